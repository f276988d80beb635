r"""Nuclei followed in time, from frames of the density alone, and how hot they are.

`densitykit.analysis.nuclei` finds positions without names, within the cell, and may miss some. A
nucleus seen at x, and displaced by u a frame, is expected after n frames at

.. math:: x + \min(n, 3)\, u :

it coasts for three frames, since velocities last a few, then waits. In each frame the expected
positions and the nuclei found are paired one to one, with the smallest total distance (the
assignment problem, Kuhn 1955), through the nearest images: the paths come out unwrapped.

**Temperature.** From positions with white noise :math:`\sigma_x`, over n steps of length t,

.. math:: \langle |x_{+n} - x|^2 \rangle / (nt)^2 = \langle v^2 \rangle - (nt)^2\langle a^2
   \rangle/12 + (nt)^4 \langle \dot a^2 \rangle / 360 + 6 \sigma_x^2/(nt)^2 + \ldots :

differencing hides fast motion, noise adds some. Several n tell the terms apart.
Lengths are in angstrom, times in fs, masses in dalton, temperatures in K.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from densitykit.analysis.nuclei import NucleiFilter, assign, find_nuclei
from densitykit.cells import single_cell
from densitykit.errors import ShapeError
from densitykit.io.progress import progress_bar
from densitykit.units import KELVIN

__all__ = [
    "ImpliedTemperature",
    "TrackedNuclei",
    "implied_temperature",
    "kinetic_temperature",
    "track_nuclei",
]


@dataclass(frozen=True)
class TrackedNuclei:
    """Nuclei followed in time: unwrapped positions (T, N, 3), angstrom, and what was seen (T, N).

    Where a nucleus was not seen, its position is linear between the frames that saw it, and NaN
    before the first and after the last of them.
    """

    positions: np.ndarray
    seen: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """Number of nuclei seen in each frame, shape (T,)."""
        return self.seen.sum(axis=1)

    @property
    def measured(self) -> np.ndarray:
        """Positions without the interpolated ones, which are NaN; shape (T, N, 3)."""
        return np.where(self.seen[..., None], self.positions, np.nan)


def track_nuclei(
    densities: Iterable[np.ndarray],
    cell: np.ndarray,
    count: int,
    filter: NucleiFilter | None = None,
    reach: float = 1.0,
    progress: bool = True,
    **options: float,
) -> TrackedNuclei:
    """Follow the nuclei of a trajectory, one frame in memory at a time.

    Each nucleus is sought around its last position plus its last displacement. If not seen, it
    coasts for three frames, then waits; its reach grows with the square root of the frames
    missed, as diffusion does. A nucleus in nobody's reach begins a track that has not begun
    yet, or is dropped.

    Parameters
    ----------
    densities
        Frames with shape (X, Y, Z) in angstrom**-3: an array or xarray.DataArray
        (T, X, Y, Z), lazy or not, or any iterable.
    cell
        Lattice vectors as rows, shape (3, 3), in angstrom.
    count
        Number of nuclei.
    filter
        From `NucleiFilter.fit`; None takes the bare minima.
    reach
        Farthest from its expected position that a nucleus is taken for the same, in
        angstrom; at most half the shortest distance between two.
    progress
        Show a bar if it takes more than two seconds.
    **options
        `min_depth` and `min_distance` of `find_nuclei`.

    Returns
    -------
    TrackedNuclei
        Positions and which of them were seen, for every frame and N = count nuclei.

    Raises
    ------
    ShapeError
        If a frame, cell or count make no sense.
    """
    cell = single_cell(cell, "tracking")
    bar = progress_bar(densities, "nuclei", unit="frame", delay=2, disable=not progress)
    frames = [find_nuclei(np.asarray(f), cell, count, filter, **options) for f in bar]
    paths = np.full((len(frames), count, 3), np.nan)
    last, velocity = np.full((2, count, 3), np.nan)
    missed = np.ones(count)
    for now, found in zip(paths, frames, strict=True):
        expected = last + np.nan_to_num(velocity) * np.minimum(missed, 3)[:, None]
        pairs, vectors = assign(found, expected, cell, reach * np.sqrt(missed))
        hit = pairs >= 0
        now[hit] = expected[hit] + vectors[hit]
        # nuclei that nobody claimed go to tracks that have not begun
        left = np.delete(found, pairs[hit], axis=0)
        unused = np.flatnonzero(np.isnan(last[:, 0]))[: len(left)]
        now[unused] = left[: len(unused)]
        seen = np.isfinite(now[:, 0])
        velocity[seen] = (now[seen] - last[seen]) / missed[seen, None]
        last[seen] = now[seen]
        missed = np.where(seen, 1, missed + 1)
    table = pd.DataFrame(paths.reshape(len(paths), -1))
    filled = table.interpolate(limit_area="inside").to_numpy().reshape(paths.shape)
    return TrackedNuclei(filled, np.isfinite(paths[..., 0]))


@dataclass(frozen=True)
class ImpliedTemperature:
    """Corrected and naive (central differences) temperature in K, and what the noise is.

    `noise` is the deviation of a component of the positions in angstrom (0: not resolved), and
    `noise_bias` what it adds to the naive temperature, m noise**2 / (2 t**2 k_B), in K.
    """

    temperature: float
    naive: float
    noise: float
    noise_bias: float


def implied_temperature(
    positions: np.ndarray, masses: np.ndarray | float, time_step: float
) -> ImpliedTemperature:
    """Mean temperature of nuclei that were only seen, from displacements over 1 to 4 steps.

    The four terms in the module docstring are solved for, which leaves less than 0.5 % for the
    bundled lithium every 6 or 12 fs (central differences over 12 fs miss 6.5 %). An error that
    persists from frame to frame is no noise: bare minima move too little, and are 7 % too
    cold. The centre of mass is held. A Verlet integrator's velocities are central differences,
    too: it reports a little less.

    Parameters
    ----------
    positions
        Unwrapped, shape (T, N, 3), in angstrom; NaN where not seen
        (`TrackedNuclei.measured`).
    masses
        One or all, shape (N,), in dalton, see `densitykit.units.atomic_masses`.
    time_step
        Between frames, in fs.

    Raises
    ------
    ShapeError
        If there are fewer than 5 frames or 2 atoms, or too few were seen.
    """
    positions = np.asarray(positions, float)
    if positions.ndim != 3 or len(positions) < 5 or positions.shape[1] < 2 or time_step <= 0:
        raise ShapeError(
            f"no temperature from positions {positions.shape} every {time_step} fs; "
            "give 5 frames or more of 2 atoms or more, and a positive time step"
        )
    weights = np.broadcast_to(np.asarray(masses, float), positions.shape[1])
    n = np.arange(1.0, 5.0)
    moved = [positions[int(i) :] - positions[: -int(i)] for i in n]
    t_n = np.array([_thermal(x, weights) for x in moved]) / (n * time_step) ** 2
    if not np.isfinite(t_n).all():
        raise ShapeError("no nucleus was seen 4 steps apart; use frames with more nuclei found")
    true, _, _, noise = np.linalg.solve(n[:, None] ** np.array([0.0, 2.0, 4.0, -2.0]), t_n)
    bias, mass = max(noise, 0.0) / 4, weights.mean()
    sigma = time_step * np.sqrt(2 * bias * KELVIN / mass)
    return ImpliedTemperature(float(true), float(t_n[1]), float(sigma), float(bias))


def kinetic_temperature(velocities: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Temperature of each frame in K: twice the kinetic energy over 3N - 3 times k_B.

    Parameters
    ----------
    velocities
        Shape (*, N, 3) in angstrom/fs; the motion of the centre of mass is taken out.
    masses
        Shape (N,) in dalton, see `densitykit.units.atomic_masses`.
    """
    weights = np.asarray(masses, float)[:, None]
    v = velocities - (weights * velocities).sum(axis=-2, keepdims=True) / weights.sum()
    freedom = max(3 * (len(weights) - 1), 1)
    return (weights * v**2).sum(axis=(-2, -1)) / (freedom * KELVIN)


def _thermal(moved: np.ndarray, masses: np.ndarray) -> float:
    """Mean of m |moved|**2 / (3 k_B) a free atom, centre of mass held; K fs**2."""
    seen = np.isfinite(moved[..., 0])
    mass = np.where(seen, masses, 0.0)[..., None]
    moved = np.where(seen[..., None], moved, 0.0)
    drift = (mass * moved).sum(axis=1) / np.maximum(mass.sum(axis=1), 1e-300)
    freedom = 3 * np.maximum(seen.sum(axis=1) - 1, 0).sum()
    energy = (mass * (moved - drift[:, None]) ** 2).sum()
    return energy / freedom / KELVIN if freedom else np.nan
