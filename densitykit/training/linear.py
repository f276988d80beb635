r"""Fitting a linear map from atoms to density: one system of equations, frame by frame.

.. math:: \min_W \sum_{p} w_p\,\big(\rho(r_p) - \hat\rho_W(r_p)\big)^2 + \lambda \sum W^2 ,

over points drawn with a probability q that grows with the density, each with the weight
:math:`w = 1/(\rho + \rho_0)/q`, so that relative errors count alike and no region is left out.
The unknowns of a frame are linear in its features, :math:`X_{p,nk} = \sum_{Im} \phi_{nlm}(r_p -
R_I) F^I_{lmk}`, and its normal equations :math:`X^T w X` add up: a frame is read once, and memory
does not grow with their number. Where a frame has fewer functions than there are unknowns (a
molecule), :math:`\phi^T w \phi` is made first and then contracted with the features.

The constant feature, the atom without surroundings, is hardly held back; free atoms are not at
all, and hold all electrons. :math:`\lambda` is chosen on validation frames. Members, each without
one part of the frames, are solved from the same sums.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from densitykit.errors import TrajectoryError
from densitykit.io.progress import progress_bar
from densitykit.metrics import relative_l1
from densitykit.models.deep_density.linear import Atoms, Block, LinearDensity, nearest_pairs

__all__ = [
    "atoms_of",
    "default_recipe",
    "fit_linear_density",
    "free_atoms",
    "grid_error",
    "nearest_in",
]

_EMPTY, _EVERYWHERE, _OFFSET = 0.02, 0.03, 0.1  # angstrom**-3: where points are drawn, weights
_CHARGE = 1e4  # weight of the electrons of a free atom, beside that of all points
_PANEL, _CHUNK = 1024, 1000  # columns, points at a time
_SOFT = 3.0  # mean square over squared mean: aluminium 1.1, water 20
Frame = tuple[xr.Dataset, int]


def atoms_of(run: xr.Dataset, frame: int) -> Atoms:
    """Return the configuration of a frame.

    Raises
    ------
    TrajectoryError
        The run has no positions.
    """
    if "positions" not in run or "numbers" not in run:
        source = run.encoding.get("source", "trajectory")
        raise TrajectoryError(f"{source}: variable 'positions' is missing; a map needs atoms")
    cell = np.asarray(run["cell"].values, float)
    return Atoms(
        np.asarray(run["positions"][frame].values, float),
        np.asarray(run["numbers"].values),
        cell if cell.ndim == 2 else cell[frame],
        bool(np.all(run["pbc"].values)) if "pbc" in run else True,
    )


def default_recipe(run: xr.Dataset) -> dict[str, Any]:
    """Return bases, surroundings and free atoms that suit the densities of a run.

    Molecules and liquids of light elements: exponents from 0.5 times 1.8^k per square angstrom,
    nine s functions, up to l = 6 (hydrogen: 5); functions within 6 and neighbours within 4.5
    angstrom. Soft densities, those of metals: exponents from 0.12 times 1.6^k, up to l = 7.
    In a periodic cell functions are neutral beside free atoms that carry the electrons, and
    reach less than half a cell, in which an atom should not see its own image. The floor of
    liquids and salts is that of water: it makes densities in voids as frequent as they are.
    """
    atoms, free = atoms_of(run, 0), free_atoms(run)
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell), axis=0)
    limit = 0.5 * heights.min() if atoms.periodic else np.inf
    soft, species = _is_soft(run), np.unique(atoms.numbers).tolist()
    heavy = (8,) * 8 if soft else (9, 9, 9, 8, 7, 7, 6)
    series = {"start": 0.12, "ratio": 1.6} if soft else {"start": 0.5, "ratio": 1.8}
    series |= {"radius": float(min(5.0 if soft else 6.0, limit)), "neutral": atoms.periodic}
    bases = {
        str(z): {"counts": (9, 9, 8, 7, 6, 5) if z == 1 and not soft else heavy} | series
        for z in species
    }
    radial = {"radial": "bessel", "n": 12, "l_max": 5, "products": 60}
    many = {"radial": "chebyshev", "n": 10, "products": 110 if atoms.periodic else 80}
    radial = radial if soft else many
    surroundings = {"cutoff": float(min(5.0 if soft else 4.5, limit))} | radial
    recipe = {"bases": bases, "surroundings": surroundings}
    recipe |= {"free": free["free"]} if atoms.periodic else {}
    return recipe | ({"floor": 4e-4} if atoms.periodic and not soft else {})


def free_atoms(run: xr.Dataset) -> dict[str, Any]:
    """Return the recipe of free atoms alone, the superposition of atoms."""
    species, soft = np.unique(atoms_of(run, 0).numbers).tolist(), _is_soft(run)
    series = {"start": 0.06, "ratio": 1.6, "radius": 8.0}
    series = series if soft else {"start": 0.25, "ratio": 1.8, "radius": 6.0}
    free = {str(z): {"counts": (10,)} | series for z in species}
    return {"bases": {}, "surroundings": {}, "free": free}


def _default_points(run: xr.Dataset) -> int:
    return 3000 if _is_soft(run) else 4000 if atoms_of(run, 0).periodic else 6000


def _is_soft(run: xr.Dataset) -> bool:
    """Whether the density varies by less than a few times its mean."""
    rho = run["density"][0].values.astype(float)
    return float((rho**2).mean() / rho.mean() ** 2) < _SOFT


def fit_linear_density(
    training: Sequence[xr.Dataset],
    validation: Sequence[xr.Dataset],
    recipe: Mapping[str, Any],
    *,
    points: int | None = None,
    ridges: Sequence[float] = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9),
    members: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> tuple[LinearDensity, dict[str, Any], list[dict[str, float]]]:
    """Fit a map to all frames of some runs.

    Parameters
    ----------
    training, validation
        Runs with positions.
    recipe
        Arguments of `LinearDensity`: bases, surroundings, and free atoms if there are any.
    points
        Drawn in a frame; default: 6000 of a molecule, 4000 of a liquid, 3000 of a metal.
    ridges
        Values of lambda to try, from the largest, relative to the weighted square of the density.
    members
        Parts of the training set, of which each member lacks one.
    seed
        Of the points.
    progress
        Show progress bars, where the output is a terminal.

    Returns
    -------
    LinearDensity
        With the weights of the best lambda.
    dict
        What it is constructed with, for its checkpoint.
    list of dict
        lambda and the validation error (relative l1) with it; the one that was taken comes last.
    """
    charges = _charges(training[0])
    model = LinearDensity(**recipe, charges=charges)
    frames = [(run, i) for run in training for i in range(run.sizes["time"])]
    _fit_features(model, [atoms_of(*frame) for frame in frames])
    model.nearest = nearest_in(frames)
    points = points or _default_points(training[0])
    normals, sides = _equations(model, frames, points, members, seed, progress)
    blocks = model.blocks(atoms_of(*frames[0]))
    _hold_charges(model, blocks, normals, sides)
    normal, side = sum(normals), sum(sides)
    ridge, rows = _choose_ridge(model, normal, side, blocks, validation, ridges)
    rest = ((normal - n, side - s) for n, s in zip(normals, sides, strict=True))
    found = [_solve(n, s, ridge * _penalty(blocks)) for n, s in rest]
    model.set_weights(torch.stack(found), blocks, "member")
    _calibrate(model, validation)
    card = {**recipe, "charges": charges}
    card |= {"shapes": {name: list(x.shape) for name, x in model.state_dict().items()}}
    names = ("nearest", "spread", "expected")
    return model.eval(), card | {name: getattr(model, name) for name in names}, rows


def _charges(run: xr.Dataset) -> dict[str, float]:
    """Valence electrons by species, where the run tells."""
    if "valence_charge" not in run:
        return {}
    known = zip(run["numbers"].values.tolist(), run["valence_charge"].values, strict=True)
    return {str(z): float(q) for z, q in known}


def nearest_in(frames: Sequence[Frame]) -> dict[str, float]:
    """Smallest distance of each pair of species in some frames; see `nearest_pairs`."""
    found: dict[str, float] = {}
    for frame in frames:
        for pair, r in nearest_pairs(atoms_of(*frame)).items():
            found[pair] = min(r, found.get(pair, r))
    return found


def _fit_features(model: LinearDensity, configurations: Sequence[Atoms]) -> None:
    """Principal components of the surroundings of each species over all configurations."""
    for z in model.bases:
        parts = [model.expansion(z, atoms) for atoms in configurations]
        model.surroundings[str(z)].fit([torch.cat(of_l) for of_l in zip(*parts, strict=True)])


# --- equations ---------------------------------------------------------------------------------


def _equations(
    model: LinearDensity,
    frames: Sequence[Frame],
    points: int,
    members: int,
    seed: int,
    progress: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Normal matrices (upper triangles) and right sides, one for each part of the frames."""
    rng, total = np.random.default_rng(seed), 0.0
    unknown = sum(b.size for b in model.blocks(atoms_of(*frames[0])))
    normals = [torch.zeros(unknown, unknown).double() for _ in range(members)]
    sides = [torch.zeros(unknown).double() for _ in range(members)]
    hidden = None if progress else True
    bar = progress_bar(frames, "normal equations", len(frames), disable=hidden)
    for count, (run, i) in enumerate(bar):
        rho, atoms = run["density"][i].values, atoms_of(run, i)
        part = count * members // len(frames)
        chosen, root = _draw(rho.ravel().astype(float), points, rng, atoms.periodic)
        blocks = model.blocks(atoms)
        few = sum(b.shape[0] * b.features[..., 0].numel() for b in blocks) < unknown
        add, size = (_add_contracted, points * 2) if few else (_add_rows, _CHUNK)
        for start in range(0, len(chosen), size):
            index, factor = chosen[start : start + size], root[start : start + size]
            y = torch.from_numpy(rho.ravel()[index] * factor)
            phi = _functions(blocks, atoms, rho.shape, index, factor)
            add(normals[part], sides[part], blocks, phi, y)
            total += float(y @ y)
    for normal, side in zip(normals, sides, strict=True):
        normal /= total
        side /= total
    return normals, sides


