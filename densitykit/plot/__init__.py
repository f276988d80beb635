"""Figures from trajectories or arrays; `densitykit.plot.slices` says what they take.

Widgets for notebooks are in `densitykit.plot.explore`.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "curves": "distribution_figure error_figure series_figure structure_factor_figure "
    "training_figure",
    "slices": "comparison_figure film_figure line panels_figure plane slice_figure",
    "theme": "PALETTE TEMPLATE TRUTH colour_range line_styles use_notebook_renderer",
    "runs": "difference",
    "volume": "isosurface isosurface_film",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import plotly only when a figure is wanted: it takes 0.1 s or more."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
