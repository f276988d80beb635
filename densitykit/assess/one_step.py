"""Errors of emulators beside a run that they have not seen: after one step, and along rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from densitykit.data.windows import Window, Windows
from densitykit.errors import ShapeError, WindowError
from densitykit.metrics import relative_l1, relative_l2
from densitykit.models.base import Emulator
from densitykit.rollout import iterate
from densitykit.statistics import block_bootstrap, decorrelation_time

__all__ = ["error_curves", "one_step_errors", "one_step_table", "validation_error"]

COLUMNS = ["model", "metric", "value", "low", "high"]


def one_step_errors(
    emulator: Emulator, windows: Windows, every: int = 1, batch: int = 8
) -> np.ndarray:
    """Relative l1 and l2 error of the density after one step, for each window.

    The step gets no generator: a thermostat, whose chance nobody predicts, does not act.

    Parameters
    ----------
    emulator
        A model or a baseline.
    windows
        Those to score.
    every
        Take every so many windows.
    batch
        Windows at once.

    Returns
    -------
    np.ndarray
        Shape (window, 2): l1 and l2 (Zepeda-Nunez et al. 2019, eqs. 21 and 22).

    Raises
    ------
    WindowError
        The emulator has another horizon than the windows, or does not fit them.
    RolloutError
        The object is no emulator, or gives what is no density.
    """
    errors = []
    for chosen in torch.arange(len(windows))[::every].split(batch):
        window = windows[chosen]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of a sampler, which draws for itself without a generator
            density = next(_densities(emulator, window, 1, windows.horizon, seed=None))
        truth = window.at(windows.lag)
        both = [f(density, truth) for f in (relative_l1, relative_l2)]
        errors.append(torch.stack(both, dim=1))
    return torch.cat(errors).double().numpy()


def _densities(
    emulator: Emulator, window: Window, steps: int, horizon: float, seed: int | None = 0
) -> Iterator[Tensor]:
    """Densities after each step, on the CPU."""
    ours = getattr(emulator, "horizon", horizon)
    if abs(ours - horizon) > 1e-6 * horizon:
        raise WindowError(
            f"{window.source}: targets are {horizon:g} fs ahead, {type(emulator).__name__} steps "
            f"{ours:g} fs; load windows with horizon={ours:g}"
        )
    return (density.cpu() for _, density in iterate(emulator, window, steps, seed))


def validation_error(model: Emulator, windows: Windows, every: int = 4) -> dict[str, float]:
    """Mean one-step l2 error on held-out windows, for a training log."""
    return {"validation_l2": float(one_step_errors(model, windows, every)[:, 1].mean())}


def one_step_table(
    emulators: Mapping[str, Emulator], windows: Windows, every: int = 1
) -> pd.DataFrame:
    """Mean one-step errors of several emulators, with 95 % intervals.

    Returns
    -------
    pd.DataFrame
        Rows (model, metric, value, low, high); blocks of the bootstrap are as long as errors of
        neighbouring windows stay alike.
    """
    rows = []
    for name, emulator in emulators.items():
        errors = one_step_errors(emulator, windows, every)
        block = round(decorrelation_time(errors)) if len(errors) > 3 else 1
        mean, low, high = block_bootstrap(errors, block)
        for i, metric in enumerate(("one-step l1", "one-step l2")):
            rows.append((name, metric, mean[i], low[i], high[i]))
    return pd.DataFrame(rows, columns=COLUMNS)


def error_curves(
    emulators: Mapping[str, Emulator], windows: Windows, steps: int, starts: int = 8
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Relative l2 error along rollouts from several frames of a reference run.

    Parameters
    ----------
    emulators
        By name.
    windows
        Of the reference run.
    steps
        Steps of each rollout.
    starts
        Equally spaced present frames, rolled out as one batch.

    Returns
    -------
    np.ndarray
        Lead times in fs, shape (steps,).
    dict
        Name to errors, shape (steps, starts).

    Raises
    ------
    ShapeError
        The rollouts outlast the run.
    """
    first = spread_starts(windows, steps, starts)
    window = windows[first]
    curves = {}
    for name, emulator in emulators.items():
        densities = _densities(emulator, window, steps, windows.horizon)
        errors = [
            relative_l2(density, true_density(windows, first, k))
            for k, density in enumerate(densities, start=1)
        ]
        curves[name] = torch.stack(errors).numpy()
    return windows.horizon * np.arange(1, steps + 1), curves


def spread_starts(windows: Windows, steps: int, starts: int) -> Tensor:
    """Return indices of equally spaced windows that have so many steps ahead of them."""
    last = len(windows.times) - windows.context - steps * windows.lag
    if last < 0:
        raise ShapeError(
            f"{windows.source}: {steps} steps of {windows.horizon:g} fs outlast the run of "
            f"{len(windows.times)} frames; ask at most "
            f"{(len(windows.times) - windows.context) // windows.lag} steps"
        )
    return torch.linspace(0, last, starts).long().unique()


def true_density(windows: Windows, first: Tensor, step: int) -> Tensor:
    """Return the density of the reference run a number of steps after windows, (B, X, Y, Z)."""
    ahead = windows.context - 1 + step * windows.lag
    return torch.stack([windows.frames[int(i) + ahead] for i in first])
