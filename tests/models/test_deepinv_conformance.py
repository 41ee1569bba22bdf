"""
deepinv's own shipped tests, run against DEAL.

They live in ``deepinv.tests`` of the wheel and are private: each is called directly,
with the function that builds the model replaced, and left out where a version lacks it.
"""

import importlib
import inspect
import pathlib
import sys
import warnings

import deepinv as dinv
import pytest
import torch
from problems import images, random_prior

from deepinv_deal import DEAL, AdjointOptions, ConvergenceWarning, SolverOptions

# What the tests and deepinv warn about is not ours; what DEAL warns about is.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::deepinv_deal.ConvergenceWarning"),
]

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def shipped():
    """The shipped test modules, importable while the tests of this file run."""
    folder = pathlib.Path(dinv.__file__).parent / "tests"
    if not folder.is_dir():
        pytest.skip("This deepinv does not ship its tests.")
    hidden = {name: sys.modules.pop(name, None) for name in ("conftest", "dummy")}
    sys.path.insert(0, str(folder))
    patch = pytest.MonkeyPatch()
    patch.setenv("DEEPINV_TEST_DEVICE", "cpu")
    patch.setenv("MPLBACKEND", "agg")
    yield lambda name: importlib.import_module(f"deepinv.tests.{name}")
    patch.undo()
    sys.path.remove(str(folder))
    for name, module in hidden.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def small_model(channels: int, **kwargs) -> DEAL:
    """Random weights; two channels are the two parts of a complex image."""
    prior = random_prior(3 if channels == 3 else 1, 8, dtype=torch.float32)
    return DEAL(prior=prior, pretrained=None, **{"rtol": 1e-3, **kwargs})


def call(module, name, **arguments):
    """Calls a shipped test; a skip at its end, after the checks, is a pass."""
    function = getattr(module, name, None)
    if function is None:
        pytest.skip(f"This deepinv has no {name}.")
    names = inspect.signature(function).parameters
    with torch.random.fork_rng(devices=[]):
        try:
            function(**{k: v for k, v in arguments.items() if k in names})
        except pytest.skip.Exception as skip:
            if "PSNR test" not in str(skip) and "backward test" not in str(skip):
                raise


def restoration_cases(once=False):
    """Operators and channels; with ``once``, repeated operators are marked as slow."""
    operators = [
        "inpainting",
        "demosaicing",
        "denoising",
        "fftdeblur",
        "deblur_valid",
        "super_resolution_circular",
        "MRI",
        "MultiCoilMRI",
        "pansharpen_circular",
    ]
    seen = set()
    for operator in operators:
        for channels in (1, 2, 3):
            # As the shipped test has it.
            if channels != 2 and "MRI" in operator:
                continue
            if channels != 3 and operator in ("demosaicing", "pansharpen_circular"):
                continue  # the shipped pansharpening has three channels in any case
            name = f"{operator}-{channels}"
            marks = [pytest.mark.slow] * (once and operator in seen)
            seen.add(operator)
            yield pytest.param(operator, channels, id=name, marks=marks)


@pytest.mark.parametrize(("operator", "channels"), list(restoration_cases()))
@pytest.mark.parametrize(
    "size", [(16, 19), pytest.param((25, 129), marks=pytest.mark.slow)]
)
def test_restoration(shipped, monkeypatch, operator, channels, size):
    tests = shipped("test_models")
    seen = []

    def choose(name, in_channels, **kwargs):
        model = small_model(in_channels)
        forward = model.forward
        model.forward = lambda *args: seen.append(args) or forward(*args)
        return model

    monkeypatch.setattr(tests, "choose_restoration_model", choose)
    call(
        tests,
        "test_restoration_models",
        device=CPU,
        pretrained=None,
        model_name="deal",
        physics_name=operator,
        channels=channels,
        rng=torch.Generator().manual_seed(0),
        whsize=size,
        load_example_image=None,
    )
    ((y, physics),) = seen
    assert len(y) == 2


