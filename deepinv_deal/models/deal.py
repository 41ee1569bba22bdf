"""DEAL, deep attentive least squares: reconstruction model and denoiser in one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Number
from typing import Any, Literal

import numpy as np
import torch
from deepinv.models import Denoiser
from deepinv.models.noise_level_estimation import PatchCovarianceNoiseEstimator
from deepinv.optim import DEQConfig
from deepinv.physics import Denoising, LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal._batch import expand, inner
from deepinv_deal.operators.multi_conv import Normalization
from deepinv_deal.optim import FixedPointOptim
from deepinv_deal.optim.fixed_point_optim import DEFAULT_DEQ
from deepinv_deal.priors import DEALPrior
from deepinv_deal.priors.deal import AttentiveEquation
from deepinv_deal.weights import load_prior

#: Noise level of the model for inverse problems, as published.
DEFAULT_SIGMA = 15 / 255

#: Tolerances on the nonlinear residual if none is given.
DEFAULT_RTOL, DEFAULT_DENOISING_RTOL = 1e-4, 1e-3

ComplexMode = Literal["real_imag", "real"]


@dataclass
class ReconstructionInfo:
    """
    How a reconstruction went, one entry per sample.

    :param torch.Tensor converged: whether the nonlinear residual met the tolerance,
        ``(B,)``.
    :param torch.Tensor status: :class:`deepinv_deal.solvers.Status` values, ``(B,)``.
    :param torch.Tensor n_iter: outer iterations, ``(B,)``.
    :param torch.Tensor cg_iter: conjugate gradient iterations in total, ``(B,)``.
    :param torch.Tensor residual: relative nonlinear residual of the result, ``(B,)``.
    :param torch.Tensor history: residual of every iterate, ``(n, B)``.
    :param torch.Tensor sigma: noise level given to the model, in its [0, 1] units,
        ``(B,)``.
    :param torch.Tensor lambda_reg: regularization weight, ``(B,)``.
    :param float rtol: tolerance on the residual.
    :param torch.Tensor scale: intensity by which the data were divided, ``(B,)``.
    :param list notes: remarks on what was decided for the user.
    :param Callable compute_mask: returns the masks at the solution, see :attr:`mask`.
    """

    converged: Tensor
    status: Tensor
    n_iter: Tensor
    cg_iter: Tensor
    residual: Tensor
    history: Tensor
    sigma: Tensor
    lambda_reg: Tensor
    rtol: float
    scale: Tensor
    notes: list[str] = field(default_factory=list)
    compute_mask: Callable[[], Tensor] | None = field(default=None, repr=False)

    @cached_property
    def mask(self) -> Tensor:
        """
        Masks at the solution, ``(B, num_filters, H, W)``; computed when asked for.
        """
        if self.compute_mask is None:
            raise AttributeError("This info holds no mask.")
        with torch.no_grad():
            return self.compute_mask()


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
    ``lambda_reg``, 1 by default, which should be tuned on a few images.

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

    :param int in_channels: image channels, 1 (gray) or 3 (colour). Weights decide if
        given.
    :param int num_filters: number of filters for ``pretrained=None``.
    :param float, torch.Tensor, str sigma: default noise level, see above.
    :param float, torch.Tensor lambda_reg: default regularization weight, see above.
    :param float rtol: tolerance on the relative nonlinear residual
        :math:`\|A^{\top} y - A_{\hat x} \hat x\| / \|A^{\top} y\|`. ``None``: ``1e-3``
        for denoising, where the PSNR has all but settled by then, and ``1e-4`` for
        other problems, which are worse conditioned.
    :param int max_iter: largest number of outer iterations.
    :param int inner_max_iter: largest number of conjugate gradient iterations per
        solve.
    :param float forcing: factor by which each inner solve reduces the residual.
    :param int anderson: depth of the safeguarded Anderson acceleration, ``0`` for none.
    :param float, str scale: ``"auto"``, a positive number or ``None``, see above.
    :param str complex_mode: ``"real_imag"`` or ``"real"``, see above.
    :param deepinv.optim.DEQConfig DEQ: settings of the backward pass, see
        :class:`deepinv_deal.optim.FixedPointOptim`.
    :param list trainable_params: among ``"lambda_reg"`` and ``"g_param"`` (sigma).
    :param Callable custom_init: first image, as in :class:`deepinv.optim.BaseOptim`;
        zeros if ``None``.
    :param dict custom_metrics: as in :class:`deepinv.optim.BaseOptim`.
    :param bool warn: issue a :class:`deepinv_deal.ConvergenceWarning` if a sample does
        not converge.
    :param DEALPrior prior: use this prior instead of ``pretrained``.
    :param str normalization: norm rule of the filters for ``pretrained=None``,
        ``"published"`` if ``None``. Weights decide if given.
    :param str, torch.device device: where the model lives.
    :param str pretrained: ``"deal_gray"`` (bundled, the default), ``"download"``
        (official weights, needs network), the path of a ``.safetensors`` or authors'
        ``.pth`` file, or ``None`` for random weights.
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
        rtol: float | None = None,
        max_iter: int = 100,
        inner_max_iter: int = 1000,
        forcing: float = 0.5,
        anderson: int = 0,
        scale: float | str | None = "auto",
        complex_mode: ComplexMode = "real_imag",
        DEQ: DEQConfig = DEFAULT_DEQ,
        trainable_params: list[str] | None = None,
        custom_init: Callable[..., Any] | None = None,
        custom_metrics: dict[str, Any] | None = None,
        warn: bool = True,
        prior: DEALPrior | None = None,
        normalization: Normalization | None = None,
        device: str | torch.device = "cpu",
        pretrained: str | os.PathLike[str] | None = "deal_gray",
    ):
        if prior is None and pretrained is None:
            prior = DEALPrior(
                in_channels or 1, num_filters or 128, normalization or "published"
            )
        elif prior is None and pretrained is not None:
            prior = load_prior(pretrained, in_channels or 1)
        assert prior is not None
        for name, asked, has in (
            ("in_channels", in_channels, prior.in_channels),
            ("num_filters", num_filters, prior.num_filters),
            ("normalization", normalization, prior.W.normalization),
        ):
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
        if complex_mode not in ("real_imag", "real"):
            raise ValueError(
                f"complex_mode must be 'real_imag' or 'real', got {complex_mode!r}."
            )
        super().__init__(
            prior,
            lambda_reg=lambda_reg,
            sigma=None if isinstance(sigma, str) else sigma,
            max_iter=max_iter,
            inner_max_iter=inner_max_iter,
            rtol=DEFAULT_RTOL if rtol is None else rtol,
            forcing=forcing,
            anderson=anderson,
            DEQ=DEQ,
            trainable_params=trainable_params,
            custom_init=custom_init,
            custom_metrics=custom_metrics,
            warn=warn,
        )
        self.denoising_rtol = DEFAULT_DENOISING_RTOL if rtol is None else rtol
        self.estimate_sigma = isinstance(sigma, str)
        self.scale, self.complex_mode = scale, complex_mode
        self.to(device)
        self.eval()

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
        :param Callable, torch.Tensor, tuple, dict init: first image, as in
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
        if sigma is None and _is_noise_level(physics):
            physics, sigma = None, physics
        reference = next(self.prior.parameters())
        _check_measurements(y, reference)
        operator = _ImageOperator(
            physics, y, self.prior[0].in_channels, self.complex_mode
        )
        b = operator.b
        notes: list[str] = []
        scale = _intensity(self.scale, operator, notes)
        level = self._sigma(sigma, physics, operator, scale, notes)
        weight = self._lambda(lambda_reg, operator)
        operator.b = b / expand(scale, b)
        equation = self.equation(y, operator, sigma=level, lambda_reg=weight)
        x0 = torch.zeros_like(b)
        if init is not None or self.custom_init is not None:
            x0 = self.init_iterate_fn(y, physics or operator, init=init)["est"][0]
            x0 = operator.extract(_check_image("init", x0, operator)) / expand(scale, b)
            if not torch.isfinite(x0).all():
                raise ValueError("init holds NaN or infinity.")
        if x_gt is not None:
            x_gt = operator.extract(_check_image("x_gt", x_gt, operator))
            x_gt = x_gt / expand(scale, b)
        rtol = self.denoising_rtol if operator.denoising else self.rtol
        x, result, metrics = self.solve(equation, x0, x_gt, compute_metrics, rtol)
        image = operator.embed(x * expand(scale, b))
        if not compute_metrics and not return_info:
            return image
        info = ReconstructionInfo(
            result.converged,
            result.status,
            result.n_iter,
            torch.zeros_like(result.n_iter)
            if result.n_inner is None
            else result.n_inner,
            result.residual,
            result.residual[None] if result.history is None else result.history,
            torch.as_tensor(level).detach(),
            equation.lambda_reg.detach(),
            rtol,
            scale,
            notes,
            lambda: equation.regularizer.mask(x.detach()),
        )
        answer = [metrics] if compute_metrics else []
        return (image, *answer, info) if return_info else (image, *answer)

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
        operator: _ImageOperator,
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
            sigma = PatchCovarianceNoiseEstimator()(b.detach().float())
            notes.append(f"The noise level was estimated: {sigma.tolist()}.")  # type: ignore[union-attr]
        if sigma is None and own is None and operator.denoising:
            raise ValueError(
                "sigma is missing: give the noise level, in units of the image, as "
                "model(y, sigma=...), or sigma='estimate'."
            )
        if sigma is None and not operator.denoising:
            # The model's own hyperparameter is relative to images in [0, 1].
            return _per_sample("sigma", DEFAULT_SIGMA if own is None else own, b)
        return _per_sample("sigma", own if sigma is None else sigma, b) / scale

    def _lambda(
        self, lambda_reg: float | Tensor | None, operator: _ImageOperator
    ) -> Tensor | None:
        if lambda_reg is None:
            lambda_reg = self.update_params_fn(0)["lambda"]
        if lambda_reg is None:
            if operator.denoising:
                return None
            lambda_reg = 1.0
        return _per_sample("lambda_reg", lambda_reg, operator.b)


class _ImageOperator:
    """The physics as a map on images that the filters can see."""

    def __init__(self, physics: Any, y: Tensor, in_channels: int, complex_mode: str):
        if isinstance(physics, Physics) and not isinstance(physics, LinearPhysics):
            raise TypeError(
                f"physics must be linear, got {type(physics).__name__}, which is not a "
                "deepinv.physics.LinearPhysics: DEAL solves least-squares problems."
            )
        if physics is not None and not hasattr(physics, "A_adjoint"):
            raise TypeError(
                "physics must be a deepinv.physics.LinearPhysics, got "
                f"{type(physics).__name__} without A_adjoint."
            )
        self.physics = physics
        self.denoising = physics is None or isinstance(physics, Denoising)
        image = y if self.denoising else _adjoint(physics, y)
        if not isinstance(image, Tensor) or image.ndim != 4:
            raise ValueError(
                "Images must be tensors of shape (B, C, H, W), got "
                f"{_shape(image)}. Add the batch dimension with [None]; "
                "three-dimensional "
                "images are not supported."
            )
        if image.is_complex():
            raise TypeError(
                "y must be real, or the physics give real images, got "
                f"{image.dtype}. Give the real and imaginary part as two channels."
            )
        self.shape = image.shape
        channels = image.shape[1]
        # A gray prior takes a two-channel image for real and imaginary part.
        self.is_complex = in_channels == 1 and channels == 2
        if channels != in_channels and not self.is_complex:
            hint = "gray" if in_channels == 1 else "colour"
            raise ValueError(
                f"The model has {hint} filters (in_channels={in_channels}), but the "
                "image "
                f"has {channels} channels (shape {tuple(image.shape)}). Choose "
                "weights for "
                f"{channels} channels."
            )
        self.real = self.is_complex and complex_mode == "real"
        self.b = self.extract(image)

    def extract(self, image: Tensor) -> Tensor:
        """Adjoint of :meth:`embed`."""
        return image[:, :1] if self.real else image

    def embed(self, x: Tensor) -> Tensor:
        """Turns what is solved for into an image of the physics."""
        return torch.cat([x, torch.zeros_like(x)], 1) if self.real else x

    def A_adjoint(self, y: Tensor) -> Tensor:  # noqa: ARG002 - known since construction
        """Returns the right-hand side."""
        return self.b

    def A_adjoint_A(self, x: Tensor) -> Tensor:
        """Applies the normal operator."""
        if self.denoising:
            return x
        image = self.embed(x)
        if hasattr(self.physics, "A_adjoint_A"):
            return self.extract(self.physics.A_adjoint_A(image))
        return self.extract(self.physics.A_adjoint(self.physics.A(image)))


def _intensity(
    scale: float | str | None, operator: _ImageOperator, notes: list[str]
) -> Tensor:
    """Intensity of the images ``(B,)`` by which the data are divided."""
    b = operator.b.detach()
    ones = b.new_ones(len(b))
    if scale is None:
        return ones
    if not isinstance(scale, str):
        return scale * ones
    with torch.no_grad():
        # x is about t A^T y with the step t of steepest descent, whatever ||A|| is.
        gain = inner(b, operator.A_adjoint_A(b))
        t = (inner(b, b) / gain).where(gain > 0, ones)
        size = t * b.abs().flatten(1).amax(1)
        decade = 10 ** (size / 2).log10().ceil()
    factor = decade.where((size > 0) & size.isfinite(), ones)
    if (factor != 1).any():
        notes.append(
            "The intensity is far from [0, 1]: data were divided by "
            f"{factor.tolist()} and the result multiplied by it (scale='auto')."
        )
    return factor


def _adjoint(physics: Any, y: Any) -> Any:
    shape = (
        [tuple(part.shape) for part in y] if isinstance(y, TensorList) else _shape(y)
    )
    try:
        image = physics.A_adjoint(y)
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"y of {shape} does not fit the physics {type(physics).__name__}: {error}"
        ) from error
    first = y[0] if isinstance(y, TensorList) else y
    if isinstance(image, Tensor) and image.ndim == 4 and len(image) != len(first):
        raise ValueError(
            f"y of {shape} holds {len(first)} samples, but the physics makes "
            f"{len(image)} images of it (shape {tuple(image.shape)}). Add the batch or "
            "channel dimension that y lacks."
        )
    return image


def _is_noise_level(value: Any) -> bool:
    return isinstance(value, (Number, Tensor, np.ndarray, list, tuple, str))


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {tuple(shape)}"


def _check_measurements(y: Any, reference: Tensor) -> None:
    parts = list(y) if isinstance(y, TensorList) else [y]
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"y must be a torch.Tensor, got {type(part).__name__}.")
        if not (part.is_floating_point() or part.is_complex()):
            raise TypeError(
                f"y must be floating point, got {part.dtype}. Divide 8-bit images by "
                "255."
            )
        if part.is_floating_point() and part.dtype != reference.dtype:
            raise ValueError(
                f"y has dtype {part.dtype}, the model {reference.dtype}. Convert one: "
                f"y.to({reference.dtype}) or model.to({part.dtype})."
            )
        if part.device != reference.device:
            raise ValueError(
                f"y is on {part.device}, the model on {reference.device}. Move one of "
                "them."
            )
        if part.ndim == 0 or part.numel() == 0:
            raise ValueError(f"y is empty: shape {tuple(part.shape)}.")
        if not torch.isfinite(part).all():
            raise ValueError(
                "y holds NaN or infinity. Remove or mask these measurements."
            )


def _check_image(name: str, image: Any, operator: _ImageOperator) -> Tensor:
    if not isinstance(image, Tensor) or image.shape != operator.shape:
        raise ValueError(
            f"{name} must be an image of shape {tuple(operator.shape)}, got "
            f"{_shape(image)}."
        )
    return image


def _per_sample(name: str, value: Any, like: Tensor) -> Tensor:
    """Checks a number, or one per sample, and returns it as ``(B,)``."""
    try:
        values = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        values = values.reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a number or a tensor, got {type(value).__name__}."
        ) from error
    if len(values) not in (1, len(like)):
        raise ValueError(
            f"{name} must hold one value, or one per sample ({len(like)}), got "
            f"{len(values)}."
        )
    checked = values.detach()
    if not bool((checked >= 0).all()) or not math.isfinite(float(checked.sum())):
        raise ValueError(
            f"{name} must not be negative and must be finite, got {checked.tolist()}."
        )
    return values.expand(len(like))
