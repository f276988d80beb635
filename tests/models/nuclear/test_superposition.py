"""Superpositions of atomic contributions against Gaussians, whose form factors are known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import xarray as xr
from made_up import CHARGES, WIDTHS, made_up_run

from densitykit.cells import wave_vectors
from densitykit.errors import ShapeError, TrajectoryError
from densitykit.fields import n_electrons, resample
from densitykit.models.nuclear.superposition import (
    Superposition,
    fit_superposition,
    structure_factors,
    superposed,
)

CUBE = 9.0 * np.eye(3)
SKEW = np.array([[9.0, 0.0, 0.0], [1.5, 8.5, 0.0], [-1.0, 0.8, 9.5]])
SHAPE = (18, 18, 18)
WIDTH = 0.7  # angstrom, of a Gaussian
CELLS = pytest.mark.parametrize("cell", [CUBE, SKEW], ids=["cubic", "triclinic"])


def gaussians(positions, cell=CUBE, charge=1.0, shape=SHAPE) -> np.ndarray:
    """Sum over nuclei (N, 3) and their images, point by point."""
    points = np.stack(np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij"), axis=-1)
    density = np.zeros(shape)
    for s in positions @ np.linalg.inv(cell):
        for image in product((-1, 0, 1), repeat=3):
            r2 = np.square(((points - s + 0.5) % 1.0 - 0.5 + image) @ cell).sum(axis=-1)
            density += np.exp(-r2 / (2 * WIDTH**2))
    return charge * density / (2 * np.pi * WIDTH**2) ** 1.5


def run_of(cell=CUBE, charge=1.0, frames=4, shape=SHAPE) -> xr.Dataset:
    """Four nuclei somewhere, again and again."""
    positions = np.random.default_rng(0).random((frames, 4, 3)) @ cell
    density = np.stack([gaussians(x, cell, charge, shape) for x in positions])
    run = xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), density),
            "positions": (("time", "atom", "cartesian"), positions),
            "cell": (("vector", "cartesian"), cell),
        }
    )
    run.encoding["source"] = "runs/li.zarr"
    return run


@pytest.fixture(scope="module")
def run() -> xr.Dataset:
    return run_of()


@pytest.fixture(scope="module")
def fitted(run) -> Superposition:
    return fit_superposition(run, every=1)


def nuclei(cell=CUBE, batch=2, count=4) -> torch.Tensor:
    """Not those of the run."""
    return torch.from_numpy(np.random.default_rng(1).random((batch, count, 3)) @ cell)


def drawn(model, x, cell=CUBE, shape=SHAPE) -> np.ndarray:
    return model(x, torch.from_numpy(cell), shape).numpy()


# --- structure factors -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 9), (6, 5, 4), (6, 4, 7)])
def test_structure_factors_are_the_direct_sum(shape) -> None:
    """But for the Nyquist planes of even grids, which are empty."""
    s = torch.from_numpy(np.random.default_rng(2).normal(0, 2, (2, 3, 3)))
    k = np.stack(np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in shape), indexing="ij"), axis=-1)
    k = k[:, :, : shape[2] // 2 + 1]
    direct = np.exp(-2j * np.pi * np.einsum("xyzc,bac->bxyza", k, s.numpy())).sum(axis=-1)
    direct[:, (2 * np.abs(k) == shape).any(axis=-1)] = 0
    found = structure_factors(s, shape).numpy()
    assert found.shape == direct.shape and (direct[:, 0, 0, 0] == 3).all()
    np.testing.assert_allclose(found, direct, rtol=0, atol=1e-12)


# --- the fit ---------------------------------------------------------------------------------


@CELLS
def test_gaussian_contributions_are_recovered(cell) -> None:
    """Best where waves are close; a spline spans the gap below the first."""
    model = fit_superposition(run_of(cell), every=1)
    x = nuclei(cell)
    expected = np.stack([gaussians(positions, cell) for positions in x.numpy()])
    assert np.abs(drawn(model, x, cell) - expected).max() < 5e-4 * expected.max()
    q = np.linspace(0, 5, 100)
    error = np.abs(model.form_factors(q)[0] - np.exp(-((q * WIDTH) ** 2) / 2))
    assert error.max() < 3e-3 and error[q > 2].max() < 2e-4


@pytest.mark.parametrize("points", [12, 14, 18])
def test_gaps_between_the_last_waves_are_bridged(points) -> None:
    """In the corner of the half spectrum shells are farther apart than knots."""
    run = run_of(7.0 * np.eye(3), frames=2, shape=(points,) * 3)
    model = fit_superposition(run, every=1)
    assert model.weights.isfinite().all()
    q = np.linspace(0, float(model.knots[-1]), 200)
    exact = np.exp(-((q * WIDTH) ** 2) / 2)
    np.testing.assert_allclose(model.form_factors(q)[0], exact, rtol=0, atol=0.01)


def test_the_form_factor_is_even_and_ends(fitted) -> None:
    q = np.linspace(0, 5, 20)
    np.testing.assert_allclose(fitted.form_factors(-q)[0], fitted.form_factors(q)[0], atol=1e-6)
    longest = np.linalg.norm(wave_vectors(SHAPE, CUBE)[:9, :9, :9], axis=-1).max()
    inside, beyond = fitted.form_factors(np.array([longest - 0.01, longest + 0.01]))[0]
    assert inside != 0 and beyond == 0


@pytest.mark.parametrize("charge", [1.0, 3.0])
def test_electrons_are_counted(charge) -> None:
    """The form factor at q = 0 is given, not fitted: the count is that of no run."""
    model = fit_superposition(run_of(charge=charge), every=1, charges={0: charge})
    counts = n_electrons(drawn(model, nuclei(batch=8)), CUBE)
    np.testing.assert_allclose(counts, 4 * charge, rtol=1e-8)
    assert np.ptp(counts) < 1e-12 * charge


def test_the_charge_is_given_not_fitted(run) -> None:
    """Another one than the run's bends the form factor at the first waves only."""
    model = fit_superposition(run, every=1, charges={0: 1.1})
    assert model.charges[0].item() == pytest.approx(1.1, rel=1e-6)
    q = np.linspace(2, 5, 20)
    exact = np.exp(-((q * WIDTH) ** 2) / 2)
    np.testing.assert_allclose(model.form_factors(q)[0], exact, rtol=0, atol=2e-3)


