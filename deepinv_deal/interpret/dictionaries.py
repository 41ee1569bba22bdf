r"""What the dictionaries make images of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.interpret._figures import (
    BLUE,
    finish,
    largest,
    new_figure,
    show,
    show_tiles,
)
from deepinv_deal.interpret._models import dictionary_prior
from deepinv_deal.models import SynthesisInfo
from deepinv_deal.operators import PatchConv
from deepinv_deal.operators.patches import PatchFrame
from deepinv_deal.problems import operator_term

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AtomUsage:
    r"""
    The atoms of a dictionary, the most used first.

    :param torch.Tensor atoms: normalised atoms as images ``(p, n, n)``.
    :param torch.Tensor use: share of each in the sum of all absolute coefficients,
        ``(p,)``, falling, with sum 1.
    :param torch.Tensor order: index of each in the model, ``(p,)``.
    :param torch.Tensor free_atoms: orthonormal basis of the patches that cost nothing,
        the smoothest first, ``(r, n, n)``; the first is constant.
    """

    atoms: Tensor
    use: Tensor
    order: Tensor
    free_atoms: Tensor


@torch.no_grad()
def atom_usage(model: Any, info: SynthesisInfo) -> AtomUsage:
    r"""
    Returns the atoms sorted by their share in the sum of all :math:`|a_{k,j}|`.

    The free atoms of a model are any basis of a subspace. Those returned here are its
    principal axes for the sum of squared differences of neighbouring pixels, so that
    the smoothest come first.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import SmoothPlusSparse
    >>> from deepinv_deal.interpret import atom_usage
    >>> model = SmoothPlusSparse(num_atoms=20, patch_size=5, num_free_atoms=10)
    >>> _, info = model(torch.rand(1, 1, 16, 17), sigma=0.1, return_info=True)
    >>> found = atom_usage(model, info)
    >>> found.atoms.shape, found.free_atoms.shape
    (torch.Size([20, 5, 5]), torch.Size([11, 5, 5]))

    :param object model: :class:`deepinv_deal.PatchSynthesis` or
        :class:`deepinv_deal.SmoothPlusSparse`.
    :param SynthesisInfo info: from ``model(y, ..., return_info=True)``.
    :return: (:class:`AtomUsage`)
    :raises TypeError: for another model.
    """
    frame = dictionary_prior(model).dictionary.frame()
    use = _by_atom(info, len(frame.C)).abs().sum((0, 1, 3, 4))
    use = use / use.sum().clamp_min(torch.finfo(use.dtype).tiny)
    order = use.argsort(descending=True, stable=True)
    atoms = frame.atoms / torch.linalg.matrix_norm(frame.atoms)[:, None, None]
    free = frame.free_features.kernels
    differences = torch.cat([free.diff(dim=d).flatten(1) for d in (1, 2)], 1)
    _, axes = torch.linalg.eigh(differences @ differences.T)  # roughness rises
    smooth = torch.tensordot(axes.T, free, 1)
    # Eigenvectors have no sign: the first is to be white.
    smooth[0] *= smooth[0].sum().sign()
    return AtomUsage(atoms[order], use[order], order, smooth)


@dataclass(frozen=True)
class Decomposition:
    r"""
    A reconstruction as a sum of three images, ``(B, C, H, W)`` as all that follow.

    :param torch.Tensor smooth: what the free atoms explain.
    :param torch.Tensor sparse: what the sparse combinations of atoms explain.
    :param torch.Tensor remainder: the rest, which the coupling :math:`\beta` allows.
    :param torch.Tensor num_atoms: how many atoms the patches that cover a pixel use, on
        average: few in flat regions, many where there is texture. The number for a
        patch is :math:`(\sum_j |a_{k,j}|)^2 / \sum_j a_{k,j}^2`, which is :math:`r` for
        :math:`r` coefficients of equal modulus and needs no threshold: the coefficients
        of weakly convex models are small rather than zero.
    """

    smooth: Tensor
    sparse: Tensor
    remainder: Tensor
    num_atoms: Tensor

    @property
    def image(self) -> Tensor:
        """The sum of the three, the reconstruction."""
        return self.smooth + self.sparse + self.remainder


@torch.no_grad()
def decompose(model: Any, x_hat: Tensor, info: SynthesisInfo) -> Decomposition:
    r"""
    Splits a reconstruction into smooth part, sparse part and remainder.

    Every patch is split, and overlapping patches are averaged: with the number
    :math:`N = \sum_k P_k^{\top} P_k \mathbf{1}` of patches that cover each pixel, the
    orthonormal free atoms :math:`Q` (constants included) and :math:`E_k = (I - Q
    Q^{\top}) P_k`,

    .. math::
        \hat x = \underbrace{\tfrac1N \sum_k P_k^{\top} Q Q^{\top} P_k \hat
        x}_{\text{smooth}} + \underbrace{\tfrac1N \sum_k P_k^{\top} D
        a_k}_{\text{sparse}} + \underbrace{\tfrac1N \sum_k P_k^{\top} (E_k \hat x - D
        a_k)}_{\text{remainder}},

    which is exact since :math:`\sum_k P_k^{\top} P_k \hat x = N \hat x`. For
    :class:`deepinv_deal.PatchSynthesis`, the smooth part is the average of the patch
    means.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import SmoothPlusSparse
    >>> from deepinv_deal.interpret import decompose
    >>> model = SmoothPlusSparse(num_atoms=20, patch_size=5, num_free_atoms=10)
    >>> x_hat, info = model(torch.rand(1, 1, 16, 17), sigma=0.1, return_info=True)
    >>> torch.allclose(decompose(model, x_hat, info).image, x_hat, atol=1e-5)
    True

    :param object model: :class:`deepinv_deal.PatchSynthesis` or
        :class:`deepinv_deal.SmoothPlusSparse`.
    :param torch.Tensor x_hat: reconstruction, real, ``(B, C, H, W)``.
    :param SynthesisInfo info: what the model returned with it.
    :return: (:class:`Decomposition`)
    :raises TypeError: for another model or a complex image.
    """
    if x_hat.is_complex():
        raise TypeError(
            "x_hat must be real: give complex images as two channels, "
            "torch.cat([x_hat.real, x_hat.imag], 1)."
        )
    prior = dictionary_prior(model)
    problem = prior.problem(
        operator_term(x_hat),
        beta=_checked(info).beta,
        lambda_reg=info.lambda_reg,
    )
    free = problem.frame.free_features
    count = free.coverage(x_hat)
    scale = expand(info.beta, x_hat) * count
    smooth = free.adjoint(free(x_hat)) / count
    penalised = problem.features_adjoint(problem.features(x_hat)) / scale
    synthesis = problem.synthesis(info.coefficients)
    sparse = problem.features_adjoint(synthesis) / scale
    return Decomposition(
        smooth, sparse, penalised - sparse, _sparsity(problem.frame, info)
    )


def _sparsity(frame: PatchFrame, info: SynthesisInfo) -> Tensor:
    """Averages the numbers of atoms over the patches that cover each pixel."""
    a = _by_atom(info, len(frame.C))
    size = a.square().sum(2)
    number = a.abs().sum(2).square() / size.where(size > 0, 1)
    n = frame.features.patch_size
    cover = PatchConv(number.new_ones(1, n, n), frame.features.boundary)
    return cover.adjoint(number) / cover.adjoint(torch.ones_like(number))


def _checked(info: SynthesisInfo) -> SynthesisInfo:
    if not isinstance(info, SynthesisInfo):
        raise TypeError(
            "info must be what a dictionary model returns with return_info=True, got "
            f"{type(info).__name__}."
        )
    return info


def _by_atom(info: SynthesisInfo, num_atoms: int) -> Tensor:
    """The coefficients as ``(B, C, p, H', W')``."""
    if _checked(info).in_a_row:
        raise ValueError(
            "info is that of slices='mean', whose coefficients belong to slices of "
            "three orientations. Give that of another setting of slices."
        )
    return info.coefficients.unflatten(1, (-1, num_atoms))


def plot_atoms(
    usage: AtomUsage, num_atoms: int = 60, num_free_atoms: int = 24, columns: int = 12
) -> Figure:
    """
    Draws the most used atoms, some free atoms, and the share of each atom.

    :param AtomUsage usage: from :func:`atom_usage`.
    :param int num_atoms: number of atoms.
    :param int num_free_atoms: number of free atoms; the constant alone is not drawn.
    :param int columns: atoms per row.
    :return: the figure.
    """
    shown = [
        (
            usage.atoms[:num_atoms],
            f"atoms, the most used first\n{min(num_atoms, len(usage.atoms))} of "
            f"{len(usage.atoms)}",
        ),
        (
            usage.free_atoms[:num_free_atoms],
            f"free atoms, smooth first\n"
            f"{min(num_free_atoms, len(usage.free_atoms))} of {len(usage.free_atoms)}",
        ),
    ]
    shown = [(atoms, title) for atoms, title in shown if len(atoms) > 1]
    rows = [-(-len(atoms) // columns) for atoms, _ in shown]
    figure = new_figure(0.62 * columns + 4.2, 0.62 * sum(rows) + 1.6)
    grid = figure.add_gridspec(len(rows), 2, height_ratios=rows, width_ratios=[1.8, 1])
    axes = [figure.add_subplot(grid[i, 0]) for i in range(len(rows))]
    for axis, (atoms, title) in zip(axes, shown, strict=True):
        show_tiles(axis, atoms, columns, title)
    axis = figure.add_subplot(grid[:, 1])
    rank = range(1, len(usage.use) + 1)
    axis.plot(rank, 100 * usage.use.cpu(), linewidth=1.8, color=BLUE)
    axis.fill_between(rank, 100 * usage.use.cpu(), alpha=0.15, color=BLUE)
    half = int((usage.use.cumsum(0) < 0.5).sum()) + 1
    title = f"{half} of {len(usage.use)} atoms carry half of all"
    finish(axis, title, "rank of the atom", "share in all coefficients, in %")
    axis.set_ylim(0, None)
    return figure


def plot_decomposition(parts: Decomposition) -> Figure:
    """
    Draws reconstruction, smooth part, sparse part, remainder and numbers of atoms.

    Gray is zero in sparse part and remainder, each on its own scale.

    :param Decomposition parts: from :func:`decompose`; the first sample is drawn.
    :return: the figure.
    """
    figure = new_figure(15.5, 3.5)
    axes = figure.subplots(1, 5)
    show(axes[0], parts.image[0], "reconstruction  =")
    show(axes[1], parts.smooth[0], "smooth part  +")
    signed = (parts.sparse, "sparse part  +"), (parts.remainder, "remainder")
    for axis, (part, title) in zip(axes[2:4], signed, strict=True):
        picture = part[0].mean(0)
        peak = 0.7 * largest(picture)
        show(axis, picture, title, limits=(-peak, peak))
        axis.set_xlabel(f"gray: 0, white: {peak:.1g}")
    show(
        axes[4],
        parts.num_atoms[0].mean(0),
        "atoms per patch",
        cmap="magma",
        limits=(0, float(parts.num_atoms.max()) or 1.0),
        colorbar=True,
    )
    return figure
