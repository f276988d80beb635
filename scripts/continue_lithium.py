"""Continue a bundled run of liquid lithium by more ab-initio molecular dynamics.

    python scripts/continue_lithium.py data/lithium-800K.zarr run-1 runs/lithium --steps 3340

The frames of the run are copied to ``runs/lithium/run-1.zarr`` (bundled stores are packed, and a
packed store is not appended to), and the dynamics goes on from the last of them: same settings,
new random numbers. Interrupted or killed, the same command continues; more steps may be asked for
later. `scripts/import_lithium.py` brings the result back.

Needs `make espresso`; a step takes 2.6 to 4 s on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import xarray as xr
from ase import Atoms
from ase.units import Ry

from densitykit.generate.dynamics import energy_drift, molecular_dynamics
from densitykit.generate.espresso import Espresso
from densitykit.io.describe import summarise
from densitykit.io.reader import open_trajectory
from densitykit.io.writer import TrajectoryWriter, copy_frames, create_trajectory

TIME_STEP, INTERVAL = 3.0, 2
SETTINGS = {"temperature": 800.0, "relaxation": 300.0, "lowest_density": 1e-4}


def create(run: xr.Dataset, path: Path, n_frames: int, seed: int) -> None:
    """Make a store that can grow, with the attributes of the run."""
    added = f"frames from {run.sizes['time']} on: densitykit.generate.dynamics, seed {seed}"
    continued = [text for text in (run.attrs.get("continued"), added) if text]
    create_trajectory(
        path,
        n_frames=n_frames,
        grid=run.density.shape[1:],
        cell=run.cell.values,
        numbers=run.numbers.values,
        attrs=run.attrs | {"continued": "; ".join(continued)},
        extra_scalars={"conserved_energy": "eV", "step": "1"},
        keepbits=int(run.density.attrs["keepbits"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("run")
    parser.add_argument("work", type=Path, help="folder of the growing store")
    parser.add_argument("--steps", type=int, required=True, help="from the first frame on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run = open_trajectory(arguments.store / arguments.run).load()
    path = arguments.work / f"{arguments.run}.zarr"
    if not path.exists():
        create(run, path, arguments.steps // INTERVAL + 1, arguments.seed)
    copy_frames(run, TrajectoryWriter(path))
    atoms = Atoms(run.numbers.values, run.positions.values[-1], cell=run.cell.values, pbc=True)
    last = int(run.step[0]) + arguments.steps
    with Espresso(16 * Ry, (2, 2, 2), temperature=800.0, bands=21) as engine:
        molecular_dynamics(
            atoms,
            engine,
            path,
            last,
            time_step=TIME_STEP,
            interval=INTERVAL,
            grid=run.density.shape[1:],
            seed=arguments.seed,
            **SETTINGS,
        )
    print(summarise(path))
    print(f"  drift {energy_drift(open_trajectory(path)):.2f} meV per atom and ps")


if __name__ == "__main__":
    main()
