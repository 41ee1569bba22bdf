"""
Checks that `:param:` fields and signatures agree, for functions and classes.

A docstring without any `:param:` field is left alone, as in the rule D417, which knows
only other docstring styles. A class is compared with its `__init__` (or, without one,
with its annotated fields, as in a dataclass).

Usage: python .ci/check_docstrings.py [FOLDER ...]
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PARAM = re.compile(r"^\s*:param\s+(?:[^:]*\s)?\**(\w+)\s*:", re.MULTILINE)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def signature(node: Function) -> tuple[set[str], set[str]]:
    """Returns the named arguments but self and cls, and the variadic ones."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    variadic = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return {a.arg for a in named} - {"self", "cls"}, {a.arg for a in variadic}


def class_signature(node: ast.ClassDef) -> tuple[set[str], set[str]] | None:
    """Returns the signature of the constructor, or None if it is inherited."""
    for item in node.body:
        if isinstance(item, Function) and item.name == "__init__":
            return signature(item)
    fields = {
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not ast.unparse(item.annotation).startswith("ClassVar")
    }
    return (fields, set()) if fields else None


def problems(path: Path) -> Iterator[str]:
    """Yields one line per disagreement in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, Function | ast.ClassDef):
            continue
        documented = PARAM.findall(ast.get_docstring(node) or "")
        is_class = isinstance(node, ast.ClassDef)
        expected = class_signature(node) if is_class else signature(node)
        if not documented or expected is None:
            continue
        named, variadic = expected
        where = f"{path}:{node.lineno}: {node.name}:"
        for name in sorted(named - set(documented)):
            yield f"{where} parameter '{name}' is not documented"
        for name in sorted(set(documented) - named - variadic):
            yield f"{where} documented parameter '{name}' does not exist"
        for name in sorted({n for n in documented if documented.count(n) > 1}):
            yield f"{where} parameter '{name}' is documented twice"


def main(folders: list[str]) -> int:
    """Prints the disagreements and returns the exit status."""
    paths = sorted(p for folder in folders for p in Path(folder).rglob("*.py"))
    found = [line for path in paths for line in problems(path)]
    print("\n".join([*found, f"{len(paths)} files, {len(found)} problems"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["deepinv_deal"]))
