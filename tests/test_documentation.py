"""Pages and scripts that state what the package does cannot go stale."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


MARKDOWN = [*ROOT.glob("*.md"), *(ROOT / "deepinv_deal" / "weights").glob("*.md")]


def script(name, folder="benchmarks"):
    """A script of a folder, as a module."""
    path = ROOT / folder / f"{name}.py"
    if not path.exists():
        pytest.skip("the scripts are not part of this distribution")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_of_errors_is_what_happens():
    errors = script("errors")
    # If this fails on purpose: python benchmarks/errors.py
    assert errors.PAGE.read_text().splitlines() == errors.page().splitlines()


def test_every_fault_of_the_mutation_check_can_be_made():
    mutations = script("mutations")
    assert len(mutations.FAULTS) >= 10
    for fault in mutations.FAULTS:
        text = (ROOT / "deepinv_deal" / fault.file).read_text()
        assert text.count(fault.before) == 1, fault.name
        for test in fault.tests:
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


def test_links_of_markdown_files_lead_somewhere():
    links, external = script("check_links", ".ci"), set()
    assert len(MARKDOWN) > 10
    assert [fault for path in MARKDOWN for fault in links.faults(path, external)] == []
    assert "https://deepinv.org" in external


@pytest.mark.parametrize(
    "line, fault",
    [
        ('<a href="other.html">', None),
        ('<a href="other.html#place">', None),
        ('<a href="#here">', None),
        ('<a href="https://deepinv.org">', None),
        ('<img src="data:image/png;base64,AAAA">', None),
        ('<a href="none.html">', "does not exist"),
        ('<img src="none.png">', "does not exist"),
        ('<a href="other.html#none">', "has no such place"),
        ('<a href="#none">', "has no such place"),
        ('<script src="https://cdn.org/a.js"></script>', "from the network"),
        ('<link rel="stylesheet" href="//cdn.org/a.css">', "from the network"),
    ],
)
def test_a_dead_link_and_a_file_from_the_network_are_found(line, fault, tmp_path):
    links = script("check_links", ".ci")
    page = tmp_path / "page.html"
    page.write_text(f'<p id="here">{line}</p>')
    (tmp_path / "other.html").write_text('<p id="place">')
    found = links.faults(page, set())
    assert len(found) == (fault is not None)
    assert fault is None or found[0].endswith(fault)
