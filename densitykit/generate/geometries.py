r"""Thermal configurations: what the engines are asked for densities of.

A static data set needs configurations drawn from the canonical ensemble,
:math:`p(R) \propto e^{-U(R)/k_B T}`, and *independent* of one another: then every snapshot counts,
and a random split into training and test is honest. The potential :math:`U` need not be that of
the density: a cheap one that puts the atoms where they belong suffices, because each density is
converged for the configuration it is given. Langevin dynamics

.. math:: m \dot v = -\nabla U - m \gamma v + \sqrt{2 m \gamma k_B T}\, \xi(t)

samples the ensemble even of a single nearly harmonic molecule, where a global thermostat would
leave the modes with the energy they started with. Snapshots are `interval` apart, a few
:math:`1/\gamma`. The times are those of the dynamics, in fs, counted from its start.

========== ================================== =================================================
system     potential                          source
========== ================================== =================================================
molecules  GFN2-xTB (tblite)                  Bannwarth, Ehlert, Grimme, JCTC 15, 1652 (2019)
water      SPC/Fw (OpenMM): `water.py`        Wu, Tepper, Voth, J. Chem. Phys. 124, 024503 (2006)
aluminium  effective-medium theory (ASE)      Jacobsen, Stoltze, Norskov, Surf. Sci. 366, 394
lithium    none: displaced fcc, to be melted
NaCl       none: displaced rock salt
========== ================================== =================================================

Every function is deterministic in its seed: on one machine, with one thread, bit for bit. On
another one rounding differs, and chaos makes of it another sample of the same ensemble.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.build import molecule as build_molecule
from ase.calculators.emt import EMT
from ase.constraints import FixCom
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from numpy.typing import NDArray

from densitykit.errors import GenerationError
from densitykit.io.progress import progress_bar

__all__ = [
    "MOLECULES",
    "aluminium",
    "lattice_constant",
    "lithium",
    "molecule",
    "sodium_chloride",
]

#: names of the molecules here, and in the collection of `ase.build.molecule`
MOLECULES = {"ethane": "C2H6", "isobutane": "isobutane", "butane": "trans-butane"}

_SALT_EDGE = 5.80  # angstrom, conventional cell of rock salt at 900 K (5.640 at 293 K)
#: right-angled cell of 12 formula units; lattice vectors in units of the conventional edge
_SALT_CELL = np.array([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5, -1.0]])
_LITHIUM_EDGE = 9.12722877  # angstrom, 32 atoms: 0.485 g/cm3, the liquid near 800 K


def molecule(
    name: str,
    n: int,
    *,
    temperature: float = 350.0,
    seed: int = 0,
    interval: float = 1000.0,
    equilibration: float = 2000.0,
    margin: float = 4.0,
    progress: bool = False,
) -> list[Atoms]:
    """Snapshots of a molecule at a temperature, all turned alike in one box.

    The dynamics is that of GFN2-xTB with a time step of 0.5 fs and a friction of 1/(50 fs).
    Overall rotation and translation carry nothing that a density model should have to learn, so
    each snapshot is laid onto the relaxed molecule, principal axes along x, y, z (Kabsch 1976).

    Parameters
    ----------
    name
        "ethane", "isobutane" or "butane" (n-butane, which starts in its trans form).
    n
        Number of snapshots.
    temperature
        K.
    seed
        Of velocities and noise.
    interval, equilibration
        fs between snapshots, and before the first. Vibrations forget within 0.1 ps; the torsion
        of butane, which visits both its forms, keeps a correlation of 0.8 over 0.25 ps.
    margin
        angstrom between the relaxed molecule and each wall of its box. Of the 14 valence
        electrons of ethane, 1e-3 are further out than 2.5 angstrom, 1e-4 than 3, 1e-5 than 3.5.
    progress
        Show a bar.

    Returns
    -------
    list of ase.Atoms
        Not periodic, in one orthorhombic cell; `info` holds "temperature" (the target, K),
        "time" (fs), "kinetic_temperature" (K) and "source".

    Raises
    ------
    GenerationError
        The name is unknown, tblite is missing, or an atom came near the walls.
    """
    if name not in MOLECULES:
        raise GenerationError(f"no molecule {name!r}; choose one of {sorted(MOLECULES)}")
    atoms = build_molecule(MOLECULES[name])
    atoms.calc = _gfn2()
    BFGS(atoms, logfile=None).run(fmax=0.01, steps=500)
    reference = _boxed(atoms, margin)
    source = f"{name}: GFN2-xTB, Langevin {temperature:g} K, seed {seed}"
    found = _langevin(
        atoms,
        n,
        temperature,
        seed,
        {"timestep": 0.5, "friction": 0.02, "interval": interval, "equilibration": equilibration},
        source,
        progress,
    )
    for snapshot in found:
        snapshot.cell = reference.cell
        snapshot.positions = _superimpose(snapshot.positions, reference)
        walls = np.minimum(snapshot.positions, reference.cell.lengths() - snapshot.positions)
        if walls.min() < 0.5 * margin:
            time = snapshot.info["time"]
            raise GenerationError(
                f"{name}: at {time:g} fs an atom is {walls.min():.1f} angstrom from the wall of "
                f"its box, half the margin; lower the temperature or raise margin={margin:g}"
            )
    return found


def _gfn2() -> Any:
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise missing("tblite") from error
    return TBLite(method="GFN2-xTB", verbosity=0)


def missing(package: str) -> GenerationError:
    return GenerationError(f'{package} is not installed; in a clone: pip install -e ".[dft]"')


def _boxed(atoms: Atoms, margin: float) -> Atoms:
    """Return a copy along its principal axes, in the middle of its box."""
    _, axes = atoms.get_moments_of_inertia(vectors=True)
    axes[2] *= np.linalg.det(axes)  # a rotation, no reflection
    boxed = Atoms(atoms.numbers, (atoms.positions - atoms.get_center_of_mass()) @ axes.T)
    boxed.center(vacuum=margin)
    return boxed


def _superimpose(positions: NDArray[np.float64], reference: Atoms) -> NDArray[np.float64]:
    """Turn and shift positions (atom, 3) onto a reference; mass-weighted least squares."""
    weights = reference.get_masses()[:, None] / reference.get_masses().sum()
    centre, target = (weights * positions).sum(0), (weights * reference.positions).sum(0)
    U, _, V = np.linalg.svd((weights * (positions - centre)).T @ (reference.positions - target))
    U[:, -1] *= np.sign(np.linalg.det(U @ V))  # never the mirror image
    return (positions - centre) @ U @ V + target


def _langevin(
    atoms: Atoms,
    n: int,
    temperature: float,
    seed: int,
    settings: dict[str, float],
    source: str,
    progress: bool,
) -> list[Atoms]:
    """Run Langevin dynamics from atoms with a calculator; settings in fs and 1/fs."""
    # not the same noise for the same seed at another temperature
    rng = np.random.default_rng([seed, len(atoms), round(temperature)])
    sigma = np.sqrt(atoms.get_masses() * units.kB * temperature)  # Maxwell-Boltzmann
    atoms.set_momenta(sigma[:, None] * rng.standard_normal((len(atoms), 3)))
    dynamics = Langevin(
        atoms,
        settings["timestep"] * units.fs,
        temperature_K=temperature,
        friction=settings["friction"] / units.fs,
        fixcm=False,
        rng=rng,
    )
    dynamics.run(round(settings["equilibration"] / settings["timestep"]))
    found = []
    for index in progress_bar(range(n), desc=f"geometries, {source}", disable=not progress):
        dynamics.run(round(settings["interval"] / settings["timestep"]))
        found.append(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
        found[-1].info = {
            "temperature": temperature,
            "time": settings["equilibration"] + (index + 1) * settings["interval"],
            "kinetic_temperature": atoms.get_temperature(),
            "source": source,
        }
    return found


def lattice_constant(temperature: float) -> float:
    """Lattice constant of fcc aluminium in angstrom, at a temperature in K.

    a(T) = a0 [1 + alpha (T - 298) + beta (T - 298)^2], a0 = 4.0496 angstrom and
    alpha = 23.1e-6/K (CRC Handbook, at 298 K); beta = 9e-9/K^2 gives the mean coefficients of
    handbooks from 20 up to 300 and 500 degrees Celsius, 25.5 and 27.4e-6/K, within 0.2e-6/K.
    """
    T = temperature - 298.0
    return 4.0496 * (1 + 23.1e-6 * T + 9e-9 * T**2)


def aluminium(
    n_atoms: int,
    n: int,
    *,
    temperature: float = 300.0,
    seed: int = 0,
    interval: float = 500.0,
    equilibration: float = 2000.0,
    progress: bool = False,
) -> list[Atoms]:
    """Snapshots of hot fcc aluminium at the experimental density of the temperature.

    Effective-medium theory with a time step of 3 fs and a friction of 1/(200 fs); the centre of
    mass stays where it is.

    Parameters
    ----------
    n_atoms
        4 m^3: 32, 108, 256, ... atoms in m x m x m conventional cells.
    n, seed, progress
        See `molecule`.
    temperature
        K; it sets the lattice constant too, see `lattice_constant`.
    interval, equilibration
        fs between snapshots, and before the first.

    Returns
    -------
    list of ase.Atoms
        Periodic, in one cubic cell, with the `info` of `molecule`.

    Raises
    ------
    GenerationError
        `n_atoms` does not fill a cube.
    """
    atoms = _fcc("Al", n_atoms, lattice_constant(temperature))
    atoms.calc = EMT()
    atoms.set_constraint(FixCom())
    source = f"Al{n_atoms}: effective-medium theory, Langevin {temperature:g} K, seed {seed}"
    settings = {"timestep": 3.0, "friction": 0.005}
    settings |= {"interval": interval, "equilibration": equilibration}
    return _langevin(atoms, n, temperature, seed, settings, source, progress)


def lithium(n_atoms: int = 32, seed: int = 0, jitter: float = 0.2) -> Atoms:
    """Start of a run of liquid lithium: fcc at 0.485 g/cm3, each atom displaced at random.

    Parameters
    ----------
    n_atoms
        4 m^3: 32 (edge 9.127 angstrom), 108, 256 (18.254 angstrom), ...
    seed
        Of the displacements.
    jitter
        Their standard deviation along each axis, angstrom.

    Returns
    -------
    ase.Atoms
        Periodic, cubic. Not a sample of anything: melt it first.

    Raises
    ------
    GenerationError
        `n_atoms` does not fill a cube.
    """
    atoms = _fcc("Li", n_atoms, _LITHIUM_EDGE / 2)
    atoms.positions += np.random.default_rng(seed).normal(0, jitter, (n_atoms, 3))
    source = f"Li{n_atoms}: fcc, displaced by {jitter:g} angstrom, seed {seed}"
    atoms.info = {"temperature": np.nan, "time": 0.0, "source": source}
    return atoms


def sodium_chloride(seed: int = 0, jitter: float = 0.15) -> Atoms:
    """Start of a run of hot rock salt: the crystal, each atom displaced at random.

    The cell is spanned by [1 -1 0], [1 1 1] and [1 1 -2]/2 of a conventional cell of
    5.80 angstrom, the experimental volume near 900 K, 174 K below melting (5.640 angstrom at
    293 K, and a mean linear expansion of 47e-6/K up to there). It is orthorhombic, its edges are
    all different, and with 12 formula units none is shorter than 7.1 angstrom.

    Parameters
    ----------
    seed
        Of the displacements.
    jitter
        Their standard deviation along each axis, angstrom.

    Returns
    -------
    ase.Atoms
        Na12Cl12, periodic, 8.202 x 10.046 x 7.104 angstrom, the sodium atoms first. Not a sample
        of anything: equilibrate it.
    """
    steps = np.arange(-6, 7) / 2
    sites = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    fractions = sites @ np.linalg.inv(_SALT_CELL)
    inside = ((fractions > -1e-9) & (fractions < 1 - 1e-9)).all(axis=1)
    sodium = np.rint(2 * sites[inside].sum(axis=1)) % 2 == 0
    order = np.argsort(~sodium, kind="stable")
    atoms = Atoms(
        np.where(sodium, 11, 17)[order],
        scaled_positions=fractions[inside][order],
        cell=_SALT_EDGE * np.linalg.norm(_SALT_CELL, axis=1),
        pbc=True,
    )
    atoms.positions += np.random.default_rng(seed).normal(0, jitter, (len(atoms), 3))
    source = f"12 NaCl: rock salt, displaced by {jitter:g} angstrom, seed {seed}"
    atoms.info = {"temperature": np.nan, "time": 0.0, "source": source}
    return atoms


def _fcc(symbol: str, n_atoms: int, a: float) -> Atoms:
    m = round((n_atoms / 4) ** (1 / 3))
    if 4 * m**3 != n_atoms or m < 1:
        raise GenerationError(f"{n_atoms} atoms fill no fcc cube; use 4 m^3: 32, 108, 256, ...")
    return bulk(symbol, "fcc", a=a, cubic=True) * (m, m, m)
