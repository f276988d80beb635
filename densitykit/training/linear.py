r"""Fitting a linear map from atoms to density: one system of equations, frame by frame.

.. math:: \min_W \sum_{p} w_p\,\big(\rho(r_p) - \hat\rho_W(r_p)\big)^2 + \lambda \sum W^2 ,

over points drawn with probability q where the density is large, each with the weight
:math:`w = 1/(\rho + \rho_0)/q`, so that relative errors count alike and no region is left out.
Each frame gives normal equations in its basis, which are small, and these are contracted with its
features: a frame is read once, and memory does not grow with their number. The constant feature,
the atom without surroundings, is hardly held back. :math:`\lambda` is chosen on validation frames.
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
from tqdm.auto import tqdm

from densitykit.errors import TrajectoryError
from densitykit.metrics import relative_l1
from densitykit.models.deep_density.linear import Atoms, LinearDensity

__all__ = ["atoms_of", "default_recipe", "fit_linear_density"]

Blocks = list[tuple[int, int, int, int]]
_EMPTY, _EVERYWHERE, _OFFSET = 0.02, 0.03, 0.1  # angstrom**-3: where points are drawn, weights


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
    """Return bases and surroundings that suit molecules and liquids of light elements.

    Exponents from 0.5 times 1.8^k per square angstrom, nine s functions, up to l = 6 (hydrogen:
    5); functions within 6 and neighbours within 4.5 angstrom, less in a small periodic cell, in
    which an atom should not see its own image.
    """
    atoms = atoms_of(run, 0)
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell), axis=0)
    limit = 0.5 * heights.min() if atoms.periodic else np.inf
    counts = {1: (9, 9, 8, 7, 6, 5)}
    bases = {
        str(z): {
            "counts": counts.get(z, (9, 9, 9, 8, 7, 7, 6)),
            "start": 0.5,
            "ratio": 1.8,
            "radius": float(min(6.0, limit)),
        }
        for z in np.unique(atoms.numbers).tolist()
    }
    cutoff = float(min(4.5, limit))
    return {"bases": bases, "surroundings": {"cutoff": cutoff, "n": 10, "products": 80}}


def fit_linear_density(
    training: Sequence[xr.Dataset],
    validation: Sequence[xr.Dataset],
    bases: Mapping[str, Mapping[str, Any]],
    surroundings: Mapping[str, Any],
    *,
    points: int = 6000,
    ridges: Sequence[float] = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8),
    seed: int = 0,
    progress: bool = True,
) -> tuple[LinearDensity, dict[str, Any], list[dict[str, float]]]:
    """Fit a map to all frames of some runs.

    Parameters
    ----------
    training, validation
        Runs with positions.
    bases, surroundings
        See `LinearDensity`.
    points
        Drawn in a frame.
    ridges
        Values of lambda to try, relative to the weighted square of the density.
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
        lambda and the validation error (relative l1) with it.
    """
    model = LinearDensity(bases, surroundings)
    frames = [(run, i) for run in training for i in range(run.sizes["time"])]
    _fit_features(model, [atoms_of(*frame) for frame in frames])
    rng, hidden = np.random.default_rng(seed), None if progress else True
    normal: Tensor | None = None
    for run, i in tqdm(frames, "normal equations", disable=hidden):
        atoms = atoms_of(run, i)
        features = model.features(atoms)
        blocks = model.block_shapes(features)
        s, b, square = _frame_equations(model, atoms, run["density"][i].values, points, rng)
        left, right = _contract(model, atoms, features, blocks, s, b)
        if normal is None:
            normal, side, total = torch.zeros_like(left), torch.zeros_like(right), 0.0
        normal += left
        side += right
        total += square
    model.nearest = min(_nearest(atoms_of(*frame)) for frame in frames)
    rows = _choose_ridge(model, normal / total, side / total, blocks, validation, ridges)
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    card = {"bases": {str(z): {**b} for z, b in bases.items()}, "surroundings": {**surroundings}}
    return model.eval(), card | {"shapes": shapes, "nearest": model.nearest}, rows


def _fit_features(model: LinearDensity, configurations: Sequence[Atoms]) -> None:
    """Principal components of the surroundings of each species over all configurations."""
    for z in model.species:
        own, parts = model.surroundings[str(z)], []
        for atoms in configurations:
            centres = np.flatnonzero(atoms.numbers == z)
            inner = (atoms.positions, atoms.numbers, atoms.wide_cell, centres)
            parts.append(own.expansion(*inner))
        own.fit([torch.cat(of_l) for of_l in zip(*parts, strict=True)])


def _nearest(atoms: Atoms) -> float:
    distance = np.linalg.norm(atoms.positions[:, None] - atoms.positions, axis=-1)
    return float((distance + 1e3 * np.eye(len(distance))).min())


def _frame_equations(
    model: LinearDensity, atoms: Atoms, density: np.ndarray, points: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Normal matrix and right side of one frame in its basis, and the weighted square of rho."""
    rho = density.ravel().astype(float)
    chance = np.abs(rho) / (np.abs(rho) + _EMPTY) + _EVERYWHERE
    chance = np.minimum(1, chance / chance.sum() * points)
    chosen = np.flatnonzero(rng.random(len(rho)) < chance)
    root = np.sqrt(1 / (np.abs(rho[chosen]) + _OFFSET) / chance[chosen])
    phi = torch.from_numpy(basis_values(model, atoms, density.shape, chosen) * root[:, None])
    y = torch.from_numpy(rho[chosen] * root)
    return phi.T @ phi, phi.T @ y, float(y @ y)


