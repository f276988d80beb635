r"""Forces between nuclei that depend on where the nuclei are, and on nothing else.

Electrons in their ground state leave the nuclei a potential energy of their own. It is modelled
as a sum over atoms, linear in invariants of their surroundings (the power spectrum of Bartok et
al. 2013, in the Cartesian moments of Shapeev 2016):

.. math:: E = \sum_i \Big[\sum_p \sum_j c^{s_i s_j}_p g_p(r_{ij})
   + \sum_{l,\,n \le n'} c^{s_i}_{lnn'} \sum_{|m| = l} \tbinom{l}{m} A_{inm} A_{in'm}\Big], \quad
   A_{inm} = \sum_j g_n(r_{ij})\, \hat x_{ij}^{m_x} \hat y_{ij}^{m_y} \hat z_{ij}^{m_z} .

:math:`s_i` is the species of atom i; each species of neighbours has its own channels n. The
binomial weights make :math:`\sum_m \binom{l}{m} u^m v^m = (u \cdot v)^l`: the second term sees
pairs of neighbours by their distances and the angle between them. Radial functions are Chebyshev
polynomials times a squared cosine cutoff. Forces are the exact gradient, so energy is conserved;
they are linear in c, which one least-squares solution finds. Cells are any, and neighbours all
images within the cutoff (`densitykit.neighbours`): the cost grows with the number of atoms.
Distances are taken in double precision, all else in that of the module: ``field.float()`` is
faster where many members move at once, and changes forces by a millionth of an eV/angstrom.
Lengths are in angstrom, energies in eV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement, product

import numpy as np
import torch
import xarray as xr
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor, nn

from densitykit.cells import single_cell
from densitykit.errors import ShapeError, TrajectoryError
from densitykit.io.progress import progress_bar
from densitykit.neighbours import neighbour_pairs

__all__ = [
    "LinearForceField",
    "as_double",
    "fit_force_field",
    "numbers_of",
    "species_in",
    "species_index",
]

#: an error of 1 eV an atom counts as much as this many eV/angstrom in a component of a force
ENERGY_WEIGHT = 30.0

Edges = tuple[Tensor, Tensor, Tensor]


def species_index(numbers: Tensor | None, species: Sequence[int], atoms: int) -> Tensor:
    """Where the atomic number of each atom stands among the species of a model, shape (N,).

    Parameters
    ----------
    numbers
        Shape (N,); None where the model has one species.
    species
        Atomic numbers that the model knows, each once.
    atoms
        N.

    Raises
    ------
    ShapeError
        If numbers are missing, too few, or not among the species.
    """
    if numbers is None and len(species) == 1:
        return torch.zeros(atoms, dtype=torch.long)
    if numbers is None or len(numbers) != atoms:
        raise ShapeError(
            f"{atoms} atoms and {'no' if numbers is None else len(numbers)} atomic numbers; a "
            f"model of the species {list(species)} needs one an atom"
        )
    match = numbers.cpu()[:, None] == torch.tensor(list(species))
    if not match.any(dim=1).all():
        raise ShapeError(
            f"atomic numbers {sorted(set(numbers.tolist()))} in the data, {list(species)} in the "
            "model; use a model of this material"
        )
    return match.long().argmax(dim=1)


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
    species
        Atomic numbers, each once; 0 is the one of a run that does not tell.

    Methods take `numbers`, the atomic numbers of the nuclei (N,); one species needs none.
    """

    def __init__(
        self,
        cutoff: float = 7.0,
        closest: float = 1.6,
        radial: int = 6,
        degree: int = 3,
        pair: int = 12,
        species: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        good = 0 < closest < cutoff and 1 <= radial <= pair and degree >= 0
        if not good or not 0 < len(species) == len(set(species)):
            raise ShapeError(
                f"no force field with cutoff {cutoff}, closest {closest}, radial {radial}, pair "
                f"{pair}, degree {degree}, species {list(species)}; give 0 < closest < cutoff, "
                "1 <= radial <= pair and degree >= 0, and each species once"
            )
        self.cutoff, self.closest, self.pair, self.radial = cutoff, closest, pair, radial
        self.species = tuple(species)
        size = len(self.species)
        self.channels = size * radial
        powers = [m for m in product(range(degree + 1), repeat=3) if sum(m) <= degree]
        powers.sort(key=sum)
        binomial = [math.factorial(sum(m)) / math.prod(map(math.factorial, m)) for m in powers]
        couples = list(combinations_with_replacement(range(self.channels), 2))
        # where the coefficient of (n, n') of degree l stands, shape (l, n, n')
        position = torch.zeros(degree + 1, self.channels, self.channels, dtype=torch.long)
        for k, (n, n_2) in enumerate(couples):
            found = k + len(couples) * torch.arange(degree + 1)
            position[:, n, n_2] = position[:, n_2, n] = found
        # the same of each species of the centre, after those of all pairs of species
        power_terms, pair_terms = (degree + 1) * len(couples), size * (size + 1) // 2 * pair
        starts = pair_terms + power_terms * torch.arange(size)
        which = torch.zeros(size, size, dtype=torch.long)
        for k, (a, b) in enumerate(combinations_with_replacement(range(size), 2)):
            which[a, b] = which[b, a] = k
        constants = {
            "powers": torch.tensor(powers),
            "binomial": torch.tensor(binomial).double(),
            "position": position[[sum(m) for m in powers]] + starts.reshape(-1, 1, 1, 1),
            "which": which,
            "parity": torch.tensor([(-1.0) ** sum(m) for m in powers]).double(),  # of x -> -x
            "slopes": _slopes(powers),
            "sums": torch.eye(4).double().repeat_interleave(self.channels, dim=0),
            "chebyshev": _chebyshev(pair, 2 / (cutoff - closest)),
        }
        for name, values in constants.items():
            self.register_buffer(name, values, persistent=False)
        count = pair_terms + size * power_terms
        self.register_buffer("coefficients", torch.zeros(count, dtype=torch.float64))

    def energy(
        self,
        positions: Tensor,
        cell: Tensor,
        numbers: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:
        """Potential energy in eV, shape (B,), up to a constant.

        Parameters
        ----------
        positions
            Shape (B, N, 3) in angstrom, wrapped or not.
        cell
            Lattice vectors as rows, shape (3, 3) or (B, 3, 3), in angstrom.
        numbers
            Atomic numbers, shape (N,).
        coefficients
            Other ones than the fitted, shape (feature,); it is linear in them.
        """
        c = self.coefficients if coefficients is None else coefficients
        i, j, v = self._edges(positions, cell)
        kinds = self._kinds(positions, numbers)
        v = v.to(self.coefficients)
        r = v.norm(dim=1)
        g, y = self._radial(r)[0], self._angular(v / r[:, None])
        near = _neighbours(i, j, len(kinds))
        others = torch.cat([j, i, j.new_zeros(1)])[near]
        g_n = self._channels(_both(g[:, : self.radial])[near], kinds, others)
        A = self._moments(g_n, _both(y, self.parity)[near])
        power = (self._coupled(c, A, kinds) * A).sum(dim=(1, 2)) / 2
        pairs = 2 * self._paired(c, g, kinds[i], kinds[j])  # seen from both ends
        return power.index_add(0, i, pairs).reshape(positions.shape[:2]).sum(dim=1).to(positions)

    def pressure(self, positions: Tensor, cell: Tensor, numbers: Tensor | None = None) -> Tensor:
        """-dE/dV of nuclei at rest in eV/angstrom**3, shape (B,); arguments as in :meth:`energy`.

        Moving nuclei add N k_B T / V. 1 eV/angstrom**3 is 160.2 GPa.
        """
        h = 1e-4  # of the edges, either way
        work = self.energy((1 - h) * positions, (1 - h) * cell, numbers)
        work = work - self.energy((1 + h) * positions, (1 + h) * cell, numbers)
        return work / (((1 + h) ** 3 - (1 - h) ** 3) * torch.linalg.det(cell).abs())

    def forces(
        self,
        positions: Tensor,
        cell: Tensor,
        numbers: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:
        """-dE/dR in eV/angstrom, shape (B, N, 3); arguments as in :meth:`energy`."""
        c = self.coefficients if coefficients is None else coefficients
        i, j, v = self._edges(positions, cell)
        kinds = self._kinds(positions, numbers)
        v = v.to(self.coefficients)
        r = v.norm(dim=1, keepdim=True)
        u = v / r
        (g, dg), y = self._radial(r[:, 0]), self._angular(u)
        n, near = self.radial, _neighbours(i, j, len(kinds))
        others = torch.cat([j, i, j.new_zeros(1)])[near]
        # all that is known of an edge in one row, so that one look-up brings it to its nuclei
        known = torch.cat([g[:, :n], dg[:, :n], 1 / r, y, u], dim=1)
        signs = known.new_ones(2 * n + 1), self.parity, -known.new_ones(3)
        sizes = [n, n, 1, y.shape[1], 3]
        g, dg_n, near_1_r, y, u = _both(known, torch.cat(signs))[near].split(sizes, dim=2)
        g, dg_n = (self._channels(x, kinds, others) for x in (g, dg_n))
        # dE/dA, on the monomials and on their gradient: (nucleus, n, 4, m)
        slope = self._coupled(c, self._moments(g, y), kinds) @ self.slopes
        along, turning = self._pulled(slope.unflatten(2, (4, -1)), y, g, dg_n)
        turning = turning * near_1_r
        pairs = _both(self._paired(c, dg, kinds[i], kinds[j]))[near]
        pull = along + pairs - (turning * u).sum(dim=2)
        push = pull[..., None] * u + turning
        flat = push.sum(dim=1).index_add(0, others.flatten(), -push.flatten(0, 1))
        return flat.reshape(positions.shape).to(positions)

    def _kinds(self, positions: Tensor, numbers: Tensor | None) -> Tensor:
        """Species of the nuclei of all members, as indices, (B N,)."""
        members, atoms = positions.shape[:2]
        return species_index(numbers, self.species, atoms).to(positions.device).repeat(members)

    def _channels(self, g: Tensor, kinds: Tensor, others: Tensor) -> Tensor:
        """Radial functions of neighbours (nucleus, k, n) in the channels of their species."""
        if len(self.species) == 1:
            return g
        own = nn.functional.one_hot(kinds[others], len(self.species)).to(g)
        return (own[..., None] * g[..., None, :]).flatten(2)

    def _paired(self, c: Tensor, g: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Sum over p of c_p g_p of each edge (edge,), with c_p of its two species."""
        if len(self.species) == 1:
            return g @ c[: self.pair]
        count = len(self.species) * (len(self.species) + 1) // 2
        sums = g @ c[: count * self.pair].reshape(count, self.pair).T
        return sums.gather(1, self.which[first, second][:, None])[:, 0]

    def _pulled(self, slope: Tensor, y: Tensor, g: Tensor, dg: Tensor) -> tuple[Tensor, Tensor]:
        """dE/dr of the power spectrum at fixed direction, (nucleus, k), and dE/du, (*, 3)."""
        b = y @ slope.permute(0, 3, 2, 1).flatten(2)
        pulls = (b * torch.cat([dg, g, g, g], dim=2)) @ self.sums
        return pulls[..., 0], pulls[..., 1:]

    def _edges(self, positions: Tensor, cell: Tensor) -> Edges:
        """Pairs of neighbours within the cutoff, each once, and the vectors from i to j."""
        good = positions.ndim == 3 and positions.shape[-1] == 3
        if not good or cell.shape not in ((3, 3), (len(positions), 3, 3)):
            raise ShapeError(
                f"forces need positions (B, N, 3) and a cell (3, 3) or one a member, not "
                f"{tuple(positions.shape)} and {tuple(cell.shape)}"
            )
        if positions.dtype != torch.float64 or cell.dtype != torch.float64:
            raise ShapeError("positions are in double precision; give float64 tensors")
        members, atoms, _ = positions.shape
        cells = cell.expand(members, 3, 3)
        known = zip(positions.detach().cpu().numpy(), cells.detach().cpu().numpy(), strict=True)
        found = [neighbour_pairs(x, a, self.cutoff) for x, a in known]
        count = torch.tensor([len(i) for i, _, _ in found], device=positions.device)
        member = torch.arange(members, device=positions.device).repeat_interleave(count)
        i, j, n = (
            torch.from_numpy(np.concatenate(x)).to(positions.device)
            for x in zip(*found, strict=True)
        )
        i, j, flat = i + atoms * member, j + atoms * member, positions.flatten(0, 1)
        image = n @ cell if cell.ndim == 2 else (n[:, None] @ cells[member])[:, 0]
        return i, j, flat[j] - flat[i] + image

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

    def _coupled(self, c: Tensor, moments: Tensor, kinds: Tensor) -> Tensor:
        """dE/dA of the power spectrum, shape (nucleus, n, m)."""
        # c_lnn' stands for n <= n' only: halves of it on both sides, whole on the diagonal
        half = 1 + torch.eye(self.channels, dtype=moments.dtype, device=moments.device)
        matrices = c[self.position] * half * self.binomial[:, None, None]
        if len(matrices) == 1:
            return torch.einsum("mnk,ikm->inm", matrices[0], moments)
        chosen = [torch.where(kinds == s)[0] for s in range(len(matrices))]
        parts = [
            torch.einsum("mnk,ikm->inm", matrix, moments[own])
            for matrix, own in zip(matrices, chosen, strict=True)
        ]
        return torch.cat(parts)[torch.cat(chosen).argsort()]


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
    """Positions, forces, cells of a trajectory, as the force field takes them; a copy, float64."""
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
    model = LinearForceField(**{"species": species_in(run, *volumes)} | arguments)
    parts = [run.isel(time=slice(None, None, every)), *volumes]
    frames = [frame for part in parts for frame in _frames(part)]
    moment, target, size = 0, 0, sum(forces.numel() for _, forces, _, _ in frames)

    def columns(function: Callable, x: Tensor, *others: Tensor | None) -> Tensor:
        # linear in c: what the unit vectors give are its columns
        unit = torch.eye(len(model.coefficients), dtype=torch.float64)
        return torch.func.vmap(lambda c: function(x, *others, c), chunk_size=128)(unit).T

    bar = progress_bar(frames, "forces", unit="frame", delay=2, disable=None if progress else True)
    for x, forces, *others in bar:
        design = columns(lambda *given: model.forces(*given).flatten(), x, *others)
        moment, target = moment + design.T @ design, target + design.T @ forces.flatten()
    if volumes:
        features = torch.stack(
            [columns(model.energy, x, *o)[0] / x.shape[1] for x, _, *o in frames]
        )
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
    """Raise TrajectoryError unless a run has these variables, finite."""
    source = run.encoding.get("source", "trajectory")
    for name in needed:
        if name not in run or not np.isfinite(run[name].values).all():
            raise TrajectoryError(
                f"{source}: variable '{name}' is missing or not finite; a force field learns from "
                "an ab-initio run that has it"
            )


def _frames(run: xr.Dataset) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Positions (1, N, 3), forces (N, 3), cell (3, 3) and numbers (N,) of each frame."""
    source = run.encoding.get("source", "trajectory")
    cell = torch.from_numpy(single_cell(run["cell"].values, f"{source}: a force field"))
    for x, forces in zip(as_double(run["positions"]), as_double(run["forces"]), strict=True):
        yield x[None], forces, cell, numbers_of(run)


def numbers_of(run: xr.Dataset) -> Tensor | None:
    """Atomic numbers of a run, shape (N,), or None where it does not tell."""
    return torch.from_numpy(run["numbers"].values.astype(int)) if "numbers" in run else None


def species_in(*runs: xr.Dataset) -> tuple[int, ...]:
    """Atomic numbers of all species of runs, each once; (0,) where the runs do not tell."""
    known = [run["numbers"].values.astype(int) for run in runs if "numbers" in run]
    return tuple(np.unique(np.concatenate(known)).tolist()) if known else (0,)
