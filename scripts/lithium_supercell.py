"""Make sets of larger cells of lithium: configurations by an emulator, their densities by DFT.

    python scripts/lithium_supercell.py data/checkpoints/lithium-nuclear data/lithium-800K.zarr \\
        data/lithium-256.zarr
    python scripts/lithium_supercell.py data/checkpoints/lithium-nuclear data/lithium-800K.zarr \\
        data/lithium-128.zarr --times 2 2 1 --source train --splits train=10 validation=2

Copies of a frame get new velocities and run for 2 ps under the emulator's force field and
thermostat, and on; every picosecond one configuration is kept. No ab-initio dynamics of this size
is needed to ask whether a density is right. Plane waves as for 32 atoms; their shifted 2x2x2 mesh
folds onto half as many points along an axis that is doubled, so what differs is the cell's doing.
May be killed and started again.

Needs `make espresso`; a configuration takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from densitykit.data.windows import step_generator
from densitykit.generate.snapshots import System, generate_snapshots
from densitykit.generate.systems import plane_waves
from densitykit.io.describe import summarise
from densitykit.io.reader import open_split
from densitykit.models import load_model
from densitykit.models.nuclear.emulator import supercell, thermal_velocities

EQUILIBRATION, INTERVAL = 2000.0, 1000.0  # fs


def configurations(
    arguments: argparse.Namespace, n: int, *, seed: int, progress: bool
) -> list[Atoms]:
    """Configurations of several cells, a picosecond apart."""
    checkpoint, times = arguments.checkpoint, tuple(arguments.times)
    model = load_model(checkpoint)
    frame = open_split(arguments.data, arguments.source).isel(time=0).load()
    x = torch.from_numpy(frame.positions.values[None].astype(float))
    x = supercell(x, frame.cell.values, times)
    cell = frame.cell.values * np.array(times)[:, None]
    numbers = np.tile(frame.numbers.values, math.prod(times))
    grid = tuple(t * n for t, n in zip(times, frame.density.shape, strict=True))
    z = torch.from_numpy(numbers)
    v = thermal_velocities(x, model.masses(z), model.temperature, step_generator(seed, 0))
    state = model.init_at(x, v, torch.from_numpy(cell), grid, z)
    found, due = [], EQUILIBRATION
    for k in range(1, 10**9):
        state = model.move(state, step_generator(seed, k))
        if k * model.horizon >= due:
            info = {"temperature": model.temperature, "time": due - EQUILIBRATION}
            info["source"] = f"{checkpoint.name}, {due:g} fs after copies {times}"
            positions = state.positions[0].numpy()
            found.append(Atoms(numbers, positions, cell=cell, pbc=True, info=info))
            due += INTERVAL
        if len(found) == n:
            return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, nargs=3, choices=(1, 2), default=(2, 2, 2))
    parser.add_argument("--source", default="test", help="split whose first frame is copied")
    parser.add_argument("--splits", nargs="+", default=["test=3"], metavar="NAME=COUNT")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    copies = math.prod(arguments.times)
    splits = {name: int(n) for name, n in (x.split("=") for x in arguments.splits)}
    system = System(
        name=arguments.out.stem,
        geometries=partial(configurations, arguments),
        engine=partial(
            plane_waves,
            16.0,
            k_points=tuple(2 // n for n in arguments.times),
            shifted=True,
            temperature=800.0,
            bands=21 * copies,
        ),
        spacing=0.3804,
        keepbits=10,
        splits=splits,
    )
    generate_snapshots(system, arguments.out, seed=arguments.seed)
    print(summarise(arguments.out))


if __name__ == "__main__":
    main()
