"""The recipe that trains DEAL: one resumable loop."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from deepinv_deal.models.deal import DEAL
from deepinv_deal.operators.multi_conv import Normalization
from deepinv_deal.priors import DEALPrior
from deepinv_deal.solvers import (
    AdjointOptions,
    FrozenProblem,
    attach_gradient,
    fixed_point,
)
from deepinv_deal.training.data import (
    DenoisingSampler,
    Problems,
    load_images,
    numbered_generator,
)
from deepinv_deal.training.losses import deal_loss
from deepinv_deal.weights import load_prior, save_prior

#: Noise levels at which validation is reported.
VALIDATION_SIGMAS = (5 / 255, 15 / 255, 25 / 255)


@dataclass
class DEALRecipe:
    r"""
    All settings of a training run.

    The recipe follows :footcite:t:`pourya2025dealing`, Section 3.2, with changes that
    suit a short training. Every noisy patch is used ``reuse`` times, in
    steps far apart, and the solver starts from the patch's last solution, so that a few
    iterations find the fixed point of the slightly changed weights. And the errors are
    weighted by :math:`(\sigma / \sigma_{\max} + 0.1)^{-b}`, so that low noise counts in
    a short training. The published scheme is ``reuse=1, pool=1, balance=0,
    drift=1e-4, depth_min=15, depth_max=60, batch_size=16, patch_size=128, lr=5e-4,
    lr_final=4e-4, rtol=5e-4``, then a second phase, which starts from the weights of
    the first by ``init``.

    :param str data: folder of training images.
    :param str out: folder for checkpoints, log and weights.
    :param str val: folder of validation images; the last 5 % of ``data`` if ``None``.
    :param int in_channels: 1 (gray) or 3 (colour).
    :param int num_filters: number of filters.
    :param str normalization: norm rule of the filters.
    :param int steps: number of optimizer steps; ``None``: limited by ``time_budget``.
    :param float time_budget: training time in seconds over all resumed runs. The
        learning rate then follows the clock.
    :param int batch_size: patches per step.
    :param int patch_size: side of the patches.
    :param float sigma_max: largest noise level ([0, 1] units).
    :param float skew: noise levels are :math:`\sigma_{\max} u^{\text{skew}}` with
        :math:`u` uniform in [0, 1]. 1: uniform, as published; larger: more low noise.
    :param float lr: learning rate after the warm-up.
    :param float lr_final: learning rate at the end of the cosine.
    :param int warmup: number of warm-up steps.
    :param str init: weights to start from, as :class:`deepinv_deal.DEAL` names them
        (bundled name or path); ``None``: random.
    :param float gamma: weight of the splines' second-order total variation in the loss.
    :param float drift: weight of the change of the mask in the last iteration. The
        published weight is too small to matter; a larger one makes the iteration
        contract.
    :param float balance: exponent :math:`b` of the weights of the noise levels. At
        1.75 all levels have about the same share in the loss.
    :param int depth_min: fewest outer iterations on a new problem.
    :param int depth_max: most outer iterations on a new problem.
    :param int reuse: number of steps that use the same noisy patch.
    :param int pool: number of batches in rotation; a batch comes back after ``pool``
        steps.
    :param int warm_depth_min: fewest outer iterations on a problem used before.
    :param int warm_depth_max: most outer iterations on a problem used before.
    :param float rtol: tolerance (imbalance of forces) at which the iteration stops.
    :param float adjoint_rtol: tolerance of the backward pass.
    :param bool jacobian_free: Jacobian-free (published) or exact gradients.
    :param float clip: largest norm of the gradient.
    :param int val_every: steps between two validations.
    :param int val_images: number of validation images used.
    :param int val_size: side of their centre crops.
    :param float checkpoint_every: seconds between two checkpoints.
    :param int seed: seed of everything random.
    :param str device: ``"cpu"``, ``"cuda"``, ...
    """

    data: str
    out: str
    val: str | None = None
    in_channels: int = 1
    num_filters: int = 128
    normalization: Normalization = "published"
    steps: int | None = None
    time_budget: float | None = None
    batch_size: int = 2
    patch_size: int = 80
    sigma_max: float = 50 / 255
    skew: float = 1.0
    lr: float = 2e-3
    lr_final: float = 1e-6
    warmup: int = 200
    init: str | None = None
    gamma: float = 1e-4
    drift: float = 0.3
    balance: float = 1.75
    depth_min: int = 6
    depth_max: int = 14
    reuse: int = 8
    pool: int = 128
    warm_depth_min: int = 1
    warm_depth_max: int = 3
    rtol: float = 5e-3
    adjoint_rtol: float = 0.1
    jacobian_free: bool = True
    clip: float = 1.0
    val_every: int = 1000
    val_images: int = 8
    val_size: int = 128
    checkpoint_every: float = 60.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steps is None and self.time_budget is None:
            raise ValueError("Give steps or time_budget: neither limits the training.")
        for name in ("steps", "time_budget"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if not self.skew > 0:
            raise ValueError(f"skew must be positive, got {self.skew}.")
        for name in ("batch_size", "patch_size", "num_filters", "reuse", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )


class DEALTrainer:
    """
    Trains a :class:`deepinv_deal.priors.DEALPrior` by a :class:`DEALRecipe`.

    The folder ``recipe.out`` receives ``state.pt`` (everything needed to go on exactly
    where the last checkpoint was written), ``log.jsonl`` (one line per validation) and
    ``best.safetensors`` (weights with the best mean validation PSNR, loadable with
    ``DEAL(pretrained=path)``) and, at the end, ``last.safetensors``. All files are
    replaced atomically.

    :param DEALRecipe recipe: settings.
    :param bool resume: go on from ``state.pt`` if there is one.
    :raises FileNotFoundError: for a missing data folder.
    :raises ValueError: if ``state.pt`` belongs to other settings.
    """

    def __init__(self, recipe: DEALRecipe, *, resume: bool = True):
        self.recipe, self.device = recipe, torch.device(recipe.device)
        self.out = Path(recipe.out)
        self.out.mkdir(parents=True, exist_ok=True)
        images = load_images(recipe.data, recipe.in_channels)
        if recipe.val is None:
            held_out = max(1, len(images) // 20)
            if len(images) == 1:
                raise ValueError(
                    "data holds a single image, so none is left to validate on: give "
                    "val, a folder of validation images."
                )
            images, validation = images[:-held_out], images[-held_out:]
        else:
            validation = load_images(recipe.val, recipe.in_channels)
        self.sampler = DenoisingSampler(
            images, recipe.patch_size, recipe.sigma_max, recipe.seed, recipe.skew
        )
        self.validation = _validation_problems(validation, recipe)
        with _seeded(recipe.seed):
            prior = DEALPrior(
                recipe.in_channels, recipe.num_filters, recipe.normalization
            )
        resume = resume and self.state_path.exists()
        if recipe.init is not None and not resume:
            prior = _start_from(recipe.init, prior)
        self.prior = prior.to(self.device)
        # kappa counts gray levels, of order 1 to 30, all else is of order 0.01 to 1.
        kappa = list(self.prior.kappa.parameters())
        others = [p for p in self.prior.parameters() if all(p is not k for k in kappa)]
        self.optimizer = torch.optim.Adam(
            [{"params": others, "factor": 1.0}, {"params": kappa, "factor": 10.0}],
            lr=recipe.lr,
        )
        self.step, self.elapsed, self.best = 0, 0.0, -math.inf
        self.pool: dict[int, tuple[Problems, Tensor]] = {}
        if resume:
            self._load()

    @property
    def state_path(self) -> Path:
        """The file from which training resumes."""
        return self.out / "state.pt"

    def train(self) -> float:
        """
        Trains until the steps or the time are used up.

        :return: best mean validation PSNR in dB.
        :raises FloatingPointError: if the loss is not finite; the last good weights and
            checkpoint are kept.
        """
        recipe = self.recipe
        start = last_save = time.monotonic()
        offset = self.elapsed
        bar = tqdm(total=recipe.steps, initial=self.step, unit="step", disable=None)
        losses: list[float] = []
        while self._progress() < 1:
            loss = self._train_step()
            losses.append(loss)
            self.step += 1
            self.elapsed = offset + time.monotonic() - start
            bar.update()
            bar.set_postfix(loss=f"{loss:.3g}", best=f"{self.best:.2f} dB")
            if self.step % recipe.val_every == 0 or self._progress() >= 1:
                self._validate(sum(losses) / len(losses))
                losses.clear()
                self.elapsed = offset + time.monotonic() - start
            if time.monotonic() - last_save > recipe.checkpoint_every:
                self.save()
                last_save = time.monotonic()
        bar.close()
        self.save()
        save_prior(self.prior, self.out / "last.safetensors")
        return self.best

    def _progress(self) -> float:
        """Fraction of the training that is done."""
        recipe = self.recipe
        by_steps = self.step / recipe.steps if recipe.steps else 0.0
        by_time = self.elapsed / recipe.time_budget if recipe.time_budget else 0.0
        return max(by_steps, by_time)

    def _learning_rate(self) -> float:
        recipe = self.recipe
        cosine = 0.5 * (1 + math.cos(math.pi * min(self._progress(), 1.0)))
        warm = min(1.0, (self.step + 1) / max(recipe.warmup, 1))
        return warm * (recipe.lr_final + (recipe.lr - recipe.lr_final) * cosine)

    def _problems(self) -> tuple[int, Problems, Tensor, int]:
        """Returns the slot, its problems, where to start, and how many iterations."""
        recipe = self.recipe
        rng = numbered_generator(recipe.seed, self.step)
        slot, visit = self.step % recipe.pool, self.step // recipe.pool
        # Offset by the slot, so that new problems are spread evenly over the steps.
        low, high = recipe.warm_depth_min, recipe.warm_depth_max
        if slot in self.pool and (visit + slot) % recipe.reuse:
            problems, start = self.pool[slot]
        else:
            problems = self.sampler.batch(self.step, recipe.batch_size).to(self.device)
            start = torch.zeros_like(problems.y)
            # Fixed points of the first, random weights are not worth finding.
            if visit > 0 or recipe.pool == 1:
                low, high = recipe.depth_min, recipe.depth_max
        depth = int(torch.randint(low, high + 1, (), generator=rng))
        return slot, problems, start, depth

    def _train_step(self) -> float:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * self._learning_rate()
        slot, problems, start, depth = self._problems()
        equation = self.prior.equation(_identity, problems.y, problems.sigma)
        squared_masks: list[Tensor] = []

        def freeze(x: Tensor) -> FrozenProblem:
            problem = equation.freeze(x)
            squared_masks[:-1] = []  # keep the last two
            squared_masks.append(problem.squared_mask)
            return problem

        with torch.no_grad():
            result = fixed_point(freeze, start, rtol=recipe.rtol, max_iter=depth)
        mask = equation.regularizer.mask(result.x)
        options = AdjointOptions(recipe.jacobian_free, recipe.adjoint_rtol)
        x_hat = attach_gradient(
            equation, result.x, options, residual=equation(result.x, mask)
        )
        weights = (problems.sigma / recipe.sigma_max + 0.1) ** -recipe.balance
        loss = deal_loss(
            x_hat,
            problems.x,
            mask,
            squared_masks[0].sqrt(),
            self.prior.splines(),
            gamma=recipe.gamma,
            drift=recipe.drift,
            weights=weights,
        )
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {float(loss.detach())} at step {self.step}. The last "
                "checkpoint and the best weights are kept; lower lr or clip and start "
                "again."
            )
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.prior.parameters(), recipe.clip)
        if not torch.isfinite(norm):  # one step would make the weights and states NaN
            raise FloatingPointError(
                f"The gradient is not finite at step {self.step}. The last checkpoint "
                "and the best weights are kept; lower lr or clip and start again."
            )
        self.optimizer.step()
        self.pool[slot] = (problems, result.x)
        return float(loss.detach())

    def _validate(self, loss: float) -> None:
        psnr = {}
        n_iter, converged = [], []
        model = DEAL(pretrained=None, prior=self.prior, warn=False, scale=None)
        for sigma, problems in self.validation:
            scores = []
            for x, y in problems:
                with torch.no_grad():
                    x_hat, info = model(
                        y.to(self.device), sigma=sigma, return_info=True
                    )
                mse = (x_hat.cpu().clamp(0, 1) - x).square().mean()
                scores.append(-10 * math.log10(float(mse)))
                n_iter.append(float(info.n_iter.double().mean()))
                converged.append(float(info.converged.double().mean()))
            psnr[f"{255 * sigma:g}"] = sum(scores) / len(scores)
        mean = sum(psnr.values()) / len(psnr)
        entry = {
            "step": self.step,
            "seconds": round(self.elapsed, 1),
            "lr": self._learning_rate(),
            "loss": loss,
            "psnr": {k: round(v, 4) for k, v in psnr.items()},
            "psnr_mean": round(mean, 4),
            "n_iter": round(sum(n_iter) / len(n_iter), 2),
            "converged": round(sum(converged) / len(converged), 3),
        }
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        tqdm.write(json.dumps(entry))
        if mean > self.best:
            self.best = mean
            save_prior(
                self.prior, self.out / "best.safetensors", {"log": json.dumps(entry)}
            )

    def save(self) -> None:
        """Writes ``state.pt``, atomically."""
        state = {
            "recipe": _comparable(self.recipe),
            "prior": self.prior.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "best": self.best,
            "pool": {
                slot: (p.x, p.y, p.sigma, start)
                for slot, (p, start) in self.pool.items()
            },
        }
        temporary = self.state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.state_path)

    def _load(self) -> None:
        state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        ours = _comparable(self.recipe)
        # Settings that are newer than the file had their default.
        defaults = {f.name: f.default for f in fields(DEALRecipe)}
        theirs = {**{k: defaults[k] for k in ours}, **state["recipe"]}
        differing = sorted(k for k in ours if theirs[k] != ours[k])
        if differing:
            changes = ", ".join(f"{k}: {theirs[k]} -> {ours[k]}" for k in differing)
            raise ValueError(
                f"{self.state_path} was written with other settings ({changes}). Use "
                "the "
                "same settings to resume, or another folder to start anew."
            )
        self.prior.load_state_dict(state["prior"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.best = state["best"]
        self.pool = {
            slot: (Problems(x, y, sigma), start)
            for slot, (x, y, sigma, start) in state["pool"].items()
        }


#: Settings that may change between a run and its continuation.
_FREE_SETTINGS = {
    "out",
    "data",
    "val",
    "device",
    "checkpoint_every",
    "time_budget",
    "val_every",
}


def _comparable(recipe: DEALRecipe) -> dict[str, Any]:
    values = asdict(recipe)
    return {
        f.name: values[f.name] for f in fields(recipe) if f.name not in _FREE_SETTINGS
    }


def _identity(x: Tensor) -> Tensor:
    return x


def _validation_problems(
    images: list[Tensor], recipe: DEALRecipe
) -> list[tuple[float, list[tuple[Tensor, Tensor]]]]:
    """Centre crops with fixed noise, for every validation noise level."""
    problems = []
    for sigma in VALIDATION_SIGMAS:
        rng = torch.Generator().manual_seed(recipe.seed)
        pairs = []
        for image in images[: recipe.val_images]:
            h, w = (min(n, recipe.val_size) for n in image.shape[-2:])
            top, left = (image.shape[-2] - h) // 2, (image.shape[-1] - w) // 2
            x = image[None, :, top : top + h, left : left + w].float() / 255
            pairs.append((x, x + sigma * torch.randn(x.shape, generator=rng)))
        problems.append((sigma, pairs))
    return problems


def _start_from(pretrained: str, expected: DEALPrior) -> DEALPrior:
    """Loads the weights to start from, and checks that the recipe describes them."""
    prior = load_prior(pretrained)
    for name in ("in_channels", "num_filters", "normalization"):
        theirs, ours = (_description(p)[name] for p in (prior, expected))
        if theirs != ours:
            raise ValueError(
                f"init={pretrained!r} has {name}={theirs!r}, the recipe says {ours!r}. "
                f"Set {name} to {theirs!r}, or start from other weights."
            )
    return prior


def _description(prior: DEALPrior) -> dict[str, Any]:
    return {
        "in_channels": prior.in_channels,
        "num_filters": prior.num_filters,
        "normalization": prior.W.normalization,
    }


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the initialisation without touching the caller's random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
