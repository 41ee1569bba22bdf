r"""Patches as convolutions, and dictionaries of patches with their constraints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepinv_deal.operators.multi_conv import Convolution, wrapped
from deepinv_deal.operators.slices import Slices, mean_of_planes

Boundary = Literal["circular", "valid"]
BOUNDARIES: tuple[str, ...] = ("circular", "valid")

#: Bjorck steps that orthonormalise the free atoms, as published. One step multiplies a
#: small singular value by 1.5, so they suffice for ratios down to about 1/400.
BJORCK_STEPS = 15


class PatchConv:
    r"""
    Inner products of all patches of an image with some kernels, and the exact adjoint.

    With the operator :math:`P_k` that takes the patch at position :math:`k`,

    .. math::
        (W x)_{j,k} = \langle w_j, P_k x \rangle, \qquad
        W^{\top} z = \sum_k P_k^{\top} \sum_j w_j z_{j,k}.

    Written out, :math:`W` is a convolution without flip; every channel of an image is
    treated alike. With the boundary
    ``"valid"`` there is one position for every patch inside the image; with
    ``"circular"`` one for every pixel, and patches continue on the opposite side.

    :param torch.Tensor kernels: the :math:`w_j`, shape ``(J, n, n)``.
    :param str boundary: ``"circular"`` or ``"valid"``.
    """

    def __init__(self, kernels: Tensor, boundary: Boundary):
        self.kernels, self.boundary = kernels, boundary
        self.circular = boundary == "circular"
        n = self.patch_size
        self.before, self.after = (n - 1) // 2, n // 2
        self.forward_conv = Convolution(kernels[:, None], pad=0)
        flipped = kernels.flip(-2, -1)[None]
        self.adjoint_conv = Convolution(flipped, pad=0 if self.circular else n - 1)

    @property
    def patch_size(self) -> int:
        """Rows (and columns) of a patch."""
        return self.kernels.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C J, H', W')
        """Applies :math:`W`."""
        channels = x.shape[1]
        x = x.flatten(0, 1)[:, None]
        if self.circular:
            pad = (self.before, self.after, self.before, self.after)
            x = F.pad(x, pad, mode="circular")
        return self.forward_conv(x).unflatten(0, (-1, channels)).flatten(1, 2)

    def adjoint(self, z: Tensor) -> Tensor:  # (B, C J, H', W') -> (B, C, H, W)
        r"""Applies :math:`W^{\top}`."""
        batch = len(z)
        z = z.unflatten(1, (-1, len(self.kernels))).flatten(0, 1)
        if self.circular:
            pad = (self.after, self.before, self.after, self.before)
            z = F.pad(z, pad, mode="circular")
        return self.adjoint_conv(z)[:, 0].unflatten(0, (batch, -1))

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """Returns the numbers of positions, rows and columns, in an image."""
        lost = 0 if self.circular else self.patch_size - 1
        return height - lost, width - lost

    def coverage(self, x: Tensor) -> Tensor | float:
        """Returns how many patches cover each pixel of images ``x``, ``(H, W)``."""
        n = self.patch_size
        return n * n if self.circular else patch_count(x, n)

    def spectrum(self, height: int, width: int, metric: Tensor | None = None) -> Tensor:
        r"""
        Returns the DFT of the filter of :math:`W^{\top} K W` with circular boundary.

        This is the aggregation operator :math:`B = \sum_k E_k^{\top} K E_k` of all
        patches: one symmetric filter of size :math:`2 n - 1`.

        :param int height: rows of the image.
        :param int width: columns of the image.
        :param torch.Tensor metric: the symmetric matrix :math:`K`, ``(J, J)``; identity
            if ``None``.
        :return: non-negative for positive semidefinite :math:`K`, shape
            ``(height, width)``.
        """
        transform = torch.fft.fft2(wrapped(self.kernels, height, width)).flatten(1)
        weighted = transform if metric is None else metric.to(transform) @ transform
        return (transform.conj() * weighted).real.sum(0).view(height, width)


@dataclass(frozen=True)
class PatchFrame:
    r"""
    The dictionary for given weights, reduced to the subspace that is penalised.

    Let :math:`U \in \mathbb{R}^{m \times d}` be an orthonormal basis of the patches
    orthogonal to everything free (constants and free atoms). All atoms lie in this
    subspace, :math:`D = U^{\top} C^{\top}`, hence

    .. math::
        \|E_k x - D a\|^2 = \|U P_k x - C^{\top} a\|^2, \qquad
        E_k = (I - Q Q^{\top} - \tfrac1d \mathbf{1} \mathbf{1}^{\top}) P_k:

    convolutions with :math:`m` filters and products with an :math:`m \times p` matrix,
    instead of :math:`d` and :math:`p \times p`.

    :param PatchConv features: the filters :math:`U`, ``(B, C, H, W)`` to ``(B, C m,
        H', W')``.
    :param torch.Tensor C: the atoms in the basis :math:`U`, shape ``(p, m)``.
    :param torch.Tensor free: orthonormal basis of what is free, shape ``(d - m, d)``.
    """

    features: PatchConv
    C: Tensor
    free: Tensor

    @property
    def atoms(self) -> Tensor:
        r"""The atoms :math:`D^{\top}` as images, shape ``(p, n, n)``."""
        return torch.tensordot(self.C, self.features.kernels, 1)

    @property
    def free_features(self) -> PatchConv:
        r"""
        The filters ``free``, ``(B, C, H, W)`` to ``(B, C (d - m), H', W')``.

        With ``features`` they form an orthonormal basis of the patches, so that the
        normal operators add up to :math:`\sum_k P_k^{\top} P_k`.
        """
        n = self.features.patch_size
        return PatchConv(self.free.unflatten(1, (n, n)), self.features.boundary)

    def synthesis(self, a: Tensor) -> Tensor:  # (B, C p, H', W') -> (B, C m, H', W')
        r"""Returns :math:`C^{\top} a_k`, the patches in the basis :math:`U`."""
        return self.map(self.C.T, a)

    def analysis(self, f: Tensor) -> Tensor:  # (B, C m, H', W') -> (B, C p, H', W')
        r"""Returns :math:`C f_k`, the adjoint of :meth:`synthesis`."""
        return self.map(self.C, f)

    def map(self, matrix: Tensor, z: Tensor) -> Tensor:
        """Multiplies what belongs to every patch, J numbers, by a matrix ``(I, J)``."""
        return channel_map(matrix, z)

    def unpack(self, z: Tensor, number: int) -> list[Tensor]:
        """Returns what belongs to the patches image by image, ``(n, J, H', W')``."""
        return [z.unflatten(1, (-1, number)).flatten(0, 1)]

    def pack(self, parts: list[Tensor], batch: int) -> Tensor:
        """Inverts :meth:`unpack`."""
        return parts[0].unflatten(0, (batch, -1)).flatten(1, 2)

    def zero_coefficients(self, x: Tensor) -> Tensor:
        """Returns a = 0 for images ``(B, C, H, W)``, shape ``(B, C p, H', W')``."""
        positions = self.features.positions(*x.shape[2:])
        return x.new_zeros(len(x), x.shape[1] * len(self.C), *positions)


class SlicedPatchConv:
    r"""
    :class:`PatchConv` on the slices of all three orientations of a volume.

    :math:`W S_o / \sqrt 3` for :math:`o = 1, 2, 3`, so that :math:`W^{\top} W` is the
    mean. Features are one vector per volume, ``(B, K, 1, 1)``: of the first stack of
    slices, then those of the others, see :class:`Slices`.

    :param PatchConv conv: the patches of an image.
    :param Slices slices: the slices.
    :param tuple size: depth, height and width of a volume.
    """

    def __init__(self, conv: PatchConv, slices: Slices, size: tuple[int, int, int]):
        self.conv, self.slices, self.size = conv, slices, size
        self.kernels, self.patch_size = conv.kernels, conv.patch_size
        self.circular, self.boundary = conv.circular, conv.boundary
        self.planes = slices.planes(*size[1:])
        #: For every orientation, slices of a part and positions of patches in them.
        self.shapes = [
            (number, *conv.positions(*plane))
            for number, plane in zip(size, self.planes, strict=True)
        ]
        #: Patches of a part.
        self.num_patches = sum(math.prod(shape) for shape in self.shapes)

    def __call__(self, x: Tensor) -> Tensor:  # (B, P D, H, W) -> (B, K, 1, 1)
        """Applies :math:`W`."""
        features = [self.conv(stack) for stack in self.slices.stacks(x)]
        return 3**-0.5 * self.pack(features, len(x))

    def adjoint(self, z: Tensor) -> Tensor:  # (B, K, 1, 1) -> (B, P D, H, W)
        r"""Applies :math:`W^{\top}`."""
        parts = self.unpack(z, len(self.kernels))
        stacks = [self.conv.adjoint(part) for part in parts]
        return 3**-0.5 * self.slices.unknown(stacks, len(z))

    def pack(self, parts: list[Tensor], batch: int) -> Tensor:
        """Makes one vector of what belongs to the patches, ``(n, J, H', W')`` each."""
        return torch.cat([f.reshape(batch, -1) for f in parts], 1)[..., None, None]

    def unpack(self, z: Tensor, number: int) -> list[Tensor]:
        """Inverts :meth:`pack` for J = ``number``."""
        each = z.shape[1] // self.num_patches  # J, for real and imaginary part
        pieces = z.flatten(1).split([each * math.prod(s) for s in self.shapes], 1)
        return [
            piece.reshape(-1, number, *shape[1:])
            for piece, shape in zip(pieces, self.shapes, strict=True)
        ]

    def coverage(self, x: Tensor) -> Tensor | float:
        """Returns how many patches cover each voxel on average, ``(P D, H, W)``."""
        if self.circular:
            return self.conv.coverage(x)
        n, one = self.patch_size, x.new_ones(())
        mean = mean_of_planes([patch_count(one.expand(p), n) for p in self.planes])
        return mean.repeat(x.shape[1] // self.size[0], 1, 1)

    def spectrum(self, height: int, width: int, metric: Tensor | None = None) -> Tensor:
        """See :meth:`PatchConv.spectrum`: the mean, ``(D, height, width)``."""
        planes = self.slices.planes(height, width)
        return mean_of_planes([self.conv.spectrum(*p, metric) for p in planes])


@dataclass(frozen=True)
class SlicedPatchFrame(PatchFrame):
    """
    The dictionary on the slices of all three orientations of a volume.

    Features and coefficients are one vector per volume, see :class:`SlicedPatchConv`.
    """

    features: Any

    @classmethod
    def of(
        cls, frame: PatchFrame, slices: Slices, size: tuple[int, int, int]
    ) -> SlicedPatchFrame:
        """
        Returns the dictionary for volumes.

        :param PatchFrame frame: the dictionary for images.
        :param Slices slices: the slices.
        :param tuple size: depth, height and width of a volume.
        """
        features = SlicedPatchConv(frame.features, slices, size)
        return cls(features, frame.C, frame.free)

    @property
    def free_features(self) -> Any:
        """The filters ``free`` on all slices."""
        n, features = self.features.patch_size, self.features
        conv = PatchConv(self.free.unflatten(1, (n, n)), features.boundary)
        return SlicedPatchConv(conv, features.slices, features.size)

    def map(self, matrix: Tensor, z: Tensor) -> Tensor:
        """Multiplies what belongs to every patch, J numbers, by a matrix ``(I, J)``."""
        parts = self.unpack(z, matrix.shape[1])
        return self.pack([channel_map(matrix, part) for part in parts], len(z))

    def unpack(self, z: Tensor, number: int) -> list[Tensor]:
        """Returns what belongs to the patches slice by slice, ``(n, J, H', W')``."""
        return self.features.unpack(z, number)

    def pack(self, parts: list[Tensor], batch: int) -> Tensor:
        """Inverts :meth:`unpack`."""
        return self.features.pack(parts, batch)

    def zero_coefficients(self, x: Tensor) -> Tensor:
        """Returns a = 0 for volumes, ``(B, K, 1, 1)``."""
        parts = x.shape[1] // self.features.size[0]
        number = parts * self.features.num_patches * len(self.C)
        return x.new_zeros(len(x), number, 1, 1)


def channel_map(matrix: Tensor, z: Tensor) -> Tensor:
    """Multiplies every J channels of ``z (B, C J, H, W)`` by a matrix ``(I, J)``."""
    grouped = z.unflatten(1, (-1, matrix.shape[1])).flatten(3)
    return (matrix @ grouped).flatten(1, 2).unflatten(2, z.shape[2:])


def patch_count(x: Tensor, n: int) -> Tensor:
    """Returns how many n x n patches inside the image cover each pixel, ``(H, W)``."""
    counts = []
    for size in x.shape[-2:]:
        i = torch.arange(size, device=x.device, dtype=x.dtype)
        count = torch.minimum(i + 1, size - i).clamp(max=min(n, size - n + 1))
        counts.append(count)
    return counts[0][:, None] * counts[1]


class PatchDictionary(nn.Module):
    r"""
    Learned atoms :math:`D`, and atoms :math:`Q` that a patch may use for free.

    The parameters are unconstrained; :meth:`frame` applies the constraints, which hold
    exactly and through which gradients flow:

    .. math::
        Q^{\top} Q = I, \quad Q^{\top} \mathbf{1} = 0, \quad Q^{\top} D = 0, \quad
        \mathbf{1}^{\top} D = 0, \quad \|d_1\| = \dots = \|d_p\|, \quad \|D\|_2 = 1.

    :math:`Q` is orthonormalised by Bjorck iterations (see
    :footcite:t:`ducotterd2024smooth`); without free atoms the constraints are those of
    :footcite:t:`ducotterd2024convex`, Eq. (10).

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.operators import PatchDictionary
    >>> frame = PatchDictionary(20, 5, num_free_atoms=4).frame()
    >>> frame.features(torch.rand(2, 1, 16, 17)).shape, frame.C.shape
    (torch.Size([2, 20, 16, 17]), torch.Size([20, 20]))

    :param int num_atoms: number of atoms :math:`p`.
    :param int patch_size: rows (and columns) :math:`n` of a patch, :math:`d = n^2`.
    :param int num_free_atoms: number of free atoms, constants not counted.
    :param str boundary: ``"circular"`` or ``"valid"``, see :class:`PatchConv`.
    :raises ValueError: for an unknown boundary, or if nothing is left to penalise.
    """

    def __init__(
        self,
        num_atoms: int,
        patch_size: int,
        num_free_atoms: int = 0,
        boundary: Boundary = "circular",
    ):
        super().__init__()
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary must be one of {BOUNDARIES}, got {boundary!r}.")
        if num_atoms < 1 or not 0 <= num_free_atoms < patch_size**2 - 1:
            raise ValueError(
                "num_atoms must be positive and num_free_atoms between 0 and "
                f"patch_size**2 - 2 = {patch_size**2 - 2}, got {num_atoms} and "
                f"{num_free_atoms}."
            )
        self.boundary: Boundary = boundary
        self.atoms = nn.Parameter(torch.randn(num_atoms, patch_size, patch_size))
        self.free_atoms = nn.Parameter(
            torch.randn(num_free_atoms, patch_size, patch_size)
        )

    @property
    def patch_size(self) -> int:
        """Rows (and columns) of a patch."""
        return self.atoms.shape[-1]

    def frame(self) -> PatchFrame:
        """
        Returns the dictionary of the current weights, constraints included.

        Take it once and apply it often: the constraints are evaluated here.
        """
        n = self.patch_size
        Q = self.orthonormal_free_atoms()
        free = torch.cat([Q.new_full((1, n * n), 1 / n), Q])
        with torch.no_grad():
            full, _ = torch.linalg.qr(free.T, mode="complete")
            basis = full[:, len(free) :].T
        # The projector I - free^T free determines everything; its basis is arbitrary.
        # Projecting a fixed basis gives the right first derivative, since for a
        # projector X: X dX + dX X = dX.
        U = basis - (basis @ free.T) @ free
        C = self.atoms.flatten(1) @ U.T
        C = C / torch.linalg.vector_norm(C, dim=1, keepdim=True)
        C = C / torch.linalg.matrix_norm(C, 2)
        return PatchFrame(PatchConv(U.unflatten(1, (n, n)), self.boundary), C, free)

    def orthonormal_free_atoms(self) -> Tensor:
        r"""Returns :math:`Q^{\top}`, shape ``(num_free_atoms, n * n)``."""
        Q = self.free_atoms.flatten(1)
        if not len(Q):
            return Q
        Q = Q - Q.mean(1, keepdim=True)
        Q = Q / torch.linalg.matrix_norm(Q, 2)
        for _ in range(BJORCK_STEPS):
            Q = 1.5 * Q - 0.5 * (Q @ Q.T) @ Q
        return Q

    @torch.no_grad()
    def project_(self) -> None:
        """
        Replaces the parameters by constrained ones of the same dictionary.

        Optimizers do not see the constraints, and drift along directions that change
        nothing; this keeps the scales of the parameters, and the Bjorck iterations
        accurate.
        """
        frame = self.frame()
        atoms = frame.atoms
        self.atoms.copy_(atoms / torch.linalg.vector_norm(atoms[0]))
        self.free_atoms.copy_(frame.free_features.kernels[1:])

    def extra_repr(self) -> str:
        """Describes the module."""
        return (
            f"num_atoms={len(self.atoms)}, patch_size={self.patch_size}, "
            f"num_free_atoms={len(self.free_atoms)}, boundary={self.boundary!r}"
        )
