r"""Real plane waves on a ring: the basis of the one-dimensional Kohn-Sham model.

Orbitals are sums of :math:`1, \sqrt2\cos kr, \sqrt2\sin kr` (over :math:`\sqrt L`) with
:math:`k = 2\pi n/L` and :math:`k^2/2 \le E_\text{cut}`. Products of two of them, and so
densities and the potentials that act on orbitals, end at twice the largest :math:`k`. Such
fields are held as their coefficients for :math:`k \ge 0`,

.. math:: f(r) = \sum_k c_k e^{ikr}, \quad c_{-k} = \bar c_k .

A matrix element of a potential between two waves picks its coefficients at the sum and at the
difference of their wave numbers,

.. math::
    \langle\cos_a|V|\cos_b\rangle = \Re(V_{a-b} + V_{a+b}), \quad
    \langle\sin_a|V|\sin_b\rangle = \Re(V_{a-b} - V_{a+b}), \quad
    \langle\cos_a|V|\sin_b\rangle = \Im(V_{a-b} - V_{a+b}),

so that the Hamiltonian is real, symmetric, and exact: no grid enters. A shift of the whole
system changes the phases of coefficients and nothing else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.linalg import eigh

from densitykit.errors import GenerationError

__all__ = ["PlaneWaves1D", "finite", "require"]

Real = NDArray[np.float64]
Complex = NDArray[np.complex128]
#: basis functions up to which all eigenvectors (divide and conquer) cost less than the lowest
_ALL_BANDS = 160


class PlaneWaves1D:
    """Waves with k^2/2 <= cutoff on a ring; atomic units.

    Parameters
    ----------
    length
        L in bohr.
    cutoff
        In hartree.

    Attributes
    ----------
    k
        Wave numbers of fields, shape (n_waves,), in 1/bohr.
    n_basis
        Number of basis functions of the orbitals.
    n_points
        Points of a grid that holds the product of two orbitals.

    Raises
    ------
    GenerationError
        The cutoff admits no wave but the constant.
    """

    def __init__(self, length: float, cutoff: float) -> None:
        step = 2 * np.pi / length
        highest = np.sqrt(2 * cutoff) / step if cutoff > 0 else 0.0
        require(1 <= highest < 1e5, "cutoff", cutoff, f"give more than {step**2 / 2:.2g} hartree")
        n = int(highest)
        self.length, self.cutoff, self.n_basis = length, cutoff, 2 * n + 1
        self.k = step * np.arange(2 * n + 1)
        self.n_points = next_fast_len(4 * n + 1, real=True)
        order = np.arange(1, n + 1)
        self._n, self._sum = n, np.add.outer(order, order)
        self._apart = np.subtract.outer(order, order)
        self._sign, self._apart = np.sign(self._apart), np.abs(self._apart)
        self._kinetic = 0.5 * np.concatenate([self.k[: n + 1], self.k[1 : n + 1]]) ** 2

    def hamiltonian(self, V: Complex) -> Real:
        """-1/2 d^2/dr^2 + V as a matrix (n_basis, n_basis), in the order 1, cosines, sines.

        Parameters
        ----------
        V
            Coefficients of the potential in hartree, shape (n_waves,).
        """
        even, odd, cos, sin = V.real, V.imag, slice(1, self._n + 1), slice(self._n + 1, None)
        near, far = even[self._apart], even[self._sum]
        H = np.empty((self.n_basis, self.n_basis))
        H[cos, cos], H[sin, sin] = near + far, near - far
        H[cos, sin] = self._sign * odd[self._apart] - odd[self._sum]
        H[sin, cos] = H[cos, sin].T
        H[0, cos] = H[cos, 0] = np.sqrt(2) * even[cos]
        H[0, sin] = H[sin, 0] = -np.sqrt(2) * odd[cos]
        H[0, 0] = even[0]
        H.flat[:: self.n_basis + 1] += self._kinetic
        return H

    def diagonalise(self, V: Complex, n_bands: int) -> tuple[Real, Real]:
        """Lowest levels (n_bands,) and their orbitals (n_basis, n_bands) in a potential."""
        H = self.hamiltonian(V)
        if n_bands == self.n_basis or self.n_basis <= _ALL_BANDS:
            eps, C = eigh(H, driver="evd", overwrite_a=True, check_finite=False)
            return eps[:n_bands], C[:, :n_bands]
        return eigh(H, subset_by_index=(0, n_bands - 1), driver="evr", check_finite=False)

    def orbitals(self, C: Real) -> Real:
        """Values of orbitals (n_basis, n_bands) on ``n_points``.

        Returns
        -------
        Real
            Shape (n_bands, n_points), normalised: sum_r psi_i psi_j L / n_points = delta_ij.
        """
        n, waves = self._n, np.empty((C.shape[1], self._n + 1), complex)
        waves[:, 0] = C[0]
        waves[:, 1:] = (C[1 : n + 1] - 1j * C[n + 1 :]).T / np.sqrt(2)
        return irfft(waves, self.n_points, axis=1) * (self.n_points / np.sqrt(self.length))

    def density(self, C: Real, f: Real) -> Complex:
        """Coefficients (n_waves,) of sum_i f_i |psi_i|^2, in 1/bohr."""
        filled = f > 1e-20
        rho = f[filled] @ self.orbitals(C[:, filled]) ** 2
        return rfft(rho)[: len(self.k)] / self.n_points

    def on_grid(self, field: Complex, n_grid: int) -> Real:
        """Values of a field at r_j = j L / n_grid: exact, however few the points are."""
        folded, order = np.zeros(n_grid, complex), np.arange(len(field))
        np.add.at(folded, order % n_grid, field)  # on few points short waves look like long ones
        np.add.at(folded, -order[1:] % n_grid, field[1:].conj())
        return np.fft.ifft(folded).real * n_grid

    def coefficients(self, field: ArrayLike) -> Complex:
        """Coefficients (n_waves,) of a real field on a grid, or of complex coefficients.

        What the basis cannot hold is dropped, and so is the Nyquist wave of an even grid.

        Raises
        ------
        GenerationError
            The field is not finite, or not one-dimensional.
        """
        field = finite("field", field)
        require(field.ndim == 1 and field.size > 0, "field", field.shape, "give one dimension")
        on_grid = np.isrealobj(field)
        waves = rfft(field) / field.size if on_grid else field
        n = min(len(self.k), (field.size + 1) // 2 if on_grid else field.size)
        out = np.zeros(len(self.k), complex)
        out[:n] = waves[:n]
        return out

    def integral(self, a: Complex, b: Complex) -> float:
        """Integral of a product of two real fields over the ring."""
        return self.length * float(2 * np.vdot(a, b).real - (a[0] * b[0]).real)


def require(holds: bool, name: str, value: object, fix: str) -> None:
    """Raise GenerationError, "name is value; fix", unless the condition holds."""
    if not holds:
        raise GenerationError(f"{name} is {value}; {fix}")


def finite(name: str, values: ArrayLike) -> NDArray:
    """Give an array of float64 or complex128; GenerationError if it is not finite."""
    array = np.asarray(values)
    array = array.astype(complex if np.iscomplexobj(array) else float)
    require(bool(np.isfinite(array).all()), name, "not finite everywhere", "check its values")
    return array