def test_a_fit_takes_every_so_many_frames(run) -> None:
    expected = fit_superposition(run.isel(time=[0, 2]), every=1)
    other = run.copy(deep=True)
    other["density"][1::2] = 7.0
    found = fit_superposition(other, every=2)
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0)


# --- several species -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nacl", "hexagonal"])
def test_each_species_has_its_form_factor(name) -> None:
    """Gaussians of other charges and widths are told apart, in any cell."""
    run = made_up_run(name)
    model = fit_superposition(run, every=1)
    species = sorted(set(run.numbers.values.tolist()))
    assert model.species == tuple(species)
    numbers, cell = (torch.from_numpy(run[k].values) for k in ("numbers", "cell"))
    later = made_up_run(name, 3, seed=1)
    x, truth = torch.from_numpy(later.positions.values), later.density.values
    found = model(x, cell, truth.shape[1:], numbers).numpy()
    assert np.linalg.norm(found - truth) < 2e-3 * np.linalg.norm(truth)
    order = torch.tensor([1, 0, *range(2, len(numbers))])
    again = model(x[:, order], cell, truth.shape[1:], numbers[order])
    np.testing.assert_allclose(again, found, rtol=0, atol=1e-12)
    number = sum(CHARGES[z] for z in numbers.tolist())
    counts = n_electrons(found, run.cell.values)
    np.testing.assert_allclose(counts, number, rtol=1e-7)
    known = fit_superposition(run, every=1, charges=CHARGES)
    exact = torch.tensor([CHARGES[z] for z in species], dtype=torch.float64)
    torch.testing.assert_close(known.charges, exact, rtol=1e-8, atol=0)
    stored = run.assign(valence_charge=("atom", [CHARGES[z] for z in numbers.tolist()]))
    torch.testing.assert_close(fit_superposition(stored, every=1).weights, known.weights)
    q = np.linspace(1.5, 5, 30)
    for f, z in zip(known.form_factors(q), species, strict=True):
        gauss = CHARGES[z] * np.exp(-((q * WIDTHS[z]) ** 2) / 2)
        np.testing.assert_allclose(f, gauss, rtol=0, atol=0.02)


