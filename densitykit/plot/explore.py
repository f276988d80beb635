"""Trajectories by hand, in a notebook with a running kernel: time, planes, surfaces, numbers.

`explore` shows one run, `compare` a run beside its reference, and where they differ: planes, and
beside or below them space; turn one scene and all turn. A second tab has S(q), g(r) and errors of
what is on the screen. Only the frames on the screen are read, so a store may be
larger than memory. What works without a kernel are `film_figure` and `isosurface_film`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from densitykit.analysis.modes import structure_factor
from densitykit.analysis.transport import pair_distribution
from densitykit.errors import ShapeError
from densitykit.metrics import relative_l1, relative_l2, spatial_sjsd
from densitykit.plot.planes import Plane, grid_plane, lattice_plane
from densitykit.plot.runs import Drawable, Run, as_run, as_runs, at_common_times, difference
from densitykit.plot.slices import WITHIN, Look, panel
from densitykit.plot.theme import TEMPLATE, colour_axis, heading, line_styles
from densitykit.plot.volume import Space, default_levels, view

__all__ = ["Explorer", "compare", "explore"]


class _Figure(go.FigureWidget):
    """A figure with its data in the first message: a later one may come after it was drawn."""

    def __init__(self, fig: go.Figure) -> None:
        super().__init__(fig)
        super().open()

    def open(self) -> None:
        """Nothing, when plotly's constructor calls it, which knows no data yet."""


