"""Larger priors that start where smaller ones ended."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepinv_deal.operators import MultiConv
from deepinv_deal.priors import DEALPrior


def grow(prior: DEALPrior, num_filters: int, strength: float = 0.1) -> DEALPrior:
    r"""
    Returns a prior with more filters that reconstructs nearly as the given one does.

    The new filters of :math:`W` are random and weak, and do not enter the old masks
    (the new columns of the old rows of :math:`V_1, V_2` are zero), so that a training
    can go on where that of the small prior ended.

    |sep|

    :Example:

    >>> from deepinv_deal.priors import DEALPrior
    >>> from deepinv_deal.training import grow
    >>> grow(DEALPrior(num_filters=4), 6).num_filters
    6

    :param DEALPrior prior: the prior to copy.
    :param int num_filters: number of filters of the new prior, at least the old one.
    :param float strength: size of the new filters' coefficients relative to the old.
    :raises ValueError: if the prior has more filters already.
    """
    n = prior.num_filters
    if num_filters < n:
        raise ValueError(
            f"num_filters must be at least the prior's {n}, got {num_filters}: filters "
            "can be added, not removed."
        )
    grown = DEALPrior(prior.in_channels, num_filters, prior.normalization)
    grown.to(prior.kappa.coefficients)
    state = grown.state_dict()
    for name, old in prior.state_dict().items():
        new = state[name]
        if new.shape == old.shape:
            new.copy_(old)
        elif name == "mask_network.scaling.coefficients":  # one row per filter
            new[:n], new[n:] = old, old.mean(0)
        else:  # kernels, of which the last layers' have more rows and columns
            new *= old.square().mean().sqrt() / new.square().mean().sqrt()
            if name.startswith("W."):
                new *= strength
            new[:n] = 0
            new[:n, : old.shape[1]] = old
    return grown


#: The orthonormal opponent colours of red, green and blue: brightness and two of hue.
OPPONENT_COLORS = torch.tensor(
    [[2**0.5, 2**0.5, 2**0.5], [3**0.5, 0, -(3**0.5)], [1, -2, 1]], dtype=torch.float64
).div(6**0.5)

#: Noise level, in gray levels, where brightness and hue are regularised as gray images.
_BALANCED_LEVEL = 15.0


def color_from_gray(prior: DEALPrior, num_filters: int) -> DEALPrior:
    r"""
    Returns a prior for colour images that treats opponent colours as gray images.

    With the orthonormal opponent colours :math:`(r + g + b) / \sqrt 3`,
    :math:`(r - b) / \sqrt 2` and :math:`(r - 2 g + b) / \sqrt 6`, the first has
    :math:`\sqrt 3` times the contrast of a gray image at the same noise, so its masks
    are those of the gray prior for the noise level :math:`\sigma / \sqrt 3`. Its
    regularization relative to that of the other two is right at
    :math:`\sigma = 15/255`. All filters of the gray prior serve brightness, and those
    with the largest kernels in the last layer each of the other two. With :math:`3 n`
    filters, this is denoising of each opponent colour as a gray image; with fewer, the
    masks of hue lack features, and denoise worse until they are trained. A training can
    go on from there and lets the colours see each other.

    |sep|

    :Example:

    >>> from deepinv_deal.priors import DEALPrior
    >>> from deepinv_deal.training import color_from_gray
    >>> color = color_from_gray(DEALPrior(num_filters=4), 8)
    >>> color.in_channels, color.num_filters
    (3, 8)

    :param DEALPrior prior: prior for gray images, with :math:`n` filters.
    :param int num_filters: number of filters of the new prior: :math:`n` for
        brightness and up to :math:`n` for each of the other two.
    :raises ValueError: if the prior is not for gray images or does not regularize, or
        the filters cannot be shared out.
    """
    n, rest = prior.num_filters, num_filters - prior.num_filters
    if prior.in_channels != 1:
        raise ValueError(
            f"prior must be for gray images, got one for {prior.in_channels} channels."
        )
    if not (rest > 0 and rest % 2 == 0 and rest <= 2 * n):
        raise ValueError(
            f"num_filters must be {n} for brightness and an even number up to {2 * n} "
            f"for hue, at most {3 * n} in all, got {num_filters}."
        )
    color = DEALPrior(3, num_filters, prior.normalization).to(prior.kappa.coefficients)
    strongest = prior.W.weight[-1].flatten(1).norm(dim=1).argsort(descending=True)
    hue = strongest[: rest // 2].sort().values
    subsets = [torch.arange(n), hue, hue]
    with torch.no_grad():
        levels = prior.kappa.coefficients.new_tensor([[_BALANCED_LEVEL]])
        brightness, hue_weight = prior.kappa(levels / math.sqrt(3)), prior.kappa(levels)
        if not (brightness > 0 and hue_weight > 0):
            raise ValueError(
                "prior must have positive regularization weights kappa at noise levels "
                f"of 8.7 and 15, got {float(brightness):g} and {float(hue_weight):g}."
            )
        ratio = float(brightness / hue_weight)
        _opponent(prior.W, color.W, subsets, last=math.sqrt(ratio))
        masks, new = prior.mask_network, color.mask_network
        _opponent(masks.W, new.W, subsets, first=1 / math.sqrt(3))
        for v, v_new in zip(masks.V, new.V, strict=True):
            v_new.copy_(_block_diagonal([v[s][:, s] for s in subsets]))
        for name in ("phi1", "phi2", "phi3"):
            getattr(new, name).load_state_dict(getattr(masks, name).state_dict())
        scaling = masks.scaling
        nearer = scaling.knots.to(levels) / math.sqrt(3)
        scalings = [
            scaling(nearer[:, None].expand(-1, n)).T + math.log(3) / 2,
            *[scaling.coefficients[s] for s in subsets[1:]],
        ]
        new.scaling.coefficients.copy_(torch.cat(scalings))
        # The filters are divided by their norm, the regularization must not be.
        gain = color.W.sqnorm() / prior.W.sqnorm()
        color.kappa.coefficients.copy_(gain * prior.kappa.coefficients)
    return color


def _opponent(
    gray: MultiConv,
    color: MultiConv,
    subsets: list[Tensor],
    first: float = 1.0,
    last: float = 1.0,
) -> None:
    """Copies filters, each subset to see one opponent colour; factors of brightness."""
    # Of zero mean already: the constraint on the new kernels, of three input channels,
    # would leave the mean in those of hue.
    kernel = gray.weight[0] - gray.weight[0].mean((1, 2, 3), keepdim=True)
    colors = OPPONENT_COLORS.to(kernel)[:, :, None, None]
    color.weight[0].copy_(torch.cat([c * kernel for c in colors]))
    color.weight[0][: len(kernel)] *= first
    color.weight[1].copy_(_block_diagonal(3 * [gray.weight[1]]))
    color.weight[2].copy_(_block_diagonal([gray.weight[2][s] for s in subsets]))
    color.weight[2][: len(subsets[0])] *= last


def _block_diagonal(kernels: list[Tensor]) -> Tensor:
    """Kernels ``(C_out, C_in, k, k)`` for features side by side."""
    k = kernels[0].shape[-1]
    blocks = [
        torch.block_diag(*(kernel[..., i, j] for kernel in kernels))
        for i in range(k)
        for j in range(k)
    ]
    return torch.stack(blocks, -1).unflatten(-1, (k, k))
