r"""Teach the residual net of an emulator larger cells as well: `lithium-nuclear` goes on.

    python scripts/refine_lithium.py data/checkpoints/lithium-nuclear data/lithium-800K.zarr \
        data/lithium-128.zarr data/checkpoints/lithium-nuclear --steps 1500

A net that has seen one cell of 32 atoms takes the images of that cell for physics: its error is
more than twice as large in a cell that has none. Here each step takes, beside the batch of the run
(`densitykit.training.nuclear.ResidualLoss`), one snapshot of a larger cell, without a past:

* half of the time at rest, with a disturbed memory of its own residual,
* else without memory, from nuclei that came from elsewhere by a thermal step, for which the
  superposition needs no density functional.

May be killed and started again. The linear parts stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from densitykit.data.windows import Window, Windows
from densitykit.io.reader import open_split
from densitykit.models import NuclearEmulator, load_model, read_provenance, save_model
from densitykit.models.checkpoint import read_arguments
from densitykit.models.nuclear.emulator import thermal_velocities
from densitykit.training.loop import fit
from densitykit.training.nuclear import ResidualLoss, base_and_residual, residual_error


class LargerCells(ResidualLoss):
    """The loss of the run, plus that of snapshots in larger cells, with equal weights."""

    def __init__(self, model: NuclearEmulator, snapshots: Windows, **options: float) -> None:
        super().__init__(model, **options)
        self.snapshots = snapshots
        self.settings |= {"snapshots": snapshots.fingerprint()}

    def forward(
        self, fields: Tensor, residual: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        window = self.snapshots.sample_batch(1, generator)
        inputs, target = self.still(window, generator)
        guess = self.model.residual_net.advance(inputs)
        large = (guess[:, 0] - target).square().mean()
        small = super().forward(fields, residual, generator)["loss"]
        return {"loss": small + large, "run": small.detach(), "larger": large.detach()}

    def still(self, window: Window, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (1, 3, *) and residual (1, *) of a snapshot, normalised."""
        net = self.model.residual_net
        base, residual = (x[:, 0] for x in base_and_residual(self.model, window))
        if torch.rand((), generator=generator) < 0.5:
            fields = net.normalise(torch.stack([base, 0 * base, residual], dim=1))
            memory = self._disturbed(fields[0, 2], generator)[None, None]
            return torch.cat([fields[:, :2], memory], dim=1), residual / net.scales[2]
        x, model = window.positions[:, -1], self.model
        v = thermal_velocities(
            x.double(), model.masses(window.numbers), model.temperature, generator
        )
        before = model.superposition(
            x.double() - model.horizon * v, window.cell.double(), base.shape[1:], window.numbers
        )
        change = base - before.float()
        fields = net.normalise(torch.stack([base, change, 0 * residual], dim=1))
        return fields, residual / net.scales[2]


def error_at_rest(model: NuclearEmulator, snapshots: Windows) -> dict[str, float]:
    """Mean relative l2 error of the density of given nuclei, in larger cells."""
    errors = []
    for i in range(len(snapshots)):
        window = snapshots[[i]]
        x, truth = window.positions[:, -1].double(), window.at(0)
        start = model.init_at(x, 0 * x, window.cell, window.grid, window.numbers)
        guess = model.density(model.converge_density(start))
        errors.append(float((guess - truth).norm() / truth.norm()))
    return {"larger_l2": sum(errors) / len(errors)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("checkpoint", "data", "larger", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/refine-lithium"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(arguments.checkpoint)
    run, held_out = (open_split(arguments.data, s).load() for s in ("train", "validation"))
    windows = Windows(run, model.horizon, context=1)
    watched = Windows(held_out, model.horizon, context=1, steps=40)
    stills = [
        Windows(open_split(arguments.larger, s).load(), None, context=1, steps=0)
        for s in ("train", "validation")
    ]

    def validate() -> dict[str, float]:
        return residual_error(model, watched, every=20) | error_at_rest(model, stills[1])

    print(before := validate())
    rows = fit(
        LargerCells(model, stills[0]),
        windows,
        steps=arguments.steps,
        batch=4,
        learning_rate=arguments.rate,
        run_dir=arguments.run_dir,
        validate=validate,
        validate_every=250,
        label="larger cells",
    )
    card, provenance = read_arguments(arguments.checkpoint), read_provenance(arguments.checkpoint)
    names = " ".join(str(getattr(arguments, n)) for n in ("checkpoint", "data", "larger", "out"))
    provenance["refined"] = {
        "command": f"python scripts/refine_lithium.py {names} --steps {arguments.steps}",
        "before": before,
        "last": rows[-1],
        "minutes": round(rows[-1]["seconds"] / 60, 1),
    }
    print(rows[-1])
    print(save_model(model, arguments.out, card, provenance))


if __name__ == "__main__":
    main()
