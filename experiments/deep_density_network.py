r"""The published Deep Density network beside what it starts from: errors on the test split.

``python -m experiments.deep_density_network DATA CHECKPOINT OUT.csv`` scores, on all voxels of
all test snapshots,

* a superposition of spherical atoms, one for each species, fitted by least squares;
* the bare ansatz of eq. 11 without networks, fitted as a training begins;
* the checkpoint: the ansatz with its networks.

Rows are tidy: relative l1 and l2 errors (eqs. 21 and 22) in per cent, mean and worst snapshot.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from densitykit.io.reader import open_split
from densitykit.metrics import relative_l1, relative_l2
from densitykit.models import load_model
from densitykit.models.checkpoint import read_arguments
from densitykit.models.deep_density.linear import Atoms
from densitykit.models.deep_density.network import DeepDensity, PointsInReach
from densitykit.training.linear import atoms_of
from densitykit.training.network import SampledDensities, fit_ansatz
from experiments.arguments import run_script
from experiments.report import merge_rows

__all__ = ["score", "superposition"]

KEYS = ["system", "map", "metric"]
Map = Callable[[Atoms, tuple[int, ...]], np.ndarray]
_EXPONENTS = 0.35 * 1.7 ** np.arange(11)  # 1/angstrom**2


def superposition(training: xr.Dataset, cutoff: float = 6.0, points: int = 3000) -> Map:
    """Fit a sum of spherical atoms, eleven Gaussians each, to 50 training snapshots."""
    species = np.unique(training["numbers"].values)

    def functions(atoms: Atoms, r: np.ndarray) -> np.ndarray:
        point, atom, vectors = PointsInReach(atoms, cutoff).pairs(r)
        out = np.zeros((len(r), len(species), len(_EXPONENTS)))
        column = np.searchsorted(species, atoms.numbers[atom])
        values = np.exp(-(vectors**2).sum(axis=1)[:, None] * _EXPONENTS)
        np.add.at(out, (point, column), values)
        return out.reshape(len(r), -1)

    rng, left, right = np.random.default_rng(0), 0.0, 0.0
    for i in np.unique(np.linspace(0, training.sizes["time"] - 1, 50).astype(int)):
        atoms, rho = atoms_of(training, int(i)), training["density"][int(i)].values
        chosen = rng.choice(rho.size, min(points, rho.size), replace=False)
        y = rho.ravel()[chosen].astype(float)
        x = functions(atoms, _grid_points(atoms, rho.shape)[chosen])
        weighted = x / (abs(y)[:, None] + 0.1)
        left, right = left + weighted.T @ x, right + weighted.T @ y
    left = left + 1e-9 * np.trace(left) * np.eye(len(left))
    weights = np.linalg.solve(left, right)

    def density(atoms: Atoms, grid: tuple[int, ...]) -> np.ndarray:
        parts = np.array_split(_grid_points(atoms, grid), max(1, np.prod(grid) // 8192))
        return np.concatenate([functions(atoms, r) @ weights for r in parts]).reshape(grid)

    return density


def _grid_points(atoms: Atoms, grid: tuple[int, ...]) -> np.ndarray:
    fractions = np.stack([i.ravel() / n for i, n in zip(np.indices(grid), grid, strict=True)], 1)
    return fractions @ atoms.cell


def _bare_ansatz(training: xr.Dataset, arguments: Mapping[str, Any]) -> DeepDensity:
    """Fit A to D as a training begins, and switch the networks off."""
    model = DeepDensity(**arguments)
    data = SampledDensities(training.isel(time=slice(20)), model, 0.5)
    few = range(len(data))
    fit_ansatz(model, data.draw(few, 3000 // len(few), torch.Generator().manual_seed(0)))
    for networks in model.fitting:
        networks.out.data.zero_()
        networks.out_bias.data.zero_()
    return model


def score(density: Map, test: xr.Dataset) -> dict[str, float]:
    """Errors in per cent over all test snapshots, and processor seconds of one density."""
    errors, started = [], time.process_time()
    for i in range(test.sizes["time"]):
        truth = test["density"][i].values.astype(float)
        guess = density(atoms_of(test, i), truth.shape)
        errors.append([100 * relative_l1(guess, truth), 100 * relative_l2(guess, truth)])
    seconds = (time.process_time() - started) / len(errors)
    mean, worst = np.mean(errors, axis=0), np.max(errors, axis=0)
    names = ("l1", "l2", "worst l1", "worst l2", "seconds")
    return dict(zip(names, [*mean, *worst, seconds], strict=True))


def main() -> None:
    """Score, write the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="store with splits")
    parser.add_argument("checkpoint", type=Path, help="of a DeepDensity")
    parser.add_argument("out", type=Path, help="CSV file")
    arguments = parser.parse_args()
    train, test = (open_split(arguments.data, name).load() for name in ("train", "test"))
    maps = {
        "superposition": superposition(train),
        "ansatz": _bare_ansatz(train, read_arguments(arguments.checkpoint)).density,
        "network": load_model(arguments.checkpoint).density,
    }
    rows = [
        {"system": Path(arguments.data).stem, "map": name, "metric": metric, "value": value}
        for name, density in maps.items()
        for metric, value in score(density, test).items()
    ]
    table = merge_rows(arguments.out, pd.DataFrame(rows), KEYS)
    print(table.pivot(index=KEYS[:2], columns="metric", values="value").round(3).to_string())


if __name__ == "__main__":
    run_script(main)
