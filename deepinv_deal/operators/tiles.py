"""Convolutions of many channels by Fourier transforms of tiles."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

#: Side, in pixels, of the tiles that are transformed.
SIDE = 32

#: Numbers in the tiles of one part, all channels, so that it stays in the cache. A part
#: is at least one row of tiles.
PART = 2**19


class TiledConvolution:
    r"""
    A zero-padded convolution of stride 1 by the overlap-save method, without gradients.

    The image is cut into tiles that overlap by :math:`k - 1` pixels. In the Fourier
    transforms of a tile, a convolution from n to n' channels is one n x n' matrix for
    every frequency; :math:`k - 1` rows and columns of the result are those of a
    circular convolution, and are cut off. The :math:`k^2` multiplications for each pair
    of channels and pixel become about :math:`2 \cdot 32^2 / (33 - k)^2`, plus the
    transforms of all channels. It pays for large kernels of many channels.

    Rounding is relative to the largest value of a tile, and a value that is not finite
    spoils its whole tile.

    :param torch.Tensor kernel: shape ``(C_out, C_in, k, k)``, k odd.
    """

    def __init__(self, kernel: Tensor):
        self.kernel = kernel.detach().clone()  # as it is now
        self.c_out, self.c_in, self.k, _ = kernel.shape
        #: Rows and columns of the result of one tile.
        self.step = SIDE - self.k + 1

    @staticmethod
    def pays(kernel: Tensor) -> bool:
        """
        Tells whether tiles were measured to be faster for such kernels, on a CPU whose
        Fourier transforms are those of MKL.
        """
        c_out, c_in, k, _ = kernel.shape
        known = kernel.device.type == "cpu" and torch.backends.mkl.is_available()
        precise = kernel.dtype in (torch.float32, torch.float64)
        large = k in (7, 9, 11, 13) and c_in >= 12 and c_in * c_out >= 256
        return known and precise and large

    def suits(self, x: Tensor) -> bool:
        """
        Tells whether tiles waste little of an image, and no gradients are asked for.
        """
        rows, columns = self._tiles(x)
        covered = rows * columns * self.step**2
        return (
            not torch.is_grad_enabled()
            and x.dtype == self.kernel.dtype
            and len(x) * rows * columns >= 4
            and 2 * covered <= 3 * x.shape[-2] * x.shape[-1]
        )

    def _tiles(self, x: Tensor) -> tuple[int, int]:
        height, width = x.shape[-2:]
        return -(-height // self.step), -(-width // self.step)

    @cached_property
    @torch.no_grad()
    def _spectrum(self) -> Tensor:
        """The matrices of all frequencies, ``(F, C_in, C_out)``."""
        # conv2d is a correlation, whose transform is that of the flipped kernel.
        spectrum = torch.fft.rfft2(self.kernel.flip(-2, -1), s=(SIDE, SIDE))
        return spectrum.flatten(2).permute(2, 1, 0).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """Convolves ``x (B, C_in, H, W)``; the size stays."""
        batch, _, height, width = x.shape
        rows, columns = self._tiles(x)
        out = x.new_empty(batch, height, width, self.c_out)  # channels last
        numbers = max(1, columns * SIDE**2 * max(self.c_in, self.c_out))
        fitting = max(1, PART * torch.get_num_threads() // numbers)  # rows of tiles
        samples = max(1, fitting // max(1, rows))
        for image, target in zip(x.split(samples), out.split(samples), strict=True):
            for first in range(0, rows, fitting):
                number = min(fitting, rows - first)
                low = first * self.step
                high = min(height, low + number * self.step)
                strip = self._strip(image, low, number, columns)
                result = self._convolve(strip)
                target[:, low:high] = result[:, : high - low, :width]
        return out.permute(0, 3, 1, 2)

    def _strip(self, x: Tensor, low: int, rows: int, columns: int) -> Tensor:
        """Returns what some rows of tiles see, ``(B, C_in, h, w)``, amid zeros."""
        height, width = x.shape[-2:]
        pad = self.k // 2
        top, bottom = low - pad, low + rows * self.step + pad
        inside = x[..., max(0, top) : min(height, bottom), :]
        right = columns * self.step + pad - width
        zeros = (pad, right, max(0, -top), max(0, bottom - height))
        return F.pad(inside.contiguous(), zeros)

    def _convolve(self, strip: Tensor) -> Tensor:
        """Convolves rows of tiles; returns channels last, ``(B, h, w, C_out)``."""
        overlap = self.k - 1
        tiles = strip.unfold(2, SIDE, self.step).unfold(3, SIDE, self.step)
        tiles = tiles.permute(0, 2, 3, 1, 4, 5)  # (B, rows, columns, C_in, s, s)
        batch, rows, columns = tiles.shape[:3]
        spectrum = torch.fft.rfft2(tiles).flatten(4).flatten(0, 2)  # (n, C_in, F)
        # Contiguous copies are faster than to transform, or multiply, views of views.
        product = torch.bmm(spectrum.permute(2, 0, 1).contiguous(), self._spectrum)
        product = product.permute(1, 2, 0).contiguous().unflatten(2, (SIDE, -1))
        result = torch.fft.irfft2(product, s=(SIDE, SIDE))[..., overlap:, overlap:]
        # (n, C_out, pixels of a tile) -> (n, pixels, C_out)
        result = result.contiguous().flatten(2).mT.contiguous()
        result = result.view(batch, rows, columns, self.step, self.step, self.c_out)
        result = result.transpose(2, 3)
        return result.reshape(batch, rows * self.step, -1, self.c_out)
