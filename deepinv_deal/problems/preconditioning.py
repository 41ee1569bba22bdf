"""Preconditioners for the quadratic problems of attentive priors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deepinv_deal._batch import expand, select
from deepinv_deal.operators import MultiConvOperator
from deepinv_deal.operators.multi_conv import wrapped
from deepinv_deal.problems.data_term import DataTerm, FrozenCurvature
from deepinv_deal.problems.options import Preconditioner
from deepinv_deal.solvers import SolverResult
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.preconditioner import (
    LARGEST_MISFIT,
    PreconditionedSolver,
    bounded,
    faithful,
    from_fourier,
    to_fourier,
)

#: Masks are flat if they deviate from their means by at most this fraction of them.
FLAT = 0.1


class Preconditioning:
    r"""
    Preconditioners for the systems :math:`H + \lambda W^{\top} m^2 W`, all samples.

    * ``"circulant"``: :math:`H` is replaced by the closest circular convolution and the
      mask of every filter by its mean; one Fourier transform each way.
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
    :param MultiConvOperator W: the filters.
    """

    @torch.no_grad()
    def __init__(
        self,
        choice: Preconditioner,
        data: DataTerm,
        lambda_reg: Tensor,
        W: MultiConvOperator,
    ):
        self.W, self.lambda_reg = W, lambda_reg
        self.complex_pair, batch = data.complex_pair, len(data.b)
        nowhere = torch.zeros(batch, dtype=torch.bool, device=data.b.device)
        self.use_circulant, usable, self.exact = nowhere, nowhere, nowhere
        #: The normal operator, in its fastest form.
        self.H: LinearMap = data.normal
        if choice != "none":
            self.responses = W.impulse_responses()
            self.H = data.fast_normal
        if choice != "none" and data.H is None:
            self.diagonal = torch.ones_like(data.b)
            channels = 1 if self.complex_pair else data.b.shape[1]
            self.symbol = self.diagonal[:, :channels]
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
            self.use_circulant = by_symbol <= by_diagonal
            usable = ~nowhere
            if choice == "auto":
                identity = faithful(torch.maximum(by_symbol, by_diagonal))
                misfit = torch.minimum(by_symbol, by_diagonal)
                usable = (misfit < LARGEST_MISFIT) & ~identity
                self.exact = data.H.circulant
                self.use_circulant = self.use_circulant | identity
            else:
                self.use_circulant = usable if choice == "circulant" else nowhere
        self.solver = PreconditionedSolver(usable, on_trial=choice == "auto")

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
        deviation, mean = torch.std_mean(squared_mask, (2, 3), correction=0)
        return (deviation <= FLAT * mean).view(len(self.exact), -1).all(1)

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
            symbol = self._filter_symbol(squared_mask)
            circulant = bounded(own_symbol + weight * symbol)
        energy = self.responses.square().sum((-2, -1))[:, :, None, None]  # (C, N, 1, 1)
        filters = F.conv2d(squared_mask, energy).view_as(self.diagonal)
        divisor = bounded(own + weight * filters)

        def apply(r: Tensor) -> Tensor:
            if circulant is None:
                return r / divisor
            spectrum = to_fourier(r, self.complex_pair) / circulant
            image = from_fourier(spectrum, r, self.complex_pair)
            return select(self.use_circulant, image, r / divisor)

        return apply

    def _filter_symbol(self, squared_mask: Tensor) -> Tensor:
        r"""Eigenvalues of :math:`W^{\top} m^2 W` for the mean masks, per channel."""
        batch = len(self.diagonal)
        mean = squared_mask.mean((2, 3)).view(batch, -1, squared_mask.shape[1]).mean(1)
        weighted = mean[:, None, :, None, None] * self.responses  # (B, C, N, n, n)
        own = self.W.adjoint(weighted.flatten(0, 1)).unflatten(0, weighted.shape[:2])
        kernels = own.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)  # (B, C, n, n)
        reach = kernels.shape[-1] // 2
        placed = wrapped(kernels, *self.diagonal.shape[-2:])
        centred = placed.roll((-reach, -reach), (-2, -1))
        return torch.fft.fft2(centred).real.clamp_min(0)
