"""Compute the densities of stored aluminium again, with the settings of today.

    python scripts/solve_again.py data/aluminium.zarr runs/aluminium.zarr
    python scripts/solve_again.py data/aluminium.zarr runs/gamma.zarr --k-points 0

The configurations are those of the store, to the last bit: chaotic dynamics would not give them
twice on two machines. Everything else is `densitykit generate aluminium`, or with another shifted
mesh of k-points (0: Gamma). May be killed and started again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from ase import Atoms

from densitykit.generate.snapshots import System, generate_snapshots
from densitykit.generate.systems import systems
from densitykit.io.reader import open_trajectory


def stored(path: Path, n: int, **_: object) -> list[Atoms]:
    """Return the configurations of a run."""
    run = open_trajectory(path)
    cell, numbers = run["cell"].values, run["numbers"].values
    source = run.attrs["configurations"].split(";")[0]
    found = []
    for i in range(n):
        atoms = Atoms(numbers, run["positions"][i].values, cell=cell, pbc=True)
        told = {"time": float(run["time"][i]), "temperature": float(run["temperature"][i])}
        atoms.info = told | {"source": source}
        found.append(atoms)
    return found


def again(store: Path, run: str, mesh: int | None) -> System:
    """Return the system of a run with the configurations that are there."""
    system = replace(systems("aluminium")[run], geometries=partial(stored, store / run))
    if mesh is None:
        return system
    points = {"k_points": (mesh,) * 3 if mesh else None, "shifted": bool(mesh)}
    return replace(system, engine=partial(system.engine, **points))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", nargs="+", default=["32-300K", "32-600K", "32-900K"])
    parser.add_argument("--k-points", type=int, metavar="N", help="default: those of the system")
    arguments = parser.parse_args()
    for run in arguments.runs:
        n = open_trajectory(arguments.store / run).sizes["time"]
        system = again(arguments.store, run, arguments.k_points)
        generate_snapshots(system, arguments.out / run, n)


if __name__ == "__main__":
    main()
