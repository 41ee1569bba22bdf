"""Two processes train as one does, and reconstruct as one does."""

from __future__ import annotations

import pytest
import torch
from problems import relative_error
from processes import run_two, use_deepinv_distributed
from safetensors.torch import load_file
from trainers import KINDS, gradient, take

from deepinv_deal.training.processes import Processes, process_group


@pytest.mark.parametrize(
    "names", [["deal"], pytest.param(["mmr", "cpr"], marks=pytest.mark.slow)]
)
def test_two_processes_find_what_one_finds(folder, tmp_path, names):
    """In training, and with deepinv.distributed: one test, for starting takes long."""
    first, second = run_two(folder, tmp_path, names)
    # They agree on when to stop and on what they found; the first one says more.
    first = [line for line in first if line.startswith("0: ")]
    assert len(first) == len(names)
    assert [line.replace("0: ", "1: ") for line in first] == second
    for name in names:
        check_training(folder, tmp_path, name)
    use_deepinv_distributed(tmp_path)
    check_distributed(tmp_path)


def check_training(folder, tmp_path, name):
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


def check_distributed(tmp_path):
    alone, *others = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in ("1-0", "2-0", "2-1")
    )
    assert (alone["processes"], alone["operators"]) == (1, 2)
    assert alone["tiles"].shape == (1, 1, 60, 26)
    for found in (alone, *others):
        torch.testing.assert_close(found["tiles"], alone["tiles"], rtol=0, atol=1e-5)
        solved, expected = found["solved"], found["expected"]
        torch.testing.assert_close(solved, expected, rtol=0, atol=1e-3)
    for found in others:
        assert (found["processes"], found["operators"]) == (2, 1)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as device:
        assert device == "cpu"
        assert Processes.current() == Processes(0, 1)


def test_batches_must_be_divisible(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "current", lambda: Processes(0, 2))
    with pytest.raises(ValueError, match="batch_size=3 cannot be divided among 2"):
        KINDS["deal"].start(folder, tmp_path, batch_size=3)
