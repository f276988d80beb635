"""Symmetries of lattices: how many there are, and that everything moves together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import HEXAGONAL, gaussians, moving_atoms, run_of

from densitykit.data.symmetry import augment, lattice_symmetries
from densitykit.data.transforms import backward_rate
from densitykit.data.windows import Window, Windows, step_generator

TRICLINIC = np.array([[4.0, 0, 0], [0.7, 5.0, 0], [0.4, 0.9, 6.0]])
FCC = np.array([[0.0, 2, 2], [2, 0, 2], [2, 2, 0]])
RHOMBUS = np.array([[4.0, 3, 0], [4, -3, 0], [0, 0, 6]])  # base-centred orthorhombic
EVEN = (6, 6, 6)


def as_window(density: np.ndarray, cell: np.ndarray | None = None, **atoms: object) -> Window:
    """Frames (K, X, Y, Z) as a window of one."""
    x = torch.as_tensor(np.array(density))[None]
    cell = np.eye(3) if cell is None else np.asarray(cell, float)
    return Window(x, torch.arange(float(x.shape[1]))[None], torch.tensor(cell)[None], **atoms)


def symmetry_matrix(operation: tuple, cell: np.ndarray) -> np.ndarray:
    """Cartesian matrix of an operation on lattice vectors."""
    axes, flips = operation
    signed = np.zeros((3, 3))
    signed[list(axes), range(3)] = np.where(flips, -1.0, 1.0)
    return np.linalg.inv(cell) @ signed @ cell


@pytest.mark.parametrize(
    ("cell", "grid", "count"),
    [
        (6 * np.eye(3), EVEN, 48),
        (6 * np.eye(3), (6, 6, 8), 16),  # the grid is less symmetric than the cell
        (np.diag([4.0, 4.0, 6.0]), EVEN, 16),
        (np.diag([4.0, 5.0, 6.0]), EVEN, 8),
        (HEXAGONAL, EVEN, 8),
        (RHOMBUS, EVEN, 8),
        (FCC, EVEN, 12),
        (TRICLINIC, EVEN, 2),
        (6 * np.eye(3)[[1, 2, 0]], EVEN, 48),  # vectors in another order
    ],
)
def test_number_of_symmetries(cell: np.ndarray, grid: tuple[int, ...], count: int) -> None:
    found = lattice_symmetries(cell, grid)
    assert len(set(found)) == count
    for operation in found:
        turned = symmetry_matrix(operation, cell)
        np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-10)
    assert ((0, 1, 2), (False,) * 3) in found and ((0, 1, 2), (True,) * 3) in found


def test_rounded_cells_keep_their_symmetry() -> None:
    """Cells from files have five digits."""
    assert len(lattice_symmetries(HEXAGONAL.round(5), EVEN)) == 8
    assert len(lattice_symmetries(np.diag([4.0, 4.01, 6.0]), EVEN)) == 8


def linear_part(moved: torch.Tensor, n: int) -> np.ndarray:
    """Signed permutation that took the field of flat indices to ``moved``."""
    corners = [moved[0, 0, 0], moved[1, 0, 0], moved[0, 1, 0], moved[0, 0, 1]]
    points = np.array([np.unravel_index(int(c), (n, n, n)) for c in corners])
    return (points[1:] - points[0] + 1) % n - 1  # differences are -1, 0 or 1


def test_augmentation_reaches_every_symmetry_and_shift() -> None:
    n = 3
    window = as_window(np.arange(n**3).reshape(1, n, n, n))
    operations, origins = set(), set()
    for step in range(600):
        moved = augment(window, step_generator(0, step)).density[0, 0]
        matrix = linear_part(moved, n)
        np.testing.assert_array_equal(np.abs(matrix) @ np.ones(3), 1)
        np.testing.assert_array_equal(matrix @ matrix.T, np.eye(3))
        assert sorted(moved.flatten().tolist()) == list(range(n**3))
        operations.add(tuple(matrix.flatten()))
        origins.add(int(moved[0, 0, 0]))
    assert len(operations) == 48 and len(origins) == n**3


@pytest.mark.parametrize("cell", [np.eye(3), HEXAGONAL, RHOMBUS, FCC, TRICLINIC])
def test_augmentation_is_an_isometry_of_the_torus(cell: np.ndarray) -> None:
    """It keeps the distances between all points: the power of each shell of |q|."""
    n = 5
    field = np.random.default_rng(1).normal(size=(n, n, n))
    index = np.stack(np.meshgrid(*[np.fft.fftfreq(n, 1 / n)] * 3, indexing="ij"), -1)
    lengths = np.linalg.norm(index @ np.linalg.inv(cell).T, axis=-1).round(9)
    _, shells = np.unique(lengths, return_inverse=True)

    def shell_power(x: np.ndarray) -> np.ndarray:
        return np.bincount(shells.ravel(), (np.abs(np.fft.fftn(x)) ** 2).ravel())

    for step in range(12):
        moved = augment(as_window(field[None], cell), step_generator(2, step)).density[0, 0]
        np.testing.assert_allclose(shell_power(moved.numpy()), shell_power(field), rtol=1e-10)


def test_augmentation_acts_alike_on_all_frames() -> None:
    """One frame is a function of the other, point by point, and stays so."""
    a = np.random.default_rng(3).uniform(size=(4, 4, 4))
    for step in range(10):
        moved = augment(as_window(np.stack([a, a**2])), step_generator(3, step)).density
        assert moved.shape == (1, 2, 4, 4, 4) and moved.is_contiguous()
        torch.testing.assert_close(moved[0, 0].square(), moved[0, 1], rtol=0, atol=0)


def test_rates_transform_as_scalars() -> None:
    """The rate of moved frames is the moved rate of the frames."""
    frames = np.random.default_rng(0).uniform(0.5, 1, (3, 4, 4, 4))
    rate = backward_rate(torch.tensor(frames)[None], 2.0)[0].numpy()
    for step in range(10):
        moved = augment(as_window(frames), step_generator(4, step)).density
        moved_rate = augment(as_window(rate[None]), step_generator(4, step)).density[0, 0]
        torch.testing.assert_close(backward_rate(moved, 2.0)[0], moved_rate, rtol=0, atol=0)


def test_each_member_of_a_batch_has_its_own_symmetry() -> None:
    density = np.repeat(np.random.default_rng(0).uniform(size=(1, 4, 4, 4)), 3, axis=0)
    batch = Windows(run_of(density), 2.0, context=1).sample_batch(8, step_generator(0, 0))
    torch.testing.assert_close(batch.at(0), batch.at(1), rtol=0, atol=0)
    assert len({tuple(s.flatten().tolist()) for s in batch.at(0)}) == 8


@pytest.mark.parametrize(
    ("cell", "grid"),
    [
        (6 * np.eye(3), (12, 12, 12)),
        (np.diag([4.0, 5.0, 6.0]), (8, 10, 13)),
        (HEXAGONAL, (10, 10, 12)),
        (FCC, (9, 9, 9)),
        (TRICLINIC, (8, 10, 12)),
    ],
    ids=["cubic", "orthorhombic", "hexagonal", "fcc", "triclinic"],
)
def test_a_gaussian_stays_at_its_atom(cell: np.ndarray, grid: tuple[int, ...]) -> None:
    """Drawn again for the moved atoms, the density is the moved density; velocities too."""
    numbers = [3, 9, 11]
    charges = np.array([1.0, 2.0, 3.0])
    run = moving_atoms(numbers, frames=6, cell=cell, grid=grid, kelvin=3000.0)
    drawn = [gaussians(x, cell, grid, charges) for x in run.positions.values]
    window = Windows(run, 2.0)[1].replace(density=torch.tensor(np.array(drawn))[None, 1:5])
    turned = set()
    for step in range(24):
        moved = augment(window, step_generator(5, step))
        for k in range(4):
            again = gaussians(moved.positions[0, k].numpy(), cell, grid, charges)
            np.testing.assert_allclose(moved.density[0, k], again, rtol=0, atol=1e-8)
        travelled = (moved.positions[0, 3] - moved.positions[0, 0]).numpy()
        np.testing.assert_allclose(travelled, 6.0 * moved.velocities[0, 0].numpy(), atol=1e-12)
        assert torch.equal(moved.cell, window.cell) and torch.equal(moved.times, window.times)
        turned.add(tuple(moved.velocities[0, 0, 0].numpy().round(9)))
    assert len(turned) > 1
