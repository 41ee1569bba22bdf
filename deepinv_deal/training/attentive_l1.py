"""The training of SAFI and MMR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from scipy.fft import idctn
from torch import Tensor, nn

from deepinv_deal.models.safi import MMR, SAFI
from deepinv_deal.priors import AttentiveL1Prior, MMRPrior, SAFIPrior
from deepinv_deal.problems import SolverOptions
from deepinv_deal.solvers import AdjointOptions
from deepinv_deal.training.data import Problems
from deepinv_deal.training.engine import Trainer
from deepinv_deal.training.losses import mask_drift
from deepinv_deal.training.recipes import AttentiveL1Recipe
from deepinv_deal.training.recorded import Recorded

#: Models by their names in the recipe.
MODELS: dict[str, type[SAFI] | type[MMR]] = {"safi": SAFI, "mmr": MMR}

#: First weight lambda, and first scale of MMR's potential, for a noise level of 1: the
#: best of a few with the filters below.
FIRST_LAMBDA, FIRST_SCALE = 0.04, 0.05


@torch.no_grad()
def start_from_cosines(prior: AttentiveL1Prior, sigma: float) -> None:
    r"""
    Makes a prior with random weights one that denoises.

    The first layer of W becomes the discrete cosine transform, by rising frequency, and
    the second one the identity (minus the mean over 7 x 7 pixels, for all kernels of W
    have zero mean). Filters beyond the 48 that are not constant stay random. The mask
    falls with the local mean of the absolute responses: for MMR by the scale of its
    potential, for SAFI by a network of the same cosines, absolute values, and means
    over 7 x 7 pixels twice. Thresholds are proportional to the noise level.

    :param AttentiveL1Prior prior: the prior, changed in place.
    :param float sigma: noise level of images in [0, 1].
    """
    first, second = prior.W.weight
    _cosines(first)
    _identity(second)
    prior.lambda_reg.fill_(FIRST_LAMBDA * sigma)
    if isinstance(prior, MMRPrior):
        prior.potential.scale.fill_(FIRST_SCALE / sigma)
    elif isinstance(prior, SAFIPrior):
        network = prior.mask_network
        _cosines(network.V[0])
        for kernel, scale in ((network.V[1], 1.0), (network.V[2], 0.1 / sigma)):
            kernel.zero_()
            kernel.diagonal().fill_(scale / kernel[0, 0].numel())
        t = prior.splines()[0].knots
        curves = (t.abs(), t, (2 - 40 * t).clamp(-2, 2))
        for spline, curve in zip(prior.splines(), curves, strict=True):
            spline.coefficients.copy_(curve)


def _cosines(kernels: Tensor) -> None:
    """Sets kernels ``(N, 1, k, k)`` to those of the discrete cosine transform."""
    k = kernels.shape[-1]
    waves = sorted(((i, j) for i in range(k) for j in range(k)), key=sum)[1:]
    for kernel, wave in zip(kernels, waves, strict=False):
        spectrum = torch.zeros(k, k, dtype=torch.float64)
        spectrum[wave] = 1
        kernel.copy_(torch.from_numpy(idctn(spectrum.numpy(), norm="ortho")))


def _identity(kernels: Tensor) -> None:
    """Sets kernels ``(N, N, k, k)`` to those of the identity."""
    kernels.zero_()
    kernels.diagonal()[kernels.shape[-1] // 2, kernels.shape[-1] // 2] = 1


class AttentiveL1Trainer(Trainer[AttentiveL1Recipe, AttentiveL1Prior]):
    """
    Trains a :class:`deepinv_deal.priors.SAFIPrior` or
    :class:`deepinv_deal.priors.MMRPrior`; see :class:`Trainer`.

    A subclass of :class:`deepinv_deal.priors.AttentiveL1Prior` of one's own, whose
    constructor takes ``num_filters`` and ``sigma``, is trained by a subclass that has
    it as ``prior_type``.

    :param AttentiveL1Recipe recipe: settings.
    :param bool resume: go on from ``state.pt`` if there is one.
    """

    #: Class of the prior; ``None``: that of the recipe's model.
    prior_type: ClassVar[type[AttentiveL1Prior] | None] = None

    def new_prior(self) -> AttentiveL1Prior:
        """Returns a prior whose filters are those of the discrete cosine transform."""
        recipe = self.recipe
        kind = self.prior_type or MODELS[recipe.model].prior_type
        prior = kind(recipe.num_filters, recipe.sigma)
        start_from_cosines(prior, recipe.sigma)
        return prior

    def adapt(self, prior: AttentiveL1Prior) -> None:
        """Rescales weights that were trained for another noise level."""
        sigma = torch.tensor(self.recipe.sigma)  # exactly the level of such a training
        prior.rescale(float(sigma / (self.recipe.init_sigma or prior.sigma)))
        prior.sigma.copy_(sigma)

    def describe(self, prior: AttentiveL1Prior) -> dict[str, Any]:
        """Returns what the recipe says about a prior, by the names it uses."""
        return {"num_filters": prior.num_filters}

    def new_model(self, prior: AttentiveL1Prior) -> SAFI | MMR:
        """Returns the model around a prior, which validation calls."""
        return MODELS[self.recipe.model](prior=prior, warn=False)

    @cached_property
    def solver(self) -> SAFI | MMR:
        """The model whose solves are differentiated."""
        recipe = self.recipe
        return MODELS[recipe.model](
            prior=self.prior,
            warn=False,
            scale=None,
            rtol=recipe.rtol,
            solver=SolverOptions(inner_max_iter=recipe.inner_max_iter),
            adjoint=AdjointOptions(
                recipe.jacobian_free,
                recipe.adjoint_rtol,
                smoothing=recipe.adjoint_smoothing,
            ),
        )

    @property
    def chooses_lambda(self) -> bool:
        """Whether ``lambda_reg`` is chosen anew for the best weights at the end."""
        return True

    def parameter_groups(self) -> Sequence[tuple[float, Sequence[nn.Parameter]]]:
        """Returns factors on the learning rate, with the parameters they are for."""
        weight = self.prior.lambda_reg
        curves = [spline.coefficients for spline in self.prior.splines()]
        if isinstance(self.prior, MMRPrior):
            curves.append(self.prior.potential.scale)
        grouped = {id(p) for p in (weight, *curves)}
        kernels = [p for p in self.prior.parameters() if id(p) not in grouped]
        dense = [p for p in kernels if p.ndim == 4 and p.shape[1] > 1]
        thin = [p for p in kernels if p.ndim != 4 or p.shape[1] == 1]
        return [(1.0, thin), (0.1, dense), (5.0, curves), (0.01, [weight])]

    def after_step(self) -> None:
        """Keeps the weight positive: at zero it would have no gradient."""
        with torch.no_grad():
            self.prior.lambda_reg.clamp_(min=1e-8)

    def loss(self, problems: Problems, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """
        Returns the loss, and what the solver can start from when the batch returns.

        :param Problems problems: the batch.
        :param torch.Tensor start: the last pairs of image and dual; ``None`` for a new
            batch.
        """
        recipe = self.recipe
        problem = self.solver.pose(problems.y)
        recorded = Recorded(problem.equation)
        p_hat, result = self.solver.solve(
            replace(problem, equation=recorded),
            start,
            max_iter=recipe.depth if start is None else recipe.warm_depth,
        )
        loss = (recorded.image(p_hat) - problems.x).square().flatten(1).sum(1)
        if recipe.drift:
            # Both masks have gradients: the mask shall depend less on the image. If the
            # previous one were constant, the mask would lag behind instead.
            last, before = map(recorded.mask, recorded.last_two(result))
            loss = loss + recipe.drift * mask_drift(last, before)
        return loss.mean(), result.x
