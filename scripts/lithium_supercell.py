"""Make the 256-atom test set: configurations by an emulator, their densities by DFT.

    python scripts/lithium_supercell.py data/checkpoints/lithium-nuclear data/lithium-800K.zarr \\
        data/lithium-256.zarr

Eight copies of a test frame, in a cell with twice the edges, get new velocities and run for 2 ps
under the emulator's force field and thermostat, and on; every picosecond one configuration is
kept. No ab-initio dynamics of this size is needed to ask whether a density is right. Plane waves
as for 32 atoms; the mesh of k-points folds onto the single point (1/2, 1/2, 1/2) of this cell, so
what differs is the model's doing. May be killed and started again.

Needs `make espresso`; a configuration takes some minutes on one core.
"""

from __future__ import annotations

import argparse
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
    checkpoint: Path, data: Path, n: int, *, seed: int, progress: bool
) -> list[Atoms]:
    """Configurations of 256 atoms, a picosecond apart."""
    model, frame = load_model(checkpoint), open_split(data, "test").isel(time=0).load()
    cell = frame.cell.values
    x = supercell(torch.from_numpy(frame.positions.values[None].astype(float)), cell)
    numbers, grid = np.tile(frame.numbers.values, 8), tuple(2 * n for n in frame.density.shape)
    z = torch.from_numpy(numbers)
    v = thermal_velocities(x, model.masses(z), model.temperature, step_generator(seed, 0))
    state = model.init_at(x, v, torch.from_numpy(2 * cell), grid, z)
    found, due = [], EQUILIBRATION
    for k in range(1, 10**9):
        state = model.move(state, step_generator(seed, k))
        if k * model.horizon >= due:
            info = {"temperature": model.temperature, "time": due - EQUILIBRATION}
            info["source"] = f"{checkpoint.name}, {due:g} fs after 2 x 2 x 2 test frames"
            positions = state.positions[0].numpy()
            found.append(Atoms(numbers, positions, cell=2 * cell, pbc=True, info=info))
            due += INTERVAL
        if len(found) == n:
            return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    system = System(
        name="lithium-256",
        geometries=partial(configurations, arguments.checkpoint, arguments.data),
        engine=partial(
            plane_waves, 16.0, k_points=(1, 1, 1), shifted=True, temperature=800.0, bands=168
        ),
        spacing=0.3804,
        keepbits=10,
        splits={"test": arguments.n},
    )
    generate_snapshots(system, arguments.out, arguments.n, seed=arguments.seed)
    print(summarise(arguments.out))


if __name__ == "__main__":
    main()
