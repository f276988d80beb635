"""The trajectory format: electron densities in time, in one zarr v3 group.

A trajectory is an `xarray.Dataset` with dimensions `time, x, y, z, atom, cartesian, vector`
(in d < 3 dimensions: the first d of `x, y, z`, and d Cartesian directions).

================================== =============== =========================================
variable                           units           meaning
================================== =============== =========================================
density (time, x, y, z)            angstrom**-d    float32; cell-periodic, end point excluded
positions (time, atom, cartesian)  angstrom        nuclei
velocities (time, atom, cartesian) angstrom/fs
forces (time, atom, cartesian)     eV/angstrom
numbers (atom)                     1               atomic numbers
cell (vector, cartesian)           angstrom        lattice vectors in rows
pbc (cartesian)                    1               periodic directions
time (time)                        fs              **NaN: the frame is not committed**
energy, temperature, n_electrons   eV, K, 1        one value per frame; NaN: unknown
================================== =============== =========================================

**Appending is crash-safe.** A store is created at its full length, which costs nothing: a
chunk takes no space until it is written. A frame is written variable by variable, its `time`
last. That is the commit mark: wherever a process is killed, the store opens, and frames with
a finite time are complete. On restart a half-written frame is overwritten. This rests on zarr
replacing files in one piece (temporary file, then rename). There is no fsync: it covers the
death of a process, not the loss of power. One writer at a time.

A store may hold several runs as groups (`lithium.zarr/run-1`); the attribute `splits` of its
root then says which frames are for training, validation and test.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import xarray as xr
import zarr
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm
from zarr.codecs import BloscCodec

from densitykit.io.schema import (
    SCHEMA_VERSION,
    PathLike,
    Variable,
    bit_round,
    checked_arrays,
    count_committed,
    fault,
    locate,
    open_arrays,
    raise_any,
    recover,
    schema_for,
    sibling,
    split_problems,
    swap,
)

__all__ = [
    "TrajectoryWriter",
    "copy_frames",
    "create_trajectory",
    "extend_trajectory",
    "pack_trajectory",
    "write_splits",
]

_QUANTITIES = ("valence", "total", "pseudo")
_CODECS = {
    "lossless": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
    "fast": BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
    "none": None,
    "packed": BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle"),
}
# An append rewrites the chunk it falls in; a read opens every chunk it touches. Per-atom arrays
# of 32 atoms: with one frame a chunk 1.8 ms an append and 207 ms to read 300 frames; with 64
# frames (49 kB) 2.4 and 6 ms; with 3000 frames 7.3 and 4.5 ms. Hence chunks of about 64 kB.
_ATOM_CHUNK_BYTES = 65536


def create_trajectory(
    path: PathLike,
    *,
    n_frames: int,
    grid: tuple[int, ...],
    cell: ArrayLike,
    numbers: ArrayLike | None = None,
    pbc: bool | Iterable[bool] = True,
    quantity: str = "valence",
    attrs: Mapping[str, Any] | None = None,
    extra_scalars: Mapping[str, str] | None = None,
    codec: str = "lossless",
    keepbits: int | None = None,
    resolution: float | None = None,
    allow_negative: bool = False,
    overwrite: bool = False,
) -> TrajectoryWriter:
    """Create an empty trajectory of fixed length and return its writer.

    Parameters
    ----------
    path
        Folder of the new group. In `lithium.zarr/run-1` the root group is made too.
    n_frames
        Frames to preallocate. Be generous: a frame takes no space until it is written.
    grid
        Points along each lattice vector, shape (d,), d from 1 to 3.
    cell
        Lattice vectors in rows, angstrom, shape (d, d); or the edges of an orthorhombic cell,
        shape (d,) or a scalar.
    numbers
        Atomic numbers, shape (atom,). Without them there are no per-atom variables.
    pbc
        Periodic or not: one value, or one per direction, shape (d,).
    quantity
        What the density counts: "valence", "total" or "pseudo".
    attrs
        Provenance: engine, functional, cutoff, seed, licence, ... Becomes the root attributes.
    extra_scalars
        Further variables with one value per frame, name to unit: `{"conserved_energy": "eV"}`.
    codec
        "lossless" (Blosc zstd 3 with shuffle), "fast" (Blosc lz4) or "none".
    keepbits
        Mantissa bits of the density to keep (see `bit_round`). None stores it exactly.
    resolution
        Round the density to multiples of this, angstrom**-d, too: where it is next to nothing,
        its digits cost as much as elsewhere. A power of two compresses.
    allow_negative
        Accept negative densities, as linear models and truncated Fourier series give.
    overwrite
        Replace the trajectory at `path`, if there is one.

    Raises
    ------
    TrajectoryError
        `path` is taken, or an argument does not describe a trajectory.
    ValueError
        `keepbits` is not in 0..23.
    """
    path = Path(path)
    _claim(path, overwrite)
    if n_frames < 1 or codec not in _CODECS or quantity not in _QUANTITIES:
        problem = f"n_frames={n_frames}, codec={codec!r}, quantity={quantity!r}"
        fix = f"use n_frames > 0, a codec of {list(_CODECS)} and a quantity of {_QUANTITIES}"
        raise fault(path, "density", problem, fix)
    constants = _constants(path, grid, cell, pbc, numbers)
    details = {"quantity": quantity, "grid": "cell-periodic, end point excluded"}
    if keepbits is not None:
        bit_round(0.0, keepbits)  # raises now rather than at the first frame
        details["keepbits"] = keepbits
    if resolution is not None:
        details["resolution"] = resolution
    if allow_negative:
        details["allow_negative"] = True
    schema = schema_for(len(grid))
    schema |= {n: Variable(("time",), u, n) for n, u in (extra_scalars or {}).items()}
    sizes = {"time": n_frames, "vector": len(grid), "cartesian": len(grid)}
    sizes |= dict(zip("xyz", grid, strict=False))
    if numbers is not None:
        sizes["atom"] = constants["numbers"].size
    group = _new_group(path, attrs or {})
    for name, variable in schema.items():
        if sizes.keys() >= set(variable.dims):  # without atoms, no per-atom variables
            _allocate(group, name, variable, sizes, _CODECS[codec], details)
    for name, values in constants.items():
        group[name][:] = values
    swap(path)
    return TrajectoryWriter(path)


def _claim(path: Path, overwrite: bool) -> None:
    """Refuse a path that is taken; never delete what is not a single trajectory."""
    recover(path)
    if path.exists() and not (overwrite and (path / "density").is_dir()):
        fix = "pass overwrite=True to replace a trajectory, or choose another path"
        raise fault(path, "store", "the path already exists", fix)


def _constants(
    path: Path,
    grid: tuple[int, ...],
    cell: ArrayLike,
    pbc: bool | Iterable[bool],
    numbers: ArrayLike | None,
) -> dict[str, NDArray]:
    """Return the variables that do not depend on time, checked and in full shape."""
    n_dim = len(grid)
    if not 1 <= n_dim <= 3 or min(grid) < 1:
        raise fault(path, "density", f"the grid is {grid}", "give 1 to 3 positive lengths")
    cell = np.asarray(cell, dtype=np.float64)
    if cell.ndim < 2 and cell.size in (1, n_dim):
        cell = np.diag(np.broadcast_to(cell, n_dim))
    finite = cell.shape == (n_dim, n_dim) and np.isfinite(cell).all()
    if not finite or np.linalg.matrix_rank(cell) < n_dim:
        fix = f"give {n_dim} independent lattice vectors in rows, in angstrom"
        raise fault(path, "cell", f"{cell.tolist()} spans no cell in {n_dim}-D", fix)
    constants = {"cell": cell, "pbc": np.broadcast_to(np.asarray(pbc, dtype=bool), n_dim)}
    if numbers is not None:
        constants["numbers"] = np.ravel(np.asarray(numbers, dtype=np.int64))
    return constants


def _new_group(path: Path, attrs: Mapping[str, Any]) -> zarr.Group:
    """Make the parent groups within the same store, and an empty group beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = next((i for i, folder in enumerate(path.parents) if folder.suffix == ".zarr"), -1)
    for folder in reversed(path.parents[: root + 1]):
        zarr.open_group(folder, mode="a")
    attrs = {**attrs, "schema_version": SCHEMA_VERSION}
    attrs["history"] = _history("created", attrs.get("history"))
    # JSON knows nothing of numpy: arrays and scalars become lists and numbers
    attrs = json.loads(json.dumps(attrs, default=lambda value: value.tolist()))
    return zarr.open_group(sibling(path, "new"), mode="w", attributes=attrs)


