r"""
The multi-convolution :math:`W`: several convolutions without anything in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepinv_deal.operators.tiles import TiledConvolution

Normalization = Literal["published", "exact", "none"]
NORMALIZATIONS: tuple[str, ...] = ("published", "exact", "none")

#: Size of the DFT on which the published rule evaluates the spectrum of W^T W. The
#: official weights are only reproduced with this size.
PUBLISHED_DFT_SIZE = 256


class Convolution:
    """
    A zero-padded convolution of stride 1, evaluated in the layout that is fastest.

    CPU kernels compute 16 output channels at once, so a layer with 1 to 8 of them
    wastes most of the machine. There, 2 x 2 neighbouring output pixels are computed as
    four times as many channels, by a kernel enlarged by one pixel and a stride of 2:
    the same sums, 1.5 to 8 times faster. A large kernel from many channels to one is
    applied row by row, its rows as output channels, which are shifted and added. Large
    kernels of many channels are applied by Fourier transforms where no gradients are
    needed, see :class:`TiledConvolution`. On an accelerator large kernels are applied
    in blocks, see :class:`BlockConvolution`.

    :param torch.Tensor kernel: shape ``(C_out, C_in, k, k)``.
    :param int pad: rows and columns of zeros on each side; ``k // 2`` if ``None``,
        which keeps the size for odd k.
    """

    def __init__(self, kernel: Tensor, pad: int | None = None):
        c_out, c_in, k, _ = kernel.shape
        self.pad = k // 2 if pad is None else pad
        self.shrink = k - 1 - 2 * self.pad
        on_cpu = kernel.device.type == "cpu"
        self.by_rows = on_cpu and c_out == 1 and c_in >= 16 and k >= 9
        self.polyphase = on_cpu and c_out <= 8 and not self.by_rows
        self.blocks: BlockConvolution | None = None
        self.tiles: TiledConvolution | None = None
        if self.pad == k // 2 and BlockConvolution.pays(kernel):
            self.blocks = BlockConvolution(kernel)
        elif self.pad == k // 2 and TiledConvolution.pays(kernel):
            self.tiles = TiledConvolution(kernel)
        if self.by_rows:
            kernel = kernel.transpose(0, 2)  # (k, C_in, 1, k)
        if self.polyphase:
            shifted = [
                F.pad(kernel, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)
            ]
            kernel = torch.stack(shifted, 1).reshape(4 * c_out, c_in, k + 1, k + 1)
        # Channels-last kernels make PyTorch choose the faster layout for the features.
        # With one input channel every layout is contiguous, and only clone sets it.
        self.kernel = kernel.clone(memory_format=torch.channels_last)

    def __call__(self, x: Tensor) -> Tensor:
        """Convolves ``x (B, C_in, H, W)``; with the usual ``pad`` the size stays."""
        if self.tiles is not None and self.tiles.suits(x):
            return self.tiles(x)
        height, width = (n - self.shrink for n in x.shape[-2:])
        if self.by_rows:
            rows = F.conv2d(x, self.kernel, padding=self.pad)  # (B, k, H + 2 pad, W')
            shifted = [row[:, i : i + height] for i, row in enumerate(rows.unbind(1))]
            return torch.stack(shifted, 1).sum(1, keepdim=True)
        if self.blocks is not None:
            blocks = self.blocks(to_blocks(x))
            return from_blocks(blocks, height, width)
        if not self.polyphase:
            return F.conv2d(x, self.kernel, padding=self.pad)
        odd = (0, width % 2, 0, height % 2)
        phases = F.conv2d(
            F.pad(x, odd) if any(odd) else x, self.kernel, None, 2, self.pad
        )
        return F.pixel_shuffle(phases, 2)[..., :height, :width]


class MultiConvOperator:
    r"""
    The linear map :math:`W = C_n \cdots C_1` for given kernels, and its exact adjoint.

    Every layer is a convolution with zero padding, stride 1 and no bias, so all maps
    keep the image size. Kernels are odd-sized, hence the adjoint of a layer is the
    convolution with the flipped kernel and the channels exchanged.

    :param tuple kernels: the layers, shapes ``(C_out, C_in, k, k)``, first applied
        first.
    """

    def __init__(self, kernels: Sequence[Tensor]):
        self.kernels = tuple(kernels)
        self.in_channels = kernels[0].shape[1]
        self.out_channels = kernels[-1].shape[0]
        self.layers = [Convolution(kernel) for kernel in kernels]
        self.adjoint_layers = [
            Convolution(kernel.flip(-2, -1).transpose(0, 1))
            for kernel in reversed(kernels)
        ]
        #: Largest distance, in pixels, at which a pixel influences another.
        self.reach = sum(layer.pad for layer in self.layers)

    def to(self, dtype: torch.dtype) -> MultiConvOperator:
        """Returns the operator with its kernels rounded to another precision."""
        return type(self)([kernel.to(dtype) for kernel in self.kernels])

    def __call__(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        """Applies :math:`W`."""
        for layer in self.layers:
            x = layer(x)
        return x

    def adjoint(self, z: Tensor) -> Tensor:  # (B, C_out, H, W) -> (B, C_in, H, W)
        r"""Applies :math:`W^{\top}`."""
        for layer in self.adjoint_layers:
            z = layer(z)
        return z

    def normal(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_in, H, W)
        r"""Applies :math:`W^{\top} W`."""
        return self.adjoint(self(x))

    def normal_kernel(self) -> Tensor:
        r"""
        Returns the impulse responses of :math:`W^{\top} W`, away from any border.

        :return: shape ``(C, C, n, n)``: entry ``[i, j]`` is channel ``j`` of the
            response to a Dirac in channel ``i``, with
            :math:`n = 1 + 2 \sum_i (k_i - 1)`.
        """
        return self.adjoint(self.impulse_responses())

    def impulse_responses(self) -> Tensor:
        r"""
        Returns the responses of :math:`W` to a Dirac in each image channel.

        The Dirac is so far from the border that :math:`W^{\top}` can follow without
        meeting it.

        :return: shape ``(C, C_out, n, n)``, n as in :meth:`normal_kernel`.
        """
        centre, channels = 2 * self.reach, self.in_channels
        dirac = self.layers[0].kernel.new_zeros(
            channels, channels, 2 * centre + 1, 2 * centre + 1
        )
        dirac[:, :, centre, centre].fill_diagonal_(1.0)
        return self(dirac)

    def correlations(self) -> Tensor:
        r"""
        Returns the kernels of :math:`W_f^{\top} W_f` of every filter f, away from any
        border.

        :return: shape ``(C, C, C_out, n, n)``, n as in :meth:`normal_kernel`; entry
            ``[i, j]`` maps channel j to channel i.
        """
        responses = self.impulse_responses()
        n = responses.shape[-1]
        spectra = torch.fft.rfft2(responses)
        products = spectra[:, None].conj() * spectra[None]
        kernels = torch.fft.irfft2(products, s=(n, n))
        return torch.fft.fftshift(kernels, (-2, -1))


#: Side, in pixels, of the blocks whose pixels become channels.
BLOCK = 4


def to_blocks(x: Tensor) -> Tensor:
    """Brings ``(B, C, H, W)`` into blocks; images end in zeros if need be."""
    height, width = x.shape[-2:]
    rest = (0, -width % BLOCK, 0, -height % BLOCK)
    x = F.pad(x, rest) if any(rest) else x
    return F.pixel_unshuffle(x, BLOCK).contiguous(memory_format=torch.channels_last)


def from_blocks(x: Tensor, height: int, width: int) -> Tensor:
    """Brings blocks back into images of the given size."""
    return F.pixel_shuffle(x, BLOCK)[..., :height, :width]


class BlockConvolution:
    r"""
    A zero-padded convolution of images whose :math:`s \times s` blocks are channels.

    On pixels with few channels the matrix units of an accelerator have nothing to do.
    With the pixels of a block as channels, the same sums are a dense convolution of
    many channels with a small kernel: for 9 x 9 pixels and blocks of 4 x 4, one of 3 x
    3 blocks.

    :param torch.Tensor kernel: shape ``(C_out, C_in, k, k)``, k odd.
    :param int side: side :math:`s` of a block.
    """

    def __init__(self, kernel: Tensor, side: int = BLOCK):
        c_out, c_in, k, _ = kernel.shape
        pad = k // 2
        self.reach = -(-pad // side)  # in blocks
        n = side * (2 * self.reach + 1)
        # Pixel number p of a block sees the kernel shifted by p, and shifted windows
        # of the kernel amid zeros are that, in reverse.
        before = side * self.reach - pad + side - 1
        after = n + side - 1 - k - before
        windows = F.pad(kernel, (before, after, before, after))
        windows = windows.unfold(2, n, 1).unfold(3, n, 1).flip(2, 3)
        windows = windows.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
        # (C_out, C_in, s, s, N, s, N, s) -> (C_out s s, C_in s s, N, N)
        windows = windows.permute(0, 2, 3, 1, 5, 7, 4, 6)
        windows = windows.flatten(3, 5).flatten(0, 2)
        self.kernel = windows.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def pays(kernel: Tensor) -> bool:
        """Tells whether a kernel is large, of few channels, and on an accelerator."""
        return BlockedNormal.pays([kernel]) and min(kernel.shape[:2]) <= 8

    def __call__(self, x: Tensor) -> Tensor:
        """Convolves images ``(B, C_in s s, H / s, W / s)``."""
        return F.conv2d(x, self.kernel, padding=self.reach)


class BlockedNormal:
    r"""
    The map :math:`x \mapsto W^{\top} (m^2 \odot W x)` for accelerators.

    All layers work on images and features in blocks, see :class:`BlockConvolution`:
    measured on an H200 (128 filters, 16 images of 128 x 128), six times faster than the
    layers of :class:`MultiConvOperator` one by one.

    :param tuple kernels: the layers of W, first applied first.
    """

    def __init__(self, kernels: Sequence[Tensor]):
        self.layers = [BlockConvolution(k) for k in kernels]
        self.adjoint_layers = [
            BlockConvolution(k.flip(-2, -1).transpose(0, 1)) for k in reversed(kernels)
        ]

    @staticmethod
    def pays(kernels: Sequence[Tensor]) -> bool:
        """Tells whether kernels are large enough, and on an accelerator."""
        on_cpu = kernels[0].device.type == "cpu"
        return not on_cpu and all(kernel.shape[-1] >= 7 for kernel in kernels)

    def __call__(self, x: Tensor, squared_mask: Tensor) -> Tensor:
        """
        Applies the map.

        :param torch.Tensor x: images ``(B, C, H, W)``.
        :param torch.Tensor squared_mask: :math:`m^2` in blocks, by :func:`to_blocks`.
        """
        height, width = x.shape[-2:]
        inside: Tensor | None = None
        if height % BLOCK or width % BLOCK:
            # The zeros that complete the blocks must stay zeros in every layer.
            inside = to_blocks(x.new_ones(1, 1, height, width))
        w = self._chain(self.layers, to_blocks(x), inside)
        # New memory for large features takes about as long as the product.
        overwrite = not torch.is_grad_enabled()
        w = w.mul_(squared_mask) if overwrite else squared_mask * w
        blocks = self._chain(self.adjoint_layers, w, inside)
        return from_blocks(blocks, height, width)

    @staticmethod
    def _chain(
        layers: Sequence[BlockConvolution], x: Tensor, inside: Tensor | None
    ) -> Tensor:
        for i, layer in enumerate(layers):
            if i and inside is not None:
                x = x * inside.repeat(1, x.shape[1] // inside.shape[1], 1, 1)
            x = layer(x)
        return x


class CollapsedOperator(MultiConvOperator):
    r"""
    The same map as :class:`MultiConvOperator` of two layers, merged into one kernel.

    A composition of convolutions is one convolution with a kernel of size
    :math:`k_1 + k_2 - 1`, which costs less where there are many channels in between. It
    differs only near the border, where the second layer does not see what the first one
    carried out of the image. With the restriction :math:`R` to the image,

    .. math::
        R\, C_2\, R\, C_1 = R\, C_2 C_1 - R\, C_2 (I - R)\, C_1 .

    The last term, the *leak*, passes through a ring of half a kernel around the image,
    from a frame of the same width to that frame. Along an edge it is a convolution in
    one dimension, with the lines of the frame as channels; the corners of the ring,
    which two edges count, are subtracted once. So the two classes agree, and the border
    costs next to nothing.

    :param tuple kernels: two layers with kernels of the same size.
    """

    def __init__(self, kernels: Sequence[Tensor]):
        super().__init__(kernels)
        r, c = self.reach, self.in_channels
        dirac = kernels[0].new_zeros(c, c, 2 * r + 1, 2 * r + 1)
        dirac[:, :, r, r].fill_diagonal_(1.0)
        # The response to a Dirac is the flipped kernel: conv2d is a correlation.
        kernel = super().__call__(dirac).flip(-2, -1).transpose(0, 1)
        self.whole = Convolution(kernel)
        self.adjoint_whole = Convolution(kernel.flip(-2, -1).transpose(0, 1))
        #: Width of the ring outside and of the frame inside the image.
        self.frame = kernels[0].shape[-1] // 2
        # Rotations by 90 degrees bring every edge and every corner to the top left.
        rotated = [[k.rot90(i, (2, 3)) for k in kernels] for i in range(4)]
        self.edges = [_edge_leak(*pair) for pair in rotated]
        self.corners = [_corner_leak(*pair) for pair in rotated]
        self.adjoint_edges = [edge.transpose(0, 1).flip(-1) for edge in self.edges]
        self.adjoint_corners = [corner.mT for corner in self.corners]

    @staticmethod
    def pays(kernels: Sequence[Tensor]) -> bool:
        """Tells whether one kernel takes less than half the multiplications."""
        sizes = [kernel.shape[-1] for kernel in kernels]
        if len(sizes) != 2 or sizes[0] != sizes[1] or sizes[0] == 1:
            return False
        merged = kernels[-1].shape[0] * kernels[0].shape[1] * (2 * sizes[0] - 1) ** 2
        return 2 * merged < sum(kernel.numel() for kernel in kernels)

    def __call__(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        """Applies :math:`W`."""
        if min(x.shape[-2:]) < self.frame:
            return super().__call__(x)
        return self._without_leak(self.whole(x), x, self.edges, self.corners)

    def adjoint(self, z: Tensor) -> Tensor:  # (B, C_out, H, W) -> (B, C_in, H, W)
        r"""Applies :math:`W^{\top}`."""
        if min(z.shape[-2:]) < self.frame:
            return super().adjoint(z)
        x = self.adjoint_whole(z)
        return self._without_leak(x, z, self.adjoint_edges, self.adjoint_corners)

    def _without_leak(
        self,
        out: Tensor,
        x: Tensor,
        edges: Sequence[Tensor],
        corners: Sequence[Tensor],
    ) -> Tensor:
        """Subtracts from the frame of ``out`` what leaks from that of ``x``."""
        n, every = self.frame, slice(None)
        low, high = slice(None, n), slice(-n, None)
        # In the order in which counterclockwise rotations bring them to the (left) top.
        strips = [(low, every), (every, high), (high, every), (every, low)]
        squares = [(low, low), (low, high), (high, high), (high, low)]
        for i in range(4):
            edge, corner = (..., *strips[i]), (..., *squares[i])
            lines = x[edge].rot90(i, (2, 3)).flatten(1, 2)  # (B, C n, length)
            leak = F.conv1d(lines, edges[i], padding=edges[i].shape[-1] // 2)
            out[edge] -= leak.unflatten(1, (-1, n)).rot90(-i, (2, 3))
            twice = x[corner].rot90(i, (2, 3)).flatten(1) @ corners[i]
            out[corner] += twice.unflatten(1, (-1, n, n)).rot90(-i, (2, 3))
        return out


def _edge_leak(first: Tensor, second: Tensor) -> Tensor:
    """
    Returns what two layers carry over the top edge and back, from the first n rows of a
    wide image to the same, as the kernel of a convolution along the edge.

    :return: shape ``(C_out n, C_in n, 4 n + 1)``, n half a kernel.
    """
    n, c = first.shape[-1] // 2, first.shape[1]
    rows = torch.eye(c * n, dtype=first.dtype, device=first.device)
    ring = F.conv2d(F.pad(rows.view(-1, c, n, 1), (2 * n, 2 * n, 2 * n, 0)), first)
    leak = F.conv2d(F.pad(ring, (2 * n, 2 * n, 0, 2 * n)), second)
    # The response to a Dirac is the flipped kernel: conv1d is a correlation.
    return leak.flatten(1, 2).transpose(0, 1).flip(-1)


def _corner_leak(first: Tensor, second: Tensor) -> Tensor:
    """
    Returns what two layers carry over the corner at the top left and back, as a matrix.

    :return: shape ``(C_in n n, C_out n n)``, n half a kernel.
    """
    n, c = first.shape[-1] // 2, first.shape[1]
    pixels = torch.eye(c * n * n, dtype=first.dtype, device=first.device)
    ring = F.conv2d(F.pad(pixels.view(-1, c, n, n), (2 * n, 0, 2 * n, 0)), first)
    return F.conv2d(F.pad(ring, (0, 2 * n, 0, 2 * n)), second).flatten(1)


class MultiConv(nn.Module):
    r"""
    Learned multi-convolution :math:`W` with zero-mean first layer and unit norm.

    .. math::
        W = \frac{1}{\sqrt{L}} \, C_n \cdots C_1, \qquad \text{each output channel of }
        C_1 \text{ has zero mean over (input channel, height, width)},

    so :math:`W` annihilates constant images away from the border and
    :math:`\|W\|_2 \approx 1` (:footcite:t:`pourya2025dealing`, Section 3.1.3). The
    number :math:`L` is differentiable and follows one of two rules, which must be
    stored with the weights since they give different operators:

    * ``"published"``: the rule of the authors' code. The response of the unnormalised
      :math:`W^{\top} W` to one Dirac is Fourier transformed; gray: :math:`L` is the
      largest modulus; colour: the Dirac is in the green channel only and :math:`L` is
      the *sum* over channels of the largest moduli, which over-estimates
      :math:`\|W\|_2^2` by 1.5 to 1.7.
    * ``"exact"``: the largest eigenvalue over all frequencies of the symbol of
      :math:`W^{\top} W` (a Hermitian ``C x C`` matrix per frequency).
    * ``"none"``: :math:`L = 1`.

    Both refer to images without border: with zero padding in every layer the norm on a
    finite image differs slightly.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.operators import MultiConv
    >>> W = MultiConv((1, 4, 8, 16))
    >>> z = W(torch.rand(2, 1, 20, 21))
    >>> z.shape, W.adjoint(z).shape
    (torch.Size([2, 16, 20, 21]), torch.Size([2, 1, 20, 21]))

    :param tuple channels: number of channels before, between and after the layers.
    :param int kernel_size: odd size of every kernel.
    :param str normalization: ``"published"``, ``"exact"`` or ``"none"``.
    :param bool, str zero_mean: ``True``: zero mean of every output channel of the first
        layer, as above; ``"every"``: zero mean of every single kernel of every layer
        (:footcite:t:`pourya2024iteratively`), which for two layers annihilates affine
        images too; ``False``: no constraint.
    :raises ValueError: for an even kernel size, fewer than two entries in ``channels``
        or an unknown ``normalization`` or ``zero_mean``.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernel_size: int = 9,
        *,
        normalization: Normalization = "published",
        zero_mean: bool | Literal["every"] = True,
    ):
        super().__init__()
        if zero_mean not in (True, False, "every"):
            raise ValueError(
                f"zero_mean must be True, False or 'every', got {zero_mean!r}."
            )
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(
                f"kernel_size must be odd and positive, got {kernel_size}: with an "
                "even size the adjoint would be shifted by one pixel."
            )
        if len(channels) < 2:
            raise ValueError(
                "channels must hold at least the input and output channels, got "
                f"{tuple(channels)}."
            )
        _check_normalization(normalization)
        self.channels = tuple(channels)
        self.kernel_size = kernel_size
        self.normalization = normalization
        self.zero_mean = zero_mean
        self.weight = nn.ParameterList()
        for c_in, c_out in zip(channels[:-1], channels[1:], strict=True):
            weight = torch.empty(c_out, c_in, kernel_size, kernel_size)
            nn.init.kaiming_uniform_(weight, a=5**0.5)  # as torch.nn.Conv2d
            self.weight.append(nn.Parameter(weight))

    def operator(self, divide_by: Tensor | None = None) -> MultiConvOperator:
        """
        Returns the operator of the current weights, constraints and norm included.

        Take it once and apply it often: the constraints and the norm are evaluated
        here. Gradients flow through them into the weights.

        :param torch.Tensor divide_by: scalar by which to divide the operator.
        """
        kernels = self.kernels()
        if divide_by is not None:
            kernels[-1] = kernels[-1] / divide_by
        if CollapsedOperator.pays(kernels):
            return CollapsedOperator(kernels)
        return MultiConvOperator(kernels)

    def kernels(self) -> list[Tensor]:
        """Returns the layers' kernels, constraints and norm included."""
        kernels = self._zero_mean_kernels()
        if self.normalization != "none":
            kernels[-1] = kernels[-1] / self.sqnorm().sqrt()
        return kernels

    def _zero_mean_kernels(self) -> list[Tensor]:
        # The zero mean is a plain re-parametrisation: torch's parametrize would do the
        # same, but modules that use it cannot be pickled.
        kernels: list[Tensor] = list(self.weight)
        if self.zero_mean == "every":
            return [k - k.mean((2, 3), keepdim=True) for k in kernels]
        if self.zero_mean:
            kernels[0] = kernels[0] - kernels[0].mean((1, 2, 3), keepdim=True)
        return kernels

    def sqnorm(self, rule: Normalization | None = None) -> Tensor:
        r"""
        Estimates :math:`\|W\|_2^2` of the *unnormalised* operator.

        :param str rule: ``"published"`` or ``"exact"``; ``None``: the module's own.
        :return: scalar :math:`L`, differentiable in the weights.
        """
        rule = rule or self.normalization
        _check_normalization(rule)
        if rule == "none":
            return self.weight[0].new_ones(())
        kernel = MultiConvOperator(self._zero_mean_kernels()).normal_kernel()
        if rule == "exact":
            # (C, C, n, n) -> one Hermitian C x C matrix per frequency.
            symbol = torch.fft.fft2(kernel, s=(2 * PUBLISHED_DFT_SIZE,) * 2)
            # The Dirac sits at the centre: undo the phase of that shift.
            symbol = symbol * _centre_phase(kernel.shape[-1], symbol)
            symbol = symbol.permute(2, 3, 1, 0)
            if symbol.shape[-1] == 1:
                return symbol.real.max()
            return torch.linalg.eigvalsh(symbol)[..., -1].max()
        green = kernel[kernel.shape[0] // 2]
        # The authors pad (256 - 1) // 2 - reach/2 zeros on every side: 279 for 9x9
        # kernels.
        size = green.shape[-1] + 2 * (
            (PUBLISHED_DFT_SIZE - 1) // 2 - (green.shape[-1] - 1) // 4
        )
        spectrum = torch.fft.fft2(green, s=(size, size)).abs()
        return spectrum.flatten(1).amax(1).sum()

    def forward(self, x: Tensor) -> Tensor:
        """Applies :math:`W` to ``x`` of shape ``(B, C, H, W)``."""
        return self.operator()(x)

    def adjoint(self, z: Tensor) -> Tensor:
        r"""Applies :math:`W^{\top}` to ``z`` of shape ``(B, C_out, H, W)``."""
        return self.operator().adjoint(z)

    def extra_repr(self) -> str:
        """Describes the module."""
        return (
            f"channels={self.channels}, kernel_size={self.kernel_size}, "
            f"normalization={self.normalization!r}, zero_mean={self.zero_mean!r}"
        )


def wrapped(kernels: Tensor, height: int, width: int) -> Tensor:
    """
    Places kernels ``(..., n, m)`` at the corner of a periodic image.

    :param torch.Tensor kernels: what is larger than the image wraps around.
    :param int height: rows of the image.
    :param int width: columns of the image.
    :return: shape ``(..., height, width)``.
    """
    rows, columns = kernels.shape[-2:]
    kernels = F.pad(kernels, (0, -columns % width, 0, -rows % height))
    for dim, n in ((-2, height), (-1, width)):
        kernels = kernels.unflatten(dim, (-1, n)).sum(dim - 1)
    return kernels


def _check_normalization(name: str) -> None:
    if name not in NORMALIZATIONS:
        raise ValueError(
            f"normalization must be one of {NORMALIZATIONS}, got {name!r}."
        )


def _centre_phase(n: int, symbol: Tensor) -> Tensor:
    frequency = torch.fft.fftfreq(
        symbol.shape[-1], device=symbol.device, dtype=symbol.real.dtype
    )
    phase = torch.exp(2j * torch.pi * frequency * (n // 2))
    return phase[:, None] * phase[None, :]
