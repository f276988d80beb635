r"""Periodic fields on regular grids.

A field sampled at :math:`r_j = jL/N,\; j < N` (cell-periodic, end point excluded) *is* its
trigonometric polynomial: sums over the grid are exact integrals of it, shifts by any
distance and changes of the number of points are operations on its Fourier coefficients.
Arrays carry space in their trailing axes; every other axis is a batch. Lengths are in angstrom,
densities in angstrom**-3, times in fs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.signal import resample as _resample_axis

from densitykit.errors import ShapeError

__all__ = [
    "check_stride",
    "fourier_shift",
    "n_electrons",
    "plane",
    "resample",
    "time_derivative",
]

#: weights on (t, t - 1, t - 2, ...) in units of 1/spacing; "central" is (t + 1, t, t - 1)
_SCHEMES = {"backward-1": (1.0, -1.0), "backward-2": (1.5, -2.0, 0.5), "central": (0.5, 0.0, -0.5)}


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


def fourier_shift(density: np.ndarray, shift: Sequence[float]) -> np.ndarray:
    """Field moved by a fraction of the cell along each axis: f(r) -> f(r - shift).

    Parameters
    ----------
    density
        Shape (*, N1, ..., Nd), d = len(shift).
    shift
        Fractions of the cell edges. Multiples of 1/N are exact for any field; others need
        a field without Nyquist component.
    """
    out = density
    for axis, s in zip(range(-len(shift), 0), shift, strict=True):
        n = density.shape[axis]
        steps = s * n
        if abs(steps - round(steps)) < 1e-9:
            out = np.roll(out, round(steps), axis=axis)
            continue
        phase = np.exp(-2j * np.pi * np.fft.rfftfreq(n, 1 / n) * s)
        if n % 2 == 0:
            phase[-1] = np.cos(np.pi * steps)
        phase = phase.reshape(-1, *[1] * (-axis - 1))
        out = np.fft.irfft(np.fft.rfft(out, axis=axis) * phase, n, axis=axis)
    return out


def time_derivative(field: np.ndarray, spacing: float, scheme: str = "backward-2") -> np.ndarray:
    """Time derivative from neighbouring frames (first axis is time); NaN where frames are missing.

    Parameters
    ----------
    field
        Shape (time, *).
    spacing
        Time between frames in fs.
    scheme
        "backward-1" and "backward-2" (first and second order, past frames only) or
        "central" (second order, uses one future frame: for analysis, never as a model's
        input).
    """
    if scheme not in _SCHEMES:
        raise ShapeError(
            f"unknown scheme '{scheme}' of the time derivative; choose from {sorted(_SCHEMES)}"
        )
    weights = _SCHEMES[scheme]
    ahead = 1 if scheme == "central" else 0
    span = len(field) - len(weights) + 1
    out = np.full(field.shape, np.nan)
    if span > 0:
        start = len(weights) - 1
        total = sum(w * field[start - i : start - i + span] for i, w in enumerate(weights))
        out[start - ahead : start - ahead + span] = total / spacing
    return out


def check_stride(shape: Sequence[int], stride: int) -> None:
    """Raise ShapeError unless each number of points is a multiple of the stride of a map."""
    if any(n % stride for n in shape):
        raise ShapeError(
            f"grid {tuple(shape)} is not divisible by the stride {stride} of the map; "
            f"resample the density to a multiple of {stride} with densitykit.fields.resample"
        )


def plane(field: np.ndarray, axis: int | str, index: int) -> np.ndarray:
    """Lattice plane (*, n, m) of a field (*, X, Y, Z); ``axis`` is 0, 1, 2 or "x", "y", "z"."""
    number = "xyz".index(axis) if isinstance(axis, str) else axis
    return np.take(field, index, axis=number - 3)
