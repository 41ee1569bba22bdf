"""What users import: reconstruction models, denoisers at the same time."""

from deepinv_deal.models.deal import DEAL, ReconstructionInfo

__all__ = ["DEAL", "ReconstructionInfo"]
