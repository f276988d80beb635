"""Rollouts whose only fault is known, judged beside a run without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from analytic import HEXAGONAL, gaussians, moving_atoms, run_of

from densitykit.assess.rollouts import COLUMNS, _interval, assess_rollout
from densitykit.errors import ShapeError
from densitykit.fields import n_electrons
from densitykit.io.reader import open_split

LITHIUM = Path(__file__).resolve().parents[2] / "data" / "lithium-800K.zarr"
ELECTRONS, FOUND, SJSD = "electron count", "frames with all nuclei", "value-sJSD"
S_DENSITY, S_NUCLEI = "S(q) of the density", "S(q) of the nuclei"
DECAY, DIFFUSION, TEMPERATURE = "decay of F", "diffusion", "temperature"
ALL = {ELECTRONS, FOUND, SJSD, S_DENSITY, S_NUCLEI, DECAY, DIFFUSION, TEMPERATURE}


@pytest.fixture(scope="module")
def training() -> xr.Dataset:
    return open_split(LITHIUM, "train").isel(time=slice(None, None, 4)).load()


@pytest.fixture(scope="module")
def halves() -> tuple[xr.Dataset, xr.Dataset]:
    """The reference, 1.8 ps, and a perfect rollout, 1.2 ps, with the same number of electrons."""
    run = open_split(LITHIUM, "test").isel(time=slice(None, None, 2))[["density", "cell"]].load()
    count = n_electrons(run.density.values, run.cell.values)
    exact = run.density.astype(float) * (32 / count)[:, None, None, None]
    run = run.assign(density=exact)
    return run.isel(time=slice(0, 150)), run.isel(time=slice(150, 250))


def changed(run: xr.Dataset, density: np.ndarray) -> xr.Dataset:
    return run.assign(density=(run.density.dims, density))


def failed(table: pd.DataFrame) -> set[str]:
    """Names of the rows with a target that was missed."""
    missed = table.metric[[passed is False for passed in table.passed]]
    return {name for name in ALL for metric in missed if metric.startswith(name)}


def values(table: pd.DataFrame) -> pd.Series:
    """The values by the names above."""
    return pd.Series({n: table.value[table.metric.str.startswith(n)].item() for n in ALL})


@pytest.fixture(scope="module")
def straight(halves, training) -> pd.DataFrame:
    reference, rollout = halves
    return assess_rollout(rollout, reference, training)


def test_the_same_liquid_passes(straight) -> None:
    assert straight.columns.tolist() == COLUMNS
    assert failed(straight) <= {S_DENSITY, S_NUCLEI}  # 64 shells that warm and cool together
    assert (values(straight)[[S_DENSITY, S_NUCLEI]] > 0.75).all()
    assert values(straight)[TEMPERATURE] == pytest.approx(700, rel=0.1)
    assert 1.0 < values(straight)[DIFFUSION] < 2.5
    assert 100 < values(straight)[DECAY] < 200
    known = straight.dropna(subset=["low", "reference_low"])
    assert len(known) == 4
    assert ((known.low <= known.value) & (known.value <= known.high)).all()
    information = straight[straight.target == ""]
    assert len(information) == 2 and information.passed.isna().all()
    assert (information.value > 0).all()


def test_a_frozen_liquid_has_no_dynamics(halves, training) -> None:
    reference, rollout = halves
    frozen = changed(rollout, rollout.density.values[:1].repeat(rollout.sizes["time"], 0))
    table = assess_rollout(frozen, reference, training)
    assert failed(table) == ALL - {ELECTRONS, FOUND}
    assert np.isnan(values(table)[DECAY])
    assert values(table)[[DIFFUSION, TEMPERATURE]].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_shuffled_frames_have_statics_only(halves, training, straight) -> None:
    reference, rollout = halves
    order = np.random.default_rng(0).permutation(rollout.sizes["time"])
    table = assess_rollout(changed(rollout, rollout.density.values[order]), reference, training)
    nuclear = {FOUND, S_NUCLEI, DIFFUSION, TEMPERATURE}
    assert failed(table) - {S_DENSITY} == nuclear | {DECAY}
    same = [S_DENSITY, SJSD]
    assert values(table)[same].tolist() == pytest.approx(values(straight)[same].tolist())
    assert values(table)[list(nuclear - {FOUND})].isna().all()


def test_noise_spoils_the_statics_of_the_density(halves, training) -> None:
    reference, rollout = halves
    density = rollout.density.values
    noise = 0.2 * density.mean() * np.random.default_rng(0).normal(size=density.shape)
    noisy = density + noise - noise.mean(axis=(1, 2, 3), keepdims=True)
    table = assess_rollout(changed(rollout, noisy), reference, training)
    assert failed(table) >= {SJSD, S_DENSITY}
    assert not failed(table) & {ELECTRONS, DECAY, DIFFUSION, TEMPERATURE}


def test_a_wrong_electron_count_is_that_only(halves, training, straight) -> None:
    reference, rollout = halves
    table = assess_rollout(
        changed(rollout, rollout.density.values * (1 + 1e-4)), reference, training
    )
    assert failed(table) - failed(straight) == {ELECTRONS}
    assert values(table)[ELECTRONS] == pytest.approx(1e-4, rel=1e-3)


def test_no_nuclei_no_exception(halves, training) -> None:
    reference, rollout = halves
    flat = np.full_like(rollout.density, 32 / 9.12723**3)
    table = assess_rollout(changed(rollout, flat), reference, training)
    assert failed(table) >= ALL - {ELECTRONS, S_DENSITY}
    assert values(table)[[S_NUCLEI, DECAY, DIFFUSION, TEMPERATURE]].isna().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run.isel(time=slice(0, 10)), "20 or more"),
        (lambda run: run.isel(x=slice(0, 12)), "other cells or grids"),
        (lambda run: run.assign(cell=1.1 * run.cell), "other cells or grids"),
        (lambda run: run.assign_coords(time=run.time / 1.5), "thin out"),
        (lambda run: run.expand_dims("member"), "one member"),
    ],
)
def test_what_cannot_be_compared_is_said(halves, change, words) -> None:
    reference, rollout = halves
    with pytest.raises(ShapeError, match=words):
        assess_rollout(change(rollout), reference, reference)


def test_burn_in_may_leave_too_little(halves) -> None:
    reference, rollout = halves
    with pytest.raises(ShapeError, match="burn-in"):
        assess_rollout(rollout, reference, reference, burn_in=1100.0)


# --- any cell, any species -------------------------------------------------------------------


def row(table: pd.DataFrame, metric: str) -> pd.Series:
    return table[table.metric.str.startswith(metric)].squeeze()


def halved(run: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    n = run.sizes["time"] // 2
    return run.isel(time=slice(0, n)), run.isel(time=slice(n, None))


@pytest.mark.parametrize(
    ("numbers", "kelvin"),
    [([11] * 8, 303.0), ([3] * 8, 303.0), ([11, 17] * 4, 303.0), ([1, 9] * 4, 500.0)],
    ids=["sodium", "lithium", "NaCl", "HF"],
)
@pytest.mark.parametrize("cell", [np.diag([6.0, 7.0, 8.0]), 1.5 * HEXAGONAL])
def test_temperature_is_that_of_the_masses(numbers, kelvin, cell) -> None:
    """Sodium at 303 K is at 303 K, not at the 91 K that the mass of lithium makes of it."""
    rollout, reference = halved(moving_atoms(numbers, frames=60, cell=cell, kelvin=kelvin))
    found = row(assess_rollout(rollout, reference, reference), "temperature")
    assert found.value == pytest.approx(kelvin, rel=1e-3)
    assert found.reference == pytest.approx(kelvin, rel=1e-3)


def test_rows_of_each_species() -> None:
    rollout, reference = halved(moving_atoms([11, 17] * 4, frames=60, cell=HEXAGONAL))
    table = assess_rollout(rollout, reference, reference)
    assert len(set(table.metric)) == len(table)
    for symbol in ("Na", "Cl"):
        for metric in (
            f"S(q) of the {symbol} nuclei, shells inside",
            f"diffusion coefficient of {symbol}, 1e-4 cm2/s",
            f"vibrations of {symbol}, peak, 1/cm",
        ):
            assert metric in set(table.metric)
    alone = assess_rollout(*halved(moving_atoms([3] * 4, frames=60)), reference)
    names = set(alone.metric)
    assert "S(q) of the nuclei, shells inside" in names and not any(" Li" in n for n in names)


def random_walk(
    steps: dict[int, float], count: int = 6, frames: int = 500, seed: int = 0
) -> xr.Dataset:
    """Independent walks of some species, standard deviation of a step by atomic number.

    2 fs apart, in an orthorhombic cell; the density is that of Gaussians at the atoms.
    """
    cell, rng = np.diag([5.0, 6.0, 7.0]), np.random.default_rng(seed)
    numbers = np.repeat(list(steps), count)
    sigma = np.repeat(list(steps.values()), count)[:, None]
    walks = np.cumsum(sigma * rng.normal(size=(frames, len(numbers), 3)), axis=0)
    x = walks + rng.uniform(0, 5, (len(numbers), 3))
    density = np.stack([gaussians(y, cell, (7, 8, 9), np.ones(len(numbers))) for y in x])
    return run_of(np.maximum(density, 0), 2.0, cell, numbers=numbers, positions=x)


def test_each_species_diffuses_at_its_own_rate() -> None:
    """D = sigma^2 / (2 dt): 0.01 and 0.0025 angstrom^2/fs, in units of 1e-4 cm2/s."""
    rollout, reference = halved(random_walk({3: 0.2, 9: 0.1}, count=12, frames=1200))
    table = assess_rollout(rollout, reference, reference, longest_lag=40.0)
    for symbol, sigma in (("Li", 0.2), ("F", 0.1)):
        found = row(table, f"diffusion coefficient of {symbol},")
        expected = sigma**2 / (2 * 2.0) * 0.1 * 1e4
        assert found.value == pytest.approx(expected, rel=0.3)
        assert found.reference == pytest.approx(expected, rel=0.3)


def vibrating(omegas: dict[int, float], frames: int = 900, time_step: float = 2.0) -> xr.Dataset:
    """Atoms on springs, angular frequencies in rad/fs by atomic number, random phases."""
    cell, rng = HEXAGONAL * 1.5, np.random.default_rng(0)
    numbers = np.repeat(list(omegas), 4)
    omega = np.repeat(list(omegas.values()), 4)[:, None]
    phase = rng.uniform(0, 2 * np.pi, (len(numbers), 3))
    t = time_step * np.arange(frames)[:, None, None]
    x = rng.uniform(0, 1, (len(numbers), 3)) @ cell + 0.1 * np.cos(omega * t + phase)
    density = np.stack([gaussians(y, cell, (6, 6, 6), np.ones(len(numbers))) for y in x])
    return run_of(np.maximum(density, 0), time_step, cell, numbers=numbers, positions=x)


def test_each_species_vibrates_at_its_own_frequency() -> None:
    """1/cm = omega / (2 pi c)."""
    rollout, reference = halved(vibrating({1: 0.1, 17: 0.03}))
    table = assess_rollout(rollout, reference, reference)
    for symbol, omega in (("H", 0.1), ("Cl", 0.03)):
        expected = omega / (2 * np.pi * 2.99792458e-5)
        assert row(table, f"vibrations of {symbol},").value == pytest.approx(expected, rel=0.05)


def test_a_run_that_has_not_forgotten_itself_is_too_short_to_judge() -> None:
    """Dynamics has no verdict then, and the row says which run, how long, and what is needed."""
    rollout, reference = halved(moving_atoms([11, 17] * 4, frames=60, kelvin=10.0))
    table = assess_rollout(rollout, reference, reference)
    for metric in ("decay of F", "diffusion coefficient of Na", "temperature"):
        found = row(table, metric)
        assert np.isnan(found.passed)
        assert found.target.startswith("too short to judge: rollout of 60 fs and reference of 60")
        assert found.target.endswith("needed")
    assert row(table, "electron count").passed is True  # statics are judged


def test_a_long_run_is_judged() -> None:
    rollout, reference = halved(random_walk({3: 0.25, 9: 0.25}))
    table = assess_rollout(rollout, reference, reference, longest_lag=60.0)
    judged = table[table.target.str.startswith("within")]
    assert len(judged) == 4 and judged.passed.isin([True, False]).all()


@pytest.mark.parametrize("which", ["rollout", "both"])
def test_stores_without_positions(which: str) -> None:
    """Several species cannot be read from the density: what is of nuclei only is left out."""
    rollout, reference = halved(moving_atoms([11, 17] * 4, frames=60))
    rollout = rollout.drop_vars(["positions", "velocities"])
    if which == "both":
        reference = reference.drop_vars(["positions", "velocities", "numbers"])
    table = assess_rollout(rollout, reference, reference)
    names = table.metric.tolist()
    assert not any("nuclei" in n or "diffusion" in n or "temperature" in n for n in names)
    assert [n.split(",")[0] for n in names] == [
        "electron count",
        "value-sJSD over its noise level",
        "S(q) of the density",
        "decay of F(q",
        "nearest training frame",
    ]
    assert row(table, "electron count").passed is True


# --- planted faults --------------------------------------------------------------------------


def gas(frames: int = 60, seed: int = 0) -> np.ndarray:
    """Log-normal noise with the same number of electrons in each frame."""
    rho = np.exp(np.random.default_rng(seed).normal(-3, 0.3, (frames, 6, 6, 6)))
    return rho * (0.05 / rho.mean((1, 2, 3), keepdims=True))


def judged(density: np.ndarray, reference: np.ndarray | None = None) -> pd.DataFrame:
    runs = [run_of(x).astype(float) for x in (density, gas() if reference is None else reference)]
    runs[0]["density"] = (runs[0].density.dims, density)  # in double precision
    return assess_rollout(runs[0], runs[1], runs[1])


def test_the_reference_agrees_with_itself() -> None:
    table = judged(gas())
    assert row(table, "value-sJSD").value == pytest.approx(0, abs=1e-6)
    assert row(table, "value-sJSD").reference == 1
    assert row(table, "electron count").value < 1e-12
    assert row(table, "S(q) of the density").value == 1
    assert row(table, "nearest training frame").value == pytest.approx(0, abs=1e-6)
    assert not failed(table)


def test_planted_faults_are_measured() -> None:
    reference, mean = gas(), 0.05
    drifting = reference * (1 + 1e-3 * np.arange(60) / 59)[:, None, None, None]
    found = row(judged(drifting), "electron count")
    assert found.value == pytest.approx(1e-3, rel=1e-5) and found.passed is False
    calm = mean * (reference / mean) ** 0.5
    found = row(judged(calm), "value-sJSD")
    assert found.value > 10 and found.passed is False
    wild = mean + 2 * (reference - mean)  # S(q) is four times as large
    found = row(judged(wild), "S(q) of the density")
    assert found.value < 0.3 and found.passed is False


def test_negative_densities_do_not_break_the_table() -> None:
    below = gas()
    below[3, 0, 0, 0] = -1e-3
    table = judged(below)
    statics = table[~table.metric.str.startswith("decay")]
    assert np.isfinite(statics.value).all()


def test_burn_in_leaves_the_start_out() -> None:
    spoilt = gas()
    spoilt[:20] *= 1.01
    runs = [run_of(x) for x in (spoilt, gas())]
    held = [assess_rollout(runs[0], runs[1], runs[1], burn_in=b) for b in (0.0, 40.0)]
    counts = [row(table, "electron count").passed for table in held]
    assert counts == [False, True]


@pytest.mark.parametrize("length", [60, 1000])
def test_another_run_lies_in_the_interval_as_often_as_it_says(length) -> None:
    """Correlated noise: two runs of one process, the reference of ten blocks."""
    rng = np.random.default_rng(1)
    noise = np.exp(0.2 * rng.normal(size=(length + 300 + 50, 300)))
    x = noise.copy()
    for i in range(1, len(x)):
        x[i] = 0.8 * x[i - 1] + 0.2 * noise[i]  # forgets in 5 frames
    theirs, ours = x[50:350], x[350:].mean(axis=0)
    _, low, high = _interval(theirs, 30, length * 300 / (length + 300))
    assert 0.9 < np.mean((low <= ours) & (ours <= high)) < 0.99
