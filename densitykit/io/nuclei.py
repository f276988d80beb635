"""What a program leaves of its nuclei beside the densities: energies, forces, velocities.

Files are read by ASE. A density belongs to the step with its positions. Where no velocities are
found, finite differences of the positions give them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densitykit.errors import DensityKitError, TrajectoryError
from densitykit.io.formats.text import Frame
from densitykit.io.reader import open_trajectory
from densitykit.io.rebuild import rebuilt
from densitykit.io.store import PathLike

__all__ = ["Steps", "differentiate", "read_atoms"]

_TOLERANCE = 0.01  # angstrom between the positions of a density and those of its step
FINITE_DIFFERENCES = "finite differences of the positions"


class Steps:
    """Steps of a run, by their positions.

    Parameters
    ----------
    trajectory
        A file that ASE reads, such as vasprun.xml, OUTCAR or run.extxyz, which must have a step
        for each density. None: what is found beside each file, if anything.
    """

    def __init__(self, trajectory: Path | None = None) -> None:
        self._given = trajectory
        self._files: dict[Path, list[Any]] = {}
        self._next = 0
        self.sources: dict[str, str] = {}

    def of(self, path: Path, frame: Frame) -> dict[str, Any]:
        """Return energy, forces and velocities of a frame of the file `path`, as far as known.

        Raises
        ------
        TrajectoryError
            The trajectory that was given cannot be read, or has no such step.
        """
        source = self._given or _beside(path.parent)
        if source is None:
            return {}
        if source not in self._files:
            self._files[source] = self._read(source)
        steps = self._files[source]
        at = _nearest(steps[self._next :], frame)
        at = _nearest(steps, frame) if at is None else at + self._next
        if at is None:
            problem = f"none of {len(steps)} steps has the positions of {path}"
            if self._given:
                raise TrajectoryError(f"{source}: {problem}; give the trajectory of this run")
            if steps:
                warnings.warn(f"{source}: {problem}; it is left out", stacklevel=2)
            self._files[source] = []
            return {}
        self._next = at + 1
        found = _values(steps[at])
        self.sources |= dict.fromkeys(found, source.name)
        return found

    def _read(self, source: Path) -> list[Any]:
        try:
            return read_atoms(source, ":")
        except (TrajectoryError, OSError) as error:
            if self._given:
                raise
            warnings.warn(f"{error}; it is left out", stacklevel=2)
            return []


def read_atoms(path: PathLike, index: str | None = None) -> Any:
    """Return the structure of a file, or a list of those that an index such as ":" chooses.

    Raises
    ------
    TrajectoryError
        ASE cannot read it.
    DensityKitError
        There is no ASE.
    """
    try:
        from ase.io import read
    except ImportError as error:
        raise DensityKitError(f"{path}: needs ASE; give: pip install ase") from error
    try:
        return read(path, index=index)
    except Exception as error:  # each parser of ASE raises its own
        if isinstance(error, OSError) and error.errno:
            raise
        problem = f"not readable ({error or type(error).__name__})"
        raise TrajectoryError(
            f"{path}: {problem}; give another file, of atoms that ASE reads"
        ) from error


def _beside(folder: Path) -> Path | None:
    names = [folder / "vasprun.xml", folder / "OUTCAR", *sorted(folder.glob("*.extxyz"))]
    return next((path for path in names if path.is_file()), None)


def _nearest(steps: list[Any], frame: Frame) -> int | None:
    """Return the first step with the positions of a frame, up to lattice vectors."""
    inverse = np.linalg.inv(frame.cell)
    for at, step in enumerate(steps):
        if np.array_equal(step.numbers, frame.numbers):
            shift = (step.positions - frame.positions) @ inverse
            if np.abs((shift - np.round(shift)) @ frame.cell).max(initial=0) < _TOLERANCE:
                return at
    return None


def _values(step: Any) -> dict[str, Any]:
    """Return what ASE knows of a step, in eV, eV/angstrom and angstrom/fs."""
    from ase.units import fs

    results = step.calc.results if step.calc else {}
    energy = results.get("free_energy", results.get("energy"))
    velocities = step.get_velocities() * fs if step.has("momenta") else None
    found = {"energy": energy, "forces": results.get("forces"), "velocities": velocities}
    return {name: value for name, value in found.items() if value is not None}


def differentiate(path: Path) -> None:
    """Give a trajectory without velocities those of its positions, and say so in an attribute.

    Central differences of second order, one-sided at the ends; atoms move by less than half a
    cell between frames. They miss what is faster than a few frames.
    """
    run = open_trajectory(path)
    known = "velocities" in run and run["positions"].notnull().all() and run.sizes["time"] > 1
    ours = known and run["velocities"].attrs.get("source") == FINITE_DIFFERENCES
    if not known or not ours and run["velocities"].notnull().any():
        return
    s = _unwrapped(run["positions"].values @ np.linalg.inv(run["cell"].values))
    speed = np.gradient(s, run["time"].values, axis=0, edge_order=2 if len(s) > 2 else 1)
    with rebuilt(path, "velocities from positions") as group:
        velocities = group["velocities"]
        velocities.attrs["source"] = FINITE_DIFFERENCES
        velocities[: len(s)] = speed @ run["cell"].values  # without the motion of the cell itself


def _unwrapped(s: NDArray[np.floating]) -> NDArray[np.floating]:
    """Fractional positions, shape (time, atom, 3), that go on across the faces of the cell."""
    jumps = np.round(np.diff(s, axis=0))
    return np.concatenate([s[:1], s[1:] - np.cumsum(jumps, axis=0)])
