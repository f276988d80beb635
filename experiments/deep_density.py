r"""Deep Density in three dimensions (Zepeda-Nunez et al. 2019, section 4.2): tables and transfer.

======== ==================================================================================
part     what
======== ==================================================================================
table    the bundled map of each system on all test splits, beside superposed free atoms
curve    maps from 5, 20 and 80 training snapshots, a few draws each
larger   maps that have seen the snapshots of larger cells, too, all but the one they are tested on
unseen   cells too large for a reference: what the map says of its error there, and what it costs
======== ==================================================================================

Rows are tidy, a split, variant, number of snapshots and seed each: relative l1 and l2 error of the
density (mean over snapshots, and of the worst one), the error that the map itself estimates, the
number of weights and the processor seconds of the fit. Tables and lessons read the file only.
Rows of ``unseen`` are in another file: number of electrons less what it should be, estimated
l1, the standard deviation of the local error that half, 90, 99 and 100 % of the points keep below,
over the mean density, processor seconds and the largest memory so far.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import nn

from densitykit.generate.snapshots import grid_shape
from densitykit.generate.systems import system as generated
from densitykit.io.reader import open_splits
from densitykit.metrics import relative_l1, relative_l2
from densitykit.models import load_model
from densitykit.models.deep_density.linear import Atoms
from densitykit.training.linear import atoms_of, default_recipe, fit_linear_density, free_atoms
from experiments.arguments import run_script
from experiments.report import merge_rows

__all__ = ["PUBLISHED", "score", "superposition"]

SYSTEMS = ("ethane", "isobutane", "butane", "water", "aluminium")
KEYS = ["system", "split", "variant", "snapshots", "seed"]
#: where the rows of a part go, if not with the others, and what tells them apart
FILES = {"unseen": ("unseen.csv", ["system", "size", "temperature"])}
#: sizes and temperatures of cells without a reference
UNSEEN = {"water": ((512, 300.0),), "aluminium": ((256, 300.0), (256, 600.0), (256, 900.0))}
#: l1 and l2, per cent, of the paper's tables 1 and 2
PUBLISHED = {
    "ethane": (0.186, 0.172),
    "isobutane": (0.222, 0.194),
    "butane": (0.314, 0.289),
    "water": (1.080, 0.606),
    "aluminium": (2.0, 2.6),
}


def score(model: nn.Module, run: xr.Dataset, frames: int = 1000) -> dict[str, float]:
    """Errors of a map on frames of a run, spread evenly; see the module's docstring."""
    chosen = np.linspace(0, run.sizes["time"] - 1, min(frames, run.sizes["time"])).astype(int)
    errors = []
    for i in chosen.tolist():
        truth, atoms = run["density"][i].values.astype(float), atoms_of(run, i)
        rho = model.density(atoms, truth.shape)
        sigma = model.uncertainty(atoms, truth.shape).sum() if hasattr(model, "spread") else np.nan
        estimate = np.sqrt(2 / np.pi) * sigma / np.abs(rho).sum()
        errors.append((float(relative_l1(rho, truth)), float(relative_l2(rho, truth)), estimate))
    l1, l2, estimate = np.array(errors).T
    found = {"l1": l1.mean(), "l2": l2.mean(), "l1_worst": l1.max(), "l2_worst": l2.max()}
    return found | {"l1_estimated": estimate.mean(), "frames": len(chosen)}


def superposition(store: Path) -> nn.Module:
    """Free atoms alone, fitted to the training splits of a store."""
    train, held_out = (open_splits(store, name) for name in ("train", "validation"))
    return fit_linear_density(train, held_out, free_atoms(train[0]), members=2)[0]


def rows_of_table(system: str, data: Path, checkpoints: Path) -> Iterator[dict[str, Any]]:
    """The bundled map and superposed free atoms on all test splits of a system."""
    store, started = data / f"{system}.zarr", time.process_time()
    fitted = {"superposition": (superposition(store), time.process_time() - started)}
    fitted["linear"] = (load_model(checkpoints / f"deep-density-{system}"), np.nan)
    snapshots = sum(run.sizes["time"] for run in open_splits(store, "train"))
    for run in open_splits(store, "test"):
        for variant, (map_, seconds) in fitted.items():
            labels = {"system": system, "split": run.attrs["split"], "variant": variant}
            labels |= {"snapshots": snapshots, "seed": 0, "cpu_seconds": round(seconds, 1)}
            yield labels | {"weights": n_weights(map_)} | score(map_, run)


