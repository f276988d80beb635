"""What is wrong with a trajectory, precisely: one line per problem, with the frames and the fix.

Checked are the schema, the commit marks, and every committed frame: that its chunk is there and
can be decoded, that the density is finite and non-negative, that no frame repeats the one before,
and that the number of electrons is the stored one and that of the other frames. Frames are read
one at a time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray

from densitykit.errors import TrajectoryError
from densitykit.io.durable import written
from densitykit.io.formats import read_frames
from densitykit.io.metadata import metadata_problems
from densitykit.io.progress import progress_bar
from densitykit.io.schema import (
    READABLE,
    SCHEMA_VERSION,
    decodable,
    lost_chunks,
    open_arrays,
    schema_problems,
    spell,
    time_problems,
)
from densitykit.io.splits import read_splits, split_problems
from densitykit.io.store import RESTORE, PathLike, locate, runs

__all__ = ["validate_trajectory"]


def validate_trajectory(
    path: PathLike, *, tolerance_electrons: float = 1e-3, progress: bool = False
) -> list[str]:
    """List everything that is wrong with a trajectory, or with all runs of a store.

    Frames are read one at a time, so memory use does not grow with the length.

    Parameters
    ----------
    path
        The group of a trajectory, or a root group with runs; or a file that `iter_frames` reads.
    tolerance_electrons
        Largest relative deviation of the electron number of a frame from the stored value, and
        from the median of all frames.
    progress
        Show a progress bar.

    Returns
    -------
    list of str
        One line per problem: variable, frames, what is wrong, what to do. Empty if all is well.
    """
    try:
        if Path(path).is_file():
            read_frames(path)
            return []
        path = locate(path)
    except TrajectoryError as error:
        return [str(error)]
    problems = []
    if runs(path) == ["."]:
        problems = _run_problems(path, tolerance_electrons, progress)
    else:
        options = {"tolerance_electrons": tolerance_electrons, "progress": progress}
        for run in runs(path):
            problems += [f"{run}: {line}" for line in validate_trajectory(path / run, **options)]
    try:
        return problems or split_problems(path, read_splits(path))
    except TrajectoryError as error:
        return [str(error)]


def _run_problems(path: Path, tolerance: float, progress: bool) -> list[str]:
    """List the problems of one run."""
    arrays, broken = open_arrays(path)
    broken = broken or schema_problems(arrays) or metadata_problems(path)
    if broken:
        return broken
    lines, attrs = [], zarr.open_group(path, mode="r").attrs
    if attrs.get("schema_version") not in READABLE:
        problem = f"schema_version is {attrs.get('schema_version')!r}"
        lines.append(f"attributes: {problem}; convert the store and set {SCHEMA_VERSION!r}")
    lost = {name for name in arrays if name != "density" and not decodable(arrays[name])}
    lines += [f"{name}: a chunk cannot be decoded; {RESTORE}" for name in sorted(lost)]
    if lost & {"time", "cell"}:
        return lines
    n, grid = written(arrays["time"]), arrays["density"].shape[1:]
    time = arrays["time"][:n]
    lines += time_problems(time) + _odd_arrays(path, arrays, lost)
    frames = np.flatnonzero(np.isfinite(time))
    lines += lost_chunks(path, arrays, frames.size)
    cells = arrays["cell"][:] if arrays["cell"].ndim == 2 else arrays["cell"][:n][frames]
    volumes = np.abs(np.linalg.det(cells))
    if not (volumes > 0).all():
        return [*lines, f"cell: the volume is {np.min(volumes)}; {RESTORE}"]
    if 0 in grid:
        return [*lines, f"density: the grid {grid} is empty; {RESTORE}"]
    found, sums = _scan(arrays["density"], frames, progress)
    counts = sums * volumes / np.prod(grid)
    known = "n_electrons" in arrays and "n_electrons" not in lost
    stored = arrays["n_electrons"][:n][frames] if known else counts
    found |= _count_problems(frames, counts, stored, tolerance)
    return lines + [f"density, {spell(found[text])}: {text}" for text in found]


def _odd_arrays(path: Path, arrays: Mapping[str, zarr.Array], lost: set[str]) -> list[str]:
    """List what can be read, but is not what programs expect."""
    lines, grid = [], arrays["density"].shape[1:]
    for name in arrays:
        if re.search(r'"endian":\s*"big"', (path / name / "zarr.json").read_text()):
            lines.append(f"{name}: stored big-endian; rewrite it with little-endian values")
    if len(grid) > 1 and min(grid) == 1 and max(grid) >= 16:
        text = " x ".join(map(str, grid))
        lines.append(f"density: a grid of {text} points is no {len(grid)}-D density; rewrite it")
    if "numbers" not in arrays or "numbers" in lost:
        return lines
    numbers = arrays["numbers"][:]
    if not np.issubdtype(numbers.dtype, np.integer):
        lines.append(f"numbers: stored as {numbers.dtype}; rewrite them as int64")
    if wrong := sorted({n for n in numbers.tolist() if not 0 <= n <= 118}):
        lines.append(f"numbers: {wrong} are no elements; restore them, from 0 to 118")
    return lines


def _scan(
    density: zarr.Array, frames: NDArray[np.integer], progress: bool
) -> tuple[dict[str, list[int]], NDArray[np.float64]]:
    """Read the frames one by one; return problem to frames, and sums over the grid."""
    found: dict[str, list[int]] = defaultdict(list)
    sums = np.full(frames.size, np.nan)
    negative, previous = [], None
    for i, frame in enumerate(progress_bar(frames, unit="frame", disable=not progress)):
        try:
            values = density[int(frame)]
        except Exception:  # every codec raises its own
            found[f"the chunk cannot be decoded; {RESTORE}"].append(frame)
            continue
        if np.array_equal(values, np.full_like(values, density.fill_value), equal_nan=True):
            found[f"committed, but the chunk is missing; {RESTORE}"].append(frame)
        elif not np.isfinite(values).all():
            found[f"values are not finite; {RESTORE}, or recompute the frame"].append(frame)
        else:
            sums[i] = values.sum(dtype=np.float64)
            if previous is not None and np.array_equal(values, previous):
                fix = "drop the frame, and look for a calculation that stood still"
                found[f"equal to the frame before; {fix}"].append(frame)
            if values.min() < 0:
                negative.append((frame, np.count_nonzero(values < 0), values.min()))
            previous = values
    if negative and not density.attrs.get("allow_negative", False):
        where, numbers, lowest = zip(*negative, strict=True)
        fix = "recompute or clip them, or declare them with the attribute allow_negative"
        found[f"{sum(numbers)} negative values, down to {min(lowest):.3g}; {fix}"] = list(where)
    return found, sums


def _count_problems(
    frames: NDArray[np.integer],
    counts: NDArray[np.float64],
    stored: NDArray[np.float64],
    tolerance: float,
) -> dict[str, list[int]]:
    """Compare electron numbers with those stored, and with the median of the run."""
    finite = np.isfinite(counts)
    typical = np.median(counts[finite]) if finite.any() else np.nan
    found = {}
    for reference, name in ((stored, "the stored n_electrons"), (typical, f"{typical:.6g}")):
        # not "> tolerance": a reference of NaN is a deviation too
        off = finite & ~(np.abs(counts - reference) <= tolerance * abs(typical))
        if off.any():
            worst = counts[off][np.argmax(np.abs(counts[off] - typical))]
            problem = f"the electron number differs from {name} (worst: {worst:.6g})"
            found[f"{problem}; {RESTORE}, or recompute the frame"] = list(frames[off])
    return found
