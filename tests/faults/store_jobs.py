"""What a user does with a store, step by step, and how to see that nothing is lost."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from densitykit.cli import main
from densitykit.io.reader import open_trajectory
from densitykit.io.rebuild import extend_trajectory, pack_trajectory, trim_trajectory
from densitykit.io.splits import write_splits
from densitykit.io.validate import validate_trajectory
from densitykit.io.writer import TrajectoryWriter, create_trajectory

LENGTH, MORE = 4, 6
SPLITS = {"train": {"run": ".", "start": 0, "stop": 3}}


def frame(k: int) -> dict[str, Any]:
    rng = np.random.default_rng(k)
    values = {name: rng.normal(size=(2, 3)) for name in ("positions", "velocities", "forces")}
    rho = rng.random((4, 4, 4))
    rho = (rho / rho.sum()).astype(np.float32)
    return {"density": rho, "time": 2.0 * k, "energy": -float(k), "temperature": 300.0, **values}


def write(path: Path, tell: Callable[[Any], None], durable: bool | None = None) -> None:
    """Create, append, extend, append, split, trim: from wherever it was interrupted.

    `tell` is called with the frames that are committed and synced, after each step.
    """
    if not path.exists() and not list(path.parent.glob(f".{path.name}.densitykit-old-*")):
        create_trajectory(path, n_frames=LENGTH, grid=(4, 4, 4), cell=3.0, numbers=[3, 3])
    writer = TrajectoryWriter(path, durable=durable)
    tell((writer.n_committed, writer.n_synced))
    while writer.n_committed < MORE:
        if writer.n_committed == writer.n_frames:
            writer.close()
            extend_trajectory(path, MORE + 1).close()
            writer = TrajectoryWriter(path, durable=durable)
        writer.append(**frame(writer.n_committed))
        tell((writer.n_committed, writer.n_synced))
    writer.close()
    tell((writer.n_committed, writer.n_synced))
    write_splits(path, SPLITS)
    trim_trajectory(path)


def pack(path: Path, tell: Callable[[Any], None], durable: bool | None = None) -> None:
    """Write, pack, and append to the packed store."""
    if not path.exists() or open_trajectory(path).sizes["time"] < MORE:
        write(path, tell, durable)
    if "packed" not in open_trajectory(path).attrs["history"]:
        pack_trajectory(path, frames_per_shard=4)
    if open_trajectory(path).sizes["time"] == MORE:
        with TrajectoryWriter(path, durable=durable) as writer:
            room = writer.n_frames
        if room == MORE:  # else it was extended before it was interrupted
            extend_trajectory(path, MORE + 1).close()
        with TrajectoryWriter(path, durable=durable) as writer:
            tell((MORE, MORE))
            writer.append(**frame(MORE))
            tell((MORE + 1, writer.n_synced))


JOBS = {"write": write, "pack": pack}


def check(path: Path, at_least: int) -> int:
    """Open a store: sound, with so many frames, each bit for bit; return how many there are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the power went")
        run = open_trajectory(path).load()
    assert run.sizes["time"] >= at_least, f"{run.sizes['time']} frames, not {at_least}"
    for k in range(run.sizes["time"]):
        for name, values in frame(k).items():
            assert np.array_equal(run[name][k], values), f"{name} of frame {k}"
    problems = validate_trajectory(path)
    assert not problems, problems
    return run.sizes["time"]


def command(*words: object) -> tuple[int, str]:
    """Run the command line; return its exit status and what it says of errors."""
    sys.argv, sys.stderr, sys.stdout = ["densitykit", *map(str, words)], StringIO(), StringIO()
    return main(), sys.stderr.getvalue()
