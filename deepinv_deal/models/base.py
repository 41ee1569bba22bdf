"""The one road of all models: check, pose, solve, report."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from deepinv.models import Denoiser, Reconstructor
from deepinv.optim import DataFidelity
from deepinv.optim.prior import Prior
from torch import Tensor, nn

from deepinv_deal._batch import expand
from deepinv_deal._progress import iterations_shown
from deepinv_deal.models.info import ReconstructionInfo
from deepinv_deal.models.noise import estimated_level
from deepinv_deal.operators.slices import SLICE_MODES, SliceMode
from deepinv_deal.optim.metrics import IterationMetrics
from deepinv_deal.problems import DataTerm, KnownPhysics, Problem, SolverOptions
from deepinv_deal.problems.bounds import Bounds, check_bounds, clamp, divided
from deepinv_deal.problems.checks import (
    check_choice,
    doubt_noise_level,
    is_noise_level,
    per_sample,
)
from deepinv_deal.problems.layout import COMPLEX_MODES, ComplexMode
from deepinv_deal.problems.likelihood import Likelihood
from deepinv_deal.problems.likelihood_term import LikelihoodTerm
from deepinv_deal.problems.noise import (
    check_data_fidelity,
    gaussian_level,
    has_noise,
    is_least_squares,
    likelihood_of,
    likelihood_of_noise,
)
from deepinv_deal.problems.options import DEFAULT_RTOL
from deepinv_deal.solvers import AdjointOptions, SolverResult, eager, full_precision
from deepinv_deal.solvers.fixed_point import Callback
from deepinv_deal.solvers.precision import solver_precision

P = TypeVar("P", bound=Prior)

LambdaMode = Literal["absolute", "relative"]
LAMBDA_MODES: tuple[str, ...] = ("absolute", "relative")

#: First images that have a name.
INITS = ("zero", "adjoint", "pseudo_inverse")


class ReconstructionModel(Reconstructor, Denoiser):
    r"""
    What all models have in common; use :class:`deepinv_deal.DEAL` and its siblings.

    ``model(y, physics)`` reconstructs from the measurements of any
    :class:`deepinv.physics.LinearPhysics`; ``model(y, sigma=0.1)`` or ``model(y, 0.1)``
    denoises.

    **Noise level.** ``sigma`` is in units of the image. For denoising (no physics, or
    :class:`deepinv.physics.Denoising`) it is taken from the argument, the physics'
    noise model or the constructor, in this order; ``"estimate"`` estimates it from the
    data. For all other physics it is a hyperparameter of the model: the argument, or
    the constructor's, never the physics' own (but see below for likelihoods).

    **Regularization weight.** ``lambda_reg`` is absolute. Denoising uses the learned
    weight unless told otherwise. With ``lambda_mode="relative"`` it is multiplied by
    :math:`\|A\|_2^2`, so that one value serves operators of any norm.

    **Intensity.** The weights expect images in about [0, 1]. With ``scale="auto"``,
    data whose intensity is far from that (all but a few pixels below 0.25, or more than
    a few above 2.5) are divided by 1 or 2.5 times a power of ten before and multiplied
    after, see ``info.scale``; and of real images that hardly differ from a large
    constant, this pedestal is subtracted before and added after. ``info.notes`` says
    so. A number fixes the scale, ``None`` switches both off.

    **Complex images** (MRI: two channels, real and imaginary part) with a gray model:
    ``complex_mode="real_imag"`` regularizes both parts alike, ``"real"`` assumes a
    real-valued image, as the papers.

    **Volumes and series** ``(B, C, D, H, W)`` of physics that act on volumes, as
    ``MRI(three_d=True)``, ``DynamicMRI`` or a blur with a kernel of three dimensions,
    are reconstructed as a whole, and denoised too. The regularizer acts on their
    slices: ``slices="depth"`` on those ``(H, W)``, which may be frames, ``"height"``
    and ``"width"`` on those along the other axes, ``"mean"`` on the slices of all three
    orientations, of whose regularizers it is the mean. Each volume is one sample.

    **Data term.** ``data_fidelity="auto"`` is least squares, or the likelihood that
    matches the noise model of the physics where the model can solve for it, which is
    then named in ``info.notes``: for counts (``PoissonNoise``,
    ``PoissonGaussianNoise``) and transmission (``LogPoissonNoise``). Others are given
    as deepinv's :class:`~deepinv.optim.L2`, :class:`~deepinv.optim.PoissonLikelihood`,
    :class:`~deepinv.optim.LogPoissonLikelihood`, :class:`~deepinv.optim.L1` (smoothed),
    or :class:`deepinv_deal.optim.WeightedL2`, :class:`deepinv_deal.optim.SmoothedL1`.
    A weight is absolute if the data term was given, and relative to its typical
    curvature, :math:`1 / \text{variance}`, if it was found, or if the weight is the
    default; so it means the same as for least squares. Counts and transmission tell the
    level of the noise: the defaults of ``sigma`` and ``lambda_reg`` are then those of
    denoising an image that is about as uncertain, also with a physics. :math:`\ell_2`
    and :math:`\ell_1` terms are those of images and measurements divided by the scale;
    counts know their unit, and are not divided. The weight of dictionaries is ``beta``.

    **Gradients** flow to weights, measurements, ``lambda_reg``, ``sigma`` and the
    parameters of physics and data fidelity by implicit differentiation, exact or
    Jacobian-free (``adjoint=AdjointOptions(jacobian_free=True)``).

    :param deepinv.optim.Prior prior: the learned prior.
    :param float, torch.Tensor, str sigma: default noise level: for denoising in units
        of the image, for all other physics in the model's unit, images in [0, 1].
    :param float, torch.Tensor lambda_reg: default regularization weight, see above.
    :param float rtol: tolerance of the solver; ``None``: what suits the model.
    :param int max_iter: largest number of outer iterations; ``None``: likewise.
    :param tuple, str bounds: smallest and largest value of the image, in its units;
        ``None`` for none, ``"auto"`` for those that the model was made with.
    :param str, SolverOptions solver: name of a method, or all settings of the solver.
    :param AdjointOptions adjoint: settings of the backward pass.
    :param str lambda_mode: ``"absolute"`` or ``"relative"``, see above.
    :param float, str scale: ``"auto"``, a positive number or ``None``, see above.
    :param str complex_mode: ``"real_imag"`` or ``"real"``, see above.
    :param str slices: which slices of a volume are regularized, see above.
    :param deepinv.optim.DataFidelity, str data_fidelity: the data term, see above.
    :param Callable, str, torch.Tensor init: first image, see :meth:`forward`.
    :param list trainable_params: hyperparameters to train: among ``"lambda_reg"`` and
        ``"sigma"``.
    :param dict custom_metrics: as in :class:`deepinv.optim.BaseOptim`.
    :param bool warn: issue a :class:`deepinv_deal.ConvergenceWarning` if a sample does
        not converge.
    :param bool strict: raise a :class:`deepinv_deal.ConvergenceError` instead, also in
        the backward pass.
    :param bool show_progress_bar: show a progress bar of the iterations; on terminals
        if ``None``.
    :param str, torch.device device: where to move the model; ``None``: weights that are
        loaded or made are on the CPU, and a ``prior`` that is given stays where it is.
    :raises ValueError: for bad settings.
    """

    #: Bounds that ``"auto"`` stands for, for images in [0, 1].
    own_bounds: ClassVar[tuple[float, float] | None] = None

    #: Settings if none are given.
    default_rtol: ClassVar[float | None] = DEFAULT_RTOL
    default_max_iter: ClassVar[int] = 100
    default_adjoint: ClassVar[AdjointOptions] = AdjointOptions()

    #: Kind of the report.
    info_type: ClassVar[type[ReconstructionInfo]] = ReconstructionInfo

    #: Hyperparameters that only some models have, as arguments of a call.
    hyperparameters: ClassVar[tuple[str, ...]] = ()

    #: Of models that were pickled before there was this setting, too.
    show_progress_bar: bool | None = False

    #: What to do if the solver does not converge.
    advice = "The image is the best iterate found. Raise max_iter, or relax rtol."

    def __init__(
        self,
        prior: Prior,
        *,
        sigma: float | Tensor | str | None = None,
        lambda_reg: float | Tensor | None = None,
        rtol: float | None = None,
        max_iter: int | None = None,
        bounds: tuple[float, float] | str | None = "auto",
        solver: str | SolverOptions = "auto",
        adjoint: AdjointOptions | None = None,
        lambda_mode: LambdaMode = "absolute",
        scale: float | str | None = "auto",
        complex_mode: ComplexMode = "real_imag",
        slices: SliceMode = "depth",
        data_fidelity: DataFidelity | str = "auto",
        init: Callable[..., Any] | str | Tensor | None = None,
        trainable_params: list[str] | None = None,
        custom_metrics: dict[str, Any] | None = None,
        warn: bool = True,
        strict: bool = False,
        show_progress_bar: bool | None = False,
        device: str | torch.device | None = None,
    ):
        super().__init__()
        if isinstance(sigma, str) and sigma != "estimate":
            raise ValueError(f"sigma must be a number or 'estimate', got {sigma!r}.")
        _check_scale(scale)
        check_choice("complex_mode", complex_mode, COMPLEX_MODES)
        check_choice("slices", slices, SLICE_MODES)
        check_choice("lambda_mode", lambda_mode, LAMBDA_MODES)
        if isinstance(bounds, str):
            check_choice("bounds", bounds, ("auto", None))
        else:
            check_bounds(bounds)
        if rtol is not None and not rtol >= 0:
            raise ValueError(f"rtol must not be negative, got {rtol}.")
        if max_iter is not None and (int(max_iter) != max_iter or max_iter < 0):
            raise ValueError(
                f"max_iter must be a whole number, not negative, got {max_iter}."
            )
        _check_init_name(init)
        check_data_fidelity(data_fidelity)
        adjoint = self.default_adjoint if adjoint is None else adjoint
        if not isinstance(adjoint, AdjointOptions):
            raise TypeError(
                f"adjoint must be AdjointOptions, got {type(adjoint).__name__}."
            )
        self.prior = prior
        self.estimate_sigma = isinstance(sigma, str)
        trainable = list(trainable_params or [])
        self._keep("sigma", None if isinstance(sigma, str) else sigma, trainable)
        self._keep("lambda_reg", lambda_reg, trainable)
        if trainable:
            raise ValueError(
                "trainable_params must be among 'lambda_reg' and 'sigma', got "
                f"{trainable[0]!r}."
            )
        self.rtol = self.default_rtol if rtol is None else rtol
        self.max_iter = self.default_max_iter if max_iter is None else int(max_iter)
        self.bounds, self.solver = bounds, SolverOptions.of(solver)
        if hasattr(prior, "methods"):
            methods = dict.fromkeys([*prior.methods(None), *prior.methods((0, 1))])
            name, settings = type(self).__name__, prior.solver_settings
            self.solver.check(name, tuple(methods), settings)
        self.lambda_mode, self.scale = lambda_mode, scale
        self.complex_mode, self.slices = complex_mode, slices
        self.data_fidelity = data_fidelity
        self.init, self.custom_metrics = init, custom_metrics
        self.adjoint, self.warn, self.strict = adjoint.made_strict(strict), warn, strict
        self.show_progress_bar = show_progress_bar
        if device is not None:
            self.to(device)
        self.eval()

    def _keep(self, name: str, value: Any, trainable: list[str]) -> None:
        """Stores a hyperparameter: trained, part of the state if a tensor, or plain."""
        wanted = name in trainable
        if wanted:
            trainable.remove(name)
            if value is None:
                raise ValueError(
                    f"trainable_params holds {name!r}, but it has no value to start "
                    f"from: give {name}."
                )
        if wanted:
            # A copy: the caller's tensor is not trained.
            value = torch.as_tensor(value).detach().clone()
            like = next(self.prior.parameters(), torch.empty(0))
            setattr(self, name, nn.Parameter(value.to(like.dtype)))
        elif isinstance(value, Tensor) and not value.requires_grad:
            self.register_buffer(name, value.clone())  # the caller's may change
        else:
            setattr(self, name, value)

    # -- the road ------------------------------------------------------------------

    @eager
    @full_precision
    def forward(
        self,
        y: Tensor,
        physics: Any = None,
        sigma: float | Tensor | str | None = None,
        *,
        lambda_reg: float | Tensor | None = None,
        init: Any = None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        return_info: bool = False,
        **hyperparameters: Any,
    ) -> Any:
        r"""
        Reconstructs or denoises.

        :param torch.Tensor y: measurements; for denoising the images ``(B, C, H, W)``
            or volumes ``(B, C, D, H, W)``.
        :param deepinv.physics.LinearPhysics physics: forward operator, or what
            :meth:`examine` returned for it; ``None`` to denoise. A number or tensor
            here is taken for ``sigma``, as deepinv's denoisers are called.
        :param float, torch.Tensor, str sigma: noise level in units of the image, one or
            one per sample; ``"estimate"`` for denoising.
        :param float, torch.Tensor lambda_reg: weight, one or one per sample.
        :param str, Callable, torch.Tensor init: first image: ``"zero"``, ``"adjoint"``,
            ``"pseudo_inverse"``, an image ``(B, C, H, W)``, or a function of ``(y,
            physics)`` that returns one; ``None``: what suits the model.
        :param torch.Tensor x_gt: ground truth for the metrics.
        :param bool compute_metrics: also return deepinv's dictionary of metrics.
        :param bool return_info: also return a :class:`ReconstructionInfo`.
        :param object hyperparameters: ``beta`` of models with a dictionary.
        :return: the image ``(B, C, H, W)``, followed by metrics and info where asked
            for.
        :raises TypeError: if ``y`` is no real floating tensor or ``physics`` not
            linear.
        :raises ValueError: for wrong shapes, channels or signs, an empty batch, NaN or
            infinity, or a missing noise level.
        """
        problem = self.pose(
            y, physics, sigma, lambda_reg=lambda_reg, init=init, **hyperparameters
        )
        if x_gt is not None:
            x_gt = problem.data.channels(problem.data.unknown("x_gt", x_gt))
        start = problem.start()
        metrics, recorder = None, self._recorder(problem, start)

        def seen(unknown: Tensor) -> Tensor:
            # In the units of the caller, and complex images as two channels.
            return problem.data.channels(problem.equation.image(unknown))

        if compute_metrics:
            metrics = IterationMetrics(seen(start.detach()), x_gt, self.custom_metrics)

        def observe(_k: int, before: Tensor, after: Tensor) -> None:
            if metrics is not None:
                metrics.observe(seen(before), seen(after))
            if recorder is not None:
                recorder.observe(after)

        watched = metrics is not None or recorder is not None
        unknown, result = self.solve(problem, start, observe if watched else None)
        image = problem.image(unknown)
        if isinstance(self.bounds, tuple) and not image.is_complex():
            # In another unit bounds are met up to rounding only. Its correction has no
            # derivative.
            image = image + (clamp(image, self.bounds) - image).detach()
        answer: list[Any] = [image]
        if metrics is not None:
            answer.append(metrics.finish(result))
        if recorder is not None and self.warn:
            recorder.check(self.rtol)
        if return_info:
            more = {} if recorder is None else recorder.fields()
            answer.append(self._info(problem, unknown, result, **more))
        return answer[0] if len(answer) == 1 else tuple(answer)

    @full_precision
    def pose(
        self,
        y: Tensor,
        physics: Any = None,
        sigma: float | Tensor | str | None = None,
        *,
        lambda_reg: float | Tensor | None = None,
        init: Any = None,
        **hyperparameters: Any,
    ) -> Problem:
        """
        Returns what :meth:`forward` solves, without solving it.

        :param torch.Tensor y: see :meth:`forward`, as for all arguments.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        :param float, torch.Tensor, str sigma: noise level.
        :param float, torch.Tensor lambda_reg: weight.
        :param str, Callable, torch.Tensor init: first image.
        :param object hyperparameters: ``beta`` of models with a dictionary.
        """
        unknown = sorted(set(hyperparameters) - set(self.hyperparameters))
        if unknown:
            raise TypeError(f"Unknown arguments: {', '.join(unknown)}.")
        if sigma is None and is_noise_level(physics):
            physics, sigma = None, physics
        data = self._data(y, physics, self.scale)
        level = self._level(sigma, physics, data)
        bounds = self._bounds(data)
        data, own_level, unit = self._at_level(data, level)
        equation = self._equation(
            data,
            sigma=own_level,
            lambda_reg=self._weight(lambda_reg, data, own_level, unit),
            bounds=divided(bounds, unit, data.b),
            **hyperparameters,
        )
        x0 = self._first_image(init, y, physics, data)
        return Problem(equation, x0, level, unit)

    def equation(self, y: Tensor, physics: Any = None, **settings: Any) -> Any:
        """
        Returns the equation that :meth:`forward` solves; arguments are those of
        :meth:`pose`.
        """
        return self.pose(y, physics, **settings).equation

    @full_precision
    def examine(self, y: Tensor, physics: Any) -> KnownPhysics:
        """
        Tries out a physics once, for many measurements of images of one shape.

        What is returned takes the place of the physics in calls of this model: its
        adjoint is then not checked again, and what preconditioners need to know of it
        not measured again. It holds nothing of the measurements. If the parameters of
        the physics change, examine it again.

        :param torch.Tensor y: measurements, as for :meth:`forward`.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        :raises ValueError: for denoising, which needs no such thing.
        """
        H = self._data(y, physics, None).H
        if not isinstance(H, KnownPhysics):
            raise ValueError("physics only adds noise: there is nothing to examine.")
        H.kept = True
        return H

    @full_precision
    def solve(
        self,
        problem: Problem,
        start: Tensor | None = None,
        callback: Callback | None = None,
        **limits: Any,
    ) -> tuple[Tensor, SolverResult]:
        """
        Solves a problem with the settings of this model.

        :param Problem problem: from :meth:`pose`.
        :param torch.Tensor start: first unknown; ``None``: that of the problem.
        :param Callable callback: called as ``callback(k, before, after)`` with the
            unknowns before and after every iteration.
        :param object limits: ``rtol`` and ``max_iter`` instead of the model's.
        :return: the unknown with implicit gradients, and how it was found.
        """
        limits = {"rtol": self.rtol, "max_iter": self.max_iter, **limits}
        name = type(self).__name__
        with iterations_shown(callback, self.show_progress_bar, name) as observer:
            unknown, result = problem.equation.solve(
                problem.start() if start is None else start,
                adjoint=self.adjoint,
                callback=observer,
                **limits,
            )
        if self.warn or self.strict:
            rtol = self._used_rtol(problem, limits["rtol"])
            advice = self.advice
            if getattr(problem.data.H, "kept", False):
                advice += (
                    " If the physics has changed since it was examined, examine it "
                    "again."
                )
            result.report(name, rtol, advice, strict=self.strict)
        return unknown, result

    # -- what a family may say for itself --------------------------------------------

    def _at_level(
        self, data: DataTerm, level: Tensor | None
    ) -> tuple[DataTerm, Tensor | None, Tensor | None]:
        """
        Returns the data term, the noise level of the equation, and the unit by which
        a weight is to be divided, or ``None``.
        """
        return data, level, None

    def _learned_weight(self, data: DataTerm) -> float | None:
        """Returns the weight if none is given; ``None``: the prior's own."""
        if data.identity:
            return None
        raise ValueError(
            "lambda_reg is missing: the learned weight is for denoising. Give "
            "lambda_reg, tuned on a few images of this problem."
        )

    def _default_level(self, data: DataTerm) -> Tensor | None:
        """Returns the noise level if none is given, in the units of the model."""
        del data
        return None

    def _equation(self, data: DataTerm, **settings: Any) -> Any:
        """Returns the equation of the prior."""
        return self.prior.equation(data, options=self.solver, **settings)

    def _recorder(
        self,
        problem: Problem,  # noqa: ARG002 - for models that record more
        start: Tensor,  # noqa: ARG002
    ) -> Any:
        """
        Returns what else looks at the unknowns, or ``None``: an object with
        ``observe(unknown)``, ``check(rtol)`` and ``fields()`` for the report.
        """
        return None

    def _used_rtol(
        self,
        problem: Problem,  # noqa: ARG002 - a method may have a tolerance of its own
        rtol: float | None,
    ) -> float:
        return DEFAULT_RTOL if rtol is None else rtol

    def _info(
        self, problem: Problem, unknown: Tensor, result: SolverResult, **more: Any
    ) -> ReconstructionInfo:
        """Returns the report."""
        equation, solution = problem.equation, unknown.detach()

        def compute_mask() -> Tensor:
            with solver_precision(solution.device):
                masks = equation.regularizer.masks(equation.mask(solution))
            return problem.data.features(masks)

        return self.info_type.of(
            result, compute_mask=compute_mask, **self._report(problem), **more
        )

    def _report(self, problem: Problem) -> dict[str, Any]:
        """Returns the fields that all reports share."""
        sigma, unit = problem.sigma, problem.unit
        weight = problem.equation.lambda_reg.detach()
        if unit is not None:  # back in that of the call, the reverse of _weight
            quadratic = problem.data.quadratic
            weight = weight * unit.detach() if quadratic else weight / unit.detach()
        return {
            "sigma": None if sigma is None else sigma.detach(),
            "lambda_reg": weight,
            "rtol": self._used_rtol(problem, self.rtol),
            "scale": problem.data.intensity,
            "notes": problem.data.notes,
        }

    # -- checks and units --------------------------------------------------------------

    def _data(self, y: Any, physics: Any, scale: float | str | None) -> DataTerm:
        """Returns the checked data term."""
        # Replicas of torch.nn.DataParallel have no parameters, and are where y is.
        weights = chain(self.prior.parameters(), self.prior.buffers())
        likelihood, note = self._likelihood(y, physics)
        data = DataTerm.of(
            y if likelihood is None else likelihood.linear(y),
            physics,
            next(weights, None),
            in_channels=self.prior.in_channels,
            complex_mode=self.complex_mode,
            slices=self.slices,
            scale=scale,
            # Counts and the like are zero where nothing was.
            pedestal=likelihood is None or likelihood.of_misfit,
        )
        if note is not None:
            data.notes.append(f"data_fidelity='auto': {note}.")
        if likelihood is None:
            return data
        return LikelihoodTerm.from_least_squares(
            data, y, likelihood, relative=note is not None
        )

    def _likelihood(self, y: Any, physics: Any) -> tuple[Likelihood | None, str | None]:
        """
        Returns the likelihood, ``None`` for least squares, and why, if it was chosen.
        """
        fidelity = self.data_fidelity
        if isinstance(fidelity, str):
            known = isinstance(physics, KnownPhysics)
            return likelihood_of_noise(physics.physics if known else physics, y)
        if is_least_squares(fidelity):
            return None, None
        return likelihood_of(fidelity), None

    def _bounds(self, data: DataTerm) -> Bounds | None:
        """Returns the bounds in the units of the model."""
        if not isinstance(self.bounds, str):
            return divided(self.bounds, data.scale, data.b, data.offset)
        own = self.own_bounds
        if own is None or data.complex_pair:
            # Real and imaginary part of an image have either sign.
            return None
        if data.signed is None or data.bright is None:
            return own
        # Where the intensity was guessed, nobody knows which value is white, and where
        # the image stood on a pedestal, which is black.
        above, below = data.bright | (data.intensity != 1), data.signed
        if data.offset is not None:
            above, below = above | (data.offset != 0), below | (data.offset != 0)
        if not bool((above | below).any()):
            return own
        if bool((data.bright | data.signed).any()):
            data.notes.append(
                f"The image has values beyond {own}, so it is not confined to it "
                "(bounds='auto')."
            )
        low, high = (torch.full_like(data.intensity, value) for value in own)
        low, high = low.masked_fill(below, -math.inf), high.masked_fill(above, math.inf)
        return expand(low, data.b), expand(high, data.b)

    def _level(
        self, sigma: float | Tensor | str | None, physics: Any, data: DataTerm
    ) -> Tensor | None:
        """Returns the noise level in the units of the model, ``(B,)``."""
        own = self.sigma is not None and not data.identity
        if sigma is None and not own and isinstance(data, LikelihoodTerm):
            if data.tells_noise:
                return data.noise_level
        if sigma is None and data.identity:
            noise = getattr(physics, "noise_model", None)
            other = isinstance(data, LikelihoodTerm)
            sigma = None if other else gaussian_level(noise)
            has_own = self.estimate_sigma or self.sigma is not None
            if sigma is None and not has_own and data.quadratic and has_noise(noise):
                raise ValueError(
                    f"sigma is missing: the physics has {type(noise).__name__}, which "
                    "is no Gaussian noise of one level. Give sigma, its standard "
                    "deviation, sigma='estimate', or a data_fidelity that suits it."
                )
        if sigma is None and self.estimate_sigma:
            sigma = "estimate"
        image = (
            data.b if data.scale is None else data.b * data.scale[:, None, None, None]
        )
        if isinstance(sigma, str):
            if sigma != "estimate" or not data.identity:
                raise ValueError(
                    f"sigma={sigma!r}: only denoising can estimate the noise level "
                    "(sigma='estimate'). Otherwise give a number, the model's noise "
                    "level."
                )
            sigma = estimated_level(image.detach())
            levels = ", ".join(f"{s:.4g}" for s in sigma.tolist())
            data.notes.append(f"The noise level was estimated: sigma={levels}.")
        if sigma is None and self.sigma is not None and not data.identity:
            # The model's own hyperparameter is relative to images in [0, 1].
            return per_sample("sigma", self.sigma, data.b)
        if sigma is None:
            sigma = self.sigma
        if sigma is None:
            return self._default_level(data)
        level = per_sample("sigma", sigma, data.b)
        if data.identity:
            doubt_noise_level(level, image)
        return level if data.scale is None else level / data.scale

    def _weight(
        self,
        lambda_reg: float | Tensor | None,
        data: DataTerm,
        level: Tensor | None,
        unit: Tensor | None,
    ) -> Tensor | None:
        """Returns the weight, ``(B,)``; ``None``: the prior's own."""
        if lambda_reg is None:
            lambda_reg = self.lambda_reg
        is_default = lambda_reg is None
        likelihood = data if isinstance(data, LikelihoodTerm) else None
        typical = None if likelihood is None else likelihood.typical
        if lambda_reg is None and not (likelihood and likelihood.tells_noise):
            lambda_reg = self._learned_weight(data)
        if lambda_reg is None:
            if likelihood is None or typical is None:
                return None
            level = level if unit is None else unit * self.prior.sigma
            lambda_reg = self.prior.default_lambda(level, data.b) * likelihood.gain
        weight = per_sample("lambda_reg", lambda_reg, data.b)
        if self.lambda_mode == "relative":
            weight = weight * data.sqnorm
        weight = weight if unit is None else weight / unit
        if likelihood is None:
            return weight
        relative = is_default or likelihood.relative or self.lambda_mode == "relative"
        if relative and typical is not None:
            return weight * typical
        # Least squares are divided by the square of the unit, likelihoods are not.
        return weight if unit is None else weight * unit.square()

    def _first_image(
        self, init: Any, y: Tensor, physics: Any, data: DataTerm
    ) -> Tensor | None:
        """Returns the image to start from, in the units of the equation, or None."""
        init = self.init if init is None else init
        _check_init_name(init)
        if init is None:
            return None
        if isinstance(init, str) and init == "zero":
            return torch.zeros_like(data.b)
        if isinstance(init, str) and (init == "adjoint" or data.identity):
            return data.b.detach()
        physics = physics.physics if isinstance(physics, KnownPhysics) else physics
        if isinstance(init, str):
            if isinstance(data, LikelihoodTerm):
                y = data.likelihood.linear(y)
            with torch.no_grad():
                init = physics.A_dagger(y)
        elif callable(init):
            init = init(y, physics)
        return data.unknown("init", init)


def checked_prior(prior: Any, kind: type[P]) -> P:
    """
    Returns a prior that must be of the kind that a model solves for.

    :param object prior: the argument.
    :param type kind: its class.
    :raises TypeError: if it is none.
    """
    if not isinstance(prior, kind):
        raise TypeError(
            f"prior must be an {kind.__name__}, got {type(prior).__name__}. A denoiser "
            "of your own is one for deepinv's plug-and-play algorithms: "
            "deepinv.optim.PnP(denoiser=...)."
        )
    return prior


def _check_scale(scale: Any) -> None:
    if isinstance(scale, str):
        if scale != "auto":
            raise ValueError(f"scale must be 'auto', a number or None, got {scale!r}.")
    elif scale is not None and np.prod(np.shape(scale)) != 1:
        raise ValueError(
            f"scale must be one number, got {np.shape(scale)}. Divide y and sigma by "
            "those of the samples, and multiply the images."
        )
    elif scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive, got {scale}.")


def _check_init_name(init: Any) -> None:
    if isinstance(init, str) and init not in INITS:
        raise ValueError(
            f"init must be one of {INITS}, an image, or a function of (y, physics), "
            f"got {init!r}."
        )
