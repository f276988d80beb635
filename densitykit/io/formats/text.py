"""Text files of densities, packed or not: lines with their numbers, and the numbers in them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from densitykit.errors import TrajectoryError
from densitykit.io.store import fault

PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TINY = re.compile(r"[+-]?\d*\.?\d+-\d{3}")  # Fortran drops the E where the exponent has 3 digits


@dataclass(frozen=True)
class Frame:
    """One density of a file: what its program has left there.

    density, magnetization (X, Y, Z) in angstrom**-3; cell, rows, and positions (atom, 3) in
    angstrom; valence (atom,) in electrons; forces (atom, 3) in eV/angstrom.
    """

    density: NDArray[np.float64]
    cell: NDArray[np.float64]
    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    magnetization: NDArray[np.float64] | None = None
    valence: NDArray[np.float64] | None = None
    forces: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Reading:
    """What a file does not say: "bohr" or "angstrom" for values and lengths; end points.

    `unit` is that of the values, bohr**-3 or angstrom**-3 (cube and XSF), `lengths` that of a
    cube file's header; `endpoint`: the grid holds both end points of each edge, which are one
    point of the crystal. None: as is usual for the format, or as the file says.
    """

    unit: str | None = None
    lengths: str | None = None
    endpoint: bool | None = None

    def __post_init__(self) -> None:
        for name in ("unit", "lengths"):
            if getattr(self, name) not in (None, "bohr", "angstrom"):
                problem = f"{name}={getattr(self, name)!r}"
                raise TrajectoryError(f"{problem} is unknown; choose 'bohr' or 'angstrom'")


class Lines:
    """The lines of a file in turn; encodings do not matter, only numbers are read."""

    def __init__(self, path: Path) -> None:
        packing = path.suffix.lower()
        self.path, self.number, self.last, self.read = path, 0, "\n", 0
        self.size = path.stat().st_size * (1000 if packing in PACKED else 1)
        self._file = PACKED.get(packing, open)(path, "rt", encoding="latin-1", newline="")
        self._next: str | None = None

    def close(self) -> None:
        self._file.close()

    def line(self) -> str:
        """Return the next line; TrajectoryError at the end of the file."""
        line, self._next = self._next if self._next is not None else self._file.readline(), None
        if not line:
            problem = f"cut short after line {self.number}"
            raise TrajectoryError(f"{self.path}: {problem}; write the file again")
        self.number, self.last, self.read = self.number + 1, line, self.read + len(line)
        return line

    def peek(self) -> str:
        """Return the next line that is not blank, without taking it; "" at the end."""
        while self._next is None or self._next and not self._next.strip():
            if self._next is not None:
                self.line()
            self._next = self._file.readline()
        return self._next

    def floats(self, start: int = 0, stop: int | None = None) -> list[float]:
        """Return the numbers of the next line, from word `start` to word `stop`."""
        words = self.line().split()[start:stop]
        return [self._value(word, self.number) for word in words]

    def vectors(self, n: int, start: int = 0) -> NDArray[np.float64]:
        """Return `n` lines of three numbers from word `start`, shape (n, 3)."""
        rows = [self.floats(start, start + 3) for _ in range(n)]
        if any(len(row) != 3 for row in rows):
            raise self.wrong("there are no three numbers in a line of a vector")
        return np.array(rows, dtype=float).reshape(n, 3)

    def numbers(self, n: int) -> NDArray[np.float64]:
        """Return the next `n` numbers, shape (n,), however they are spread over lines."""
        if n > self.size:
            raise self.wrong(f"cut short: {n} values in a file of {self.size} bytes")
        values, at, width = np.empty(n), 0, 10
        while at < n:
            first = self.number + 1
            lines = [self.line()]
            width = max(width, len(lines[0].split()))  # so many lines have no number too many
            lines += islice(self._file, max(0, (n - at) // width - 1))
            self.number, self.last = first + len(lines) - 1, lines[-1]
            self.read += sum(map(len, lines[1:]))
            try:
                found = list(map(float, "".join(lines).split()))
            except ValueError:
                words = ((w, first + i) for i, line in enumerate(lines) for w in line.split())
                found = [self._value(word, number) for word, number in words]
            if at + len(found) > n:
                raise self.wrong(f"there are more values than the {n} of the grid")
            values[at : at + len(found)] = found
            at += len(found)
        return values

    def _value(self, word: str, number: int) -> float:
        try:
            return float(word.replace("D", "E").replace("d", "e"))
        except ValueError:
            if _TINY.fullmatch(word):
                return 0.0
            self.number = number
            raise self.wrong(f"{word!r} is no number") from None

    def wrong(self, problem: str) -> TrajectoryError:
        fix = "write the file again, with numbers such as 1.0E-03"
        return fault(self.path, f"line {self.number}", problem, fix)
