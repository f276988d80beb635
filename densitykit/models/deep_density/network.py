r"""Deep Density as published: a network for the local density of each atom, in three dimensions.

.. math::
    \rho(r) = \sum_I \rho_I(r), \qquad \rho_I(r) = \big(N_I + A_s R + B_s\big)\,
    e^{C_s (R - D_s)^2 + E_I}\, u(R), \quad R = |r - R_I|

(Zepeda-Nunez et al. 2019, eqs. 9, 11, 12). A to D belong to the species s of atom I. N_I and E_I
are *fitting networks* of the *descriptor*, a symmetric matrix of M by M invariants of the
surroundings of I, with the electron at r as particle 0:

.. math:: D^I = h^\top h, \qquad h = \sum_{J \in \{0\} \cup \mathrm{neighbours}}
    d_J\, g_{s(I)s(J)}(\phi(R_{JI}))^\top, \qquad
    d_J = \phi(R_{JI}) \Big(1, \frac{R_J - R_I}{R_{JI}}\Big)

(eqs. 15 to 20), with a small network g for each ordered pair of species, and :math:`\phi = u(R) /
(R + \delta)`, where the cosine u falls from 1 at three quarters of the cutoff to 0 (eq. 16). All
depends on differences of positions, on sums over neighbours and on scalar products: translations,
permutations and rotations change nothing, and atoms and points that cross the cutoff come and go
with one continuous derivative.

**Linear cost** (which the paper proposes and does not have). Only :math:`d_0` depends on the
point: the sum over neighbours is made once per atom, and u takes :math:`\rho_I` to zero at the
cutoff, so that an atom touches as many points as its sphere holds. Neighbours of atoms and points
in reach are found by cells and trees, in chunks of bounded memory.

**What we add.** The networks see centred and scaled inputs, with constants that are taken from the
training set before it begins. **Where it is not smooth**: the direction of the electron jumps at
the nucleus. Lengths are in angstrom, densities in angstrom**-3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional

from densitykit.errors import ShapeError, WindowError
from densitykit.models.deep_density.linear import Atoms
from densitykit.neighbours import neighbour_pairs
from densitykit.nn.dense import cosine_taper, dense

__all__ = ["DeepDensity", "Neighbourhood", "PointsInReach", "distances"]

_POINTS, _PAIRS = 8192, 4096  # searched, and evaluated together
_START = {"A": 0.0, "B": 1.0, "C": -1.0, "D": 0.0}


class Neighbourhood(NamedTuple):
    """All that the atomic part of the descriptor depends on but the weights.

    Attributes
    ----------
    species
        Of each atom, as an index in the list of the model, shape (N,).
    I, J
        Atoms of each ordered pair of neighbours, shapes (pair,).
    d_J
        Generalised coordinates of J seen from I, shape (pair, 4), in 1/angstrom and dimensionless
        directions times it.
    """

    species: Tensor
    I: Tensor
    J: Tensor
    d_J: Tensor

    @classmethod
    def join(cls, parts: Sequence[Neighbourhood]) -> Neighbourhood:
        """Several configurations as one, whose atoms are numbered through."""
        first = np.cumsum([0, *(len(p.species) for p in parts[:-1])]).tolist()
        shifted = [(p.species, p.I + k, p.J + k, p.d_J) for p, k in zip(parts, first, strict=True)]
        return cls(*(torch.cat(column) for column in zip(*shifted, strict=True)))


class PointsInReach:
    """Pairs of points and atoms, images included, that are closer than a cutoff.

    Parameters
    ----------
    atoms
        The configuration.
    cutoff
        In angstrom; of any size beside the cell.
    """

    def __init__(self, atoms: Atoms, cutoff: float) -> None:
        self.cutoff, self.cell, self.periodic = cutoff, atoms.cell, atoms.periodic
        self.atom, positions = np.arange(len(atoms.numbers)), atoms.positions
        if self.periodic:
            self.inverse = np.linalg.inv(atoms.cell)
            margin = cutoff * np.linalg.norm(self.inverse, axis=0)
            wrapped = positions @ self.inverse % 1.0
            reach = np.ceil(margin).astype(int)
            shifts = np.array(list(np.ndindex(*(2 * reach + 1)))) - reach
            images = (wrapped[:, None] + shifts).reshape(-1, 3)
            kept = ((images >= -margin) & (images <= 1 + margin)).all(axis=1)
            self.atom = np.repeat(self.atom, len(shifts))[kept]
            positions = images[kept] @ atoms.cell
        self.tree = cKDTree(positions)

    def pairs(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points (P, 3) with the atoms in reach; a point comes once for each image.

        Returns indices of points and of atoms (pair,), and the vectors r - R_I (pair, 3).
        """
        if self.periodic:
            points = (points @ self.inverse % 1.0) @ self.cell
        found = cKDTree(points).sparse_distance_matrix(
            self.tree, self.cutoff, output_type="ndarray"
        )
        point, image = found["i"], found["j"]
        return point, self.atom[image], points[point] - self.tree.data[image]


