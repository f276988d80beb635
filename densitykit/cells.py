r"""Cells: what follows from three lattice vectors in rows, in angstrom.

Wave vectors of the reciprocal lattice, in 1/angstrom, and shortest vectors between images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from densitykit.errors import TrajectoryError

__all__ = [
    "cubic_edge",
    "minimum_image",
    "shells",
    "wave_vectors",
]


def wave_vectors(shape: Sequence[int], cell: np.ndarray) -> np.ndarray:
    """Reciprocal-lattice vectors of the FFT layout, shape (*shape, d), in 1/angstrom."""
    index = np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in shape), indexing="ij")
    return 2 * np.pi * np.stack(index, axis=-1) @ np.linalg.inv(cell).T


def minimum_image(s: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Shortest Cartesian vector of fractional differences; exact up to half the cell's width."""
    return (s - np.round(s)) @ cell


def shells(shape: Sequence[int], cell: np.ndarray | None = None) -> np.ndarray:
    """Index of the shell of equal |q| of each Fourier coefficient, shape ``shape``.

    Shell 0 is q = 0; the numbering follows |q|. Without a cell, that of a cube.
    """
    cell = np.eye(len(shape)) if cell is None else np.asarray(cell)
    q = np.linalg.norm(wave_vectors(shape, cell), axis=-1)
    _, shell = np.unique(np.round(q / q.max(), 6), return_inverse=True)
    return shell.reshape(shape)


def cubic_edge(cell: np.ndarray, source: str = "trajectory") -> float:
    """Edge in angstrom of a cubic cell; TrajectoryError if it is not cubic."""
    edge = float(cell[0, 0])
    if (
        edge <= 0
        or np.shape(cell) != (3, 3)
        or not np.allclose(cell, edge * np.eye(3), atol=1e-6 * abs(edge))
    ):
        raise TrajectoryError(
            f"{source}: variable 'cell' is not cubic ({np.asarray(cell).tolist()}); symmetry "
            "augmentation and cubic models need a cubic cell aligned with the axes"
        )
    return edge
