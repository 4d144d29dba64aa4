"""Builds the documentation: `sphinx-build -W docs docs/_build`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import calib_jax

project = "calib_jax"
copyright = "the authors of calib_jax, Apache 2.0"
version = release = calib_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"calib_jax {version}"

# Docstrings name functions and arguments in single backticks; what Sphinx knows becomes a link.
default_role = "py:obj"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
