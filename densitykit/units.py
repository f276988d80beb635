"""Units: angstrom, fs, eV, dalton, kelvin; what converts to and from them; masses of elements.

Multiply by a constant (CODATA 2018) to go from the unit in its name to ours, unless the comment
says otherwise. Masses are the standard atomic weights of IUPAC (2021), as in ASE; of elements
without stable isotopes, that of the longest lived.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from densitykit.errors import ShapeError

__all__ = [
    "ACCELERATION",
    "ATOMIC_TIME",
    "BOHR",
    "BOLTZMANN_HARTREE",
    "CM2_PER_S",
    "HARTREE",
    "KELVIN",
    "PER_CM",
    "SYMBOLS",
    "atomic_masses",
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

#: symbols of the elements by atomic number, "X" for 0
SYMBOLS = """
    X
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br
    Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho
    Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es
    Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
""".split()
_MASSES = """
    nan
    1.008 4.002602 6.94 9.012183 10.81 12.011 14.007 15.999 18.9984 20.1797 22.98977 24.305
    26.98154 28.085 30.97376 32.06 35.45 39.948 39.0983 40.078 44.95591 47.867 50.9415 51.9961
    54.93804 55.845 58.93319 58.6934 63.546 65.38 69.723 72.63 74.92159 78.971 79.904 83.798
    85.4678 87.62 88.90584 91.224 92.90637 95.95 97.90721 101.07 102.9055 106.42 107.8682 112.414
    114.818 118.71 121.76 127.6 126.9045 131.293 132.9055 137.327 138.9055 140.116 140.9077
    144.242 144.9128 150.36 151.964 157.25 158.9254 162.5 164.9303 167.259 168.9342 173.054
    174.9668 178.49 180.9479 183.84 186.207 190.23 192.217 195.084 196.9666 200.592 204.38 207.2
    208.9804 208.9824 209.9872 222.0176 223.0197 226.0254 227.0277 232.0377 231.0359 238.0289
    237.0482 244.0642 243.0614 247.0703 247.0703 251.0796 252.083 257.0951 258.0984 259.101 262.11
    267.122 268.126 271.134 270.133 269.1338 278.156 281.165 281.166 285.177 286.182 289.19
    289.194 293.204 293.208 294.214
""".split()


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
