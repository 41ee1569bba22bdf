r"""How sure the model is of each pixel, and whether it is right about that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepinv_deal._batch import expand
from deepinv_deal.interpret._figures import BLUE, GRAY, finish, new_figure, show
from deepinv_deal.interpret.linearization import Linearization
from deepinv_deal.interpret.local import random_signs
from deepinv_deal.problems.likelihood_term import LikelihoodTerm
from deepinv_deal.problems.measurements import each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Nominal probability of the interval whose coverage is reported, and its half width.
NOMINAL, HALF_WIDTH = 0.9, 1.6449


def posterior_variance(
    at: Linearization,
    noise: float | None = None,
    *,
    spacing: int = 8,
    num_probes: int = 1,
    batch_size: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""
    Returns the pixel-wise variance of the reconstruction, the mask frozen.

    With the mask frozen, the regularizer is a Gaussian prior. If the measurements carry
    white noise of standard deviation :math:`s` and the prior has the precision
    :math:`\lambda W^{\top} M^2 W / s^2`, the image given the data is Gaussian with mean
    :math:`\hat x` and covariance :math:`s^2 B^{-1}`, of which this is the diagonal.

    It is estimated by probing: with random signs :math:`v` on every ``spacing``-th
    pixel and zeros elsewhere,

    .. math::
        (B^{-1})_{nn} \approx v_n \, (B^{-1} v)_n \quad \text{where } v_n \neq 0.

    The error comes from entries of :math:`B^{-1}` between pixels that are ``spacing``
    apart, and averages out over ``num_probes``; it vanishes for a ``spacing`` as large
    as the image. The cost is ``C * spacing**2 * num_probes`` solves.

    .. note::
        The mask is taken for known, and :math:`\lambda` is tuned for quality, not
        derived from the noise: compare with true errors by :func:`calibrate`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import linearize, posterior_variance
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> at = linearize(model, torch.rand(1, 1, 12, 12), sigma=0.1)
    >>> variance = posterior_variance(at, 0.1, spacing=2)
    >>> variance.shape, bool(variance.max() < 0.1**2)
    (torch.Size([1, 1, 12, 12]), True)

    :param Linearization at: from :func:`linearize`, of :class:`deepinv_deal.DEAL`.
    :param float noise: standard deviation of the noise in the measurements; ``None``
        for a likelihood, which knows its noise: s is then 1, in units of the model.
    :param int spacing: distance of the pixels of one probe.
    :param int num_probes: number of random signs.
    :param int batch_size: solves that run together.
    :param torch.Generator generator: of the signs; a fresh one if ``None``.
    :return: in squared units of the image, ``(1, C, H, W)``. Not negative: estimates
        below 0 are set to 0.
    :raises ValueError: if a number is not positive.
    """
    s = _unit_of_noise(at, noise)
    _check_positive(spacing=spacing, num_probes=num_probes)
    channels, height, width = at.x.shape[1:]
    offsets = [
        (c, i, j)
        for c in range(channels)
        for i in range(min(spacing, height))
        for j in range(min(spacing, width))
    ]
    total = torch.zeros_like(at.x)
    for signs in random_signs(at.x, num_probes, generator):
        probes = signs.new_zeros(len(offsets), *signs.shape)
        for probe, (c, i, j) in zip(probes, offsets, strict=True):
            grid = (c, slice(i, None, spacing), slice(j, None, spacing))
            probe[grid] = signs[grid]
        for v in probes.split(batch_size):
            total += (v * at.solve(v)).sum(0)
    return s.square() * (total / num_probes).clamp_min(0)


