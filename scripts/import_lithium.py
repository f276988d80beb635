"""Import ab-initio MD runs of liquid lithium into the bundled store.

    python scripts/import_lithium.py SOURCE data/lithium-800K.zarr

SOURCE holds ``run-1.zarr`` and ``run-2.zarr``, written by Quantum ESPRESSO MD, with the density on
a 32^3 grid (or as `scripts/continue_lithium.py` leaves them, on the grid of the target). Longer
runs drop in: the splits are fractions of whatever is there, or those of another store, so that
models trained before are judged on the same frames. Every step is lossy on purpose and measured
at the end against the source:

* Fourier truncation to 24^3 points (0.12 % relative l2);
* truncation rings in the pseudised cores, where about 12 ppm of the voxels fall below FLOOR or
  even below zero: they are raised to FLOOR;
* 10 mantissa bits are kept (relative rounding error at most 2^-11).

Train and validation come from run-1 with a gap between them that is longer than the
decorrelation time of the density (its autocorrelation is 0.11 at 120 fs and below 0.04 from 180
fs); the test split is all of the independent run-2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import xarray as xr

from densitykit.fields import resample
from densitykit.io.reader import open_trajectory
from densitykit.io.rebuild import pack_trajectory
from densitykit.io.splits import read_splits, write_splits
from densitykit.io.writer import copy_frames, create_trajectory
from densitykit.metrics import relative_l2

GRID = (24, 24, 24)
FLOOR = 1e-4  # angstrom**-3; the smallest value on the source grid is 1.6e-4
KEEPBITS = 10
GAP_FS = 240.0
RUNS = ("run-1", "run-2")


def committed(source: Path) -> xr.Dataset:
    """Open a run; of a store that is still growing, the frames that are there."""
    ds = xr.open_zarr(source, consolidated=False, chunks=None)
    return ds.isel(time=np.isfinite(ds.time.values))


def import_run(source: Path, target: Path) -> None:
    """Copy one run frame by frame, then pack it."""
    ds = committed(source)
    attrs = ds.attrs | {
        "density_grid": f"Fourier-truncated from 45^3 to {GRID[0]}^3; floor {FLOOR} angstrom**-3",
        "seconds_per_step_one_core": 2.6,  # the lower end of what the source's card states
        "licence": "CC-BY-4.0",
    }
    with create_trajectory(
        target,
        n_frames=ds.sizes["time"],
        grid=GRID,
        cell=ds.cell.values,
        numbers=ds.numbers.values,
        attrs=attrs,
        extra_scalars={"conserved_energy": "eV", "step": "1"},
        keepbits=KEEPBITS,
    ) as writer:
        coarse = resample(ds.density.values.astype(np.float64), GRID).clip(FLOOR)
        rest = ds.drop_dims(["x", "y", "z"])
        copy_frames(rest.assign(density=(ds.density.dims, coarse)), writer)
    pack_trajectory(target)


def splits(root: Path) -> dict[str, dict[str, object]]:
    """Train: the first part of run-1; validation: its last eighth; test: all of run-2."""
    time = open_trajectory(root / "run-1").time.values
    validation = len(time) - len(time) // 8 + 2
    gap = round(GAP_FS / float(time[1] - time[0]))
    test = open_trajectory(root / "run-2").sizes["time"]
    return {
        "train": {"run": "run-1", "start": 0, "stop": validation - gap},
        "validation": {"run": "run-1", "start": validation, "stop": len(time)},
        "test": {"run": "run-2", "start": 0, "stop": test},
    }


def report(source: Path, root: Path) -> None:
    """Relative l2 error of the stored density on the source grid, and the size of the store."""
    for run in RUNS:
        original = committed(source / f"{run}.zarr").density.values
        stored = resample(open_trajectory(root / run).density.values, original.shape[1:])
        error = relative_l2(stored, original)
        print(f"{run}: relative l2 error mean {error.mean():.3%}, largest {error.max():.3%}")
    size = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
    print(f"{root}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--splits-of", type=Path, help="keep the splits of this store")
    arguments = parser.parse_args()
    for run in RUNS:
        import_run(arguments.source / f"{run}.zarr", arguments.target / run)
    kept = arguments.splits_of and read_splits(arguments.splits_of)
    write_splits(arguments.target, kept or splits(arguments.target))
    report(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
