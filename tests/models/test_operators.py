"""DEAL on every kind of linear physics of deepinv."""

import deepinv as dinv
import pytest
import torch
from deepinv.physics import (
    MRI,
    Blur,
    BlurFFT,
    CompressedSensing,
    Decolorize,
    Demosaicing,
    Downsampling,
    Inpainting,
    LinearPhysics,
    MultiCoilMRI,
    SinglePixelCamera,
    StackedLinearPhysics,
    StructuredRandom,
    Tomography,
)
from deepinv.utils import TensorList
from problems import (
    DOUBLE,
    generator,
    images,
    random_model,
    random_prior,
    relative_error,
)

from deepinv_deal._batch import inner
from deepinv_deal.problems import DataTerm

SIZE = (8, 10)

PRIORS = {channels: random_prior(channels) for channels in (1, 3)}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def rand(*shape):
    return torch.rand(shape, generator=generator(1), dtype=DOUBLE)


def kernel():
    k = torch.tensor([[1.0, 2, 1], [2, 9, 2], [1, 2, 3]], dtype=DOUBLE)[None, None]
    return k / k.sum()


def fourier_mask():
    mask = torch.ones(SIZE, dtype=DOUBLE)
    mask[:, ::3] = 0
    return mask


def coil_maps(coils=3):
    maps = torch.randn(1, coils, *SIZE, generator=generator(2), dtype=torch.complex128)
    return maps / maps.abs().square().sum(1, keepdim=True).sqrt()


def inpainting(channels):
    return Inpainting((channels, *SIZE), mask=0.3 + 0.7 * rand(channels, *SIZE).round())


#: For image channels, the operators that exist.
PHYSICS = {
    "inpainting": inpainting,
    "blur, valid": lambda c: Blur(kernel(), padding="valid"),
    "blur, circular": lambda c: Blur(kernel(), padding="circular"),
    "blur, reflecting": lambda c: Blur(kernel(), padding="reflect"),
    "blur, Fourier": lambda c: BlurFFT((c, *SIZE), filter=kernel()),
    "downsampling": lambda c: Downsampling((c, *SIZE), filter=kernel(), factor=2),
    "demosaicing": lambda c: Demosaicing((c, *SIZE)).to(DOUBLE) if c == 3 else None,
    "decolorize": lambda c: Decolorize().to(DOUBLE) if c == 3 else None,
    "MRI": lambda c: MRI(fourier_mask(), img_size=SIZE) if c == 2 else None,
    "multi-coil MRI": lambda c: (
        MultiCoilMRI(fourier_mask(), coil_maps=coil_maps(), img_size=SIZE)
        if c == 2
        else None
    ),
    "tomography": lambda c: Tomography(
        angles=12, img_width=SIZE[1], normalize=False, dtype=DOUBLE
    ),
    "compressed sensing": lambda c: CompressedSensing(
        m=60, img_size=(c, *SIZE), dtype=DOUBLE, rng=generator()
    ),
    "single pixel": lambda c: SinglePixelCamera(m=32, img_size=(c, 8, 8)).to(DOUBLE),
    "structured random": lambda c: StructuredRandom(
        img_size=(c, *SIZE), output_size=(c, *SIZE), rng=generator()
    ).to(DOUBLE),
    "stacked": lambda c: StackedLinearPhysics(
        [inpainting(c), Blur(kernel(), padding="circular")]
    ),
}
SQUARE = {"tomography": (10, 10), "single pixel": (8, 8)}

CASES = [
    pytest.param(name, channels, id=f"{name}-{channels}")
    for name, make in PHYSICS.items()
    for channels in (1, 2, 3)
    # Filters of several channels are slow, and most physics treat channels alike.
    if make(channels) is not None
    and (channels == 1 or make(1) is None or (name, channels) == ("inpainting", 3))
]


