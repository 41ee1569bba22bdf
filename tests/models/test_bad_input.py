"""Bad input: an error that names the argument, what arrived and what to do."""

import math

import deepinv as dinv
import numpy as np
import pytest
import torch
from deepinv.utils import TensorList
from problems import DOUBLE, MODELS, images, random_model, random_prior

from deepinv_deal import DEAL, SAFI, SolverOptions

SHAPE = (1, 6, 7)


@pytest.fixture(scope="module", params=list(MODELS))
def gray(request):
    """Every model, with a weight where it has none of its own."""
    return MODELS[request.param](lambda_reg=0.02)


@pytest.fixture(scope="module")
def colour():
    return random_model(random_prior(3), rtol=1e-4)


def image(*shape):
    return images(*(shape or (2, *SHAPE)))


def with_value(value):
    y = image()
    y[1, 0, 2, 3] = value
    return y


def inpainting():
    return dinv.physics.Inpainting(SHAPE, mask=torch.ones(SHAPE, dtype=DOUBLE))


class Phase(dinv.physics.Physics):
    def A(self, x, **kwargs):
        return x.square()


PHYSICS = inpainting()
LEVEL = {"sigma": 0.1}

MEASUREMENTS = {
    "integers": (
        torch.ones(1, *SHAPE, dtype=torch.uint8),
        TypeError,
        r"y .*uint8.*255",
    ),
    "array": (
        np.ones((1, *SHAPE)),
        TypeError,
        r"y must be a torch.Tensor, got ndarray",
    ),
    "list": ([image()], TypeError, r"y must be a torch.Tensor, got list"),
    "none": (None, TypeError, r"y must be a torch.Tensor, got NoneType"),
    "complex of another precision": (
        image().to(torch.complex64),
        ValueError,
        r"y has dtype .*complex64.*float64",
    ),
    "float32": (image().float(), ValueError, r"y has dtype .*float32.*float64.*to\("),
    "half": (image().half(), ValueError, r"y has dtype .*float16"),
    "empty batch": (image()[:0], ValueError, r"y is empty: shape \(0, 1, 6, 7\)"),
    "empty image": (image()[..., :0], ValueError, r"y is empty"),
    "no dimension": (torch.tensor(1.0, dtype=DOUBLE), ValueError, r"y is empty|shape"),
    "rank 3": (image()[0], ValueError, r"\(B, C, H, W\).*\(1, 6, 7\)"),
    "rank 2": (image()[0, 0], ValueError, r"\(B, C, H, W\).*\(6, 7\)"),
    "rank 6": (image()[None, None], ValueError, r"\(B, C, D, H, W\).*\(1, 1, 2, 1,"),
    "channels of a volume": (
        torch.stack([image(2, 3, 6, 7)] * 2, 2),
        ValueError,
        r"in_channels=1.*3 channels",
    ),
    "channels": (image(2, 3, 6, 7), ValueError, r"in_channels=1.*3 channels"),
    "many channels": (image(2, 4, 6, 7), ValueError, r"in_channels=1.*4 channels"),
    "nan": (with_value(math.nan), ValueError, r"y holds NaN"),
    "infinity": (with_value(-math.inf), ValueError, r"y holds .*infinity"),
    "other device": (image().to("meta"), ValueError, r"y is on meta, the model on cpu"),
}


@pytest.mark.parametrize(
    ("y", "error", "message"), MEASUREMENTS.values(), ids=list(MEASUREMENTS)
)
def test_measurements_to_denoise(gray, y, error, message):
    with pytest.raises(error, match=message):
        gray(y, sigma=0.1)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels_of_a_colour_model(colour, channels):
    with pytest.raises(ValueError, match=rf"in_channels=3.*{channels} channel"):
        colour(image(2, channels, 6, 7), sigma=0.1)


WITH_PHYSICS = {
    "nan": (with_value(math.nan), PHYSICS, ValueError, r"y holds NaN"),
    "empty": (image()[:0], PHYSICS, ValueError, r"y is empty"),
    # deepinv's mask broadcasts it to one image of two channels, "real and imaginary".
    "rank 3": (
        image()[:, 0],
        PHYSICS,
        ValueError,
        r"\(2, 6, 7\) holds 2 samples.*channel",
    ),
    "wrong size": (
        image(2, 1, 5, 7),
        PHYSICS,
        ValueError,
        r"y .*\(2, 1, 5, 7\).*physics",
    ),
    "channels": (image(2, 3, 6, 7), PHYSICS, ValueError, r"in_channels=1.*3 channels"),
    "part is nan": (
        TensorList([image(), with_value(math.nan)]),
        dinv.physics.StackedLinearPhysics([inpainting(), inpainting()]),
        ValueError,
        r"y holds NaN",
    ),
    "non-linear": (image(), Phase(), TypeError, r"physics must be linear, got Phase"),
    "haze": (
        image(),
        dinv.physics.Haze(),
        TypeError,
        r"physics must be linear, got Haze",
    ),
    "object": (
        image(),
        object(),
        TypeError,
        r"physics must be .*LinearPhysics, got object",
    ),
    "function": (image(), torch.abs, TypeError, r"physics must be .*LinearPhysics"),
}


