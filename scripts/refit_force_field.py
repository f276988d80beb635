"""Fit the force field of an emulator with nuclei anew; its residual net does not depend on it.

    python scripts/refit_force_field.py data/checkpoints/lithium-nuclear data/lithium-800K.zarr \\
        data/lithium-volumes.zarr data/checkpoints/lithium-nuclear

Saves training the net again, which is driven along the true path of the nuclei and never sees the
forces.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from densitykit.io.reader import open_runs, open_split
from densitykit.models import load_model, read_provenance, save_model
from densitykit.models.checkpoint import read_arguments
from densitykit.models.nuclear.force_field import fit_force_field


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("volumes", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model, card = load_model(arguments.checkpoint), read_arguments(arguments.checkpoint)
    train, volumes = open_split(arguments.data, "train"), open_runs(arguments.volumes)
    options = {"species": model.species} | card["force_field"]
    field = fit_force_field(train, volumes=volumes, **options)
    model.force_field.load_state_dict(field.state_dict())
    provenance = read_provenance(arguments.checkpoint)
    provenance["force_field"] = f"fitted to {arguments.data} (train) and {arguments.volumes}"
    print(save_model(model, arguments.out, card, provenance))


if __name__ == "__main__":
    main()
