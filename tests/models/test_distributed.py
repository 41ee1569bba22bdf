"""deepinv.distributed with the models of this package, in two processes."""

from __future__ import annotations

import runpy

import torch
from processes import run_two

#: Denoises a large image in tiles and solves for a stack of operators, both shared by
#: as many processes as there are, and writes what each of them found.
SCRIPT = """
import sys
import torch
from deepinv.distributed import DistributedContext, distribute
from deepinv.physics import Blur, StackedLinearPhysics
from deepinv.physics.functional import gaussian_blur

sys.path.insert(0, sys.argv[1])
from problems import images

from deepinv_deal import DEAL

torch.manual_seed(3)
model = DEAL(pretrained=None, num_filters=4, rtol=1e-3)
y = images(1, 1, 60, 26, dtype=torch.float32)
x = y[..., :24, :]
kernels = [gaussian_blur(sigma=(s, s)) for s in (0.7, 1.2)]
physics = StackedLinearPhysics([Blur(k, padding="circular") for k in kernels])
with DistributedContext(device_mode="cpu") as context, torch.no_grad():
    tiles = distribute(
        model, context, type_object="denoiser", patch_size=24, overlap=8,
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
    torch.save(found, f"{sys.argv[2]}/{context.world_size}-{context.rank}.pt")
"""


def test_tiles_and_stacked_physics_are_shared_by_two_processes(tmp_path, monkeypatch):
    run_two(SCRIPT, tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    tests = str(__file__).rpartition("models")[0]
    monkeypatch.setattr("sys.argv", ["script.py", tests, str(tmp_path)])
    runpy.run_path(str(tmp_path / "script.py"))
    alone, *others = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in ("1-0", "2-0", "2-1")
    )
    assert (alone["processes"], alone["operators"]) == (1, 2)
    assert alone["tiles"].shape == (1, 1, 60, 26)
    for found in (alone, *others):
        torch.testing.assert_close(found["tiles"], alone["tiles"], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            found["solved"], found["expected"], rtol=0, atol=1e-3
        )
    for found in others:
        assert (found["processes"], found["operators"]) == (2, 1)
