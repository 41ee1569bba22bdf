"""
Every linear physics of deepinv, small: how it is made, and what DEAL says to it.

``python tests/all_physics.py`` writes the table of the guide.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import deepinv as dinv  # noqa: E402
import deepinv.physics as p  # noqa: E402
import torch  # noqa: E402
from deepinv.utils import TensorList  # noqa: E402
from problems import DOUBLE, generator, images, random_model, random_prior  # noqa: E402
from torch import Tensor  # noqa: E402

from deepinv_deal.problems.layout import ImageLayout  # noqa: E402

PAGE = ROOT / "docs" / "user_guide" / "physics.rst"

SIZE = (8, 10)
LAMBDA, SIGMA = 0.3, 15 / 255


@dataclass(frozen=True)
class Case:
    """
    One physics.

    :param str name: class of deepinv.
    :param Callable make: makes one.
    :param tuple shape: shape of an image, without the batch.
    :param str setting: what is special about it.
    :param bool complex: whether images hold complex numbers.
    :param torch.dtype dtype: precision of images.
    :param float rtol: tolerance; rough where deepinv is slow or in single precision.
    :param tuple error: the error that DEAL raises, and what it says.
    :param str package: what has to be installed besides deepinv.
    """

    name: str
    make: Callable[[], Any] | None
    shape: tuple[int, ...] = (1, *SIZE)
    setting: str = ""
    complex: bool = False
    dtype: torch.dtype = DOUBLE
    rtol: float = 1e-7
    error: tuple[type[Exception], str] | None = None
    package: str | None = None

    @property
    def id(self) -> str:
        return self.name + (self.setting and f", {self.setting}")

    def image(self, batch: int = 1) -> Tensor:
        x = images(batch, 1, self.shape[-2], self.shape[-1] * self._numbers)
        x = x.reshape(batch, -1, *self.shape[-2:]).reshape(batch, *self._real_shape)
        if self.complex:
            x = torch.complex(*x.chunk(2, 1))
        return x.to(self.dtype.to_complex() if self.complex else self.dtype)

    @property
    def _real_shape(self) -> tuple[int, ...]:
        return ((1 + self.complex) * self.shape[0], *self.shape[1:])

    @property
    def _numbers(self) -> int:
        number = 1
        for n in self._real_shape[:-2]:
            number *= n
        return number


# -- ingredients -----------------------------------------------------------------------


def kernel() -> Tensor:
    k = torch.tensor([[1.0, 2, 1], [2, 9, 2], [1, 2, 3]], dtype=DOUBLE)[None, None]
    return k / k.sum()


def pixels(*shape: int) -> Tensor:
    return 0.3 + 0.7 * torch.rand(shape, generator=generator(1), dtype=DOUBLE).round()


def fourier_mask(*shape: int) -> Tensor:
    mask = torch.ones(*shape, *SIZE, dtype=DOUBLE)
    mask[..., ::3] = 0
    return mask


def coil_maps(*shape: int, coils: int = 3) -> Tensor:
    maps = torch.randn(1, coils, *shape, generator=generator(2), dtype=torch.complex128)
    return maps / maps.abs().square().sum(1, keepdim=True).sqrt()


def inpainting(channels: int = 1) -> p.Inpainting:
    return p.Inpainting((channels, *SIZE), mask=pixels(channels, *SIZE))


def blur(padding: str = "circular", channels: int = 1) -> p.Blur:  # noqa: ARG001
    return p.Blur(kernel(), padding=padding)


def varying_blur(padding: str) -> p.SpaceVaryingBlur:
    filters = torch.stack([kernel(), kernel().flip(-1)], 2)
    ramp = torch.linspace(0, 1, SIZE[1], dtype=DOUBLE).expand(1, 1, *SIZE)
    weights = torch.stack([ramp, 1 - ramp], 2)
    return p.SpaceVaryingBlur(filters=filters, multipliers=weights, padding=padding)


def tiled_blur() -> p.TiledSpaceVaryingBlur:
    tiles = {"patch_size": (6, 6), "stride": (4, 4)}
    generators = p.generator.TiledBlurGenerator(
        p.generator.DiffractionBlurGenerator((3, 3)), **tiles
    )
    rows, columns = generators.get_num_patches(SIZE)
    filters = [kernel().flip(-1) if k % 2 else kernel() for k in range(rows * columns)]
    return p.TiledSpaceVaryingBlur(torch.stack(filters, 2), dtype=DOUBLE, **tiles)


def tomography(**settings: Any) -> p.Tomography:
    return p.Tomography(8, img_width=8, normalize=False, dtype=DOUBLE, **settings)


def ptychography() -> p.PtychographyLinearOperator:
    return p.PtychographyLinearOperator((1, 8, 10))


def born() -> p.LinearPhysics:
    from deepinv.physics.scattering import BornOperator

    n, transmitters, receivers = 6, 3, 8
    field = torch.randn(
        1, transmitters, n, n, generator=generator(3), dtype=torch.complex128
    )
    turn = torch.linspace(0, 5, receivers, dtype=DOUBLE)
    ring = 2 * torch.stack([turn.cos(), turn.sin()])[:, None].expand(2, 3, receivers)
    grid = torch.linspace(-0.5, 0.5, n, dtype=DOUBLE)
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    return BornOperator(field, ring, columns.flatten(), rows.flatten(), 6.0, 0.3, n)


def ultrasound() -> p.LinearPhysics:
    places = torch.stack([torch.linspace(-1e-3, 1e-3, 6), torch.zeros(6)], -1)
    return p.UltrasoundPlaneWave(
        img_size=(8, 8),
        angles=torch.linspace(-0.28, 0.28, 3),
        element_positions=places,
        n_samples=128,
        sampling_frequency=40e6,
        normalize=True,
    )


def non_cartesian() -> p.LinearPhysics:
    return p.NonCartesianMRI(SIZE, num_shots=6, num_samples_per_shot=16)


def radio() -> p.LinearPhysics:
    places = 3 * (torch.rand(2, 120, generator=generator(4)) - 0.5)
    return p.RadioInterferometry(SIZE, places)


def fourier_decomposition() -> p.DecomposablePhysics:
    spectrum = 0.2 + torch.rand(1, 1, *SIZE, generator=generator(5), dtype=DOUBLE)

    def rotate(x: Tensor) -> Tensor:
        return x.flip(-1)

    return p.DecomposablePhysics(
        U=rotate, U_adjoint=rotate, V=rotate, V_adjoint=rotate, mask=spectrum
    )


def turned() -> p.LinearPhysics:
    from deepinv.physics.virtual import VirtualLinearPhysics

    return VirtualLinearPhysics(
        physics=inpainting(),
        transform=dinv.transform.Reflect(dim=[-1]),
        g_params={"dims": [torch.tensor([-1])]},
    )


def multi_scaler(kind: str, base: Any) -> p.LinearPhysics:
    wrappers = importlib.import_module("deepinv.physics.wrappers")
    settings = {"filter": "bilinear", "factors": (2,), "dtype": DOUBLE}
    return getattr(wrappers, kind)(base, (1, *SIZE), **settings)


def cropper() -> p.LinearPhysics:
    return importlib.import_module("deepinv.physics.wrappers").PhysicsCropper(
        inpainting(), (1, 2)
    )


def astra() -> p.LinearPhysics:
    return p.TomographyWithAstra(img_size=(8, 8), angles=8, device="cpu")


def pet() -> p.LinearPhysics:
    return p.PET((8, 8, 8))


# -- the table -------------------------------------------------------------------------

CASES = (
    Case("Blur", lambda: blur("valid"), setting="valid"),
    Case("Blur", lambda: blur("circular"), setting="circular"),
    Case("Blur", lambda: blur("reflect"), setting="reflect"),
    Case("Blur", lambda: blur("replicate"), setting="replicate"),
    Case("Blur", lambda: blur("constant"), setting="constant"),
    Case("Blur", lambda: p.Blur(kernel()[:, :, None]), (1, 3, *SIZE), "3D", rtol=1e-4),
    Case("BlurFFT", lambda: p.BlurFFT((1, *SIZE), filter=kernel())),
    Case("Downsampling", lambda: p.Downsampling((1, *SIZE), filter=kernel(), factor=2)),
    Case("DownsamplingMatlab", lambda: p.DownsamplingMatlab(factor=2), rtol=1e-4),
    Case("SpaceVaryingBlur", lambda: varying_blur("valid"), setting="valid"),
    Case("SpaceVaryingBlur", lambda: varying_blur("circular"), setting="circular"),
    Case("TiledSpaceVaryingBlur", tiled_blur),
    Case(
        "Upsampling",
        lambda: p.Upsampling((1, 16, 20), filter=kernel(), factor=2),
    ),
    *(
        Case(
            "CompressiveSpectralImaging",
            lambda mode=mode: p.CompressiveSpectralImaging(
                (3, 7, 7), mode=mode, rng=generator()
            ).to(DOUBLE),
            (3, 7, 7),
            mode,
        )
        for mode in ("ss", "sd")
    ),
    Case(
        "CompressiveSpectralImaging",
        lambda: p.CompressiveSpectralImaging((3, 6, 6), rng=generator()).to(DOUBLE),
        (3, 6, 6),
        "even sides",
        error=(ValueError, "not the adjoint.*adjoint_function"),
    ),
    Case(
        "CompressiveSpectralImaging",
        lambda: p.CompressiveSpectralImaging((5, 7, 7), rng=generator()).to(DOUBLE),
        (5, 7, 7),
        "5 bands",
        error=(ValueError, "gray filters.*5 channels"),
    ),
    Case(
        "CompressedSensing",
        lambda: p.CompressedSensing(60, (1, *SIZE), dtype=DOUBLE, rng=generator()),
    ),
    Case(
        "ComposedLinearPhysics",
        lambda: p.ComposedLinearPhysics(blur("circular"), inpainting()),
    ),
    Case("DecomposablePhysics", fourier_decomposition),
    Case("Denoising", lambda: p.Denoising()),
    Case(
        "StackedLinearPhysics",
        lambda: p.StackedLinearPhysics([inpainting(), blur("circular")]),
    ),
    Case("Demosaicing", lambda: p.Demosaicing((3, 6, 6)).to(DOUBLE), (3, 6, 6)),
    Case("Inpainting", inpainting),
    Case(
        "DynamicMRI",
        lambda: p.DynamicMRI(fourier_mask(1, 2, 3), img_size=(3, *SIZE)).to(DOUBLE),
        (2, 3, *SIZE),
    ),
    Case("MRI", lambda: p.MRI(fourier_mask(1, 2), img_size=SIZE), (2, *SIZE)),
    Case(
        "MRI",
        lambda: p.MRI(fourier_mask(1, 2, 3), img_size=(3, *SIZE), three_d=True),
        (2, 3, *SIZE),
        "3D",
    ),
    Case(
        "MultiCoilMRI",
        lambda: p.MultiCoilMRI(
            fourier_mask(1, 1), coil_maps=coil_maps(*SIZE), img_size=SIZE
        ),
        (2, *SIZE),
    ),
    Case(
        "MultiCoilMRI",
        lambda: p.MultiCoilMRI(
            fourier_mask(1, 1, 3),
            coil_maps=coil_maps(3, *SIZE),
            img_size=(3, *SIZE),
            three_d=True,
        ),
        (2, 3, *SIZE),
        "3D",
    ),
    Case(
        "SequentialMRI",
        lambda: p.SequentialMRI(fourier_mask(1, 2, 3)),
        (2, *SIZE),
        error=(ValueError, "not the adjoint.*adjoint_function"),
    ),
    Case(
        "NonCartesianMRI",
        non_cartesian,
        (2, *SIZE),
        dtype=torch.float32,
        rtol=1e-3,
        package="mrinufft",
    ),
    Case("PET", pet, (1, 8, 8, 8), package="parallelproj"),
    Case("PtychographyLinearOperator", ptychography, complex=True),
    Case(
        "PtychographyLinearOperator",
        ptychography,
        setting="real image",
    ),
    Case(
        "RadioInterferometry",
        radio,
        dtype=torch.float32,
        rtol=3e-3,
        package="torchkbnufft",
    ),
    Case("Decolorize", lambda: p.Decolorize().to(DOUBLE), (3, 6, 6)),
    Case(
        "Pansharpen",
        lambda: p.Pansharpen((3, 8, 8), factor=2),
        (3, 8, 8),
        dtype=torch.float32,
        rtol=1e-4,
    ),
    Case("BornOperator", born, (1, 6, 6), complex=True),
    Case(
        "SinglePixelCamera",
        lambda: p.SinglePixelCamera(m=32, img_size=(1, 8, 8)).to(DOUBLE),
        (1, 8, 8),
    ),
    Case(
        "StructuredRandom",
        lambda: p.StructuredRandom((1, *SIZE), (1, *SIZE), rng=generator()).to(DOUBLE),
    ),
    Case("Tomography", tomography, (1, 8, 8), "parallel", rtol=1e-4),
    Case(
        "Tomography",
        lambda: tomography(fan_beam=True),
        (1, 8, 8),
        "fan beam",
        rtol=1e-4,
    ),
    Case("TomographyWithAstra", astra, (1, 8, 8), package="astra"),
    Case("UltrasoundPlaneWave", ultrasound, (1, 8, 8), dtype=torch.float32, rtol=1e-3),
    Case(
        "HyperSpectralUnmixing",
        lambda: p.HyperSpectralUnmixing(
            M=torch.rand(3, 5, generator=generator(), dtype=DOUBLE), E=3, C=5
        ),
        (3, 6, 6),
        "3 endmembers",
    ),
    Case(
        "HyperSpectralUnmixing",
        lambda: p.HyperSpectralUnmixing(
            M=torch.rand(5, 6, generator=generator(), dtype=DOUBLE), E=5, C=6
        ),
        (5, 6, 6),
        "5 endmembers",
        error=(ValueError, "gray filters.*5 channels"),
    ),
    Case("VirtualLinearPhysics", turned),
    Case(
        "BlurFFTMultiScaler",
        lambda: multi_scaler(
            "BlurFFTMultiScaler", p.BlurFFT((1, *SIZE), filter=kernel())
        ),
    ),
    Case("BlurMultiScaler", lambda: multi_scaler("BlurMultiScaler", blur())),
    Case(
        "InpaintingMultiScaler",
        lambda: multi_scaler("InpaintingMultiScaler", inpainting()),
    ),
    Case(
        "LinearPhysicsMultiScaler",
        lambda: multi_scaler("LinearPhysicsMultiScaler", inpainting()),
    ),
    Case("PhysicsCropper", cropper, (1, SIZE[0] + 1, SIZE[1] + 2)),
    # Needs processes and is tested with them, see tests/processes.py.
    Case("DistributedStackedLinearPhysics", None, setting="needs a process group"),
)


def classes() -> set[str]:
    """Names of all subclasses of ``LinearPhysics`` in the installed deepinv."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(dinv.__path__, "deepinv."):
            importlib.import_module(module.name)

    def below(kind: type) -> set[str]:
        kinds = kind.__subclasses__()
        own = {k.__name__ for k in kinds if k.__module__.startswith("deepinv.")}
        return own.union(*map(below, kinds))

    return below(p.LinearPhysics)


