"""Figures: arrays in, `plotly.graph_objects.Figure` out.

Every function is pure and needs no browser, kernel or torch. Arrays are numpy or
`xarray.DataArray`; lengths are in angstrom, times in fs, densities in angstrom**-3. These
arguments mean the same everywhere: `axis` (0-2 or "x", "y", "z") is the normal of a plane,
`index` its grid point (default: the middle), and `edge` the edge of the cubic cell in angstrom,
or its three edges; without it axes count grid points.

One design holds for all. The reference is dark grey, models take the colours of Okabe and Ito
(distinct to colour-blind eyes) in a fixed order, densities are viridis, absolute errors start at
white. A plane shows grid points as cells, unsmoothed; for a finer picture of the same
function refine it first with `densitykit.fields.resample`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import ArrayLike, NDArray
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots
from scipy.ndimage import median_filter

from densitykit.errors import ShapeError
from densitykit.fields import plane

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

Edge = float | Sequence[float] | None
Styles = Mapping[str, Mapping[str, Any]]

TRUTH = "#333333"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
DENSITY_SCALE = "viridis"
ERROR_SCALE = ["#ffffff", "#fdd0bc", "#fb8a6a", "#d92523", "#67000d"]
_AXIS = dict(showline=True, linecolor="#777", ticks="outside", tickcolor="#777", ticklen=4)
_AXIS |= dict(gridcolor="#e8e8e8", zeroline=False, exponentformat="power", title_standoff=8)
_TITLE = dict(x=0, xref="paper", xanchor="left", y=1, yref="container", yanchor="top", pad_t=14)
_SMALL = dict(size=13, color="#666")
TEMPLATE = go.layout.Template(
    layout=dict(
        font=dict(family="Open Sans, Arial, sans-serif", size=13, color="#222"),
        title=dict(font_size=16, subtitle_font=_SMALL, **_TITLE),
        paper_bgcolor="white",
        plot_bgcolor="white",
        colorway=PALETTE,
        hoverlabel_bgcolor="white",
        margin=dict(l=75, r=20, t=50, b=60),
        xaxis=_AXIS,
        yaxis=_AXIS,
    )
)


def use_notebook_renderer() -> None:
    """Show figures in notebooks interactively, and as pictures where those can be made.

    Sites that show notebooks without running them draw no plotly; a PNG beside each figure
    serves their readers. Making one needs kaleido and a Chrome or Chromium browser: without them,
    or where PLOTLY_RENDERER is set, nothing is lost but the PNG.
    """
    browsers = ("google-chrome", "chromium", "chromium-browser", "chrome")
    can_draw = find_spec("kaleido") and (
        os.environ.get("BROWSER_PATH") or any(map(shutil.which, browsers))
    )
    if "PLOTLY_RENDERER" not in os.environ:
        pio.renderers.default = "plotly_mimetype+png" if can_draw else "plotly_mimetype"


# --- planes ----------------------------------------------------------------------------------


def slice_figure(
    density: ArrayLike,
    axis: int | str = "z",
    index: int | None = None,
    *,
    edge: Edge = None,
    title: str | None = None,
) -> go.Figure:
    """Draw one plane of a density of shape (X, Y, Z); the default title is its position."""
    (field,) = _fields("(X, Y, Z)", density=density)
    axis, index = _locate(field.shape, axis, index)
    fig = _panels(field.shape, axis, edge, 420)
    fig.add_trace(_heatmap(field, axis, index, edge))
    title = title or _position(field.shape, axis, index, edge)
    return fig.update_layout(title_text=title, coloraxis=_colours(plane(field, axis, index)))


def comparison_figure(
    truth: ArrayLike,
    prediction: ArrayLike,
    axis: int | str = "z",
    index: int | None = None,
    *,
    edge: Edge = None,
    names: tuple[str, str] = ("reference", "prediction"),
) -> go.Figure:
    """Draw a plane of two densities, on one colour scale, and of their absolute difference.

    Both have shape (X, Y, Z). The subtitle gives the relative l2 error of the whole fields.
    """
    truth, prediction = _fields("(X, Y, Z)", truth=truth, prediction=prediction)
    axis, index = _locate(truth.shape, axis, index)
    error = np.abs(prediction - truth)
    margin = dict(t=100, b=130, r=25)
    fig = _panels(truth.shape, axis, edge, 280, columns=(*names, "|error|"), margin=margin)
    for i, field in enumerate((truth, prediction, error)):
        heatmap = _heatmap(field, axis, index, edge, "coloraxis2" if i == 2 else "coloraxis")
        fig.add_trace(heatmap, 1, i + 1)
    both = plane(np.stack([truth, prediction]), axis, index)
    norm = np.linalg.norm(truth) or np.nan  # no relative error of nothing
    relative = 100 * np.linalg.norm(error) / norm
    return fig.update_layout(
        title_text=_position(truth.shape, axis, index, edge),
        title_subtitle_text=f"relative l² error of the whole field: {relative:.3g} %",
        coloraxis=_colours(both, below=(0, fig.layout.xaxis2.domain[1])),
        coloraxis2=_colours(plane(error, axis, index), below=fig.layout.xaxis3.domain, error=True),
    )


def worst_slice(truth: ArrayLike, prediction: ArrayLike) -> tuple[str, int]:
    """Find the axis and index of the grid plane with the largest l2 error (rms over its points).

    Both fields have shape (X, Y, Z).
    """
    truth, prediction = _fields("(X, Y, Z)", truth=truth, prediction=prediction)
    square = np.square(prediction - truth, dtype=np.float64)
    profiles = [square.mean(axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    axis = int(np.argmax([profile.max() for profile in profiles]))
    return "xyz"[axis], int(profiles[axis].argmax())


def worst_slice_figure(
    truth: ArrayLike,
    prediction: ArrayLike,
    *,
    edge: Edge = None,
    names: tuple[str, str] = ("reference", "prediction"),
) -> go.Figure:
    """Draw `comparison_figure` in the plane of `worst_slice`."""
    axis, index = worst_slice(truth, prediction)
    fig = comparison_figure(truth, prediction, axis, index, edge=edge, names=names)
    return fig.update_layout(title_text=f"Plane of largest error, {fig.layout.title.text}")


def panels_figure(
    fields: Mapping[str, ArrayLike],
    times: ArrayLike,
    picks: Sequence[int],
    axis: int | str = "z",
    index: int | None = None,
    *,
    edge: Edge = None,
) -> go.Figure:
    """Draw rollouts below the reference run: one row a run, one column a time.

    Parameters
    ----------
    fields
        Name to density, shape (T, X, Y, Z); the reference first. All panels share its range of
        colours; what lies outside is saturated.
    times
        Shape (T,), in fs.
    picks
        Frames to show.
    """
    runs, times = _films(fields, times, list(picks))
    axis, index = _locate(runs[0].shape[1:], axis, index)
    columns = [f"{time:g} fs" for time in times]
    fig = _panels(runs[0].shape[1:], axis, edge, 240, rows=tuple(fields), columns=columns)
    for row, column in np.ndindex(len(runs), len(columns)):
        fig.add_trace(_heatmap(runs[row][column], axis, index, edge), row + 1, column + 1)
    return fig.update_layout(
        title_text=_position(runs[0].shape[1:], axis, index, edge),
        coloraxis=_colours(plane(runs[0], axis, index)),
    )


def film_figure(
    density_time: ArrayLike | Mapping[str, ArrayLike],
    times: ArrayLike,
    axis: int | str = "z",
    index: int | None = None,
    *,
    edge: Edge = None,
    max_frames: int = 40,
) -> go.Figure:
    """Animate a plane, with slider and play button; works in saved pages, without a kernel.

    Parameters
    ----------
    density_time
        Shape (T, X, Y, Z), or name to such arrays, shown side by side with the range of colours
        of the first.
    times
        Shape (T,), in fs.
    max_frames
        A longer run is shown with the smallest stride that keeps to this number.
    """
    named = density_time if isinstance(density_time, Mapping) else {"": density_time}
    every = max(1, -(-np.size(times) // max_frames))
    runs, times = _films(named, times, slice(None, None, every))
    axis, index = _locate(runs[0].shape[1:], axis, index)
    fig = _panels(runs[0].shape[1:], axis, edge, 420, columns=tuple(named), margin=dict(b=130))
    for column, run in enumerate(runs):
        fig.add_trace(_heatmap(run[0], axis, index, edge), 1, column + 1)
    planes = [[_picture(run[frame], axis, index) for run in runs] for frame in range(len(times))]
    fig.frames = [
        go.Frame(name=str(frame), data=[go.Heatmap(z=z) for z in row], traces=[*range(len(row))])
        for frame, row in enumerate(planes)
    ]
    return fig.update_layout(
        title_text=_position(runs[0].shape[1:], axis, index, edge),
        coloraxis=_colours(plane(runs[0], axis, index)),
        **_film_controls(times),
    )


def _film_controls(
    times: NDArray[np.floating], prefix: str = "t = ", suffix: str = " fs"
) -> dict[str, Any]:
    """Slider and play button for frames named 0, 1, ..."""
    now = dict(mode="immediate", transition_duration=0, frame=dict(duration=0, redraw=True))
    play = now | dict(fromcurrent=True, frame=dict(duration=100, redraw=True))
    buttons = [
        dict(label=label, method="animate", args=args)
        for label, args in (("▶", [None, play]), ("❚❚", [[None], now]))
    ]
    steps = [
        dict(label=f"{time:g}", method="animate", args=[[str(frame)], now])
        for frame, time in enumerate(times)
    ]
    place = dict(y=0, yanchor="top", xanchor="left")
    menu = dict(type="buttons", direction="left", showactive=False, buttons=buttons)
    shown = dict(prefix=prefix, suffix=suffix, xanchor="right")
    slider = dict(steps=steps, currentvalue=shown, x=0.25, len=0.75, pad_t=45, **place)
    return dict(sliders=[slider], updatemenus=[menu | dict(x=0, pad_t=60, **place)])


def _films(
    fields: Mapping[str, ArrayLike], times: ArrayLike, frames: slice | list[int]
) -> tuple[list[NDArray[np.floating]], NDArray[np.floating]]:
    """Chosen frames of some runs, and their times; only these frames are read."""
    times = np.asarray(times)
    for name, field in fields.items():
        if times.ndim != 1 or np.shape(field)[:1] != times.shape:
            problem = f"{name or 'density_time'} has shape {np.shape(field)}, times {times.shape}"
            raise ShapeError(f"{problem}; pass one time for each frame")
    try:
        chosen = {name or "density_time": field[frames] for name, field in fields.items()}
        times = times[frames]
    except IndexError as error:
        raise ShapeError(f"picks {frames}: {error}; choose frames of the run") from error
    return _fields("(T, X, Y, Z)", **chosen), times


def _fields(axes: str, /, **arrays: ArrayLike) -> list[NDArray[np.floating]]:
    """Arrays of one shape with the given axes; ShapeError names the one that has not."""
    if not arrays:
        raise ShapeError("there is nothing to draw; pass at least one field")
    first = np.shape(next(iter(arrays.values())))
    for name, array in arrays.items():
        shape = np.shape(array)
        if len(shape) != len(axes.split(",")) or 0 in shape:
            raise ShapeError(f"{name} has shape {shape}; pass a non-empty array {axes}")
        if shape != first:
            raise ShapeError(f"{name} has shape {shape}, not {first}; pass fields on one grid")
    return [np.asarray(array) for array in arrays.values()]


def _locate(shape: Sequence[int], axis: int | str, index: int | None) -> tuple[int, int]:
    """Axis as a number and index as a non-negative one, both checked."""
    number = dict(x=0, y=1, z=2).get(axis, axis)
    if number not in (0, 1, 2):
        raise ShapeError(f"there is no axis {axis!r}; choose 'x', 'y' or 'z'")
    points = shape[number]
    index = points // 2 if index is None else int(index)
    if not -points <= index < points:
        raise ShapeError(f"{'xyz'[number]} has no plane {index}; choose from 0 to {points - 1}")
    return number, index % points


def _spacings(shape: Sequence[int], edge: Edge) -> NDArray[np.float64]:
    """Distance of grid points along each axis, in angstrom or in grid points."""
    return np.ones(3) if edge is None else np.broadcast_to(edge, 3) / np.array(shape)


def _position(shape: Sequence[int], axis: int, index: int, edge: Edge) -> str:
    """Name of a plane, such as "z = 4.56 Å"."""
    place = index * _spacings(shape, edge)[axis]
    return f"{'xyz'[axis]} = " + (f"{index} (grid point)" if edge is None else f"{place:.2f} Å")


def _picture(field: NDArray[np.floating], axis: int, index: int) -> NDArray[np.float32]:
    """Plane of a field with its first axis to the right and its second upwards."""
    return plane(field, axis, index).T.astype(np.float32)


def _heatmap(
    field: NDArray[np.floating], axis: int, index: int, edge: Edge, coloraxis: str = "coloraxis"
) -> go.Heatmap:
    right, up = (i for i in range(3) if i != axis)
    steps, unit = _spacings(field.shape, edge), "" if edge is None else " Å"
    hover = f"{'xyz'[right]} = %{{x:.4g}}{unit}<br>{'xyz'[up]} = %{{y:.4g}}{unit}"
    return go.Heatmap(
        z=_picture(field, axis, index),
        **dict(x0=0, dx=float(steps[right]), y0=0, dy=float(steps[up]), coloraxis=coloraxis),
        hovertemplate=f"{hover}<br>%{{z:.4g}} Å<sup>−3</sup><extra></extra>",
    )


def _colours(
    values: NDArray[np.floating], *, below: Sequence[float] | None = None, error: bool = False
) -> dict[str, Any]:
    """Colour axis over the range of values; the bar is on the right, or below a span of x."""
    title = "|error| (Å<sup>−3</sup>)" if error else "ρ (Å<sup>−3</sup>)"
    bar = dict(title_text=title, thickness=14, outlinewidth=0, exponentformat="power")
    if below is None:
        bar |= dict(x=1, xpad=16, ypad=0, len=1)
    else:
        bar |= dict(orientation="h", x=sum(below) / 2, len=below[1] - below[0], xpad=0, nticks=6)
        bar |= dict(yref="container", y=0, yanchor="bottom", ypad=10, title_side="bottom")
    scale = ERROR_SCALE if error else DENSITY_SCALE
    return dict(colorscale=scale, colorbar=bar) | colour_range(values, 0.0 if error else None)


def colour_range(values: NDArray[np.floating], low: float | None = None) -> dict[str, float]:
    """Ends of a colour axis, cmin and cmax: those of the finite values, or from `low` up."""
    finite = values[np.isfinite(values)]
    ends = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low, high = ends[0] if low is None else low, ends[1]
    return dict(cmin=low, cmax=high if high > low else low + 1)


def _panels(
    shape: Sequence[int],
    axis: int,
    edge: Edge,
    size: int,
    *,
    rows: Sequence[str] = ("",),
    columns: Sequence[str] = ("",),
    margin: Mapping[str, int] | None = None,
) -> go.Figure:
    """Empty panels of equal aspect, at most `size` pixels long, with labels on the outer sides."""
    right, up = (i for i in range(3) if i != axis)
    extent = _spacings(shape, edge) * shape
    gap = 16
    scale = max(110, min(size, 900 // len(columns) - gap)) / max(extent[right], extent[up])
    wide, tall = round(scale * extent[right]), round(scale * extent[up])
    width, height = len(columns) * (wide + gap) - gap, len(rows) * (tall + gap) - gap
    spacing = dict(horizontal_spacing=gap / width, vertical_spacing=gap / height)
    fig = make_subplots(len(rows), len(columns), column_titles=list(columns), **spacing)
    fig.update_annotations(font_size=13)
    unit = "(grid point)" if edge is None else "(Å)"
    inner = dict(showticklabels=False, showgrid=False, constrain="domain")
    fig.update_xaxes(**inner, matches="x").update_yaxes(**inner, matches="y")
    fig.update_xaxes(row=len(rows), showticklabels=True, title_text=f"{'xyz'[right]} {unit}")
    for row, name in enumerate(rows, start=1):
        label = f"<b>{name}</b><br>" * bool(name) + f"{'xyz'[up]} {unit}"
        fig.update_yaxes(row=row, col=1, showticklabels=True, title_text=label)
    margin = dict(l=90, r=95, t=75 if any(columns) else 50, b=60) | dict(margin or {})
    width, height = width + margin["l"] + margin["r"], height + margin["t"] + margin["b"]
    fig.update_layout(template=TEMPLATE, margin=margin, width=width, height=height)
    return fig.update_layout(yaxis_scaleanchor="x")


# --- curves ----------------------------------------------------------------------------------


def line_styles(names: Iterable[str], truth: str | None = None) -> dict[str, dict[str, Any]]:
    """Name to plotly line; pass it as `styles` so that several figures agree. `truth` is grey."""
    names = list(names)
    styles = {truth: dict(color=TRUTH, dash="solid", width=3)} if truth in names else {}
    for i, name in enumerate(name for name in names if name != truth):
        dash = ("solid", "dash", "dot")[i // len(PALETTE) % 3]
        styles[name] = dict(color=PALETTE[i % len(PALETTE)], dash=dash, width=2)
    return styles


def distribution_figure(
    values: Mapping[str, ArrayLike],
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
        Name to probability of each bin, shape (bins,), as `metrics.value_distribution` gives it;
        the reference first. Its outer bins also hold everything beyond them.
    centres
        Centres of the bins, equally spaced, shape (bins,), in standard deviations.
    log, normal
        Logarithmic ordinate; dotted standard normal distribution.
    """
    centres, curves = _curves(centres, values)
    if centres.size < 2:
        raise ShapeError(f"centres has shape {centres.shape}; pass at least two bins")
    curves = {name: c / (centres[1] - centres[0]) for name, c in curves.items()}
    fig = _draw(centres, curves, "standardised ln ρ (standard deviations)", styles, log=log)
    density = np.exp(-(centres**2) / 2) / np.sqrt(2 * np.pi)
    if normal:
        line = dict(color="#888", dash="dot", width=1.5)
        curve = dict(x=_small(centres), y=_small(density), mode="lines", line=line)
        fig.add_scatter(**curve, name="standard normal")
    if log:
        lowest = min((c.min(where=c > 0, initial=1.0) for c in curves.values()), default=1e-4)
        fig.update_yaxes(range=[np.log10(max(lowest / 2, 1e-9)), 0.2])
    return fig.update_yaxes(title_text="probability density (per standard deviation)")