def _allocate(
    group: zarr.Group,
    name: str,
    variable: Variable,
    sizes: Mapping[str, int],
    codec: BloscCodec | None,
    details: Mapping[str, Any],
) -> None:
    """Create one empty array. A flat key (`c.5.0.0.0`) makes one inode per frame, not four."""
    shape = tuple(sizes[dim] for dim in variable.dims)
    dtype = {"density": "float32", "numbers": "int64", "pbc": "bool"}.get(name, "float64")
    chunks, attributes = shape, {"units": variable.units, "long_name": variable.long_name}
    if name == "density":
        chunks = (1, *shape[1:])
        attributes |= {"long_name": f"{details['quantity']} electron density", **details}
    elif variable.dims[:2] == ("time", "atom"):
        frame_bytes = 8 * max(1, shape[1] * shape[2])
        chunks = (min(shape[0], max(1, _ATOM_CHUNK_BYTES // frame_bytes)), *shape[1:])
    group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(1, size) for size in chunks),
        dtype=dtype,
        fill_value=np.nan if dtype.startswith("float") else 0,
        compressors=codec if name == "density" else "auto",
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=variable.dims,
        attributes=attributes,
    )


def _history(event: str, previous: str | None = None) -> str:
    from densitykit import __version__

    line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} densitykit {__version__}: {event}"
    return f"{previous}\n{line}" if previous else line


