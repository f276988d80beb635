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
Distances are taken in double precision, all else in that of the module: ``field.float()`` is
faster where many members move at once, and changes forces by a millionth of an eV/angstrom.
Lengths are in angstrom, energies in eV, times in fs, masses in dalton; one kind of atoms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, product

import numpy as np
import torch
import xarray as xr
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor, nn
from tqdm.auto import tqdm

from densitykit.errors import ShapeError, TrajectoryError

__all__ = ["LinearForceField", "as_double", "fit_force_field"]


#: an error of 1 eV an atom counts as much as this many eV/angstrom in a component of a force
ENERGY_WEIGHT = 30.0

Edges = tuple[Tensor, Tensor, Tensor]


class LinearForceField(nn.Module):
    """Energy and forces of periodic nuclei, linear in the invariants of their surroundings.

    Parameters
    ----------
    cutoff
        Farthest neighbour that counts, in angstrom; images of the same nucleus, too.
    closest
        Distance in angstrom at which the Chebyshev polynomials begin; nuclei seldom
        come closer.
    radial
        Number of radial functions in the power spectrum.
    degree
        Largest degree l of the power spectrum.
    pair
        Number of radial functions in the sum over pairs, at least ``radial``.
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
        constants = {
            "powers": torch.tensor(powers),
            "binomial": torch.tensor(binomial).double(),
            "place": place[[sum(m) for m in powers]] + pair,
            "parity": torch.tensor([(-1.0) ** sum(m) for m in powers]).double(),  # of x -> -x
            "slopes": _slopes(powers),
            "sums": torch.eye(4).double().repeat_interleave(radial, dim=0),
            "chebyshev": _chebyshev(pair, 2 / (cutoff - closest)),
        }
        for name, values in constants.items():
            self.register_buffer(name, values, persistent=False)
        count = pair + (degree + 1) * len(couples)
        self.register_buffer("coefficients", torch.zeros(count, dtype=torch.float64))

    def energy(
        self, positions: Tensor, cell: Tensor, coefficients: Tensor | None = None
    ) -> Tensor:
        """Potential energy in eV, shape (B,), up to a constant.

        Parameters
        ----------
        positions
            Shape (B, N, 3) in angstrom, wrapped or not.
        cell
            Lattice vectors as rows, shape (3, 3), in angstrom.
        coefficients
            Other ones than the fitted, shape (feature,); it is linear in them.
        """
        c = self.coefficients if coefficients is None else coefficients
        i, j, v = self._edges(positions, cell)
        v = v.to(self.coefficients)
        r = v.norm(dim=1)
        g, y = self._radial(r)[0], self._angular(v / r[:, None])
        nuclei = positions.shape[0] * positions.shape[1]
        near = _neighbours(i, j, nuclei)
        A = self._moments(_both(g[:, : self.radial])[near], _both(y, self.parity)[near])
        power = (self._coupled(c, A) * A).sum(dim=(1, 2)) / 2
        pairs = 2 * (g @ c[: self.pair])  # seen from both ends
        return power.index_add(0, i, pairs).reshape(positions.shape[:2]).sum(dim=1).to(positions)

    def pressure(self, positions: Tensor, cell: Tensor) -> Tensor:
        """-dE/dV of nuclei at rest in eV/angstrom**3, shape (B,); arguments as in :meth:`energy`.

        Moving nuclei add N k_B T / V. 1 eV/angstrom**3 is 160.2 GPa.
        """
        h = 1e-4  # of the edges, either way
        work = self.energy((1 - h) * positions, (1 - h) * cell)
        work = work - self.energy((1 + h) * positions, (1 + h) * cell)
        return work / (((1 + h) ** 3 - (1 - h) ** 3) * torch.linalg.det(cell).abs())

    def forces(
        self, positions: Tensor, cell: Tensor, coefficients: Tensor | None = None
    ) -> Tensor:
        """-dE/dR in eV/angstrom, shape (B, N, 3); arguments as in :meth:`energy`.

        Parameters
        ----------
        coefficients
            Other ones than the fitted, shape (feature,); forces are linear in them.
        """
        c = self.coefficients if coefficients is None else coefficients
        i, j, v = self._edges(positions, cell)
        v = v.to(self.coefficients)
        r = v.norm(dim=1, keepdim=True)
        u = v / r
        (g, dg), y = self._radial(r[:, 0]), self._angular(u)
        nuclei, n = positions.shape[0] * positions.shape[1], self.radial
        near = _neighbours(i, j, nuclei)
        # all that is known of an edge in one row, so that one look-up brings it to its nuclei
        known = torch.cat([g[:, :n], dg[:, :n], 1 / r, y, u], dim=1)
        signs = known.new_ones(2 * n + 1), self.parity, -known.new_ones(3)
        sizes = [n, n, 1, y.shape[1], 3]
        g, dg_n, near_1_r, y, u = _both(known, torch.cat(signs))[near].split(sizes, dim=2)
        # dE/dA, on the monomials and on their gradient: (nucleus, n, 4, m)
        slope = (self._coupled(c, self._moments(g, y)) @ self.slopes).unflatten(2, (4, -1))
        along, turning = self._pulled(slope, y, g, dg_n)
        turning = turning * near_1_r
        pull = along + _both(dg @ c[: self.pair])[near] - (turning * u).sum(dim=2)
        push = pull[..., None] * u + turning
        others = torch.cat([j, i, j.new_zeros(1)])[near].flatten()
        flat = push.sum(dim=1).index_add(0, others, -push.flatten(0, 1))
        return flat.reshape(positions.shape).to(positions)

    def _pulled(self, slope: Tensor, y: Tensor, g: Tensor, dg: Tensor) -> tuple[Tensor, Tensor]:
        """dE/dr of the power spectrum at fixed direction, (nucleus, k), and dE/du, (*, 3)."""
        b = y @ slope.permute(0, 3, 2, 1).flatten(2)
        pulls = (b * torch.cat([dg, g, g, g], dim=2)) @ self.sums
        return pulls[..., 0], pulls[..., 1:]

    def _edges(self, positions: Tensor, cell: Tensor) -> Edges:
        """Pairs of neighbours within the cutoff, each once, and the vectors from i to j."""
        if positions.ndim != 3 or positions.shape[-1] != 3 or cell.shape != (3, 3):
            raise ShapeError(
                f"forces need positions (B, N, 3) and a cell (3, 3), not {tuple(positions.shape)} "
                f"and {tuple(cell.shape)}"
            )
        if positions.dtype != torch.float64 or cell.dtype != torch.float64:
            raise ShapeError("places are in double precision; give float64 tensors")
        b, n, _ = positions.shape
        inverse = np.linalg.inv(cell.tolist())  # of 3 x 3, ten times faster than in torch
        s = positions @ torch.from_numpy(inverse).to(cell)
        first, second = torch.triu_indices(n, n, device=positions.device)
        d = s[:, second] - s[:, first]
        d = d - d.round()
        # mirrored to 0 <= d <= 1/2, image c of it is within reach = cutoff / height along c if
        # -reach <= d + c <= reach
        images = [
            range(-math.floor(reach + 0.5), math.floor(reach) + 1)
            for reach in self.cutoff * np.linalg.norm(inverse, axis=0)
        ]
        images = list(product(*images))
        mirror = torch.where(d < 0, -1.0, 1.0)
        shifts = mirror[..., None, :] * torch.tensor(images).to(cell)
        vectors = (d[..., None, :] + shifts) @ cell
        square = vectors.square().sum(dim=-1)
        near = square < self.cutoff**2
        # of a nucleus with itself, image c and image -c are the same pair, and 0 is none
        near[:, first == second, : images.index((0, 0, 0)) + 1] = False
        member, pair, image = near.nonzero(as_tuple=True)
        i, j = member * n + first[pair], member * n + second[pair]
        return i, j, vectors[member, pair, image]

    def _radial(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """g_n(r) and its derivative, each (edge, pair)."""
        x = 2 * (r - self.closest) / (self.cutoff - self.closest) - 1
        powers = x[:, None].expand(-1, self.pair - 1).cumprod(dim=1)
        t, dt = (torch.cat([torch.ones_like(r)[:, None], powers], 1) @ self.chebyshev).chunk(2, 1)
        angle = math.pi / self.cutoff * r[:, None]
        cosine = (1 + angle.cos()) / 2
        d_cut = -math.pi / self.cutoff * cosine * angle.sin()
        return t * cosine**2, dt * cosine**2 + t * d_cut

    def _angular(self, u: Tensor) -> Tensor:
        """Monomials of the direction, (edge, m)."""
        u, degree = u.T.contiguous(), int(self.powers[-1].sum())  # long rows are faster
        powers = torch.cat([torch.ones_like(u)[None], u.expand(degree, -1, -1)]).cumprod(dim=0)
        x, y, z = (powers[self.powers[:, c], c] for c in range(3))
        return (x * y * z).T

    def _moments(self, g: Tensor, y: Tensor) -> Tensor:
        """A_inm of all nuclei, shape (nucleus, n, m)."""
        return g.transpose(1, 2) @ y

    def _coupled(self, c: Tensor, moments: Tensor) -> Tensor:
        """dE/dA of the power spectrum, shape (nucleus, n, m)."""
        # c_lnn' stands for n <= n' only: halves of it on both sides, whole on the diagonal
        half = 1 + torch.eye(self.radial, dtype=moments.dtype, device=moments.device)
        matrix = c[self.place] * half * self.binomial[:, None, None]
        return torch.einsum("mnk,ikm->inm", matrix, moments)


def _neighbours(i: Tensor, j: Tensor, nuclei: int) -> Tensor:
    """Where the neighbours of each nucleus stand in `_both` of the edges, (nucleus, k).

    Short rows are filled up with the last row of `_both`, which is zero.
    """
    ends = torch.cat([i, j])
    order = ends.argsort(stable=True)
    counts = torch.bincount(ends, minlength=nuclei)
    rank = torch.arange(len(ends), device=ends.device) - (counts.cumsum(0) - counts)[ends[order]]
    widest = int(counts.max()) if len(ends) else 0
    near = ends.new_full((nuclei, widest), len(ends))
    near[ends[order], rank] = order
    return near


def _both(rows: Tensor, sign: Tensor | float = 1.0) -> Tensor:
    """Rows of edges i -> j, the same times a sign for j -> i, and a row of zeros."""
    return torch.cat([rows, sign * rows, torch.zeros_like(rows[:1])])


def _chebyshev(count: int, scale: float) -> Tensor:
    """Chebyshev polynomials, and scale times their derivatives, as sums of powers of x.

    Shape (count, 2 count): 1, x, x**2, ... -> T_0, T_1, ..., scale T_0', ...
    """
    matrix = np.zeros((count, 2 * count))
    for n in range(count):
        T = Chebyshev.basis(n).convert(kind=Polynomial)
        matrix[: n + 1, n] = T.coef
        matrix[: max(n, 1), count + n] = scale * T.deriv().coef
    return torch.from_numpy(matrix)


def _slopes(powers: list[tuple[int, ...]]) -> Tensor:
    """Matrices that make s y and its derivatives by u_x, u_y, u_z from any s, shape (m, 4 m).

    The derivative of a monomial is one of a degree less.
    """
    size = len(powers)
    slopes = torch.zeros(size, 4, size, dtype=torch.float64)
    for k, m in enumerate(powers):
        slopes[k, 0, k] = 1
        for c in range(3):
            if m[c]:
                lower = tuple(p - (axis == c) for axis, p in enumerate(m))
                slopes[k, 1 + c, powers.index(lower)] = m[c]
    return slopes.flatten(1)


def as_double(values: xr.DataArray) -> Tensor:
    """Places, forces, cells of a trajectory, as the force field takes them; a copy, float64."""
    return torch.from_numpy(np.array(values.values, dtype=float))


def fit_force_field(
    run: xr.Dataset,
    every: int = 8,
    ridge: float = 1e-9,
    progress: bool = True,
    volumes: Sequence[xr.Dataset] = (),
    **arguments: float,
) -> LinearForceField:
    """Least-squares coefficients for the forces of an ab-initio run, and for its pressure.

    Forces at one volume do not tell the pressure. Other volumes do: their forces count like those
    of the run, and so do energies an atom, of all up to a common constant.

    Parameters
    ----------
    run
        Trajectory with `positions`, `forces` and `cell`, see `densitykit.io.writer`.
    every
        Take every so many frames; neighbouring ones tell the same.
    ridge
        Penalty on coefficients of features scaled to unit variance, relative to the
        number of force components.
    progress
        Show a progress bar.
    volumes
        Trajectories in other cells, whose frames all count; with `energy`, as the run.
    **arguments
        Of :class:`LinearForceField`.

    Raises
    ------
    TrajectoryError
        If positions, forces or, where needed, energies are missing or not finite.
    ShapeError
        If an argument makes no sense.
    """
    needed = ["positions", "forces"] + (["energy"] if volumes else [])
    for part in (run, *volumes):
        _check_variables(part, needed)
    if every < 1:
        raise ShapeError(f"every={every} takes no frames; give 1 or more")
    model = LinearForceField(**arguments)
    parts = [run.isel(time=slice(None, None, every)), *volumes]
    frames = [frame for part in parts for frame in _frames(part)]
    moment, target, size = 0, 0, sum(forces.numel() for _, forces, _ in frames)
    # a function linear in c has its columns as its derivative
    design = torch.func.jacfwd(lambda c, x, cell: model.forces(x, cell, c).flatten())
    for x, forces, cell in tqdm(frames, "forces", unit="frame", delay=2, disable=not progress):
        columns = design(model.coefficients, x, cell)
        moment, target = moment + columns.T @ columns, target + columns.T @ forces.flatten()
    if volumes:
        design = torch.func.jacfwd(lambda c, x, cell: model.energy(x, cell, c).sum() / x.shape[1])
        features = torch.stack([design(model.coefficients, x, cell) for x, _, cell in frames])
        energies = torch.cat([as_double(p["energy"]) / p.sizes["atom"] for p in parts])
        features, energies = features - features.mean(dim=0), energies - energies.mean()
        moment = moment + ENERGY_WEIGHT**2 * features.T @ features
        target = target + ENERGY_WEIGHT**2 * features.T @ energies
    # features that never act have no scale; the ridge keeps their coefficients at zero
    scale = moment.diagonal().sqrt().clamp(min=1e-12) / math.sqrt(size)
    scaled = moment / torch.outer(scale, scale) / size + ridge * torch.eye(len(scale))
    model.coefficients.copy_(torch.linalg.solve(scaled, target / scale / size) / scale)
    return model


def _check_variables(run: xr.Dataset, needed: Sequence[str]) -> None:
    source = run.encoding.get("source", "trajectory")
    for name in needed:
        if name not in run or not np.isfinite(run[name].values).all():
            raise TrajectoryError(
                f"{source}: variable '{name}' is missing or not finite; a force field learns from "
                "an ab-initio run that has it"
            )


def _frames(run: xr.Dataset) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Positions (1, N, 3), forces (N, 3) and cell (3, 3) of each frame."""
    cell = as_double(run["cell"])
    for x, forces in zip(as_double(run["positions"]), as_double(run["forces"]), strict=True):
        yield x[None], forces, cell
