"""Help and completion of the command line, which need no torch."""

import ast
import shutil
import subprocess
import sys

import pytest

from deepinv_deal import training
from deepinv_deal.cli import completion, main
from deepinv_deal.cli.evaluate import TASK_NAMES
from deepinv_deal.cli.train import TRAINERS
from deepinv_deal.evaluation import TASKS

# Asks for the help of every command in one process and prints the commands and what of
# `heavy` was imported, before and after DEAL is asked for.
EVERY_HELP = """
import contextlib, io, sys
import deepinv_deal
from deepinv_deal import cli

heavy = ("torch", "deepinv", "numpy", "scipy", "skimage", "matplotlib", "PIL", "tqdm")

def commands(parser, path):
    yield path
    for action in parser._actions:
        if isinstance(action, cli._options.Commands):
            for name, command in action.choices.items():
                yield from commands(command, [*path, name])

shown, texts = [], []
for path in [*commands(cli._parser(), []), None]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            cli.main(["--version"] if path is None else [*path, "--help"])
        except SystemExit as end:
            assert end.code == 0
    texts.append(text.getvalue())
    shown.append("--version" if path is None else " ".join(path))
assert all(texts) and len(set(texts)) == len(texts)
print(shown)
print([name for name in heavy if name in sys.modules])
deepinv_deal.DEAL
print([name for name in heavy if name in sys.modules])
"""


def test_no_help_imports_torch():
    done = subprocess.run(
        [sys.executable, "-c", EVERY_HELP], capture_output=True, text=True, check=True
    )
    shown, at_help, at_use = map(ast.literal_eval, done.stdout.splitlines())
    assert {"", "denoise", "reconstruct mri", "train deal", "--version"} <= set(shown)
    assert len(shown) > 15
    assert at_help == []
    assert {"torch", "deepinv", "numpy"} <= set(at_use)


def test_tables_without_torch_agree_with_what_they_stand_for():
    assert list(TASKS) == list(TASK_NAMES)
    for recipe, name in TRAINERS.items():
        trainer = getattr(training, name)
        assert issubclass(trainer, training.Trainer)
        assert recipe.__name__.removesuffix("Recipe") == name.removesuffix("Trainer")


# -- completion ------------------------------------------------------------------


def script_of(shell, capsys):
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


CASES = {
    "train de": "deal",
    "train deal --num-f": "--num-filters",
    "reconstruct m": "mri",
    "evaluate --task deb": "deblurring",
    "denoise pict": "picture.png",
    "train deal --data pict": "picture.png",
    "denoise picture.png out.png --sigma pict": "",  # takes no file
}


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(("typed", "expected"), CASES.items())
def test_bash_completes(typed, expected, capsys, tmp_path):
    (tmp_path / "picture.png").touch()
    ask = """
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _shtab_deepinv_deal
    echo "${COMPREPLY[@]}"
    """
    command = ["bash", "--norc", "-c", script_of("bash", capsys) + ask, "bash"]
    done = subprocess.run(
        [*command, "deepinv-deal", *typed.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_takes_the_script(capsys, tmp_path):
    path = tmp_path / "script"
    path.write_text(script_of("zsh", capsys))
    ask = (
        f"autoload -U compinit; compinit -u -d {tmp_path}/dump; "
        f'eval "$(cat {path})"; echo ${{_comps[deepinv-deal]}}'
    )
    done = subprocess.run(
        ["zsh", "-f", "-c", ask], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "_shtab_deepinv_deal"
    assert "--num-filters" in path.read_text()


def test_what_is_missing_for_completion_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install deepinv-deal[completion]" in capsys.readouterr().err


def test_completion_is_for_the_shells_it_names(capsys):
    for shell in completion.SHELLS:
        assert script_of(shell, capsys)
    with pytest.raises(SystemExit):
        main(["completion", "cmd.exe"])
