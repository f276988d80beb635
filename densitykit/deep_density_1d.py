r"""Learning the density of one-dimensional chains: two recipes.

**paper** (Zepeda-Nunez et al. 2019, appendix A): Adam for 400 epochs on the mean squared error of
all points, in single precision; the weights with the lowest validation error are kept, and the
best of five seeds counts. Learning rate, batch and sizes of layers are not published: here the
rate falls from 0.003 to 0 as a cosine, since at a constant one Adam's own noise is what is left.

**smooth**: the model of :mod:`densitykit.models.smooth_density` in double precision. A linear
least-squares solve finds its polynomials; L-BFGS on all data at once may refine them and the
network beside them: the problem is small, smooth and free of noise, so that curvature pays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from densitykit.chain_maps import ChainSnapshots
from densitykit.chain_training import cosine_rate, polish, train_ensemble
from densitykit.models.deep_density import DeepDensity1D, fit_ansatz
from densitykit.models.smooth_density import SmoothDensity1D, fit_linear

__all__ = ["train_paper", "train_smooth"]


def train_paper(
    training: ChainSnapshots,
    validation: ChainSnapshots,
    *,
    n_near: int = 2,
    seeds: Sequence[int] = range(5),
    run_dir: str | Path | None = None,
    device: str = "cpu",
    sizes: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[list[DeepDensity1D], pd.DataFrame]:
    """Deep Density as published: A to D fitted without networks, then Adam, one model a seed.

    Arguments:
        training, validation: snapshots.
        n_near: neighbours that an atom sees.
        seeds: of the initial weights.
        run_dir: see :func:`densitykit.chain_training.train_ensemble`, to which the ``options`` go.
        device: where to train.
        sizes: further arguments of :class:`densitykit.models.deep_density.DeepDensity1D`.

    Returns:
        The models in the order of the seeds, on the CPU, and the rows of the training.
    """
    species = training.species.unique().tolist()
    models = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(DeepDensity1D(species, n_near, **(sizes or {})))
    few = training.evenly(min(5, len(training)))
    fit_ansatz(models[0], *few.arguments, few.density)
    ansatz = {key: getattr(models[0], key).detach() for key in "ABCD"}
    for model in models:
        model.load_state_dict(ansatz, strict=False)
        model.to(device)
    options = {"learning_rate": 3e-3, "rate": cosine_rate} | options
    history = train_ensemble(models, training, validation, run_dir=run_dir, **options)
    return [model.cpu().eval() for model in models], history


def train_smooth(
    training: ChainSnapshots,
    validation: ChainSnapshots,
    *,
    rounds: int = 0,
    seed: int = 0,
    run_dir: str | Path | None = None,
    **sizes: Any,
) -> tuple[SmoothDensity1D, pd.DataFrame]:
    """The smooth variant: polynomials by linear least squares, then L-BFGS with the network.

    Arguments:
        training, validation: snapshots.
        rounds: of L-BFGS; 0 leaves it at the polynomials, to which no seed matters.
        seed: of the network.
        run_dir: see :func:`densitykit.chain_training.polish`.
        sizes: arguments of :class:`densitykit.models.smooth_density.SmoothDensity1D`.

    Returns:
        The model and the rows of `polish`; the first is that of the polynomials alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmoothDensity1D(training.species.unique().tolist(), **sizes)
    fit_linear(model, *training.arguments, training.density)
    history = polish(model, training, validation, rounds=rounds, run_dir=run_dir)
    return model.eval(), history
