"""Preconditioners that follow from a few applications of an operator to images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from deepinv_deal._batch import expand, norm, read_any, select
from deepinv_deal.solvers.conjugate_gradient import LinearMap, conjugate_gradient
from deepinv_deal.solvers.result import SolverResult, Status

#: Number of random images by which an operator is probed, at most.
PROBES = 4

#: A model of an operator is worth a trial if it predicts its action on a random image
#: up to this relative error.
LARGEST_MISFIT = 0.7

#: A model whose error is below so many units of rounding is the operator itself: the
#: one test of whether a physics is a circular convolution, or diagonal.
ROUNDING = 100

#: A preconditioner is kept if it makes convergence per iteration faster by this factor.
LEAST_GAIN = 1.3

#: Solves, counted from 0, in which a preconditioner is tried; the one before each is
#: measured. Of some operators the first right-hand sides are easy and tell little.
TRIALS = (2, 4)

#: One step of a preconditioner is taken without applying the operator where the last
#: solve reduced the residual, in every iteration, by this much more than is asked.
TRUST = 1.2

#: A preconditioner that is an iteration is given up where iterations with it reduce the
#: residual by no more than this: its own system is as badly conditioned as the other.
FAILING = 0.9

#: Iterations of a preconditioner that is an iteration, at most.
INNER_MAX_ITER = 30

#: Preconditioners stay bounded: no eigenvalue below this fraction of the largest.
FLOOR = 1e-6


@dataclass(frozen=True)
class Fourier:
    """
    The Fourier transform of unknowns ``(B, C, H, W)``: what a convolution acts on.

    :param bool complex_pair: the first half of the channels are the real, the second
        the imaginary part of complex images, whose spectrum is meant.
    :param int depth: so many slices are one volume, and are transformed along the third
        axis, too, as the most significant one of the channels; 0: every channel by
        itself.
    """

    complex_pair: bool = False
    depth: int = 0

    def spectrum(self, x: Tensor) -> Tensor:
        """Returns the spectrum ``(B, C or C / 2, H, W)`` of an unknown."""
        if self.complex_pair:
            x = torch.complex(*x.chunk(2, 1))
        if not self.depth:
            return torch.fft.fft2(x)
        volume = x.unflatten(1, (self.depth, -1))
        return torch.fft.fftn(volume, dim=_VOLUME).flatten(1, 2)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """Inverts :meth:`spectrum`."""
        if self.depth:
            spectrum = spectrum.unflatten(1, (self.depth, -1))
            x = torch.fft.ifftn(spectrum, dim=_VOLUME).flatten(1, 2)
        else:
            x = torch.fft.ifft2(spectrum)
        if self.complex_pair:
            return torch.cat([x.real, x.imag], 1)
        return x.real.contiguous()

    def real_spectrum(self, x: Tensor) -> Tensor:
        """Returns numbers in place of a spectrum: one half of those of a pair."""
        return x.chunk(2, 1)[0] if self.complex_pair else x

    def points(self, like: Tensor) -> int:
        """Returns how many numbers are transformed together."""
        return max(1, self.depth) * like[0, 0].numel()

    def symmetrized(self, values: Tensor) -> Tensor:
        """Returns the closest eigenvalues that an operator on unknowns can have."""
        if self.complex_pair:
            return values
        # Real operators have real, hence symmetric, kernels.
        if not self.depth:
            mirrored = values.flip(-2, -1).roll((1, 1), (-2, -1))
            return 0.5 * (values + mirrored)
        volume = values.unflatten(1, (self.depth, -1))
        mirrored = volume.flip(_VOLUME).roll((1, 1, 1), _VOLUME).flatten(1, 2)
        return 0.5 * (values + mirrored)


#: Axes of a volume in ``(B, D, C, H, W)``.
_VOLUME = (1, 3, 4)

#: The transform of images.
PLANE = Fourier()


def probe(like: Tensor, seed: int, fourier: Fourier = PLANE) -> Tensor:
    """
    Returns a random image with a flat spectrum, the same for every sample.

    On such an image the action of a convolution shows its transfer function exactly.

    :param torch.Tensor like: images ``(B, C, H, W)``; their values do not matter.
    :param int seed: number of the probe.
    :param Fourier fourier: the transform.
    """
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(like.shape[1:], generator=rng, dtype=like.dtype, device="cpu")
    spectrum = fourier.spectrum(noise[None])
    flat = fourier.inverse(spectrum / spectrum.abs())
    return math.sqrt(fourier.points(like)) * flat.to(like.device).expand_as(like)


def transfer_function(
    H: LinearMap, like: Tensor, fourier: Fourier = PLANE
) -> tuple[Tensor, Tensor]:
    r"""
    Estimates the circulant operator closest to :math:`H`.

    Its eigenvalues are the diagonal of :math:`F H F^{*}`, where :math:`F` is the
    Fourier transform; they are exact if :math:`H` is a circular convolution, or masks
    the Fourier transform.

    :param Callable H: symmetric positive semi-definite operator on images.
    :param torch.Tensor like: images ``(B, C, H, W)``; their values do not matter.
    :param Fourier fourier: the transform.
    :return: eigenvalues ``(B, C, H, W)``, with one channel for a complex pair, and the
        relative error ``(B,)`` with which they predict the action of :math:`H`.
    """
    estimates, outputs = [], []
    for seed in range(PROBES):
        v = probe(like, seed, fourier)
        spectrum, output = fourier.spectrum(v), fourier.spectrum(H(v))
        estimates.append((spectrum.conj() * output).real / spectrum.abs().square())
        outputs.append((spectrum, output))
        # An estimate from one image reproduces that image whatever the operator is. The
        # first check is therefore after two, which are enough for a convolution.
        if seed not in (1, PROBES - 1):
            continue
        values = torch.stack(estimates).mean(0).clamp_min(0)
        values = fourier.symmetrized(values)
        misfit = _misfit(values, outputs)
        if faithful(misfit).all():
            break
    return values, misfit


def faithful(misfit: Tensor) -> Tensor:
    """Whether the relative error of a model is that of rounding, shape as given."""
    return misfit < ROUNDING * torch.finfo(misfit.dtype).eps


def convolve(values: Tensor, x: Tensor, fourier: Fourier = PLANE) -> Tensor:
    """
    Applies the circular convolution with given eigenvalues to images.

    :param torch.Tensor values: eigenvalues, ``(B, C, H, W)`` or a shape that expands to
        it, with one channel for a complex pair. Otherwise they are those of a real
        kernel: the same at a frequency and its negative.
    :param torch.Tensor x: images ``(B, C, H, W)``.
    :param Fourier fourier: the transform.
    """
    if fourier.complex_pair:
        return fourier.inverse(values * fourier.spectrum(x))
    # Kernels are real, so half of the spectrum tells all.
    half = values[..., : x.shape[-1] // 2 + 1]
    if not fourier.depth:
        return torch.fft.irfft2(half * torch.fft.rfft2(x), s=x.shape[-2:])
    volume = x.unflatten(1, (fourier.depth, -1))
    spectrum = torch.fft.rfftn(volume, dim=_VOLUME).flatten(1, 2)
    product = (half * spectrum).unflatten(1, (fourier.depth, -1))
    size = [volume.shape[i] for i in _VOLUME]
    return torch.fft.irfftn(product, s=size, dim=_VOLUME).flatten(1, 2)


def diagonal(H: LinearMap, like: Tensor) -> tuple[Tensor, Tensor]:
    """
    Estimates the diagonal of an operator on images; exactly if it is diagonal.

    :param Callable H: symmetric positive semi-definite operator on images.
    :param torch.Tensor like: images ``(B, C, H, W)``; their values do not matter.
    :return: diagonal, shape of ``like``, and the relative error ``(B,)`` with which it
        predicts the action of :math:`H`.
    """
    outputs = []
    for seed in range(PROBES):
        rng = torch.Generator().manual_seed(seed)
        bits = torch.randint(2, like.shape[1:], generator=rng, device="cpu")
        sign = bits.to(like) * 2 - 1
        # Not a view with stride 0, which MKL's FFT in some versions of torch refuses
        # (pytorch issue 154477) and a physics may not expect.
        v = sign.expand_as(like).contiguous()
        outputs.append((v, H(v)))
    values = torch.stack([v * u for v, u in outputs]).mean(0).clamp_min(0)
    return values, _misfit(values, outputs)


def _misfit(values: Tensor, outputs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Relative error of ``values * v`` for given pairs of v and its image, ``(B,)``."""
    errors = torch.stack([norm(values * v - u) for v, u in outputs])
    sizes = torch.stack([norm(u) for _, u in outputs])
    return (norm(errors.T) / norm(sizes.T)).nan_to_num(0)


