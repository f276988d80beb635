r"""Kohn-Sham DFT in Gaussians and plane waves: CP2K as an ASE calculator, one process a solve.

The orbitals are expanded in contracted Gaussians and the density in plane waves up to a cutoff,
on which the Hartree potential is a division by :math:`G^2`: the cost grows slowly enough for
hundreds of water molecules on one core. Pseudopotentials and functional are those of the other
engines (GTH, PBE), and the basis that of `densitykit.generate.molecular`, with whose values the
density agrees to 0.04 % (l1, 32 molecules of water). The Gamma point only.

**The grid.** The density that CP2K writes is that of its own finest grid, point by point. To
interpolate it costs 0.1 % and more, so this engine chooses the cutoff,

.. math:: E_{cut} = \left(\frac{\pi (n - 1/2)}{L}\right)^2,

in Ry and bohr, such that this grid has n = `multiple` times as many points along an edge L as the
wanted one, and takes every `multiple`-th of them. The grid is that of `grid_shape`: even numbers
of points at most `spacing` apart, which have to be products of 2, 3 and 5.

CP2K comes with Debian and Ubuntu (``apt-get install cp2k``; an optimised BLAS, as in
`libopenblas0-serial`, makes it faster) and with conda-forge. `DENSITYKIT_CP2K` names the
executable; otherwise `cp2k.psmp`, `cp2k.ssmp` and `cp2k` are looked for.

Source: VandeVondele, Krack, Mohamed, Parrinello, Chassaing, Hutter 2005 (Quickstep); Kuhne et al.
2020 (CP2K).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.units import Bohr, Hartree
from numpy.typing import NDArray

from densitykit.errors import GenerationError
from densitykit.generate.espresso_worker import die_with_parent
from densitykit.generate.pseudopotentials import gth
from densitykit.generate.snapshots import grid_shape

__all__ = ["CP2K", "executable"]

_NAMES = ("cp2k.psmp", "cp2k.ssmp", "cp2k")
#: "diagonalisation" to about a hundred molecules, "orbital transformation" beyond
_SOLVERS = {
    "diagonalisation": """
      MAX_SCF {max_iterations}
      EPS_SCF {threshold:.1E}
      &MIXING
        METHOD BROYDEN_MIXING
        ALPHA 0.4
        NBROYDEN 8
      &END MIXING""",
    "orbital transformation": """
      MAX_SCF 20
      EPS_SCF {threshold:.1E}
      &OT
        PRECONDITIONER FULL_SINGLE_INVERSE
        MINIMIZER CG
      &END OT
      &OUTER_SCF
        EPS_SCF {threshold:.1E}
        MAX_SCF {outer}
      &END OUTER_SCF""",
}
_INPUT = """&GLOBAL
  PROJECT job
  RUN_TYPE ENERGY_FORCE
  PRINT_LEVEL MEDIUM
&END GLOBAL
&FORCE_EVAL
  METHOD QS
  &PRINT
    &FORCES ON
    &END FORCES
  &END PRINT
  &DFT
    BASIS_SET_FILE_NAME GTH_BASIS_SETS
    POTENTIAL_FILE_NAME GTH_POTENTIALS
    &MGRID
      CUTOFF {cutoff:.4f}
      REL_CUTOFF 60
      NGRIDS 4
    &END MGRID
    &QS
      EPS_DEFAULT {precision:.1E}
    &END QS
    &SCF
      SCF_GUESS ATOMIC{solver}
      &PRINT
        &RESTART OFF
        &END RESTART
      &END PRINT
    &END SCF
    &XC
      &XC_FUNCTIONAL {functional}
      &END XC_FUNCTIONAL
    &END XC
    &PRINT
      &E_DENSITY_CUBE
        STRIDE {multiple}
      &END E_DENSITY_CUBE
    &END PRINT
  &END DFT
  &SUBSYS
    &CELL
{cell}
    &END CELL
    &COORD
{coordinates}
    &END COORD
{kinds}
  &END SUBSYS
