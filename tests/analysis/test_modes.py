"""Structure factors of waves, gases, crystals and Gaussian atoms; error bars of known noise."""

from __future__ import annotations

import weakref
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from made_up import CHARGES, WIDTHS, made_up_run

from densitykit.analysis.modes import (
    allowed_waves,
    density_modes,
    fluctuation,
    nuclear_modes,
    partial_structure,
    peak_wave_number,
    static_structure,
    structure_factor,
)
from densitykit.errors import ShapeError
from densitykit.io.reader import open_trajectory

LITHIUM = Path(__file__).parents[2] / "data" / "lithium-800K.zarr" / "run-2"

EDGE = 6.0
CELL = EDGE * np.eye(3)
UNIT = 2 * np.pi / EDGE
RHO_0 = 0.05
TRICLINIC = np.array([[5.0, 0.0, 0.0], [1.3, 6.0, 0.0], [0.4, 0.7, 7.0]])
FIELD = ("time", "x", "y", "z")


def wave(index: tuple[int, int, int], amplitude: float, n: int = 12) -> np.ndarray:
    """rho_0 + a cos(2 pi index . s), one frame."""
    axes = np.meshgrid(*[np.arange(n) / n] * 3, indexing="ij")
    phase = 2 * np.pi * sum(i * axis for i, axis in zip(index, axes, strict=True))
    return (RHO_0 + amplitude * np.cos(phase))[None]


# --- structure factor ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "multiplicity"), [((1, 0, 0), 6), ((1, 1, 0), 12), ((1, -1, 1), 8), ((2, 1, 0), 24)]
)
def test_a_plane_wave_is_alone_on_its_shell(index, multiplicity):
    """|rho_q| = a V/2 at +-q: S = 2 (a V/2)^2 / (m rho_0 V) = a^2 V / (2 m rho_0)."""
    a = 0.01
    q, m, s = structure_factor(wave(index, a), CELL)
    k = np.argmin(np.abs(q - UNIT * np.linalg.norm(index)))
    assert q[k] == pytest.approx(UNIT * np.linalg.norm(index), abs=1e-6)
    assert m[k] == multiplicity
    assert s[0, k] == pytest.approx(a**2 * EDGE**3 / (2 * multiplicity * RHO_0), rel=1e-9)
    assert np.abs(np.delete(s[0], k)).max() < 1e-20


def test_shells_of_a_cubic_cell():
    q, m, _ = structure_factor(wave((1, 0, 0), 0.01), CELL, q_max=3.01 * UNIT)
    np.testing.assert_allclose(q, UNIT * np.sqrt([1, 2, 3, 4, 5, 6, 8, 9]), atol=1e-6)
    np.testing.assert_array_equal(m, [6, 12, 8, 6, 24, 24, 12, 30])
    assert (np.diff(q) > 0).all()


def test_sum_over_all_shells_is_the_variance():
    """Parseval: sum_q |rho_q|^2 = V^2 var(rho), if nothing lies at or beyond Nyquist."""
    rng = np.random.default_rng(0)
    n, keep = 8, 3
    density = np.empty((4, n, n, n))
    for frame in density:
        spectrum = np.fft.fftn(rng.normal(size=(n, n, n)))
        index = np.abs(np.fft.fftfreq(n, 1 / n)) <= keep
        spectrum *= index[:, None, None] & index[:, None] & index
        frame[:] = 1 + 0.1 * np.fft.ifftn(spectrum).real
    _, m, s = structure_factor(density, CELL, q_max=100.0)
    assert m.sum() == (2 * keep + 1) ** 3 - 1
    electrons, variance = density.mean((1, 2, 3)) * EDGE**3, density.var((1, 2, 3))
    np.testing.assert_allclose((s * m).sum(1), EDGE**6 * variance / electrons, rtol=1e-10)


def test_nyquist_waves_are_left_out():
    _, m, s = structure_factor(wave((4, 0, 0), 0.01, n=8), CELL, q_max=100.0)
    assert np.abs(s).max() < 1e-20 and m.sum() == 7**3 - 1


