r"""deepinv's optimizer interface to the fixed-point engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from deepinv.loss.metric import PSNR
from deepinv.optim import BaseOptim, DEQConfig, OptimIterator
from deepinv.optim.data_fidelity import L2, DataFidelity
from deepinv.optim.prior import Prior
from deepinv.physics import Denoising
from torch import Tensor

from deepinv_deal.priors.attentive_l1 import AttentiveL1Equation
from deepinv_deal.priors.attentive_quadratic import AttentiveEquation
from deepinv_deal.priors.preconditioning import PRECONDITIONERS, Preconditioner
from deepinv_deal.solvers import (
    AdjointOptions,
    SolverResult,
    attach_gradient,
    full_precision,
    implicit_solution,
    solve_equation,
)

#: The equation of any prior of this package.
AnyEquation = AttentiveEquation | AttentiveL1Equation

#: Tolerance on the imbalance of forces. In denoising it is the share of the removed
#: noise that is still uncertain.
DEFAULT_RTOL = 2e-2

#: Precisions of the convolutions in inner solves; ``None``: that of the weights.
INNER_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32)

#: Settings of the backward pass if none are given: exact gradients, Anderson
#: accelerated.
DEFAULT_DEQ = DEQConfig(
    anderson_acceleration_backward=True, eps_backward=1e-4, max_iter_backward=100
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
    :param int inner_max_iter: largest number of inner iterations.
    :param str preconditioner: ``"auto"``, ``"circulant"``, ``"diagonal"``, ``"none"``.
    :param torch.dtype inner_dtype: precision of the convolutions in the inner solves of
        :class:`FixedPointOptim`; this iteration itself is in that of the weights.
    """

    def __init__(
        self,
        rtol: float = 1e-6,
        inner_max_iter: int = 1000,
        preconditioner: Preconditioner = "none",
        inner_dtype: torch.dtype | None = None,
    ):
        super().__init__(has_cost=False)
        self.rtol, self.inner_max_iter = rtol, inner_max_iter
        self.preconditioner, self.inner_dtype = preconditioner, inner_dtype

    def equation(
        self,
        data_fidelity: DataFidelity,
        prior: Prior,
        params: dict[str, Any],
        y: Tensor,
        physics: Any,
    ) -> AnyEquation:
        """
        Returns the equation that the fixed points of the iteration solve.

        :param deepinv.optim.DataFidelity data_fidelity: :class:`deepinv.optim.L2`.
        :param deepinv.optim.Prior prior: a prior of this package.
        :param dict params: with entries ``"lambda"`` (``None``: the prior's own) and
            ``"g_param"``, the noise level of the prior.
        :param torch.Tensor y: measurements.
        :param deepinv.physics.LinearPhysics physics: forward operator.
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
        settings: dict[str, Any] = {"inner_max_iter": self.inner_max_iter}
        if getattr(prior, "quadratic", False):
            settings["preconditioner"] = self.preconditioner
        elif self.inner_dtype is not None:
            raise ValueError(
                f"inner_dtype={self.inner_dtype} is for quadratic priors such as "
                f"DEALPrior, not for {type(prior).__name__}."
            )
        equation = prior.equation(
            physics.A_adjoint_A,
            physics.A_adjoint(y),
            params["g_param"],
            lambda_reg,
            **settings,
        )
        if isinstance(equation, AttentiveEquation):
            identity = getattr(physics, "denoising", isinstance(physics, Denoising))
            equation = replace(
                equation, inner_dtype=self.inner_dtype, denoising=identity
            )
        return equation

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
        x = X["est"][0]
        equation = self.equation(cur_data_fidelity, cur_prior, cur_params, y, physics)
        if not isinstance(equation, AttentiveEquation):
            raise TypeError(
                f"FrozenIteration runs quadratic priors, got {type(cur_prior).__name__}"
                ", whose iterates are pairs. Use FixedPointOptim."
            )
        equation = equation.precise  # a single solve, which nobody corrects
        with torch.no_grad():
            problem = equation.freeze(x)
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
        return {"est": (z, z), "cost": None}

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

    :param deepinv.optim.Prior prior: a prior of this package.
    :param float, torch.Tensor lambda_reg: regularization weight; ``None``: the prior's
        own.
    :param float, torch.Tensor sigma: noise level of the prior in [0, 1] units.
    :param deepinv.optim.L2 data_fidelity: :class:`deepinv.optim.L2` if ``None``.
    :param int max_iter: largest number of outer iterations.
    :param int inner_max_iter: largest number of conjugate gradient iterations per
        solve.
    :param float rtol: tolerance on the imbalance of forces, see
        :class:`deepinv_deal.priors.AttentiveEquation`.
    :param str preconditioner: ``"auto"``, ``"circulant"``, ``"diagonal"``, ``"none"``,
        see :class:`deepinv_deal.priors.preconditioning.Preconditioning`.
    :param torch.dtype inner_dtype: precision of the convolutions in the inner solves,
        see :class:`deepinv_deal.DEAL`; ``None``: that of the weights.
    :param float forcing: see :func:`deepinv_deal.solvers.fixed_point`.
    :param int anderson: depth of the Anderson acceleration, ``0`` for none; ``None``: 5
        with a quadratic prior, otherwise none.
    :param deepinv.optim.DEQConfig DEQ: settings of the backward pass:
        ``jacobian_free``, ``eps_backward`` (tolerance), ``max_iter_backward``,
        ``anderson_acceleration_backward`` and ``history_size_backward``.
    :param list trainable_params: among ``"lambda_reg"`` and ``"g_param"``.
    :param Callable custom_init: as in :class:`deepinv.optim.BaseOptim`; zeros if
        ``None``.
    :param dict custom_metrics: as in :class:`deepinv.optim.BaseOptim`.
    :param bool warn: issue a :class:`ConvergenceWarning` if a sample does not converge.
    :param bool strict: raise a :class:`ConvergenceError` instead, also in the
        backward pass.
    """

    def __init__(
        self,
        prior: Prior,
        *,
        lambda_reg: float | Tensor | None = None,
        sigma: float | Tensor | None = None,
        data_fidelity: L2 | None = None,
        max_iter: int = 100,
        inner_max_iter: int = 1000,
        rtol: float = DEFAULT_RTOL,
        forcing: float = 0.5,
        anderson: int | None = None,
        preconditioner: Preconditioner = "auto",
        inner_dtype: torch.dtype | None = None,
        DEQ: DEQConfig = DEFAULT_DEQ,
        trainable_params: list[str] | None = None,
        custom_init: Callable[..., Any] | None = None,
        custom_metrics: dict[str, Any] | None = None,
        warn: bool = True,
        strict: bool = False,
    ):
        if not isinstance(DEQ, DEQConfig):
            raise TypeError(f"DEQ must be a DEQConfig, got {type(DEQ).__name__}.")
        if inner_max_iter < 1:
            raise ValueError(f"inner_max_iter must be positive, got {inner_max_iter}.")
        if preconditioner not in PRECONDITIONERS:
            raise ValueError(
                f"preconditioner must be one of {PRECONDITIONERS}, got "
                f"{preconditioner!r}."
            )
        if inner_dtype not in INNER_DTYPES:
            raise ValueError(
                f"inner_dtype must be one of {INNER_DTYPES}, got {inner_dtype!r}."
            )
        if anderson and not getattr(prior, "quadratic", False):
            raise ValueError(
                f"anderson={anderson} needs a prior whose frozen problems are linear "
                f"systems, as DEALPrior; {type(prior).__name__} is none. Leave it out."
            )
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
            FrozenIteration(
                inner_max_iter=inner_max_iter,
                preconditioner=preconditioner,
                inner_dtype=inner_dtype,
            ),
            # One-element lists: a tensor is one value (or one per sample), not a
            # schedule.
            params_algo={"lambda": [lambda_reg], "g_param": [sigma], "stepsize": [1.0]},
            data_fidelity=data_fidelity or L2(),
            prior=prior,
            max_iter=max_iter,
            thres_conv=rtol,
            early_stop=True,
            DEQ=DEQ,
            # A copy, since BaseOptim renames entries in place.
            trainable_params=list(trainable_params or []),
            custom_init=custom_init,
            custom_metrics=custom_metrics,
            get_output=_image_of,
        )
        # deepinv would ask every iterate for its cost; MMR has an energy of its own.
        self.has_cost = self.fixed_point.iterator.has_cost = False
        # deepinv's metric object holds a local function and cannot be pickled.
        del self.psnr
        self.psnr: Callable[..., Tensor] = _psnr
        self.rtol, self.forcing, self.anderson = rtol, forcing, anderson
        self.warn, self.strict = warn, strict

    @property
    def adjoint_options(self) -> AdjointOptions:
        """The settings of the backward pass, from ``DEQ``."""
        config = self.DEQ_config
        return AdjointOptions(
            jacobian_free=config.jacobian_free,
            rtol=config.eps_backward,
            max_iter=config.max_iter_backward,
            anderson=config.history_size_backward
            if config.anderson_acceleration_backward
            else 0,
            strict=self.strict,
        )

    def equation(
        self,
        y: Tensor,
        physics: Any,
        *,
        sigma: float | Tensor | None = None,
        lambda_reg: float | Tensor | None = None,
    ) -> AnyEquation:
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

    def DEQ_additional_step(
        self, X: dict[str, Any], y: Tensor, physics: Any, **kwargs: Any
    ) -> Tensor:
        """Attaches implicit gradients to the fixed point in ``X``."""
        return attach_gradient(
            self.equation(y, physics, **kwargs), X["est"][0], self.adjoint_options
        )

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
        x0 = self.initial_image(equation, y, physics, init)
        x, result, metrics = self.solve(equation, x0, x_gt, compute_metrics)
        answer: tuple[Any, ...] = (x, *([metrics] if compute_metrics else []))
        if return_info:
            answer = (*answer, result)
        return answer if len(answer) > 1 else x

    def initial_image(
        self, equation: AnyEquation, y: Tensor, physics: Any, init: Any
    ) -> Tensor | None:
        """Returns the first image from ``init`` or ``custom_init``, or ``None``."""
        if init is None and self.custom_init is None:
            return None
        x = self.init_iterate_fn(y, physics, init=init)["est"][0]
        if x.shape != equation.b.shape:
            raise ValueError(
                f"init must give an image of shape {tuple(equation.b.shape)}, got "
                f"{tuple(x.shape)}."
            )
        return x

    def solve(
        self,
        equation: AnyEquation,
        init: Tensor | None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        callback: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, SolverResult, dict[str, Any] | None]:
        """
        Solves an equation with the settings of this optimizer.

        :param object equation: from :meth:`equation`.
        :param torch.Tensor init: first image, shape ``(B, C, H, W)``; ``None``: the
            equation's own.
        :param torch.Tensor x_gt: ground truth for the metrics.
        :param bool compute_metrics: whether to record metrics.
        :param Callable callback: called with the first and every further unknown.
        :return: solution with implicit gradients, solver result, metrics or ``None``.
        """
        with torch.no_grad():
            start = equation.start(init)
        metrics: dict[str, Any] | None = None
        if compute_metrics:
            metrics = self.init_metrics_fn({"est": (equation.image(start),)}, x_gt=x_gt)

        if callback is not None:
            callback(start)

        def observe(_k: int, previous: Tensor, x: Tensor) -> None:
            if compute_metrics:
                before, after = ({"est": (equation.image(p),)} for p in (previous, x))
                self.update_metrics_fn(metrics, before, after, x_gt)
            if callback is not None:
                callback(x)

        iterate, result = solve_equation(
            equation,
            start,
            rtol=self.rtol,
            max_iter=self.max_iter,
            forcing=self.forcing,
            anderson=self.anderson,
            callback=observe if compute_metrics or callback is not None else None,
            adjoint=self.adjoint_options,
        )
        self.has_converged = bool(result.converged.all())
        if self.warn or self.strict:
            result.report(
                type(self).__name__,
                self.rtol,
                "The image is the best iterate found. Raise max_iter, or relax rtol.",
                strict=self.strict,
                stacklevel=7,  # the caller of the module
            )
        if metrics is not None:
            metrics["nonlinear_residual"] = result.history.T.tolist()
        return equation.image(iterate), result, metrics


def _image_of(X: dict[str, Any]) -> Tensor:
    return X["est"][0]


def _psnr(x: Tensor, x_gt: Tensor) -> Tensor:
    return PSNR()(x, x_gt)
