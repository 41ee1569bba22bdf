"""
The settings of all trainings.

The options of ``deepinv-deal train`` are made from them, so importing this module
imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from deepinv_deal.operators.multi_conv import Normalization
    from deepinv_deal.priors.patches import Mean

#: Noise levels at which validation of DEAL is reported.
DEAL_VALIDATION_SIGMAS = (5 / 255, 15 / 255, 25 / 255)

#: Accuracy of dictionaries by model: tolerance of the solver, its iterations on a new
#: batch and on one used before. A weakly convex model that is trained with few
#: iterations learns to be good after these, and is useless at its minimum.
DICTIONARY_ACCURACY = {
    "cpr": (3e-3, 50, 10),
    "ncpr": (2e-4, 150, 40),
    "patch": (3e-3, 50, 10),
}


@dataclass
class Recipe:
    r"""
    Settings that all trainings have.

    Every noisy patch is used ``reuse`` times, in steps far apart, and the solver starts
    from the patch's last solution, so that a few iterations find the fixed point of the
    slightly changed weights.

    :param str data: folder of training images.
    :param str out: folder for checkpoints, log and weights.
    :param str val: folder of validation images; the last 5 % of ``data`` if ``None``.
    :param int steps: number of optimizer steps; ``None``: limited by ``time_budget``.
    :param float time_budget: training time in seconds over all resumed runs. The
        learning rate then follows the clock.
    :param int batch_size: patches per step.
    :param int patch_size: side of the patches.
    :param float lr: learning rate after the warm-up.
    :param float lr_final: learning rate at the end of the cosine.
    :param int warmup: number of warm-up steps; at most a tenth of the training.
    :param str init: weights to start from, as the model's ``pretrained`` names them
        (bundled name or path), which are validated first; ``None``: random.
    :param int reuse: number of steps that use the same noisy patch.
    :param int pool: number of batches in rotation; a batch comes back after ``pool``
        steps.
    :param float rtol: tolerance at which the solver stops.
    :param float adjoint_rtol: tolerance of the backward pass.
    :param float clip: largest norm of the gradient.
    :param int val_every: steps between two validations.
    :param int val_images: number of validation images used.
    :param int val_size: side of their centre crops.
    :param float checkpoint_every: seconds between two checkpoints; at most a tenth of
        ``time_budget``.
    :param int seed: seed of everything random.
    :param str device: ``"cpu"``, ``"cuda"``, ...
    :param bool tf32: on NVIDIA's GPUs, let the steps of the training (not the
        validations) round to TF32, which is several times faster.
    """

    data: str
    out: str
    val: str | None = None
    steps: int | None = None
    time_budget: float | None = None
    batch_size: int = 2
    patch_size: int = 80
    lr: float = 2e-3
    lr_final: float = 1e-6
    warmup: int = 200
    init: str | None = None
    reuse: int = 8
    pool: int = 128
    rtol: float = 5e-3
    adjoint_rtol: float = 0.1
    clip: float = 1.0
    val_every: int = 1000
    val_images: int = 8
    val_size: int = 128
    checkpoint_every: float = 60.0
    seed: int = 0
    device: str = "cpu"
    tf32: bool = True

    #: Settings that must not be negative or zero.
    positive: ClassVar[tuple[str, ...]] = (
        "steps",
        "time_budget",
        "batch_size",
        "patch_size",
        "reuse",
        "pool",
        "val_every",
        "val_images",
        "val_size",
    )

    #: Settings that may be zero, but not negative.
    nonnegative: ClassVar[tuple[str, ...]] = ()

    #: Settings that are noise levels.
    levels: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.steps is None and self.time_budget is None:
            raise ValueError("Give steps or time_budget: neither limits the training.")
        for name in self.positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        for name in self.nonnegative:
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        for name in self.levels:
            value = getattr(self, name)
            if value is not None and value >= 1:
                raise ValueError(
                    f"{name} must be below 1, since images are in [0, 1], got {value}. "
                    "For 25 gray levels give 25 / 255 = 0.098."
                )

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return 1

    @property
    def noise(self) -> tuple[float, float]:
        """Largest noise level and skew of :class:`DenoisingSampler`."""
        raise NotImplementedError

    @property
    def validation_sigmas(self) -> Sequence[float]:
        """Noise levels at which validation is reported, in [0, 1] units."""
        raise NotImplementedError


@dataclass
class SingleLevelRecipe(Recipe):
    """
    Settings of the trainings at one noise level.

    :param float sigma: noise level of images in [0, 1]; 0.098 for 25 gray levels.
    """

    sigma: float = 25 / 255

    positive: ClassVar[tuple[str, ...]] = (*Recipe.positive, "sigma")

    levels: ClassVar[tuple[str, ...]] = ("sigma",)

    @property
    def noise(self) -> tuple[float, float]:
        """Largest noise level and skew of :class:`DenoisingSampler`."""
        return self.sigma, 0.0

    @property
    def validation_sigmas(self) -> Sequence[float]:
        """Noise levels at which validation is reported, in [0, 1] units."""
        return (self.sigma,)


@dataclass
class DEALRecipe(Recipe):
    r"""
    All settings of a training of DEAL.

    The recipe follows :footcite:t:`pourya2025dealing`, Section 3.2, with changes that
    suit a short training: noisy patches are used again, see :class:`Recipe`, and the
    errors are weighted by :math:`(\sigma / \sigma_{\max} + 0.1)^{-b}`, so that low
    noise counts. The published scheme is ``reuse=1, pool=1, balance=0, drift=1e-4,
    depth_min=15, depth_max=60, batch_size=16, patch_size=128, lr=5e-4, lr_final=4e-4,
    rtol=5e-4``, then a second phase, which starts from the weights of the first by
    ``init``. Further settings are those of :class:`Recipe`; ``rtol`` is the imbalance
    of forces at which the iteration stops.

    :param int in_channels: 1 (gray) or 3 (colour).
    :param int num_filters: number of filters. If the weights of ``init`` have fewer,
        new ones are added, see :func:`grow`; if they are for gray images and
        ``in_channels`` is 3, three times as many are best, see
        :func:`color_from_gray`.
    :param str normalization: norm rule of the filters.
    :param float sigma_max: largest noise level ([0, 1] units).
    :param float skew: noise levels are :math:`\sigma_{\max} u^{\text{skew}}` with
        :math:`u` uniform in [0, 1]. 1: uniform, as published; larger: more low noise.
    :param float gamma: weight of the splines' second-order total variation in the loss.
    :param float drift: weight of the change of the mask in the last iteration. The
        published weight is too small to matter; a larger one makes the iteration
        contract.
    :param float balance: exponent :math:`b` of the weights of the noise levels. At
        1.75 all levels have about the same share in the loss.
    :param int depth_min: fewest outer iterations on a new problem.
    :param int depth_max: most outer iterations on a new problem.
    :param int warm_depth_min: fewest outer iterations on a problem used before.
    :param int warm_depth_max: most outer iterations on a problem used before.
    :param bool jacobian_free: Jacobian-free (published) or exact gradients.
    :param bool logarithmic: train by the logarithm of every patch's error, that is by
        the mean PSNR, instead of the weighted squared errors; ``balance`` is not used.
    """

    in_channels: int = 1
    num_filters: int = 128
    normalization: Normalization = "published"
    sigma_max: float = 50 / 255
    skew: float = 1.0
    gamma: float = 1e-4
    drift: float = 0.3
    balance: float = 1.75
    depth_min: int = 6
    depth_max: int = 14
    warm_depth_min: int = 1
    warm_depth_max: int = 3
    jacobian_free: bool = True
    logarithmic: bool = False

    positive: ClassVar[tuple[str, ...]] = (
        *Recipe.positive,
        "num_filters",
        "sigma_max",
        "skew",
    )

    nonnegative: ClassVar[tuple[str, ...]] = ("gamma", "drift")

    levels: ClassVar[tuple[str, ...]] = ("sigma_max",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for prefix in ("", "warm_"):
            name, largest = f"{prefix}depth_min", f"{prefix}depth_max"
            low, high = getattr(self, name), getattr(self, largest)
            if not 1 <= low <= high:
                raise ValueError(
                    f"{name} must be from 1 to {largest}={high}, got {low}."
                )

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.in_channels

    @property
    def noise(self) -> tuple[float, float]:
        """Largest noise level and skew of :class:`DenoisingSampler`."""
        return self.sigma_max, self.skew

    @property
    def validation_sigmas(self) -> Sequence[float]:
        """Noise levels at which validation is reported, in [0, 1] units."""
        return DEAL_VALIDATION_SIGMAS


@dataclass
class AttentiveL1Recipe(SingleLevelRecipe):
    r"""
    All settings of a training of :class:`deepinv_deal.SAFI` or
    :class:`deepinv_deal.MMR` as a denoiser at one noise level.

    As published (:footcite:t:`pourya2024iteratively`), the squared error on patches of
    40 x 40 pixels is minimised. Instead of unrolling all iterations, the fixed point is
    differentiated implicitly; and instead of random filters, training starts from those
    of the discrete cosine transform, with which both models denoise from the first
    step. Further settings are those of :class:`SingleLevelRecipe` and :class:`Recipe`.
    The weight :math:`\lambda` is trained too, and chosen anew at the end, on the
    validation images, by :func:`deepinv_deal.tune`.

    :param int patch_size: side of the patches.
    :param int batch_size: patches per step.
    :param float lr: learning rate after the warm-up, of kernels with one input channel.
        A tenth of it is for those with many, whose many small gradients are mostly
        noise; five times for splines and scales, which are of order 1, and a hundredth
        for :math:`\lambda`, which is of order 0.01.
    :param float rtol: tolerance (imbalance of forces) at which the iteration stops.
    :param float adjoint_smoothing: how far absolute values are rounded off for the
        derivative, see :class:`deepinv_deal.solvers.AdjointOptions`.
    :param str init: weights to start from, as the model's ``pretrained`` names them
        (bundled name or path); ``None``: the discrete cosine transform.
    :param float init_sigma: noise level that those were trained for; ``None``: the one
        that they know. They are rescaled, see ``SAFIPrior.rescale``.
    :param int reuse: how often each noisy batch is used. The solver goes on where it
        was, so that one mask and a few inner iterations per step are enough.
    :param int pool: number of batches in rotation; a batch comes back after ``pool``
        steps.
    :param str model: ``"safi"`` or ``"mmr"``.
    :param int num_filters: number of filters.
    :param int depth: most outer iterations on a new batch.
    :param int warm_depth: most outer iterations on a batch used before.
    :param int inner_max_iter: most inner iterations in each of them, and of the
        backward pass.
    :param bool jacobian_free: Jacobian-free or exact gradients.
    :param float drift: weight of the change of the mask in the last iteration, see
        :func:`deepinv_deal.training.mask_drift`. With 0, training ends with masks that
        take many iterations to settle; with much more, quality may be lost. MMR has
        borne ten times as much. Errors are small where the noise is weak, so it weighs
        more there: at 5 gray levels, a twentieth of it was better.
    """

    patch_size: int = 40
    batch_size: int = 4
    lr: float = 1e-3
    rtol: float = 2e-2
    adjoint_smoothing: float = 0.1
    init: str | None = None
    init_sigma: float | None = None
    reuse: int = 16
    pool: int = 64

    model: Literal["safi", "mmr"] = "safi"
    num_filters: int = 64
    depth: int = 3
    warm_depth: int = 1
    inner_max_iter: int = 15
    jacobian_free: bool = True
    drift: float = 0.02

    positive: ClassVar[tuple[str, ...]] = (
        *SingleLevelRecipe.positive,
        "init_sigma",
        "num_filters",
        "depth",
        "warm_depth",
        "inner_max_iter",
    )

    nonnegative: ClassVar[tuple[str, ...]] = ("drift",)

    levels: ClassVar[tuple[str, ...]] = (*SingleLevelRecipe.levels, "init_sigma")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in ("safi", "mmr"):
            raise ValueError(f"model must be 'safi' or 'mmr', got {self.model!r}.")
        if self.init_sigma is not None and self.init is None:
            raise ValueError(
                f"init_sigma={self.init_sigma} says what the weights of init were "
                "trained for, but init is not given."
            )


@dataclass
class DictionaryRecipe(SingleLevelRecipe):
    r"""
    All settings of a training of :class:`deepinv_deal.SmoothPlusSparse` or
    :class:`deepinv_deal.PatchSynthesis` as a denoiser at one noise level.

    As published (:footcite:t:`ducotterd2024smooth,ducotterd2024convex`), the mean
    absolute error on patches of 40 x 40 pixels is minimised, by implicit
    differentiation; the convex model takes two passes of coordinate descent, and its
    threshold is chosen anew at the end. Further settings are those of :class:`Recipe`.

    :param int patch_size: side of the patches.
    :param int batch_size: patches per step.
    :param float lr: learning rate of the atoms after the warm-up.
    :param float clip: largest norm of the gradient.
    :param float adjoint_rtol: tolerance of the backward pass. Most of the time of a
        step is spent there, and rough gradients do.
    :param float rtol: tolerance at which the solver stops; for ``"patch"`` that of the
        coefficients in each of the two passes. ``None``: 3e-3, for ``"ncpr"`` 2e-4.
    :param int pool: number of batches in rotation; a batch comes back after ``pool``
        steps.
    :param int reuse: number of steps that use the same noisy patch.
    :param str init: weights to start from, as the model's ``pretrained`` names them
        (bundled name or path); those of the other penalty or of another noise level
        give their atoms only. ``None``: random.
    :param str model: ``"cpr"``, ``"ncpr"`` or ``"patch"``, the convex model.
    :param int num_atoms: number of atoms; ``None``: as published, 200 or, for
        ``"patch"``, 128.
    :param int atom_size: rows (and columns) of the atoms; ``None``: as published, 13
        or 10.
    :param int num_free_atoms: number of free atoms, not for ``"patch"``.
    :param float beta: first coupling; ``None``: as published.
    :param float lambda_reg: base of the thresholds; ``None``: as published.
    :param float order: exponent of the penalty of ``"ncpr"``; ``None``: as published.
    :param str mean: of ``"patch"``, see :class:`deepinv_deal.PatchSynthesis`. Fixed
        means denoise better, free ones ("++" in the paper) are for inverse problems.
    :param int max_iter: most iterations of the solver on a new batch; ``None``: 50, for
        ``"ncpr"`` 150.
    :param int warm_max_iter: most iterations on a batch used before; ``None``: 10, for
        ``"ncpr"`` 40.
    """

    patch_size: int = 40
    batch_size: int = 4
    lr: float = 2e-3
    clip: float = 0.1
    adjoint_rtol: float = 0.3
    rtol: float | None = None  # type: ignore[assignment]
    pool: int = 32
    reuse: int = 4
    init: str | None = None

    model: Literal["cpr", "ncpr", "patch"] = "cpr"
    num_atoms: int | None = None
    atom_size: int | None = None
    num_free_atoms: int = 120
    beta: float | None = None
    lambda_reg: float | None = None
    order: float | None = None
    mean: Mean = "fixed"
    max_iter: int | None = None
    warm_max_iter: int | None = None

    positive: ClassVar[tuple[str, ...]] = (
        *SingleLevelRecipe.positive,
        "num_atoms",
        "atom_size",
        "beta",
        "lambda_reg",
        "max_iter",
        "warm_max_iter",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in ("cpr", "ncpr", "patch"):
            raise ValueError(
                f"model must be 'cpr', 'ncpr' or 'patch', got {self.model!r}."
            )
        from deepinv_deal.priors.patches import check_mean

        check_mean(self.mean, "valid")

    def accuracy(self, new: bool) -> tuple[float, int]:
        """Returns the solver's tolerance and most iterations, on a new batch or not."""
        rtol, many, few = DICTIONARY_ACCURACY[self.model]
        most = self.max_iter if new else self.warm_max_iter
        return (
            rtol if self.rtol is None else self.rtol,
            (many if new else few) if most is None else most,
        )
