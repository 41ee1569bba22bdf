"""
What ``comparison.py`` compares: this package's models and what deepinv offers instead.

Each method has one free parameter, so that all can be tuned alike. It is the noise
level that the method is told, divided by the true one, for denoising; else a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import deepinv as dinv
import numpy as np
import torch
from deepinv.models import Denoiser, Reconstructor
from deepinv.optim import DPIR, HQS, L2, BaseOptim, PnP, Prior, WaveletPrior
from deepinv.physics import MRI, LinearPhysics
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from deepinv_deal import DEAL, MMR, SAFI, PatchSynthesis, SmoothPlusSparse
from deepinv_deal.evaluation import Adjoint, Task, TotalVariation
from deepinv_deal.models import ReconstructionModel, SynthesisModel
from deepinv_deal.solvers import Status

#: Noise level that learned regularizers are told in other problems than denoising.
LEVEL = 15 / 255

#: How much larger thresholds of two steps are than those of a minimiser, see the guide.
TWO_STEPS = 40

#: Relative change at which gradient and splitting methods stop, as in TotalVariation.
CHANGE = 1e-4

#: Relative decrease of the objective at which L-BFGS stops.
DECREASE = 1e-6

#: Largest number of iterations of both.
LIMIT = 300


class Solution(NamedTuple):
    """
    A reconstruction, and how it went.

    :param torch.Tensor x: image.
    :param int n_iter: (outer) iterations, ``None`` without an iteration.
    :param bool converged: whether a tolerance was met, ``None`` if there is none.
    """

    x: Tensor
    n_iter: int | None = None
    converged: bool | None = None


class Method(Reconstructor):
    """
    A method with one free parameter.

    :param float start: where the search for it starts.
    :param float spread: first factor of the search.
    :param bool tuned: whether there is a parameter at all.
    :param float noise: noise level in denoising, of which the parameter is then a
        factor, so that the search starts at 1; else ``None``.
    """

    def __init__(
        self,
        start: float = 1.0,
        spread: float = 2.5,
        tuned: bool = True,
        noise: float | None = None,
    ):
        super().__init__()
        self.start, self.spread = (1.0, 1.3) if noise else (start, spread)
        self.tuned, self.noise = tuned, noise

    def solve(self, y: Tensor, physics: LinearPhysics, weight: float) -> Solution:
        raise NotImplementedError

    def forward(
        self, y: Tensor, physics: LinearPhysics, lambda_reg: float, **_: Any
    ) -> Tensor:
        return self.solve(y, physics, float(lambda_reg)).x


# -- this package ------------------------------------------------------------------


class Ours(Method):
    """
    A model of this package.

    :param ReconstructionModel model: the model.
    :param float noise: noise level of the data in denoising, else ``None``.
    """

    def __init__(self, model: ReconstructionModel, noise: float | None, start: float):
        super().__init__(start, noise=noise)
        self.model = model

    def arguments(self, weight: float) -> dict[str, float]:
        if self.noise:
            return {"sigma": weight * self.noise}
        if isinstance(self.model, PatchSynthesis):
            # Its weights are those of two steps; a minimiser needs smaller thresholds.
            base = self.model.prior.lambda_reg.item() / TWO_STEPS
            return {"lambda_reg": base, "beta": weight}
        if isinstance(self.model, SynthesisModel):
            return {"sigma": LEVEL, "beta": weight}
        if not isinstance(self.model, DEAL):
            weight = weight * self.model.prior.lambda_reg.item()
            return {"lambda_reg": weight}
        return {"sigma": LEVEL, "lambda_reg": weight}

    def solve(self, y: Tensor, physics: LinearPhysics, weight: float) -> Solution:
        arguments = self.arguments(weight)
        x, info = self.model(y, physics, return_info=True, **arguments)
        passes = bool((info.status == Status.FINISHED).all())  # a fixed number of them
        converged = None if passes else bool(info.converged.all())
        return Solution(x, int(info.n_iter.max()), converged)


# -- deepinv -------------------------------------------------------------------------


def real_part(physics: LinearPhysics) -> LinearPhysics:
    """Returns a physics of images with one channel: that of MRI for real images."""
    if not isinstance(physics, MRI):
        return physics
    return LinearPhysics(
        A=lambda x, **_: physics.A(torch.cat([x, torch.zeros_like(x)], 1)),
        A_adjoint=lambda y, **_: physics.A_adjoint(y)[:, :1],
        max_iter=100,
        tol=1e-5,
    )


def counted(solver: BaseOptim, y: Tensor, physics: LinearPhysics) -> Solution:
    """Runs one of deepinv's algorithms and counts its iterations."""
    steps: list[None] = []
    step = solver.fixed_point.iterator
    hook = step.register_forward_hook(lambda *_: steps.append(None))
    x = solver(y, physics)
    hook.remove()
    stops = solver.fixed_point.early_stop
    return Solution(x, len(steps), bool(solver.has_converged) if stops else None)


