r"""Learned dictionaries of patches as deepinv priors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from deepinv.optim.prior import Prior
from torch import Tensor, nn

from deepinv_deal._batch import as_batch, inner
from deepinv_deal.operators import PatchDictionary
from deepinv_deal.operators.patches import Boundary, SlicedPatchFrame
from deepinv_deal.priors.config import Configurable
from deepinv_deal.problems.bounds import Bounds
from deepinv_deal.problems.checks import check_floating, per_sample
from deepinv_deal.problems.data_term import DataTerm, operator_term
from deepinv_deal.problems.dictionary import DictionaryEquation, dictionary_method
from deepinv_deal.problems.options import SolverOptions
from deepinv_deal.problems.penalties import (
    GroupPenalty,
    L1Penalty,
    Penalty,
    SlicedPenalty,
    WeaklyConvexPenalty,
)
from deepinv_deal.problems.synthesis import SynthesisProblem, with_means
from deepinv_deal.problems.synthesis_solvers import sparse_coding
from deepinv_deal.solvers import SolverResult, full_precision

PenaltyName = Literal["group", "l1", "weakly_convex"]
PENALTIES: tuple[str, ...] = ("group", "l1", "weakly_convex")

#: What a denoiser takes the means of patches from: estimate or data.
Mean = Literal["free", "fixed"]

#: Steps of size 1 in the coefficients need a dictionary of norm below 1, as published.
GAIN = 0.99**0.5


class PatchPrior(Prior, Configurable):
    r"""
    What the two learned dictionaries share.

    The partially minimised prior of an image is

    .. math::
        g(x) = \min_a \; \sum_k \tfrac12 \|\sqrt{\beta}\, E_k x - \bar D a_k\|_2^2 +
        R(a), \qquad \|\bar D\|_2 \leq 1,

    where :math:`E_k` takes the patch at position k and removes what is free.
    :meth:`fn`, :meth:`grad` and :meth:`prox` make it a prior for deepinv's own
    algorithms. The gradient :math:`\sqrt{\beta} \sum_k E_k^{\top} (\sqrt{\beta} E_k x -
    \bar D a_k(x))` needs no derivative of the coefficients :math:`a(x)`.

    :param PatchDictionary dictionary: the atoms.
    :param float beta: initial coupling :math:`\beta > 0`.
    :param float lambda_reg: base of the thresholds.
    :param float sigma: noise level at which the thresholds apply, in [0, 1] units.
    :param float gain: norm of :math:`\bar D`.
    """

    def __init__(
        self,
        dictionary: PatchDictionary,
        beta: float,
        lambda_reg: float,
        sigma: float,
        gain: float,
    ):
        super().__init__()
        for name, value in (
            ("beta", beta),
            ("lambda_reg", lambda_reg),
            ("sigma", sigma),
        ):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        self.explicit_prior = True
        self.in_channels = 1
        self.dictionary = dictionary
        self.log_beta = nn.Parameter(torch.tensor(float(beta)).log())
        self.register_buffer("lambda_reg", torch.tensor(float(lambda_reg)))
        self.register_buffer("sigma", torch.tensor(float(sigma)))
        self.gain = gain

    def config(self, **known: Any) -> dict[str, Any]:
        """
        Returns the keyword arguments that build a prior of the same sizes.

        :param Any known: values of arguments that are no attributes of the same name.
        """
        sizes = {
            "num_atoms": len(self.dictionary.atoms),
            "num_free_atoms": len(self.dictionary.free_atoms),
            "patch_size": self.dictionary.patch_size,
            "boundary": self.dictionary.boundary,
        }
        return super().config(**{**sizes, **known})

    @property
    def beta(self) -> Tensor:
        r"""The learned coupling :math:`\beta`."""
        return self.log_beta.exp()

    def penalty(self, beta: Tensor, lambda_reg: Tensor, channels: int) -> Penalty:
        """
        Returns the penalty of the coefficients.

        :param torch.Tensor beta: coupling per sample, ``(B,)``.
        :param torch.Tensor lambda_reg: base of the thresholds per sample, ``(B,)``.
        :param int channels: image channels.
        """
        raise NotImplementedError

    def problem(
        self,
        data: DataTerm,
        *,
        beta: Tensor | None = None,
        lambda_reg: Tensor | None = None,
    ) -> SynthesisProblem:
        """
        Returns the joint problem of image and coefficients.

        :param DataTerm data: the data term.
        :param torch.Tensor beta: coupling per sample ``(B,)``; the learned one if
            ``None``.
        :param torch.Tensor lambda_reg: base of the thresholds per sample ``(B,)``; the
            prior's own if ``None``.
        :raises ValueError: if the image is smaller than a patch.
        """
        batch, channels, height, width = data.b.shape
        n, slices = self.dictionary.patch_size, data.mean_slices
        volume = None if slices is None else (slices.depth, height, width)
        size = volume or (height, width)
        if min(size) < n:
            raise ValueError(
                f"{'Volumes' if volume else 'Images'} must be at least as large as a "
                f"patch, {n} x {n}, got {' x '.join(map(str, size))}."
            )
        if beta is None:
            beta = self.beta.expand(batch)
        if lambda_reg is None:
            lambda_reg = self.lambda_reg.expand(batch)
        frame = self.dictionary.frame()
        frame = replace(frame, C=self.gain * frame.C)
        penalty: Penalty
        if slices is None or volume is None:
            penalty = self.penalty(beta, lambda_reg, channels)
        else:
            frame = SlicedPatchFrame.of(frame, slices, volume)
            parts = channels // slices.depth  # real and imaginary part
            penalties = tuple(
                self.penalty(
                    beta.repeat_interleave(parts * number),
                    lambda_reg.repeat_interleave(parts * number),
                    channels=1,
                )
                for number in volume
            )
            penalty = SlicedPenalty(penalties, frame)
        return SynthesisProblem(
            data,
            frame,
            penalty,
            beta,
            cg_rtol=1e-6 if data.b.dtype == torch.float32 else 1e-12,
        )

    #: Settings of the solver that exist for it, see :class:`SolverOptions`.
    solver_settings: tuple[str, ...] = ()

    #: Whether the regularizer depends on a noise level.
    needs_sigma = False

    @staticmethod
    def methods(bounds: Bounds | None) -> tuple[str, ...]:  # noqa: ARG004
        """Returns the names of the methods that minimise, some without bounds."""
        return ("admm", "fista", "ipalm")

    def equation(
        self,
        data: DataTerm,
        *,
        sigma: float | Tensor | None = None,
        lambda_reg: float | Tensor | None = None,
        beta: float | Tensor | None = None,
        bounds: Bounds | None = None,
        options: SolverOptions = SolverOptions(),  # noqa: B008 - immutable
    ) -> DictionaryEquation:
        """
        Returns the equation of a reconstruction with this prior.

        :param DataTerm data: the data term.
        :param float, torch.Tensor sigma: noise level in [0, 1] units, one or ``(B,)``;
            ``None``: that of the training.
        :param float, torch.Tensor lambda_reg: base of the thresholds, one or ``(B,)``;
            ``None``: the learned one times ``sigma`` over that of the training.
        :param float, torch.Tensor beta: coupling, one or ``(B,)``; ``None``: the
            learned one.
        :param tuple bounds: smallest and largest value of the image, or ``None``.
        :param SolverOptions options: the method.
        :raises ValueError: if the image is smaller than a patch, or a setting does not
            exist.
        """
        name, methods = type(self).__name__, self.methods(bounds)
        options.check(name, methods, self.solver_settings)
        if lambda_reg is None:
            level = self.sigma if sigma is None else as_batch(sigma, data.b)
            lambda_reg = level / self.sigma * self.lambda_reg
        weight = as_batch(lambda_reg, data.b)
        coupling = as_batch(self.beta if beta is None else beta, data.b)
        problem = self.problem(data, beta=coupling, lambda_reg=weight)
        method = dictionary_method(problem, options, bounds)
        return DictionaryEquation(problem, weight, method, bounds)

    # -- deepinv's interface -----------------------------------------------------

    def _at(self, x: Tensor, sigma: Any) -> SynthesisProblem:
        check_floating("x", x)
        scale = 1.0 if sigma is None else per_sample("sigma", sigma, x) / self.sigma
        return self.problem(
            operator_term(x),
            lambda_reg=as_batch(scale * self.lambda_reg, x),
        )

    @full_precision
    def code(
        self, x: Tensor, sigma: Any = None, *, rtol: float = 1e-5, max_iter: int = 10000
    ) -> SolverResult:
        r"""
        Returns the coefficients :math:`a(x)` of an image and how they were found.

        :param torch.Tensor x: images, shape ``(B, C, H, W)``.
        :param float, torch.Tensor sigma: noise level in [0, 1] units; the training's if
            ``None``.
        :param float rtol: tolerance.
        :param int max_iter: largest number of iterations.
        """
        problem = self._at(x, sigma)
        with torch.no_grad():
            f = problem.features(x)
            zero = problem.zero_coefficients()
        result = sparse_coding(problem, f, zero, rtol=rtol, max_iter=max_iter)
        advice = "Raise max_iter or relax rtol."
        result.report(type(self).__name__, rtol, advice)
        return result

    @full_precision
    def fn(self, x: Tensor, sigma: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        r"""Returns :math:`g(x)` of every sample, ``(B,)``."""
        problem = self._at(x, sigma)
        a = self.code(x, sigma).x
        r = problem.features(x) - problem.synthesis(a)
        return 0.5 * inner(r, r) + problem.penalty.value(a)

    @full_precision
    def grad(self, x: Tensor, sigma: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        r"""
        Returns :math:`\nabla g(x)`, shape of ``x``.

        Not differentiable a second time.
        """
        with torch.no_grad():
            problem = self._at(x, sigma)
            a = self.code(x, sigma).x
            return problem.features_adjoint(problem.features(x) - problem.synthesis(a))

    @full_precision
    def prox(
        self,
        x: Tensor,
        sigma: Any = None,
        *args: Any,
        gamma: float | Tensor = 1.0,
        rtol: float = 1e-5,
        max_iter: int = 10000,
        **kwargs: Any,
    ) -> Tensor:
        r"""
        Returns :math:`\arg\min_z \tfrac{1}{2 \gamma} \|z - x\|^2 + g(z)`.

        Differentiable by implicit differentiation. A :class:`ConvergenceWarning` tells
        if it did not converge.

        :param torch.Tensor x: images, shape ``(B, C, H, W)``.
        :param float, torch.Tensor sigma: noise level in [0, 1] units; the training's if
            ``None``.
        :param float, torch.Tensor gamma: weight, one or ``(B,)``.
        :param float rtol: tolerance of the joint solver.
        :param int max_iter: its largest number of iterations.
        """
        weight = 1 / per_sample("gamma", gamma, x, positive=True)[:, None, None, None]
        data = operator_term(weight * x, lambda v: weight * v)
        problem = replace(self._at(x, sigma), data=data)
        method = dictionary_method(problem, SolverOptions(), None)
        equation = DictionaryEquation(problem, as_batch(self.lambda_reg, x), method)
        z, result = equation.solve(x, rtol=rtol, max_iter=max_iter)
        what, advice = f"{type(self).__name__}.prox", "Raise max_iter or relax rtol."
        result.report(what, rtol, advice)
        return z


def check_mean(mean: str, boundary: str) -> None:
    """Raises a ``ValueError`` for a handling of patch means that does not exist."""
    if mean not in get_args(Mean):
        raise ValueError(f"mean must be 'free' or 'fixed', got {mean!r}.")
    if mean == "fixed" and boundary != "valid":
        raise ValueError(
            "mean='fixed' needs patches inside the image: boundary='valid', got "
            f"{boundary!r}."
        )


class PatchSynthesisPrior(PatchPrior):
    r"""
    The convex patch-based synthesis prior.

    .. math::
        g(x) = \min_a \; \beta \sum_k \tfrac12 \|\tilde P_k x - D a_k\|_2^2
        + \lambda \|a_k\|_1

    (:footcite:t:`ducotterd2024convex`, Eq. (2), in the scaling of the authors' code:
    :math:`\lambda` is the threshold of the coefficients, the paper's divided by
    :math:`\beta`). :math:`\tilde P_k` takes a patch and removes its mean; D has
    zero-mean atoms of equal norm and :math:`\|D\|_2 = 1`. Convex.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.priors import PatchSynthesisPrior
    >>> prior = PatchSynthesisPrior(num_atoms=20, patch_size=4)
    >>> x = torch.rand(2, 1, 12, 13)
    >>> prior.fn(x).shape, prior.grad(x).shape
    (torch.Size([2]), torch.Size([2, 1, 12, 13]))

    :param int num_atoms: number of atoms.
    :param int patch_size: rows (and columns) of a patch.
    :param float beta: coupling :math:`\beta`.
    :param float lambda_reg: threshold :math:`\lambda`.
    :param float sigma: noise level at which :math:`\lambda` applies, in [0, 1] units.
    :param str boundary: ``"valid"`` (patches inside the image, as published) or
        ``"circular"``.
    :param str mean: how the weights were trained to denoise, see
        :class:`deepinv_deal.PatchSynthesis`; no matter for the prior itself.
    :raises ValueError: for an unknown ``mean``, or ``"fixed"`` with a circular
        boundary.
    """

    def __init__(
        self,
        num_atoms: int = 128,
        patch_size: int = 10,
        *,
        beta: float = 2.0,
        lambda_reg: float = 0.0075,
        sigma: float = 25 / 255,
        boundary: Boundary = "valid",
        mean: Mean = "free",
    ):
        check_mean(mean, boundary)
        dictionary = PatchDictionary(num_atoms, patch_size, 0, boundary)
        super().__init__(dictionary, beta, lambda_reg, sigma, gain=1.0)
        self.mean: Mean = mean

    @staticmethod
    def methods(bounds: Bounds | None) -> tuple[str, ...]:
        """Returns the names of the methods that minimise, or stop early."""
        return (*PatchPrior.methods(bounds), "two-step", "coordinate-descent")

    def equation(
        self,
        data: DataTerm,
        *,
        mean: Mean | None = None,
        options: SolverOptions = SolverOptions(),  # noqa: B008 - immutable
        **settings: Any,
    ) -> DictionaryEquation:
        """
        Returns the equation of a reconstruction with this prior.

        :param DataTerm data: the data term.
        :param str mean: ``"free"`` or ``"fixed"``; ``None``: as the weights were
            trained for denoising, and free otherwise.
        :param SolverOptions options: the method; ``"auto"`` is ``"two-step"`` for
            denoising.
        :param object settings: see
            :meth:`deepinv_deal.priors.PatchPrior.equation`.
        """
        if data.identity and options.method == "auto":
            options = replace(options, method="two-step")
        if (mean or (self.mean if data.identity else "free")) == "fixed":
            beta = settings.get("beta")
            coupling = as_batch(self.beta if beta is None else beta, data.b)
            data = with_means(data, data.b, self.dictionary.patch_size, coupling)
        return super().equation(data, options=options, **settings)

    def penalty(self, beta: Tensor, lambda_reg: Tensor, channels: int) -> L1Penalty:
        """Returns the l1 norm of the coefficients times the root of beta."""
        del channels  # one threshold for all
        return L1Penalty((beta.sqrt() * lambda_reg).view(-1, 1, 1, 1))


class SmoothPlusSparsePrior(PatchPrior):
    r"""
    The smooth-plus-sparse prior, convex (CPR) or weakly convex (NCPR).

    .. math::
        g(x) = \min_a \; \sum_k \tfrac{\beta}{2} \|(I - Q Q^{\top} - \tfrac1d \mathbf{1}
        \mathbf{1}^{\top}) P_k x - D a_k\|_2^2 + R(a)

    (:footcite:t:`ducotterd2024smooth`). Constants and the span of the learned
    orthonormal free atoms Q are not penalised: they represent the smooth part of a
    patch, the sparse combination of atoms D the rest. :math:`\beta \|D\|_2^2 = 0.99`,
    so a change of :math:`\beta` also changes the effective weight of R, as published.
    The penalty has one learned threshold per atom,
    :math:`t_j = \lambda e^{s_j}`, and is

    * ``"group"``: norms of blocks of 2 x 2 positions, as trained for CPR;
    * ``"l1"``: the l1 norm;
    * ``"weakly_convex"``: :class:`~deepinv_deal.problems.WeaklyConvexPenalty`, as
      trained for NCPR.

    Patches continue circularly. With odd numbers of rows or columns, the last blocks
    of ``"group"`` are smaller.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.priors import SmoothPlusSparsePrior
    >>> prior = SmoothPlusSparsePrior("group", 20, 5, num_free_atoms=10)
    >>> x = torch.rand(2, 1, 12, 13)
    >>> prior.fn(x).shape, prior.grad(x).shape
    (torch.Size([2]), torch.Size([2, 1, 12, 13]))

    :param str penalty: ``"group"``, ``"l1"`` or ``"weakly_convex"``.
    :param int num_atoms: number of atoms.
    :param int patch_size: rows (and columns) of a patch.
    :param int num_free_atoms: number of free atoms, constants not counted.
    :param float order: exponent of the weakly convex penalty.
    :param float beta: initial coupling :math:`\beta`.
    :param float lambda_reg: base :math:`\lambda` of the thresholds; ``None``: as
        published, 0.002 or, weakly convex, 0.0125.
    :param float sigma: noise level at which the thresholds apply, in [0, 1] units.
    :param str boundary: ``"circular"`` (as published) or ``"valid"``.
    """

    def __init__(
        self,
        penalty: PenaltyName = "group",
        num_atoms: int = 200,
        patch_size: int = 13,
        num_free_atoms: int = 120,
        *,
        order: float = 1.8,
        beta: float = 2.0,
        lambda_reg: float | None = None,
        sigma: float = 25 / 255,
        boundary: Boundary = "circular",
    ):
        if penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {PENALTIES}, got {penalty!r}.")
        if not 1 < order <= 2:
            raise ValueError(f"order must lie in (1, 2], got {order}.")
        if lambda_reg is None:
            lambda_reg = 0.0125 if penalty == "weakly_convex" else 0.002
        dictionary = PatchDictionary(num_atoms, patch_size, num_free_atoms, boundary)
        super().__init__(dictionary, beta, lambda_reg, sigma, gain=GAIN)
        self.penalty_name: PenaltyName = penalty
        self.order = order
        self.log_scale = nn.Parameter(torch.zeros(num_atoms))

    def config(self, **known: Any) -> dict[str, Any]:
        """
        Returns the keyword arguments that build a prior of the same sizes.

        :param Any known: values of arguments that are no attributes of the same name.
        """
        return super().config(penalty=self.penalty_name, **known)

    def penalty(self, beta: Tensor, lambda_reg: Tensor, channels: int) -> Penalty:
        """Returns the penalty with the learned thresholds."""
        del beta  # the dictionary is scaled instead
        thresholds = lambda_reg[:, None] * self.log_scale.exp().repeat(channels)
        thresholds = thresholds[..., None, None]
        if self.penalty_name == "group":
            return GroupPenalty(thresholds)
        if self.penalty_name == "l1":
            return L1Penalty(thresholds)
        return WeaklyConvexPenalty(thresholds, self.order)
