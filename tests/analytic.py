"""Made-up runs that tests share: fields in memory, and Gaussians that ride on moving atoms."""

from __future__ import annotations

import numpy as np
import xarray as xr

from densitykit.units import KELVIN, atomic_masses

HEXAGONAL = np.array([[5.0, 0, 0], [-2.5, 2.5 * np.sqrt(3), 0], [0, 0, 6.0]])


def run_of(
    density: np.ndarray,
    time_step: float = 2.0,
    cell: np.ndarray | float = 6.0,
    start: float = 0.0,
    **atoms: np.ndarray,
) -> xr.Dataset:
    """Equally spaced frames (time, x, y, z) in memory; a number is the edge of a cube.

    ``atoms``: numbers (atom,), positions and velocities (time, atom, 3).
    """
    cell = cell * np.eye(3) if np.ndim(cell) == 0 else np.asarray(cell, float)
    dims = ("time", *("x", "y", "z")[: density.ndim - 1])
    variables = {"density": (dims, np.asarray(density, np.float32))}
    variables["cell"] = (("vector", "cartesian"), cell)
    for name, values in atoms.items():
        lead = () if name == "numbers" else ("time",)
        tail = () if name == "numbers" else ("cartesian",)
        variables[name] = ((*lead, "atom", *tail), np.asarray(values))
    run = xr.Dataset(variables, {"time": start + time_step * np.arange(len(density))})
    run.encoding["source"] = "runs/li.zarr"
    return run


def gaussians(
    positions: np.ndarray,
    cell: np.ndarray,
    grid: tuple[int, ...],
    charges: np.ndarray,
    width: float = 0.7,
) -> np.ndarray:
    """Periodic Gaussians at positions (atom, 3), a Fourier series: exact counts, (X, Y, Z)."""
    index = np.stack(np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in grid), indexing="ij"), -1)
    q = 2 * np.pi * index @ np.linalg.inv(cell).T
    modes = np.exp(-1j * q @ np.asarray(positions).T) @ np.asarray(charges, float)
    modes *= np.exp(-((q * width) ** 2).sum(-1) / 2)
    return np.fft.ifftn(modes).real * np.prod(grid) / abs(np.linalg.det(cell))


def thermal(numbers: np.ndarray, kelvin: float, seed: int = 0) -> np.ndarray:
    """Velocities (atom, 3) in angstrom/fs of exactly this temperature, at rest as a whole."""
    masses = atomic_masses(numbers)[:, None]
    v = np.random.default_rng(seed).normal(size=(len(masses), 3)) / np.sqrt(masses)
    v -= (masses * v).sum(axis=0) / masses.sum()
    found = (masses * v**2).sum() / (3 * (len(v) - 1)) / KELVIN
    return v * np.sqrt(kelvin / found)


def moving_atoms(
    numbers: np.ndarray,
    frames: int = 40,
    time_step: float = 2.0,
    cell: np.ndarray | float = 6.0,
    grid: tuple[int, ...] = (8, 8, 8),
    kelvin: float = 300.0,
    seed: int = 0,
) -> xr.Dataset:
    """Atoms in uniform motion from random places, each with a Gaussian of two electrons.

    The sites are those of a mesh, so that no two atoms are close.
    """
    cell = cell * np.eye(3) if np.ndim(cell) == 0 else np.asarray(cell, float)
    numbers, rng = np.asarray(numbers), np.random.default_rng(seed)
    mesh = int(np.ceil(len(numbers) ** (1 / 3)))
    sites = np.stack(np.meshgrid(*[np.arange(mesh) / mesh] * 3, indexing="ij"), -1).reshape(-1, 3)
    first = rng.permutation(sites)[: len(numbers)] @ cell + rng.normal(0, 0.1, (len(numbers), 3))
    velocities = np.broadcast_to(thermal(numbers, kelvin, seed), (frames, len(numbers), 3))
    positions = first + time_step * np.arange(frames)[:, None, None] * velocities
    charges = np.full(len(numbers), 2.0)
    density = np.stack([gaussians(x, cell, grid, charges) for x in positions])
    return run_of(
        np.maximum(density, 0),
        time_step,
        cell,
        numbers=numbers,
        positions=positions,
        velocities=velocities,
    )
