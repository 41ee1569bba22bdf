r"""Learned synthesis dictionaries: reconstruction models and denoisers in one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from deepinv.models import Denoiser, Reconstructor
from torch import Tensor

from deepinv_deal.models.image_operator import (
    ComplexMode,
    ImageOperator,
    check_complex_mode,
    check_init,
    check_measurements,
    doubt_noise_level,
    is_noise_level,
    per_sample,
)
from deepinv_deal.models.info import ReconstructionInfo
from deepinv_deal.operators.patches import Boundary
from deepinv_deal.priors import PatchSynthesisPrior, SmoothPlusSparsePrior
from deepinv_deal.priors.patches import (
    ADMM_CONVEX,
    ADMM_WEAKLY_CONVEX,
    Mean,
    PatchPrior,
    PenaltyName,
    check_mean,
)
from deepinv_deal.priors.synthesis import ImageSystem, SynthesisProblem
from deepinv_deal.priors.synthesis_solvers import (
    coordinate_descent,
    eliminated_fista,
    ipalm,
    joint_admm,
)
from deepinv_deal.solvers import AdjointOptions, SolverResult, full_precision
from deepinv_deal.solvers.preconditioner import transfer_function
from deepinv_deal.weights.patches import load_patch_prior

Solver = Literal["admm", "fista", "ipalm", "two-step", "coordinate-descent"]
SOLVERS: tuple[str, ...] = ("admm", "fista", "ipalm", "two-step", "coordinate-descent")

#: Tolerances if none is given, by solver: their stopping rules differ. With these the
#: PSNR of denoising is within a few thousandths of a decibel of its limit for ADMM.
DEFAULT_RTOL = {"admm": 3e-3}
DEFAULT_OTHER_RTOL = 1e-4

#: The systems of the backward pass are solved exactly without Jacobian-vector products.
DEFAULT_ADJOINT = AdjointOptions(jacobian_free=True)

#: Power iterations estimate the norm of the physics from below: the factor on it.
NORM_MARGIN = 1.05


@dataclass(kw_only=True)
class SynthesisInfo(ReconstructionInfo):
    r"""
    How a reconstruction with a dictionary went, one entry per sample.

    As :class:`ReconstructionInfo`; ``imbalance`` is what the solver compared with
    ``rtol``, ``inner_iter`` counts the steps of sparse coding of ``"two-step"`` and is
    zero for other solvers. Beyond:

    :param torch.Tensor beta: coupling of image and coefficients, ``(B,)``.
    :param str solver: the solver that ran.
    :param torch.Tensor coefficients: the coefficients :math:`a` at the solution,
        ``(B, C p, H', W')``, in the scaling of
        :class:`~deepinv_deal.priors.SmoothPlusSparsePrior`: :math:`\sqrt{\beta}` times
        those of :class:`~deepinv_deal.priors.PatchSynthesisPrior`.
    :param torch.Tensor objective: value of the energy, data term up to
        :math:`\tfrac12 \|y\|^2`, ``(B,)``.
    """

    beta: Tensor
    solver: str
    coefficients: Tensor = field(repr=False)
    objective: Tensor


class SynthesisModel(Reconstructor, Denoiser):
    """
    What the two dictionary models share.

    :param PatchPrior prior: the learned prior.
    :param str solver: default solver, see :class:`SmoothPlusSparse`.
    :param float, torch.Tensor beta: default coupling.
    :param float, torch.Tensor lambda_reg: default base of the thresholds.
    :param float sigma: default noise level of denoising, in units of the image.
    :param tuple bounds: smallest and largest value of the image.
    :param float rtol: tolerance of the solver; ``None``: ``3e-3`` for ``"admm"``, else
        ``1e-4``, as published.
    :param int max_iter: its largest number of iterations.
    :param str complex_mode: ``"real_imag"`` or ``"real"``.
    :param AdjointOptions adjoint: settings of the backward pass.
    :param bool warn: issue a :class:`deepinv_deal.ConvergenceWarning` if a sample does
        not converge.
    :param bool strict: raise a :class:`deepinv_deal.ConvergenceError` instead, also in
        the backward pass.
    :param str, torch.device device: where the model lives; ``None``: where the prior
        is, which for loaded weights is the CPU.
    """

    def __init__(
        self,
        prior: PatchPrior,
        *,
        solver: str | None,
        beta: float | Tensor | None,
        lambda_reg: float | Tensor | None,
        sigma: float | None,
        bounds: tuple[float, float] | None,
        rtol: float | None,
        max_iter: int,
        complex_mode: ComplexMode,
        adjoint: AdjointOptions,
        warn: bool,
        strict: bool,
        device: str | torch.device | None,
    ):
        super().__init__()
        if solver is not None and solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}.")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(
                f"bounds must be (smallest, largest) with smallest < largest, got "
                f"{bounds}."
            )
        if bounds is not None and solver == "fista":
            raise ValueError(
                "solver='fista' eliminates the image, which bounds prevent. Use "
                "'admm' or 'ipalm', or leave bounds out."
            )
        if (rtol is not None and not rtol >= 0) or max_iter < 1:
            raise ValueError(
                "rtol must not be negative and max_iter must be positive, got "
                f"{rtol} and {max_iter}."
            )
        check_complex_mode(complex_mode)
        self.prior = prior
        self.solver, self.bounds = solver, bounds
        self.beta, self.lambda_reg, self.sigma = beta, lambda_reg, sigma
        self.rtol, self.max_iter = rtol, max_iter
        self.complex_mode, self.warn, self.strict = complex_mode, warn, strict
        self.adjoint = replace(adjoint, strict=strict or adjoint.strict)
        if device is not None:
            self.to(device)
        self.eval()

    @full_precision
    def forward(
        self,
        y: Tensor,
        physics: Any = None,
        sigma: float | Tensor | None = None,
        *,
        beta: float | Tensor | None = None,
        lambda_reg: float | Tensor | None = None,
        init: Tensor | None = None,
        solver: str | None = None,
        return_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        r"""
        Reconstructs or denoises.

        :param torch.Tensor y: measurements; for denoising the images ``(B, C, H, W)``.
        :param deepinv.physics.LinearPhysics physics: forward operator; ``None`` to
            denoise. A number or tensor here is taken for ``sigma``, as deepinv's
            denoisers are called.
        :param float, torch.Tensor sigma: noise level in units of the image, one or one
            per sample; scales the thresholds relative to the level of the training.
        :param float, torch.Tensor beta: coupling, one or one per sample.
        :param float, torch.Tensor lambda_reg: base of the thresholds, one or one per
            sample, taken as it is: no noise level scales it.
        :param torch.Tensor init: first image, shape ``(B, C, H, W)``; :math:`A^{\top}
            y` if ``None``.
        :param str solver: solver instead of the constructor's.
        :param bool return_info: also return a :class:`SynthesisInfo`.
        :return: the image ``(B, C, H, W)``, followed by the info where asked for.
        :raises TypeError: if ``y`` is no real floating tensor or ``physics`` not
            linear.
        :raises ValueError: for wrong shapes, channels or signs, images smaller than a
            patch, an empty batch, NaN or infinity.
        """
        if kwargs:
            raise TypeError(f"Unknown arguments: {', '.join(sorted(kwargs))}.")
        if solver is not None and solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}.")
        if sigma is None and is_noise_level(physics):
            physics, sigma = None, physics
        check_measurements(y, self.prior.log_beta)
        operator = ImageOperator(physics, y, self.prior.in_channels, self.complex_mode)
        notes = operator.notes
        level, weight = self._threshold_base(sigma, lambda_reg, physics, operator)
        coupling = self.default_beta if beta is None else beta
        coupling = _positive("beta", coupling, operator.b)
        data = self._data(operator, coupling, notes)
        problem = self.prior.problem(data, beta=coupling, lambda_reg=weight)
        x0 = operator.b
        if init is not None:
            x0 = check_init(init, operator)
        name = solver or self.solver or self._default_solver(problem, operator)
        rtol = self.rtol
        if rtol is None:
            rtol = DEFAULT_RTOL.get(name, DEFAULT_OTHER_RTOL)
        x, result = self._solve(name, problem, x0.detach(), rtol)
        if self.warn or self.strict:
            result.report(
                type(self).__name__,
                rtol,
                "The image is the last iterate. Raise max_iter, or relax rtol.",
                strict=self.strict,
                stacklevel=6,  # the caller of the module
            )
        image = operator.embed(x)
        if not return_info:
            return image
        with torch.no_grad():
            objective = problem.objective(result.x, result.state[0])
        return image, SynthesisInfo.of(
            result,
            sigma=level.detach(),
            lambda_reg=weight.detach(),
            rtol=rtol,
            scale=torch.ones_like(level),
            notes=notes,
            beta=coupling.detach(),
            solver=name,
            coefficients=result.state[0].detach(),
            objective=objective,
        )

    def default_lambda(self, sigma: Any = None) -> Any:
        """
        Returns the base of the thresholds that is taken if none is given in a call.

        :param float, torch.Tensor sigma: noise level in units of the image; the
            constructor's or, if it has none, that of the training if ``None``.
        :return: the constructor's ``lambda_reg`` or, if it has none, the learned one
            times ``sigma`` over the noise level of the training.
        """
        if self.lambda_reg is not None:
            return self.lambda_reg
        level = self.default_sigma if sigma is None else sigma
        return level / self.prior.sigma * self.prior.lambda_reg

    @property
    def default_sigma(self) -> float | Tensor:
        """The constructor's noise level or, if it has none, that of the training."""
        return self.prior.sigma if self.sigma is None else self.sigma

    @property
    def default_beta(self) -> float | Tensor:
        """The constructor's coupling or, if it has none, the learned one."""
        return self.prior.beta if self.beta is None else self.beta

    def _default_solver(
        self,
        problem: SynthesisProblem,
        operator: ImageOperator,  # noqa: ARG002 - for models that tell tasks apart
    ) -> str:
        """Returns the solver that is fastest for the problem."""
        if problem.suits_admm:
            return "admm"
        return "fista" if self.bounds is None else "ipalm"

    def _data(
        self, operator: ImageOperator, beta: Tensor, notes: list[str]
    ) -> ImageSystem:
        """Returns the data term."""
        del beta  # for models that tie patch means
        if operator.denoising:
            return ImageSystem.identity(operator.b)
        H, b = operator.A_adjoint_A, operator.b
        with torch.no_grad():
            complex_pair = operator.is_complex and not operator.real
            found, misfit = transfer_function(H, b, complex_pair=complex_pair)
            circular = bool((misfit <= 1e3 * torch.finfo(b.dtype).eps).all())
            spectrum = found if circular else None
            if spectrum is None:
                sqnorm = NORM_MARGIN * operator.sqnorm()
                notes.append(
                    "The physics is no circular convolution: images are found by "
                    "conjugate gradients."
                )
            else:
                sqnorm = spectrum.amax((1, 2, 3))
        return ImageSystem(H, b, spectrum, sqnorm)

    def _threshold_base(
        self,
        sigma: Any,
        lambda_reg: Any,
        physics: Any,
        operator: ImageOperator,
    ) -> tuple[Tensor, Tensor]:
        """Returns the noise level and the base of the thresholds, ``(B,)`` each."""
        if sigma is None and operator.denoising:
            # ZeroNoise, PoissonNoise, ... have no sigma.
            sigma = getattr(getattr(physics, "noise_model", None), "sigma", None)
        if sigma is None:
            sigma = self.default_sigma
        level = _positive("sigma", sigma, operator.b)
        if operator.denoising:
            doubt_noise_level(level, operator.b, stacklevel=6)
        base = self.default_lambda(level) if lambda_reg is None else lambda_reg
        return level, _positive("lambda_reg", base, operator.b)

    def _solve(
        self, name: str, problem: SynthesisProblem, x: Tensor, rtol: float
    ) -> tuple[Tensor, SolverResult]:
        a = problem.zero_coefficients()
        limits = {"rtol": rtol, "max_iter": self.max_iter}
        if name in ("two-step", "coordinate-descent"):
            if name == "two-step":
                limits = {"rtol": 0.0, "max_iter": 2}
            result = coordinate_descent(problem, x, a, bounds=self.bounds, **limits)  # type: ignore[arg-type]
            return result.x, replace(
                result, x=result.x.detach(), state=(result.state[0].detach(),)
            )
        if name == "fista" and self.bounds is None:
            result = eliminated_fista(problem, x, a, **limits)  # type: ignore[arg-type]
        elif name == "ipalm":
            result = ipalm(problem, x, a, bounds=self.bounds, **limits)  # type: ignore[arg-type]
        elif name == "admm":
            convex = problem.penalty.weak_convexity == 0
            r = ADMM_CONVEX if convex else ADMM_WEAKLY_CONVEX
            result = joint_admm(problem, x, a, r=r, bounds=self.bounds, **limits)  # type: ignore[arg-type]
        else:
            raise ValueError(f"solver={name!r} cannot impose bounds; use 'admm'.")
        if self.bounds is not None:
            return result.x, result  # implicit gradients are those of free images
        image, _ = problem.differentiable(result.x, result.state[0], self.adjoint)
        return image, result


