"""Gases, crystals, oscillators, Langevin particles in closed form; freud on liquid lithium."""

from __future__ import annotations

from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
from made_up import made_up_run

from densitykit.analysis.transport import (
    diffusion_coefficient,
    green_kubo,
    mean_square_displacement,
    pair_distribution,
    partial_pair_distribution,
    unwrap,
    velocities_from_positions,
    velocity_autocorrelation,
    vibrational_density_of_states,
    without_drift,
    yeh_hummer,
)
from densitykit.errors import ShapeError, TrajectoryError
from densitykit.io.reader import open_trajectory
from densitykit.statistics import block_bootstrap, over_segments
from densitykit.units import CM2_PER_S

LITHIUM = Path(__file__).parents[2] / "data" / "lithium-800K.zarr" / "run-2"
EDGE = 6.0
CELL = EDGE * np.eye(3)
SHEARED = np.array([[3.0, 0.0, 0.0], [2.8, 3.1, 0.0], [-1.0, 1.4, 3.3]])
TRICLINIC = np.array([[5.0, 0.0, 0.0], [1.3, 6.0, 0.0], [0.4, 0.7, 7.0]])
STEP = 2.0  # fs


def paths(values: np.ndarray, step: float = STEP) -> xr.DataArray:
    time = step * np.arange(len(values))
    return xr.DataArray(values, {"time": time}, ("time", "atom", "cartesian"))


def random_walk(n_frames: int, n_atoms: int, d: float, seed: int = 0) -> xr.DataArray:
    """Brownian motion: steps of variance 2 D dt along each axis."""
    steps = np.random.default_rng(seed).normal(0, np.sqrt(2 * d * STEP), (n_frames, n_atoms, 3))
    return paths(np.cumsum(steps, axis=0))


def langevin(n_frames: int, n_atoms: int, gamma: float, speed: float) -> xr.DataArray:
    """Velocities of an Ornstein-Uhlenbeck process: <v v(t)> = speed^2 exp(-gamma t) an axis."""
    rng, c = np.random.default_rng(0), np.exp(-gamma * STEP)
    v = np.empty((n_frames, n_atoms, 3))
    v[0] = rng.normal(0, speed, v[0].shape)
    for t in range(1, n_frames):
        v[t] = c * v[t - 1] + rng.normal(0, speed * np.sqrt(1 - c**2), v[0].shape)
    return paths(v)


# --- paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [CELL, TRICLINIC], ids=["cubic", "triclinic"])
def test_unwrap_undoes_wrapping(cell):
    true = random_walk(200, 4, 0.02)
    wrapped = true.copy(data=(true.values @ np.linalg.inv(cell) % 1) @ cell)
    assert np.abs(wrapped - true).max() > 3
    again = unwrap(wrapped, cell)
    np.testing.assert_allclose(again - again[0], true - true[0], atol=1e-10)
    np.testing.assert_allclose(again[0], wrapped[0])
    assert again.dims == true.dims and (again["time"] == true["time"]).all()


def test_without_drift():
    v = np.random.default_rng(0).normal(size=(5, 3, 3))
    masses = np.array([1.0, 2.0, 16.0])
    assert np.abs(without_drift(paths(v)).mean("atom")).max() < 1e-14
    rest = without_drift(paths(v), masses)
    assert np.abs((rest.values * masses[:, None]).sum(1)).max() < 1e-13
    np.testing.assert_allclose(rest[:, 0] - rest[:, 1], v[:, 0] - v[:, 1])


def test_central_differences_damp_by_a_sinc():
    w, t = 0.1, STEP * np.arange(100)
    positions = paths(np.sin(w * t)[:, None, None] * np.ones((1, 2, 3)))
    v = velocities_from_positions(positions)
    expected = w * np.cos(w * v["time"]) * np.sin(w * STEP) / (w * STEP)
    np.testing.assert_allclose(v[:, 0, 0], expected, atol=1e-12)
    assert v.sizes["time"] == 98


# --- g(r) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [CELL, TRICLINIC], ids=["cubic", "triclinic"])
def test_ideal_gas(cell):
    n = 20
    fractions = np.random.default_rng(0).uniform(-1, 2, (1500, n, 3))
    g = pair_distribution(paths(fractions @ cell), cell, bins=10)
    mean, error = g.mean("time"), g.std("time") / np.sqrt(g.sizes["time"])
    assert (np.abs(mean - (1 - 1 / n)) < 4 * error).all()
    assert float(error[3:].max()) < 0.02
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    assert float(g["r"][-1]) == pytest.approx(heights.min() / 2 * 0.95)


