"""Clocks, memory, and the time of one application of the operator."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deepinv_deal.models import DEAL
from deepinv_deal.operators import MultiConv


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


@dataclass(frozen=True)
class ApplicationTimes:
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
    prior = model.prior[0]
    weight = next(prior.parameters())
    rng = torch.Generator().manual_seed(0)
    shape = (1, prior.in_channels, size, size)
    x = torch.rand(shape, generator=rng, device="cpu").to(weight)
    with torch.no_grad():
        equation = prior.equation(lambda v: v, x, 25 / 255, 1.0)
        system = equation.freeze(x)
        plain = plain_normal(prior.W)
        long, short = 12, 2

        def steps(number: int) -> Any:
            zero = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            limited = replace(equation, inner_max_iter=number).freeze(x)
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