&END FORCE_EVAL
"""


def executable() -> Path:
    """Return the program CP2K.

    Raises
    ------
    GenerationError
        It is not installed, or `DENSITYKIT_CP2K` names no file.
    """
    named = os.environ.get("DENSITYKIT_CP2K")
    for name in [named] if named else _NAMES:
        if found := shutil.which(name):
            return Path(found).absolute()
    raise GenerationError(
        f"no CP2K: {named or ', '.join(_NAMES)} not found; install it (apt-get install cp2k, or "
        "conda install -c conda-forge cp2k), or name the program in DENSITYKIT_CP2K"
    )


class CP2K(Calculator):
    """DFT of one orthorhombic periodic cell at Gamma; usable wherever ASE takes a calculator.

    Parameters
    ----------
    spacing
        Largest distance of the points of the density, angstrom; see `grid_shape`.
    multiple
        How many times finer CP2K's own grid is: 2 at 0.25 angstrom means about 180 Ry, 3 about
        405 Ry. Water at 2 is 0.04 % (l1) from analytic values, at 3 0.03 %.
    basis
        A set of CP2K's GTH_BASIS_SETS.
    functional
        Exchange and correlation, CP2K's name; the pseudopotentials are those of `gth`.
    solver
        "diagonalisation", or "orbital transformation", the cheaper one from about a hundred
        molecules on.
    threshold
        Of self-consistency, CP2K's EPS_SCF; None for 1e-5 (diagonalisation) or 5e-5.
    precision
        Of the matrix elements, CP2K's EPS_DEFAULT.
    max_iterations
        Of the self-consistency cycle.
    threads
        OpenMP threads.
    folder
        For scratch folders; None for the system's own.
    program
        CP2K; None looks for it (`executable`).

    Energies are in eV, forces in eV/angstrom, densities in angstrom**-3.

    Attributes
    ----------
    iterations
        Of the last self-consistency cycle.

    Raises
    ------
    GenerationError
        No program or pseudopotential, a cell or grid that CP2K cannot take as they are, a solve
        that failed or did not converge.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces"]

    def __init__(
        self,
        *,
        spacing: float = 0.25,
        multiple: int = 2,
        basis: str = "TZV2P-GTH",
        functional: str = "PBE",
        solver: str = "diagonalisation",
        threshold: float | None = None,
        precision: float = 1e-8,
        max_iterations: int = 60,
        threads: int = 1,
        folder: str | Path | None = None,
        program: str | Path | None = None,
    ) -> None:
        super().__init__()
        if not 0 < spacing < np.inf or multiple < 1 or solver not in _SOLVERS:
            raise GenerationError(
                f"spacing={spacing} angstrom, multiple={multiple}, solver={solver!r}; give a "
                f"positive spacing, a multiple of at least 1 and one of {sorted(_SOLVERS)}"
            )
        self.spacing, self.multiple, self.basis = spacing, multiple, basis
        self.functional, self.solver, self.precision = functional, solver, precision
        self.threshold = threshold or (1e-5 if solver == "diagonalisation" else 5e-5)
        self.max_iterations, self.threads = max_iterations, threads
        self.folder = None if folder is None else Path(folder)
        self.program = Path(program) if program else executable()
        self.iterations, self.version = 0, "CP2K"
        self._density: NDArray[np.float64] | None = None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Solve for `atoms`; called by ASE when a result is asked for."""
        super().calculate(atoms, properties, system_changes)
        self._density = None
        text = self.input_text(self.atoms)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="cp2k-", dir=self.folder) as scratch:
            output = self._run(Path(scratch), text)
            energy, forces = _read_energy(output), _read_forces(output, len(self.atoms))
            self._density = self._read_density(Path(scratch))
        self.iterations = len(re.findall(r"^ +\d+ +\S+/\S+ .*E[-+]\d+", output, re.MULTILINE))
        if found := re.search(r"CP2K\| version string: +CP2K version (\S+)", output):
            self.version = f"CP2K {found[1]}"
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}

    def density(self, shape: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Return the valence density of the configuration solved last.

        Parameters
        ----------
        shape
            Points along the edges; the engine has one grid, that of its spacing (None).

        Returns
        -------
        ndarray
            Shape `grid_shape(atoms, spacing)`, angstrom**-3, cell-periodic without end point:
            values at the points, not a truncated Fourier series.

        Raises
        ------
        GenerationError
            Nothing was solved yet, or another grid is asked for.
        """
        if self._density is None:
            raise GenerationError("there is no density yet; ask for the energy or forces first")
        if shape is not None and tuple(shape) != self._density.shape:
            raise GenerationError(
                f"a density on {tuple(shape)} points was asked for, this engine with "
                f"spacing={self.spacing} angstrom has {self._density.shape}; give it the spacing "
                "of the wanted grid: interpolation would cost more than the rest of its errors"
            )
        return self._density.copy()

    def description(self) -> dict[str, Any]:
        """Return engine, settings and pseudopotentials, for the attributes of a trajectory."""
        elements = sorted(set(self.atoms.get_chemical_symbols())) if self.atoms else []
        valence = {e: gth(e, functional=self.functional).valence for e in elements}
        names = [f"{e} GTH-{self.functional}-q{valence[e]}" for e in elements]
        return {
            "engine": self.version,
            "functional": self.functional,
            "pseudopotential": ", ".join(names),
            "valence_charges": valence,
            "basis": self.basis,
            "cutoff_rydberg": round(self._cutoff(self.atoms), 2) if self.atoms else "none",
            "grid_multiple": self.multiple,
            "k_points": "Gamma",
            "smearing": "none",
            "solver": self.solver,
            "scf_threshold": self.threshold,
            "eps_default": self.precision,
        }

    def close(self) -> None:
        """Forget the last solution; no process is left between solves."""
        self._density = None
        self.results = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _cutoff(self, atoms: Atoms) -> float:
        """Cutoff in Ry whose grid is `multiple` times as fine as the wanted one."""
        n = self.multiple * np.array(grid_shape(atoms, self.spacing))
        return float(np.max((np.pi * (n - 0.5) / (atoms.cell.lengths() / Bohr)) ** 2))

    def input_text(self, atoms: Atoms) -> str:
        """Return CP2K's input for `atoms`.

        Raises
        ------
        GenerationError
            The cell is not orthorhombic and periodic, or its grid not a product of 2, 3 and 5.
        """
        _check_cell(atoms, self.multiple * np.array(grid_shape(atoms, self.spacing)))
        solver = _SOLVERS[self.solver].format(
            threshold=self.threshold,
            max_iterations=self.max_iterations,
            outer=-(-self.max_iterations // 6),
        )
        vectors = zip("ABC", atoms.cell, strict=True)
        places = zip(atoms.get_chemical_symbols(), atoms.positions, strict=True)
        return _INPUT.format(
            cutoff=self._cutoff(atoms),
            precision=self.precision,
            solver=solver,
            functional=self.functional,
            multiple=self.multiple,
            cell="\n".join(f"      {name} {_row(vector)}" for name, vector in vectors),
            coordinates="\n".join(f"      {symbol} {_row(x)}" for symbol, x in places),
            kinds="\n".join(map(self._kind, dict.fromkeys(atoms.get_chemical_symbols()))),
        )

    def _kind(self, element: str) -> str:
        valence = gth(element, functional=self.functional).valence
        return (
            f"    &KIND {element}\n      BASIS_SET {self.basis}\n"
            f"      POTENTIAL GTH-{self.functional}-q{valence}\n    &END KIND"
        )

    def _run(self, scratch: Path, text: str) -> str:
        """Run CP2K in a folder and return what it printed."""
        (scratch / "job.inp").write_text(text)
        done = subprocess.run(
            [self.program, "-i", "job.inp"],
            cwd=scratch,
            env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            preexec_fn=_ending_with_us(),
        )
        if done.returncode or "SCF run converged" not in done.stdout:
            end = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            reason = f"ended with status {done.returncode}"
            if not done.returncode:
                reason = f"did not reach self-consistency (max_iterations={self.max_iterations})"
            raise GenerationError(f"CP2K {reason}; its output ends:\n{end}")
        return done.stdout

    def _read_density(self, scratch: Path) -> NDArray[np.float64]:
        (path,) = scratch.glob("job-ELECTRON_DENSITY-1_*.cube")
        values, wanted = _read_cube(path), grid_shape(self.atoms, self.spacing)
        if values.shape != wanted:
            raise GenerationError(
                f"CP2K took a grid of {values.shape} points instead of {wanted}: no cutoff gives "
                f"the edges {self.atoms.cell.lengths().round(3).tolist()} angstrom this grid; "
                f"change spacing={self.spacing} or multiple={self.multiple}"
            )
        return values


def _ending_with_us() -> Callable[[], None] | None:
    """What the child does before it becomes CP2K: be killed when this process ends (Linux)."""
    return die_with_parent if sys.platform == "linux" else None


def _row(vector: Sequence[float]) -> str:
    return " ".join(f"{x:.12f}" for x in vector)


def _check_cell(atoms: Atoms, grid: NDArray[np.int_]) -> None:
    """Raise unless CP2K can take the cell and make this grid of its own."""
    off = atoms.cell.array - np.diag(np.diag(atoms.cell.array))
    if not atoms.pbc.all() or atoms.cell.rank < 3 or np.abs(off).max() > 1e-9 or not len(atoms):
        raise GenerationError(
            f"{atoms.get_chemical_formula() or 'no atoms'}, pbc={atoms.pbc.tolist()}, cell "
            f"{atoms.cell.array.round(3).tolist()}: this engine needs atoms in a cell periodic in "
            "three directions with edges along x, y and z"
        )
    for n in grid.tolist():
        if _without_small_factors(n) > 1:
            raise GenerationError(
                f"a grid of {grid.tolist()} points for CP2K, of which {n} is no product of 2, 3 "
                "and 5; change spacing or multiple"
            )


def _without_small_factors(n: int) -> int:
    for p in (2, 3, 5):
        while n % p == 0:
            n //= p
    return n


def _read_energy(output: str) -> float:
    """Total energy, eV."""
    found = re.findall(r"ENERGY\| Total FORCE_EVAL.*?(-?\d+\.\d+)\s*$", output, re.MULTILINE)
    if not found:
        raise GenerationError("CP2K printed no energy; this version writes another output")
    return float(found[-1]) * Hartree


def _read_forces(output: str, n_atoms: int) -> NDArray[np.float64]:
    """Forces from the table `ATOMIC FORCES in [a.u.]`, eV/angstrom, shape (atom, 3)."""
    _, _, table = output.partition("ATOMIC FORCES in [a.u.]")
    number = r"(-?\d+\.\d+(?:E[-+]\d+)?)"
    rows = re.findall(rf"^ *\d+ +\d+ +\w+ +{number} +{number} +{number}", table, re.MULTILINE)
    if len(rows) < n_atoms:
        raise GenerationError(
            f"CP2K printed forces on {len(rows)} of {n_atoms} atoms; this version writes another "
            "output"
        )
    return np.array(rows[:n_atoms], dtype=float) * Hartree / Bohr


def _read_cube(path: Path) -> NDArray[np.float64]:
    """Density of a cube file of CP2K, angstrom**-3, shape (X, Y, Z)."""
    with path.open() as file:
        head = [file.readline() for _ in range(6)]
        for _ in range(int(head[2].split()[0])):
            file.readline()
        values = np.fromstring(file.read(), sep=" ")
    return values.reshape([int(line.split()[0]) for line in head[3:6]]) / Bohr**3