def test_shifts_change_nothing():
    density = np.random.default_rng(0).uniform(0.5, 1, (3, 6, 6, 6))
    s = structure_factor(density, CELL)[2]
    moved = structure_factor(np.roll(density, (1, 3, 2), (1, 2, 3)), CELL)[2]
    np.testing.assert_allclose(moved, s, rtol=1e-9)


def test_s_scales_like_the_square_over_the_number():
    density = np.random.default_rng(0).uniform(0.5, 1, (2, 6, 6, 6))
    s = structure_factor(density, CELL)[2]
    np.testing.assert_allclose(structure_factor(3 * density, CELL)[2], 3 * s, rtol=1e-12)


def test_a_cell_that_is_not_cubic():
    """A monoclinic cell: the shell is the |q| of the reciprocal vector, all others are apart."""
    cell = TRICLINIC
    a, index = 0.01, (1, -1, 2)
    q, m, s = structure_factor(wave(index, a), cell)
    length = np.linalg.norm(2 * np.pi * np.linalg.inv(cell) @ index)
    k = np.argmin(np.abs(q - length))
    assert q[k] == pytest.approx(length, abs=1e-6) and m[k] == 2
    volume = np.linalg.det(cell)
    assert s[0, k] == pytest.approx(a**2 * volume / (4 * RHO_0), rel=1e-9)
    assert np.abs(np.delete(s[0], k)).max() < 1e-20


def test_no_wave_vector_says_raise_q_max():
    with pytest.raises(ShapeError, match="raise q_max"):
        structure_factor(wave((1, 0, 0), 0.01), CELL, q_max=0.5 * UNIT)


# --- waves and modes -------------------------------------------------------------------------


def atoms(positions: np.ndarray) -> xr.DataArray:
    """Positions (time, atom, cartesian) with labels."""
    return xr.DataArray(positions, dims=("time", "atom", "cartesian"))


def gaussian_atoms(positions: np.ndarray, cell: np.ndarray, n: int, sigma: float) -> xr.DataArray:
    """One electron an atom, a Gaussian about it, built in real space image by image."""
    axes = np.meshgrid(*[np.arange(n) / n] * 3, indexing="ij")
    points = np.stack(axes, -1)[..., None, :]
    density = np.zeros((len(positions), n, n, n))
    for frame, where in zip(density, positions @ np.linalg.inv(cell), strict=True):
        for image in np.ndindex(5, 5, 5):
            step = (points - where + np.array(image) - 2) @ cell
            frame += np.exp(-(step**2).sum(-1) / (2 * sigma**2)).sum(-1)
    return xr.DataArray(density / (2 * np.pi * sigma**2) ** 1.5, dims=FIELD)


@pytest.mark.parametrize("cell", [CELL, TRICLINIC], ids=["cubic", "triclinic"])
def test_waves_are_half_of_all_that_fit(cell):
    q_max = 4.0
    waves = allowed_waves(cell, q_max)
    index, vector = waves["index"].values, np.stack([waves[f"q{x}"] for x in "xyz"], 1)
    np.testing.assert_allclose(vector @ cell.T, 2 * np.pi * index, atol=1e-9)
    every = np.stack(np.meshgrid(*[np.arange(-9, 10)] * 3), -1).reshape(-1, 3)
    length = np.linalg.norm(2 * np.pi * every @ np.linalg.inv(cell).T, axis=1)
    both = {tuple(h) for h in index} | {tuple(-h) for h in index}
    assert both == {tuple(h) for h in every[length <= q_max]}
    assert len(both) == 2 * len(index) - 1 and not index[0].any()
    assert (np.diff(waves["q"]) >= 0).all() and waves["shell"][0] == 0 < waves["shell"][1]


@pytest.mark.parametrize("cell", [CELL, TRICLINIC], ids=["cubic", "triclinic"])
def test_modes_of_nuclei_are_the_sum_of_phases(cell):
    positions = np.random.default_rng(0).uniform(-20, 20, (3, 5, 3))
    waves = allowed_waves(cell, 3.5)
    modes = nuclear_modes(atoms(positions), waves)
    vectors = np.stack([modes[f"q{x}"] for x in "xyz"])
    np.testing.assert_allclose(modes, np.exp(-1j * positions @ vectors).sum(1), atol=1e-10)
    np.testing.assert_allclose(modes[:, 0], 5)


