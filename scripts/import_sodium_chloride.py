"""Put two runs of hot rock salt into the bundled store.

    densitykit generate sodium-chloride runs/salt-1.zarr --seed 1 --steps N
    densitykit generate sodium-chloride runs/salt-2.zarr --seed 2 --steps M
    python scripts/import_sodium_chloride.py runs/salt-1.zarr runs/salt-2.zarr OUT

The first 250 fs of each, in which the displaced crystal becomes hot, are left out. Train and
validation come from the first run with a gap between them, the test split is all of the second,
which starts from other displacements and has other random numbers. Runs that are still growing
are taken as far as they are. The density loses on purpose, to be small: Fourier components beyond
24 x 32 x 20 points, what is below FLOOR where the truncated series rings about the pseudised
cores, and bits; the script tells how much, in relative l2 norm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from densitykit.fields import resample
from densitykit.generate.engine import valence_charges
from densitykit.io.reader import open_trajectory
from densitykit.io.rebuild import pack_trajectory
from densitykit.io.splits import write_splits
from densitykit.io.writer import copy_frames, create_trajectory
from densitykit.metrics import relative_l2

GRID = (24, 32, 20)
FLOOR = RESOLUTION = 2.0**-13  # angstrom**-3
EQUILIBRATION_FS = 250.0
GAP_FS = 150.0
VALIDATION = 0.15  # of the first run
KEEPBITS = 10
CHARGES = {"Na": 1, "Cl": 7}
SECONDS = 4.2  # of processor time a step, as the card states


def import_run(source: Path, target: Path) -> None:
    """Truncate and copy what comes after the equilibration, frame by frame, then pack it."""
    run = open_trajectory(source)
    run = run.isel(time=run.time.values >= EQUILIBRATION_FS)
    attrs = {k: v for k, v in run.attrs.items() if k not in ("history", "schema_version")}
    attrs |= {"valence_charges": CHARGES, "licence": "CC-BY-4.0"}
    attrs["seconds_per_step_one_core"] = SECONDS
    attrs["density_grid"] = f"Fourier-truncated to {GRID}; floor {FLOOR:g} angstrom**-3"
    with create_trajectory(
        target,
        n_frames=run.sizes["time"],
        grid=GRID,
        cell=run.cell.values,
        numbers=run.numbers.values,
        valence_charges=valence_charges(attrs, run.numbers.values),
        attrs=attrs,
        extra_scalars={"conserved_energy": "eV", "step": "1"},
        keepbits=KEEPBITS,
        resolution=RESOLUTION,
    ) as writer:
        coarse = resample(run.density.values.astype(float), GRID).clip(FLOOR)
        rest = run.drop_dims(["x", "y", "z"])
        copy_frames(rest.assign(density=(run.density.dims, coarse)), writer)
    pack_trajectory(target)
    report(run.density.values, open_trajectory(target).density.values)


def report(source: NDArray[np.floating], stored: NDArray[np.floating]) -> None:
    """Tell what truncation, floor and bits have cost, in all and after the truncation."""
    coarse = resample(source.astype(float), GRID)
    whole = relative_l2(resample(stored, source.shape[1:]), source).mean()
    rest = relative_l2(stored, coarse).mean()
    raised = (coarse < FLOOR).mean()
    print(
        f"relative l2: {whole:.3%}, of floor and bits {rest:.3%}; raised to the floor {raised:.3%}"
    )


def splits(first: xr.Dataset, second: xr.Dataset) -> dict[str, dict[str, object]]:
    """Train and validation of the first run, with a gap between them; test: the second."""
    n, spacing = first.sizes["time"], float(first.time[1] - first.time[0])
    validation = n - round(VALIDATION * n)
    return {
        "train": {"run": "run-1", "start": 0, "stop": validation - round(GAP_FS / spacing)},
        "validation": {"run": "run-1", "start": validation, "stop": n},
        "test": {"run": "run-2", "start": 0, "stop": second.sizes["time"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    for run, source in (("run-1", arguments.first), ("run-2", arguments.second)):
        import_run(source, arguments.target / run)
    both = (open_trajectory(arguments.target / run) for run in ("run-1", "run-2"))
    write_splits(arguments.target, splits(*both))
    size = sum(f.stat().st_size for f in arguments.target.rglob("*") if f.is_file())
    print(f"{arguments.target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
