r"""Opening trajectories, lazily: the committed frames of a run, all runs of a store, a split.

The format is described in :mod:`densitykit.io.writer`. A chunk that is damaged or lost is an error
when it is read, also long after the store was opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from densitykit.io.durable import read
from densitykit.io.metadata import CHECKSUM
from densitykit.io.schema import checked_arrays, count_committed
from densitykit.io.splits import read_splits, split_problems
from densitykit.io.store import PathLike, fault, locate, plain_attributes, raise_any, runs

__all__ = ["open_runs", "open_split", "open_trajectory"]


class _Lazy(BackendArray):
    """An array of a store, read when and as far as it is asked for."""

    def __init__(self, array: zarr.Array) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> NDArray:
        level = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(
            key, self.shape, level, lambda part: read(self.array, *part)
        )


class _Stores(BackendEntrypoint):
    """What xarray asks for a dataset."""

    def open_dataset(self, filename_or_obj: Any, *, drop_variables: Any = None) -> xr.Dataset:
        """Open the committed frames; `TrajectoryError` where they break the schema."""
        path, ds = Path(filename_or_obj), xr.Dataset()
        arrays = checked_arrays(path)
        committed = {"time": slice(count_committed(path, arrays))}
        for name, array in arrays.items():
            dims, data = array.metadata.dimension_names, indexing.LazilyIndexedArray(_Lazy(array))
            chunks = dict(zip(dims, array.chunks, strict=True))
            variable = xr.Variable(dims, data, array.attrs, {"preferred_chunks": chunks})
            ds[name] = variable.isel(committed, missing_dims="ignore")
        ds.attrs = dict(zarr.open_group(path, mode="r").attrs)
        for variable in (ds, *ds.variables.values()):
            marks = {CHECKSUM: None, "always_written": None}  # of this store, not of the data
            variable.attrs = plain_attributes(variable.attrs | marks)
        return ds


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
        Variables as in :mod:`densitykit.io.writer`. A constant orthorhombic cell also gives the
        coordinates `x, y, z` in angstrom. `encoding["source"]` holds the path.

    Raises
    ------
    TrajectoryError
        There is no store, or it breaks the schema: the message names file, variable and fix.
    """
    path = locate(path)
    ds = xr.open_dataset(str(path), engine=_Stores, chunks=chunks)
    cell, attrs = ds["cell"].values, {"units": "angstrom"}
    tolerance = {"rtol": 0, "atol": 1e-9 * np.abs(cell).max(initial=0)}
    if cell.ndim == 2 and np.allclose(cell, np.diag(np.diag(cell)), **tolerance):
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
    splits = read_splits(path)
    if name not in splits:
        fix = f"choose one of {sorted(splits)}, or write it with write_splits"
        raise fault(path, "splits", f"there is no split {name!r}", fix)
    split = splits[name]
    raise_any(path, split_problems(path, {name: split}))
    ds = open_trajectory(path / split["run"], chunks=chunks)
    part = ds.isel(time=slice(split["start"], split["stop"])).assign_attrs(split=name)
    part.encoding["source"] = ds.encoding["source"]
    return part


def open_splits(path: PathLike, name: str, *, chunks: Any = None) -> list[xr.Dataset]:
    """Open the split `name`, or those of all runs, "train-32-300K" and so on; see `open_split`."""
    path = locate(path)
    found = [split for split in read_splits(path) if split.startswith(f"{name}-")]
    return [open_split(path, split, chunks=chunks) for split in found or [name]]
