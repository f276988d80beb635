"""Which frames of a store are for training, validation and test.

The attribute `splits` of its root is JSON text (in older stores a mapping), name to frames,
half-open: `{"train": {"run": "run-1", "start": 0, "stop": 400}}`. Where the root is itself a
trajectory, its run is called ".".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike

from densitykit.errors import TrajectoryError
from densitykit.io.metadata import metadata_problems, set_attributes
from densitykit.io.schema import checked_arrays, count_committed
from densitykit.io.store import Lock, PathLike, fault, locate, raise_any, runs

__all__ = ["read_splits", "split_in_time", "write_splits"]


def read_splits(path: PathLike) -> dict[str, dict[str, Any]]:
    """Return the splits of a store, empty where it has none; TrajectoryError if unreadable."""
    path = locate(path)
    raise_any(path, metadata_problems(path, root=runs(path) != ["."]))
    found = zarr.open_group(path, mode="r").attrs.get("splits", {})
    try:
        return {name: dict(split) for name, split in _parsed(found).items()}
    except (ValueError, TypeError, AttributeError) as error:
        fix = "write them again with write_splits"
        raise fault(path, "splits", f"unreadable ({error})", fix) from error


def _parsed(splits: Any) -> Any:
    return json.loads(splits) if isinstance(splits, str) else splits


def write_splits(path: PathLike, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the splits of a store into the attributes of its root, replacing earlier ones.

    Parameters
    ----------
    path
        The root group.
    splits
        Name to frames, as in the module docstring.

    Raises
    ------
    TrajectoryError
        A run is missing, frames are not committed, or two splits overlap.
    """
    path = locate(path)
    raise_any(path, split_problems(path, splits))
    text = json.dumps({name: dict(split) for name, split in splits.items()}, default=int)
    with Lock(path, takes=False):
        set_attributes(path, splits=text)


def split_in_time(
    path: PathLike, fractions: Sequence[float] = (0.7, 0.1, 0.2), gap: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Cut a run into train, validation and test, one after another, and write the splits.

    Parameters
    ----------
    path
        A store that is one run.
    fractions
        Of the run, for the three; they sum to at most one.
    gap
        Time left out between them, fs: longer than the density remembers, for a fair test. A
        second, independent run makes a better one.

    Raises
    ------
    TrajectoryError
        Impossible fractions, or a run too short for them.
    """
    folder = locate(path)
    arrays = checked_arrays(folder)
    times = arrays["time"][: count_committed(folder, arrays)]
    splits = cut_in_time(times, fractions, gap, str(path))
    write_splits(path, splits)
    return splits


def cut_in_time(
    times: ArrayLike, fractions: Sequence[float], gap: float, source: str
) -> dict[str, dict[str, Any]]:
    """Return the splits of frames at `times` in fs; see `split_in_time`."""
    times = np.asarray(times)
    sound = len(fractions) == 3 and min(fractions) > 0 and sum(fractions) <= 1 + 1e-9
    if not sound or not 0 <= gap < np.inf:
        problem = f"fractions {list(fractions)} and a gap of {gap:g} fs are no splits"
        fix = "give three positive fractions of a sum up to 1, and a gap of at least 0 fs"
        raise TrajectoryError(f"{source}: {problem}; {fix}")
    ends = np.round(np.cumsum(fractions) * len(times) + 1e-9).astype(int)
    after = np.append(times, np.inf)[ends[:-1]] + gap - 1e-6
    starts = [0, *np.searchsorted(times, after)]
    if (ends <= starts).any():
        span = times[-1] - times[0] if len(times) else 0
        problem = f"fractions {list(fractions)} with gaps of {gap:g} fs leave a split empty"
        fix = "make the gap shorter, or the run longer"
        raise TrajectoryError(f"{source}: {len(times)} frames, {span:g} fs: {problem}; {fix}")
    return {
        name: {"run": ".", "start": int(first), "stop": int(last)}
        for name, first, last in zip(("train", "validation", "test"), starts, ends, strict=True)
    }


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
        committed = count_committed(path / run, checked_arrays(path / run))
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
