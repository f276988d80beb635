"""Settings of the site, which scripts/make_site.py builds."""

import re
from typing import Any

from densitykit import __version__

project, author, version = "densitykit", "the densitykit developers", __version__
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["amsmath", "attrs_inline", "dollarmath"]
myst_heading_anchors = 3
mathjax_path = "mathjax/tex-chtml.js"  # no network
nb_execution_mode = "off"
nb_ipywidgets_js = {}
default_role = "code"
autodoc_typehints = "none"
autodoc_use_type_comments = False
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
html_theme = "furo"
html_title = f"densitykit {version}"


suppress_warnings = ["myst.header", "toc.not_included", "ref.python"]
exclude_patterns = ["data/*/*.csv"]


def plain(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Shapes (*, X) and magnitudes |q| are text, not markup; code and equations stay."""
    equation = None
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if equation is not None and line.strip() and indent <= equation:
            equation = None
        if line.lstrip().startswith(".. math::"):
            equation = indent
        if equation is None:
            marker = re.match(r"\s*(\* )?", line)[0]  # of a list
            parts = re.split("(`[^`]*`)", line[len(marker) :])
            parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
            lines[i] = marker + "".join(parts)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
