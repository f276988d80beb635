"""Stores rewritten as a whole: longer, cut, packed, with a moving cell, in the present format.

A neighbour is built and takes the place of the store when it is complete; a kill leaves the old.
Another process that writes the store is not disturbed: it holds the lock, and this is refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from densitykit.io.durable import read
from densitykit.io.metadata import metadata_problems, seal, seal_root
from densitykit.io.schema import SCHEMA_VERSION, checked_arrays, count_committed
from densitykit.io.store import (
    SYNCED,
    Lock,
    PathLike,
    fault,
    fresh,
    history,
    locate,
    real,
    recover,
    runs,
    swap,
)
from densitykit.io.writer import CODECS, FIELDS, TrajectoryWriter, allocate

__all__ = [
    "extend_trajectory",
    "free_cell",
    "pack_trajectory",
    "trim_trajectory",
    "upgrade_trajectory",
]


@contextmanager
def rebuilt(path: PathLike, event: str) -> Iterator[zarr.Group]:
    """Give a copy to change; when that is done, it takes the place of the store.

    A change of several variables in place would leave a store with conflicting lengths if
    killed between two of them. In the copy the data are hard links (copies where the file
    system has none); zarr replaces files, so that the store does not see the change.
    """
    with Lock(path):
        path = real(path)
        new = fresh(path, "new")
        shutil.copytree(path, new, copy_function=_link, ignore=lambda *_: [SYNCED])
        group = zarr.open_group(new, mode="r+")
        yield group
        group.attrs["history"] = history(event, group.attrs.get("history"))
        seal(new)
        swap(new, path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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


def _resize(path: PathLike, n_frames: int, event: str) -> None:
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
        cell = read(group["cell"], slice(None))
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
    with _new_group(path) as (group, arrays, count):
        group.attrs["history"] = history(f"packed {count} frames", group.attrs.get("history"))
        for name, array in arrays.items():
            moves = array.metadata.dimension_names[0] == "time"
            shape = (count if moves else array.shape[0], *array.shape[1:])
            layout = {"chunks": (1, *shape[1:]), "shards": (frames_per_shard, *shape[1:])}
            layout = layout if name in FIELDS else {"chunks": shape}
            codecs = [CODECS["packed"], Crc32cCodec()]
            _copy(group, name, array, count, shape, compressors=codecs, **layout)


def upgrade_trajectory(path: PathLike) -> list[str]:
    """Rewrite a store, or its runs, in the present version of the format; nothing else changes.

    A checksum that does not fit metadata, which somebody has edited, is put right, too.

    Parameters
    ----------
    path
        The group of a trajectory, or a root group with runs.

    Returns
    -------
    list of str
        The runs that were rewritten. Empty: all were in the present version.

    Raises
    ------
    TrajectoryError
        The store is missing or broken.
    """
    path = locate(path)
    if runs(path) != ["."]:
        done = [name for name in runs(path) if upgrade_trajectory(path / name)]
        seal_root(path)
        return done
    attrs = zarr.open_group(path, mode="r").attrs
    if attrs.get("schema_version") == SCHEMA_VERSION and not metadata_problems(path):
        return []
    if attrs.get("schema_version") == SCHEMA_VERSION:
        with rebuilt(path, "changed metadata accepted"):
            return ["."]
    with _new_group(path, accept=True) as (group, arrays, count):
        event = f"format {SCHEMA_VERSION}, was {attrs.get('schema_version')}"
        group.attrs["schema_version"] = SCHEMA_VERSION
        group.attrs["history"] = history(event, attrs.get("history"))
        for name, array in arrays.items():
            codecs = [c for c in array.compressors if not isinstance(c, Crc32cCodec)]
            layout = {"chunks": array.chunks, "shards": array.shards, "filters": array.filters}
            layout["compressors"] = [*codecs, Crc32cCodec()]
            _copy(group, name, array, count, array.shape, **layout)
    return ["."]


@contextmanager
def _new_group(
    path: PathLike, *, accept: bool = False
) -> Iterator[tuple[zarr.Group, dict[str, zarr.Array], int]]:
    """Give a group to fill, that takes the place of a store, its arrays, and how many frames."""
    with Lock(path):
        recover(Path(path))
        arrays = checked_arrays(locate(path), accept=accept)
        count = count_committed(Path(path), arrays)
        attrs = dict(zarr.open_group(path, mode="r").attrs)
        new = fresh(real(path), "new")
        yield zarr.open_group(new, mode="w-", attributes=attrs), arrays, count
        seal(new)
        swap(new, real(path))


def _copy(
    group: zarr.Group,
    name: str,
    array: zarr.Array,
    count: int,
    shape: tuple[int, ...],
    **layout: Any,
) -> None:
    """Write the `count` committed frames of an array, or all of a constant one, and compare."""
    new = group.create_array(
        name,
        shape=shape,
        dtype=array.dtype,
        fill_value=array.fill_value,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=array.metadata.dimension_names,
        attributes=dict(array.attrs) | ({} if name in FIELDS else {"always_written": 1}),
        config={"write_empty_chunks": name not in FIELDS},
        **layout,
    )
    stop = count if array.metadata.dimension_names[0] == "time" else array.shape[0]
    step = (new.shards or new.chunks)[0]
    if not stop and name not in FIELDS:
        new[:step] = new.fill_value
    for start in range(0, stop, step):
        values = read(array, slice(start, min(start + step, stop)))
        new[start : start + len(values)] = values
        if new[start : start + len(values)].tobytes() != values.tobytes():
            raise fault(group.store_path, name, "not read as written", "look at the disk")
