"""Nuclei of model densities with known places, and of the bundled liquid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from densitykit.analysis.nuclei import NucleiFilter, assign, find_nuclei, match_nuclei
from densitykit.cells import wave_vectors
from densitykit.errors import ShapeError
from densitykit.fields import resample
from densitykit.io.reader import open_trajectory

LITHIUM = Path(__file__).resolve().parents[2] / "data" / "lithium-800K.zarr"
CUBE = 7.0 * np.eye(3)
SKEW = np.array([[7.0, 0.0, 0.0], [1.5, 6.5, 0.0], [-1.0, 0.8, 7.5]])
#: equal edges at 60 degrees: fcc, primitive
STEEP = 7.0 * np.linalg.cholesky(np.full((3, 3), 0.5) + 0.5 * np.eye(3))
SHAPE = (18, 20, 22)
WIDTH = 0.55  # angstrom, of a Gaussian hole
#: far apart; the first two straddle a face and a corner of the cell
FRACTIONS = np.array(
    [[0.002, 0.5, 0.5], [0.999, 0.001, 0.998], [0.4, 0.1, 0.6], [0.55, 0.62, 0.13]]
)


def holes(fractions, cell=CUBE, shape=SHAPE, width=WIDTH) -> np.ndarray:
    """A uniform density with Gaussian holes, whose Fourier coefficients are exact."""
    q = wave_vectors(shape, cell)
    places = np.asarray(fractions) @ cell
    waves = np.exp(-1j * np.tensordot(q, places, axes=(-1, 1))).sum(axis=-1)
    form = (2 * np.pi * width**2) ** 1.5 * np.exp(-((q * width) ** 2).sum(-1) / 2)
    field = np.fft.ifftn(waves * form).real * np.prod(shape) / abs(np.linalg.det(cell))
    return 0.05 * (1.2 - field)


@pytest.fixture(scope="module")
def lithium() -> tuple[xr.Dataset, xr.Dataset]:
    """Training run, and a stretch of the independent run."""
    part = slice(0, 400)
    train, test = (open_trajectory(LITHIUM / f"run-{i}") for i in (1, 2))
    return train.isel(time=part), test.isel(time=slice(0, 100))


@pytest.fixture(scope="module")
def trained(lithium) -> NucleiFilter:
    return NucleiFilter.fit(lithium[0], frames=12)


@pytest.mark.parametrize("cell", [CUBE, SKEW], ids=["cubic", "triclinic"])
@pytest.mark.parametrize("count", [None, 4])
def test_isolated_minima_are_found_between_the_points(cell, count) -> None:
    found = find_nuclei(holes(FRACTIONS, cell), cell, count)
    hits, distances = match_nuclei(found, FRACTIONS @ cell, cell)
    assert sorted(hits) == [0, 1, 2, 3] and len(found) == 4
    assert distances.max() < 0.01  # the tails of the neighbours; the grid is 0.35 angstrom
    fractions = found @ np.linalg.inv(cell)
    assert (fractions >= 0).all() and (fractions < 1 + 1e-12).all()


@pytest.mark.parametrize("cell", [CUBE, SKEW, STEEP], ids=["cubic", "triclinic", "rhombohedral"])
def test_one_minimum_alone_is_exact(cell) -> None:
    """Two holes too close to resolve are one oblong minimum, symmetric about their middle.

    So are the images, which hence do not tilt it. The grid is 0.35 angstrom, and Newton's method
    quadratic: only the true gradient and Hessian get that close in its few steps.
    """
    rng = np.random.default_rng(5)
    apart = np.array([[0.25, 0.2, -0.25]]) @ np.linalg.inv(cell)
    for place in (np.array([[0.123, 0.987, 0.51]]), *rng.random((5, 1, 3))):
        density = holes(np.concatenate([place - apart, place + apart]), cell)
        found = find_nuclei(density, cell)
        assert len(found) == 1
        assert match_nuclei(found, place @ cell, cell)[1] < 1e-8


@pytest.mark.parametrize("cell", [CUBE, SKEW, STEEP], ids=["cubic", "triclinic", "rhombohedral"])
def test_a_deep_nucleus_at_the_border_takes_no_other_ones_place(cell) -> None:
    """Between the eight voxels at the corners of the cell it is still one nucleus."""
    corner, inside = -0.5 / np.array([SHAPE]), np.array([[0.45, 0.55, 0.5]])
    density = holes(corner, cell) + 0.7 * holes(inside, cell)
    found = find_nuclei(density, cell, 2)
    hits, distances = match_nuclei(found, np.concatenate([corner, inside]) @ cell, cell)
    assert hits.tolist() == [0, 1]
    assert distances.max() < 0.01


def test_the_deepest_are_kept_and_close_ones_merged() -> None:
    shallow = 0.6 * (holes(FRACTIONS[3:]) - 0.06)
    density = holes(FRACTIONS[:3]) + shallow
    found = find_nuclei(density, CUBE, 3)
    assert (match_nuclei(found, FRACTIONS[:3] @ CUBE, CUBE)[0] >= 0).all()
    assert len(find_nuclei(density, CUBE)) == 4
    assert len(find_nuclei(density, CUBE, min_distance=20.0)) == 1


def test_a_flat_core_is_one_nucleus() -> None:
    density = np.maximum(holes(FRACTIONS, width=0.4), 0.0)  # voxels at the floor are equal
    found = find_nuclei(density, CUBE, 4)
    assert match_nuclei(found, FRACTIONS @ CUBE, CUBE)[1].max() < 0.05


def test_the_filter_undoes_what_neighbours_do() -> None:
    """For a superposition of holes the filter is exact but for its few nodes."""
    rng = np.random.default_rng(0)
    lattice = np.stack(np.meshgrid(*[[0.0, 0.5]] * 3), axis=-1).reshape(8, 3)
    places = (lattice + rng.normal(0, 0.03, (40, 8, 3))) @ CUBE
    frames = np.stack([holes(p @ np.linalg.inv(CUBE), width=0.9) for p in places])
    run = xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), frames),
            "positions": (("time", "atom", "cartesian"), places),
            "cell": (("vector", "cartesian"), CUBE),
        }
    )
    trained = NucleiFilter.fit(run.isel(time=slice(0, 30)), noise=1e-4)
    errors = {}
    for name, sieve in {"bare": None, "filter": trained}.items():
        found = [find_nuclei(f, CUBE, 8, sieve, 0.0) for f in frames[30:]]
        pairs = [match_nuclei(f, p, CUBE)[1] for f, p in zip(found, places[30:], strict=True)]
        errors[name] = np.sqrt(np.mean(np.square(pairs)))
    assert errors["filter"] < errors["bare"] / 5


def test_all_nuclei_of_the_bundled_liquid(lithium, trained) -> None:
    run = lithium[1].isel(time=slice(0, 100, 10))
    cell = run.cell.values
    for sieve, error in ((trained, 0.003), (None, 0.03)):
        distances = []
        for density, places in zip(run.density.values, run.positions.values, strict=True):
            distances.append(match_nuclei(find_nuclei(density, cell, 32, sieve), places, cell)[1])
        assert np.isfinite(distances).all()
        assert np.sqrt(np.mean(np.square(distances))) < error
    assert len(find_nuclei(run.density[0].values, cell, filter=trained)) == 32


def test_noise_and_blur_cost_accuracy_only(lithium, trained) -> None:
    run = lithium[1].isel(time=slice(0, 100, 40))
    cell, rng = run.cell.values, np.random.default_rng(3)
    q2 = (wave_vectors(run.density.shape[1:], cell) ** 2).sum(-1)
    for density, places in zip(run.density.values, run.positions.values, strict=True):
        noise = np.fft.ifftn(np.fft.fftn(rng.standard_normal(q2.shape)) * np.exp(-q2 / 8)).real
        blurred = np.fft.ifftn(np.fft.fftn(density) * np.exp(-0.5 * 0.25**2 * q2)).real
        for worse in (density * (1 + 0.02 * noise / noise.std()), blurred):
            distances = match_nuclei(find_nuclei(worse, cell, 32, trained), places, cell)[1]
            assert distances.max() < 0.1


def test_a_finer_grid_changes_nothing(lithium, trained) -> None:
    density, cell = lithium[1].density[5].values.astype(float), lithium[1].cell.values
    coarse = find_nuclei(density, cell, 32, trained)
    fine = find_nuclei(resample(density, (30, 32, 28)), cell, 32, trained)
    assert match_nuclei(fine, coarse, cell)[1].max() < 1e-3


@pytest.mark.parametrize("density", [np.ones((8, 8, 8)), np.full((8, 8, 8), np.nan)])
def test_no_minima_no_nuclei(density) -> None:
    assert find_nuclei(density, CUBE, 5).shape == (0, 3)
    assert find_nuclei(-density, CUBE).shape == (0, 3)


def test_match_is_one_to_one_through_the_border() -> None:
    reference = np.array([[0.1, 3.0, 3.0], [3.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
    found = np.array([[3.1, 3.0, 3.0], [6.9, 10.0, 3.0], [3.3, 3.0, 3.0]])
    hits, distances = match_nuclei(found, reference, CUBE)
    assert hits.tolist() == [1, 0, -1]
    assert distances == pytest.approx([0.2, 0.1, np.nan], nan_ok=True)
    assert match_nuclei(np.empty((0, 3)), reference, CUBE)[0].tolist() == [-1, -1, -1]


def test_each_place_has_its_own_reach() -> None:
    """The total distance counts, not who comes first; an unknown place claims nothing."""
    places = np.array([[3.0, 3.0, 3.0], [np.nan] * 3, [3.9, 3.0, 3.0], [1.0, 6.8, 1.0]])
    found = np.array([[3.4, 3.0, 3.0], [2.2, 3.0, 3.0], [1.0, 0.4, 1.0]])
    for reach, expected in ((1.0, [1, -1, 0, 2]), ([0.5, 9.0, 0.4, 0.7], [0, -1, -1, 2])):
        pairs, vectors = assign(found, places, CUBE, np.broadcast_to(reach, 4))
        assert pairs.tolist() == expected
        assert (np.isnan(vectors[:, 0]) == (pairs < 0)).all()
        assert vectors[3] == pytest.approx([0.0, 0.6, 0.0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: find_nuclei(np.ones((2, 8, 8, 8)), CUBE), "track_nuclei"),
        (lambda: find_nuclei(np.ones((8, 8, 8)), np.ones(3)), "lattice vectors"),
        (lambda: find_nuclei(np.ones((8, 8, 8)), np.zeros((3, 3))), "lattice vectors"),
        (lambda: find_nuclei(np.ones((8, 8, 8)), CUBE, 0), "1 or more"),
    ],
)
def test_bad_input_is_told_what_to_do(call, words) -> None:
    with pytest.raises(ShapeError, match=words):
        call()


def test_a_filter_needs_nuclei(lithium) -> None:
    with pytest.raises(ShapeError, match="positions"):
        NucleiFilter.fit(lithium[0].drop_vars("positions"))
    with pytest.raises(ShapeError, match="spacing"):
        NucleiFilter.fit(lithium[0], spacing=100.0)
