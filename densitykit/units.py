"""Units: angstrom, fs, eV, dalton, kelvin; and what converts to and from them (CODATA 2018).

Multiply by a constant to go from the unit in its name to ours, unless the comment says otherwise.
"""

from __future__ import annotations

import math

__all__ = [
    "ACCELERATION",
    "ATOMIC_TIME",
    "BOHR",
    "BOLTZMANN_HARTREE",
    "CM2_PER_S",
    "HARTREE",
    "KELVIN",
    "PER_CM",
]

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
