"""Explorers: widgets move the figure, and only what is on the screen is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from densitykit.errors import ShapeError
from densitykit.io.reader import open_trajectory
from densitykit.plot.explore import compare, explore
from densitykit.rollout import rollout

Make = Callable[..., Path]


@pytest.fixture
def run(mock_trajectory: Make) -> xr.Dataset:
    return open_trajectory(mock_trajectory(grid=(8, 6, 4)))


def test_widgets_choose_frame_and_plane(run: xr.Dataset) -> None:
    explorer = explore(run)
    np.testing.assert_array_equal(explorer.figure.data[0].z, run.density[0, :, :, 2].values.T)
    explorer.time.value = 3
    explorer.axis.value = "x"
    explorer.index.value = 7
    np.testing.assert_array_equal(explorer.figure.data[0].z, run.density[3, 7].values.T)
    assert explorer.figure.layout.title.text.startswith("x = 5.25")
    assert explorer.figure.layout.xaxis.title.text == "y (Å)"


def test_a_shorter_axis_moves_the_plane_inside(run: xr.Dataset) -> None:
    explorer = explore(run)
    explorer.axis.value = "x"
    explorer.index.value = 7
    explorer.axis.value = "z"
    assert explorer.index.max == 3 and explorer.index.value == 3
    np.testing.assert_array_equal(explorer.figure.data[0].z, run.density[0, :, :, 3].values.T)


def test_colours_stay(run: xr.Dataset) -> None:
    explorer = explore(run)
    before = explorer.figure.layout.coloraxis.cmin, explorer.figure.layout.coloraxis.cmax
    assert before == (float(run.density[0].min()), float(run.density[0].max()))
    explorer.time.value, explorer.index.value = 5, 0
    assert (explorer.figure.layout.coloraxis.cmin, explorer.figure.layout.coloraxis.cmax) == before


def test_only_frames_on_the_screen_are_read(
    run: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    get = xr.DataArray.__getitem__
    monkeypatch.setattr(
        xr.DataArray, "__getitem__", lambda self, key: read.append(key) or get(self, key)
    )
    explorer = explore(run)
    explorer.time.value = 6
    assert set(read) - {0, 6} == set()


def test_comparison_at_common_times(run: xr.Dataset) -> None:
    late = run.isel(time=slice(2, None, 2)).assign(density=2 * run.density[2::2])
    explorer = compare(run, late, names=("here", "there"))
    assert [label for label, _ in explorer.time.options] == ["4 fs", "8 fs", "12 fs"]
    explorer.time.value = 2
    truth, twice, error = (trace.z for trace in explorer.figure.data)
    np.testing.assert_array_equal(truth, run.density[6, :, :, 2].values.T)
    np.testing.assert_array_equal(twice, 2 * truth)
    np.testing.assert_array_equal(error, truth)
    assert "100 %" in explorer.figure.layout.title.subtitle.text


def test_times_with_rounding_are_common(run: xr.Dataset) -> None:
    drifted = run.assign_coords(time=run.time + 1e-4)
    assert len(compare(run, drifted).time.options) == run.sizes["time"]


@pytest.mark.parametrize("step", [0.004, 0.125])  # 0.125 is half-way between hundredths
def test_short_steps_pair_as_they_should(step: float, run: xr.Dataset) -> None:
    times = step * np.arange(run.sizes["time"])
    here, there = (run.assign_coords(time=times + shift) for shift in (0, 1e-6))
    explorer = compare(here, there)
    assert len(explorer.time.options) == run.sizes["time"]
    explorer.time.value = 5
    assert not explorer.figure.data[2].z.any()


def test_late_times_are_told_apart(run: xr.Dataset) -> None:
    late = run.assign_coords(time=100000 + 0.5 * np.arange(run.sizes["time"]))
    assert explore(late).time.options[1][0] == "100000.5 fs"


@pytest.mark.parametrize("times", [[0, 1, 1, 2, 3, 4, 5, 6], [7, 6, 5, 4, 3, 2, 1, 0]])
def test_times_must_increase_to_be_compared(times: list[int], run: xr.Dataset) -> None:
    odd = run.assign_coords(time=times)
    for pair in ((odd, run), (run, odd)):
        with pytest.raises(ShapeError, match="sort"):
            compare(*pair)
    explorer = explore(odd)  # alone it can be shown
    explorer.time.value = 2
    np.testing.assert_array_equal(explorer.figure.data[0].z, run.density[2, :, :, 2].values.T)


def test_runs_without_a_cell_count_grid_points(run: xr.Dataset) -> None:
    bare = run.drop_vars("cell")
    assert explore(bare).figure.layout.title.text == "z = 2 (grid point)"
    assert compare(bare, run).figure.layout.title.text == "z = 2 (grid point)"


@pytest.mark.parametrize("hole", ["one", "all", "none"])
def test_colours_have_a_finite_range(hole: str, run: xr.Dataset) -> None:
    density = run.density.values.copy() if hole == "one" else 0 * run.density.values
    density[0, 0, 0, :2] = np.nan, np.inf
    density = density + np.nan if hole == "all" else density
    axis = explore(run.assign(density=(run.density.dims, density))).figure.layout.coloraxis
    assert np.isfinite([axis.cmin, axis.cmax]).all() and axis.cmax > axis.cmin


def test_one_frame_one_plane_and_dask(run: xr.Dataset) -> None:
    thin = open_trajectory(run.encoding["source"], chunks={}).isel(time=[3], z=[1])
    explorer = compare(thin, thin)
    explorer.axis.value = "x"
    np.testing.assert_array_equal(explorer.figure.data[0].z, run.density[3, 0, :, 1:2].values.T)
    explorer.axis.value = "z"
    assert explorer.index.value == explorer.index.max == 0


def test_rollouts_are_shown(run: xr.Dataset) -> None:
    states = torch.as_tensor(run.density[:2].values)
    predicted = rollout(lambda x: x, states, 3, cell=run.cell.values, horizon=2.0, progress=False)
    explorer = compare(run, predicted)
    assert [label for label, _ in explorer.time.options] == ["0 fs", "2 fs", "4 fs", "6 fs"]
    with pytest.raises(ShapeError, match="member"):
        explore(predicted.expand_dims("member"))


def test_what_is_no_run_is_refused(run: xr.Dataset) -> None:
    for thing in (run.density, run.drop_vars("density"), run.isel(x=slice(0))):
        with pytest.raises(ShapeError, match="density"):
            explore(thing)


@pytest.mark.parametrize("case", ["time", "grid", "flat", "empty"])
def test_bad_input_is_refused(run: xr.Dataset, case: str) -> None:
    other = {
        "time": run.assign_coords(time=run.time + 1000),
        "grid": run.isel(x=slice(None, None, 2)),
        "flat": run.isel(x=0),
        "empty": run.isel(time=slice(0)),
    }[case]
    words = {"time": "common times", "grid": "resample"}.get(case, "dimensions")
    with pytest.raises(ShapeError, match=words):
        compare(run, other)


def test_skewed_cells_count_grid_points(mock_trajectory: Make) -> None:
    run = open_trajectory(mock_trajectory())
    skewed = run["cell"].values.copy()
    skewed[0, 1] = 1.0
    explorer = explore(run.assign(cell=(run["cell"].dims, skewed)))
    assert explorer.figure.layout.title.text == "z = 4 (grid point)"


def test_sites_that_run_nothing_are_told(run: xr.Dataset) -> None:
    assert "run this cell" in repr(explore(run))
