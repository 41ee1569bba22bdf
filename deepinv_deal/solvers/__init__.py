"""Solvers: functions of tensors that know nothing of networks or physics."""

from deepinv_deal.solvers.conjugate_gradient import conjugate_gradient
from deepinv_deal.solvers.fixed_point import FrozenProblem, fixed_point
from deepinv_deal.solvers.implicit import (
    AdjointOptions,
    Equation,
    attach_gradient,
    implicit_solution,
    solve_adjoint_system,
    solve_equation,
)
from deepinv_deal.solvers.result import ConvergenceWarning, SolverResult, Status

__all__ = [
    "AdjointOptions",
    "ConvergenceWarning",
    "Equation",
    "FrozenProblem",
    "SolverResult",
    "Status",
    "attach_gradient",
    "conjugate_gradient",
    "fixed_point",
    "implicit_solution",
    "solve_adjoint_system",
    "solve_equation",
]
