"""Explorers: widgets move the figure, and only what is on the screen is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from densitykit.errors import ShapeError
from densitykit.explore import compare, explore
from densitykit.trajectory import open_trajectory

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