@pytest.mark.parametrize(
    ("y", "physics", "error", "message"), WITH_PHYSICS.values(), ids=list(WITH_PHYSICS)
)
def test_measurements_with_physics(gray, y, physics, error, message):
    with pytest.raises(error, match=message):
        gray(y, physics)


LEVELS = {
    "negative": (-0.1, ValueError, r"must not be negative.*-0\.1"),
    "one negative": ([0.1, -0.1], ValueError, r"must not be negative"),
    "nan": (math.nan, ValueError, r"finite.*nan"),
    "infinity": (math.inf, ValueError, r"finite.*inf"),
    "too many": ([0.1, 0.1, 0.1], ValueError, r"one per sample \(2\), got 3"),
    "none at all": ([], ValueError, r"one per sample \(2\), got 0"),
    "map": (torch.full((2, *SHAPE), 0.1), ValueError, r"one per sample \(2\), got 84"),
    "object": (object(), TypeError, r"must be a number.*got object"),
    "dictionary": ({"level": 0.1}, TypeError, r"must be a number.*got dict"),
    "complex": (0.1 + 0.1j, TypeError, r"must be a number.*got complex"),
}


@pytest.mark.parametrize(
    ("value", "error", "message"), LEVELS.values(), ids=list(LEVELS)
)
@pytest.mark.parametrize("name", ["sigma", "lambda_reg"])
@pytest.mark.parametrize("physics", [None, PHYSICS], ids=["denoising", "inpainting"])
def test_noise_levels_and_weights(gray, name, physics, value, error, message):
    with pytest.raises(error, match=name + ".*" + message):
        gray(image(), physics, **{"sigma": 0.1, name: value})