class Nothing(Method):
    """The adjoint, which is the noisy or zero-filled image; filtered for tomography."""

    def __init__(self) -> None:
        super().__init__(tuned=False)

    def solve(self, y: Tensor, physics: LinearPhysics, weight: float) -> Solution:  # noqa: ARG002
        if isinstance(physics, dinv.physics.Tomography):
            return Solution(physics.A_dagger(y))
        return Solution(Adjoint()(y, physics))


class Proximal(Method):
    r"""
    A prior with a proximal map, by deepinv's FISTA; :math:`\lambda` is free.

    :param TotalVariation model: makes the algorithm.
    """

    def __init__(self, model: TotalVariation, start: float, spread: float = 2.5):
        super().__init__(start, spread)
        self.model = model

    def solve(self, y: Tensor, physics: LinearPhysics, weight: float) -> Solution:
        physics = real_part(physics)
        return counted(self.model.solver(y, physics, weight), y, physics)


class _Wavelets(WaveletPrior):
    """deepinv's prior without a factor of its own."""

    def prox(self, x: Tensor, *args: Any, gamma: Any = 1.0, **_: Any) -> Tensor:
        return super().prox(x, *args, ths=1.0, gamma=gamma)


class Wavelets(TotalVariation):
    """The l1 norm of two wavelet transforms instead of total variation."""

    def prior(self) -> Prior:
        return _Wavelets(level=3, wv=["haar", "db4"], mode="reflect")


class Denoise(Method):
    """
    A denoiser: by itself, or in deepinv's plug-and-play method DPIR.

    DPIR's parameter is the noise level, from which all its others follow.
    """

    def __init__(self, denoiser: Denoiser, noise: float | None):
        super().__init__(STARTS["BM3D"], noise=noise)
        self.denoiser = denoiser

    def solve(self, y: Tensor, physics: LinearPhysics, weight: float) -> Solution:
        if self.noise:
            return Solution(self.denoiser(y, weight * self.noise))
        return counted(DPIR(weight, self.denoiser), y, real_part(physics))


class SplitDenoiser(Method):
    r"""
    A denoiser of one noise level: rescaled, or in deepinv's half-quadratic splitting.

    The noise level of the denoiser is that of its training; the step :math:`\gamma` of
    the data term is free.
    """

    def __init__(self, denoiser: Denoiser, level: float, noise: float | None):
        super().__init__(STARTS["DnCNN"], noise=noise)
        self.denoiser, self.level = denoiser, level

    def solve(self, y: Tensor, physics: LinearPhysics, weight: float) -> Solution:
        if self.noise:
            a = weight * self.noise / self.level
            return Solution(a * self.denoiser(y / a))
        solver = HQS(
            data_fidelity=L2(),
            prior=PnP(self.denoiser),
            stepsize=weight,
            max_iter=LIMIT,
            early_stop=True,
            thres_conv=CHANGE,
        )
        return counted(solver, y, real_part(physics))


