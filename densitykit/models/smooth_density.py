r"""A smooth variant of Deep Density in one dimension, exactly symmetric under reflection.

As in :mod:`densitykit.models.deep_density` the density is a sum over atoms of functions of their
nearest neighbours, but the model speaks once per atom, not once per point: it gives the
coefficients of smooth functions of x = r - R_I,

.. math::
    \rho_I(r) = w(x) \Big[\sum_{k=0}^{K} a_k \cos\frac{k\pi x}{R_c}
        + \sum_{k=1}^{K} b_k \sin\frac{k\pi x}{R_c}\Big], \qquad w = (1 - x^2/R_c^2)^4 .

**Neighbours** are the first, second, ... on the right and on the left, not sorted by distance,
and each is seen as :math:`u = e^{-(R - jd)/\lambda}`, j its place, in the column of its species.
Where two atoms of one species meet and pass they exchange their surroundings: the set of all
inputs, and so the density, is continuous for all motions of one species. (Two of different
species that pass through one another change it abruptly.)

**Reflection.** Sums of right and left u are even, differences odd. With the descriptor
:math:`v = (\text{even}, \text{odd})` and its mirror image :math:`Pv = (\text{even}, -\text{odd})`,

.. math::
    a = A\,q_+(v) + \tfrac12 [f_a(v) + f_a(Pv)], \qquad
    b = B\,q_-(v) + \tfrac12 [f_b(v) - f_b(Pv)]

makes the density of the mirror image the mirror image of the density: :math:`q_\pm` are the even
and odd monomials of v up to some degree, as in an atomic cluster expansion (Drautz 2019); f is a
dense network.

**Training.** The densities are linear in A and B: :func:`fit_linear` finds the best ones by
one linear least-squares solve, with no seed, no rate and no epochs. f starts at zero and learns
what polynomials miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from densitykit.errors import ShapeError
from densitykit.models.atomic_sum import (
    AtomicSum1D,
    Surroundings,
    ordered_neighbours,
    per_species,
)
from densitykit.models.deep_density import dense

__all__ = ["SmoothDensity1D", "fit_linear"]


class SmoothDensity1D(AtomicSum1D):
    """Smooth, reflection-symmetric Deep Density, in double precision; zero until trained.

    Arguments:
        species, cutoff: as in :class:`densitykit.models.atomic_sum.AtomicSum1D`.
        n_near: neighbours that an atom sees, half of them on each side: an even number.
        degree: of the polynomials.
        waves: K; the shortest wave is 2 cutoff / K long.
        nodes, layers: of the network.
        spacing: d, usual distance of first neighbours in bohr.
        decay: lambda in bohr.
    """

    def __init__(
        self,
        species: Sequence[int],
        n_near: int = 4,
        cutoff: float = 24.0,
        degree: int = 2,
        waves: int = 48,
        nodes: int = 64,
        layers: int = 2,
        spacing: float = 10.0,
        decay: float = 5.0,
    ) -> None:
        super().__init__(species, n_near, cutoff)
        if n_near % 2:
            raise ShapeError(f"n_near is {n_near}; give an even number, half for each side")
        count, self.spacing, self.decay = len(self.species), spacing, decay
        self.waves, self.width = waves, n_near * count
        self.monomials = _monomials(self.width, degree)
        even, odd = (len(m) for m in self.monomials)
        self.A = nn.Parameter(torch.zeros(count, even, waves + 1))
        self.B = nn.Parameter(torch.zeros(count, odd, waves))
        self.f = nn.ModuleList(
            nn.Sequential(dense(self.width, [nodes] * layers), nn.Linear(nodes, 2 * waves + 1))
            for _ in range(count)
        )
        for f in self.f:
            nn.init.zeros_(f[1].weight)
            nn.init.zeros_(f[1].bias)
        # what single precision would round off is larger than the errors reached
        self.double()

    def neighbours(self, positions: Tensor, length: float) -> tuple[Tensor, Tensor]:
        return ordered_neighbours(positions, length, self.n_near // 2)

    def electron(self, x: Tensor) -> Tensor:
        """Windowed cosines and sines, (B, N, W) -> (B, N, W, 2 waves + 1)."""
        k = torch.arange(self.waves + 1, device=x.device) * (torch.pi / self.cutoff)
        phase = x[..., None] * k.to(x)
        waves = torch.cat([phase.cos(), phase[..., 1:].sin()], -1)
        return waves * (1 - (x / self.cutoff) ** 2).clamp(min=0)[..., None] ** 4

    def descriptor(self, surroundings: Surroundings) -> Tensor:
        """v, shape (B, N, n_near species): first all even numbers, then all odd ones."""
        s = surroundings
        place = torch.arange(2, self.n_near + 2, device=s.R_JI.device) // 2
        u = torch.exp((self.spacing * place - s.R_JI.abs()) / self.decay)
        kinds = torch.arange(len(self.species), device=u.device)
        u = u[..., None] * (s.kind_J[..., None] == kinds)  # (B, N, n_near, species)
        right, left = u[..., 0::2, :], u[..., 1::2, :]
        return torch.cat([right + left, right - left], 2).flatten(2) / 2

    def polynomials(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """q_+ and q_- of a descriptor, each (B, N, monomials)."""
        padded = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        even, odd = (
            padded[..., torch.as_tensor(m, device=v.device)].prod(-1) for m in self.monomials
        )
        return even, odd

    def coefficients(self, surroundings: Surroundings) -> Tensor:
        """a and b of each atom, shape (B, N, 2 waves + 1)."""
        v, even = self.descriptor(surroundings), self.waves + 1
        half = self.width // 2
        mirrored = torch.cat([v[..., :half], -v[..., half:]], -1)
        q_even, q_odd = self.polynomials(v)

        def apply(s: int, I: Tensor) -> Tensor:  # noqa: E741
            f, f_P = self.f[s](v[:, I]), self.f[s](mirrored[:, I])
            a = q_even[:, I] @ self.A[s] + 0.5 * (f + f_P)[..., :even]
            b = q_odd[:, I] @ self.B[s] + 0.5 * (f - f_P)[..., even:]
            return torch.cat([a, b], -1)

        return per_species(apply, surroundings.kind_I, len(self.f))

    def local(self, surroundings: Surroundings) -> Tensor:
        c = self.coefficients(surroundings)
        return (surroundings.electron @ c[..., None])[..., 0]


def _monomials(width: int, degree: int) -> tuple[list[list[int]], list[list[int]]]:
    """Even and odd monomials of v as lists of ``degree`` indices; index ``width`` stands for 1."""
    every = combinations_with_replacement(range(width + 1), degree)
    sorted_by_parity: tuple[list[list[int]], list[list[int]]] = ([], [])
    for m in every:
        sorted_by_parity[sum(width // 2 <= i < width for i in m) % 2].append(list(m))
    return sorted_by_parity


@torch.no_grad()
def fit_linear(
    model: SmoothDensity1D,
    positions: Tensor,
    species: Tensor,
    points: Tensor,
    length: float,
    density: Tensor,
    ridge: float = 1e-12,
) -> float:
    """Set A and B to what fits densities best; the network is left out.

    Linear least squares on all points, by normal equations of columns scaled to unit norm.
    ``ridge`` is added to their diagonal: functions of neighbouring atoms can nearly stand
    for one another. Arguments as for :func:`densitykit.models.deep_density.fit_ansatz`.

    Returns:
        Mean squared error of the polynomials in 1/bohr^2.

    Raises:
        ShapeError: density does not belong to these points.
    """
    n_points = points.shape[-1]
    if density.shape != (len(positions), n_points):
        expected = (len(positions), n_points)
        raise ShapeError(f"density has shape {tuple(density.shape)}; give {expected}")
    size = model.A.numel() + model.B.numel()
    normal, projected, square = density.new_zeros(size, size), density.new_zeros(size), 0.0
    normal, projected = normal.double(), projected.double()
    for i in range(len(positions)):
        at = points[i] if points.ndim == 2 else points
        s = model.surroundings(positions[i : i + 1], species, at, length)
        M, rho = _columns(model, s, n_points), density[i].double()
        normal.addmm_(M.T, M)
        projected += M.T @ rho
        square += float(rho @ rho)
    norm = normal.diagonal().sqrt().clamp(min=1e-300)
    scaled = normal / norm / norm[:, None] + ridge * torch.eye(size).to(normal)
    w = torch.linalg.solve(scaled, projected / norm) / norm
    model.A.copy_(w[: model.A.numel()].view_as(model.A))
    model.B.copy_(w[model.A.numel() :].view_as(model.B))
    return float(square - 2 * w @ projected + w @ (normal @ w)) / density.numel()


def _columns(model: SmoothDensity1D, s: Surroundings, n_points: int) -> Tensor:
    """Derivatives of one density by A and B, shape (n_points, numbers in A and B)."""
    phi = s.electron.where(s.inside[..., None], 0)[0].double()
    basis = phi[..., : model.waves + 1], phi[..., model.waves + 1 :]
    q = model.polynomials(model.descriptor(s).double())
    blocks = []
    for part in (0, 1):
        for kind in range(len(model.species)):
            features, waves = q[part].shape[-1], basis[part].shape[-1]
            block = phi.new_zeros(n_points, features * waves)
            for atom in torch.nonzero(s.kind_I == kind).flatten().tolist():
                product = q[part][0, atom, :, None] * basis[part][atom][:, None, :]
                block.index_add_(0, s.index[0, atom], product.flatten(1))
            blocks.append(block)
    return torch.cat(blocks, 1)
