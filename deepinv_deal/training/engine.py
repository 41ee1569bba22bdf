"""The training loop that all recipes share: resumable, validated, limited in time."""

from __future__ import annotations

import json
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from deepinv.models import Reconstructor
from torch import Tensor, nn
from tqdm import tqdm

from deepinv_deal._atomic import replacing
from deepinv_deal._warnings import warn
from deepinv_deal.files import load_image_folder, load_images
from deepinv_deal.priors import Configurable
from deepinv_deal.solvers import ConvergenceWarning
from deepinv_deal.solvers.precision import rough_solvers, tf32_convolutions
from deepinv_deal.training.checkpoint import read_checkpoint, write_checkpoint
from deepinv_deal.training.curve import CURVE, LOG, plot_learning_curve
from deepinv_deal.training.data import (
    DenoisingSampler,
    Prefetched,
    Problems,
    fingerprint,
    noisy_crops,
)
from deepinv_deal.training.processes import Processes
from deepinv_deal.training.recipes import Recipe
from deepinv_deal.tuning import tune
from deepinv_deal.weights import load, save
from deepinv_deal.weights.files import read_header

#: Seconds between two lines on the progress, where there is no progress bar.
TELL_EVERY = 300.0

R = TypeVar("R", bound=Recipe)
P = TypeVar("P", bound=nn.Module)


