"""Two processes train as one does."""

from __future__ import annotations

import pytest
import torch
from problems import relative_error
from processes import run_two
from safetensors.torch import load_file
from trainers import KINDS, gradient, take

from deepinv_deal.training.processes import Processes, process_group

#: Trains some steps, writes a checkpoint, and goes on from it; one line per process.
SCRIPT = """
import sys
import torch
from torch import distributed

sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from trainers import KINDS, gradient, take

from deepinv_deal.training.processes import process_group

with process_group("cpu") as device:
    assert device == "cpu"
    for name in sys.argv[4:]:
        begin = KINDS[name].start(sys.argv[2], f"{sys.argv[3]}/{name}", steps=4)
        take(begin, 1)
        if begin.processes.first:
            torch.save(gradient(begin), f"{sys.argv[3]}/{name}/gradient.pt")
        take(begin, 1)
        begin.save()
        distributed.barrier()
        rest = KINDS[name].start(
            sys.argv[2], f"{sys.argv[3]}/{name}", steps=4, resume=True
        )
        assert rest.step == 2 and len(rest.pool[0][0].x) == 1
        rest.train()
        print(f"{rest.processes.rank}: {rest.best:.10f} dB after {rest.elapsed:.10f} s")
assert not distributed.is_initialized()
"""


@pytest.mark.parametrize(
    "names", [["deal"], pytest.param(["mmr", "cpr"], marks=pytest.mark.slow)]
)
def test_two_processes_give_the_weights_of_one(folder, tmp_path, names):
    first, second = run_two(SCRIPT, folder, tmp_path, *names)
    # They agree on when to stop and on what they found; the first one says more.
    first = [line for line in first if line.startswith("0: ")]
    assert len(first) == len(names)
    assert [line.replace("0: ", "1: ") for line in first] == second
    for name in names:
        kind = KINDS[name]
        alone = kind.start(folder, tmp_path / f"{name}-alone", steps=4)
        before = {k: v.clone() for k, v in alone.prior.state_dict().items()}
        take(alone, 1)
        found = torch.load(tmp_path / name / "gradient.pt", weights_only=True)
        assert relative_error(found, gradient(alone)) < 1e-4
        take(alone, 3)
        together = load_file(tmp_path / name / "last.safetensors")
        moved = missed = 0.0
        for key, value in alone.prior.state_dict().items():
            moved += float((value - before[key]).square().sum())
            missed += float((value - together[key]).square().sum())
        assert missed < 1e-3 * moved, name
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert len(log) == 2  # written once, not by each process
        # Each process has its own problems.
        state = torch.load(tmp_path / name / "state.pt", weights_only=True)
        (x0, *_), (x1, *_) = (pool[0] for pool in state["pools"])
        assert not torch.equal(x0, x1)
        with pytest.raises(ValueError, match=r"written by 2 process\(es\)"):
            kind.start(folder, tmp_path / name, steps=4, resume=True)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as device:
        assert device == "cpu"
        assert Processes.current() == Processes(0, 1)


def test_batches_must_be_divisible(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "current", lambda: Processes(0, 2))
    with pytest.raises(ValueError, match="batch_size=3 cannot be divided among 2"):
        KINDS["deal"].start(folder, tmp_path, batch_size=3)
