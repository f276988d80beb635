"""A predicted density as the start of Kohn-Sham: iterations, time, and the energy of one shot.

Aluminium of a test split, Quantum ESPRESSO with the settings of the data set. A solve starts from
superposed atoms of the pseudopotential (the usual start), from fitted free atoms, from the bundled
map, and from the density of the store, the best that a map could do. `one_shot_mev` is the error
an atom of the energy of a single diagonalisation in the potential of that density (Harris 1985;
Foulkes, Haydock 1989). Seconds are of the processor, in the engine's own process.
"""

from __future__ import annotations

import argparse
import os
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

KEYS = ["split", "frame", "start"]


def starts(data: Path, run: xr.Dataset, frame: int) -> dict[str, np.ndarray | None]:
    """Densities to start from, by name; None leaves it to the engine."""
    base = superposition(data / "aluminium.zarr")
    model = load_model(data / "checkpoints/deep-density-aluminium")
    truth, atoms = run["density"][frame].values.astype(float), atoms_of(run, frame)
    guesses = {
        name: m.density(atoms, truth.shape) for name, m in (("fitted", base), ("map", model))
    }
    return {"pseudopotential": None, **guesses, "converged": truth}


def processor_seconds(pid: int) -> float:
    """Time of a process so far, of the user and the system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rows(data: Path, run: xr.Dataset, frame: int) -> Iterator[dict[str, Any]]:
    """One solve, and one shot, from each start; the engine's first process is discarded."""
    N, T = run.sizes["atom"], float(run.attrs["split"].rpartition("-")[2][:-1])
    engine_of = partial(system("aluminium", N, T).engine)
    inner = atoms_of(run, frame)
    atoms = Atoms(inner.numbers, inner.positions, cell=inner.cell, pbc=True)
    energy = None
    for name, density in reversed(starts(data, run, frame).items()):
        with engine_of() as engine:
            if density is not None:
                engine.start_from(density)
            found = engine.get_potential_energy(atoms)
            seconds = processor_seconds(engine._worker._process.pid)
            energy = found if energy is None else energy
            row = {"split": run.attrs["split"], "frame": frame, "start": name}
            row |= {"iterations": engine.iterations, "cpu_seconds": round(seconds, 1)}
            row |= {"energy_mev": 1e3 * (found - energy) / N, "one_shot_mev": np.nan}
        if density is not None:
            with engine_of() as engine:
                row["one_shot_mev"] = 1e3 * (engine.one_shot(atoms, density) - energy) / N
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--frames", type=int, nargs="+", default=[0])
    parser.add_argument("--splits", nargs="+", help="default: all test splits of aluminium")
    parser.add_argument("--out", type=Path, default=Path("data/deep-density-3d/start.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for run in open_splits(arguments.data / "aluminium.zarr", "test"):
        if arguments.splits and run.attrs["split"] not in arguments.splits:
            continue
        for frame in arguments.frames:
            for row in rows(arguments.data, run, frame):
                print(row, flush=True)
                merge_rows(arguments.out, pd.DataFrame([row]), KEYS)


if __name__ == "__main__":
    run_script(main)
