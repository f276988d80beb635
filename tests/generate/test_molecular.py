"""Gaussian DFT against itself moved, turned and displaced, and against PySCF called directly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule as built
from ase.units import Bohr, Hartree

pytest.importorskip("pyscf", reason="pip install 'densitykit[dft]'")

import pyscf

from densitykit.errors import GenerationError
from densitykit.fields import n_electrons
from densitykit.generate import molecular
from densitykit.generate.molecular import GaussianDFT, PeriodicGaussianDFT

GRID = (48, 48, 48)
EDGE = 7.2  # angstrom: a spacing of 0.15, so that quarter turns and steps map the grid on itself


def solved(atoms: Atoms, **options: object) -> Atoms:
    atoms = atoms.copy()
    atoms.calc = GaussianDFT(basis="gth-dzvp", **options)
    atoms.get_potential_energy()
    return atoms


def relative_l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def water() -> Atoms:
    """Bent, of no symmetry, in a cubic cell; solved."""
    atoms = built("H2O", cell=[EDGE] * 3)
    atoms.rotate(33, (1, 2, 3))
    atoms.positions += [3.6, 3.6, 3.6]
    atoms.positions[1] += [0.05, -0.03, 0.08]
    return solved(atoms)


@pytest.fixture(scope="module")
def density(water: Atoms) -> np.ndarray:
    return water.calc.density(GRID)


# --- energy and forces -------------------------------------------------------------------------


def test_energy_is_that_of_pyscf(water: Atoms) -> None:
    mol = pyscf.M(
        atom=list(zip(water.get_chemical_symbols(), water.positions / Bohr, strict=True)),
        unit="Bohr",
        basis="gth-dzvp",
        pseudo="gth-pbe",
        verbose=0,
    )
    field = pyscf.dft.RKS(mol, xc="PBE").set(conv_tol=1e-10)
    field.grids.level = 2
    np.testing.assert_allclose(water.get_potential_energy(), field.kernel() * Hartree, atol=1e-6)


def test_forces_are_the_slope_of_the_energy(water: Atoms) -> None:
    """Along a random direction; the integration grid moves with the atoms: a few meV/angstrom."""
    direction = np.random.default_rng(0).normal(size=(3, 3))
    slope = -np.sum(water.get_forces() * direction)
    moved, energy, h = water.copy(), [], 2e-3
    moved.calc = GaussianDFT(basis="gth-dzvp", grid_level=3, threshold=1e-9)
    for sign in (1, -1):
        moved.positions = water.positions + sign * h * direction
        energy.append(moved.get_potential_energy())
    assert abs(slope) > 0.5
    np.testing.assert_allclose((energy[0] - energy[1]) / (2 * h), slope, atol=5e-3)


def test_restart_gives_the_same_in_fewer_iterations(water: Atoms) -> None:
    """The density matrix of a neighbouring configuration is a better guess than that of atoms."""
    moved = solved(water)
    moved.positions[0] += 0.01
    energy, fresh = moved.get_potential_energy(), solved(moved)
    np.testing.assert_allclose(energy, fresh.get_potential_energy(), atol=2e-6)
    assert moved.calc.iterations < fresh.calc.iterations


@pytest.mark.parametrize("spin", [0, 2])
def test_a_density_is_a_start(water: Atoms, density: np.ndarray, spin: int) -> None:
    """Fewer iterations from a density, to the same energy; once."""
    atoms = water.copy()
    atoms.calc = GaussianDFT(basis="gth-dzvp", spin=spin)
    energy, usual = atoms.get_potential_energy(), atoms.calc.iterations
    atoms.calc.close()
    atoms.calc.start_from(density if not spin else atoms_density(atoms))
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-5)
    assert atoms.calc.iterations < usual - (2 if not spin else 0)
    assert atoms.calc._start_density is None


def atoms_density(atoms: Atoms) -> np.ndarray:
    """What an engine of the same settings finds for the same atoms."""
    again = atoms.copy()
    again.calc = GaussianDFT(basis="gth-dzvp", spin=atoms.calc.spin)
    again.get_potential_energy()
    return again.calc.density(GRID)


def test_a_fitted_density_is_that_density(water: Atoms, density: np.ndarray) -> None:
    functions, c = molecular._fitted(water.calc._solution.mol, water, density)
    points = np.array([[3.6, 3.6, 3.6], [3.9, 3.3, 3.6], [4.2, 3.6, 3.6]])
    found = functions.eval_gto("GTOval_sph", points / Bohr) @ c
    orbitals = molecular._weighted_orbitals(water.calc._solution)
    true = ((water.calc._basis_at(points / Bohr) @ orbitals) ** 2).sum(axis=1)
    np.testing.assert_allclose(found, true, rtol=0.01)


def test_periodic_cells_do_not_start_from_a_density(periodic: Atoms, density: np.ndarray) -> None:
    with pytest.raises(GenerationError, match="take GaussianDFT for a molecule"):
        periodic.calc.start_from(density)


def test_density_fitting_changes_little(water: Atoms) -> None:
    fitted = solved(water, density_fit=True)
    change = fitted.get_potential_energy() - water.get_potential_energy()
    assert 1e-6 < abs(change) < 2e-3
    np.testing.assert_allclose(fitted.get_forces(), water.get_forces(), atol=1e-3)


def test_open_shell() -> None:
    """Triplet methylene lies below the singlet, and both spins are in the density."""
    atoms = built("CH2_s3B1d", cell=[EDGE] * 3)
    triplet, singlet = solved(atoms, spin=2), solved(atoms)
    assert triplet.get_potential_energy() < singlet.get_potential_energy() - 0.3
    count = n_electrons(triplet.calc.density(GRID), triplet.cell)
    np.testing.assert_allclose(count, 6, rtol=1e-3)


# --- density -----------------------------------------------------------------------------------


def test_density_counts_the_electrons(water: Atoms, density: np.ndarray) -> None:
    assert density.shape == GRID and density.min() >= 0
    np.testing.assert_allclose(n_electrons(density, water.cell), 8, rtol=2e-4)


def test_dipole_moment(water: Atoms, density: np.ndarray) -> None:
    """The grid's against PySCF's, which comes from analytic integrals; e angstrom."""
    points = np.stack(np.meshgrid(*[EDGE * np.arange(48) / 48] * 3, indexing="ij"), axis=-1)
    ions = [6, 1, 1] @ (water.positions - 3.6)
    cell_volume = (EDGE / 48) ** 3
    moment = ions - np.einsum("xyz,xyzk->k", density, points - 3.6) * cell_volume
    solution = water.calc._solution
    np.testing.assert_allclose(moment, solution.dip_moment(unit="AU") * Bohr, atol=3e-3)


def test_shifted_by_grid_steps(water: Atoms, density: np.ndarray) -> None:
    """A molecule across the boundary of the cell, or beyond it, wraps around."""
    moved = water.copy()
    moved.positions += EDGE / 48 * np.array([5, 24, -100])
    shifted = solved(moved).calc.density(GRID)
    assert relative_l2(shifted, np.roll(density, (5, 24, -100), axis=(0, 1, 2))) < 1e-5


def test_turned_by_a_quarter(water: Atoms, density: np.ndarray) -> None:
    """(x, y, z) -> (y, -x, z) about the origin, a grid point; odd axes start at index 0."""
    turned = water.copy()
    turned.positions = water.positions[:, [1, 0, 2]] * [1, -1, 1]
    expected = np.roll(density.transpose(1, 0, 2)[:, ::-1], 1, axis=1)
    assert relative_l2(density, expected) > 0.1
    assert relative_l2(solved(turned).calc.density(GRID), expected) < 1e-4


def test_skewed_cell(water: Atoms, density: np.ndarray) -> None:
    """A sheared cell holds the same electrons; its planes are those of the cube, displaced."""
    skewed = water.copy()
    skewed.cell = [[EDGE, EDGE / 48 * 8, 0], [0, EDGE, 0], [0, 0, EDGE]]
    sheared = solved(skewed).calc.density(GRID)
    np.testing.assert_allclose(n_electrons(sheared, skewed.cell), 8, rtol=2e-4)
    np.testing.assert_allclose(sheared[24], np.roll(density[24], -4, axis=0), atol=1e-4)


# --- periodic cells ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def periodic() -> Atoms:
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.8]], cell=[5, 5, 5], pbc=True)
    atoms.calc = PeriodicGaussianDFT(basis="gth-dzvp")
    atoms.get_potential_energy()
    return atoms


def test_periodic_density(periodic: Atoms) -> None:
    """Samples of one function on any grid, with the atoms on the corner of the cell."""
    density = periodic.calc.density((20, 24, 40))
    np.testing.assert_allclose(n_electrons(density, periodic.cell), 2, rtol=1e-3)
    fine = periodic.calc.density((40, 24, 40))
    np.testing.assert_allclose(fine[::2], density)
    assert density[0, 0, 0] > 0.9 * density.max() and density.min() > 0
    np.testing.assert_allclose(density, np.roll(density[::-1], 1, axis=0), atol=1e-5)


def test_periodic_density_is_that_of_the_calculation(periodic: Atoms) -> None:
    solution = periodic.calc._solution
    mesh = solution._numint.mesh
    values = solution._numint.get_rho(solution.cell, solution.make_rdm1(), solution.grids)
    expected = np.reshape(values, mesh) / Bohr**3
    assert relative_l2(periodic.calc.density(tuple(mesh)), expected) < 1e-5


def test_periodic_forces(periodic: Atoms) -> None:
    force, moved, energy = periodic.get_forces()[1, 2], periodic.copy(), []
    moved.calc = PeriodicGaussianDFT(basis="gth-dzvp")
    for step in (2e-3, -2e-3):
        moved.positions = periodic.positions
        moved.positions[1, 2] += step
        energy.append(moved.get_potential_energy())
    assert abs(force) > 0.5
    np.testing.assert_allclose(-(energy[0] - energy[1]) / 4e-3, force, atol=5e-3)


def test_a_large_periodic_cell_holds_a_molecule(periodic: Atoms) -> None:
    """Two programs: images 7 angstrom apart no longer matter to hydrogen."""
    wide = periodic.copy()
    wide.cell = [EDGE] * 3
    free = solved(wide)
    wide.calc = PeriodicGaussianDFT(basis="gth-dzvp")
    energy = wide.get_potential_energy()
    np.testing.assert_allclose(energy, free.get_potential_energy(), atol=0.03)
    assert relative_l2(wide.calc.density(GRID), free.calc.density(GRID)) < 0.01


# --- provenance and errors ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GaussianDFT, PeriodicGaussianDFT])
def test_description_is_json(kind: type[GaussianDFT]) -> None:
    settings = kind(functional="PBE0", basis="gth-szv").description()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["engine"] == f"PySCF {pyscf.__version__}"
    assert (settings["functional"], settings["basis"]) == ("PBE0", "gth-szv")


def test_log_grows_and_closes(tmp_path: Path) -> None:
    atoms = built("H2", cell=[EDGE] * 3)
    with GaussianDFT(basis="gth-szv", log=tmp_path / "log") as calc:
        atoms.calc = calc
        atoms.get_potential_energy()
        once = (tmp_path / "log").read_text()
        atoms.positions[1] += 0.1
        atoms.get_potential_energy()
    assert once.count("converged SCF energy") == 1
    assert (tmp_path / "log").read_text().count("converged SCF energy") == 2
    with pytest.raises(GenerationError, match="no density yet"):
        calc.density(GRID)


@pytest.mark.parametrize(
    ("atoms", "options", "message"),
    [
        (Atoms("OH", [[0, 0, 0], [0, 0, 1]]), {}, "7 electrons .* cannot have spin 0"),
        (Atoms("H"), {"charge": 1, "spin": 0}, "0 electrons"),
        (built("H2O"), {"spin": 10}, "8 electrons .* spin 10"),
        (Atoms("U"), {}, "U: .*gth-dzvp"),
        (Atoms("Pu"), {"basis": {"Pu": [[0, [1.0, 1.0]]]}}, "Pu: .* pseudopotential gth-pbe"),
        (
            built("H2O"),
            {"pseudopotential": {"H": "gth-pbe"}},
            "H2O: no .* pseudopotential of O",
        ),
        (built("H2O"), {"max_iterations": 2}, "H2O: .* 2 iterations"),
    ],
)
def test_impossible_calculations(atoms: Atoms, options: dict, message: str) -> None:
    atoms = atoms.copy()
    atoms.calc = GaussianDFT(**{"basis": "gth-dzvp"} | options)
    with pytest.raises(GenerationError, match=message):
        atoms.get_potential_energy()


def test_density_needs_a_cell_that_holds_it() -> None:
    hydrogen = solved(built("H2"))
    with pytest.raises(GenerationError, match="no cell"):
        hydrogen.calc.density((8, 8, 8))
    hydrogen.cell = [2.5] * 3
    hydrogen.get_potential_energy()
    with pytest.raises(GenerationError, match="of 2 on the grid .* 2.5 x 2.5 x 2.5"):
        hydrogen.calc.density((32, 32, 32))


def test_periodic_needs_a_periodic_cell() -> None:
    atoms = built("H2", cell=[5, 5, 5])
    atoms.calc = PeriodicGaussianDFT(basis="gth-szv")
    with pytest.raises(GenerationError, match="pbc=.*GaussianDFT"):
        atoms.get_potential_energy()
