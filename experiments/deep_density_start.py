"""A predicted density as the start of Kohn-Sham: iterations, time, and the energy of one shot.

Aluminium and molecules of test splits, Quantum ESPRESSO and PySCF with the settings of the data
sets. A solve starts as the engine does by itself (from atoms of the pseudopotential, or minimal
atomic orbitals), from fitted free atoms, from the bundled map, and from the density of the store,
the best that a map could do. `one_shot_mev` is the error an atom of the energy of a single
diagonalisation in the potential of that density (Harris 1985; Foulkes, Haydock 1989), of Quantum
ESPRESSO only. Seconds are of the processor, what the start takes included.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from ase import Atoms

from densitykit.generate.systems import system
from densitykit.io.reader import open_splits
from densitykit.models import load_model
from densitykit.training.linear import atoms_of
from experiments.arguments import run_script
from experiments.deep_density import superposition
from experiments.report import merge_rows

KEYS = ["system", "split", "frame", "start"]


def starts(name: str, data: Path, run: xr.Dataset, frame: int) -> dict[str, np.ndarray | None]:
    """Densities to start from, by name; None leaves it to the engine."""
    base = superposition(data / f"{name}.zarr")
    model = load_model(data / f"checkpoints/deep-density-{name}")
    truth, atoms = run["density"][frame].values.astype(float), atoms_of(run, frame)
    guesses = {k: m.density(atoms, truth.shape) for k, m in (("fitted", base), ("map", model))}
    return {"usual": None, **guesses, "converged": truth}


def processor_seconds(engine: Any) -> float:
    """Time so far, of the user and the system, in the process of an engine or in this one."""
    worker = getattr(engine, "_worker", None)
    if worker is None:
        return time.process_time()
    fields = Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rows(name: str, data: Path, run: xr.Dataset, frame: int) -> Iterator[dict[str, Any]]:
    """One solve, and one shot, from each start; the engine's first process is discarded."""
    inner, N, split = atoms_of(run, frame), run.sizes["atom"], run.attrs["split"]
    solid = name == "aluminium"
    size = (N, float(split.rpartition("-")[2][:-1])) if solid else ()
    engine_of = partial(system(name, *size).engine)
    atoms = Atoms(inner.numbers, inner.positions, cell=inner.cell, pbc=inner.periodic)
    energy = None
    for start, density in reversed(starts(name, data, run, frame).items()):
        row = {"system": name, "split": split, "frame": frame, "start": start}
        with engine_of() as engine:
            begun = 0.0 if solid else processor_seconds(engine)
            if density is not None:
                engine.start_from(density)
            found = engine.get_potential_energy(atoms)
            seconds = processor_seconds(engine) - begun
            energy = found if energy is None else energy
            row |= {"iterations": engine.iterations, "cpu_seconds": round(seconds, 1)}
            row |= {"energy_mev": 1e3 * (found - energy) / N, "one_shot_mev": np.nan}
        if density is not None and solid:
            with engine_of() as engine:
                row["one_shot_mev"] = 1e3 * (engine.one_shot(atoms, density) - energy) / N
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--frames", type=int, nargs="+", default=[0])
    parser.add_argument("--systems", nargs="+", default=["aluminium"])
    parser.add_argument("--splits", nargs="+", help="default: all test splits of the systems")
    parser.add_argument("--out", type=Path, default=Path("data/deep-density-3d/start.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.systems:
        for run in open_splits(arguments.data / f"{name}.zarr", "test"):
            if arguments.splits and run.attrs["split"] not in arguments.splits:
                continue
            for frame in arguments.frames:
                for row in rows(name, arguments.data, run, frame):
                    print(row, flush=True)
                    merge_rows(arguments.out, pd.DataFrame([row]), KEYS)


if __name__ == "__main__":
    run_script(main)