class TrajectoryWriter:
    """Append frames to a trajectory made by `create_trajectory`.

    Opening an interrupted store continues it: the next frame is the first whose time is NaN.
    There must be one writer at a time. Usable as a context manager, though there is nothing
    to flush: a frame is on disk when `append` returns.

    Parameters
    ----------
    path
        The group of the trajectory.

    Attributes
    ----------
    path, n_frames, n_committed, last_time
        The group, its length, the number of frames committed so far, and the time of the last
        of them in fs (-inf before the first).

    Raises
    ------
    TrajectoryError
        The store is missing, broken, or was not preallocated by `create_trajectory`.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        recover(self.path)
        locate(self.path)
        self._arrays = checked_arrays(self.path, mode="r+")
        if not np.isnan(self._arrays["time"].fill_value):
            fix = "copy the frames into a store made by create_trajectory"
            raise fault(self.path, "time", "its fill value is not NaN, cannot append", fix)
        for partial in self.path.rglob("*.partial"):  # what zarr leaves when it is killed
            partial.unlink()
        scalar = {n: a for n, a in self._arrays.items() if a.metadata.dimension_names == ("time",)}
        self.n_committed = count_committed(self.path, self._arrays["time"])
        self._scalars = {name: array[:] for name, array in scalar.items()}
        self._density = self._arrays["density"]
        volume = np.abs(np.linalg.det(self._arrays["cell"][:]))
        self._voxel = float(volume) / np.prod(self._density.shape[1:])
        self.n_frames = self._density.shape[0]

    @property
    def fields(self) -> list[str]:
        """What `append` takes, by name."""
        per_frame = (n for n, a in self._arrays.items() if "time" in a.metadata.dimension_names)
        return [name for name in per_frame if name != "n_electrons"]

    @property
    def last_time(self) -> float:
        return float(self._scalars["time"][self.n_committed - 1]) if self.n_committed else -np.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def append(
        self,
        density: ArrayLike,
        time: float,
        positions: ArrayLike | None = None,
        velocities: ArrayLike | None = None,
        forces: ArrayLike | None = None,
        energy: float = np.nan,
        temperature: float = np.nan,
        **extra: float,
    ) -> int:
        """Write and commit one frame. Nothing is written if any of the input is bad.

        Parameters
        ----------
        density
            angstrom**-d, shape `grid`, finite and non-negative; stored as float32.
        time
            fs, later than the last committed frame.
        positions, velocities, forces
            angstrom, angstrom/fs and eV/angstrom, shape (atom, cartesian).
        energy, temperature
            eV and K.
        **extra
            Values of the `extra_scalars` that the store was created with.

        Returns
        -------
        int
            The index of the frame.

        Raises
        ------
        TrajectoryError
            The store is full or the input is bad.
        """
        frame = self.n_committed
        if frame >= self.n_frames:
            fix = "make room with extend_trajectory(path, n_frames), then open a new writer"
            raise fault(self.path, "time", f"the store is full, n_frames={frame}", fix)
        given = {"time": time, "energy": energy, "temperature": temperature, **extra}
        scalars = self._checked_scalars(given)
        arrays = {"density": self._checked_density(density)}
        given = {"positions": positions, "velocities": velocities, "forces": forces}
        arrays |= self._checked_atoms(given)
        scalars["n_electrons"] = self._voxel * float(arrays["density"].sum(dtype=np.float64))
        for name, values in arrays.items():
            self._arrays[name][frame] = values
        scalars["time"] = scalars.pop("time")  # the commit mark goes last
        for name, value in scalars.items():
            if not np.isnan([value, self._scalars[name][frame]]).all():  # NaN is there already
                self._arrays[name][frame] = self._scalars[name][frame] = value
        self.n_committed += 1
        return frame

    def _checked_scalars(self, given: Mapping[str, float]) -> dict[str, float]:
        """Return one finite number or NaN for every variable with one value per frame."""
        names = [name for name in self._scalars if name != "n_electrons"]
        given = {name: float(value) for name, value in given.items()}
        for name, value in given.items():
            if name not in names and not np.isnan(value):
                fix = f"use one of {names}, or name it in extra_scalars of create_trajectory"
                raise fault(self.path, name, "the store has no such variable", fix)
            if np.isinf(value) or (name == "time" and np.isnan(value)):
                raise fault(self.path, name, f"the value is {value}", "pass a finite number")
        if given["time"] <= self.last_time:
            problem = f"{given['time']} fs is not later than the last frame at {self.last_time} fs"
            raise fault(self.path, "time", problem, "pass increasing times")
        # all of them, so that a value of an earlier, half-written frame does not survive
        return dict.fromkeys(names, np.nan) | {n: v for n, v in given.items() if n in names}

    def _checked_density(self, density: ArrayLike) -> NDArray[np.float32]:
        """Return the density as it will be stored."""
        with np.errstate(over="ignore"):  # beyond float32 becomes inf, reported below
            values = np.asarray(density).astype(np.float32)
        if values.shape != self._density.shape[1:]:
            problem = f"the shape is {values.shape}, not {self._density.shape[1:]}"
            raise fault(self.path, "density", problem, "resample it onto the grid of the store")
        if not np.isfinite(values).all():
            problem = f"{np.count_nonzero(~np.isfinite(values))} values are not finite"
            raise fault(self.path, "density", problem, "pass finite values, within float32")
        if values.min() < 0 and not self._density.attrs.get("allow_negative", False):
            problem = f"{np.count_nonzero(values < 0)} values are negative, down to {values.min()}"
            fix = "clip them knowingly, or create the store with allow_negative=True"
            raise fault(self.path, "density", problem, fix)
        keepbits, step = map(self._density.attrs.get, ("keepbits", "resolution"))
        values = values if keepbits is None else bit_round(values, keepbits)
        return values if step is None else np.round(values / step).astype(np.float32) * step

    def _checked_atoms(self, given: Mapping[str, ArrayLike | None]) -> dict[str, NDArray]:
        """Return the per-atom arrays in float64; NaN for those not given."""
        checked = {}
        for name, values in given.items():
            if name not in self._arrays:
                if values is not None:
                    fix = "drop the argument, or create the store with numbers"
                    raise fault(self.path, name, "the store has no atoms", fix)
                continue
            shape = self._arrays[name].shape[1:]
            checked[name] = np.full(shape, np.nan) if values is None else np.asarray(values, float)
            if checked[name].shape != shape:
                problem = f"the shape is {checked[name].shape}, not {shape}"
                raise fault(self.path, name, problem, "pass one row per atom of the store")
            if values is not None and not np.isfinite(checked[name]).all():
                raise fault(self.path, name, "not all values are finite", "pass finite values")
        return checked


def copy_frames(run: xr.Dataset, writer: TrajectoryWriter, *, progress: bool = True) -> None:
    """Append what a writer does not have yet of a run, frame by frame.

    Parameters
    ----------
    run
        A trajectory; variables that the store of the writer lacks are left out.
    writer
        Of a store of the same atoms and grid, whose first frames, if any, are those of the run.
    progress
        Show a progress bar.

    Raises
    ------
    TrajectoryError
        As `TrajectoryWriter.append`.
    """
    names = [name for name in writer.fields if name in run.variables]
    frames = range(writer.n_committed, run.sizes["time"])
    for i in tqdm(frames, f"copying to {writer.path.name}", disable=not progress):
        values = {name: run[name][i].values for name in names}
        # what nobody has given is NaN in the store, and not given again
        writer.append(**{n: v for n, v in values.items() if not np.isnan(v).all()})


def extend_trajectory(path: PathLike, n_frames: int) -> TrajectoryWriter:
    """Lengthen a trajectory to `n_frames` and return a new writer for it.

    Lengthening variables one by one would leave a store with conflicting lengths if killed
    between two of them. So a neighbour is built, in which the data are hard links (copies where
    the file system has none), and takes the place of the store when it is complete.

    Parameters
    ----------
    path
        The group of the trajectory. Writers opened before must not be used any more.
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
    new = sibling(path, "new")
    shutil.copytree(path, new, copy_function=_link)
    for array in open_arrays(new, "r+")[0].values():
        if array.metadata.dimension_names[0] == "time":
            array.resize((n_frames, *array.shape[1:]))  # replaces the link to zarr.json
    attrs = zarr.open_group(new, mode="r+").attrs
    attrs["history"] = _history(f"extended to {n_frames} frames", attrs.get("history"))
    swap(path)
    return TrajectoryWriter(path)


