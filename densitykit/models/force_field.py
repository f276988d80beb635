r"""Forces between nuclei that depend on where the nuclei are, and on nothing else.

Electrons in their ground state leave the nuclei a potential energy of their own. It is modelled
as a sum over atoms, linear in invariants of their surroundings (the power spectrum of Bartok et
al. 2013, in the Cartesian moments of Shapeev 2016):

.. math:: E = \sum_i \Big[\sum_p c_p \sum_j g_p(r_{ij})
   + \sum_{l,\,n \le n'} c_{lnn'} \sum_{|m| = l} \tbinom{l}{m} A_{inm} A_{in'm}\Big], \qquad
   A_{inm} = \sum_j g_n(r_{ij})\, \hat x_{ij}^{m_x} \hat y_{ij}^{m_y} \hat z_{ij}^{m_z} .

The binomial weights make :math:`\sum_m \binom{l}{m} u^m v^m = (u \cdot v)^l`: the second term sees
pairs of neighbours by their distances and the angle between them. Radial functions are Chebyshev
polynomials times a squared cosine cutoff. Forces are the exact gradient, so energy is conserved;
they are linear in c, which one least-squares solution finds. Cost grows with the number of atoms.
Lengths are in angstrom, energies in eV, times in fs, masses in dalton; one kind of atoms.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, product

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from densitykit.errors import ShapeError, TrajectoryError

__all__ = ["ACCELERATION", "LinearForceField", "fit_force_field"]

#: eV / (dalton angstrom) in angstrom/fs**2: 1.602176634e-19 J / 1.66053907e-27 kg * 1e-10
ACCELERATION = 1.602176634e-19 / 1.66053907e-27 * 1e-10

Edges = tuple[Tensor, Tensor, Tensor]


class LinearForceField(nn.Module):
    """Energy and forces of periodic nuclei, linear in the invariants of their surroundings.

    Arguments:
        cutoff: farthest neighbour that counts, in angstrom; images of the same nucleus, too.
        closest: distance in angstrom at which the Chebyshev polynomials begin; nuclei seldom
            come closer.
        radial: number of radial functions in the power spectrum.
        degree: largest degree l of the power spectrum.
        pair: number of radial functions in the sum over pairs, at least ``radial``.
    """

    def __init__(
        self,
        cutoff: float = 7.0,
        closest: float = 1.6,
        radial: int = 6,
        degree: int = 3,
        pair: int = 12,
    ) -> None:
        super().__init__()
        if not 0 < closest < cutoff or not 1 <= radial <= pair or degree < 0:
            raise ShapeError(
                f"no force field with cutoff {cutoff}, closest {closest}, radial {radial}, pair "
                f"{pair}, degree {degree}; give 0 < closest < cutoff, 1 <= radial <= pair and "
                "degree >= 0"
            )
        self.cutoff, self.closest, self.pair, self.radial = cutoff, closest, pair, radial
        powers = [m for m in product(range(degree + 1), repeat=3) if sum(m) <= degree]
        powers.sort(key=sum)
        binomial = [math.factorial(sum(m)) / math.prod(map(math.factorial, m)) for m in powers]
        couples = list(combinations_with_replacement(range(radial), 2))
        # where the coefficient of (n, n') of degree l stands, shape (l, n, n')
        place = torch.zeros(degree + 1, radial, radial, dtype=torch.long)
        for k, (n, n_2) in enumerate(couples):
            place[:, n, n_2] = place[:, n_2, n] = k + len(couples) * torch.arange(degree + 1)
        self.register_buffer("powers", torch.tensor(powers), persistent=False)
        self.register_buffer("binomial", torch.tensor(binomial).double(), persistent=False)
        self.register_buffer("place", place + pair, persistent=False)
        sign = [(-1.0) ** sum(m) for m in powers]  # of a monomial seen from the other end
        self.register_buffer("parity", torch.tensor(sign).double(), persistent=False)
        count = pair + (degree + 1) * len(couples)
        self.register_buffer("coefficients", torch.zeros(count, dtype=torch.float64))

    def energy(self, positions: Tensor, cell: Tensor) -> Tensor:
        """Potential energy in eV, shape (B,), up to a constant.

        Arguments:
            positions: shape (B, N, 3) in angstrom, wrapped or not.
            cell: lattice vectors as rows, shape (3, 3), in angstrom.
        """
        i, j, v = self._edges(positions, cell)
        r = v.norm(dim=1)
        (g, _), (y, _) = self._radial(r), self._angular(v / r[:, None])
        moments = self._moments(i, j, g, y, positions)
        power = (self._coupled(self.coefficients, moments) * moments).sum(dim=(1, 2)) / 2
        pairs = 2 * (g @ self.coefficients[: self.pair])  # seen from both ends
        return power.index_add(0, i, pairs).reshape(positions.shape[:2]).sum(dim=1)

    def forces(
        self, positions: Tensor, cell: Tensor, coefficients: Tensor | None = None
    ) -> Tensor:
        """-dE/dR in eV/angstrom, shape (B, N, 3); arguments as in :meth:`energy`.

        Arguments:
            coefficients: other ones than the fitted, shape (feature,); forces are linear in them.
        """
        c = self.coefficients if coefficients is None else coefficients
        i, j, v = self._edges(positions, cell)
        r = v.norm(dim=1)
        u = v / r[:, None]
        (g, dg), (y, dy) = self._radial(r), self._angular(u)
        slope = self._coupled(c, self._moments(i, j, g, y, positions))
        slope = slope[i] + self.parity * slope[j]  # dE/dA at both ends, (edge, n, m)
        along = torch.einsum("enm,en->em", slope, dg[:, : self.radial])
        across = torch.einsum("enm,en->em", slope, g[:, : self.radial])
        # y is homogeneous of degree l in u, so u . dy/du = l y
        turning = torch.einsum("em,cem->ec", across, dy)
        l_y = (across * y) @ self.powers.sum(dim=1).double()
        pull = (along * y).sum(dim=1) + dg @ (2 * c[: self.pair]) - l_y / r
        push = pull[:, None] * u + turning / r[:, None]
        flat = torch.zeros_like(positions).reshape(-1, 3)
        return flat.index_add(0, i, push).index_add(0, j, -push).reshape(positions.shape)

    def _edges(self, positions: Tensor, cell: Tensor) -> Edges:
        """Pairs of neighbours within the cutoff, each once, and the vectors from i to j."""
        if positions.ndim != 3 or positions.shape[-1] != 3 or cell.shape != (3, 3):
            raise ShapeError(
                f"forces need positions (B, N, 3) and a cell (3, 3), not {tuple(positions.shape)} "
                f"and {tuple(cell.shape)}"
            )
        if positions.dtype != torch.float64 or cell.dtype != torch.float64:
            raise ShapeError("forces are computed in double precision; give float64 tensors")
        b, n, _ = positions.shape
        inverse = torch.linalg.inv(cell)
        s = positions @ inverse
        first, second = torch.triu_indices(n, n, device=positions.device)
        d = s[:, second] - s[:, first]
        d = (d - d.round()) @ cell
        # image c can matter if the cutoff reaches beyond half the height of the cell along c
        reach = [int(self.cutoff * h + 0.5) for h in inverse.norm(dim=0).tolist()]
        images = torch.tensor(list(product(*(range(-k, k + 1) for k in reach)))).to(cell) @ cell
        vectors = d[..., None, :] + images
        square = vectors.square().sum(dim=-1)
        near = (square < self.cutoff**2) & (square > 1e-8)
        # of a nucleus with itself, image c and image -c are the same pair
        near[:, first == second, len(images) // 2 :] = False
        member, pair, image = near.nonzero(as_tuple=True)
        i, j = member * n + first[pair], member * n + second[pair]
        return i, j, vectors[member, pair, image]

    def _radial(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """g_n(r) and its derivative, each (edge, pair)."""
        x = 2 * (r - self.closest) / (self.cutoff - self.closest) - 1
        t, dt = [torch.ones_like(x), x], [torch.zeros_like(x), torch.ones_like(x)]
        for _ in range(2, self.pair):
            t.append(2 * x * t[-1] - t[-2])
            dt.append(2 * t[-2] + 2 * x * dt[-1] - dt[-2])
        t, dt = torch.stack(t[: self.pair], dim=1), torch.stack(dt[: self.pair], dim=1)
        angle = math.pi * r[:, None] / self.cutoff
        cut = ((1 + angle.cos()) / 2) ** 2
        d_cut = -math.pi / self.cutoff * (1 + angle.cos()) / 2 * angle.sin()
        return t * cut, dt * cut * 2 / (self.cutoff - self.closest) + t * d_cut

    def _angular(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Monomials of the direction, (edge, m), and their derivatives, (3, edge, m)."""
        degree = int(self.powers.max())
        powers = torch.stack([u**k for k in range(degree + 1)])  # (degree, edge, 3)
        factors = [powers[self.powers[:, c], :, c].T for c in range(3)]
        lower = [
            self.powers[:, c] * powers[(self.powers[:, c] - 1).clamp(min=0), :, c].T
            for c in range(3)
        ]
        x, y, z = factors
        return x * y * z, torch.stack([lower[0] * y * z, x * lower[1] * z, x * y * lower[2]])

    def _moments(self, i: Tensor, j: Tensor, g: Tensor, y: Tensor, positions: Tensor) -> Tensor:
        """A_inm of all nuclei, shape (B N, n, m)."""
        terms = g[:, : self.radial, None] * y[:, None]
        nuclei = positions.shape[0] * positions.shape[1]
        moments = terms.new_zeros(nuclei, *terms.shape[1:]).index_add(0, i, terms)
        return moments.index_add(0, j, self.parity * terms)

    def _coupled(self, c: Tensor, moments: Tensor) -> Tensor:
        """dE/dA of the power spectrum, shape (B N, n, m)."""
        # c_lnn' stands for n <= n' only: halves of it on both sides, whole on the diagonal
        half = 1 + torch.eye(self.radial, dtype=moments.dtype, device=moments.device)
        matrix = (c[self.place] * half)[self.powers.sum(dim=1)]
        return torch.einsum("mnk,ikm,m->inm", matrix, moments, self.binomial)


