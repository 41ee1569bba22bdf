"""
The code in README, user guide and model cards runs.

Python blocks are executed, those of one page in one namespace, as they would be by a
reader who copies them one after the other. Commands are parsed by the program that they
call, and those that only need small files are run. A block that cannot run has a
directive of sybil above it, which says why: ``.. skip: next "reason"``.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path
from unittest import SkipTest

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import test_file_kinds as files
import tifffile
from PIL import Image
from skimage import data
from sybil import Region, Sybil
from sybil.parsers import markdown, rest

from deepinv_deal.cli import main
from deepinv_deal.priors import DEALPrior
from deepinv_deal.weights import save

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.rst")),
    *sorted((ROOT / "docs").glob("[mqu]*/*.rst")),  # measurements, questions, guide
    *sorted((ROOT / "deepinv_deal" / "weights").glob("*.md")),
]
#: Pages that tune or linearize for more than ten seconds.
SLOW = {"dictionaries", "interpretation", "tuning"}
#: Programs whose options are not ours to check.
OTHERS = {"bash", "eval", "mkdir", "mypy", "pip", "ruff", "source", "sphinx-build"}
#: Commands that are run; the others need hours or a folder of many images.
QUICK = {"denoise", "reconstruct"}
#: Blocks of code, to see that none is missed, and commands in a line of text.
BLOCK = re.compile(r"^ *(?:\.\. (?:code-block|sourcecode|code)::|```\w)", re.MULTILINE)
INLINE = re.compile(r"(?<!`)``?((?:deepinv-deal|python benchmarks/)[^`]*)``?(?!`)")

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").exists(), reason="the pages are not part of this distribution"
)


# -- Commands --------------------------------------------------------------------


class Parsed(Exception):
    """The arguments of a program were understood, before it did anything."""


def commands(text):
    """The commands of a shell script, as lists of words without assignments."""
    text = re.sub(r"<<(\w+)\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="&;\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words, comment = [], False
    for word in [*lexer, "\n"]:
        if set(word) <= set("&;\n"):
            if words:
                yield words
            words, comment = [], False
        else:
            comment = comment or word[0] in "#>"  # or the file of the output
            if not comment and (words or not re.match(r"[A-Z_]+=", word)):
                words.append(word)


def run(words, monkeypatch):
    """Parses a command, and runs it if it is quick."""
    program, *options = words
    if program == "deepinv-deal" or "deepinv_deal" in words:
        options = words[words.index("-m") + 2 :] if "-m" in words else options
        if options[0] in QUICK and len(options) > 1 and options[1] != "--help":
            assert main(options) == 0, shlex.join(words)
        elif options[0] != "COMMAND":
            parse(partial(main, options), options, words, monkeypatch)
    elif program == "python" and options[0].startswith("benchmarks/"):
        path = ROOT / options[0]
        assert path.exists(), shlex.join(words)
        if options[1:]:
            assert ".parse_args(" in path.read_text(), shlex.join(words)
            monkeypatch.syspath_prepend(path.parent)
            start = partial(runpy.run_path, str(path), run_name="__main__")
            parse(start, options[1:], words, monkeypatch)
    elif program == "python" and options[0].startswith("."):
        assert (ROOT / options[0]).exists(), shlex.join(words)
    else:
        assert program in OTHERS | {"python"}, shlex.join(words)


def parse(start, options, words, monkeypatch):
    """Starts a program that ends when it has parsed its arguments."""
    if len(options) == 1 and not options[0].startswith("-"):
        options = [*options, "--help"]  # the text is about a command, not a call
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser, args=None, namespace=None):
        original(parser, options, namespace)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", words)
        try:
            start()
        except Parsed:
            return
        except SystemExit as end:  # after the help, or an error in the options
            assert end.code == 0, shlex.join(words)
            return
    raise AssertionError(f"{shlex.join(words)} did not parse its arguments")


# -- Pages -----------------------------------------------------------------------


def examples(path, monkeypatch):
    """The blocks of a page, each of which can be evaluated."""

    def evaluate(example):
        for words in commands(example.parsed):
            run(words, monkeypatch)

    def inline(document):
        for match in INLINE.finditer(document.text):
            text = " ".join(match[1].split())
            if text.startswith("deepinv-deal train ") and "--data" not in text:
                text += " --data IMAGES --out RUN"  # the text is about other options
            yield Region(match.start(), match.end(), text, evaluate)

    language = rest if path.suffix == ".rst" else markdown
    parsers = [
        language.PythonCodeBlockParser(),
        language.CodeBlockParser("bash", evaluate),
        language.SkipParser(),
    ]
    document = Sybil([*parsers, inline]).parse(path)
    found = list(document)
    of_commands = sum(1 for _ in INLINE.finditer(document.text))
    of_skips = sum(type(example.parsed) is tuple for example in found)
    blocks = len(found) - of_commands - of_skips
    assert blocks == len(BLOCK.findall(document.text)), "a block of an unknown language"
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = data.camera()[80:112, 200:232] / 255

    def picture(level):
        noisy = x + rng.normal(0, level, x.shape)
        return Image.fromarray((255 * noisy.clip(0, 1)).round().astype(np.uint8))

    picture(25 / 255).save("noisy.png")
    picture(2 / 255).save("y.png")
    for name in ("IMAGES", "VALIDATION", "NOISY_FOLDER"):
        Path(name).mkdir()
        picture(10 / 255).resize((48, 48)).save(Path(name) / "0.png")
    mask = rng.random(x.shape) < 0.5
    Image.fromarray(255 * mask.astype(np.uint8)).save("mask.png")
    photons = rng.poisson(100 * x)
    tifffile.imwrite("photons.tif", photons.astype(np.uint16))
    tifffile.imwrite("camera.tif", (2.2 * photons).round().astype(np.uint16))
    transmitted = rng.poisson(1000 * np.exp(-x))
    np.save("projection.npy", -np.log(transmitted / 1000).astype(np.float32))
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    np.save("kernel.npy", kernel)
    np.save("psf.npy", kernel)
    rows, columns = np.meshgrid(*2 * [np.linspace(-1, 1, 32)], indexing="ij")
    maps = np.stack([np.exp(-((rows - s) ** 2) - columns**2) for s in (-1, 1)])
    k_space = np.fft.fftshift(
        np.fft.fft2(np.fft.ifftshift(maps * x, axes=(-2, -1)), norm="ortho"),
        axes=(-2, -1),
    )
    lines = np.arange(32) % 2 == 0
    lines[12:20] = True
    np.savez("kspace.npz", y=k_space * lines, maps=maps + 0j)
    volume = np.stack([x, 0.9 * x]) + rng.normal(0, 10 / 255, (2, *x.shape))
    tifffile.imwrite("stack.tif", (60000 * volume.clip(0, 1)).astype(np.uint16))
    Path("RUN").mkdir()
    save(DEALPrior(1, 4), "RUN/best.safetensors")
    return tmp_path


def parameters():
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        marks = [pytest.mark.slow] if page.stem in SLOW else []
        yield pytest.param(page, id=name, marks=marks)


def run_page(page, monkeypatch):
    """Runs all blocks of a page but those that are skipped with a reason."""
    for example in examples(page, monkeypatch):
        if type(example.parsed) is tuple:
            assert example.parsed[1], f"{page}:{example.line}: a skip needs a reason"
        with contextlib.suppress(SkipTest):
            example.evaluate()
    plt.close("all")


@pytest.fixture
def volumes(folder):
    """Files of the fields in the current folder, by the tests of these."""
    for module in ("h5py", "ismrmrd", "nibabel", "pydicom"):
        pytest.importorskip(module, reason=files.REASON)
    import h5py
    import nibabel
    import pydicom

    x = files.smooth(2, (24, 20))
    stored = np.rint(1000 * files.smooth(2, (44, 40))).astype(np.int16)
    files.save_nifti(nibabel, "scan.nii.gz", stored.T)
    Path("SERIES").mkdir()
    for i, pixels in enumerate(stored):
        dataset = files.dicom_slice(pydicom, pixels, 16, (1.0, 0.0), i + 1, 2.0 * i)
        dataset.save_as(Path("SERIES") / f"{i}.dcm", enforce_file_format=True)
    with h5py.File("fastmri.h5", "w") as file:
        file["kspace"], file["mask"] = files.k_space(x), files.lines(20, 1)
        file["ismrmrd_header"] = files.header(24, 20, 16, 20)
        file["reconstruction_esc"] = np.abs(x[:, 4:20])
    maps = files.coils(2, (24, 20))
    y, rows = files.k_space(x[:, None] * maps), np.flatnonzero(files.lines(24, 0))
    files.save_ismrmrd("ismrmrd.h5", y, rows, files.header(20, 24, 20, 24))
    np.save("ismrmrd_maps.npy", maps)


@pytest.mark.parametrize("page", list(parameters()))
def test_the_code_of_a_page_runs(page, folder, monkeypatch, request):
    matplotlib.use("Agg")
    if page.stem == "command_line":
        request.getfixturevalue("volumes")
    run_page(page, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "deepinv-deal evaluate --data IMAGES --no-such 9",
        "deepinv-deal train deal --data IMAGES --out RUN --lr fast",
        "deepinv-deal denoise none.png x.png --sigma 25",
        "deepinv-del demo",
        "python benchmarks/speed.py --no-such 9",
        "python benchmarks/none.py",
        "python .ci/none.py",
    ],
)
def test_a_wrong_command_is_found(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"# comment\nA=1 ruff check . && {command} \\\n  # comment\n"
    assert list(commands(text)) == [["ruff", "check", "."], shlex.split(command)]
    page = tmp_path / "page.md"
    page.write_text(f"```bash\n{text}```\n")
    with pytest.raises(AssertionError):
        run_page(page, monkeypatch)


@pytest.mark.parametrize(
    "text, error",
    [
        (
            ".. code-block:: python\n\n   x = 1\n\n.. code-block:: python\n\n   x\n",
            None,
        ),
        (".. code-block:: python\n\n   y\n", NameError),
        (".. code-block:: python3\n\n   x = 1\n", AssertionError),
        ('.. skip: next "hours"\n\n.. code-block:: python\n\n   y\n', None),
        (".. skip: next\n\n.. code-block:: python\n\n   y\n", AssertionError),
        ("It is ``deepinv-deal evaluate --no-such 9``.\n", AssertionError),
    ],
)
def test_a_wrong_block_is_found(text, error, tmp_path, monkeypatch):
    page = tmp_path / "page.rst"
    page.write_text(text)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        run_page(page, monkeypatch)
