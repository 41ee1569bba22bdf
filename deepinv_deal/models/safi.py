"""SAFI and MMR: reconstruction models and denoisers in one, with attentive l1 terms."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from deepinv.models import Denoiser
from deepinv.optim import DEQConfig
from deepinv.optim.data_fidelity import L2
from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.models.image_operator import (
    ComplexMode,
    ImageOperator,
    check_complex_mode,
    check_image,
    check_init,
    check_measurements,
    intensity,
    is_noise_level,
    per_sample,
)
from deepinv_deal.models.info import ReconstructionInfo
from deepinv_deal.models.problem import Problem
from deepinv_deal.optim import FixedPointOptim
from deepinv_deal.optim.fixed_point_optim import DEFAULT_DEQ, DEFAULT_RTOL
from deepinv_deal.priors.attentive_l1 import AttentiveL1Equation, InnerSolver
from deepinv_deal.priors.safi import AttentiveL1Prior, MMRPrior, SAFIPrior
from deepinv_deal.solvers import ConvergenceWarning, full_precision
from deepinv_deal.weights.safi import load_l1_prior


@dataclass(kw_only=True)
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


class AttentiveL1Model(FixedPointOptim, Denoiser):
    """
    What :class:`SAFI` and :class:`MMR` have in common; use these.
    """

    prior_type: type[AttentiveL1Prior]

    #: Whether to record the energy of every iterate; SAFI has none.
    verify_energy = False

    def __init__(
        self,
        num_filters: int | None = None,
        *,
        lambda_reg: float | Tensor | None = None,
        rtol: float = DEFAULT_RTOL,
        max_iter: int = 100,
        inner_max_iter: int = 1000,
        inner: InnerSolver = "auto",
        forcing: float = 0.5,
        box: tuple[float, float] | None = (0.0, 1.0),
        scale: float | str | None = None,
        complex_mode: ComplexMode = "real_imag",
        DEQ: DEQConfig = DEFAULT_DEQ,
        trainable_params: list[str] | None = None,
        warn: bool = True,
        strict: bool = False,
        prior: AttentiveL1Prior | None = None,
        device: str | torch.device | None = None,
        pretrained: str | os.PathLike[str] | None = None,
    ):
        if prior is None and pretrained is not None:
            prior = load_l1_prior(pretrained, self.prior_type)
        elif prior is None:
            prior = self.prior_type(64 if num_filters is None else num_filters)
        if num_filters not in (None, prior.num_filters):
            raise ValueError(
                f"num_filters={num_filters} was asked for, but the weights have "
                f"{prior.num_filters}. Leave num_filters out or give other weights."
            )
        if scale is not None and scale != "auto" and not 0 < float(scale) < torch.inf:
            raise ValueError(f"scale must be 'auto', positive or None, got {scale!r}.")
        check_complex_mode(complex_mode)
        if box is not None and not (len(box) == 2 and box[0] < box[1]):
            raise ValueError(f"box must be None or (lower, upper), got {box}.")
        super().__init__(
            prior,
            lambda_reg=lambda_reg,
            max_iter=max_iter,
            inner_max_iter=inner_max_iter,
            rtol=rtol,
            forcing=forcing,
            DEQ=DEQ,
            trainable_params=trainable_params,
            warn=warn,
            strict=strict,
        )
        self.inner_max_iter, self.inner, self.box = inner_max_iter, inner, box
        self.scale, self.complex_mode = scale, complex_mode
        if device is not None:
            self.to(device)
        self.eval()

    @full_precision
    def forward(  # type: ignore[override]  # the call conventions of a denoiser too
        self,
        y: Tensor,
        physics: Any = None,
        sigma: Any = None,
        *,
        lambda_reg: float | Tensor | None = None,
        init: Tensor | None = None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        return_info: bool = False,
    ) -> Any:
        r"""
        Reconstructs or denoises.

        :param torch.Tensor y: measurements; for denoising the images ``(B, C, H, W)``.
        :param deepinv.physics.LinearPhysics physics: forward operator; ``None`` to
            denoise.
        :param float sigma: accepted since deepinv calls denoisers with it, and ignored:
            the weights serve one noise level.
        :param float, torch.Tensor lambda_reg: weight, one or one per sample.
        :param torch.Tensor init: first image ``(B, C, H, W)``; ``None``: the
            reconstruction with mask 1.
        :param torch.Tensor x_gt: ground truth for the metrics.
        :param bool compute_metrics: also return deepinv's dictionary of metrics.
        :param bool return_info: also return an :class:`AttentiveL1Info`.
        :return: the image ``(B, C, H, W)``, followed by metrics and info where asked
            for.
        :raises TypeError: if ``y`` is no real floating tensor or ``physics`` not
            linear.
        :raises ValueError: for wrong shapes, channels or signs, an empty batch, or NaN
            or infinity.
        """
        problem = self.pose(y, physics, sigma, lambda_reg=lambda_reg, init=init)
        operator, scale, equation = problem.operator, problem.scale, problem.equation
        if x_gt is not None:
            x_gt = problem.unknown("x_gt", x_gt)
        energies: list[Tensor] = []
        gaps: list[Tensor] = []
        pairs: list[Tensor] = []  # the last one

        @torch.no_grad()
        def record(p: Tensor) -> None:
            image = equation.image(p)
            energies.append(self._energy(image, y, operator, scale, equation))
            if operator.denoising:
                gaps.extend(equation.freeze(last).gap(p) for last in pairs)
                pairs[:] = [p]

        x, result, metrics = self.solve(
            equation,
            problem.init,
            x_gt,
            compute_metrics,
            callback=record if self.verify_energy else None,
        )
        energy = torch.stack(energies) if energies else None
        if energy is not None and self.warn:
            _warn_if_rising(energy, self.rtol)
        image = problem.image(x)
        answer = [metrics] if compute_metrics else []
        if not return_info:
            return (image, *answer) if answer else image
        regularizer, solution = equation.regularizer, x.detach()
        info = AttentiveL1Info.of(
            result,
            lambda_reg=equation.lambda_reg.detach(),
            rtol=self.rtol,
            scale=scale,
            notes=operator.notes,
            energy=energy,
            gap=torch.stack(gaps) if gaps else None,
            compute_mask=lambda: regularizer.mask(
                solution, regularizer.analyse(solution)
            ),
        )
        return image, *answer, info

    def pose(
        self,
        y: Tensor,
        physics: Any = None,
        sigma: Any = None,
        *,
        lambda_reg: float | Tensor | None = None,
        init: Tensor | None = None,
    ) -> Problem[AttentiveL1Equation]:
        """
        Returns what :meth:`forward` would solve, without solving it.

        :param torch.Tensor y: see :meth:`forward`, as for all arguments.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        :param float sigma: ignored.
        :param float, torch.Tensor lambda_reg: weight.
        :param torch.Tensor init: first image.
        """
        if sigma is None and is_noise_level(physics):
            physics, sigma = None, physics
        operator, scale = self._operator(y, physics)
        if sigma is not None:
            operator.notes.append(
                "sigma was ignored: the weights serve one noise level."
            )
        equation = self._equation(operator, scale, lambda_reg)
        if init is not None:
            init = check_init(init, operator) / expand(scale, operator.b)
        return Problem(operator, scale, equation, init)

    def _energy(
        self,
        x: Tensor,
        y: Tensor,
        operator: ImageOperator,
        scale: Tensor,
        equation: AttentiveL1Equation,
    ) -> Tensor:
        """The energy of an image in the units of the equation; raises for SAFI."""
        if operator.denoising:
            data = 0.5 * (x - equation.b).square().flatten(1).sum(1)
        else:
            data = L2()(operator.embed(x * expand(scale, x)), y, operator.physics)
            data = data / scale.square()
        return data + equation.lambda_reg * self.prior[0](x)

    def _operator(self, y: Tensor, physics: Any) -> tuple[ImageOperator, Tensor]:
        """The checked problem, and the intensity of its images ``(B,)``."""
        check_measurements(y, next(self.prior.parameters()))
        operator = ImageOperator(physics, y, 1, self.complex_mode)
        return operator, intensity(self.scale, operator)

    def _equation(
        self,
        operator: ImageOperator,
        scale: Tensor,
        lambda_reg: float | Tensor | None,
    ) -> AttentiveL1Equation:
        if lambda_reg is None:
            lambda_reg = self.update_params_fn(0)["lambda"]
        if lambda_reg is None and not operator.denoising:
            raise ValueError(
                "lambda_reg is missing: the learned weight is for denoising. Give "
                "lambda_reg, tuned on a few images of this problem."
            )
        if lambda_reg is not None:
            lambda_reg = per_sample("lambda_reg", lambda_reg, operator.b)
        return self.prior[0].equation(
            None if operator.denoising else operator.A_adjoint_A,
            operator.b / expand(scale, operator.b),
            lambda_reg=lambda_reg,
            box=self.box,
            inner_max_iter=self.inner_max_iter,
            inner=self.inner,
        )


def _warn_if_rising(energy: Tensor, rtol: float) -> None:
    """Warns if the energy ``(n, B)`` of an iterate is above that of the last one."""
    if len(energy) < 2:
        return
    size = energy[:-1].abs()
    rise = (energy.diff(dim=0) / size.where(size != 0, 1)).amax(0)
    worst = int(rise.argmax())
    # The error of a minimum is of second order in the error of its equation.
    slack = max(rtol**2, 10 * torch.finfo(energy.dtype).eps)
    if rise[worst] > slack:
        warnings.warn(
            f"The energy of sample {worst} rose by {float(rise[worst]):.1e} of its "
            f"value, more than {slack:.1e}: an inner solve was too rough. Lower "
            "forcing or raise inner_max_iter.",
            ConvergenceWarning,
            stacklevel=6,
        )


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

    ``model(y, physics, lambda_reg=...)`` reconstructs from the measurements of any
    :class:`deepinv.physics.LinearPhysics`; ``model(y)`` denoises with the learned
    :math:`\lambda`. One set of weights serves one noise level. Images lie in [0, 1], a
    constraint of the problem.

    **Complex images** (MRI: two channels, real and imaginary part):
    ``complex_mode="real_imag"`` regularizes both parts alike; the box then holds for
    both, and ``box=None`` lifts it. ``"real"`` assumes a real-valued image, as the
    paper.

    **Gradients** flow to weights, measurements, ``lambda_reg`` and the parameters of
    the physics by implicit differentiation, exact or Jacobian-free.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import SAFI
    >>> model = SAFI(num_filters=8, lambda_reg=0.1)
    >>> x_hat, info = model(torch.rand(2, 1, 16, 17), return_info=True)
    >>> x_hat.shape, info.converged
    (torch.Size([2, 1, 16, 17]), tensor([True, True]))

    :param int num_filters: number of filters, 64 if ``None``. Weights decide if given.
    :param float, torch.Tensor lambda_reg: regularization weight, one or one per sample.
        ``None``: the learned one for denoising; other problems need it.
    :param float rtol: tolerance on the imbalance of forces
        :math:`\|F\| / \|W^{\top} w\|` of
        :class:`deepinv_deal.priors.attentive_l1.AttentiveL1Equation`, as for
        :class:`deepinv_deal.DEAL`.
    :param int max_iter: largest number of refreshes of the mask.
    :param int inner_max_iter: largest number of inner iterations per refresh.
    :param str inner: inner solver, ``"admm"``, ``"fista"`` (dual; denoising only) or
        ``"auto"``.
    :param float forcing: factor by which each inner solve reduces the residual. Large
        values refresh the mask often; the fixed point is the same.
    :param tuple box: bounds of the image, or ``None``.
    :param float, str scale: ``"auto"``, a number or ``None``, as for
        :class:`deepinv_deal.DEAL`.
    :param str complex_mode: ``"real_imag"`` or ``"real"``, see above.
    :param deepinv.optim.DEQConfig DEQ: settings of the backward pass, see
        :class:`deepinv_deal.optim.FixedPointOptim`.
    :param list trainable_params: may hold ``"lambda_reg"``.
    :param bool warn: issue a :class:`deepinv_deal.ConvergenceWarning` if a sample does
        not converge.
    :param bool strict: raise a :class:`deepinv_deal.ConvergenceError` instead, also in
        the backward pass.
    :param SAFIPrior prior: use this prior instead of ``pretrained``.
    :param str, torch.device device: where the model lives; ``None``: where the prior
        is, which for loaded weights is the CPU.
    :param str pretrained: ``"safi_5"``, ``"safi_15"`` or ``"safi_25"`` (bundled, for
        noise of so many gray levels; for MMR ``"mmr_5"`` and so on), path of a
        ``.safetensors`` file of this package or of a ``.pth`` file in the authors'
        layout, or ``None`` for random weights.
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
    falls. The problems are solved roughly: how far an update may raise the energy is
    bounded by the error of its inner solve. ``verify_energy=True`` records the energy
    and warns if it rises; for denoising, it also records the duality gap, a bound of
    that error.

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
    ) -> Tensor:
        """
        Returns E(x) of every sample, ``(B,)``; infinity outside the box.

        :param torch.Tensor x: images ``(B, C, H, W)``.
        :param torch.Tensor y: measurements.
        :param deepinv.physics.LinearPhysics physics: forward operator; ``None`` for
            denoising.
        :param float, torch.Tensor lambda_reg: weight instead of the model's.
        """
        operator, scale = self._operator(y, physics)
        equation = self._equation(operator, scale, lambda_reg)
        image = operator.extract(check_image("x", x, operator)) / expand(scale, x)
        energy = self._energy(image, y, operator, scale, equation)
        inside = (image == equation.clamp(image)).flatten(1).all(1)
        return energy.where(inside, torch.inf)
