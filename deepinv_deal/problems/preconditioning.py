"""Preconditioners for the quadratic problems of attentive priors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepinv_deal._batch import expand, select
from deepinv_deal.problems.data_term import DataTerm, FrozenCurvature
from deepinv_deal.problems.options import Preconditioner
from deepinv_deal.solvers import SolverResult
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.preconditioner import (
    LARGEST_MISFIT,
    PreconditionedSolver,
    bounded,
    faithful,
)

if TYPE_CHECKING:
    from deepinv_deal.problems.quadratic import AttentiveQuadratic, SlicedQuadratic

#: Masks are flat if they deviate from their means by at most this fraction of them.
FLAT = 0.1

#: A model that predicts H worse than this is tried once only.
LARGEST_MISFIT_AGAIN = 0.4


class Preconditioning:
    r"""
    Preconditioners for the systems :math:`H + \lambda W^{\top} m^2 W`, all samples.

    * ``"circulant"``: :math:`H` is replaced by the closest circular convolution and the
      mask of every filter by its mean; one Fourier transform each way. Where that
      convolution misfits by some fraction, it is raised by that fraction of its mean.
    * ``"diagonal"``: both terms are replaced by their diagonals, where a filter counts
      with its energy and its mask is taken to be smooth.
    * ``"auto"``: for every sample the one whose model of :math:`H` fits better, on
      trial (``PreconditionedSolver``); none where neither fits, and for denoising,
      which is well conditioned. The first system, whose masks are those of an empty
      image and flat, is solved with the circulant one where that models :math:`H`
      exactly: for gray images only the borders are left for conjugate gradients.
    * ``"none"``.

    Borders, the shape of the mask inside an image and coupled colour channels are left
    out: preconditioners change the speed, not the solution.

    :param str choice: see above.
    :param DataTerm data: the data term, which knows what :math:`H` resembles.
    :param torch.Tensor lambda_reg: weights, ``(B,)``.
    :param AttentiveQuadratic regularizer: the regularizer.
    """

    @torch.no_grad()
    def __init__(
        self,
        choice: Preconditioner,
        data: DataTerm,
        lambda_reg: Tensor,
        regularizer: AttentiveQuadratic | SlicedQuadratic,
    ):
        self.regularizer, self.lambda_reg = regularizer, lambda_reg
        batch = len(data.b)
        nowhere = torch.zeros(batch, dtype=torch.bool, device=data.b.device)
        self.use_circulant, usable, self.exact = nowhere, nowhere, nowhere
        again: Tensor | None = None
        #: The normal operator, in its fastest form.
        self.H: LinearMap = data.normal
        if choice != "none":
            self.fourier, self.H = data.fourier, data.fast_normal
        if choice != "none" and data.H is None:
            self.diagonal = torch.ones_like(data.b)
            self.symbol = self.fourier.real_spectrum(self.diagonal)
            self.use_circulant = ~nowhere if choice != "diagonal" else nowhere
            usable = nowhere if choice == "auto" else ~nowhere
            self.exact = ~nowhere if choice == "auto" else nowhere
            if not data.quadratic:  # weights of measurements vary
                usable, self.exact = ~nowhere, nowhere
                self.use_circulant = ~nowhere if choice == "circulant" else nowhere
        elif choice != "none":
            assert data.H is not None
            self.symbol, by_symbol = data.H.transfer
            self.diagonal, by_diagonal = data.H.diagonal
            # Small eigenvalues of a model are not known better than it predicts H.
            shift = by_symbol * self.symbol.flatten(1).mean(1)
            self.symbol = self.symbol + expand(shift, self.symbol)
            self.use_circulant = by_symbol <= by_diagonal
            usable = ~nowhere
            if choice == "auto":
                identity = faithful(torch.maximum(by_symbol, by_diagonal))
                misfit = torch.minimum(by_symbol, by_diagonal)
                again = misfit < LARGEST_MISFIT_AGAIN
                usable = (misfit < LARGEST_MISFIT) & ~identity
                self.exact = data.H.circulant
                self.use_circulant = self.use_circulant | identity
            else:
                self.use_circulant = usable if choice == "circulant" else nowhere
        self.solver = PreconditionedSolver(
            usable, on_trial=choice == "auto", again=again
        )

    def solve(
        self,
        A: LinearMap,
        r: Tensor,
        rtol: Tensor,
        max_iter: int,
        squared_mask: Tensor,
        active: Tensor | None = None,
        curvature: FrozenCurvature | None = None,
    ) -> SolverResult:
        """
        Solves a system with the given squared masks ``(B * parts, N, H, W)`` and
        curvature of the data term, if it is not :math:`H`; see
        ``PreconditionedSolver.solve``.
        """
        return self.solver.solve(
            A,
            r,
            rtol,
            max_iter,
            lambda: self.at(squared_mask, curvature),
            active,
            lambda: self.exact & self._flat(squared_mask),
        )

    def _flat(self, squared_mask: Tensor) -> Tensor:
        """Whether the masks of a sample hardly vary over the image, ``(B,)``."""
        flat = torch.ones_like(self.exact)
        for mask in self.regularizer.masks(squared_mask):
            deviation, mean = torch.std_mean(mask, (2, 3), correction=0)
            flat = flat & (deviation <= FLAT * mean).view(len(flat), -1).all(1)
        return flat

    @torch.no_grad()
    def at(
        self, squared_mask: Tensor, curvature: FrozenCurvature | None = None
    ) -> LinearMap:
        """
        Returns the preconditioner for the squared masks ``(B * parts, N, H, W)``, and
        the curvature of the data term if it is not :math:`H`.
        """
        weight = expand(self.lambda_reg, self.diagonal)
        own, own_symbol = self.diagonal, self.symbol
        if curvature is not None:
            own = own * curvature.density
            mean = curvature.density.flatten(1).mean(1)
            own_symbol = own_symbol * expand(mean, own_symbol)
        circulant: Tensor | None = None
        if self.use_circulant.any():
            symbol = self.regularizer.symbol(squared_mask, len(self.diagonal))
            if 1 < symbol.shape[1] < own_symbol.shape[1]:  # one image stands for all
                slices = own_symbol.shape[1] // symbol.shape[1]
                symbol = symbol.repeat(1, slices, 1, 1)
            circulant = bounded(own_symbol + weight * symbol)
        filters = self.regularizer.diagonal(squared_mask, len(self.diagonal))
        divisor = bounded(own + weight * filters)

        def apply(r: Tensor) -> Tensor:
            if circulant is None:
                return r / divisor
            image = self.fourier.inverse(self.fourier.spectrum(r) / circulant)
            return select(self.use_circulant, image, r / divisor)

        return apply
