"""Emulators of electrons in time, beside the time-dependent Kohn-Sham equation itself.

    python -m experiments.electrons data/electrons data/electrons/results.csv

For each system: the best linear map (and what of the state it needs), a Fourier neural operator,
a U-Net, latent diffusion, and orbitals in a learned potential (and in that of Thomas and Fermi,
not trained), of several seeds, rolled out on chains they have not seen, of the training length and
twice as long. One number a row: a metric of one run, model and seed. Goes on where it was killed.

=============== ===================================================================================
metric          of a run
=============== ===================================================================================
density         relative l2 error of the deviation from the ground state, over 100 a.u. (50 steps)
density-long    the same over the whole run of 400 a.u.
current         relative l2 error of the mean current (the rate of the polarisation), 100 a.u.
current-long    the same over the whole run
line            kicks: position of the highest absorption line over the true one, minus 1
f-sum           kicks: integral of the absorption over pi N / 2 L, minus 1
plasmon         waves: position of the highest line of S(q, w) over the true one, minus 1
energy          pulses: energy absorbed, the work of the field, over the true one, minus 1
growth          size of the deviation after 1000 steps over its largest true one, ten times the
                training length
electrons       largest change of the number of electrons, relative
one-step        error of the density after a step from the truth, over that of persistence; not of
                orbitals, which begin in the ground state only
speed-up        time of the equation over that of the emulator
training        CPU seconds
=============== ===================================================================================
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from densitykit.chain.electron_data import driven_chain
from densitykit.chain.electron_diffusion import ChainDiffusion, LatentObjective
from densitykit.chain.electron_emulators import (
    ChainUNet,
    ElectronEmulator,
    FourierOperator,
    LinearMap,
    OneStepObjective,
    fit_linear_map,
)
from densitykit.chain.electron_orbitals import ChainOrbitals, GroundStateObjective
from densitykit.chain.electron_spectra import conductivity, lines
from densitykit.chain.electron_windows import ElectronWindows, load_electrons
from densitykit.models import save_model
from densitykit.models.base import Emulator
from densitykit.rollout import iterate, start
from densitykit.training import fit
from densitykit.units import ATOMIC_TIME, BOHR
from experiments.arguments import run_script
from experiments.report import merge_rows

__all__ = ["judge", "linear_map", "run_electrons"]

KEYS = ["system", "model", "seed", "split", "run", "metric"]
NETS: dict[str, type[ElectronEmulator]] = {
    "FNO": FourierOperator,
    "U-Net": ChainUNet,
    "latent diffusion": ChainDiffusion,
}
MODELS = (*NETS, "orbitals")
#: orbitals in the potential of Thomas and Fermi
UNTRAINED = "orbitals, not trained"
CONTEXT, SHORT, LONG = 1, 50, 1000
OMEGA = np.arange(0.05, 1.4, 2e-3)


def roll_out(
    emulator: Emulator, windows: ElectronWindows, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Density in 1/bohr and current in atomic units of all runs, (run, frame, X).

    Begins with the true frames of the first window.
    """
    window = windows.first()
    given = window.past(windows.context)
    state = start(emulator, window)
    density = [d[..., 0, 0] for d in given.density.unbind(1)]
    current = [*given.current.unbind(1)]
    for state, rho in iterate(emulator, window, steps - len(density)):
        density.append(rho[..., 0, 0])
        current.append(emulator.current(state))
    rho, j = torch.stack(density, 1).numpy(), torch.stack(current, 1).numpy()
    return rho * BOHR, j * ATOMIC_TIME


def judge(emulator: Emulator, windows: ElectronWindows, steps: int = LONG) -> pd.DataFrame:
    """All metrics of all runs after so many steps: columns run, metric, value."""
    true = windows.density.numpy() * BOHR, windows.current.numpy() * ATOMIC_TIME
    ground, frames, rows = true[0][:, :1], windows.frames, []
    rho, j = roll_out(emulator, windows, max(steps, frames))
    for run in range(len(true[0])):
        field = windows.field[run].numpy() * ATOMIC_TIME / BOHR
        own = _errors(rho[run] - ground[run], true[0][run] - ground[run], "density")
        own |= _errors(j[run].mean(-1), true[1][run].mean(-1), "current")
        own |= _physics(rho[run, :frames], j[run, :frames], true[0][run], true[1][run], field)
        size = np.abs(true[0][run] - ground[run]).max()
        if steps == LONG:
            own["growth"] = np.abs(rho[run, -1] - ground[run, 0]).max() / size
        number = rho[run].astype(float).mean(-1)
        own["electrons"] = np.abs(number / number[0] - 1).max()
        rows += [{"run": run, "metric": k, "value": float(v)} for k, v in own.items()]
    return pd.DataFrame(rows)


def _errors(found: np.ndarray, true: np.ndarray, name: str) -> dict[str, float]:
    ends = {name: SHORT, f"{name}-long": len(true)}
    norm = np.linalg.norm
    return {k: norm(found[:n] - true[:n]) / norm(true[:n]) for k, n in ends.items()}


