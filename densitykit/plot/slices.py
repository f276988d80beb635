"""Planes of densities: one, beside a prediction, in rows of rollouts, as films.

A figure takes a trajectory (`xarray.Dataset`) and knows its cell, atoms and times; or a density
alone, shape (X, Y, Z) or (T, X, Y, Z) in angstrom**-3, whose `cell` may be given: an edge, three
edges or three lattice vectors in angstrom. Without it axes count grid points. Where one frame is
drawn, it is the first. Several densities are a mapping from names, the reference first. These
arguments mean the same everywhere:

* `axis` (0-2 or "x", "y", "z") is the lattice vector that leaves the plane, `index` the grid
  point along it (default: the middle);
* `smooth` draws the trigonometric polynomial that the grid stands for, else the grid points;
* `within` draws atoms no farther from the plane than that, in angstrom; 0 draws none;
* `times`, shape (T,) in fs, are for densities that have none of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray
from plotly.subplots import make_subplots

from densitykit.errors import ShapeError
from densitykit.plot.curves import series_figure
from densitykit.plot.planes import Plane, grid_plane, images_near, lattice_plane, values_at
from densitykit.plot.runs import Drawable, Run, as_run, as_runs, at_common_times
from densitykit.plot.theme import TEMPLATE, colour_axis, film, heading, line_styles
from densitykit.units import SYMBOLS

__all__ = ["comparison_figure", "film_figure", "line", "panels_figure", "plane", "slice_figure"]

WITHIN = 0.5  # angstrom


class Look(NamedTuple):
    """How planes are drawn: pixels along the longer side, and as above."""

    pixels: int
    smooth: bool
    within: float


def slice_figure(
    density: Drawable,
    axis: int | str = "z",
    index: int | None = None,
    *,
    cell: ArrayLike | None = None,
    smooth: bool = True,
    within: float = WITHIN,
) -> go.Figure:
    """Draw one plane of grid points; the title says where it is."""
    run = as_run(density, cell=cell)
    here = grid_plane(run.grid, run.cell_at(), axis, index)
    return _single(run, here, Look(72, smooth, within))


def plane(
    density: Drawable,
    hkl: Sequence[int] = (1, 1, 1),
    through: ArrayLike | None = None,
    *,
    cell: ArrayLike | None = None,
    within: float = WITHIN,
) -> go.Figure:
    """Draw any lattice plane, by Fourier interpolation.

    Parameters
    ----------
    hkl
        Miller indices with respect to the cell.
    through
        A point in angstrom, drawn as a corner. Default: the first atom, or the origin.
    """
    run = as_run(density, cell=cell)
    if through is None:
        through = np.zeros(3) if run.atoms() is None else run.atoms()[1][0]
    here = lattice_plane(run.cell_at(), hkl, through)
    return _single(run, here, Look(96, True, within))


def line(
    density: Drawable | Mapping[str, Drawable],
    start: ArrayLike,
    end: ArrayLike,
    *,
    cell: ArrayLike | None = None,
    within: float = WITHIN,
) -> go.Figure:
    """Draw a density, or several, along a straight line, by Fourier interpolation.

    Parameters
    ----------
    start, end
        Points in angstrom, inside the cell or not.
    """
    runs = as_runs(density, cell)
    first, *_ = runs.values()
    start, end, inverse = np.asarray(start), np.asarray(end), np.linalg.inv(first.cell_at())
    length = np.linalg.norm(end - start) if start.shape == end.shape == (3,) else 0.0
    if not 0 < length < np.inf:
        raise ShapeError(f"no line from {start} to {end}; pass two points in {first.unit}")
    ends = np.array([start, end])
    x = np.linspace(0, length, 401)
    s = (ends[0] + np.outer(x / length, ends[1] - ends[0])) @ inverse
    curves = {name or "ρ": values_at(run.finite_field(), s) for name, run in runs.items()}
    fig = series_figure(x, curves, f"{first.kind} (Å<sup>−3</sup>)", styles=line_styles(curves))
    if first.atoms() is not None and within > 0:
        numbers, positions = first.atoms()
        r = images_near(positions, first.cell_at(), ends @ inverse, within) - ends[0]
        along = r @ (ends[1] - ends[0]) / length
        far = np.linalg.norm(r - np.outer(along / length, ends[1] - ends[0]), axis=1)
        near = (far <= within) & (abs(along / length - 0.5) < 0.5001)
        height = np.interp(along[near], x, next(iter(curves.values())))
        fig.add_trace(_marks(along[near], height, np.resize(numbers, len(r))[near]))
    spots = [", ".join(f"{c:.2f}" for c in point).replace("-", "−") for point in ends]
    text = f"({spots[0]}) to ({spots[1]}) {first.unit}"
    text = heading(text, first.moment(), _nearby(first, within, "line"))
    fig.update_layout(text, width=760, margin_t=66, showlegend=len(runs) > 1)
    return fig.update_xaxes(title_text=f"distance ({first.unit})")


def _marks(
    x: NDArray[np.floating], y: NDArray[np.floating], numbers: NDArray[np.integer]
) -> go.Scatter:
    """Atoms with their symbols."""
    circle = dict(size=17, color="rgba(255,255,255,0.85)", line=dict(color="#222", width=1))
    marks = dict(mode="markers+text", marker=circle, textfont=dict(size=10, color="#222"))
    marks |= dict(hoverinfo="skip", showlegend=False, cliponaxis=False)
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    return go.Scatter(x=x, y=y, text=[SYMBOLS[n] for n in numbers], **marks)


def _single(run: Run, here: Plane, look: Look) -> go.Figure:
    traces = panel(run, 0, here, look)
    text = heading(here.title(run.unit), run.moment(), _nearby(run, look.within))
    colours = colour_axis(traces[0].z, run.kind)
    return _panels([[traces]], here, run, 380, **text, coloraxis=colours)


def comparison_figure(
    fields: Mapping[str, Drawable],
    axis: int | str = "z",
    index: int | None = None,
    *,
    cell: ArrayLike | None = None,
    smooth: bool = True,
    within: float = WITHIN,
) -> go.Figure:
    """Draw a plane of a density and of its prediction, on one scale, and the absolute error.

    `fields` maps two names. Below the title is the relative l2 error of the whole fields.
    """
    runs = as_runs(fields, cell)
    if len(runs) != 2:
        raise ShapeError(f"there are {len(runs)} fields, {list(runs)}; pass two to compare")
    first, _ = runs.values()
    here = grid_plane(first.grid, first.cell_at(), axis, index)
    look = Look(60, smooth, within)
    truth, prediction = (run.field() for run in runs.values())
    panels = [panel(run, 0, here, look) for run in runs.values()]
    error = _heatmap(prediction - truth, here, look, first.unit)
    error.update(z=abs(error.z), coloraxis="coloraxis2")
    bars = [
        colour_axis(np.stack([panel[0].z for panel in panels])),
        colour_axis(error.z, "|error|"),
    ]
    if not error.z.any():
        bars[1]["cmax"] = 0.01 * (bars[0]["cmax"] - bars[0]["cmin"])
    norm = np.linalg.norm(truth) or np.nan  # no relative error of nothing
    percent = 100 * np.linalg.norm(prediction - truth) / norm
    text = heading(here.title(first.unit), f"relative l² error of the field: {percent:.3g} %")
    bars[1]["colorbar"].update(x=1.12)
    columns, margin = [*runs, "|error|"], dict(r=185)
    options = dict(columns=columns, margin=margin, coloraxis=bars[0], coloraxis2=bars[1])
    return _panels([[*panels, [error, _outside(here)]]], here, first, 250, **options, **text)


def panels_figure(
    fields: Mapping[str, Drawable],
    times: ArrayLike | None = None,
    picks: Sequence[int] | None = None,
    axis: int | str = "z",
    index: int | None = None,
    *,
    cell: ArrayLike | None = None,
    smooth: bool = True,
    within: float = WITHIN,
) -> go.Figure:
    """Draw rollouts below the reference run: one row a run, one column a time.

    The runs are shown at times that they have in common, with the range of colours of the
    reference; `picks` are the frames of these to show, default four.
    """
    runs = at_common_times(as_runs(fields, cell, times))
    first, *_ = runs.values()
    n = len(first.density)
    picks = np.linspace(0, n - 1, min(n, 4)).round().astype(int) if picks is None else picks
    if not len(picks) or not all(pick in range(-n, n) for pick in picks):
        raise ShapeError(f"picks {list(picks)}: choose frames of the run, which has {n}")
    here, look = grid_plane(first.grid, first.cell_at(), axis, index), Look(48, smooth, within)
    rows = [[panel(run, pick, here, look) for pick in picks] for run in runs.values()]
    colours = colour_axis(np.stack([panel[0].z for panel in rows[0]]), first.kind)
    text = heading(here.title(first.unit), _nearby(first, within))
    columns = [first.label(pick) for pick in picks]
    options = dict(rows=list(runs), columns=columns, coloraxis=colours)
    return _panels(rows, here, first, 240, **options, **text)


def film_figure(
    density: Drawable | Mapping[str, Drawable],
    times: ArrayLike | None = None,
    axis: int | str = "z",
    index: int | None = None,
    *,
    cell: ArrayLike | None = None,
    max_frames: int = 40,
    smooth: bool = True,
    within: float = WITHIN,
) -> go.Figure:
    """Animate a plane, with slider and play button; works in saved pages, without a kernel.

    `density` is a run, or maps names to runs, which are shown side by side at times that they
    have in common, with the range of colours of the first. Longer ones than `max_frames` are
    shown with a stride.
    """
    runs = at_common_times(as_runs(density, cell, times))
    first, *_ = runs.values()
    shown = first.shown(max_frames)
    places = [grid_plane(first.grid, first.cell_at(frame), axis, index) for frame in shown]
    look, (here, *_) = Look(32, smooth, within), places
    films = [
        [panel(run, frame, place, look) for run in runs.values()]
        for frame, place in zip(shown, places, strict=True)
    ]
    colours = colour_axis(np.concatenate([panels[0][0].z.ravel() for panels in films]), first.kind)
    text = heading(here.title(first.unit), _nearby(first, within))
    options = dict(columns=list(runs), margin=dict(b=120), coloraxis=colours)
    fig = _panels([films[0]], here, first, 340, **options, **text)
    frames = [[trace for traces in panels for trace in traces] for panels in films]
    return film(fig, frames, [first.label(n) for n in shown], first.times is not None)


def _nearby(run: Run, within: float, what: str = "plane") -> str:
    there = run.atoms() is not None and within > 0
    return f"atoms within {within:g} Å of the {what}" if there else ""


def panel(run: Run, frame: int, here: Plane, look: Look) -> list[Any]:
    """Traces of one plane: the density, what hides the outside of it, atoms on top."""
    numbers, places = np.empty(0, int), np.empty((0, 2))
    if run.atoms(frame) is not None and look.within > 0:
        numbers, places = here.project(*run.atoms(frame), look.within)
    field = run.field(frame)
    return [_heatmap(field, here, look, run.unit), _outside(here), _marks(*places.T, numbers)]


def _heatmap(field: NDArray[np.floating], here: Plane, look: Look, unit: str) -> go.Heatmap:
    x, y, z = here.picture(field, look.pixels, look.smooth)
    hover = [
        f"{name} = %{{{v}:.4g}} {unit}<br>" for name, v in zip(here.labels, "xy", strict=True)
    ]
    dx, dy = float(x[1] - x[0]), float(y[1] - y[0])
    return go.Heatmap(
        **dict(z=z, x0=float(x[0]), dx=dx, y0=float(y[0]), dy=dy, coloraxis="coloraxis"),
        zsmooth="best" if look.smooth else False,
        hovertemplate="".join(hover) + "%{z:.4g} Å<sup>−3</sup><extra></extra>",
    )


def _outside(here: Plane) -> go.Scatter:
    """White over what is outside of the parallelogram, and its outline; nothing in a box."""
    box = here.grid_index is not None and np.allclose(here.cell, np.diag(np.diag(here.cell)))
    low, high = here.span
    frame = low + np.array([(-1, -1), (-1, 2), (2, 2), (2, -1), (-1, -1)]) * (high - low)
    x, y = np.concatenate([frame, here.outline])[:: 99 if box else 1].T
    look = dict(mode="lines", line=dict(color="#777", width=1), fill="toself", fillcolor="white")
    return go.Scatter(x=x, y=y, hoverinfo="skip", showlegend=False, **look)


def _panels(
    panels: list[list[list[Any]]],
    here: Plane,
    run: Run,
    size: int,
    *,
    rows: Sequence[str] = ("",),
    columns: Sequence[str] = ("",),
    margin: Mapping[str, int] | None = None,
    **layout: Any,
) -> go.Figure:
    """Panels of equal aspect, at most `size` pixels long, with labels on the outer sides."""
    low, high = here.span
    gap = 16
    scale = max(110, min(size, 900 // len(columns) - gap)) / (high - low).max()
    wide, tall = np.round(scale * (high - low)).astype(int).tolist()
    width, height = len(columns) * (wide + gap) - gap, len(rows) * (tall + gap) - gap
    spacing = dict(horizontal_spacing=gap / width, vertical_spacing=gap / height)
    fig = make_subplots(len(rows), len(columns), column_titles=list(columns), **spacing)
    for row, column in np.ndindex(len(rows), len(columns)):
        fig.add_traces(panels[row][column], row + 1, column + 1)
    fig.update_annotations(font_size=13)
    inner = dict(showticklabels=False, showgrid=False, constrain="domain")
    fig.update_xaxes(**inner, matches="x", range=[low[0], high[0]])
    fig.update_yaxes(**inner, matches="y", range=[low[1], high[1]])
    right, up = (f"{label} ({run.unit})" for label in here.labels)
    fig.update_xaxes(row=len(rows), showticklabels=True, title_text=right)
    for row, name in enumerate(rows, start=1):
        label = f"<b>{name}</b><br>" * bool(name) + up
        fig.update_yaxes(row=row, col=1, showticklabels=True, title_text=label)
    margin = dict(l=90, r=95, t=95 if any(columns) else 66, b=60) | dict(margin or {})
    width, height = width + margin["l"] + margin["r"], height + margin["t"] + margin["b"]
    fig.update_layout(template=TEMPLATE, margin=margin, width=width, height=height, **layout)
    return fig.update_layout(yaxis_scaleanchor="x")
