"""Learned synthesis dictionaries: reconstruction models and denoisers in one."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from deepinv_deal.models.base import ReconstructionModel
from deepinv_deal.models.info import ReconstructionInfo, SynthesisInfo
from deepinv_deal.operators.patches import Boundary
from deepinv_deal.priors import PatchSynthesisPrior, SmoothPlusSparsePrior
from deepinv_deal.priors.patches import Mean, PatchPrior, PenaltyName, check_mean
from deepinv_deal.problems import DataTerm, Problem
from deepinv_deal.problems.checks import per_sample
from deepinv_deal.problems.dictionary import DICTIONARY_ADJOINT
from deepinv_deal.problems.likelihood_term import LikelihoodTerm
from deepinv_deal.solvers import SolverResult
from deepinv_deal.weights import load


class SynthesisModel(ReconstructionModel):
    """
    What the two dictionary models share; use these.

    :param PatchPrior prior: the learned prior.
    :param float, torch.Tensor beta: default coupling; the learned one if ``None``.
    :param float rtol: tolerance of the method; ``None``: what suits it.
    :param int max_iter: largest number of iterations; ``None``: what suits the model.
    :param object settings: see :class:`ReconstructionModel`.
    """

    prior: PatchPrior
    default_rtol = None
    default_adjoint = DICTIONARY_ADJOINT
    info_type = SynthesisInfo
    hyperparameters = ("beta",)
    advice = "The image is the last iterate. Raise max_iter, or relax rtol."

    def __init__(
        self,
        prior: PatchPrior,
        *,
        beta: float | Tensor | None = None,
        rtol: float | None = None,
        max_iter: int | None = None,
        **settings: Any,
    ):
        super().__init__(prior, rtol=rtol, max_iter=max_iter, **settings)
        self._keep("beta", beta, [])
        if self.lambda_mode == "relative":
            raise ValueError(
                "lambda_mode='relative' is for weights; lambda_reg of a dictionary is "
                "a threshold of its coefficients, which does not grow with the physics."
                " Multiply beta by the squared norm instead."
            )
        if self.solver.method == "two-step" and (rtol, max_iter) != (None, None):
            raise ValueError(
                "solver='two-step' runs two passes: neither rtol nor max_iter changes "
                "them. Leave these out, or use solver='coordinate-descent'."
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

    def _learned_weight(self, data: DataTerm) -> float | None:  # noqa: ARG002
        return None

    def _default_level(self, data: DataTerm) -> Tensor | None:
        return self.prior.sigma.to(data.b).expand(len(data.b))

    def _weight(
        self,
        lambda_reg: float | Tensor | None,
        data: DataTerm,
        level: Tensor | None,  # noqa: ARG002 - dictionaries have no unit
        unit: Tensor | None,  # noqa: ARG002
    ) -> Tensor | None:
        # A threshold, which does not grow with the data term.
        lambda_reg = self.lambda_reg if lambda_reg is None else lambda_reg
        if lambda_reg is None:
            return None
        return per_sample("lambda_reg", lambda_reg, data.b, positive=True)

    def _equation(self, data: DataTerm, *, beta: Any = None, **settings: Any) -> Any:
        beta = self.beta if beta is None else beta
        if isinstance(data, LikelihoodTerm) and (beta is None or data.relative):
            # The learned weight is that of least squares.
            data = data.normalized(learned=beta is None)
        coupling = self.default_beta if beta is None else beta
        coupling = per_sample("beta", coupling, data.b, positive=True)
        sigma = per_sample("sigma", settings.pop("sigma"), data.b, positive=True)
        return super()._equation(data, sigma=sigma, beta=coupling, **settings)

    def _used_rtol(self, problem: Problem, rtol: float | None) -> float:
        fixed = problem.equation.method == "two-step"
        return problem.equation.default_rtol if rtol is None or fixed else rtol

    def _info(
        self,
        problem: Problem,
        unknown: Tensor,  # noqa: ARG002 - the result holds it
        result: SolverResult,
        **more: Any,
    ) -> ReconstructionInfo:
        equation, coefficients = problem.equation, result.state[0].detach()
        with torch.no_grad():
            objective = equation.problem.objective(result.x, coefficients)
        return SynthesisInfo.of(
            result,
            beta=equation.beta.detach(),
            solver=equation.method,
            coefficients=coefficients,
            objective=objective,
            in_a_row=problem.data.mean_slices is not None,
            **self._report(problem),
            **more,
        )


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
    the physics by implicit differentiation; a pixel at a bound has none. **Complex
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
    :param SmoothPlusSparsePrior prior: use this prior instead of ``pretrained``.
    :param str pretrained: ``"cpr_5"``, ``"cpr_25"``, ``"ncpr_5"`` or ``"ncpr_25"``
        (bundled, for as many gray levels of noise), the authors' own with
        ``"download_"`` before (needs network), path of a ``.safetensors`` file of this
        package or of a ``.pth`` file of the authors, or ``None`` for random weights.
    :param object settings: see :class:`ReconstructionModel`; and ``beta``, the default
        coupling, the learned one if ``None``. ``rtol`` is a tolerance of the method;
        ``None``: ``3e-3`` for ``"admm"``, else ``1e-4``, as published.
    :raises ValueError: for bad settings or a checkpoint of another model.
    :raises FileNotFoundError: for a missing checkpoint.
    """

    default_max_iter = 2000

    def __init__(
        self,
        penalty: PenaltyName = "group",
        num_atoms: int = 200,
        patch_size: int = 13,
        num_free_atoms: int = 120,
        *,
        order: float = 1.8,
        prior: SmoothPlusSparsePrior | None = None,
        pretrained: str | os.PathLike[str] | None = None,
        **settings: Any,
    ):
        if prior is None and pretrained is None:
            prior = SmoothPlusSparsePrior(
                penalty, num_atoms, patch_size, num_free_atoms, order=order
            )
        elif prior is None and pretrained is not None:
            prior = load(pretrained, SmoothPlusSparsePrior)
        assert prior is not None
        super().__init__(prior, **settings)


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
    :param PatchSynthesisPrior prior: use this prior instead of ``pretrained``.
    :param str pretrained: ``"patch_25"`` (bundled, for noise of 25 gray levels),
        ``"download_5"``, ``"download_25"``, ``"download_5++"`` or ``"download_25++"``
        (the authors' own, needs network), path of a ``.safetensors`` file of this
        package or of a ``.pth`` file of the authors, or ``None`` for random weights.
    :param object settings: see :class:`ReconstructionModel`; and ``beta``, the default
        coupling, the learned one if ``None``. ``rtol`` is a tolerance of the method;
        ``None``: ``3e-3`` for ``"admm"``, else ``1e-4``, as published.
    :raises ValueError: for bad settings or a checkpoint of another model.
    :raises FileNotFoundError: for a missing checkpoint.
    """

    default_max_iter = 5000

    def __init__(
        self,
        num_atoms: int = 128,
        patch_size: int = 10,
        boundary: Boundary = "valid",
        *,
        mean: Mean | None = None,
        prior: PatchSynthesisPrior | None = None,
        pretrained: str | os.PathLike[str] | None = None,
        **settings: Any,
    ):
        if prior is None and pretrained is None:
            prior = PatchSynthesisPrior(num_atoms, patch_size, boundary=boundary)
        elif prior is None and pretrained is not None:
            prior = load(pretrained, PatchSynthesisPrior)
        assert prior is not None
        if mean is not None:
            check_mean(mean, prior.dictionary.boundary)
        super().__init__(prior, **settings)
        self.mean = mean

    def _equation(self, data: DataTerm, *, beta: Any = None, **settings: Any) -> Any:
        return super()._equation(data, beta=beta, mean=self.mean, **settings)