def posterior_samples(
    at: Linearization,
    noise: float | None = None,
    num_samples: int = 8,
    *,
    batch_size: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""
    Draws images from the Gaussian of :func:`posterior_variance` by perturb and solve.

    .. math::
        x^{(i)} = \hat x + s \, B^{-1} \big( A^{\top} n_1 + \sqrt{\lambda}\, W^{\top}
        (M \odot n_2) \big), \qquad n_1, n_2 \sim \mathcal{N}(0, I)

    The perturbation has the covariance :math:`s^2 B`, so the samples have
    :math:`s^2 B^{-1}`, exactly. One solve each.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import DEAL
    >>> from deepinv_deal.interpret import linearize, posterior_samples
    >>> model = DEAL(pretrained=None, num_filters=8)
    >>> at = linearize(model, torch.rand(1, 1, 12, 12), sigma=0.1)
    >>> posterior_samples(at, 0.1, 3).shape
    torch.Size([3, 1, 12, 12])

    :param Linearization at: from :func:`linearize`, of :class:`deepinv_deal.DEAL`.
    :param float noise: standard deviation of the noise in the measurements; ``None``
        for a likelihood, which knows its noise: s is then 1, in units of the model.
    :param int num_samples: number of samples.
    :param int batch_size: solves that run together.
    :param torch.Generator generator: of the perturbations; a fresh one if ``None``.
    :return: images of the physics, ``(num_samples, C, H, W)``.
    :raises ValueError: if a number is not positive.
    """
    s = _unit_of_noise(at, noise)
    _check_positive(num_samples=num_samples)
    generator = generator or torch.Generator().manual_seed(0)
    equation = at.problem.equation
    regularizer = equation.regularizer
    weight = expand(equation.lambda_reg.sqrt(), at.x)
    right = []
    with torch.no_grad():
        mask = equation.mask(at.x)
        for _ in range(num_samples):
            n2 = _normal(mask, generator)
            prior = weight * regularizer.adjoint(mask * n2, at.x)
            right.append(_back_projected_noise(at, generator) + prior)
    changes = [at.solve(v) for v in torch.cat(right).split(batch_size)]
    # Changes of x are in the units of the model.
    scale = expand(at.problem.data.intensity, at.x)
    return at.problem.image(at.x + s / scale * torch.cat(changes))


def _unit_of_noise(at: Linearization, noise: float | None) -> Tensor:
    r"""Returns :math:`s` in units of the image, to be broadcast to images."""
    data = at.problem.data
    if data.quadratic:
        if noise is None:
            raise ValueError(
                "noise is missing: the standard deviation of the noise in y."
            )
        _check_positive(noise=noise)
        return torch.full_like(at.x[:, :1, :1, :1], noise)
    if noise is not None:
        raise ValueError(
            f"noise={noise}: the data_fidelity is a likelihood, which knows its noise. "
            "Leave noise out."
        )
    return expand(data.intensity, at.x)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    device = generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like)


def _back_projected_noise(at: Linearization, generator: torch.Generator) -> Tensor:
    r"""
    Returns :math:`A^{\top} n` for white noise of variance 1, shape of ``at.x``; for
    likelihoods :math:`A^{\top} D^{1/2} n`.
    """
    data = at.problem.data
    if isinstance(data, LikelihoodTerm):
        return data.score(at.x, lambda like: _white(like, generator))
    if data.identity:
        return _normal(at.x, generator)
    layout, physics = data.layout, data.physics
    assert layout is not None
    y = physics.A(layout.embed(torch.zeros_like(at.x)))
    noise = each(lambda part: _white(part, generator), y)
    return layout.extract(physics.A_adjoint(noise))


def _white(like: Tensor, generator: torch.Generator) -> Tensor:
    if not like.is_complex():
        return _normal(like, generator)
    return torch.complex(_normal(like.real, generator), _normal(like.imag, generator))


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")


@dataclass(frozen=True)
class Calibration:
    r"""
    How predicted standard deviations compare with true errors.

    :param float factor: what the standard deviations have to be multiplied with.
    :param float correlation: of predicted standard deviation and absolute error, over
        all pixels. Even with perfect predictions it is far from 1, since the error of a
        single pixel is random.
    :param float coverage: share of pixels whose error is within the calibrated interval
        of nominally 90 %.
    :param torch.Tensor predicted: calibrated standard deviation, root mean square of
        each bin, ``(n,)``.
    :param torch.Tensor observed: root mean square error of each bin, ``(n,)``.
    """

    factor: float
    correlation: float
    coverage: float
    predicted: Tensor
    observed: Tensor


def calibrate(
    variance: Tensor, error: Tensor, num_bins: int = 12, factor: float | None = None
) -> Calibration:
    r"""
    Fits one factor to predicted variances and compares them with true errors.

    .. math::
        c^2 = \frac1n \sum_i \frac{e_i^2}{\sigma_i^2},

    the maximum likelihood estimate if the errors are Gaussian with standard deviation
    :math:`c \sigma_i`. Pixels are then sorted by :math:`\sigma_i` into bins of equal
    size, in which the root mean square error should equal the prediction.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.interpret import calibrate
    >>> variance = torch.linspace(0.5, 2.0, 4000).square()
    >>> error = 3 * variance.sqrt() * torch.randn(4000, generator=torch.manual_seed(0))
    >>> round(calibrate(variance, error).factor, 1)
    3.0

    :param torch.Tensor variance: predicted, positive, any shape.
    :param torch.Tensor error: reconstruction minus ground truth, same shape.
    :param int num_bins: number of bins.
    :param float factor: use this factor, fitted on other images, instead of fitting.
    :return: (:class:`Calibration`)
    :raises ValueError: for different shapes or a variance that is not positive.
    """
    if variance.shape != error.shape:
        raise ValueError(
            f"variance and error must have one shape, got {tuple(variance.shape)} and "
            f"{tuple(error.shape)}."
        )
    if not bool((variance > 0).all()):
        raise ValueError(
            f"variance must be positive, got {float(variance.min()):.1e}. Raise "
            "num_probes or spacing of its estimate."
        )
    variance, error = variance.flatten().double(), error.flatten().double()
    std = variance.sqrt()
    if factor is None:
        factor = float((error.square() / variance).mean().sqrt())
    order = std.argsort()
    predicted, observed = [], []
    for index in order.tensor_split(num_bins):
        predicted.append(factor * variance[index].mean().sqrt())
        observed.append(error[index].square().mean().sqrt())
    correlation = torch.corrcoef(torch.stack([std, error.abs()]))[0, 1]
    inside = error.abs() <= HALF_WIDTH * factor * std
    return Calibration(
        factor,
        float(correlation),
        float(inside.double().mean()),
        torch.stack(predicted),
        torch.stack(observed),
    )


def plot_uncertainty(
    x_hat: Tensor,
    variance: Tensor,
    x_gt: Tensor,
    calibration: Calibration | None = None,
) -> Figure:
    """
    Draws reconstruction, calibrated standard deviation, true error and calibration.

    Standard deviation and error share one colour scale.

    :param torch.Tensor x_hat: reconstruction ``(1, C, H, W)``.
    :param torch.Tensor variance: from :func:`posterior_variance`, ``(1, C, H, W)``.
    :param torch.Tensor x_gt: ground truth ``(1, C, H, W)``.
    :param Calibration calibration: fitted elsewhere; ``None``: fitted to this image.
    :return: the figure.
    """
    error = x_hat - x_gt
    if calibration is None:
        calibration = calibrate(variance, error)
    std = calibration.factor * variance.sqrt()[0].mean(0)
    absolute = error[0].abs().mean(0)
    top = float(absolute.flatten().quantile(0.99))
    figure = new_figure(15.0, 4.5)
    axes = figure.subplots(1, 4)
    show(axes[0], x_hat[0], "reconstruction\n")
    maps = (
        (std, f"predicted standard deviation\nfactor {calibration.factor:.2f} fitted"),
        (absolute, f"true error\ncorrelation {calibration.correlation:.2f}"),
    )
    for axis, (image, title) in zip(axes[1:3], maps, strict=True):
        show(axis, image, title, cmap="magma", limits=(0, top), colorbar=True)
    _draw_calibration(axes[3], calibration)
    return figure


def _draw_calibration(axis: Axes, found: Calibration) -> None:
    """Draws observed errors over predicted ones: on the diagonal, they are right."""
    predicted, observed = found.predicted.cpu(), found.observed.cpu()
    label = f"90 % interval holds {found.coverage:.0%}"
    axis.plot(predicted, observed, "o-", markersize=4, color=BLUE, label=label)
    top = 1.05 * max(float(predicted.max()), float(observed.max()))
    axis.plot([0, top], [0, top], "--", color=GRAY, linewidth=1)
    axis.set_xlim(0, top)
    axis.set_ylim(0, top)
    axis.set_aspect("equal")
    finish(
        axis,
        "calibration\npixels sorted by prediction",
        "predicted standard deviation",
        "observed root mean square error",
        legend=True,
    )
