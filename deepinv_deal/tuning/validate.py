"""The arguments of ``tune``: what can be tuned, where to start, on which problems."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Denoising
from deepinv.utils import TensorList
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepinv_deal.models import ReconstructionModel, SynthesisModel
from deepinv_deal.models.deal import DEFAULT_SIGMA
from deepinv_deal.optim import FixedPointOptim
from deepinv_deal.problems.likelihood_term import LikelihoodTerm

#: Models with a weight of their own.
ITERATIVE = (ReconstructionModel, FixedPointOptim)

EMPTY = "The validation set is empty: at least one image is needed to tune."


# -- parameters ------------------------------------------------------------------


def check_parameters(
    model: Reconstructor, given: Mapping[str, float | None], names: Sequence[str]
) -> None:
    """
    Checks that the model has the parameters that are given or to be tuned.

    :param deepinv.models.Reconstructor model: the model.
    :param dict given: values by name, ``None`` if not given.
    :param list names: parameters to tune.
    :raises TypeError: if it is no model.
    :raises ValueError: for a parameter that it has not or does not use, or a value that
        is not one number.
    """
    if not isinstance(model, Reconstructor):
        raise TypeError(
            "model must be a deepinv Reconstructor such as deepinv_deal.DEAL, got "
            f"{type(model).__name__}."
        )
    kind, dictionary = type(model).__name__, isinstance(model, SynthesisModel)
    iterates = isinstance(model, ITERATIVE) and not dictionary
    adapts = iterates and (
        isinstance(model, ReconstructionModel) or own_values(model)[2].needs_sigma
    )
    has = {
        "sigma": (adapts, "DEAL, SAFI and MMR"),
        "beta": (dictionary, "PatchSynthesis and SmoothPlusSparse"),
    }
    for name, (present, owners) in has.items():
        if (given[name] is not None or name in names) and not present:
            raise ValueError(
                f"{name} can be fixed or tuned for {owners} only, not for {kind}, on "
                f"which it has no effect, got {name}={given[name]}, "
                f"tune_{name}={name in names}."
            )
    if given["lambda_reg"] is None and not iterates and not dictionary:
        raise ValueError(
            f"For {kind}, lambda_reg must be given: the weight to start at."
        )
    for name, value in given.items():
        if value is not None and torch.as_tensor(value).numel() != 1:
            raise ValueError(f"{name} must be one number, got {value}.")


def first_values(
    model: Reconstructor,
    problem: Problem,
    given: dict[str, float | None],
    names: Sequence[str],
) -> np.ndarray:
    """
    Returns the first values of the parameters to tune.

    :param deepinv.models.Reconstructor model: the model, whose own values are taken
        for those that are not given.
    :param Problem problem: the first of the validation set.
    :param dict given: values by name, ``None`` if not given.
    :param list names: parameters to tune.
    :raises ValueError: for a value that is not positive.
    """
    denoising = problem.physics is None or isinstance(problem.physics, Denoising)
    if isinstance(model, SynthesisModel):
        known = noise_level(problem.physics) if denoising else None
        learned = {
            "lambda_reg": model.default_lambda(known),
            "beta": model.default_beta,
        }
        given = {k: learned.get(k) if v is None else v for k, v in given.items()}
    if isinstance(model, SynthesisModel) or not isinstance(model, ITERATIVE):
        return _positive({name: given[name] for name in names})
    lambda_reg, sigma = given["lambda_reg"], given["sigma"]
    own_weight, own_level, prior = own_values(model)
    level: Any = sigma
    unit, known, intensity, tells_noise = _units(model, problem, sigma)
    if known is not None:
        level = known
    elif level is None and denoising:
        level = noise_level(problem.physics)
    if level is None:
        level = own_level
    weight: Any = own_weight if lambda_reg is None else lambda_reg
    learned_serves = denoising or tells_noise
    if weight is None and learned_serves and not (level is None and prior.needs_sigma):
        weight = prior.default_lambda(level, problem.y) * unit
    start = {
        "lambda_reg": unit if weight is None else weight,
        "sigma": getattr(prior, "sigma", DEFAULT_SIGMA) if level is None else level,
    }
    start["sigma"] = start["sigma"] * intensity
    return _positive({name: start[name] for name in names})


@torch.no_grad()
def _units(
    model: Any, problem: Problem, sigma: float | None
) -> tuple[Any, Any, Any, bool]:
    """
    Returns, for likelihoods other than least squares, by what its weights are to be
    multiplied, the noise level that the model takes, the intensity that is its unit,
    and whether it tells the noise; for least squares 1, ``None``, 1 and ``False``.
    """
    if isinstance(model, ReconstructionModel):
        posed = model.pose(problem.y, problem.physics, sigma=sigma, lambda_reg=1.0)
        data = posed.equation.data
        if isinstance(data, LikelihoodTerm):
            relative = data.relative or model.lambda_mode == "relative"
            unit = 1.0 if relative or data.typical is None else data.typical
            return unit * data.gain, posed.sigma, data.intensity, data.tells_noise
    return 1.0, None, 1.0, False


def own_values(model: Any) -> tuple[Any, Any, Any]:
    """Returns the weight and noise level that a model was made with, and its prior."""
    iterator = isinstance(model, FixedPointOptim)  # with a list of priors, as deepinv
    prior = model.prior[0] if iterator else model.prior
    return model.lambda_reg, model.sigma, prior


def _positive(start: dict[str, Any]) -> np.ndarray:
    values = []
    for name, first in start.items():
        value = torch.as_tensor(first).detach().cpu().double()
        values.append(float(value.log().mean().exp()))
        if not 0 < values[-1] < math.inf:
            raise ValueError(
                f"The search for {name} is on a logarithmic scale and must start at a "
                f"positive number, got {value.tolist()}. Give {name}=..."
            )
    return np.array(values)


# -- the validation set ----------------------------------------------------------


@dataclass
class Problem:
    """A batch of the validation set: every candidate sees these measurements."""

    x: Tensor | None
    y: Any
    physics: Any

    def __len__(self) -> int:
        return len(self.y[0] if isinstance(self.y, TensorList) else self.y)


def read_problems(
    model: Reconstructor, physics: Any, dataset: Any, seed: int
) -> list[Problem]:
    """
    Reads a validation set, and draws the measurements that it lacks.

    :param deepinv.models.Reconstructor model: tells the device.
    :param deepinv.physics.LinearPhysics physics: forward operator with its noise.
    :param object dataset: as in :func:`tune`.
    :param int seed: seed of the noise.
    :raises TypeError: for data of another kind.
    :raises ValueError: without images, or measurements that cannot be made.
    """
    # Without parameters, the data stay where they are.
    device = next((p.device for p in model.parameters()), None)
    if isinstance(dataset, Tensor):
        dataset = [dataset]
    elif isinstance(dataset, Dataset):
        dataset = DataLoader(dataset)
    if not isinstance(dataset, Iterable):
        raise TypeError(
            "dataset must be an iterable of images or of pairs (x, y), got "
            f"{type(dataset).__name__}."
        )
    problems = []
    with own_randomness(physics, device, seed):
        for i, item in enumerate(dataset):
            x, y, params = _unpack(item, i)
            own = physics
            if params:
                own = physics.clone()
                own.update(**params)
            if x is not None and device is not None:
                x = x.to(device)
            if x is not None and not len(x):
                raise ValueError(EMPTY)
            if y is None:
                if physics is None:
                    raise ValueError(
                        f"Item {i} of the validation set has no measurements, and "
                        "without physics none can be made of it. Give physics=..., "
                        "e.g. Denoising(GaussianNoise(sigma))."
                    )
                with torch.no_grad():
                    y = own(x)
            y = y if device is None else y.to(device)
            problems.append(Problem(x, y, own))
    if not problems:
        raise ValueError(EMPTY)
    return problems


def _unpack(item: Any, i: int) -> tuple[Tensor | None, Any, dict[str, Any] | None]:
    """Takes image, measurements and parameters from an item in deepinv's formats."""
    if isinstance(item, dict):
        x, y, params = (item.get(name) for name in ("x", "y", "params"))
    elif isinstance(item, Tensor):
        x, y, params = item, None, None
    elif isinstance(item, (tuple, list)) and 2 <= len(item) <= 3:
        x, y, params = (*item, None)[:3]
    else:
        raise TypeError(
            f"Item {i} of the validation set must be an image, a pair (x, y), a triple "
            f"(x, y, params) or a dictionary, got {type(item).__name__}."
        )
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, (Tensor, TensorList, type(None))):
            raise TypeError(
                f"{name} of item {i} must be a tensor, got {type(value).__name__}."
            )
    if isinstance(x, Tensor) and x.numel() and bool(x.isnan().all()):
        x = None  # deepinv's placeholder for a missing ground truth
    if x is None and y is None:
        raise ValueError(f"Item {i} of the validation set has neither x nor y.")
    if x is not None and x.ndim == 3:
        x, y = x[None], None if y is None else y[None]
    return x, y, params


@contextmanager
def own_randomness(
    physics: Any, device: torch.device | None, seed: int
) -> Iterator[None]:
    """
    Seeds all generators, and puts them back as they were.

    :param deepinv.physics.LinearPhysics physics: may have generators of its own.
    :param torch.device device: whose generator is used too.
    :param int seed: the seed.
    """
    device = torch.device("cpu") if device is None else device
    devices = [] if device.type == "cpu" else [device]
    modules: Iterable[Any] = (
        physics.modules() if isinstance(physics, torch.nn.Module) else ()
    )
    generators = [
        (module, rng, rng.get_state())
        for module in modules
        if isinstance(rng := getattr(module, "rng", None), torch.Generator)
    ]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed)
        for _, rng, _ in generators:
            rng.manual_seed(seed)
        try:
            yield
        finally:
            for module, rng, state in generators:
                # An update of the noise model may have put another generator there.
                module.rng = rng
                rng.set_state(state)


def noise_level(physics: Any) -> Tensor | None:
    """Returns the standard deviation of the noise of a physics, if it has one."""
    return getattr(getattr(physics, "noise_model", None), "sigma", None)
