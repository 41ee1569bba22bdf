"""How a reconstruction went: the report of every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepinv_deal.solvers import SolverResult, Status

Info = TypeVar("Info", bound="ReconstructionInfo")


@dataclass(kw_only=True, repr=False)
class ReconstructionInfo:
    r"""
    How a reconstruction went, one entry per sample.

    :param torch.Tensor converged: whether ``criterion`` met the tolerance, ``(B,)``.
    :param torch.Tensor status: :class:`deepinv_deal.solvers.Status` values, ``(B,)``.
        A method that runs a fixed number of passes ends with ``FINISHED``, which is not
        convergence.
    :param torch.Tensor n_iter: outer iterations, ``(B,)``.
    :param torch.Tensor inner_iter: iterations of the inner solver in total, ``(B,)``. A
        solve that the preconditioner does alone has none.
    :param torch.Tensor criterion: what was compared with ``rtol``, ``(B,)``: for models
        with weights that follow the image their ``imbalance``, the nonlinear residual
        relative to the force of the regularizer; for dictionaries the relative change
        of the image, see :class:`SynthesisInfo`.
    :param torch.Tensor residual: the residual relative to :math:`A^{\top} y`, ``(B,)``.
    :param torch.Tensor history: ``residual`` of every iterate, ``(n, B)``.
    :param torch.Tensor lambda_reg: regularization weight, absolute, ``(B,)``.
    :param float rtol: tolerance on the criterion.
    :param torch.Tensor scale: intensity by which the data were divided, ``(B,)``.
    :param list notes: remarks on what was decided for the user.
    :param torch.Tensor sigma: noise level given to the model, in its [0, 1] units,
        ``(B,)``; ``None`` for models without.
    :param Callable compute_mask: returns the masks at the solution, see :attr:`mask`.
    """

    converged: Tensor
    status: Tensor
    n_iter: Tensor
    inner_iter: Tensor
    criterion: Tensor
    residual: Tensor
    history: Tensor
    lambda_reg: Tensor
    rtol: float
    scale: Tensor
    notes: list[str] = field(default_factory=list)
    sigma: Tensor | None = None
    compute_mask: Callable[[], Tensor] | None = field(default=None, repr=False)

    @classmethod
    def of(cls: type[Info], result: SolverResult, **settings: Any) -> Info:
        """Makes the report of a solver's result; ``settings`` are the other fields."""
        return cls(
            converged=result.converged,
            status=result.status,
            n_iter=result.n_iter,
            inner_iter=result.n_inner,
            criterion=result.weighted_residual,
            residual=result.residual,
            history=result.history,
            **settings,
        )

    @property
    def succeeded(self) -> Tensor:
        """
        Whether each sample ended as was asked, ``(B,)``: it converged, or ran the fixed
        number of passes of its method.
        """
        return self.status <= Status.CONVERGED

    @property
    def imbalance(self) -> Tensor:
        """
        Nonlinear residual of the result relative to the force of the regularizer.
        """
        return self.criterion

    @property
    def has_mask(self) -> bool:
        """Whether :attr:`mask` exists: not for models with a dictionary."""
        return self.compute_mask is not None or "mask" in self.__dict__

    @cached_property
    def mask(self) -> Tensor:
        """
        Masks at the solution, ``(B, num_filters, H, W)``; computed when asked for. Of a
        two-channel image ``(B, 2 num_filters, H, W)``, those of the first channel
        first.
        """
        if self.compute_mask is None:
            raise AttributeError("This info holds no mask.")
        with torch.no_grad():
            return self.compute_mask()

    def __repr__(self) -> str:
        """One line for each field, ``status`` in words; long ones are cut."""
        images = len(self.status)
        lines = [f"{type(self).__name__} of {images} image{'s' * (images != 1)}"]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.repr and value is not None:
                lines.append(f"  {f.name}: {_shown(f.name, value)}")
        return "\n".join(lines)

    def __getstate__(self) -> dict[str, Any]:
        # A file cannot hold the function, but what it would have returned.
        if self.compute_mask is not None:
            _ = self.mask
        return {**self.__dict__, "compute_mask": None}


#: Largest number of entries of a field that its report shows.
SHOWN = 8


def _shown(name: str, value: Any) -> str:
    """Returns a field of a report in words."""
    if not isinstance(value, Tensor):
        return str(value)
    if value.ndim > 1:
        return f"{len(value)} iterates"
    entries = value.tolist()
    if name == "status":
        entries = [Status(entry).name for entry in entries]
    words = [f"{e:.4g}" if isinstance(e, float) else str(e) for e in entries[:SHOWN]]
    return ", ".join(words) + ", ..." * (len(entries) > SHOWN)


@dataclass(kw_only=True, repr=False)
class AttentiveL1Info(ReconstructionInfo):
    r"""
    As :class:`ReconstructionInfo`, with ``n_iter`` refreshes of the mask and
    ``inner_iter`` iterations of ADMM or FISTA. Beyond:

    :param torch.Tensor energy: energy of every iterate, ``(n, B)``, if asked for (MMR).
    :param torch.Tensor gap: duality gap of every iterate but the first in the convex
        problem that it should minimise, ``(n - 1, B)``, where the energy is asked for,
        in denoising. Since that problem majorises the energy, the energy can rise by
        that much at most: :math:`E(x_{k+1}) \leq E(x_k) + \mathrm{gap}_k`.
    """

    energy: Tensor | None = None
    gap: Tensor | None = None


@dataclass(kw_only=True, repr=False)
class SynthesisInfo(ReconstructionInfo):
    r"""
    As :class:`ReconstructionInfo`, for a reconstruction with a dictionary.

    ``inner_iter`` counts the steps of sparse coding of ``"two-step"`` and is zero for
    other methods. Beyond:

    :param torch.Tensor beta: coupling of image and coefficients, ``(B,)``.
    :param str solver: the method that ran.
    :param torch.Tensor coefficients: the coefficients :math:`a` at the solution,
        ``(B, C p, H', W')``, in the scaling of
        :class:`~deepinv_deal.priors.SmoothPlusSparsePrior`: :math:`\sqrt{\beta}` times
        those of :class:`~deepinv_deal.priors.PatchSynthesisPrior`. Of volumes with
        ``slices="mean"``, :math:`3^{-1/2}` times those of all patches of the three
        stacks of slices in a row, ``(B, K, 1, 1)``.
    :param torch.Tensor objective: value of the energy, data term up to
        :math:`\tfrac12 \|y\|^2`, ``(B,)``.
    :param bool in_a_row: whether the coefficients are those of three stacks of slices.
    """

    beta: Tensor
    solver: str
    coefficients: Tensor = field(repr=False)
    objective: Tensor
    in_a_row: bool = False

    @property
    def change(self) -> Tensor:
        """Relative change of the image in the last iteration, ``(B,)``."""
        return self.criterion

    @property
    def imbalance(self) -> Tensor:
        """Raises: forces are not what the methods of dictionaries look at."""
        raise AttributeError(
            "Dictionaries stop by the change of the image, not by an imbalance of "
            "forces: see info.change."
        )
