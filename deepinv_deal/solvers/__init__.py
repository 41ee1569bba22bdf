"""Solvers: functions of tensors that know nothing of networks or physics."""

from deepinv_deal.solvers.conjugate_gradient import conjugate_gradient
from deepinv_deal.solvers.fixed_point import (
    FrozenProblem,
    LinearProblem,
    fixed_point,
)
from deepinv_deal.solvers.implicit import (
    AdjointOptions,
    Equation,
    SolvedEquation,
    anderson_depth,
    attach_gradient,
    implicit_solution,
    solve_adjoint_system,
    solve_equation,
    solve_linearized_system,
)
from deepinv_deal.solvers.precision import full_precision
from deepinv_deal.solvers.preconditioner import Fourier
from deepinv_deal.solvers.proximal import (
    ADMMState,
    LocalProx,
    admm,
    project_linf,
    proximal_gradient,
    relative_change,
    soft_threshold,
)
from deepinv_deal.solvers.result import (
    ConvergenceError,
    ConvergenceWarning,
    SolverResult,
    Status,
)
from deepinv_deal.solvers.transforms import eager

__all__ = [
    "ADMMState",
    "AdjointOptions",
    "ConvergenceError",
    "ConvergenceWarning",
    "Equation",
    "Fourier",
    "FrozenProblem",
    "LinearProblem",
    "LocalProx",
    "SolvedEquation",
    "SolverResult",
    "Status",
    "admm",
    "anderson_depth",
    "attach_gradient",
    "conjugate_gradient",
    "eager",
    "fixed_point",
    "full_precision",
    "implicit_solution",
    "project_linf",
    "proximal_gradient",
    "relative_change",
    "soft_threshold",
    "solve_adjoint_system",
    "solve_equation",
    "solve_linearized_system",
]
