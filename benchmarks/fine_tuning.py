"""
What does adapting the weights to one task bring, beyond a tuned regularization weight?

DEAL is trained to denoise. Its output is differentiable for every linear operator, so
its weights can go on learning through the inverse problem itself. On a handful of
images, ``lambda_reg`` and ``sigma`` are tuned; then the weights and ``lambda_reg`` are
trained, starting from there. The table holds the mean PSNR and SSIM on held-out images,
which take part in neither, and the mean gain over the first row. The weights can be
written to a file for ``DEAL(pretrained=...)``.

Training takes what the recipes of this package take: the Jacobian-free gradient with a
rough backward solve, and measurements that come back, whose solver starts from the last
solution.

    python benchmarks/fine_tuning.py --data TRAINING --test HELD_OUT
        [--task deblurring] [--images 10] [--steps 300] [--out tuned.safetensors]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from _common import SPEED_TASKS
from torch import Tensor
from tqdm import tqdm

from deepinv_deal import DEAL, AdjointOptions
from deepinv_deal._batch import central
from deepinv_deal.evaluation import quality
from deepinv_deal.training import DenoisingSampler, load_images
from deepinv_deal.tuning import tune
from deepinv_deal.weights import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of training images")
    parser.add_argument("--test", required=True, help="folder of held-out images")
    parser.add_argument("--pretrained", default="deal_gray")
    tasks = [name for name in SPEED_TASKS if name != "denoising"]
    parser.add_argument("--task", default="deblurring", choices=tasks)
    parser.add_argument("--images", type=int, default=10, help="how many to train on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pool", type=int, default=25, help="number of batches")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="side of all crops")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rtol", type=float, default=5e-3, help="in training")
    parser.add_argument("--out", help="file for the weights")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if Path(args.data).resolve() == Path(args.test).resolve():
        parser.error("--test must be other images than --data.")
    task = SPEED_TASKS[args.task]
    (condition,) = task.conditions
    noise = condition.noise / 255

    sampler = DenoisingSampler(load_images(args.data, 1)[: args.images], args.size, 0.0)
    held_out = [task.ground_truth(x) for x in load_images(args.test, 1)]
    held_out = [central(x, args.size) for x in held_out]
    physics = condition.physics(held_out[0])
    rng = torch.Generator().manual_seed(0)

    def clean(index: int, size: int) -> Tensor:
        x = sampler.batch(index, size).x
        if not task.mri:
            return x
        x = x / x.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
        return torch.cat([x, torch.zeros_like(x)], 1)

    def measure(x: Tensor) -> Tensor:
        y = physics.A(x)
        return y + noise * torch.randn(y.shape, generator=rng)

    model = DEAL(
        pretrained=args.pretrained,
        complex_mode="real" if task.mri else "real_imag",
        adjoint=AdjointOptions(jacobian_free=True, rtol=0.1),
        warn=False,
    )

    found: list[Tensor] = []

    @torch.no_grad()
    def score(label: str, **settings: float) -> None:
        rows, converged = [], 0
        for x in held_out:
            y, own_physics = condition.measure(x)
            x_hat, info = model(y, own_physics, return_info=True, **settings)
            rows.append(quality(task.compare(x_hat), task.compare(x)))
            converged += int(info.converged.sum())
        found.append(torch.tensor(rows, dtype=torch.float64))
        psnr, ssim = found[-1].mean(0).tolist()
        gain = found[-1][:, 0] - found[0][:, 0]
        error = gain.std() / len(rows) ** 0.5
        print(
            f"{label:44}{psnr:8.2f}{ssim:8.4f}{float(gain.mean()):+8.3f} "
            f"+- {float(error):.3f}{converged:5}/{len(rows)}",
            flush=True,
        )

    header = f"{'PSNR':>8}{'SSIM':>8}{'gain, standard error':>23}{'converged':>11}"
    print(" " * 44 + header)
    weight = condition.lambda_reg or 1.0
    score(f"sigma 15/255, lambda_reg {weight:g}", sigma=15 / 255, lambda_reg=weight)
    pairs = [(x, measure(x)) for x in (clean(-1 - i, 2) for i in range(5))]
    with torch.no_grad():
        tuned = tune(
            model,
            physics,
            pairs,
            lambda_reg=condition.lambda_reg,
            sigma=15 / 255,
            tune_sigma=True,
        )
    settings = tuned.settings
    label = ", ".join(f"{k} = {v:.4g}" for k, v in settings.items())
    score(f"tuned: {label}", **settings)

    # The weight is trained by its logarithm.
    log_weight = torch.nn.Parameter(torch.tensor(settings["lambda_reg"]).log())
    optimizer = torch.optim.Adam(
        [
            {"params": list(model.prior.parameters()), "lr": args.lr},
            {"params": [log_weight], "lr": 20 * args.lr},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    accurate, model.rtol = model.rtol, args.rtol
    start = time.perf_counter()
    pool = [clean(i, args.batch_size) for i in range(args.pool)]
    measured = [measure(x) for x in pool]
    last: list[Tensor | None] = [None] * args.pool
    for step in tqdm(range(args.steps), disable=None):
        i = step % args.pool
        x = pool[i]
        x_hat = model(
            measured[i],
            physics,
            sigma=settings["sigma"],
            lambda_reg=log_weight.exp(),
            init=last[i],
        )
        last[i] = x_hat.detach()
        # The mean PSNR, up to a factor.
        loss = (x_hat - x).square().flatten(1).mean(1).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.prior.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    model.rtol = accurate
    settings["lambda_reg"] = float(log_weight.detach().exp())
    score(f"weights and lambda_reg, {args.steps} steps, {seconds:.0f} s", **settings)
    print(f"settings now: {settings}")
    if args.out:
        save(model.prior, args.out)


if __name__ == "__main__":
    main()