def _draw(
    rho: np.ndarray, points: int, rng: np.random.Generator, dense: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Choose about so many points; roots of their weights.

    Where matter is everywhere (``dense``) a point comes as often as the root of its density, so
    that cores are met; around a molecule wherever the density is not small.
    """
    a = np.abs(rho)
    chance = np.sqrt(a) if dense else a / (a + _EMPTY) + _EVERYWHERE
    chance = np.minimum(1, chance / chance.sum() * points)
    chosen = np.flatnonzero(rng.random(len(rho)) < chance)
    return chosen, np.sqrt(1 / (a[chosen] + _OFFSET) / chance[chosen])


def _functions(
    blocks: Sequence[Block],
    atoms: Atoms,
    grid: tuple[int, ...],
    chosen: np.ndarray,
    factor: np.ndarray,
) -> list[Tensor]:
    """Functions of all blocks at some grid points times a factor, (P, n, atom x (2l + 1))."""
    known: dict[int, Tensor] = {}
    out = []
    for block in blocks:
        if id(block.basis) not in known:
            known.clear()
            values = basis_values(block, atoms, grid, chosen) * factor[:, None, None]
            known[id(block.basis)] = torch.from_numpy(values)
        of_l = slice(*block.basis.offsets[block.l : block.l + 2])
        values = known[id(block.basis)][:, :, of_l].unflatten(2, (-1, 2 * block.l + 1))
        out.append(values.transpose(1, 2).flatten(2))
    return out


def basis_values(
    block: Block, atoms: Atoms, grid: tuple[int, ...], chosen: np.ndarray
) -> np.ndarray:
    """All functions of a block's basis at some grid points, (P, atom, size)."""
    fractions = np.stack(np.unravel_index(chosen, grid), axis=1) / np.array(grid)
    basis, centres = block.basis, np.flatnonzero(atoms.numbers == block.z)
    out = np.zeros((len(chosen), len(centres), basis.size))
    for column, i in enumerate(centres):
        for vectors in _images(fractions, atoms.positions[i], atoms, basis.radius):
            near = np.flatnonzero((vectors**2).sum(axis=1) < basis.radius**2)
            if len(near):
                out[near, column] += basis.values(vectors[near])
    return out


def _images(
    fractions: np.ndarray, position: np.ndarray, atoms: Atoms, radius: float
) -> Iterator[np.ndarray]:
    """Vectors from an atom, and from those of its images that come near, to points (P, 3)."""
    if not atoms.periodic:
        yield fractions @ atoms.cell - position
        return
    s = fractions - position @ np.linalg.inv(atoms.cell)
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell), axis=0)
    reach = np.ceil(radius / heights - 0.5).astype(int).clip(0)
    s = s - np.round(s)
    for shift in np.ndindex(*(2 * reach + 1)):
        yield (s + np.array(shift) - reach) @ atoms.cell