@pytest.mark.parametrize("name", ["sigma", "lambda_reg"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_noise_levels_and_weights_of_the_constructor(name, value):
    for make in MODELS.values():
        with pytest.raises(ValueError, match=f"{name} must not be negative"):
            make(**{**LEVEL, name: value})(image())


OTHERS = {
    "word": ({"sigma": "guess"}, ValueError, r"sigma='guess'"),
    "estimate": (
        {"sigma": "estimate", "physics": PHYSICS},
        ValueError,
        r"sigma='estimate': only denoising",
    ),
    "estimate of little": (
        {"sigma": "estimate"},
        ValueError,
        r"sigma='estimate': the noise level cannot be estimated from images of 6 x 7",
    ),
    "unknown": ({**LEVEL, "lambda_": 1.0}, TypeError, r"Unknown arguments: lambda_"),
    "init size": (
        {**LEVEL, "init": image(2, 1, 5, 7)},
        ValueError,
        r"init must be an image of shape \(2, 1, 6, 7\), got shape \(2, 1, 5, 7\)",
    ),
    "init batch": ({**LEVEL, "init": image(1, *SHAPE)}, ValueError, r"init must be"),
    "init list": ({**LEVEL, "init": [1.0]}, (TypeError, ValueError), r"init|initial"),
    "init nan": ({**LEVEL, "init": with_value(math.nan)}, ValueError, r"init"),
    "x_gt size": (
        {**LEVEL, "x_gt": image(2, 1, 5, 7), "compute_metrics": True},
        ValueError,
        r"x_gt must be an image of shape",
    ),
    "two sigmas": ({"physics": 0.1, "sigma": 0.2}, TypeError, r"physics must be"),
}


def test_a_missing_noise_level_is_named():
    with pytest.raises(ValueError, match=r"sigma is missing.*model\(y, sigma=\.\.\.\)"):
        random_model()(image())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"), OTHERS.values(), ids=list(OTHERS)
)
def test_other_arguments_of_a_call(gray, kwargs, error, message):
    with pytest.raises(error, match=message):
        gray(image(), **kwargs)


SETTINGS = {
    "sigma": ({"sigma": "guess"}, ValueError, r"sigma must be a number or 'estimate'"),
    "scale word": (
        {"scale": "none"},
        ValueError,
        r"scale must be 'auto', a number or None",
    ),
    "scale zero": ({"scale": 0}, ValueError, r"scale must be positive, got 0"),
    "scale negative": ({"scale": -1.0}, ValueError, r"scale must be positive, got -1"),
    "scale nan": ({"scale": math.nan}, ValueError, r"scale must be positive, got nan"),
    "scale infinite": (
        {"scale": math.inf},
        ValueError,
        r"scale must be positive, got inf",
    ),
    "complex_mode": (
        {"complex_mode": "abs"},
        ValueError,
        r"complex_mode must be .*'abs'",
    ),
    "rtol": ({"rtol": -1e-3}, ValueError, r"rtol.*-0.001"),
    "rtol nan": ({"rtol": math.nan}, ValueError, r"rtol.*nan"),
    "max_iter": ({"max_iter": -1}, ValueError, r"max_iter.*-1"),
    "bounds": ({"bounds": (1, 0)}, ValueError, r"smallest < largest"),
    "bounds number": ({"bounds": 1.0}, ValueError, r"bounds must be None or .*got 1.0"),
    "bounds word": ({"bounds": "none"}, ValueError, r"bounds must be one of .*'none'"),
    "solver": ({"solver": "newton"}, ValueError, r"solver='newton' is no method of"),
    "solver type": (
        {"solver": {"anderson": 0}},
        TypeError,
        r"solver must be .*SolverOptions, got dict",
    ),
    "lambda_mode": (
        {"lambda_mode": "norm"},
        ValueError,
        r"lambda_mode must be one of .*'absolute', 'relative'.*got 'norm'",
    ),
    "init": ({"init": "ones"}, ValueError, r"init must be one of .*zero.*got 'ones'"),
    "adjoint": (
        {"adjoint": True},
        TypeError,
        r"adjoint must be AdjointOptions, got bool",
    ),
    "trainable_params": (
        {"trainable_params": ["stepsize"]},
        ValueError,
        r"trainable_params.*'stepsize'",
    ),
    "nothing to train": (
        {"trainable_params": ["lambda_reg"]},
        ValueError,
        r"trainable_params.*'lambda_reg'.*no value to start from",
    ),
    "unknown": ({"regularization": 1}, TypeError, r"regularization"),
}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"), SETTINGS.values(), ids=list(SETTINGS)
)
@pytest.mark.parametrize("name", MODELS)
def test_settings(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        MODELS[name](**kwargs)(image(), **({} if "sigma" in kwargs else LEVEL))


SHAPES = {
    "normalization": (
        {"normalization": "fast", "prior": None},
        r"normalization must be one of .*'fast'",
    ),
    "in_channels": ({"in_channels": 3}, r"in_channels=3 .*in_channels=1"),
    "num_filters": ({"num_filters": 9}, r"num_filters=9 .*num_filters=4"),
}


@pytest.mark.parametrize(("kwargs", "message"), SHAPES.values(), ids=list(SHAPES))
def test_shapes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DEAL(**{"prior": random_prior(), "pretrained": None, **kwargs})


OPTIONS = {
    "inner_max_iter": ({"inner_max_iter": -1}, r"inner_max_iter.*-1"),
    "preconditioner": (
        {"preconditioner": "jacobi"},
        r"preconditioner must be one of .*auto.*got 'jacobi'",
    ),
    "inner_dtype": (
        {"inner_dtype": "bfloat16"},
        r"inner_dtype must be one of \(None, torch.bfloat16, .*got 'bfloat16'",
    ),
    "inner_dtype of 8 bits": (
        {"inner_dtype": torch.float8_e4m3fn},
        r"inner_dtype must be one of .*got torch.float8_e4m3fn",
    ),
    "anderson": ({"anderson": -1}, r"anderson.*-1"),
    "forcing one": ({"forcing": 1.0}, r"forcing must lie in \(0, 1\), got 1"),
    "forcing zero": ({"forcing": 0.0}, r"forcing must lie in \(0, 1\), got 0"),
}


@pytest.mark.parametrize(("kwargs", "message"), OPTIONS.values(), ids=list(OPTIONS))
def test_options_of_the_solver(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SolverOptions(**kwargs)


#: Options that not every model has: the models without them.
DICTIONARIES = ("CPR", "NCPR", "two-step", "PatchSynthesis")
ABSENT = {
    "anderson": (2, ("SAFI", "MMR", *DICTIONARIES)),
    "preconditioner": ("none", ("SAFI", "MMR", *DICTIONARIES)),
    "inner_dtype": (torch.bfloat16, ("SAFI", "MMR", *DICTIONARIES)),
    "forcing": (0.1, DICTIONARIES),
    "inner_max_iter": (5, DICTIONARIES),
}


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for option, (_, names) in ABSENT.items() for name in names],
)
def test_an_option_that_a_model_has_not_is_refused(name, option):
    solver = SolverOptions(**{option: ABSENT[option][0]})
    with pytest.raises(ValueError, match=f"{option}=.* is no setting of"):
        MODELS[name](solver=solver)


def test_error_leaves_the_model_usable(gray):
    expected = gray(image(), sigma=0.1)
    with pytest.raises(ValueError):
        gray(with_value(math.nan), sigma=0.1)
    assert torch.equal(gray(image(), sigma=0.1), expected)


@pytest.mark.parametrize("name", ["DEAL", "CPR", "two-step"])
def test_noise_levels_in_another_unit_than_the_image_are_doubted(name):
    model, y = MODELS[name](max_iter=2, warn=False), image()
    with torch.no_grad():
        message = r"sigma=25 is larger .*divide gray level"
        with pytest.warns(UserWarning, match=message) as caught:
            model(y, sigma=25.0)
        assert caught[0].filename == __file__
        model(255 * y, sigma=25.0)  # in gray levels both
        model(0 * y, sigma=25.0)  # nothing to compare with


@pytest.mark.parametrize("model", [DEAL, SAFI])
@pytest.mark.parametrize(
    "prior", [torch.nn.Identity(), dinv.optim.PnP(torch.nn.Identity())]
)
def test_a_denoiser_is_no_prior(model, prior):
    with pytest.raises(TypeError, match=r"prior must be .*, got .*plug-and-play"):
        model(prior=prior)
