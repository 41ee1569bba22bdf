"""DEAL, deep attentive least squares: reconstruction model and denoiser in one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from deepinv.models import Denoiser
from deepinv.models.noise_level_estimation import PatchCovarianceNoiseEstimator
from deepinv.optim import DEQConfig
from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.models.image_operator import (
    ComplexMode,
    ImageOperator,
    check_complex_mode,
    check_init,
    check_measurements,
    doubt_noise_level,
    intensity,
    is_noise_level,
    per_sample,
)
from deepinv_deal.models.info import ReconstructionInfo
from deepinv_deal.models.problem import Problem
from deepinv_deal.operators.multi_conv import Normalization
from deepinv_deal.optim import FixedPointOptim
from deepinv_deal.optim.fixed_point_optim import DEFAULT_DEQ, DEFAULT_RTOL
from deepinv_deal.priors import AttentiveQuadraticPrior, DEALPrior
from deepinv_deal.priors.attentive_quadratic import AttentiveEquation
from deepinv_deal.priors.preconditioning import Preconditioner
from deepinv_deal.solvers import full_precision
from deepinv_deal.weights import load_prior

#: Noise level of the model for inverse problems, as published.
DEFAULT_SIGMA = 15 / 255

LambdaMode = Literal["absolute", "relative"]

#: On images with a smaller side, deepinv's estimate of the noise is useless. On 40 x 40
#: pixels it is up to 40 % too low, on 64 x 64 up to 10 %.
SMALLEST_ESTIMATE = 40

#: Channels are estimated together if there are as many patches for each entry of one;
#: with fewer, the estimate would be lower than that of each channel alone.
PATCHES_PER_ENTRY = 8

#: First images that have a name.
INITS = ("zero", "adjoint", "pseudo_inverse")


class DEAL(FixedPointOptim, Denoiser):
    r"""
    Deep attentive least squares.

    The method is that of :footcite:t:`pourya2025dealing`. The reconstruction is a fixed
    point :math:`\hat x = T(\hat x)` of

    .. math::
        T(z) = \underset{x}{\arg\min} \; \tfrac{1}{2} \|A x - y\|_2^2
        + \tfrac{\lambda}{2} \|M_\sigma(z) \odot W x\|_2^2,

    where :math:`W` are learned filters and :math:`M_\sigma` a small network that lowers
    the penalty where the image has structure. Each update is one linear system, solved
    by conjugate gradients. There is no energy that :math:`\hat x` minimises.

    One model serves all linear inverse problems:

    * ``model(y, physics)`` for any :class:`deepinv.physics.LinearPhysics`;
    * ``model(y, sigma=0.1)`` or ``model(y, 0.1)`` as a denoiser.

    **Noise level.** ``sigma`` is in units of the image. For denoising (no physics, or
    :class:`deepinv.physics.Denoising`) it is taken from the argument, the physics'
    noise model or the constructor, in this order; ``"estimate"`` estimates it from the
    data. For all other physics, ``sigma`` is the noise level of the *model*, a
    hyperparameter: the argument, or the constructor's (``15/255`` if that is ``None``
    too), never the physics' own.

    **Regularization weight.** :math:`\lambda` is absolute, as in the paper. Denoising
    uses the learned :math:`\kappa(\sigma)` unless told otherwise; other problems use
    ``lambda_reg``, 1 by default, which should be tuned on a few images. With
    ``lambda_mode="relative"`` it is multiplied by :math:`\|A\|_2^2`, so that one value
    serves operators of any norm.

    **Accuracy.** The iteration stops when the forces of data and regularizer balance:

    .. math::
        \| A^{\top} (y - A \hat x) - \lambda G_\sigma(\hat x) \|
        \leq \mathrm{rtol} \, \| \lambda G_\sigma(\hat x) \|, \qquad
        G_\sigma(x) = W^{\top} \big( M_\sigma(x)^2 \odot W x \big)

    (the right-hand side is at least :math:`10^{-4} \, \mathrm{rtol} \,
    \|A^{\top} y\|`). A residual that is small against :math:`A^{\top} y` alone would
    mean little where much was not measured.

    **Intensity.** The filters expect images in about [0, 1]. With ``scale="auto"``,
    data whose intensity is far from that (a largest absolute value above 2 or below
    0.2) are divided by a power of ten before and multiplied after, see ``info.scale``.
    A number fixes the scale, ``None`` switches it off. The result is never clipped.

    **Gradients** flow to weights, measurements, ``lambda_reg``, ``sigma`` and the
    parameters of the physics by implicit differentiation, exact or Jacobian-free
    (``DEQ=DEQConfig(jacobian_free=True)``).

    **Complex images** (MRI: two channels, real and imaginary part) with a gray model:
    ``complex_mode="real_imag"`` regularizes both parts alike, ``"real"`` assumes a
    real-valued image, as the paper.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> x_hat, info = model(torch.rand(2, 1, 16, 17), sigma=0.1, return_info=True)
    >>> x_hat.shape, info.converged
    (torch.Size([2, 1, 16, 17]), tensor([True, True]))

    :param int in_channels: image channels, 1 (gray) or 3 (colour); 1 if ``None``,
        unless the weights say otherwise.
    :param int num_filters: number of filters for ``pretrained=None``.
    :param float, torch.Tensor, str sigma: default noise level, see above.
    :param float, torch.Tensor lambda_reg: default regularization weight, see above.
    :param float rtol: tolerance on the imbalance of forces, see above.
    :param int max_iter: largest number of outer iterations.
    :param int inner_max_iter: largest number of conjugate gradient iterations per
        solve.
    :param float forcing: factor by which each inner solve reduces the residual at
        least.
    :param int anderson: depth of the safeguarded Anderson acceleration, ``0`` for none;
        ``None``: 5. See :func:`deepinv_deal.solvers.fixed_point`. In inverse problems
        it starts when the imbalance of forces is below 0.02.
    :param str preconditioner: ``"auto"``, ``"circulant"``, ``"diagonal"``, ``"none"``,
        see :class:`deepinv_deal.priors.preconditioning.Preconditioning`.
    :param torch.dtype inner_dtype: precision of the convolutions in the inner solves,
        for example ``torch.bfloat16``; masks, residuals and everything else stay in
        that of the weights, so the result is as accurate. Faster where the hardware has
        such units. ``None``: that of the weights.
    :param str lambda_mode: ``"absolute"`` or ``"relative"``, see above.
    :param float, str scale: ``"auto"``, a positive number or ``None``, see above.
    :param str complex_mode: ``"real_imag"`` or ``"real"``, see above.
    :param deepinv.optim.DEQConfig DEQ: settings of the backward pass, see
        :class:`deepinv_deal.optim.FixedPointOptim`.
    :param list trainable_params: among ``"lambda_reg"`` and ``"g_param"`` (sigma).
    :param Callable, str custom_init: first image, see ``init`` of :meth:`forward`.
    :param dict custom_metrics: as in :class:`deepinv.optim.BaseOptim`.
    :param bool warn: issue a :class:`deepinv_deal.ConvergenceWarning` if a sample does
        not converge.
    :param bool strict: raise a :class:`deepinv_deal.ConvergenceError` instead, also in
        the backward pass.
    :param AttentiveQuadraticPrior prior: use this prior instead of ``pretrained``.
    :param str normalization: norm rule of the filters for ``pretrained=None``,
        ``"published"`` if ``None``. Weights decide if given.
    :param str, torch.device device: where the model lives; ``None``: where the prior
        is, which for loaded weights is the CPU.
    :param str pretrained: ``"bundled"`` (the default: ``"deal_gray"``, or
        ``"deal_color"`` if ``in_channels=3``), a bundled name, ``"download"`` (official
        weights, needs network), the path of a ``.safetensors`` or authors' ``.pth``
        file, or ``None`` for random weights.
    :raises ValueError: for bad settings, damaged or unknown weights.
    :raises FileNotFoundError: for a missing weights file.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        num_filters: int | None = None,
        *,
        sigma: float | Tensor | str | None = None,
        lambda_reg: float | Tensor | None = None,
        rtol: float = DEFAULT_RTOL,
        max_iter: int = 100,
        inner_max_iter: int = 1000,
        forcing: float = 0.5,
        anderson: int | None = None,
        preconditioner: Preconditioner = "auto",
        inner_dtype: torch.dtype | None = None,
        lambda_mode: LambdaMode = "absolute",
        scale: float | str | None = "auto",
        complex_mode: ComplexMode = "real_imag",
        DEQ: DEQConfig = DEFAULT_DEQ,
        trainable_params: list[str] | None = None,
        custom_init: Callable[..., Any] | str | None = None,
        custom_metrics: dict[str, Any] | None = None,
        warn: bool = True,
        strict: bool = False,
        prior: AttentiveQuadraticPrior | None = None,
        normalization: Normalization | None = None,
        device: str | torch.device | None = None,
        pretrained: str | os.PathLike[str] | None = "bundled",
    ):
        if prior is None and pretrained is None:
            prior = DEALPrior(
                in_channels or 1, num_filters or 128, normalization or "published"
            )
        elif prior is None and pretrained is not None:
            prior = load_prior(pretrained, in_channels or 1)
        assert prior is not None
        for name, asked in (
            ("in_channels", in_channels),
            ("num_filters", num_filters),
            ("normalization", normalization),
        ):
            has = getattr(prior, name, None)
            if asked is not None and asked != has:
                raise ValueError(
                    f"{name}={asked} was asked for, but the weights "
                    f"{str(pretrained)!r} have {name}={has}. Leave {name} out, or give "
                    "pretrained=None or other weights."
                )
        if isinstance(sigma, str) and sigma != "estimate":
            raise ValueError(f"sigma must be a number or 'estimate', got {sigma!r}.")
        if isinstance(scale, str) and scale != "auto":
            raise ValueError(f"scale must be 'auto', a number or None, got {scale!r}.")
        if (
            scale is not None
            and not isinstance(scale, str)
            and not 0 < scale < math.inf
        ):
            raise ValueError(f"scale must be positive, got {scale}.")
        check_complex_mode(complex_mode)
        if lambda_mode not in ("absolute", "relative"):
            raise ValueError(
                f"lambda_mode must be 'absolute' or 'relative', got {lambda_mode!r}."
            )
        _check_init_name("custom_init", custom_init)
        super().__init__(
            prior,
            lambda_reg=lambda_reg,
            sigma=None if isinstance(sigma, str) else sigma,
            max_iter=max_iter,
            inner_max_iter=inner_max_iter,
            rtol=rtol,
            forcing=forcing,
            anderson=anderson,
            preconditioner=preconditioner,
            inner_dtype=inner_dtype,
            DEQ=DEQ,
            trainable_params=trainable_params,
            custom_metrics=custom_metrics,
            warn=warn,
            strict=strict,
        )
        self.custom_init = custom_init
        self.estimate_sigma = isinstance(sigma, str)
        self.scale, self.complex_mode = scale, complex_mode
        self.lambda_mode = lambda_mode
        if device is not None:
            self.to(device)
        self.eval()

    @full_precision
    def forward(  # type: ignore[override]  # the call conventions of a denoiser too
        self,
        y: Tensor,
        physics: Any = None,
        sigma: float | Tensor | str | None = None,
        *,
        lambda_reg: float | Tensor | None = None,
        init: Any = None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        return_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        r"""
        Reconstructs or denoises.

        :param torch.Tensor y: measurements; for denoising the images ``(B, C, H, W)``.
        :param deepinv.physics.LinearPhysics physics: forward operator; ``None`` to
            denoise. A number or tensor here is taken for ``sigma``, as deepinv's
            denoisers are called.
        :param float, torch.Tensor, str sigma: noise level in units of the image, one or
            one per sample; ``"estimate"`` for denoising.
        :param float, torch.Tensor lambda_reg: weight, one or one per sample.
        :param str, Callable, torch.Tensor, tuple, dict init: first image: ``"zero"``
            (the default), ``"adjoint"``, ``"pseudo_inverse"``, or as in
            :class:`deepinv.optim.BaseOptim`.
        :param torch.Tensor x_gt: ground truth for the metrics.
        :param bool compute_metrics: also return deepinv's dictionary of metrics.
        :param bool return_info: also return a :class:`ReconstructionInfo`.
        :return: the image ``(B, C, H, W)``, followed by metrics and info where asked
            for.
        :raises TypeError: if ``y`` is no real floating tensor or ``physics`` not
            linear.
        :raises ValueError: for wrong shapes, channels or signs, an empty batch, NaN or
            infinity, or a missing noise level.
        """
        if kwargs:
            raise TypeError(f"Unknown arguments: {', '.join(sorted(kwargs))}.")
        problem = self.pose(y, physics, sigma, lambda_reg=lambda_reg, init=init)
        equation = problem.equation
        if x_gt is not None:
            x_gt = problem.unknown("x_gt", x_gt)
        x, result, metrics = self.solve(equation, problem.init, x_gt, compute_metrics)
        image = problem.image(x)
        if not compute_metrics and not return_info:
            return image
        solution, regularizer = x.detach(), equation.regularizer
        info = ReconstructionInfo.of(
            result,
            sigma=torch.as_tensor(problem.sigma).detach(),
            lambda_reg=equation.lambda_reg.detach(),
            rtol=self.rtol,
            scale=problem.scale,
            notes=problem.operator.notes,
            compute_mask=lambda: regularizer.mask(solution),
        )
        answer = [metrics] if compute_metrics else []
        return (image, *answer, info) if return_info else (image, *answer)

    def pose(
        self,
        y: Tensor,
        physics: Any = None,
        sigma: float | Tensor | str | None = None,
        *,
        lambda_reg: float | Tensor | None = None,
        init: Any = None,
    ) -> Problem[AttentiveEquation]:
        """
        Returns what :meth:`forward` would solve, without solving it.

        :param torch.Tensor y: see :meth:`forward`, as for all arguments.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        :param float, torch.Tensor, str sigma: noise level.
        :param float, torch.Tensor lambda_reg: weight.
        :param str, Callable, torch.Tensor, tuple, dict init: first image.
        """
        if sigma is None and is_noise_level(physics):
            physics, sigma = None, physics
        reference = next(self.prior.parameters())
        check_measurements(y, reference)
        operator = ImageOperator(
            physics, y, self.prior[0].in_channels, self.complex_mode
        )
        b = operator.b
        scale = intensity(self.scale, operator)
        level = self._sigma(sigma, physics, operator, scale, operator.notes)
        weight = self._lambda(lambda_reg, operator)
        x0 = self._first_image(init, y, physics, operator) / expand(scale, b)
        operator.b = b / expand(scale, b)
        equation = self.equation(y, operator, sigma=level, lambda_reg=weight)
        return Problem(operator, scale, equation, x0, level)

    def equation(
        self,
        y: Tensor,
        physics: Any,
        *,
        sigma: float | Tensor | None = None,
        lambda_reg: float | Tensor | None = None,
    ) -> AttentiveEquation:
        """Returns the equation of one problem, see :class:`FixedPointOptim`."""
        equation = super().equation(y, physics, sigma=sigma, lambda_reg=lambda_reg)
        assert isinstance(equation, AttentiveEquation)
        return equation

    def _sigma(
        self,
        sigma: float | Tensor | str | None,
        physics: Any,
        operator: ImageOperator,
        scale: Tensor,
        notes: list[str],
    ) -> Tensor:
        """Noise level for the model in its [0, 1] units, ``(B,)``."""
        b = operator.b
        own = self.update_params_fn(0)["g_param"]
        if sigma is None and operator.denoising:
            # ZeroNoise, PoissonNoise, ... have no sigma.
            noise_model = getattr(physics, "noise_model", None)
            sigma = getattr(noise_model, "sigma", None)
        if sigma is None and self.estimate_sigma:
            sigma = "estimate"
        if isinstance(sigma, str):
            if sigma != "estimate" or not operator.denoising:
                raise ValueError(
                    f"sigma={sigma!r}: only denoising can estimate the noise level "
                    "(sigma='estimate'). Otherwise give a number, the model's noise "
                    "level."
                )
            sigma = _estimated(b.detach())
            levels = ", ".join(f"{s:.4g}" for s in sigma.tolist())
            notes.append(f"The noise level was estimated: sigma={levels}.")
        if sigma is None and own is None and operator.denoising:
            raise ValueError(
                "sigma is missing: give the noise level, in units of the image, as "
                "model(y, sigma=...), or sigma='estimate'."
            )
        if sigma is None and not operator.denoising:
            # The model's own hyperparameter is relative to images in [0, 1].
            return per_sample("sigma", DEFAULT_SIGMA if own is None else own, b)
        level = per_sample("sigma", own if sigma is None else sigma, b)
        if operator.denoising:
            doubt_noise_level(level, b, stacklevel=7)
        return level / scale

    def _lambda(
        self, lambda_reg: float | Tensor | None, operator: ImageOperator
    ) -> Tensor | None:
        if lambda_reg is None:
            lambda_reg = self.update_params_fn(0)["lambda"]
        if lambda_reg is None:
            if operator.denoising:
                return None
            lambda_reg = 1.0
        weight = per_sample("lambda_reg", lambda_reg, operator.b)
        return weight * operator.sqnorm() if self.lambda_mode == "relative" else weight

    def _first_image(
        self, init: Any, y: Tensor, physics: Any, operator: ImageOperator
    ) -> Tensor:
        """The image to start from, ``(B, C, H, W)``."""
        _check_init_name("init", init)
        init = self.custom_init if init is None else init
        if init is None or isinstance(init, str) and init == "zero":
            return torch.zeros_like(operator.b)
        if isinstance(init, str) and (init == "adjoint" or operator.denoising):
            return operator.b.detach()
        if isinstance(init, str):
            with torch.no_grad():
                x0 = physics.A_dagger(y)
        else:
            x0 = self.init_iterate_fn(y, physics or operator, init=init)["est"][0]
        return check_init(x0, operator)


def _estimated(b: Tensor) -> Tensor:
    """Noise levels of some images, ``(B,)``."""
    if min(b.shape[-2:]) < SMALLEST_ESTIMATE:
        raise ValueError(
            "sigma='estimate': the noise level cannot be estimated from images of "
            f"{b.shape[-2]} x {b.shape[-1]} pixels, which are fewer than "
            f"{SMALLEST_ESTIMATE} on a side. Give it as a number."
        )
    estimator = PatchCovarianceNoiseEstimator()
    # It takes the covariance of patches of 8 x 8 pixels, 3 pixels apart. Those of all
    # channels together have more entries, and need more patches, than those of one.
    height, width = ((n - 8) // 3 + 1 for n in b.shape[-2:])
    if height * width >= PATCHES_PER_ENTRY * 64 * b.shape[1]:
        levels = estimator(b.float())
    else:
        levels = estimator(b.float().flatten(0, 1)[:, None]).view(b.shape[:2]).mean(1)
    if not levels.isfinite().all():
        raise ValueError(
            "sigma='estimate': the noise level cannot be estimated from these images, "
            "which may have no noise. Give it as a number."
        )
    return levels


def _check_init_name(name: str, init: Any) -> None:
    if isinstance(init, str) and init not in INITS:
        raise ValueError(
            f"{name} must be one of {INITS}, an image, or a function of (y, physics), "
            f"got {init!r}."
        )
