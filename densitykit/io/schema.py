"""What lies on disk: the schema of a trajectory, where its group is, and whether it is whole.

The layout is described in :mod:`densitykit.io.writer`, which writes and reads it, and is
checked frame by frame in :mod:`densitykit.io.validate`. Here is what the two share. Problems are
lines of text, "variable: what is wrong; what to do", so that a check can list them all and a
reader can raise.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from densitykit.errors import TrajectoryError

__all__ = [
    "SCHEMA_VERSION",
    "bit_round",
    "load_arrays",
    "save_arrays",
]

SCHEMA_VERSION = "1.0"

PathLike = str | os.PathLike[str]
_REQUIRED = ("density", "time", "cell")
RESTORE = "restore the file from a copy"


class Variable(NamedTuple):
    dims: tuple[str, ...]
    units: str
    long_name: str


def schema_for(n_dim: int) -> dict[str, Variable]:
    """Return the variables of a trajectory in `n_dim` dimensions."""
    atomic = ("time", "atom", "cartesian")
    return {
        "density": Variable(("time", *"xyz"[:n_dim]), f"angstrom**-{n_dim}", "electron density"),
        "positions": Variable(atomic, "angstrom", "positions of the nuclei"),
        "velocities": Variable(atomic, "angstrom/fs", "velocities of the nuclei"),
        "forces": Variable(atomic, "eV/angstrom", "forces on the nuclei"),
        "numbers": Variable(("atom",), "1", "atomic numbers"),
        "cell": Variable(("vector", "cartesian"), "angstrom", "lattice vectors in rows"),
        "pbc": Variable(("cartesian",), "1", "periodic directions"),
        "n_electrons": Variable(("time",), "1", "stored density summed over the cell"),
        "energy": Variable(("time",), "eV", "potential energy"),
        "temperature": Variable(("time",), "K", "kinetic temperature of the nuclei"),
        "time": Variable(("time",), "fs", "time; NaN marks a frame that is not committed"),
    }


def fault(path: Path, variable: str, problem: str, fix: str) -> TrajectoryError:
    return TrajectoryError(f"{path}: {variable}: {problem}; {fix}")


def raise_any(path: Path, problems: list[str]) -> None:
    if problems:
        raise TrajectoryError("\n".join(f"{path}: {problem}" for problem in problems))


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


def sibling(path: Path, role: str) -> Path:
    """Return the hidden neighbour of `path`: `new` while it is built, `old` while replaced."""
    return path.with_name(f".{path.name}.{role}")


def swap(path: Path) -> None:
    """Put the finished `new` in the place of `path`, if need be by way of `old`.

    Folders cannot be exchanged in one step on every system: for some microseconds there is
    only `old`. `locate` then reads from there, and `recover` puts it back.
    """
    old = sibling(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    sibling(path, "new").rename(path)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Clear away what a killed `create_trajectory` or `extend_trajectory` left behind."""
    old = sibling(path, "old")
    if not path.exists() and old.exists():
        old.rename(path)
    for leftover in (old, sibling(path, "new")):
        shutil.rmtree(leftover, ignore_errors=True)


def locate(path: PathLike) -> Path:
    """Return the folder that holds the zarr group `path`; raise if there is none."""
    path = Path(path)
    if not path.exists():
        old = sibling(path, "old")
        if not old.exists():
            fix = "correct the path, or make the store with create_trajectory"
            raise fault(path, "store", "the path does not exist", fix)
        path = old
    if not (path / "zarr.json").is_file():
        fix = "give the folder that holds it, or write the data with create_trajectory"
        raise fault(path, "store", "not a zarr v3 group, zarr.json is missing", fix)
    try:
        is_group = json.loads((path / "zarr.json").read_bytes())["node_type"] == "group"
    except (ValueError, KeyError, TypeError) as error:
        raise fault(path, "store", f"zarr.json is unreadable ({error!r})", RESTORE) from error
    if not is_group:
        raise fault(path, "store", "this is one variable", f"give its group, {path.parent}")
    return path


def runs(path: Path) -> list[str]:
    """Return the names of the runs in a root group; `["."]` where `path` is itself a run."""
    names = sorted({file.parent.parent.name for file in path.glob("[!.]*/*/zarr.json")})
    return ["."] if (path / "density").is_dir() or not names else names


