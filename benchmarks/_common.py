"""What several of these scripts share: clocks, memory, problems, deepinv's model."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import deepinv as dinv
import numpy as np
import skimage.data
import torch
from deepinv.physics import (
    MRI,
    Blur,
    Denoising,
    Downsampling,
    GaussianNoise,
    Inpainting,
    LinearPhysics,
)
from deepinv.physics.functional import gaussian_blur
from skimage.transform import rescale
from torch import Tensor
from torch.nn import functional as F

from deepinv_deal import DEAL, SolverOptions
from deepinv_deal.evaluation import Condition, Task
from deepinv_deal.evaluation.tasks import MRI_NOISE, line_mask
from deepinv_deal.operators import MultiConv
from deepinv_deal.priors import DEALPrior
from deepinv_deal.problems import operator_term
from deepinv_deal.weights import to_authors

# -- images ----------------------------------------------------------------------

#: Photographs, and how much they are shrunk.
PHOTOGRAPHS = {
    "astronaut": 0.35, "camera": 0.35, "coffee": 0.4, "chelsea": 0.6, "rocket": 0.4,
    "brick": 0.5, "coins": 0.5, "grass": 0.5, "gravel": 0.5, "moon": 0.35,
    "page": 0.7, "text": 0.8,
}  # fmt: skip


def crop(name: str, size: int) -> Tensor:
    """The middle of a photograph, ``(1, 1, size, size)``."""
    image = getattr(skimage.data, name)()
    gray = image.mean(-1) if image.ndim == 3 else image
    gray = rescale(gray / 255.0, PHOTOGRAPHS[name], anti_aliasing=True)
    top, left = ((n - size) // 2 for n in gray.shape)
    x = torch.from_numpy(gray[top : top + size, left : left + size]).float()
    return x[None, None].contiguous()


# -- problems --------------------------------------------------------------------


def _inpainting(x: Tensor) -> LinearPhysics:
    rng = torch.Generator().manual_seed(0)
    mask = (torch.rand(x.shape[1:], generator=rng, device="cpu") < 0.5).to(x)
    return Inpainting(tuple(x.shape[1:]), mask=mask)


def _deblurring(_: Tensor) -> LinearPhysics:
    return Blur(gaussian_blur(sigma=(1.6, 1.6)), padding="circular")


def _super_resolution(x: Tensor) -> LinearPhysics:
    kernel = gaussian_blur(sigma=(1.2, 1.2))
    return Downsampling(tuple(x.shape[1:]), filter=kernel, factor=2, padding="circular")


def _mri(x: Tensor) -> LinearPhysics:
    size = (int(x.shape[-2]), int(x.shape[-1]))
    return MRI(mask=line_mask(size, 4, 0.08), img_size=size)


#: One condition each: noise in gray levels, physics and weight.
SPEED_TASKS = {
    name: Task(name, (Condition("", *condition),), sigma=sigma, mri=name == "mri")
    for name, sigma, *condition in (
        ("denoising", None, 25.0, lambda _: Denoising(GaussianNoise(25 / 255))),
        ("inpainting", 15.0, 0.0, _inpainting, 1.0),
        ("deblurring", 15.0, 2.55, _deblurring, 0.5),
        ("super-resolution", 15.0, 2.55, _super_resolution, 0.28),
        ("mri", 15.0, round(255 * MRI_NOISE, 2), _mri, 0.05),
    )
}


def deepinv_model(prior: DEALPrior) -> dinv.models.DEAL:
    """
    Returns ``deepinv.models.DEAL`` with the weights of a prior.

    :param DEALPrior prior: with the norm rule ``"published"``; any number of filters.
    :raises ValueError: for another norm rule, which deepinv's model does not have.
    """
    if prior.normalization != "published":
        raise ValueError(
            f"deepinv.models.DEAL has the norm rule 'published' only, the weights have "
            f"{prior.normalization!r}."
        )
    color, n = prior.in_channels == 3, prior.num_filters
    model = dinv.models.DEAL(
        pretrained=None, color=color, clamp_output=False, device="cpu"
    )
    inner = model.model
    inner.last_c, channels = n, [*inner.W1.num_channels[:-1], n]
    for name in ("W1", "M1"):
        setattr(inner, name, type(inner.W1)(channels, [9] * 3, color=color))
    for name in ("M2", "M3"):
        setattr(inner, name, torch.nn.Conv2d(n, n, 3, padding=1, bias=False))
    inner.spline_scaling = type(inner.spline_scaling)(
        num_activations=n, num_knots=14, x_min=-1, x_max=51, init=3.0, clamp=False
    )
    missing, unexpected = inner.load_state_dict(to_authors(prior), strict=False)
    parameters = {name for name, _ in inner.named_parameters()}
    assert not unexpected and not parameters & set(missing)
    return model.to(next(prior.parameters())).eval()


# -- clocks and memory -------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds, when all work so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(
    function: Callable[[], Any], repeats: int, device: torch.device
) -> float:
    """
    Returns the median wall time of a function.

    :param Callable function: what to time; it runs once more, to warm up.
    :param int repeats: number of times.
    :param torch.device device: where it computes.
    """
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = clock(device)
        function()
        times.append(clock(device) - start)
    return float(np.median(times[1:]))


class PeakMemory:
    """
    The largest memory beyond that at the first start, while it is switched on.

    On a CPU it is the resident memory of the process, on Linux only.

    :param torch.device device: where the memory is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        #: In MB; NaN if the system does not tell.
        self.peak = math.nan
        self._before = math.nan

    def start(self) -> None:
        """Starts, or goes on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            now = torch.cuda.memory_allocated(self.device) / 1e6
        else:
            with contextlib.suppress(OSError, AttributeError):
                # Otherwise what others have freed would be used again, and not count.
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            with contextlib.suppress(OSError):
                # Sets the high-water mark to what is used now.
                Path("/proc/self/clear_refs").write_text("5")
            now = _resident("VmRSS")
        if math.isnan(self._before):
            self._before, self.peak = now, 0.0 * now

    def stop(self) -> None:
        """Stops."""
        if self.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.device) / 1e6
        else:
            now = _resident("VmHWM")
        self.peak = max(self.peak, now - self._before)


def _resident(name: str) -> float:
    """Returns a line of the process's status in MB, NaN where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return float(line.split()[1]) * 1.024e-3
    return math.nan


