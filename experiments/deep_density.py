r"""Deep Density in three dimensions (Zepeda-Nunez et al. 2019, section 4.2): tables and transfer.

======== ==================================================================================
part     what
======== ==================================================================================
table    the bundled map of each system on all test splits, beside superposed free atoms
curve    maps from 5, 20 and 80 training snapshots, a few draws each
======== ==================================================================================

Rows are tidy, a split, variant, number of snapshots and seed each: relative l1 and l2 error of the
density (mean over snapshots, and of the worst one), the error that the map itself estimates, the
number of weights and the processor seconds of the fit. Tables and lessons read the file only.
"""

from __future__ import annotations

import argparse
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

from densitykit.io.reader import open_splits
from densitykit.metrics import relative_l1, relative_l2
from densitykit.models import load_model
from densitykit.training.linear import atoms_of, default_recipe, fit_linear_density, free_atoms
from experiments.arguments import run_script
from experiments.report import merge_rows

__all__ = ["PUBLISHED", "score", "superposition"]

SYSTEMS = ("ethane", "isobutane", "butane", "water", "aluminium")
KEYS = ["system", "split", "variant", "snapshots", "seed"]
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


def _drawn(run: xr.Dataset, n: int, seed: int) -> xr.Dataset:
    chosen = np.random.default_rng(seed).permutation(run.sizes["time"])[: max(n, 1)]
    return run.isel(time=np.sort(chosen))


def n_weights(model: nn.Module) -> int:
    """Number of weights that were fitted."""
    return sum(x.numel() for name, x in model.named_buffers() if name.startswith("weight_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="+", choices=("table", "curve"))
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
        }
        for row in rows[part]():
            merge_rows(arguments.out / "results.csv", pd.DataFrame([row]), KEYS)
    table = pd.read_csv(arguments.out / "results.csv")
    print(table[[*KEYS, "l1", "l2", "l1_worst", "l1_estimated"]].to_string(index=False))


if __name__ == "__main__":
    run_script(main)
