"""Films of densities in one dimension: curves that move with a slider, nuclei below them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from densitykit.errors import ShapeError
from densitykit.plot.runs import as_floats
from densitykit.plot.theme import TEMPLATE, TRUTH, film_controls, line_styles

__all__ = ["curve_film"]


def curve_film(
    x: ArrayLike,
    curves: Mapping[str, ArrayLike],
    values: ArrayLike,
    *,
    prefix: str = "t = ",
    suffix: str = " fs",
    markers: Mapping[str, ArrayLike] | None = None,
) -> go.Figure:
    """Animate curves over any abscissa, with slider and play button; needs no kernel.

    Parameters
    ----------
    x
        Shape (n,).
    curves
        Name to values, shape (T, n). The ordinate spans them all. Of several, the first is the
        reference.
    values
        What the slider shows, shape (T,), between `prefix` and `suffix`.
    markers
        Name to abscissas, shape (T, m), of points below the curves: nuclei.

    Raises
    ------
    ShapeError
        An array does not fit.
    """
    values, x = as_floats(values, "values"), as_floats(x, "x")
    named = {name: as_floats(y, name) for name, y in (curves | (markers or {})).items()}
    for name, y in named.items():
        expected = (values.size, x.size if name in curves else y.size // max(values.size, 1))
        if y.shape != expected:
            raise ShapeError(f"{name} has shape {y.shape}; pass {expected}, a row for each value")
    if not curves:
        raise ShapeError("there is nothing to draw; pass at least one curve")
    low, high = (f([f(named[name]) for name in curves]) for f in (np.min, np.max))
    digits = 4 - int(np.ceil(np.log10(max(high - low, 1e-300))))  # saves most of the file

    def traces(frame: int) -> list[dict[str, Any]]:
        lines = [dict(y=np.round(named[name][frame], digits)) for name in curves]
        return lines + [dict(x=np.round(named[name][frame], 2)) for name in markers or {}]

    fig = go.Figure(layout=dict(template=TEMPLATE, height=450, margin_b=150))
    styles = line_styles(curves, next(iter(curves)) if len(curves) > 1 else None)
    for name, trace in zip(curves, traces(0), strict=False):
        fig.add_scatter(x=x, **trace, name=name, line=styles[name], mode="lines")
    for name, trace in zip(markers or {}, traces(0)[len(curves) :], strict=True):
        y = np.full(named[name].shape[1], low - 0.05 * (high - low))
        look = dict(mode="markers", marker=dict(color=TRUTH, size=10))
        fig.add_scatter(y=y, **trace, name=name, **look)
    fig.frames = [go.Frame(name=str(n), data=traces(n)) for n in range(values.size)]
    fig.update_xaxes(range=[x.min(), x.max()])
    margin = 0.1 * (high - low)
    fig.update_yaxes(range=[low - margin, high + margin])
    return fig.update_layout(**film_controls([f"{value:g}" for value in values], prefix, suffix))
