"""What a step costs: seconds, operations, and how much faster than ab-initio MD that is."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from densitykit.data.windows import Window, Windows
from densitykit.errors import TrajectoryError
from densitykit.models.base import Emulator
from densitykit.rollout import start

__all__ = [
    "ab_initio_seconds",
    "cost_table",
    "matrix_rate",
    "operations_per_step",
    "seconds_per_step",
]


@torch.no_grad()
def seconds_per_step(
    emulator: Emulator, window: Window, repeats: int = 10, threads: int = 1
) -> float:
    """Median wall time of a step of a rollout, on some cores or the GPU of the emulator.

    All members of the window take their steps at once.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = []
    try:
        state = start(emulator, window)
        emulator.density(emulator.step(state))
        for _ in range(repeats):
            started = time.perf_counter()
            emulator.density(emulator.step(state)).sum().item()  # the sum waits for a GPU
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return float(np.median(seconds))


@torch.no_grad()
def operations_per_step(emulator: Emulator, windows: Windows) -> float:
    """Floating-point operations of one member's step, counted on two windows."""
    state = start(emulator, windows[0:2])
    with FlopCounterMode(display=False) as counter:  # it does not know oneDNN's for one
        emulator.density(emulator.step(state))
    return counter.get_total_flops() / 2


def matrix_rate(n: int = 1536, repeats: int = 5, device: torch.device | str = "cpu") -> float:
    """Floating-point operations per second of a product of matrices (n, n)."""
    a = torch.randn(n, n, device=device)
    a @ a
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def ab_initio_seconds(attrs: Mapping[str, float]) -> float:
    """Seconds on one core that ab-initio MD takes per fs, from the attributes of its trajectory.

    Raises
    ------
    TrajectoryError
        "seconds_per_step_one_core" or "time_step_fs" is missing.
    """
    missing = {"seconds_per_step_one_core", "time_step_fs"} - set(attrs)
    if missing:
        raise TrajectoryError(f"the trajectory lacks the attributes {sorted(missing)}; set them")
    return attrs["seconds_per_step_one_core"] / attrs["time_step_fs"]


def cost_table(emulators: Mapping[str, Emulator], windows: Windows) -> pd.DataFrame:
    """Seconds a step on one core, and how much faster than ab-initio MD on one core that is.

    The speed-up is left out where the run does not say what it has cost.

    Returns
    -------
    pd.DataFrame
        Rows (model, metric, value).
    """
    rows = []
    for name, emulator in emulators.items():
        seconds = seconds_per_step(emulator, windows[0])
        rows.append((name, "seconds per step", seconds))
        if {"seconds_per_step_one_core", "time_step_fs"} <= set(windows.attrs):
            gain = ab_initio_seconds(windows.attrs) * windows.horizon / seconds
            rows.append((name, "speed-up", gain))
    return pd.DataFrame(rows, columns=["model", "metric", "value"])