class RidgeRegularizer(torch.nn.Module):
    r"""
    A convex (CRR) or weakly convex (WCRR) ridge regularizer.

    .. math::
        \nabla R(x) = a \, W^\top \varphi(W x / a), \qquad
        \varphi(t) = e^\alpha \tfrac1s
        \big( \mathrm{clip}(e^\beta s t) - c \, \mathrm{clip}(s t) \big)

    with clipping to [-1, 1], :math:`c = 0` (convex) or 1, :math:`\|W\| = 1`, learned
    scales :math:`s`, and :math:`a` the noise level relative to that of the training.

    :param dict state: tensors of a file of johertrich/LearnedRegularizers.
    :param float concave: the number :math:`c`.
    """

    #: Noise level of the training.
    level = 0.1

    def __init__(self, state: dict[str, Tensor], concave: float):
        super().__init__()
        name = "regularizer.filters.0.parametrizations.weight.original"
        first = state[name]
        self.kernels = [
            first - first.mean((1, 2, 3), keepdim=True),
            state["regularizer.filters.1.weight"],
            state["regularizer.filters.2.weight"],
        ]
        self.concave = concave
        self.inner = (state["regularizer.scaling"] + state["scale"]).exp()
        self.slope = state["regularizer.beta"].exp()
        self.factor = state["alpha"].exp()
        side = sum(k.shape[-1] - 1 for k in self.kernels) + 1
        dirac = torch.zeros(1, 1, 2 * side - 1, 2 * side - 1)
        dirac[0, 0, side - 1, side - 1] = 1
        response = self.adjoint(self.apply_filters(dirac))
        self.norm = float(torch.fft.fft2(response, s=[256, 256]).abs().max()) ** 0.5

    def apply_filters(self, x: Tensor) -> Tensor:
        for kernel in self.kernels:
            x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        return x

    def adjoint(self, z: Tensor) -> Tensor:
        for kernel in reversed(self.kernels):
            z = F.conv_transpose2d(z, kernel, padding=kernel.shape[-1] // 2)
        return z

    def value_and_grad(self, x: Tensor, a: float) -> tuple[Tensor, Tensor]:
        """Returns the sum of the values of a batch, and the gradients."""
        t = self.inner * self.apply_filters(x / a) / self.norm
        convex, concave = (self.slope * t).clamp(-1, 1), t.clamp(-1, 1)
        # Huber's function of t is c (t - c / 2), where c is t clipped.
        value = convex * (t - convex / self.slope / 2)
        value = value - self.concave * concave * (t - concave / 2)
        z = (convex - self.concave * concave) / self.inner
        gradient = a * self.factor * self.adjoint(z) / self.norm
        return a**2 * self.factor * (value / self.inner**2).double().sum(), gradient


class Ridge(Method):
    r"""
    A ridge regularizer, by SciPy's L-BFGS; :math:`\lambda` is free.

    The slopes are steep near zero, which makes the steps of gradient methods short.
    """

    def __init__(self, regularizer: RidgeRegularizer, noise: float | None):
        super().__init__(STARTS["WCRR"], noise=noise)
        self.regularizer = regularizer

    def solve(self, y: Tensor, physics: LinearPhysics, weight: float) -> Solution:
        physics = real_part(physics)
        level = weight * self.noise if self.noise else LEVEL
        weight = 1.0 if self.noise else weight
        start = physics.A_adjoint(y)

        def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
            x = torch.from_numpy(values).float().view_as(start)
            residual = physics.A(x) - y
            value, slope = self.regularizer.value_and_grad(
                x, level / self.regularizer.level
            )
            value = residual.double().square().sum() / 2 + weight * value
            slope = physics.A_adjoint(residual) + weight * slope
            return float(value), slope.double().numpy().ravel()

        result = minimize(
            objective,
            start.double().numpy().ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": LIMIT, "ftol": DECREASE, "gtol": 0.0},
        )
        x = torch.from_numpy(result.x).float().view_as(start)
        return Solution(x, result.nit, bool(result.success))


def read_dncnn(path: Path) -> Denoiser:
    """Reads DnCNN's kernels ``w0`` and biases ``b0`` and so on; it predicts noise."""
    arrays = np.load(path)
    depth = len(arrays.files) // 2
    model = dinv.models.DnCNN(1, 1, depth=depth, pretrained=None)
    layers = [model.in_conv, *model.conv_list, model.out_conv]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            sign = -1 if i == depth - 1 else 1  # deepinv adds what is predicted
            layer.weight.copy_(sign * torch.from_numpy(arrays[f"w{i}"]))
            layer.bias.copy_(sign * torch.from_numpy(arrays[f"b{i}"]))
    return model.eval()


# -- all of them ---------------------------------------------------------------------

#: Names of the rows: this package's, then others.
OURS = ("DEAL", "DEAL, 128 filters", "SAFI", "MMR", "CPR", "NCPR", "PatchSynthesis")
OTHERS = ("adjoint or FBP", "TV", "wavelets", "BM3D", "CRR", "WCRR", "DnCNN")

#: Where weights are given: the files of others, and what is left out without them.
FILES = {
    "CRR": "lr_crr_bilevel_ift.pt",
    "WCRR": "lr_wcrr_bilevel_ift.pt",
    "DnCNN": "dncnn_gray_sigma25.npz",
}


def nearest(noise: float | None, levels: tuple[int, ...]) -> int:
    """The level of the weights: that of the data, or :data:`LEVEL`."""
    wanted = 255 * (noise or LEVEL)
    return min(levels, key=lambda level: abs(np.log(level / wanted)))


def make_methods(
    task: Task, baselines: Path | None
) -> tuple[dict[str, Callable[[], Method]], list[str]]:
    """
    Returns makers of all methods for a task, by name, and what is left out and why.

    :param Task task: with one condition.
    :param pathlib.Path baselines: folder with the weights of others, if there is one.
    """
    told = task.conditions[0].noise / 255 if task.sigma is None else None
    options: dict[str, Any] = {"warn": False}
    if task.mri:
        options["complex_mode"] = "real"
    fine, coarse = nearest(told, (5, 15, 25)), nearest(told, (5, 25))

    def ours(kind: Any, pretrained: str, start: float) -> Callable[[], Method]:
        return lambda: Ours(kind(pretrained=pretrained, **options), told, start)

    def proximal(
        name: str, kind: type[TotalVariation], relative: float
    ) -> Callable[[], Method]:
        if told:
            return lambda: Proximal(kind(), relative * told, 1.3)
        return lambda: Proximal(kind(), STARTS[name])

    methods: dict[str, Callable[[], Method]] = {
        "DEAL": ours(DEAL, "deal_gray", STARTS["DEAL"]),
        "DEAL, 128 filters": ours(DEAL, "deal_gray_128", STARTS["DEAL"]),
        "SAFI": ours(SAFI, f"safi_{fine}", STARTS["SAFI"]),
        "MMR": ours(MMR, f"mmr_{fine}", STARTS["MMR"]),
        "CPR": ours(SmoothPlusSparse, f"cpr_{coarse}", STARTS["CPR"]),
        "NCPR": ours(SmoothPlusSparse, f"ncpr_{coarse}", STARTS["NCPR"]),
        "PatchSynthesis": ours(PatchSynthesis, "patch_25", STARTS["PatchSynthesis"]),
        "adjoint or FBP": Nothing,
        "TV": proximal("TV", TotalVariation, 0.8),
    }
    missing = []
    if find_spec("ptwt"):
        methods["wavelets"] = proximal("wavelets", Wavelets, 1.5)
    else:
        missing.append("wavelets (pip install ptwt)")
    if find_spec("bm3d"):
        methods["BM3D"] = lambda: Denoise(dinv.models.BM3D(), told)
    else:
        missing.append("BM3D (pip install bm3d)")

    def given(name: str) -> Path | None:
        path = None if baselines is None else baselines / FILES[name]
        if path is not None and path.is_file():
            return path
        where = "--baselines" if baselines is None else str(baselines)
        missing.append(f"{name} ({FILES[name]} is not given by {where})")
        return None

    for name, concave in (("CRR", 0.0), ("WCRR", 1.0)):
        if path := given(name):
            state = torch.load(path, map_location="cpu", weights_only=True)
            regularizer = RidgeRegularizer(state, concave)
            methods[name] = lambda r=regularizer: Ridge(r, told)  # type: ignore[misc]
    if path := given("DnCNN"):
        network = read_dncnn(path)
        methods["DnCNN"] = lambda: SplitDenoiser(network, 25 / 255, told)
    return methods, missing


#: Where the search for the weight starts in other problems than denoising; for SAFI and
#: MMR relative to the learned weight.
STARTS = {
    "DEAL": 0.1, "SAFI": 0.03, "MMR": 0.03, "CPR": 0.02, "NCPR": 0.02,
    "PatchSynthesis": 0.02, "TV": 0.01, "wavelets": 0.01, "BM3D": 0.02, "CRR": 0.05,
    "WCRR": 0.05, "DnCNN": 10.0,
}  # fmt: skip