def _add_rows(
    normal: Tensor, side: Tensor, blocks: Sequence[Block], phi: Sequence[Tensor], y: Tensor
) -> None:
    """Add X^T X and X^T y of some points, X from functions and features."""
    x = torch.cat(
        [
            (p @ b.features.flatten(0, 1)).flatten(1)  # (P, n K)
            for b, p in zip(blocks, phi, strict=True)
        ],
        dim=1,
    )
    side += x.T @ y
    _add_gram(normal, x)


def _add_gram(normal: Tensor, x: Tensor) -> None:
    """Add the upper triangle of x^T x, panel by panel."""
    for start in range(0, x.shape[1], _PANEL):
        stop = min(start + _PANEL, x.shape[1])
        normal[:stop, start:stop] += x[:, :stop].T @ x[:, start:stop]


def _add_contracted(
    normal: Tensor, side: Tensor, blocks: Sequence[Block], phi: Sequence[Tensor], y: Tensor
) -> None:
    """Do the same by way of the normal equations of the coefficients, which are few."""
    flat = torch.cat([p.flatten(1) for p in phi], dim=1)
    s = torch.zeros(flat.shape[1], flat.shape[1]).double()
    _add_gram(s, flat)
    s, b = torch.triu(s) + torch.triu(s, 1).T, flat.T @ y
    of_phi = _slices([p[0].numel() for p in phi])
    of_w = _slices([b.size for b in blocks])
    for i, one in enumerate(blocks):
        f, n = one.features.flatten(0, 1), one.shape[0]  # (atom m, K)
        side[of_w[i]] += (b[of_phi[i]].reshape(n, -1) @ f).flatten()
        half = torch.einsum("nas,ak->nks", s[of_phi[i]].reshape(n, -1, len(s)), f).flatten(0, 1)
        for j, other in enumerate(blocks[i:], start=i):
            part = half[:, of_phi[j]].unflatten(1, (other.shape[0], -1))
            whole = part @ other.features.flatten(0, 1)  # (n K, n', K')
            normal[of_w[i], of_w[j]] += whole.flatten(1)


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum([0, *sizes]).tolist()
    return [slice(a, e) for a, e in pairwise(ends)]


