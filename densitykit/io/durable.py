"""Frames that outlast a loss of power: what is synced when, and what is put back afterwards.

A frame is its own file on the grid; all else is small, in chunks of many frames that each append
replaces. The system writes files to disk when it likes: after a loss of power those that nobody
waited for may be empty, old or gone, those of earlier frames too. Hence *syncing*: the densities
of the frames since the last time, then one file, `time/.synced`, which holds the last chunk of all
that is small, commit marks included. It is replaced in one piece, and removed on closing,
when everything has been synced itself.

Who opens a store that still has this file was preceded by a writer that did not come to its end.
If the machine has not been started since, nothing is lost. Else what the file holds is put back,
and later frames stay as far as they are whole.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any
from zipfile import BadZipFile

import numpy as np
import zarr
from google_crc32c import value as crc32c
from numcodecs import Blosc, Zstd
from numpy.typing import ArrayLike, NDArray
from zarr.codecs import BloscCodec, BloscShuffle, BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from densitykit.errors import TrajectoryError
from densitykit.io.store import (
    RESTORE,
    SYNCED,
    Lock,
    fault,
    load_arrays,
    replacing,
    save_arrays,
    sync,
    sync_tree,
)

__all__ = ["SHARE"]

#: of the time that a writer lives, the part that syncing may take
SHARE = 0.05
#: most frames that an array of one value a frame holds in a chunk
FRAMES = 1024


def boot() -> str:
    """Return a name for the time since the machine was started; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def is_small(array: zarr.Array) -> bool:
    """Whether an array has values for each frame, but not on the grid."""
    dims = array.metadata.dimension_names
    return dims[0] == "time" and "x" not in dims


