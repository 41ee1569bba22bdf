"""Where the public names are: what ``__init__.py`` imports on demand."""

from . import evaluation as evaluation
from . import files as files
from . import interpret as interpret
from . import models as models
from . import operators as operators
from . import optim as optim
from . import priors as priors
from . import problems as problems
from . import solvers as solvers
from . import splines as splines
from . import training as training
from . import tuning as tuning
from . import weights as weights
from ._memory import keep_freed_memory
from .models import (
    DEAL,
    MMR,
    SAFI,
    AttentiveL1Info,
    PatchSynthesis,
    ReconstructionInfo,
    SmoothPlusSparse,
    SynthesisInfo,
)
from .optim import FixedPointOptim, FrozenIteration
from .priors import (
    DEALPrior,
    MMRPrior,
    PatchSynthesisPrior,
    SAFIPrior,
    SmoothPlusSparsePrior,
)
from .problems import KnownPhysics, SolverOptions
from .solvers import AdjointOptions, ConvergenceError, ConvergenceWarning
from .tuning import Trial, TuningResult, tune

__version__: str

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
