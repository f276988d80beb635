"""Curves against time, wave number, value or step, with bands.

Names map to curves, the reference first: a mean of shape (n,) alone, or (mean, low, high).
`styles` are those of `densitykit.plot.line_styles`; `log` makes the ordinate logarithmic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from densitykit.errors import ShapeError
from densitykit.plot.runs import as_floats
from densitykit.plot.theme import TEMPLATE, line_styles

__all__ = ["distribution_figure", "error_figure", "series_figure", "structure_factor_figure"]
__all__ += ["training_figure"]

Curves = Mapping[str, ArrayLike]
Styles = Mapping[str, Mapping[str, Any]]


def distribution_figure(
    values: Curves,
    centres: ArrayLike,
    *,
    log: bool = True,
    normal: bool = True,
    styles: Styles | None = None,
) -> go.Figure:
    """Draw how often values of the standardised ln(density) occur, beside the normal law.

    Parameters
    ----------
    values
        Name to probability of each bin, shape (bins,), as `metrics.value_distribution` gives it.
        Its outer bins also hold everything beyond them.
    centres
        Centres of the bins, equally spaced, shape (bins,), in standard deviations.
    normal
        Dotted standard normal distribution.
    """
    centres, curves = _curves(centres, values)
    if centres.size < 2:
        raise ShapeError(f"centres has shape {centres.shape}; pass at least two bins")
    curves = {name: c / (centres[1] - centres[0]) for name, c in curves.items()}
    fig = _draw(centres, curves, "standardised ln ρ (standard deviations)", styles, log=log)
    if normal:
        density = np.exp(-(centres**2) / 2) / np.sqrt(2 * np.pi)
        line = dict(color="#888", dash="dot", width=1.5)
        fig.add_scatter(x=_small(centres), y=_small(density), line=line, name="standard normal")
    if log:
        lowest = min((c.min(where=c > 0, initial=1.0) for c in curves.values()), default=1e-4)
        fig.update_yaxes(range=[np.log10(max(lowest / 2, 1e-9)), 0.2])
    return fig.update_yaxes(title_text="probability density (per standard deviation)")


def structure_factor_figure(
    q: ArrayLike, curves: Curves, *, log: bool = False, styles: Styles | None = None
) -> go.Figure:
    """Draw S(q), a marker on every allowed q in 1/angstrom, and below it ratios to the reference.

    The ratios have a logarithmic ordinate that ends at 1/20 and 20; a single curve has none.
    """
    q, curves = _curves(q, curves)
    fig = _draw(q, curves, "q (Å<sup>−1</sup>)", styles, log=log, mode="lines+markers")
    fig.update_yaxes(title_text="S(q) (dimensionless)", rangemode="tozero")
    if len(curves) > 1:
        first = next(iter(curves.values()))[0]
        first = np.where(first > 0, first, np.nan)
        ratios = {name: np.clip(curve / first, 0.02, 50) for name, curve in curves.items()}
        below = _draw(q, ratios, "", styles, log=True, mode="lines+markers")
        fig.add_traces(below.update_traces(yaxis="y2", showlegend=False).data)
        y = np.concatenate([mean for mean, *_ in ratios.values()])
        ends = np.log10(np.clip([np.nanmin(y) / 1.1, np.nanmax(y) * 1.1], 0.05, 20))
        axis = dict(anchor="x", domain=[0, 0.32], range=ends, title_text="ratio to reference")
        axis |= below.layout.yaxis.to_plotly_json()
        fig.update_layout(height=560, yaxis_domain=[0.38, 1], xaxis_anchor="y2", yaxis2=axis)
        fig.update_traces(marker_size=4)
    return fig.update_xaxes(rangemode="tozero")


def error_figure(
    times: ArrayLike, curves: Curves, *, log: bool = False, styles: Styles | None = None
) -> go.Figure:
    """Draw relative l2 errors, given as fractions and shown in percent, against time in fs.

    None of the curves is the reference.
    """
    times, curves = _curves(times, curves)
    curves = {name: 100 * c for name, c in curves.items()}
    fig = _draw(times, curves, "t (fs)", styles or line_styles(curves), log=log)
    fig.update_yaxes(title_text="relative l² error of ρ (%)")
    return fig if log else fig.update_yaxes(rangemode="tozero")


def series_figure(
    times: ArrayLike,
    curves: Curves,
    y_title: str,
    *,
    log: bool = False,
    styles: Styles | None = None,
) -> go.Figure:
    """Draw any quantities against times in fs; `y_title` names the quantity and its unit.

    Where none is the reference, pass `styles=line_styles(curves)`.
    """
    fig = _draw(*_curves(times, curves), "t (fs)", styles, log=log)
    return fig.update_yaxes(title_text=y_title)


def training_figure(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    *,
    window: int | None = None,
) -> go.Figure:
    """Draw a training log, or several joined, on a logarithmic ordinate.

    Columns filled at most steps are shown as running medians, others (validation) as points.

    Parameters
    ----------
    rows
        One mapping a step with key "step", as a log is read; values may be missing.
    columns
        Default: all but step, learning rate and seconds.
    window
        Number of steps in a running median; default a fiftieth of the log.
    """
    if not len(rows):
        raise ShapeError("the training log has no rows; pass at least one")
    log = pd.DataFrame(list(rows)).apply(pd.to_numeric, errors="coerce")
    if "step" not in log:
        raise ShapeError(f"the training log has no column 'step'; it has {[*log]}")
    log = log.set_index("step")
    columns = columns or [k for k in log if k not in ("learning_rate", "seconds")]
    fig, n_steps = _draw(np.empty(0), {}, "step", {}), log.index.nunique()
    for name, line in line_styles(columns).items():
        y = log[name].dropna() if name in log else pd.Series()
        if not y.size:
            raise ShapeError(f"the training log has no column {name!r}; choose from {[*log]}")
        mode = "lines" if 2 * y.size >= n_steps else "lines+markers"
        if mode == "lines":
            width = max(window or n_steps // 50, 0) // 2 * 2 + 1
            y = y.rolling(width, center=True, min_periods=1).median()[:: -(-n_steps // 1000)]
        fig.add_scatter(x=y.index, y=_small(y), name=name, line=line, mode=mode)
    return _log_axis(fig).update_yaxes(title_text="loss, relative error (dimensionless)")


def _small(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def _curves(
    x: ArrayLike, curves: Curves
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Abscissa of shape (n,), and name to rows (mean,) or (mean, low, high), shape (1 or 3, n)."""
    if not isinstance(curves, Mapping):
        raise ShapeError(f"curves are a {type(curves).__name__}; pass a mapping from names")
    x, checked = as_floats(x, "the abscissa"), {}
    for name, values in curves.items():
        checked[name] = np.atleast_2d(as_floats(values, name))
        if x.ndim != 1 or checked[name].shape not in ((1, x.size), (3, x.size)):
            problem = f"{name} has shape {np.shape(values)}, its abscissa {x.shape}"
            raise ShapeError(f"{problem}; pass a value, or (mean, low, high), for each point")
    return x, checked


