"""Cells: what follows from three lattice vectors in rows, in angstrom.

Wave vectors of the reciprocal lattice, in 1/angstrom, and shortest vectors between images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from densitykit.errors import ShapeError

__all__ = ["cell_heights", "group_lengths", "minimum_image", "reduced_cell", "shells"]
__all__ += ["single_cell", "wave_vectors"]


def wave_vectors(shape: Sequence[int], cell: np.ndarray) -> np.ndarray:
    """Reciprocal-lattice vectors of the FFT layout, shape (*shape, d), in 1/angstrom."""
    index = np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in shape), indexing="ij")
    return 2 * np.pi * np.stack(index, axis=-1) @ np.linalg.inv(cell).T


def cell_heights(cell: np.ndarray) -> np.ndarray:
    """Distances between opposite faces of a cell, shape (*, d) for cells (*, d, d)."""
    return 1 / np.linalg.norm(np.linalg.inv(cell), axis=-2)


def reduced_cell(cell: np.ndarray) -> np.ndarray:
    """The lattice vectors, shortest first, that Minkowski's reduction finds; the same lattice.

    No vector becomes shorter by adding or subtracting others (Semaev 2001, in three dimensions).
    """
    rows = np.array(cell, dtype=np.float64)
    sums = np.array(list(product((-1, 0, 1), repeat=len(rows) - 1)))
    shorter = True
    while shorter:
        rows, shorter = rows[np.argsort(np.linalg.norm(rows, axis=1), kind="stable")], False
        for i in reversed(range(len(rows))):
            others, tried = np.delete(rows, i, axis=0), rows[i]
            for other in others:  # in one step what the sums would take many for
                tried = tried - np.round(tried @ other / (other @ other)) * other
            tried = tried + sums @ others
            tried = tried[np.linalg.norm(tried, axis=1).argmin()]
            if np.linalg.norm(tried) < np.linalg.norm(rows[i]) * (1 - 1e-9):
                rows[i], shorter = tried, True
    return rows


def minimum_image(s: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Shortest Cartesian vectors (*, d) of fractional differences (*, d), in any cell.

    Rounding in the reduced cell is right up to half of its smallest height; beyond, the
    neighbouring images are tried, which suffices there (Nguyen and Stehle 2009).
    """
    rows = reduced_cell(cell)
    s = s @ np.round(cell @ np.linalg.inv(rows))
    vectors = (s - np.round(s)) @ rows
    if np.count_nonzero(rows) == len(rows):  # orthorhombic
        return vectors
    far = (vectors**2).sum(axis=-1) > (0.5 * cell_heights(rows).min()) ** 2
    images = np.array(list(product((-1, 0, 1), repeat=len(rows)))) @ rows
    tried = vectors[far][:, None] + images
    nearest = (tried**2).sum(axis=-1).argmin(axis=1)
    vectors[far] = tried[np.arange(len(tried)), nearest]
    return vectors


def single_cell(cell: np.ndarray, what: str) -> np.ndarray:
    """The cell (3, 3) of a whole run; ShapeError if it changes from frame to frame.

    Parameters
    ----------
    cell
        Shape (3, 3), or (time, 3, 3), in angstrom.
    what
        What makes no sense in a cell that changes, for the message.
    """
    cell = np.asarray(cell, dtype=np.float64)
    cells = cell.reshape(-1, *cell.shape[-2:])
    if cell.ndim == 3 and np.ptp(cells, axis=0).max() > 1e-6:
        edges = np.linalg.norm(cells, axis=-1)
        raise ShapeError(
            f"{what} needs one cell; here its edges change by {np.ptp(edges, axis=0).max():.3g} "
            "angstrom in the run: give a run at constant volume"
        )
    return cells[0]


def group_lengths(lengths: np.ndarray, tolerance: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Lengths that are equal to a tolerance: the first of each group, rising, and whose is whose.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        Shapes (group,) and that of ``lengths``; the second numbers the groups.
    """
    order = np.argsort(lengths, axis=None, kind="stable")
    rising = np.ravel(lengths)[order]
    new = np.diff(rising, prepend=-np.inf) > tolerance
    group = np.empty(len(order), dtype=int)
    group[order] = np.cumsum(new) - 1
    return rising[new], group.reshape(np.shape(lengths))


def shells(shape: Sequence[int], cell: np.ndarray | None = None) -> np.ndarray:
    """Index of the shell of equal |q| of each Fourier coefficient, shape ``shape``.

    Shell 0 is q = 0; the numbering follows |q|. Without a cell, that of a cube.
    """
    cell = np.eye(len(shape)) if cell is None else np.asarray(cell)
    return group_lengths(np.linalg.norm(wave_vectors(shape, cell), axis=-1))[1]
