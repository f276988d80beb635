"""Cube files: lengths in bohr or angstrom, values in bohr**-3, z fastest; an origin anywhere.

Several frames may follow one another (CP2K). Negative numbers of grid points, or a title that says
so, mean lengths in angstrom (Gaussian; RMG). The title's "OUTER LOOP" is not believed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from densitykit.io.formats.text import Frame, Lines, Reading
from densitykit.units import BOHR

_ANGSTROM = re.compile(r"coordinates\s+in\s+angstrom", re.IGNORECASE)


def read_cube(lines: Lines, reading: Reading) -> Iterator[Frame]:
    """Yield the frames of a cube file."""
    while not lines.number or lines.peek():
        title = lines.line() + lines.line()
        head = lines.line().split()
        n_atoms, n_fields = _whole(lines, head[:1]), _whole(lines, head[4:5] or ["1"])
        origin = np.array([float(word) for word in head[1:4]])
        counts, voxels = zip(*(_axis(lines) for _ in range(3)), strict=True)
        atoms = np.array([lines.floats(0, 5) for _ in range(abs(n_atoms))]).reshape(-1, 5)
        if n_atoms < 0:  # labels of orbitals, after their number
            n_fields = _whole(lines, lines.peek().split()[:1])
            lines.numbers(n_fields + 1)
        if n_fields != 1:
            raise lines.wrong(f"there are {n_fields} fields in one file, not one density")
        if min(counts) < 0 < max(counts):
            raise lines.wrong(f"the numbers of grid points are {counts}, of unlike sign")
        in_angstrom = min(counts) < 0 or _ANGSTROM.search(title)
        length = 1.0 if (reading.lengths or (in_angstrom and "angstrom")) == "angstrom" else BOHR
        shape = np.abs(counts)
        density = lines.numbers(int(np.prod(shape))).reshape(shape)
        if reading.endpoint or reading.endpoint is None and "castep2cube" in title:
            density, shape = density[:-1, :-1, :-1], shape - 1
        yield Frame(
            density / (1.0 if reading.unit == "angstrom" else BOHR**3),
            shape[:, None] * np.array(voxels) * length,
            atoms[:, 0].astype(int),
            (atoms[:, 2:] - origin) * length,
            valence=_valence(atoms[:, 0], atoms[:, 1]),
        )


def _whole(lines: Lines, words: list[str]) -> int:
    try:
        return int(words[0])
    except (ValueError, IndexError):
        raise lines.wrong(f"{' '.join(words) or 'nothing'} where a whole number belongs") from None


def _axis(lines: Lines) -> tuple[int, list[float]]:
    words = lines.line().split()
    if len(words) != 4:
        raise lines.wrong("an axis of the grid has a number of points and a vector")
    return _whole(lines, words), [float(word) for word in words[1:]]


def _valence(numbers: NDArray[np.float64], charges: NDArray[np.float64]) -> NDArray | None:
    """Return the column of charges where it is that of the ions, not 0 or the nuclear one."""
    sound = (charges > 0).all() and (charges <= numbers).all()
    return charges if sound and (charges < numbers).any() else None


def write_cube(file: TextIO, frame: Frame, title: str) -> None:
    """Write one frame, whose charges are those of the ions if known, else of the nuclei."""
    charges = frame.numbers if frame.valence is None else frame.valence
    file.write(f"{title}\ndensity in bohr**-3, lengths in bohr, z fastest\n")
    file.write(f"{len(frame.numbers):5}{0:14.8f}{0:14.8f}{0:14.8f}\n")
    for n, vector in zip(frame.density.shape, frame.cell, strict=True):
        file.write(f"{n:5}" + "".join(f"{x:14.8f}" for x in vector / n / BOHR) + "\n")
    for number, charge, place in zip(frame.numbers, charges, frame.positions, strict=True):
        file.write(f"{number:5}" + "".join(f"{x:14.8f}" for x in [charge, *place / BOHR]) + "\n")
    for row in (frame.density * BOHR**3).reshape(-1, frame.density.shape[2]):
        for start in range(0, row.size, 6):
            file.write("".join(f" {value:13.6E}" for value in row[start : start + 6]) + "\n")
