"""Hot rock salt is what its card says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from densitykit.assess import one_step_errors
from densitykit.data.windows import load_windows
from densitykit.fields import n_electrons
from densitykit.io.reader import open_split
from densitykit.io.validate import validate_trajectory
from densitykit.models import load_model
from densitykit.models.baselines import LinearExtrapolation
from densitykit.units import atomic_masses

STORE = Path(__file__).parents[1] / "data" / "sodium-chloride-900K.zarr"
SPLITS = ("train", "validation", "test")


def test_the_store_is_valid_and_small() -> None:
    assert validate_trajectory(STORE) == []
    assert sum(f.stat().st_size for f in STORE.rglob("*") if f.is_file()) < 16e6


def test_orthorhombic_with_two_species() -> None:
    run = open_split(STORE, "train")
    lengths = np.diag(run.cell.values)
    np.testing.assert_allclose(run.cell.values, np.diag(lengths), atol=1e-9)
    np.testing.assert_allclose(lengths, 5.8 * np.sqrt([2, 3, 1.5]), rtol=1e-6)
    assert run.density.shape[1:] == (24, 32, 20)
    np.testing.assert_array_equal(run.numbers, [11] * 12 + [17] * 12)
    np.testing.assert_array_equal(run.valence_charge, [1] * 12 + [7] * 12)


@pytest.mark.parametrize("name", SPLITS)
def test_frames(name: str) -> None:
    run = open_split(STORE, name).load()
    np.testing.assert_allclose(np.diff(run.time), 5.0)
    assert float(run.density.min()) > 0
    counted = n_electrons(run.density.values, run.cell.values)
    np.testing.assert_allclose(counted, 96, atol=0.02)
    assert 700 < float(run.temperature.mean()) < 1100
    momenta = run.velocities.values * atomic_masses(run.numbers.values)[:, None]
    assert np.abs(momenta.sum(1)).max() < 1e-3 * np.abs(momenta).max()


def test_velocities_are_those_of_the_positions() -> None:
    run = open_split(STORE, "test").load()
    x, v = run.positions.values, run.velocities.values
    slope = (x[2:] - x[:-2]) / 10.0
    assert np.linalg.norm(slope - v[1:-1]) < 0.05 * np.linalg.norm(v[1:-1])


def test_splits_are_apart() -> None:
    train, validation, test = (open_split(STORE, name) for name in SPLITS)
    assert float(validation.time[0] - train.time[-1]) >= 150
    assert train.attrs["seed"] == validation.attrs["seed"] != test.attrs["seed"]


def test_the_emulator_through_the_nuclei_beats_extrapolation_fivefold() -> None:
    emulator = load_model(STORE.parent / "checkpoints" / "sodium-chloride-nuclear")
    windows = load_windows(STORE, "test", emulator.horizon)
    emulators = {"nuclear": emulator, "extrapolation": LinearExtrapolation(windows.horizon)}
    errors = {n: one_step_errors(e, windows, every=20)[:, 1].mean() for n, e in emulators.items()}
    assert errors["nuclear"] < 0.02 < 5 * errors["nuclear"] < errors["extrapolation"]
