r"""Nuclei from the density: the sharp minima of a valence density.

A bare minimum lies beside its nucleus, because the neighbours tilt the density there. A linear
filter removes most of that. In the *depth*, a periodic field of zero mean,

.. math:: d(r) = \sum_{q \ne 0} W(|q|)\, \rho_q\, e^{iq\cdot r}, \qquad \nabla d(R_a) = 0,

nuclei are maxima. Bare minima are those of :math:`W = -1/\bar\rho`, :math:`d = 1 - \rho/\bar\rho`.
`NucleiFilter.fit` finds a piecewise linear :math:`W = \sum_m w_m B_m` from known nuclei. The
maximum misses by :math:`-H^{-1}\nabla d(R_a)`: W has the least mean square gradient at fixed
curvature,

.. math:: w \propto -C^{-1} h, \quad C_{mn} = \langle \nabla d_m \cdot \nabla d_n \rangle_a
   + \tfrac{\sigma^2}{N} \sum_q q^2 B_m B_n, \quad h_m = \langle \Delta d_m \rangle_a .

It is a matched filter (Turin 1960) for position instead of presence; the second term guards
against white noise of deviation :math:`\sigma` on N voxels. W is scaled to a mean depth of 1.
Maxima on the grid are moved by Newton's method on the trigonometric polynomial, exact between
the points. On the bundled lithium the bare minima miss by 0.02, the filtered ones by 0.0014.
Lengths are in angstrom, wave numbers in 1/angstrom, densities in angstrom**-3.
`densitykit.analysis.tracking` follows the nuclei in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import xarray as xr
from scipy import fft
from scipy.ndimage import maximum_filter
from scipy.optimize import linear_sum_assignment

from densitykit.cells import minimum_image, single_cell, wave_vectors
from densitykit.errors import ShapeError

__all__ = ["NucleiFilter", "assign", "find_nuclei", "match_nuclei"]

_NEWTON_STEPS = 8


@dataclass(frozen=True)
class NucleiFilter:
    """Map from density to depth: W (angstrom**3) at rising nodes (1/angstrom), both (node,)."""

    wave_numbers: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(
        cls, run: xr.Dataset, frames: int = 24, spacing: float = 0.7, noise: float = 5e-3
    ) -> Self:
        """Fit W to a run with known nuclei; takes about a second.

        Parameters
        ----------
        run
            Trajectory with `density`, `positions` and `cell`, see `densitykit.io.writer`.
        frames
            Number of frames to use, evenly spaced in the run.
        spacing
            Distance of the nodes in 1/angstrom.
        noise
            White noise to guard against, relative to the mean density. More of it
            costs accuracy on exact densities, and gains it on blurred ones.

        Returns
        -------
        Self
            The filter. Its nodes end where the grid ceases to resolve all directions. It
            serves any cell, and any grid that is not coarser.

        Raises
        ------
        ShapeError
            If the run has no nuclei or those of several species (whose depths differ: take the
            positions of the store), or the spacing gives fewer than two nodes.
        """
        cell = single_cell(run["cell"].values, "a filter for nuclei")
        shape = run["density"].shape[1:]
        if "positions" not in run or len(shape) != 3:
            raise ShapeError("a filter needs a 3-D run with 'positions'; pass an ab-initio one")
        if "numbers" in run and len(set(run["numbers"].values.tolist())) > 1:
            raise ShapeError("a filter finds nuclei of one species; take positions of the store")
        q_max = np.pi * min(shape / np.linalg.norm(cell, axis=1))
        nodes = np.linspace(0, q_max, round(q_max / spacing) + 1 if spacing > 0 else 1)
        if len(nodes) < 2:
            raise ShapeError(f"spacing={spacing} gives no nodes up to {q_max:.1f}; use about 0.7")
        chosen = np.unique(np.linspace(0, run.sizes["time"] - 1, frames).round().astype(int))
        densities = run["density"].isel(time=chosen).values.astype(float)
        fractions = run["positions"].isel(time=chosen).values @ np.linalg.inv(cell)
        q = _wave_numbers(shape, cell.tobytes())
        hats = _hats(q, nodes)
        value, gradient, laplacian = _at_nuclei(densities, hats, fractions, cell)
        covariance = np.einsum("mac,nac->mn", gradient, gradient) / gradient.shape[1]
        flat = (hats * q * np.sqrt(_multiplicity(shape))).reshape(len(nodes), -1)
        covariance += (noise * densities.mean()) ** 2 / np.prod(shape) * flat @ flat.T
        weights = _solve_scaled(covariance, -laplacian.mean(axis=1))
        return cls(nodes, weights / (weights @ value.mean(axis=1)))

    def modes(self, density: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Fourier coefficients of the depth, half spectrum, shape (X, Y, Z//2 + 1)."""
        q = _wave_numbers(density.shape, np.asarray(cell, float).tobytes())
        return _modes(density) * np.interp(q, self.wave_numbers, self.weights, right=0)


