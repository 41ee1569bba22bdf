r"""Attentive quadratic regularizers in which groups of filters share one mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn import functional as F

from deepinv_deal.operators.blocks import BLOCK_BYTES, row_blocks
from deepinv_deal.operators.multi_conv import wrapped

#: Groups of filters.
GROUPS = 4

#: Rounds of the search for groups, and pixels of a mask that it looks at, about.
ROUNDS, LOOKED_AT = 10, 4096

#: Numbers in the features of all groups from which they are computed one by one.
TOGETHER = 2**22


@dataclass(frozen=True)
class GroupedQuadratic:
    r"""
    The closest regularizer whose filters form few groups with one mask each.

    .. math::
        W^{\top} m^2 W \approx \sum_{k=1}^{K} L_k^{\,} \, a_k \, L_k^{*}, \qquad
        L_k^{\,} L_k^{*} = \sum_{f \in k} s_f W_f^{\top} W_f^{\,}, \qquad
        a_k = \frac{\sum_{f \in k} e_f m_f^2}{\sum_{f \in k} e_f s_f}

    Every filter counts with its energy :math:`e_f` and the mean :math:`s_f` of its
    squared mask. The convolutions :math:`L_k` are the Cholesky factors of 3 x 3 or 1 x
    1 matrices, one for every frequency. Images are continued by their borders: trained
    filters hardly respond to a constant, up to the border, whatever their padding. In
    the middle it is exact for masks that do not vary over the image, up to tails of
    :math:`L_k`; and it costs 2 (K + 1) Fourier transforms, much less than :math:`W`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEALPrior
    >>> from deepinv_deal.problems import GroupedQuadratic
    >>> W = DEALPrior(num_filters=16).W.operator()
    >>> squared_mask = torch.full((1, 16, 64, 64), 0.3)
    >>> R = GroupedQuadratic.of(squared_mask, W.correlations().detach())
    >>> x = torch.zeros(1, 1, 64, 64)
    >>> x[..., 30:34, 30:34] = torch.rand(4, 4)
    >>> exact = W.adjoint(squared_mask * W(x)).detach()
    >>> bool((R(x) - exact).norm() < 0.01 * exact.norm())
    True

    :param list factors: spectra of the convolutions, ``(n, k, C, C, h, w)``, real if C
        is 1, of the groups that are applied together.
    :param torch.Tensor masks: the masks :math:`a_k` amid zeros, ``(n, K, *size)``.
    :param tuple size: rows and columns of the Fourier transforms.
    :param int reach: rows by which images are continued on each side.
    """

    factors: list[Tensor]
    masks: Tensor
    size: tuple[int, int]
    reach: int

    @classmethod
    def of(cls, squared_mask: Tensor, correlations: Tensor) -> GroupedQuadratic:
        r"""
        Groups the filters of a regularizer.

        :param torch.Tensor squared_mask: squared masks, ``(n, N, H, W)``.
        :param torch.Tensor correlations: kernels of :math:`W_f^{\top} W_f`, ``(C, C, N,
            l, l)``, from ``MultiConvOperator.correlations``.
        """
        group = group_masks(squared_mask).to(squared_mask.dtype)  # (n, N, K)
        energy = energies(correlations).sum(0)
        scale = squared_mask.mean((2, 3))  # (n, N)
        weight = group * energy[:, None]
        total = torch.einsum("nfk,nf->nk", weight, scale)[:, None]
        tiny = torch.finfo(total.dtype).tiny
        weight = torch.where(total > tiny, weight / total, 0)
        kernels = torch.einsum("nfk,nf,cdfij->nkcdij", group, scale, correlations)

        def put_masks(inside: Tensor) -> None:
            # In blocks: the product copies the masks.
            number, filters, height, width = squared_mask.shape
            row_bytes = number * filters * width * squared_mask.element_size()
            for rows in row_blocks(height, row_bytes, BLOCK_BYTES):
                part = squared_mask[..., rows, :]
                inside[..., rows, :] = torch.einsum("nfk,nfhw->nkhw", weight, part)

        return cls._of_kernels(kernels, put_masks, squared_mask.shape[2:])

    @classmethod
    def uniform(
        cls, square: float, correlations: Tensor, height: int, width: int
    ) -> GroupedQuadratic:
        """
        Makes the regularizer in which all filters have one mask, the same everywhere.

        :param float square: the squared mask.
        :param torch.Tensor correlations: as for :meth:`of`.
        :param int height: rows of the images.
        :param int width: columns of the images.
        """
        kernels = square * correlations.sum(2)[None, None]
        return cls._of_kernels(kernels, lambda inside: inside.fill_(1), (height, width))

    @classmethod
    def _of_kernels(
        cls, kernels: Tensor, put_masks: Callable[[Tensor], Any], shape: Sequence[int]
    ) -> GroupedQuadratic:
        """
        Makes it from the kernels of groups, ``(n, K, C, C, l, l)``, and a function that
        puts the masks into ``(n, K, H, W)``, for images of a shape ``(H, W)``.
        """
        length = kernels.shape[-1]
        reach = length // 4
        rows, columns = shape
        height, width = (
            next_fast_len(max(n + 2 * reach, length), real=True) for n in shape
        )
        masks = kernels.new_zeros(*kernels.shape[:2], height, width)
        put_masks(masks[..., reach : reach + rows, reach : reach + columns])
        # Of large images, what is needed on the way is large, too.
        together = masks.numel() * kernels.shape[2] <= TOGETHER
        step = kernels.shape[1] if together else 1
        factors = [
            cholesky(symbol(part, height, width)) for part in kernels.split(step, 1)
        ]
        return cls(factors, masks, (height, width), reach)

    def __call__(self, x: Tensor) -> Tensor:
        """Applies it to images ``(n, C, H, W)``."""
        r = self.reach
        rows, columns = (n + 2 * r for n in x.shape[2:])
        spectrum = torch.fft.rfft2(F.pad(x, (r,) * 4, mode="replicate"), s=self.size)
        total = torch.zeros_like(spectrum)
        parts = self.masks.split([part.shape[1] for part in self.factors], 1)
        for factors, masks in zip(self.factors, parts, strict=True):
            part = self._through(spectrum, factors, masks)
            total += part[:, 0] if part.shape[1] == 1 else part.sum(1)
            del part
        del spectrum  # of a large image, every vector counts
        back = torch.fft.irfft2(total, s=self.size)
        return folded(back[..., :rows, :columns], r)

    def _through(self, spectrum: Tensor, factors: Tensor, masks: Tensor) -> Tensor:
        """Takes spectra ``(n, C, ...)`` through some groups, ``(n, K, C, ...)``."""
        v = product(factors.conj(), spectrum[:, None, :, None], 2)
        v = torch.fft.irfft2(v, s=self.size).mul_(masks[:, :, None])
        v = torch.fft.rfft2(v)
        # New memory of large images takes longer than the product.
        gray = factors.shape[2] == 1
        return v.mul_(factors[:, :, 0]) if gray else product(v[:, :, None], factors, 3)


def symbol(kernels: Tensor, height: int, width: int) -> Tensor:
    """Returns the spectra of centred kernels for transforms of a size."""
    placed = wrapped(kernels, height, width)
    return torch.fft.rfft2(placed.roll((-(kernels.shape[-1] // 2),) * 2, (-2, -1)))


def energies(correlations: Tensor) -> Tensor:
    """Returns the energies of filters in each channel, ``(C, N)``."""
    own = correlations.diagonal(dim1=0, dim2=1)  # (N, l, l, C)
    middle = correlations.shape[-1] // 2
    return own[:, middle, middle].mT


def product(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Returns the sum of products over a dimension, which has one entry for gray."""
    c = a * b
    return c.squeeze(dim) if c.shape[dim] == 1 else c.sum(dim)


