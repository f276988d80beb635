"""Make `data/checkpoints/aluminium-nuclear`: a force field of snapshots, and their map.

    python scripts/aluminium_emulator.py data/aluminium.zarr data/checkpoints/aluminium-nuclear

The linear force field is fitted to the Kohn-Sham forces and energies of all training snapshots,
the density is drawn by `deep-density-aluminium`, which was fitted to their densities. So the
emulator moves solid aluminium though nobody has computed a trajectory. Printed are the rms errors
of the forces on the test snapshots, those of effective-medium theory (ASE's EMT) beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from ase.calculators.emt import EMT

from densitykit.generate.film import CalculatorForces
from densitykit.io.reader import open_splits
from densitykit.models import NuclearEmulator, load_model, save_model
from densitykit.models.checkpoint import read_arguments
from densitykit.models.nuclear.force_field import as_double, fit_force_field, numbers_of

FIELD = {"cutoff": 6.0, "closest": 1.9, "radial": 6, "degree": 3, "pair": 12}


def force_errors(model: object, run: xr.Dataset) -> tuple[float, float]:
    """Rms error of forces, and rms force, eV/angstrom."""
    x, cell = as_double(run["positions"]), as_double(run["cell"])
    error = model.forces(x, cell, numbers_of(run)).numpy() - run["forces"].values
    return tuple(float(np.sqrt(np.mean(f**2))) for f in (error, run["forces"].values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run.load() for run in open_splits(arguments.data, "train")]
    drawn = arguments.data.parent / "checkpoints" / "deep-density-aluminium"
    field = fit_force_field(runs[-1], 1, volumes=runs[:-1], species=(13,), **FIELD)
    card = {"horizon": 12.0, "substeps": 4, "temperature": 300.0, "relaxation": 300.0}
    card |= {"force_field": FIELD, "density": read_arguments(drawn), "widths": []}
    model = NuclearEmulator(**card | {"force_field": field, "density": load_model(drawn)})
    errors = {}
    for run in open_splits(arguments.data, "test"):
        found = [force_errors(forces, run) for forces in (field, CalculatorForces(EMT()))]
        errors[run.attrs["split"]] = [round(x, 4) for x in (*found[0], found[1][0])]
        print(
            "{}: field {}, of {}, EMT {} eV/angstrom".format(
                run.attrs["split"], *errors[run.attrs["split"]]
            )
        )
    provenance = {"data": f"{arguments.data}, splits train", "force_errors": errors}
    provenance |= {
        "command": f"python scripts/aluminium_emulator.py {arguments.data} {arguments.out}"
    }
    print(save_model(model, arguments.out, card, provenance))


if __name__ == "__main__":
    main()
