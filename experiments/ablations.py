r"""What helps an emulator on the grid? Small ones, one thing changed at a time, over seeds.

.. math:: L = L_{LDM} + \lambda_2 L_{sJSD}

of latent diffusion without sJSD, and with its spatial and value reading (`densitykit.metrics`),
each with a weight that makes the term about a sixth of the loss at the end of a training; without
noise on the conditioning latent, and with three times as much; and drawn in several sampler steps,
trained on lower noise levels, instead of the conditional mean in one. All these share one
autoencoder; variants of the size of the latent train their own. Beside them stands the
deterministic U-Net of the same width without a latent, in steps of 6, 12 and 24 fs, and without
the rate of the density.

Seed by seed, initial weights, batches and noise are the same, so that one thing alone differs:
differences *within* a seed say more than those between means. One row per (variant, seed, metric)
goes to a CSV file; what is there is not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from densitykit.assess import error_curves, one_step_table
from densitykit.data.windows import Window, Windows, load_windows
from densitykit.models import FieldEmulator, LatentDiffusion, SurrogateUNet, load_model
from densitykit.models.base import FieldState
from densitykit.models.checkpoint import read_arguments
from densitykit.training import copy_autoencoder, train, train_latent_diffusion
from experiments.arguments import ablation_parser, run_script
from experiments.report import paired_ratios, run_missing

__all__ = ["VARIANTS", "Latent", "Plain", "run_ablations"]


class Latent(NamedTuple):
    """Latent diffusion: arguments of its training, steps of its sampler, channels of its latent.

    Without channels, the autoencoder is the one that all share.
    """

    training: Mapping[str, Any] = {}  # noqa: RUF012
    sampler_steps: int = 1
    channels: int | None = None


class Plain(NamedTuple):
    """Deterministic U-Net: time of a step in fs, and whether it sees the rate of the density."""

    horizon: float = 12.0
    rate: bool = True


_LOW_NOISE = {"loss": {"log_sigma": (0.0, 1.5)}}
VARIANTS = {
    "no sJSD": Latent(),
    "spatial": Latent({"lambda_2": 300.0, "reading": "spatial"}),
    "value": Latent({"lambda_2": 50.0, "reading": "value"}),
    "no conditioning noise": Latent({"loss": {"condition_noise": 0.0}}),
    "conditioning noise 0.3": Latent({"loss": {"condition_noise": 0.3}}),
    "4 sampler steps": Latent(_LOW_NOISE, sampler_steps=4),
    "16 sampler steps": Latent(_LOW_NOISE, sampler_steps=16),
    "latent of 4 channels": Latent(channels=4),
    "latent of 8 channels": Latent(channels=8),
    "latent of 16 channels": Latent(channels=16),
    "U-Net": Plain(),
    "U-Net, 6 fs": Plain(6.0),
    "U-Net, 24 fs": Plain(24.0),
    "U-Net, no rate": Plain(rate=False),
}
SMALL = {"widths": (32, 64), "blocks": (1, 2)}
RECIPE = {"batch": 2, "learning_rate": 2e-3, "ema": 0.99}
COLUMNS = ["variant", "seed", "steps", "metric", "value"]
LEADS = (24.0, 72.0)  # fs


def run_ablations(
    data: str | Path,
    autoencoder: Path,
    out: Path,
    *,
    variants: Sequence[str] = tuple(VARIANTS),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 1200,
    autoencoder_steps: int = 1500,
    run_dir: Path = Path("runs/ablations"),
) -> pd.DataFrame:
    """Train and judge variants with every seed, or what of it is not in the file yet.

    Parameters
    ----------
    data
        Store with splits train and test.
    autoencoder
        Checkpoint whose autoencoder the latent variants share.
    out
        CSV file; rows are added to what it holds.
    variants
        Names of `VARIANTS`.
    seeds
        Of initial weights and training.
    steps
        Of each training.
    autoencoder_steps
        Of an autoencoder that a variant trains for itself.
    run_dir
        States of trainings; an interrupted one is continued.

    Returns
    -------
    pd.DataFrame
        All rows of the file: variant, seed, steps, metric, value.
    """

    @cache
    def windows(horizon: float) -> list[Windows]:
        return [load_windows(data, split, horizon) for split in ("train", "test")]

    def judged(name: str, seed: int, steps: int) -> pd.DataFrame:
        variant = VARIANTS[name]
        training, test = windows(_horizon(variant, autoencoder))
        torch.manual_seed(seed)
        folder = run_dir / f"{_trained_as(name)}, seed {seed}, {steps} steps"
        options = RECIPE | {"steps": steps, "seed": seed, "run_dir": folder}
        if isinstance(variant, Latent):
            model = _latent(variant, autoencoder, training, autoencoder_steps, options)
        else:
            model = _plain(variant, autoencoder, training, options)
        return _errors(model, test)

    wanted = [(v, s, steps) for s in seeds for v in variants]
    return run_missing(out, COLUMNS, COLUMNS[:3], wanted, judged)


def _horizon(variant: Latent | Plain, autoencoder: Path) -> float:
    return (
        variant.horizon if isinstance(variant, Plain) else read_arguments(autoencoder)["horizon"]
    )


def _trained_as(name: str) -> str:
    """The first variant with the same training: those that only sample otherwise share it."""
    variant = VARIANTS[name]
    if isinstance(variant, Plain):
        return name
    same = {k: v._replace(sampler_steps=1) for k, v in VARIANTS.items() if isinstance(v, Latent)}
    return next(k for k, v in same.items() if v == same[name])


def _latent(
    variant: Latent,
    autoencoder: Path,
    training: Windows,
    autoencoder_steps: int,
    options: Mapping[str, Any],
) -> LatentDiffusion:
    """Trained, with the shared autoencoder or one of its own."""
    card = read_arguments(autoencoder) | SMALL
    if variant.channels is not None:
        model = LatentDiffusion(**card | {"latent_channels": variant.channels})
    else:
        model = LatentDiffusion(**card)
        copy_autoencoder(model, load_model(autoencoder))
        autoencoder_steps = 0
    options = {**options, "autoencoder_steps": autoencoder_steps}
    train_latent_diffusion(model, training, **options, **variant.training)
    model.sampler_steps = variant.sampler_steps
    return model


def _plain(
    variant: Plain, autoencoder: Path, training: Windows, options: Mapping[str, Any]
) -> SurrogateUNet:
    """Trained; standardised as the latent models are."""
    card = read_arguments(autoencoder)
    constants = {k: card[k] for k in ("mu", "sigma", "eps")}
    kind = SurrogateUNet if variant.rate else RestingUNet
    model = kind(**constants, horizon=variant.horizon, **SMALL)
    train(model, training, **options)
    return model


class RestingUNet(SurrogateUNet):
    """Sees the density, and nothing of its rate."""

    def init(self, window: Window) -> FieldState:
        state = super().init(window)
        return state.replace(fields=state.fields * torch.tensor([1.0, 0]).reshape(2, 1, 1, 1))


def _errors(model: FieldEmulator, test: Windows) -> pd.DataFrame:
    """After a step, with every fourth window, and after the same times for all steps."""
    table = one_step_table({"": model}, test, every=4)
    leads, curves = error_curves({"": model}, test, round(LEADS[-1] / test.horizon), starts=32)
    at = [round(lead / test.horizon) - 1 for lead in LEADS]
    later = {
        "metric": [f"l2 after {leads[i]:g} fs" for i in at],
        "value": [curves[""][i].mean() for i in at],
    }
    return pd.concat([table, pd.DataFrame(later)])[["metric", "value"]]


def main() -> None:
    of = "autoencoder that the latent variants share"
    parser = ablation_parser(__doc__, VARIANTS, of, "runs/ablations", steps=1200)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    rows = run_ablations(
        arguments.data,
        arguments.checkpoint,
        arguments.out,
        variants=arguments.variants,
        seeds=arguments.seeds,
        steps=arguments.steps,
        run_dir=arguments.run_dir,
    )
    ratios = paired_ratios(rows, "no sJSD", within=["seed", "steps"])
    print(ratios.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    run_script(main)
