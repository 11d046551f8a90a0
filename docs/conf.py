"""How Sphinx builds the documentation, which `make docs` asks it to do.

The pages are Markdown that can be read without Sphinx, so there is nothing in them for Sphinx alone. What it needs
besides is made here: the table of contents from the links of the first page, and links to what lies outside of this
folder.
"""

from __future__ import annotations

import re
from typing import Any, List

import chainer_accum

project = "chainer_accum"
author = "The chainer_accum developers"
version = release = chainer_accum.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
root_doc = "index"
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings have them in words, as Chainer's do
napoleon_use_ivar = True

# A reference must lead somewhere, unless it is to Chainer, to a type in words, or to what a class inherits or describes
# in its own docstring.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"chainer(\..*)?"),
    (r"py:class", r"callable|device specifier|sequence|LockstepPolicy"),
    (r"py:(attr|meth)", r"[a-z_]+|chainer_accum\.AccumulatingUpdater\.[a-z_]+"),
]

highlight_language = "text"  # of blocks that name no language, such as output

html_theme = "furo"
html_title = "chainer_accum"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_copy_source = False


def add_contents(app: Any, docname: str, source: List[str]) -> None:
    """Adds the table of contents to the first page: for each of its sections, the pages to which that links."""
    if docname != root_doc:
        return
    for section in source[0].split("\n## ")[1:]:
        caption, text = section.split("\n", 1)
        pages = "\n".join(re.findall(r"\]\((\w+)\.(?:md|rst)\)", text))
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def leave_folder(app: Any, docname: str, source: List[str]) -> None:
    """Lets links out of this folder lead from build/docs to the same files, which are not part of the documentation."""
    source[0] = re.sub(r"\]\(\.\./([^)]*)\)", r"](../../\1){.external}", source[0])


def setup(app: Any) -> None:
    """Tells Sphinx of both."""
    app.connect("source-read", add_contents)
    app.connect("source-read", leave_folder)
