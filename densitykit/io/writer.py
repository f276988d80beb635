"""The trajectory format: electron densities in time, in one zarr v3 group.

A trajectory is an `xarray.Dataset` with dimensions `time, x, y, z, atom, cartesian, vector`
(in d < 3 dimensions: the first d of `x, y, z`, and d Cartesian directions).

================================== =============== =========================================
variable                           units           meaning
================================== =============== =========================================
density (time, x, y, z)            angstrom**-d    float32; cell-periodic, end point excluded
magnetization (time, x, y, z)      angstrom**-d    optional: spin up minus spin down
current (time, x)                  1/fs            optional, d = 1: electrons through a point
positions (time, atom, cartesian)  angstrom        nuclei
velocities (time, atom, cartesian) angstrom/fs
forces (time, atom, cartesian)     eV/angstrom
numbers (atom)                     1               atomic numbers
valence_charge (atom)              1               optional: electrons that the atom brings
cell (vector, cartesian)           angstrom        lattice vectors in rows
or (time, vector, cartesian)       angstrom        where the cell moves (constant pressure)
pbc (cartesian)                    1               periodic directions
time (time)                        fs              **NaN: the frame is not committed**
energy, temperature, n_electrons   eV, K, 1        one value per frame; NaN: unknown
================================== =============== =========================================

**Appending is crash-safe.** A store is created at its full length, which costs nothing: a
chunk takes no space until it is written. A frame is written variable by variable, its `time`
last. That is the commit mark: wherever a process is killed, the store opens, and frames with
a finite time are complete. On restart a half-written frame is overwritten. This rests on zarr
replacing files in one piece (temporary file, then rename). What covers the loss of power, too,
is in :mod:`densitykit.io.durable`. A lock keeps other writers off; readers never wait.

**Damage is noticed.** Since format 2 each chunk ends with its CRC-32C, and all chunks of
committed frames are there (attribute `always_written`): a flipped bit is not read as a density,
nor a lost file as data that were never given. Since 2.1 the metadata have checksums, too
(:mod:`densitykit.io.metadata`). Older stores are read, and `densitykit upgrade` rewrites them.

A store may hold several runs as groups (`lithium.zarr/run-1`); :mod:`densitykit.io.splits` says
which frames are for training, validation and test.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import xarray as xr
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from densitykit.io.durable import FRAMES, Journal, read
from densitykit.io.metadata import CHECKSUM, metadata_problems, seal, seal_root
from densitykit.io.progress import progress_bar
from densitykit.io.schema import (
    SCHEMA_VERSION,
    Variable,
    bit_round,
    checked_arrays,
    count_committed,
    schema_for,
)
from densitykit.io.store import (
    Lock,
    PathLike,
    fault,
    fresh,
    history,
    is_ours,
    locate,
    plain_attributes,
    real,
    recover,
    swap,
    sync,
)

__all__ = ["TrajectoryWriter", "copy_frames", "create_trajectory"]

FIELDS = ("density", "magnetization", "current")  # on the grid
QUANTITIES = ("valence", "total", "core", "pseudo")
CODECS = {
    "lossless": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
    "fast": BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
    "none": None,
    "packed": BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle"),
}
_SMALL = ZstdCodec()  # of all that is not on the grid
# An append rewrites the chunk it falls in; a read opens every chunk it touches. Per-atom arrays
# of 32 atoms: with one frame a chunk 1.8 ms an append and 207 ms to read 300 frames; with 64
# frames (49 kB) 2.4 and 6 ms; with 3000 frames 7.3 and 4.5 ms. Hence chunks of about 64 kB.
_ATOM_CHUNK_BYTES = 65536


def create_trajectory(
    path: PathLike,
    *,
    n_frames: int,
    grid: tuple[int, ...],
    cell: ArrayLike | None,
    numbers: ArrayLike | None = None,
    valence_charges: ArrayLike | None = None,
    pbc: bool | Iterable[bool] = True,
    quantity: str = "valence",
    magnetization: bool = False,
    current: bool = False,
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
        shape (d,) or a scalar; or None: each frame brings its own.
    numbers, valence_charges
        Atomic numbers, and the electrons that each atom gives the density, shape (atom,).
        Without numbers there are no per-atom variables.
    pbc
        Periodic or not: one value, or one per direction, shape (d,).
    quantity
        What the density counts: "valence", "total", "core" or "pseudo".
    magnetization, current
        Make room for the difference of the spins, and in one dimension for the current.
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
    path, n_dim = Path(path), len(grid)
    if n_frames < 1 or codec not in CODECS or quantity not in QUANTITIES:
        problem = f"n_frames={n_frames}, codec={codec!r}, quantity={quantity!r}"
        fix = f"use n_frames > 0, a codec of {list(CODECS)} and a quantity of {QUANTITIES}"
        raise fault(path, "density", problem, fix)
    if not 1 <= n_dim <= 3 or min(grid) < 1:
        raise fault(path, "density", f"the grid is {grid}", "give 1 to 3 positive lengths")
    constants = {"pbc": np.broadcast_to(np.asarray(pbc, dtype=bool), n_dim)}
    constants |= {} if cell is None else {"cell": checked_cell(path, cell, n_dim)}
    constants |= _constant_atoms(path, numbers, valence_charges)
    if keepbits is not None:
        bit_round(0.0, keepbits)  # raises now rather than at the first frame
    details = {"keepbits": keepbits, "resolution": resolution, "quantity": quantity}
    details |= {"allow_negative": allow_negative or None}
    details = plain_attributes(details | {"grid": "cell-periodic, end point excluded"})
    sizes = {"time": n_frames, "vector": n_dim, "cartesian": n_dim}
    sizes |= dict(zip("xyz", grid, strict=False))
    sizes |= {} if numbers is None else {"atom": len(constants["numbers"])}
    left_out = {n for n, on in (("magnetization", magnetization), ("current", current)) if not on}
    left_out |= {"valence_charge"} - constants.keys()
    with _new_group(path, attrs or {}, overwrite) as group:
        for name in schema_for(n_dim).keys() - left_out:
            used = CODECS[codec] if name in FIELDS else _SMALL
            allocate(group, name, sizes, n_dim, used, details, moving_cell=cell is None)
        for name, unit in (extra_scalars or {}).items():
            allocate(group, name, sizes, n_dim, unit=unit)
        for name, values in constants.items():
            if values.any():
                group[name][:] = values  # else written already, as zeros
    return TrajectoryWriter(path)


def checked_cell(path: Path, cell: ArrayLike, n_dim: int) -> NDArray[np.float64]:
    """Return lattice vectors in rows, shape (d, d); TrajectoryError if they span no cell."""
    cell = np.asarray(cell, dtype=np.float64)
    if cell.ndim < 2 and cell.size in (1, n_dim):
        cell = np.diag(np.broadcast_to(cell, n_dim))
    finite = cell.shape == (n_dim, n_dim) and np.isfinite(cell).all()
    if not finite or np.linalg.matrix_rank(cell) < n_dim:
        fix = f"give {n_dim} independent lattice vectors in rows, in angstrom"
        raise fault(path, "cell", f"{cell.tolist()} spans no cell in {n_dim}-D", fix)
    return cell


def _constant_atoms(
    path: Path, numbers: ArrayLike | None, charges: ArrayLike | None
) -> dict[str, NDArray]:
    """Return what is known of the atoms for all times, checked."""
    if numbers is None:
        return {}
    atoms = {"numbers": np.ravel(np.asarray(numbers))}
    whole = np.equal(atoms["numbers"], np.round(atoms["numbers"])).all()
    if not whole or not ((atoms["numbers"] >= 0) & (atoms["numbers"] <= 118)).all():
        problem = f"{sorted(set(atoms['numbers'].tolist()))} are not atomic numbers"
        raise fault(path, "numbers", problem, "give whole numbers from 0 to 118")
    if charges is not None:
        atoms["valence_charge"] = np.asarray(charges, dtype=float)
        if atoms["valence_charge"].shape != atoms["numbers"].shape:
            problem = f"{np.size(charges)} values for {len(atoms['numbers'])} atoms"
            raise fault(path, "valence_charge", problem, "give one for each atom")
    return atoms


@contextmanager
def _new_group(path: Path, attrs: Mapping[str, Any], overwrite: bool) -> Iterator[zarr.Group]:
    """Give an empty group that takes its place at `path` when it is filled; make its parents.

    A path that is taken is refused, unless it may be overwritten and is a trajectory.
    """
    for folder in reversed([folder for folder in path.parents if not folder.exists()]):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
    with Lock(path):
        path = real(path)
        recover(path)
        if path.exists() and not (overwrite and is_ours(path)):
            fix = "pass overwrite=True to replace a trajectory, or choose another path"
            raise fault(path, "store", "the path already exists", fix)
        root = next((i for i, folder in enumerate(path.parents) if folder.suffix == ".zarr"), -1)
        for folder in reversed(path.parents[: root + 1]):
            zarr.open_group(folder, mode="a")
            if not metadata_problems(folder, root=True):
                seal_root(folder)
        attrs = plain_attributes({**attrs, "schema_version": SCHEMA_VERSION, CHECKSUM: None})
        attrs["history"] = history("created", attrs.get("history"))
        new = fresh(path, "new")
        yield zarr.open_group(new, mode="w-", attributes=attrs)
        seal(new)
        swap(new, path)


def allocate(
    group: zarr.Group,
    name: str,
    sizes: Mapping[str, int],
    n_dim: int,
    codec: BloscCodec | ZstdCodec | None = _SMALL,
    details: Mapping[str, Any] | None = None,
    *,
    unit: str = "1",
    moving_cell: bool = False,
) -> None:
    """Create one empty array, unless it needs atoms and there are none.

    A flat key (`c.5.0.0.0`) makes one inode per frame, not four.
    """
    variable = schema_for(n_dim).get(name, Variable(("time",), unit, name))
    dims = ("time", *variable.dims) if name == "cell" and moving_cell else variable.dims
    if not sizes.keys() >= set(dims):
        return
    field, shape = name in FIELDS, tuple(sizes[dim] for dim in dims)
    dtype = {"numbers": "int64", "pbc": "bool"}.get(name, "float32" if field else "float64")
    attributes = {"units": variable.units, "long_name": variable.long_name}
    attributes |= {} if field else {"always_written": 1}
    if name == "density":
        attributes |= {"long_name": f"{details['quantity']} electron density", **details}
    frames = max(1, _ATOM_CHUNK_BYTES // (8 * max(1, int(np.prod(shape[1:])))))
    frames = 1 if field else FRAMES if dims == ("time",) else frames
    chunks = (min(shape[0], frames) if "time" in dims else shape[0], *shape[1:])
    array = group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(1, size) for size in chunks),
        dtype=dtype,
        fill_value=np.nan if dtype.startswith("float") else 0,
        compressors=[*([codec] if codec else []), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dims,
        attributes=attributes,
        config={"write_empty_chunks": not field},
    )
    if not field:  # that it is gone can be noticed
        array[: chunks[0]] = array.fill_value


class TrajectoryWriter:
    """Append frames to a trajectory made by `create_trajectory`.

    Opening an interrupted store continues it: the next frame is the first whose time is NaN.
    There is one writer at a time: other processes are refused while it is open, and within this
    one the newest writer has the store.

    When `append` returns, no end of the process can take the frame. A loss of power can, until
    it is *synced*: before `append` returns, if frames take long to make, else after some of them,
    such that no more than a twentieth of the time goes to waiting for the disk.

    Parameters
    ----------
    path
        The group of the trajectory.
    durable
        True: each `append` syncs. None: as above. False: only `sync` and `close` do.

    Attributes
    ----------
    path, n_frames, n_committed, n_synced, last_time
        The group, its length, the number of frames committed so far, how many of them are
        synced, and the time of the last of them in fs (-inf before the first).

    Raises
    ------
    TrajectoryError
        The store is missing, broken, was not preallocated by `create_trajectory`, or another
        process is writing it.
    """

    def __init__(self, path: PathLike, *, durable: bool | None = None) -> None:
        self.path, self._durable = Path(path), durable
        locate(self.path)
        self._lock = Lock(self.path)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        recover(self.path)
        self._arrays = checked_arrays(self.path, mode="r+")
        if not np.isnan(self._arrays["time"].fill_value):
            fix = "copy the frames into a store made by create_trajectory"
            raise fault(self.path, "time", "its fill value is not NaN, cannot append", fix)
        for partial in self.path.rglob("*.partial"):  # what zarr leaves when it is killed
            partial.unlink()
        committed = count_committed(self.path, self._arrays)
        self._journal = Journal(self.path, self._arrays, committed)
        self._closing = weakref.finalize(self, _close, self._lock, self._journal)
        self.last_time = float(self._arrays["time"][committed - 1]) if committed else -np.inf
        self._density = self._arrays["density"]
        cell = self._arrays["cell"]
        self._cell = read(cell, slice(None)) if cell.ndim == 2 else None
        self.n_frames = self._density.shape[0]

    @property
    def n_committed(self) -> int:
        return self._journal.n_frames

    @property
    def n_synced(self) -> int:
        return self._journal.n_synced

    @property
    def fields(self) -> set[str]:
        """What `append` takes beside the time, by name."""
        per_frame = {n for n, a in self._arrays.items() if "time" in a.metadata.dimension_names}
        return per_frame - {"n_electrons", "time"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def sync(self) -> None:
        """Wait until the frames so far are on disk, such that a loss of power cannot take them."""
        self._check_open()
        self._journal.sync()

    def close(self) -> None:
        """Sync all, and let others write the store; also done when the writer is forgotten."""
        self._closing()

    def _check_open(self) -> None:
        if not self._lock.held:
            problem = "this writer is closed, or another one was opened since"
            raise fault(self.path, "store", problem, "use the newest writer")

    def append(self, density: ArrayLike, time: float, **values: Any) -> int:
        """Write and commit one frame. Nothing is written if any of the input is bad.

        Parameters
        ----------
        density
            angstrom**-d, shape `grid`, finite and non-negative; stored as float32.
        time
            fs, later than the last committed frame.
        **values
            Of the other variables with one value per frame, by name: `positions`, `velocities`,
            `forces`, `energy`, `temperature`, `cell` where it moves, ... None: unknown.

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
        self._check_open()
        if frame >= self.n_frames:
            fix = "make room with extend_trajectory(path, n_frames), then open a new writer"
            raise fault(self.path, "time", f"the store is full, n_frames={frame}", fix)
        given = {n: v for n, v in values.items() if v is not None} | {"density": density}
        for name in given.keys() - self.fields:
            fix = "drop it, or make room for it in create_trajectory"
            raise fault(self.path, name, "the store has no such variable per frame", fix)
        arrays = {n for n in self.fields if self._arrays[n].ndim > 1}
        arrays = {name: self._checked(name, given.pop(name, None)) for name in arrays}
        scalars = self._checked_scalars(given, time)
        volume = abs(np.linalg.det(arrays.get("cell", self._cell)))
        scalars["n_electrons"] = volume * float(arrays["density"].mean(dtype=np.float64))
        self._journal.commit(arrays | scalars | {"time": float(time)}, self._durable)
        self.last_time = float(time)
        return frame

    def _checked_scalars(self, given: Mapping[str, Any], time: float) -> dict[str, float]:
        """Return a number, or NaN, for every variable with one value per frame but the time."""
        # all of them, so that a value of an earlier, half-written frame does not survive
        scalars = {name for name in self.fields if self._arrays[name].ndim == 1}
        values = dict.fromkeys(scalars, np.nan)
        values |= {name: float(value) for name, value in given.items()}
        for name, value in (values | {"time": float(time)}).items():
            if np.isinf(value) or (name == "time" and np.isnan(value)):
                raise fault(self.path, name, f"the value is {value}", "pass a finite number")
        if time <= self.last_time:
            problem = f"{time} fs is not later than the last frame at {self.last_time} fs"
            raise fault(self.path, "time", problem, "pass increasing times")
        return values

    def _checked(self, name: str, values: ArrayLike | None) -> NDArray:
        """Return the values of one variable as they will be stored; NaN where none are given."""
        array = self._arrays[name]
        shape, n_dim = array.shape[1:], self._density.ndim - 1
        if name == "cell":
            return checked_cell(self.path, np.nan if values is None else values, n_dim)
        if values is None:
            return np.full(shape, np.nan, array.dtype)
        with np.errstate(over="ignore"):  # beyond float32 becomes inf, reported below
            values = np.asarray(values).astype(array.dtype)
        if values.shape != shape:
            fix = "use the grid and the atoms of the store"
            raise fault(self.path, name, f"the shape is {values.shape}, not {shape}", fix)
        if not np.isfinite(values).all():
            problem = f"{np.count_nonzero(~np.isfinite(values))} values are not finite"
            raise fault(self.path, name, problem, f"pass finite values, within {array.dtype}")
        if name not in FIELDS:
            return values
        keepbits, step, signed = map(
            self._density.attrs.get, ("keepbits", "resolution", "allow_negative")
        )
        if name == "density" and not signed and values.min() < 0:
            problem = f"{np.count_nonzero(values < 0)} values are negative, down to {values.min()}"
            fix = "clip them knowingly (--clip), or create the store with allow_negative=True"
            raise fault(self.path, name, problem, fix)
        values = values if keepbits is None else bit_round(values, keepbits)
        return values if step is None else np.round(values / step).astype(np.float32) * step


def _close(lock: Lock, journal: Journal) -> None:
    try:
        if lock.held:
            with suppress(FileNotFoundError):  # of a store that somebody has removed
                journal.close()
    finally:
        lock.release()


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
    names = (writer.fields | {"time"}) & set(run.variables)
    frames = range(writer.n_committed, run.sizes["time"])
    for i in progress_bar(frames, f"copying to {writer.path.name}", disable=not progress):
        values = {name: run[name][i].values for name in names}
        # what nobody has given is NaN in the store, and not given again
        writer.append(**{n: v for n, v in values.items() if not np.isnan(v).all()})
