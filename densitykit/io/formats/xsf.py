"""XSF, of XCrySDen and Quantum ESPRESSO: x fastest, the last plane of each axis is the first.

Lengths are in angstrom, forces in hartree/angstrom; values of a density in bohr**-3, as Quantum
ESPRESSO writes them (the format leaves it open).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from densitykit.io.formats.text import Frame, Lines, Reading
from densitykit.units import BOHR, HARTREE, SYMBOLS


def read_xsf(lines: Lines, reading: Reading) -> Iterator[Frame]:
    """Yield the one frame of an XSF file."""
    found: dict[str, Any] = {"atoms": [], "grids": []}
    while line := lines.peek():
        word = lines.line().split()[0].upper()
        if word == "PRIMVEC":
            found["cell"] = lines.vectors(3)
        elif word == "CONVVEC":
            lines.vectors(3)
        elif word == "PRIMCOORD":
            found["atoms"] = [lines.line().split() for _ in range(int(lines.floats()[0]))]
        elif word == "ANIMSTEPS" and line.split()[1:] != ["1"]:
            raise lines.wrong("there are several structures in one file, and one density")
        elif word.removeprefix("BEGIN_").startswith("DATAGRID_3D"):
            found["grids"].append(_grid(lines))
    if len(found["grids"]) != 1 or not found["atoms"]:
        problem = f"{len(found['grids'])} grids and {len(found['atoms'])} atoms in one file"
        raise lines.wrong(f"{problem}, not one density of a crystal")
    ((density, origin, spans),) = found["grids"]
    if not np.allclose(spans, found.get("cell", spans), atol=1e-3):
        raise lines.wrong("the grid spans another cell than PRIMVEC")
    if reading.endpoint is None and not repeats(density):
        problem = "opposite faces of the grid differ, and should be the same plane"
        raise lines.wrong(f"{problem}: endpoint=False (--no-endpoint) if both are wanted")
    density = density if reading.endpoint is False else density[:-1, :-1, :-1]
    yield _frame(lines, density, origin, spans, found["atoms"], reading)


def _grid(lines: Lines) -> tuple[NDArray, NDArray, NDArray]:
    """Read values, shape (X, Y, Z) with the repeated planes, origin, and vectors in rows."""
    shape = tuple(int(n) for n in lines.floats())
    origin, spans = lines.vectors(1)[0], lines.vectors(3)
    if len(shape) != 3:
        raise lines.wrong("the grid has no three numbers of points")
    return lines.numbers(int(np.prod(shape))).reshape(shape, order="F"), origin, spans


def _frame(
    lines: Lines,
    density: NDArray,
    origin: NDArray,
    cell: NDArray,
    atoms: list[list[str]],
    reading: Reading,
) -> Frame:
    try:
        numbers = [int(a[0]) if a[0].isdigit() else SYMBOLS.index(a[0]) for a in atoms]
        values = np.array([[float(word) for word in a[1:]] for a in atoms])
    except (ValueError, IndexError) as error:
        raise lines.wrong(f"PRIMCOORD is unreadable ({error})") from error
    forces = values[:, 3:6] * HARTREE if values.shape[1] >= 6 else None
    unit = 1.0 if reading.unit == "angstrom" else BOHR**3
    positions = values[:, :3] - origin
    return Frame(density / unit, cell, np.array(numbers), positions, forces=forces)


def repeats(density: NDArray[np.floating]) -> bool:
    """Whether the last plane along each axis is the first one again, and not all are equal."""
    pairs = [(density.take(0, axis=i), density.take(-1, axis=i)) for i in range(3)]
    close = {"rtol": 1e-4, "atol": 1e-6 * float(np.abs(density).max(initial=0))}
    same = all(np.allclose(first, last, **close) for first, last in pairs)
    return min(density.shape) > 1 and same and bool(np.ptp(density) > close["atol"])


def write_xsf(file: TextIO, frame: Frame, title: str) -> None:
    """Write one frame, density in bohr**-3."""
    file.write(f"# {title}, density in bohr**-3\nCRYSTAL\nPRIMVEC\n")
    vectors = "".join("".join(f"{x:16.10f}" for x in row) + "\n" for row in frame.cell)
    file.write(f"{vectors}PRIMCOORD\n{len(frame.numbers)} 1\n")
    for number, place in zip(frame.numbers, frame.positions, strict=True):
        file.write(f"{number:4}" + "".join(f"{x:16.10f}" for x in place) + "\n")
    values = np.pad(frame.density * BOHR**3, ((0, 1),) * 3, mode="wrap")
    file.write("BEGIN_BLOCK_DATAGRID_3D\ndensity\nBEGIN_DATAGRID_3D_density\n")
    file.write(" ".join(map(str, values.shape)) + f"\n0.0 0.0 0.0\n{vectors}")
    flat = values.ravel(order="F")
    for start in range(0, flat.size, 6):
        file.write("".join(f" {value:13.6E}" for value in flat[start : start + 6]) + "\n")
    file.write("END_DATAGRID_3D\nEND_BLOCK_DATAGRID_3D\n")
