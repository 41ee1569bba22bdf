"""Which likelihood belongs to a data fidelity, or to the noise of a physics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepinv.optim import (
    L1,
    L2,
    DataFidelity,
    LogPoissonLikelihood,
    PoissonLikelihood,
    StackedPhysicsDataFidelity,
)
from deepinv.physics import (
    FisherTippettNoise,
    GammaNoise,
    GaussianNoise,
    LaplaceNoise,
    LogPoissonNoise,
    NoiseModel,
    PoissonGaussianNoise,
    PoissonNoise,
    RicianNoise,
    SaltPepperNoise,
    UniformNoise,
    ZeroNoise,
)
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal.problems.data_fidelity import (
    DEFAULT_DELTA,
    CorrelatedL2,
    SmoothedL1,
    WeightedL2,
)
from deepinv_deal.problems.likelihood import (
    Correlated,
    Gaussian,
    Likelihood,
    LogPoisson,
    Poisson,
    SmoothedAbsolute,
    Stacked,
)
from deepinv_deal.problems.measurements import whole


def _gaussian(fidelity: Any) -> Gaussian:
    return Gaussian(fidelity.d.norm)


#: How the data fidelities that can be frozen become likelihoods. Not their subclasses,
#: which are something else.
LIKELIHOODS: dict[type[DataFidelity], Callable[[Any], Likelihood]] = {
    L2: _gaussian,
    WeightedL2: lambda fidelity: Gaussian(fidelity.weights),
    L1: lambda _: SmoothedAbsolute(DEFAULT_DELTA),
    SmoothedL1: lambda fidelity: SmoothedAbsolute(fidelity.delta),
    CorrelatedL2: lambda fidelity: Correlated(fidelity.covariance, fidelity.dim),
    StackedPhysicsDataFidelity: lambda fidelity: Stacked(
        [likelihood_of(part) for part in fidelity.data_fidelity_list]
    ),
    PoissonLikelihood: lambda fidelity: Poisson(
        fidelity.d.gain, fidelity.d.bkg, fidelity.d.denormalize
    ),
    LogPoissonLikelihood: lambda fidelity: LogPoisson(fidelity.d.N0, fidelity.d.mu),
}


def check_data_fidelity(data_fidelity: Any) -> None:
    """
    Checks that a data fidelity can be frozen.

    :param object data_fidelity: the argument; ``"auto"`` is one, too.
    :raises TypeError: if it cannot.
    """
    if isinstance(data_fidelity, str) and data_fidelity == "auto":
        return
    if type(data_fidelity) not in LIKELIHOODS:
        given = (
            repr(data_fidelity)
            if isinstance(data_fidelity, str)
            else type(data_fidelity).__name__
        )
        raise TypeError(
            "data_fidelity must be 'auto' or one of "
            f"{', '.join(kind.__name__ for kind in LIKELIHOODS)}, got {given}, which "
            "cannot be frozen."
        )


def is_least_squares(data_fidelity: Any) -> bool:
    """Whether a data fidelity is plain least squares."""
    norm = data_fidelity.d.norm if type(data_fidelity) is L2 else None
    return norm is not None and not isinstance(norm, Tensor) and norm == 1


def likelihood_of(data_fidelity: DataFidelity) -> Likelihood:
    """
    Returns the likelihood of a data fidelity.

    :param DataFidelity data_fidelity: one of those that can be frozen.
    :raises TypeError: if it is none.
    :raises ValueError: if a parameter is missing or impossible.
    """
    check_data_fidelity(data_fidelity)
    return LIKELIHOODS[type(data_fidelity)](data_fidelity)


def likelihood_of_noise(physics: Any, y: Any) -> tuple[Likelihood | None, str | None]:
    """
    Returns the likelihood that matches the noise model of a physics, and a remark.

    ``None`` stands for least squares: where the noise is another, or the measurements
    cannot be of it.

    :param deepinv.physics.Physics physics: forward operator, or ``None``.
    :param torch.Tensor y: measurements.
    """
    if isinstance(y, TensorList):
        return _of_stack(physics, y)
    noise: Any = getattr(physics, "noise_model", None)
    mapped = has_noise_map(noise)
    if not isinstance(y, Tensor) or not (y.is_floating_point() or mapped):
        return None, None
    name = type(noise).__name__
    if type(noise) is LogPoissonNoise:
        text = f"the transmission likelihood of {name}"
        return LogPoisson(noise.N0, noise.mu), text
    if type(noise) is PoissonNoise:
        likelihood = Poisson(noise.gain, 0.0, bool(noise.normalize))
        counts = likelihood.counts(y).detach()
        if bool((counts < 0).any()) or not bool(whole(counts)):
            return None, (
                f"least squares, since y does not hold counts of the physics' {name}"
            )
        return likelihood, f"the Poisson likelihood of {name}"
    if type(noise) is PoissonGaussianNoise and bool((noise.gain > 0).all()):
        shift = (noise.sigma / noise.gain).square()
        likelihood = Poisson(noise.gain, 0.0, shift=shift)
        return likelihood, f"the shifted Poisson likelihood of {name}"
    if mapped:
        if not bool((noise.sigma > 0).all()):
            raise ValueError(
                "noise_model: the levels of GaussianNoise must be positive, got a "
                f"smallest one of {float(noise.sigma.min()):.4g}."
            )
        return _of_level(noise), f"the noise levels of {name}"
    if type(noise) in OTHER_NOISE:
        advice = OTHER_NOISE[type(noise)]
        return None, f"least squares, though the physics has {name}; {advice}"
    return None, None


def _of_level(noise: GaussianNoise) -> Gaussian:
    """Returns the likelihood of Gaussian noise, in the unit of the measurements."""
    return Gaussian(noise.sigma.square().reciprocal(), unitless=False)


def _of_stack(physics: Any, y: TensorList) -> tuple[Likelihood | None, str | None]:
    """Returns the likelihood of a stack, where one of its parts is not Gaussian."""
    operators = list(getattr(physics, "physics_list", []))
    if len(operators) != len(y):
        return None, None
    found = [likelihood_of_noise(p, part) for p, part in zip(operators, y, strict=True)]
    remarks = [remark for _, remark in found if remark is not None]
    noises = [getattr(operator, "noise_model", None) for operator in operators]
    if all(likelihood is None for likelihood, _ in found):
        # Least squares weigh all parts alike, and levels may differ between these.
        if not _levels_differ(noises):
            return None, remarks[0] if remarks else None
        remarks = ["the noise levels of GaussianNoise"]
    parts = []
    for noise, (likelihood, _) in zip(noises, found, strict=True):
        if likelihood is None and _has_level(noise):
            likelihood = _of_level(noise)
        if likelihood is None:
            return None, (
                "least squares, since not all parts of the stack have a noise model "
                "whose likelihood is known"
            )
        parts.append(likelihood)
    return Stacked(parts), f"of a stack: {', '.join(remarks)}"


def _has_level(noise: Any) -> bool:
    """Whether a noise model is Gaussian with a level that weights can be made of."""
    return type(noise) is GaussianNoise and bool((noise.sigma > 0).all())


def _levels_differ(noises: list[Any]) -> bool:
    """Whether all are Gaussian with a level, and the levels are not all the same."""
    if not all(map(_has_level, noises)):
        return False
    first, *others = [noise.sigma.flatten() for noise in noises]
    lengths = {len(sigma) for sigma in (first, *others)} - {1}
    if len(lengths) > 1:
        raise ValueError(
            "noise_model: the parts of the stack have levels of different numbers of "
            f"samples, {sorted(lengths)}. Give each one level, or one per sample."
        )
    return any(not bool(((s - first).abs() <= 1e-6 * first).all()) for s in others)


#: Noise that no likelihood here matches, and what to do about it.
OTHER_NOISE: dict[type, str] = {
    LaplaceNoise: "data_fidelity=L1() suits it",
    SaltPepperNoise: "data_fidelity=L1() suits it",
    GammaNoise: "denoise the logarithm of y with its noise level",
    FisherTippettNoise: "denoise y as an image with its noise level",
    RicianNoise: "where the signal is strong it is nearly Gaussian",
    UniformNoise: "it is treated as Gaussian noise of the level that is given",
}


def has_noise(noise: Any) -> bool:
    """Whether a noise model adds noise, of whatever kind."""
    return isinstance(noise, NoiseModel) and type(noise) is not ZeroNoise


def gaussian_level(noise: Any) -> Any:
    """Returns the level of a noise model that has one; ``None``: it has not."""
    if type(noise) in {*OTHER_NOISE, PoissonGaussianNoise}:
        return None  # where sigma is something else, or not all
    return getattr(noise, "sigma", None)


def has_noise_map(noise: Any) -> bool:
    """Whether a noise model is Gaussian with a level for every measurement."""
    sigma = noise.sigma if type(noise) is GaussianNoise else None
    return sigma is not None and sigma.ndim > 1 and sigma[:1].numel() > 1
