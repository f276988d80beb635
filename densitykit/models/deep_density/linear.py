r"""A linear, atom-centred, equivariant map from atoms to density.

.. math:: \rho(r) = \sum_I \Big[ \sum_n b^{s_I}_n\, \chi_n(|r - R_I|)
   + \sum_{nlm} c^I_{nlm}\, \phi_{nlm}(r - R_I) \Big], \qquad
   c^I_{nlm} = \sum_k W^{s_I l}_{nk} F^{I}_{lmk} ,

with functions :math:`\phi` of :mod:`densitykit.models.deep_density.basis` and features F of the
surroundings (:mod:`densitykit.models.deep_density.features`), both of which turn with the atoms.
So the map commutes with translations, rotations and permutations by construction, and its weights
are the solution of one linear system (:mod:`densitykit.training.linear`). The first sum, the
*free atoms*, is there in condensed matter: it reaches far and carries all electrons, while what
the surroundings change is neutral. Every function has a finite reach: the cost is linear in
atoms, and the map serves any cell. Deep Density (Zepeda-Nunez et al. 2019, eqs. 9 and 10) has the
same form, with a network for each local density; expansions with linear coefficients are those of
Grisafi et al. (2018, ACS Cent. Sci. 5, 57).

Each of the *members* was fitted without another part of the training set. Their spread, scaled on
validation frames, estimates the error of a prediction (delete-a-group jackknife; Efron and Stein
1981, Ann. Stat. 9, 586). Lengths are in angstrom, densities in angstrom**-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from densitykit.errors import WindowError
from densitykit.models.deep_density.basis import GaussianBasis
from densitykit.models.deep_density.features import Surroundings
from densitykit.neighbours import neighbour_pairs

__all__ = ["Atoms", "Block", "LinearDensity", "Patch", "nearest_pairs"]


@dataclass(frozen=True)
class Atoms:
    """A configuration: positions (N, 3), atomic numbers (N,), cell (3, 3), periodic or not."""

    positions: np.ndarray
    numbers: np.ndarray
    cell: np.ndarray
    periodic: bool = True

    @property
    def wide_cell(self) -> np.ndarray:
        """The cell; of a molecule, a box in which no atom sees an image."""
        return self.cell if self.periodic else np.diag(np.ptp(self.positions, axis=0) + 50.0)


class Block(NamedTuple):
    """The functions of one l of one species: they share a matrix of weights (n, K)."""

    name: str  #: of the weights
    z: int
    basis: GaussianBasis
    l: int
    features: Tensor  #: (atom, 2l + 1, K)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weights."""
        return self.basis.counts[self.l], self.features.shape[-1]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


