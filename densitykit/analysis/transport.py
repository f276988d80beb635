r"""Nuclei in real space: where they are, how far they get, how they vibrate.

The pair distribution function, the mean square displacement and the velocity autocorrelation,

.. math:: g(r) = \frac{V}{N^2} \sum_{i \ne j} \frac{\delta(r - r_{ij})}{4\pi r^2}, \quad
   \mathrm{MSD}(t) = \langle |R(t_0 + t) - R(t_0)|^2 \rangle, \quad
   C(t) = \langle v(t_0 + t) \cdot v(t_0) \rangle,

(Hansen and McDonald, Theory of Simple Liquids, chapters 2 and 7) give the diffusion coefficient
twice, by Einstein's relation and by that of Green and Kubo, in d dimensions:

.. math:: D = \lim_{t \to \infty} \frac{1}{2d} \frac{d}{dt} \mathrm{MSD}(t)
   = \frac{1}{d} \int_0^\infty C(t)\, dt .

The vibrational density of states is the spectrum of C, weighted by mass and normalised to one; 3N
times it counts modes. Diffusion shows as its value at zero frequency.

A periodic cell slows diffusion, by the hydrodynamic drag of a particle's own images. For a cubic
cell of edge L and a liquid of shear viscosity eta (Yeh and Hummer 2004, eq. 12)

.. math:: D_\infty = D_L + \frac{\xi k_B T}{6 \pi \eta L}, \qquad \xi = 2.837297 .

It is no small thing in a cell of ab-initio size, so state D with its L, and the correction beside
it. Lengths are in angstrom, times in fs, D in angstrom**2/fs (`CM2_PER_S` converts to cm**2/s).
xarray in, xarray out, lazy on dask; statistics keep the axis of the atoms: select a species, then
average over ``atom``. Error bars: `densitykit.analysis.modes.over_segments`.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.constants import k as boltzmann

from densitykit.analysis.modes import apply_lazily, species_pairs
from densitykit.analysis.scattering import dynamic_structure, time_correlation
from densitykit.cells import cell_heights, single_cell
from densitykit.errors import ShapeError
from densitykit.neighbours import neighbour_pairs
from densitykit.units import PER_CM

__all__ = ["diffusion_coefficient", "green_kubo", "mean_square_displacement", "pair_distribution"]
__all__ += ["partial_pair_distribution", "unwrap", "velocities_from_positions"]
__all__ += ["velocity_autocorrelation", "vibrational_density_of_states", "without_drift"]
__all__ += ["yeh_hummer"]

_XI = 2.837297  # of the cubic lattice of images


def unwrap(positions: xr.DataArray, cell: np.ndarray) -> xr.DataArray:
    """Continuous paths from positions folded into the cell.

    Parameters
    ----------
    positions
        Dimensions (time, atom, cartesian) in angstrom; the same atom in the same row
        in each frame, and moving by less than half of the cell between two.
    cell
        Lattice vectors as rows, shape (d, d), in angstrom; of the whole run.

    Returns
    -------
    xr.DataArray
        Same dimensions; the first frame stays where it is.

    Raises
    ------
    ShapeError
        If the cell changes: displacements would have a part that is the cell's.
    """
    cell = single_cell(cell, "unwrap")

    def join(paths: np.ndarray) -> np.ndarray:
        steps = np.diff(paths @ np.linalg.inv(cell), axis=-2, prepend=np.nan)
        steps[..., 0, :] = 0.0
        return paths - np.cumsum(np.round(steps), axis=-2) @ cell

    core = ["time", "cartesian"]
    sizes = {dim: positions.sizes[dim] for dim in core}
    out = apply_lazily(join, positions, core=[core], out=sizes, dtype=float)
    return out.transpose(*positions.dims).assign_coords(positions.coords)


def without_drift(vectors: xr.DataArray, masses: np.ndarray | None = None) -> xr.DataArray:
    """Positions or velocities relative to the centre of mass of all atoms.

    Parameters
    ----------
    vectors
        Dimensions (time, atom, cartesian); positions unwrapped.
    masses
        Shape (atom,), in any unit; equal by default.
    """
    weights = xr.DataArray(
        np.ones(vectors.sizes["atom"]) if masses is None else masses, dims="atom"
    )
    return vectors - (vectors * weights).sum("atom") / weights.sum()


def pair_distribution(
    positions: xr.DataArray,
    cell: np.ndarray,
    r_max: float | None = None,
    bins: int = 100,
    other: xr.DataArray | None = None,
) -> xr.DataArray:
    """Pair distribution function g(r) of every frame, with all images within reach.

    Parameters
    ----------
    positions
        Dimensions (time, atom, cartesian) in angstrom, wrapped or not.
    cell
        Lattice vectors as rows, shape (3, 3), or (time, 3, 3) if it changes, in angstrom.
    r_max
        Largest distance; by default half of the smallest height of the cell, up to which
        the nearest image is the only one. Beyond, the order of the periodic images shows.
    bins
        Of equal width between 0 and r_max.
    other
        Positions of another species, for the partial g_ab(r).

    Returns
    -------
    xr.DataArray
        (time, r) at the centres of the bins, dimensionless. Of N atoms of one kind, an ideal gas
        has 1 - 1/N: an atom is no neighbour of itself.

    Raises
    ------
    ShapeError
        If r_max is not positive, or the cells are not those of the frames.
    """
    cells = np.asarray(cell, dtype=np.float64)
    r_max = float(cell_heights(cells).min()) / 2 if r_max is None else r_max
    n = positions.sizes["time"]
    if r_max <= 0 or (cells.ndim == 3 and len(cells) != n):
        raise ShapeError(
            f"no g(r) up to {r_max} angstrom of {n} frames in cells {cells.shape}; give a "
            "positive r_max, and one cell or as many as frames"
        )
    edges = np.linspace(0.0, r_max, bins + 1)
    shells = 4 / 3 * np.pi * np.diff(edges**3)

    first = positions.sizes["atom"]
    pairs = first * (first if other is None else other.sizes["atom"])

    def count(x: np.ndarray, cells: np.ndarray) -> np.ndarray:
        cells, out = np.broadcast_to(cells, (*x.shape[:-2], 3, 3)), np.empty((*x.shape[:-2], bins))
        for k in np.ndindex(out.shape[:-1]):
            i, j, image = neighbour_pairs(x[k], cells[k], r_max, both_ways=True)
            wanted = i < first if other is None else (i < first) & (j >= first)
            i, j, image = i[wanted], j[wanted], image[wanted]
            distance = np.linalg.norm(x[k][j] - x[k][i] + image @ cells[k], axis=1)
            out[k] = np.histogram(distance, edges)[0] * abs(np.linalg.det(cells[k]))
        return out / (pairs * shells)

    both = positions if other is None else xr.concat([positions, other], "atom")
    lattice = xr.DataArray(cells, dims=("time", "vector", "xyz")[-cells.ndim :])
    core = [["atom", "cartesian"], ["vector", "xyz"]]
    g = apply_lazily(count, both, lattice, core=core, out={"r": bins}, dtype=float)
    return g.assign_coords(r=("r", (edges[1:] + edges[:-1]) / 2, {"units": "angstrom"}))


def partial_pair_distribution(
    run: xr.Dataset, r_max: float | None = None, bins: int = 100
) -> xr.DataArray:
    """Partial g_ab(r) of a run with several species, (pair, time, r), see `species_pairs`.

    Parameters
    ----------
    run
        Trajectory with `positions`, `numbers` and `cell`.
    r_max, bins
        See `pair_distribution`.
    """
    x, cell = run["positions"], run["cell"].values

    def partial(a: np.ndarray, b: np.ndarray) -> xr.DataArray:
        other = None if a is b else x[:, b]
        return pair_distribution(x[:, a], cell, r_max, bins, other)

    return species_pairs(run, partial)


def mean_square_displacement(positions: xr.DataArray, max_lag: int | None = None) -> xr.DataArray:
    """Mean square displacement of each atom over all origins, by FFT (Kneller et al. 1995).

    Parameters
    ----------
    positions
        Dimensions (time, atom, cartesian) in angstrom, equally spaced in fs, unwrapped
        (`unwrap`); `without_drift`, if the centre of mass moves.
    max_lag
        Longest lag in frames; half of the run by default. Beyond, few origins are left.

    Returns
    -------
    xr.DataArray
        (lag, atom) in angstrom**2, lag in fs.
    """
    # about their middle, since the difference of two large sums is taken
    centred = positions - positions.mean("time")
    product = time_correlation(centred, max_lag=max_lag).sum("cartesian")
    n, lags = positions.sizes["time"], product.sizes["lag"]

    def squares(values: np.ndarray) -> np.ndarray:
        total = np.cumsum(np.concatenate([0 * values[..., :1], values], -1), -1)  # of the first k
        k = np.arange(lags)
        return (total[..., n - k] + total[..., [n]] - total[..., k]) / (n - k)

    square = (centred**2).sum("cartesian")
    ends = apply_lazily(squares, square, core=[["time"]], out={"lag": lags}, dtype=float)
    return (ends - 2 * product).assign_coords(lag=product["lag"]).transpose("lag", ...)


def diffusion_coefficient(
    msd: xr.DataArray, start: float, stop: float, dimensions: int = 3
) -> xr.DataArray:
    """Einstein's diffusion coefficient: slope of a straight line through MSD(t), over 2d.

    Parameters
    ----------
    msd
        (lag, *) in angstrom**2, averaged over the atoms or not.
    start, stop
        Lags of the fit in fs: beyond the ballistic time and the rattling in the cage,
        and short of where few independent origins are left (a tenth of the run, say).
    dimensions
        D.

    Returns
    -------
    xr.DataArray
        Shape (*,), in angstrom**2/fs: D of this cell, see `yeh_hummer`.

    Raises
    ------
    ShapeError
        If the window holds less than two lags.
    """
    part = msd.sel(lag=slice(start, stop))
    if part.sizes["lag"] < 2:
        last = float(msd["lag"][-1])
        raise ShapeError(
            f"no two lags in {start} ... {stop} fs; choose a window within 0 ... {last}"
        )
    t = part["lag"] - part["lag"].mean()
    return (part * t).sum("lag") / (t**2).sum() / (2 * dimensions)


def yeh_hummer(temperature: float, viscosity: float, edge: float) -> float:
    """What to add to D of a cubic cell for an infinite liquid (Yeh and Hummer 2004, eq. 12).

    Parameters
    ----------
    temperature
        K.
    viscosity
        Shear viscosity of the liquid in Pa s, from experiment or from a simulation.
    edge
        Of the cell in angstrom.

    Returns
    -------
    float
        xi k_B T / (6 pi eta L) in angstrom**2/fs.
    """
    si = _XI * boltzmann * temperature / (6 * np.pi * viscosity * edge * 1e-10)
    return si * 1e5  # m**2/s to angstrom**2/fs


def velocities_from_positions(positions: xr.DataArray) -> xr.DataArray:
    """Velocities by central differences, where a store has none.

    A vibration of angular frequency w is damped by sin(w h)/(w h), h the time between frames: 1 %
    at a period of 26 h, 5 % at 11 h.

    Parameters
    ----------
    positions
        Dimensions (time, *) in angstrom, unwrapped, time in fs.

    Returns
    -------
    xr.DataArray
        angstrom/fs, without the first and the last frame.
    """
    return positions.differentiate("time").isel(time=slice(1, -1))


def velocity_autocorrelation(velocities: xr.DataArray, max_lag: int | None = None) -> xr.DataArray:
    """Velocity autocorrelation of each atom over all origins; at lag 0 it is d kT/m.

    Parameters
    ----------
    velocities
        Dimensions (time, atom, cartesian) in angstrom/fs, equally spaced.
    max_lag
        Longest lag in frames; half of the run by default.

    Returns
    -------
    xr.DataArray
        (lag, atom) in angstrom**2/fs**2, lag in fs.
    """
    return time_correlation(velocities, max_lag=max_lag).sum("cartesian")


def green_kubo(vacf: xr.DataArray, dimensions: int = 3) -> xr.DataArray:
    """Running integral of a velocity autocorrelation over d: D where it has a plateau.

    Parameters
    ----------
    vacf
        (lag, *) in angstrom**2/fs**2.
    dimensions
        D.

    Returns
    -------
    xr.DataArray
        (lag, *) in angstrom**2/fs, by the trapezium rule.
    """
    return vacf.cumulative_integrate("lag") / dimensions


def vibrational_density_of_states(
    vacf: xr.DataArray, masses: np.ndarray | None = None, window: str | tuple[str, float] = "hann"
) -> xr.DataArray:
    """Vibrational density of states, whose integral over omega > 0 is one.

    Parameters
    ----------
    vacf
        (lag, atom) from lag 0 on.
    masses
        Shape (atom,), in any unit; equal by default. Weighted by mass every harmonic mode
        counts the same.
    window
        See `dynamic_structure`; the resolution is about pi over the longest lag.

    Returns
    -------
    xr.DataArray
        (omega,) in fs, omega in rad/fs; the coordinate wavenumber is in 1/cm.
    """
    weights = xr.DataArray(np.ones(vacf.sizes["atom"]) if masses is None else masses, dims="atom")
    total = (vacf * weights).sum("atom")
    spectrum = 2 * dynamic_structure(total / total.isel(lag=0), window)
    wavenumber = spectrum["omega"] * PER_CM
    return spectrum.assign_coords(wavenumber=wavenumber.assign_attrs(units="1/cm"))
