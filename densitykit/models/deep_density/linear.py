r"""A linear, atom-centred, equivariant map from atoms to density.

.. math:: \rho(r) = \sum_I \sum_{nlm} c^I_{nlm}\, \phi_{nlm}(r - R_I), \qquad
   c^I_{nlm} = \sum_k W^{s_I l}_{nk} F^{I}_{lmk} ,

with functions :math:`\phi` of :mod:`densitykit.models.deep_density.basis` and features F of the
surroundings (:mod:`densitykit.models.deep_density.features`), both of which turn with the atoms.
So the map commutes with translations, rotations and permutations by construction, and its weights
are the solution of one linear system (:mod:`densitykit.training.linear`). Every function has a
finite reach: the cost is linear in atoms, and the map serves any cell. Deep Density (Zepeda-Nunez
et al. 2019, eqs. 9 and 10) has the same form, with a network for each local density; expansions
with linear coefficients are those of Grisafi et al. (2018, ACS Cent. Sci. 5, 57).

Lengths are in angstrom, densities in angstrom**-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from densitykit.errors import WindowError
from densitykit.models.deep_density.basis import GaussianBasis
from densitykit.models.deep_density.features import Surroundings

__all__ = ["Atoms", "LinearDensity", "points_near"]


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


class LinearDensity(nn.Module):
    """The map; see the module's docstring.

    Parameters
    ----------
    bases
        Atomic number to the arguments of `GaussianBasis`.
    surroundings
        Arguments of `Surroundings` but species and out_l_max.
    shapes
        Of the buffers, by name, as `state_dict` has them; None before a fit.
    nearest
        Smallest distance of two atoms in training, angstrom.

    Raises
    ------
    WindowError
        An atom is of a species that was not trained on.
    """

    def __init__(
        self,
        bases: Mapping[str, Mapping[str, Any]],
        surroundings: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]] | None = None,
        nearest: float = 0.0,
    ) -> None:
        super().__init__()
        self.species, self.nearest = sorted(int(z) for z in bases), nearest
        self.bases = {int(z): GaussianBasis(**{**b}) for z, b in bases.items()}
        self.surroundings = nn.ModuleDict()
        for z in self.species:
            l_max = self.bases[z].l_max
            features = Surroundings(self.species, out_l_max=l_max, **surroundings)
            self.surroundings[str(z)] = features
        for name, shape in (shapes or {}).items():
            owner, _, last = name.rpartition(".")
            module = self.get_submodule(owner)
            module.register_buffer(last, torch.zeros(tuple(shape), dtype=torch.float64))

    def features(self, atoms: Atoms) -> dict[int, list[Tensor]]:
        """Features of all atoms by species, for each l (atom, 2l + 1, K)."""
        strange = sorted(set(atoms.numbers.tolist()) - set(self.species))
        if strange:
            raise WindowError(
                f"atomic numbers {strange}, this map was trained on {self.species}; train one on "
                "densities of these elements"
            )
        out = {}
        for z in self.species:
            centres = np.flatnonzero(atoms.numbers == z)
            if len(centres):
                own = self.surroundings[str(z)]
                inner = (atoms.positions, atoms.numbers, atoms.wide_cell, centres)
                out[z] = own(own.expansion(*inner))
        return out

    def coefficients(self, atoms: Atoms) -> list[np.ndarray]:
        """c of every atom, in the order of the atoms, shape (size of its basis,) each."""
        out: list[np.ndarray] = [np.empty(0)] * len(atoms.numbers)
        for z, features in self.features(atoms).items():
            parts = [
                torch.einsum("nk,imk->inm", getattr(self, f"weight_{z}_{l}"), f).flatten(1)
                for l, f in enumerate(features)
            ]
            rows = torch.cat(parts, dim=1).numpy()
            for i, row in zip(np.flatnonzero(atoms.numbers == z), rows, strict=True):
                out[i] = row
        return out

    @torch.no_grad()
    def density(self, atoms: Atoms, grid: tuple[int, ...]) -> np.ndarray:
        """Density on a grid, shape (X, Y, Z); values of atoms add up where they overlap."""
        total = np.zeros(int(np.prod(grid)))
        for i, c in enumerate(self.coefficients(atoms)):
            basis = self.bases[int(atoms.numbers[i])]
            for index, vectors in points_near(atoms, i, basis.radius, grid):
                np.add.at(total, index, basis.density(vectors, c))
        return total.reshape(grid)

    def block_shapes(
        self, features: Mapping[int, list[Tensor]]
    ) -> list[tuple[int, int, int, int]]:
        """Blocks of the weights: species, l, functions n, features K."""
        return [
            (z, l, self.bases[z].counts[l], f.shape[-1])
            for z, own in features.items()
            for l, f in enumerate(own)
        ]

    def set_weights(self, flat: Tensor, blocks: Sequence[tuple[int, int, int, int]]) -> None:
        """Fill the weights from one vector, block after block."""
        sizes = [n * k for _, _, n, k in blocks]
        for (z, l, n, k), part in zip(blocks, flat.split(sizes), strict=True):
            self.register_buffer(f"weight_{z}_{l}", part.reshape(n, k).clone())


def points_near(
    atoms: Atoms, i: int, radius: float, grid: tuple[int, ...], chunk: int = 20000
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Grid points within a radius of atom i, images included, some at a time.

    Yields
    ------
    tuple[np.ndarray, np.ndarray]
        Flat indices of the points (P,), and the vectors from the atom to them (P, 3), angstrom.
        In a cell smaller than the sphere a point comes once for each image.
    """
    n = np.array(grid)
    voxel = atoms.cell / n[:, None]
    reach = np.ceil(radius * np.linalg.norm(np.linalg.inv(voxel), axis=0)).astype(int) + 1
    axes = [np.arange(-r, r + 1) for r in reach]
    middle = np.round(atoms.positions[i] @ np.linalg.inv(voxel)).astype(int)
    inner = np.stack(np.meshgrid(axes[1], axes[2], indexing="ij"), axis=-1).reshape(-1, 2)
    step = max(1, chunk // len(inner))
    for start in range(0, len(axes[0]), step):
        first = axes[0][start : start + step]
        block = np.concatenate(
            [np.repeat(first, len(inner))[:, None], np.tile(inner, (len(first), 1))], axis=1
        )
        points = middle + block
        vectors = points @ voxel - atoms.positions[i]
        kept = (vectors**2).sum(axis=1) < radius**2
        if not atoms.periodic:
            kept &= ((points >= 0) & (points < n)).all(axis=1)
        points = points[kept] % n
        yield (points[:, 0] * n[1] + points[:, 1]) * n[2] + points[:, 2], vectors[kept]
