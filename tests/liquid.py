"""A synthetic liquid, all of whose parts are known.

Eight nuclei repel one another, and Verlet's method moves them. Each carries a Gaussian cloud,
which takes electrons from the others where it is crowded: a residual of 3 % for the superposition.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import xarray as xr

from densitykit.units import ACCELERATION, KELVIN

EDGE, MASS, STEP = 7.0, 6.94, 6.0  # angstrom, dalton, fs
CELL = EDGE * np.eye(3)
CUTOFF, HEIGHT = 3.4, 4.0  # of the pair potential, angstrom and eV
FORCE_FIELD = {"cutoff": CUTOFF, "pair": 4, "radial": 2, "degree": 1}


def pair_forces(x) -> np.ndarray:
    """-grad of the sum of HEIGHT cos(pi r / 2 CUTOFF)**4 over pairs, shape (N, 3)."""
    v = x[:, None] - x
    v -= EDGE * np.round(v / EDGE)
    r = np.linalg.norm(v, axis=-1) + np.eye(len(x))
    u = np.minimum(np.pi * r / (2 * CUTOFF), np.pi / 2)
    push = HEIGHT * 4 * np.cos(u) ** 3 * np.sin(u) * np.pi / (2 * CUTOFF) / r
    return (push[:, :, None] * v).sum(axis=1)


def verlet(frames, kelvin, seed) -> tuple[np.ndarray, ...]:
    """Positions, velocities and forces, each (frames, 8, 3), 6 fs apart."""
    rng = np.random.default_rng(seed)
    x = EDGE / 2 * np.stack(np.meshgrid(*[[0.0, 1.0]] * 3), axis=-1).reshape(8, 3)
    x += rng.normal(0, 0.2, x.shape)
    v = rng.normal(0, np.sqrt(KELVIN * kelvin / MASS), x.shape)
    v, f, path = v - v.mean(axis=0), pair_forces(x), []
    for _ in range(40 + frames):
        path.append((x, v, f))
        half = v + STEP / 2 * ACCELERATION / MASS * f
        x = x + STEP * half
        f = pair_forces(x)
        v = half + STEP / 2 * ACCELERATION / MASS * f
    return tuple(np.stack(y) for y in zip(*path[40:], strict=True))


def clouds(x, n, width) -> np.ndarray:
    """Periodic Gaussians at (*, N, 3) on n**3 points."""
    d = EDGE * np.arange(n) / n - x[..., None]
    d = (d - EDGE * np.round(d / EDGE))[..., None] + EDGE * np.array([-1, 0, 1])
    g = np.exp(-(d**2) / (2 * width**2)).sum(axis=-1)
    return np.einsum("...ax,...ay,...az->...xyz", *(g[..., c, :] for c in range(3)))


def density_of(x, n=16) -> np.ndarray:
    """One electron a nucleus."""
    crowd, space = clouds(x, n, 1.2), (-3, -2, -1)
    rho = clouds(x, n, 0.7) * (0.7 + 0.3 * crowd / crowd.mean(space, keepdims=True))
    return rho / rho.mean(space, keepdims=True) * x.shape[-2] / EDGE**3


@cache
def liquid_run(frames=40, n=16, kelvin=1200.0, seed=0) -> xr.Dataset:
    """A trajectory in memory."""
    x, v, f = verlet(frames, kelvin, seed)
    dims = ("time", "atom", "cartesian")
    atoms = {"positions": (dims, x), "velocities": (dims, v), "forces": (dims, f)}
    density = {"density": (("time", "x", "y", "z"), density_of(x, n))}
    cell = {"cell": (("vector", "cartesian"), CELL), "numbers": ("atom", np.full(8, 3))}
    return xr.Dataset(density | atoms | cell, {"time": STEP * np.arange(frames)})