@lru_cache(maxsize=8)
def _wave_numbers(shape: tuple[int, ...], cell: bytes) -> np.ndarray:
    """|q| in 1/angstrom of the half spectrum; cached, since all frames of a run share it."""
    vectors = wave_vectors(shape, np.frombuffer(cell).reshape(3, 3))
    return np.linalg.norm(vectors[:, :, : shape[2] // 2 + 1], axis=-1)


def _hats(q: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Piecewise linear B_m, 1 at node m and 0 at the others and at q = 0, shape (m, *q.shape)."""
    hats = np.stack([np.interp(q, nodes, row, right=0) for row in np.eye(len(nodes))])
    hats[:, 0, 0, 0] = 0
    return hats


def _solve_scaled(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Solve for a covariance whose diagonal spans many decades, some of it zero."""
    # nodes without a wave vector have neither gradient nor curvature; they keep weight 0
    scale = np.sqrt(np.maximum(np.diag(matrix), 1e-12 * np.trace(matrix)))
    scaled = matrix / np.outer(scale, scale) + 1e-10 * np.eye(len(matrix))
    return np.linalg.solve(scaled, vector / scale) / scale


def _multiplicity(shape: tuple[int, ...]) -> np.ndarray:
    """How many of q and -q each entry of the half spectrum stands for, shape (Z//2 + 1,)."""
    k = np.arange(shape[2] // 2 + 1)
    return np.where((k == 0) | (2 * k == shape[2]), 1.0, 2.0)


def _modes(density: np.ndarray) -> np.ndarray:
    """Half spectrum without mean, and without Nyquist planes, whose derivatives are undefined."""
    modes = fft.rfftn(density, norm="forward")
    modes[0, 0, 0] = 0
    for axis, n in enumerate(density.shape):
        if n % 2 == 0:
            modes[tuple(n // 2 if a == axis else slice(None) for a in range(3))] = 0
    return modes


def _taylor(
    modes: np.ndarray, n_z: int, s: np.ndarray, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value (n,), gradient (n, 3) and Hessian (n, 3, 3) of a polynomial at fractions s (n, 3)."""
    n_x, n_y, half = modes.shape
    k = [np.fft.fftfreq(n_x, 1 / n_x), np.fft.fftfreq(n_y, 1 / n_y), np.arange(half)]
    orders = np.arange(3)[:, None]
    x, y, z = ((2j * np.pi * k[a]) ** orders for a in range(3))
    wave = [np.exp(2j * np.pi * s[:, a, None, None] * k[a]) for a in range(3)]
    z = z * _multiplicity((n_x, n_y, n_z))
    # one axis after the other; indices: derivative along x, point, derivative along y, along z
    t = np.moveaxis(wave[0] * x, 1, 0).reshape(-1, n_x) @ modes.reshape(n_x, -1)
    t = (wave[1] * y) @ t.reshape(3, len(s), n_y, half)
    t = (t @ np.swapaxes(wave[2] * z, 1, 2)).real
    unit = np.eye(3, dtype=int)
    first = np.stack([t[o[0], :, o[1], o[2]] for o in unit], axis=-1)
    orders = (a + b for a in unit for b in unit)
    second = np.stack([t[o[0], :, o[1], o[2]] for o in orders], axis=-1).reshape(-1, 3, 3)
    inverse = np.linalg.inv(cell)
    return t[0, :, 0, 0], first @ inverse.T, inverse @ second @ inverse.T


def _at_nuclei(
    densities: np.ndarray, hats: np.ndarray, fractions: np.ndarray, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value (m, n), gradient (m, n, 3), Laplacian (m, n) at all nuclei through each hat m."""
    terms = []
    for density, s in zip(densities, fractions, strict=True):
        modes, n_z = _modes(density), density.shape[2]
        terms.append(list(zip(*(_taylor(modes * b, n_z, s, cell) for b in hats), strict=True)))
    value, gradient, hessian = (np.concatenate(t, axis=1) for t in zip(*terms, strict=True))
    return value, gradient, np.trace(hessian, axis1=2, axis2=3)


def find_nuclei(
    density: np.ndarray,
    cell: np.ndarray,
    count: int | None = None,
    filter: NucleiFilter | None = None,
    min_depth: float = 0.3,
    min_distance: float = 1.2,
) -> np.ndarray:
    """Nuclei of one frame, with sub-grid accuracy, the deepest first.

    Parameters
    ----------
    density
        Shape (X, Y, Z) in angstrom**-3.
    cell
        Lattice vectors as rows, shape (3, 3), in angstrom.
    count
        Known number of nuclei: only the deepest are kept. Fewer may be found.
    filter
        From `NucleiFilter.fit`. None takes the bare minima, and then give `count`:
        voids are minima, too, and only a filter tells them from nuclei.
    min_depth
        Smallest depth of a nucleus; 1 is a typical (bare: an empty) core, 0 the mean.
    min_distance
        Of two nuclei closer than this the shallower is dropped, in angstrom. In
        the bundled lithium no two come closer than 1.88.

    Returns
    -------
    np.ndarray
        Positions with shape (n, 3) in angstrom, within the cell; n = 0 where the density is
        not finite or its mean not positive, as in a rollout that went astray.

    Raises
    ------
    ShapeError
        If density, cell or count make no sense.
    """
    density, cell = np.asarray(density, float), np.asarray(cell, float)
    _check(density, cell, count)
    mean = density.mean() if np.isfinite(density).all() else 0.0
    if mean <= 0:
        return np.empty((0, 3))
    modes = filter.modes(density, cell) if filter else _modes(density) / -mean
    field = fft.irfftn(modes, density.shape, norm="forward")
    # between the points a maximum is higher than on them
    is_peak = (field == maximum_filter(field, 3, mode="wrap")) & (field > min_depth / 2)
    peaks = np.argwhere(is_peak)
    peaks = peaks[np.argsort(-field[is_peak], kind="stable")][: 2 * count if count else None]
    if not len(peaks):
        return np.empty((0, 3))
    depth, s = _climb(modes, density.shape, peaks / density.shape, cell)
    order = np.argsort(-depth, kind="stable")
    order = order[depth[order] >= min_depth]
    return _apart(s[order] % 1.0, cell, min_distance)[:count] @ cell


def _check(density: np.ndarray, cell: np.ndarray, count: int | None) -> None:
    if density.ndim != 3 or min(density.shape) < 4:
        raise ShapeError(
            f"nuclei need a density of shape (X, Y, Z), 4 points or more each, not "
            f"{density.shape}; pass one frame, or give several to track_nuclei"
        )
    if cell.shape != (3, 3) or not abs(np.linalg.det(cell)) > 0:
        raise ShapeError(f"cell {cell.tolist()} is no cell; give 3 lattice vectors as rows")
    if count is not None and count < 1:
        raise ShapeError(f"count={count} nuclei cannot be found; give 1 or more, or None")


def _climb(
    modes: np.ndarray, shape: tuple[int, ...], s: np.ndarray, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Depth (n,) and fractions (n, 3) of the maxima above the starting points s (n, 3)."""
    inverse, voxel = np.linalg.inv(cell), np.linalg.norm(cell, axis=1) / shape
    for _ in range(_NEWTON_STEPS):
        depth, gradient, hessian = _taylor(modes, shape[2], s, cell)
        curvature, axes = np.linalg.eigh(hessian)
        # |curvature| goes uphill from saddles, too; the bound keeps flat directions from flying
        curvature = np.maximum(abs(curvature), 1e-3 * abs(curvature).max(axis=1, keepdims=True))
        along = np.einsum("nca,nc->na", axes, gradient) / (curvature + 1e-300)
        step = np.einsum("nca,na->nc", axes, along)
        length = np.linalg.norm(step, axis=1, keepdims=True)
        s = s + step * np.minimum(1, 0.5 * min(voxel) / (length + 1e-300)) @ inverse
        if length.max() < 1e-5:
            break
    return depth, s


def _apart(s: np.ndarray, cell: np.ndarray, min_distance: float) -> np.ndarray:
    """Greedy choice of fractions (n, 3), in order, no two closer than the distance."""
    distance = np.linalg.norm(minimum_image(s[:, None] - s, cell), axis=-1)
    kept: list[int] = []
    for i, row in enumerate(distance):
        if (row[kept] >= min_distance).all():
            kept.append(i)
    return s[kept]


def match_nuclei(
    found: np.ndarray, reference: np.ndarray, cell: np.ndarray, radius: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Pair found nuclei with known ones, one to one, with the smallest total distance.

    Parameters
    ----------
    found, reference
        Shapes (n, 3) and (m, 3) in angstrom, wrapped or not.
    cell
        Lattice vectors as rows, shape (3, 3), in angstrom.
    radius
        Farthest that counts as a hit, in angstrom: a quarter of the shortest
        distance between two nuclei, so that a hit cannot mean another nucleus.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        hits, the row of `found` for each row of `reference`, -1 if missed, shape (m,), and the
        distances in angstrom, NaN if missed, shape (m,).
    """
    reference = np.asarray(reference, float)
    reach = np.full(len(reference), radius)
    pairs, vectors = assign(np.asarray(found, float), reference, cell, reach)
    return pairs, np.linalg.norm(vectors, axis=1)


def assign(
    found: np.ndarray, expected: np.ndarray, cell: np.ndarray, reach: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pair found nuclei with expected positions, one to one, with the smallest total distance.

    Parameters
    ----------
    found
        Shape (n, 3) in angstrom, wrapped or not.
    expected
        Shape (m, 3) in angstrom, wrapped or not; NaN where nothing is expected.
    cell
        Lattice vectors as rows, shape (3, 3), in angstrom.
    reach
        Farthest that a nucleus may be from each position, shape (m,), in angstrom.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        The row of `found` for each position, -1 if none is within reach, shape (m,), and the
        shortest vectors from the positions to them in angstrom, NaN if none, shape (m, 3).
    """
    pairs, vectors = np.full(len(expected), -1), np.full((len(expected), 3), np.nan)
    difference = (found[None] - expected[:, None]) @ np.linalg.inv(cell)
    difference = minimum_image(difference, cell)
    distance = np.linalg.norm(difference, axis=-1)
    # beyond reach (or unknown) all are equally bad, so that they do not push others away
    cost = np.where(distance <= reach[:, None], distance, 1e3 * (1 + reach.max(initial=0)))
    rows, columns = linear_sum_assignment(cost)
    hit = distance[rows, columns] <= reach[rows]
    rows, columns = rows[hit], columns[hit]
    pairs[rows], vectors[rows] = columns, difference[rows, columns]
    return pairs, vectors
