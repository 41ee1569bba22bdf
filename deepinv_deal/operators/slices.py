"""Volumes as stacks of two-dimensional images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deepinv_deal.operators.multi_conv import wrapped

SliceMode = Literal["depth", "height", "width", "mean"]

#: Axes of a volume along which it can be sliced, and the mean over all three.
SLICE_AXES: tuple[str, ...] = ("depth", "height", "width")
SLICE_MODES: tuple[str, ...] = (*SLICE_AXES, "mean")


@dataclass(frozen=True)
class Slices:
    r"""
    The two-dimensional images of which an unknown ``(B, P D C, H, W)`` consists.

    C channels are one image for the filters; D slices are a volume, which may have P
    parts (real and imaginary). Filters see the P D slices of size ``(H, W)``; or, with
    ``mean``, also the P H slices ``(D, W)`` and the P W slices ``(D, H)``. A
    regularizer is then the mean of those of the three stacks,

    .. math::
        R(x) = \tfrac13 \sum_{o=1}^3 R_o(S_o x),

    where :math:`S_o` only rearranges pixels.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.operators import Slices
    >>> x = torch.rand(2, 5, 16, 17)  # two volumes of five slices
    >>> [tuple(stack.shape) for stack in Slices(depth=5, mean=True).stacks(x)]
    [(10, 1, 16, 17), (32, 1, 5, 17), (34, 1, 5, 16)]

    :param int channels: C, of images that the filters see.
    :param int depth: D; 1 for images.
    :param bool mean: whether filters see slices of all three orientations.
    """

    channels: int = 1
    depth: int = 1
    mean: bool = False

    @property
    def number(self) -> int:
        """Number of stacks: 1 or, for the mean, 3."""
        return 3 if self.mean else 1

    def planes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Returns rows and columns of the slices of every stack, from H and W."""
        planes = [(height, width), (self.depth, width), (self.depth, height)]
        return planes[: self.number]

    def stacks(self, x: Tensor) -> list[Tensor]:
        """
        Returns the stacks of slices, ``(B P D, C, H, W)`` and, for the mean, ``(B P H,
        C, D, W)`` and ``(B P W, C, D, H)``.

        :param torch.Tensor x: unknown ``(B, P D C, H, W)``.
        """
        if not self.mean:
            return [x.reshape(-1, self.channels, *x.shape[2:])]
        shape = (len(x), -1, self.depth, self.channels, *x.shape[2:])
        return [x.reshape(shape).permute(order).flatten(0, 2) for order in _ORDERS]

    def unknown(self, stacks: Sequence[Tensor], batch: int) -> Tensor:
        r"""
        Returns :math:`\sum_o S_o^{\top} s_o`, the adjoint of :meth:`stacks`.

        :param list stacks: the stacks :math:`s_o`, images like those of :meth:`stacks`.
        :param int batch: B.
        """
        first = stacks[0]
        if not self.mean:
            return first.reshape(batch, -1, *first.shape[2:])
        shape = (batch, -1, self.depth, self.channels, *first.shape[2:])
        total = first.reshape(shape)
        for stack, order in zip(stacks[1:], _ORDERS[1:], strict=True):
            axes = stack.reshape([total.shape[i] for i in order])
            total = total + axes.permute(_inverse(order))
        return total.flatten(1, 3)

    def each(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """
        Applies a map of images to images ``(n, C, h, w)`` to all slices, and returns
        the mean over the orientations.
        """
        stacks = [function(stack) for stack in self.stacks(x)]
        total = self.unknown(stacks, len(x))
        return total / self.number if self.mean else total

    # -- features of slices ------------------------------------------------------

    def pack(self, features: Sequence[Tensor], batch: int) -> Tensor:
        """
        Returns the features of all stacks in one tensor ``(B, K, H, W)``.

        Where there are several stacks, its entries are in no order that means anything:
        it is to be unpacked, or used entry by entry.

        :param list features: features ``(n, N, h, w)`` of every stack.
        :param int batch: B.
        """
        shape = (batch, -1, *features[0].shape[2:])
        parts = [f.reshape(shape) for f in features]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def unpack(self, packed: Tensor, number: int) -> list[Tensor]:
        """
        Inverts :meth:`pack`.

        :param torch.Tensor packed: features ``(B, K, H, W)``.
        :param int number: number N of features of every pixel.
        """
        parts = packed.chunk(self.number, 1)
        return [
            part.reshape(-1, number, *plane)
            for part, plane in zip(parts, self.planes(*packed.shape[2:]), strict=True)
        ]

    def voxels(self, features: Sequence[Tensor], batch: int) -> Tensor:
        """
        Returns features ``(n, N, h, w)`` of every stack at the voxels they belong to.

        :param list features: features of every stack.
        :param int batch: B.
        :return: shape ``(B, K, D, H, W)``; the features of the first part and the first
            stack come first.
        """
        parts = len(features[0]) // (batch * self.depth)
        found = []
        for feature, order in zip(features, _ORDERS, strict=False):
            axes = feature.unflatten(0, (batch, parts, -1)).permute(_inverse(order))
            # From (B, P, D, N, H, W) to (B, P N, D, H, W).
            found.append(axes.transpose(2, 3).flatten(1, 2))
        return torch.cat(found, 1)

    # -- convolutions of slices --------------------------------------------------

    def symbol(self, kernels: Sequence[Tensor], height: int, width: int) -> Tensor:
        r"""
        Returns the eigenvalues of symmetric circular convolutions of all slices.

        :param list kernels: for every stack kernels ``(B, C, n, n)`` with their centre
            in the middle; a pixel of a channel sees only that channel.
        :param int height: H.
        :param int width: W.
        :return: the mean over the orientations: not negative, ``(B, C, H, W)`` or for
            the mean ``(B, D C, H, W)``, eigenvalues for Fourier transforms over all
            three axes.
        """
        planes = self.planes(height, width)
        symbols = [_symbol(k, *plane) for k, plane in zip(kernels, planes, strict=True)]
        if not self.mean:
            return symbols[0]
        return mean_of_planes(symbols).transpose(1, 2).flatten(1, 2)


#: Orders of the axes ``(B, P, D, C, H, W)`` in which the slices of an orientation come
#: one after the other, the second one ``(B, P, H, C, D, W)``.
_ORDERS = ((0, 1, 2, 3, 4, 5), (0, 1, 4, 3, 2, 5), (0, 1, 5, 3, 2, 4))


def _inverse(order: tuple[int, ...]) -> list[int]:
    """Returns the order of axes that undoes another one."""
    return [order.index(i) for i in range(len(order))]


def mean_of_planes(maps: Sequence[Tensor]) -> Tensor:
    """
    Returns the mean of maps that vary in the planes of the slices only.

    :param list maps: for slices along depth, height and width maps ``(..., H, W)``,
        ``(..., D, W)`` and ``(..., D, H)``.
    :return: shape ``(..., D, H, W)``.
    """
    along_depth, along_height, along_width = maps
    total = along_depth[..., None, :, :] + along_height[..., :, None, :]
    return (total + along_width[..., None]) / 3


def _symbol(kernels: Tensor, height: int, width: int) -> Tensor:
    """Eigenvalues ``(B, C, H, W)`` of kernels ``(B, C, n, n)`` about their middle."""
    reach = kernels.shape[-1] // 2
    placed = wrapped(kernels, height, width).roll((-reach, -reach), (-2, -1))
    return torch.fft.fft2(placed).real.clamp_min(0)