# -- one application of the operator -------------------------------------------------


class ApplicationTimes(NamedTuple):
    r"""
    Seconds for one application, medians.

    :param float normal: :math:`W^{\top} M^2 W` of this package.
    :param float plain: the same by ``conv2d`` and ``conv_transpose2d`` of contiguous
        tensors.
    :param float step: one conjugate gradient step for denoising.
    :param float mask: one mask.
    """

    normal: float
    plain: float
    step: float
    mask: float


def application_times(
    model: DEAL, size: int = 256, repeats: int = 9
) -> ApplicationTimes:
    """
    Times one application of the regularizer's operator, and what surrounds it.

    :param DEAL model: the model.
    :param int size: side of the image.
    :param int repeats: each time is the median of so many.
    :return: (:class:`ApplicationTimes`)
    """
    prior = model.prior
    weight = next(prior.parameters())
    rng = torch.Generator().manual_seed(0)
    shape = (1, prior.in_channels, size, size)
    x = torch.rand(shape, generator=rng, device="cpu").to(weight)
    with torch.no_grad():
        equation = prior.equation(
            operator_term(x, lambda v: v), sigma=25 / 255, lambda_reg=1.0
        )
        system = equation.freeze(x)
        plain = plain_normal(prior.W)
        long, short = 12, 2

        def steps(number: int) -> Any:
            zero = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            options = SolverOptions(inner_max_iter=number)
            limited = replace(equation, options=options).freeze(x)
            limited.squared_mask = system.squared_mask
            return limited.correction(x, zero)

        def seconds(function: Callable[[], Any]) -> float:
            return median_seconds(function, repeats, x.device)

        return ApplicationTimes(
            seconds(lambda: equation.regularizer.normal(x, system.squared_mask)),
            seconds(lambda: plain(x, system.squared_mask)),
            (seconds(lambda: steps(long)) - seconds(lambda: steps(short)))
            / (long - short),
            seconds(lambda: equation.regularizer.squared_mask(x)),
        )


def plain_normal(W: MultiConv) -> Callable[[Tensor, Tensor], Tensor]:
    r"""
    Returns :math:`(x, m^2) \mapsto W^{\top}(m^2 \odot W x)` by plain convolutions.

    :param MultiConv W: the filters.
    """
    kernels = [kernel.detach().contiguous() for kernel in W.kernels()]

    def normal(x: Tensor, squared_mask: Tensor) -> Tensor:
        for kernel in kernels:
            x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        x = squared_mask * x
        for kernel in reversed(kernels):
            x = F.conv_transpose2d(x, kernel, padding=kernel.shape[-1] // 2)
        return x

    return normal