def test_neighbours_in_a_simple_cubic_crystal():
    """rho int g 4 pi r^2 dr counts 6, 12 and 8 neighbours at a, a sqrt 2 and a sqrt 3."""
    a = EDGE / 4
    corners = np.stack(np.meshgrid(*[np.arange(4.0)] * 3), -1).reshape(1, -1, 3) * a
    g = pair_distribution(paths(corners), CELL, r_max=1.9 * a, bins=19)[0]
    edges = np.linspace(0, 1.9 * a, 20)
    counts = g * 64 / EDGE**3 * 4 / 3 * np.pi * np.diff(edges**3)
    expected = np.zeros(19)
    expected[[np.searchsorted(edges, a * np.sqrt(k)) - 1 for k in (2, 3)]] = 12, 8
    np.testing.assert_allclose(counts[12:], expected[12:], atol=1e-9)
    assert float(counts[8:12].sum()) == pytest.approx(6)
    assert float(counts[:8].sum()) == 0


def test_partial_pair_distribution():
    """One A and one B at a known distance across the boundary: one pair in one bin."""
    a, b = paths(np.array([[[0.2, 0, 0]]])), paths(np.array([[[EDGE - 0.85, 0, 0]]]))
    g = pair_distribution(a, CELL, bins=30, other=b)[0]
    k = int(g.values.argmax())
    assert float(g["r"][k]) == pytest.approx(1.05) and (np.delete(g.values, k) == 0).all()
    assert float(g[k]) == pytest.approx(EDGE**3 / (4 / 3 * np.pi * (1.1**3 - 1.0**3)))


def test_all_images_count():
    """Beyond half of the cell: that of a supercell, but for the copies that are one atom here."""
    fractions = np.random.default_rng(2).random((1, 5, 3))
    copies = np.stack(np.meshgrid(*[np.arange(2.0)] * 3), -1).reshape(-1, 3)
    tiled = (fractions[:, :, None] + copies).reshape(1, -1, 3)
    one = pair_distribution(paths(fractions @ SHEARED), SHEARED, r_max=4.03, bins=40)
    many = pair_distribution(paths(tiled @ SHEARED), 2 * SHEARED, r_max=4.03, bins=40)
    np.testing.assert_allclose(one, many, rtol=1e-9, atol=1e-9)
    assert float(one.max()) > 1


def test_strongly_skewed_cells_are_the_lattice_they_span():
    """The same crystal in other lattice vectors."""
    skewed = np.array([[1.0, 0, 0], [3, 1, 0], [-2, 5, 1]]) @ TRICLINIC
    x = paths(np.random.default_rng(0).uniform(0, 1, (5, 8, 3)) @ TRICLINIC)
    g = pair_distribution(x, TRICLINIC, r_max=2.5, bins=20)
    np.testing.assert_allclose(pair_distribution(x, skewed, r_max=2.5, bins=20), g, atol=1e-9)


def test_a_cell_for_each_frame():
    """A crystal that breathes: in units of its edge all frames are the same."""
    scale = np.array([1.0, 1.02, 0.97])[:, None, None]
    x = paths(scale * (np.random.default_rng(1).random((1, 6, 3)) @ TRICLINIC))
    g = pair_distribution(x, scale * TRICLINIC, r_max=2.4, bins=6)
    for k in range(3):
        alone = pair_distribution(x[k : k + 1], scale[k] * TRICLINIC, r_max=2.4, bins=6)
        np.testing.assert_allclose(g[k], alone[0])
    assert np.abs(g[1] - g[0]).max() > 0
    for bad in ({"cell": (scale * TRICLINIC)[:2]}, {"cell": TRICLINIC, "r_max": 0.0}):
        with pytest.raises(ShapeError, match="one cell or as many as frames"):
            pair_distribution(x, **bad)
    with pytest.raises(ShapeError, match="unwrap needs one cell"):
        unwrap(x, scale * TRICLINIC)


