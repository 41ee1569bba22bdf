"""Preconditioners for the quadratic problems of attentive priors."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepinv_deal._batch import expand, read_counts, select
from deepinv_deal.problems.data_term import DataTerm, FrozenCurvature
from deepinv_deal.problems.grouped import GROUPS
from deepinv_deal.problems.options import Preconditioner
from deepinv_deal.solvers import SolverResult
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.preconditioner import (
    LARGEST_MISFIT,
    InnerSolve,
    Kind,
    PreconditionedSolver,
    bounded,
    convolve,
    faithful,
)

if TYPE_CHECKING:
    from deepinv_deal.problems.quadratic import AttentiveQuadratic, SlicedQuadratic

#: Masks are flat if they deviate from their means by at most this fraction of them.
FLAT = 0.1

#: A model that predicts H worse than this is tried once only.
LARGEST_MISFIT_AGAIN = 0.4


#: Accuracy of the inner solves: where H is a formula, and where they apply a physics.
INNER_RTOL, INNER_RTOL_PHYSICS = 0.1, 0.3

#: Times of an inner iteration without the physics, and of a physics that is no formula,
#: in filters of the regularizer. The latter is not known; this is assumed.
INNER_COST, PHYSICS_COST = 2, 16

#: Filters from which their groups are much less work.
LEAST_FILTERS = 4 * GROUPS

#: Numbers in an unknown from which that also holds on accelerators, where the many
#: small operations of an inner iteration wait for the host: an estimate, not measured.
LARGE_ON_ACCELERATORS = 2**20


class Preconditioning:
    r"""
    Preconditioners for the systems :math:`H + \lambda W^{\top} m^2 W`, all samples.

    * ``"circulant"``: :math:`H` is replaced by the closest circular convolution and the
      mask of every filter by its mean; one Fourier transform each way. Where that
      convolution misfits by some fraction, it is raised by that fraction of its mean.
    * ``"diagonal"``: both terms are replaced by their diagonals, where a filter counts
      with its energy and its mask is taken to be smooth.
    * ``"grouped"``: :math:`H` stays, and four groups of filters share one mask each
      (:class:`~deepinv_deal.problems.GroupedQuadratic`). This system is solved
      roughly, by conjugate gradients within those of the model, with the better of the
      two above. So the filters are applied a few times only, whatever makes :math:`H`
      difficult; the physics may be applied more often.
    * ``"auto"``: ``"grouped"``. Where :math:`H` is a physics that no formula replaces,
      the better of the first two is on trial against it (``PreconditionedSolver``) if
      it resembles :math:`H`. For few filters, and for small images on accelerators,
      which wait for launches, only this one is tried; nothing for denoising, which is
      well conditioned. The first system, whose masks are those of an empty image and
      flat, is then solved with the circulant one where that models :math:`H` exactly.
    * ``"none"``.

    Preconditioners change the speed, not the solution.

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
        nowhere = torch.zeros(len(data.b), dtype=torch.bool, device=data.b.device)
        none = nowhere.long()
        #: Samples of which the circulant model is exact, which helps the first system.
        self.exact = nowhere
        #: The normal operator, in its fastest form.
        self.H: LinearMap = data.normal
        if choice == "none":
            self.solver = PreconditionedSolver(none)
            return
        self.H = data.fast_normal
        usable, again = self._find_formulas(data)
        if choice in ("circulant", "diagonal"):
            self.use_circulant = torch.full_like(nowhere, choice == "circulant")
            self.exact = nowhere
            self.solver = PreconditionedSolver(none + Kind.DIRECT)
        elif choice == "grouped":
            self.solver = PreconditionedSolver(none + Kind.INNER)
        elif self._grouping_pays(data.b):
            kept, usable = none + Kind.INNER, usable & ~self.closed
            self.solver = PreconditionedSolver(kept, usable, again)
        else:
            self.solver = PreconditionedSolver(none, usable, again)

    def _find_formulas(self, data: DataTerm) -> tuple[Tensor, Tensor]:
        """
        Looks for formulas that resemble H, and returns for which samples the better of
        them is worth a trial, and for which a second one, ``(B,)``.
        """
        self.fourier = data.fourier
        everywhere = torch.ones_like(self.exact)
        if data.H is None:
            self.diagonal = torch.ones_like(data.b)
            self.symbol = self.fourier.real_spectrum(self.diagonal)
            # Weights of measurements, if there are any, vary over the image.
            self.use_circulant = self.exact = everywhere & data.quadratic
            self.closed = self.fits = everywhere
            return ~self.exact, everywhere
        self.symbol, by_symbol = data.H.transfer
        self.diagonal, by_diagonal = data.H.diagonal
        # Small eigenvalues of a model are not known better than it predicts H.
        shift = by_symbol * self.symbol.flatten(1).mean(1)
        self.symbol = self.symbol + expand(shift, self.symbol)
        identity = faithful(torch.maximum(by_symbol, by_diagonal))
        misfit = torch.minimum(by_symbol, by_diagonal)
        self.use_circulant = (by_symbol <= by_diagonal) | identity
        self.exact = data.H.circulant
        #: Samples for which H is a formula, whose time does not count.
        self.closed = data.H.is_formula & data.quadratic
        #: Samples for which one of the two resembles H.
        self.fits = misfit < LARGEST_MISFIT
        return self.fits & ~identity, misfit < LARGEST_MISFIT_AGAIN

    def _grouping_pays(self, b: Tensor) -> bool:
        few = self.regularizer.W.out_channels < LEAST_FILTERS
        return not few and (
            b.device.type == "cpu" or b.numel() >= LARGE_ON_ACCELERATORS
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
        Solves a system with the given squared masks ``(B * parts, N, H, W)``, and
        curvature of the data term, if it is not :math:`H`; see
        ``PreconditionedSolver.solve``.
        """
        return self.solver.solve(
            A,
            r,
            rtol,
            max_iter,
            lambda used: self.at(squared_mask, curvature, used),
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
        self,
        squared_mask: Tensor,
        curvature: FrozenCurvature | None = None,
        used: Tensor | None = None,
    ) -> tuple[LinearMap, InnerSolve | None]:
        """
        Returns the preconditioner, and the iteration in it, if any.

        :param torch.Tensor squared_mask: squared masks, ``(B * parts, N, H, W)``.
        :param Callable curvature: that of the data term, if it is not :math:`H`.
        :param torch.Tensor used: the ``Kind`` that each sample uses, ``(B,)``;
            ``None``: the one it has.
        """
        used = self.solver.kept if used is None else used
        direct = self._direct(squared_mask, curvature)
        inner = used == Kind.INNER
        if not inner.any():
            return direct, None
        regularizer = self.regularizer.grouped(squared_mask)
        H: LinearMap = self.H if curvature is None else curvature

        def A(v: Tensor) -> Tensor:
            return H(v) + expand(self.lambda_reg, v) * regularizer(v)

        rtol = torch.where(self.closed, INNER_RTOL, INNER_RTOL_PHYSICS)
        rtol = rtol.to(self.diagonal).where(inner, torch.inf)
        physics = torch.where(self.closed, 0.0, PHYSICS_COST)
        cost = (physics + INNER_COST) / (physics + self.regularizer.W.out_channels)
        solve = InnerSolve(A, rtol, cost, lambda r: select(self.fits, direct(r), r))
        return (lambda r: select(inner, solve(r), direct(r))), solve

    def _direct(
        self,
        squared_mask: Tensor,
        curvature: FrozenCurvature | None,
    ) -> LinearMap:
        """The better of the two formulas for every sample."""
        some, all_of_them = self._circulant_ones
        ways: list[LinearMap] = []
        if some:
            inverse = self._inverse_symbol(squared_mask, curvature)
            ways.append(lambda r: convolve(inverse, r, self.fourier))
        if not all_of_them:
            divisor = self._divisor(squared_mask, curvature)
            ways.append(lambda r: r / divisor)
        if len(ways) == 1:
            return ways[0]
        return lambda r: select(self.use_circulant, *(way(r) for way in ways))

    @cached_property
    def _circulant_ones(self) -> tuple[bool, bool]:
        """Whether any sample uses the circulant formula, and whether all do."""
        (number,) = read_counts([self.use_circulant])
        return number > 0, number == len(self.use_circulant)

    def _inverse_symbol(
        self,
        squared_mask: Tensor,
        curvature: FrozenCurvature | None,
    ) -> Tensor:
        """The eigenvalues of the circulant formula's inverse."""
        own = self.symbol
        if curvature is not None:
            own = own * expand(curvature.density.flatten(1).mean(1), own)
        symbol = self.regularizer.symbol(squared_mask, len(own))
        if 1 < symbol.shape[1] < own.shape[1]:  # one image stands for all
            symbol = symbol.repeat(1, own.shape[1] // symbol.shape[1], 1, 1)
        return 1 / bounded(own + expand(self.lambda_reg, own) * symbol)

    def _divisor(
        self,
        squared_mask: Tensor,
        curvature: FrozenCurvature | None,
    ) -> Tensor:
        """The diagonal of the system."""
        own = self.diagonal
        if curvature is not None:
            own = own * curvature.density
        filters = self.regularizer.diagonal(squared_mask, len(own))
        return bounded(own + expand(self.lambda_reg, own) * filters)
