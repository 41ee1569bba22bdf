"""What is prepared for other projects, docs/upstream, and the model cards."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import deepinv as dinv
import pytest
import torch
import yaml

from deepinv_deal import DEAL, priors, weights
from deepinv_deal.problems import SolverOptions
from deepinv_deal.weights.files import read_header
from deepinv_deal.weights.registry import BUNDLED

UPSTREAM = Path(__file__).parents[1] / "docs" / "upstream"
SOLVER = UPSTREAM / "benchmark" / "deal.py"
pytestmark = pytest.mark.skipif(not UPSTREAM.exists(), reason="not distributed")


def module(path):
    spec = importlib.util.spec_from_file_location(f"upstream_{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def image(size=32):
    """A colour image with an edge, ``(3, size, size)``."""
    ramp = torch.linspace(0.1, 0.5, size)
    x = ramp[:, None] + 0.4 * (ramp > 0.3)
    return torch.stack([x, 0.7 * x, 1 - x])


def physics_of(kind, seed=0):
    noise = dinv.physics.GaussianNoise(0.05, torch.Generator().manual_seed(seed))
    return {
        "denoising": lambda: dinv.physics.Denoising(noise),
        "deblurring": lambda: dinv.physics.Blur(
            dinv.physics.functional.gaussian_blur(sigma=(0.6, 0.6)), noise_model=noise
        ),
        "inpainting": lambda: dinv.physics.Inpainting((3, 32, 32), mask=0.5),
    }[kind]()


# -- solver of the benchmark -----------------------------------------------------


@pytest.fixture
def solver(monkeypatch):
    """The solver, with a base class that has what benchopt's gives its solvers."""

    class BaseSolver:
        parameters, requirements = None, None

        def __init__(self, **parameters):
            vars(self).update(parameters)

        def skip(self, **_):
            return False, None

    benchopt = types.ModuleType("benchopt")
    benchopt.BaseSolver = BaseSolver
    monkeypatch.setitem(sys.modules, "benchopt", benchopt)
    return module(SOLVER).Solver()


@pytest.mark.filterwarnings("ignore:non_blocking_transfers:UserWarning")
@pytest.mark.parametrize("kind", ["denoising", "deblurring"])
def test_the_solver_runs_as_the_benchmark_runs_it(solver, kind, monkeypatch):
    assert solver.parameters == {} and solver.name == "DEAL"
    # A few iterations are enough to see that it works.
    options = SolverOptions(inner_max_iter=15)
    few = partial(DEAL, max_iter=3, solver=options, warn=False)
    monkeypatch.setattr("deepinv_deal.DEAL", few)
    objective = {"train_dataset": [image()], "physics": physics_of(kind)}
    assert solver.skip(**objective) == (False, None)
    solver.set_objective(**objective)
    solver.run(None)
    model = solver.get_result()["model"]
    assert isinstance(model, torch.nn.Module)
    results = {}
    for name, tested in (("DEAL", model), ("data", Backprojection())):
        results[name] = dinv.test(
            tested,
            torch.utils.data.DataLoader([{"x": image()}]),
            physics_of(kind),
            online_measurements=True,
            device=model.device,
            metrics=[dinv.metric.PSNR(center_crop=-8)],
            compare_no_learning=False,
            show_progress_bar=False,
            verbose=False,
        )["PSNR"]
    assert results["DEAL"] > results["data"] + (2 if kind == "denoising" else 1)


class Backprojection(dinv.models.Reconstructor):
    """What the solver has to be better than."""

    def forward(self, y, physics, **kwargs):
        return physics.A_adjoint(y)


def test_the_solver_gives_deal_its_settings(solver):
    for kind, name in (("denoising", "Denoising"), ("deblurring", "Blur")):
        solver.set_objective(None, physics_of(kind))
        model = solver.get_result()["model"]
        assert isinstance(model, DEAL) and model.prior.in_channels == 3
        for setting in ("lambda_reg", "sigma"):
            given = getattr(model, setting)
            expected = solver.SETTINGS[name].get(setting)
            assert given == (expected and pytest.approx(expected)), setting


