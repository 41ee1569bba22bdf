"""What is solved: the data term, and the equations of all models."""

from deepinv_deal.problems.bounds import Bounds
from deepinv_deal.problems.data_term import DataTerm, operator_term
from deepinv_deal.problems.dictionary import DictionaryEquation
from deepinv_deal.problems.grouped import GroupedQuadratic
from deepinv_deal.problems.l1 import AttentiveL1, AttentiveL1Equation
from deepinv_deal.problems.layout import ImageLayout
from deepinv_deal.problems.normal_operator import KnownPhysics, NormalOperator
from deepinv_deal.problems.options import SolverOptions
from deepinv_deal.problems.penalties import (
    GroupPenalty,
    L1Penalty,
    WeaklyConvexPenalty,
)
from deepinv_deal.problems.preconditioning import Preconditioning
from deepinv_deal.problems.problem import Problem
from deepinv_deal.problems.quadratic import (
    AttentiveEquation,
    AttentiveQuadratic,
    SlicedQuadratic,
)
from deepinv_deal.problems.sampled_convolution import SampledConvolution
from deepinv_deal.problems.smoothed_l1 import SmoothedL1Equation
from deepinv_deal.problems.synthesis import SynthesisProblem

__all__ = [
    "AttentiveEquation",
    "AttentiveL1",
    "AttentiveL1Equation",
    "AttentiveQuadratic",
    "Bounds",
    "DataTerm",
    "DictionaryEquation",
    "GroupPenalty",
    "GroupedQuadratic",
    "ImageLayout",
    "KnownPhysics",
    "L1Penalty",
    "NormalOperator",
    "Preconditioning",
    "Problem",
    "SampledConvolution",
    "SlicedQuadratic",
    "SmoothedL1Equation",
    "SolverOptions",
    "SynthesisProblem",
    "WeaklyConvexPenalty",
    "operator_term",
]
