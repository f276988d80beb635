r"""Structure of densities in reciprocal space, with honest error bars.

The modes of the electron density and of the nuclei,

.. math:: \rho_q = \int_\Omega \rho(r)\, e^{-iq\cdot r}\, dr, \qquad
   n_q = \sum_j e^{-iq\cdot R_j},

exist only on the reciprocal lattice of the cell, so averages run over shells of equal
:math:`|q|` and never over bins. With a, b either of the two (i nuclei, e electrons) and
:math:`N_a = a_0`, the static structure factor, or for a not b the cross term, is (Hansen and
McDonald, Theory of Simple Liquids, section 4.1)

.. math:: S_{ab}(q) = \frac{\langle a_q b_q^* \rangle_{t,\,|q|}}{\sqrt{N_a N_b}} .

Between two species of nuclei these are the partial structure factors of Ashcroft and Langreth
(1967). Where the cell changes from frame to frame a wave keeps its integer indices, the waves of
each frame are those of its own cell, and q, by which shells are told apart, is that of the mean
cell: give one of exact symmetry to keep shells whole.

Everything but the two functions on plain arrays takes and gives xarray. On dask
(``open_trajectory(path, chunks={})``) it stays lazy: a density larger than memory is read a few
frames at a time, and only its modes are kept. Lengths are in angstrom, wave numbers in
1/angstrom, densities in electrons per angstrom**3.
Error bars: `densitykit.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

import numpy as np
import scipy.fft
import xarray as xr

from densitykit.cells import group_lengths
from densitykit.errors import ShapeError, TrajectoryError
from densitykit.units import SYMBOLS

__all__ = ["allowed_waves", "apply_lazily", "density_modes", "fluctuation", "nuclear_modes"]
__all__ += ["partial_structure", "peak_wave_number", "same_waves", "shell_mean", "species_of"]
__all__ += ["species_pairs", "static_structure", "structure_factor"]

_SAME = 1e-6  # 1/angstrom: wave numbers closer than this are one shell


def structure_factor(
    density: np.ndarray, cell: np.ndarray, q_max: float = 6.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shell-averaged static structure factor of the electrons in every frame, on plain arrays.

    Parameters
    ----------
    density
        Shape (time, X, Y, Z) in angstrom**-3.
    cell
        Lattice vectors as rows, shape (3, 3) or (time, 3, 3), in angstrom.
    q_max
        Largest wave number in 1/angstrom; q = 0 is left out.

    Returns
    -------
    tuple[np.ndarray, np.ndarray, np.ndarray]
        q with shape (shell,) in 1/angstrom, multiplicity with shape (shell,) (each of q and -q
        counts) and S with shape (time, shell), dimensionless.

    Raises
    ------
    ShapeError
        If no allowed q lies in (0, q_max].
    """
    waves = allowed_waves(cell, q_max, density.shape[-3:])
    modes = density_modes(xr.DataArray(density, dims=("time", "x", "y", "z")), waves)
    s = static_structure(modes)
    return s["q"].values, s["multiplicity"].values, s.values


def allowed_waves(
    cell: np.ndarray, q_max: float = 6.0, grid: Sequence[int] | None = None
) -> xr.Dataset:
    """The wave vectors that the cell allows: q = 0 first, then one of each pair +-q.

    Parameters
    ----------
    cell
        Lattice vectors as rows, shape (d, d), or (time, d, d) if it changes, in angstrom.
    q_max
        Largest wave number in 1/angstrom.
    grid
        Points of the density along each lattice vector, shape (d,): keeps only what this
        grid resolves. Nyquist waves are half of a pair, so they are left out.

    Returns
    -------
    xr.Dataset
        index (mode, vector), integers, and cell ([time,] vector, cartesian); as coordinates of the
        modes q and its components qx, qy, qz in the (mean) cell, and shell, which numbers the |q|
        and is 0 for q = 0.

    Raises
    ------
    ShapeError
        If no allowed q lies in (0, q_max].
    """
    given = np.asarray(cell, dtype=np.float64)
    cell = given.mean(axis=0) if given.ndim == 3 else given
    largest = np.floor(
        q_max * np.linalg.norm(cell, axis=1) / (2 * np.pi) + 1e-9
    )  # |q.a| <= |q||a|
    if grid is not None:
        largest = np.minimum(largest, (np.asarray(grid) - 1) // 2)
    ranges = [np.arange(-n, n + 1, dtype=int) for n in largest]
    index = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, len(cell))
    # of +-h, keep that whose last component other than zero is positive
    index = index[index @ np.cumprod([1, *(2 * largest[:-1] + 1)]) >= 0]
    vector = 2 * np.pi * index @ np.linalg.inv(cell).T
    length = np.linalg.norm(vector, axis=1)
    order = np.argsort(length, kind="stable")[: np.count_nonzero(length <= q_max + 1e-9)]
    if len(order) < 2:
        raise ShapeError(f"no wave vector of this cell in (0, {q_max}] 1/angstrom; raise q_max")
    index, vector, length = index[order], vector[order], length[order]
    _, shell = group_lengths(length, _SAME)
    dims = ("time", "vector", "cartesian")[-given.ndim :]
    return xr.Dataset(
        {"index": (("mode", "vector"), index), "cell": (dims, given)},
        {
            "q": ("mode", length, {"units": "1/angstrom"}),
            "shell": ("mode", shell),
            **{f"q{x}": ("mode", v) for x, v in zip("xyz", vector.T, strict=False)},
        },
    )


