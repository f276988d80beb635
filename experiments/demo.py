"""The main job, end to end, on the bundled trajectory: train, roll out, compare, report.

Two small latent diffusion models are trained, with and without the sJSD term, on the same
autoencoder, from the same seed and for the same number of steps, and a small emulator whose
latent is the nuclei. All are rolled out from an unseen state of the independent test run, beside
the bundled checkpoints; baselines stand beside them in the table. A table and a page of figures
say how they did.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from lightning_fabric import Fabric

from densitykit import plot
from densitykit.analysis.modes import structure_factor
from densitykit.assess import assess, error_curves, pivot_metrics, validation_error
from densitykit.assess.rollouts import standardised
from densitykit.data.transforms import LogNormal
from densitykit.data.windows import Windows, load_windows
from densitykit.io.reader import open_split, open_trajectory
from densitykit.metrics import value_distribution
from densitykit.models import (
    Emulator,
    FieldEmulator,
    LatentDiffusion,
    NuclearEmulator,
    baselines,
    load_model,
)
from densitykit.rollout import Thermostat, rollout
from densitykit.statistics import block_bootstrap, decorrelation_time
from densitykit.training import copy_autoencoder, train_latent_diffusion
from densitykit.training.nuclear import fit_parts, train_emulator
from experiments.arguments import run_script
from experiments.report import write_report

__all__ = ["run"]

HORIZON = 12.0
SMALL = {
    "latent_channels": 8,
    "autoencoder_width": 32,
    "autoencoder_blocks": 1,
    "widths": (32, 64),
    "blocks": (1, 2),
}
LAMBDA_2 = 300.0
REFERENCE = "ab-initio MD"
Rows = list[dict[str, float]]


def run(
    data: str | Path = "data/lithium-800K.zarr",
    checkpoints: str | Path = "data/checkpoints",
    out: str | Path = "demo",
    autoencoder_steps: int = 1200,
    steps: int = 1200,
    nuclear_steps: int = 400,
    rollout_steps: int = 240,
    seed: int = 0,
) -> pd.DataFrame:
    """Train, roll out, compare; write table.csv, scores.csv and report.html to ``out``.

    Parameters
    ----------
    data
        Store with splits train, validation and test.
    checkpoints
        Folder of the bundled models.
    out
        Folder for everything made here; an interrupted training in it is continued.
    autoencoder_steps, steps, nuclear_steps
        Training steps of the autoencoder, of each
        denoiser, and of the residual net of the emulator with nuclei.
    rollout_steps
        Steps of each rollout.
    seed
        Of initial weights, training and sampling.

    Returns
    -------
    pd.DataFrame
        The table, one line a model.
    """
    out, stage = Path(out), _Stages()
    training, held_out, test = (
        load_windows(data, s, HORIZON) for s in ("train", "validation", "test")
    )
    print(training, test, sep="\n")
    models, history = _train_both(training, held_out, out, autoencoder_steps, steps, seed, stage)
    device = next(iter(models.values())).latent_mean.device
    stage(f"training the emulator through nuclei, {nuclear_steps} steps")
    models["demo nuclear"], history["demo nuclear"] = _train_nuclear(
        data, out, nuclear_steps, seed
    )
    for path in sorted(Path(checkpoints).glob("lithium-*.safetensors")):
        models[f"bundled {path.stem.removeprefix('lithium-')}"] = load_model(path).to(device)
    runs = _roll_out(models, training, test, out, rollout_steps, seed, stage)
    scores = []
    stage("fitting the baselines")
    for name, emulator in (models | baselines(training)).items():
        stage(f"judging {name}")
        judged = {name: runs[name]} if name in runs else {}
        scores.append(assess(data, {name: emulator}, judged, every=2, cost=True))
    pd.concat(scores).to_csv(out / "scores.csv", index=False)
    table = pivot_metrics(scores)
    table.to_csv(out / "table.csv")
    stage("errors along rollouts, and the report")
    write_report(
        out / "report.html",
        "Liquid lithium at 800 K: emulators beside ab-initio MD",
        _sections(models | baselines(training), runs, table, history, training, test),
    )
    print(table.T.to_string(float_format=lambda x: f"{x:.3g}", na_rep="-"))
    stage(f"done: {out}/report.html and {out}/table.csv")
    return table


class _Stages:
    """Says what comes next, and how many minutes have gone by."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def __call__(self, what: str) -> None:
        print(f"{(time.perf_counter() - self.started) / 60:5.1f} min  {what}", flush=True)


