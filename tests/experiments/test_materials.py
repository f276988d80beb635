"""Aluminium and water in motion: what is told of a density has its closed form."""

from __future__ import annotations

import numpy as np
import pytest

from densitykit.cells import wave_vectors
from densitykit.models.deep_density.linear import Atoms
from experiments.materials import debye_waller, dipole_features, infrared, xray_intensity

A = 4.05 * np.eye(3)


def lattice(width: float) -> np.ndarray:
    """Density of a face-centred crystal of Gaussians, by its plane waves, angstrom**-3."""
    shape = (24, 24, 24)
    g = wave_vectors(shape, A)
    sites = 4.05 / 2 * np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]])
    waves = np.exp(-1j * g @ sites.T).sum(axis=-1) * np.exp(-((g**2).sum(axis=-1)) * width**2 / 2)
    return np.fft.ifftn(3 * waves).real * np.prod(shape) / np.linalg.det(A)


def test_a_crystal_smeared_by_u_has_its_debye_waller_factor() -> None:
    u = 0.1  # along each axis, angstrom: Gaussians get wider by it
    found = debye_waller(lattice(np.hypot(0.4, u)), lattice(0.4), A)
    assert found == pytest.approx(8 * np.pi**2 * u**2, rel=1e-6)


def test_a_dipole_that_swings_has_one_line() -> None:
    t, k = 2.0 * np.arange(4000), 1600.0  # fs, 1/cm
    omega = 2 * np.pi * 2.99792458e-5 * k
    wave_numbers, power = infrared(np.outer(np.cos(omega * t), [1.0, 2.0, 0.0]), 2.0)
    assert wave_numbers[power.argmax()] == pytest.approx(k, abs=10)


def test_features_turn_with_molecules_and_know_no_cell_faces() -> None:
    rng, edge = np.random.default_rng(0), 9.0
    oxygen = np.array([[1.0, 1, 1], [8.5, 1, 1], [4, 6, 5]])
    x = (oxygen[:, None] + 0.1 * rng.normal(size=(3, 3, 3))).reshape(-1, 3)
    x[1::3] += [0.9, 0, 0]
    x[2::3] += [0, 0.9, 0]
    features = dipole_features(x, edge)
    turned = dipole_features(x[:, [1, 2, 0]], edge)
    np.testing.assert_allclose(turned, features[..., [1, 2, 0]], atol=1e-12)
    moved = x.reshape(3, 3, 3) + edge * np.array([0, 1, -2])[:, None, None]
    np.testing.assert_allclose(dipole_features(moved.reshape(-1, 3), edge), features, atol=1e-12)


def test_lone_cores_scatter_like_their_form_factor() -> None:
    """No valence electrons: two 1s electrons at each oxygen, four together where they meet."""
    here = Atoms(np.array([[1.0, 2.0, 3.0]] * 2), np.array([8, 8]), 9.0 * np.eye(3))
    intensity = xray_intensity(np.zeros((20, 20, 20)), here, largest=3.0)
    assert intensity.iloc[0] == pytest.approx(2**2 * 2, rel=0.02)
    assert (np.diff(intensity.values) < 0).all()
