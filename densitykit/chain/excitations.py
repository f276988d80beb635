r"""Excitations of the one-dimensional model: linear response in the frequency domain.

What a weak kick (:mod:`densitykit.chain.electrons`) rings with, without any motion. With pairs
p = (i, j) of orbitals, :math:`\omega_p = \varepsilon_j - \varepsilon_i > 0`,
:math:`\Delta f_p = f_i - f_j` and transition densities :math:`\psi_i\psi_j`, the Dyson equation
:math:`\chi = \chi_0 + \chi_0 K\chi` becomes an eigenvalue problem (Casida 1995),

.. math::
    \bigl[\omega_p^2\delta_{pq} + 2 s_p (\psi_i\psi_j|K|\psi_k\psi_l)\, s_q\bigr] F_n
        = \Omega_n^2 F_n, \quad s_p = \sqrt{\Delta f_p\,\omega_p} .

A kick to the velocity a makes the current, and a potential :math:`\lambda\cos qr` that lasts no
time the density wave

.. math::
    \int\! j\,dr = a\Bigl[D + \sum_n f_n\cos\Omega_n t\Bigr], \quad
    \int\!\cos(qr)\,\delta\rho\,dr = -\lambda\sum_n \frac{2 g_n^2}{\Omega_n}\sin\Omega_n t,

with the oscillator strengths :math:`f_n = 2(\sum_p s_p x_p F_{pn})^2`, where
:math:`x_p = \langle i|\partial_r|j\rangle/\omega_p`,
:math:`g_n = \sum_p s_p \langle i|\cos qr|j\rangle F_{pn}`, and :math:`D = N - \sum_n f_n` the
Drude weight: what is left is free to move. (On a short ring it may be negative, of a degenerate
pair it is large and cancels.) In a full basis :math:`\sum_n 2 g_n^2 = q^2\int\rho\sin^2 qr\,dr`.

There are no excitons: the kernel is the classical repulsion K alone, which pushes lines up from
the differences of the levels. An electron and its hole attract by exchange, which is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.fft import rfft
from scipy.linalg import eigh

from densitykit.chain.kohn_sham import KohnShamSolution, ReducedHartreeFock1D

__all__ = ["Excitations", "casida"]

Real = NDArray[np.float64]
#: differences of occupations below are none
_EMPTY = 1e-9


@dataclass(frozen=True)
class Excitations:
    """Excitation energies and what makes them visible; atomic units.

    Attributes
    ----------
    energies
        Omega_n in hartree, ascending, shape (n,).
    strengths
        Oscillator strengths f_n, shape (n,).
    drude
        D, in electrons.
    pairs
        s_p times transition densities on the grid of the basis, shape (n_pairs, n_points).
    vectors
        F_pn, shape (n_pairs, n).
    length
        Of the ring in bohr.
    """

    energies: Real
    strengths: Real
    drude: float
    pairs: Real
    vectors: Real
    length: float

    def current(self, t: ArrayLike) -> Real:
        """Current over amplitude after a weak kick, integrated over the ring, at times t."""
        phases = np.cos(np.multiply.outer(np.asarray(t), self.energies))
        return self.drude + phases @ self.strengths

    def coupling(self, potential: ArrayLike) -> Real:
        """g_n of a potential on the grid of the basis, shape (n,)."""
        step = self.length / self.pairs.shape[1]
        return step * (self.pairs @ np.asarray(potential)) @ self.vectors

    def density_wave(self, potential: ArrayLike, t: ArrayLike) -> Real:
        """Overlap of a weak potential, applied for no time, with the density it makes."""
        phases = np.sin(np.multiply.outer(np.asarray(t), self.energies))
        return -phases @ (2 * self.coupling(potential) ** 2 / self.energies)


def casida(
    model: ReducedHartreeFock1D,
    solution: KohnShamSolution,
    *,
    interacting: bool = True,
    highest: float = np.inf,
) -> Excitations:
    """Solve Casida's equation for all pairs of orbitals.

    Parameters
    ----------
    model, solution
        The model and its ground state.
    interacting
        False: the pairs themselves, without K.
    highest
        Leave out pairs further apart than this, in hartree. All of 8 narrow atoms take minutes.
    """
    basis = model.basis
    eps, C = basis.diagonalise(solution.V_k, basis.n_basis)
    f = np.zeros_like(eps)
    f[: len(solution.occupations)] = solution.occupations
    apart, drop = np.subtract.outer(eps, eps).T, np.subtract.outer(f, f)
    i, j = np.nonzero((drop > _EMPTY) & (apart <= highest))
    gaps, psi = apart[i, j], basis.orbitals(C)
    s = np.sqrt(drop[i, j] * gaps)
    pairs = s[:, None] * psi[i] * psi[j]
    matrix = np.zeros((len(s), len(s)))
    if interacting:
        waves = rfft(pairs)[:, 1 : len(basis.k)] / basis.n_points * np.sqrt(model.K[1:])
        matrix = 4 * basis.length * (waves.real @ waves.real.T + waves.imag @ waves.imag.T)
    matrix.flat[:: len(s) + 1] += gaps**2
    squares, F = eigh(matrix, driver="evd", overwrite_a=True, check_finite=False)
    slopes = _slopes(C, basis.k)
    x = np.einsum("bp,bp->p", C[:, i], slopes[:, j]) / gaps
    strengths = 2 * ((s * x) @ F) ** 2
    energies = np.sqrt(np.maximum(squares, 0))
    drude = float(f.sum() - strengths.sum())
    return Excitations(energies, strengths, drude, pairs, F, basis.length)


def _slopes(C: Real, k: Real) -> Real:
    """Coefficients of the derivatives of orbitals: cosines become sines."""
    n = len(C) // 2
    k = k[1 : n + 1, None]
    return np.concatenate([np.zeros_like(C[:1]), k * C[n + 1 :], -k * C[1 : n + 1]])
