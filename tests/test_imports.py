"""The architecture: imports point one way, and the numerical core needs only torch."""

from __future__ import annotations

import ast
import importlib
import pkgutil
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
    "operators": CORE,
    "splines": CORE,
    "solvers": CORE,
    "problems": NUMERICS,
    "priors": PARTS,
    "weights": PARTS | {"priors", "_atomic"},
    "optim": PARTS | {"priors"},
    "models": PARTS | {"priors", "optim", "weights"},
    "files": {"_atomic"},
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
