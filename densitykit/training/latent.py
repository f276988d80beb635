r"""Training latent diffusion, block by block.

The loss (:mod:`densitykit.training.losses`) falls apart: its autoencoder term does not depend on
the denoiser, nor the denoiser's on the autoencoder. So it is minimised block by block, first the
autoencoder, then, with it frozen, the denoiser: half the cost, and a latent that stands still
while its dynamics is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densitykit.data.windows import Windows
from densitykit.models.diffusion import LatentDiffusion
from densitykit.training.loop import fit
from densitykit.training.losses import LatentDiffusionLoss

__all__ = ["copy_autoencoder", "train_latent_diffusion"]


def train_latent_diffusion(
    model: LatentDiffusion,
    windows: Windows,
    *,
    autoencoder_steps: int,
    steps: int,
    lambda_1: float = 1.0,
    lambda_2: float = 0.0,
    reading: str = "spatial",
    loss: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train the autoencoder, standardise its latent, then train the denoiser on it.

    Parameters
    ----------
    model, windows
        The model and its training windows.
    autoencoder_steps, steps
        Steps of the two blocks; zero skips a block.
    lambda_1, lambda_2, reading
        See :class:`LatentDiffusionLoss`.
    loss
        Other arguments of :class:`LatentDiffusionLoss`, for the denoiser.
    run_dir
        Each block keeps its state in a folder of its own below it.
    options
        Passed to :func:`fit`.

    Returns
    -------
    list[dict[str, float]]
        Rows of both blocks, with "block" 0 and 1.
    """
    folder = Path(run_dir) if run_dir is not None else None
    rows = []
    if autoencoder_steps:
        _train_only(model, model.autoencoder)
        ae_options = {k: v for k, v in options.items() if k not in ("validate", "validate_every")}
        history = fit(
            LatentDiffusionLoss(model, lambda_1=0),
            windows,
            steps=autoencoder_steps,
            run_dir=folder and folder / "autoencoder",
            label="autoencoder",
            **ae_options,
        )
        rows += [{"block": 0, **row} for row in history]
        device = next(model.parameters()).device
        some = windows[windows.every(1, 32)].to(device)
        with torch.no_grad():
            model.set_latent_scales(*model.normalised_pair(some, windows.lag))
    if steps:
        _train_only(model, model.net, model.embed)
        history = fit(
            LatentDiffusionLoss(model, lambda_1, lambda_2, reading, **(loss or {})),
            windows,
            steps=steps,
            run_dir=folder and folder / "denoiser",
            label="denoiser",
            **options,
        )
        rows += [{"block": 1, **row} for row in history]
    return rows


def copy_autoencoder(model: LatentDiffusion, donor: LatentDiffusion) -> None:
    """Copy the autoencoder and the scales of its latent, so that only the denoisers differ."""
    model.autoencoder.load_state_dict(donor.autoencoder.state_dict())
    for name in ("latent_mean", "latent_scale", "increment_scale"):
        getattr(model, name).copy_(getattr(donor, name))


def _train_only(model: nn.Module, *parts: nn.Module) -> None:
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
