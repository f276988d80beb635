"""Time correlations: sums by hand, travelling waves, a free gas, sum rules, and dynasor."""

from __future__ import annotations

from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr

from densitykit.analysis.modes import allowed_waves, density_modes, fluctuation, nuclear_modes
from densitykit.analysis.scattering import (
    decay_time,
    dynamic_structure,
    intermediate_scattering,
    spectral_moment,
    time_correlation,
)
from densitykit.errors import ShapeError
from densitykit.io.reader import open_trajectory

LITHIUM = Path(__file__).parents[2] / "data" / "lithium-800K.zarr" / "run-2"
EDGE = 6.0
CELL = EDGE * np.eye(3)
UNIT = 2 * np.pi / EDGE
STEP = 2.0  # fs


def over_time(values: np.ndarray, *dims: str) -> xr.DataArray:
    time = STEP * np.arange(len(values))
    return xr.DataArray(values, {"time": time}, ("time", *dims))


def at_lags(function, last: float, spacing: float) -> xr.DataArray:
    lag = np.arange(round(last / spacing) + 1) * spacing
    return xr.DataArray(function(lag), {"lag": lag}, ("lag",))


def travelling_wave(period: float, n_frames: int = 40, n: int = 8) -> xr.DataArray:
    """1 + 0.3 cos(2 pi (2 x/L - t/period)), frames 2 fs apart."""
    x, time = np.arange(n)[:, None, None] / n, STEP * np.arange(n_frames)
    phase = 2 * x - (time / period)[:, None, None, None]
    density = 1 + 0.3 * np.cos(2 * np.pi * phase)
    return over_time(np.broadcast_to(density, (n_frames, n, n, n)), *"xyz")


# --- correlation of any two series -----------------------------------------------------------


def test_correlation_is_the_mean_over_origins():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(17, 3)) + 1j * rng.normal(size=(17, 3)) for _ in range(2))
    c = time_correlation(over_time(a, "k"), over_time(b, "k"), max_lag=16)
    for lag in range(17):
        expected = (a[lag:] * b[: 17 - lag].conj()).mean(0)
        np.testing.assert_allclose(c[lag], expected, atol=1e-12)
    np.testing.assert_allclose(c["lag"], STEP * np.arange(17))
    assert time_correlation(over_time(a.real, "k")).dtype == float
    assert time_correlation(over_time(a, "k")).sizes == {"lag": 9, "k": 3}


def test_what_cannot_be_correlated():
    series = over_time(np.arange(5.0))
    for lag in (0, 5):
        with pytest.raises(ShapeError, match="give 0 < max_lag < 5"):
            time_correlation(series, max_lag=lag)
    with pytest.raises(ShapeError, match="equally spaced"):
        time_correlation(series.isel(time=[0, 1, 2, 4]))
    with pytest.raises(ShapeError, match="coordinate time"):
        time_correlation(series.drop_vars("time"))


def test_decay_time():
    tau = 37.0
    c = at_lags(lambda t: 5 * np.exp(-t / tau), 100.0, 0.5)
    assert float(decay_time(c)) == pytest.approx(tau, rel=1e-4)
    assert float(decay_time(c, 0.5)) == pytest.approx(tau * np.log(2), rel=1e-4)
    line = at_lags(lambda t: 1 - t / 10, 10.0, 2.0)
    both = xr.concat([line, 0 * line + 1], "k")
    np.testing.assert_allclose(decay_time(both, 0.3), [7.0, np.nan])


# --- F(q, t) ---------------------------------------------------------------------------------