def structure_factor_figure(
    q: ArrayLike, curves: Mapping[str, ArrayLike], *, styles: Styles | None = None
) -> go.Figure:
    """Draw S(q) with a marker on every allowed q, and error bands.

    Parameters
    ----------
    q
        Shape (nq,), in 1/angstrom.
    curves
        Name to (mean, low, high), or to the mean alone, each of shape (nq,); the reference first.
    """
    fig = _draw(*_curves(q, curves), "q (Å<sup>−1</sup>)", styles, mode="lines+markers")
    fig.update_xaxes(rangemode="tozero")
    return fig.update_yaxes(title_text="S(q) (dimensionless)", rangemode="tozero")


def error_figure(
    times: ArrayLike,
    curves: Mapping[str, ArrayLike],
    *,
    log: bool = False,
    styles: Styles | None = None,
) -> go.Figure:
    """Draw relative l2 errors, given as fractions and shown in percent, against time.

    Parameters
    ----------
    times
        Shape (nt,), in fs.
    curves
        Name to error, shape (nt,), or to (mean, low, high). None of them is the reference.
    """
    times, curves = _curves(times, curves)
    curves = {name: 100 * c for name, c in curves.items()}
    fig = _draw(times, curves, "t (fs)", styles or line_styles(curves), log=log)
    fig.update_yaxes(title_text="relative l² error of ρ (%)")
    return fig if log else fig.update_yaxes(rangemode="tozero")


