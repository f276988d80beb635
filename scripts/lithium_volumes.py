"""Make the densities of lithium at other volumes: what tells a force field the pressure.

    python scripts/lithium_volumes.py data/lithium-800K.zarr data/lithium-volumes.zarr

Frames of the training run, the cell and all in it made larger or smaller: places that no dynamics
at one volume visits, and energies whose differences are the work of the pressure. Plane waves,
mesh of k-points and smearing as in the run. One group for each volume, relative to that of the
run; 1.0 repeats frames of it, to show that the settings agree. May be killed and started again.

Needs `make espresso`; a configuration takes 10 to 20 s on one core.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ase import Atoms

from densitykit.generate.snapshots import System, generate_snapshots
from densitykit.generate.systems import plane_waves
from densitykit.io.describe import summarise
from densitykit.io.reader import open_split

VOLUMES = (1.0, 0.8, 0.88, 0.94, 1.06, 1.14, 1.25)


def scaled_frames(data: Path, volume: float, n: int, *, seed: int, progress: bool) -> list[Atoms]:
    """Frames of the training run, equally far apart, in another volume."""
    run, found = open_split(data, "train"), []
    for i in range(n):
        frame = run.isel(time=i * run.sizes["time"] // n)
        info = {"temperature": float(frame.temperature), "time": float(frame.time)}
        info["source"] = f"{data.name}, split train, in {volume:g} of its volume"
        atoms = Atoms(frame.numbers.values, frame.positions.values, cell=run.cell.values, pbc=True)
        atoms.set_cell(volume ** (1 / 3) * atoms.cell.array, scale_atoms=True)
        atoms.info = info
        found.append(atoms)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, default=6, help="frames at each volume")
    arguments = parser.parse_args()
    run = open_split(arguments.data, "train")
    spacing = 1.0001 * float(run.cell[0, 0]) / run.sizes["x"]  # as many points as the run
    for volume in VOLUMES:
        n = 1 if volume == 1 else arguments.n
        system = System(
            name=f"lithium in {volume:g} of its volume",
            geometries=partial(scaled_frames, arguments.data, volume),
            engine=partial(
                plane_waves, 16.0, k_points=(2, 2, 2), shifted=True, temperature=800.0, bands=24
            ),
            spacing=volume ** (1 / 3) * spacing,
            keepbits=10,
            splits={"train": n},
        )
        path = arguments.out / f"{volume:.2f}"
        generate_snapshots(system, path, n)
        print(summarise(path))


if __name__ == "__main__":
    main()
