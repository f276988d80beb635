"""The variables of a trajectory, their dimensions and units, and whether a group has them.

The layout is described in :mod:`densitykit.io.writer`, and checked frame by frame in
:mod:`densitykit.io.validate`. Problems are lines of text, "variable: what is wrong; what to do",
so that a check can list them all and a reader can raise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from densitykit.io.durable import chunk_files, is_small, open_to_write, read, restore, written
from densitykit.io.metadata import metadata_problems
from densitykit.io.store import RESTORE, fault, raise_any, runs

__all__ = ["SCHEMA_VERSION", "bit_round"]

SCHEMA_VERSION, READABLE = "2.1", ("1.0", "2.0", "2.1")
REQUIRED = ("density", "time", "cell")


class Variable(NamedTuple):
    dims: tuple[str, ...]
    units: str
    long_name: str


def schema_for(n_dim: int) -> dict[str, Variable]:
    """Return the variables of a trajectory in `n_dim` dimensions."""
    atomic, field = ("time", "atom", "cartesian"), ("time", *"xyz"[:n_dim])
    flow = {"current": Variable(field, "1/fs", "electrons through a point per time")}
    return {
        **(flow if n_dim == 1 else {}),
        "density": Variable(field, f"angstrom**-{n_dim}", "electron density"),
        "magnetization": Variable(field, f"angstrom**-{n_dim}", "spin up minus spin down"),
        "positions": Variable(atomic, "angstrom", "positions of the nuclei"),
        "velocities": Variable(atomic, "angstrom/fs", "velocities of the nuclei"),
        "forces": Variable(atomic, "eV/angstrom", "forces on the nuclei"),
        "numbers": Variable(("atom",), "1", "atomic numbers"),
        "valence_charge": Variable(("atom",), "1", "electrons that the atom gives the density"),
        "cell": Variable(("vector", "cartesian"), "angstrom", "lattice vectors in rows"),
        "pbc": Variable(("cartesian",), "1", "periodic directions"),
        "n_electrons": Variable(("time",), "1", "stored density summed over the cell"),
        "energy": Variable(("time",), "eV", "potential energy"),
        "temperature": Variable(("time",), "K", "kinetic temperature of the nuclei"),
        "time": Variable(("time",), "fs", "time; NaN marks a frame that is not committed"),
    }


def bit_round(array: ArrayLike, keepbits: int) -> NDArray[np.float32]:
    """Round the mantissa of float32 values to `keepbits` bits, half to even.

    The relative error is at most 2**-(keepbits + 1), that is 1e-3 for 9 bits and 1.2e-4 for
    12. The zeros that take the place of the dropped bits are what compresses.

    Parameters
    ----------
    array
        Values of any shape and unit; converted to float32.
    keepbits
        Mantissa bits to keep, 0 to 23 (all).

    Returns
    -------
    numpy.ndarray
        Rounded copy, float32, same shape. NaN and infinities pass unchanged.

    Raises
    ------
    ValueError
        `keepbits` is not in 0..23.
    """
    if not 0 <= keepbits <= 23:
        raise ValueError(f"keepbits is {keepbits}; give a number of mantissa bits in 0..23")
    values = np.array(array, dtype=np.float32)
    drop = 23 - keepbits
    if drop == 0:
        return values
    bits = values.view(np.uint32)
    # adding just under half, plus the last kept bit, carries upwards exactly when it should
    bias = (bits >> np.uint32(drop) & np.uint32(1)) + np.uint32((1 << drop - 1) - 1)
    rounded = (bits + bias) >> np.uint32(drop) << np.uint32(drop)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def open_arrays(path: Path, mode: str = "r") -> tuple[dict[str, zarr.Array], list[str]]:
    """Open the arrays in the group at `path`, and list those that are broken or lost."""
    arrays, problems = {}, []
    restore(path)
    for folder in sorted(path.glob("[!.]*/")):
        try:
            array = zarr.open_array(folder, mode=mode) if mode == "r" else open_to_write(folder)
            arrays[folder.name] = array
            array.metadata.dimension_names  # noqa: B018 - zarr v2 has none
            first = folder / array.metadata.encode_chunk_key((0,) * array.ndim)
            if array.attrs.get("always_written") and array.size and not first.is_file():
                problems.append(f"{folder.name}: its first chunk is missing; {RESTORE}")
        except Exception as error:  # zarr, json and the file system each raise their own
            reason = f"zarr.json is unreadable, or not of zarr v3 ({type(error).__name__})"
            problems.append(f"{folder.name}: {reason}; {RESTORE}")
    return arrays, problems


def schema_problems(arrays: Mapping[str, zarr.Array]) -> list[str]:
    """Compare names, dimensions, lengths and units with the schema; one line per problem."""
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        fix = "restore it from a copy, or write the store anew with create_trajectory"
        return [f"{name}: this required variable is missing; {fix}" for name in missing]
    n_dim = arrays["density"].ndim - 1
    schema, sizes, problems = schema_for(n_dim), {"vector": n_dim, "cartesian": n_dim}, []
    for name in sorted(arrays, key=lambda name: name != "density"):  # it sets the lengths
        dims, units = arrays[name].metadata.dimension_names, arrays[name].attrs.get("units")
        expected = schema.get(name, Variable(dims, units, ""))
        moving_cell = name == "cell" and dims == ("time", *expected.dims)
        if dims is None or dims != expected.dims and not moving_cell:
            fix = f"rewrite it with dimension_names={expected.dims}"
            problems.append(f"{name}: the dimensions are {dims}; {fix}")
            continue
        frame = arrays[name].shape["time" in dims :]  # in memory at once, and what Blosc takes
        if math.prod([arrays[name].dtype.itemsize, *frame]) >= 2**31:
            problems.append(f"{name}: {frame} values are too many at once; {RESTORE}")
        if units != expected.units and (units is not None or name in REQUIRED):
            fix = f"convert the values to {expected.units} and set the attribute 'units'"
            problems.append(f"{name}: the units are {units!r}; {fix}")
        for dim, size in zip(dims, arrays[name].shape, strict=True):
            if size != sizes.setdefault(dim, size):
                problem = f"length {size} along {dim}, expected {sizes[dim]}"
                problems.append(f"{name}: {problem}; restore it from a copy, or rewrite it")
    return problems


def checked_arrays(path: Path, mode: str = "r", accept: bool = False) -> dict[str, zarr.Array]:
    """Open the arrays of one run; raise `TrajectoryError` where they break the schema.

    Metadata that were changed since they were written are refused, unless to `accept` them.
    """
    if runs(path) != ["."]:
        fix = f"open one of its runs {runs(path)}, or use open_split"
        raise fault(path, "density", "the group has no density of its own", fix)
    arrays, problems = open_arrays(path, mode)
    raise_any(path, problems or schema_problems(arrays))
    raise_any(path, [] if accept else metadata_problems(path))
    return arrays


def count_committed(path: Path, arrays: Mapping[str, zarr.Array]) -> int:
    """Return the number of committed frames; raise if there is a hole, or a chunk is lost."""
    time = read(arrays["time"], slice(written(arrays["time"])))
    finite = np.isfinite(time)
    count = int(finite.sum())
    if not finite[:count].all():
        raise_any(path, time_problems(time))
    raise_any(path, lost_chunks(path, arrays, count))
    return count


def lost_chunks(path: Path, arrays: Mapping[str, zarr.Array], count: int) -> list[str]:
    """Look for lost commit marks, and for lost chunks of other small values of `count` frames."""
    per_file = (arrays["density"].shards or arrays["density"].chunks)[0]
    late = [i for i, _ in chunk_files(path / "density") if i * per_file > count]
    if late:
        found = f"{count or 'no'} frames are committed, but there are densities of later ones"
        return [f"time: {found}; {RESTORE}"]
    lines, marks = [], max((i for i, _ in chunk_files(path / "time")), default=0)
    for name, array in arrays.items():
        if is_small(array) and array.attrs.get("always_written") and array.size:
            there = {i for i, _ in chunk_files(path / name)}
            if name != "time" and array.chunks == arrays["time"].chunks and max(there) > marks:
                lines.append(f"time: chunk {max(there)} is missing; {RESTORE}")
            lost = sorted(set(range(-(-count // array.chunks[0]))) - there)
            lines += [f"{name}: chunk {lost[0]} is missing; {RESTORE}"] if lost else []
    return lines


def decodable(array: zarr.Array) -> bool:
    """Read an array chunk by chunk along its first dimension."""
    try:
        for start in range(0, written(array), array.chunks[0]):
            array[start : start + array.chunks[0]]
    except Exception:  # every codec raises its own
        return False
    return True


def time_problems(time: NDArray[np.floating]) -> list[str]:
    """Check the commit marks: no holes, and increasing."""
    frames = np.flatnonzero(np.isfinite(time))
    holes = sorted(set(range(frames.max(initial=-1))) - set(frames))
    late = frames[1:][np.diff(time[frames]) <= 0]
    lines = []
    if holes:
        fix = "restore the times, or copy the frames on each side to stores of their own"
        lines.append(f"time, {spell(holes)}: NaN before committed frames; {fix}")
    if late.size:
        fix = "sort the frames, or drop those written twice"
        lines.append(f"time, {spell(late)}: not later than the frame before; {fix}")
    return lines


def spell(frames: Iterable[int]) -> str:
    """Spell frame indices with runs contracted: `frames 3-7, 9`."""
    spans: list[list[int]] = []
    for frame in map(int, frames):
        if spans and frame == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], frame]
        else:
            spans.append([frame])
    plural = "s" if len(spans) > 1 or len(spans[0]) > 1 else ""
    return f"frame{plural} " + ", ".join("-".join(map(str, span)) for span in spans)
