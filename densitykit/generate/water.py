r"""Liquid water from a flexible point-charge model, SPC/Fw.

The potential of Wu, Tepper and Voth, J. Chem. Phys. 124, 024503 (2006), is that of SPC with
harmonic bonds and angles,

.. math::
    U = \sum_\text{bonds} \frac{k_{OH}}{2} (r - r_{OH})^2
      + \sum_\text{angles} \frac{k_{HOH}}{2} (\theta - \theta_{HOH})^2
      + \sum_{i<j} \frac{q_i q_j}{4 \pi \epsilon_0 r_{ij}}
      + \sum_{O<O'} 4 \epsilon_O \left[\left(\frac{\sigma_O}{r}\right)^{12}
      - \left(\frac{\sigma_O}{r}\right)^6\right],

the last two between different molecules only. Both are summed over all periodic images
(particle-mesh Ewald), since half a cell of 32 molecules is 4.9 angstrom, too short for a cutoff.
Its O-H bond in the liquid is long, 1.03 angstrom on average, against 0.97-0.99 in nature.

The CPU platform of OpenMM with one thread and deterministic forces repeats a run bit for bit on
one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.data import atomic_masses
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from densitykit.errors import GenerationError
from densitykit.generate.geometries import missing
from densitykit.io.progress import progress_bar

__all__ = ["SPCFw", "water"]

_WATER_DENSITY = 0.997  # g/cm3, at 298 K and 1 bar
_NM = 10.0  # angstrom
_KJ_PER_MOL = units.kJ / units.mol

# SPC/Fw, table I of Wu, Tepper and Voth (2006), in kcal/mol and angstrom; U = k/2 (x - x0)^2
_SPCFW = {
    "k_OH": 1059.162,
    "r_OH": 1.012,
    "k_HOH": 75.90,
    "theta_HOH": 113.24,
    "sigma_O": 3.165492,
    "epsilon_O": 0.1554253,
    "q_O": -0.82,
}


def water(
    n_molecules: int,
    n: int,
    *,
    temperature: float = 300.0,
    seed: int = 0,
    interval: float = 2000.0,
    equilibration: float = 20000.0,
    progress: bool = False,
) -> list[Atoms]:
    """Snapshots of liquid water at 0.997 g/cm3, from a flexible point-charge model.

    SPC/Fw with particle-mesh Ewald sums for charges and dispersion (a cell of 32 molecules is too
    small for a cutoff); Langevin middle integrator, 0.5 fs, friction 5/ps.

    Parameters
    ----------
    n_molecules
        Water molecules in the cell.
    n, seed, progress
        See `molecule`.
    temperature
        K.
    interval, equilibration
        fs between snapshots, and before the first.

    Returns
    -------
    list of ase.Atoms
        Atoms in the order O, H, H of each molecule; molecules whole, their oxygen in the cell;
        periodic, in one cubic cell, with the `info` of `molecule`.

    Raises
    ------
    GenerationError
        OpenMM is missing.
    """
    openmm = _openmm()
    mass = n_molecules * (2 * atomic_masses[1] + atomic_masses[8])
    edge = (mass / units.mol / (_WATER_DENSITY * 1e-24)) ** (1 / 3)
    integrator = openmm.LangevinMiddleIntegrator(temperature, 5.0, 0.0005)  # K, 1/ps, ps
    integrator.setRandomNumberSeed(seed + 1)  # 0 would mean: any
    context = _context(_spcfw(n_molecules, edge), integrator)
    context.setPositions(_ice_cubes(n_molecules, edge, seed) / _NM)
    openmm.LocalEnergyMinimizer.minimize(context, 100.0, 500)
    context.setVelocitiesToTemperature(temperature, seed + 1)
    integrator.step(round(equilibration / 0.5))
    source = f"{n_molecules} H2O: SPC/Fw, Langevin {temperature:g} K, seed {seed}"
    found = []
    for index in progress_bar(range(n), desc=f"geometries, {source}", disable=not progress):
        integrator.step(round(interval / 0.5))
        found.append(_water_snapshot(context, edge))
        time = equilibration + (index + 1) * interval
        found[-1].info |= {"temperature": temperature, "time": time, "source": source}
    return found


class SPCFw(Calculator):
    """The potential as an ASE calculator, for cubic cells of molecules written O, H, H.

    Energies are in eV, forces in eV/angstrom. OpenMM's CPU platform, one thread.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Evaluate the potential; called by ASE.

        Raises
        ------
        GenerationError
            The atoms are not whole molecules in the order O, H, H, or the cell is not cubic.
        """
        super().calculate(atoms, properties, system_changes)
        if {"numbers", "cell", "pbc"} & set(system_changes):
            n_molecules, edge = _checked(self.atoms)
            idle = _openmm().VerletIntegrator(0.001)  # never stepped
            self._context = _context(_spcfw(n_molecules, edge), idle)
        self._context.setPositions(self.atoms.positions / _NM)
        state = self._context.getState(energy=True, forces=True)
        energy = state.getPotentialEnergy()._value * _KJ_PER_MOL
        forces = np.array(state.getForces(asNumpy=True)._value) * _KJ_PER_MOL / _NM
        self.results = {"energy": energy, "forces": forces}


def _checked(atoms: Atoms) -> tuple[int, float]:
    """Return the number of molecules and the edge of the cell."""
    edge, numbers = atoms.cell.lengths().max(initial=0.0), atoms.numbers
    n = len(numbers) // 3
    cubic = np.allclose(atoms.cell.array, edge * np.eye(3)) and atoms.pbc.all()
    if not (n and cubic and np.array_equal(numbers, np.tile([8, 1, 1], n))):
        raise GenerationError(
            f"{atoms.get_chemical_formula() or 'no atoms'}, cell {atoms.cell.lengths().round(3)}: "
            "SPC/Fw is for water in a cubic periodic cell, each molecule written O, H, H"
        )
    return n, float(edge)


def _openmm() -> Any:
    try:
        import openmm
    except ImportError as error:
        raise missing("openmm") from error
    return openmm


def _context(system: Any, integrator: Any) -> Any:
    """Return a context of one thread that adds the same sums in the same order."""
    openmm = _openmm()
    platform = openmm.Platform.getPlatformByName("CPU")
    exact = {"Threads": "1", "DeterministicForces": "true"}
    return openmm.Context(system, integrator, platform, exact)


def _spcfw(n_molecules: int, edge: float) -> Any:
    """Return the OpenMM system: nm, kJ/mol, elementary charges."""
    openmm = _openmm()
    p, kcal, A = _SPCFW, 4.184, 1 / _NM
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*(edge * A * np.eye(3)))
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    pairs = openmm.NonbondedForce()
    pairs.setNonbondedMethod(openmm.NonbondedForce.LJPME)
    pairs.setCutoffDistance(min(9.0, 0.49 * edge) * A)
    for O in range(0, 3 * n_molecules, 3):
        H1, H2 = O + 1, O + 2
        for Z in (8, 1, 1):
            system.addParticle(atomic_masses[Z])
        pairs.addParticle(p["q_O"], p["sigma_O"] * A, p["epsilon_O"] * kcal)
        for H in (H1, H2):
            pairs.addParticle(-p["q_O"] / 2, A, 0.0)
            bonds.addBond(O, H, p["r_OH"] * A, p["k_OH"] * kcal / A**2)
            pairs.addException(O, H, 0.0, A, 0.0)
        pairs.addException(H1, H2, 0.0, A, 0.0)
        angles.addAngle(H1, O, H2, np.deg2rad(p["theta_HOH"]), p["k_HOH"] * kcal)
    for force in (bonds, angles, pairs):
        system.addForce(force)
    return system


def _ice_cubes(n_molecules: int, edge: float, seed: int) -> NDArray[np.float64]:
    """Molecules on a cubic lattice, turned at random: positions (3 n_molecules, 3), angstrom."""
    rng = np.random.default_rng(seed)
    m = int(np.ceil(n_molecules ** (1 / 3) - 1e-9))
    sites = np.stack(np.meshgrid(*3 * [np.arange(m)], indexing="ij"), axis=-1).reshape(-1, 3)
    sites = sites[np.sort(rng.permutation(m**3)[:n_molecules])] * edge / m
    half = np.deg2rad(_SPCFW["theta_HOH"]) / 2
    arm = _SPCFW["r_OH"] * np.array([np.sin(half), np.cos(half), 0])
    shape = np.array([np.zeros(3), arm, arm * [-1, 1, 1]])
    turns = Rotation.random(n_molecules, random_state=rng).as_matrix()
    return (sites[:, None] + np.einsum("nij,aj->nai", turns, shape)).reshape(-1, 3)


def _water_snapshot(context: Any, edge: float) -> Atoms:
    """Read positions (angstrom) and kinetic temperature from an OpenMM context."""
    state = context.getState(positions=True, energy=True)
    R = np.array(state.getPositions(asNumpy=True)._value) * _NM
    R -= np.repeat(edge * np.floor(R[::3] / edge), 3, axis=0)  # by its oxygen, molecules whole
    atoms = Atoms(len(R) // 3 * "OH2", R, cell=3 * [edge], pbc=True)
    kinetic = state.getKineticEnergy()._value * _KJ_PER_MOL
    atoms.info["kinetic_temperature"] = kinetic / (1.5 * len(R) * units.kB)
    return atoms
