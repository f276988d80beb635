r"""Make `data/checkpoints/sodium-chloride-nuclear`: an emulator that does not lean on its memory.

    python scripts/sodium_chloride_emulator.py data/sodium-chloride-900K.zarr \
        data/checkpoints/sodium-chloride-nuclear

Linear parts as `densitykit train nuclear` fits them. The residual net is trained along two steps
in a row, from a memory that is disturbed more than usual: the density of an insulator follows from
where the nuclei are, and what the net remembers is mostly its own errors, which grow eightfold in
13 steps where a single step is trained. Between the ions there is next to no density, so errors
count there by the weight :math:`1/(\rho + 0.05\,\text{angstrom}^{-3})`, in units of its mean.
May be killed and started again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from densitykit.data.windows import Window, Windows
from densitykit.io.reader import open_split
from densitykit.models import save_model
from densitykit.training.loop import fit
from densitykit.training.nuclear import (
    ResidualLoss,
    base_and_residual,
    fit_parts,
    residual_error,
)

EMPTY = 0.05  # angstrom**-3
LOSS = {"memory_noise": 1.0, "white_noise": 0.3, "forget": 0.3}


class EvenLoss(ResidualLoss):
    """The loss of the residual, weighted so that voids count."""

    def inputs(self, window: Window) -> tuple[Tensor, ...]:
        fields, residual = super().inputs(window)
        net = self.model.residual_net
        rho = fields[:, :, 0] * net.scales[0] + net.mean + residual * net.scales[2]
        weight = 1 / (rho.clamp(min=0) + EMPTY)
        return fields, residual, weight / weight.mean()

    def forward(
        self, fields: Tensor, residual: Tensor, weight: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        errors = [
            (weight[:, k] * (guess - residual[:, k]).square()).mean()
            for k, guess in enumerate(self.unrolled(fields, generator))
        ]
        return {"loss": torch.stack(errors).mean()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/sodium-chloride"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    run, held_out = (open_split(arguments.data, s).load() for s in ("train", "validation"))
    model, card = fit_parts(run)
    windows = Windows(run, model.horizon, context=1, steps=2)
    base, residual = base_and_residual(model, windows[windows.every(1, 256)])
    model.residual_net.set_scales(base, base[:, 1:] - base[:, :-1], residual)
    watched = Windows(held_out, model.horizon, context=1, steps=13)
    rows = fit(
        EvenLoss(model, **LOSS),
        windows,
        steps=arguments.steps,
        batch=2,
        learning_rate=2e-3,
        run_dir=arguments.run_dir,
        validate=lambda: residual_error(model, watched, every=5),
        validate_every=300,
        label="residual net",
    )
    provenance = {
        "data": f"{arguments.data}, split train",
        "command": f"python scripts/sodium_chloride_emulator.py {arguments.data} {arguments.out}",
        "minutes": round((time.process_time() - started) / 60, 1),
        "last": rows[-1],
    }
    model.residual_net.net.half()
    print(save_model(model, arguments.out, card, provenance))


if __name__ == "__main__":
    main()
