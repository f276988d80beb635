"""Trajectories by hand, in a notebook with a running kernel: any frame, any plane, play.

`explore` shows one run; `compare` shows a run beside its reference, with the error. Only the
frames on the screen are read, so a store may be larger than memory. The figures are those of
`densitykit.plot.figures`; for a page that must work without a kernel use `film_figure`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import xarray as xr
from numpy.typing import NDArray

from densitykit.errors import ShapeError
from densitykit.plot.figures import colour_range, comparison_figure, slice_figure

__all__ = ["Explorer", "compare", "explore"]

Draw = Callable[[int, str, int], go.Figure]


class Explorer(widgets.VBox):
    """A figure with a play button, a slider of time, the normal of the plane and its place.

    Parameters
    ----------
    draw
        Gives the figure of a frame, an axis ("x", "y", "z") and a grid point. Its figures all
        have the same traces; it reads what it draws.
    times
        Of the frames, in fs.
    shape
        Grid points along x, y and z.

    Attributes
    ----------
    time, axis, index
        The widgets, whose values may be set from code as well.
    figure
        The `FigureWidget`; `figure.write_image` and the like work as for any plotly figure.
    """

    def __init__(self, draw: Draw, times: NDArray[np.floating], shape: Sequence[int]) -> None:
        self._draw, self._shape = draw, tuple(shape)
        wide = {"continuous_update": False, "layout": widgets.Layout(width="420px")}
        steps = [(f"{time:.7g} fs", frame) for frame, time in enumerate(times)]
        self.time = widgets.SelectionSlider(options=steps, description="time", **wide)
        self.axis = widgets.ToggleButtons(options=["x", "y", "z"], value="z", description="normal")
        self.axis.style.button_width = "40px"
        self.index = widgets.IntSlider(shape[2] // 2, 0, shape[2] - 1, description="plane", **wide)
        play = widgets.Play(max=len(steps) - 1, interval=200, show_repeat=False)
        widgets.jslink((play, "value"), (self.time, "index"))
        self.figure = go.FigureWidget(self._drawn())
        for control in (self.time, self.axis, self.index):
            control.observe(self._redraw, "value")
        rows = [widgets.HBox([self.time, play]), widgets.HBox([self.index, self.axis])]
        super().__init__([*rows, self.figure])

    def __repr__(self) -> str:
        # what sites show that do not run notebooks
        return f"<Explorer of {len(self.time.options)} frames: run this cell to use it>"

    def _drawn(self) -> go.Figure:
        return self._draw(self.time.value, self.axis.value, self.index.value)

    def _redraw(self, change: dict[str, object]) -> None:
        last = self._shape["xyz".index(self.axis.value)] - 1
        if self.index.max != last:
            self.index.max = last  # of a shorter axis: moves the value, and comes back here
        new = self._drawn()
        with self.figure.batch_update():  # one message to the page, not one a property
            for old, trace in zip(self.figure.data, new.data, strict=True):
                old.update(trace.to_plotly_json(), overwrite=False)
            self.figure.layout.update(new.layout.to_plotly_json())


def explore(run: xr.Dataset) -> Explorer:
    """Look at a run, plane by plane, on the range of colours of its first frame.

    Parameters
    ----------
    run
        Trajectory, open or in memory: `density` (time, x, y, z) in angstrom**-3, `time` in fs.

    Raises
    ------
    ShapeError
        No density or no frames, or a density that is not three-dimensional.
    """
    density = _checked(run)
    edge, colours = _edges(run), colour_range(density[0].values)

    def draw(frame: int, axis: str, index: int) -> go.Figure:
        figure = slice_figure(density[frame].values, axis, index, edge=edge)
        return figure.update_coloraxes(colours)

    return Explorer(draw, run["time"].values, density.shape[1:])


def compare(
    reference: xr.Dataset,
    run: xr.Dataset,
    names: tuple[str, str] = ("reference", "prediction"),
) -> Explorer:
    """Look at a run beside its reference, at the times of both, and at where they differ.

    Parameters
    ----------
    reference, run
        As in `explore`, on one grid, with some times in common (to 0.005 fs).
    names
        Titles of the two.

    Raises
    ------
    ShapeError
        Other grids, no common times, times that do not increase, or as `explore`.
    """
    truth, prediction = _checked(reference), _checked(run)
    if truth.shape[1:] != prediction.shape[1:]:
        raise ShapeError(f"grids {truth.shape[1:]} and {prediction.shape[1:]}; resample one")
    times, others = (ds["time"].astype(float).to_index() for ds in (reference, run))
    if not all(index.is_monotonic_increasing and index.is_unique for index in (times, others)):
        raise ShapeError("times do not increase; sort the runs, and drop frames of equal times")
    nearest = others.get_indexer(times, method="nearest", tolerance=0.005)
    mine = np.flatnonzero(nearest >= 0)
    if not len(mine):
        spans = [f"{t[0]:g} to {t[-1]:g} fs" for t in (times, others)]
        raise ShapeError(f"no common times in {spans[0]} and {spans[1]}; shift the times of one")
    edge, colours = _edges(reference), colour_range(truth[int(mine[0])].values)

    def draw(frame: int, axis: str, index: int) -> go.Figure:
        fields = truth[int(mine[frame])].values, prediction[int(nearest[mine[frame]])].values
        figure = comparison_figure(*fields, axis, index, edge=edge, names=names)
        return figure.update_layout(coloraxis=colours)

    return Explorer(draw, times.values[mine], truth.shape[1:])


def _checked(run: xr.Dataset) -> xr.DataArray:
    """The density, if it can be shown."""
    if not isinstance(run, xr.Dataset) or "density" not in run:
        raise ShapeError("there is no variable 'density'; give a trajectory, as a dataset")
    density = run["density"]
    if density.dims != ("time", "x", "y", "z") or not density.size:
        raise ShapeError(
            f"density has dimensions {dict(density.sizes)}; give one run in 3-D, of one or more "
            "frames (of an ensemble isel(member=0); chains: plot.curve_film)"
        )
    return density


def _edges(run: xr.Dataset) -> NDArray[np.float64] | None:
    """Lengths of an orthorhombic cell in angstrom; None for another or none: grid points."""
    if "cell" not in run:
        return None
    cell = run["cell"].values
    return np.diag(cell) if np.allclose(cell, np.diag(np.diag(cell))) else None
