"""Made-up runs of other elements and cells: Gaussian clouds on independent oscillators.

Masses, charges and temperature are known exactly: sodium in a cube, rock salt in an orthorhombic
box, and a hexagonal cell with two species.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import xarray as xr

from densitykit.cells import wave_vectors
from densitykit.units import ACCELERATION, KELVIN, atomic_masses

STEP, KELVINS = 5.0, 300.0  # fs, K
HEXAGONAL = np.array([[5.0, 0.0, 0.0], [-2.5, 5 * np.sqrt(3) / 2, 0.0], [0.0, 0.0, 6.0]])
CUBE = [[x, y, z] for x in (0.1, 0.6) for y in (0.1, 0.6) for z in (0.1, 0.6)]
ROCK_SALT = [11 if sum(corner) % 1 < 0.5 else 17 for corner in CUBE]
#: cell, atomic numbers, fractions, grid
SYSTEMS = {
    "sodium": (8.0 * np.eye(3), [11] * 8, CUBE, (16, 16, 16)),
    "nacl": (np.diag([5.6, 5.8, 6.0]), ROCK_SALT, CUBE, (12, 12, 14)),
    "hexagonal": (
        HEXAGONAL,
        [3, 3, 9],
        [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75], [1 / 3, 2 / 3, 0.7]],
        (12, 12, 16),
    ),
}
CHARGES = {3: 1.0, 9: 7.0, 11: 1.0, 17: 7.0}
WIDTHS = {3: 0.7, 9: 0.6, 11: 0.9, 17: 0.75}  # angstrom


def gaussians(positions, cell, numbers, shape) -> np.ndarray:
    """Periodic Gaussians, CHARGES electrons of WIDTHS each, (*, X, Y, Z) from (*, N, 3)."""
    q = wave_vectors(shape, cell)
    size = np.square(q).sum(axis=-1)
    modes = 0
    for a, z in enumerate(numbers):
        phase = np.exp(-1j * positions[..., a, :] @ q.reshape(-1, 3).T)
        form = CHARGES[z] * np.exp(-size * WIDTHS[z] ** 2 / 2)
        modes = modes + phase.reshape(*phase.shape[:-1], *shape) * form
    density = np.fft.ifftn(modes, axes=(-3, -2, -1)).real
    return density * np.prod(shape) / abs(np.linalg.det(cell))


@cache
def made_up_run(name: str, frames: int = 40, seed: int = 0, kelvins: float = KELVINS):
    """A trajectory in memory: density, positions, velocities, forces, energy, cell, numbers."""
    cell, numbers, fractions, shape = SYSTEMS[name]
    rng, n = np.random.default_rng(seed), len(numbers)
    mass = atomic_masses(numbers)[:, None]
    omega = 2 * np.pi / (150 + 100 * np.random.default_rng(7).random((n, 3)))  # rad/fs
    amplitude = np.sqrt(2 * KELVIN * kelvins / mass) / omega
    time = STEP * np.arange(frames)
    phase = omega * time[:, None, None] + 2 * np.pi * rng.random((n, 3))
    moved = amplitude * np.sin(phase)
    x = np.array(fractions) @ cell + moved
    v = amplitude * omega * np.cos(phase)
    atoms = ("time", "atom", "cartesian")
    springs = mass * omega**2 / ACCELERATION  # eV/angstrom**2
    run = xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), gaussians(x, cell, numbers, shape)),
            "positions": (atoms, x),
            "velocities": (atoms, v),
            "forces": (atoms, -springs * moved),
            "energy": ("time", (springs * moved**2).sum(axis=(1, 2)) / 2),
            "cell": (("vector", "cartesian"), cell),
            "numbers": ("atom", np.array(numbers)),
        },
        {"time": time},
    )
    run.encoding["source"] = f"runs/{name}.zarr"
    return run