def test_partial_distributions_of_rock_salt():
    """Unlike ions are nearest; like ions come at the diagonal; the mean of all is g(r)."""
    run = made_up_run("nacl", 8)
    partial = partial_pair_distribution(run, bins=14)
    assert partial["pair"].values.tolist() == ["Na-Na", "Na-Cl", "Cl-Cl"]
    mean = partial.mean("time")
    assert float(mean.sel(pair="Na-Cl").max()) > 2
    assert float(mean.sel(pair=["Na-Na", "Cl-Cl"], r=slice(0, 2.4)).max()) == 0
    g = pair_distribution(run["positions"], run["cell"].values, bins=14).mean("time")
    weights = xr.DataArray([1, 2, 1], dims="pair") / 4
    np.testing.assert_allclose((mean * weights).sum("pair"), g, atol=1e-9)
    with pytest.raises(TrajectoryError, match=r"nacl\.zarr: variable 'numbers' is missing"):
        lost = run.drop_vars("numbers")
        lost.encoding["source"] = "nacl.zarr"
        partial_pair_distribution(lost)


def test_pair_distribution_is_that_of_freud():
    freud = pytest.importorskip("freud")
    ds = open_trajectory(LITHIUM).isel(time=slice(0, 100, 5))
    cell = ds["cell"].values
    ours = pair_distribution(ds["positions"], cell, r_max=4.5, bins=45)
    box = freud.box.Box.from_matrix(cell.T)
    theirs = freud.density.RDF(bins=45, r_max=4.5)
    for frame in ds["positions"].values:
        theirs.compute((box, box.wrap(frame)), reset=False)
    np.testing.assert_allclose(theirs.bin_centers, ours["r"], rtol=1e-6)
    # single precision puts a pair now and then into the next bin
    np.testing.assert_allclose(theirs.rdf, ours.mean("time"), atol=0.01)
    assert float(ours.mean("time").max()) > 1.5


# --- mean square displacement and diffusion --------------------------------------------------


def test_free_flight():
    v = np.random.default_rng(0).normal(size=(4, 3))
    positions = paths(100 + STEP * np.arange(50)[:, None, None] * v)
    msd = mean_square_displacement(positions)
    expected = (msd["lag"].values[:, None] ** 2) * (v**2).sum(1)
    np.testing.assert_allclose(msd, expected, atol=1e-8)
    assert msd.dims == ("lag", "atom")


def test_displacement_is_the_mean_over_origins():
    x = np.cumsum(np.random.default_rng(0).normal(size=(23, 3, 3)), axis=0)
    msd = mean_square_displacement(paths(x), max_lag=22)
    for k in range(23):
        expected = ((x[k:] - x[: 23 - k]) ** 2).sum(-1).mean(0)
        np.testing.assert_allclose(msd[k], expected, atol=1e-10)


def test_displacement_is_that_of_freud():
    freud = pytest.importorskip("freud")
    positions = open_trajectory(LITHIUM)["positions"].isel(time=slice(0, 120))
    theirs = freud.msd.MSD(mode="window").compute(positions.values)
    ours = mean_square_displacement(positions, max_lag=119).mean("atom")
    np.testing.assert_allclose(
        ours, theirs.msd, rtol=1e-4, atol=5e-5
    )  # theirs is single precision
    assert float(ours[60]) > 1


def test_diffusion_of_brownian_motion():
    """D within its own interval over segments, and in cm^2/s."""
    d = 0.003

    def fit(part: xr.DataArray) -> xr.DataArray:
        msd = mean_square_displacement(part, max_lag=20).mean("atom")
        return diffusion_coefficient(msd, 2 * STEP, 20 * STEP)

    walk = random_walk(4000, 10, d)
    _, low, high = block_bootstrap(over_segments(fit, walk, 8).values, 1)
    assert low < float(fit(walk)) < high
    assert float(fit(walk)) == pytest.approx(d, rel=0.05) and 0 < high - low < 0.1 * d
    si = 0.003 * (1e-8) ** 2 / 1e-15  # angstrom in cm, fs in s
    assert d * CM2_PER_S == pytest.approx(si)


def test_fit_window():
    lag = np.arange(50) * STEP
    msd = xr.DataArray(6 * 0.01 * lag + 3.0 + (lag < 20), {"lag": lag}, ("lag",))
    assert float(diffusion_coefficient(msd, 20, 80)) == pytest.approx(0.01)
    assert float(diffusion_coefficient(msd, 20, 80, dimensions=1)) == pytest.approx(0.03)
    with pytest.raises(ShapeError, match="choose a window"):
        diffusion_coefficient(msd, 200, 300)


def test_yeh_hummer_correction():
    """Water, by hand: 298 K, 0.85 mPa s, 18.6 angstrom: 3.92e-10 m^2/s; it goes as T/(eta L)."""
    assert yeh_hummer(298.0, 0.85e-3, 18.6) * CM2_PER_S == pytest.approx(3.917e-6, rel=1e-3)
    ratio = yeh_hummer(400.0, 2e-3, 30.0) / yeh_hummer(200.0, 1e-3, 10.0)
    assert ratio == pytest.approx(2 / 2 / 3)