class Trainer(ABC, Generic[R, P]):
    """
    Trains the prior of a model by a recipe.

    The folder ``recipe.out`` receives ``state.pt`` (everything needed to go on exactly
    where the last checkpoint was written), ``log.jsonl`` (one line per validation),
    ``curve.png`` (a picture of it, :func:`plot_learning_curve`) and
    ``best.safetensors`` (weights with the best mean validation PSNR, loadable with
    ``pretrained=path``) and, at the end, ``last.safetensors``. All files are replaced
    atomically.

    If torch.distributed is initialised, every process takes its part of each batch, and
    the gradients are averaged: ``torchrun --nproc-per-node 2 -m deepinv_deal train
    ...``. The first process writes the files.

    :param Recipe recipe: settings.
    :param bool resume: go on from ``state.pt`` if there is one.
    :raises FileNotFoundError: for a missing data folder.
    :raises ValueError: if ``state.pt`` belongs to other settings or other images, or
        the batches cannot be divided among the processes.
    """

    def __init__(self, recipe: R, *, resume: bool = True):
        self.recipe, self.device = recipe, torch.device(recipe.device)
        self.processes = Processes.current()
        if recipe.batch_size % self.processes.number:
            raise ValueError(
                f"batch_size={recipe.batch_size} cannot be divided among "
                f"{self.processes.number} processes. Choose a multiple."
            )
        self.out = Path(recipe.out)
        self.out.mkdir(parents=True, exist_ok=True)
        own = self.out / CURVE  # no image to train on
        loaded = load_image_folder(recipe.data, recipe.channels, leave_out=own)
        names, images = ([*column] for column in zip(*loaded, strict=True))
        if recipe.val is None:
            held_out = max(1, len(images) // 20)
            if len(images) == 1:
                raise ValueError(
                    "data holds a single image, so none is left to validate on: give "
                    "val, a folder of validation images."
                )
            images, validation = images[:-held_out], images[-held_out:]
        else:
            validation = load_images(recipe.val, recipe.channels, leave_out=own)
        #: What training and validation images are, so that a change is noticed.
        self.seen = {"data": fingerprint(images), "val": fingerprint(validation)}
        sigma_max, skew = recipe.noise
        self.sampler = DenoisingSampler(
            images, recipe.patch_size, sigma_max, recipe.seed, skew, names
        )
        self.batches = Prefetched(self.sampler, recipe.batch_size, self.device)
        self.validation = noisy_crops(
            validation[: recipe.val_images],
            recipe.validation_sigmas,
            recipe.val_size,
            recipe.seed,
        )
        # All must begin at the same step, also where only the first one sees the file.
        resume = resume and bool(self._agreed(float(self.state_path.exists())))
        with _seeded(recipe.seed):
            prior = self.new_prior()
            if recipe.init is not None and not resume:
                expected = self.describe(prior)
                prior = self.load_prior(recipe.init)
                _compare(recipe.init, self.describe(prior), expected)
                self.adapt(prior)
        if isinstance(prior, Configurable):
            prior.config()  # raises now if the trained weights could not be saved
        self.prior: P = prior.to(self.device)
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(parameters), "factor": factor}
                for factor, parameters in self.parameter_groups()
            ],
            lr=recipe.lr,
        )
        self.step, self.elapsed, self.best = 0, 0.0, -math.inf
        #: The step whose weights were the best; ``None``: there is none yet.
        self.best_step: int | None = None
        #: Whether ``lambda_reg`` was chosen anew, at the end.
        self.chosen = False
        self.pool: dict[int, tuple[Problems, Tensor]] = {}
        if resume:
            self._load()
        self._averaged_loss = self.processes.wrap(self.prior, self.loss)

    # -- what a model provides -----------------------------------------------------

    @abstractmethod
    def new_prior(self) -> P:
        """Returns the prior that training starts from without ``recipe.init``."""

    def load_prior(self, pretrained: str) -> P:
        """Returns the prior with the weights of ``recipe.init``."""
        return load(pretrained, type(self.new_prior()))

    def adapt(self, prior: P) -> None:
        """Adapts the weights of ``recipe.init`` to the recipe, in place."""

    def save_prior(self, path: Path, metadata: dict[str, str]) -> None:
        """Writes the weights of the prior in training, atomically."""
        save(self.prior, path, metadata)

    def describe(self, prior: P) -> dict[str, Any]:  # noqa: ARG002
        """Returns what the recipe says about a prior, by the names it uses."""
        return {}

    @abstractmethod
    def new_model(self, prior: P) -> Reconstructor:
        """Returns the model around a prior, which validation calls."""

    @property
    def chooses_lambda(self) -> bool:
        """Whether ``lambda_reg`` is chosen anew for the best weights at the end."""
        return False

    @abstractmethod
    def loss(self, problems: Problems, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """
        Returns the loss, and what the solver can start from when the batch returns.

        :param Problems problems: the batch.
        :param torch.Tensor start: what was returned for the batch before; ``None`` for
            a new one.
        """

    def parameter_groups(self) -> Sequence[tuple[float, Sequence[nn.Parameter]]]:
        """Returns factors on the learning rate, with the parameters they are for."""
        return [(1.0, list(self.prior.parameters()))]

    def after_step(self) -> None:
        """Imposes constraints on the weights, where there are any."""

    # -- the loop ------------------------------------------------------------------

    @property
    def state_path(self) -> Path:
        """The file from which training resumes."""
        return self.out / "state.pt"

    def train(self) -> float:
        r"""
        Trains until the steps or the time are used up.

        Where gradients leave the weight :math:`\lambda` beside its best value, it is
        then chosen anew on the validation images, by :func:`deepinv_deal.tune`.

        :return: best mean validation PSNR in dB.
        :raises FloatingPointError: if the loss is not finite; the last good weights and
            checkpoint are kept.
        """
        recipe = self.recipe
        start = time.monotonic()
        offset = last_save = last_told = self.elapsed
        bar = tqdm(
            total=recipe.steps,
            initial=self.step,
            unit="step",
            disable=None if self.processes.first else True,
        )
        losses: list[float] = []
        self._prepare_log()
        if self.step == 0 and recipe.init is not None:
            self._validate(None)  # so that the best weights are no worse than these
        while self.progress() < 1:
            loss = self.train_step()
            losses.append(loss)
            self.step += 1
            self.elapsed = self._agreed(offset + time.monotonic() - start)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3g}", best=f"{self.best:.2f} dB")
            if self.step % recipe.val_every == 0 or self.progress() >= 1:
                self._validate(sum(losses) / len(losses))
                losses.clear()
                self.elapsed = self._agreed(offset + time.monotonic() - start)
                last_told = self.elapsed
            # Where there is no bar, a log file would stay silent until the validation.
            if self.elapsed - last_told > TELL_EVERY and bar.disable and losses:
                self._tell(sum(losses) / len(losses))
                last_told = self.elapsed
            if self.elapsed - last_save > self.checkpoint_interval:
                self.save()
                last_save = self.elapsed
        bar.close()
        self.save()
        if self.processes.first:
            self.save_prior(self.out / "last.safetensors", {})
        if self.chooses_lambda and not self.chosen:  # once, however often it is killed
            if self.processes.first:
                self._choose_lambda(self.out / "best.safetensors")
            self.best, self.chosen = self._agreed(self.best), True
            self.save()
        return self._agreed(self.best)  # and wait until the files are there

    def _tell(self, loss: float) -> None:
        """Writes a line on how far the training is."""
        if self.processes.first:
            tqdm.write(
                f"step {self.step}, {self.elapsed:.0f} s, {self.progress():.0%}: "
                f"loss {loss:.4g}"
            )

    def _choose_lambda(self, path: Path) -> None:
        """Chooses the weight anew, in the file of the best weights."""
        prior: Any = self.load_prior(str(path)).to(self.device)
        problems = [
            (x.to(self.device), y.to(self.device))
            for _, level in self.validation
            for x, y in level
        ]
        with warnings.catch_warnings():  # of a search that ends early: it may
            warnings.simplefilter("ignore", RuntimeWarning)
            model = self.new_model(prior)
            found = tune(
                model, None, problems, spread=1.2, precision=1.05, max_trials=7
            )
        if found.best.score <= self.best:
            return
        with torch.no_grad():
            prior.lambda_reg.fill_(found.lambda_reg)
        save(prior, path, read_header(path))
        tqdm.write(
            f"lambda_reg {found.lambda_reg:.4g} instead of that of the training: "
            f"{found.best.score:.2f} dB"
        )
        self.best = found.best.score

    def _agreed(self, value: float) -> float:
        return self.processes.agreed(value, self.device)

    @property
    def checkpoint_interval(self) -> float:
        """Seconds between two checkpoints, less in short trainings."""
        recipe = self.recipe
        if recipe.time_budget is None:
            return recipe.checkpoint_every
        return min(recipe.checkpoint_every, recipe.time_budget / 10)

    def progress(self) -> float:
        """Returns the fraction of the training that is done."""
        recipe = self.recipe
        by_steps = self.step / recipe.steps if recipe.steps else 0.0
        by_time = self.elapsed / recipe.time_budget if recipe.time_budget else 0.0
        return max(by_steps, by_time)

    def _learning_rate(self) -> float:
        recipe = self.recipe
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.progress(), 1.0)))
        warm = (self.step + 1) / max(recipe.warmup, 1)
        # In a short training, no more than the first tenth.
        warm = min(1.0, max(warm, 10 * self.progress()))
        return warm * (recipe.lr_final + (recipe.lr - recipe.lr_final) * cosine)

    def train_step(self) -> float:
        """
        Takes one step of the optimizer.

        :return: the loss.
        :raises FloatingPointError: if loss or gradient are not finite; the weights are
            then as before.
        """
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * self._learning_rate()
        slot = self.step % recipe.pool
        if self._is_new(self.step):
            batch = self.batches.batch(self.step)
            pinned = self.device.type == "cuda"
            problems = self.processes.share(batch).to(self.device, non_blocking=pinned)
            start = None
        else:
            problems, start = self.pool[slot]
        if self.device.type != "cpu":  # there the thread would only take time from us
            self._prepare_batch()
        with self._rounding():
            loss, end = self._averaged_loss(problems, start)
            self.prior.zero_grad()  # parameters that are not trained have gradients too
            with warnings.catch_warnings():  # rough gradients are what was asked for
                warnings.simplefilter("ignore", ConvergenceWarning)
                loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        # The loss is that of the whole batch, so that all processes give up together.
        # It is read together with the norm: each reading waits for the device.
        mean = self.processes.mean(loss.detach())
        value, size = torch.stack([mean, norm.to(mean)]).tolist()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The loss is {value} at step {self.step}. The last checkpoint and the "
                "best weights are kept; lower lr or clip and start again."
            )
        if not math.isfinite(size):  # one step would make the weights and states NaN
            raise FloatingPointError(
                f"The gradient is not finite at step {self.step}. The last checkpoint "
                "and the best weights are kept; lower lr or clip and start again."
            )
        self.optimizer.step()
        self.after_step()
        if recipe.reuse > 1:
            self.pool[slot] = (problems, end)
        return value

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        """The precision of a step on a GPU."""
        tf32 = self.recipe.tf32
        with rough_solvers(tf32), tf32_convolutions(self.device, tf32):
            yield

    def _is_new(self, step: int) -> bool:
        """Whether a step takes a new batch, rather than one from the pool."""
        slot, visit = step % self.recipe.pool, step // self.recipe.pool
        # Offset by the slot, so that new problems are spread evenly over the steps.
        return slot not in self.pool or (visit + slot) % self.recipe.reuse == 0

    def _prepare_batch(self) -> None:
        """Lets the next new batch be drawn in the background, if there is one."""
        step = next(step for step in count(self.step + 1) if self._is_new(step))
        if self.recipe.steps is None or step < self.recipe.steps:
            self.batches.prepare(step)

    def _validate(self, loss: float | None) -> None:
        psnr = {}
        n_iter, converged = [], []
        model = self.new_model(self.prior)
        for sigma, problems in self.validation:
            scores = []
            for x, y in problems:
                with torch.no_grad():
                    x_hat, info = model(
                        y.to(self.device), sigma=sigma, return_info=True
                    )
                mse = (x_hat.cpu().clamp(0, 1) - x).square().mean()
                scores.append(-10 * math.log10(float(mse)))
                n_iter.append(float(info.n_iter.float().mean()))
                converged.append(float(info.succeeded.float().mean()))
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
        better = mean > self.best
        if better:
            self.best, self.best_step, self.chosen = mean, self.step, False
        if not self.processes.first:  # all have the same weights
            return
        with open(self.out / LOG, "a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        levels = ", ".join(f"{v:.2f} dB at {k}" for k, v in psnr.items())
        tqdm.write(
            f"step {self.step}, {self.elapsed:.0f} s: "
            f"{'' if loss is None else f'loss {loss:.4g}, '}{levels}, mean "
            f"{mean:.2f} dB{' (best)' * better}"
        )
        if better:
            self.save_prior(self.out / "best.safetensors", {"log": json.dumps(entry)})
        try:
            with replacing(self.out / CURVE) as temporary:
                plot_learning_curve(self.out).savefig(temporary, format="png", dpi=120)
        except (OSError, ValueError) as error:  # a picture is not worth a training
            warn(f"{CURVE} could not be drawn: {error}")

    # -- checkpoints ---------------------------------------------------------------

    def save(self) -> None:
        """
        Writes ``state.pt``, atomically.

        :raises OSError: if it cannot be written; the last checkpoint is kept.
        """
        pools = self.processes.gathered(
            {slot: (p.x, p.y, p.sigma, end) for slot, (p, end) in self.pool.items()}
        )
        if self.processes.first:
            state = {
                "prior": self.prior.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "elapsed": self.elapsed,
                "best": self.best,
                "best_step": self.best_step,
                "chosen": self.chosen,
                "pools": pools,  # one for each process
                "seen": self.seen,
            }
            write_checkpoint(self.state_path, self.recipe, state)

    def _load(self) -> None:
        state = read_checkpoint(self.state_path, self.recipe, self.processes.number)
        for name, before in state.get("seen", {}).items():
            if before != self.seen[name]:
                raise ValueError(
                    f"{name} has changed: {self.state_path} belongs to {before}, now "
                    f"there are {self.seen[name]}. Restore the folder, or begin "
                    "another training from the weights of this one, with init and "
                    "another out."
                )
        self.prior.load_state_dict(state["prior"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.best, self.best_step = state["best"], state.get("best_step")
        # A checkpoint without it is from before there was this question.
        self.chosen = state.get("chosen", self.progress() >= 1)
        self._note_best()
        self.pool = {
            slot: (Problems(x, y, sigma).to(self.device), end.to(self.device))
            for slot, (x, y, sigma, end) in state["pools"][self.processes.rank].items()
        }

    def _note_best(self) -> None:
        """Takes note of weights that are better than those before the checkpoint."""
        told = self._validation_of_best()
        if not told:
            return
        entry = json.loads(told)
        if entry["psnr_mean"] > self.best:
            self.best, self.best_step = entry["psnr_mean"], entry["step"]

    def _validation_of_best(self) -> str:
        """Returns the line of the log about the best weights, if it is there."""
        try:
            told = read_header(self.out / "best.safetensors").get("log", "")
            log = (self.out / LOG).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return ""  # they are missing or damaged: the next validation writes them
        return told if told in log else ""  # else that of another training

    def _prepare_log(self) -> None:
        """Leaves of the log what belongs to this training, up to its step."""
        path = self.out / LOG
        if not self.processes.first or not path.exists():
            return
        # The weights are there, though the training goes on from before them.
        kept, best = [], self._validation_of_best()
        for line in path.read_text(encoding="utf-8").splitlines() if self.step else ():
            try:
                if json.loads(line)["step"] <= self.step or line == best:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # it was cut off
        with replacing(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _compare(pretrained: str, theirs: dict[str, Any], expected: dict[str, Any]) -> None:
    """Checks that the recipe describes the weights to start from."""
    for name, ours in expected.items():
        if theirs[name] != ours:
            raise ValueError(
                f"init={pretrained!r} has {name}={theirs[name]!r}, the recipe says "
                f"{ours!r}. Set {name} to {theirs[name]!r}, or start from other "
                "weights."
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the initialisation without touching the caller's random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