def pack_trajectory(path: PathLike, frames_per_shard: int = 64) -> None:
    """Rewrite a finished trajectory with many frames in one file, for keeping and copying.

    Only committed frames are kept, the density in shards (each frame stays a chunk of its own,
    so reading is as before). A packed store is not meant to be appended to: every append would
    rewrite a shard. A kill leaves the store as it was.

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
    path = Path(path)
    recover(path)
    arrays = checked_arrays(locate(path))
    count = count_committed(path, arrays["time"])
    attrs = dict(zarr.open_group(path, mode="r").attrs)
    attrs["history"] = _history(f"packed {count} frames", attrs.get("history"))
    group = zarr.open_group(sibling(path, "new"), mode="w", attributes=attrs)
    for name, array in arrays.items():
        moves = array.metadata.dimension_names[0] == "time"
        length = count if moves else array.shape[0]
        shape = (length, *array.shape[1:])
        sharded = {"chunks": (1, *shape[1:]), "shards": (frames_per_shard, *shape[1:])}
        new = group.create_array(
            name,
            shape=shape,
            dtype=array.dtype,
            fill_value=array.fill_value,
            compressors=_CODECS["packed"],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=array.metadata.dimension_names,
            attributes=dict(array.attrs),
            **(sharded if name == "density" else {"chunks": shape}),
        )
        step = frames_per_shard if moves else length
        for start in range(0, length, step):
            new[start : start + step] = array[start : min(start + step, length)]
    swap(path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_splits(path: PathLike, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the splits of a store into the attributes of its root, replacing earlier ones.

    Parameters
    ----------
    path
        The root group.
    splits
        Name to frames, half-open: `{"train": {"run": "run-1", "start": 0, "stop": 400}}`.
        Where the root is itself a trajectory, its run is called ".".

    Raises
    ------
    TrajectoryError
        A run is missing, frames are not committed, or two splits overlap.
    """
    path = locate(path)
    raise_any(path, split_problems(path, splits))
    zarr.open_group(path, mode="r+").attrs["splits"] = {n: dict(s) for n, s in splits.items()}