def rows(y, i):
    if isinstance(y, TensorList):
        return TensorList([part[i : i + 1] for part in y])
    return y[i : i + 1]


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_every_linear_physics_is_solved_for_every_batch(name, channels):
    physics = PHYSICS[name](channels)
    x = images(2, channels, *SQUARE.get(name, SIZE))
    x[1] *= 0.5
    y = physics.A(x)
    prior = PRIORS[3 if channels == 3 else 1]
    model = random_model(prior, rtol=1e-4, lambda_reg=0.3)
    x_hat, info = model(y, physics, return_info=True)
    assert x_hat.shape == x.shape and info.converged.all()
    # The equation, evaluated with the parts of the package that are public.
    data = physics.A_adjoint(physics.A(x_hat) - y)
    parts = x_hat.reshape(-1, prior.in_channels, *x.shape[2:])
    force = 0.3 * prior.grad(parts, 15 / 255).view_as(x)
    # deepinv's tomography is in single precision.
    assert relative_error(-data, force) < (4e-4 if name == "tomography" else 1.01e-4)
    alone, own = model(rows(y, 1), physics, return_info=True)
    # Conjugate gradients and the acceleration amplify rounding, more so where the
    # system is bad or deepinv computes in single precision: there, both are
    # solutions to the tolerance, and which ones depends on the processor.
    exact = name not in (
        "compressed sensing",
        "blur, valid",
        "downsampling",
        "tomography",
    )
    assert relative_error(x_hat[1:], alone) < (1e-7 if exact else 1e-3)
    if exact:
        assert (own.n_iter, own.inner_iter) == (info.n_iter[1], info.inner_iter[1])


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_the_normal_operator_is_symmetric_and_not_negative(name, channels):
    physics = PHYSICS[name](channels)
    y = physics.A(images(1, channels, *SQUARE.get(name, SIZE)))
    filters = 3 if channels == 3 else 1
    data = DataTerm.of(y, physics, torch.empty(0, dtype=DOUBLE), in_channels=filters)
    for seed in range(20):
        u, v = torch.randn(2, *data.b.shape, generator=generator(seed)).double()
        Hu, Hv = data.normal(u), data.normal(v)
        size = float(inner(Hu, Hu) * inner(v, v)) ** 0.5
        assert abs(float(inner(Hu, v) - inner(u, Hv))) <= 1e-6 * size
        assert inner(Hu, u) >= 0


def test_float32_is_solved_too():
    physics = Blur(kernel().float(), padding="circular")
    x = images(2, 1, *SIZE)
    double = random_model(PRIORS[1], rtol=1e-4)
    x_hat = double(
        Blur(kernel(), padding="circular")(x), Blur(kernel(), padding="circular")
    )
    single = random_model(random_prior(dtype=torch.float32), rtol=1e-4)
    assert relative_error(single(physics(x.float()), physics).double(), x_hat) < 1e-3


# -- complex images ------------------------------------------------------------


class ComplexFourier(LinearPhysics):
    """Masks the Fourier transform of images of complex numbers."""

    def A(self, x, **kwargs):
        return fourier_mask() * torch.fft.fft2(x, norm="ortho")

    def A_adjoint(self, y, **kwargs):
        return torch.fft.ifft2(fourier_mask() * y, norm="ortho")


@pytest.mark.parametrize("mode", ["real_imag", "real"])
def test_complex_numbers_are_two_channels(mode):
    model = random_model(PRIORS[1], complex_mode=mode, scale=None)
    x = images(2, 2, *SIZE)
    z = torch.complex(x[:, :1], x[:, 1:])
    numbers, info = model(
        ComplexFourier().A(z), ComplexFourier(), x_gt=z, init=z, return_info=True
    )
    physics = MRI(torch.fft.fftshift(fourier_mask()), img_size=SIZE)
    pairs = model(physics.A(x), physics)
    assert numbers.is_complex() and numbers.shape == (2, 1, *SIZE)
    assert info.converged.all()
    assert relative_error(torch.cat([numbers.real, numbers.imag], 1), pairs) < 1e-8
    if mode == "real":
        assert (numbers.imag == 0).all()


def test_complex_images_are_denoised():
    model = random_model(PRIORS[1])
    x = images(2, 2, *SIZE)
    numbers = model(torch.complex(x[:, :1], x[:, 1:]), sigma=0.1)
    assert relative_error(numbers.imag, model(x[:, 1:], sigma=0.1)) < 1e-8


def test_real_start_for_a_complex_image_is_refused():
    z = images(1, 1, *SIZE) + 0j
    with pytest.raises(ValueError, match="init must be complex"):
        random_model(PRIORS[1])(
            ComplexFourier().A(z), ComplexFourier(), init=z.real.clone()
        )


def test_colour_filters_do_not_take_complex_images():
    z = images(1, 3, *SIZE) + 0j
    with pytest.raises(ValueError, match="colour filters.*3 complex channels"):
        random_model(PRIORS[3])(z, sigma=0.1)


# -- weights relative to the operator ------------------------------------------


