"""What the table of predicted densities measures, on densities whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("ase", reason="needs densitykit[dft]")

from densitykit.models.deep_density.linear import Atoms
from experiments.deep_density_physics import (
    COULOMB,
    coulomb_potential,
    dipole,
    errors,
    force_on_hydrogen,
    structure_factor,
    water_dipoles,
)

L, N = 10.0, 40
X = np.stack(np.meshgrid(*3 * [np.arange(N) * L / N], indexing="ij"), axis=-1)


def gaussian(centre: tuple[float, ...], width: float = 0.6, periodic: bool = False) -> np.ndarray:
    """A charge of one."""
    d = X - np.array(centre)
    d -= L * np.round(d / L) if periodic else 0
    return np.exp(-(d**2).sum(axis=-1) / (2 * width**2)) / (2 * np.pi * width**2) ** 1.5


def atoms(positions: list, numbers: list[int], periodic: bool = False) -> Atoms:
    return Atoms(np.array(positions, float), np.array(numbers), L * np.eye(3), periodic)


def test_dipole_of_a_displaced_charge() -> None:
    proton = atoms([[5, 5, 5]], [1])
    mu = dipole(gaussian((5.3, 5, 4.9)), proton, np.array([1.0]))
    np.testing.assert_allclose(mu, [-0.3, 0, 0.1], atol=1e-6)


def test_potential_of_a_wave() -> None:
    k = 2 * np.pi / L
    rho = np.cos(2 * k * X[..., 0])
    v = coulomb_potential(rho, atoms([[0, 0, 0]], [1], periodic=True))
    np.testing.assert_allclose(v, 4 * np.pi * COULOMB / (2 * k) ** 2 * rho, atol=1e-10)


def test_force_is_coulombs_far_from_a_charge() -> None:
    """Of two opposite charges, which have hardly any images."""
    proton, rho = atoms([[5, 5, 5]], [1]), gaussian((8, 5, 5)) - gaussian((2, 5, 5))
    force = force_on_hydrogen(rho, proton)[0]
    assert force[0] == pytest.approx(2 * COULOMB / 3**2, rel=0.03)
    np.testing.assert_allclose(force[1:], 0, atol=1e-9)


def test_structure_factor_of_one_charge() -> None:
    s = structure_factor(gaussian((3, 4, 5), 0.5, True), atoms([[3, 4, 5]], [1], periodic=True))
    assert s[0] == pytest.approx(np.exp(-((0.5 * 2 * np.pi / L) ** 2)), rel=1e-3)
    assert np.all(np.diff(s) < 0)


def test_each_molecule_of_water_has_its_dipole() -> None:
    """Far apart, across the faces of the cell, densities off their oxygens."""
    places, moves = [[0.2, 5, 9.9], [5, 0.1, 5]], [[0.2, 0, 0], [0, 0, -0.1]]
    positions, rho = [], 0.0
    for place, move in zip(places, moves, strict=True):
        R = np.array(place)
        positions += [R, R + [0.8, 0, 0.6], R + [-0.8, 0, 0.6]]
        rho = rho + 8 * gaussian(tuple(R + move), 0.4, True)
    water = atoms(positions, [8, 1, 1] * 2, periodic=True)
    mu = water_dipoles(rho, water, np.array([6, 1, 1] * 2))
    expected = np.array([0, 0, 1.2]) - 8 * np.array(moves)
    np.testing.assert_allclose(mu, expected, atol=0.02)


def test_no_error_has_no_effect_and_more_of_it_more() -> None:
    molecule = atoms([[5, 5, 5], [5, 5, 5.75]], [1, 1])
    truth, other = 2 * gaussian((5, 5, 5.4)), 2 * gaussian((5, 5, 5.5), 0.7)
    none = errors(truth, truth, molecule)
    half, whole = (errors(truth + a * (other - truth), truth, molecule) for a in (0.5, 1.0))
    for name in none:
        assert none[name][0] == pytest.approx(0, abs=1e-12)
        assert 0 < half[name][0] < whole[name][0]
    name = "Coulomb energy, meV/atom"
    assert whole[name][0] == pytest.approx(4 * half[name][0], rel=1e-9)