def density_modes(density: xr.DataArray, waves: xr.Dataset) -> xr.DataArray:
    """Fourier coefficients rho_q of the density, exact for what its grid resolves.

    Parameters
    ----------
    density
        Dimensions (time, x, y, z), or (time, x) in one dimension, in angstrom**-d.
    waves
        From `allowed_waves`.

    Returns
    -------
    xr.DataArray
        Complex, (time, mode), in electrons. Mode 0 is the number of electrons.

    Raises
    ------
    ShapeError
        If the grid does not resolve a wave.
    """
    index = waves["index"].values
    space = [dim for dim in "xyz" if dim in density.dims]
    grid = np.array([density.sizes[dim] for dim in space])
    if len(grid) != index.shape[1] or (2 * np.abs(index) >= grid).any():
        raise ShapeError(
            f"a density on the grid {tuple(grid.tolist())} does not resolve all of the waves; "
            "make them with allowed_waves(cell, q_max, grid)"
        )
    volume = xr.DataArray(
        np.abs(np.linalg.det(_cell_of(waves, density).values)),
        dims=[dim for dim in waves["cell"].dims if dim == "time"],
    )

    def transform(frames: np.ndarray) -> np.ndarray:
        out = np.empty((*frames.shape[: -len(grid)], len(index)), complex)
        for frame in np.ndindex(out.shape[:-1]):  # one at a time: no second copy of a chunk
            out[frame] = scipy.fft.rfftn(frames[frame].astype(np.float64))[tuple(index.T)]
        return out / grid.prod()

    return _to_modes(transform, density, space, waves) * volume


def nuclear_modes(positions: xr.DataArray, waves: xr.Dataset) -> xr.DataArray:
    """Fourier coefficients n_q of the number density of the nuclei, all of them or one species.

    Parameters
    ----------
    positions
        Dimensions (time, atom, cartesian) in angstrom, wrapped or not.
    waves
        From `allowed_waves`.

    Returns
    -------
    xr.DataArray
        Complex, (time, mode). Mode 0 is the number of nuclei.
    """
    index, cell = waves["index"].values, _cell_of(waves, positions)
    inverse = xr.DataArray(np.linalg.inv(cell.values), dims=[*cell.dims[:-2], "cartesian", "axis"])
    largest = np.abs(index).max(0)
    flat = np.ravel_multi_index(tuple((index + largest).T), tuple(2 * largest + 1))
    phases = [-2j * np.pi * np.arange(-n, n + 1) for n in largest]

    def transform(frames: np.ndarray) -> np.ndarray:
        out = np.empty((*frames.shape[:-2], len(index)), complex)
        for frame in np.ndindex(out.shape[:-1]):
            # exp(-iq.R) is a product over axes: few exponentials, and a matrix product sums atoms
            *axes, last = [
                np.exp(np.outer(s, p)) for s, p in zip(frames[frame].T, phases, strict=True)
            ]
            product = np.ones((len(last), 1))
            for axis in axes:
                product = (product[:, :, None] * axis[:, None]).reshape(len(last), -1)
            out[frame] = (product.T @ last).ravel()[flat]
        return out

    fractions = xr.dot(positions, inverse, dim="cartesian")
    return _to_modes(transform, fractions, ["atom", "axis"], waves)


def _cell_of(waves: xr.Dataset, frames: xr.DataArray) -> xr.DataArray:
    """The cell of the waves; ShapeError if it has other frames than what is to be transformed."""
    cell = waves["cell"]
    if "time" in cell.dims and cell.sizes["time"] != frames.sizes.get("time"):
        raise ShapeError(
            f"{cell.sizes['time']} cells for {frames.sizes.get('time')} frames; give "
            "allowed_waves the cells of the same frames"
        )
    return cell


def _to_modes(
    transform: Callable, frames: xr.DataArray, inner: Sequence[str], waves: xr.Dataset
) -> xr.DataArray:
    """Apply a map of whole frames (the dimensions ``inner``) to modes, lazily on dask."""
    modes = apply_lazily(transform, frames, core=[inner], out={"mode": waves.sizes["mode"]})
    return modes.assign_coords(waves.coords)


def fluctuation(modes: xr.DataArray) -> xr.DataArray:
    """Modes less their time average, for solids and molecules; mode 0, the number, stays."""
    return modes - modes.mean("time").where(modes["q"] > 0, 0.0)


