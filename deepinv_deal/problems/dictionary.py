r"""The equation of a reconstruction with a learned dictionary, and who solves it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepinv_deal.problems.bounds import Bounds, clamp
from deepinv_deal.problems.data_term import DataTerm
from deepinv_deal.problems.options import SolverOptions
from deepinv_deal.problems.synthesis import SynthesisProblem, TiedMeans
from deepinv_deal.problems.synthesis_solvers import (
    Observer,
    coordinate_descent,
    eliminated_fista,
    ipalm,
    joint_admm,
    reweighted,
)
from deepinv_deal.solvers import AdjointOptions, SolverResult

#: Penalty parameters of ADMM. For convex penalties the one that reaches a relative
#: error of 1e-3 first (benchmarks/dictionaries.py); for others it has to exceed their
#: weak convexity.
ADMM_CONVEX, ADMM_WEAKLY_CONVEX = 0.015, 0.2

#: Tolerances if none is given, by method: their stopping rules differ. With these the
#: PSNR of denoising is within a few thousandths of a decibel of its limit for ADMM.
DEFAULT_RTOLS = {"admm": 3e-3}
DEFAULT_OTHER_RTOL = 1e-4

#: Passes of the method that is named after them.
TWO_STEPS = 2

#: Their systems are solved exactly without Jacobian-vector products.
DICTIONARY_ADJOINT = AdjointOptions(jacobian_free=True)


@dataclass(frozen=True)
class DictionaryEquation:
    r"""
    A reconstruction with a dictionary: the joint problem of image and coefficients.

    Its unknown is the image. Nothing is frozen: one convex (or weakly convex) problem
    is minimised, by the method that suits it:

    * ``"admm"``: joint quadratic solve for image and coefficients;
    * ``"fista"``: image eliminated; not with bounds;
    * ``"ipalm"``: the published method of the smooth-plus-sparse models;
    * ``"two-step"``: two passes over coefficients and image, as the synthesis model was
      trained. Their number is fixed: ``rtol`` and ``max_iter`` must not be given, and
      the status is :attr:`deepinv_deal.solvers.Status.FINISHED`, not convergence;
    * ``"coordinate-descent"``: such passes until ``rtol`` is met.

    :param SynthesisProblem problem: the problem.
    :param torch.Tensor lambda_reg: base of the thresholds, ``(B,)``.
    :param str method: the method.
    :param tuple bounds: smallest and largest value of the image, or ``None``.
    :param torch.Tensor start_coefficients: first coefficients; zero if ``None``.
    :param float inner_rtol: tolerance of the coefficient problems in every pass of
        coordinate descent.
    :raises ValueError: if the method cannot impose bounds.
    """

    problem: SynthesisProblem
    lambda_reg: Tensor
    method: str
    bounds: Bounds | None = None
    start_coefficients: Tensor | None = None
    inner_rtol: float = 1e-4

    def __post_init__(self) -> None:
        if self.bounds is not None and self.method == "fista":
            raise ValueError(
                "solver='fista' eliminates the image, which bounds prevent. Use "
                "'admm' or 'ipalm', or leave bounds out."
            )

    @property
    def data(self) -> DataTerm:
        """The data term."""
        return self.problem.data

    @property
    def beta(self) -> Tensor:
        """Coupling of image and coefficients, ``(B,)``."""
        return self.problem.beta

    @property
    def default_rtol(self) -> float:
        """Tolerance that suits the method; 0: it has no rule to stop by."""
        if self.method == "two-step":
            return 0.0
        return DEFAULT_RTOLS.get(self.method, DEFAULT_OTHER_RTOL)

    def start(self, x: Tensor | None) -> Tensor:
        r"""
        Returns the first image: the given one; :math:`A^{\top} y`, or with a physics
        the constant that suits a likelihood, if ``None``.
        """
        if x is None and not (self.data.quadratic or self.data.identity):
            x = self.data.start()
        elif x is None:
            # With tied means, b holds these as well, many times the image.
            H = self.data.H
            x = H.data.b if isinstance(H, TiedMeans) else self.data.b
        return clamp(x, self.bounds)

    def image(self, x: Tensor) -> Tensor:
        """Returns the image of an unknown: itself."""
        return x

    def solve(
        self,
        start: Tensor,
        *,
        rtol: float | None = None,
        max_iter: int,
        adjoint: AdjointOptions | None = None,
        callback: Observer | None = None,
    ) -> tuple[Tensor, SolverResult]:
        """
        Minimises over image and coefficients, with implicit gradients.

        :param torch.Tensor start: first image.
        :param float rtol: tolerance of the method; ``None``: what suits it.
        :param int max_iter: largest number of iterations.
        :param AdjointOptions adjoint: settings of the backward pass; of two-step and
            coordinate descent only ``strict``, since their systems are solved exactly.
        :param Callable callback: called as ``callback(k, before, after)`` with the
            images before and after every iteration.
        :return: the image, and how it was found, with the coefficients in ``state[0]``.
        """
        options = adjoint or DICTIONARY_ADJOINT
        p, bounds = replace(self.problem, strict=options.strict), self.bounds
        a = self.start_coefficients
        a = p.zero_coefficients() if a is None else a
        limits: dict[str, Any] = {
            "rtol": self.default_rtol if rtol is None else rtol,
            "max_iter": max_iter,
            "callback": callback,
        }
        if self.method in ("two-step", "coordinate-descent"):
            if self.method == "two-step":
                limits |= {"rtol": 0.0, "max_iter": TWO_STEPS}
            limits["inner_rtol"] = self.inner_rtol
            result = coordinate_descent(p, start, a, bounds=bounds, **limits)
            x, coefficients = result.x, result.state[0].detach()
            return x, replace(result, x=x.detach(), state=(coefficients,))
        start = start.detach()
        if p.data.quadratic:
            result = self._minimise(p, start, a, **limits)
        else:
            result = reweighted(
                p,
                lambda p, x, a, rtol: self._minimise(
                    p, x, a, rtol=rtol, max_iter=max_iter
                ),
                start,
                a,
                rtol=limits["rtol"],
                callback=callback,
            )
        image, _ = self._held(result, options.strict).differentiable(
            result.x, result.state[0], options
        )
        return image, result

    def _minimise(
        self, p: SynthesisProblem, x: Tensor, a: Tensor, **limits: Any
    ) -> SolverResult:
        """Minimises a problem with a least-squares term by the method."""
        if self.method == "fista":
            return eliminated_fista(p, x, a, **limits)
        if self.method == "ipalm":
            return ipalm(p, x, a, bounds=self.bounds, **limits)
        r = ADMM_WEAKLY_CONVEX if p.penalty.weak_convexity else ADMM_CONVEX
        return joint_admm(p, x, a, r=r, bounds=self.bounds, **limits)

    def _held(self, result: SolverResult, strict: bool) -> SynthesisProblem:
        """Returns the problem with the pixels that have met a bound held there."""
        p = replace(self.problem, strict=strict)
        if self.bounds is None or not torch.is_grad_enabled():
            return p
        x = result.x
        with torch.no_grad():
            descent = p.data.force(x) - p.features_adjoint(
                p.features(x) - p.synthesis(result.state[0])
            )
            # A pixel is held where the descent would carry it over its bound.
            t = 1 / (p.data.norm_bound + p.beta * p.aggregation_norm)
            moved = x + t.view(-1, 1, 1, 1) * descent
            held = moved != clamp(moved, self.bounds)
            # A solution of finite accuracy may lie near a bound instead of on it.
            at_bound = clamp(moved, self.bounds)
            return replace(p, pinned=at_bound.where(held, torch.nan))


def dictionary_method(
    problem: SynthesisProblem, options: SolverOptions, bounds: Bounds | None
) -> str:
    """
    Returns the method of the options, or for ``"auto"`` the one that minimises fastest.

    :param SynthesisProblem problem: the problem.
    :param SolverOptions options: the options.
    :param tuple bounds: bounds of the image.
    """
    if options.method != "auto":
        return options.method
    if problem.suits_admm:
        return "admm"
    return "fista" if bounds is None else "ipalm"
