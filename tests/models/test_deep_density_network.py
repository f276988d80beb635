"""The published Deep Density network: its symmetries, its reach, its cost, its files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from densitykit.errors import ShapeError, WindowError
from densitykit.models import load_model, save_model
from densitykit.models.deep_density.linear import Atoms
from densitykit.models.deep_density.network import DeepDensity, PointsInReach

SMALL = {"cutoff": 2.6, "pair_nodes": (4, 5), "nodes": 6, "layers": 3}
CELL = np.array([[6.0, 0.3, 0.0], [-0.4, 5.5, 0.2], [0.5, 0.0, 7.0]])
EXACT = {"rtol": 0, "atol": 1e-12}


def configuration(seed: int = 0, count: int = 12, periodic: bool = True) -> Atoms:
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.arange(count) % 3 % 2 * 7 + 1)
    return Atoms(rng.random((count, 3)) @ CELL, numbers, CELL, periodic)


@pytest.fixture(scope="module")
def model() -> DeepDensity:
    """In double precision, all weights moved away from their start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = DeepDensity([1, 8], **SMALL).double()
        for p in result.parameters():
            p.data += 0.3 * torch.randn_like(p)
        for name in ("phi_mean", "D_mean"):
            getattr(result, name).normal_()
    result.C.data.fill_(-0.5)
    return result.eval()


@pytest.mark.parametrize("periodic", [True, False])
def test_permuted_shifted_and_turned_atoms_take_their_density_along(model, periodic):
    atoms, rng = configuration(periodic=periodic), np.random.default_rng(1)
    points = rng.random((300, 3)) @ CELL
    rho = model.values(atoms, points)
    assert np.ptp(rho) > 0.1
    order = rng.permutation(len(atoms.numbers))
    permuted = replace(atoms, positions=atoms.positions[order], numbers=atoms.numbers[order])
    np.testing.assert_allclose(model.values(permuted, points), rho, **EXACT)
    step = np.array([0.37, -1.21, 2.5])
    shifted = replace(atoms, positions=atoms.positions + step)
    np.testing.assert_allclose(model.values(shifted, points + step), rho, **EXACT)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]  # of either handedness
    turned = replace(atoms, positions=atoms.positions @ turn, cell=CELL @ turn)
    np.testing.assert_allclose(model.values(turned, points @ turn), rho, **EXACT)


def test_atoms_of_two_species_are_told_apart(model):
    atoms = configuration()
    swapped = replace(atoms, numbers=9 - atoms.numbers)
    points = np.random.default_rng(1).random((50, 3)) @ CELL
    assert abs(model.values(swapped, points) - model.values(atoms, points)).max() > 1e-3


def test_a_repeated_cell_has_the_repeated_density(model):
    """Any cell, also one that is smaller than the cutoff, where atoms see their own images."""
    cell = np.diag([2.0, 2.2, 5.0])
    one = Atoms(np.array([[0.1, 0.2, 0.3], [1.2, 1.3, 2.0]]), np.array([1, 8]), cell)
    shifts = np.array([[i, j, 0] for i in range(2) for j in range(3)]) @ cell
    many = Atoms(
        (shifts[:, None] + one.positions).reshape(-1, 3),
        np.tile(one.numbers, 6),
        np.diag([4.0, 6.6, 5.0]),
    )
    expected = np.tile(model.density(one, (4, 5, 9)), (2, 3, 1))
    np.testing.assert_allclose(model.density(many, (8, 15, 9)), expected, **EXACT)


def test_the_grid_starts_at_the_corner_of_the_cell(model):
    atoms, grid = configuration(), (3, 4, 5)
    point = np.array([2 / 3, 1 / 4, 3 / 5]) @ CELL
    expected = model.values(atoms, point[None])[0]
    assert model.density(atoms, grid)[2, 1, 3] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("moved", ["neighbour", "point"])
def test_density_has_one_continuous_derivative_at_the_cutoff(model, moved):
    """Values and slopes just inside and just outside differ by what vanishes with the step."""
    R_c, eps = model.cutoff, 1e-4

    def rho(R: float) -> float:
        second = np.array([R if moved == "neighbour" else 1.0, 0.0, 0.0])
        atoms = Atoms(np.array([np.zeros(3), second]), np.array([8, 1]), CELL, periodic=False)
        point = [0.3, 0.4, 0.2] if moved == "neighbour" else [0.0, 0.6 * R, 0.8 * R]
        return model.values(atoms, np.array([point]))[0]

    inside, at, outside = (rho(R_c + k * eps) for k in (-1, 0, 1))
    far = abs(rho(0.9 * R_c) - at)
    assert far > 1e-4  # it does depend on what crosses the cutoff
    assert abs(inside - 2 * at + outside) / eps < 0.02 * far / (0.1 * R_c)