def scaled(physics, factor):
    return LinearPhysics(
        A=lambda x: factor * physics.A(x),
        A_adjoint=lambda y: factor * physics.A_adjoint(y),
    )


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_relative_weights_serve_operators_of_any_norm(factor):
    x = images(2, 1, *SIZE)
    model = random_model(PRIORS[1], lambda_mode="relative")
    physics = Blur(kernel(), padding="circular")
    x_hat, info = model(physics.A(x), physics, lambda_reg=0.3, return_info=True)
    # The circular blur keeps constants, so its norm is 1.
    assert info.lambda_reg.tolist() == pytest.approx([0.3, 0.3], rel=1e-3)
    physics = scaled(physics, factor)
    again, info = model(physics.A(x), physics, lambda_reg=0.3, return_info=True)
    assert info.lambda_reg.tolist() == pytest.approx(2 * [0.3 * factor**2], rel=1e-3)
    assert relative_error(again, x_hat) < 1e-7


def test_the_norm_is_that_of_each_sample():
    mask = torch.stack([torch.ones(1, *SIZE), 0.1 * torch.ones(1, *SIZE)]).double()
    physics = Inpainting((1, *SIZE), mask=mask)
    model = random_model(PRIORS[1], lambda_mode="relative", lambda_reg=2.0)
    _, info = model(physics.A(images(2, 1, *SIZE)), physics, return_info=True)
    assert info.lambda_reg.tolist() == pytest.approx([2.0, 0.02], rel=1e-3)


def test_denoising_does_not_need_a_norm():
    y = images(2, 1, *SIZE)
    relative = random_model(PRIORS[1], lambda_mode="relative")
    assert torch.equal(relative(y, sigma=0.1), random_model(PRIORS[1])(y, sigma=0.1))


# -- physics that are not what they say ----------------------------------------


def test_an_adjoint_that_is_none_is_refused():
    physics = LinearPhysics(
        A=Blur(kernel(), padding="circular").A, A_adjoint=lambda y: y
    )
    with pytest.raises(ValueError, match="A_adjoint is not the adjoint.*differ by"):
        random_model(PRIORS[1])(images(1, 1, *SIZE), physics)


def test_a_map_that_is_not_linear_is_refused():
    physics = LinearPhysics(A=lambda x: x**3, A_adjoint=lambda y: y)
    with pytest.raises(ValueError, match="not linear"):
        random_model(PRIORS[1])(images(1, 1, *SIZE), physics)


def test_an_approximate_adjoint_is_noted():
    physics = LinearPhysics(A=lambda x: x, A_adjoint=lambda y: 1.001 * y)
    _, info = random_model(PRIORS[1])(images(1, 1, *SIZE), physics, return_info=True)
    assert "only approximately the adjoint" in info.notes[0]


def test_a_wrong_normal_operator_is_not_used():
    class Wrong(Blur):
        def A_adjoint_A(self, x, **kwargs):
            return x

    right = Blur(kernel(), padding="circular")
    x, model = images(1, 1, *SIZE), random_model(PRIORS[1])
    x_hat, info = model(
        right.A(x), Wrong(kernel(), padding="circular"), return_info=True
    )
    assert "A_adjoint_A of Wrong is not A_adjoint times A" in info.notes[0]
    assert relative_error(x_hat, model(right.A(x), right)) < 1e-8


def test_a_normal_operator_that_fails_is_not_used():
    class Failing(Blur):
        def A_adjoint_A(self, x, **kwargs):
            raise RuntimeError("sizes differ")

    physics = Failing(kernel(), padding="circular")
    x, model = images(1, 1, *SIZE), random_model(PRIORS[1])
    x_hat, info = model(physics.A(x), physics, return_info=True)
    assert "A_adjoint_A of Failing is not A_adjoint times A" in info.notes[0]
    right = Blur(kernel(), padding="circular")
    assert relative_error(x_hat, model(right.A(x), right)) < 1e-8


def test_a_non_linear_physics_class_is_refused():
    with pytest.raises(TypeError, match="physics must be linear, got PhaseRetrieval"):
        random_model(PRIORS[1])(
            images(1, 1, *SIZE), dinv.physics.PhaseRetrieval(B=LinearPhysics())
        )


def test_trying_out_a_physics_leaves_no_trace():
    physics = Blur(kernel(), padding="circular")
    y = physics.A(images(1, 1, *SIZE))
    state = torch.get_rng_state()
    before = y.clone()
    random_model(PRIORS[1])(y, physics)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(y, before)
