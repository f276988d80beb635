"""Explorers: widgets move the figure, and only what is on the screen is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest
import xarray as xr

from densitykit.data.windows import Windows
from densitykit.errors import ShapeError
from densitykit.fields import resample
from densitykit.io.reader import open_trajectory
from densitykit.models.baselines import Persistence
from densitykit.plot import difference
from densitykit.plot.explore import Explorer, compare, explore
from densitykit.rollout import rollout

Make = Callable[..., Path]


@pytest.fixture
def run(mock_trajectory: Make) -> xr.Dataset:
    return open_trajectory(mock_trajectory(grid=(8, 6, 4)))


def shows(explorer: Explorer, plane: xr.DataArray, panel: int = 0) -> bool:
    """Whether a panel is the Fourier interpolation of a plane of grid points."""
    z = explorer.figure.data[panel].z
    fine = resample(plane.values.T, [n - 1 for n in z.shape])
    return np.allclose(z[:-1, :-1], fine, atol=1e-6)


def _error(explorer: Explorer) -> np.ndarray:
    return [trace.z for trace in explorer.figure.data if trace.type == "heatmap"][2]


def points(explorer: Explorer) -> np.ndarray:
    """Corners of the last surface, shape (n, 3)."""
    mesh = explorer.figure.data[-1]
    return np.stack([mesh.x, mesh.y, mesh.z], axis=-1)


def test_widgets_choose_frame_and_plane(run: xr.Dataset) -> None:
    explorer = explore(run)
    assert shows(explorer, run.density[0, :, :, 2])
    explorer.time.value = 3
    explorer.axis.value = "x"
    explorer.index.value = 7
    assert shows(explorer, run.density[3, 7])
    assert explorer.figure.layout.title.text.startswith("x = 5.25")
    assert explorer.figure.layout.xaxis.title.text == "y (Å)"


def test_a_shorter_axis_moves_the_plane_inside(run: xr.Dataset) -> None:
    explorer = explore(run)
    explorer.axis.value = "x"
    explorer.index.value = 7
    explorer.axis.value = "z"
    assert explorer.index.max == 3 and explorer.index.value == 3
    assert shows(explorer, run.density[0, :, :, 3])


def test_colours_stay(run: xr.Dataset) -> None:
    explorer = explore(run)
    before = explorer.figure.layout.coloraxis.cmin, explorer.figure.layout.coloraxis.cmax
    assert before == (float(run.density[0].min()), float(run.density[0].max()))
    explorer.time.value, explorer.index.value = 5, 0
    assert (explorer.figure.layout.coloraxis.cmin, explorer.figure.layout.coloraxis.cmax) == before


def test_only_frames_on_the_screen_are_read(mock_trajectory: Make) -> None:
    path = mock_trajectory(grid=(8, 6, 4))
    run = open_trajectory(path)
    for frame in set(range(8)) - {0, 6}:  # reading these fails
        (path / "density" / f"c.{frame}.0.0.0").write_bytes(b"no chunk")
    holes = open_trajectory(path)
    explorer = explore(holes)
    explorer.time.value = 6
    assert shows(explorer, run.density[6, :, :, 2])


def test_comparison_at_common_times(run: xr.Dataset) -> None:
    late = run.isel(time=slice(2, None, 2)).assign(density=2 * run.density[2::2])
    explorer = compare(run, late, names=("here", "there"))
    assert [label for label, _ in explorer.time.options] == ["4 fs", "8 fs", "12 fs"]
    explorer.time.value = 2
    maps = [trace.z for trace in explorer.figure.data if trace.type == "heatmap"]
    assert shows(explorer, run.density[6, :, :, 2])
    np.testing.assert_allclose(maps[1], 2 * maps[0], rtol=1e-5)
    np.testing.assert_allclose(maps[2], maps[0], atol=1e-6)  # there less here
    assert "100 %" in explorer.figure.layout.title.text


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
    assert not _error(explorer).any()


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
    assert shows(explorer, run.density[2, :, :, 2])


def test_runs_without_a_cell_count_grid_points(run: xr.Dataset) -> None:
    bare = run.drop_vars("cell")
    for explorer in (explore(bare), compare(bare, run)):
        assert explorer.figure.layout.title.text.startswith("z = 2 (grid point)")


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
    assert np.isfinite(explorer.figure.data[0].z).all()
    explorer.axis.value = "z"
    assert explorer.index.value == explorer.index.max == 0


def test_rollouts_are_shown(run: xr.Dataset) -> None:
    window = Windows(run, horizon=2.0)[:1]
    predicted = rollout(Persistence(2.0), window, 3, progress=False)
    explorer = compare(run, predicted)
    assert [label for label, _ in explorer.time.options] == ["4 fs", "6 fs", "8 fs", "10 fs"]
    with pytest.raises(ShapeError, match="member"):
        explore(predicted.expand_dims("member"))


def test_what_is_no_run_is_refused(run: xr.Dataset) -> None:
    for thing in (run.drop_vars("density"), run.isel(x=slice(0))):
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


def test_skewed_cells_keep_their_shape(mock_trajectory: Make) -> None:
    run = open_trajectory(mock_trajectory())
    skewed = run["cell"].values.copy()
    skewed[0, 1] = 1.0
    run = run.assign(cell=(run["cell"].dims, skewed))
    for explorer in (explore(run), compare(run, run)):
        assert explorer.figure.layout.title.text.startswith("z = 3.00 Å")
        explorer.axis.value = "y"
        assert explorer.figure.layout.title.text.startswith("(010) plane")


def test_comparisons_open_where_there_is_an_error(run: xr.Dataset) -> None:
    still = run.assign(density=run.density[:1].isel(time=[0] * run.sizes["time"]).variable)
    explorer = compare(run, still)
    assert explorer.time.value == 1 and abs(_error(explorer)).max() > 0


def test_atoms_move_with_the_slider(run: xr.Dataset) -> None:
    near = run.assign(positions=0 * run.positions + [1.0, 2.0, 3.0] + 0.1 * run.time)
    near = near.transpose(..., "time", "atom", "cartesian", "x", "y", "z", missing_dims="ignore")
    explorer = explore(near)
    marks = explorer.figure.data[2]
    before = marks.x[0]
    explorer.time.value = 1
    assert marks.x[0] == pytest.approx(before + 0.2)


def test_sites_that_run_nothing_are_told(run: xr.Dataset) -> None:
    assert "run this cell" in repr(explore(run))


def test_any_lattice_plane_by_its_indices(run: xr.Dataset) -> None:
    explorer = explore(run)
    explorer.axis.value, explorer.index.value = "hkl", 0
    assert explorer.figure.layout.title.text.startswith("(111) plane, 0.00 Å")
    explorer.hkl.value = "1, -1, 0"
    assert explorer.figure.layout.title.text.startswith("(1 −1 0) plane")
    explorer.hkl.value = "1 -1 x"  # still typing
    assert explorer.figure.layout.title.text.startswith("(111) plane")


def test_the_level_moves_the_surface(run: xr.Dataset) -> None:
    n = run.sizes["x"]
    x = 1 + np.cos(2 * np.pi * np.arange(n) / n)[:, None, None]
    wave = run.assign(density=(run.density.dims, x + 0 * run.density.values))
    explorer = explore(wave)
    for level in (0.8, 1.4):
        explorer.level.value = level
        spots = points(explorer) @ np.linalg.inv(run.cell.values)
        inside = spots[(abs(spots - 0.5) < 0.499).all(axis=1), 0]  # not on the lids
        assert len(inside)
        np.testing.assert_allclose(1 + np.cos(2 * np.pi * inside), level, atol=0.05)


def test_differences_may_be_explored(run: xr.Dataset) -> None:
    explorer = explore(difference(run, run.isel(time=[0])))
    explorer.time.value = 3
    shown = run.assign(density=run.density - run.density[0])
    assert shows(explorer, shown.density[3, :, :, 2])
    assert explorer.figure.layout.coloraxis.colorbar.title.text.startswith("Δρ")


def test_scenes_are_seen_from_one_side(run: xr.Dataset) -> None:
    explorer = compare(run, run.assign(density=2 * run.density))
    explorer.figure.layout.scene2.camera = dict(eye=dict(x=0, y=0, z=2))
    cameras = [scene.camera for scene in explorer.figure.select_scenes()]
    assert len(cameras) == 3 and all(camera.eye.z == 2 for camera in cameras)
    explorer.time.value = 2  # and stay where they were turned to
    assert all(scene.camera.eye.z == 2 for scene in explorer.figure.select_scenes())


def test_numbers_of_what_is_on_the_screen(run: xr.Dataset) -> None:
    explorer = compare(run, run.assign(density=2 * run.density), names=("here", "there"))
    explorer.tabs.selected_index = 1
    explorer.time.value = 4
    names, *lines = ([x.text for x in r] for r in fromstring(explorer.table.value).iter("tr"))
    table = dict(zip(names, zip(*lines, strict=True), strict=True))
    assert table["l2 error (%)"] == (None, "100")
    electrons = float(run.density[4].mean()) * np.linalg.det(run.cell)
    found = [float(value) for value in table["electrons"]]
    assert found == pytest.approx([electrons, 2 * electrons], rel=1e-3)
    first, _, second, nuclei = explorer.curves.data
    np.testing.assert_allclose(second.y, 2 * np.asarray(first.y), rtol=1e-5)
    assert nuclei.xaxis == "x2" and len(nuclei.x) in (0, 30)