@pytest.mark.parametrize(("operator", "channels"), list(restoration_cases(once=True)))
def test_restoration_backward(shipped, monkeypatch, operator, channels):
    # The shipped test skips its backward pass for all models but one.
    tests = shipped("test_models")
    find = shipped("test_models").find_operator
    physics, shape, _, _ = find(operator, CPU, imsize=(channels, 12, 14))
    x = images(2, *shape, dtype=torch.float32)
    physics.noise_model = dinv.physics.GaussianNoise(0.05)
    model = small_model(channels).train()
    loss = tests.dinv.loss.SupLoss()(x=x, x_net=model(physics(x), physics)).mean()
    loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "kappa" not in n]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("name", "channels", "arguments"),
    [
        pytest.param("test_denoiser_color", 3, {"imsize": (3, 37, 31)}, id="colour"),
        pytest.param(
            "test_denoiser_gray", 1, {"imsize_1_channel": (1, 37, 31)}, id="gray"
        ),
        pytest.param(
            "test_denoiser_1_channel",
            1,
            {"imsize_1_channel": (1, 37, 31)},
            id="1 channel",
        ),
        pytest.param(
            "test_denoiser_sigma_gray", 1, {"batch_size": 1}, id="sigma gray 1"
        ),
        pytest.param(
            "test_denoiser_sigma_gray", 1, {"batch_size": 2}, id="sigma gray 2"
        ),
        pytest.param(
            "test_denoiser_sigma_color", 3, {"batch_size": 1}, id="sigma col 1"
        ),
        pytest.param(
            "test_denoiser_sigma_color", 3, {"batch_size": 2}, id="sigma col 2"
        ),
    ],
)
def test_denoiser(shipped, monkeypatch, name, channels, arguments):
    tests = shipped("test_models")
    monkeypatch.setattr(
        tests, "choose_denoiser", lambda name, size: small_model(size[0])
    )
    call(tests, name, device=CPU, denoiser="deal", **arguments)


def smoothing_denoiser(channels: int, kappa: float = 3.0) -> DEAL:
    """
    The linear denoiser (I + kappa W^T W)^-1, a proximal operator.

    The masks are 1, and W holds the differences of neighbours, divided by their norm.
    """
    model = small_model(channels, rtol=1e-5)
    prior = model.prior
    with torch.no_grad():
        prior.mask_network.phi3.coefficients.fill_(1.0)
        prior.kappa.coefficients.fill_(kappa)
        for kernel in prior.W.weight:
            kernel.zero_()
            for i in range(min(kernel.shape[:2])):
                kernel[i, i, 4, 4] = 1.0
        for i in range(channels):
            prior.W.weight[0][i, i, 4, 5] = -1.0
            prior.W.weight[0][i + channels, i, 4, 4] = 1.0
            prior.W.weight[0][i + channels, i, 5, 4] = -1.0
    return model


@pytest.mark.parametrize("mode", ["real_imag", "abs_angle"])
def test_complex_wrapper(shipped, monkeypatch, mode):
    tests = shipped("test_models")
    model = smoothing_denoiser(3)  # instead of weights that would be downloaded
    monkeypatch.setattr(dinv.models, "DRUNet", lambda **kwargs: model)
    column, row = torch.linspace(0, 3, 32)[:, None], torch.linspace(0, 3, 32)
    smooth = (0.5 + 0.4 * torch.sin(column + row)).expand(1, 3, 32, 32)
    call(
        tests,
        "test_complex_wrapper",
        mode=mode,
        device=CPU,
        load_example_image=lambda *args, **kwargs: smooth,
    )


def test_equivariant_wrapper():
    model = dinv.models.EquivariantDenoiser(small_model(1), random=True)
    assert model(images(2, 1, 16, 16, dtype=torch.float32), 0.1).shape == (2, 1, 16, 16)


