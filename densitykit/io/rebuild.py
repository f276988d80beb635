"""Stores rewritten as a whole: longer, as long as their frames, packed, with a moving cell.

A neighbour is built and takes the place of the store when it is complete; a kill leaves the old.
Another process that writes the store is not disturbed: it holds the lock, and this is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from densitykit.io.schema import checked_arrays, count_committed
from densitykit.io.store import (
    Lock,
    PathLike,
    fault,
    fresh,
    history,
    locate,
    real,
    rebuilt,
    recover,
    swap,
)
from densitykit.io.writer import CODECS, FIELDS, TrajectoryWriter, allocate

__all__ = ["extend_trajectory", "free_cell", "pack_trajectory", "trim_trajectory"]


def extend_trajectory(path: PathLike, n_frames: int) -> TrajectoryWriter:
    """Lengthen a trajectory to `n_frames` and return a new writer for it.

    Parameters
    ----------
    path
        The group of the trajectory.
    n_frames
        The new length, larger than the present one.

    Raises
    ------
    TrajectoryError
        The store is missing or broken, or `n_frames` does not lengthen it.
    """
    path = Path(path)
    length = TrajectoryWriter(path).n_frames
    if n_frames <= length:
        raise fault(path, "time", f"n_frames={n_frames} is no longer than {length}", "use more")
    _resize(path, n_frames, f"extended to {n_frames} frames")
    return TrajectoryWriter(path)


def trim_trajectory(path: PathLike) -> int:
    """Cut what was preallocated and not used; returns the number of frames that are left.

    A store without committed frames stays as it is. TrajectoryError if missing or broken.
    """
    writer = TrajectoryWriter(path)
    if 0 < writer.n_committed < writer.n_frames:
        _resize(writer.path, writer.n_committed, f"trimmed to {writer.n_committed} frames")
    return writer.n_committed


def _resize(path: Path, n_frames: int, event: str) -> None:
    with rebuilt(path, event) as group:
        for _, array in group.arrays():
            if array.metadata.dimension_names[0] == "time":
                array.resize((n_frames, *array.shape[1:]))  # replaces the link to zarr.json


def free_cell(path: PathLike) -> TrajectoryWriter:
    """Let the cell move: `cell` gets a value for each frame, so far the one of all.

    Raises
    ------
    TrajectoryError
        The store is missing or broken.
    """
    writer = TrajectoryWriter(path)
    with rebuilt(writer.path, "a cell for each frame") as group:
        cell = group["cell"][:]
        if cell.ndim == 2:
            sizes = {"time": writer.n_frames, "vector": len(cell), "cartesian": len(cell)}
            del group["cell"]
            allocate(group, "cell", sizes, len(cell), moving_cell=True)
            group["cell"][: writer.n_committed] = np.broadcast_to(
                cell, (writer.n_committed, *cell.shape)
            )
    return TrajectoryWriter(path)


def pack_trajectory(path: PathLike, frames_per_shard: int = 64) -> None:
    """Rewrite a finished trajectory with many frames in one file, for keeping and copying.

    Only committed frames are kept, the density in shards (each frame stays a chunk of its own,
    so reading is as before). A packed store is not meant to be appended to: every append would
    rewrite a shard.

    Parameters
    ----------
    path
        The group of the trajectory.
    frames_per_shard
        Frames in one file.

    Raises
    ------
    TrajectoryError
        The store is missing or broken.
    """
    with Lock(path):
        recover(Path(path))
        arrays = checked_arrays(locate(path))
        count = count_committed(Path(path), arrays["time"])
        attrs = dict(zarr.open_group(path, mode="r").attrs)
        attrs["history"] = history(f"packed {count} frames", attrs.get("history"))
        new = fresh(real(path), "new")
        group = zarr.open_group(new, mode="w-", attributes=attrs)
        for name, array in arrays.items():
            _pack(group, name, array, count, frames_per_shard)
        swap(new, real(path))


def _pack(group: zarr.Group, name: str, array: zarr.Array, count: int, per_shard: int) -> None:
    """Write one array of `count` frames, the density in shards."""
    moves = array.metadata.dimension_names[0] == "time"
    length = count if moves else array.shape[0]
    shape = (length, *array.shape[1:])
    sharded = {"chunks": (1, *shape[1:]), "shards": (per_shard, *shape[1:])}
    new = group.create_array(
        name,
        shape=shape,
        dtype=array.dtype,
        fill_value=array.fill_value,
        compressors=[CODECS["packed"], Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=array.metadata.dimension_names,
        attributes=dict(array.attrs),
        config={"write_empty_chunks": name not in FIELDS},
        **(sharded if name in FIELDS else {"chunks": shape}),
    )
    step = per_shard if moves else length
    for start in range(0, length, step):
        new[start : start + step] = array[start : min(start + step, length)]
