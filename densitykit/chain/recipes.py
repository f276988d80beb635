r"""Learning the density of one-dimensional chains: two recipes.

**paper** (Zepeda-Nunez et al. 2019, appendix A): Adam for 400 epochs on the mean squared error of
all points, in single precision; the weights with the lowest validation error are kept, and the
best of five seeds counts. Learning rate, batch and sizes of layers are not published: here a
batch is one snapshot, and the rate falls from 0.005 to 0 as a cosine, since at a constant one
Adam's own noise is what is left.

**smooth**: the model of :mod:`densitykit.chain.smooth_density` in double precision, found by one
linear least-squares solve: the problem is smooth and free of noise.

**Settings of the smooth variant** were chosen on validation data. That of all chains is
for transfer: the longer mixed chain has metal atoms with metal on both sides further than
the short one, so its model may combine what it has seen in any of the three, in stretches of at
most four atoms, which is as long as those of one species in the short mixed chain are (``spans``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from densitykit.chain.deep_density import DeepDensity1D, fit_ansatz
from densitykit.chain.smooth_density import SmoothDensity1D
from densitykit.chain.snapshots import ChainSnapshots
from densitykit.chain.training import cosine_rate, fit_linear, train_ensemble

__all__ = ["PUBLISHED", "SMOOTH", "Entry", "Smooth", "train_paper", "train_smooth"]


class Entry(NamedTuple):
    """One entry of a table: a system, the neighbours an atom sees, the training snapshots."""

    system: str
    n_near: int
    samples: int


class Smooth(NamedTuple):
    """A smooth model: training snapshots by system, and the sizes of the model."""

    samples: dict[str, int]
    sizes: dict[str, Any]


#: validation MSE of the paper in 1/bohr^2, best of five
PUBLISHED = dict(
    zip(
        [Entry("insulator", n, 100) for n in range(1, 8)]
        + [Entry("metal", n, 100) for n in range(1, 8)]
        + [Entry("mixed", 2, n) for n in (100, 200, 400)],
        [1.91e-8, 4.02e-8, 2.26e-8, 5.02e-8, 1.38e-7, 1.39e-7, 1.13e-7]
        + [9.11e-10, 1.08e-9, 1.04e-9, 1.10e-9, 3.00e-9, 7.65e-9, 3.53e-9]
        + [1.87e-7, 6.94e-8, 4.40e-8],
        strict=True,
    )
)

SMOOTH = {
    "insulator": Smooth(
        {"insulator": 100}, {"n_near": 4, "spans": [4, 4, 4], "waves": 40, "cutoff": 20.0}
    ),
    "metal": Smooth(
        {"metal": 100}, {"n_near": 6, "spans": [6, 6], "waves": 24, "cutoff": 32.0, "decay": 12.0}
    ),
    "mixed": Smooth(
        {"mixed": 400},
        {"n_near": 6, "spans": [6, 6, 3], "waves": 40, "cutoff": 24.0, "decay": 8.0},
    ),
    "all": Smooth(
        {"insulator": 100, "metal": 100, "mixed": 400},
        {"n_near": 6, "spans": [3, 3], "waves": 40, "cutoff": 24.0},
    ),
}


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

    Parameters
    ----------
    training, validation
        Snapshots.
    n_near
        Neighbours that an atom sees.
    seeds
        Of the initial weights.
    run_dir
        See :func:`densitykit.chain.training.train_ensemble`, to which the ``options`` go.
    device
        Where to train.
    sizes
        Further arguments of :class:`densitykit.chain.deep_density.DeepDensity1D`.

    Returns
    -------
    tuple[list[DeepDensity1D], pd.DataFrame]
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
    options = {"learning_rate": 5e-3, "rate": cosine_rate, "batch": 1} | options
    history = train_ensemble(models, training, validation, run_dir=run_dir, **options)
    return [model.cpu().eval() for model in models], history


def train_smooth(sets: Sequence[ChainSnapshots], **sizes: Any) -> SmoothDensity1D:
    """The smooth variant, in double precision, by one linear least-squares solve.

    Parameters
    ----------
    sets
        Training snapshots of one chain, or of several that one model is to serve.
    sizes
        Arguments of :class:`densitykit.chain.smooth_density.SmoothDensity1D`.
    """
    species = sorted({s for data in sets for s in data.species.tolist()})
    model = SmoothDensity1D(species, **sizes)
    fit_linear(model, sets)
    return model.eval()
