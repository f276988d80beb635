"""Trajectories on disk: the format, its writer and reader, validation, other formats."""

from densitykit.io.reader import open_runs, open_split, open_trajectory, summarise
from densitykit.io.validate import validate_trajectory
from densitykit.io.writer import (
    TrajectoryWriter,
    copy_frames,
    create_trajectory,
    extend_trajectory,
    pack_trajectory,
    write_splits,
)

__all__ = [
    "TrajectoryWriter",
    "copy_frames",
    "create_trajectory",
    "extend_trajectory",
    "open_runs",
    "open_split",
    "open_trajectory",
    "pack_trajectory",
    "summarise",
    "validate_trajectory",
    "write_splits",
]