# --- solutions ---------------------------------------------------------------------------------


def _hold_charges(
    model: LinearDensity, blocks: Sequence[Block], normals: list[Tensor], sides: list[Tensor]
) -> None:
    """Give each free atom its electrons: an equation of great weight in every part."""
    for block, own in zip(blocks, _slices([b.size for b in blocks]), strict=True):
        if not block.name.endswith("_free") or block.z not in model.charges:
            continue
        row = torch.from_numpy(block.basis.integrals) / model.charges[block.z]
        for normal, side in zip(normals, sides, strict=True):
            normal[own, own] += _CHARGE * torch.outer(row, row)
            side[own] += _CHARGE * row


def _penalty(blocks: Sequence[Block]) -> Tensor:
    """What lambda multiplies, for each unknown."""
    parts = []
    for block in blocks:
        held = torch.ones(block.shape, dtype=torch.float64)
        if block.l == 0:
            held[:, 0] = 1e-3  # the constant feature, or the free atom
        parts.append(held.flatten())
    return torch.cat(parts)


def _solve(normal: Tensor, side: Tensor, penalty: Tensor) -> Tensor | None:
    """Solve the equations with a penalty; None where rounding has made them indefinite."""
    factor, info = torch.linalg.cholesky_ex(normal + torch.diag(penalty), upper=True)
    return None if info.item() else torch.cholesky_solve(side[:, None], factor, upper=True)[:, 0]


def _choose_ridge(
    model: LinearDensity,
    normal: Tensor,
    side: Tensor,
    blocks: Sequence[Block],
    validation: Sequence[xr.Dataset],
    ridges: Sequence[float],
) -> tuple[float, list[dict[str, float]]]:
    """Solve for each lambda, and leave the weights that are best on validation frames."""
    best, penalty, rows = (np.inf, 0.0, side), _penalty(blocks), []
    for ridge in ridges:
        weights = _solve(normal, side, ridge * penalty)
        if weights is None:
            break
        model.set_weights(weights, blocks)
        error = grid_error(model, validation)
        rows.append({"lambda": ridge, "validation_l1": error, "seconds": time.process_time()})
        if error > 0.998 * best[0]:  # less of it gains nothing, or overfits
            break
        best = (error, ridge, weights)
    model.set_weights(best[2], blocks)
    rows.append({"lambda": best[1], "validation_l1": best[0], "seconds": time.process_time()})
    return best[1], rows


def _calibrate(model: LinearDensity, validation: Sequence[xr.Dataset]) -> None:
    """Scale the spread of the members to the mean error of validation frames."""
    error = spread = total = 0.0
    for run, i in _some_frames(validation):
        truth, atoms = run["density"][i].values.astype(float), atoms_of(run, i)
        error += float(np.abs(model.density(atoms, truth.shape) - truth).sum())
        spread += float(model.uncertainty(atoms, truth.shape).sum())
        total += float(np.abs(truth).sum())
    model.spread *= error / (spread * np.sqrt(2 / np.pi))  # mean |x| of a normal error
    model.expected = error / total


def _some_frames(runs: Sequence[xr.Dataset], count: int = 8) -> Iterator[Frame]:
    for run in runs:
        for i in np.unique(np.linspace(0, run.sizes["time"] - 1, count).astype(int)):
            yield run, int(i)


def grid_error(model: LinearDensity, runs: Sequence[xr.Dataset]) -> float:
    """Mean relative l1 error on whole grids of some frames."""
    errors = []
    for run, i in _some_frames(runs):
        truth = run["density"][i].values.astype(float)
        guess = model.density(atoms_of(run, i), truth.shape)
        errors.append(float(relative_l1(guess, truth)))
    return float(np.mean(errors))
