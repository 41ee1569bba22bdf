"""The kit for the first minutes on a GPU, in a small form on the CPU."""

from __future__ import annotations

import contextlib
import json
import sys

import numpy as np
import pytest
from PIL import Image

from deepinv_deal import DEAL

gpu = pytest.importorskip("gpu", reason="the scripts are not part of this distribution")


def test_the_kit_runs_from_an_empty_folder(tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        image = np.kron(rng.integers(0, 255, (6, 8)), np.ones((5, 5))).astype(np.uint8)
        Image.fromarray(image).save(images / f"{i}.png")
    out = tmp_path / "out"
    command = ["gpu.py", "--small", "--out", str(out), "--data", str(images)]
    command += ["--device", "cpu", "--parts", "micro,steps,train", "--minutes", "4"]
    command += ["--recipe", json.dumps({"num_filters": 3})]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    # Its alarm clock is also that of pytest-timeout.
    monkeypatch.setattr(gpu, "limited", lambda _: contextlib.nullcontext())
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 0, capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert "failures" not in report
    tables = [part for name, part in report.items() if name != "seconds"]
    rows = [row for table in tables for row in table]
    assert not [row for row in rows if isinstance(row.get("error"), str)]
    blocks = [r for r in report["micro_operators"] if "blocks" in r["name"]]
    assert blocks
    for row in blocks:  # other ways to compute the same
        assert row["error"] < (2e-2 if "bf16" in row["name"] else 1e-5)
    assert report["train"][0]["steps"] == 4
    assert DEAL(pretrained=out / "best.safetensors").prior.num_filters == 3
    files = [path.name for path in out.iterdir()]
    assert len(files) <= 8 and {"state.pt", "log.jsonl", "report.txt"} <= set(files)