class LinearDensity(nn.Module):
    """The map; see the module's docstring.

    Parameters
    ----------
    bases
        Atomic number to the arguments of `GaussianBasis`.
    surroundings
        Arguments of `Surroundings` but species and out_l_max.
    free
        Atomic number to the arguments of the `GaussianBasis` of a free atom, l = 0 only. Free
        atoms without any of the bases are the superposition of atoms.
    charges
        Atomic number to valence electrons; predictions are scaled to hold as many.
    shapes
        Of the buffers, by name, as `state_dict` has them; None before a fit.
    nearest
        Smallest distance in training of each pair of species, "1-8", angstrom.
    spread
        What the standard deviation of the members is multiplied by, to be that of an error.
    expected
        Mean estimate of the error (relative l1) on validation frames.
    floor
        Densities of periodic cells are made positive, rho -> floor ln(1 + exp(rho/floor)), before
        they are scaled; angstrom**-3. 0 leaves them as they are.

    Raises
    ------
    WindowError
        An atom is of a species that was not trained on.
    """

    def __init__(
        self,
        bases: Mapping[str, Mapping[str, Any]],
        surroundings: Mapping[str, Any],
        free: Mapping[str, Mapping[str, Any]] | None = None,
        charges: Mapping[str, float] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        nearest: Mapping[str, float] | None = None,
        spread: float = 1.0,
        expected: float = 0.0,
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        self.species = sorted({int(z) for z in (*bases, *(free or {}))})
        self.nearest = dict(nearest or {})
        self.bases = {int(z): GaussianBasis(**b) for z, b in bases.items()}
        self.free = {int(z): GaussianBasis(**b) for z, b in (free or {}).items()}
        self.charges = {int(z): float(q) for z, q in (charges or {}).items()}
        self.spread, self.expected, self.floor = spread, expected, floor
        self.surroundings = nn.ModuleDict()
        for z, basis in self.bases.items():
            features = Surroundings(self.species, out_l_max=basis.l_max, **surroundings)
            self.surroundings[str(z)] = features
        for name, shape in (shapes or {}).items():
            owner, _, last = name.rpartition(".")
            module = self.get_submodule(owner)
            kind = torch.float32 if last.startswith("pairs_") else torch.float64
            module.register_buffer(last, torch.zeros(tuple(shape), dtype=kind))

    def blocks(self, atoms: Atoms) -> list[Block]:
        """All functions of a configuration with their features, by species and l."""
        strange = sorted(set(atoms.numbers.tolist()) - set(self.species))
        if strange:
            raise WindowError(
                f"atomic numbers {strange}, this map was trained on {self.species}; train one on "
                "densities of these elements"
            )
        out = []
        for z in self.species:
            centres = np.flatnonzero(atoms.numbers == z)
            if z in self.bases and len(centres):
                parts = self.surroundings[str(z)](self.expansion(z, atoms))
                out += [Block(f"{z}_{l}", z, self.bases[z], l, f) for l, f in enumerate(parts)]
            if z in self.free and len(centres):
                ones = torch.ones(len(centres), 1, 1, dtype=torch.float64)
                out.append(Block(f"{z}_free", z, self.free[z], 0, ones))
        return out

    def expansion(self, z: int, atoms: Atoms) -> list[Tensor]:
        """What the atoms of a species see; see `Surroundings.expansion`."""
        centres = np.flatnonzero(atoms.numbers == z)
        inner = (atoms.positions, atoms.numbers, atoms.wide_cell, centres)
        return self.surroundings[str(z)].expansion(*inner)

    def coefficients(self, atoms: Atoms, of: str = "weight") -> list[list[tuple]]:
        """Bases and coefficients of every atom, in the order of the atoms.

        ``of`` is "weight" or "member"; shapes are ([member,] size of the basis).
        """
        out: list[list[tuple]] = [[] for _ in atoms.numbers]
        for _, group in groupby(self.blocks(atoms), key=lambda block: id(block.basis)):
            blocks, parts = [*group], []
            for block in blocks:
                w = getattr(self, f"{of}_{block.name}")
                part = torch.einsum("...nk,imk->i...nm", w, block.features)
                parts.append(part.flatten(-2))
            whole = torch.cat(parts, dim=-1).numpy()
            for i, c in zip(np.flatnonzero(atoms.numbers == blocks[0].z), whole, strict=True):
                out[i].append((blocks[0].basis, c))
        return out

    @torch.no_grad()
    def density(self, atoms: Atoms, grid: tuple[int, ...]) -> np.ndarray:
        """Density on a grid, shape (X, Y, Z), angstrom**-3, with as many electrons as atoms have.

        In a periodic cell the mean over the grid tells the number of electrons, for a molecule
        the integrals of the functions, since grids cut its tails.
        """
        coefficients = self.coefficients(atoms)
        rho = _sum_on_grid(coefficients, atoms, grid)[0]
        if not self.charges:
            return rho
        n = sum(self.charges[int(z)] for z in atoms.numbers)
        if atoms.periodic:
            rho = self.floor * np.logaddexp(0, rho / self.floor) if self.floor else rho
            return rho * (n / (rho.mean() * abs(np.linalg.det(atoms.cell))))
        return rho * (n / sum(b.electrons(c) for own in coefficients for b, c in own))

    def forward(
        self, positions: Tensor, cell: Tensor, shape: tuple[int, ...], numbers: Tensor
    ) -> Tensor:
        """Densities of B periodic configurations, (B, X, Y, Z), as a `Superposition` gives them.

        Positions (B, N, 3) and cell (3, 3) or (B, 3, 3) in angstrom, numbers (N,).
        """
        cells, z = cell.expand(len(positions), 3, 3).cpu().numpy(), numbers.cpu().numpy()
        some = (Atoms(x, z, a) for x, a in zip(positions.cpu().numpy(), cells, strict=True))
        rho = np.stack([self.density(atoms, shape) for atoms in some])
        return torch.from_numpy(rho).to(positions)

    @torch.no_grad()
    def uncertainty(self, atoms: Atoms, grid: tuple[int, ...]) -> np.ndarray:
        """Estimated standard deviation of the error of `density`, (X, Y, Z), angstrom**-3."""
        members = _sum_on_grid(self.coefficients(atoms, "member"), atoms, grid)
        variance = ((members - members.mean(axis=0)) ** 2).sum(axis=0)
        return self.spread * np.sqrt(variance * (len(members) - 1) / len(members))

    def set_weights(self, flat: Tensor, blocks: Sequence[Block], of: str = "weight") -> None:
        """Fill the weights from a vector ([member,] unknown), block after block."""
        parts = flat.split([b.size for b in blocks], dim=-1)
        for block, part in zip(blocks, parts, strict=True):
            w = part.unflatten(-1, block.shape).clone()
            self.register_buffer(f"{of}_{block.name}", w)


def _sum_on_grid(
    coefficients: Sequence[Sequence[tuple[GaussianBasis, np.ndarray]]],
    atoms: Atoms,
    grid: tuple[int, ...],
) -> np.ndarray:
    """Sum of the functions of all atoms, shape (set, X, Y, Z); a set of coefficients each."""
    sets = len(np.atleast_2d(coefficients[0][0][1]))
    total = np.zeros((sets, int(np.prod(grid))))
    patches: dict[float, Patch] = {}
    for i, own in enumerate(coefficients):
        for basis, c in own:
            matrices = basis.contract(np.atleast_2d(c))
            if basis.radius not in patches:
                patches[basis.radius] = Patch(atoms, basis.radius, grid)
            for index, vectors in patches[basis.radius].around(atoms.positions[i]):
                values = basis.density(vectors, matrices)
                for row, column in zip(total, values, strict=True):
                    np.add.at(row, index, column)  # a small cell meets a point more than once
    return total.reshape(sets, *grid)


def nearest_pairs(atoms: Atoms, reach: float = 3.0) -> dict[str, float]:
    """Smallest distance of each pair of species, by "1-8", angstrom; those within reach."""
    i, j, shift = neighbour_pairs(atoms.positions, atoms.wide_cell, reach, both_ways=True)
    r = np.linalg.norm(atoms.positions[j] - atoms.positions[i] + shift @ atoms.wide_cell, axis=1)
    pairs = np.sort(np.stack([atoms.numbers[i], atoms.numbers[j]], axis=1), axis=1)
    return {
        f"{a}-{b}": float(r[(pairs == (a, b)).all(axis=1)].min())
        for a, b in np.unique(pairs, axis=0).tolist()
    }


class Patch:
    """Grid points within a radius of any position, images included.

    Their offsets from the grid point nearest to it are found once for all atoms.

    Parameters
    ----------
    atoms
        Whose cell it is, periodic or not.
    radius
        angstrom.
    grid
        Numbers of points.
    """

    def __init__(self, atoms: Atoms, radius: float, grid: tuple[int, ...]) -> None:
        self.grid, self.periodic, self.radius = np.array(grid), atoms.periodic, radius
        self.voxel = atoms.cell / self.grid[:, None]
        widest = radius + 0.5 * np.linalg.norm(self.voxel, axis=1).sum()
        heights = 1 / np.linalg.norm(np.linalg.inv(self.voxel), axis=0)
        self.reach = np.ceil(widest / heights).astype(int)
        steps = np.indices(tuple(2 * self.reach + 1)).reshape(3, -1)
        vectors = self.voxel.T @ (steps - self.reach[:, None])
        near = (vectors**2).sum(axis=0) < widest**2
        self.steps, self.vectors = steps[:, near], vectors[:, near]

    def around(
        self, position: np.ndarray, chunk: int = 4096
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield flat indices of points (P,), and the vectors to them (P, 3), some at a time.

        In a cell smaller than the sphere a point comes once for each image.
        """
        middle = np.round(position @ np.linalg.inv(self.voxel)).astype(int)
        rest = middle @ self.voxel - position
        tables = self._tables(middle)
        for start in range(0, self.steps.shape[1], chunk):
            of_chunk = slice(start, start + chunk)
            index = sum(t[n] for t, n in zip(tables, self.steps[:, of_chunk], strict=True))
            x, y, z = (v + r for v, r in zip(self.vectors[:, of_chunk], rest, strict=True))
            near = np.flatnonzero((x * x + y * y + z * z < self.radius**2) & (index >= 0))
            yield index[near], np.stack([x[near], y[near], z[near]], axis=1)

    def _tables(self, middle: np.ndarray) -> list[np.ndarray]:
        """What each step along an axis adds to a flat index; very little outside of a box."""
        out, strides = [], (self.grid[1] * self.grid[2], self.grid[2], 1)
        for m, reach, n, stride in zip(middle, self.reach, self.grid, strides, strict=True):
            points = np.arange(m - reach, m + reach + 1)
            outside = (points < 0) | (points >= n)
            table = points % n * stride
            out.append(table if self.periodic else np.where(outside, -self.grid.prod() * 3, table))
        return out