def test_travelling_wave():
    """rho_q(t) = A exp(-i w t) at one pair of waves: F = S cos(w t); the shell has 6 waves."""
    period = 16.0
    waves = allowed_waves(CELL, 2.5 * UNIT, (8, 8, 8))
    f = intermediate_scattering(density_modes(travelling_wave(period), waves), max_lag=32)
    k = int(np.abs(f["q"].values - 2 * UNIT).argmin())
    s = (0.3 / 2) ** 2 * EDGE**3 * 2 / 6
    expected = s * np.cos(2 * np.pi * f["lag"] / period)
    np.testing.assert_allclose(f.isel(q=k), expected, atol=1e-10)
    assert np.abs(f.drop_isel(q=k)).max() < 1e-10
    spectrum = dynamic_structure(f.isel(q=k))
    peak = int(spectrum.values.argmax())
    assert float(spectrum["omega"][peak]) == pytest.approx(2 * np.pi / period, rel=1e-9)


def test_f_at_zero_is_s_and_the_cross_term_is_symmetric():
    rng = np.random.default_rng(0)
    positions = over_time(rng.uniform(0, EDGE, (20, 5, 3)), "atom", "cartesian")
    density = over_time(rng.uniform(0.5, 1, (20, 8, 8, 8)), *"xyz")
    waves = allowed_waves(CELL, 2.0, (8, 8, 8))
    n, rho = nuclear_modes(positions, waves), density_modes(density, waves)
    f = intermediate_scattering(n, rho, 5)
    shell = waves["shell"].values == 2
    norm = np.sqrt(5 * float(rho[:, 0].real.mean()))
    by_hand = (n[2:, shell].values * rho[:-2, shell].values.conj()).real.mean() / norm
    assert float(f[2, 1]) == pytest.approx(by_hand, rel=1e-12)
    np.testing.assert_allclose(f[0], intermediate_scattering(rho, n, 5)[0], rtol=1e-10)


def test_free_gas():
    """F(q, t) = exp(-q^2 kT t^2/2m): ballistic, S = 1; kT/m from a thermal speed of 0.02 A/fs."""
    rng, speed, n = np.random.default_rng(0), 0.02, 3000
    start, v = rng.uniform(0, EDGE, (n, 3)), rng.normal(0, speed, (n, 3))
    time = 5 * STEP * np.arange(60)[:, None, None]
    positions = over_time(start + v * time, "atom", "cartesian")
    positions["time"] = time[:, 0, 0]
    f = intermediate_scattering(nuclear_modes(positions, allowed_waves(CELL, 3.5)), max_lag=20)
    expected = np.exp(-((f["q"] * f["lag"] * speed) ** 2) / 2)
    wide = f["multiplicity"] >= 24  # enough waves for the mean
    assert float(np.abs(f - expected).where(wide).max()) < 0.25
    np.testing.assert_allclose((f - expected).where(wide).mean("q"), 0, atol=0.06)


def test_a_rigid_crystal_does_not_fluctuate():
    positions = over_time(np.zeros((10, 1, 3)) + [1, 2, 3], "atom", "cartesian")
    modes = nuclear_modes(positions, allowed_waves(CELL, 2.0))
    np.testing.assert_allclose(intermediate_scattering(modes), 1.0)
    np.testing.assert_allclose(intermediate_scattering(fluctuation(modes)), 0.0, atol=1e-12)


# --- S(q, w) and its sum rules ---------------------------------------------------------------


def test_spectrum_of_a_gaussian():
    """exp(-a^2 t^2/2) gives exp(-w^2/2a^2)/(a sqrt(2 pi)), with the moments 1, a^2, 3 a^4."""
    a = 0.05
    s = dynamic_structure(at_lags(lambda t: np.exp(-((a * t) ** 2) / 2), 300.0, 2.0), "boxcar")
    w = s["omega"].values
    np.testing.assert_allclose(s, np.exp(-((w / a) ** 2) / 2) / a / np.sqrt(2 * np.pi), atol=1e-12)
    for order, moment in ((0, 1), (2, a**2), (4, 3 * a**4)):
        assert float(spectral_moment(s, order)) == pytest.approx(moment, rel=1e-9)


