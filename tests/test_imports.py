"""The architecture: imports point one way, and the numerical core needs only torch."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import deepinv_deal

ROOT = Path(deepinv_deal.__file__).parent

# What each part of the package may import from the others. The package itself and the
# command line stand on top and may import everything.
CORE = {"_batch", "_warnings"}
NUMERICS = CORE | {"operators", "splines", "solvers"}
PARTS = NUMERICS | {"problems"}
ALLOWED = {
    "_batch": set(),
    "_warnings": set(),
    "_atomic": set(),
    "_memory": set(),
    "_progress": set(),
    "operators": CORE,
    "splines": CORE,
    "solvers": CORE,
    "problems": NUMERICS,
    "priors": PARTS,
    "weights": PARTS | {"priors", "_atomic"},
    "optim": PARTS | {"priors", "_progress"},
    "models": PARTS | {"priors", "optim", "weights", "_progress"},
    "files": {"_atomic", "_warnings"},
}
for _part in (
    "training",
    "tuning",
    "interpret",
    "evaluation",
):  # independent of another
    ALLOWED[_part] = PARTS | {
        "priors",
        "optim",
        "weights",
        "models",
        "files",
        "_atomic",
    }
ALLOWED["evaluation"] |= {"tuning"}
ALLOWED["training"] |= {"tuning"}  # SAFI and MMR: lambda is chosen anew at the end
TOP = {"", "cli", "__main__"}
FILES = sorted(ROOT.rglob("*.py"))


def part_of(dotted: str) -> str:
    """``deepinv_deal.solvers.result`` -> ``solvers``; the package itself -> ````."""
    return (dotted.split(".") + [""])[1]


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, root: Path = ROOT) -> set[str]:
    """All absolute module names that a file imports, also inside functions."""
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package[: len(package) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            if base == root.name:  # `from deepinv_deal import solvers`
                exists = {n.name for n in pkgutil.iter_modules([str(root)])}
                found |= {
                    f"{base}.{alias.name}" if alias.name in exists else base
                    for alias in node.names
                }
            else:
                found.add(base)
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    part = part_of(module_name(path))
    if part in TOP:
        return
    assert part in ALLOWED, f"say in ALLOWED what {part!r} may import"
    own = {m for m in imported_modules(path) if m.split(".")[0] == ROOT.name}
    forbidden = {m for m in own if part_of(m) not in ALLOWED[part] | {part}}
    assert not forbidden, f"{module_name(path)} must not import {sorted(forbidden)}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if part_of(module_name(p)) in NUMERICS], ids=module_name
)
def test_the_numerical_core_needs_only_torch(path):
    outside = {m.split(".")[0] for m in imported_modules(path)} - {ROOT.name}
    assert outside <= {"torch"} | sys.stdlib_module_names


def test_imports_inside_functions_and_relative_ones_are_seen(tmp_path):
    root = tmp_path / "deepinv_deal"
    path = root / "solvers" / "result.py"
    for folder in ("solvers", "models"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
    path.write_text(
        "import torch.nn\n"
        "from . import fixed_point\n"
        "from ..models.deal import DEAL\n"
        "def f():\n"
        "    from deepinv_deal import models, DEAL\n"
        "    import deepinv_deal.cli\n"
    )
    assert imported_modules(path, root) == {
        "torch.nn",
        "deepinv_deal.solvers",
        "deepinv_deal.models.deal",
        "deepinv_deal.models",
        "deepinv_deal",
        "deepinv_deal.cli",
    }


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name == "__init__.py"], ids=module_name
)
def test_every_public_name_exists(path):
    module = importlib.import_module(module_name(path))
    names = getattr(module, "__all__", [])
    assert sorted(set(names)) == sorted(names), "a name is listed twice"
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing


# -- names that are imported on demand ---------------------------------------------

STUBS = sorted(ROOT.rglob("*.pyi"))


@pytest.mark.parametrize("stub", STUBS, ids=module_name)
def test_stubs_agree_with_what_they_describe(stub):
    package = importlib.import_module(module_name(stub))
    where = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            where |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign):
            assert [target.id for target in node.targets] == ["__all__"]
            assert ast.literal_eval(node.value) == package.__all__
    public = {name for name, module in where.items() if module is not None}
    assert public == set(package.__all__) - {"__version__"}
    assert public <= set(dir(package))
    # A module is an attribute of its package as soon as anything imports it, and would
    # take the place of a function of the same name.
    assert not public & {m.name for m in pkgutil.iter_modules(package.__path__)}
    for name, module in where.items():
        home = importlib.import_module(f"{package.__name__}.{module or name}")
        assert getattr(package, name) is (getattr(home, name) if module else home)


def test_names_that_do_not_exist_are_errors():
    with pytest.raises(AttributeError, match="nothing"):
        deepinv_deal.nothing  # noqa: B018
    with pytest.raises(ImportError, match="nothing"):
        from deepinv_deal import nothing  # noqa: F401


EACH_FIRST = """
import importlib, pkgutil, sys
import deepinv  # stays, so that only this package is imported again and again
import deepinv_deal

for room in pkgutil.iter_modules(deepinv_deal.__path__, "deepinv_deal."):
    for name in [name for name in sys.modules if name.startswith("deepinv_deal")]:
        del sys.modules[name]
    importlib.import_module(room.name)
    print(room.name)
"""


def test_every_room_can_be_the_first_that_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", EACH_FIRST], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"deepinv_deal.weights", "deepinv_deal.training"} <= set(done.stdout.split())


def test_solvers_come_without_deepinv():
    code = "import sys, deepinv_deal.solvers; print('deepinv' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
