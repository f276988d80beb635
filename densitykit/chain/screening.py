r"""Linear response of the one-dimensional model, and what screening does to it.

A small change of the effective potential changes the density by
:math:`\delta\rho = \chi_0\,\delta V_\text{eff}`, a change of the external potential by
:math:`\delta\rho = \chi\,\delta V_\text{ext}` (Zepeda-Nunez et al. 2019, equations 6 and 7). The
first follows from perturbation theory (Adler 1962, Wiser 1963; here at a temperature),

.. math::
    \chi_0(r, r') = \sum_{ij} \frac{f_i - f_j}{\varepsilon_i - \varepsilon_j}
        \psi_i(r)\psi_j(r)\psi_i(r')\psi_j(r') - \frac{v(r) v(r')}{\sum_i f'_i}, \quad
    v = \sum_i f'_i \psi_i^2, \quad f' = \frac{df}{d\varepsilon},

with :math:`f'` in the place of the quotient where two levels agree; the last term is the shift of
:math:`\mu` that keeps the number of electrons. The electrons' own potential adds to the external
one, :math:`\delta V_\text{eff} = \delta V_\text{ext} + K\chi\,\delta V_\text{ext}`, hence

.. math:: \chi = (1 - \chi_0 K)^{-1} \chi_0 .

In a metal :math:`\chi_0` is large and reaches far, :math:`\chi` is small and short: the
electrons screen. The same matrix, :math:`(1 - K\chi_0)^{-1}`, turns the residual of a
self-consistent iteration into its error, to first order: the best preconditioner there is, where
a nearby solution is known (:class:`InverseDielectric`; molecular dynamics uses it).

Fields are vectors here, with components on the orthonormal :math:`1, \sqrt2\cos kr, \sqrt2\sin kr`
(over :math:`\sqrt L`): :math:`\chi_0` is a symmetric matrix, :math:`K` a diagonal one.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densitykit.chain.kohn_sham import KohnShamSolution, ReducedHartreeFock1D
from densitykit.chain.plane_waves import require
from densitykit.chain.scf import fermi_dirac, occupation_slopes

__all__ = [
    "InverseDielectric",
    "gaussian_potential",
    "linear_response",
    "polarizability",
    "solve_screened",
]

Real = NDArray[np.float64]
Complex = NDArray[np.complex128]


def gaussian_potential(
    r: ArrayLike, length: float, mu0: float = 40.0, sigma0: float = 3.0
) -> Real:
    """The perturbation of equation 8: a normalised Gaussian, nearest image.

    Parameters
    ----------
    r
        Points in bohr, any shape.
    length
        L of the ring in bohr.
    mu0, sigma0
        Centre and width in bohr.
    """
    distance = np.asarray(r) - mu0
    distance = distance - length * np.round(distance / length)
    return np.exp(-0.5 * (distance / sigma0) ** 2) / np.sqrt(2 * np.pi * sigma0**2)


def polarizability(model: ReducedHartreeFock1D, V: Complex, n_waves: int | None = None) -> Real:
    """Irreducible polarizability chi_0 of the electrons in a potential.

    Parameters
    ----------
    model
        Gives the basis, the number of electrons and their temperature.
    V
        Coefficients of the effective potential in hartree, shape (n_waves of the basis,).
    n_waves
        Wave numbers k >= 0 to respond to; None: all of the basis.

    Returns
    -------
    Real
        Symmetric, non-positive, shape (2 n_waves - 1, 2 n_waves - 1), in 1/hartree.

    Raises
    ------
    GenerationError
        N_waves is not in 1 ... n_waves of the basis.
    """
    basis = model.basis
    n = len(basis.k) if n_waves is None else n_waves
    require(1 <= n <= len(basis.k), "n_waves", n, f"give 1 to {len(basis.k)}")
    eps, C = basis.diagonalise(V, basis.n_basis)
    mu, f = fermi_dirac(eps, model.n_electrons, model.temperature)
    psi, h = basis.orbitals(C), basis.length / basis.n_points
    kr = np.outer(basis.k[1:n], h * np.arange(basis.n_points))
    waves = np.concatenate([np.full((1, basis.n_points), np.sqrt(0.5)), np.cos(kr), np.sin(kr)])
    waves *= h * np.sqrt(2 / basis.length)
    filled = f > 1e-20  # pairs of empty states do not respond
    slopes = occupation_slopes(eps, mu, model.temperature)[filled]
    fermi = np.diag(slopes)
    slopes[:, ~filled] *= 2  # (i, j) and (j, i)
    chi0, v = np.zeros((2 * n - 1, 2 * n - 1)), np.zeros(2 * n - 1)
    for i in range(len(slopes)):
        pairs = (waves * psi[i]) @ psi.T  # <psi_i| wave |psi_j>
        chi0 += (pairs * slopes[i]) @ pairs.T
        v += fermi[i] * pairs[:, i]
    if fermi.sum() < -1e-200:  # an insulator has no states to refill
        chi0 -= np.outer(v, v) / fermi.sum()
    return chi0


class InverseDielectric:
    """(1 - K chi_0)^-1 on potentials, at a given solution: callable, coefficients to coefficients.

    Parameters
    ----------
    model
        The model.
    V
        Coefficients of a potential near the self-consistent one, shape (n_waves,).
    k_max
        Largest wave number in 1/bohr that is screened; shorter waves, which hardly are,
        pass unchanged. None: all.
    """

    def __init__(
        self, model: ReducedHartreeFock1D, V: Complex, k_max: float | None = None
    ) -> None:
        if k_max is not None:  # the response to long waves does not ask for short ones
            model = model.with_cutoff(min(1.2 * k_max**2, model.basis.cutoff))
        n = len(model.basis.k) if k_max is None else np.searchsorted(model.basis.k, k_max)
        chi0 = polarizability(model, model.basis.coefficients(V), n)
        K = np.concatenate([model.K[:n], model.K[1:n]])
        self._n, self.matrix = n, np.linalg.inv(np.eye(len(K)) - K[:, None] * chi0)

    def __call__(self, potential: Complex) -> Complex:
        """Total potential that an external one of coefficients (n_waves,) leads to."""
        screened = potential.copy()
        screened[: self._n] = _coefficients(self.matrix @ _vector(potential[: self._n]))
        return screened


def linear_response(
    model: ReducedHartreeFock1D, solution: KohnShamSolution, perturbation: ArrayLike
) -> tuple[Real, Real]:
    """Density induced by a potential, without and with screening (figure 1).

    Parameters
    ----------
    model
        The model, and the solution about which to expand.
    solution
        Of the unperturbed model.
    perturbation
        In hartree, on any grid or as coefficients (n_waves,).

    Returns
    -------
    tuple[Real, Real]
        chi_0 dV and chi dV on the output grid, each shape (n_grid,), in 1/bohr.
    """
    basis, dV = model.basis, model.basis.coefficients(perturbation)
    chi0 = polarizability(model, solution.V_k)
    K = np.concatenate([model.K, model.K[1:]])
    bare = chi0 @ _vector(dV)
    screened = np.linalg.solve(np.eye(len(K)) - chi0 * K, bare)
    return tuple(basis.on_grid(_coefficients(field), model.n_grid) for field in (bare, screened))


def solve_screened(model: ReducedHartreeFock1D, k_max: float = 3.0) -> KohnShamSolution:
    """Solve without a start: Kerker's preconditioner to 1e-3, then the inverse dielectric matrix.

    Long insulating chains converge in a third of the iterations of `ReducedHartreeFock1D.solve`.

    Parameters
    ----------
    model
        The model.
    k_max
        As for `InverseDielectric`.

    Raises
    ------
    GenerationError
        No convergence.
    """
    rough = copy.copy(model)
    rough.tolerance = max(1e-3, model.tolerance)
    V = rough.solve().V_k
    return model.solve(V, precondition=InverseDielectric(model, V, k_max))


def _vector(field: Complex) -> Real:
    """Components on the orthonormal waves, up to a factor sqrt(L)."""
    return np.concatenate(
        [[field[0].real], np.sqrt(2) * field[1:].real, -np.sqrt(2) * field[1:].imag]
    )


def _coefficients(vector: Real) -> Complex:
    """Inverse of `_vector`."""
    n = len(vector) // 2 + 1
    waves = (vector[1:n] - 1j * vector[n:]) / np.sqrt(2)
    return np.concatenate([vector[:1].astype(complex), waves])
