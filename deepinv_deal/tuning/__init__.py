r"""
Choosing the regularization weight, and a second parameter, on a few images.

:func:`tune` looks for the :math:`\lambda` (and, on request, the :math:`\sigma` or
:math:`\beta` of the model) with the best mean score on a validation set. With ground
truth the score is any deepinv metric; without, it is Stein's unbiased risk estimate.
"""

from deepinv_deal.tuning.report import Trial, TuningResult
from deepinv_deal.tuning.run import tune
from deepinv_deal.tuning.search import Search

__all__ = ["Search", "Trial", "TuningResult", "tune"]
