"""Exceptions of densitykit.

All derive from `DensityKitError`, most of them from `ValueError` too, so that code which does not
know this package can still catch them. A message says where (file and variable), what is
wrong, and what to do about it.
"""

__all__ = [
    "CheckpointError",
    "DensityKitError",
    "GenerationError",
    "RolloutError",
    "ShapeError",
    "TrajectoryError",
    "UnfinishedError",
    "WindowError",
]


class DensityKitError(Exception):
    """Base class of every error that densitykit raises on purpose."""


class TrajectoryError(DensityKitError, ValueError):
    """A trajectory store, or a frame meant for one, breaks the format."""


class CheckpointError(DensityKitError, ValueError):
    """A checkpoint is unreadable, or does not belong to the model that loads it."""


class UnfinishedError(DensityKitError, ValueError):
    """Unfinished work is broken, or belongs to another recipe or to other data."""


class ShapeError(DensityKitError, ValueError):
    """An argument has a shape or a value that the operation cannot take."""


class WindowError(DensityKitError, ValueError):
    """A window of frames does not fit the model that it was given to."""


class RolloutError(DensityKitError, ArithmeticError):
    """A one-step map left the numbers that mean something."""


class GenerationError(DensityKitError, RuntimeError):
    """A density could not be computed: bad input, no convergence, or an engine that died."""
