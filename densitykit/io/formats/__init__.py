"""Densities of other programs, read as frames in our units: cube, VASP's CHGCAR and like, XSF.

What goes wrong between programs is looked for here: units (the electron count tells), grids that
hold both end points, numbers without exponent letter, values that are stars. The count is near a
whole number for valence densities of pseudopotentials on the grid they were computed on, and off
by percents for all-electron densities, whose cusps no such grid resolves.
"""

from __future__ import annotations

import lzma
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from densitykit.errors import TrajectoryError
from densitykit.io.formats.cube import read_cube
from densitykit.io.formats.text import PACKED, Frame, Lines, Reading
from densitykit.io.formats.vasp import read_vasp
from densitykit.io.formats.xsf import read_xsf, repeats
from densitykit.io.store import PathLike
from densitykit.units import BOHR

__all__ = ["Frame", "Reading", "count_frames", "format_of", "iter_frames", "read_frames"]

_READERS = {"cube": read_cube, "CHGCAR": read_vasp, "xsf": read_xsf}


def read_frames(path: PathLike, reading: Reading | None = None) -> list[Frame]:
    """Read all densities of one file; see `iter_frames`."""
    return list(iter_frames(path, reading))


def iter_frames(path: PathLike, reading: Reading | None = None) -> Iterator[Frame]:
    """Yield the densities of one file, one after the other.

    Parameters
    ----------
    path
        A cube file (`*.cube`, `*.cub`), one of VASP whose name holds CHG, AECCAR or PARCHG, or
        an XSF file (`*.xsf`); as it is, or packed (.gz, .bz2, .xz).
    reading
        What the file does not say.

    Raises
    ------
    TrajectoryError
        The file is missing, cut short, or of another kind; its electrons cannot be, or would
        be a whole number in another unit.
    """
    path, reading = Path(path), reading or Reading()
    if not path.exists():
        raise TrajectoryError(f"{path}: no such file; correct the path")
    if path.is_dir():
        raise TrajectoryError(f"{path}: a folder, not a density; correct the path")
    kind, lines, count = format_of(path), None, 0
    try:
        lines = Lines(path)
        for frame in _READERS[kind](lines, reading):
            _check(path, frame)
            if kind == "xsf" and reading.unit is None:
                frame = _in_likely_unit(path, frame)
            elif kind != "CHGCAR":
                _check_electrons(path, frame, reading)
            if (
                kind == "cube"
                and reading.endpoint is None
                and not count
                and repeats(frame.density)
            ):
                text = "opposite faces are equal, as where a grid holds both end points of an edge"
                warnings.warn(
                    f"{path}: {text}: endpoint=True (--endpoint) drops them", stacklevel=2
                )
            yield frame
            count += 1
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise TrajectoryError(f"{path}: {error}; correct the path, or write it again") from error
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        if isinstance(error, TrajectoryError):
            raise
        where = f"line {lines.number}" if lines else "the file"
        problem = f"not a readable {kind} file ({error})"
        raise TrajectoryError(f"{path}: {where}: {problem}; write it again") from error
    finally:
        if lines:
            lines.close()


def format_of(path: Path) -> str:
    """Return "cube", "CHGCAR" or "xsf" by the name; TrajectoryError if it says nothing."""
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    if name.suffix.lower() in (".cube", ".cub"):
        return "cube"
    if name.suffix.lower() == ".xsf":
        return "xsf"
    words = ("CHG", "AECCAR")
    if any(word in name.name.upper() for word in words) or name.suffix.lower() == ".vasp":
        return "CHGCAR"
    raise TrajectoryError(
        f"{path}: neither cube, XSF nor VASP by its name; rename it to end with .cube or .xsf, or "
        "to begin with CHGCAR"
    )


def count_frames(path: Path, reading: Reading | None = None) -> int:
    """Estimate the number of frames in a file from the length of its first one."""
    lines = Lines(path)
    try:
        next(_READERS[format_of(path)](lines, reading or Reading()))
        if path.suffix.lower() in PACKED:
            return sum(1 for _ in iter_frames(path, reading))
        return max(1, round(lines.size / max(1, lines.read)))
    finally:
        lines.close()


def _check(path: Path, frame: Frame) -> None:
    """Complain about a frame that is no density of atoms in a cell."""
    shape, numbers = frame.density.shape, frame.numbers
    finite = all(np.isfinite(a).all() for a in (frame.density, frame.cell, frame.positions))
    problems = {
        f"an empty grid of {shape} points": min(shape) < 1,
        "values that are not finite": not finite,
        "lattice vectors that span no cell": finite and np.linalg.matrix_rank(frame.cell) < 3,
        f"numbers of no elements, {sorted(set(numbers.tolist()))}": len(numbers)
        and not 0 <= numbers.min() <= numbers.max() <= 118,
    }
    for problem, there in problems.items():
        if there:
            raise TrajectoryError(f"{path}: {problem}; write the file again")


def _check_electrons(path: Path, frame: Frame, reading: Reading) -> None:
    """Complain about more electrons than the nuclei have, or a count that speaks for a unit."""
    count = float(frame.density.mean() * abs(np.linalg.det(frame.cell)))
    nuclear = int(frame.numbers.sum())
    other = "angstrom" if reading.unit != "angstrom" else "bohr"
    there = count * (BOHR**3 if other == "angstrom" else BOHR**-3)
    if nuclear and count > 1.05 * nuclear + 2:
        problem = f"{count:.2f} electrons, but the nuclei have {nuclear}"
        fix = f"give unit={other!r} (--unit {other}) if the values are per {other}**3"
        raise TrajectoryError(f"{path}: {problem} ({there:.2f} in the other unit); {fix}")
    if reading.unit is None and _whole(there) and not _whole(count):
        problem = f"{count:.2f} electrons, {there:.2f} if the values are per angstrom**3"
        fix = "say which: unit='bohr' or unit='angstrom' (--unit bohr, --unit angstrom)"
        raise TrajectoryError(f"{path}: {problem}; {fix}")
    larger = count / BOHR**3
    possible = reading.lengths is None and reading.unit is None and larger <= nuclear + 0.5
    if possible and _whole(larger) and not _whole(count):
        problem = f"{count:.3f} electrons, {larger:.2f} if the lengths are in angstrom"
        fix = "say which: lengths='bohr' or lengths='angstrom' (--lengths bohr, ...)"
        raise TrajectoryError(f"{path}: {problem}; {fix}")


def _in_likely_unit(path: Path, frame: Frame) -> Frame:
    """Take values of an unknown unit per bohr**3, unless only angstrom**-3 gives a sound count."""
    volume, limit = abs(np.linalg.det(frame.cell)), 1.05 * frame.numbers.sum() + 2
    count = float(frame.density.mean() * volume)
    there = count * BOHR**3
    if count <= limit and (_whole(count) or not _whole(there)):
        return frame
    text = f"values taken as per angstrom**3, which gives {there:.2f} electrons, not {count:.2f}"
    warnings.warn(f"{path}: {text}; unit='bohr' (--unit bohr) if that is wrong", stacklevel=2)
    return replace(frame, density=frame.density * BOHR**3)


def _whole(count: float) -> bool:
    return round(count) > 0 and abs(count - round(count)) < 0.01