def series_figure(
    times: ArrayLike,
    curves: Mapping[str, ArrayLike],
    y_title: str,
    *,
    log: bool = False,
    styles: Styles | None = None,
) -> go.Figure:
    """Draw any quantities, each of shape (nt,) or (mean, low, high), against times in fs.

    The reference comes first; where there is none, pass `styles=line_styles(curves)`. `y_title`
    names the quantity and its unit.
    """
    fig = _draw(*_curves(times, curves), "t (fs)", styles, log=log)
    return fig.update_yaxes(title_text=y_title)


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
    values, x = np.asarray(values, float), np.asarray(x, float)
    named = {name: np.asarray(y, float) for name, y in (curves | (markers or {})).items()}
    for name, y in named.items():
        expected = (values.size, x.size if name in curves else y.shape[-1])
        if y.shape != expected:
            raise ShapeError(f"{name} has shape {y.shape}; pass {expected}, a row for each value")
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
    return fig.update_layout(**_film_controls(values, prefix, suffix))


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
        One mapping a step with key "step", as `training.fit` returns them or `csv.DictReader`
        reads them from its log; a value may be missing, empty or NaN.
    columns
        Default: all but step, learning rate and seconds.
    window
        Number of steps in a running median; default a fiftieth of the log.
    """
    if not rows:
        raise ShapeError("the training log has no rows; pass at least one")
    known = dict.fromkeys(key for row in rows for key in row)
    columns = columns or [k for k in known if k not in ("step", "learning_rate", "seconds")]
    fig = _draw(np.empty(0), {}, "step", {})
    n_steps = len({row["step"] for row in rows})
    window, stride = window or n_steps // 50, -(-n_steps // 1000)
    for name, line in line_styles(columns).items():
        pairs = [(row["step"], row.get(name)) for row in rows]
        step, y = np.array([p for p in pairs if p[1] not in (None, "")], float).reshape(-1, 2).T
        step, y = step[np.isfinite(y)], y[np.isfinite(y)]
        if not y.size:
            raise ShapeError(f"the training log has no column {name!r}; choose from {list(known)}")
        if 2 * y.size < n_steps:
            fig.add_scatter(x=step, y=_small(y), name=name, line=line, mode="lines+markers")
        else:
            y = median_filter(y, window // 2 * 2 + 1, mode="nearest")
            x, y = step[::stride], _small(y[::stride])
            fig.add_scatter(x=x, y=y, name=name, line=line, mode="lines")
    return _log_axis(fig).update_yaxes(title_text="loss, relative error (dimensionless)")


def _small(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def _curves(
    x: ArrayLike, curves: Mapping[str, ArrayLike]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Abscissa of shape (n,), and name to rows (mean,) or (mean, low, high), shape (1 or 3, n)."""
    x, checked = np.asarray(x, float), {}
    for name, values in curves.items():
        try:
            checked[name] = np.atleast_2d(np.asarray(values, float))
        except ValueError as error:
            raise ShapeError(f"{name}: {error}; pass (mean, low, high) of one length") from error
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
            fill = f"rgba{(*hex_to_rgb(styles[name]['color']), 0.2)}"
            quiet = dict(line_width=0, mode="lines", showlegend=False, hoverinfo="skip")
            fig.add_scatter(**path, fill="toself", fillcolor=fill, legendgroup=name, **quiet)
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
