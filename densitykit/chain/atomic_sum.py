r"""Densities on a ring that are sums over atoms, each of finite reach: geometry and summation.

.. math:: \rho(r) = \sum_I \rho_I(r - R_I; \text{neighbours of } I), \qquad
          \rho_I = 0 \text{ for } |r - R_I| \ge R_c

(Zepeda-Nunez et al. 2019, eq. 9). All that a model learns from is differences of positions, so
shifts of the whole system, whole cells added to an atom and relabelled atoms of one species change
nothing. On a ring neighbours of atoms and points in reach are found by sorting; with a fixed
number of neighbours, and points up to a cutoff, the cost is linear in the number of atoms.

A cell repeated several times gives the repeated density, provided that the cell is at
least twice the cutoff long: an atom then meets each point once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densitykit.errors import ShapeError

__all__ = [
    "AtomicSum1D",
    "Surroundings",
    "ordered_neighbours",
    "per_species",
    "points_in_reach",
]


#: atoms that are evaluated together: more of them would not stay in a cache of 1 MB a core
_ATOMS = 32


class Surroundings(NamedTuple):
    """All that a model wants to know of B configurations of N atoms; no weights enter.

    Attributes
    ----------
    x
        R - R_I of the W points in reach of each atom, shape (B, N, W), in bohr.
    index
        Which points they are, shape (B, N, W).
    inside
        False where an atom has fewer than W points, shape (B, N, W).
    R_JI
        Signed R_J - R_I of the neighbours, shape (B, N, J), in bohr.
    species_J
        Species of the neighbours as indices in the model's list, shape (B, N, J).
    species_I
        The same of the atoms, shape (N,).
    """

    x: Tensor
    index: Tensor
    inside: Tensor
    R_JI: Tensor
    species_J: Tensor
    species_I: Tensor

    def at(self, rows: Tensor) -> Surroundings:
        """The configurations with these indices, shape (B',)."""
        return Surroundings(*(t[rows] for t in self[:-1]), self.species_I)

    def around(self, atoms: slice) -> Surroundings:
        """What only some of the atoms see."""
        return Surroundings(*(t[:, atoms] for t in self[:-1]), self.species_I[atoms])


def ordered_neighbours(positions: Tensor, length: float, n_side: int) -> tuple[Tensor, Tensor]:
    """Neighbours of each atom on a ring: the first to the right, to the left, the second, ...

    Parameters
    ----------
    positions
        Shape (B, N), in any cell.
    length
        Of the ring.
    n_side
        Neighbours on each side, less than N.

    Returns
    -------
    tuple[Tensor, Tensor]
        R_J - R_I, shape (B, N, 2 n_side), and the indices J, same shape.
    """
    n_atoms = positions.shape[1]
    R, order = torch.remainder(positions, length).sort(dim=1)
    R, atoms = torch.cat([R - length, R, R + length], 1), order.repeat(1, 3)
    rank = torch.arange(n_atoms, device=R.device)
    step = torch.arange(1, n_side + 1, device=R.device)
    step = torch.stack([step, -step], 1).flatten()
    rank_J = n_atoms + rank[:, None] + step
    R_JI, J = R[:, rank_J] - R[:, n_atoms + rank, None], atoms[:, rank_J]
    back = order.argsort(1)[..., None].expand_as(J)  # from the order on the ring to the labels
    return R_JI.gather(1, back), J.gather(1, back)


def points_in_reach(
    positions: Tensor, points: Tensor, length: float, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The points within a cutoff of each atom on a ring, in N log P operations.

    Parameters
    ----------
    positions, points
        Shapes (B, N) and (B, P), in any cell.
    length, cutoff
        Of the ring; a point is at most once in reach as 2 cutoff <= length.

    Returns
    -------
    tuple[Tensor, Tensor, Tensor]
        x, index and inside as in :class:`Surroundings`; W is the largest number of points found.
    """
    n_points = points.shape[1]
    r, order = torch.remainder(points, length).sort(dim=1)
    r = torch.cat([r, r + length], 1)
    start = torch.remainder(positions - cutoff, length)
    first, stop = torch.searchsorted(r, start), torch.searchsorted(r, start + 2 * cutoff)
    width = max(1, int((stop - first).max()))
    rank = first[..., None] + torch.arange(width, device=r.device)
    inside = rank < stop[..., None]
    flat = rank.clamp(max=2 * n_points - 1).flatten(1)
    x = r.gather(1, flat).view(rank.shape) - (start + cutoff)[..., None]
    return x, order.gather(1, flat % n_points).view(rank.shape), inside


class AtomicSum1D(nn.Module):
    """A density on a ring that is a sum over atoms; subclasses say what an atom contributes.

    Parameters
    ----------
    species
        The numbers that name the species.
    n_near
        Neighbours that an atom sees, at least 1.
    cutoff
        Distance in bohr beyond which an atom contributes nothing.

    ``forward``: positions (B, N) in bohr, species (N,), points (P,) or (B, P) in bohr, length of
    the ring in bohr -> density (B, P) in 1/bohr.

    Raises
    ------
    ShapeError
        The arguments, or those of `forward`, do not fit.
    """

    def __init__(self, species: Sequence[int], n_near: int, cutoff: float) -> None:
        super().__init__()
        self.species, self.n_near, self.cutoff = tuple(species), int(n_near), float(cutoff)
        self.rates: dict[str, float] = {}  # of parameters by name, as shares of the learning rate
        if not self.species or len(set(self.species)) < len(self.species):
            raise ShapeError(f"species is {species}; give at least one, none twice")
        if n_near < 1 or not cutoff > 0:
            raise ShapeError(f"n_near is {n_near}, cutoff {cutoff}; give positive numbers")

    def neighbours(self, positions: Tensor, length: float) -> tuple[Tensor, Tensor]:
        """R_J - R_I and J of the neighbours, each (B, N, n_near)."""
        raise NotImplementedError

    def local(self, surroundings: Surroundings) -> Tensor:
        """rho_I at the points in reach, shape (B, N, W); needs not be zero outside."""
        raise NotImplementedError

    def surroundings(
        self, positions: Tensor, species: Tensor, points: Tensor, length: float
    ) -> Surroundings:
        """What `density` needs; compute it once where the atoms stay and the weights change."""
        species_I = self._check(positions, species, points, length)
        points = points.to(positions).expand(len(positions), -1).contiguous()
        x, index, inside = points_in_reach(positions, points, length, self.cutoff)
        R_JI, J = self.neighbours(positions, length)
        dtype = next(self.parameters()).dtype
        x = torch.where(inside, x, self.cutoff).to(dtype)
        return Surroundings(x, index, inside, R_JI.to(dtype), species_I[J], species_I)

    def _check(self, positions: Tensor, species: Tensor, points: Tensor, length: float) -> Tensor:
        """Species as indices in the list of the model, shape (N,)."""
        if positions.ndim != 2 or species.shape != positions.shape[1:]:
            raise ShapeError(
                f"positions have shape {tuple(positions.shape)}, species {tuple(species.shape)}; "
                "give (B, N) and (N,)"
            )
        if points.ndim not in (1, 2) or points.shape[:-1] not in ((), positions.shape[:1]):
            raise ShapeError(f"points have shape {tuple(points.shape)}; give (P,) or (B, P)")
        if self.n_near >= positions.shape[1]:
            raise ShapeError(
                f"n_near is {self.n_near}, but there are {positions.shape[1]} atoms; "
                "an atom has fewer neighbours than there are atoms"
            )
        if not 2 * self.cutoff <= length:
            raise ShapeError(
                f"length is {length}; it must be at least {2 * self.cutoff}, twice "
                "the cutoff of the model: repeat the cell"
            )
        known = species.new_tensor(self.species)
        matches = species[:, None] == known
        if not matches.any(1).all():
            raise ShapeError(
                f"species are {sorted(set(species.tolist()))}; the model knows {self.species}"
            )
        return matches.int().argmax(1).to(positions.device)

    def density(self, surroundings: Surroundings, n_points: int) -> Tensor:
        """Density (B, n_points) in 1/bohr."""
        rho = surroundings.x.new_zeros(len(surroundings.x), n_points)
        for start in range(0, surroundings.x.shape[1], _ATOMS):
            s = surroundings.around(slice(start, start + _ATOMS))
            rho_I = self.local(s).where(s.inside, 0)
            rho = rho.scatter_add(1, s.index.flatten(1), rho_I.flatten(1))
        return rho

    def forward(self, positions: Tensor, species: Tensor, points: Tensor, length: float) -> Tensor:
        s = self.surroundings(positions, species, points, length)
        return self.density(s, points.shape[-1])

    def atomic_contributions(
        self, positions: Tensor, species: Tensor, points: Tensor, length: float
    ) -> Tensor:
        """rho_I one by one, arguments as for `forward` -> (B, N, P) in 1/bohr."""
        s = self.surroundings(positions, species, points, length)
        rho_I = self.local(s).where(s.inside, 0)
        return rho_I.new_zeros(*rho_I.shape[:2], points.shape[-1]).scatter_add(2, s.index, rho_I)


def per_species(apply: Callable[[int, Tensor], Tensor], species: Tensor, count: int) -> Tensor:
    """Join apply(species, its atoms), each (B, atoms, ...), to (B, N, ...)."""
    atoms = [torch.nonzero(species == s).flatten() for s in range(count)]
    parts = [apply(s, a) for s, a in enumerate(atoms) if len(a)]
    return torch.cat(parts, 1).index_select(1, torch.cat(atoms).argsort())
