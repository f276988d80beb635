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
from densitykit.units import KELVIN

__all__ = ["cell_angles", "chemical_formula", "summarise"]


def summarise(path: PathLike) -> str:
    """Describe a trajectory, or each run of a store, and its splits."""
    names, splits = runs(locate(path)), read_splits(path)
    lines = [_summary(Path(path) / name if names != ["."] else Path(path)) for name in names]
    if splits:
        parts = (f"{n} {s['run']}[{s['start']}:{s['stop']}]" for n, s in splits.items())
        lines.append(f"{'' if names != ['.'] else '  '}splits: {', '.join(parts)}")
    return "\n".join(lines)


def _summary(path: Path) -> str:
    ds = open_trajectory(path)
    times, grid = ds["time"].values, ds["density"].shape[1:]
    quantity = ds["density"].attrs.get("quantity", "unknown")
    lines = [f"{path}: {times.size} frames, {quantity} density on {' x '.join(map(str, grid))}"]
    if times.size > 1:
        spacing = np.median(np.diff(times))
        lines.append(f"  time {times[0]:g} to {times[-1]:g} fs, every {spacing:g} fs")
    lines += [_cell_line(ds), *_nuclei_lines(ds)]
    if times.size and "n_electrons" in ds:
        counts = ds["n_electrons"].values
        lines.append(f"  electrons {counts.mean():.6f} +- {counts.std():.1e}")
    if clipped := ds["density"].attrs.get("n_clipped"):
        electrons = ds["density"].attrs["clipped_electrons"]
        lines.append(
            f"  {clipped} negative values clipped, up to {electrons:.1e} electrons a frame"
        )
    return "\n".join(lines)


def _cell_line(ds: xr.Dataset) -> str:
    cell = ds["cell"].values
    if cell.ndim == 3:
        volumes = np.abs(np.linalg.det(cell)) if len(cell) else np.zeros(1)
        moving = f", one for each frame, volume {volumes.min():.4g} to {volumes.max():.4g}"
        cell = cell.mean(axis=0)
    else:
        moving = ""
    edges = ", ".join(f"{edge:.4f}" for edge in np.linalg.norm(cell, axis=1))
    angles = ", ".join(f"{angle:.2f}" for angle in cell_angles(cell))
    return f"  cell edges {edges} angstrom{f', angles {angles} degrees' if angles else ''}{moving}"


def _nuclei_lines(ds: xr.Dataset) -> list[str]:
    if "numbers" not in ds:
        return ["  no atoms"]
    numbers = ds["numbers"].values
    lines = [f"  {chemical_formula(numbers)}, {numbers.size} atoms"]
    if "valence_charge" in ds:
        lines[0] += f", valence charges {ds['valence_charge'].values.sum():g} in all"
    known = [n for n in ("positions", "velocities", "forces", "energy") if _given(ds, n)]
    sources = {n: ds[n].attrs["source"] for n in known if "source" in ds[n].attrs}
    known = [f"{n} ({sources[n]})" if n in sources else n for n in known]
    lines.append(f"  known: {', '.join(known) or 'nothing'}")
    if _given(ds, "temperature"):
        temperature = ds["temperature"].values
    elif _given(ds, "velocities"):
        temperature = _kinetic_temperature(ds)
    else:
        return lines
    temperature = temperature[np.isfinite(temperature)]
    lines.append(f"  temperature {temperature.mean():.1f} +- {temperature.std():.1f} K")
    return lines


def _given(ds: xr.Dataset, name: str) -> bool:
    return name in ds and bool(np.isfinite(ds[name].values).any())


def _kinetic_temperature(ds: xr.Dataset) -> NDArray[np.float64]:
    """Temperature in K, shape (time,), of velocities about that of the centre of mass."""
    from ase.data import atomic_masses

    masses = atomic_masses[ds["numbers"].values][:, None]
    v = ds["velocities"].values
    v = v - (masses * v).sum(axis=1, keepdims=True) / masses.sum()
    freedom = v.shape[2] * max(1, v.shape[1] - 1)
    return (masses * v**2).sum(axis=(1, 2)) / (freedom * KELVIN)


def chemical_formula(numbers: ArrayLike) -> str:
    """Symbols and counts in the order of the atoms, such as Na8Cl8."""
    from ase.data import chemical_symbols

    counts = Counter(np.asarray(numbers).tolist())
    return "".join(f"{chemical_symbols[z]}{n if n > 1 else ''}" for z, n in counts.items())


def cell_angles(cell: NDArray[np.floating]) -> list[float]:
    """Angles alpha, beta, gamma in degrees; of fewer than three dimensions, those there are."""
    unit = cell / np.linalg.norm(cell, axis=1, keepdims=True)
    pairs = {3: [(1, 2), (0, 2), (0, 1)], 2: [(0, 1)]}.get(len(cell), [])
    return [float(np.degrees(np.arccos(np.clip(unit[i] @ unit[j], -1, 1)))) for i, j in pairs]
