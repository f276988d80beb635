"""The verdict on trajectories whose only fault is known, beside a run without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from densitykit.assess.rollouts import COLUMNS, _interval, verdict
from densitykit.errors import ShapeError
from densitykit.fields import n_electrons
from densitykit.io.reader import open_split

LITHIUM = Path(__file__).resolve().parents[1] / "data" / "lithium-800K.zarr"
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
    return verdict(rollout, reference, training)


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
    table = verdict(frozen, reference, training)
    assert failed(table) == ALL - {ELECTRONS, FOUND}
    assert np.isnan(values(table)[DECAY])
    assert values(table)[[DIFFUSION, TEMPERATURE]].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_shuffled_frames_have_statics_only(halves, training, straight) -> None:
    reference, rollout = halves
    order = np.random.default_rng(0).permutation(rollout.sizes["time"])
    table = verdict(changed(rollout, rollout.density.values[order]), reference, training)
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
    table = verdict(changed(rollout, noisy), reference, training)
    assert failed(table) >= {SJSD, S_DENSITY}
    assert not failed(table) & {ELECTRONS, DECAY, DIFFUSION, TEMPERATURE}


def test_a_wrong_electron_count_is_that_only(halves, training, straight) -> None:
    reference, rollout = halves
    table = verdict(changed(rollout, rollout.density.values * (1 + 1e-4)), reference, training)
    assert failed(table) - failed(straight) == {ELECTRONS}
    assert values(table)[ELECTRONS] == pytest.approx(1e-4, rel=1e-3)


def test_no_nuclei_no_exception(halves, training) -> None:
    reference, rollout = halves
    flat = np.full_like(rollout.density, 32 / 9.12723**3)
    table = verdict(changed(rollout, flat), reference, training)
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
        verdict(change(rollout), reference, reference)


def test_burn_in_may_leave_too_little(halves) -> None:
    reference, rollout = halves
    with pytest.raises(ShapeError, match="burn-in"):
        verdict(rollout, reference, reference, burn_in=1100.0)


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