def chunk_file(array: zarr.Array, frame: int) -> Path:
    """Return the file that holds a frame of an array."""
    size = (array.shards or array.chunks)[0]
    key = array.metadata.encode_chunk_key((frame // size, *[0] * (array.ndim - 1)))
    return Path(array.store.root) / array.path / key


def chunk_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the chunks of an array that are there, each with its number along the time."""
    for file in folder.glob("c.*[0-9]"):  # not those that zarr leaves when it is killed
        yield int(file.name.split(".")[1]), file


def written(array: zarr.Array) -> int:
    """Return up to where along its first dimension an array has chunks, or may have."""
    size, folder = (array.shards or array.chunks)[0], Path(array.store.root, array.path)
    if array.metadata.chunk_key_encoding.separator != ".":
        return array.shape[0]
    last = max((i for i, _ in chunk_files(folder)), default=-1)
    return min(array.shape[0], (last + 1) * size)


def read(array: zarr.Array, *key: Any) -> NDArray:
    """Read a part of an array, each index of `key` for itself.

    Raises
    ------
    TrajectoryError
        It cannot be read, or it is a density that is not there: file, variable and frame.
    """
    name = array.path or array.store.root.name
    with suppress(Exception):  # every codec raises its own
        values = _read_chunk(array, key)
        if values is None:
            listed = any(isinstance(k, np.ndarray) for k in key)
            values = array.oindex[key] if listed else array[key]
        few = values[..., :1] if values.ndim > 1 else values  # what is not there is NaN all over
        if name != "density" or not np.isnan(few).any():
            return values
    for i in map(int, np.arange(array.shape[0])[key[0]].reshape(-1)):
        file = chunk_file(array, i)
        where = f"{name}, frame {i}" if array.metadata.dimension_names[0] == "time" else name
        try:
            array[i]
        except Exception as error:  # see above
            raise fault(file, where, "the chunk cannot be decoded", RESTORE) from error
        if name == "density" and not file.is_file():
            raise fault(file, where, "the chunk is missing", RESTORE)
    return array.oindex[key]


def _read_chunk(array: zarr.Array, key: tuple[Any, ...]) -> NDArray | None:
    """Read a frame that is a chunk of its own, as zarr does; None where zarr has to.

    zarr's threads and the copy into a larger array take longer than decoding the frame.
    """
    (frame, *inner), decoders = key or (None,), _coders(array, _DECODERS)
    one = array.chunks == (1, *array.shape[1:]) and all(isinstance(k, slice) for k in inner)
    if not one or not decoders or not isinstance(frame, int | np.integer) or frame < 0:
        return None
    file = chunk_file(array, int(frame))
    if not file.is_file():
        return None
    data = file.read_bytes()
    for decode in reversed(decoders):
        data = decode(data)
    return np.frombuffer(data, array.dtype).reshape(array.shape[1:])[tuple(inner)].copy()


def _coders(array: zarr.Array, known: Mapping[type, Any]) -> list[Any] | None:
    """What of `known` belongs to the codecs of an array's chunks; None if that is not all."""
    into_bytes, *codecs = array.metadata.codecs
    found = [known.get(type(codec)) for codec in codecs]
    ours = into_bytes == BytesCodec() and array.dtype.isnative and not array.shards
    return found if ours and None not in found else None


def open_to_write(folder: Path) -> zarr.Array:
    """Open an array; a chunk of it is a file, also where all of it is unknown."""
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(folder, mode="r+")
        return zarr.open_array(SyncedFiles(folder), mode="r+") if array.shards else array


class SyncedFiles(LocalStore):
    """A store whose files are on disk before they take their names: for shards, see `pack`."""

    async def set(self, key: str, value: Buffer) -> None:
        self.set_sync(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        with replacing(self.root / key) as file:
            file.write(value.to_bytes())


def chunk_writer(array: zarr.Array) -> Callable[[int, NDArray], None]:
    """Return what writes the chunk that begins at a frame, as zarr does, bit for bit.

    zarr hands each chunk to threads of its own and waits: 2 ms, and a frame has seven. Chunks of
    codecs that our stores do not have are left to it.
    """
    encoders = _coders(array, _ENCODERS)
    if encoders is None:
        return lambda frame, values: array.__setitem__(slice(frame, frame + len(values)), values)
    steps = [make(codec) for make, codec in zip(encoders, array.metadata.codecs[1:], strict=True)]

    def write(frame: int, values: NDArray) -> None:
        whole = np.full(array.chunks, array.fill_value, array.dtype)
        whole[: len(values)] = values
        data = whole.reshape(-1).view(np.uint8)
        for encode in steps:
            data = encode(data)
        file = chunk_file(array, frame)
        partial = file.with_suffix(f".{secrets.token_hex(16)}.partial")  # zarr's name for one
        try:
            partial.write_bytes(data)
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    return write


def _blosc(codec: BloscCodec) -> Callable[[ArrayLike], bytes]:
    shuffle = list(BloscShuffle).index(codec.shuffle)
    names = {"cname": codec.cname.value, "clevel": codec.clevel, "blocksize": codec.blocksize}
    return Blosc(shuffle=shuffle, typesize=codec.typesize, **names).encode


def _with_checksum(data: ArrayLike) -> bytes:
    data = bytes(data)
    return data + crc32c(data).to_bytes(4, "little")


def _without_checksum(data: bytes) -> bytes:
    data, checksum = data[:-4], data[-4:]
    if crc32c(data) != int.from_bytes(checksum, "little"):
        raise ValueError("the checksum is wrong")
    return data


_ENCODERS = {
    BloscCodec: _blosc,
    ZstdCodec: lambda codec: Zstd(codec.level, codec.checksum).encode,
    Crc32cCodec: lambda codec: _with_checksum,
}
_DECODERS = {BloscCodec: Blosc().decode, ZstdCodec: Zstd().decode, Crc32cCodec: _without_checksum}


class Tail:
    """The last chunk of a variable with small values for each frame, kept and written in whole."""

    def __init__(self, array: zarr.Array, frame: int) -> None:
        self.array, self._write = array, chunk_writer(array)
        self._load(frame)

    def _load(self, frame: int) -> None:
        size = self.array.chunks[0]
        self.start = frame // size * size
        self.values = read(self.array, slice(self.start, self.start + size))
        self._written = chunk_file(self.array, self.start).is_file()

    def put(self, frame: int, value: ArrayLike) -> Path | None:
        """Write the value of a frame; returns the chunk before if that is now complete."""
        done = None
        if frame >= self.start + len(self.values):
            done = chunk_file(self.array, self.start)
            self._load(frame)
        row = self.values[frame - self.start]
        if not self._written or not np.array_equal(row, value, equal_nan=True):
            self._written = False  # until it is: a disk may be full
            self.values[frame - self.start] = value
            self._write(self.start, self.values)
            self._written = True
        return done


class Journal:
    """What a loss of power could still take of a store that is being written.

    Parameters
    ----------
    path
        The group of the trajectory.
    arrays
        All arrays of the group, by name.
    n_frames
        How many frames are committed.

    Attributes
    ----------
    n_frames, n_synced
        Frames that are committed, and those of them that a loss of power cannot take.
    """

    def __init__(self, path: Path, arrays: Mapping[str, zarr.Array], n_frames: int) -> None:
        self.n_frames = self.n_synced = n_frames
        self._file = path / "time" / SYNCED
        self._tails = {n: Tail(a, n_frames) for n, a in arrays.items() if is_small(a)}
        self._fields = {n: a for n, a in arrays.items() if "x" in a.metadata.dimension_names}
        self._writers = {name: chunk_writer(array) for name, array in self._fields.items()}
        self._unsynced: set[Path] = set()
        self._begun, self._process = False, os.getpid()
        self._opened, self._spent = perf_counter(), 0.0
        if self._file.is_file():  # of a writer that was killed
            self.n_synced = int(load_arrays(self._file)["n"])
            for frame in range(self.n_synced, n_frames):
                for array in arrays.values():
                    self._wrote(chunk_file(array, frame))

    def _wrote(self, file: Path) -> None:
        if file.is_file():
            self._unsynced.add(file)

    def commit(self, values: Mapping[str, ArrayLike], durable: bool | None) -> None:
        """Write a frame, its time last, and sync if it is time to.

        Parameters
        ----------
        values
            Of all variables with one value for each frame, on the grid or small.
        durable
            Sync in any case (True), in no case (False), or if `SHARE` allows it (None).
        """
        if not self._begun:
            self._secure()  # what this frame will replace
            self._begun = True
        frame = self.n_frames
        self._put("time", np.nan)  # a new chunk, if any: that one of marks is lost must show
        for name, array in self._fields.items():
            self._writers[name](frame, np.asarray(values[name])[None])
            self._wrote(chunk_file(array, frame))
        for name in (self._tails.keys() & values.keys()) - {"time"}:
            self._put(name, values[name])
        self._put("time", values["time"])
        self.n_frames += 1
        spare = SHARE * (perf_counter() - self._opened) > self._spent
        if durable or durable is None and spare:
            self.sync()

    def _put(self, name: str, value: ArrayLike) -> None:
        complete = self._tails[name].put(self.n_frames, value)
        if complete:
            self._wrote(complete)

    def sync(self) -> None:
        """Wait until all committed frames are on disk."""
        if self._begun and self.n_synced < self.n_frames:
            self._secure()

    def _secure(self) -> None:
        started = perf_counter()
        self._sync_files()
        tails = {name: t.values[: self.n_frames - t.start] for name, t in self._tails.items()}
        save_arrays(self._file, {"boot": boot(), "n": self.n_frames, **tails})
        self.n_synced = self.n_frames
        self._spent += perf_counter() - started

    def _sync_files(self) -> None:
        for file in sorted(self._unsynced):
            sync(file)
        for folder in {file.parent for file in self._unsynced}:
            sync(folder)
        self._unsynced.clear()

    def close(self) -> None:
        """Sync every file, after which `.synced` has nothing to tell."""
        if self._process != os.getpid() or not self._file.is_file():
            return
        for tail in self._tails.values():
            self._wrote(chunk_file(tail.array, tail.start))
        self._sync_files()
        self._file.unlink()
        sync(self._file.parent)
        self._begun, self.n_synced = False, self.n_frames


# --- after a loss of power -------------------------------------------------------------------


def restore(path: Path) -> None:
    """Put back what a loss of power has taken, if there was one since the store was written.

    Raises
    ------
    TrajectoryError
        The file that tells cannot be read, or the store not be written.
    """
    file = path / "time" / SYNCED
    if not file.is_file():
        return
    try:
        synced = load_arrays(file)
        if str(synced.pop("boot")) == boot() != "":
            return
        with Lock(path, takes=False):
            if file.is_file():
                _restore(path, int(synced.pop("n")), synced)
                file.unlink()
                sync(file.parent)
    except TrajectoryError:
        return  # it is being written, on another machine
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        problem = f"its writer came to no end, and that cannot be set right ({error})"
        raise fault(path, "time", problem, "open it where it can be written") from error


def _restore(path: Path, n: int, synced: Mapping[str, NDArray]) -> None:
    arrays = {folder.name: open_to_write(folder) for folder in path.glob("[!.]*/")}
    small = {name: arrays[name] for name in synced}
    try:
        seen = int(np.isfinite(small["time"][:]).sum())
    except Exception:  # every codec raises its own
        seen = n
    for name, values in synced.items():
        _put_back(small[name], n, values)
    kept = n
    while 0 < kept < small["time"].shape[0] and _is_whole(arrays, kept):
        kept += 1
    for array in small.values():
        start = kept // array.chunks[0] * array.chunks[0]
        values = array[start:kept]
        for frame in range(start, array.shape[0], array.chunks[0]):
            chunk_file(array, frame).unlink(missing_ok=True)
        _put_back(array, kept, values)
    for name, array in arrays.items():
        if "x" in array.metadata.dimension_names and not array.shards:
            for index, file in chunk_files(path / name):
                file.unlink() if index >= kept else None
    sync_tree(path)
    if seen > kept:
        text = f"{seen - kept} frames after the {kept} that were synced are not whole"
        warnings.warn(f"{path}: the power went while it was written: {text}", stacklevel=4)


def _put_back(array: zarr.Array, n: int, values: NDArray) -> None:
    """Make sure that the frames before the n-th of a chunk have these values."""
    start = n - len(values)
    stop = min(start + array.chunks[0], array.shape[0])
    try:
        if start >= stop or start < n and np.array_equal(array[start:n], values, equal_nan=True):
            return
    except Exception:  # every codec raises its own
        pass
    chunk_file(array, start).unlink(missing_ok=True)
    whole = np.full((stop - start, *array.shape[1:]), array.fill_value, array.dtype)
    whole[: len(values)] = values
    array[start:stop] = whole


def _is_whole(arrays: Mapping[str, zarr.Array], frame: int) -> bool:
    """Whether a frame is there with all that the one before it has, and its density adds up."""
    moving = {n: a for n, a in arrays.items() if a.metadata.dimension_names[0] == "time"}
    try:
        values, before = ({n: a[i] for n, a in moving.items()} for i in (frame, frame - 1))
        cell = values["cell"] if "cell" in values else arrays["cell"][:]
        count = values["density"].mean(dtype=np.float64) * abs(np.linalg.det(cell))
    except Exception:  # every codec raises its own
        return False
    same = all(np.isnan(values[n]).all() == np.isnan(before[n]).all() for n in moving)
    return same and bool(np.isclose(count, values["n_electrons"], rtol=1e-9, atol=0))