def test_what_the_window_does_to_the_moments():
    """The zeroth stays; Hann's second derivative at 0, -pi^2/2T^2, adds to the second."""
    a, last = 0.05, 300.0
    c = at_lags(lambda t: 7 * np.exp(-((a * t) ** 2) / 2), last, 2.0)
    s = dynamic_structure(c)
    assert float(spectral_moment(s)) == pytest.approx(7, rel=1e-12)
    expected = 7 * (a**2 + np.pi**2 / (2 * last**2))
    assert float(spectral_moment(s, 2)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("window", ["boxcar", "hann", ("gaussian", 5.0)])
def test_zeroth_sum_rule_is_exact_for_any_correlation(window):
    noise = over_time(np.random.default_rng(0).normal(size=(50, 4)), "q")
    f = time_correlation(noise)
    np.testing.assert_allclose(spectral_moment(dynamic_structure(f, window)), f[0], rtol=1e-12)


def test_f_sum_rule_of_liquid_lithium():
    """The second moment of S(q, w) is q^2 <v^2>/3 of the very run, within sampling error."""
    ds = open_trajectory(LITHIUM)
    modes = nuclear_modes(ds["positions"].load(), allowed_waves(ds["cell"].values, 3.0))
    f = intermediate_scattering(modes, max_lag=60)
    bias = f[0] * np.pi**2 / (2 * float(f["lag"][-1]) ** 2)
    moment = spectral_moment(dynamic_structure(f), 2) - bias
    thermal = f["q"] ** 2 * float((ds["velocities"] ** 2).mean())
    ratio = moment / thermal
    assert (np.abs(ratio - 1) < 0.25).all()
    assert float(ratio.weighted(f["multiplicity"]).mean()) == pytest.approx(1, abs=0.05)


def test_intermediate_scattering_is_that_of_dynasor(tmp_path):
    """100 frames of liquid lithium, all waves up to 2.5/angstrom; dynasor divides by N, too."""
    dynasor = pytest.importorskip("dynasor")
    ase, ase_io = pytest.importorskip("ase"), pytest.importorskip("ase.io")
    ds = open_trajectory(LITHIUM).isel(time=slice(0, 100))
    cell, positions = ds["cell"].values, ds["positions"].load()
    frames = [ase.Atoms("Li32", x, cell=cell, pbc=True) for x in positions.values]
    ase_io.write(tmp_path / "li.xyz", frames, format="extxyz")
    waves = allowed_waves(cell, 2.5)
    vectors = np.stack([waves[f"q{x}"] for x in "xyz"], 1)[1:]
    film = dynasor.Trajectory(str(tmp_path / "li.xyz"), trajectory_format="extxyz")
    theirs = dynasor.compute_dynamic_structure_factors(film, vectors, dt=6.0, window_size=30)
    modes = nuclear_modes(positions, waves)
    ours = time_correlation(modes, max_lag=30)[:, 1:].real / 32
    total = next(getattr(theirs, name) for name in ("Fqt", "Fqt_coh") if hasattr(theirs, name))
    np.testing.assert_allclose(np.reshape(total, ours.T.shape).T, ours, atol=1e-4)


# --- dask ------------------------------------------------------------------------------------


def test_correlations_stay_lazy():
    density = travelling_wave(16.0, n_frames=16).chunk(time=1)
    waves = allowed_waves(CELL, 2.5, (8, 8, 8))

    def chain(rho: xr.DataArray) -> list[xr.DataArray]:
        f = intermediate_scattering(density_modes(rho, waves), max_lag=6)
        return [f, decay_time(f), dynamic_structure(f), spectral_moment(dynamic_structure(f), 2)]

    with dask.config.set(scheduler="synchronous"), np.errstate(invalid="ignore"):
        for lazy, eager in zip(chain(density), chain(density.compute()), strict=True):
            assert dask.is_dask_collection(lazy)
            xr.testing.assert_allclose(lazy.compute(), eager, atol=1e-12)
