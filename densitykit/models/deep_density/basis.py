r"""Atom-centred functions, in which a local density is expanded.

.. math:: \phi_{nlm}(r) = R_{nl}(r)\, r^l\, Y_{lm}(\hat r)\, u(r), \qquad
   R_{nl} = \sum_a T^l_{na} e^{-\alpha_a r^2}, \quad u(r) = (1 - r^2/r_b^2)^2 ,

Gaussians with exponents in a geometric series, :math:`\alpha_a = \alpha_0 q^a`, orthonormal in n
for each l (Gram-Schmidt, from the diffuse to the tight), within a sphere of radius :math:`r_b`. A
*neutral* basis has no monopole in l = 0 and no dipole in l = 1: a metal screens, so that what an
atom adds to the superposition of its base carries neither. Lengths are in angstrom; Y are real,
and normalised to one on the sphere.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import sphericart
import torch
from numpy.typing import NDArray
from scipy.integrate import simpson
from scipy.special import gamma

__all__ = ["GaussianBasis", "coupling", "spherical_harmonics"]

Array = NDArray[np.float64]


@lru_cache(maxsize=16)
def _calculator(l_max: int, solid: bool) -> sphericart.SphericalHarmonics:
    return (sphericart.SolidHarmonics if solid else sphericart.SphericalHarmonics)(l_max)


def spherical_harmonics(l_max: int, vectors: Array, solid: bool = False) -> Array:
    """Real spherical harmonics of vectors (P, 3), shape (P, (l_max + 1)^2).

    ``solid`` multiplies by r^l.
    """
    return _calculator(l_max, solid).compute(np.ascontiguousarray(vectors))


@lru_cache(maxsize=256)
def coupling(l1: int, l2: int, l: int) -> Array:
    r"""Coefficients that couple two sets of harmonics to a third, for even l1 + l2 + l.

    :math:`C_{m_1 m_2 m} \propto \int Y_{l_1 m_1} Y_{l_2 m_2} Y_{lm}\, d\Omega`, which the Gauss
    quadrature gives to rounding, scaled to :math:`\sum_{m_1 m_2} C^2 = 1` for each m.
    """
    nodes, weights = np.polynomial.legendre.leggauss(l1 + l2 + l + 1)
    phi = 2 * np.pi * np.arange(l1 + l2 + l + 1) / (l1 + l2 + l + 1)
    z, p = (x.ravel() for x in np.meshgrid(nodes, phi, indexing="ij"))
    rho = np.sqrt(1 - z**2)
    y = spherical_harmonics(
        max(l1, l2, l), np.stack([rho * np.cos(p), rho * np.sin(p), z], axis=1)
    )
    one, two, three = (y[:, k * k : (k + 1) ** 2] for k in (l1, l2, l))
    c = np.einsum("p,pa,pb,pc->abc", np.repeat(weights, len(phi)), one, two, three)
    return c / np.sqrt((c**2).sum() / (2 * l + 1))


class GaussianBasis:
    """Functions of one species.

    Parameters
    ----------
    counts
        Number of functions for each l, from 0.
    start, ratio
        Of the series of exponents, 1/angstrom**2.
    radius
        r_b, angstrom.
    neutral
        Without monopole and dipole.
    """

    def __init__(
        self,
        counts: tuple[int, ...],
        start: float,
        ratio: float,
        radius: float,
        neutral: bool = False,
    ) -> None:
        self.radius, self.l_max = radius, len(counts) - 1
        self.exponents = start * ratio ** np.arange(max(counts))
        self.transforms = [self._orthonormal(l, n) for l, n in enumerate(counts)]
        if neutral:
            self.transforms[:2] = [
                self._without_moment(l, t) for l, t in enumerate(self.transforms[:2])
            ]
        self.counts = tuple(len(t) for t in self.transforms)
        sizes = [n * (2 * l + 1) for l, n in enumerate(self.counts)]
        self.offsets = np.cumsum([0, *sizes])
        self.size = int(self.offsets[-1])

    def _orthonormal(self, l: int, count: int) -> Array:
        """T of one l, shape (count, exponents)."""
        a = self.exponents[:count]
        overlap = gamma(l + 1.5) / 2 / (a[:, None] + a) ** (l + 1.5)
        scale = 1 / np.sqrt(np.diag(overlap))
        factor = np.linalg.cholesky(overlap * scale[:, None] * scale + 1e-12 * np.eye(count))
        padded = np.zeros((count, len(self.exponents)))
        padded[:, :count] = np.linalg.inv(factor) * scale
        return padded

    def _without_moment(self, l: int, transform: Array) -> Array:
        """Combinations of functions whose moment of order l vanishes."""
        r = np.linspace(0, self.radius, 4000)
        radial = transform @ np.exp(-self.exponents[:, None] * r**2) * self._envelope(r)
        moment = (radial * r ** (2 * l + 2)).sum(axis=1)
        return np.linalg.svd(moment[None] / np.linalg.norm(moment))[2][1:] @ transform

    def _envelope(self, r: Array) -> Array:
        return np.clip(1 - (r / self.radius) ** 2, 0, None) ** 2

    def values(self, vectors: Array) -> Array:
        """Functions at vectors from the atom (P, 3), shape (P, size); order l, n, m."""
        y, radial = self._parts(vectors)
        out = np.empty((len(vectors), self.size))
        for l, (start, stop) in enumerate(pairwise(self.offsets)):
            r_nl = radial @ self.transforms[l].T
            product = r_nl[:, :, None] * y[:, None, l * l : (l + 1) ** 2]
            out[:, start:stop] = product.reshape(len(vectors), -1)
        return out

    def contract(self, coefficients: Array) -> Array:
        """Matrices (set, exponents, (l_max + 1)^2) of sets of coefficients (set, size).

        Sums over n come first: a point then costs exponents x (l_max + 1)^2 multiplications.
        """
        parts = [
            np.einsum("na,snm->sam", t, coefficients[:, a:b].reshape(-1, len(t), 2 * l + 1))
            for l, (t, (a, b)) in enumerate(
                zip(self.transforms, pairwise(self.offsets), strict=True)
            )
        ]
        return np.concatenate(parts, axis=2)

    def density(self, vectors: Array, matrices: Array) -> Array:
        """Sums of the functions at vectors (P, 3), by the matrices of `contract`: (set, P)."""
        if self.l_max == 0:
            return matrices[..., 0] @ self._radial(vectors).T / np.sqrt(4 * np.pi)
        y, radial = self._parts(vectors)
        return np.stack([np.einsum("pk,pk->p", radial @ m, y) for m in matrices])

    @cached_property
    def integrals(self) -> Array:
        """Integrals over space of the functions of l = 0, shape (n,)."""
        r = np.linspace(0, self.radius, 4001)
        radial = self.transforms[0] @ np.exp(-self.exponents[:, None] * r**2) * self._envelope(r)
        return simpson(radial * r**2, x=r) * np.sqrt(4 * np.pi)  # Y_00 = 1 / sqrt(4 pi)

    def electrons(self, coefficients: Array) -> float:
        """Integral over space of a sum of functions, coefficients (size,)."""
        return float(coefficients[: self.counts[0]] @ self.integrals)

    def _parts(self, vectors: Array) -> tuple[Array, Array]:
        """Solid harmonics (P, (l_max + 1)^2), and radial parts (P, exponents)."""
        return spherical_harmonics(self.l_max, vectors, True), self._radial(vectors)

    def _radial(self, vectors: Array) -> Array:
        """Gaussians times the envelope (P, exponents)."""
        square = np.einsum("pk,pk->p", vectors, vectors)
        envelope = np.clip(1 - square / self.radius**2, 0, None) ** 2
        exponents = torch.from_numpy(square[:, None] * -self.exponents)
        return exponents.exp_().numpy() * envelope[:, None]  # several times as fast as NumPy's