def folded(x: Tensor, r: int) -> Tensor:
    """Adds r rows and columns on every side to those next to them: adjoint of pad."""
    for dim in (-2, -1):
        before, middle, after = x.split([r, x.shape[dim] - 2 * r, r], dim)
        middle = middle.clone()
        middle.select(dim, 0).add_(before.sum(dim))
        middle.select(dim, -1).add_(after.sum(dim))
        x = middle
    return x


def group_masks(squared_mask: Tensor) -> Tensor:
    """
    Groups filters whose squared masks look alike, up to a factor, by k-means.

    The first centres are masks that are far from each other, so that the result is no
    matter of chance.

    :param torch.Tensor squared_mask: shape ``(n, N, H, W)``.
    :return: whether a filter is in a group, boolean, ``(n, N, K)``; groups may be
        empty.
    """
    height, width = squared_mask.shape[2:]
    step = max(1, round((height * width / LOOKED_AT) ** 0.5))
    masks = squared_mask[..., ::step, ::step].flatten(2)
    size = masks.norm(dim=2, keepdim=True)
    masks = masks / size.where(size > 0, 1)
    number = min(GROUPS, masks.shape[1])
    centres = masks[:, :1]
    for _ in range(number - 1):
        farthest = distances(masks, centres).amin(2).argmax(1)
        index = farthest[:, None, None].expand(-1, 1, masks.shape[2])
        centres = torch.cat([centres, masks.gather(1, index)], 1)
    names = torch.arange(number, device=masks.device)
    for _ in range(ROUNDS):
        nearest = distances(masks, centres).argmin(2)
        group = nearest[..., None] == names
        members = group.to(masks).mT  # (n, K, N)
        count = members.sum(2, keepdim=True)
        centres = torch.where(count > 0, members @ masks / count.clamp_min(1), centres)
    return group


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns squared distances of vectors ``(n, N, d)``, ``(n, K, d)``: (n, N, K)."""
    squares = a.square().sum(2)[..., None] + b.square().sum(2)[:, None]
    return (squares - 2 * a @ b.mT).clamp_min(0)


def cholesky(M: Tensor) -> Tensor:
    r"""
    Returns the factors :math:`L` of :math:`M = L L^{*}`, entry by entry.

    :param torch.Tensor M: Hermitian positive semi-definite matrices, ``(n, K, C, C,
        ...)``, of few rows: much faster than one after the other.
    :return: lower triangular matrices, shape of ``M``; real if C is 1.
    """
    if M.shape[2] == 1:
        return M.real.clamp_min(0).sqrt()
    L, least = torch.zeros_like(M), torch.finfo(M.dtype).eps
    for j in range(M.shape[2]):
        for i in range(j, M.shape[2]):
            done = (L[:, :, i, :j] * L[:, :, j, :j].conj()).sum(2)
            rest = M[:, :, i, j] - done
            if i == j:
                # Not below the rounding of the Fourier transform, which would be large
                # against what is left at frequencies that the filters do not pass.
                floor = least * M[:, :, j, j].real.amax((-2, -1), keepdim=True)
                root = torch.maximum(rest.real, floor).sqrt()
                L[:, :, j, j] = root
            else:
                L[:, :, i, j] = torch.where(root > 0, rest / root, 0)
    return L
