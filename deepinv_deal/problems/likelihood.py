r"""Likelihoods: data terms beyond least squares, by their derivative and curvature."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.problems.measurements import (
    each,
    mean,
    mixed,
    parameter,
    squared,
    total,
    whitening,
    whole,
)

#: A typical line integral is one of more counts than this.
LEAST_TRANSMITTED = 0.5

#: Counts have at least this variance. It bounds the curvature where none are expected.
LEAST_VARIANCE = 0.1


class Likelihood(ABC):
    r"""
    A negative log-likelihood :math:`\phi(u; y)` of measurements :math:`y`, separable
    and convex in what is predicted of them, :math:`u = A x`.

    With its curvature frozen at :math:`z`, a data term is the quadratic

    .. math::
        \tfrac12 \langle x, H x \rangle - \langle b, x \rangle, \qquad
        H = A^{\top} D A, \quad b = A^{\top} \big(D A z - \phi'(A z; y)\big), \quad
        D = \mathrm{diag}(c(A z; y)),

    whose gradient at :math:`z` is that of the likelihood. Where :math:`2 c \geq
    \phi''`, as for all likelihoods here, repeating that contracts near a solution
    without any shortening of steps.

    Subclasses define the functions of one measurement tensor; :meth:`value`,
    :meth:`derivative` and :meth:`curvature` also take several, a ``TensorList``.
    """

    #: Whether it has no unit of its own: it is that of images and measurements in
    #: [0, 1], see :meth:`in_unit`.
    unitless: bool = True

    #: Whether it depends on the misfit only, so that images may stand on a pedestal.
    of_misfit: bool = False

    def in_unit(self, scale: Tensor) -> Likelihood:
        """
        Returns the likelihood of measurements as they are; itself if it has a unit.

        :param torch.Tensor scale: by which they are to be divided, ``(B,)``.
        """
        return InUnit(self, scale) if self.unitless else self

    def value(self, u: Any, y: Any) -> Tensor:
        r"""Returns :math:`\phi(u; y)` of every sample, ``(B,)``."""
        return total(each(self._value, u, y))

    def derivative(self, u: Any, y: Any) -> Any:
        r"""Returns :math:`\phi'(u; y)`, shape of ``u``."""
        return each(self._derivative, u, y)

    def curvature(self, u: Any, y: Any) -> Any:
        r"""Returns the curvature :math:`c(u; y) \geq 0`, shape of ``u``."""
        return each(self._curvature, u, y)

    def slope(self, u: Any, y: Any) -> Any:
        r"""Returns :math:`\phi''(u; y)`, shape of ``u``, without gradients."""

        def one(u: Tensor, y: Tensor) -> Tensor:
            if u.is_complex():
                raise RuntimeError(
                    f"The derivative of {type(self).__name__} is not available for "
                    "complex measurements. Give real and imaginary part as two "
                    "channels, or use another data_fidelity."
                )
            with torch.enable_grad():
                u = u.detach().requires_grad_()
                summed = self.derivative(u, y.detach()).sum()
            return torch.autograd.grad(summed, u)[0].detach()

        return each(one, u, y)

    def level(
        self,
        y: Any,  # noqa: ARG002 - not known here
        seen: Any,  # noqa: ARG002
    ) -> Tensor | None:
        """
        Returns the typical curvature, one over the variance of the noise, ``(B,)``;
        ``None``: not known.

        :param torch.Tensor y: measurements.
        :param torch.Tensor seen: which of them the image contributes to.
        """
        return None

    def linear(self, y: Any) -> Any:
        r"""Returns what the measurements say of :math:`A x`."""
        return y

    def check(self, y: Any) -> list[str]:
        """
        Checks the measurements and returns remarks on them.

        :raises ValueError: if they cannot be of this likelihood.
        """
        del y
        return []

    # -- products with the curvature D --------------------------------------------

    def weigh(self, c: Any, v: Any) -> Any:
        """Returns D v, shape of ``v``, for the curvature ``c``."""
        return c * v

    def weigh_root(self, c: Any, v: Any) -> Any:
        """Returns :math:`D^{1/2} v`, up to a rotation, for the curvature ``c``."""
        return each(lambda c, v: c.sqrt() * v, c, v)

    def largest(self, c: Any) -> Tensor:
        """Returns the largest eigenvalue of D, ``(B,)``, for the curvature ``c``."""
        parts = list(c) if isinstance(c, TensorList) else [c]
        return torch.stack([part.flatten(1).amax(1) for part in parts]).amax(0)

    @abstractmethod
    def _value(self, u: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _derivative(self, u: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _curvature(self, u: Tensor, y: Tensor) -> Tensor: ...


class Gaussian(Likelihood):
    """
    Gaussian noise: :math:`w |u - y|^2 / 2`.

    :param torch.Tensor weights: one over the variances.
    :param bool unitless: whether the variances are those of images and measurements in
        [0, 1], or of the measurements as they are.
    """

    of_misfit = True

    def __init__(self, weights: Any, *, unitless: bool = True):
        self.unitless = unitless
        parts = list(weights) if isinstance(weights, TensorList) else [weights]
        for part in map(torch.as_tensor, parts):
            if not bool(((part >= 0) & part.isfinite()).all()):
                raise ValueError(
                    "data_fidelity: the weights of least squares must be finite and "
                    f"not negative, got {_extremes(part)}."
                )
        self.weights = weights

    def derivative(self, u: Any, y: Any) -> Any:
        """Returns the weighted misfit."""
        return self.curvature(u, y) * (u - y)

    def curvature(self, u: Any, y: Any) -> Any:
        """Returns the weights."""
        if isinstance(self.weights, TensorList):
            return each(self._weight, self.weights, u)
        return each(lambda u, _: self._weight(self.weights, u), u, y)

    def slope(self, u: Any, y: Any) -> Any:
        """Returns the weights, without gradients."""
        return each(lambda w, _: w.detach(), self.curvature(u, y), y)

    def value(self, u: Any, y: Any) -> Tensor:
        """Returns half the weighted square of the misfit, ``(B,)``."""
        return 0.5 * total(self.curvature(u, y) * each(squared, u - y))

    def level(self, y: Any, seen: Any) -> Tensor:
        """Returns the mean of the weights of what is not excluded, ``(B,)``."""
        weights = self.curvature(y, y)
        return mean(weights, each(lambda w, s: s & (w > 0), weights, seen))

    def linear(self, y: Any) -> Any:
        """Returns the measurements, zero where they are excluded by a zero weight."""
        return each(lambda w, y: y.where(w > 0, 0), self.curvature(y, y), y)

    @staticmethod
    def _weight(weights: Any, like: Tensor) -> Tensor:
        weights = parameter(weights, like)
        try:
            return weights.expand(like.shape)
        except RuntimeError:
            raise ValueError(
                "data_fidelity: weights must expand to the measurements "
                f"{tuple(like.shape)}, got {tuple(weights.shape)}."
            ) from None

    def _value(self, u: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    _derivative = _curvature = _value


class SmoothedAbsolute(Likelihood):
    r"""
    :class:`SmoothedL1`, for images and measurements in [0, 1]. Its curvature is that of
    the parabola above it, :math:`1 / \max(|u - y|, \delta)`.

    :param float delta: misfit below which it is quadratic, in units of the model.
    """

    of_misfit = True

    def __init__(self, delta: float):
        self.delta = delta

    def _curvature(self, u: Tensor, y: Tensor) -> Tensor:
        return 1 / (u - y).abs().clamp_min(self.delta)

    def _derivative(self, u: Tensor, y: Tensor) -> Tensor:
        return self._curvature(u, y) * (u - y)

    def _value(self, u: Tensor, y: Tensor) -> Tensor:
        size = (u - y).abs()
        inside = (size.square() / self.delta + self.delta) / 2
        return torch.where(size <= self.delta, inside, size)


class Poisson(Likelihood):
    r"""
    Counts :math:`k` of which :math:`n = u / \gamma + \beta` are expected, with the gain
    :math:`\gamma` and the background :math:`\beta`.

    .. math::
        \phi = n - k \log n, \qquad \phi' = \frac{n - k}{\gamma \max(n, \epsilon)}

    The derivative is that of the likelihood with the variance of a count, :math:`n`,
    kept above :math:`\epsilon`; where less is expected, :math:`\phi` goes on as a
    parabola. So predictions need not be kept positive by short steps, zero counts
    without background have a solution, and a negative prediction is a large misfit.

    The curvature is the expected one, :math:`1 / (\gamma^2 n)`, raised to half the
    observed one, :math:`k / (\gamma n)^2`, where that is greater. A system is thus
    least squares weighted by the variances that the last image predicts.

    **Units**: those of the image are those of the gain. An image, its gain and its
    scale may be multiplied by one factor; the weight stays.

    :param float, torch.Tensor gain: gain, one or one per sample.
    :param float, torch.Tensor bkg: background in counts, likewise.
    :param bool denormalize: whether measurements are the gain times the counts.
    :param torch.Tensor shift: what was added to counts, in counts: the variance of
        Gaussian noise beside the counts (shifted Poisson), or ``None``.
    """

    unitless = False

    def __init__(
        self, gain: Any, bkg: Any = 0.0, denormalize: bool = True, shift: Any = None
    ):
        for name, value, positive in (("gain", gain, True), ("bkg", bkg, False)):
            _check_parameter("PoissonLikelihood", name, value, positive=positive)
        self.gain, self.bkg, self.denormalize = gain, bkg, denormalize
        self.shift = shift

    def counts(self, y: Tensor) -> Tensor:
        """Returns the counts of the measurements."""
        counts = y / parameter(self.gain, y) if self.denormalize else y
        return counts if self.shift is None else counts + parameter(self.shift, y)

    def expected(self, u: Tensor) -> Tensor:
        """Returns the counts that are expected."""
        expected = u / parameter(self.gain, u) + parameter(self.bkg, u)
        return expected if self.shift is None else expected + parameter(self.shift, u)

    def _variance(self, n: Tensor) -> Tensor:
        least = torch.as_tensor(LEAST_VARIANCE).to(n)
        if self.shift is not None:
            least = torch.maximum(least, parameter(self.shift, n))
        return torch.maximum(n, least)

    def _derivative(self, u: Tensor, y: Tensor) -> Tensor:
        n = self.expected(u)
        return (n - self.counts(y)) / self._variance(n) / parameter(self.gain, u)

    def _curvature(self, u: Tensor, y: Tensor) -> Tensor:
        n = self.expected(u)
        variance = self._variance(n)
        # Below the least variance it is a parabola.
        ratio = torch.where(n >= variance, self.counts(y) / variance / 2, 1)
        return ratio.clamp_min(1) / variance / parameter(self.gain, u).square()

    def _value(self, u: Tensor, y: Tensor) -> Tensor:
        n, k = self.expected(u), self.counts(y)
        v = self._variance(n)
        beyond = ((n - k).square() - (v - k).square()) / (2 * v)
        return v - k - k * v.log() + beyond

    def linear(self, y: Any) -> Any:
        """Returns the counts without background, times the gain."""

        def one(y: Tensor) -> Tensor:
            k = self.counts(y) - parameter(self.bkg, y)
            k = k if self.shift is None else k - parameter(self.shift, y)
            return k * parameter(self.gain, y)

        return each(one, y)

    def level(self, y: Any, seen: Any) -> Tensor:
        """Returns one over the mean variance, ``(B,)``."""

        def variance(y: Tensor) -> Tensor:
            gain = parameter(self.gain, y)
            return self._variance(self.counts(y)) * gain.square()

        return 1 / mean(each(variance, y), seen)

    def check(self, y: Any) -> list[str]:
        """Checks that the measurements are counts."""
        if self.shift is not None:
            return []
        notes = []
        for part in list(y) if isinstance(y, TensorList) else [y]:
            if part.is_complex():
                raise ValueError("y is complex: Poisson counts are not.")
            counts = self.counts(part).detach()
            if bool((counts < 0).any()):
                raise ValueError(
                    "data_fidelity: y has negative values, down to "
                    f"{float(part.min()):.4g}: no Poisson counts. Give the raw counts, "
                    "and what is to be subtracted from them as bkg; for Gaussian noise "
                    "beside the counts give the physics PoissonGaussianNoise."
                )
            if not bool(whole(counts)):
                gain = parameter(self.gain, part).detach()
                other = part if self.denormalize else part / gain
                if bool(whole(other)):
                    raise ValueError(
                        "data_fidelity: y holds whole numbers only "
                        f"{'before' if self.denormalize else 'after'} division by the "
                        f"gain. Give denormalize={not self.denormalize}, or for the "
                        "rounded numbers of a camera a physics with "
                        "PoissonGaussianNoise."
                    )
                notes.append("y does not hold whole numbers of counts.")
            few = int((counts == 0).sum())
            if few and bool((torch.as_tensor(self.bkg) <= 0).any()):
                notes.append(
                    f"{few} of {counts.numel()} counts are zero, without background: "
                    f"expected counts below {LEAST_VARIANCE} have that variance."
                )
        return notes


class LogPoisson(Likelihood):
    r"""
    Transmission: :math:`N_0 e^{-\mu y}` counts of which :math:`N_0 e^{-\mu u}` are
    expected (computed tomography).

    .. math::
        \phi = N_0 \big(e^{-\mu u} + \mu u \, e^{-\mu y}\big), \qquad
        \phi' = \mu N_0 \big(e^{-\mu y} - e^{-\mu u}\big)

    The curvature is the greater of :math:`\phi''(u)` and the slope of the chord
    :math:`\phi'(u) / (u - y)`; it lies above the likelihood between :math:`u` and
    :math:`y`. No counts at all, :math:`y = \infty`, are allowed.

    **Units**: those of the image are those of :math:`1 / \mu`. An image and its scale
    may be multiplied by a factor by which :math:`\mu` is divided; the weight stays.

    :param float, torch.Tensor N0: counts without object, one or one per sample.
    :param float, torch.Tensor mu: normalization, likewise.
    """

    unitless = False

    def __init__(self, N0: Any, mu: Any):
        for name, value in (("N0", N0), ("mu", mu)):
            _check_parameter("LogPoissonLikelihood", name, value, positive=True)
        self.N0, self.mu = N0, mu

    def _counts(self, u: Tensor) -> Tensor:
        return parameter(self.N0, u) * torch.exp(-parameter(self.mu, u) * u)

    def _value(self, u: Tensor, y: Tensor) -> Tensor:
        return self._counts(u) + parameter(self.mu, u) * u * self._counts(y)

    def _derivative(self, u: Tensor, y: Tensor) -> Tensor:
        return parameter(self.mu, u) * (self._counts(y) - self._counts(u))

    def _curvature(self, u: Tensor, y: Tensor) -> Tensor:
        mu = parameter(self.mu, u)
        t = mu * (u - y)
        near = t.abs() < 1e-4
        chord = -torch.expm1(-t) / t.where(~near, 1)
        chord = chord.where(~near, 1 - t / 2) * self._counts(y)
        return mu.square() * torch.maximum(chord.nan_to_num(0), self._counts(u))

    def check(self, y: Any) -> list[str]:
        """Checks that the measurements are line integrals."""
        for part in list(y) if isinstance(y, TensorList) else [y]:
            if part.is_complex():
                raise ValueError("y is complex: line integrals are not.")
            doubt = self.doubt(part)
            if doubt is not None:
                raise ValueError(
                    "data_fidelity: the likelihood of transmission is for line "
                    f"integrals, -log(counts / N0) / mu. y holds {doubt}."
                )
        return []

    def doubt(self, y: Tensor) -> str | None:
        """
        Says what measurements hold that can be no line integrals, ``None``: they can.

        :param torch.Tensor y: real measurements.
        """
        y = y.detach()
        counts = self._counts(y)
        few = counts.flatten(1).median(1).values < LEAST_TRANSMITTED
        if not bool(few.any()) and not bool(counts.isposinf().any()):
            return None
        return (
            f"numbers from {float(y.min()):.4g} to {float(y.max()):.4g}, which would "
            f"be from {float(counts.max()):.2g} to {float(counts.min()):.2g} counts"
        )

    def linear(self, y: Any) -> Any:
        """Returns the measurements, half a count where there was none."""

        def one(y: Tensor) -> Tensor:
            most = (2 * parameter(self.N0, y)).log() / parameter(self.mu, y)
            return torch.where(y == math.inf, most, y)

        return each(one, y) if isinstance(y, (Tensor, TensorList)) else y

    def level(self, y: Any, seen: Any) -> Tensor:
        """Returns the mean of the curvature at the measurements, ``(B,)``."""

        def curvature(y: Tensor) -> Tensor:
            return parameter(self.mu, y).square() * self._counts(y)

        return mean(each(curvature, y), seen)


class InUnit(Likelihood):
    r"""
    A likelihood without unit, of measurements as they are: :math:`\phi(u / s; y / s)`.

    :param Likelihood likelihood: the likelihood, for measurements in [0, 1].
    :param torch.Tensor scale: s, ``(B,)``.
    """

    def __init__(self, likelihood: Likelihood, scale: Tensor):
        self.likelihood, self.scale = likelihood, scale

    def _divided(self, v: Any, power: int = 1) -> Any:
        return each(lambda v: v / expand(self.scale, v) ** power, v)

    def value(self, u: Any, y: Any) -> Tensor:
        """Returns the value, ``(B,)``."""
        return self.likelihood.value(self._divided(u), self._divided(y))

    def derivative(self, u: Any, y: Any) -> Any:
        """Returns the derivative in u."""
        inner = self.likelihood.derivative(self._divided(u), self._divided(y))
        return self._divided(inner)

    def curvature(self, u: Any, y: Any) -> Any:
        """Returns the curvature."""
        inner = self.likelihood.curvature(self._divided(u), self._divided(y))
        return self._divided(inner, 2)

    def slope(self, u: Any, y: Any) -> Any:
        """Returns the second derivative in u."""
        inner = self.likelihood.slope(self._divided(u), self._divided(y))
        return self._divided(inner, 2)

    def level(self, y: Any, seen: Any) -> Tensor | None:
        """Returns the typical curvature, ``(B,)``."""
        level = self.likelihood.level(self._divided(y), seen)
        return None if level is None else level / self.scale.square()

    def check(self, y: Any) -> list[str]:
        """Checks the measurements."""
        return self.likelihood.check(self._divided(y))

    def linear(self, y: Any) -> Any:
        """Returns what the measurements say, in their unit."""
        return self.likelihood.linear(y)

    def weigh(self, c: Any, v: Any) -> Any:
        """Returns D v."""
        return self.likelihood.weigh(c, v)

    def weigh_root(self, c: Any, v: Any) -> Any:
        """Returns the root of D times v."""
        return self.likelihood.weigh_root(c, v)

    def largest(self, c: Any) -> Tensor:
        """Returns the largest eigenvalue of D, ``(B,)``."""
        return self.likelihood.largest(c)

    def _value(self, u: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    _derivative = _curvature = _value


class Stacked(Likelihood):
    """
    Likelihoods of several independent measurements of one image.

    :param list parts: the likelihood of each.
    """

    def __init__(self, parts: list[Likelihood]):
        self.parts = parts
        self.unitless = any(part.unitless for part in parts)
        self.of_misfit = all(part.of_misfit for part in parts)

    def _paired(self, *values: Any) -> Any:
        number = len(values[0]) if isinstance(values[0], TensorList) else 1
        if number != len(self.parts):
            raise ValueError(
                f"data_fidelity has {len(self.parts)} parts, the measurements "
                f"{number}. Give one for each operator of a StackedLinearPhysics."
            )
        return zip(self.parts, *values, strict=True)

    def in_unit(self, scale: Tensor) -> Likelihood:
        """Returns the likelihoods of measurements as they are."""
        stacked = Stacked([part.in_unit(scale) for part in self.parts])
        stacked.unitless = self.unitless
        return stacked

    def value(self, u: Any, y: Any) -> Tensor:
        """Returns the sum of the values, ``(B,)``."""
        return torch.stack([p.value(*uy) for p, *uy in self._paired(u, y)]).sum(0)

    def derivative(self, u: Any, y: Any) -> Any:
        """Returns the derivatives."""
        return TensorList([p.derivative(*uy) for p, *uy in self._paired(u, y)])

    def curvature(self, u: Any, y: Any) -> Any:
        """Returns the curvatures."""
        return TensorList([p.curvature(*uy) for p, *uy in self._paired(u, y)])

    def slope(self, u: Any, y: Any) -> Any:
        """Returns the second derivatives."""
        return TensorList([p.slope(*uy) for p, *uy in self._paired(u, y)])

    def linear(self, y: Any) -> Any:
        """Returns what the measurements say of their predictions."""
        return TensorList([p.linear(part) for p, part in self._paired(y)])

    def check(self, y: Any) -> list[str]:
        """Checks all measurements."""
        return [note for p, part in self._paired(y) for note in p.check(part)]

    def level(self, y: Any, seen: Any) -> Tensor | None:
        """Returns the mean of the levels over all measurements, ``(B,)``."""
        levels = [p.level(*values) for p, *values in self._paired(y, seen)]
        known = [level for level in levels if level is not None]
        if len(known) < len(levels):
            return None
        numbers = torch.stack([total(part.long()) for part in seen])
        return (numbers * torch.stack(known)).sum(0) / numbers.sum(0)

    def weigh(self, c: Any, v: Any) -> Any:
        """Returns D v."""
        return TensorList([p.weigh(*values) for p, *values in self._paired(c, v)])

    def weigh_root(self, c: Any, v: Any) -> Any:
        """Returns the root of D times v."""
        return TensorList([p.weigh_root(*values) for p, *values in self._paired(c, v)])

    def largest(self, c: Any) -> Tensor:
        """Returns the largest eigenvalue of D, ``(B,)``."""
        return torch.stack([p.largest(part) for p, part in self._paired(c)]).amax(0)

    def _value(self, u: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    _derivative = _curvature = _value


class Correlated(Likelihood):
    r"""
    Gaussian noise with a covariance :math:`\Psi` between channels or coils,
    :math:`\tfrac12 \|R (u - y)\|^2` with :math:`R^H R = \Psi^{-1}`; see
    :class:`CorrelatedL2`.

    :param torch.Tensor covariance: :math:`\Psi`, ``(N, N)``.
    :param int dim: the dimension of the measurements that it mixes.
    """

    of_misfit = True

    def __init__(self, covariance: Tensor, dim: int):
        self.dim = dim
        root = whitening(covariance)
        precision = root.mH @ root
        # The mean of the eigenvalues stands for all where one number is wanted.
        self.mean = precision.diagonal().real.mean()
        self.root, self.precision = root / self.mean.sqrt(), precision / self.mean

    def _value(self, u: Tensor, y: Tensor) -> Tensor:
        return 0.5 * self.mean.to(u.device) * squared(mixed(self.root, u - y, self.dim))

    def _derivative(self, u: Tensor, y: Tensor) -> Tensor:
        return self.mean.to(u.device) * mixed(self.precision, u - y, self.dim)

    def _curvature(self, u: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return torch.ones_like(u.real if u.is_complex() else u) * self.mean.to(u.device)

    def slope(self, u: Any, y: Any) -> Any:
        """Returns the curvature."""
        return self.curvature(u, y)

    def level(self, y: Any, seen: Any) -> Tensor:
        """Returns the mean of the precisions, ``(B,)``."""
        return mean(self.curvature(y, y), seen)

    def weigh(self, c: Any, v: Any) -> Any:
        """Returns the precision matrix times v."""
        return each(lambda c, v: c * mixed(self.precision, v, self.dim), c, v)

    def weigh_root(self, c: Any, v: Any) -> Any:
        """Returns a root of the precision matrix times v."""
        return each(lambda c, v: c.sqrt() * mixed(self.root.mH, v, self.dim), c, v)

    def largest(self, c: Any) -> Tensor:
        """Returns the largest precision, ``(B,)``."""
        return super().largest(c) * torch.linalg.eigvalsh(self.precision).max()


def _check_parameter(owner: str, name: str, value: Any, *, positive: bool) -> None:
    try:
        values = torch.as_tensor(value).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"data_fidelity: {name} of {owner} is missing: {value!r} is no number."
        ) from None
    bad = (values <= 0) if positive else (values < 0)
    if bool((bad | ~values.isfinite()).any()):
        raise ValueError(
            f"data_fidelity: {name} of {owner} must be finite and "
            f"{'positive' if positive else 'not negative'}, got {_extremes(values)}."
        )


def _extremes(values: Tensor) -> str:
    if values.numel() == 1:
        return f"{float(values):.4g}"
    return f"values from {float(values.min()):.4g} to {float(values.max()):.4g}"
