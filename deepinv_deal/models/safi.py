"""SAFI and MMR: reconstruction models and denoisers in one, with attentive l1 terms."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._warnings import warn
from deepinv_deal.models.base import ReconstructionModel, checked_prior
from deepinv_deal.models.info import AttentiveL1Info
from deepinv_deal.priors.safi import AttentiveL1Prior, MMRPrior, SAFIPrior
from deepinv_deal.problems import AttentiveL1Equation, DataTerm, Problem
from deepinv_deal.solvers import ConvergenceWarning, full_precision
from deepinv_deal.weights import load

#: Noise levels that differ from that of the training by less, relative, are equal.
SAME_LEVEL = 1e-3


class AttentiveL1Model(ReconstructionModel):
    """
    What :class:`SAFI` and :class:`MMR` have in common; use these.
    """

    prior: AttentiveL1Prior
    prior_type: type[AttentiveL1Prior]
    own_bounds = (0.0, 1.0)
    info_type = AttentiveL1Info

    def __init__(
        self,
        num_filters: int | None = None,
        *,
        prior: AttentiveL1Prior | None = None,
        pretrained: str | os.PathLike[str] | None = None,
        **settings: Any,
    ):
        if prior is None and pretrained is not None:
            prior = load(pretrained, self.prior_type)
        elif prior is None:
            prior = self.prior_type(64 if num_filters is None else num_filters)
        prior = checked_prior(prior, AttentiveL1Prior)
        if num_filters not in (None, prior.num_filters):
            raise ValueError(
                f"num_filters={num_filters} was asked for, but the weights have "
                f"{prior.num_filters}. Leave num_filters out or give other weights."
            )
        super().__init__(prior, **settings)

    def _at_level(
        self, data: DataTerm, level: Tensor | None
    ) -> tuple[DataTerm, Tensor | None, Tensor | None]:
        """Weights for one noise level serve another if the image is divided by a."""
        if level is None:
            return data, None, None
        a = level / self.prior.sigma
        differentiable = torch.is_grad_enabled() and level.requires_grad
        if not differentiable and bool(((a - 1).abs() <= SAME_LEVEL).all()):
            return data, None, None
        if not bool((a > 0).all()):
            raise ValueError(
                f"sigma must be positive: {type(self).__name__} rescales its weights "
                f"to the noise level, got {level.tolist()}."
            )
        levels = ", ".join(f"{s:.4g}" for s in level.tolist())
        data.notes.append(
            f"The weights, made for noise of {float(self.prior.sigma):.4g}, were "
            f"rescaled to sigma={levels}."
        )
        return data.scaled(a), None, a


class SAFI(AttentiveL1Model):
    r"""
    Solution-adaptive fixed-point iterations.

    The method is that of :footcite:t:`pourya2024iteratively`. The reconstruction is a
    fixed point :math:`\hat x = T(\hat x)` of

    .. math::
        T(z) = \underset{x \in [0, 1]^n}{\arg\min} \; \tfrac{1}{2} \|A x - y\|_2^2
        + \lambda \|m(z) \odot W x\|_1,

    where :math:`W` are learned filters and :math:`m` a convolutional network that
    lowers the penalty where the image has structure. There is no energy that
    :math:`\hat x` minimises; for an invertible :math:`A` a fixed point exists.

    The calls are those of every :class:`ReconstructionModel`, which also says what
    noise level, weight, intensity and complex images mean. One set of weights serves
    one noise level; told another, the model rescales itself: weights made for
    :math:`\sigma` denoise :math:`a \sigma` as :math:`a \, \mathrm{model}(y / a)`. For
    inverse problems ``lambda_reg`` must be given.

    **Bounds.** Images lie in [0, 1], a constraint of the problem (in the unit of the
    data, if that was rescaled). Real and imaginary part of a complex image are free.
    ``bounds=None`` lifts the constraint.

    The solver stops at an imbalance of forces :math:`\|F\| / \|W^{\top} w\|`, see
    :class:`deepinv_deal.problems.AttentiveL1Equation`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import SAFI
    >>> model = SAFI(num_filters=8, lambda_reg=0.1)
    >>> x_hat, info = model(torch.rand(2, 1, 16, 17), return_info=True)
    >>> x_hat.shape, info.converged
    (torch.Size([2, 1, 16, 17]), tensor([True, True]))

    :param int num_filters: number of filters, 64 if ``None``. Weights decide if given.
    :param SAFIPrior prior: use this prior instead of ``pretrained``.
    :param str pretrained: ``"safi_5"``, ``"safi_15"`` or ``"safi_25"`` (bundled, for
        noise of so many gray levels; for MMR ``"mmr_5"`` and so on), ``"download_5"``,
        ``"download_15"`` or ``"download_25"`` (the authors' own, needs network), path
        of a ``.safetensors`` file of this package or of a ``.pth`` file in the authors'
        layout, or ``None`` for random weights.
    :param object settings: see :class:`ReconstructionModel`.
    :raises ValueError: for bad settings or damaged weights.
    :raises FileNotFoundError: for a missing weights file.
    """

    prior_type = SAFIPrior


class MMR(AttentiveL1Model):
    r"""
    Majorization-minimization regularizer: the special case of SAFI with an energy.

    The method is that of :footcite:t:`pourya2024iteratively`. The reconstruction is a
    critical point of

    .. math::
        E(x) = \tfrac{1}{2} \|A x - y\|_2^2
        + \lambda \sum_c \big\langle 1, \psi_c( G_c |W_c x| ) \big\rangle,
        \qquad x \in [0, 1]^n,

    with concave :math:`\psi_c` (:class:`deepinv_deal.priors.MMRPrior`). Each update
    minimises a convex majoriser of :math:`E`, a problem of SAFI's type, so :math:`E`
    falls. (With another likelihood than least squares, it falls where the curvature
    that is frozen lies above the likelihood.) The problems are solved roughly: how far
    an update may raise the energy is bounded by the error of its inner solve.
    ``verify_energy=True`` records the energy and warns if it rises; for denoising, it
    also records the duality gap, a bound of that error.

    Arguments are those of :class:`SAFI`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import MMR
    >>> model, y = MMR(num_filters=8, lambda_reg=0.1), torch.rand(2, 1, 16, 17)
    >>> bool((model.energy(model(y), y) < model.energy(y, y)).all())
    True

    :param object args: as for :class:`SAFI`.
    :param bool verify_energy: record the energy of every iterate in ``info.energy``,
        for denoising the bound of its rise in ``info.gap``, and issue a
        :class:`deepinv_deal.ConvergenceWarning` if it rises by more than ``rtol**2``
        times its value.
    :param object kwargs: as for :class:`SAFI`.
    """

    prior: MMRPrior
    prior_type = MMRPrior

    def __init__(self, *args: Any, verify_energy: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.verify_energy = verify_energy

    @full_precision
    def energy(
        self,
        x: Tensor,
        y: Tensor,
        physics: Any = None,
        lambda_reg: float | Tensor | None = None,
        sigma: float | Tensor | str | None = None,
    ) -> Tensor:
        """
        Returns E(x) of every sample, ``(B,)``; infinity outside the box.

        It is that of the problem which is solved: where data are divided by a scale
        (``info.scale``), the energy is divided by its square.

        :param torch.Tensor x: images ``(B, C, H, W)``.
        :param torch.Tensor y: measurements.
        :param deepinv.physics.LinearPhysics physics: forward operator; ``None`` for
            denoising.
        :param float, torch.Tensor lambda_reg: weight instead of the model's.
        :param float, torch.Tensor, str sigma: noise level, as for the model.
        """
        problem = self.pose(y, physics, sigma, lambda_reg=lambda_reg)
        image = problem.data.unknown("x", x)
        # Bounds in another unit are met up to rounding only.
        slack = 8 * torch.finfo(image.dtype).eps * image.abs().clamp_min(1)
        outside = (image - problem.equation.clamp(image)).abs() > slack
        inside = ~outside.flatten(1).any(1)
        return _energy(image, problem.equation, self.prior).where(inside, torch.inf)

    def _recorder(self, problem: Problem, start: Tensor) -> _EnergyRecord | None:
        if not self.verify_energy:
            return None
        return _EnergyRecord(problem.equation, self.prior, start)


def _energy(x: Tensor, equation: AttentiveL1Equation, prior: MMRPrior) -> Tensor:
    """The energy of an image in the units of the equation, ``(B,)``."""
    energy = prior.fn(x, slices=equation.data.slices)
    return equation.data.value(x) + equation.lambda_reg * energy


class _EnergyRecord:
    """The energies of all iterates, and in denoising the gaps that bound their rise."""

    def __init__(self, equation: AttentiveL1Equation, prior: MMRPrior, start: Tensor):
        self.equation, self.prior, self.last = equation, prior, start
        self.energies = [self._of(start)]
        self.gaps: list[Tensor] = []

    @torch.no_grad()
    def _of(self, pair: Tensor) -> Tensor:
        return _energy(self.equation.image(pair), self.equation, self.prior)

    @torch.no_grad()
    def observe(self, pair: Tensor) -> None:
        """Records an iterate."""
        self.energies.append(self._of(pair))
        data = self.equation.data
        if data.identity and data.quadratic:
            self.gaps.append(self.equation.freeze(self.last).gap(pair))
            self.last = pair

    def fields(self) -> dict[str, Any]:
        """Returns what the report holds of it."""
        gap = torch.stack(self.gaps) if self.gaps else None
        return {"energy": torch.stack(self.energies), "gap": gap}

    def check(self, rtol: float) -> None:
        """Warns if the energy of an iterate is above that of the last one."""
        energy = torch.stack(self.energies)
        if len(energy) < 2:
            return
        size = energy[:-1].abs()
        rise = (energy.diff(dim=0) / size.where(size != 0, 1)).amax(0)
        worst = int(rise.argmax())
        # The error of a minimum is of second order in the error of its equation.
        slack = max(rtol**2, 10 * torch.finfo(energy.dtype).eps)
        if rise[worst] > slack:
            warn(
                f"The energy of sample {worst} rose by {float(rise[worst]):.1e} of its "
                f"value, more than {slack:.1e}: an inner solve was too rough. Lower "
                "forcing or raise inner_max_iter.",
                ConvergenceWarning,
            )
