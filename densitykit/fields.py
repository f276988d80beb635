r"""Periodic fields on regular grids.

A field sampled at :math:`r_j = jL/N,\; j < N` (cell-periodic, end point excluded) *is* its
trigonometric polynomial: sums over the grid are exact integrals of it, and changes
of the number of points are operations on its Fourier coefficients.
Arrays carry space in their trailing axes; every other axis is a batch. Lengths are in angstrom,
densities in angstrom**-3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.signal import resample as _resample_axis

from densitykit.errors import ShapeError

__all__ = ["check_stride", "n_electrons", "resample"]


def n_electrons(density: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Integral of the density over the cell.

    Parameters
    ----------
    density
        Shape (*, X, Y, Z) (or (*, X) in one dimension) in angstrom**-3 (angstrom**-1).
    cell
        Lattice vectors as rows, shape (d, d), in angstrom.

    Returns
    -------
    np.ndarray
        Number of electrons with shape (*,), summed in double precision.
    """
    axes = tuple(range(-len(cell), 0))
    volume = abs(np.linalg.det(np.atleast_2d(cell)))
    return np.mean(density, axis=axes, dtype=np.float64) * volume


def resample(density: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The same periodic function on another number of points, by Fourier interpolation.

    Parameters
    ----------
    density
        Shape (*, N1, ..., Nd) with d = len(shape).
    shape
        New numbers of points.

    Returns
    -------
    np.ndarray
        Field with shape (*, *shape). Refining is exact; coarsening drops the coefficients that the
        coarse grid cannot hold. The integral is kept to rounding either way.
    """
    if density.ndim < len(shape) or min(shape) < 1:
        raise ShapeError(
            f"cannot resample a field of shape {density.shape} to {tuple(shape)}; "
            "give one positive number of points per spatial axis"
        )
    for axis, n in zip(range(-len(shape), 0), shape, strict=True):
        if density.shape[axis] != n:
            density = _resample_axis(density, n, axis=axis)
    return density


def check_stride(shape: Sequence[int], stride: int) -> None:
    """Raise ShapeError unless each number of points is a multiple of the stride of a map."""
    if any(n % stride for n in shape):
        raise ShapeError(
            f"grid {tuple(shape)} is not divisible by the stride {stride} of the map; "
            f"resample the density to a multiple of {stride} with densitykit.fields.resample"
        )
