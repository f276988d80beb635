"""Points a second of the linear map from atoms to density, and how its cost grows with atoms.

    python benchmarks/deep_density_3d.py

One core, processor time, medians of a few predictions: the molecule of the test split on its own
grid, and aluminium of 32 to 2 048 atoms (thermal displacements of 0.1 angstrom) on 0.3 angstrom.
The exponent of the cost is that of a power of the number of atoms.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk

from densitykit.io.reader import open_split
from densitykit.models import load_model
from densitykit.models.deep_density.linear import Atoms, LinearDensity
from densitykit.training.linear import atoms_of


def seconds(model: LinearDensity, atoms: Atoms, grid: tuple[int, ...], repeats: int) -> float:
    """Median processor time of a prediction."""
    model.density(atoms, grid)
    found = []
    for _ in range(repeats):
        started = time.process_time()
        model.density(atoms, grid)
        found.append(time.process_time() - started)
    return float(np.median(found))


def aluminium(repeat: int) -> Atoms:
    solid = bulk("Al", a=4.05, cubic=True).repeat(repeat)
    moved = np.random.default_rng(0).normal(0, 0.1, solid.positions.shape)
    return Atoms(solid.positions + moved, solid.numbers, np.asarray(solid.cell))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("data/checkpoints"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = open_split("data/ethane.zarr", "test")
    grid, atoms = tuple(run["density"].shape[1:]), atoms_of(run, 0)
    t = seconds(load_model(arguments.checkpoints / "deep-density-ethane"), atoms, grid, 10)
    print(f"ethane: {np.prod(grid) / t:,.0f} points a second")
    model = load_model(arguments.checkpoints / "deep-density-aluminium")
    sizes, times = [], []
    for repeat in (2, 4, 8):
        n = (14 * repeat,) * 3
        solid = aluminium(repeat)
        sizes.append(len(solid.numbers))
        times.append(seconds(model, solid, n, arguments.repeats))
        print(
            f"{sizes[-1]} atoms: {times[-1]:.2f} s, {np.prod(n) / times[-1]:,.0f} points a second"
        )
    slope = np.polyfit(np.log(sizes), np.log(times), 1)[0]
    print(f"cost grows as the number of atoms to the power {slope:.3f}")


if __name__ == "__main__":
    main()