def _physics(
    rho: np.ndarray, j: np.ndarray, true_rho: np.ndarray, true_j: np.ndarray, field: np.ndarray
) -> dict[str, float]:
    """What the kind of a run allows to ask: it is told by the field and the first current."""
    t, length = 2.0 * np.arange(len(rho)), float(rho.shape[1])  # a point per bohr
    if np.ptp(field):
        work = [_work(field, x.mean(-1)) for x in (j, true_j)]
        return {"energy": work[0] / work[1] - 1}
    if field[0]:
        signals = [x.mean(-1) / field[0] for x in (j, true_j)]
        sigma = conductivity(t, signals[0], 1.0, np.arange(0, 1.57, 2e-3))
        exact = np.pi / 2 * float(rho[0].mean())
        total = np.trapezoid(sigma.real, dx=2e-3) / exact - 1
        return {"line": _line(t, *signals, np.real), "f-sum": total}
    waves = np.abs(np.fft.rfft(true_j[0] / true_rho[0]))
    q = 2 * np.pi * int(waves[1:].argmax() + 1) / length
    wave = np.cos(q * np.arange(rho.shape[1]))
    signals = [(x - true_rho[0]) @ wave for x in (rho, true_rho)]
    return {"plasmon": _line(t, *signals, lambda z: -z.imag)}


def _line(t: np.ndarray, found: np.ndarray, true: np.ndarray, part: Callable) -> float:
    """Relative shift of the highest line; NaN where there is none."""
    tables = [lines(t, np.clip(x, -1e3, 1e3), OMEGA, part) for x in (found, true)]
    if tables[0].empty:
        return float("nan")
    return tables[0].position[0] / tables[1].position[0] - 1


def _work(field: np.ndarray, current: np.ndarray) -> float:
    """Integral of dA/dt times the mean current, by the rule of Stieltjes and the trapezoid."""
    return float(np.sum(np.diff(field) * (current[1:] + current[:-1]) / 2))


def linear_map(
    data: Path, context: int = CONTEXT, current: bool = True
) -> tuple[LinearMap, pd.DataFrame]:
    """The map whose ridge does best in rollouts of validation runs, and all that were tried."""
    train = load_electrons(data, "train", context)
    held_out = load_electrons(data, "validation", context)
    best, least, rows = None, np.inf, []
    for ridge in (1e-5, 1e-4, 1e-3, 1e-2):
        model = LinearMap(train.horizon, context, current)
        fit_linear_map(model, train, ridge)
        rho, _ = roll_out(model, held_out, held_out.frames)
        true = held_out.density.numpy() * BOHR
        change = true - true[:, :1]
        error = np.linalg.norm(rho - true) / np.linalg.norm(change)
        rows.append({"ridge": ridge, "error": error})
        if np.nan_to_num(error, nan=np.inf) < least:
            best, least = model, error
    return best, pd.DataFrame(rows)


def one_step(emulator: ElectronEmulator, windows: ElectronWindows) -> pd.DataFrame:
    """Relative error of the deviation of the density after one step, over that of persistence."""
    rows, each = [], len(windows) // len(windows.density)
    for run in range(len(windows.density)):
        window = windows[torch.arange(run * each, (run + 1) * each)]
        state = emulator.init(window.past(emulator.context))
        found, now = (x.squeeze() for x in (emulator.density(emulator.step(state)), window.at(0)))
        true = window.at(1).squeeze()
        value = torch.linalg.norm(found - true) / torch.linalg.norm(now.squeeze() - true)
        rows.append({"run": run, "metric": "one-step", "value": float(value)})
    return pd.DataFrame(rows)


def train(name: str, data: Path, base: LinearMap, **settings: Any) -> nn.Module:
    """One of `MODELS`, trained; the nets begin as the linear map."""
    torch.manual_seed(settings["seed"])
    windows = load_electrons(data, "train", CONTEXT, 1 if name == "orbitals" else 6)
    if name == "orbitals":
        model = ChainOrbitals(**ChainOrbitals.arguments_for(windows))
        objective, rate, batch = GroundStateObjective(model), 1e-3, 16
    elif name == "latent diffusion":
        model = ChainDiffusion(base.horizon, CONTEXT, base=base)
        objective, rate, batch = LatentObjective(model), 2e-3, 64
    else:
        model = NETS[name](base.horizon, CONTEXT, base=base)
        objective, rate, batch = OneStepObjective(model, 6), 3e-3, 16
    fit(objective, windows, batch=batch, learning_rate=rate, ema=0.98, **settings)
    return model


