r"""deepinv's optimizer interface to the fixed-point engine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from deepinv.optim import BaseOptim, DEQConfig, OptimIterator
from deepinv.optim.data_fidelity import L2, DataFidelity
from deepinv.optim.prior import Prior
from torch import Tensor

from deepinv_deal._progress import iterations_shown
from deepinv_deal.operators.slices import SLICE_MODES, SliceMode
from deepinv_deal.optim.metrics import IterationMetrics
from deepinv_deal.priors import PatchPrior
from deepinv_deal.problems import AttentiveEquation, DataTerm, SolverOptions
from deepinv_deal.problems.checks import check_choice
from deepinv_deal.problems.options import DEFAULT_RTOL
from deepinv_deal.problems.quadratic import FrozenSystem
from deepinv_deal.solvers import (
    AdjointOptions,
    SolverResult,
    eager,
    full_precision,
    implicit_solution,
)


class FrozenIteration(OptimIterator):
    r"""
    One outer iteration: freeze the weights of the prior at :math:`x_k`, solve, return.

    .. math::
        x_{k+1} = T(x_k) = \underset{x}{\arg\min} \; \tfrac{1}{2} \|A x - y\|_2^2
        + \lambda R_{m(x_k)}(x)

    It runs in any :class:`deepinv.optim.BaseOptim`, unfolded and DEQ included, and is
    differentiable in :math:`x_k` and in all parameters. :class:`FixedPointOptim` runs
    it with inexact inner solves, per-sample stopping and its own implicit backward.

    :param float rtol: relative accuracy of the inner solve.
    :param SolverOptions solver: how the frozen problems are solved. This iteration
        itself is in the precision of the weights, whatever its ``inner_dtype``.
    :param str slices: which slices of a volume are regularized, see
        :class:`deepinv_deal.models.ReconstructionModel`.
    """

    def __init__(
        self,
        rtol: float = 1e-6,
        solver: str | SolverOptions = SolverOptions(preconditioner="none"),  # noqa: B008
        slices: SliceMode = "depth",
    ):
        super().__init__(has_cost=False)
        check_choice("slices", slices, SLICE_MODES)
        self.rtol, self.solver, self.slices = rtol, SolverOptions.of(solver), slices

    def equation(
        self,
        data_fidelity: DataFidelity,
        prior: Prior,
        params: dict[str, Any],
        y: Tensor,
        physics: Any,
        *,
        trial: bool = True,
    ) -> Any:
        """
        Returns the equation that the fixed points of the iteration solve.

        :param deepinv.optim.DataFidelity data_fidelity: :class:`deepinv.optim.L2`.
        :param deepinv.optim.Prior prior: a prior of this package.
        :param dict params: with entries ``"lambda"`` (``None``: the prior's own) and
            ``"g_param"``, the noise level of the prior.
        :param torch.Tensor y: measurements.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        :param bool trial: whether to try the physics out; otherwise it is trusted.
        :raises TypeError: for another data fidelity or a prior that cannot be frozen.
        """
        if not isinstance(data_fidelity, L2):
            raise TypeError(
                "data_fidelity must be deepinv.optim.L2, got "
                f"{type(data_fidelity).__name__}: the inner problems are least squares."
            )
        if not hasattr(prior, "equation"):
            raise TypeError(
                f"prior must be one of deepinv_deal.priors, got {type(prior).__name__}."
            )
        lambda_reg = params["lambda"]
        if lambda_reg is not None:
            # The term norm / 2 ||A x - y||^2 with weight lambda, divided by its factor.
            lambda_reg = lambda_reg / data_fidelity.norm
        weights = chain(prior.parameters(), prior.buffers())
        reference = next(weights, None)
        data = DataTerm.of(
            y,
            physics,
            reference,
            in_channels=prior.in_channels,
            slices=self.slices,
            trial=trial,
        )
        if data_fidelity.norm != 1 and isinstance(prior, PatchPrior):
            raise ValueError(
                f"data_fidelity has the factor {data_fidelity.norm:g}, which no weight "
                "of a dictionary can stand for: its lambda_reg is a threshold. Scale "
                "the physics instead."
            )
        # A box around 0 to 1 is for images, not for real and imaginary part.
        settings: dict[str, Any] = {"bounds": None} if data.complex_pair else {}
        return prior.equation(
            data,
            sigma=params["g_param"],
            lambda_reg=lambda_reg,
            options=self.solver,
            **settings,
        )

    def forward(
        self,
        X: dict[str, Any],
        cur_data_fidelity: DataFidelity,
        cur_prior: Prior,
        cur_params: dict[str, Any],
        y: Tensor,
        physics: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        Returns ``{"est": (T(x), T(x)), "cost": None}`` for ``X = {"est": (x, ...)}``.
        """
        equation = self.equation(
            cur_data_fidelity, cur_prior, cur_params, y, physics, trial=False
        )
        x = equation.data.layout.extract(X["est"][0])
        if not isinstance(equation, AttentiveEquation):
            raise TypeError(
                f"FrozenIteration runs quadratic priors, got {type(cur_prior).__name__}"
                ". Use FixedPointOptim."
            )
        equation = equation.precise  # a single solve, which nobody corrects
        with torch.no_grad():
            problem = FrozenSystem(equation, x)
            rtol = torch.full_like(problem.residual, self.rtol)
            result = problem.solve(rtol, torch.ones_like(rtol, dtype=torch.bool))
        self._report(result)
        z = result.x
        if torch.is_grad_enabled():
            # z solves a linear system whose matrix depends on x through the mask.
            residual = equation(z, equation.regularizer.mask(x))
            if residual.requires_grad:

                def solve_adjoint(v: Tensor) -> Tensor:
                    answer = problem.correction(v, rtol)
                    self._report(answer)
                    return answer.x

                z = implicit_solution(z, residual, solve_adjoint)
        image = equation.data.image(z)
        return {"est": (image, image), "cost": None}

    def _report(self, result: SolverResult) -> None:
        advice = "Raise inner_max_iter, or relax rtol."
        result.report("An inner solve of FrozenIteration", self.rtol, advice)


class FixedPointOptim(BaseOptim):
    r"""
    Runs a prior of this package to its fixed point :math:`x = T(x)`.

    A :class:`deepinv.optim.BaseOptim`: ``init``, ``custom_init``, ``x_gt``,
    ``compute_metrics``, ``custom_metrics`` and ``trainable_params`` work as there.
    Different are

    * the loop, :func:`deepinv_deal.solvers.fixed_point`: every sample stops on its own,
      when data and regularizer balance: their sum :math:`F(x)` is at most ``rtol``
      times the force of the regularizer;
    * the backward pass, :func:`deepinv_deal.solvers.attach_gradient` instead of
      deepinv's DEQ step: no hooks, accuracy per sample, no change of dtype. ``DEQ``
      holds its settings;
    * the report: ``return_info=True`` gives a
      :class:`deepinv_deal.solvers.SolverResult`.

    The metrics hold ``"nonlinear_residual"`` in addition.

    .. note::
        Images must be in about [0, 1], for which priors were trained: unlike
        :class:`deepinv_deal.DEAL` and its siblings, it does not rescale data.

    :param deepinv.optim.Prior prior: a prior of this package.
    :param float, torch.Tensor lambda_reg: regularization weight; ``None``: the prior's
        own.
    :param float, torch.Tensor sigma: noise level of the prior in [0, 1] units.
    :param deepinv.optim.L2 data_fidelity: :class:`deepinv.optim.L2` if ``None``.
    :param int max_iter: largest number of outer iterations.
    :param float rtol: tolerance of the solver, for attentive priors on the imbalance of
        forces; ``None``: what suits the equation.
    :param str, SolverOptions solver: name of a method, or all settings of the solver.
    :param str slices: which slices of a volume are regularized, see
        :class:`deepinv_deal.models.ReconstructionModel`.
    :param deepinv.optim.DEQConfig DEQ: settings of the backward pass in deepinv's
        words: ``jacobian_free``, ``eps_backward`` (tolerance), ``max_iter_backward``,
        ``anderson_acceleration_backward`` and ``history_size_backward``; ``None``:
        exact gradients.
    :param list trainable_params: among ``"lambda_reg"`` and ``"g_param"``.
    :param Callable custom_init: as in :class:`deepinv.optim.BaseOptim`; zeros if
        ``None``.
    :param dict custom_metrics: as in :class:`deepinv.optim.BaseOptim`.
    :param bool warn: issue a :class:`ConvergenceWarning` if a sample does not converge.
    :param bool strict: raise a :class:`ConvergenceError` instead, also in the
        backward pass.
    :param bool show_progress_bar: show a progress bar of the iterations; on terminals
        if ``None``.
    """

    def __init__(
        self,
        prior: Prior,
        *,
        lambda_reg: float | Tensor | None = None,
        sigma: float | Tensor | None = None,
        data_fidelity: L2 | None = None,
        max_iter: int = 100,
        rtol: float | None = None,
        solver: str | SolverOptions = "auto",
        slices: SliceMode = "depth",
        DEQ: DEQConfig | None = None,
        trainable_params: list[str] | None = None,
        custom_init: Callable[..., Any] | None = None,
        custom_metrics: dict[str, Any] | None = None,
        warn: bool = True,
        strict: bool = False,
        show_progress_bar: bool | None = False,
    ):
        if DEQ is not None and not isinstance(DEQ, DEQConfig):
            raise TypeError(f"DEQ must be a DEQConfig, got {type(DEQ).__name__}.")
        values = {"lambda_reg": lambda_reg, "g_param": sigma}
        for name in trainable_params or []:
            if name not in values:
                raise ValueError(
                    f"trainable_params must be among {list(values)}, got {name!r}."
                )
            if values[name] is None:
                raise ValueError(
                    f"trainable_params holds {name!r}, but it has no value to start "
                    f"from: give {name.replace('g_param', 'sigma')}."
                )
        super().__init__(
            FrozenIteration(solver=solver, slices=slices),
            # One-element lists: a tensor is one value (or one per sample), not a
            # schedule.
            params_algo={"lambda": [lambda_reg], "g_param": [sigma], "stepsize": [1.0]},
            data_fidelity=data_fidelity or L2(),
            prior=prior,
            max_iter=max_iter,
            thres_conv=DEFAULT_RTOL if rtol is None else rtol,
            early_stop=True,
            DEQ=DEQ or DEQConfig(),
            # A copy, since BaseOptim renames entries in place.
            trainable_params=list(trainable_params or []),
            custom_init=custom_init,
            custom_metrics=custom_metrics,
            get_output=_image_of,
            show_progress_bar=show_progress_bar,
        )
        # deepinv would ask every iterate for its cost; MMR has an energy of its own.
        self.has_cost = self.fixed_point.iterator.has_cost = False
        # deepinv's metric object holds a local function and cannot be pickled.
        del self.psnr
        self.rtol, self.warn, self.strict = rtol, warn, strict
        self.adjoint = _adjoint_options(DEQ).made_strict(strict)

    @property
    def lambda_reg(self) -> float | Tensor | None:
        """The regularization weight of the constructor."""
        return self.init_params_algo["lambda"][0]

    @property
    def sigma(self) -> float | Tensor | None:
        """The noise level of the constructor."""
        return self.init_params_algo["g_param"][0]

    def equation(
        self,
        y: Tensor,
        physics: Any,
        *,
        sigma: float | Tensor | None = None,
        lambda_reg: float | Tensor | None = None,
    ) -> Any:
        """
        Returns the equation of one reconstruction problem.

        :param torch.Tensor y: measurements.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        :param float, torch.Tensor sigma: noise level instead of the constructor's.
        :param float, torch.Tensor lambda_reg: weight instead of the constructor's.
        """
        self.params_algo = self.init_params_algo.copy()
        params = self.update_params_fn(0)
        if sigma is not None:
            params["g_param"] = sigma
        if lambda_reg is not None:
            params["lambda"] = lambda_reg
        if params["g_param"] is None and self.update_prior_fn(0).needs_sigma:
            raise ValueError(
                "sigma is missing: give the noise level of the prior, in [0, 1] "
                "units, to "
                "the constructor or to the call."
            )
        return self.fixed_point.iterator.equation(
            self.update_data_fidelity_fn(0), self.update_prior_fn(0), params, y, physics
        )

    @eager
    @full_precision
    def forward(
        self,
        y: Tensor,
        physics: Any,
        init: Any = None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        return_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        r"""
        Solves the reconstruction problem.

        :param torch.Tensor y: measurements.
        :param deepinv.physics.LinearPhysics physics: forward operator.
        :param Callable, torch.Tensor, tuple, dict init: first image, as in
            :class:`deepinv.optim.BaseOptim`; zeros if ``None``.
        :param torch.Tensor x_gt: ground truth for the metrics.
        :param bool compute_metrics: also return the dictionary of metrics.
        :param bool return_info: also return the :class:`SolverResult`.
        :param kwargs: ``sigma`` and ``lambda_reg``, see :meth:`equation`.
        :return: the image, followed by metrics and info where asked for.
        """
        equation = self.equation(y, physics, **kwargs)
        start = equation.start(self._initial_image(equation, y, physics, init))
        data, metrics = equation.data, None

        def seen(unknown: Tensor) -> Tensor:
            return data.channels(equation.image(unknown))

        if compute_metrics:
            first = seen(start.detach())
            if x_gt is not None:
                x_gt = data.channels(data.unknown("x_gt", x_gt))
            metrics = IterationMetrics(first, x_gt, self.custom_metrics)

        def observe(_k: int, before: Tensor, after: Tensor) -> None:
            assert metrics is not None
            metrics.observe(seen(before), seen(after))

        watched, name = observe if metrics is not None else None, type(self).__name__
        with iterations_shown(watched, self.show_progress_bar, name) as observer:
            unknown, result = equation.solve(
                start,
                rtol=self.rtol,
                max_iter=self.max_iter,
                adjoint=self.adjoint,
                callback=observer,
            )
        self.has_converged = bool(result.converged.all())
        if self.warn or self.strict:
            result.report(
                name,
                equation.default_rtol if self.rtol is None else self.rtol,
                "The image is the best iterate found. Raise max_iter, or relax rtol.",
                strict=self.strict,
            )
        answer: tuple[Any, ...] = (equation.data.image(equation.image(unknown)),)
        if metrics is not None:
            answer = (*answer, metrics.finish(result))
        if return_info:
            answer = (*answer, result)
        return answer if len(answer) > 1 else answer[0]

    def _initial_image(
        self, equation: Any, y: Tensor, physics: Any, init: Any
    ) -> Tensor | None:
        """Returns the first image from ``init`` or ``custom_init``, or ``None``."""
        if init is None and self.custom_init is None:
            return None
        image = self.init_iterate_fn(y, physics, init=init)["est"][0]
        return equation.data.unknown("init", image)


def _adjoint_options(config: DEQConfig | None) -> AdjointOptions:
    """Returns the settings of the backward pass from deepinv's words."""
    if config is None:
        return AdjointOptions()
    accelerated = config.anderson_acceleration_backward
    return AdjointOptions(
        jacobian_free=config.jacobian_free,
        rtol=config.eps_backward,
        max_iter=config.max_iter_backward,
        anderson=config.history_size_backward if accelerated else 0,
    )


def _image_of(X: dict[str, Any]) -> Tensor:
    return X["est"][0]