class Explorer(widgets.VBox):
    """Sliders of time, plane and level, a play button, and figures of runs at equal times.

    Parameters
    ----------
    runs
        Names to runs on one grid with the same frames, the reference first; differences last.
    first
        The frame to begin with, whose range of colours stays.

    Attributes
    ----------
    time, axis, hkl, index, level, tabs
        Widgets, whose values may be set from code as well: the plane is normal to x, y or z, or
        has the Miller indices that `hkl` spells.
    figure, table, curves
        What they move: a `FigureWidget`, and in the second tab an HTML table, S(q) and g(r).
    """

    def __init__(self, runs: dict[str, Run], first: int = 0) -> None:
        self._runs, (self._first, *_) = runs, runs.values()
        self._real = {name: run for name, run in runs.items() if not run.signed or len(runs) == 1}
        wide = dict(continuous_update=False, layout=widgets.Layout(width="320px"))
        steps = [(self._first.label(n), n) for n in range(len(self._first.density))]
        self.time = widgets.SelectionSlider(options=steps, value=first, description="time", **wide)
        self.axis = widgets.ToggleButtons(options=["x", "y", "z", "hkl"], value="z")
        self.axis.style.button_width = "40px"
        small = widgets.Layout(width="70px")
        self.hkl = widgets.Text("1 1 1", continuous_update=False, layout=small)
        points, field = self._first.grid[2], self._first.field(first)
        self.index = widgets.IntSlider(points // 2, 0, points - 1, description="plane", **wide)
        finite = np.nan_to_num(field, posinf=0, neginf=0)
        level, top = default_levels(finite, self._first.signed, (0.3,))[-1], abs(finite).max() or 1
        options = dict(step=top / 200, readout_format=".3g", description="level", **wide)
        self.level = widgets.FloatSlider(float(level), min=0, max=float(top), **options)
        play = widgets.Play(value=first, max=len(steps) - 1, interval=300, show_repeat=False)
        play.layout.width = "110px"
        widgets.jslink((play, "value"), (self.time, "index"))
        self._colours = colour_axis(field, self._first.kind)
        self.figure = _Figure(self._drawn())
        self.table = widgets.HTML(self._tabulated())
        for scene in self.figure.select_scenes():
            scene.on_change(self._turn, "camera")
        self.tabs = widgets.Tab(
            [self.figure, widgets.VBox([self.table])], titles=["planes and space", "numbers"]
        )
        for control in (self.time, self.axis, self.hkl, self.index, self.level):
            control.observe(self._redraw, "value")
        self.tabs.observe(self._redraw, "selected_index")
        rows = [[self.time, play, self.index], [self.level, self.axis, self.hkl]]
        super().__init__([*map(widgets.HBox, rows), self.tabs])

    @cached_property
    def curves(self) -> _Figure:
        """Made when it is first looked at: the page has two seconds for all figures of a cell."""
        curves = _Figure(self._counted())
        self.tabs.children[1].children = [self.table, curves]
        return curves

    def __repr__(self) -> str:
        # what sites show that do not run notebooks
        return f"<Explorer of {len(self.time.options)} frames: run this cell to use it>"

    def _turn(self, _: Any, camera: Any) -> None:
        """All scenes are seen from where one is."""
        for scene in self.figure.select_scenes():
            if scene.camera != camera:
                scene.camera = camera

    def _plane(self) -> Plane:
        cell, index = self._first.cell_at(self.time.value), self.index.value
        if self.axis.value != "hkl":
            return grid_plane(self._first.grid, cell, self.axis.value, index)
        try:
            hkl = np.array(self.hkl.value.replace(",", " ").split(), dtype=int)
            normal = np.linalg.solve(cell, hkl)
            corner = normal / (normal @ normal) * index / (self.index.max + 1)
            return lattice_plane(cell, hkl, corner)
        except (ValueError, np.linalg.LinAlgError):  # not yet three indices
            return lattice_plane(cell, (1, 1, 1), np.zeros(3))

    def _levels(self, run: Run, frame: int) -> NDArray[np.float64]:
        if run.signed and not self._first.signed:
            return default_levels(np.nan_to_num(run.field(frame)), True, (0.2,))
        return np.array([-1, 1] if run.signed else [1]) * self.level.value

    def _drawn(self) -> go.Figure:
        """All panels of what the controls say: as many traces, whatever they say."""
        frame, here, n = self.time.value, self._plane(), len(self._runs)
        specs = np.array([[dict(type=kind)] * n for kind in ("xy", "scene")])
        specs = specs if n > 1 else specs.T  # a single scene is beside its plane
        gaps = dict(horizontal_spacing=0.04 if n > 1 else 0.12, vertical_spacing=0.13)
        gaps |= dict(column_titles=[*self._runs]) if n > 1 else dict(column_widths=[0.43, 0.57])
        fig = make_subplots(*specs.shape, specs=specs.tolist(), **gaps)
        space, look = Space(None, True, (1, 1, 1), 24, corners=1000), Look(64, True, WITHIN)
        for column, run in enumerate(self._runs.values(), start=1):
            flat = panel(run, frame, here, look)
            flat[0].coloraxis = "coloraxis" if run.signed == self._first.signed else "coloraxis2"
            fig.add_traces(flat, 1, column)
            deep = space._replace(levels=self._levels(run, frame)).traces(run, frame)
            fig.add_traces(deep, *((1, 2) if n == 1 else (2, column)))
        fig.update_scenes(**view(self._first, space))
        (low, high), unit = here.span, self._first.unit
        inner = dict(constrain="domain", showgrid=False)
        fig.update_xaxes(range=[low[0], high[0]], title_text=f"{here.labels[0]} ({unit})", **inner)
        fig.update_yaxes(range=[low[1], high[1]], showticklabels=False, **inner)
        fig.update_yaxes(col=1, showticklabels=True, title_text=f"{here.labels[1]} ({unit})")
        for i in range(n):
            fig.update_yaxes(col=i + 1, scaleanchor=f"x{i + 1}".removesuffix("1"))
        fig.update_layout(template=TEMPLATE, showlegend=False, width=800, height=455, margin_b=50)
        if n == 1:
            bar = dict(x=0.38, xpad=8)
            fig.update_layout(
                margin=dict(t=80, l=60, r=5), coloraxis=self._colours, coloraxis_colorbar=bar
            )
            return fig.update_layout(heading(here.title(unit), self._first.moment(frame)))
        maps = [trace.z for trace in fig.select_traces(dict(type="heatmap"))]
        fig.update_layout(coloraxis=self._colours, coloraxis2=colour_axis(maps[-1], "Δρ"))
        bars = dict(y=1, yanchor="top", len=0.44)
        fig.update_coloraxes(colorbar=bars).update_layout(coloraxis2_colorbar_x=1.12)
        truth, field, *_ = (run.field(frame) for run in self._runs.values())
        error = f"relative l² error of the field: {100 * relative_l2(field, truth):.3g} %"
        text = heading(here.title(unit), self._first.moment(frame), error)
        return fig.update_layout(text, margin=dict(t=90, r=160, b=10))

    def _counted(self) -> go.Figure:
        """S(q) and g(r) of the frame on the screen, where cell and nuclei are known."""
        fig, frame = make_subplots(1, 2, horizontal_spacing=0.12), self.time.value
        for name, line in line_styles(self._real, next(iter(self._real))).items():
            run, look = self._real[name], dict(name=name or "density", line=line)
            field, cell, q, s, r, g = run.field(frame), run.cell_at(frame), [], [[]], [], [[]]
            if run.cell is not None and np.isfinite(field).all() and field.any():
                q, _, s = structure_factor(field[None], cell)
            if run.atoms(frame) is not None:
                x = xr.DataArray(run.atoms(frame)[1][None], dims=("time", "atom", "cartesian"))
                g = pair_distribution(x, cell, bins=30)
                r = g.r
            fig.add_scatter(x=q, y=s[0], row=1, col=1, **look)
            fig.add_scatter(x=r, y=g[0], row=1, col=2, showlegend=False, **look)
        for column, (x, y) in enumerate([("q (Å<sup>−1</sup>)", "S(q)"), ("r (Å)", "g(r)")], 1):
            fig.update_xaxes(title_text=x, col=column).update_yaxes(title_text=y, col=column)
        legend = dict(orientation="h", y=1.02, yanchor="bottom")
        size = dict(width=770, height=340, showlegend=len(self._real) > 1, legend=legend)
        return fig.update_layout(template=TEMPLATE, **size)

    def _tabulated(self) -> str:
        """Electrons, extremes and errors of the frame on the screen."""
        frame, rows, truth = self.time.value, {}, self._first.field(self.time.value)
        for name, run in self._real.items():
            field, volume = run.field(frame), abs(np.linalg.det(run.cell_at(frame)))
            electrons = np.nan if run.cell is None else field.mean(dtype=float) * volume
            row = {"electrons": electrons, "lowest (Å⁻³)": field.min()}
            row["highest (Å⁻³)"] = field.max()
            if run is not self._first:
                row["l1 error (%)"] = 100 * relative_l1(field, truth)
                row["l2 error (%)"] = 100 * relative_l2(field, truth)
                row["spatial sJSD"] = spatial_sjsd(field, truth)
            rows[name or "density"] = row
        table = pd.DataFrame(rows).T.astype(float)
        return table.to_html(float_format="{:.4g}".format, na_rep="", border=0)

    def _redraw(self, change: dict[str, Any]) -> None:
        last = self._first.grid["xyz".find(self.axis.value)] - 1  # of hkl: as along z
        if self.index.max != last:
            self.index.max = last  # of a shorter axis: moves the value, and comes back here
        if self.tabs.selected_index == 0:
            return _pour(self._drawn(), self.figure)
        self.table.value = self._tabulated()
        return _pour(self._counted(), self.curves)


def _pour(new: go.Figure, figure: go.FigureWidget) -> None:
    """Show another figure in a widget, whose cameras stay."""
    layout = {k: v for k, v in new.layout.to_plotly_json().items() if not k.startswith("scene")}
    with figure.batch_update():  # one message to the page, not one a property
        for old, trace in zip(figure.data, new.data, strict=True):
            old.update(trace.to_plotly_json(), overwrite=False)
        figure.layout.update(layout)


def explore(run: Drawable) -> Explorer:
    """Look at a run, or a `difference`, in planes and in space.

    Raises
    ------
    ShapeError
        No density or no frames, or a density that is not three-dimensional.
    """
    return Explorer({"": as_run(run)})


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
    if len(set(names)) != 2:
        raise ShapeError(f"names {names}; pass two, one for the reference and one for the run")
    both = at_common_times(as_runs(dict(zip(names, (reference, run), strict=True))))
    truth, predicted = both.values()
    runs = both | {"difference": difference(predicted, truth)}
    return Explorer(runs, first=min(1, len(truth.density) - 1))