def test_modes_in_one_dimension():
    """rho = 2 + cos(2 pi (2 s - t)): rho_q = L/2 exp(-2 pi i t) at the second wave; L = 3."""
    s, time = np.arange(10) / 10, np.arange(4)[:, None] / 4
    density = xr.DataArray(2 + np.cos(2 * np.pi * (2 * s - time)), dims=("time", "x"))
    waves = allowed_waves(np.eye(1) * 3.0, 7.0, (10,))
    modes = density_modes(density, waves)
    np.testing.assert_allclose(modes["qx"], 2 * np.pi / 3 * np.arange(4))
    expected = np.zeros((4, 4), complex)
    expected[:, 0], expected[:, 2] = 6, 1.5 * np.exp(-2j * np.pi * time[:, 0])
    np.testing.assert_allclose(modes, expected, atol=1e-12)


def test_a_grid_that_is_too_coarse_is_refused():
    density = xr.DataArray(wave((1, 0, 0), 0.01, n=4), dims=FIELD)
    with pytest.raises(ShapeError, match="does not resolve"):
        density_modes(density, allowed_waves(CELL, 3.0))
    with pytest.raises(ShapeError, match="does not resolve"):
        density_modes(density, allowed_waves(np.eye(2) * EDGE, 1.5))
    assert density_modes(density, allowed_waves(CELL, 3.0, (4, 4, 4))).sizes["mode"] == 14


# --- static structure of nuclei and electrons ------------------------------------------------


def test_ideal_gas():
    """S = 1 at every q, within the error of the mean of many independent frames."""
    positions = np.random.default_rng(0).uniform(0, EDGE, (4000, 20, 3))
    s = static_structure(nuclear_modes(atoms(positions), allowed_waves(CELL, 3.0)))
    mean, error = s.mean("time"), s.std("time") / np.sqrt(s.sizes["time"])
    assert (np.abs(mean - 1) < 4 * error).all() and error.max() < 0.02