def static_structure(a: xr.DataArray, b: xr.DataArray | None = None) -> xr.DataArray:
    """Static structure factor S_ab(q) of every frame.

    Parameters
    ----------
    a, b
        Modes (time, mode) on the same waves; b = a by default. S_ee, S_ii, or, with
        electrons and nuclei, S_ie.

    Returns
    -------
    xr.DataArray
        (time, q), dimensionless; q are the shells without q = 0, and the coordinate multiplicity
        says how many wave vectors each has (q and -q count both).
    """
    b = same_waves(a, b)
    norm = np.sqrt(a.isel(mode=0, drop=True).real * b.isel(mode=0, drop=True).real)
    return shell_mean((a * b.conj()).real) / norm


def species_of(run: xr.Dataset) -> dict[str, np.ndarray]:
    """Indices of the atoms of each species of a run, by symbol, lightest first.

    Raises
    ------
    TrajectoryError
        If the run has no `numbers`.
    """
    if "numbers" not in run:
        source = run.encoding.get("source", "trajectory")
        raise TrajectoryError(f"{source}: variable 'numbers' is missing; write atomic numbers")
    numbers = run["numbers"].values.astype(int)
    return {SYMBOLS[z]: np.flatnonzero(numbers == z) for z in np.unique(numbers)}


def species_pairs(
    run: xr.Dataset, statistic: Callable[[np.ndarray, np.ndarray], xr.DataArray]
) -> xr.DataArray:
    """A statistic of each pair of species: (pair, *), named "Na-Na", "Na-Cl", "Cl-Cl".

    Parameters
    ----------
    run
        Trajectory with `numbers`.
    statistic
        Map of the atoms of one species and of another (or the same), as indices.
    """
    pairs = list(combinations_with_replacement(species_of(run).items(), 2))
    values = [statistic(a, b) for (_, a), (_, b) in pairs]
    names = [f"{a}-{b}" for (a, _), (b, _) in pairs]
    return xr.concat(values, "pair").assign_coords(pair=names)


def partial_structure(run: xr.Dataset, q_max: float = 6.0) -> xr.DataArray:
    """Partial structure factors of the nuclei, (pair, time, q), see `species_pairs`.

    Parameters
    ----------
    run
        Trajectory with `positions`, `numbers` and `cell`.
    q_max
        Largest wave number in 1/angstrom.
    """
    waves = allowed_waves(run["cell"].values, q_max)

    def partial(*pair: np.ndarray) -> xr.DataArray:
        return static_structure(*(nuclear_modes(run["positions"][:, a], waves) for a in pair))

    return species_pairs(run, partial)


def peak_wave_number(s: xr.DataArray, width: float = 0.2) -> float:
    """Wave number of the highest peak of a structure factor.

    Parameters
    ----------
    s
        (q,) with its multiplicity, as from `static_structure`, averaged over time.
    width
        Shells within this distance in 1/angstrom are averaged, weighted by their
        multiplicity: single shells of a small cell are noisy.

    Returns
    -------
    float
        In 1/angstrom.
    """
    q = s["q"].values
    near = s["multiplicity"].values * (abs(q[:, None] - q) <= width)
    return float(q[(near @ s.values / near.sum(axis=1)).argmax()])


def same_waves(a: xr.DataArray, b: xr.DataArray | None) -> xr.DataArray:
    """b, or a where there is none; both must lie on the same waves."""
    if b is None:
        return a
    same = a.sizes["mode"] == b.sizes["mode"]
    names = [name for name in ("qx", "qy", "qz") if name in a.coords]
    if not same or not all(np.allclose(a[x], b[x], atol=_SAME) for x in names):
        raise ShapeError("the two sets of modes lie on other waves; give both the same `waves`")
    return b


def shell_mean(values: xr.DataArray) -> xr.DataArray:
    """Mean over each shell of equal |q| but q = 0: the dimension mode becomes q."""
    shell, q = values["shell"].values, values["q"].values
    count = np.bincount(shell)
    weights = (shell[:, None] == np.arange(1, len(count))) / count[1:]
    first = np.searchsorted(shell, np.arange(1, len(count)))
    coords = {"q": ("q", q[first], {"units": "1/angstrom"}), "multiplicity": ("q", 2 * count[1:])}
    matrix = xr.DataArray(weights, coords, ("mode", "q"))
    names = [name for name, coord in values.coords.items() if "mode" in coord.dims]
    return xr.dot(values.drop_vars(names), matrix, dim="mode")


def apply_lazily(
    function: Callable,
    *arrays: xr.DataArray,
    core: Sequence[Sequence[str]],
    out: dict[str, int],
    dtype: type = complex,
) -> xr.DataArray:
    """`xarray.apply_ufunc`, lazy on dask, for a map of core dimensions to others."""
    return xr.apply_ufunc(
        function,
        *arrays,
        input_core_dims=list(core),
        output_core_dims=[list(out)],
        dask="parallelized",
        output_dtypes=[dtype],
        dask_gufunc_kwargs={"output_sizes": out, "allow_rechunk": True},
    )
