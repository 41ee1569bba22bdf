"""Two processes that work together, as torchrun would start them, and their work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch
from deepinv.distributed import DistributedContext, distribute
from deepinv.physics import Blur, StackedLinearPhysics
from deepinv.physics.functional import gaussian_blur
from problems import images
from torch import distributed
from trainers import KINDS, gradient, take

from deepinv_deal import DEAL
from deepinv_deal.training.processes import process_group


def train_in_two_parts(folder, out, name: str) -> None:
    """Trains, writes gradient and checkpoint after two steps, and goes on from it."""
    begin = KINDS[name].start(folder, f"{out}/{name}", steps=4)
    take(begin, 1)
    if begin.processes.first:
        torch.save(gradient(begin), f"{out}/{name}/gradient.pt")
    take(begin, 1)
    begin.save()
    distributed.barrier()
    rest = KINDS[name].start(folder, f"{out}/{name}", steps=4, resume=True)
    assert rest.step == 2 and len(rest.pool[0][0].x) == 1
    rest.train()
    print(f"{rest.processes.rank}: {rest.best:.10f} dB after {rest.elapsed:.10f} s")


def use_deepinv_distributed(out) -> None:
    """Denoises in tiles, solves for a stack of operators, and writes what was found."""
    torch.manual_seed(3)
    model = DEAL(pretrained=None, num_filters=4, rtol=1e-3)
    y = images(1, 1, 60, 26, dtype=torch.float32)
    x = y[..., :24, :]
    kernels = [gaussian_blur(sigma=(s, s)) for s in (0.7, 1.2)]
    physics = StackedLinearPhysics([Blur(k, padding="circular") for k in kernels])
    with DistributedContext(device_mode="cpu") as context, torch.no_grad():
        tiles = distribute(
            model,
            context,
            type_object="denoiser",
            patch_size=24,
            overlap=8,
            tiling_dims=(2, 3),
        )
        shared = distribute(physics, context)
        solved, info = model(shared(x), shared, return_info=True)
        assert info.converged
        found = {
            "processes": torch.tensor(context.world_size),
            "operators": torch.tensor(len(shared.local_indexes)),
            "tiles": tiles(y, 0.02),
            "solved": solved,
            "expected": model(physics(x), physics),
        }
        torch.save(found, f"{out}/{context.world_size}-{context.rank}.pt")


def run_two(folder, out, names) -> list[list[str]]:
    """Does all of this in two processes; returns the lines that each has printed."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [sys.executable, __file__, str(folder), str(out), *names]
    started = []
    for rank in ("0", "1"):
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "test",
            "LOCAL_WORLD_SIZE": "2",
            "RANK": rank,
            "LOCAL_RANK": rank,
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=env, text=True, **pipes))
    try:
        outputs = [process.communicate(timeout=250) for process in started]
    finally:
        for process in started:
            process.kill()
    errors = "\n\n".join(text[-3000:] for _, text in outputs)
    assert not any(process.returncode for process in started), errors
    return [lines.splitlines() for lines, _ in outputs]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group("cpu") as device:
        assert device == "cpu"
        for kind in sys.argv[3:]:
            train_in_two_parts(*sys.argv[1:3], kind)
        use_deepinv_distributed(sys.argv[2])  # in the same process group
    assert not distributed.is_initialized()
