"""Sphinx configuration."""

import urllib.request
from importlib.metadata import metadata

from sphinx.util.nodes import make_refnode
from sphinx_gallery.scrapers import figure_rst

import deepinv_deal

project = "deepinv_deal"
author = "the deepinv_deal contributors"
copyright = "2026, the deepinv_deal contributors"
release = metadata("deepinv-deal")["Version"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx-mathjax-offline",  # formulas need no network
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "upstream"]  # the latter is for other projects
templates_path = ["_templates"]
default_role = "code"

# A first line `|sep|` draws a rule between the parts of a docstring, as in deepinv.
rst_prolog = """
.. |sep| raw:: html

   <hr />

"""

# -- API -------------------------------------------------------------------------

autosummary_generate = True
# A room of the package lists what its __all__ names, re-exported names included.
autosummary_ignore_module_all = False
autosummary_imported_members = True
autosummary_context = {
    "top_level": list(deepinv_deal.__all__),
    "of_problems": list(deepinv_deal.problems.__all__),
}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
copybutton_exclude = ".linenos, .gp, .go"

# -- Links -----------------------------------------------------------------------

# Each inventory, with a pattern of the targets that only it can resolve.
INVENTORIES = {
    "python": (
        "https://docs.python.org/3/",
        r"(collections|contextlib|dataclasses|enum|functools|os|pathlib|typing)\..*"
        r"|bool|bytes|complex|dict|float|int|list|object|set|str|tuple|type|None"
        r"|\w+(Error|Warning|Exception)",
    ),
    "numpy": ("https://numpy.org/doc/stable/", r"(numpy|np)\..*"),
    "torch": ("https://pytorch.org/docs/stable/", r"torch\..*"),
    "deepinv": ("https://deepinv.github.io/deepinv/", r"(deepinv|dinv)\..*"),
}


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "objects.inv", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


# Without a connection the build must neither fail nor warn: an inventory that does not
# answer is left out, and links to its targets stay plain text.
_answers = {name: _reachable(url) for name, (url, _) in INVENTORIES.items()}
intersphinx_mapping = {
    name: (url, None) for name, (url, _) in INVENTORIES.items() if _answers[name]
}

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", pattern)
    for name, (_, pattern) in INVENTORIES.items()
    if not _answers[name]
] + [
    # Short names in `:param Callable A:` and in annotations, absent from inventories.
    # Type variables.
    (r"py:.*", r".*\.(weights\.\w+|training\.deal)\.(Prior|P)|.*\.engine\.[RP]"),
    # Annotations with internal classes.
    (r"py:.*", r"Penalty|Prior|(.*\.)?(BlockedNormal|IterativeEquation|Bounds)"),
    (
        r"py:.*",
        r"Callable|Iterable|Iterator|Mapping|Sequence|Path|Tensor|Generator|abc\.ABC",
    ),
    (r"py:.*", r"Dataset|DataLoader|Figure|matplotlib\..*"),
    # Aliases of types that have no page of their own.
    (r"py:.*", r"(.*\.)?LinearMap"),
    # Base classes in torch and deepinv are documented under their public names only.
    (r"py:.*", r"torch\.nn\.modules\..*|deepinv\..*"),
]

# -- References ------------------------------------------------------------------

bibtex_bibfiles = ["refs.bib"]
bibtex_default_style = "plain"
bibtex_foot_reference_style = "foot"


def add_references(app, what, name, obj, options, lines):
    """Ends a docstring that cites a paper with its list of references."""
    text = "\n".join(lines)
    if ":footcite" in text and ".. footbibliography::" not in text:
        lines += ["", "|sep|", "", ":References:", "", ".. footbibliography::", ""]


def resolve_by_last_name(app, env, node, contnode):
    """
    Links a name of this package that was written short or by another path.

    An object is documented once, under the path that users import it from, but may be
    mentioned bare, by its room, or by the module that defines it.
    """
    path, _, name = node.get("reftarget", "").rpartition(".")
    if node.get("refdomain") != "py" or path.partition(".")[0] not in (
        "",
        "deepinv_deal",
    ):
        return None
    objects = env.domains["py"].objects
    found = {
        (entry.docname, entry.node_id)
        for key, entry in objects.items()
        if key.rpartition(".")[2] == name and not entry.aliased
    }
    if len(found) != 1:
        return None
    docname, target = found.pop()
    return make_refnode(
        app.builder, node.get("refdoc"), docname, target, contnode, name
    )


def setup(app):
    app.connect("autodoc-process-docstring", add_references)
    app.connect("missing-reference", resolve_by_last_name)


# -- Gallery ---------------------------------------------------------------------


def show_last_expression(block, block_vars, gallery_conf):
    """
    Saves the figure that a block ends with, as a notebook would show it.

    Figures of :mod:`deepinv_deal.interpret` are not pyplot's, so the scraper of
    matplotlib does not find them.
    """
    from matplotlib.figure import Figure

    figure = block_vars["example_globals"].get("___")
    new = isinstance(figure, Figure) and figure.canvas.manager is None
    if not new or hasattr(figure, "in_gallery"):
        return ""
    figure.in_gallery = True
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=100)
    return figure_rst([path], gallery_conf["src_dir"])


sphinx_gallery_conf = {
    "image_scrapers": ("matplotlib", show_last_expression),
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["auto_examples"],
    "filename_pattern": "/demo_",
    "backreferences_dir": "gen_modules/backreferences",
    "doc_module": ("deepinv_deal",),
    "reference_url": {"deepinv_deal": None},
    "first_notebook_cell": "%pip install deepinv-deal",
    "capture_repr": ("_repr_html_",),
    "abort_on_example_error": True,
    "write_computation_times": False,  # their tables fetch scripts from the network
}
# The configuration of the gallery holds objects that cannot be pickled.
suppress_warnings = ["config.cache"]

# -- HTML ------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_title = "deepinv_deal"
html_theme_options = {
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc", "sg_download_links"],
}
html_sidebars = {"changelog": [], "contributing": []}
mathjax3_config = {
    "tex": {"macros": {"argmin": r"\operatorname*{arg\,min}", "norm": [r"\|#1\|", 1]}}
}
