"""The main job, end to end, on the bundled trajectory: train, roll out, compare, report.

Two small latent diffusion models are trained, with and without the sJSD term, on the same
autoencoder, from the same seed and for the same number of steps, and a small emulator whose
latent is the nuclei. All are rolled out from an unseen state of the independent test run, beside
the bundled checkpoints and the baselines. A table and a page of figures say how they did.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from lightning_fabric import Fabric

from densitykit.analysis.modes import structure_factor
from densitykit.assess import (
    cost_table,
    error_curves,
    one_step_table,
    rollout_table,
    standardised,
    validation_error,
    wide_table,
)
from densitykit.assess.one_step import BLOCK_FS
from densitykit.cells import cubic_edge
from densitykit.data.transforms import LogNormal
from densitykit.data.windows import StatePairs, load_pairs
from densitykit.io.reader import open_split
from densitykit.metrics import value_distribution
from densitykit.models import LatentDiffusion, NuclearEmulator, StateMap, load_model
from densitykit.models.baselines import baseline_maps
from densitykit.plot import figures as plot
from densitykit.rollout import Thermostat, rollout
from densitykit.statistics import block_bootstrap
from densitykit.training.loop import adopt_autoencoder, train_latent_diffusion
from densitykit.training.nuclear import fit_parts, train_emulator
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
Maps = dict[str, Callable[..., torch.Tensor]]
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
    out, started = Path(out), time.perf_counter()
    train, validation, test = (
        load_pairs(data, s, HORIZON) for s in ("train", "validation", "test")
    )
    print(f"{data}: {len(train)} training, {len(validation)} validation, {len(test)} test pairs")
    maps, history = _train_both(train, validation, out, autoencoder_steps, steps, seed)
    device = next(iter(maps.values())).latent_mean.device
    maps["demo nuclear"], history["demo nuclear"] = _train_nuclear(data, out, nuclear_steps, seed)
    for path in sorted(Path(checkpoints).glob("lithium-*.safetensors")):
        maps[f"bundled {path.stem.removeprefix('lithium-')}"] = load_model(path).to(device)
    maps |= baseline_maps(train)
    runs = _roll_out(maps, train, test, out, rollout_steps, seed)
    tables = [
        one_step_table(maps, test, every=2),
        rollout_table(
            runs, test.states[:, 0].numpy(), test.cell, LogNormal.fit(_rho(train), eps=0.0)
        ),
        cost_table(maps, test, open_split(data, "test").attrs),
    ]
    pd.concat(tables).to_csv(out / "scores.csv", index=False)
    table = wide_table(tables)
    table.to_csv(out / "table.csv")
    write_report(
        out / "report.html",
        "Liquid lithium at 800 K: emulators beside ab-initio MD",
        _sections(maps, runs, table, history, train, test),
    )
    print(table.to_string(float_format=lambda x: f"{x:.3g}", na_rep="-"))
    minutes = (time.perf_counter() - started) / 60
    print(f"{out}/report.html and {out}/table.csv, {minutes:.1f} minutes")
    return table


def _rho(pairs: StatePairs) -> np.ndarray:
    return pairs.states[:, 0].numpy()


def _train_both(
    train: StatePairs,
    validation: StatePairs,
    out: Path,
    autoencoder_steps: int,
    steps: int,
    seed: int,
) -> tuple[dict[str, LatentDiffusion], dict[str, Rows]]:
    """One autoencoder, then a denoiser without and one with the sJSD term."""
    transform = LogNormal.fit(_rho(train))
    models: dict[str, LatentDiffusion] = {}
    history = {}
    for name, lambda_2 in (("demo without sJSD", 0.0), ("demo with sJSD", LAMBDA_2)):
        torch.manual_seed(seed)
        model = LatentDiffusion(transform.mu, transform.sigma, transform.eps, HORIZON, **SMALL)
        if models:
            adopt_autoencoder(model, models["demo without sJSD"])
        history[name] = train_latent_diffusion(
            model,
            train,
            autoencoder_steps=0 if models else autoencoder_steps,
            steps=steps,
            lambda_2=lambda_2,
            run_dir=out / "training" / name.replace(" ", "-"),
            seed=seed,
            batch=2,
            learning_rate=2e-3,
            ema=0.99,  # a short training forgets fast
            validate=partial(validation_error, model, validation),
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
    maps: Maps, train: StatePairs, test: StatePairs, out: Path, n: int, seed: int
) -> dict[str, np.ndarray]:
    """Densities (n + 1, X, Y, Z) of rollouts from the first test state, also kept as stores."""
    shutil.rmtree(out / "rollouts", ignore_errors=True)
    runs = {}
    for name, step in maps.items():
        # an emulator with nuclei has a thermostat of its own
        learned = isinstance(step, StateMap)
        path = out / "rollouts" / f"{name.replace(' + ', '-').replace(' ', '-')}.zarr"
        print(f"{name}, with thermostat" if learned else name)
        runs[name] = rollout(
            Thermostat(step, train) if learned else step,
            test.given(step, 0),
            n,
            cell=test.cell,
            path=path,
            start=float(test.times[0]),
            seed=seed,
        ).density.values
    return runs


def _sections(
    maps: Maps,
    runs: dict[str, np.ndarray],
    table: pd.DataFrame,
    history: dict[str, Rows],
    train: StatePairs,
    test: StatePairs,
) -> list[tuple[str, str, go.Figure | None]]:
    """Heading, text and figure of each section of the report."""
    models = {k: v for k, v in runs.items() if isinstance(maps[k], torch.nn.Module)}
    best = min(models, key=lambda name: table.loc[name, "one-step l2"])
    edge, every = cubic_edge(test.cell), test.lag
    truth = _rho(test)[::every]
    times, curves = error_curves(maps, test, steps=20)
    error = {k: tuple(block_bootstrap(v.T, 1)) for k, v in curves.items() if k != "mean field"}
    length = min(len(truth), len(runs[best]))
    worst = min(5, length - 1)
    aims = test.times[0] + test.horizon * np.arange(length)
    films = {k: v[:length] for k, v in ({REFERENCE: truth} | models).items()}
    picks = [0, 1, 5, min(20, length - 1), length - 1]
    return [
        ("Table", table.to_html(float_format=lambda x: f"{x:.3g}", na_rep="-"), None),
        (
            "Rollouts beside the ab-initio run",
            "All start from the same test state. Chaos parts them from the reference within some "
            "100 fs; then only statistics can agree. Learned maps have a thermostat. "
            "A model trained for a minute or two loses the liquid within some steps.",
            plot.panels_figure(films, aims, picks, "z", 12, edge=edge),
        ),
        (
            f"Where {best} errs most after {worst * test.horizon:.0f} fs",
            "The lattice plane with the largest error.",
            plot.worst_slice_figure(truth[worst], runs[best][worst], edge=edge),
        ),
        (
            "Error against time",
            "Mean over 8 initial states of the test run; bands are 95 % intervals over them.",
            plot.error_figure(times, error, log=True),
        ),
        ("Distribution of ln rho", *_distributions(models, train, truth)),
        ("Structure factor", *_structure(models, test, truth)),
        ("Training", "Loss and validation error.", _training_figure(history)),
    ]


def _distributions(
    models: dict[str, np.ndarray], train: StatePairs, truth: np.ndarray
) -> tuple[str, go.Figure]:
    transform = LogNormal.fit(_rho(train), eps=0.0)
    runs = {REFERENCE: truth} | models
    values = {k: value_distribution(standardised(v, transform)) for k, v in runs.items()}
    text = "Standardised by the training frames. The low tail is the pseudised cores."
    return text, plot.distribution_figure(values, np.linspace(-6, 4, 100))


def _structure(
    models: dict[str, np.ndarray], test: StatePairs, truth: np.ndarray
) -> tuple[str, go.Figure]:
    block = round(BLOCK_FS / test.horizon)
    curves = {}
    for name, density in ({REFERENCE: truth} | models).items():
        q, _, s = structure_factor(density, test.cell)
        curves[name] = tuple(block_bootstrap(s, block))
    text = "Allowed q of the cell only; bands are 95 % block-bootstrap intervals."
    return text, plot.structure_factor_figure(q, curves).update_yaxes(type="log")


def _training_figure(history: dict[str, Rows]) -> go.Figure:
    rows = [
        {"step": r["step"], **{f"{name}: {k}": r[k] for k in ("ldm", "validation_l2") if k in r}}
        for name, run in history.items()
        for r in run
        if r.get("block", 1) == 1
    ]
    return plot.training_figure(rows)
