"""The documentation site: `make docs` builds it into build/docs, without a network; a warning is an error."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `generated`

project = "trl_ext"
author = "The trl_ext authors"
copyright = "The trl_ext authors, Apache-2.0"
release = version = installed("trl-ext")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated",
]
exclude_patterns = ["results/raw", "results/real/raw"]
nitpicky = False  # links between pages are checked by MyST; types in docstrings are often those of TRL and torch
suppress_warnings = ["myst.xref_ambiguous"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

smartquotes_action = "qe"  # no dashes: `--flag` in a sentence stays one
default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_google_docstring = True

html_theme = "furo"
html_title = f"trl_ext {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