class SmoothPlusSparse(SynthesisModel):
    r"""
    Smooth-plus-sparse patch models: CPR (convex) and NCPR (weakly convex).

    .. math::
        \hat x = \underset{x}{\arg\min} \; \tfrac12 \|A x - y\|_2^2 + \min_a \sum_k
        \tfrac{\beta}{2} \|(I - Q Q^{\top} - \tfrac1d \mathbf{1} \mathbf{1}^{\top})
        P_k x - D a_k\|_2^2 + R(a)

    (:footcite:t:`ducotterd2024smooth`), see
    :class:`~deepinv_deal.priors.SmoothPlusSparsePrior`. The penalty ``"group"`` is CPR,
    ``"weakly_convex"`` NCPR, whose solution depends on the start.

    ``model(y, physics)`` reconstructs for any
    :class:`deepinv.physics.LinearPhysics`; ``model(y)``, ``model(y, sigma=0.1)`` or
    ``model(y, 0.1)`` denoise.

    **Weights.** ``beta`` and ``lambda_reg`` are the published hyperparameters:
    ``lambda_reg`` is the base of the learned thresholds. Denoising scales the trained
    one by ``sigma`` over the noise level of the training (argument, the physics' noise
    model, the constructor's, or the training's own). For other problems, both should be
    tuned on a few images; the physics' noise level is not used.

    **Solvers.** All of them use the exact reduction to the penalised subspace.

    * ``"admm"``: joint quadratic solve for image and coefficients; the default for
      convex penalties where images are found by Fourier transforms (see below).
    * ``"fista"``: image eliminated; the default otherwise, unless there are bounds.
    * ``"ipalm"``: the published method.

    They stop on different rules: ``rtol`` bounds the relative change of the image per
    iteration for ``"fista"`` and ``"ipalm"``, the change and the violation of the
    splitting for ``"admm"``.
    Where the physics is a circular convolution (denoising, circular blur, single-coil
    Fourier sampling, recognised by probing), images are found by Fourier transforms;
    otherwise by preconditioned conjugate gradients.

    **Sizes.** Patches continue circularly, and images must be at least as large as a
    patch. With odd numbers of rows or columns, the last 2 x 2 groups of ``"group"`` are
    smaller, as if the coefficients were padded by one row or column of zeros.

    **Gradients** flow to the weights, ``y``, ``beta``, ``lambda_reg``, ``sigma`` and
    the physics by implicit differentiation, unless ``bounds`` are given. **Complex
    images** (two channels): as :class:`DEAL`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import SmoothPlusSparse
    >>> model = SmoothPlusSparse(num_atoms=20, patch_size=5, num_free_atoms=10)
    >>> x_hat, info = model(torch.rand(2, 1, 16, 17), sigma=0.1, return_info=True)
    >>> x_hat.shape, info.converged
    (torch.Size([2, 1, 16, 17]), tensor([True, True]))

    :param str penalty: ``"group"``, ``"l1"`` or ``"weakly_convex"``.
    :param int num_atoms: number of atoms, without weights.
    :param int patch_size: rows (and columns) of a patch, without weights.
    :param int num_free_atoms: number of free atoms, without weights.
    :param float order: exponent of the weakly convex penalty.
    :param str solver: ``"admm"``, ``"fista"`` or ``"ipalm"``; ``None``: see above.
    :param float, torch.Tensor beta: default coupling; the learned one if ``None``.
    :param float, torch.Tensor lambda_reg: default base of the thresholds.
    :param float sigma: default noise level of denoising, in units of the image.
    :param tuple bounds: smallest and largest value of the image, for example ``(0,
        float("inf"))``; not for ``"fista"``.
    :param float rtol: tolerance of the solver; ``None``: ``3e-3`` for ``"admm"``, else
        ``1e-4``, as published.
    :param int max_iter: its largest number of iterations.
    :param str complex_mode: ``"real_imag"`` or ``"real"``.
    :param AdjointOptions adjoint: settings of the backward pass.
    :param bool warn: issue a :class:`deepinv_deal.ConvergenceWarning` if a sample does
        not converge.
    :param bool strict: raise a :class:`deepinv_deal.ConvergenceError` instead, also in
        the backward pass.
    :param SmoothPlusSparsePrior prior: use this prior instead of ``pretrained``.
    :param str, torch.device device: where the model lives; ``None``: where the prior
        is, which for loaded weights is the CPU.
    :param str pretrained: ``"cpr_5"``, ``"cpr_25"``, ``"ncpr_5"`` or ``"ncpr_25"``
        (bundled, for as many gray levels of noise), path of a ``.safetensors`` file of
        this package or of a ``.pth`` file of the authors, or ``None`` for random
        weights.
    :raises ValueError: for bad settings or a checkpoint of another model.
    :raises FileNotFoundError: for a missing checkpoint.
    """

    def __init__(
        self,
        penalty: PenaltyName = "group",
        num_atoms: int = 200,
        patch_size: int = 13,
        num_free_atoms: int = 120,
        *,
        order: float = 1.8,
        solver: Solver | None = None,
        beta: float | Tensor | None = None,
        lambda_reg: float | Tensor | None = None,
        sigma: float | None = None,
        bounds: tuple[float, float] | None = None,
        rtol: float | None = None,
        max_iter: int = 2000,
        complex_mode: ComplexMode = "real_imag",
        adjoint: AdjointOptions = DEFAULT_ADJOINT,
        warn: bool = True,
        strict: bool = False,
        prior: SmoothPlusSparsePrior | None = None,
        device: str | torch.device | None = None,
        pretrained: str | os.PathLike[str] | None = None,
    ):
        if prior is None and pretrained is None:
            prior = SmoothPlusSparsePrior(
                penalty, num_atoms, patch_size, num_free_atoms, order=order
            )
        elif prior is None and pretrained is not None:
            prior = load_patch_prior(pretrained, SmoothPlusSparsePrior)
        assert prior is not None
        super().__init__(
            prior,
            solver=solver,
            beta=beta,
            lambda_reg=lambda_reg,
            sigma=sigma,
            bounds=bounds,
            rtol=rtol,
            max_iter=max_iter,
            complex_mode=complex_mode,
            adjoint=adjoint,
            warn=warn,
            strict=strict,
            device=device,
        )


