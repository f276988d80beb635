"""Latent diffusion is trained from scratch, and has dynamics only when both blocks are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import moving_atoms

from densitykit.data.windows import Windows
from densitykit.errors import CheckpointError
from densitykit.models import LatentDiffusion
from densitykit.training import train


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows(moving_atoms(np.array([3, 3])), horizon=2.0)


def small(windows: Windows) -> LatentDiffusion:
    torch.manual_seed(0)
    return LatentDiffusion(
        **LatentDiffusion.arguments_for(windows),
        latent_channels=2,
        autoencoder_width=8,
        autoencoder_blocks=1,
        widths=(8,),
        blocks=(1,),
        embedding=8,
    )


def test_both_blocks_from_scratch(windows: Windows) -> None:
    model = small(windows)
    rows = train(model, windows, autoencoder_steps=2, steps=3, batch=2)
    assert [row["block"] for row in rows] == [0, 0, 1, 1, 1]
    assert model.density(model.step(model.init(windows[0]))).isfinite().all()


def test_an_autoencoder_alone_encodes_but_does_not_step(windows: Windows) -> None:
    model = small(windows)
    train(model, windows, autoencoder_steps=2, steps=0, batch=2)
    state = model.init(windows[0])
    assert model.encode(model.normalise(state.fields)).std() > 0
    with pytest.raises(CheckpointError, match="only its autoencoder: it has no dynamics; train"):
        model.step(state)