#: Weights of the smoothing with which few iterations are taken.
ALGORITHMS = {
    ("test_pnp_algo", "PGD"): 30.0,
    ("test_pnp_algo", "HQS"): 30.0,
    ("test_pnp_algo", "DRS"): 30.0,
    ("test_pnp_algo", "ADMM"): 30.0,
    ("test_pnp_algo", "PDCP"): 30.0,
    ("test_pnp_algo", "FISTA"): 30.0,
    ("test_red_algo", "GD"): 300.0,
    ("test_red_algo", "PGD"): 300.0,
    ("test_red_algo", "FISTA"): 100.0,
}
#: The others take the same calls of the prior.
FAST = {("test_pnp_algo", "PGD"), ("test_pnp_algo", "HQS"), ("test_red_algo", "GD")}


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case not in FAST))
        for case in ALGORITHMS
    ],
)
def test_plug_and_play(shipped, monkeypatch, name, algorithm):
    tests = shipped("test_optim")
    monkeypatch.setattr(
        dinv.models,
        "WaveletDenoiser",
        lambda **_: smoothing_denoiser(1, ALGORITHMS[name, algorithm]),
    )
    # The shipped tests need a wavelet package only for the denoiser replaced here.
    monkeypatch.setattr(pytest, "importorskip", lambda *args, **kwargs: None)
    # Lists, since DataLoader takes anything with a length and items.
    data = [{"x": images(1, 1, 17, 18, dtype=torch.float32)[0]}]
    call(
        tests,
        name,
        pnp_algo=algorithm,
        red_algo=algorithm,
        imsize=(1, 17, 18),
        dummy_dataset=data,
        device=CPU,
    )


# -- Trainer ---------------------------------------------------------------------------


class Counting(DEAL):
    """Counts its passes, as the model of the shipped test."""

    def __init__(self):
        super().__init__(
            prior=random_prior(1, 4, dtype=torch.float32),
            pretrained=None,
            rtol=1e-2,
            adjoint=AdjointOptions(jacobian_free=True),
        )
        self.eval_count = self.train_count = 0

    def forward(self, y, physics, **kwargs):
        if self.training:
            self.train_count += 1
        else:
            self.eval_count += 1
        return super().forward(y, physics, **kwargs)


@pytest.mark.parametrize(
    "compute_eval_losses", [pytest.param(True, marks=pytest.mark.slow), False]
)
def test_trainer_passes(shipped, monkeypatch, tmp_path, compute_eval_losses):
    tests = shipped("test_trainer")
    monkeypatch.setattr(tests, "DummyModel", Counting)
    call(
        tests,
        "test_model_forward_passes",
        mixed_precision=False,
        dummy_dataset=None,
        imsize=(1, 5, 4),
        device=CPU,
        tmpdir=tmp_path,
        compute_eval_losses=compute_eval_losses,
        compute_train_metrics=True,
        epochs=4,
        eval_interval=2,
    )


# Adam with the learning rate 0.1 of the shipped test, made for one scalar, leaves
# weights with which nothing converges: the formats are what is tested.
@pytest.mark.parametrize("generate_params", [True, False])
@pytest.mark.parametrize("ground_truth", [True, False])
def test_trainer_data_formats(
    shipped, monkeypatch, tmp_path, generate_params, ground_truth
):
    tests = shipped("test_trainer")
    warnings.simplefilter("ignore", ConvergenceWarning)
    call(
        tests,
        "test_dataloader_formats",
        non_blocking_plots=None,
        imsize=(1, 17, 16),
        device=CPU,
        dummy_model=small_model(
            1,
            rtol=0.1,
            max_iter=3,
            solver=SolverOptions(inner_max_iter=5),
            adjoint=AdjointOptions(jacobian_free=True),
        ),
        generate_params=generate_params,
        ground_truth=ground_truth,
        measurements=True,
        online_measurements=False,
        batch_size=2,
        use_dict_output=True,
        rng=torch.Generator().manual_seed(0),
        tmpdir=str(tmp_path),
    )


def test_trainer_identity():
    # As the shipped test of this name, whose model cannot be replaced: the weight of
    # the regularizer is learned, and must go to zero for the model to be the identity.
    x = images(4, 1, 9, 8, dtype=torch.float32)

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return {"x": x[i]}

    model = small_model(
        1, sigma=0.1, lambda_reg=0.3, trainable_params=["lambda_reg"], rtol=1e-3
    )
    model.prior.requires_grad_(False)
    weight = model.lambda_reg
    trainer = dinv.Trainer(
        model=model,
        physics=dinv.physics.Denoising(dinv.physics.ZeroNoise()),
        optimizer=torch.optim.Adam([weight], lr=3e-2),
        train_dataloader=torch.utils.data.DataLoader(Data(), batch_size=2),
        losses=dinv.loss.SupLoss(),
        epochs=5,
        online_measurements=True,
        save_path=None,
        verbose=False,
        show_progress_bar=False,
        device="cpu",
    )
    trainer.train()
    assert 0 <= float(weight.detach()) < 0.1
