"""Lattices of any shape: shortest vectors and neighbours against a search of all images."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from densitykit.cells import (
    cell_heights,
    group_lengths,
    minimum_image,
    reduced_cell,
    shells,
    single_cell,
    wave_vectors,
)
from densitykit.errors import ShapeError
from densitykit.neighbours import neighbour_pairs
from densitykit.units import SYMBOLS, atomic_masses

CELLS = {
    "cubic": 3.0 * np.eye(3),
    "orthorhombic": np.diag([3.0, 4.0, 6.0]),
    "hexagonal": np.array([[5.0, 0, 0], [-2.5, 5 * np.sqrt(3) / 2, 0], [0, 0, 6.0]]),
    "skewed": np.array([[5.0, 0, 0], [4.9, 1.5, 0], [14.0, 3.0, 2.0]]),
    "very skewed": np.array([[4.0, 0, 0], [41.0, 3.0, 0], [-77.0, 58.0, 5.0]]),
}
each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
IMAGES = np.array(list(product(range(-4, 5), repeat=3)))


@each_cell
def test_a_reduced_cell_is_the_same_lattice(cell) -> None:
    rows = reduced_cell(cell)
    change = rows @ np.linalg.inv(cell)
    np.testing.assert_allclose(change, change.round(), atol=1e-9)
    assert abs(np.linalg.det(change)) == pytest.approx(1)
    lengths = np.linalg.norm(IMAGES @ rows, axis=1)
    first = np.sort(lengths[lengths > 1e-9])[0]
    assert np.linalg.norm(rows[0]) == pytest.approx(first)
    np.testing.assert_allclose(reduced_cell(rows), rows, atol=1e-9)


@each_cell
def test_minimum_images_are_the_shortest(cell) -> None:
    s = np.random.default_rng(0).uniform(-3, 3, (300, 3))
    found = minimum_image(s, cell)
    laps = (found - s @ cell) @ np.linalg.inv(cell)
    np.testing.assert_allclose(laps, laps.round(), atol=1e-8)
    tried = found[:, None] + IMAGES @ reduced_cell(cell)
    shortest = np.linalg.norm(tried, axis=-1).min(axis=1)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), shortest, rtol=1e-9)


def test_rounding_alone_is_wrong_in_a_skewed_cell() -> None:
    s = np.random.default_rng(0).uniform(-3, 3, (300, 3))
    cell = CELLS["skewed"]
    rounded = np.linalg.norm((s - s.round()) @ cell, axis=1)
    assert (rounded > 1.5 * np.linalg.norm(minimum_image(s, cell), axis=1)).mean() > 0.5


def test_minimum_images_of_what_is_not_there() -> None:
    s = np.array([[0.9, np.nan, 0.1], [0.9, 0.2, 0.1]])
    found = minimum_image(s, CELLS["hexagonal"])
    assert np.isnan(found[0]).any() and np.isfinite(found[1]).all()
    line = minimum_image(np.array([[0.75], [-0.6]]), np.array([[4.0]]))
    np.testing.assert_allclose(line, [[-1.0], [1.6]])


@each_cell
@pytest.mark.parametrize("cutoff", [2.0, 6.5])
def test_neighbours_are_all_images_within_reach(cell, cutoff) -> None:
    """Each pair once, the same atom's images too, whatever the laps of the positions."""
    rows = reduced_cell(cell)
    x = np.random.default_rng(0).uniform(-2, 3, (5, 3)) @ rows
    i, j, n = neighbour_pairs(x, cell, cutoff)
    distances = np.linalg.norm(x[j] - x[i] + n @ cell, axis=1)
    base = minimum_image((x - x[:, None]) @ np.linalg.inv(cell), cell)
    every = np.linalg.norm(base[:, :, None] + IMAGES @ rows, axis=-1).ravel()
    every = every[(every < cutoff) & (every > 1e-9)]
    np.testing.assert_allclose(np.sort(np.r_[distances, distances]), np.sort(every), atol=1e-9)
    assert len(neighbour_pairs(x, cell, cutoff, both_ways=True)[0]) == 2 * len(i)


@pytest.mark.parametrize(
    ("positions", "cell", "cutoff"),
    [
        (np.full((2, 3), np.nan), np.eye(3), 1.0),
        (np.zeros((2, 3)), np.zeros((3, 3)), 1.0),
        (np.zeros((2, 3)), np.eye(3), 0.0),
        (np.zeros((2, 2)), np.eye(3), 1.0),
        (np.zeros((2, 3)), np.ones((4, 3, 3)), 1.0),
    ],
)
def test_no_neighbours_of_nonsense(positions, cell, cutoff) -> None:
    with pytest.raises(ShapeError, match="neighbours"):
        neighbour_pairs(positions, cell, cutoff)


def test_heights() -> None:
    np.testing.assert_allclose(cell_heights(CELLS["orthorhombic"]), [3, 4, 6])
    both = cell_heights(np.stack([CELLS["hexagonal"], 2 * CELLS["hexagonal"]]))
    h = 5 * np.sqrt(3) / 2
    np.testing.assert_allclose(both, [[h, h, 6], [2 * h, 2 * h, 12]])


def test_shells_of_cells() -> None:
    """A cube has one shell for 6 waves, a hexagonal cell 6 in its plane and 2 along its axis."""
    cube = shells((6, 6, 6))
    assert cube[0, 0, 0] == 0 and (cube == 1).sum() == 6 and (cube == 2).sum() == 12
    hexagonal = shells((7, 7, 7), CELLS["hexagonal"])
    q = np.linalg.norm(wave_vectors((7, 7, 7), CELLS["hexagonal"]), axis=-1)
    first, count = (f(q[hexagonal == 1]) for f in (np.mean, len))
    assert (first, count) == (pytest.approx(2 * np.pi / 6), 2)
    assert (hexagonal == 2).sum() == 6
    assert np.ptp(q[hexagonal == 2]) < 1e-12


def test_equal_lengths_are_grouped() -> None:
    lengths = np.array([[2.0, 1.0], [1.0 + 1e-9, 3.0]])
    first, group = group_lengths(lengths)
    np.testing.assert_allclose(first, [1, 2, 3], atol=1e-8)
    np.testing.assert_array_equal(group, [[1, 0], [0, 2]])


def test_one_cell_of_a_run() -> None:
    cells = np.tile(CELLS["hexagonal"], (4, 1, 1))
    np.testing.assert_array_equal(single_cell(cells, "x"), CELLS["hexagonal"])
    np.testing.assert_array_equal(single_cell(cells[0], "x"), CELLS["hexagonal"])
    cells[2] *= 1.01
    with pytest.raises(ShapeError, match=r"unwrap needs one cell; .* change by 0\.06 angstrom"):
        single_cell(cells, "unwrap")


def test_masses_are_those_of_ase() -> None:
    data = pytest.importorskip("ase.data")
    numbers = np.arange(1, 119)
    np.testing.assert_allclose(atomic_masses(numbers), data.atomic_masses[1:119], rtol=1e-6)
    assert list(SYMBOLS) == data.chemical_symbols[:119]
    np.testing.assert_allclose(atomic_masses([[11, 3]]), [[22.98977, 6.94]])
    for wrong in ([0], [119], [3, -1], [2.5]):
        with pytest.raises(ShapeError, match="no atomic numbers"):
            atomic_masses(wrong)
