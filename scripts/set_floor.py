"""Make the densities of a bundled map positive: set the floor of a checkpoint.

    python scripts/set_floor.py CHECKPOINT RUN FLOOR [FLOOR ...]

Of the floors (angstrom**-3; 0 leaves densities as they are) the one is taken with which values of
ln rho are as frequent in predictions as in the frames of a run, that is with the least value-sJSD.
Give frames of training and validation. Maps that are trained from now on have a floor in their
recipe (`densitykit.training.linear.default_recipe`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from densitykit.assess.rollouts import value_histograms
from densitykit.data.transforms import LogNormal
from densitykit.io.reader import open_trajectory
from densitykit.metrics import jensen_shannon
from densitykit.models import load_model, save_model
from densitykit.models.checkpoint import read_arguments, read_provenance
from densitykit.training.linear import atoms_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("floors", type=float, nargs="+")
    parser.add_argument("--frames", type=int, default=35, help="the first so many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, run = load_model(arguments.checkpoint), open_trajectory(arguments.run)
    truth = run["density"][: arguments.frames].values.astype(float)
    logs = np.log(np.maximum(truth, 1e-6))
    transform = LogNormal(float(logs.mean()), float(logs.std()), 0.0)
    right = value_histograms(truth, transform).mean(axis=0)
    errors = {}
    for model.floor in arguments.floors:
        rho = np.stack([model.density(atoms_of(run, i), x.shape) for i, x in enumerate(truth)])
        found = value_histograms(rho, transform).mean(axis=0)
        errors[model.floor] = float(jensen_shannon(found, right))
        l1 = np.abs(rho - truth).sum() / truth.sum()
        print(f"{model.floor:g}: value-sJSD {errors[model.floor]:.2e}, l1 {l1:.5f}", flush=True)
    card = read_arguments(arguments.checkpoint) | {"floor": min(errors, key=errors.get)}
    told = {"floor": f"value-sJSD of {len(truth)} frames of {arguments.run}: {errors}"}
    save_model(model, arguments.checkpoint, card, read_provenance(arguments.checkpoint) | told)
    print(f"{arguments.checkpoint}: floor {card['floor']:g}")


if __name__ == "__main__":
    main()
