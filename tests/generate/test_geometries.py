"""Thermal configurations: ensembles, boxes, and the same numbers from the same seed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("ase")

from ase import Atoms, units
from ase.build import molecule as build_molecule
from scipy.spatial.transform import Rotation

from densitykit.errors import GenerationError
from densitykit.generate.geometries import (
    MOLECULES,
    _boxed,
    _superimpose,
    aluminium,
    lattice_constant,
    lithium,
    molecule,
    sodium_chloride,
)
from densitykit.generate.water import _ice_cubes, _spcfw, water

SHORT = {"interval": 30.0, "equilibration": 30.0}


def _ethane(seed: int) -> list[Atoms]:
    pytest.importorskip("tblite")
    return molecule("ethane", 2, seed=seed, **SHORT)


def _water(seed: int) -> list[Atoms]:
    pytest.importorskip("openmm")
    return water(8, 2, seed=seed, **SHORT)


def _aluminium(seed: int) -> list[Atoms]:
    return aluminium(32, 2, seed=seed, **SHORT)


@pytest.mark.parametrize("draw", [_ethane, _water, _aluminium])
def test_seed_determines_every_bit(draw: Callable[[int], list[Atoms]]) -> None:
    first, again, other = draw(1), draw(1), draw(2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
    assert np.abs(first[0].positions - other[0].positions).max() > 1e-3
    assert np.abs(first[0].positions - first[1].positions).max() > 1e-3
    assert [a.info["time"] for a in first] == [60.0, 90.0]
    for a in first:
        np.testing.assert_array_equal(a.cell, first[0].cell)
        assert a.info["temperature"] in (300.0, 350.0) and "seed 1" in a.info["source"]
        assert 50 < a.info["kinetic_temperature"] < 1000 and a.calc is None


def test_temperatures_differ_in_their_noise() -> None:
    """The same noise at another temperature would give nearly the same displacements, scaled."""
    cold, hot = (
        aluminium(32, 1, temperature=T, seed=0, **SHORT)[0].get_scaled_positions(wrap=False)
        for T in (300.0, 310.0)
    )
    cold, hot = (x - np.round(4 * x) / 4 for x in (cold, hot))  # from the sites, multiples of 1/4
    assert abs(np.corrcoef(cold.ravel(), hot.ravel())[0, 1]) < 0.5


# --- molecules -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOLECULES)
def test_box_of_a_molecule(name: str) -> None:
    boxed = _boxed(build_molecule(MOLECULES[name]), 3.0)
    np.testing.assert_allclose(boxed.positions.min(0), 3.0)
    np.testing.assert_allclose(boxed.positions.max(0), boxed.cell.lengths() - 3.0)
    moments, axes = boxed.get_moments_of_inertia(vectors=True)
    np.testing.assert_allclose(np.abs(np.diag(axes)).max(), 1.0, atol=1e-6)  # the long axis is x
    assert np.argmin(moments) == 0 and np.argmax(boxed.cell.lengths()) == 0 or name == "isobutane"
    original = build_molecule(MOLECULES[name])
    np.testing.assert_allclose(boxed.get_all_distances(), original.get_all_distances())


def test_superimpose() -> None:
    reference = _boxed(build_molecule("isobutane"), 3.0)
    turn = Rotation.random(random_state=0).as_matrix()
    moved = reference.positions @ turn + [1.0, -2.0, 3.0]
    np.testing.assert_allclose(_superimpose(moved, reference), reference.positions, atol=1e-12)
    mirrored = _superimpose(moved * [-1, 1, 1], reference)
    inside, outside = (
        mirrored - mirrored.mean(0),
        reference.positions - reference.positions.mean(0),
    )
    triple = [np.linalg.det(x[[0, 1, 5]]) for x in (inside, outside)]
    assert np.sign(triple[0]) != 0  # a mirror image is turned, never reflected back
    assert np.abs(inside - outside).max() > 1e-3 or np.isclose(*triple)


def test_snapshots_of_a_molecule() -> None:
    found = _ethane(0)
    centres = [a.get_center_of_mass() for a in found]
    np.testing.assert_allclose(centres[0], centres[1], atol=1e-10)
    for a in found:
        assert not a.pbc.any() and a.numbers.tolist() == [6, 6, 1, 1, 1, 1, 1, 1]
        assert 1.4 < a.get_distance(0, 1) < 1.7
        bond = np.abs(a.positions[0] - a.positions[1])
        assert bond.argmax() == 0 and bond[0] > 0.98 * a.get_distance(0, 1)  # laid along x


def test_bad_molecules(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenerationError, match="no molecule 'benzene'; choose one of .*'ethane'"):
        molecule("benzene", 1)
    pytest.importorskip("tblite")
    with pytest.raises(GenerationError, match="an atom is .* from the wall of its box"):
        molecule("ethane", 2, margin=0.05, **SHORT)
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    with pytest.raises(GenerationError, match=r"tblite is not installed; in a clone: pip install"):
        molecule("ethane", 1)


# --- aluminium and lithium -------------------------------------------------------------------


def test_lattice_constant() -> None:
    assert lattice_constant(298) == 4.0496
    for T, coefficient in ((573, 25.5e-6), (773, 27.4e-6)):
        mean = (lattice_constant(T) / lattice_constant(293) - 1) / (T - 293)
        assert abs(mean - coefficient) < 0.3e-6


def test_aluminium() -> None:
    found = aluminium(32, 6, temperature=900, interval=60.0, equilibration=300.0)
    assert found[0].pbc.all() and len(found[0]) == 32
    np.testing.assert_allclose(found[0].cell.lengths(), 2 * lattice_constant(900))
    assert abs(np.mean([a.info["kinetic_temperature"] for a in found]) / 900 - 1) < 0.2
    sites = aluminium(32, 1, temperature=1e-9, interval=3.0, equilibration=0.0)[0]
    scale = found[0].cell.lengths() / sites.cell.lengths()
    shift = np.array([a.positions - sites.positions * scale for a in found])
    np.testing.assert_allclose(shift.mean(1), 0, atol=1e-6)  # the crystal stays where it is
    assert 0.06 < (shift**2).sum(-1).mean() < 0.2  # angstrom**2; 0.12 in long runs


@pytest.mark.parametrize(("n_atoms", "edge"), [(32, 9.12722877), (256, 2 * 9.12722877)])
def test_lithium(n_atoms: int, edge: float) -> None:
    atoms = lithium(n_atoms, seed=3)
    np.testing.assert_allclose(atoms.cell.lengths(), edge)
    assert atoms.get_chemical_formula() == f"Li{n_atoms}" and atoms.pbc.all()
    density = atoms.get_masses().sum() / units.mol / (atoms.get_volume() * 1e-24)
    assert abs(density - 0.485) < 1e-3
    shift = atoms.positions - lithium(n_atoms, jitter=0.0).positions
    assert 0.15 < shift.std() < 0.25
    np.testing.assert_array_equal(atoms.positions, lithium(n_atoms, seed=3).positions)


@pytest.mark.parametrize("make", [lithium, lambda n: aluminium(n, 1)])
def test_atoms_that_fill_no_cube(make: Callable) -> None:
    for n_atoms in (0, 31, 64):
        with pytest.raises(GenerationError, match=f"{n_atoms} atoms fill no fcc cube; use 4 m"):
            make(n_atoms)


def test_sodium_chloride() -> None:
    """Rock salt in a right-angled cell: 6 neighbours of the other kind at half the edge."""
    atoms = sodium_chloride(jitter=0.0)
    assert atoms.get_chemical_formula() == "Cl12Na12" and atoms.pbc.all()
    np.testing.assert_allclose(atoms.cell.lengths(), 5.8 * np.sqrt([2, 3, 1.5]))
    np.testing.assert_allclose(atoms.cell.angles(), 90)
    sodium = np.r_[[True] * 12, [False] * 12]
    np.testing.assert_array_equal(atoms.numbers == 11, sodium)
    distances = atoms.get_all_distances(mic=True) + 10 * np.eye(24)
    near = np.abs(distances - 2.9) < 1e-6
    assert (near.sum(1) == 6).all() and distances.min() > 2.89
    assert not (near & (sodium[:, None] == sodium)).any()
    shift = sodium_chloride(seed=3).positions - atoms.positions
    assert 0.1 < shift.std() < 0.2
    np.testing.assert_array_equal(
        sodium_chloride(seed=3).positions, sodium_chloride(seed=3).positions
    )


# --- water -----------------------------------------------------------------------------------


def test_snapshots_of_water() -> None:
    for a in _water(0):
        assert a.numbers.tolist() == 8 * [8, 1, 1] and a.pbc.all()
        density = a.get_masses().sum() / units.mol / (a.get_volume() * 1e-24)
        assert abs(density - 0.997) < 1e-6
        O, H = a.positions[::3], a.positions.reshape(-1, 3, 3)[:, 1:]
        bonds = np.linalg.norm(H - O[:, None], axis=-1)
        assert 0.9 < bonds.min() and bonds.max() < 1.2  # molecules are whole
        assert (O >= 0).all() and (O < a.cell.lengths()).all()


def _energy(positions: np.ndarray, edge: float) -> float:
    """SPC/Fw energy in kcal/mol of molecules at positions in angstrom."""
    openmm = pytest.importorskip("openmm")
    platform = openmm.Platform.getPlatformByName("Reference")
    system = _spcfw(len(positions) // 3, edge)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(positions / 10)
    return context.getState(energy=True).getPotentialEnergy()._value / 4.184


def test_spcfw_of_one_molecule() -> None:
    """Stretching and bending cost k/2 x^2, but for what is left of the periodic images."""
    edge = 30.0
    shape = _ice_cubes(1, edge, 0)
    still = _energy(shape, edge)
    arm = shape[1] - shape[0]
    assert np.linalg.norm(arm) == pytest.approx(1.012)
    stretched = shape.copy()
    stretched[1] += 0.05 * arm / np.linalg.norm(arm)
    assert _energy(stretched, edge) - still == pytest.approx(0.5 * 1059.162 * 0.05**2, rel=0.01)
    axis = np.cross(arm, shape[2] - shape[0])
    bend = Rotation.from_rotvec(0.1 * axis / np.linalg.norm(axis)).as_matrix()
    bent = shape.copy()
    bent[1] = shape[0] + bend @ arm
    assert _energy(bent, edge) - still == pytest.approx(0.5 * 75.90 * 0.1**2, rel=0.02)


def test_spcfw_of_two_molecules() -> None:
    """Two molecules 3 angstrom apart: Coulomb and Lennard-Jones sums over pairs of sites."""
    edge = 30.0
    one = _ice_cubes(1, edge, 0)
    other = one @ Rotation.from_euler("x", 70, degrees=True).as_matrix() + [0.0, 3.0, 0.0]
    pair = np.concatenate([one, other])
    q = np.array([-0.82, 0.41, 0.41])
    r = np.linalg.norm(one[:, None] - other[None], axis=-1)
    expected = 332.0637 * (np.outer(q, q) / r).sum()
    x = (3.165492 / r[0, 0]) ** 6
    expected += 4 * 0.1554253 * (x**2 - x)
    interaction = _energy(pair, edge) - _energy(one, edge) - _energy(other, edge)
    assert interaction == pytest.approx(expected, abs=0.02)


def test_missing_openmm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openmm", None)
    with pytest.raises(GenerationError, match=r"openmm is not installed; in a clone: pip install"):
        water(8, 1)


@pytest.mark.slow
def test_structure_of_liquid_water() -> None:
    """First peak of g_OO near 2.75 angstrom and 300 K: 64 molecules for some picoseconds."""
    pytest.importorskip("openmm")
    found = water(64, 10, interval=1000.0, equilibration=5000.0)
    r = np.concatenate([a[::3].get_all_distances(mic=True)[np.triu_indices(64, 1)] for a in found])
    counts, edges = np.histogram(r, np.arange(2.0, 5.0, 0.1))
    middle = edges[:-1] + 0.05
    g = counts / (10 * 64 / 2 * 4 * np.pi * middle**2 * 0.1 * 64 / found[0].get_volume())
    assert 2.65 < middle[g.argmax()] < 2.85 and 2.5 < g.max() < 3.6
    assert abs(np.mean([a.info["kinetic_temperature"] for a in found]) - 300) < 15
