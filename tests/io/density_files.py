"""Small files as other programs write them, of water in a skewed cell: six electrons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.vasp import VaspChargeDensity
from ase.io.cube import write_cube as ase_write_cube
from ase.units import Bohr

Make = Callable[..., Path]
CELL = np.array([[5.0, 0.0, 0.0], [1.0, 6.0, 0.0], [0.0, -0.5, 7.0]])
SHAPE = (4, 6, 8)


def density(time: float = 0.0) -> np.ndarray:
    """Six electrons, unlike along each axis, in angstrom**-3."""
    x, y, z = np.meshgrid(*(np.arange(n) / n for n in SHAPE), indexing="ij")
    wave = 1 + 0.5 * np.sin(2 * np.pi * (x + time)) + 0.3 * np.cos(2 * np.pi * (y + 2 * z))
    return 6 / np.linalg.det(CELL) * wave


def atoms() -> Atoms:
    return Atoms("OH2", [[1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, 2.0, 1.5]], cell=CELL, pbc=True)


def cube(path: Path, time: float = 0.0, origin: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Path:
    """As a program with atomic units writes it."""
    with path.open("w") as file:
        moved = atoms()
        moved.positions += origin
        ase_write_cube(file, moved, density(time) * Bohr**3, origin=origin)
    return path


def chgcar(path: Path, times: tuple[float, ...] = (0.0,)) -> Path:
    """As VASP writes it: density times volume, x fastest."""
    file = VaspChargeDensity(None)
    file.atoms, file.chg = [atoms() for _ in times], [density(t) for t in times]
    file.write(str(path), format="chgcar" if len(times) == 1 else "chg")
    return path
