r"""Plane-wave Kohn-Sham DFT: Quantum ESPRESSO as an ASE calculator in a process of its own.

The Kohn-Sham orbitals of wave vector k are expanded in plane waves with
:math:`|k + G|^2 / 2 < E_{cut}`; pseudopotentials stand for nuclei and core electrons (Payne,
Teter, Allan, Arias, Joannopoulos 1992). Metals need k-points, and a smearing of the occupations:
here the Fermi-Dirac distribution at the temperature of the electrons, so that the energy is
Mermin's free energy (1965) and forces are its derivatives. In molecular dynamics orbitals and
density are extrapolated to second order from the steps before, which halves the number of
iterations.

Quantum ESPRESSO comes as a wheel, `qepy`, that wants an old numpy and holds its state in Fortran
globals. So it runs in a worker process with an environment of its own (``make espresso``, or
``python -m densitykit.generate.espresso FOLDER``); see
:mod:`densitykit.generate.espresso_worker`. A worker that dies raises `GenerationError` with the
end of its log. Units here are those of ASE: angstrom, eV, eV/angstrom, and angstrom**-3 for
densities.

Source: Giannozzi et al. 2009 and 2017 (Quantum ESPRESSO); Shao, Andreussi, Ceresoli, Truscott,
Baczewski, Campbell, Pavanello 2022 (QEpy).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.data import atomic_masses, atomic_numbers
from ase.units import Bohr, Ry, kB
from numpy.typing import NDArray

from densitykit.errors import GenerationError
from densitykit.fields import resample
from densitykit.generate.espresso_worker import read_record, write_record
from densitykit.generate.pseudopotentials import gth, write_upf

__all__ = ["Espresso", "make_environment", "worker_python"]

_WORKER = Path(__file__).with_name("espresso_worker.py")
_ENVIRONMENT = ".venv-espresso"
#: what the worker needs; scipy is here for the OpenBLAS inside its wheel
REQUIREMENTS = ("qepy==7.2.0", "f90wrap==0.2.15", "numpy==1.26.4", "scipy==1.11.4")
_EXTRAPOLATION = ("second_order", "first_order", "atomic", "none")


def worker_python() -> Path:
    """Return the interpreter of the environment that holds qepy.

    `DENSITYKIT_ESPRESSO_PYTHON` names it; otherwise it is that of `.venv-espresso`, as made by
    ``make espresso``, in the current folder or beside the package.

    Raises
    ------
    GenerationError
        There is none.
    """
    named = os.environ.get("DENSITYKIT_ESPRESSO_PYTHON")
    folders = [Path.cwd(), Path(__file__).parents[2]]
    found = [Path(named)] if named else [f / _ENVIRONMENT / "bin/python" for f in folders]
    for python in found:
        if python.is_file():
            return python.absolute()  # not resolved: a virtual environment is known by its link
    raise GenerationError(
        f"no environment for Quantum ESPRESSO: {' and '.join(map(str, found))} not found; make "
        f"one with `python -m densitykit.generate.espresso {_ENVIRONMENT}`, or name its python in "
        "DENSITYKIT_ESPRESSO_PYTHON"
    )


def make_environment(folder: str | Path) -> Path:
    """Make a virtual environment with Quantum ESPRESSO in it (300 MB), and return its python.

    Parameters
    ----------
    folder
        Of the environment; one that is there is replaced.

    Raises
    ------
    GenerationError
        The folder holds something else; or pip failed, as where there is no wheel for this Python
        or system.
    """
    folder = Path(folder)
    empty = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    if not empty and not (folder / "pyvenv.cfg").is_file():
        raise GenerationError(f"{folder}: no virtual environment; choose a folder of its own")
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin/python"
    status = subprocess.run([python, "-m", "pip", "install", *REQUIREMENTS]).returncode
    if status:
        raise GenerationError(
            f"{folder}: pip could not install {' '.join(REQUIREMENTS)}; there are wheels for "
            "Linux and Python 3.8 to 3.12: run this command with such a Python"
        )
    return python


class Espresso(Calculator):
    """Plane-wave DFT for one periodic cell; usable wherever ASE takes a calculator.

    Parameters
    ----------
    cutoff
        Kinetic energy of the plane waves, eV. The density takes four times as much.
    k_points
        Monkhorst-Pack mesh, three numbers; None for Gamma with real orbitals.
    shifted
        Move the mesh half a step off Gamma. Even shifted meshes keep all symmetries of a
        cubic cell and converge faster than centred ones.
    temperature
        Of the electrons, K (Fermi-Dirac smearing); 0 for fixed occupations.
    functional
        Of exchange and correlation; picks the GTH pseudopotentials.
    pseudopotentials
        UPF files by element, for others than those of `gth`; or numbers of
        valence electrons, to choose among them.
    bands
        Orbitals per k-point; None leaves it to Quantum ESPRESSO.
    threshold
        Estimated energy error at which self-consistency is reached, eV.
    mixing, mixing_mode
        Charge mixing: "plain", "TF" or "local-TF".
    extrapolation
        Of density and orbitals between solves: "second_order" for dynamics,
        "atomic" for unrelated configurations.
    max_iterations
        Of the self-consistent field.
    threads
        OpenMP threads of the worker.
    folder
        For scratch files and `pw.log`; None makes a temporary one.
    python
        Interpreter with qepy; None looks for it (`worker_python`).

    Attributes
    ----------
    iterations
        Of the last solve.

    Raises
    ------
    GenerationError
        No environment, no pseudopotential, a worker that died, or no convergence.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces"]

    def __init__(
        self,
        cutoff: float,
        k_points: Sequence[int] | None = None,
        *,
        shifted: bool = True,
        temperature: float = 0.0,
        functional: str = "PBE",
        pseudopotentials: Mapping[str, str | Path | int] | None = None,
        bands: int | None = None,
        threshold: float = 1e-6 * Ry,
        mixing: float = 0.7,
        mixing_mode: str = "local-TF",
        extrapolation: str = "second_order",
        max_iterations: int = 100,
        threads: int = 1,
        folder: str | Path | None = None,
        python: str | Path | None = None,
    ) -> None:
        super().__init__()
        if not 0 < cutoff < np.inf or temperature < 0 or extrapolation not in _EXTRAPOLATION:
            raise GenerationError(
                f"cutoff={cutoff} eV, temperature={temperature} K, "
                f"extrapolation={extrapolation!r}; give a positive cutoff, a temperature >= 0 and "
                f"one of {_EXTRAPOLATION}"
            )
        if k_points is not None and (len(k_points) != 3 or min(k_points) < 1):
            raise GenerationError(f"k_points={k_points}; give three positive numbers, or None")
        self.cutoff, self.k_points, self.shifted = cutoff, k_points, shifted
        self.temperature, self.functional, self.bands = temperature, functional, bands
        self.pseudopotentials = dict(pseudopotentials or {})
        self.threshold, self.mixing, self.mixing_mode = threshold, mixing, mixing_mode
        self.extrapolation, self.max_iterations = extrapolation, max_iterations
        self.threads, self.python = threads, Path(python) if python else worker_python()
        self.folder = None if folder is None else Path(folder)
        self.iterations = 0
        self._start_density: NDArray[np.float64] | None = None
        self._worker: _Worker | None = None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Solve for `atoms`; called by ASE when a result is asked for."""
        super().calculate(atoms, properties, system_changes)
        reply = self._solve(self.max_iterations, system_changes)
        if not reply["converged"]:
            raise GenerationError(
                f"self-consistency not reached: estimated error {float(reply['error']):.1e} Ry "
                f"after {self.iterations} iterations (log: {self._worker.log}); lower mixing, "
                "raise temperature or max_iterations, or look for atoms that touch"
            )
        self._keep(reply)

    def _solve(self, limit: int, changes: Sequence[str]) -> dict[str, NDArray]:
        if self._worker is None or {"numbers", "cell", "pbc"} & set(changes):
            self._start(self.atoms)
        request = {"positions": self.atoms.positions / Bohr, "limit": np.array(limit)}
        if self._start_density is not None:
            request["start"] = resample(self._start_density, self._worker.grid) * Bohr**3
            self._start_density = None
        reply = self._worker.ask(**request)
        self.iterations = int(reply["iterations"])
        return reply

    def _keep(self, reply: Mapping[str, NDArray]) -> None:
        energy = float(reply["energy"]) * Ry
        self.results = {"energy": energy, "free_energy": energy}
        self.results["forces"] = reply["forces"].reshape(-1, 3) * Ry / Bohr

    def start_from(self, density: NDArray[np.floating]) -> None:
        """Let the next solve start from a density instead of superposed or extrapolated ones.

        Parameters
        ----------
        density
            Valence density, shape (X, Y, Z), angstrom**-3, on any grid; it is resampled.
        """
        self._start_density = np.asarray(density, float)
        self.reset()

    def one_shot(self, atoms: Atoms, density: NDArray[np.floating]) -> float:
        """Energy (eV) of one diagonalisation in the potential of a density.

        Its error is of second order in that of the density (Harris 1985, Phys. Rev. B 31, 1770;
        Foulkes and Haydock 1989, Phys. Rev. B 39, 12520). A solve of the same atoms goes on from
        its orbitals.

        Parameters
        ----------
        atoms, density
            See `start_from`.
        """
        self.start_from(density)
        changes = self.check_state(atoms)
        super().calculate(atoms, ["energy"], changes)
        return float(self._solve(1, changes)["energy"]) * Ry

    def density(self, shape: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Return the valence density of the configuration solved last.

        Parameters
        ----------
        shape
            Points along the lattice vectors; None for the grid of Quantum ESPRESSO.

        Returns
        -------
        NDArray[np.float64]
            angstrom**-3, cell-periodic without end point. A coarser grid drops the Fourier
            components that it cannot hold.

        Raises
        ------
        GenerationError
            Nothing was solved yet.
        """
        if not self.results:
            raise GenerationError("there is no density yet; ask for the energy or forces first")
        values = self._worker.ask()["density"] / Bohr**3
        return values if shape is None else resample(values, shape)

    def description(self) -> dict[str, Any]:
        """Return engine, settings and pseudopotentials, for the attributes of a trajectory."""
        mesh = "Gamma" if self.k_points is None else "x".join(map(str, self.k_points))
        shifted = self.k_points is not None and self.shifted
        smearing = f"Fermi-Dirac, {self.temperature:g} K" if self.temperature else "none"
        versions = self._worker.versions if self._worker else {}
        return {
            "engine": "Quantum ESPRESSO 7.2 (qepy {})".format(versions.get("qepy", "7.2.0")),
            "functional": self.functional,
            "pseudopotential": self._pseudopotential_names(),
            "valence_charges": self._valence_charges(),
            "cutoff_rydberg": round(self.cutoff / Ry, 6),
            "k_points": f"shifted {mesh}" if shifted else mesh,
            "smearing": smearing,
            "bands": self.bands or "default",
            "scf_threshold_rydberg": self.threshold / Ry,
            "blas": str(versions.get("blas", "unknown")),
        }

    def close(self) -> None:
        """End the worker process and remove its scratch files."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
            self._scratch.cleanup()
        self.results = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _pseudopotential_names(self) -> str:
        elements = sorted(set(self.atoms.get_chemical_symbols())) if self.atoms else []
        names = []
        for element in elements:
            choice = self.pseudopotentials.get(element)
            if isinstance(choice, str | Path):
                names.append(Path(choice).name)
            else:
                names.append(f"{element} GTH-{self.functional}-q{self._gth(element).valence}")
        return ", ".join(names)

    def _valence_charges(self) -> dict[str, int]:
        """Valence electrons by element; of a UPF file of the user, its name is all we say."""
        elements = sorted(set(self.atoms.get_chemical_symbols())) if self.atoms else []
        chosen = {e: self.pseudopotentials.get(e) for e in elements}
        ours = [e for e, choice in chosen.items() if not isinstance(choice, str | Path)]
        return {element: self._gth(element).valence for element in ours}

    def _gth(self, element: str) -> Any:
        return gth(element, self.pseudopotentials.get(element), self.functional)

    def _start(self, atoms: Atoms) -> None:
        """Start a worker for this cell and these atoms; the one before is of no use any more."""
        if not atoms.pbc.all() or atoms.cell.rank < 3 or len(atoms) == 0:
            raise GenerationError(
                f"{atoms.get_chemical_formula() or 'no atoms'}, pbc={atoms.pbc.tolist()}, cell of "
                f"rank {atoms.cell.rank}: plane waves need atoms in a cell periodic in three "
                "directions; set atoms.cell and atoms.pbc=True"
            )
        if self._worker is not None:
            self._worker.close()
        # removed with the engine, or at the end of Python: after an error its log can be read
        self._scratch = tempfile.TemporaryDirectory(prefix="espresso-", dir=self._made_folder())
        scratch = Path(self._scratch.name)
        for element in sorted(set(atoms.get_chemical_symbols())):
            choice = self.pseudopotentials.get(element)
            if isinstance(choice, str | Path):
                _copy_pseudopotential(element, Path(choice), scratch)
            else:
                write_upf(self._gth(element), scratch / f"{element}.UPF")
        (scratch / "pw.in").write_text(self.input_text(atoms))
        self._worker = _Worker(self.python, scratch, self.threads)

    def _made_folder(self) -> Path | None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def input_text(self, atoms: Atoms) -> str:
        """Return the input file of `pw.x` for `atoms`.

        The type of calculation is "md" although the ions are moved from here: only there does
        Quantum ESPRESSO extrapolate orbitals and density from one configuration to the next.
        """
        elements = sorted(set(atoms.get_chemical_symbols()))
        orbitals = self.extrapolation if self.extrapolation != "atomic" else "none"
        occupations = "occupations='fixed'"
        if self.temperature:
            width = self.temperature * kB / Ry
            occupations = f"occupations='smearing', smearing='fd', degauss={width:.8f}"
        lines = [
            "&control calculation='md', prefix='pw', outdir='tmp', pseudo_dir='.', dt=20,",
            " nstep=100000000, disk_io='none', tprnfor=.true. /",
            f"&system ibrav=0, nat={len(atoms)}, ntyp={len(elements)}, nosym=.true.,",
            f" ecutwfc={self.cutoff / Ry:.8f}, {occupations}",
            f"{f', nbnd={self.bands}' if self.bands else ''} /",
            f"&electrons conv_thr={self.threshold / Ry:.3e}, mixing_beta={self.mixing},",
            f" mixing_mode='{self.mixing_mode}', electron_maxstep={self.max_iterations},",
            " startingwfc='random', diagonalization='david' /",
            f"&ions pot_extrapolation='{self.extrapolation}', wfc_extrapolation='{orbitals}' /",
            "ATOMIC_SPECIES",
            *(f"{e} {atomic_masses[atomic_numbers[e]]:.6f} {e}.UPF" for e in elements),
            "CELL_PARAMETERS angstrom",
            *("{:.12f} {:.12f} {:.12f}".format(*vector) for vector in atoms.cell),
            "ATOMIC_POSITIONS angstrom",
            *("{} {:.12f} {:.12f} {:.12f}".format(a.symbol, *a.position) for a in atoms),
            self._k_points_text(),
        ]
        return "\n".join(lines) + "\n"

    def _k_points_text(self) -> str:
        if self.k_points is None:
            return "K_POINTS gamma"
        mesh = " ".join(str(n) for n in self.k_points)
        return f"K_POINTS automatic\n{mesh} {' '.join([str(int(self.shifted))] * 3)}"


def _copy_pseudopotential(element: str, source: Path, scratch: Path) -> None:
    if not source.is_file():
        raise GenerationError(f"{source}: no such pseudopotential for {element}; give a UPF file")
    shutil.copy(source, scratch / f"{element}.UPF")


class _Worker:
    """The worker process, its scratch folder and its pipes."""

    def __init__(self, python: Path, scratch: Path, threads: int) -> None:
        self.scratch, self.log = scratch, scratch / "pw.log"
        theirs, requests = os.pipe()
        replies, theirs_too = os.pipe()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONNOUSERSITE": "1"}
        environment.pop("PYTHONPATH", None)  # their numpy is not ours
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, _WORKER, str(theirs), str(theirs_too)],
                cwd=scratch,
                env=environment,
                pass_fds=(theirs, theirs_too),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(theirs), os.close(theirs_too)  # else a dead worker would not end the stream
        self._requests: BinaryIO = os.fdopen(requests, "wb")
        self._replies: BinaryIO = os.fdopen(replies, "rb")
        told = self._receive()
        self.grid = tuple(told.pop("grid").tolist())
        self.versions = {name: str(value) for name, value in told.items()}

    def ask(self, **arrays: Any) -> dict[str, NDArray]:
        """Send a request and wait for the reply."""
        try:
            write_record(self._requests, **(arrays or {"density": True}))
        except (BrokenPipeError, ValueError):
            pass  # it has died; reading says so, with its log
        return self._receive()

    def _receive(self) -> dict[str, NDArray]:
        try:
            return read_record(self._replies)
        except (EOFError, ValueError, OSError):
            status = self._process.wait()
            raise GenerationError(
                f"the Quantum ESPRESSO worker ended with status {status}; its log ({self.log}) "
                f"ends:\n{self.tail()}"
            ) from None

    def tail(self, lines: int = 25) -> str:
        """Return the end of the log, and Quantum ESPRESSO's own error file if it left one."""
        files = [self.log, self.scratch / "CRASH"]
        texts = [f.read_text(errors="replace") for f in files if f.is_file()]
        return "\n".join("\n".join(text.splitlines()[-lines:]) for text in texts)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._requests, self._replies):
            try:
                stream.close()
            except OSError:  # what was still in the buffer has nowhere to go
                pass


if __name__ == "__main__":
    try:
        print(make_environment(*(sys.argv[1:] or [_ENVIRONMENT])))
    except GenerationError as error:
        sys.exit(f"densitykit: {error}")