def _train_both(
    training: Windows,
    held_out: Windows,
    out: Path,
    autoencoder_steps: int,
    steps: int,
    seed: int,
    stage: _Stages,
) -> tuple[dict[str, Emulator], dict[str, Rows]]:
    """One autoencoder, then a denoiser without and one with the sJSD term."""
    models: dict[str, Emulator] = {}
    history = {}
    for name, lambda_2 in (("demo without sJSD", 0.0), ("demo with sJSD", LAMBDA_2)):
        torch.manual_seed(seed)
        model = LatentDiffusion(**LatentDiffusion.arguments_for(training), **SMALL)
        if models:
            copy_autoencoder(model, models["demo without sJSD"])
        first = 0 if models else autoencoder_steps
        stage(f"training {name}, " + (f"{first} + " if first else "") + f"{steps} steps")
        history[name] = train_latent_diffusion(
            model,
            training,
            autoencoder_steps=first,
            steps=steps,
            lambda_2=lambda_2,
            run_dir=out / "training" / name.replace(" ", "-"),
            seed=seed,
            batch=2,
            learning_rate=2e-3,
            ema=0.99,  # a short training forgets fast
            validate=partial(validation_error, model, held_out),
            validate_every=max(1, steps // 6),
            fabric=Fabric(accelerator="auto", devices=1),
        )
        models[name] = model
    return models, history


def _train_nuclear(
    data: str | Path, out: Path, steps: int, seed: int
) -> tuple[NuclearEmulator, Rows]:
    """An emulator whose latent is the nuclei, with a small residual net."""
    torch.manual_seed(seed)
    run, held_out = (open_split(data, s).load() for s in ("train", "validation"))
    small = {"widths": SMALL["widths"], "blocks": SMALL["blocks"]}
    model, _ = fit_parts(run, HORIZON, every=48, **small)
    options = {"ema": 0.98, "seed": seed, "validate_every": max(1, steps // 4)}
    folder = out / "training" / "demo-nuclear"
    rows = train_emulator(model, run, held_out, steps=steps, run_dir=folder, **options)
    return model, rows


def _roll_out(
    models: dict[str, Emulator],
    training: Windows,
    test: Windows,
    out: Path,
    n: int,
    seed: int,
    stage: _Stages,
) -> dict[str, xr.Dataset]:
    """Rollouts from the first test window, kept as stores."""
    shutil.rmtree(out / "rollouts", ignore_errors=True)
    runs = {}
    for name, emulator in models.items():
        # an emulator with nuclei has a thermostat of its own
        on_grid = isinstance(emulator, FieldEmulator)
        stage(f"rollout of {name}" + ", with thermostat" * on_grid + f", {n} steps")
        path = out / "rollouts" / f"{name.replace(' ', '-')}.zarr"
        rollout(
            Thermostat(emulator, training) if on_grid else emulator,
            test[0],
            n,
            path=path,
            seed=seed,
        )
        runs[name] = open_trajectory(path).load()
    return runs


def _sections(
    emulators: dict[str, Emulator],
    runs: dict[str, xr.Dataset],
    table: pd.DataFrame,
    history: dict[str, Rows],
    training: Windows,
    test: Windows,
) -> list[tuple[str, str, go.Figure | None]]:
    """Heading, text and figure of each section of the report."""
    fields = {name: run.density.values for name, run in runs.items()}
    best = min(fields, key=lambda name: table.loc[name, "one-step l2"])
    cell, length = test.cell.numpy(), min(map(len, fields.values()))
    later = range(test.context - 1, len(test.times), test.lag)
    truth = np.stack([test.frames[i].numpy() for i in later])
    length = min(length, len(truth))
    times, curves = error_curves(emulators, test, steps=20)
    error = {k: tuple(block_bootstrap(v.T, 1)) for k, v in curves.items() if k != "mean field"}
    worst = min(5, length - 1)
    pair = {REFERENCE: truth[worst], best: fields[best][worst]}
    aims = test.times[test.context - 1] + test.horizon * np.arange(length)
    films = {k: v[:length] for k, v in ({REFERENCE: truth} | fields).items()}
    picks = [0, 1, 5, min(20, length - 1), length - 1]
    return [
        ("Table", table.to_html(float_format=lambda x: f"{x:.3g}", na_rep="-"), None),
        (
            "Rollouts beside the ab-initio run",
            "All start from the same test state. Chaos parts them from the reference within some "
            "100 fs; then only statistics can agree. Learned maps have a thermostat. "
            "A model trained for a minute or two loses the liquid within some steps.",
            plot.panels_figure(films, aims, picks, cell=cell),
        ),
        (
            f"Where {best} errs most after {worst * test.horizon:.0f} fs",
            "The lattice plane with the largest error.",
            plot.comparison_figure(pair, *worst_slice(*pair.values()), cell=cell),
        ),
        (
            "Error against time",
            "Mean over 8 initial states of the test run; bands are 95 % intervals over them.",
            plot.error_figure(times, error, log=True),
        ),
        ("Distribution of ln rho", *_distributions(fields, training, truth)),
        ("Structure factor", *_structure(fields, test, truth)),
        ("Training", "Loss and validation error.", _training_figure(history)),
    ]


def worst_slice(truth: np.ndarray, prediction: np.ndarray) -> tuple[str, int]:
    """Axis and index of the grid plane with the largest l2 error, of two fields (X, Y, Z)."""
    square = np.square(prediction - truth, dtype=np.float64)
    profiles = [square.mean(axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    axis = int(np.argmax([profile.max() for profile in profiles]))
    return "xyz"[axis], int(profiles[axis].argmax())


def _distributions(
    fields: dict[str, np.ndarray], training: Windows, truth: np.ndarray
) -> tuple[str, go.Figure]:
    transform = LogNormal.of(training, eps=0.0)
    every = {REFERENCE: truth} | fields
    values = {k: value_distribution(standardised(v, transform)) for k, v in every.items()}
    text = "Standardised by the training frames. The low tail is the pseudised cores."
    return text, plot.distribution_figure(values, np.linspace(-6, 4, 100))


def _structure(
    fields: dict[str, np.ndarray], test: Windows, truth: np.ndarray
) -> tuple[str, go.Figure]:
    curves = {}
    for name, density in ({REFERENCE: truth} | fields).items():
        q, _, s = structure_factor(density, test.cell.numpy())
        curves[name] = tuple(block_bootstrap(s, round(decorrelation_time(s))))
    text = "Allowed q of the cell only; bands are 95 % block-bootstrap intervals."
    return text, plot.structure_factor_figure(q, curves, log=True)


def _training_figure(history: dict[str, Rows]) -> go.Figure:
    rows = [
        {"step": r["step"], **{f"{name}: {k}": r[k] for k in ("ldm", "validation_l2") if k in r}}
        for name, run in history.items()
        for r in run
        if r.get("block", 1) == 1
    ]
    return plot.training_figure(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="data/lithium-800K.zarr", help="trajectory store")
    parser.add_argument("--checkpoints", default="data/checkpoints", help="of bundled models")
    parser.add_argument("--out", default="demo", help="folder for all that is made")
    run(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_script(main)
