"""Trajectories on disk: the format, its writer and reader, validation, other formats."""

from densitykit.io.describe import summarise
from densitykit.io.reader import open_runs, open_split, open_trajectory
from densitykit.io.rebuild import (
    extend_trajectory,
    pack_trajectory,
    trim_trajectory,
    upgrade_trajectory,
)
from densitykit.io.splits import read_splits, split_in_time, write_splits
from densitykit.io.validate import validate_trajectory
from densitykit.io.writer import TrajectoryWriter, copy_frames, create_trajectory

__all__ = [
    "TrajectoryWriter",
    "copy_frames",
    "create_trajectory",
    "extend_trajectory",
    "open_runs",
    "open_split",
    "open_trajectory",
    "pack_trajectory",
    "read_splits",
    "split_in_time",
    "summarise",
    "trim_trajectory",
    "upgrade_trajectory",
    "validate_trajectory",
    "write_splits",
]