# -- the dense problem -----------------------------------------------------------------


def real(y: Any) -> Tensor:
    """Measurements as real vectors ``(B, M)``."""
    if isinstance(y, TensorList):
        return torch.cat([real(part) for part in y], 1)
    y = torch.view_as_real(y) if y.is_complex() else y
    return y.flatten(1).double()


def dense_physics(physics: Any, layout: ImageLayout, unknown: Tensor) -> Tensor:
    """The matrix ``(M, N)`` of a physics on real unknowns, column by column."""
    n, shape = unknown[0].numel(), (1, *unknown.shape[1:])
    basis = torch.eye(n, dtype=unknown.dtype).view(n, *shape)
    return torch.cat([real(physics.A(layout.embed(e))) for e in basis]).T


def prior_for(case: Case):
    """Random weights for the channels of a case."""
    return random_prior(3 if case.shape[0] == 3 else 1, dtype=case.dtype)


def solve(case: Case, **settings: Any):
    """Returns physics, measurements, model, result and info of a case."""
    assert case.make is not None
    with warnings.catch_warnings():  # those of other packages
        warnings.simplefilter("ignore")
        physics = case.make()
    x = case.image()
    y = physics.A(x)
    model = random_model(
        prior_for(case),
        rtol=case.rtol,
        lambda_reg=LAMBDA,
        warn=False,
        scale=None,
        **settings,
    )
    with torch.no_grad():
        # As an argument: Denoising has a level of its own.
        x_hat, info = model(y, physics, sigma=SIGMA, return_info=True)
    return physics, y, model, x_hat, info