def basis_values(
    model: LinearDensity, atoms: Atoms, grid: tuple[int, ...], chosen: np.ndarray
) -> np.ndarray:
    """All functions at some grid points, (P, sum of sizes), atom after atom."""
    fractions = np.stack(np.unravel_index(chosen, grid), axis=1) / np.array(grid)
    values = []
    for position, z in zip(atoms.positions, atoms.numbers, strict=True):
        basis = model.bases[int(z)]
        out = np.zeros((len(chosen), basis.size))
        for vectors in _images(fractions, position, atoms, basis.radius):
            near = np.flatnonzero((vectors**2).sum(axis=1) < basis.radius**2)
            if len(near):
                out[near] += basis.values(vectors[near])
        values.append(out)
    return np.concatenate(values, axis=1)


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


def _contract(
    model: LinearDensity,
    atoms: Atoms,
    features: Mapping[int, list[Tensor]],
    blocks: Blocks,
    s: Tensor,
    b: Tensor,
) -> tuple[Tensor, Tensor]:
    """Normal equations of the weights from those of the coefficients; c = F W, block by block."""
    columns = _columns(model, atoms, blocks)
    starts = np.cumsum([0, *(n * k for _, _, n, k in blocks)])
    left, right = torch.zeros(starts[-1], starts[-1]).double(), torch.zeros(starts[-1]).double()
    size = len(s)
    for (z, l, n, k), index, (a, e) in zip(blocks, columns, pairwise(starts), strict=True):
        f = features[z][l].flatten(0, 1)  # (atom m, K)
        right[a:e] = (b[index].reshape(-1, n, 2 * l + 1).transpose(0, 1).flatten(1) @ f).flatten()
        rows = s[index].reshape(-1, n, 2 * l + 1, size).permute(1, 3, 0, 2)
        half = (rows.reshape(n * size, -1) @ f).reshape(n, size, k)
        for (z2, l2, n2, _), index2, (a2, e2) in zip(
            blocks, columns, pairwise(starts), strict=True
        ):
            if a2 < a:
                continue
            part = half[:, index2].reshape(n, -1, n2, 2 * l2 + 1, k).permute(0, 4, 2, 1, 3)
            whole = part.reshape(n * k * n2, -1) @ features[z2][l2].flatten(0, 1)
            left[a:e, a2:e2] = whole.reshape(n * k, -1)
    return torch.triu(left) + torch.triu(left, 1).T, right


def _columns(model: LinearDensity, atoms: Atoms, blocks: Blocks) -> list[Tensor]:
    """Where in the basis of a frame the functions of a block are: (atom, n, m) flattened."""
    starts = np.cumsum([0, *(model.bases[int(z)].size for z in atoms.numbers)])
    out = []
    for z, l, _, _ in blocks:
        a, e = model.bases[z].offsets[l], model.bases[z].offsets[l + 1]
        of = [
            torch.arange(starts[i] + a, starts[i] + e) for i in np.flatnonzero(atoms.numbers == z)
        ]
        out.append(torch.cat(of))
    return out


def _choose_ridge(
    model: LinearDensity,
    normal: Tensor,
    side: Tensor,
    blocks: Blocks,
    validation: Sequence[xr.Dataset],
    ridges: Sequence[float],
) -> list[dict[str, float]]:
    """Solve for each lambda, and leave the weights that are best on validation frames."""
    penalty = torch.cat([_penalty(l, n, k) for _, l, n, k in blocks])
    diagonal, best, rows = normal.diagonal().clone(), (np.inf, side), []
    for ridge in ridges:
        normal.diagonal().copy_(diagonal + ridge * penalty)
        factor, info = torch.linalg.cholesky_ex(normal)
        if info.item():
            break
        weights = torch.cholesky_solve(side[:, None], factor)[:, 0]
        model.set_weights(weights, blocks)
        error = grid_error(model, validation)
        rows.append({"lambda": ridge, "validation_l1": error, "seconds": time.process_time()})
        best = min(best, (error, weights), key=lambda pair: pair[0])
    normal.diagonal().copy_(diagonal)
    model.set_weights(best[1], blocks)
    return rows


def _penalty(l: int, n: int, k: int) -> Tensor:
    held = torch.ones(n, k, dtype=torch.float64)
    if l == 0:
        held[:, 0] = 1e-3  # the constant feature
    return held.flatten()


def grid_error(model: LinearDensity, runs: Sequence[xr.Dataset], frames: int = 8) -> float:
    """Mean relative l1 error on whole grids of some frames."""
    errors = []
    for run in runs:
        for i in np.unique(np.linspace(0, run.sizes["time"] - 1, frames).astype(int)):
            truth = run["density"][int(i)].values.astype(float)
            guess = model.density(atoms_of(run, int(i)), truth.shape)
            errors.append(float(relative_l1(guess, truth)))
    return float(np.mean(errors))
