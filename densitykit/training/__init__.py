"""One way to train, to resume and to watch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from densitykit.assess.one_step import validation_error
from densitykit.data.windows import Windows
from densitykit.errors import ShapeError
from densitykit.models.base import FieldEmulator
from densitykit.models.diffusion import LatentDiffusion
from densitykit.models.nuclear.emulator import NuclearEmulator
from densitykit.training.latent import copy_autoencoder, train_latent_diffusion
from densitykit.training.loop import fit
from densitykit.training.losses import LatentDiffusionLoss, OneStepLoss
from densitykit.training.nuclear import train_emulator

__all__ = [
    "LatentDiffusionLoss",
    "OneStepLoss",
    "copy_autoencoder",
    "fit",
    "train",
    "train_latent_diffusion",
]


def train(
    model: nn.Module,
    windows: Windows,
    held_out: Windows | None = None,
    *,
    steps: int = 6000,
    run_dir: str | Path | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train a model by the loss that belongs to it, in place.

    Parameters
    ----------
    model
        A field emulator: latent diffusion by its own loss, block by block
        (:func:`train_latent_diffusion`), others by the error of a step from a noisy start
        (:class:`OneStepLoss`). An emulator through the nuclei, of which
        :func:`densitykit.training.nuclear.fit_parts` has fitted the rest: its residual net. Or a
        module of your own that is an objective
        (:class:`densitykit.training.loop.Objective`).
    windows
        Training windows.
    held_out
        Windows to watch the one-step error on.
    steps, run_dir, **options
        See :func:`densitykit.training.loop.fit`.

    Returns
    -------
    list of dict
        One row a step.
    """
    options |= {"steps": steps, "run_dir": run_dir}
    if isinstance(model, NuclearEmulator):
        watched = None if held_out is None else held_out.run
        return train_emulator(model, windows.run, watched, **options)
    if held_out is not None:
        options["validate"] = partial(validation_error, model, held_out)
    if isinstance(model, LatentDiffusion):
        return train_latent_diffusion(model, windows, **{"autoencoder_steps": steps} | options)
    if isinstance(model, FieldEmulator):
        noise = {k: options.pop(k) for k in ("input_noise",) if k in options}
        return fit(OneStepLoss(model, **noise), windows, **options)
    if not callable(getattr(model, "inputs", None)):
        raise ShapeError(
            f"a {type(model).__name__} says not how it is trained; give it inputs(window) and a "
            "forward(*inputs, generator) that returns its loss, see docs/your-own-model.md"
        )
    return fit(model, windows, **options)