# -- the page --------------------------------------------------------------------------


def result(case: Case) -> str:
    """What DEAL says, for the page."""
    if case.make is None:
        return "not tried"
    return "solved" if case.error is None else case.error[0].__name__


def shape(case: Case) -> str:
    numbers = " complex" if case.complex else ""
    return " x ".join(map(str, case.shape)) + numbers


def page() -> str:
    """The page of the user guide."""
    lines = [
        ".. Written by python tests/all_physics.py; tests/models/test_all_physics.py",
        "   tries every line.",
        "",
        "Every linear physics of deepinv",
        "===============================",
        "",
        "What DEAL makes of every linear physics of deepinv 0.5. *Solved* means that a",
        "test compares the result with a dense matrix of the physics, made by applying",
        "``A`` to unit images. Errors say what is wrong and the way out.",
        "``python tests/all_physics.py`` prints this table with the iterations.",
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
        "   * - Physics",
        "     - DEAL",
        "     - Images",
        "     - Needs",
    ]
    for case in sorted(CASES, key=lambda case: case.id.lower()):
        setting = f", {case.setting}" if case.setting else ""
        needs = f"``{case.package}``" if case.package else ""
        lines += [
            f"   * - ``{case.name}``{setting}",
            f"     - {result(case)}",
            f"     - {shape(case)}",
            f"     - {needs}".rstrip(),
        ]
    lines += [
        "",
        "``CompressiveSpectralImaging`` of even sides and ``SequentialMRI`` have an",
        "``A_adjoint`` that is not the adjoint of their ``A``. The adjoint that",
        "automatic differentiation finds is right:",
        "",
        ".. code-block:: python",
        "",
        "    import torch",
        "    from deepinv.physics import LinearPhysics, SequentialMRI",
        "    from deepinv.physics.forward import adjoint_function",
        "    from deepinv_deal import DEAL",
        "",
        "    physics = SequentialMRI(torch.rand(1, 2, 3, 16, 16).round())  # 3 frames",
        "    x = torch.rand(1, 2, 16, 16)",
        "    transpose = adjoint_function(physics.A, x.shape, dtype=x.dtype)",
        "    mended = LinearPhysics(A=physics.A, A_adjoint=transpose)",
        "    x_hat = DEAL()(physics(x), mended, lambda_reg=0.1)",
        "",
        "The bundled weights are for images of 1, 2 (real and imaginary part) or 3",
        "channels. For other numbers you need weights of your own.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page, and prints it with the iterations."""
    PAGE.write_text(page())
    for case in sorted(CASES, key=lambda case: case.id.lower()):
        if case.make is None:
            print(f"{case.id:44s}not tried")
            continue
        try:
            *_, info = solve(case)
            counts = f"{int(info.n_iter[0])}/{int(info.inner_iter[0])}"
            print(f"{case.id:44s}{counts:>10s}  outer/CG, rtol {case.rtol:g}")
        except Exception as error:  # noqa: BLE001 - printed
            print(f"{case.id:44s}{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