def test_pairs_of_points_and_atoms_are_all_there_is(model):
    """The tree against all distances to all images."""
    atoms, cutoff = configuration(), 4.0
    points = (np.random.default_rng(2).random((40, 3)) * 3 - 1) @ CELL  # also outside the cell
    shifts = np.array(list(np.ndindex(9, 9, 9))) - 4
    images = atoms.positions[:, None] + shifts @ CELL
    R = np.linalg.norm(points[:, None, None] - images, axis=-1)
    expected = np.sort(R[R < cutoff])
    point, atom, vectors = PointsInReach(atoms, cutoff).pairs(points)
    np.testing.assert_allclose(np.sort(np.linalg.norm(vectors, axis=1)), expected, atol=1e-9)
    for k in (0, 17):
        counted = np.bincount(atom[point == k], minlength=len(atoms.numbers))
        np.testing.assert_array_equal(counted, (R[k] < cutoff).sum(axis=1))


def test_the_cost_of_a_point_does_not_depend_on_the_number_of_atoms(model, monkeypatch):
    """What the networks see, counted: 2 and 4 times the cell, 2 and 4 times the pairs."""
    seen = {"points": 0, "atoms": 0}
    local, atomic = DeepDensity.local, DeepDensity.atomic

    def counted_local(self, h, species, atom, vectors):
        seen["points"] += len(vectors)
        assert len(vectors) <= 4096  # memory is bounded
        return local(self, h, species, atom, vectors)

    def counted_atomic(self, neighbours):
        seen["atoms"] += len(neighbours.I)
        return atomic(self, neighbours)

    monkeypatch.setattr(DeepDensity, "local", counted_local)
    monkeypatch.setattr(DeepDensity, "atomic", counted_atomic)
    atoms, counts = configuration(), []
    for n in (1, 2, 4):
        shifts = np.arange(n)[:, None] * CELL[0]
        many = Atoms(
            (shifts[:, None] + atoms.positions).reshape(-1, 3),
            np.tile(atoms.numbers, n),
            np.diag([n, 1, 1]) @ CELL,
        )
        seen.update(points=0, atoms=0)
        model.density(many, (6 * n, 6, 7))
        counts.append(dict(seen))
    for n, count in zip((2, 4), counts[1:], strict=True):
        assert count == {key: n * value for key, value in counts[0].items()}


def test_scaled_inputs_have_mean_zero_and_variance_one(model):
    fresh = DeepDensity([1, 8], **SMALL).double()
    atoms = configuration()
    points = np.random.default_rng(3).random((200, 3)) @ CELL
    _, atom, vectors = PointsInReach(atoms, fresh.cutoff).pairs(points)
    seen, index = fresh.neighbourhood(atoms), torch.from_numpy(atom).long()
    fresh.standardise(seen, index, torch.from_numpy(vectors))
    d_0, h = fresh.coordinates(torch.from_numpy(vectors)), fresh.atomic(seen)
    for s in (0, 1):
        rows = seen.species[index] == s
        D = fresh.descriptor(s, h[index[rows]], d_0[rows])
        x = (D - fresh.D_mean[s]) * fresh.D_scale[s]
        assert abs(x.mean(dim=0)).max() < 1e-9
        assert 0.5 < x.std(dim=0).median() <= 1.0 + 1e-9


def test_a_checkpoint_gives_the_same_density(model, tmp_path):
    card = {"species": [1, 8], "nearest": {"1-8": 0.9}} | SMALL
    single = DeepDensity(**card)
    path = save_model(single, tmp_path / "network", card)
    atoms = configuration()
    np.testing.assert_array_equal(
        load_model(path).density(atoms, (4, 4, 4)), single.density(atoms, (4, 4, 4))
    )


def test_what_does_not_fit_is_refused(model):
    atoms = configuration()
    with pytest.raises(WindowError, match=r"\[16\].*\[1, 8\]"):
        model.density(replace(atoms, numbers=np.where(atoms.numbers == 8, 16, 1)), (2, 2, 2))
    for bad in ({"species": []}, {"species": [1, 1]}, {"species": [1], "cutoff": 0.0}):
        with pytest.raises(ShapeError, match="species"):
            DeepDensity(**bad)
