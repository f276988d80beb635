r"""Opening trajectories, lazily: the committed frames of a run, all runs of a store, a split.

The format is described in :mod:`densitykit.io.writer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from densitykit.io.schema import (
    PathLike,
    checked_arrays,
    count_committed,
    fault,
    locate,
    raise_any,
    runs,
    split_problems,
)

__all__ = [
    "open_runs",
    "open_split",
    "open_trajectory",
    "summarise",
]


def open_trajectory(path: PathLike, *, chunks: Any = None) -> xr.Dataset:
    """Open the committed frames of a trajectory, lazily.

    Parameters
    ----------
    path
        The group of the trajectory.
    chunks
        None reads through numpy (best for training); `{}` gives dask arrays, one chunk per
        frame (for analysis of what exceeds memory).

    Returns
    -------
    xarray.Dataset
        Variables as in the module docstring. An orthorhombic cell also gives the coordinates
        `x, y, z` in angstrom. `encoding["source"]` holds the path.

    Raises
    ------
    TrajectoryError
        There is no store, or it breaks the schema: the message names file, variable and fix.
    """
    path = locate(path)
    n_committed = count_committed(path, checked_arrays(path)["time"])
    ds = xr.open_zarr(
        str(path), chunks=chunks, consolidated=False, decode_times=False, mask_and_scale=False
    ).isel(time=slice(0, n_committed))
    cell, attrs = ds["cell"].values, {"units": "angstrom"}
    if np.allclose(cell, np.diag(np.diag(cell)), rtol=0, atol=1e-9 * np.abs(cell).max()):
        for dim, edge in zip(ds["density"].dims[1:], np.diag(cell), strict=True):
            if dim not in ds.coords:
                points = np.arange(ds.sizes[dim]) * (edge / ds.sizes[dim])
                ds = ds.assign_coords({dim: (dim, points, attrs)})
    ds.encoding["source"] = str(path)
    return ds


def open_runs(path: PathLike) -> list[xr.Dataset]:
    """Open all runs of a store, in the order of their names; see `open_trajectory`."""
    path = Path(path)
    return [open_trajectory(path / name) for name in runs(locate(path))]


def open_split(path: PathLike, name: str, *, chunks: Any = None) -> xr.Dataset:
    """Open the frames of one split, lazily; `attrs["split"]` holds its name.

    Parameters
    ----------
    path
        The root group, see `write_splits`.
    name
        The split.
    chunks
        As for `open_trajectory`, which also describes the result.

    Raises
    ------
    TrajectoryError
        There is no such split, or its frames are not there.
    """
    path = locate(path)
    splits = zarr.open_group(path, mode="r").attrs.get("splits", {})
    if name not in splits:
        fix = f"choose one of {sorted(splits)}, or write it with write_splits"
        raise fault(path, "splits", f"there is no split {name!r}", fix)
    split = splits[name]
    raise_any(path, split_problems(path, {name: split}))
    ds = open_trajectory(path / split["run"], chunks=chunks)
    part = ds.isel(time=slice(split["start"], split["stop"])).assign_attrs(split=name)
    part.encoding["source"] = ds.encoding["source"]
    return part


def summarise(path: PathLike) -> str:
    """Describe a trajectory, or each run of a store: frames, span, grid, cell, electrons."""
    names = runs(locate(path))
    if names != ["."]:
        return "\n".join(summarise(Path(path) / name) for name in names)
    ds = open_trajectory(path)
    times, grid = ds["time"].values, ds["density"].shape[1:]
    quantity = ds["density"].attrs.get("quantity", "unknown")
    lines = [f"{path}: {times.size} frames, {quantity} density on {' x '.join(map(str, grid))}"]
    if times.size > 1:
        spacing = np.median(np.diff(times))
        lines.append(f"  time {times[0]:g} to {times[-1]:g} fs, every {spacing:g} fs")
    edges = ", ".join(f"{edge:.4f}" for edge in np.linalg.norm(ds["cell"].values, axis=1))
    lines.append(f"  cell edges {edges} angstrom, {ds.sizes.get('atom', 0)} atoms")
    if times.size and "n_electrons" in ds:
        counts = ds["n_electrons"].values
        lines.append(f"  electrons {counts.mean():.6f} +- {counts.std():.1e}")
    return "\n".join(lines)
