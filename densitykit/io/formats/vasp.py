"""VASP's CHGCAR, CHG, AECCAR, PARCHG: density times volume, x fastest; spins; several frames.

After the density come augmentation occupancies, moments, and the magnetization in blocks of the
same kind; then perhaps the next frame.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from densitykit.io.formats.text import Frame, Lines, Reading
from densitykit.units import SYMBOLS

_ZVAL = re.compile(r"ZVAL\s*=\s*([\d.]+)\s+mass")
_HEAD = 2_000_000  # characters of an OUTCAR before its first step, at most


def read_vasp(lines: Lines, reading: Reading) -> Iterator[Frame]:
    """Yield the frames of a file of VASP 5 or later; nothing of `reading` is left open by it."""
    while not lines.number or lines.peek():
        cell, numbers, positions = _header(lines)
        lines.peek()
        grid = lines.line().split()
        if len(grid) != 3 or not all(word.isdigit() for word in grid):
            raise lines.wrong("there is no grid of three whole numbers after the positions")
        shape, volume, blocks = tuple(map(int, grid)), abs(np.linalg.det(cell)), []
        while not blocks or _next_block(lines, grid):
            values = lines.numbers(int(np.prod(shape))) / volume
            blocks.append(values.reshape(shape, order="F"))
        if len(blocks) > 2:
            warnings.warn(
                f"{lines.path}: magnetization of noncollinear spins is left out", stacklevel=2
            )
        spin = blocks[1] if len(blocks) == 2 else None
        valence = _valence(lines.path.parent, numbers)
        yield Frame(blocks[0], cell, numbers, positions, spin, valence)
    if not lines.last.endswith("\n"):  # half a number is a number
        raise lines.wrong("cut short: there is no newline at the end")


def _header(lines: Lines) -> tuple[NDArray, NDArray, NDArray]:
    """Read lattice vectors in rows, atomic numbers, and positions in angstrom."""
    lines.line()
    scale, cell = np.array(lines.floats()), lines.vectors(3)
    if scale.size == 1 and scale[0] < 0:  # the volume
        scale = (-scale / abs(np.linalg.det(cell))) ** (1 / 3)
    symbols = lines.line().split()
    elements = [re.split(r"[_/.\d]", symbol)[0] for symbol in symbols]
    if not elements or not all(element in SYMBOLS for element in elements):
        raise lines.wrong(f"{' '.join(symbols) or 'nothing'} where symbols of elements belong")
    counts = [int(n) for n in lines.floats()]
    if len(counts) != len(elements):
        raise lines.wrong(f"{len(counts)} numbers of atoms for {len(elements)} elements")
    kind = lines.line().strip().lower()
    kind = lines.line().strip().lower() if kind.startswith("s") else kind  # selective dynamics
    positions, cell = lines.vectors(sum(counts)), cell * scale
    positions = positions * scale if kind[:1] in ("c", "k") else positions @ cell
    return cell, np.repeat([SYMBOLS.index(e) for e in elements], counts), positions


def _next_block(lines: Lines, grid: list[str]) -> bool:
    """Go to the next block of this frame; False where another frame begins, or nothing."""
    while words := lines.peek().split():
        if words == grid:
            lines.line()
            return True
        if words[0].startswith("augmentation"):
            lines.line()
            lines.numbers(int(words[-1]))
        elif re.fullmatch(r"[-+.\deEdD\s]+", " ".join(words)):
            lines.line()  # moments
        else:
            return False
    return False


def _valence(folder: Path, numbers: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Return the electrons of each atom by the POTCAR or OUTCAR beside the file, if there."""
    groups = [len(list(group)) for _, group in groupby(numbers)]
    for name in ("POTCAR", "OUTCAR"):
        if (folder / name).is_file():
            with (folder / name).open(encoding="latin-1") as file:
                charges = _ZVAL.findall(file.read() if name == "POTCAR" else file.read(_HEAD))
            if len(charges) == len(groups):
                return np.repeat(np.array(charges, dtype=float), groups)
    return None


def write_vasp(file: TextIO, frame: Frame, title: str) -> None:
    """Write one frame as a CHGCAR, without augmentation; spins where there are any."""
    groups = [(SYMBOLS[z], len(list(group))) for z, group in groupby(frame.numbers)]
    file.write(f"{title}\n   1.0\n")
    file.writelines("".join(f"{x:16.10f}" for x in vector) + "\n" for vector in frame.cell)
    file.write("".join(f"{symbol:>6}" for symbol, _ in groups) + "\n")
    file.write("".join(f"{n:6}" for _, n in groups) + "\nDirect\n")
    fractions = frame.positions @ np.linalg.inv(frame.cell)
    file.writelines("".join(f"{x:16.10f}" for x in row) + "\n" for row in fractions)
    volume = abs(np.linalg.det(frame.cell))
    for field in (frame.density, frame.magnetization):
        if field is not None:
            file.write(
                ("\n" if field is frame.density else "")
                + "".join(f"{n:5}" for n in field.shape)
                + "\n"
            )
            values = (field * volume).ravel(order="F")
            for start in range(0, values.size, 5):
                row = values[start : start + 5]
                file.write("".join(f" {value:17.10E}" for value in row) + "\n")