def bounded(values: Tensor) -> Tensor:
    """Raises the smallest values of every sample to a fraction of its largest."""
    largest = values.flatten(1).amax(1)
    return torch.maximum(values, expand(FLOOR * largest, values))


class Kind(IntEnum):
    """Which preconditioner a sample has."""

    NONE = 0
    #: A formula: its time does not count.
    DIRECT = 1
    #: An iteration, whose work counts.
    INNER = 2


class InnerSolve:
    """
    A preconditioner that is itself a solve by conjugate gradients, of a cheaper system.

    :param Callable A: the cheaper operator.
    :param torch.Tensor rtol: accuracy of the solves, ``(B,)``.
    :param torch.Tensor cost: time of their iterations relative to those that they
        precondition, ``(B,)``.
    :param Callable preconditioner: preconditioner of the cheaper system.
    """

    def __init__(
        self, A: LinearMap, rtol: Tensor, cost: Tensor, preconditioner: LinearMap
    ):
        self.A, self.rtol, self.preconditioner = A, rtol, preconditioner
        self.cost, self.n_iter = cost, torch.zeros_like(rtol, dtype=torch.int64)

    def __call__(self, r: Tensor) -> Tensor:
        """Returns about :math:`A^{-1} r`."""
        result = conjugate_gradient(
            self.A,
            r,
            rtol=self.rtol,
            max_iter=INNER_MAX_ITER,
            preconditioner=self.preconditioner,
            verify=False,
        )
        self.n_iter = self.n_iter + result.n_iter
        return result.x

    @property
    def work(self) -> Tensor:
        """What all calls took, in iterations of the outer system, ``(B,)``."""
        return self.cost * self.n_iter


