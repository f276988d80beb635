"""A trajectory in a few lines of text: frames, time, system, cell, what is known of the nuclei."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from densitykit.io.reader import open_trajectory
from densitykit.io.splits import read_splits
from densitykit.io.store import PathLike, locate, runs
from densitykit.units import KELVIN, SYMBOLS, atomic_masses

__all__ = ["cell_angles", "chemical_formula", "summarise"]


def summarise(path: PathLike) -> str:
    """Describe a trajectory, or each run of a store, and its splits."""
    names, splits = runs(locate(path)), read_splits(path)
    lines = [_summary(Path(path) / name) for name in names]
    parts = (f"{name} {s['run']}[{s['start']}:{s['stop']}]" for name, s in splits.items())
    return "\n".join([*lines, *([f"  splits: {', '.join(parts)}"] if splits else [])])


def _summary(path: Path) -> str:
    ds = open_trajectory(path)
    times, density = ds["time"].values, ds["density"]
    quantity, grid = density.attrs.get("quantity", "unknown"), map(str, density.shape[1:])
    lines = [f"{path}: {times.size} frames, {quantity} density on {' x '.join(grid)}", _cell(ds)]
    if times.size > 1:
        spacing = np.median(np.diff(times))
        lines.insert(1, f"time {times[0]:g} to {times[-1]:g} fs, every {spacing:g} fs")
    lines += _nuclei(ds)
    if times.size and "n_electrons" in ds:
        counts = ds["n_electrons"].values
        lines.append(f"electrons {counts.mean():.6f} +- {counts.std():.1e}")
    if clipped := density.attrs.get("n_clipped"):
        largest = density.attrs["clipped_electrons"]
        lines.append(f"{clipped} negative values clipped, up to {largest:.1e} electrons a frame")
    return "\n  ".join(lines)


def _cell(ds: xr.Dataset) -> str:
    cell, moving = ds["cell"].values, ""
    if cell.ndim == 3:
        volumes = np.abs(np.linalg.det(cell))
        moving = f", one for each frame, volume {volumes.min():.4g} to {volumes.max():.4g}"
        cell = cell.mean(axis=0)
    edges = ", ".join(f"{edge:.4f}" for edge in np.linalg.norm(cell, axis=1))
    angles = ", ".join(f"{angle:.2f}" for angle in cell_angles(cell))
    return f"cell edges {edges} angstrom{f', angles {angles} degrees' if angles else ''}{moving}"


def _nuclei(ds: xr.Dataset) -> list[str]:
    if "numbers" not in ds:
        return ["no atoms"]
    numbers = ds["numbers"].values
    known = [n for n in ("positions", "velocities", "forces", "energy") if ds[n].notnull().any()]
    named = (f"{n} ({ds[n].attrs['source']})" if "source" in ds[n].attrs else n for n in known)
    lines = [f"{chemical_formula(numbers)}, {numbers.size} atoms; known: {', '.join(named)}"]
    if "valence_charge" in ds:
        lines.append(f"valence charges {ds['valence_charge'].values.sum():g} in all")
    temperature = ds["temperature"].values
    if not np.isfinite(temperature).any() and "velocities" in known:
        masses, v = atomic_masses(numbers)[:, None], ds["velocities"].values
        v = v - (masses * v).sum(axis=1, keepdims=True) / masses.sum()
        freedom = v.shape[2] * max(1, numbers.size - 1)
        temperature = (masses * v**2).sum(axis=(1, 2)) / (freedom * KELVIN)
    temperature = temperature[np.isfinite(temperature)]
    if temperature.size:
        lines.append(f"temperature {temperature.mean():.1f} +- {temperature.std():.1f} K")
    return lines


def chemical_formula(numbers: ArrayLike) -> str:
    """Symbols and counts in the order of the atoms, such as Na8Cl8."""
    counts = Counter(np.asarray(numbers).tolist())
    return "".join(f"{SYMBOLS[z]}{n if n > 1 else ''}" for z, n in counts.items())


def cell_angles(cell: NDArray[np.floating]) -> list[float]:
    """Angles alpha, beta, gamma in degrees; of fewer than three dimensions, those there are."""
    unit = cell / np.linalg.norm(cell, axis=1, keepdims=True)
    pairs = {3: [(1, 2), (0, 2), (0, 1)], 2: [(0, 1)]}.get(len(cell), [])
    return [float(np.degrees(np.arccos(np.clip(unit[i] @ unit[j], -1, 1)))) for i, j in pairs]