def test_a_cell_for_each_member(fitted) -> None:
    x = torch.cat([nuclei(CUBE, 1), nuclei(SKEW, 1)])
    cells = torch.from_numpy(np.stack([CUBE, SKEW]))
    found = fitted(x, cells, SHAPE).numpy()
    for k, cell in enumerate((CUBE, SKEW)):
        np.testing.assert_allclose(found[k], drawn(fitted, x[k : k + 1], cell)[0], atol=1e-13)


# --- the density -----------------------------------------------------------------------------


def test_wrapped_or_not(fitted) -> None:
    x = nuclei()
    laps = torch.from_numpy(np.random.default_rng(3).integers(-3, 4, (2, 4, 3)) @ CUBE)
    np.testing.assert_allclose(drawn(fitted, x + laps), drawn(fitted, x), rtol=0, atol=1e-12)


@CELLS
@pytest.mark.parametrize("times", [(2, 1, 1), (1, 3, 2)])
def test_a_supercell_is_the_tiled_density(fitted, cell, times) -> None:
    x = nuclei(cell)
    shifts = torch.from_numpy(np.array(list(product(*map(range, times)))) @ cell)
    tiled = (x[:, None] + shifts[:, None]).flatten(1, 2)
    larger, shape = np.array(times)[:, None] * cell, tuple(18 * t for t in times)
    expected = np.tile(drawn(fitted, x, cell), (1, *times))
    np.testing.assert_allclose(drawn(fitted, tiled, larger, shape), expected, rtol=0, atol=1e-12)


@CELLS
def test_a_shift_by_points_rolls_the_density(fitted, cell) -> None:
    x, steps = nuclei(cell), (3, -1, 6)
    shift = torch.from_numpy(np.array(steps) / SHAPE @ cell)
    expected = np.roll(drawn(fitted, x, cell), steps, (1, 2, 3))
    np.testing.assert_allclose(drawn(fitted, x + shift, cell), expected, rtol=0, atol=1e-12)


def test_a_finer_grid_shows_the_same_density(fitted) -> None:
    """At the common points, but for the waves that the coarse grid cannot hold."""
    x = nuclei()
    fine, coarse = drawn(fitted, x, shape=(36, 36, 36)), drawn(fitted, x)
    assert 1e-9 < np.abs(fine[:, ::2, ::2, ::2] - coarse).max() < 2e-4 * coarse.max()
    odd = drawn(fitted, x, shape=(17, 17, 17))
    np.testing.assert_allclose(resample(fine, (17, 17, 17)), odd, rtol=0, atol=1e-12)


def test_a_batch_is_its_members(fitted) -> None:
    x = nuclei(batch=3)
    whole = drawn(fitted, x)
    for i in range(3):
        np.testing.assert_allclose(whole[i], drawn(fitted, x[i : i + 1])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("cell", "shape"), [(1.2 * CUBE, SHAPE), (SKEW, SHAPE), (CUBE, (18, 18, 20))]
)
def test_one_model_serves_one_cell_after_the_other(fitted, cell, shape) -> None:
    """Form factors are kept for one cell and grid, and made anew for the next."""
    x, other = nuclei(), Superposition(len(fitted.knots))
    other.load_state_dict(fitted.state_dict())
    first = drawn(fitted, x)
    np.testing.assert_array_equal(drawn(fitted, x, cell, shape), drawn(other, x, cell, shape))
    np.testing.assert_array_equal(drawn(fitted, x), first)


# --- errors ----------------------------------------------------------------------------------


def test_a_fit_needs_positions(run) -> None:
    run = run.drop_vars("positions")
    run.encoding["source"] = "runs/li.zarr"
    with pytest.raises(TrajectoryError, match=r"runs/li\.zarr: variable 'positions' is missing"):
        fit_superposition(run)


def test_a_fit_needs_three_dimensions(run) -> None:
    with pytest.raises(ShapeError, match=r"3-D density, not a grid \(18, 18\)"):
        fit_superposition(run.isel(z=0))


def test_a_grid_without_waves(run) -> None:
    with pytest.raises(ShapeError, match=r"4 wave numbers carry no form factor"):
        fit_superposition(run_of(7.0 * np.eye(3), frames=2, shape=(3, 3, 3)), every=1)


@CELLS
def test_a_run_of_lone_atoms_is_its_superposition(cell) -> None:
    run = run_of(cell)
    lone = superposed(run, every=1)
    assert lone.density.dims == run.density.dims
    np.testing.assert_allclose(lone.density, run.density, atol=0.01 * float(run.density.max()))