class _Plan(NamedTuple):
    """
    How the next system of a sequence is solved; all tensors ``(B,)``.

    :param torch.Tensor used: the :class:`Kind` of preconditioner.
    :param torch.Tensor limit: largest number of iterations.
    :param torch.Tensor trial: samples whose preconditioner is on trial.
    :param torch.Tensor measured: samples of which the rate is measured for a trial.
    :param torch.Tensor trusted: samples that take one step of the preconditioner.
    """

    used: Tensor
    limit: Tensor
    trial: Tensor
    measured: Tensor
    trusted: Tensor


class PreconditionedSolver:
    r"""
    Conjugate gradients for a sequence of similar systems, with a direct preconditioner
    that is kept only where it pays.

    Every sample decides for itself. The first system tells nothing, since the first
    weights of a model are those of an empty image. The second is solved as before, and
    its rate of convergence is measured; the third is solved with the preconditioner on
    trial, with at most as many iterations as would have been the same work. If that was
    faster by the factor ``LEAST_GAIN``, it stays; otherwise it gets a second chance
    with the fourth and the fifth. So a useless one costs at most two solves.

    Where a preconditioner has been better than a solve has to be, the next solve is one
    step with it, and :math:`A` is not applied at all: the outer iteration evaluates its
    residual anyway. If that has not fallen since, conjugate gradients follow, and the
    preconditioner is judged anew.

    :param torch.Tensor kept: the :class:`Kind` of each sample at first, ``(B,)``.
    :param torch.Tensor usable: samples for which the direct one is tried, ``(B,)``;
        ``None``: none.
    :param torch.Tensor again: samples that get the second chance, ``(B,)``; ``None``:
        all.
    """

    def __init__(
        self,
        kept: Tensor,
        usable: Tensor | None = None,
        again: Tensor | None = None,
    ):
        self.kept = kept
        nowhere = torch.zeros_like(kept, dtype=torch.bool)
        self.candidates = nowhere if usable is None else usable
        self.again = ~nowhere if again is None else again
        self.begun = False
        self.solves = torch.zeros_like(kept)
        self.rate = torch.zeros_like(kept, dtype=torch.float32)
        #: By how much an iteration reduced the residual when that was last seen, with
        #: which preconditioner, and the norm of the last right-hand side.
        self.reduction = torch.full_like(self.rate, torch.inf)
        self.proved = torch.zeros_like(kept)
        self.size = torch.zeros_like(self.rate)

    def solve(
        self,
        A: LinearMap,
        b: Tensor,
        rtol: Tensor,
        max_iter: int,
        preconditioner: Callable[[Tensor], tuple[LinearMap, InnerSolve | None]],
        active: Tensor | None = None,
        at_first: Callable[[], Tensor] | None = None,
    ) -> SolverResult:
        """
        Solves :math:`A x = b` for the next system of the sequence.

        :param Callable A: symmetric positive definite linear map on the whole batch.
        :param torch.Tensor b: right-hand side ``(B, ...)``.
        :param torch.Tensor rtol: relative tolerance, ``(B,)``.
        :param int max_iter: largest number of iterations.
        :param Callable preconditioner: makes the preconditioner for the kind that each
            sample uses, ``(B,)``, and returns the iteration in it, too; called where
            needed.
        :param torch.Tensor active: samples that take part in trials, ``(B,)``.
            ``None``: no trials.
        :param Callable at_first: tells the samples, ``(B,)``, whose first system with
            ``active`` is solved with the direct preconditioner if with none else.
        """
        plan = self._plan(norm(b), rtol, max_iter, active, at_first)
        used, trusted = plan.used, plan.trusted
        others = ~trusted if active is None else active & ~trusted
        # Asked together: every answer makes the host wait for the device.
        any_used, any_trusted, any_others = read_any([used > 0, trusted, others])
        M, inner_solve = None, None
        if any_used:
            P, inner_solve = preconditioner(used)

            def M(r: Tensor) -> Tensor:
                return select(used > Kind.NONE, P(r), r)

        nothing = torch.zeros_like(b)
        step = nothing
        if any_trusted:
            assert M is not None
            step = M(select(trusted, b, nothing))
            b = select(trusted, nothing, b)
        if any_others or not any_trusted:
            result = conjugate_gradient(
                A,
                b,
                rtol=rtol,
                max_iter=plan.limit,
                preconditioner=M,
                flexible=inner_solve is not None,
                verify=False,
            )
        else:
            solved = torch.full_like(used, Status.CONVERGED, dtype=torch.int8)
            none = torch.zeros_like(used)
            result = SolverResult(nothing, solved, none, torch.zeros_like(rtol))
        if active is not None:
            self._learn(result, plan, inner_solve, active)
        if any_trusted:
            left = self.reduction.to(result.residual)
            result.x = select(trusted, step, result.x)
            result.residual = left.where(trusted, result.residual)
        return result

    def _plan(
        self,
        size: Tensor,
        rtol: Tensor,
        max_iter: int,
        active: Tensor | None,
        at_first: Callable[[], Tensor] | None,
    ) -> _Plan:
        """Decides how a right-hand side of the given norm, ``(B,)``, is solved for."""
        used, limit = self.kept, torch.full_like(self.solves, max_iter)
        no = torch.zeros_like(used, dtype=torch.bool)
        if active is None:
            return _Plan(used, limit, no, no, no)
        if at_first is not None and not self.begun:
            used = torch.where(at_first(), used.clamp_min(Kind.DIRECT), used)
        self.begun = True
        trial = self.candidates & active & self._on_trial()
        trial = trial & (self.kept != Kind.DIRECT)
        used = used.masked_fill(trial, Kind.DIRECT)
        # As many iterations as the measured rate predicts for the same work.
        predicted = (-rtol.float().log() / self.rate).ceil().clamp(1, max_iter)
        limit = torch.where(trial, predicted.long(), limit)
        measured = active & self._on_trial(ahead=1)
        trusted = active & (used > Kind.NONE) & (used == self.proved)
        trusted = trusted & (size <= self.size)
        trusted = trusted & (TRUST * self.reduction <= rtol)
        trusted = trusted & ~trial & ~(measured & self.candidates)
        self.size = size
        return _Plan(used, limit, trial, measured, trusted)

    def _learn(
        self,
        result: SolverResult,
        plan: _Plan,
        inner_solve: InnerSolve | None,
        active: Tensor,
    ) -> None:
        """Judges preconditioners by what a solve has shown."""
        progress = -result.residual.float().clamp(1e-16, 1 - 1e-6).log()
        iterations = result.n_iter.clamp_min(1).float()
        seen = active & ~plan.trusted & (result.n_iter > 0)
        reduction = (-progress / iterations).exp()
        self.reduction = torch.where(seen, reduction, self.reduction)
        self.proved = torch.where(seen, plan.used, self.proved)
        failing = seen & (plan.used == Kind.INNER) & (reduction > FAILING)
        self.kept = self.kept.masked_fill(failing, Kind.NONE)
        work = iterations
        if inner_solve is not None:
            work = work + inner_solve.work.where(plan.used == Kind.INNER, 0)
        rate = progress / work
        pays = plan.trial & (rate > LEAST_GAIN * self.rate)
        self.kept = torch.where(pays, plan.used, self.kept)
        self.rate = torch.where(plan.measured, rate, self.rate)
        self.solves = self.solves + active

    def _on_trial(self, ahead: int = 0) -> Tensor:
        """Whether the solve ``ahead`` of the next one may be a trial, ``(B,)``."""
        number, (first, second) = self.solves + ahead, TRIALS
        return (number == first) | (number == second) & self.again