class PatchSynthesis(SynthesisModel):
    r"""
    The convex patch-based synthesis model, a dictionary of patches with l1 penalty.

    .. math::
        \hat x = \underset{x}{\arg\min} \; \tfrac12 \|A x - y\|_2^2
        + \beta \min_a \sum_k \tfrac12 \|E_k x - D a_k\|_2^2 + \lambda \|a_k\|_1

    (:footcite:t:`ducotterd2024convex`, Eq. (2), in the scaling of the authors' code:
    their code's :math:`\lambda` is the paper's divided by :math:`\beta`). How the
    patches :math:`E_k x` are centred is a choice:

    * ``mean="free"`` ("++" in the paper): the mean of every patch of the *estimate* is
      removed;
    * ``mean="fixed"``: the patch means of :math:`A^{\top} y` are kept;
    * ``mean=None``: as the weights were trained for denoising, and free otherwise.

    The calls are those of :class:`SmoothPlusSparse`, and so are its solvers; in
    addition

    * ``"two-step"``: two passes over coefficients and image, as in the training. The
      default for denoising, where published weights need it;
    * ``"coordinate-descent"``: passes until the published rule of early stopping.

    The others minimise fully and are the default for reconstruction. The minimiser
    needs a :math:`\lambda` 20 to 60 times smaller than two steps do.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal import PatchSynthesis
    >>> model = PatchSynthesis(num_atoms=20, patch_size=4)
    >>> x_hat, info = model(torch.rand(2, 1, 16, 17), sigma=0.1, return_info=True)
    >>> x_hat.shape, info.solver
    (torch.Size([2, 1, 16, 17]), 'two-step')

    :param int num_atoms: number of atoms, without weights.
    :param int patch_size: rows (and columns) of a patch, without weights.
    :param str boundary: ``"valid"`` (patches inside the image, as published) or
        ``"circular"``, without weights.
    :param str mean: ``"free"``, ``"fixed"`` or ``None``, see above; ``"fixed"`` needs
        patches inside the image.
    :param str solver: see above.
    :param float, torch.Tensor beta: default coupling; the prior's own if ``None``.
    :param float, torch.Tensor lambda_reg: default threshold.
    :param float sigma: default noise level of denoising, in units of the image.
    :param tuple bounds: smallest and largest value of the image; not for ``"fista"``.
    :param float rtol: tolerance of the solver; ``None``: ``3e-3`` for ``"admm"``, else
        ``1e-4``, as published.
    :param int max_iter: its largest number of iterations.
    :param str complex_mode: ``"real_imag"`` or ``"real"``.
    :param AdjointOptions adjoint: settings of the backward pass.
    :param bool warn: issue a :class:`deepinv_deal.ConvergenceWarning` if a sample does
        not converge.
    :param bool strict: raise a :class:`deepinv_deal.ConvergenceError` instead, also in
        the backward pass.
    :param PatchSynthesisPrior prior: use this prior instead of ``pretrained``.
    :param str, torch.device device: where the model lives; ``None``: where the prior
        is, which for loaded weights is the CPU.
    :param str pretrained: ``"patch_25"`` (bundled, for noise of 25 gray levels), path
        of a ``.safetensors`` file of this package or of a ``.pth`` file of the authors,
        or ``None`` for random weights.
    :raises ValueError: for bad settings or a checkpoint of another model.
    :raises FileNotFoundError: for a missing checkpoint.
    """

    def __init__(
        self,
        num_atoms: int = 128,
        patch_size: int = 10,
        boundary: Boundary = "valid",
        *,
        mean: Mean | None = None,
        solver: Solver | None = None,
        beta: float | Tensor | None = None,
        lambda_reg: float | Tensor | None = None,
        sigma: float | None = None,
        bounds: tuple[float, float] | None = None,
        rtol: float | None = None,
        max_iter: int = 5000,
        complex_mode: ComplexMode = "real_imag",
        adjoint: AdjointOptions = DEFAULT_ADJOINT,
        warn: bool = True,
        strict: bool = False,
        prior: PatchSynthesisPrior | None = None,
        device: str | torch.device | None = None,
        pretrained: str | os.PathLike[str] | None = None,
    ):
        if prior is None and pretrained is None:
            prior = PatchSynthesisPrior(num_atoms, patch_size, boundary=boundary)
        elif prior is None and pretrained is not None:
            prior = load_patch_prior(pretrained, PatchSynthesisPrior)
        assert prior is not None
        if mean is not None:
            check_mean(mean, prior.dictionary.boundary)
        super().__init__(
            prior,
            solver=solver,
            beta=beta,
            lambda_reg=lambda_reg,
            sigma=sigma,
            bounds=bounds,
            rtol=rtol,
            max_iter=max_iter,
            complex_mode=complex_mode,
            adjoint=adjoint,
            warn=warn,
            strict=strict,
            device=device,
        )
        self.mean = mean

    def _default_solver(
        self, problem: SynthesisProblem, operator: ImageOperator
    ) -> str:
        """Returns the solver of the training for denoising, else the fastest."""
        if operator.denoising:
            return "two-step"
        return super()._default_solver(problem, operator)

    def _data(
        self, operator: ImageOperator, beta: Tensor, notes: list[str]
    ) -> ImageSystem:
        """Returns the data term, patch means tied to those of the data if asked."""
        data = super()._data(operator, beta, notes)
        mean = self.mean or (self.prior.mean if operator.denoising else "free")
        if mean == "free":
            return data
        return data.with_means(operator.b, self.prior.dictionary.patch_size, beta)


def _positive(name: str, value: Any, like: Tensor) -> Tensor:
    values = per_sample(name, value, like)
    if not bool((values.detach() > 0).all()):
        raise ValueError(f"{name} must be positive, got {values.tolist()}.")
    return values