def fit_force_field(
    run: xr.Dataset,
    every: int = 8,
    ridge: float = 1e-9,
    progress: bool = True,
    **arguments: float,
) -> LinearForceField:
    """Least-squares coefficients for the forces of an ab-initio run.

    Arguments:
        run: trajectory with `positions`, `forces` and `cell`, see `densitykit.trajectory`.
        every: take every so many frames; neighbouring ones tell the same.
        ridge: penalty on coefficients of features scaled to unit variance, relative to the
            number of force components.
        progress: show a progress bar.
        **arguments: of :class:`LinearForceField`.

    Raises:
        TrajectoryError: if the run has no positions or forces, or they are not finite.
        ShapeError: if an argument makes no sense.
    """
    source = run.encoding.get("source", "trajectory")
    for name in ("positions", "forces"):
        if name not in run or not np.isfinite(run[name].values).all():
            raise TrajectoryError(
                f"{source}: variable '{name}' is missing or not finite; a force field learns from "
                "an ab-initio run that has it"
            )
    if every < 1:
        raise ShapeError(f"every={every} takes no frames; give 1 or more")
    model = LinearForceField(**arguments)
    cell = torch.from_numpy(np.array(run["cell"].values, dtype=float))
    positions = torch.from_numpy(run["positions"].values[::every].astype(float))
    forces = torch.from_numpy(run["forces"].values[::every].astype(float))
    size = len(model.coefficients)
    moment, target = torch.zeros(size, size).double(), torch.zeros(size).double()
    # a function linear in c has its columns as its derivative
    design = torch.func.jacfwd(lambda c, x: model.forces(x, cell, c).flatten())
    bar = tqdm(positions, "forces", unit="frame", delay=2, disable=not progress)
    for x, f in zip(bar, forces, strict=True):
        columns = design(model.coefficients, x[None])
        moment += columns.T @ columns
        target += columns.T @ f.flatten()
    # features that never act have no scale; the ridge keeps their coefficients at zero
    scale = moment.diagonal().sqrt().clamp(min=1e-12) / math.sqrt(forces.numel())
    scaled = moment / torch.outer(scale, scale) / forces.numel() + ridge * torch.eye(size)
    model.coefficients.copy_(torch.linalg.solve(scaled, target / scale / forces.numel()) / scale)
    return model