def test_bragg_peaks_of_a_perfect_crystal():
    """fcc, 3x3x3 cubic cells: S = N where h, k, l are all odd or all even, in units of 2 pi/a."""
    base = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
    corners = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 1, 3)
    positions = (corners + base).reshape(1, -1, 3) * EDGE / 3
    n = positions.shape[1]
    waves = allowed_waves(CELL, 3 * UNIT * np.sqrt(8.5))
    power = np.abs(nuclear_modes(atoms(positions), waves)[0]) ** 2 / n
    h = waves["index"].values
    bragg = (h % 3 == 0).all(1) & ((h // 3 % 2).sum(1) % 3 == 0)
    np.testing.assert_allclose(power, np.where(bragg, n, 0), atol=1e-9)
    s = static_structure(nuclear_modes(atoms(positions), waves))[0]
    peaks = s[s > 1e-6]
    np.testing.assert_allclose(peaks["q"], 3 * UNIT * np.sqrt([3, 4, 8]))
    # other waves of the same length, (5, 1, 1) beside (3, 3, 3), are no peaks
    np.testing.assert_allclose(peaks * peaks["multiplicity"], n * np.array([8, 6, 12]))


@pytest.mark.parametrize("cell", [CELL, TRICLINIC], ids=["cubic", "triclinic"])
def test_gaussian_atoms_have_a_form_factor(cell):
    """rho_q = f n_q with f = exp(-q^2 sigma^2/2), hence S_ie = f S_ii and S_ee = f^2 S_ii."""
    sigma = 0.6
    positions = np.random.default_rng(0).uniform(0, 5, (2, 3, 3))
    waves = allowed_waves(cell, 3.0, (16, 16, 16))
    rho = density_modes(gaussian_atoms(positions, cell, 16, sigma), waves)
    nuclei = nuclear_modes(atoms(positions), waves)
    s_ii = static_structure(nuclei)
    f = np.exp(-((s_ii["q"] * sigma) ** 2) / 2)
    np.testing.assert_allclose(static_structure(nuclei, rho), s_ii * f, atol=1e-5)
    np.testing.assert_allclose(static_structure(rho), s_ii * f**2, atol=1e-5)
    assert float(s_ii.max()) > 0.5


def test_cross_term_is_normalised_by_both_numbers():
    nuclei = nuclear_modes(atoms(np.zeros((1, 2, 3))), allowed_waves(CELL, 2.0))
    np.testing.assert_allclose(static_structure(nuclei, 3 * nuclei), 2 * np.sqrt(3))


def test_modes_on_other_waves_are_refused():
    positions = atoms(np.zeros((1, 2, 3)))
    a, b = (nuclear_modes(positions, allowed_waves(edge * np.eye(3), 2.0)) for edge in (6.0, 6.1))
    for other in (b, a[:, :-1]):
        with pytest.raises(ShapeError, match="other waves"):
            static_structure(a, other)


def test_fluctuation_leaves_the_number():
    positions = np.random.default_rng(0).uniform(0, EDGE, (5, 4, 3))
    modes = fluctuation(nuclear_modes(atoms(positions), allowed_waves(CELL, 2.0)))
    np.testing.assert_allclose(modes[:, 0], 4)
    np.testing.assert_allclose(modes[:, 1:].mean("time"), 0, atol=1e-12)
    assert static_structure(modes).sizes["q"] == 3


def test_static_structure_is_that_of_freud():
    """Liquid lithium, every shell up to 3/angstrom, against StaticStructureFactorDirect.

    freud averages over the waves of one octant, which does for a liquid; so compare these.
    """
    freud = pytest.importorskip("freud")
    ds = open_trajectory(LITHIUM).isel(time=slice(0, 100, 10))
    cell, positions = ds["cell"].values, ds["positions"].load()
    waves = allowed_waves(cell, 3.0)
    octant = (waves["index"].values >= 0).all(1)
    ours = static_structure(nuclear_modes(positions, waves)[:, octant]).mean("time")
    box = freud.box.Box.from_matrix(cell.T)
    # bins so narrow that none holds two shells
    theirs = freud.diffraction.StaticStructureFactorDirect(bins=150, k_max=3.01)
    for frame in positions.values:
        theirs.compute((box, box.wrap(frame)), reset=False)
    bins = np.digitize(ours["q"], theirs.bin_edges) - 1
    assert len(set(bins)) == len(bins) > 15
    np.testing.assert_allclose(theirs.S_k[bins], ours, rtol=1e-4, atol=1e-5)


# --- larger than memory ----------------------------------------------------------------------


class Film:
    """A lazy density that counts its frames: how many were made, how many were alive at once."""

    def __init__(self, n_frames: int, n: int = 8) -> None:
        self.made = self.alive = self.most = 0
        blocks = {"chunks": ((1,) * n_frames, (n,), (n,), (n,)), "dtype": np.float32}
        array = da.map_blocks(self._frame, n, **blocks, meta=np.empty((0,) * 4, np.float32))
        time = np.arange(n_frames) * 2.0
        self.density = xr.DataArray(array, {"time": time}, FIELD)

    def _frame(self, n: int, block_info: dict | None = None) -> np.ndarray:
        seed = block_info[None]["chunk-location"][0]
        frame = np.random.default_rng(seed).uniform(0.5, 1, (1, n, n, n)).astype(np.float32)
        self.made, self.alive = self.made + 1, self.alive + 1
        self.most = max(self.most, self.alive)
        weakref.finalize(frame, self._forget)
        return frame

    def _forget(self) -> None:
        self.alive -= 1


def test_a_film_larger_than_memory():
    film = Film(60)
    waves = allowed_waves(CELL, 3.0, (8, 8, 8))
    with dask.config.set(scheduler="synchronous"):
        lazy = static_structure(density_modes(film.density, waves))
        assert film.made == 0 and dask.is_dask_collection(lazy)
        values = lazy.compute()
        assert film.made == 60 and film.most < 6
        eager = static_structure(density_modes(film.density.compute(), waves))
    xr.testing.assert_allclose(values, eager, rtol=1e-12)
    np.testing.assert_allclose(structure_factor(film.density.values, CELL, 3.0)[2], values)


def test_a_store_opened_with_chunks_gives_the_same():
    cell = open_trajectory(LITHIUM)["cell"].values
    waves = allowed_waves(cell, 3.0, (24,) * 3)
    results = []
    for chunks in (None, {}):
        ds = open_trajectory(LITHIUM, chunks=chunks).isel(time=slice(0, 20))
        nuclei = nuclear_modes(ds["positions"], waves)
        results.append(static_structure(nuclei, density_modes(ds["density"], waves)))
    assert results[0].chunks is None and results[1].chunks
    xr.testing.assert_allclose(*results, rtol=1e-12)


def test_peak_is_broad_and_weighted() -> None:
    q = [1.75, 1.9, 2.05, 2.2, 2.35, 4.0, 4.1]
    s = xr.DataArray([1.0, 2.0, 2.6, 2.0, 1.0, 3.0, 0.5], {"q": q}, ("q",))
    s = s.assign_coords(multiplicity=("q", [24] * 5 + [6, 24]))
    assert peak_wave_number(s[:6]) == 4.0  # nothing near it to be averaged with
    assert peak_wave_number(s) == 2.05


# --- other cells, several species --------------------------------------------------------------


@pytest.mark.parametrize("name", ["nacl", "hexagonal"])
def test_density_is_made_of_partial_structure_factors(name):
    """Of Gaussian clouds: N S_ee = sum over pairs of sqrt(N_a N_b) f_a f_b S_ab."""
    run = made_up_run(name, 3)
    partial, number = partial_structure(run, 4.0), float(run["density"][0].mean())
    number *= abs(np.linalg.det(run["cell"].values))
    assert partial.dims == ("pair", "time", "q")
    total = 0
    numbers = np.unique(run["numbers"])
    for pair, (a, b) in zip(partial["pair"].values, [(0, 0), (0, 1), (1, 1)], strict=True):
        z = numbers[[a, b]]
        count = [int((run["numbers"] == x).sum()) for x in z]
        f = [CHARGES[x] * np.exp(-((partial["q"] * WIDTHS[x]) ** 2) / 2) for x in z]
        weight = (1 if a == b else 2) * np.sqrt(count[0] * count[1])
        total = total + weight * f[0] * f[1] * partial.sel(pair=pair)
    waves = allowed_waves(run["cell"].values, 4.0)
    s_ee = static_structure(density_modes(run["density"], waves))
    np.testing.assert_allclose(
        (total / number).transpose("time", "q"), s_ee, atol=1e-3 * float(s_ee.max())
    )


def test_a_cell_for_each_frame():
    """A crystal that breathes as a whole: its modes stay, and the electrons are counted."""
    run = made_up_run("hexagonal", 4)
    scale = xr.DataArray([1.0, 1.01, 0.99, 1.02], dims="time")
    still = run.isel(time=[0, 0, 0, 0])
    cells, x = scale * still["cell"], scale * still["positions"]
    cells = cells.transpose("time", "vector", "cartesian").values
    density = still["density"] / scale**3
    waves = allowed_waves(cells, 4.0)
    nuclei, rho = nuclear_modes(x, waves), density_modes(density, waves)
    for modes in (nuclei, rho):
        np.testing.assert_allclose(modes, modes[:1].values.repeat(4, axis=0), atol=1e-9)
    mean = allowed_waves(cells.mean(axis=0), 4.0)
    np.testing.assert_allclose(waves["q"], mean["q"])
    with pytest.raises(ShapeError, match="4 cells for 3 frames"):
        nuclear_modes(x[:3], waves)
    _, _, s = structure_factor(density.values, cells, 4.0)
    np.testing.assert_allclose(s, s[:1].repeat(4, axis=0), atol=1e-9)
