"""Figures, from arrays or datasets to plotly."""

from densitykit.plot.figures import (
    colour_range,
    comparison_figure,
    curve_film,
    distribution_figure,
    error_figure,
    film_figure,
    line_styles,
    panels_figure,
    series_figure,
    slice_figure,
    structure_factor_figure,
    training_figure,
    use_notebook_renderer,
    worst_slice,
    worst_slice_figure,
)

__all__ = [
    "colour_range",
    "comparison_figure",
    "curve_film",
    "distribution_figure",
    "error_figure",
    "film_figure",
    "line_styles",
    "panels_figure",
    "series_figure",
    "slice_figure",
    "structure_factor_figure",
    "training_figure",
    "use_notebook_renderer",
    "worst_slice",
    "worst_slice_figure",
]
