"""Settings of the solvers, with the same names for all models."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

from deepinv_deal.problems.checks import check_choice

Preconditioner = Literal["auto", "grouped", "circulant", "diagonal", "none"]
PRECONDITIONERS: tuple[str, ...] = ("auto", "grouped", "circulant", "diagonal", "none")

#: Precisions of the convolutions in inner solves; ``None``: that of the weights.
INNER_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, "tf32")

#: Tolerance on the imbalance of forces. In denoising it is the share of the removed
#: noise that is still uncertain.
DEFAULT_RTOL = 2e-2


@dataclass(frozen=True)
class SolverOptions:
    r"""
    How the problems with frozen weights are solved.

    Not every setting exists for every model: one that does not is an error, unless it
    has its default.

    |sep|

    :Example:

    >>> from deepinv_deal import DEAL, SolverOptions
    >>> model = DEAL(solver=SolverOptions(anderson=0, preconditioner="none"))
    >>> model.solver.inner_max_iter
    1000

    :param str method: ``"auto"`` or the name of a method. DEAL: ``"cg"``, with bounds
        ``"admm"``. SAFI, MMR: ``"admm"``, ``"fista"`` (on the dual, denoising only).
        Dictionaries: ``"admm"``, ``"fista"``, ``"ipalm"``, PatchSynthesis also
        ``"two-step"`` and ``"coordinate-descent"``.
    :param int inner_max_iter: largest number of inner iterations in each solve (DEAL,
        SAFI, MMR).
    :param float forcing: factor by which each inner solve reduces the residual at
        least (DEAL, SAFI, MMR). Large values refresh the mask often; the fixed point is
        the same.
    :param int anderson: depth of the safeguarded Anderson acceleration, ``0`` for none;
        ``None``: 5 (DEAL without bounds), see
        :func:`deepinv_deal.solvers.fixed_point`. In inverse problems it starts when the
        imbalance of forces is below 0.02.
    :param str preconditioner: ``"auto"``, ``"grouped"``, ``"circulant"``,
        ``"diagonal"``, ``"none"`` (DEAL), see
        :class:`deepinv_deal.problems.Preconditioning`.
    :param torch.dtype inner_dtype: precision of the convolutions in the inner solves
        (DEAL), for example ``torch.bfloat16``, or ``"tf32"``, which NVIDIA's GPUs
        compute much faster than float32; masks, residuals and everything else stay in
        that of the weights, so the result is as accurate. ``None``: that of the
        weights; TF32 is then switched off while the model runs, whatever
        ``torch.backends`` says, since residuals stagnate with it.
    :raises ValueError: for values outside of these.
    """

    method: str = "auto"
    inner_max_iter: int = 1000
    forcing: float = 0.5
    anderson: int | None = None
    preconditioner: Preconditioner = "auto"
    inner_dtype: torch.dtype | Literal["tf32"] | None = None

    def __post_init__(self) -> None:
        if self.inner_max_iter < 1:
            raise ValueError(
                f"inner_max_iter must be positive, got {self.inner_max_iter}."
            )
        if not 0 < self.forcing < 1:
            raise ValueError(f"forcing must lie in (0, 1), got {self.forcing}.")
        if self.anderson is not None and self.anderson < 0:
            raise ValueError(f"anderson must not be negative, got {self.anderson}.")
        check_choice("preconditioner", self.preconditioner, PRECONDITIONERS)
        check_choice("inner_dtype", self.inner_dtype, INNER_DTYPES)

    @classmethod
    def of(cls, solver: str | SolverOptions) -> SolverOptions:
        """
        Returns options, made from the name of a method where only that is given.

        :param str, SolverOptions solver: the argument.
        :raises TypeError: if it is neither.
        """
        if isinstance(solver, str):
            return cls(method=solver)
        if not isinstance(solver, cls):
            raise TypeError(
                "solver must be the name of a method or SolverOptions, got "
                f"{type(solver).__name__}."
            )
        return solver

    def check(
        self, owner: str, methods: tuple[str, ...], settings: tuple[str, ...]
    ) -> None:
        """
        Checks that all settings that differ from their defaults exist for a model.

        :param str owner: name of the model or prior, for the message.
        :param tuple methods: names of its methods, besides ``"auto"``.
        :param tuple settings: names of its further settings.
        :raises ValueError: if a setting does not exist.
        """
        if self.method not in ("auto", *methods):
            raise ValueError(
                f"solver={self.method!r} is no method of {owner}: choose one of "
                f"{('auto', *methods)}."
            )
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in ("method", *settings) or value == option.default:
                continue
            raise ValueError(
                f"{option.name}={value!r} is no setting of {owner}, which has "
                f"{', '.join(settings) or 'none but the method'}. Leave it out."
            )