def test_the_solver_skips_what_it_has_no_weight_for(solver):
    skipped, reason = solver.skip(None, physics_of("inpainting"))
    assert skipped and "Inpainting" in reason


def test_weights_are_compared(capsys):
    script = (UPSTREAM / "benchmark" / "choose_lambda.py").read_text()
    for before, after in (
        ("CROP = 80", "CROP = 40"),  # smaller and rougher, so that it takes seconds
        ("rtol=2e-2", "max_iter=1, warn=False"),
    ):
        assert script.count(before) == 1
        script = script.replace(before, after)
    exec(script, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[-1] for line in lines] == ["20.0", "10.0", "5.0"]
    assert all(line.count(" dB") == 2 for line in lines)


OBJECTIVE = """
import deepinv as dinv
from benchopt import BaseObjective
from torch.utils.data import DataLoader

class Objective(BaseObjective):
    name = "tiny"
    sampling_strategy = "run_once"
    min_benchopt_version = "1.8"

    def set_data(self, dataset, physics):
        self.dataset, self.physics = dataset, physics

    def evaluate_result(self, model):
        return dinv.test(
            model, DataLoader(self.dataset), self.physics, online_measurements=True,
            device=model.device, metrics=[dinv.metric.PSNR()],
            compare_no_learning=False,
        )

    def get_one_result(self):
        return dict(model=None)

    def get_objective(self):
        return dict(train_dataset=self.dataset, physics=self.physics)
"""

DATASET = """
import deepinv as dinv
import torch
from benchopt import BaseDataset

class Dataset(BaseDataset):
    name = "ramp"

    def get_data(self):
        x = torch.linspace(0, 1, 40).expand(3, 40, 40)
        physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(0.1))
        return dict(dataset=[{"x": x}], physics=physics)
"""


