"""Units: angstrom, fs, eV, dalton, kelvin; what converts to and from them; data of elements.

Multiply by a constant (CODATA 2018) to go from the unit in its name to ours, unless the comment
says otherwise. Of elements, `elements.csv` has the standard atomic weights of IUPAC (2021), and of
those without stable isotopes that of the longest lived; covalent radii in pm (Cordero et al.
2008); and the colours of Jmol: all as in ASE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from densitykit.errors import ShapeError

__all__ = ["ACCELERATION", "ATOMIC_TIME", "BOHR", "BOLTZMANN_HARTREE", "CM2_PER_S", "COLOURS"]
__all__ += ["HARTREE", "KELVIN", "PER_CM", "RADII", "SYMBOLS", "atomic_masses"]

BOHR = 0.529177210903  # angstrom
HARTREE = 27.211386245988  # eV
ATOMIC_TIME = 0.024188843265857  # fs
BOLTZMANN_HARTREE = 3.1668115634556e-6  # k_B in hartree / K
#: 1 eV/angstrom on 1 dalton, as an acceleration in angstrom/fs**2
ACCELERATION = 1.602176634e-19 / 1.66053907e-27 * 1e-10
#: k_B in dalton (angstrom/fs)**2 / K: 1.380649e-23 J/K / (1.66053907e-27 kg * 1e10 m**2/s**2)
KELVIN = 1.380649e-23 / 1.66053907e-17
#: 1 angstrom**2/fs in cm**2/s
CM2_PER_S = 0.1
#: 1 rad/fs in 1/cm
PER_CM = 1e13 / (2 * math.pi * 299792458.0)

_ELEMENTS = (Path(__file__).parent / "elements.csv").read_text().split()[1:]
#: of the elements by atomic number, "X" for 0: symbols, covalent radii in pm, colours
SYMBOLS, _MASSES, RADII, COLOURS = zip(*(row.split(",") for row in _ELEMENTS), strict=True)


def atomic_masses(numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Masses in dalton of atomic numbers, of the same shape.

    Raises
    ------
    ShapeError
        If a number is that of no element.
    """
    numbers = np.asarray(numbers)
    whole = np.round(numbers).astype(int)
    if not np.array_equal(whole, numbers) or (whole < 1).any() or (whole >= len(_MASSES)).any():
        strange = sorted(set(np.unique(numbers).tolist()) - set(range(1, len(_MASSES))))
        raise ShapeError(f"{strange} are no atomic numbers; give 1 to {len(_MASSES) - 1}")
    return np.array(_MASSES, dtype=float)[whole]
