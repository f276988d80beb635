r"""Kohn-Sham DFT in Gaussian orbitals: molecules in free space and small periodic cells, by PySCF.

The orbitals are expanded in contracted Gaussians, :math:`\psi_i(r) = \sum_\mu C_{\mu i}
\chi_\mu(r)`, and pseudopotentials stand for the core (see
:mod:`densitykit.generate.pseudopotentials`), so that the valence density

.. math:: \rho(r) = \sum_i f_i\, |\psi_i(r)|^2

is smooth enough for a regular grid. It is evaluated there point by point: no cube file, no
interpolation. The molecule has free space around it. Its density is folded into the cell: each
grid point stands for the periodic image of itself nearest to the middle of the molecule. So a
molecule may sit anywhere in its cell, but a cell too small to hold its density is an error.

From one configuration to the next the density matrix P moves with its orthonormalised basis,
:math:`P' = S'^{-1/2} S^{1/2} P\, S^{1/2} S'^{-1/2}`: the electrons are kept and the orbitals stay
orthonormal, whatever the step.

Errors of ethane's density (GTH-PBE, relative l2): basis against QZV3P, DZVP 2.3 %, TZVP 1.0 %,
TZV2P 0.5 %, QZV2P 0.3 %; integration grid of level 2 below 1e-6, of level 1 3e-5. A grid of 0.25
bohr (0.13 angstrom) counts the electrons to 1e-5 and holds the density to 0.2 % between its
points; 0.2 bohr to 0.04 %, 0.3 bohr to 0.7 %, 0.4 bohr to 2 %. Values at the points are exact on
any grid. Between the outermost nuclei and the faces of the cell 2.8 angstrom keep the electrons to
1e-5, and 3.8 the density at the faces below 1e-5 angstrom**-3. Forces miss the response of the
integration grid, some 1e-3 eV/angstrom.

Source: Goedecker, Teter, Hutter 1996; VandeVondele, Krack, Mohamed, Parrinello, Chassaing, Hutter
2005 (Gaussian bases and multigrids); Sun et al. 2020 (PySCF).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TextIO

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.units import Bohr, Hartree
from numpy.typing import NDArray
from scipy.linalg import eigh, solve

from densitykit.errors import GenerationError
from densitykit.fields import n_electrons

try:
    import pyscf
    from pyscf import df
    from pyscf.gto import mole
    from pyscf.pbc import dft as periodic_dft
    from pyscf.pbc import gto as periodic_gto
except ImportError as error:
    raise ImportError(
        "densitykit.generate.molecular needs PySCF: in a clone, pip install -e '.[dft]'"
    ) from error

__all__ = ["GaussianDFT", "PeriodicGaussianDFT"]

#: points along each edge of a block of the density: bounded memory, and small enough that most
#: shells are far away and skipped
_BLOCK = 16
#: points of the integration grid at a time
_POINTS = 20_000
#: densities that the fit leaves out, 1/bohr**3
_FAINT = 1e-5
#: of the fit of a density, relative to functions of unit norm
_RIDGE = 1e-9
#: relative error of the electron count above which a cell is called too small or too coarse
_COUNT_TOLERANCE = 1e-3


class GaussianDFT(Calculator):
    """DFT of a molecule in free space; usable wherever ASE takes a calculator.

    Parameters
    ----------
    functional
        Exchange-correlation functional, PySCF's name.
    basis
        Gaussian basis made for the pseudopotential, PySCF's name or one for each element.
    pseudopotential
        PySCF's name, or one for each element.
    charge
        Of the molecule, in e.
    spin
        Number of unpaired electrons; orbitals are unrestricted unless it is 0.
    grid_level
        Integration grid of the exchange-correlation energy, PySCF's 0 to 9.
    density_fit
        Fit the density in the Coulomb energy: 1e-6 of the density, and forces on
        butane 4 times faster.
    threshold
        Convergence of the energy, eV.
    max_iterations
        Of the self-consistency cycle.
    log
        File that PySCF's output is appended to; None for none.

    The cell of the atoms serves for the density only. Energies are in eV, forces in eV/angstrom.

    Attributes
    ----------
    iterations
        Of the last self-consistency cycle.

    Raises
    ------
    GenerationError
        No basis or pseudopotential for an element, an impossible number of
        electrons, or no convergence.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces"]

    def __init__(
        self,
        *,
        functional: str = "PBE",
        basis: str | Mapping[str, Any] = "gth-tzv2p",
        pseudopotential: str | Mapping[str, Any] = "gth-pbe",
        charge: int = 0,
        spin: int = 0,
        grid_level: int = 2,
        density_fit: bool = False,
        threshold: float = 1e-7,
        max_iterations: int = 60,
        log: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.functional, self.basis, self.pseudopotential = functional, basis, pseudopotential
        self.charge, self.spin, self.grid_level = charge, spin, grid_level
        self.threshold, self.max_iterations = threshold, max_iterations
        self.density_fit = density_fit
        self.log = None if log is None else Path(log)
        self.iterations = 0
        self._stream: TextIO | None = None
        self._solution: Any = None  # PySCF's mean field of the configuration solved last
        self._orthonormal: NDArray[np.float64] | None = None  # S^(1/2) P S^(1/2) of it
        self._start_density: NDArray[np.float64] | None = None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Solve for `atoms`; called by ASE when a result is asked for."""
        super().calculate(atoms, properties, system_changes)
        if self._solution is None or self._matters(system_changes):
            if "numbers" in system_changes:
                self._orthonormal = None
            self._solution = None
            self._solution = self._solve()
        energy = float(self._solution.e_tot) * Hartree
        self.results |= {"energy": energy, "free_energy": energy}
        if "forces" in properties:
            gradient = self._solution.nuc_grad_method().kernel()
            self.results["forces"] = -np.asarray(gradient) * Hartree / Bohr

    def start_from(self, density: NDArray[np.floating]) -> None:
        """Let the next solve start from a density instead of the orbitals of free atoms.

        It is fitted by atom-centred Gaussians, in whose potential one diagonalisation is done.

        Parameters
        ----------
        density
            Valence density in the cell of the atoms, shape (X, Y, Z), angstrom**-3.
        """
        self._start_density = np.asarray(density, float)
        self._solution = None
        self.reset()

    def density(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """Return the valence density of the configuration solved last, sampled point by point.

        Parameters
        ----------
        shape
            Points along the lattice vectors.

        Returns
        -------
        NDArray[np.float64]
            Shape (X, Y, Z), angstrom**-3, cell-periodic without end point.

        Raises
        ------
        GenerationError
            Nothing was solved yet, no cell, or a cell or grid on which the number
            of electrons is off by more than 1e-3.
        """
        solution, cell = self._solved(), np.asarray(self.atoms.cell)
        orbitals = _weighted_orbitals(solution) / Bohr**1.5
        values = np.empty(tuple(shape))
        for block, points in _blocks(self.atoms, values.shape):
            basis = self._basis_at(points.reshape(-1, 3) / Bohr)
            values[block] = ((basis @ orbitals) ** 2).sum(axis=1).reshape(points.shape[:3])
        self._check_count(float(n_electrons(values, cell)), shape)
        return values

    def _basis_at(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of the basis functions, shape (point, basis), at points (point, 3) in bohr."""
        return self._solution.mol.eval_gto("GTOval_sph", points)

    def description(self) -> dict[str, Any]:
        """Return engine and settings, for the attributes of a trajectory."""
        return {
            "engine": f"PySCF {pyscf.__version__}",
            "functional": self.functional,
            "pseudopotential": self.pseudopotential,
            "valence_charges": self._valence_charges(),
            "basis": self.basis,
            "charge": self.charge,
            "spin": self.spin,
            "k_points": "none (free space)",
            "smearing": "none",
            "integration_grid": f"level {self.grid_level}",
            "density_fit": self.density_fit,
            "scf_threshold_eV": self.threshold,
        }

    def _valence_charges(self) -> dict[str, int]:
        """Electrons that each element gives the density, once a configuration was solved."""
        if self._solution is None:
            return {}
        mol, symbols = self._solution.mol, self.atoms.get_chemical_symbols()
        return {s: int(z) for s, z in zip(symbols, mol.atom_charges(), strict=True)}

    def close(self) -> None:
        """Forget the last solution and close the log."""
        self._solution = self._orthonormal = None
        self.results = {}
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _matters(self, changes: Sequence[str]) -> bool:
        """Whether the energy depends on what changed; a molecule's knows nothing of the cell."""
        return bool({"numbers", "positions"} & set(changes))

    def _solve(self) -> Any:
        """Return the converged mean field of `self.atoms`."""
        solution = self._mean_field(self._molecule())
        solution.conv_tol, solution.max_cycle = self.threshold / Hartree, self.max_iterations
        solution.chkfile = None
        overlap = solution.get_ovlp()
        guess, self._start_density = self._start_density, None
        if guess is None:
            dm0 = self._initial(overlap)
        else:
            dm0 = _density_matrix(solution, _fitted(solution.mol, self.atoms, guess))
        solution.kernel(dm0=dm0)
        self.iterations = int(solution.cycles)
        if not solution.converged:
            raise GenerationError(
                f"{self.atoms.get_chemical_formula()}: self-consistency not reached in "
                f"{self.max_iterations} iterations (charge {self.charge}, spin {self.spin}); look "
                "for atoms that touch or drift apart, check the spin, or raise max_iterations"
            )
        root = _power(overlap, 0.5)
        self._orthonormal = root @ np.asarray(solution.make_rdm1()) @ root
        return solution

    def _initial(self, overlap: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Return the density matrix of the step before, in the basis of this one."""
        if self._orthonormal is None or self._orthonormal.shape[-1] != len(overlap):
            return None
        inverse = _power(overlap, -0.5)
        return inverse @ self._orthonormal @ inverse

    def _molecule(self) -> Any:
        """Return PySCF's molecule (or cell) of `self.atoms`."""
        atoms = self.atoms
        mol = self._empty()
        mol.atom = list(zip(atoms.get_chemical_symbols(), atoms.positions / Bohr, strict=True))
        mol.unit, mol.basis, mol.pseudo = "Bohr", self.basis, self.pseudopotential
        if self.log is not None and self._stream is None:
            self._stream = self.log.open("a", encoding="utf-8")
        mol.charge, mol.verbose, mol.stdout = self.charge, 4 if self.log else 0, self._stream
        mol.spin = None  # any, so that our own check has the word
        name = atoms.get_chemical_formula() or "no atoms"
        try:
            mol.build(dump_input=False, parse_arg=False)
        except (KeyError, RuntimeError, ValueError) as error:
            raise GenerationError(
                f"{name}: {error}; PySCF needs the basis {self.basis} and the pseudopotential "
                f"{self.pseudopotential} for every element"
            ) from error
        self._check_electrons(mol, name)
        mol.spin = self.spin
        return mol

    def _check_electrons(self, mol: Any, name: str) -> None:
        bare = sorted(set(self.atoms.get_chemical_symbols()) - set(mol._pseudo))
        if bare:
            pseudo = f"{self.pseudopotential} pseudopotential of {', '.join(bare)}"
            raise GenerationError(f"{name}: no {pseudo}; name another set")
        electrons = mol.tot_electrons()
        if electrons < 1 or (electrons - self.spin) % 2 or not 0 <= self.spin <= electrons:
            raise GenerationError(
                f"{name}: {electrons} electrons (charge {self.charge}) cannot have spin "
                f"{self.spin}; spin counts the unpaired electrons"
            )

    def _empty(self) -> Any:
        return mole.Mole()

    def _mean_field(self, mol: Any) -> Any:
        kind = pyscf.dft.UKS if self.spin else pyscf.dft.RKS
        field = kind(mol, xc=self.functional)
        field.grids.level = self.grid_level
        return field.density_fit() if self.density_fit else field

    def _solved(self) -> Any:
        if self._solution is None:
            raise GenerationError("there is no density yet; ask for the energy or forces first")
        if self.atoms.cell.rank < 3:
            raise GenerationError(
                f"{self.atoms.get_chemical_formula()}: no cell to put a density in; use e.g. "
                "atoms.center(vacuum=4) before the calculation"
            )
        return self._solution

    def _check_count(self, count: float, shape: Sequence[int]) -> None:
        expected = self._solution.mol.tot_electrons()
        if abs(count / expected - 1) > _COUNT_TOLERANCE:
            lengths = " x ".join(f"{length:.1f}" for length in self.atoms.cell.lengths())
            raise GenerationError(
                f"{self.atoms.get_chemical_formula()}: {count:.4f} electrons of {expected} on the "
                f"grid {tuple(shape)} of the cell {lengths} angstrom; the cell cuts the density "
                "(leave 4 angstrom around the molecule) or the grid is too coarse (0.25 angstrom)"
            )


class PeriodicGaussianDFT(GaussianDFT):
    """DFT of a periodic cell at the Gamma point, with multigrids: for small boxes of water.

    The grid of the exchange-correlation energy breaks translational symmetry: a water molecule
    moved by a fraction of a step changes its energy by 3 meV at 140 hartree and 0.1 meV at 300;
    the forces on it sum to 0.05 eV/angstrom at either. Take forces for dynamics elsewhere.

    Arguments as those of `GaussianDFT`, but for the integration grid and density fitting:

        cutoff: kinetic energy of the plane waves that hold the density, eV.
    """

    def __init__(self, *, cutoff: float = 140 * Hartree, **options: Any) -> None:
        super().__init__(**options)
        self.cutoff = cutoff

    def start_from(self, density: NDArray[np.floating]) -> None:
        raise GenerationError(
            "PeriodicGaussianDFT cannot start from a density; take GaussianDFT for a molecule, or "
            "Espresso for a cell"
        )

    def _basis_at(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._solution.cell.pbc_eval_gto("GTOval_sph", points)

    def description(self) -> dict[str, Any]:
        """Return engine and settings, for the attributes of a trajectory."""
        settings = super().description() | {"k_points": "Gamma"}
        del settings["integration_grid"], settings["density_fit"]
        return settings | {"density_cutoff_eV": round(self.cutoff, 6)}

    def _matters(self, changes: Sequence[str]) -> bool:
        return bool({"numbers", "positions", "cell", "pbc"} & set(changes))

    def _empty(self) -> Any:
        if not self.atoms.pbc.all() or self.atoms.cell.rank < 3:
            raise GenerationError(
                f"{self.atoms.get_chemical_formula()}, pbc={self.atoms.pbc.tolist()}: set "
                "atoms.cell and atoms.pbc=True, or take GaussianDFT for a molecule"
            )
        cell = periodic_gto.Cell()
        cell.a = np.asarray(self.atoms.cell) / Bohr
        cell.ke_cutoff = self.cutoff / Hartree
        return cell

    def _mean_field(self, mol: Any) -> Any:
        kind = periodic_dft.UKS if self.spin else periodic_dft.RKS
        return kind(mol, xc=self.functional).multigrid_numint()


def _fitted(
    mol: Any, atoms: Atoms, density: NDArray[np.float64]
) -> tuple[Any, NDArray[np.float64]]:
    """Gaussians on the atoms and their coefficients in 1/bohr**3, by least squares on the grid."""
    functions = df.make_auxmol(mol, df.aug_etb(mol))
    normal, side = 0.0, 0.0
    for block, points in _blocks(atoms, density.shape):
        rho = density[block].ravel() * Bohr**3
        held = rho > _FAINT
        if held.any():
            values = functions.eval_gto("GTOval_sph", points.reshape(-1, 3)[held] / Bohr)
            normal, side = normal + values.T @ values, side + values.T @ rho[held]
    scale = np.sqrt(np.diag(normal))
    normal, side = normal / np.outer(scale, scale), side / scale
    normal[np.diag_indices_from(normal)] += _RIDGE
    return functions, solve(normal, side, assume_a="pos") / scale


def _density_matrix(solution: Any, fit: tuple[Any, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Of the orbitals in the PBE potential of a fitted density, which both spins share."""
    mol, numint, (functions, c) = solution.mol, solution._numint, fit
    fock = solution.get_hcore() + df.incore.aux_e2(mol, functions, "int3c2e") @ c
    solution.grids.build()
    for start in range(0, len(solution.grids.weights), _POINTS):
        some = slice(start, start + _POINTS)
        points, weights = solution.grids.coords[some], solution.grids.weights[some]
        basis = mol.eval_gto("GTOval_sph_deriv1", points)
        rho = functions.eval_gto("GTOval_sph_deriv1", points) @ c
        rho[0] = np.maximum(rho[0], 1e-12)
        potential = weights * numint.eval_xc_eff("PBE", rho, deriv=1)[1]
        potential[0] /= 2
        half = np.einsum("cp,cpi,pj->ij", potential, basis, basis[0], optimize=True)
        fock = fock + half + half.T
    fock = np.stack([fock, fock]) if isinstance(solution, pyscf.dft.uks.UKS) else fock
    energies, orbitals = solution.eig(fock, solution.get_ovlp())
    return solution.make_rdm1(orbitals, solution.get_occ(energies, orbitals))


def _power(matrix: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """Power of a symmetric positive matrix."""
    values, vectors = eigh(matrix)
    return (vectors * np.maximum(values, 1e-12) ** exponent) @ vectors.T


def _weighted_orbitals(solution: Any) -> NDArray[np.float64]:
    """Occupied orbitals of both spins times the root of their occupation, shape (basis, orbital).

    With them the density is a sum of squares: positive, and cheaper than by the density matrix.
    """
    coefficients, occupations = np.asarray(solution.mo_coeff), np.asarray(solution.mo_occ)
    if coefficients.ndim == 3:
        coefficients, occupations = np.hstack(coefficients), np.hstack(occupations)
    held = occupations > 0
    return coefficients[:, held] * np.sqrt(occupations[held])


def _blocks(
    atoms: Atoms, shape: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], NDArray[np.float64]]]:
    """Walk the grid in blocks: index and points (*, 3) in angstrom, at their nearest image."""
    cell = np.asarray(atoms.cell)
    fractions = atoms.positions @ np.linalg.inv(cell)
    middle = (fractions.min(axis=0) + fractions.max(axis=0)) / 2
    axes = [np.arange(n) / n for n in shape]
    # The half-open interval [-1/2, 1/2) about the middle; rounding only decides where rho ~ 0.
    axes = [m + (a - m + 0.5) % 1 - 0.5 for a, m in zip(axes, middle, strict=True)]
    for start in np.ndindex(*(-(-n // _BLOCK) for n in shape)):
        block = tuple(slice(_BLOCK * s, _BLOCK * (s + 1)) for s in start)
        local = np.meshgrid(*(a[b] for a, b in zip(axes, block, strict=True)), indexing="ij")
        yield block, np.stack(local, axis=-1) @ cell
