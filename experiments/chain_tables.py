r"""The one-dimensional experiments of Deep Density (Zepeda-Nunez et al. 2019, 4.1 and appendix A).

========== ================================================================== =================
what       experiment                                                         entries
========== ================================================================== =================
table3     published network: validation error against neighbours            N_near = 1 .. 7
table4     published network: validation error against training snapshots     100, 200, 400
smooth     our linear variant: one model a chain, and one for all three       4
========== ================================================================== =================

Every model is scored on all splits: "validation" (tables 3 and 4 of the paper), "test-within"
(figure 4: step 2019, between two training frames), "step-29000" (figure 5), "test" (steps 10 000
to 29 900) and "transfer" (figure 6: 32 atoms). Results are tidy: one number a row, in
``results.csv``, beside the checkpoints. Lessons and tables read these files only.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from densitykit.chain.recipes import SMOOTH, Entry, train_paper, train_smooth
from densitykit.chain.snapshots import ChainSnapshots, load_snapshots, score
from densitykit.errors import DensityKitError
from densitykit.io.reader import open_split
from densitykit.models import save_model
from experiments.arguments import run_script
from experiments.report import merge_rows

__all__ = ["TABLES", "run_experiments"]


TABLES = {
    "table3": [Entry(s, n, 100) for n in (2, 1, 3, 4, 5, 6, 7) for s in ("insulator", "metal")],
    "table4": [Entry("mixed", 2, n) for n in (400, 200, 100)],
}

KEYS = ["variant", "system", "n_near", "samples", "seed", "split", "metric"]
COLUMNS = [*KEYS, "value", "cpu_seconds"]


def run_experiments(
    data: str | Path,
    out: str | Path,
    *,
    tables: Sequence[str] = ("table3", "table4", "smooth"),
    seeds: Sequence[int] = range(5),
    run_dir: str | Path = "runs/deep-density-1d",
    **options: Any,
) -> pd.DataFrame:
    """Train and score all entries of tables.

    A killed run continues where it was. Further seeds may be asked for later: their rows
    are added.

    Parameters
    ----------
    data
        Folder of the chains, ``SYSTEM.zarr``.
    out
        Folder of ``results.csv`` and the checkpoints: ``SYSTEM-paper``, of the lowest
        validation error at N_near = 2 and most snapshots, and ``NAME-smooth``.
    tables
        Names of `TABLES`, and "smooth".
    seeds
        Of the initial weights of the paper's networks; they are trained together.
    run_dir
        States of unfinished trainings.
    options
        Of :func:`densitykit.chain.recipes.train_paper`.

    Returns
    -------
    pd.DataFrame
        All rows of ``results.csv``.

    Raises
    ------
    DensityKitError
        There is no such table.
    """
    unknown = set(tables) - set(TABLES) - {"smooth"}
    if unknown:
        raise DensityKitError(f"no table {sorted(unknown)}; choose of {[*TABLES, 'smooth']}")
    data, out = Path(data), Path(out)
    for entry in (e for name in tables if name in TABLES for e in TABLES[name]):
        folder = Path(run_dir) / f"{entry.system}-{entry.n_near}-{entry.samples}"
        folder = folder / "-".join(str(seed) for seed in seeds)
        models, rows = _train_entry(data, entry, seeds, folder, **options)
        rows, sizes = merge_rows(out / "results.csv", rows, KEYS), options.get("sizes") or {}
        if _keep_best(out, entry, models, rows, sizes):
            shutil.copyfile(folder / "log.csv", out / f"{entry.system}-paper-log.csv")
    for name in SMOOTH if "smooth" in tables else ():
        merge_rows(out / "results.csv", _train_smooth(data, out, name), KEYS)
    return pd.read_csv(out / "results.csv")


def _train_entry(
    data: Path, entry: Entry, seeds: Sequence[int], folder: Path, **options: Any
) -> tuple[dict[int, nn.Module], pd.DataFrame]:
    """The models by seed, and their scores on all splits."""
    path = data / f"{entry.system}.zarr"
    splits = _splits(path)
    models, history = train_paper(
        load_snapshots(path, "train").evenly(entry.samples),
        splits["validation"],
        n_near=entry.n_near,
        seeds=seeds,
        run_dir=folder,
        label=f"{entry.system}, N_near {entry.n_near}, {entry.samples} snapshots",
        **options,
    )
    seconds = round(history.seconds.iloc[-1] / len(seeds), 1)
    by_seed = dict(zip(seeds, models, strict=True))
    labels = {"variant": "paper", **entry._asdict()}
    rows = [_scores(m, splits, **labels, seed=s, cpu_seconds=seconds) for s, m in by_seed.items()]
    return by_seed, pd.concat(rows, ignore_index=True)


def _train_smooth(data: Path, out: Path, name: str) -> pd.DataFrame:
    """Train, score and save one smooth model."""
    samples, sizes = SMOOTH[name]
    started = time.process_time()
    paths = {system: data / f"{system}.zarr" for system in samples}
    model = train_smooth(
        [load_snapshots(p, "train").evenly(samples[s]) for s, p in paths.items()], **sizes
    )
    seconds = round(time.process_time() - started, 1)
    variant = "smooth, all chains" if name == "all" else "smooth"
    labels = {"variant": variant, "n_near": model.n_near, "seed": 0, "cpu_seconds": seconds}
    rows = [
        _scores(model, _splits(p), **labels, system=s, samples=samples[s])
        for s, p in paths.items()
    ]
    data_used = ", ".join(f"{n} of {system}" for system, n in samples.items())
    provenance = {
        "data": f"training snapshots: {data_used}",
        "command": "python -m experiments.chain_tables --tables smooth",
        "cpu_seconds": seconds,
    }
    card = {"species": list(model.species)} | sizes
    save_model(model, out / f"{name}-smooth", card, provenance)
    return pd.concat(rows, ignore_index=True)


def _scores(model: nn.Module, splits: Mapping[str, ChainSnapshots], **labels: Any) -> pd.DataFrame:
    """Scores of a model on all splits of a chain."""
    rows = [score(model, d, **labels, split=s) for s, d in splits.items()]
    return pd.concat(rows, ignore_index=True)[COLUMNS]


def _splits(path: Path) -> Mapping[str, ChainSnapshots]:
    splits = {
        name: load_snapshots(path, name)
        for name in ("validation", "test-within", "test", "transfer")
    }
    late = (open_split(path, "test").step == 29_000).values.nonzero()[0]
    return splits | {"step-29000": splits["test"].at(late)}


def _keep_best(
    out: Path,
    entry: Entry,
    models: Mapping[int, nn.Module],
    rows: pd.DataFrame,
    sizes: Mapping[str, Any],
) -> bool:
    """Save the model of a system that all rows so far call the best, if it is one of these."""
    mine = rows.query("variant == 'paper' and system == @entry.system and n_near == 2")
    mine = mine.query("split == 'validation' and metric == 'mse'")
    if entry.n_near != 2 or entry.samples < mine.samples.max():
        return False
    best = mine[mine.samples == entry.samples].sort_values("value").iloc[0]
    if best.seed not in models:
        return False
    model = models[best.seed]
    provenance = {
        "data": f"{entry.samples} training snapshots of {entry.system}",
        "command": "python -m experiments.chain_tables",
        "seed": int(best.seed),
        "validation_mse": float(best.value),
        "cpu_seconds": float(best.cpu_seconds),
    }
    card = {"species": list(model.species), "n_near": model.n_near} | sizes
    save_model(model, out / f"{entry.system}-paper", card, provenance)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Deep Density in one dimension: tables, models.")
    parser.add_argument("--data", type=Path, default=Path("data/chain"), help="folder of chains")
    parser.add_argument("--out", type=Path, default=Path("data/deep-density-1d"))
    names = [*TABLES, "smooth"]
    parser.add_argument("--tables", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/deep-density-1d"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads only slow these small matrices
    rows = run_experiments(**vars(arguments))
    best = rows.pivot_table(
        index=["variant", "system", "n_near", "samples"],
        columns=["split", "metric"],
        values="value",
        aggfunc="min",
    )
    print(best.loc[:, [("validation", "mse"), ("test", "l1"), ("transfer", "l1")]].to_string())


if __name__ == "__main__":
    run_script(main)
