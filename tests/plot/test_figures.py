"""Figures: what is drawn of any cell, scales, frames, bands, messages, and the offline report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from plotly.offline import get_plotlyjs

from densitykit import __version__, plot, units
from densitykit.errors import ShapeError
from densitykit.fields import resample
from densitykit.plot import (
    PALETTE,
    TRUTH,
    comparison_figure,
    distribution_figure,
    error_figure,
    film_figure,
    isosurface,
    line_styles,
    panels_figure,
    series_figure,
    slice_figure,
    structure_factor_figure,
    training_figure,
)
from densitykit.plot.explore import compare
from densitykit.plot.planes import grid_plane, lattice_plane
from densitykit.plot.volume import contour
from experiments.report import write_report

GRID = (4, 6, 8)
EDGE = 9.0
TIMES = np.arange(5) * 6.0
CELLS = {
    "cubic": 5.0 * np.eye(3),
    "orthorhombic": np.diag([4.0, 5.0, 9.0]),
    "hexagonal": np.array([[5, 0, 0], [-2.5, 2.5 * np.sqrt(3), 0], [0, 0, 6]]),
    "monoclinic": np.array([[5, 0, 0], [0, 4, 0], [-1.5, 0, 6.0]]),
    "triclinic": np.array([[5, 0, 0], [1, 4, 0], [-1.5, 0.8, 6]]),
}


@pytest.fixture
def fields() -> np.ndarray:
    """Five positive frames, shape (5, 4, 6, 8), in angstrom**-3."""
    return np.random.default_rng(0).uniform(0.01, 0.08, (5, *GRID))


def waves(points: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """A density at points in angstrom, shape (*, 3): three waves that every grid here holds."""
    phases = (
        2 * np.pi * points @ np.linalg.inv(cell) @ np.array([(1, 0, 0), (0, 1, 1), (1, -2, 2)]).T
    )
    return 1 + np.cos(phases + [0.3, 1.1, 2.0]) @ [0.3, 0.2, 0.1]


def made(cell: np.ndarray, n_frames: int = 3, step: float = 2.0) -> xr.Dataset:
    """A run of `waves` on a grid of (6, 8, 9), with two atoms, the same in each frame."""
    grid = np.stack(np.meshgrid(*(np.arange(n) / n for n in (6, 8, 9)), indexing="ij"), axis=-1)
    positions = np.array([(0.1, 0.2, 0.0), (0.5, 0.75, 0.52)]) @ cell
    return xr.Dataset(
        {
            "density": (("time", *"xyz"), np.stack([waves(grid @ cell, cell)] * n_frames)),
            "cell": (("vector", "cartesian"), cell),
            "numbers": ("atom", [3, 9]),
            "positions": (("time", "atom", "cartesian"), np.stack([positions] * n_frames)),
        },
        {"time": step * np.arange(n_frames)},
    )


def same(drawn: np.ndarray, expected: np.ndarray) -> None:
    """What is drawn is the float32 of what was given, and keeps its shape."""
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, np.asarray(expected, "f4"))


def maps(fig: go.Figure) -> list[go.Heatmap]:
    return [trace for trace in fig.data if trace.type == "heatmap"]


def grid_points(heatmap: go.Heatmap, shape: tuple[int, ...]) -> np.ndarray:
    """What a heatmap of a box shows at the grid points, shape (m, n) of the plane."""
    rows, columns = ((np.array(heatmap.z.shape) - 1) // shape).tolist()
    return heatmap.z[:-1:rows, :-1:columns]


# --- planes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("axis", range(3))
def test_planes_are_the_polynomial_in_their_true_shape(cell: np.ndarray, axis: int) -> None:
    run = made(cell)
    here = grid_plane((6, 8, 9), cell, axis, 2)
    x, y, z = here.picture(run.density[0].values, 30)
    assert np.diff(x)[0] == pytest.approx(np.diff(y)[0], rel=0.2)
    right, up, normal = here.frame
    np.testing.assert_allclose(here.frame @ here.frame.T, np.eye(3), atol=1e-12)
    xy = np.stack(np.meshgrid(x, y), axis=-1)
    points = here.start @ cell + xy @ np.array([right, up])
    inside = np.isfinite(z)
    np.testing.assert_allclose(z[inside], waves(points, cell)[inside], atol=1e-6)
    s = np.delete(points @ np.linalg.inv(cell), axis, axis=-1)  # fractions along the sides
    within = (s > -1e-9).all(axis=-1) & (s < 1 + 1e-9).all(axis=-1)
    assert inside[within].all()
    assert within[inside].mean() > 0.8  # no more than a pixel around it
    assert abs(points @ normal - points[0, 0] @ normal).max() < 1e-9
    assert np.array(here.outline[2]) @ here.frame[:2] == pytest.approx(here.steps.sum(0) @ cell)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("hkl", [(1, 1, 1), (1, 0, 0), (1, 1, 0), (2, -1, 0), (3, -2, 1)])
def test_any_lattice_plane(cell: np.ndarray, hkl: tuple[int, int, int]) -> None:
    density, corner = made(cell).density[0].values, np.array([0.3, 1.7, 2.9])
    here = lattice_plane(cell, hkl, corner)
    assert not (here.steps @ hkl).any()
    assert (
        abs(np.cross(*here.steps)).tolist() == np.abs(hkl).tolist()
    )  # no smaller lattice vectors
    x, y, z = here.picture(density, 25)
    points = corner + np.stack(np.meshgrid(x, y), axis=-1) @ here.frame[:2]
    inside = np.isfinite(z)
    assert inside.mean() > 0.3
    np.testing.assert_allclose(z[inside], waves(points, cell)[inside], atol=1e-6)


def test_nyquist_waves_are_shared() -> None:
    field = np.random.default_rng(1).random((4, 6, 5))
    here = grid_plane(field.shape, np.diag([4.0, 6, 5]), "z", 3)
    z = here.picture(field, 24)[2]
    np.testing.assert_allclose(z[:-1, :-1], resample(field[..., 3], (16, 24)).T, atol=1e-6)


@pytest.mark.parametrize(("axis", "labels"), [("x", "yz"), ("y", "xz"), (2, "xy")])
@pytest.mark.parametrize("wrap", [np.asarray, lambda a: xr.DataArray(a, dims=("x", "y", "z"))])
def test_slices(fields: np.ndarray, wrap: Callable, axis: int | str, labels: str) -> None:
    before = fields.copy()
    fig = slice_figure(wrap(fields[0]), axis, 1, cell=EDGE)
    (heatmap,) = maps(fig)
    number = dict(x=0, y=1).get(axis, 2)
    expected = np.take(fields[0], 1, axis=number).T
    np.testing.assert_allclose(grid_points(heatmap, expected.shape), expected, atol=1e-6)
    assert fig.layout.xaxis.title.text == f"{labels[0]} (Å)"
    assert fig.layout.yaxis.title.text == f"{labels[1]} (Å)"
    assert tuple(fig.layout.xaxis.range) == (0, pytest.approx(EDGE))
    assert fig.layout.yaxis.scaleanchor == "x"
    shown = float(heatmap.z.min()), float(heatmap.z.max())
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == shown
    np.testing.assert_array_equal(fields, before)


def test_grid_points_on_request_and_where_a_field_is_not_finite(fields: np.ndarray) -> None:
    cells = slice_figure(fields[0], smooth=False).data[0]
    assert set(cells.z.ravel()) == set(fields[0, :, :, 4].astype("f4").ravel())
    assert cells.zsmooth is False
    broken = fields[0].copy()
    broken[1, 1, 4] = np.nan
    z = slice_figure(broken).data[0].z
    assert 0 < np.isnan(z).mean() < 0.1


def test_titles_and_labels(fields: np.ndarray) -> None:
    title = lambda fig: fig.layout.title.text  # noqa: E731
    assert title(slice_figure(fields[0], "z", 2, cell=EDGE)) == "z = 2.25 Å"
    assert title(slice_figure(fields[0], "z", 2, cell=(1, 2, 4))) == "z = 1.00 Å"
    plain = slice_figure(fields[0], "y")
    assert title(plain) == "y = 3 (grid point)"
    assert plain.layout.xaxis.title.text == "x (grid point)"
    hexagonal = made(CELLS["hexagonal"])
    top, side = slice_figure(hexagonal, "z", 3), slice_figure(hexagonal, "x", 3)
    assert title(top).startswith("z = 2.00 Å<br>") and "t = 0 fs" in title(top)
    assert title(side).startswith("(100) plane, 2.17 Å from the origin")
    assert top.layout.yaxis.title.text == "y (Å)"
    assert [side.layout[a].title.text for a in ("xaxis", "yaxis")] == ["along b (Å)", "z (Å)"]
    assert title(plot.plane(hexagonal, (1, -1, 0))).startswith("(1 −1 0) plane")


def test_panels_have_the_aspect_of_the_plane(fields: np.ndarray) -> None:
    half = np.sqrt(3) / 2 / 1.5  # a rhombus of 60 degrees in its box
    hexagonal = dict(density=made(CELLS["hexagonal"]))
    cases = [({"cell": EDGE}, 1.0), ({}, 6 / 4), ({"cell": (1, 3, 1)}, 3.0), (hexagonal, half)]
    for options, aspect in cases:
        layout = slice_figure(**({"density": fields[0]} | options)).layout
        wide = layout.width - layout.margin.l - layout.margin.r
        tall = layout.height - layout.margin.t - layout.margin.b
        assert tall / wide == pytest.approx(aspect, rel=0.01)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_atoms_near_the_plane(cell: np.ndarray) -> None:
    run = made(cell)
    atoms = slice_figure(run, "z", 0, within=0.1).data[-1]
    assert list(atoms.text) == ["Li"]  # the other is in the middle of the cell
    here = grid_plane((6, 8, 9), cell, "z", 0)
    np.testing.assert_allclose(
        [atoms.x[0], atoms.y[0]], run.positions[0, 0].values @ here.frame[:2].T, atol=1e-5
    )
    moved = run.assign(positions=run.positions + 3 * cell[0] - 2 * cell[2])  # images
    again = slice_figure(moved, "z", 0, within=0.1).data[-1]
    np.testing.assert_allclose([again.x, again.y], [atoms.x, atoms.y], atol=1e-5)
    assert not len(slice_figure(run, within=0).data[-1].x)


def test_lattice_planes_start_at_an_atom() -> None:
    run = made(CELLS["triclinic"])
    atoms = plot.plane(run, (1, 1, 1)).data[-1]
    assert "Li" in atoms.text and min(np.hypot(atoms.x, atoms.y)) < 1e-5
    assert (
        plot.plane(run, (1, 1, 1), through=(0, 0, 1.0), within=0).layout.title.text
        != plot.plane(run).layout.title.text
    )


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_lines(cell: np.ndarray) -> None:
    run = made(cell)
    start, end = np.array([-0.3, 1.0, 0.2]), np.array([4.0, 2.2, 7.1])
    curve = plot.line(run, start, end).data[0]
    points = start + np.outer(curve.x, end - start) / np.linalg.norm(end - start)
    np.testing.assert_allclose(curve.y, waves(points, cell), atol=1e-5)
    lithium, fluorine = run.positions[0].values
    through = plot.line({"a": run, "b": run}, lithium, fluorine + cell[0], within=0.1)
    marks = through.data[-1]
    length = np.linalg.norm(fluorine + cell[0] - lithium)
    assert {"Li", "F"} <= set(marks.text)
    assert {0.0, round(length, 4)} <= {round(float(x), 4) for x in marks.x}
    assert through.layout.xaxis.title.text == "distance (Å)" and len(through.data) == 3


def test_a_cell_for_each_frame() -> None:
    run = made(CELLS["hexagonal"])
    cells = CELLS["hexagonal"] * np.array([1, 1.1, 1.2])[:, None, None]
    run = run.assign(cell=(("time", "vector", "cartesian"), cells))
    fig = film_figure(run)
    assert fig.frames[2].data[0].dx == pytest.approx(1.2 * fig.frames[0].data[0].dx)
    assert slice_figure(run.isel(time=1)).layout.xaxis.range[1] == pytest.approx(5.5)


def test_comparison(fields: np.ndarray) -> None:
    truth, prediction = fields[0], fields[1] * 1.5
    fig = comparison_figure({"DFT": truth, "model": prediction}, "z", 2, cell=EDGE)
    panels = [grid_points(heatmap, (6, 4)) for heatmap in maps(fig)]
    left, right = truth[..., 2].T, prediction[..., 2].T
    expected = (left, right, abs(left - right))
    for drawn, wanted in zip(panels, expected, strict=True):
        np.testing.assert_allclose(drawn, wanted, atol=1e-6)
    assert [heatmap.coloraxis for heatmap in maps(fig)] == ["coloraxis", "coloraxis", "coloraxis2"]
    both = np.stack([heatmap.z for heatmap in maps(fig)[:2]])
    assert fig.layout.coloraxis.cmin == both.min() and fig.layout.coloraxis.cmax == both.max()
    assert fig.layout.coloraxis2.cmin == 0
    assert [a.text for a in fig.layout.annotations] == ["DFT", "model", "|error|"]
    relative = 100 * np.linalg.norm(truth - prediction) / np.linalg.norm(truth)
    assert f"{relative:.3g} %" in fig.layout.title.text
    twins = comparison_figure({"a": truth, "b": truth})
    assert 0 < twins.layout.coloraxis2.cmax < np.ptp(truth)  # no scale from 0 to 1 of nothing
    with pytest.raises(ShapeError, match="two"):
        comparison_figure({"a": truth})


def test_panels(fields: np.ndarray) -> None:
    runs = {"ab initio": fields, "with sJSD": xr.DataArray(fields[::-1]), "axes": fields * 2}
    fig = panels_figure(runs, TIMES, [0, -1], "y", 1, cell=EDGE)
    assert len(maps(fig)) == 6
    expected = [np.asarray(run)[pick][:, 1].T for run in runs.values() for pick in (0, -1)]
    for heatmap, picture in zip(maps(fig), expected, strict=True):
        np.testing.assert_allclose(grid_points(heatmap, picture.shape), picture, atol=1e-6)
        assert heatmap.coloraxis == "coloraxis"
    assert [a.text for a in fig.layout.annotations] == ["0 fs", "24 fs"]
    rows = [fig.layout[f"yaxis{i}"].title.text for i in ("", 3, 5)]
    assert rows == [f"<b>{name}</b><br>z (Å)" for name in runs]
    assert fig.layout.yaxis2.title.text is None
    shown = np.stack([heatmap.z for heatmap in maps(fig)[:2]])  # the reference sets the range
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (shown.min(), shown.max())


def test_runs_meet_at_common_times() -> None:
    run = made(CELLS["orthorhombic"], n_frames=8)
    late = run.isel(time=slice(2, None, 2))
    fig = film_figure({"a": run, "b": late})
    assert [step.label for step in fig.layout.sliders[0].steps] == ["4", "8", "12"]
    assert [a.text for a in panels_figure({"a": late, "b": run}).layout.annotations] == [
        "4 fs",
        "8 fs",
        "12 fs",
    ]
    with pytest.raises(ShapeError, match="common times"):
        film_figure({"a": run, "b": run.assign_coords(time=run.time + 1000)})


def test_film(fields: np.ndarray) -> None:
    fig = film_figure(fields, TIMES, "y", 2, cell=EDGE)
    assert len(fig.frames) == 5
    for frame, field in zip(fig.frames, fields, strict=True):
        shown = grid_points(frame.data[0], (8, 4))
        np.testing.assert_allclose(shown, field[:, 2].T, atol=1e-6)
    same(fig.data[0].z, fig.frames[0].data[0].z)
    (slider,) = fig.layout.sliders
    assert [step.label for step in slider.steps] == ["0", "6", "12", "18", "24"]
    assert [step.args[0][0] for step in slider.steps] == [frame.name for frame in fig.frames]
    assert len(fig.layout.updatemenus[0].buttons) == 2
    shown = np.stack([frame.data[0].z for frame in fig.frames])
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (shown.min(), shown.max())


def test_films_of_runs_move_their_atoms() -> None:
    run = made(CELLS["hexagonal"])
    along = np.arange(3)[:, None, None] * np.array([0.2, 0, 0])
    fig = film_figure(run.assign(positions=run.positions + along), index=0, within=0.1)
    assert [float(frame.data[-1].x[0]) for frame in fig.frames] == pytest.approx([0, 0.2, 0.4])
    assert fig.layout.sliders[0].currentvalue.suffix == " fs"


@pytest.mark.parametrize(("length", "frames", "stride"), [(40, 40, 1), (41, 21, 2), (100, 34, 3)])
def test_film_strides(length: int, frames: int, stride: int) -> None:
    run = np.arange(length * 8.0).reshape(length, 2, 2, 2)
    fig = film_figure(run, np.arange(length) * 3.0)
    assert len(fig.frames) == len(fig.layout.sliders[0].steps) == frames
    assert fig.frames[1].data[0].z[0, 0] == pytest.approx(run[stride, 0, 0, 1])
    assert fig.layout.sliders[0].steps[1].label == f"{3 * stride}"
    assert len(film_figure(run, max_frames=7).frames) <= 7


def test_films_side_by_side(fields: np.ndarray) -> None:
    fig = film_figure({"ab initio": fields, "model": 1 - fields}, TIMES, "y", cell=EDGE)
    assert [a.text for a in fig.layout.annotations] == ["ab initio", "model"]
    shown = grid_points(fig.frames[3].data[3], (8, 4))
    np.testing.assert_allclose(shown, 1 - fields[3, :, 3].T, atol=1e-6)
    assert fig.frames[3].traces == tuple(range(6))


def test_payload_is_small() -> None:
    cube = np.random.default_rng(0).random((40, 24, 24, 24))
    assert len(comparison_figure({"a": cube[0], "b": cube[1]}, cell=EDGE).to_json()) < 80_000
    assert len(film_figure(cube, cell=EDGE).to_json()) < 330_000


def test_figures_fit_a_small_screen(fields: np.ndarray) -> None:
    ds = made(CELLS["cubic"])
    pair = {"a": ds, "b": ds}
    for fig in (slice_figure(ds), comparison_figure(pair), film_figure(pair), isosurface(ds)):
        assert fig.layout.height <= 560 and fig.layout.width <= 1100


# --- space -----------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [2.2, 3.3, 5.3])
def test_the_contour_of_a_gaussian_is_a_sphere(radius: float) -> None:
    gaussian = np.exp(-np.sum((np.indices((15, 14, 16)) - 7) ** 2, axis=0) / 18)
    points, triangles = contour(gaussian, np.exp(-(radius**2) / 18))
    np.testing.assert_allclose(np.linalg.norm(points - 7, axis=1), radius, atol=0.03)
    a, b, c = np.moveaxis(points[triangles], 1, 0) - 7
    # outward normals of a closed surface give its volume, chords a little less
    volume = np.sum(a * np.cross(b - a, c - a)) / 6
    assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.4 / radius**2)
    sides = np.sort(triangles[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2))
    assert (np.unique(sides, axis=0, return_counts=True)[1] == 2).all()  # watertight


@pytest.mark.parametrize("closed", [True, False])
def test_contours_end_on_the_faces_of_the_box(closed: bool) -> None:
    x = np.broadcast_to(np.arange(6.0)[:, None, None], (6, 5, 4))
    points, triangles = contour(x, 2.4, closed)
    on_plane = np.isclose(points[:, 0], 2.4, atol=0.03)
    assert on_plane.all() != closed
    a, b, c = np.moveaxis(points[triangles], 1, 0)
    volume = np.sum((a - points.mean(axis=0)) * np.cross(b - a, c - a)) / 6
    if not closed:
        assert np.ptp(points, axis=0)[1:].tolist() == [4, 3]
    else:  # a slab from 2.4 to 5, its edges a little bevelled
        assert volume == pytest.approx(2.6 * 4 * 3, rel=0.2)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_isosurfaces_lie_on_their_level(cell: np.ndarray) -> None:
    run = made(cell)
    fig = isosurface(run, [0.9, 1.2], points=40)
    surfaces = [trace for trace in fig.data if trace.name and "Å" in trace.name]
    for level, mesh in zip((1.2, 0.9), surfaces, strict=True):  # the inner one first
        points = np.stack([mesh.x, mesh.y, mesh.z], axis=-1)
        s = points @ np.linalg.inv(cell)
        points = points[(abs(s - 0.5) < 0.499).all(axis=1)]  # not on the lids
        assert len(points) > 100
        np.testing.assert_allclose(waves(points, cell), level, atol=0.02)
    assert [trace.name for trace in fig.data[:2]] == ["Li", "F"]
    edges = [trace for trace in fig.data if trace.type == "scatter3d"][-1]
    ends = np.stack([edges.x, edges.y, edges.z], axis=-1).reshape(12, 3, 3)[:, :2]
    lengths = np.sort(np.linalg.norm(ends[:, 1] - ends[:, 0], axis=-1))
    np.testing.assert_allclose(lengths, np.sort(np.repeat(np.linalg.norm(cell, axis=1), 4)))


def test_default_levels_enclose_shares_of_the_electrons() -> None:
    run = made(CELLS["cubic"])
    inner, outer = (
        float(t.name.split()[0]) for t in isosurface(run).data if "Å" in (t.name or "")
    )
    fine = resample(run.density[0].values, (48, 48, 48))
    shares = [fine[fine > level].sum() / fine.sum() for level in (inner, outer)]
    assert shares == pytest.approx([0.2, 0.6], abs=0.03)


def test_differences_have_both_signs() -> None:
    run = made(CELLS["hexagonal"])
    shifted = run.assign(density=run.density.roll(x=2))
    less = plot.difference(run, shifted)
    fig = isosurface(less, atoms=False)
    meshes = [trace for trace in fig.data if trace.type == "mesh3d"]
    assert [trace.name[0] == "−" for trace in meshes].count(True) == 2 and len(meshes) == 4
    colours = {trace.name[0] == "−": trace.color for trace in meshes}
    assert colours == {True: PALETTE[1], False: PALETTE[0]}
    heatmap = slice_figure(less, "z", 0, smooth=False)
    expected = (run.density - shifted.density)[0, :, :, 0].values
    assert set(np.unique(heatmap.data[0].z[np.isfinite(heatmap.data[0].z)])) <= set(
        expected.astype("f4").ravel()
    )
    colours = heatmap.layout.coloraxis
    assert colours.cmin == -colours.cmax and colours.colorbar.title.text.startswith("Δρ")


def test_differences_are_taken_at_common_times_or_from_one_frame() -> None:
    run = made(CELLS["cubic"], n_frames=6)
    run = run.assign(density=run.density * (1 + run.time))
    late = run.isel(time=slice(2, None, 2))
    less = plot.difference(run, late)
    assert less.times.tolist() == [4.0, 8.0] and not less.field(1).any()
    from_first = plot.difference(run, run.isel(time=[0]))
    np.testing.assert_allclose(from_first.field(3), run.density[3] - run.density[0])
    with pytest.raises(ShapeError, match="one grid"):
        plot.difference(run, run.isel(x=slice(None, None, 2)))


def test_repeated_cells() -> None:
    run = made(CELLS["triclinic"])
    one, four = isosurface(run, [1.2]), isosurface(run, [1.2], repeat=(2, 1, 2))
    edges = [[t for t in fig.data if t.type == "scatter3d"][-1] for fig in (one, four)]
    assert [len(t.x) // 3 for t in edges] == [12, 33]  # shared edges once
    highest = [max(fig.data[-1].z) for fig in (one, four)]
    assert highest[1] == pytest.approx(highest[0] + 6)
    with pytest.raises(ShapeError, match="repeat"):
        isosurface(run, repeat=(0, 1, 1))


def test_films_in_space_are_bounded() -> None:
    run = made(CELLS["cubic"], n_frames=30)
    noise = np.random.default_rng(0).normal(size=(30, 24, 24, 24))
    rough = xr.Dataset({"density": (("time", *"xyz"), noise + 5)}).assign(
        {k: run[k] for k in ("cell", "numbers", "positions")}
    )
    fig = plot.isosurface_film(rough, times=2.0 * np.arange(30))
    assert len(fig.frames) == 10 and len(fig.to_json()) < 500_000
    assert "of 24 × 24 × 24 points" in fig.layout.title.text
    assert [step.label for step in fig.layout.sliders[0].steps][:2] == ["0", "6"]
    assert all(len(frame.data) == len(fig.data) for frame in fig.frames)
    same(fig.frames[0].data[-1].x, fig.data[-1].x)
    both = plot.isosurface_film({"a": run, "b": run.isel(time=slice(0, 9))}, max_frames=3)
    assert {t.scene for t in both.data} == {"scene", "scene2"} and len(both.frames) == 3


def test_colours_and_radii_are_those_of_ase() -> None:
    data, colours = pytest.importorskip("ase.data"), pytest.importorskip("ase.data.colors")
    assert [float(r) / 100 for r in units.RADII[:97]] == list(data.covalent_radii[:97])
    hexes = ["#" + "".join(f"{round(255 * c):02x}" for c in rgb) for rgb in colours.jmol_colors]
    assert list(units.COLOURS[2 : len(hexes)]) == hexes[2:]  # of hydrogen a light grey
    assert len(units.SYMBOLS) == len(units.COLOURS) == 119


def test_large_grids_are_decimated_and_say_so() -> None:
    x = np.cos(2 * np.pi * np.arange(60) / 60)
    fig = isosurface(1 + 0.1 * x[:, None, None] + np.zeros((60, 30, 30)), [1.03], cell=6.0)
    assert "drawn on 48 × 24 × 24 of 60 × 30 × 30 points" in fig.layout.title.text
    assert "drawn" not in isosurface(made(CELLS["cubic"])).layout.title.text
    for wrong in ([5.0], [-1.0]):
        with pytest.raises(ShapeError, match="no point has the level"):
            isosurface(made(CELLS["cubic"]), wrong)


def test_molecules_have_bonds() -> None:
    run = made(CELLS["cubic"])
    water = np.array([(2.0, 2, 2), (2.96, 2, 2), (1.76, 2.93, 2)])
    there = dict(
        numbers=("atom", [8, 1, 1]), positions=(("time", "atom", "cartesian"), [water] * 3)
    )
    fig = isosurface(run.drop_vars(["numbers", "positions"]).assign(there))
    bonds = [trace for trace in fig.data if trace.type == "scatter3d" and trace.line.width > 3]
    assert len(bonds) == 1 and len(bonds[0].x) == 12  # two bonds, half from either end
    ends = np.stack([bonds[0].x, bonds[0].y, bonds[0].z], axis=-1).reshape(-1, 3, 3)[:, :2]
    middle = (water[0] + water[1:]) / 2
    np.testing.assert_allclose(np.sort(ends[:2, 1], axis=0), np.sort(middle, axis=0), atol=1e-5)
    across = water + [2.5, 0, 0]  # a hydrogen beyond the face: whole molecules on both sides
    moved = run.assign(there).assign(positions=(there["positions"][0], [across] * 3))
    fig = plot.isosurface_film(moved)
    hydrogen, oxygen = (
        np.stack([t.x, t.y, t.z], axis=-1) for t in fig.select_traces(dict(mode="markers"))
    )
    expected = [across[0], across[0] - run.cell.values[0]]
    np.testing.assert_allclose(sorted(oxygen.tolist()), sorted(map(list, expected)), atol=1e-5)
    assert len(hydrogen) == 4
    metal = isosurface(run.assign(numbers=("atom", [3, 13])))
    assert len([trace for trace in metal.data if trace.type == "scatter3d"]) == 1


def test_names_are_imported_when_used() -> None:
    assert set(plot.__all__) >= {"isosurface", "plane", "slice_figure", "line_styles"}
    assert all(hasattr(plot, name) for name in plot.__all__)
    with pytest.raises(AttributeError, match="pie_chart"):
        plot.pie_chart  # noqa: B018


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda f: slice_figure(f[0, :0]), ["density", "(0, 6, 8)"]),
        (lambda f: slice_figure(f[None]), ["density", "(1, 5, 4, 6, 8)", "(X, Y, Z)"]),
        (lambda f: slice_figure(f[0], "xy"), ["'xy'", "choose 'x'"]),
        (lambda f: slice_figure(f[0], 3), ["axis 3", "choose 'x'"]),
        (lambda f: slice_figure(f[0], "y", 6), ["y has no plane 6", "0 to 5"]),
        (lambda f: slice_figure(f[0], cell=np.ones((2, 3))), ["cell has shape (2, 3)", "edge"]),
        (lambda f: film_figure(f, cell=np.eye(4)), ["cell has shape (4, 4)", "vectors"]),
        (lambda f: film_figure(f, cell=[1, 0, 1]), ["no volume"]),
        (lambda f: film_figure(f, cell=np.stack([np.eye(3)] * 3)), ["(3, 3, 3)", "each frame"]),
        (lambda f: slice_figure(xr.Dataset({"rho": 1})), ["no variable 'density'"]),
        (lambda f: plot.plane(f[0], (0, 0, 0)), ["hkl is [0.0, 0.0, 0.0]", "not all 0"]),
        (lambda f: plot.plane(f[0], (1, 0.5, 0)), ["hkl", "integers"]),
        (lambda f: plot.plane(f[0], (1, 1, 0), through=(1, 2)), ["[1.0, 2.0]", "point"]),
        (lambda f: isosurface(f[0] * np.nan), ["not finite"]),
        (lambda f: plot.difference(f[0], f[0, :2]), ["reference", "one grid"]),
        (lambda f: plot.line(f[0], (0, 0), (1, 2, 3)), ["no line", "two points"]),
        (lambda f: plot.line(f[0], (0, 0, 1), (0, 0, 1)), ["no line"]),
        (
            lambda f: comparison_figure({"a": f[0], "b": f[0, :, :3]}),
            ["b has", "(4, 3, 8)", "one grid"],
        ),
        (lambda f: film_figure(f, TIMES[:3]), ["density", "(3,)", "one for each"]),
        (lambda f: film_figure(f[:0], TIMES[:0]), ["density", "not empty"]),
        (lambda f: film_figure({}, TIMES), ["at least one field"]),
        (lambda f: film_figure({"a": f, "b": f[:4]}), ["'a': 5, 'b': 4"]),
        (lambda f: panels_figure({"a": f, "b": f[:4]}, TIMES, [0]), ["b has", "one for each"]),
        (lambda f: panels_figure({"a": f}, TIMES, [0, 5]), ["picks [0, 5]", "choose frames"]),
        (lambda f: panels_figure({"a": f}, TIMES, []), ["picks []"]),
        (lambda f: series_figure(TIMES, {"a": [1, 2]}, ""), ["a has shape (2,)", "(5,)"]),
        (lambda f: series_figure(TIMES, {"a": [TIMES] * 2}, ""), ["(2, 5)", "(mean, low, high)"]),
        (lambda f: error_figure(TIMES, {"a": (TIMES, [1], [2])}), ["a:", "inhomogeneous"]),
        (lambda f: error_figure(f, {"a": TIMES}), ["abscissa (5, 4, 6, 8)"]),
        (lambda f: distribution_figure({"a": [1.0]}, [0.0]), ["centres", "two bins"]),
        (lambda f: training_figure([]), ["no rows"]),
        (lambda f: training_figure([{"loss": 1.0}]), ["no column 'step'", "loss"]),
        (lambda f: film_figure(f, max_frames=0), ["max_frames=0", "1 or more"]),
        (lambda f: plot.isosurface_film(f, max_frames=-1), ["max_frames=-1"]),
        (lambda f: film_figure(f, times=["a"] * 5), ["times", "'a'"]),
        (lambda f: film_figure("run.zarr"), ["dk.open_trajectory"]),
        (lambda f: slice_figure(f, [0, 1]), ["axis [0, 1]"]),
        (lambda f: slice_figure(f, index=2.5), ["no plane 2.5"]),
        (lambda f: slice_figure(f, index="middle"), ["no plane middle"]),
        (lambda f: slice_figure([f[0], f[0, :3]]), ["density:", "array of numbers"]),
        (lambda f: plot.plane(f, (1, 1, 1), through="atom"), ["through:", "'atom'"]),
        (lambda f: isosurface(f, ["high"]), ["levels:", "'high'"]),
        (lambda f: series_figure(TIMES, TIMES, ""), ["ndarray", "mapping"]),
        (lambda f: compare(f, f, names=("a", "a")), ["names", "two"]),
        (lambda f: training_figure([{"step": 0, "loss": 1.0}], ["los"]), ["'los'", "loss"]),
    ],
)
def test_what_does_not_fit_is_named(fields: np.ndarray, call: Callable, parts: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        call(fields)
    for part in parts:
        assert part in str(caught.value)


# --- curves ----------------------------------------------------------------------------------


def test_line_styles() -> None:
    names = ["DFT", *"abcdefgh"]
    styles = line_styles(names, truth="DFT")
    assert styles["DFT"]["color"] == TRUTH
    assert [styles[name]["color"] for name in "abcdefg"] == list(PALETTE)
    assert styles["h"]["color"] == PALETTE[0]
    assert styles["h"]["dash"] != styles["a"]["dash"]
    assert len({(s["color"], s["dash"]) for s in styles.values()}) == len(names)
    assert line_styles("ab", truth="DFT") == {name: styles[name] for name in "ab"}


def test_distribution_is_a_density() -> None:
    centres = np.linspace(-6, 4, 101)
    density = np.exp(-(centres**2) / 2) / np.sqrt(2 * np.pi)
    probability = density * 0.1
    probability[:3] = 0
    fig = distribution_figure({"DFT": probability, "model": probability[::-1]}, centres)
    truth, model, normal = fig.data
    np.testing.assert_allclose(truth.y[3:], density[3:], rtol=1e-5)
    np.testing.assert_allclose(normal.y, density, rtol=1e-5)
    assert np.isnan(truth.y[:3]).all()  # zero has no logarithm: a gap, not a cliff
    assert (truth.line.color, model.line.color) == (TRUTH, PALETTE[0])
    assert fig.layout.yaxis.type == "log"
    low, high = 10.0 ** np.array(fig.layout.yaxis.range)
    assert low < density[3] and density.max() < high
    linear = distribution_figure({"DFT": probability}, centres, log=False, normal=False)
    assert len(linear.data) == 1
    assert linear.layout.yaxis.type != "log"
    assert linear.data[0].y.sum() * 0.1 == pytest.approx(1, abs=2e-3)


def test_structure_factor_bands() -> None:
    q = np.array([0.7, 1.0, 1.2])
    mean = np.array([0.1, 0.5, 2.0])
    curves = {"DFT": (mean, mean - 0.05, mean + 0.2), "model": mean * 2}
    fig = structure_factor_figure(q, curves)
    band, truth, model, ratio_band, one, ratio = fig.data  # bands below the curves
    assert band.fill == "toself"
    same(band.x, [*q, *q[::-1]])
    same(band.y, [*(mean + 0.2), *(mean - 0.05)[::-1]])
    assert band.showlegend is False and band.legendgroup == truth.name
    assert (band.fillcolor, band.opacity) == (TRUTH, 0.2)
    same(truth.x, q)
    same(model.y, 2 * mean)
    assert truth.mode == model.mode == "lines+markers"
    assert {trace.yaxis for trace in (ratio_band, one, ratio)} == {"y2"}
    same(one.y, [1, 1, 1])
    same(ratio.y, [2, 2, 2])
    np.testing.assert_allclose(ratio_band.y[:3], 1 + 0.2 / mean, rtol=1e-6)
    assert fig.layout.yaxis2.type == "log" and fig.layout.yaxis.type != "log"
    assert len(structure_factor_figure(q, {"DFT": mean}).data) == 1
    assert "Å<sup>−1</sup>" in fig.layout.xaxis.title.text


def test_bands_skip_what_is_not_finite() -> None:
    mean, low, high = np.ones(5), np.full(5, 0.5), np.full(5, 2.0)
    low[1], high[4] = np.nan, np.inf
    band = series_figure(TIMES, {"a": (mean, low, high)}, "a (eV)").data[0]
    same(band.x, [*TIMES[:4], *TIMES[[4, 3, 2, 0]]])
    assert np.isfinite(band.y).all()


def test_errors_are_in_percent() -> None:
    error = np.array([0.0, 0.1, 0.2, 0.3, 0.3])
    curves = {"persistence": error, "model": np.stack([error, error - 0.15, error + 0.1])}
    fig = error_figure(xr.DataArray(TIMES), curves)
    band, persistence, model = fig.data
    np.testing.assert_allclose(persistence.y, 100 * error, rtol=1e-6)
    np.testing.assert_allclose(band.y[:5], 100 * error + 10, rtol=1e-6)
    assert [persistence.line.color, model.line.color] == list(PALETTE[:2])  # no reference
    assert fig.layout.xaxis.title.text == "t (fs)"
    assert "%" in fig.layout.yaxis.title.text
    styles = line_styles(["model", "persistence"])
    again = error_figure(TIMES, curves, styles=styles)
    assert again.data[2].line.color == PALETTE[0]


def test_logarithmic_errors() -> None:
    error = np.array([0.0, 0.1, 0.2, 0.3, 0.3])
    fig = error_figure(TIMES, {"model": (error, error - 0.15, error + 0.1)}, log=True)
    band, model = fig.data
    assert fig.layout.yaxis.type == "log"
    assert fig.layout.yaxis.dtick == "D2"  # one and a half decades: labels on 1, 2, 5
    assert np.isnan(model.y[0]) and model.y[1] == pytest.approx(10)
    assert 0 not in band.x and len(band.x) == 8
    assert band.y.min() == pytest.approx(1)  # a tenth of the smallest mean, not minus infinity
    wide = series_figure(TIMES, {"a": 10.0 ** -np.arange(5)}, "a", log=True)
    assert wide.layout.yaxis.dtick == 1


def test_series() -> None:
    curves = {"DFT": 0 * TIMES, "model": TIMES**2}
    fig = series_figure(TIMES, curves, "electron drift (electrons)")
    assert [trace.name for trace in fig.data] == ["DFT", "model"]
    same(fig.data[1].y, TIMES**2)
    assert fig.data[0].line.color == TRUTH
    assert fig.layout.yaxis.title.text == "electron drift (electrons)"


def test_training_curve_is_a_running_median() -> None:
    loss = np.exp(-np.arange(100) / 30)
    spiky = loss.copy()
    spiky[50] = 1e3
    rows = [{"step": i, "loss": y, "learning_rate": 1e-3} for i, y in enumerate(spiky)]
    for i in range(9, 100, 10):
        rows[i]["validation_l2"] = 0.1 + i
    fig = training_figure(rows, window=5)
    assert [trace.name for trace in fig.data] == ["loss", "validation_l2"]
    smooth, points = fig.data
    np.testing.assert_allclose(smooth.y[2:48], loss[2:48], rtol=1e-6)
    assert smooth.y.max() <= 1
    assert points.mode == "lines+markers"
    np.testing.assert_array_equal(points.x, np.arange(9, 100, 10))
    np.testing.assert_allclose(points.y, points.x + 0.1, rtol=1e-6)
    assert fig.layout.yaxis.type == "log"
    (only,) = training_figure(rows, ["loss"], window=1).data
    same(only.y, spiky)


def test_training_log_as_read_from_csv() -> None:
    rows = [{"step": str(i), "loss": str(2.0 - i), "extra": "" if i else "3"} for i in range(2)]
    loss, extra = training_figure(rows).data
    same(loss.y, [2, 1])
    same(extra.y, [3])


def test_joined_training_logs() -> None:
    """Rows of several trainings repeat the steps; each loss is still a curve."""
    rows = [{"step": i, name: 1.0 + i} for name in "abc" for i in range(40)]
    curves = training_figure(rows, window=1).data
    assert [curve.name for curve in curves] == ["a", "b", "c"]
    for curve in curves:
        assert curve.mode == "lines"
        same(curve.y, 1.0 + np.arange(40))


def test_long_training_logs_are_thinned() -> None:
    rows = [{"step": i, "loss": 1.0 + i, "other": np.nan if i % 9 else i} for i in range(20_000)]
    loss, other = training_figure(rows).data
    assert len(loss.x) == 1000 and loss.x[1] == 20
    assert loss.y[500] == pytest.approx(10_001)
    assert other.mode == "lines+markers"


# --- report ----------------------------------------------------------------------------------


def test_report_is_complete_and_offline(tmp_path: Path, fields: np.ndarray) -> None:
    path = tmp_path / "report.html"
    sections = [
        ("Errors & <limits>", "<table><tr><td>5.3</td></tr></table>", None),
        ("A slice", "Below <5 % & above.\n\nSecond.", slice_figure(fields[0], cell=EDGE)),
        ("A film", "", film_figure(fields, TIMES)),
    ]
    write_report(path, "Lithium <800 K>", sections)
    page = path.read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    rest = page.replace(get_plotlyjs(), "")
    assert not re.search(r"<(script|link|img|iframe)\b[^>]*\b(src|href)\s*=", rest)
    assert "cdn" not in re.sub(r'"bdata":"[^"]*"', "", rest).lower()
    assert "<title>Lithium &lt;800 K&gt;</title>" in rest
    for i, heading in enumerate(("Errors &amp; &lt;limits&gt;", "A slice", "A film")):
        assert f'<li><a href="#s{i}">{heading}</a></li>' in rest
        assert f'<h2 id="s{i}">{heading}</h2>' in rest
    assert "<td>5.3</td>" in rest
    assert "<p>Below &lt;5 % &amp; above.</p><p>Second.</p>" in rest
    assert rest.count("Plotly.newPlot(") == 2
    assert "Plotly.addFrames(" in rest and "Plotly.animate(" not in rest  # films wait for a click
    assert f"densitykit {__version__}" in rest
    write_report(tmp_path / "again.html", "Lithium <800 K>", sections)
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_report_without_figures_is_small(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", "Words", [("One", "<5 % is text, not a tag", None)])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(page) < 5000
    assert "<p>&lt;5 % is text, not a tag</p>" in page


def test_report_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    write_report(path, "First", [])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(path, "Second", [])
    assert "First" in path.read_text(encoding="utf-8")
    monkeypatch.undo()
    write_report(path, "Third", [])
    assert "Third" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