def _draw(
    x: NDArray[np.float64],
    curves: Mapping[str, NDArray[np.float64]],
    x_title: str,
    styles: Styles | None,
    *,
    log: bool = False,
    mode: str = "lines",
) -> go.Figure:
    """Draw bands, and curves above them; by default the first curve is the reference."""
    styles = line_styles(curves, next(iter(curves), None)) | dict(styles or {})
    fig = go.Figure(layout=dict(template=TEMPLATE, height=420, xaxis_title_text=x_title))
    for name, (mean, *band) in curves.items():
        if band:
            floor = mean.min(where=mean > 0, initial=np.inf) / 10 if log else -np.inf
            outline = np.maximum([*band[1], *band[0][::-1]], floor)
            there = np.isfinite(outline)
            if log:
                there &= np.concatenate([mean, mean[::-1]]) > 0
            path = dict(x=_small([*x, *x[::-1]])[there], y=_small(outline)[there])
            fill = dict(fill="toself", fillcolor=styles[name].get("color"), opacity=0.2)
            quiet = dict(line_width=0, mode="lines", showlegend=False, hoverinfo="skip")
            fig.add_scatter(**path, **fill, legendgroup=name, **quiet)
    for name, (mean, *_) in curves.items():
        y = _small(np.where(mean > 0, mean, np.nan) if log else mean)
        look = dict(line=styles[name], name=name, legendgroup=name, mode=mode)
        fig.add_scatter(x=_small(x), y=y, **look)
    fig.update_layout(showlegend=True)
    return _log_axis(fig) if log else fig


def _log_axis(fig: go.Figure) -> go.Figure:
    """Logarithmic ordinate, with a label on each decade, or on 1, 2 and 5 if decades are few."""
    y = np.concatenate([[1.0], *(trace.y for trace in fig.data)])[1:]
    y = y[y > 0]
    few = y.size and y.max() < 500 * y.min()
    ticks = dict(dtick="D2", tickformat="~g") if few else dict(dtick=1)
    return fig.update_yaxes(type="log", **ticks)