def run_electrons(
    data: str | Path,
    out: str | Path,
    *,
    systems: tuple[str, ...] = ("insulator", "metal"),
    models: tuple[str, ...] = MODELS,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 2000,
    run_dir: str | Path = "runs/electrons",
    checkpoints: str | Path | None = None,
) -> pd.DataFrame:
    """Fit, train and judge; rows that are in ``out`` are not made again.

    Parameters
    ----------
    data
        Folder of the data sets, ``SYSTEM.zarr``.
    out
        The CSV file.
    systems, models, seeds, steps
        What to do; ``steps`` of each training.
    run_dir
        Of trainings, finished or not.
    checkpoints
        Where orbitals of the first seed are saved; None: nowhere.
    """
    done = pd.read_csv(out) if Path(out).exists() else pd.DataFrame(columns=KEYS)
    for system in systems:
        path, there = Path(data) / f"{system}.zarr", done[done.system == system]
        base, _ = linear_map(path)
        labels: dict[str, Any] = {"system": system, "seed": 0}
        if not len(there[there.model == "linear"]):
            _keep(out, path, base, labels | {"model": "linear"})
        if not len(there[there.model == UNTRAINED]):
            windows = load_electrons(path, "train", CONTEXT)
            model = ChainOrbitals(**ChainOrbitals.arguments_for(windows))
            _keep(out, path, model, labels | {"model": UNTRAINED})
        for context, current in ((1, False), (1, True), (4, False), (4, True)):
            name = f"linear, {context} frame{'s' * (context > 1)}"
            name += ", density and current" if current else ", density"
            if not len(there[there.model == name]):
                model, _ = linear_map(path, context, current)
                rows = one_step(model, load_electrons(path, "test", 4))
                _merge(out, rows, labels | {"model": name, "split": "test"})
        for seed, name in itertools.product(seeds, models):
            if len(there[(there.model == name) & (there.seed == seed)]):
                continue
            folder = Path(run_dir) / f"{system}-{name}-{seed}"
            begun = time.process_time()
            model = train(name, path, base, steps=steps, seed=seed, run_dir=folder)
            _keep(out, path, model, labels | {"model": name, "seed": seed}, begun)
        if checkpoints is not None:
            settings = {"steps": steps, "seed": seeds[0]}
            folder = Path(run_dir) / f"{system}-orbitals-{seeds[0]}"
            model = train("orbitals", path, base, **settings, run_dir=folder)
            arguments = ChainOrbitals.arguments_for(load_electrons(path, "train", CONTEXT))
            save_model(model, Path(checkpoints) / f"orbitals-{system}", arguments, settings)
    return pd.read_csv(out)


def _keep(
    out: str | Path,
    path: Path,
    model: nn.Module,
    labels: dict[str, Any],
    begun: float | None = None,
) -> None:
    spent = pd.DataFrame(
        [{"run": 0, "metric": "training", "value": time.process_time() - begun}] if begun else []
    )
    for split in ("test", "longer"):
        windows = load_electrons(path, split, CONTEXT)
        rows = judge(model, windows, LONG if split == "test" else 0)
        if split == "test":
            alone = [one_step(model, windows)] if isinstance(model, ElectronEmulator) else []
            rows = pd.concat([rows, *alone, _speed(model, windows, labels), spent])
        _merge(out, rows, labels | {"split": split})


def _speed(model: nn.Module, windows: ElectronWindows, labels: dict[str, Any]) -> pd.DataFrame:
    """CPU time of the equation over that of the emulator, for the same span of one chain."""
    electrons, *_ = driven_chain(labels["system"], 4, 0, 0)
    window, best = windows.first()[:1], [np.inf, np.inf]
    for _ in range(5):
        begun = time.process_time()
        for _ in iterate(model, window, 20):
            pass
        middle = time.process_time()
        electrons.advance(100)
        spent = middle - begun, time.process_time() - middle
        best = [min(a, b) for a, b in zip(best, spent, strict=True)]
    return pd.DataFrame([{"run": 0, "metric": "speed-up", "value": best[1] / best[0]}])


def _merge(out: str | Path, rows: pd.DataFrame, labels: dict[str, Any]) -> None:
    merge_rows(Path(out), rows.assign(**labels)[[*KEYS, "value"]], KEYS)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Median over runs and seeds of the size of each metric, with the range of its middle half."""
    size = rows.assign(value=rows.value.abs())
    groups = size.groupby(["system", "split", "metric", "model"], sort=False)["value"]
    return groups.quantile([0.5, 0.25, 0.75]).unstack().set_axis(["median", "low", "high"], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("out", type=Path, help="CSV file; what it holds is not computed again")
    parser.add_argument("--systems", nargs="+", default=["insulator", "metal"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000, help="of each training")
    parser.add_argument("--checkpoints", type=Path, help="folder for orbitals of the first seed")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/electrons"))
    arguments = vars(parser.parse_args())
    data, out = arguments.pop("data"), arguments.pop("out")
    rows = run_electrons(data, out, **arguments)
    print(summary(rows).to_string(float_format="{:.3g}".format))


if __name__ == "__main__":
    run_script(main)
