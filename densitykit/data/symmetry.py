r"""Symmetries of a periodic grid, for augmentation.

An operation that permutes and inverts lattice vectors maps the lattice onto itself if it leaves
the metric :math:`G = A A^T` of the cell unchanged (A: lattice vectors in rows), and grid points
onto grid points if it leaves the numbers of points unchanged. A cubic cell keeps all 48 signed
permutations, an orthorhombic one 8, a hexagonal one 8 of its 24 (the others are no permutations),
any cell at least inversion. Every shift by a grid point is one more. The physics commutes with
them all if the k-points of the data do: a shifted 2x2x2 mesh does, a single general one does not.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations, product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from densitykit.data.windows import Window

__all__ = ["augment", "lattice_symmetries"]

Operation = tuple[tuple[int, ...], tuple[bool, ...]]


def lattice_symmetries(cell: np.ndarray, grid: tuple[int, ...]) -> list[Operation]:
    """Return the signed permutations of lattice vectors that keep the metric and the grid.

    Parameters
    ----------
    cell
        Lattice vectors in rows, angstrom, shape (3, 3).
    grid
        Numbers of points, (X, Y, Z).

    Returns
    -------
    list of (axes, flips)
        New axis a is old axis axes[a], inverted where flips[a].
    """
    return list(_symmetries(np.asarray(cell, float).tobytes(), tuple(grid)))


@lru_cache(maxsize=32)
def _symmetries(cell: bytes, grid: tuple[int, ...]) -> tuple[Operation, ...]:
    vectors = np.frombuffer(cell).reshape(3, 3)
    metric = vectors @ vectors.T
    tolerance = 1e-4 * np.abs(metric).max()
    kept = []
    for axes, flips in product(permutations(range(3)), product((False, True), repeat=3)):
        signs = np.where(flips, -1.0, 1.0)
        turned = metric[np.ix_(axes, axes)] * np.outer(signs, signs)
        same_grid = tuple(grid[a] for a in axes) == grid
        if same_grid and np.abs(turned - metric).max() <= tolerance:
            kept.append((axes, flips))
    return tuple(kept)


def augment(window: Window, generator: torch.Generator) -> Window:
    """Apply to each member of a window a symmetry and a shift of its own.

    Densities, positions and velocities move alike; the cell stays as it is.
    """
    grid = window.grid
    moved = []
    for b in range(len(window)):
        one = window[b : b + 1]
        shift = [int(torch.randint(n, (1,), generator=generator)) for n in grid]
        operations = lattice_symmetries(one.cell[0].numpy(), grid)
        chosen = int(torch.randint(len(operations), (1,), generator=generator))
        moved.append(_act(one, shift, operations[chosen]))
    return type(window).stack(moved)


def _act(window: Window, shift: list[int], operation: Operation) -> Window:
    """Shift, then permute and invert the axes of everything in a window."""
    axes, flips = operation
    x = torch.roll(window.density, shift, (-3, -2, -1))
    x = x.permute(0, 1, *(2 + a for a in axes)).flip([a - 3 for a in range(3) if flips[a]])
    fields: dict[str, Tensor | None] = {"density": x.contiguous()}
    if window.positions is not None or window.velocities is not None:
        n = torch.tensor(window.grid, dtype=torch.float64)
        sign = torch.tensor([-1.0 if f else 1.0 for f in flips], dtype=torch.float64)
        offset = torch.where(sign < 0, (n - 1) / n, 0.0)
        to_cell, from_cell = window.cell[0], torch.linalg.inv(window.cell[0])
        if window.positions is not None:
            s = window.positions @ from_cell + torch.tensor(shift) / n
            fields["positions"] = (s[..., list(axes)] * sign + offset) @ to_cell
        if window.velocities is not None:
            s = window.velocities @ from_cell
            fields["velocities"] = (s[..., list(axes)] * sign) @ to_cell
    return window.replace(**fields)
