r"""A smooth variant of Deep Density in one dimension, found by one linear solve.

As in :mod:`densitykit.chain.deep_density` the density is a sum over atoms of functions of their
nearest neighbours, but the model speaks once per atom, not once per point: it gives the
coefficients of smooth functions of x = r - R_I,

.. math::
    \rho_I(r) = w(x) \Big[\sum_{k=0}^{K} a_k \cos\frac{k\pi x}{R_c}
        + \sum_{k=1}^{K} b_k \sin\frac{k\pi x}{R_c}\Big], \qquad w = (1 - x^2/R_c^2)^4 .

**Neighbours** are the first, second, ... on the right and on the left, not sorted by distance,
and each is seen as :math:`u = e^{-(R - jd)/\lambda}`, j its rank, in the column of its species.
Where two atoms of one species meet and pass they exchange their surroundings: the set of all
inputs, and so the density, is continuous for all motions of one species. (Two of different
species that pass through one another change it abruptly.)

**Reflection.** With monomials m of all u, and P that exchanges right and left,

.. math:: a = A\,(m + Pm), \qquad b = B\,(m - Pm)

makes the density of the mirror image the mirror image of the density: an atomic cluster expansion
(Drautz 2019) of the electron density.

**Span.** A monomial of d factors may only bring together atoms of one stretch of
``spans[d - 1]`` + 1 consecutive ones. The longer the stretches, the more numbers; and the more
patterns of species that a longer chain has, and the short one of the training data did not show.

**Training.** The densities are linear in A and B: :func:`densitykit.chain.training.fit_linear`
finds the best ones by one linear least-squares solve, with no seed, no rate and no epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from math import comb

import torch
from torch import Tensor, nn

from densitykit.chain.atomic_sum import AtomicSum1D, Surroundings, ordered_neighbours, per_species
from densitykit.errors import ShapeError

__all__ = ["SmoothDensity1D", "design_matrix"]

#: a monomial as indices of its factors
Monomial = tuple[int, ...]


class SmoothDensity1D(AtomicSum1D):
    """Smooth, reflection-symmetric Deep Density, in double precision; zero until trained.

    Parameters
    ----------
    species, cutoff
        As in :class:`densitykit.chain.atomic_sum.AtomicSum1D`.
    n_near
        Neighbours that an atom sees, half of them on each side: an even number.
    spans
        For monomials of one factor, of two, and so on: they bring together at most
        span + 1 consecutive atoms, the atom itself among them; ``n_near`` excludes nothing.
    waves
        K; the shortest wave is 2 cutoff / K long.
    spacing
        D, usual distance of first neighbours in bohr.
    decay
        Lambda in bohr.
    """

    def __init__(
        self,
        species: Sequence[int],
        n_near: int = 4,
        cutoff: float = 24.0,
        spans: Sequence[int] = (4, 4),
        waves: int = 48,
        spacing: float = 10.0,
        decay: float = 5.0,
    ) -> None:
        super().__init__(species, n_near, cutoff)
        if n_near % 2:
            raise ShapeError(f"n_near is {n_near}; give an even number, half for each side")
        count, self.waves, self.spacing, self.decay = len(self.species), waves, spacing, decay
        if comb(n_near * count + len(spans), len(spans)) > 10**5:
            raise ShapeError(f"n_near {n_near}, spans {list(spans)}: too many products; give less")
        pairs = _mirror_pairs(n_near, count, spans)
        self.m, self.Pm = (torch.tensor(list(m)) for m in zip(*pairs, strict=True))
        #: monomials that are not their own mirror images, which have no odd part
        self.odd = torch.tensor([i for i, (m, Pm) in enumerate(pairs) if m != Pm]).long()
        self.A = nn.Parameter(torch.zeros(count, len(self.m), waves + 1))
        self.B = nn.Parameter(torch.zeros(count, len(self.odd), waves))
        # what single precision would round off is larger than the errors reached
        self.double()

    def neighbours(self, positions: Tensor, length: float) -> tuple[Tensor, Tensor]:
        return ordered_neighbours(positions, length, self.n_near // 2)

    def waves_at(self, x: Tensor) -> Tensor:
        """Windowed cosines and sines, (B, N, W) -> (B, N, W, 2 waves + 1)."""
        k = torch.arange(self.waves + 1, device=x.device) * (torch.pi / self.cutoff)
        phase = x[..., None] * k.to(x)
        waves = torch.cat([phase.cos(), phase[..., 1:].sin()], -1)
        return waves * (1 - (x / self.cutoff) ** 2).clamp(min=0)[..., None] ** 4

    def polynomials(self, surroundings: Surroundings) -> tuple[Tensor, Tensor]:
        """m + Pm and m - Pm of each atom, each (B, N, monomials)."""
        s = surroundings
        rank = torch.arange(2, self.n_near + 2, device=s.R_JI.device) // 2
        u = torch.exp((self.spacing * rank - s.R_JI.abs()) / self.decay)
        every = torch.arange(len(self.species), device=u.device)
        u = (u[..., None] * (s.species_J[..., None] == every)).flatten(2)
        u = torch.cat([u, torch.ones_like(u[..., :1])], -1)  # the last index stands for 1
        m, Pm = (u[..., i.to(u.device)].prod(-1) for i in (self.m, self.Pm))
        return m + Pm, (m - Pm)[..., self.odd.to(u.device)]

    def local(self, surroundings: Surroundings) -> Tensor:
        even, odd = self.polynomials(surroundings)

        def coefficients(s: int, I: Tensor) -> Tensor:  # noqa: E741
            return torch.cat([even[:, I] @ self.A[s], odd[:, I] @ self.B[s]], -1)

        c = per_species(coefficients, surroundings.species_I, len(self.species))
        return (self.waves_at(surroundings.x) @ c[..., None])[..., 0]


def _mirror_pairs(
    n_near: int, count: int, spans: Sequence[int]
) -> list[tuple[Monomial, Monomial]]:
    """Monomials and their mirror images, each pair once, in ``len(spans)`` indices of u.

    Index j * count + s is neighbour j (first right, first left, second right, ...) of species s,
    and n_near * count stands for 1.
    """
    one = n_near * count
    pairs = []
    for m in combinations_with_replacement(range(one + 1), len(spans)):
        factors = [i for i in m if i < one]
        neighbours = {i // count for i in factors}
        reach = [
            max((j // 2 + 1 for j in neighbours if j % 2 == side), default=0) for side in (0, 1)
        ]
        # an atom has one species: products of two columns of the same neighbour are zero
        if len(neighbours) < len(set(factors)) or sum(reach) > ([0, *spans])[len(factors)]:
            continue
        Pm = tuple(sorted(i if i == one else (i // count ^ 1) * count + i % count for i in m))
        if m <= Pm:
            pairs.append((m, Pm))
    return pairs


@torch.no_grad()
def design_matrix(model: SmoothDensity1D, s: Surroundings, n_points: int) -> Tensor:
    """Derivatives of one density by A and B, shape (n_points, numbers in A and B)."""
    phi = model.waves_at(s.x).where(s.inside[..., None], 0)[0].double()
    basis = phi[..., : model.waves + 1], phi[..., model.waves + 1 :]
    q = [p.double() for p in model.polynomials(s)]
    blocks = []
    for part in (0, 1):
        for species in range(len(model.species)):
            features, waves = q[part].shape[-1], basis[part].shape[-1]
            block = phi.new_zeros(n_points, features * waves)
            for atom in torch.nonzero(s.species_I == species).flatten().tolist():
                product = q[part][0, atom, :, None] * basis[part][atom][:, None, :]
                block.index_add_(0, s.index[0, atom], product.flatten(1))
            blocks.append(block)
    return torch.cat(blocks, 1)