def open_arrays(path: Path, mode: str = "r") -> tuple[dict[str, zarr.Array], list[str]]:
    """Open the arrays in the group at `path`, and list those whose metadata is broken."""
    arrays, problems = {}, []
    for folder in sorted(path.glob("[!.]*/")):
        try:
            arrays[folder.name] = zarr.open_array(folder, mode=mode)
        except Exception as error:  # zarr, json and the file system each raise their own
            reason = f"zarr.json is unreadable ({type(error).__name__})"
            problems.append(f"{folder.name}: {reason}; {RESTORE}")
    return arrays, problems


def schema_problems(arrays: Mapping[str, zarr.Array]) -> list[str]:
    """Compare names, dimensions, lengths and units with the schema; one line per problem."""
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        fix = "restore it from a copy, or write the store anew with create_trajectory"
        return [f"{name}: this required variable is missing; {fix}" for name in missing]
    n_dim = arrays["density"].ndim - 1
    schema, sizes, problems = schema_for(n_dim), {"vector": n_dim, "cartesian": n_dim}, []
    for name in sorted(arrays, key=lambda name: name != "density"):  # it sets the lengths
        dims, units = arrays[name].metadata.dimension_names, arrays[name].attrs.get("units")
        expected = schema.get(name, Variable(dims, units, ""))
        if dims is None or dims != expected.dims:
            fix = f"rewrite it with dimension_names={expected.dims}"
            problems.append(f"{name}: the dimensions are {dims}; {fix}")
            continue
        if units != expected.units and (units is not None or name in _REQUIRED):
            fix = f"convert the values to {expected.units} and set the attribute 'units'"
            problems.append(f"{name}: the units are {units!r}; {fix}")
        for dim, size in zip(dims, arrays[name].shape, strict=True):
            if size != sizes.setdefault(dim, size):
                problem = f"length {size} along {dim}, expected {sizes[dim]}"
                problems.append(f"{name}: {problem}; restore it from a copy, or rewrite it")
    return problems


def checked_arrays(path: Path, mode: str = "r") -> dict[str, zarr.Array]:
    """Open the arrays of one run; raise `TrajectoryError` where they break the schema."""
    if runs(path) != ["."]:
        fix = f"open one of its runs {runs(path)}, or use open_split"
        raise fault(path, "density", "the group has no density of its own", fix)
    arrays, problems = open_arrays(path, mode)
    raise_any(path, problems or schema_problems(arrays))
    return arrays


def count_committed(path: Path, time: zarr.Array) -> int:
    """Return the number of committed frames; raise if there is a hole among them."""
    if not decodable(time):
        raise fault(path, "time", "a chunk cannot be decoded", RESTORE)
    finite = np.isfinite(time[:])
    count = int(finite.sum())
    if not finite[:count].all():
        raise_any(path, time_problems(time[:]))
    return count


def decodable(array: zarr.Array) -> bool:
    """Read an array chunk by chunk along its first dimension."""
    try:
        for start in range(0, array.shape[0], array.chunks[0]):
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


def split_problems(path: Path, splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check splits against the runs below `path`; one line per problem."""
    problems: list[str] = []
    taken: dict[str, tuple[str, int, int]] = {}
    for name, split in splits.items():
        run, start, stop = (split.get(key) for key in ("run", "start", "stop"))
        if run not in runs(path):
            fix = f"choose one of {runs(path)}"
            problems.append(f"splits, {name}: there is no run {run!r}; {fix}")
            continue
        committed = count_committed(path / run, checked_arrays(path / run)["time"])
        indices = isinstance(start, int) and isinstance(stop, int)
        if not indices or not 0 <= start < stop <= committed:
            fix = f"choose 0 <= start < stop <= {committed}, the committed frames"
            problems.append(f"splits, {name}: frames {start}:{stop} of {run}; {fix}")
            continue
        for other, (its_run, its_start, its_stop) in taken.items():
            if run == its_run and start < its_stop and its_start < stop:
                problems.append(f"splits, {name}: overlaps {other!r} in {run}; move its frames")
        taken[name] = (run, start, stop)
    return problems


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


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays, numbers and texts to one npz file, in one piece: it is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_arrays(path: Path) -> dict[str, NDArray]:
    """Read what `save_arrays` wrote. Texts and numbers come as arrays without dimensions."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
