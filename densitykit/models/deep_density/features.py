r"""Equivariant features of the surroundings of an atom.

The density of the neighbours of species s, expanded around atom I,

.. math:: A^s_{nlm} = \sum_{J \in s} g_n(r_{IJ})\, f_c(r_{IJ})\, Y_{lm}(\hat r_{IJ}) ,

turns with the surroundings as a set of harmonics does, and so do its products, coupled by
Clebsch-Gordan coefficients (Drautz 2019, Phys. Rev. B 99, 014104; Willatt, Musil, Ceriotti
2019, J. Chem. Phys. 150, 154110). Principal components over the training configurations keep the
channels that vary: a few of A for the products, some tens of the products. Blocks are scaled to
unit variance, and the invariants (l = 0) are centred; the first of them is the constant one, whose
coefficients are the atom without surroundings. Lengths are in angstrom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from densitykit.models.deep_density.basis import coupling, spherical_harmonics
from densitykit.neighbours import neighbour_pairs

__all__ = ["Surroundings"]


class Surroundings(nn.Module):
    """Features of one central species.

    Parameters
    ----------
    species
        Atomic numbers of the neighbours.
    cutoff
        angstrom.
    radial
        Radial functions: "chebyshev", polynomials in exp(-r/2), or "bessel".
    n, l_max
        Radial functions, and largest l of A.
    out_l_max
        Largest l of the features.
    channels
        Principal components of A, for each l, that enter the products.
    products
        Principal components of the products that are kept, for each l.
    """

    def __init__(
        self,
        species: Sequence[int],
        cutoff: float,
        radial: str = "chebyshev",
        n: int = 8,
        l_max: int = 4,
        out_l_max: int = 6,
        channels: int = 4,
        products: int = 50,
    ) -> None:
        super().__init__()
        self.species, self.cutoff, self.radial = tuple(species), cutoff, radial
        self.n, self.l_max, self.out_l_max = n, l_max, out_l_max
        self.channels, self.products = channels, products

    def expansion(
        self, positions: np.ndarray, numbers: np.ndarray, cell: np.ndarray, centres: np.ndarray
    ) -> list[Tensor]:
        """A of some atoms, one tensor (centre, 2l + 1, species x n) for each l."""
        i, j, shift = neighbour_pairs(positions, cell, self.cutoff, both_ways=True)
        vectors = positions[j] - positions[i] + shift @ cell
        row = np.full(len(positions), -1)
        row[centres] = np.arange(len(centres))
        kept = row[i] >= 0
        vectors, target = vectors[kept], row[i[kept]]
        column = np.searchsorted(self.species, numbers[j[kept]])
        r = np.linalg.norm(vectors, axis=1)
        y, g = spherical_harmonics(self.l_max, vectors), self._radial(r)
        slot = torch.from_numpy(target * len(self.species) + column)
        out = []
        for l in range(self.l_max + 1):
            terms = y[:, l * l : (l + 1) ** 2, None] * g[:, None, :]
            sums = torch.zeros(len(centres) * len(self.species), 2 * l + 1, self.n).double()
            sums.index_add_(0, slot, torch.from_numpy(terms))
            sums = sums.reshape(len(centres), len(self.species), 2 * l + 1, self.n)
            out.append(sums.transpose(1, 2).flatten(2))
        return out

    def _radial(self, r: np.ndarray) -> np.ndarray:
        """g_n f_c, shape (pair, n)."""
        x = np.clip(r / self.cutoff, 0, 1)
        smooth = ((1 - x) ** 2 * (1 + 2 * x))[:, None]
        if self.radial == "bessel":
            k = np.arange(1, self.n + 1)
            return np.sin(np.pi * k * x[:, None]) / np.maximum(r[:, None], 1e-3) * smooth
        far, near = np.exp(-self.cutoff / 2), np.exp(-0.3)
        t = np.clip(2 * (np.exp(-r / 2) - far) / (near - far) - 1, -1, 1.5)
        return np.polynomial.chebyshev.chebvander(t, self.n - 1) * smooth

    def fit(self, expansions: list[Tensor]) -> None:
        """Find principal components, means and scales on training atoms."""
        for l, a in enumerate(expansions):
            self._keep(f"all_{l}", _components(a, a.shape[-1]))
            self._keep(f"few_{l}", _components(a, self.channels * len(self.species)))
        few = [a @ getattr(self, f"few_{l}") for l, a in enumerate(expansions)]
        for l in range(self.out_l_max + 1):
            pairs = _products(few, l)
            centred = pairs - (pairs.mean(dim=0) if l == 0 else 0)
            axes = _components(centred, self.products)
            self._keep(f"pairs_{l}", axes.float())  # most of a checkpoint; fitted as rounded
        for l in range(self.out_l_max + 1):
            blocks = self._blocks(expansions, few, l)
            means = [b.mean(dim=(0, 1)) if l == 0 else 0 * b.mean(dim=(0, 1)) for b in blocks]
            scales = [
                ((b - m).square().sum() / (b.shape[0] * b.shape[1])).rsqrt().expand(b.shape[-1])
                for b, m in zip(blocks, means, strict=True)
            ]
            self._keep(f"mean_{l}", torch.cat(means))
            self._keep(f"scale_{l}", torch.cat(scales))

    def _keep(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.contiguous())

    def _blocks(self, expansions: list[Tensor], few: list[Tensor], l: int) -> list[Tensor]:
        linear = [expansions[l] @ getattr(self, f"all_{l}")] if l < len(expansions) else []
        return [*linear, _products(few, l) @ getattr(self, f"pairs_{l}").double()]

    def forward(self, expansions: list[Tensor]) -> list[Tensor]:
        """Features, one tensor (centre, 2l + 1, K_l) for each l."""
        few = [a @ getattr(self, f"few_{l}") for l, a in enumerate(expansions)]
        out = []
        for l in range(self.out_l_max + 1):
            x = torch.cat(self._blocks(expansions, few, l), dim=-1)
            x = (x - getattr(self, f"mean_{l}")) * getattr(self, f"scale_{l}")
            out.append(torch.cat([torch.ones_like(x[..., :1]), x], dim=-1) if l == 0 else x)
        return out


def _components(x: Tensor, count: int) -> Tensor:
    """Leading principal axes of channels, (channel, kept)."""
    flat = x.reshape(-1, x.shape[-1])
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    values, vectors = values.flip(0), vectors.flip(1)
    kept = min(count, int((values > 1e-10 * values[0].clamp(min=1e-300)).sum()))
    return vectors[:, : max(kept, 1)]


def _products(few: list[Tensor], l: int) -> Tensor:
    """All products of two channels that couple to l with even parity, (centre, 2l + 1, pair)."""
    out = []
    for l1, a in enumerate(few):
        for l2, b in enumerate(few[l1:], start=l1):
            if (l1 + l2 + l) % 2 or not l2 - l1 <= l <= l1 + l2:
                continue
            c = torch.from_numpy(coupling(l1, l2, l))
            product = torch.einsum("abm,iax,iby->imxy", c, a, b)
            if l1 == l2:
                upper = torch.triu_indices(a.shape[-1], b.shape[-1])
                out.append(product[..., upper[0], upper[1]])
            else:
                out.append(product.flatten(-2))
    return torch.cat(out, dim=-1)