class DeepDensity(nn.Module):
    """The map; see the module's docstring.

    Parameters
    ----------
    species
        Atomic numbers.
    cutoff
        R_c, angstrom; the paper has 4 for molecules, 3.5 for water, 6 for aluminium.
    pair_nodes
        Layers of g; the last is M. The paper has (5, 10, 20), for water (5, 10, 20, 40).
    nodes, layers
        Of the fitting networks; the paper has 50 and 3, for water 50 and 5.
    delta
        Of eq. 16, angstrom; the paper gives none.
    nearest
        Smallest distance of two species in training, angstrom, by "1-8".

    Raises
    ------
    ShapeError
        No species, one twice, or a cutoff that is not positive.
    WindowError
        An atom is of a species that was not trained on.
    """

    def __init__(
        self,
        species: Sequence[int],
        cutoff: float = 4.0,
        pair_nodes: Sequence[int] = (5, 10, 20),
        nodes: int = 50,
        layers: int = 3,
        delta: float = 1.0,
        nearest: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.species, self.cutoff = [int(z) for z in species], float(cutoff)
        self.delta, self.nearest, self.M = float(delta), dict(nearest or {}), int(pair_nodes[-1])
        if not self.species or len(set(self.species)) < len(self.species) or not cutoff > 0:
            raise ShapeError(
                f"species {self.species} and cutoff {cutoff}: give at least one species, none "
                "twice, and a positive cutoff"
            )
        S, pairs = len(self.species), self.M * (self.M + 1) // 2
        for name, start in _START.items():
            self.register_parameter(name, nn.Parameter(torch.full((S,), start)))
        self.g = nn.ModuleList(
            nn.ModuleList(dense(1, pair_nodes) for _ in range(S + 1)) for _ in range(S)
        )
        self.fitting = nn.ModuleList(_FittingNetworks(pairs, nodes, layers) for _ in range(S))
        upper = torch.triu_indices(self.M, self.M)
        self.register_buffer("upper", upper[0] * self.M + upper[1], persistent=False)
        self.register_buffer("phi_mean", torch.zeros(S, S + 1))
        self.register_buffer("phi_scale", torch.ones(S, S + 1))
        self.register_buffer("D_mean", torch.zeros(S, pairs))
        self.register_buffer("D_scale", torch.ones(S, pairs))

    def neighbourhood(self, atoms: Atoms) -> Neighbourhood:
        """What of the atoms the descriptor depends on."""
        strange = sorted(set(atoms.numbers.tolist()) - set(self.species))
        if strange:
            raise WindowError(
                f"atomic numbers {strange}, this map was trained on {self.species}; train one on "
                "densities of these elements"
            )
        index = np.array([self.species.index(z) for z in atoms.numbers.tolist()])
        i, j, shift = neighbour_pairs(atoms.positions, atoms.wide_cell, self.cutoff, True)
        R_JI = atoms.positions[j] - atoms.positions[i] + shift @ atoms.wide_cell
        place = self.A.device
        of_pairs = (torch.from_numpy(x).to(place) for x in (index, i, j))
        return Neighbourhood(*of_pairs, self.coordinates(self.as_tensor(R_JI)))

    def as_tensor(self, values: np.ndarray) -> Tensor:
        """An array on the device and in the precision of the weights."""
        return torch.from_numpy(values).to(self.A)

    def coordinates(self, vectors: Tensor) -> Tensor:
        """Generalised coordinates d (eq. 17) of vectors (P, 3), shape (P, 4)."""
        R = distances(vectors)[:, None]
        phi = cosine_taper(R, 0.75 * self.cutoff, self.cutoff) / (R + self.delta)
        return torch.cat([phi, phi / R.clamp(min=1e-9) * vectors], dim=1)

    def atomic(self, seen: Neighbourhood) -> Tensor:
        """Sum over the neighbours of each atom, the atomic part of h, shape (N, 4, M)."""
        h = self.A.new_zeros(len(seen.species), 4, self.M)
        for s in range(len(self.species)):
            for t in range(len(self.species)):
                chosen = (seen.species[seen.I] == s) & (seen.species[seen.J] == t)
                d = seen.d_J[chosen]
                terms = d[:, :, None] * self._g(s, t + 1, d)[:, None, :]
                h = h.index_add(0, seen.I[chosen], terms)
        return h

    def _g(self, s: int, t: int, d: Tensor) -> Tensor:
        """g of a pair of species, of which t = 0 is the electron; shape (P, M)."""
        return self.g[s][t]((d[:, :1] - self.phi_mean[s, t]) * self.phi_scale[s, t])

    def descriptor(self, s: int, h_I: Tensor, d_0: Tensor) -> Tensor:
        """Upper triangle of D, (P, M (M + 1) / 2), for points seen from atoms of one species.

        ``h_I`` are the atomic parts (P, 4, M) of the atoms, ``d_0`` the electrons (P, 4).
        """
        h = h_I + d_0[:, :, None] * self._g(s, 0, d_0)[:, None, :]
        return (h.mT @ h).flatten(1).index_select(1, self.upper)

    def local(self, h: Tensor, species: Tensor, atom: Tensor, vectors: Tensor) -> Tensor:
        """rho_I (P,) at vectors from some atoms (P, 3), given the atomic parts h of all."""
        d_0, R = self.coordinates(vectors), distances(vectors)
        fitted = R.new_zeros(2, len(R))
        for s in range(len(self.species)):
            rows = torch.nonzero(species[atom] == s).flatten()
            D = self.descriptor(s, h[atom[rows]], d_0[rows])
            of_species = self.fitting[s](D, self.D_mean[s], self.D_scale[s])
            fitted = fitted.index_copy(1, rows, of_species)
        return self.ansatz(species[atom], R, *fitted)

    def ansatz(
        self, s: Tensor, R: Tensor, N_I: Tensor | float = 0.0, E_I: Tensor | float = 0.0
    ) -> Tensor:
        """Eqs. 11 and 12 for species s at distances R (P,), tapered to zero; shape (P,)."""
        linear = N_I + self.A[s] * R + self.B[s]
        u = cosine_taper(R, 0.75 * self.cutoff, self.cutoff)
        return linear * torch.exp(self.C[s] * (R - self.D[s]) ** 2 + E_I) * u

    def values(self, atoms: Atoms, points: np.ndarray) -> np.ndarray:
        """Density (P,) at any points (P, 3)."""
        return self._values(atoms, len(points), lambda start, stop: points[start:stop])

    def density(self, atoms: Atoms, grid: tuple[int, ...]) -> np.ndarray:
        """Density on a grid, shape (X, Y, Z)."""

        def points(start: int, stop: int) -> np.ndarray:
            index = np.unravel_index(np.arange(start, stop), grid)
            return np.stack(index, axis=1) / np.array(grid) @ atoms.cell

        return self._values(atoms, int(np.prod(grid)), points).reshape(grid)

    @torch.no_grad()
    def _values(
        self, atoms: Atoms, count: int, points: Callable[[int, int], np.ndarray]
    ) -> np.ndarray:
        """Density at points that are made some at a time: only the result is as long as they."""
        seen, reach = self.neighbourhood(atoms), PointsInReach(atoms, self.cutoff)
        h, out = self.atomic(seen), np.zeros(count)
        size = _PAIRS if h.device.type == "cpu" else 32 * _PAIRS  # a cache, or a device, full
        for start in range(0, count, _POINTS):
            part = out[start : start + _POINTS]  # a view
            point, atom, vectors = reach.pairs(points(start, start + len(part)))
            for k in range(0, len(point), size):
                rows = slice(k, k + size)
                index = torch.from_numpy(atom[rows]).to(h.device)
                rho_I = self.local(h, seen.species, index, self.as_tensor(vectors[rows]))
                np.add.at(part, point[rows], rho_I.double().cpu().numpy())
        return out

    @torch.no_grad()
    def standardise(self, seen: Neighbourhood, atom: Tensor, vectors: Tensor) -> None:
        """Take centres and scales of what the networks see from some surroundings and points."""
        d_0 = self.coordinates(vectors)
        of_point = seen.species[atom]
        for s in range(len(self.species)):
            mine = seen.species[seen.I] == s
            phis = [d_0[of_point == s, 0]]
            for t in range(len(self.species)):
                phis.append(seen.d_J[mine & (seen.species[seen.J] == t), 0])
            for t, phi in enumerate(phis):
                if len(phi) > 1:
                    self.phi_mean[s, t] = phi.mean()
                    self.phi_scale[s, t] = 1 / phi.std().clamp(min=0.02)
        h = self.atomic(seen)
        for s in range(len(self.species)):
            D = self.descriptor(s, h[atom[of_point == s]], d_0[of_point == s])
            spread = D.std(dim=0)
            self.D_mean[s] = D.mean(dim=0)
            self.D_scale[s] = 1 / spread.clamp(min=0.01 * float(spread.max()))


def distances(vectors: Tensor) -> Tensor:
    """Lengths of vectors (P, 3), shape (P,)."""
    return vectors.square().sum(dim=1).sqrt()


class _FittingNetworks(nn.Module):
    """N and E of one species side by side: h <- a h + tanh(W h + b) with trainable scalars a.

    ``forward``: descriptor (P, inputs), its centre and scale (inputs,) -> N, E, shape (2, P).
    """

    def __init__(self, inputs: int, nodes: int, layers: int, gain: float = 0.1) -> None:
        super().__init__()
        self.nodes, self.gain = nodes, gain
        self.first = nn.Linear(inputs, 2 * nodes)
        nn.init.normal_(self.first.weight, std=(2 / (inputs + nodes)) ** 0.5)
        shape = (layers - 1, 2, nodes, nodes)
        self.weight = nn.Parameter(torch.randn(shape) * nodes**-0.5)
        self.bias = nn.Parameter(torch.zeros(layers - 1, 2, 1, nodes))
        self.skip = nn.Parameter(torch.ones(layers - 1, 2, 1, 1))
        # start at the ansatz that has been fitted
        self.out = nn.Parameter(1e-3 * torch.randn(2, nodes, 1) * nodes**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(2, 1))

    def forward(self, D: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        weight = self.first.weight * scale  # of D as it comes: P is larger than the layer
        x = functional.linear(D, weight, self.first.bias - weight @ mean)
        h = torch.tanh(x).view(len(D), 2, self.nodes).transpose(0, 1)
        for a, weight, bias in zip(self.skip, self.weight, self.bias, strict=True):
            h = a * h + torch.tanh(torch.baddbmm(bias, h, weight))
        return self.gain * ((h @ self.out)[..., 0] + self.out_bias)
