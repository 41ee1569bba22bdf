"""
Published results, as data.

PSNR in dB as printed in the tables of the DEAL paper (Pourya, Kobler, Unser, Neumayer,
"DEALing with Image Reconstruction: Deep Attentive Least Squares", ICML 2025, PMLR 267),
which also holds the figures of the other methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "Pourya et al., ICML 2025"


@dataclass(frozen=True)
class Published:
    """
    One row of a table.

    :param str task: name of the task.
    :param int channels: 1 (gray) or 3 (colour).
    :param float noise: noise level in gray levels.
    :param str setting: end of the setting's name; empty for the mean over all settings.
    :param str data: data set.
    :param int images: number of its images.
    :param dict psnr: PSNR in dB by method, ours first.
    """

    task: str
    channels: int
    noise: float
    setting: str
    data: str
    images: int
    psnr: dict[str, float]


def _rows(
    task: str,
    channels: int,
    data: str,
    images: int,
    methods: str,
    table: Mapping[float, tuple[float, ...]],
    setting: str = "",
) -> list[Published]:
    return [
        Published(
            task,
            channels,
            noise,
            setting,
            data,
            images,
            dict(zip(methods.split(), values, strict=True)),
        )
        for noise, values in table.items()
    ]


PUBLISHED = [
    *_rows(  # Table 1
        "denoising",
        1,
        "BSD68",
        68,
        "DEAL SAFI WCRR Prox-DRUNet DRUNet",
        {
            5: (37.85, 37.90, 37.65, 37.97, 38.09),
            15: (31.61, 31.56, 31.20, 31.70, 31.94),
            25: (29.16, 29.05, 28.68, 29.18, 29.48),
        },
    ),
    *_rows(  # Table 1
        "denoising",
        3,
        "CBSD68, central 256 x 256 pixels",
        68,
        "DEAL Prox-DRUNet DRUNet",
        {
            5: (40.04, 40.12, 40.19),
            15: (33.61, 33.60, 33.85),
            25: (30.93, 30.82, 31.21),
        },
    ),
    *_rows(  # Table 2
        "super-resolution-x2",
        3,
        "CBSD68, central 256 x 256 pixels",
        68,
        "DEAL DPIR Prox-DRUNet",
        {
            2.55: (27.99, 27.79, 27.88),
            7.65: (26.58, 26.58, 26.61),
            12.75: (25.75, 25.83, 25.79),
        },
    ),
    *_rows(  # Table 2
        "super-resolution-x3",
        3,
        "CBSD68, central 256 x 256 pixels",
        68,
        "DEAL DPIR Prox-DRUNet",
        {
            2.55: (26.20, 26.05, 26.13),
            7.65: (25.27, 25.27, 25.29),
            12.75: (24.59, 24.66, 24.67),
        },
    ),
    *(  # Table 5, one figure per image there
        row
        for size, image, table in (
            ("17x17", "Cameraman", {2.55: (31.72, 32.05), 7.65: (27.89, 28.17)}),
            ("17x17", "House", {2.55: (35.20, 35.82), 7.65: (32.24, 32.79)}),
            ("17x17", "Monarch", {2.55: (32.77, 33.38), 7.65: (28.26, 28.48)}),
            ("27x27", "Cameraman", {2.55: (31.64, 31.97), 7.65: (27.79, 27.99)}),
            ("27x27", "House", {2.55: (35.03, 35.52), 7.65: (32.11, 32.87)}),
            ("27x27", "Monarch", {2.55: (32.48, 32.99), 7.65: (28.15, 28.27)}),
        )
        for row in _rows(
            "deblurring",
            1,
            f"{image} with Levin's kernel of this size",
            1,
            "DEAL DPIR",
            table,
            size,
        )
    ),
    *(  # Table 3
        row
        for task, data, values in (
            ("mri-single-coil-4x", "PD", (36.59, 36.43, 35.78, 27.40)),
            ("mri-single-coil-4x", "PDFS", (34.92, 34.92, 34.63, 29.68)),
            ("mri-multi-coil-8x", "PD", (36.21, 36.06, 35.57, 23.80)),
            ("mri-multi-coil-8x", "PDFS", (35.32, 35.36, 35.16, 27.19)),
        )
        for row in _rows(
            task,
            1,
            f"fastMRI knee, {data}",
            50,
            "DEAL SAFI WCRR zero-filled",
            {0.51: values},
        )
    ),
]
