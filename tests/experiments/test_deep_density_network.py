"""The table of the published network: a superposition is found exactly, and scored."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from experiments.deep_density_network import score, superposition


@pytest.fixture
def run() -> xr.Dataset:
    """Two atoms in a skew periodic cell, each a Gaussian of one of the exponents."""
    cell, rng = np.array([[5.0, 0, 0], [1.0, 5.2, 0], [0, 0.3, 4.8]]), np.random.default_rng(0)
    fractions = np.stack(np.meshgrid(*3 * [np.arange(8) / 8], indexing="ij"), axis=-1)
    images = np.array(list(np.ndindex(3, 3, 3))) - 1
    positions = rng.random((3, 2, 3)) @ cell
    rho = 0.0
    for atom, (height, exponent) in enumerate(((1.0, 0.35 * 1.7), (2.0, 0.35 * 1.7**3))):
        R = (fractions[None, :, :, :, None] + images) @ cell
        R = R - positions[:, atom][:, None, None, None, None]
        rho = rho + height * np.exp(-exponent * (R**2).sum(axis=-1)).sum(axis=-1)
    return xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), rho),
            "positions": (("time", "atom", "cartesian"), positions),
            "numbers": ("atom", np.array([3, 9])),
            "cell": (("vector", "cartesian"), cell),
        }
    )


def test_a_superposition_is_found(run):
    found = score(superposition(run), run)
    assert found["worst l1"] < 0.1 and found["worst l2"] < 0.1
    whole = superposition(run)
    half = score(lambda atoms, grid: 0.5 * whole(atoms, grid), run)
    assert half["l1"] == pytest.approx(50, abs=0.1)
