"""Trajectories by hand, in a notebook with a running kernel: any frame, any plane, play.

`explore` shows one run; `compare` shows a run beside its reference, with the error. Only the
frames on the screen are read, so a store may be larger than memory. The figures are those of
`densitykit.plot`; for a page that must work without a kernel use `film_figure`.
"""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as widgets
import plotly.graph_objects as go

from densitykit.plot.runs import Drawable, Run, as_run, as_runs, at_common_times
from densitykit.plot.slices import comparison_figure, slice_figure
from densitykit.plot.theme import colour_range

__all__ = ["Explorer", "compare", "explore"]


class Explorer(widgets.VBox):
    """A figure with a play button, a slider of time, the normal of the plane and its place.

    Parameters
    ----------
    draw
        Gives the figure of a frame, an axis ("x", "y", "z") and a grid point. Its figures all
        have the same traces; it reads what it draws.
    run
        Whose frames and grid the sliders follow.
    first
        The frame to begin with.

    Attributes
    ----------
    time, axis, index, figure
        The widgets, whose values may be set from code as well, and the `FigureWidget`.
    """

    def __init__(
        self, draw: Callable[[int, str, int], go.Figure], run: Run, first: int = 0
    ) -> None:
        self._draw, self._grid = draw, run.grid
        wide = dict(continuous_update=False, layout=widgets.Layout(width="420px"))
        steps = [(run.label(frame), frame) for frame in range(len(run.density))]
        self.time = widgets.SelectionSlider(options=steps, value=first, description="time", **wide)
        self.axis = widgets.ToggleButtons(options=["x", "y", "z"], value="z", description="normal")
        self.axis.style.button_width = "40px"
        last = run.grid[2] - 1
        self.index = widgets.IntSlider((last + 1) // 2, 0, last, description="plane", **wide)
        play = widgets.Play(value=first, max=len(steps) - 1, interval=200, show_repeat=False)
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
        last = self._grid["xyz".index(self.axis.value)] - 1
        if self.index.max != last:
            self.index.max = last  # of a shorter axis: moves the value, and comes back here
        new = self._drawn()
        with self.figure.batch_update():  # one message to the page, not one a property
            for old, trace in zip(self.figure.data, new.data, strict=True):
                old.update(trace.to_plotly_json(), overwrite=False)
            self.figure.layout.update(new.layout.to_plotly_json())


def explore(run: Drawable) -> Explorer:
    """Look at a run, plane by plane, on the range of colours of its first frame.

    Raises
    ------
    ShapeError
        No density or no frames, or a density that is not three-dimensional.
    """
    shown = as_run(run)
    colours = colour_range(shown.field())

    def draw(frame: int, axis: str, index: int) -> go.Figure:
        return slice_figure(shown.take([frame]), axis, index).update_coloraxes(colours)

    return Explorer(draw, shown)


def compare(
    reference: Drawable, run: Drawable, names: tuple[str, str] = ("reference", "prediction")
) -> Explorer:
    """Look at a run beside its reference, at the times of both, and at where they differ.

    It opens at the second of these times: at the first a rollout is its reference.

    Raises
    ------
    ShapeError
        Other grids, no common times, times that do not increase, or as `explore`.
    """
    both = at_common_times(as_runs(dict(zip(names, (reference, run), strict=True))))
    truth, _ = both.values()
    colours = colour_range(truth.field())

    def draw(frame: int, axis: str, index: int) -> go.Figure:
        now = {name: shown.take([frame]) for name, shown in both.items()}
        return comparison_figure(now, axis, index).update_layout(coloraxis=colours)

    return Explorer(draw, truth, first=min(1, len(truth.density) - 1))
