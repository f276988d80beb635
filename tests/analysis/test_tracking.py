"""Tracks of model densities with known paths, and of the bundled liquid; temperatures of both."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import KELVINS, STEP, made_up_run
from test_nuclei import CUBE, FRACTIONS, LITHIUM, SHAPE, SKEW, holes

from densitykit.analysis.nuclei import NucleiFilter, match_nuclei
from densitykit.analysis.tracking import implied_temperature, kinetic_temperature, track_nuclei
from densitykit.errors import ShapeError
from densitykit.io.reader import open_trajectory
from densitykit.units import KELVIN, atomic_masses


def walk(n_frames: int) -> np.ndarray:
    """Fractions (time, 4, 3), unwrapped: a common drift through the border, and vibrations."""
    time = np.arange(n_frames)[:, None, None]
    pace = np.array([-0.03, 0.01, 0.015])
    return FRACTIONS + pace * time + 0.03 * np.sin(0.5 * time + np.arange(12.0).reshape(4, 3))


@pytest.mark.parametrize("cell", [CUBE, SKEW], ids=["cubic", "triclinic"])
def test_tracks_are_unwrapped(cell) -> None:
    fractions = walk(30)
    tracked = track_nuclei((holes(s, cell) for s in fractions), cell, 4, progress=False)
    assert tracked.seen.all() and (tracked.found == 4).all()
    order = match_nuclei(tracked.positions[0], fractions[0] @ cell, cell)[0]
    moved = tracked.positions[:, order] - tracked.positions[0, order]
    assert np.abs(moved - (fractions - fractions[0]) @ cell).max() < 0.1
    assert np.ptp(tracked.positions[:, order[0], 0]) > 3.5  # went through the face


def test_a_missed_nucleus_is_marked_and_found_again() -> None:
    fractions = walk(12)
    frames = [holes(s[1:] if 4 <= i < 7 else s) for i, s in enumerate(fractions)]
    frames[9] = np.full(SHAPE, np.nan)
    tracked = track_nuclei(frames, CUBE, 4, progress=False)
    assert tracked.found.tolist() == [4] * 4 + [3] * 3 + [4] * 2 + [0] + [4] * 2
    order = match_nuclei(tracked.positions[0], fractions[0] @ CUBE, CUBE)[0]
    moved = tracked.positions[:, order] - tracked.positions[0, order]
    assert np.abs(moved - (fractions - fractions[0]) @ CUBE).max() < 0.1
    assert np.isnan(tracked.measured[4:7, order[0]]).all()
    assert np.isfinite(tracked.measured[~np.isin(np.arange(12), (4, 5, 6, 9))]).all()


@pytest.mark.parametrize("hidden", [1, 2, 4])
def test_a_fast_nucleus_coasts_while_it_is_hidden(hidden) -> None:
    """It comes back out of reach of where it was, and of where it was headed for one frame."""
    fractions = np.repeat(FRACTIONS[None, [2, 0]], 10, axis=0)
    fractions[:, 0, 0] += 0.8 / 7.0 * np.arange(10)
    frames = [holes(s[1:] if 4 <= i < 4 + hidden else s) for i, s in enumerate(fractions)]
    tracked = track_nuclei(frames, CUBE, 2, reach=0.85, progress=False)
    assert tracked.found.tolist() == [2] * 4 + [1] * hidden + [2] * (6 - hidden)
    order = match_nuclei(tracked.positions[0], fractions[0] @ CUBE, CUBE)[0]
    moved = tracked.positions[:, order] - tracked.positions[0, order]
    assert np.abs(moved - (fractions - fractions[0]) @ CUBE).max() < 0.05


def test_two_that_pass_each_other_unseen_keep_their_names() -> None:
    """Nearest places would swap them: identity is what their velocities say."""
    along = 0.8 / 7.0 * np.arange(9)
    fractions = np.full((9, 2, 3), 0.5)
    fractions[:, 0, 0], fractions[:, 1, 0] = 0.05 + along, 0.05 + along[::-1]
    fractions[:, 1, 1] += 0.2
    frames = [holes(s) if abs(i - 4) > 1 else np.ones(SHAPE) for i, s in enumerate(fractions)]
    tracked = track_nuclei(frames, CUBE, 2, progress=False)
    assert tracked.found.tolist() == [2] * 3 + [0] * 3 + [2] * 3
    order = match_nuclei(tracked.positions[0], fractions[0] @ CUBE, CUBE)[0]
    moved = tracked.positions[:, order] - tracked.positions[0, order]
    assert np.abs(moved - (fractions - fractions[0]) @ CUBE).max() < 0.1


def test_before_the_first_and_after_the_last_sight_is_nan() -> None:
    fractions = walk(8)
    frames = [holes(s[1:] if i in (0, 7) else s) for i, s in enumerate(fractions)]
    tracked = track_nuclei(frames, CUBE, 4, progress=False)
    lost = ~np.isfinite(tracked.positions[..., 0])
    assert lost.sum() == 2 and lost[0].any() and lost[7].any()
    nothing = track_nuclei([np.ones(SHAPE)] * 3, CUBE, 4, progress=False)
    assert nothing.found.tolist() == [0, 0, 0] and np.isnan(nothing.positions).all()


def test_tracks_of_the_bundled_liquid() -> None:
    train, run = (open_trajectory(LITHIUM / f"run-{i}") for i in (1, 2))
    trained = NucleiFilter.fit(train.isel(time=slice(0, 400)), frames=12)
    run = run.isel(time=slice(0, 60)).load()
    cell = run.cell.values
    tracked = track_nuclei(run.density, cell, 32, trained, progress=False)
    assert tracked.seen.all()
    order = match_nuclei(tracked.positions[0], run.positions.values[0], cell)[0]
    moved = tracked.positions[:, order] - tracked.positions[0, order]
    assert np.abs(moved - (run.positions.values - run.positions.values[0])).max() < 0.02
    seen = np.gradient(tracked.positions[:, order], 6.0, axis=0)
    true = run.velocities.values
    assert np.sqrt(np.mean((seen - true)[1:-1] ** 2)) < 0.03 * true.std()
    implied = implied_temperature(tracked.measured, 6.94, 6.0)
    assert implied.temperature == pytest.approx(run.temperature.values.mean(), rel=0.02)
    assert implied.naive < implied.temperature


def test_temperature_of_oscillators_with_noise_and_gaps() -> None:
    """Mean square velocity of known vibrations; differencing hides some, noise adds some."""
    rng = np.random.default_rng(1)
    omega = rng.uniform(0.01, 0.06, (400, 3))  # 1/fs
    time = 6.0 * np.arange(400)[:, None, None]
    exact = 0.013 / omega * np.sin(omega * time + rng.uniform(0, 2 * np.pi, (400, 3)))
    kelvin = 7.0 * 1.2027236e6 * 0.013**2 / 2
    drift = np.array([0.01, 0.0, 0.0]) * time
    noisy = exact + drift + rng.normal(0, 0.02, exact.shape)
    noisy[rng.random(exact.shape[:2]) < 0.05] = np.nan
    clean = implied_temperature(exact, 7.0, 6.0)
    assert clean.temperature == pytest.approx(kelvin, rel=0.01)
    assert clean.noise < 0.002 and clean.naive < 0.99 * kelvin
    implied = implied_temperature(noisy, np.full(400, 7.0), 6.0)
    assert implied.temperature == pytest.approx(kelvin, rel=0.02)
    assert implied.noise == pytest.approx(0.02, rel=0.05)
    assert implied.naive - clean.naive == pytest.approx(implied.noise_bias, rel=0.1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: track_nuclei(np.ones((3, 8, 8)), CUBE, 4, progress=False), "shape"),
        (lambda: track_nuclei(np.ones((1, 8, 8, 8)), CUBE, 0, progress=False), "1 or more"),
        (lambda: implied_temperature(np.zeros((3, 4, 3)), 7.0, 6.0), "5 frames"),
        (lambda: implied_temperature(np.full((9, 4, 3), np.nan), 7.0, 6.0), "seen"),
    ],
)
def test_bad_input_is_told_what_to_do(call, words) -> None:
    with pytest.raises(ShapeError, match=words):
        call()


# --- other elements --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sodium", "nacl", "hexagonal"])
def test_temperature_by_the_masses_of_the_elements(name) -> None:
    """With that of lithium for all, sodium would be 3.3 times too cold."""
    run = made_up_run(name, 400)
    masses, n = atomic_masses(run.numbers), run.sizes["atom"]
    x, v = run.positions.values, run.velocities.values
    exact = kinetic_temperature(v, masses)
    energy = (masses[:, None] * v**2).sum() / len(v)
    drift = ((masses[:, None] * v).sum(axis=1) ** 2).sum() / masses.sum() / len(v)
    assert KELVINS * 3 * n * KELVIN == pytest.approx(energy, rel=0.03)  # equal for all modes
    assert exact.mean() == pytest.approx((energy - drift) / (3 * n - 3) / KELVIN, rel=1e-9)
    seen = implied_temperature(x, masses, STEP)
    assert seen.temperature == pytest.approx(exact.mean(), rel=0.01)
    lithium = implied_temperature(x, 6.94, STEP).temperature
    assert abs(lithium / seen.temperature - 1) > 0.1


def test_tracks_need_one_cell() -> None:
    cells = np.stack([CUBE, 1.01 * CUBE])
    with pytest.raises(ShapeError, match="tracking needs one cell"):
        track_nuclei([holes(FRACTIONS)] * 2, cells, 4, progress=False)


def test_several_species_take_the_positions_of_the_store() -> None:
    with pytest.raises(ShapeError, match="one species; take positions of the store"):
        NucleiFilter.fit(made_up_run("nacl", 8))