def rows_of_curve(
    system: str, data: Path, seeds: Sequence[int], counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Maps from few training snapshots, drawn at random, on all test splits."""
    store = data / f"{system}.zarr"
    train, held_out = (open_splits(store, name) for name in ("train", "validation"))
    test = open_splits(store, "test")
    for n in counts:
        for seed in seeds:
            few = [_drawn(run, n // len(train), seed) for run in train]
            started = time.process_time()
            recipe = default_recipe(train[0])
            model, _, _ = fit_linear_density(few, held_out, recipe, members=2, seed=seed)
            seconds = round(time.process_time() - started, 1)
            for run in test:
                labels = {"system": system, "split": run.attrs["split"], "variant": "linear"}
                labels |= {"snapshots": n, "seed": seed, "cpu_seconds": seconds}
                yield labels | {"weights": n_weights(model)} | score(model, run)


def rows_of_larger(system: str, data: Path) -> Iterator[dict[str, Any]]:
    """Maps whose training set has the other snapshots of larger cells, on one of them."""
    store = data / f"{system}.zarr"
    train, held_out = (open_splits(store, name) for name in ("train", "validation"))
    atoms, recipe = train[0].sizes["atom"], default_recipe(train[0])
    large = [run for run in open_splits(store, "test") if run.sizes["atom"] > atoms]
    for run in large:
        started, others = time.process_time(), [other for other in large if other is not run]
        model, _, _ = fit_linear_density([*train, *others], held_out, recipe, members=2)
        seconds = round(time.process_time() - started, 1)
        labels = {"system": system, "split": run.attrs["split"], "variant": "larger cells, too"}
        snapshots = sum(small.sizes["time"] for small in train)
        labels |= {"snapshots": snapshots, "seed": 0, "cpu_seconds": seconds}
        yield labels | {"weights": n_weights(model)} | score(model, run)


def _drawn(run: xr.Dataset, n: int, seed: int) -> xr.Dataset:
    chosen = np.random.default_rng(seed).permutation(run.sizes["time"])[: max(n, 1)]
    return run.isel(time=np.sort(chosen))


def rows_unseen(system: str, checkpoints: Path) -> Iterator[dict[str, Any]]:
    """One configuration a size and temperature, drawn as those of the data set are."""
    model = load_model(checkpoints / f"deep-density-{system}")
    for size, temperature in UNSEEN.get(system, ()):
        drawn = generated(system, size, temperature)
        (atoms,) = drawn.geometries(1, seed=1)
        grid, started = grid_shape(atoms, drawn.spacing), time.process_time()
        rho = model.density(inner := _inner(atoms), grid)
        seconds = time.process_time() - started
        sigma = model.uncertainty(inner, grid)
        charges = sum(model.charges[int(z)] for z in atoms.numbers)
        electrons = float(rho.mean()) * atoms.get_volume() - charges
        row = {"system": system, "size": size, "temperature": temperature, "electrons": electrons}
        row["l1_estimated"] = float(np.sqrt(2 / np.pi) * sigma.sum() / np.abs(rho).sum())
        quantiles = np.quantile(sigma / rho.mean(), (0.5, 0.9, 0.99, 1.0)).tolist()
        row |= dict(zip(("median", "p90", "p99", "largest"), quantiles, strict=True))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield row | {"cpu_seconds": round(seconds, 1), "memory_gb": round(memory, 2)}


def _inner(atoms: Any) -> Atoms:
    return Atoms(atoms.positions, atoms.numbers, np.asarray(atoms.cell), True)


def n_weights(model: nn.Module) -> int:
    """Number of weights that were fitted."""
    return sum(x.numel() for name, x in model.named_buffers() if name.startswith("weight_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="+", choices=("table", "curve", "larger", "unseen"))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("data/deep-density-3d"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--snapshots", type=int, nargs="+", default=[5, 20, 80])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, checkpoints = arguments.data, arguments.data / "checkpoints"
    for part, system in product(arguments.parts, arguments.systems):
        rows = {
            "table": partial(rows_of_table, system, data, checkpoints),
            "curve": partial(rows_of_curve, system, data, arguments.seeds, arguments.snapshots),
            "larger": partial(rows_of_larger, system, data),
            "unseen": partial(rows_unseen, system, checkpoints),
        }
        name, keys = FILES.get(part, ("results.csv", KEYS))
        for row in rows[part]():
            merge_rows(arguments.out / name, pd.DataFrame([row]), keys)
    for name in ("results.csv", "unseen.csv"):
        if (arguments.out / name).exists():
            print(pd.read_csv(arguments.out / name).to_string(index=False))


if __name__ == "__main__":
    run_script(main)
