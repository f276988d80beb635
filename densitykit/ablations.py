r"""What helps a latent diffusion model? Small ones, one thing changed at a time, over seeds.

.. math:: L = L_{LDM} + \lambda_2 L_{sJSD}

without sJSD, and with its spatial and value reading (`densitykit.metrics`), each with a
weight that makes the term about a sixth of the loss at the end of a training; without noise on
the conditioning latent, and with three times as much; and drawn in several sampler steps, trained
on lower noise levels, instead of the conditional mean in one. All share one
autoencoder and, seed by seed, initial weights, batches and noise, so that one thing alone differs:
differences *within* a seed say more than those between means. One row per (variant, seed, metric)
goes to a CSV file; what is there is not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

from densitykit.evaluation import one_step_table, rollout_table
from densitykit.models import LatentDiffusion, load_model
from densitykit.models.checkpoint import read_arguments
from densitykit.report import known_rows, merge_rows
from densitykit.rollout import Thermostat, rollout
from densitykit.sampling import StatePairs, load_pairs
from densitykit.training import adopt_autoencoder, train_latent_diffusion
from densitykit.transforms import LogNormal

__all__ = ["VARIANTS", "compare_variants", "run_ablations"]

VARIANTS = {
    "no sJSD": {},
    "spatial": {"lambda_2": 300.0, "reading": "spatial"},
    "value": {"lambda_2": 50.0, "reading": "value"},
    "no conditioning noise": {"loss": {"condition_noise": 0.0}},
    "conditioning noise 0.3": {"loss": {"condition_noise": 0.3}},
    "4 sampler steps": {"loss": {"log_sigma": (0.0, 1.5)}},
    "16 sampler steps": {"loss": {"log_sigma": (0.0, 1.5)}},
}
SAMPLER_STEPS = {"4 sampler steps": 4, "16 sampler steps": 16}
SMALL = {"widths": (32, 64), "blocks": (1, 2)}
COLUMNS = ["variant", "seed", "steps", "metric", "value"]
TAU = 30.0  # fs, of the thermostat


def run_ablations(
    data: str | Path,
    autoencoder: Path,
    out: Path,
    *,
    variants: Sequence[str] = tuple(VARIANTS),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 1200,
    rollout_steps: int = 400,
    run_dir: Path = Path("runs/ablations"),
) -> pd.DataFrame:
    """Train and judge variants with every seed, or what of it is not in the file yet.

    Arguments:
        data: store with splits train and test.
        autoencoder: checkpoint whose autoencoder all variants share.
        out: CSV file; rows are added to what it holds.
        variants: names of `VARIANTS`.
        seeds: of initial weights, training and rollouts.
        steps: of each training.
        rollout_steps: of the rollout, with thermostat, from the first test state.
        run_dir: states of trainings; an interrupted one is continued.

    Returns:
        All rows of the file: variant, seed, steps, metric, value.
    """
    rows, known = known_rows(out, COLUMNS, COLUMNS[:3])
    todo = [(v, s) for s in seeds for v in variants if (v, s, steps) not in known]
    if not todo:
        return rows
    horizon = read_arguments(autoencoder)["horizon"]
    train, test = (load_pairs(data, split, horizon) for split in ("train", "test"))
    for variant, seed in todo:
        print(f"{variant}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        model = LatentDiffusion(**read_arguments(autoencoder) | SMALL)
        adopt_autoencoder(model, load_model(autoencoder))
        train_latent_diffusion(
            model,
            train,
            autoencoder_steps=0,
            steps=steps,
            run_dir=run_dir / f"{_trained_as(variant)}, seed {seed}, {steps} steps",
            seed=seed,
            batch=2,
            learning_rate=2e-3,
            ema=0.99,
            **VARIANTS[variant],
        )
        model.sampler_steps = SAMPLER_STEPS.get(variant, 1)
        new = _judged(model, train, test, rollout_steps, seed)
        new = new.assign(variant=variant, seed=seed, steps=steps)
        rows = merge_rows(out, new[COLUMNS], COLUMNS[:3])
    return rows


def _trained_as(variant: str) -> str:
    """The first variant with the same training: those that only sample otherwise share it."""
    return next(name for name, training in VARIANTS.items() if training == VARIANTS[variant])


def _judged(
    model: LatentDiffusion, train: StatePairs, test: StatePairs, steps: int, seed: int
) -> pd.DataFrame:
    """One-step errors, and statistics of a rollout beside the reference."""
    one = one_step_table({"": model}, test, every=4)
    held = Thermostat(model, train, TAU)
    options = {"cell": test.cell, "seed": seed, "progress": False}
    density = rollout(held, test.states[0], steps, **options).density.values
    transform = LogNormal.fit(train.states[:, 0].numpy(), eps=0.0)
    reference = test.states[:: test.lag, 0].numpy()
    table = rollout_table({"rollout": density}, reference, test.cell, transform)
    table = table[table.model == "rollout"]
    return pd.concat([one, table])[["metric", "value"]]


def compare_variants(rows: pd.DataFrame, base: str = "no sJSD") -> pd.DataFrame:
    """Mean ratio of each metric to that of the base variant, paired by seed.

    Arguments:
        rows: from :func:`run_ablations`.
        base: the variant to divide by.

    Returns:
        Rows (variant, metric, ratio, low, high, seeds): the geometric mean of the ratios and its
        95 % interval from Student's t in ln ratio; NaN with one seed.
    """
    wide = rows.pivot_table("value", ["seed", "steps"], ["variant", "metric"], sort=False)
    found = []
    for variant in wide.columns.unique("variant"):
        if variant == base:
            continue
        for metric in wide[variant].columns:
            log = np.log(wide[variant][metric] / wide[base][metric]).dropna()
            mean, n = log.mean(), len(log)
            half = student.ppf(0.975, n - 1) * log.std() / np.sqrt(n) if n > 1 else np.nan
            found.append((variant, metric, *np.exp([mean, mean - half, mean + half]), n))
    return pd.DataFrame(found, columns=["variant", "metric", "ratio", "low", "high", "seeds"])