# --- velocities ------------------------------------------------------------------------------


def test_langevin_particles():
    """C(t) = 3 s^2 exp(-gamma t), its integral D = s^2/gamma (1/tanh, since time is discrete)."""
    gamma, speed = 0.05, 0.02
    vacf = velocity_autocorrelation(langevin(8000, 20, gamma, speed), 100).mean("atom")
    exact = 3 * speed**2 * np.exp(-gamma * vacf["lag"])
    np.testing.assert_allclose(vacf, exact, atol=0.05 * float(exact[0]))
    trapezium = speed**2 * STEP / 2 / np.tanh(gamma * STEP / 2)
    assert float(green_kubo(vacf)[-1]) == pytest.approx(trapezium, rel=0.05)
    assert float(green_kubo(vacf)[0]) == 0


def test_oscillators():
    """C = a^2 w^2/2 cos wt; two species, two lines, equal areas once weighted by mass."""
    t, w = STEP * np.arange(4000), np.array([0.05, 0.15])
    masses = np.array([16.0, 1.0])
    amplitude = 1 / np.sqrt(masses) / w  # equal kinetic energies
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, (2, 3))
    v = (amplitude * w)[:, None] * np.cos(w[:, None] * t[:, None, None] + phases)
    vacf = velocity_autocorrelation(paths(v), 500)
    ratio = vacf / vacf[0]
    np.testing.assert_allclose(ratio, np.cos(w * ratio["lag"].values[:, None]), atol=0.02)
    dos = vibrational_density_of_states(vacf, masses)
    assert float(dos.integrate("omega")) == pytest.approx(1, rel=1e-9)
    low, high = dos.sel(omega=slice(0, 0.1)), dos.sel(omega=slice(0.1, None))
    for part, line in ((low, w[0]), (high, w[1])):
        assert float(part["omega"][int(part.values.argmax())]) == pytest.approx(line, abs=0.002)
        assert float(part.integrate("omega")) == pytest.approx(0.5, abs=0.01)
    light = vibrational_density_of_states(vacf)
    assert float(light.sel(omega=slice(0.1, None)).integrate("omega")) > 0.9


def test_wavenumbers():
    """One wave in 10 fs is 3335.64 1/cm."""
    t = STEP * np.arange(1000)
    v = paths(np.cos(2 * np.pi * t / 10)[:, None, None] * np.ones((1, 1, 3)))
    dos = vibrational_density_of_states(velocity_autocorrelation(v, 500))
    peak = dos["wavenumber"][int(dos.values.argmax())]
    assert float(peak) == pytest.approx(3335.64, rel=1e-5)


def test_diffusion_is_the_density_of_states_at_zero():
    """Einstein, Green-Kubo and (pi/2) g(0) C(0)/3 agree for liquid lithium within 15 %."""
    ds = open_trajectory(LITHIUM)
    msd = mean_square_displacement(without_drift(ds["positions"].load()), 100).mean("atom")
    vacf = velocity_autocorrelation(ds["velocities"].load(), 100)
    einstein = float(diffusion_coefficient(msd, 200, 600))
    integral = float(green_kubo(vacf.mean("atom"))[-1])
    dos = vibrational_density_of_states(vacf, window="boxcar")
    assert integral == pytest.approx(np.pi / 6 * float(dos[0] * vacf[0].mean()), rel=1e-9)
    assert einstein == pytest.approx(integral, rel=0.15)
    assert 1e-4 < einstein * CM2_PER_S < 3e-4


# --- dask ------------------------------------------------------------------------------------


def test_everything_is_lazy_and_the_same_in_chunks():
    walk = random_walk(60, 4, 0.01)

    def chain(x: xr.DataArray) -> list[xr.DataArray]:
        vacf = velocity_autocorrelation(velocities_from_positions(x), 20)
        msd = mean_square_displacement(unwrap(without_drift(x), CELL), 20)
        out = [pair_distribution(x, CELL), msd, diffusion_coefficient(msd, 4, 40)]
        return [*out, vacf, green_kubo(vacf), vibrational_density_of_states(vacf)]

    with dask.config.set(scheduler="synchronous"):
        for lazy, eager in zip(chain(walk.chunk(time=7)), chain(walk), strict=True):
            assert dask.is_dask_collection(lazy)
            xr.testing.assert_allclose(lazy.compute(), eager, atol=1e-10)
