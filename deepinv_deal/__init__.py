r"""
Learned, interpretable, convergent image reconstruction for deepinv.

* :mod:`deepinv_deal.models`: what to start with: :class:`DEAL`, :class:`SAFI`,
  :class:`MMR`, :class:`SmoothPlusSparse`, :class:`PatchSynthesis`
* :mod:`deepinv_deal.priors`: the learned regularizers as deepinv priors
* :mod:`deepinv_deal.problems`: what is solved: the data term and the equations
* :mod:`deepinv_deal.optim`: the deepinv optimizer that runs a prior to its fixed point
* :mod:`deepinv_deal.solvers`: conjugate gradients, fixed points, implicit
  differentiation
* :mod:`deepinv_deal.operators`, :mod:`deepinv_deal.splines`: the learned building
  blocks
* :mod:`deepinv_deal.tuning`: choosing lambda and sigma on a few images, :func:`tune`
* :mod:`deepinv_deal.interpret`: looking inside: filters, masks, convergence, stability,
  uncertainty
* :mod:`deepinv_deal.evaluation`: the published protocols
* :mod:`deepinv_deal.training`: data, losses, recipes
* :mod:`deepinv_deal.weights`: bundled weights, checkpoints, converters
"""

from importlib.metadata import version

from lazy_loader import attach_stub

# A name is imported when it is first asked for; __init__.pyi says from where. So the
# command line can answer without torch, and a part is imported without the others.
__getattr__, __dir__, _ = attach_stub(__name__, __file__)

__version__ = version("deepinv-deal")

__all__ = [
    "DEAL",
    "MMR",
    "SAFI",
    "AdjointOptions",
    "AttentiveL1Info",
    "ConvergenceError",
    "ConvergenceWarning",
    "DEALPrior",
    "FixedPointOptim",
    "FrozenIteration",
    "KnownPhysics",
    "MMRPrior",
    "PatchSynthesis",
    "PatchSynthesisPrior",
    "ReconstructionInfo",
    "SAFIPrior",
    "SmoothPlusSparse",
    "SmoothPlusSparsePrior",
    "SolverOptions",
    "SynthesisInfo",
    "Trial",
    "TuningResult",
    "__version__",
    "keep_freed_memory",
    "tune",
]
