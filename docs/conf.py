"""How `make docs` builds these pages, and the exported names, into searchable HTML."""

from typing import Any

import fedsea

project = "FedSEA"
author = "the FedSEA authors"
release = version = fedsea.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"FedSEA {release}"
html_show_copyright = html_show_sphinx = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

# A room's exported names are those of its `__all__`, in that order; each has a NumPy docstring.
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_ivar = True


def _plain_bars(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    # |h_A| is a magnitude in our docstrings, and a substitution in reStructuredText.
    lines[:] = [line.replace("|", "\\|") for line in lines]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _plain_bars)
