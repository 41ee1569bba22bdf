r"""Convolutions of which only some pixels are measured, by Fourier transforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepinv_deal._batch import norm
from deepinv_deal.operators.multi_conv import wrapped
from deepinv_deal.solvers.preconditioner import faithful


@dataclass(frozen=True)
class SampledConvolution:
    r"""
    The normal operator :math:`C^{\top} S C` of a circular convolution that is sampled.

    So are blurs whose border is not measured (``padding="valid"``) and downsampling:
    sums over large kernels, pixel by pixel, become four Fourier transforms.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Blur
    >>> from deepinv_deal.problems import SampledConvolution
    >>> physics = Blur(torch.ones(1, 1, 3, 3) / 9, padding="valid")
    >>> x = torch.rand(1, 1, 16, 17)
    >>> H = SampledConvolution.of(physics, x, physics.A(x))
    >>> torch.allclose(H(x), physics.A_adjoint_A(x), atol=1e-6)
    True

    :param torch.Tensor symbol: :math:`C`, spectrum as of ``torch.fft.rfft2``.
    :param torch.Tensor sampled: :math:`S`, ``(H, W)``: 1 for pixels that are measured,
        else 0.
    """

    symbol: Tensor
    sampled: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Applies it to images ``(B, C, H, W)``."""
        size = x.shape[-2:]
        spectrum = self.symbol * torch.fft.rfft2(x)
        blurred = self.sampled * torch.fft.irfft2(spectrum, s=size)
        return torch.fft.irfft2(self.symbol.conj() * torch.fft.rfft2(blurred), s=size)

    @classmethod
    def of(cls, physics: Any, x: Tensor, y: Any) -> SampledConvolution | None:
        """
        Returns that of a physics with a ``filter``, if it is one.

        :param object physics: forward operator.
        :param torch.Tensor x: images that show it, ``(B, C, H, W)``.
        :param torch.Tensor y: what it makes of them.
        :return: ``None`` if it is none: it must give ``y`` up to rounding.
        """
        kernel: Any = getattr(physics, "filter", None)
        for image in (kernel, x, y):
            if not isinstance(image, Tensor) or image.ndim != 4 or image.is_complex():
                return None
        (rows, columns), (height, width) = kernel.shape[-2:], x.shape[-2:]
        if (
            rows > height
            or columns > width
            or not 0 < y[0, 0].numel() < x[0, 0].numel()
        ):
            return None
        origin = (-(rows // 2), -(columns // 2))
        placed = wrapped(kernel.to(x), height, width).roll(origin, (-2, -1))
        symbol = torch.fft.rfft2(placed)
        blurred = torch.fft.irfft2(symbol * torch.fft.rfft2(x), s=(height, width))
        sampled = x.new_zeros(height, width)
        if y.shape[-2:] == (height - rows + 1, width - columns + 1):
            start = (rows - 1 - rows // 2, columns - 1 - columns // 2)
            where = tuple(
                slice(i, i + n) for i, n in zip(start, y.shape[-2:], strict=True)
            )
        else:
            step = -(-height // y.shape[-2])
            where = (slice(None, None, step), slice(None, None, step))
        found = blurred[..., where[0], where[1]]
        if found.shape != y.shape or not faithful(norm(found - y) / norm(y)).all():
            return None
        sampled[where] = 1
        return cls(symbol.detach(), sampled)
