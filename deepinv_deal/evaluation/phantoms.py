"""Volumes to try things on, made of formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The ellipsoids of the phantom: density, half axes, centre, angle in degrees in the
#: plane of the first two axes. All lengths are relative to half the volume.
_SHEPP_LOGAN = (
    (1.0, (0.69, 0.92, 0.81), (0.0, 0.0, 0.0), 0),
    (-0.8, (0.6624, 0.874, 0.78), (0.0, -0.0184, 0.0), 0),
    (-0.2, (0.11, 0.31, 0.22), (0.22, 0.0, 0.0), -18),
    (-0.2, (0.16, 0.41, 0.28), (-0.22, 0.0, 0.0), 18),
    (0.1, (0.21, 0.25, 0.41), (0.0, 0.35, -0.15), 0),
    (0.1, (0.046, 0.046, 0.05), (0.0, 0.1, 0.25), 0),
    (0.1, (0.046, 0.046, 0.05), (0.0, -0.1, 0.25), 0),
    (0.1, (0.046, 0.023, 0.05), (-0.08, -0.605, 0.0), 0),
    (0.1, (0.023, 0.023, 0.02), (0.0, -0.606, 0.0), 0),
    (0.1, (0.023, 0.046, 0.02), (0.06, -0.605, 0.0), 0),
)

#: Points per voxel and axis over which a voxel takes the mean.
_POINTS = 2


def shepp_logan_volume(depth: int, height: int, width: int) -> Tensor:
    """
    Returns the Shepp-Logan phantom as a volume, ``(1, 1, D, H, W)``, in [0, 1].

    With the ellipsoids of Kak and Slaney and the contrast of Toft, as common for images
    (``skimage.data.shepp_logan_phantom``); the height of the volume is the long
    axis of the head, its depth runs from the neck to the crown.

    |sep|

    :Example:

    >>> from deepinv_deal.evaluation import shepp_logan_volume
    >>> x = shepp_logan_volume(12, 16, 17)
    >>> x.shape, bool((x >= 0).all() and (x <= 1).all())
    (torch.Size([1, 1, 12, 16, 17]), True)

    :param int depth: slices.
    :param int height: rows.
    :param int width: columns.
    """
    z, y, x = (_coordinates(n) for n in (depth, height, width))
    z, y, x = z[:, None, None], -y[:, None], x  # rows run downwards
    volume = torch.zeros(depth * _POINTS, height * _POINTS, width * _POINTS)
    for density, axes, centre, degrees in _SHEPP_LOGAN:
        angle = math.radians(degrees)
        u, v, w = (p - c for p, c in zip((x, y, z), centre, strict=True))
        across = (math.cos(angle) * u + math.sin(angle) * v) / axes[0]
        along = (math.cos(angle) * v - math.sin(angle) * u) / axes[1]
        radius = across.square() + along.square() + (w / axes[2]).square()
        volume += density * (radius <= 1)
    return torch.nn.functional.avg_pool3d(volume[None, None], _POINTS).clamp(0, 1)


def _coordinates(n: int) -> Tensor:
    """The centres of so many voxels, each in several points, in [-1, 1]."""
    m = n * _POINTS
    return (2 * torch.arange(m) + 1) / m - 1