@pytest.mark.skipif(
    not importlib.util.find_spec("benchopt"), reason="benchopt is not installed"
)
def test_benchopt_itself_runs_the_solver(tmp_path):
    folder = tmp_path / "benchmark_tiny"
    for part in ("datasets", "solvers"):
        (folder / part).mkdir(parents=True)
    (folder / "objective.py").write_text(OBJECTIVE)
    (folder / "datasets" / "ramp.py").write_text(DATASET)
    shutil.copy(SOLVER, folder / "solvers")
    command = [sys.executable, "-m", "benchopt", "run", str(folder)]
    command += ["--no-plot", "--no-html", "--no-cache", "--output", "result"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    import pandas

    (file,) = (folder / "outputs").glob("result*.parquet")
    results = pandas.read_parquet(file)
    assert list(results.solver_name) == ["DEAL"]
    assert results.objective_PSNR[0] > 25


# -- example ---------------------------------------------------------------------


def test_the_example_runs(monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda *_, **__: None)
    # A smaller picture than the page has.
    path = UPSTREAM / "demo_connect_deepinv_deal.py"
    monkeypatch.setattr("skimage.transform.resize", quarter)
    names = runpy.run_path(str(path))
    plt.close("all")
    assert names["info"].converged.all()
    assert names["psnr"](names["x_hat"], names["x"]) > 20


def quarter(pixels, shape, **options):
    return pixels[150 : 150 + shape[0], 200 : 200 + shape[1]]


# -- model cards -----------------------------------------------------------------

hub = module(UPSTREAM / "model_hub.py")


def test_every_bundled_file_has_a_card():
    assert {card.stem for card in hub.CARDS} == {entry.name for entry in BUNDLED}


@pytest.mark.parametrize("card", hub.CARDS, ids=lambda card: card.stem)
def test_headers_of_cards_are_complete_and_have_the_figures_of_the_table(card):
    # If this fails on purpose: python docs/upstream/model_hub.py headers
    text = card.read_text()
    assert text == hub.header(card) + hub.body(card)
    header = yaml.safe_load(text.split("---\n", 2)[1])
    assert header["library_name"] == "deepinv-deal"
    assert header["pipeline_tag"] == "image-to-image"
    assert header["license"] == "bsd-3-clause"
    assert header["datasets"] == ["BSDS500"] and "BSDS500" in hub.body(card)
    assert header["metrics"] == ["psnr", "ssim"]
    (model,) = header["model-index"]
    assert model["name"] == card.stem
    for result in model["results"]:
        assert result["dataset"]["type"] in ("bsd68", "cbsd68")
        values = {m["type"]: m["value"] for m in result["metrics"]}
        assert 20 < values["psnr"] < 45 and 0.5 < values["ssim"] < 1
        assert f"| {values['psnr']:.2f} |" in text
        assert f"| {values['ssim']:.4f} |" in text


@pytest.mark.parametrize("card", hub.CARDS, ids=lambda card: card.stem)
def test_cards_describe_the_weights_that_they_are_for(card):
    text = card.read_text()
    (entry,) = (entry for entry in BUNDLED if entry.name == card.stem)
    metadata = read_header(card.with_suffix(".safetensors"))
    assert metadata["prior"] == entry.prior
    config = json.loads(metadata["config"])
    (line,) = re.findall(r"^\| architecture \| (.*) \|$", text, re.M)
    number = int(re.search(r"([\d,]+) parameters", line)[1].replace(",", ""))
    prior = weights.load(card.stem, getattr(priors, entry.prior))
    assert number == sum(p.numel() for p in prior.parameters())
    said = {int(n) for n in re.findall(r"\d+", line)}
    for key in ("num_filters", "num_atoms", "num_free_atoms", "patch_size"):
        assert key not in config or config[key] in said, key
    if entry.prior == "DEALPrior":
        channels = re.search(r"channels ([\d-]+)", line)[1].split("-")
        assert int(channels[0]) == config["in_channels"] == entry.in_channels
        assert int(channels[-1]) == config["num_filters"]
    if "sigma" in config:
        assert round(255 * config["sigma"]) == entry.level
        assert {int(level) for level, _, _ in hub.figures(card)} == {entry.level}
    tags = yaml.safe_load(text.split("---\n", 2)[1])["tags"]
    assert ("arxiv:2502.04079" in tags) == (entry.prior == "DEALPrior")


def test_the_commands_upload_every_file_once():
    lines = [line.split() for line in hub.commands("someone")]
    assert all(line[:2] == ["hf", "upload"] for line in lines)
    files = {Path(line[3]) for line in lines}
    assert all((hub.ROOT / file).is_file() for file in files)
    assert len(lines) == len(files) == 2 * len(BUNDLED)
    for _, _, repository, file, name in lines:
        expected = Path(file).stem.replace("_", "-")
        assert repository == f"someone/deepinv-deal-{expected}"
        assert name == ("README.md" if file.endswith(".md") else Path(file).name)


# -- notebooks of the gallery ----------------------------------------------------

EXAMPLES = sorted((UPSTREAM.parents[1] / "examples").glob("demo_*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_notebooks_install_the_package_and_hold_the_whole_page(example):
    gallery = pytest.importorskip("sphinx_gallery.gen_gallery")
    from sphinx_gallery.notebook import jupyter_notebook
    from sphinx_gallery.py_source_parser import split_code_and_text_blocks

    (first,) = re.findall(
        r'"first_notebook_cell": "(.*)"', (UPSTREAM.parent / "conf.py").read_text()
    )
    options = gallery.DEFAULT_GALLERY_CONF | {"first_notebook_cell": first}
    _, blocks = split_code_and_text_blocks(str(example))
    notebook = jupyter_notebook(blocks, options, str(example.parent))
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    assert cells[0] == "%pip install deepinv-deal"
    code = [
        text
        for cell, text in zip(notebook["cells"], cells, strict=True)
        if cell["cell_type"] == "code"
    ][1:]
    assert len(code) >= 2
    compile("\n".join(code), example.name, "exec")
    statements = [n for b in blocks if b[0] == "code" for n in ast.parse(b[1]).body]
    assert len(ast.parse("\n".join(code)).body) == len(statements)
