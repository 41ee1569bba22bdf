"""
Links of the built pages and of the Markdown files lead somewhere.

Built pages must load scripts, styles and pictures from their own folder, so that they
are complete without a network, and every link to a file or to a place in a file must
have a target. Exits with 1 and the list of faults if they do not. Addresses elsewhere
are not visited; ``--external`` lists them. Links from source code back to the
documentation are checked up to the page: Sphinx knows one module for all objects of a
file, and so the wrong place for those that are documented elsewhere.

    python .ci/check_links.py docs/_build/html README.md CONTRIBUTING.md
"""

from __future__ import annotations

import argparse
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt


class Page(HTMLParser):
    """The targets, links and loaded files of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes what a tag names, links to or loads."""
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if found.get("href"):
            stylesheet = tag == "link" and found.get("rel") in ("stylesheet", "icon")
            (self.loaded if stylesheet else self.links).append(found["href"])
        if found.get("src"):
            self.loaded.append(found["src"])


@cache
def page(path: Path) -> Page:
    """Reads an HTML file, or a Markdown file as the HTML that it stands for."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = MarkdownIt("commonmark").enable("table").render(text)
    return Page(text)


def faults(path: Path, external: set[str]) -> list[str]:
    """Returns what is wrong with a page, and adds its links elsewhere to a set."""
    found = []
    for loaded, links in ((True, page(path).loaded), (False, page(path).links)):
        for link in links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https") or parts.netloc:
                external.add(link)
                if loaded and path.suffix == ".html":
                    found.append(f"{path}: loads {link} from the network")
                continue
            if parts.scheme:  # data:, mailto:
                continue
            target = path
            if parts.path:
                target = (path.parent / unquote(parts.path)).resolve()
            if target.is_dir():
                continue
            if not target.is_file():
                found.append(f"{path}: {link} does not exist")
            elif (
                target.suffix == ".html"
                and parts.fragment
                and "_modules" not in path.parts
            ):
                if unquote(parts.fragment) not in page(target).ids:
                    found.append(f"{path}: {link} has no such place")
    return found


def main() -> int:
    """Checks the files given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, help="files and folders")
    parser.add_argument(
        "--external", action="store_true", help="list the addresses elsewhere"
    )
    args = parser.parse_args()
    found: list[str] = []
    external: set[str] = set()
    number = 0
    for path in args.paths:
        for file in sorted(path.rglob("*.html")) if path.is_dir() else [path]:
            if "_static" in file.parts:  # templates of the theme
                continue
            found += faults(file.resolve(), external)
            number += 1
    print(*sorted(external) if args.external else [], *found, sep="\n")
    print(f"{number} pages, {len(found)} faults")
    return int(bool(found) or not number)


if __name__ == "__main__":
    raise SystemExit(main())
