r"""Structure of the density in reciprocal space, with honest error bars.

The static structure factor of the electron density of a run,

.. math:: S(q) = \frac{1}{N_e} \langle |\rho_q|^2 \rangle_{t,\,|q|}, \qquad
   \rho_q = \int_\Omega \rho(r)\, e^{-iq\cdot r}\, dr,

exists only on the reciprocal lattice of the cell, so it is averaged over shells of equal
:math:`|q|` and never binned. Frames of a run are correlated: error bars come from a moving-block
bootstrap (Kunsch 1989), which resamples blocks longer than the decorrelation time.
"""

from __future__ import annotations

import numpy as np

from densitykit.errors import ShapeError
from densitykit.grid import n_electrons, wave_vectors

__all__ = ["block_bootstrap", "structure_factor"]


def structure_factor(
    density: np.ndarray, cell: np.ndarray, q_max: float = 6.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shell-averaged static structure factor of every frame.

    Arguments:
        density: shape (time, X, Y, Z) in angstrom**-3.
        cell: lattice vectors as rows, shape (3, 3), in angstrom.
        q_max: largest wave number in 1/angstrom; q = 0 is left out.

    Returns:
        q with shape (shell,) in 1/angstrom, multiplicity with shape (shell,) (each of q and -q
        counts) and S with shape (time, shell), dimensionless.

    Raises:
        ShapeError: if no allowed q lies in (0, q_max].
    """
    shape = density.shape[-3:]
    vectors = wave_vectors(shape, cell)
    length = np.linalg.norm(vectors, axis=-1)
    nyquist = np.zeros(shape, bool)  # half of a pair +-q, so not a Fourier coefficient of its own
    for axis, n in enumerate(shape):
        if n % 2 == 0:
            nyquist[tuple(n // 2 if a == axis else slice(None) for a in range(3))] = True
    chosen = (length > 1e-9) & (length <= q_max + 1e-9) & ~nyquist
    if not chosen.any():
        raise ShapeError(f"no wave vector of this cell in (0, {q_max}] 1/angstrom; raise q_max")
    keys, shell = np.unique(np.round(length[chosen], 6), return_inverse=True)
    multiplicity = np.bincount(shell)
    electrons = n_electrons(density, cell)
    voxel = abs(np.linalg.det(cell)) / np.prod(shape)
    spectrum = np.stack([np.abs(np.fft.fftn(frame)[chosen]) ** 2 for frame in density]) * voxel**2
    sums = np.stack([np.bincount(shell, frame) for frame in spectrum])
    return keys, multiplicity, sums / multiplicity / electrons[:, None]


def block_bootstrap(
    samples: np.ndarray, block: int, draws: int = 500, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over time and its percentile interval by the moving-block bootstrap.

    Arguments:
        samples: shape (time, *).
        block: frames per block, at least the decorrelation time.
        draws: bootstrap replicas.
        level: coverage of the interval.
        seed: of the resampling.

    Returns:
        mean, low and high, each with shape (*,).
    """
    n = len(samples)
    block = max(1, min(block, n // 2))
    rng = np.random.default_rng(seed)
    starts = rng.integers(n - block + 1, size=(draws, -(-n // block)))
    # sums of all blocks once, so that a replica is a mean over a few rows
    cumulative = np.concatenate([np.zeros_like(samples[:1]), np.cumsum(samples, axis=0)])
    blocks = (cumulative[block:] - cumulative[:-block]) / block
    replicas = blocks[starts].mean(axis=1)
    low, high = np.quantile(replicas, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return samples.mean(axis=0), low, high
