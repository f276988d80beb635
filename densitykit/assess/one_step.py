r"""The verdict: tidy error tables of one-step maps and of their rollouts.

One row per (model, metric) with a value and, where it is a mean over correlated frames, a 95 %
block-bootstrap interval. Every distance stands beside its floor, the same distance between the
two halves of the reference run: no model can be told from the reference below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from densitykit.analysis.modes import structure_factor
from densitykit.data.transforms import LogNormal
from densitykit.data.windows import StatePairs
from densitykit.errors import ShapeError, TrajectoryError
from densitykit.fields import n_electrons
from densitykit.metrics import relative_l1, relative_l2, split_half_floor, value_sjsd
from densitykit.rollout import device_of, iterate, remembering
from densitykit.statistics import block_bootstrap

__all__ = [
    "ab_initio_seconds",
    "cost_table",
    "error_curves",
    "matrix_rate",
    "one_step_errors",
    "one_step_table",
    "operations_per_step",
    "rollout_table",
    "seconds_per_step",
    "standardised",
    "validation_error",
    "wide_table",
]

Step = Callable[..., Tensor]
BLOCK_FS = 180.0  # the density of liquid lithium at 800 K decorrelates to below 0.04 in this time


@torch.no_grad()
def one_step_errors(step: Step, pairs: StatePairs, every: int = 1, batch: int = 8) -> np.ndarray:
    """Relative l1 and l2 error of the density after one step, for each pair.

    Parameters
    ----------
    step
        Map of physical states (B, 2, X, Y, Z), a model or a baseline.
    pairs
        Pairs to score.
    every
        Take every so many pairs.
    batch
        Pairs at once.

    Returns
    -------
    np.ndarray
        Shape (pair, 2): l1 and l2 (Zepeda-Nunez et al. 2019, eqs. 21 and 22).
    """
    device = device_of(step)
    errors = []
    for chosen in torch.arange(len(pairs))[::every].split(batch):
        truth = pairs.states[chosen + pairs.lag]
        predicted = step(pairs.given(step, chosen).to(device)).cpu()
        errors.append(
            torch.stack(
                [f(predicted[:, 0], truth[:, 0]) for f in (relative_l1, relative_l2)], dim=1
            )
        )
    return torch.cat(errors).double().numpy()


def validation_error(model: Step, pairs: StatePairs, every: int = 4) -> dict[str, float]:
    """Mean one-step l2 error on held-out pairs, for a training log."""
    return {"validation_l2": float(one_step_errors(model, pairs, every)[:, 1].mean())}


def one_step_table(maps: Mapping[str, Step], pairs: StatePairs, every: int = 1) -> pd.DataFrame:
    """Mean one-step errors of several maps: rows (model, metric, value, low, high)."""
    spacing = every * float(pairs.times[1] - pairs.times[0])
    rows = []
    for name, step in maps.items():
        errors = one_step_errors(step, pairs, every)
        mean, low, high = block_bootstrap(errors, max(1, round(BLOCK_FS / spacing)))
        for i, metric in enumerate(("one-step l1", "one-step l2")):
            rows.append((name, metric, mean[i], low[i], high[i]))
    return pd.DataFrame(rows, columns=["model", "metric", "value", "low", "high"])


def error_curves(
    maps: Mapping[str, Step], pairs: StatePairs, steps: int, starts: int = 8
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Relative l2 error along rollouts from several frames of a reference run.

    Parameters
    ----------
    maps
        One-step maps.
    pairs
        States of the reference run.
    steps
        Steps of each rollout.
    starts
        Equally spaced initial frames, rolled out as one batch.

    Returns
    -------
    tuple[np.ndarray, dict[str, np.ndarray]]
        Lead times in fs with shape (steps,), and for each map errors with shape (steps, starts).
    """
    last = len(pairs.states) - 1 - steps * pairs.lag
    if last < 0:
        raise ShapeError(f"{steps} steps outlast the run of {len(pairs.states)} states; ask fewer")
    first = torch.linspace(0, last, starts).long().unique()
    curves = {}
    for name, step in maps.items():
        states = iterate(step, pairs.given(step, first), steps)
        errors = [
            relative_l2(state[:, 0].cpu(), pairs.states[first + (k + 1) * pairs.lag, 0])
            for k, state in enumerate(states)
        ]
        curves[name] = torch.stack(errors).numpy()
    return pairs.horizon * np.arange(1, steps + 1), curves


def rollout_table(
    densities: Mapping[str, np.ndarray],
    reference: np.ndarray,
    cell: np.ndarray,
    transform: LogNormal,
) -> pd.DataFrame:
    """Statistics of rollouts beside a reference run.

    Parameters
    ----------
    densities
        Name -> density with shape (time, X, Y, Z) in angstrom**-3.
    reference
        Density of the reference run, same trailing shape.
    cell
        Lattice vectors, shape (3, 3), in angstrom.
    transform
        Standardisation for the value-sJSD and the spread of ln rho.

    Returns
    -------
    pd.DataFrame
        Rows (model, metric, value). The row "reference halves" holds the floors: its value-sJSD
        and S(q) error are those between the two halves of the reference.
    """
    standard = standardised(reference, transform)
    q_ref = structure_factor(reference, cell)[2]
    half = len(reference) // 2
    rows = [
        ("reference halves", "value-sJSD", split_half_floor(standard)),
        ("reference halves", "value-sJSD / floor", 1.0),
        ("reference halves", "S(q) error", _rms_ratio(q_ref[:half], q_ref[half:])),
        (
            "reference halves",
            "sd ln rho / reference",
            standard[:half].std() / standard[half:].std(),
        ),
        ("reference halves", "electron drift", _drift(reference, cell)),
    ]
    for name, density in densities.items():
        values = standardised(density, transform)
        divergence = value_sjsd(values, standard)
        rows += [
            (name, "value-sJSD", divergence),
            (name, "value-sJSD / floor", divergence / rows[0][2]),
            (name, "S(q) error", _rms_ratio(structure_factor(density, cell)[2], q_ref)),
            (name, "sd ln rho / reference", values.std() / standard.std()),
            (name, "electron drift", _drift(density, cell)),
        ]
    return pd.DataFrame(rows, columns=["model", "metric", "value"])


def standardised(density: np.ndarray, transform: LogNormal) -> np.ndarray:
    """Standardised logarithm of a density in angstrom**-3, in double precision, same shape."""
    # a map without a positivity constraint may fall below zero: those voxels go to the lowest bin
    return transform.forward(np.maximum(density, 1e-6, dtype=np.float64))


def _rms_ratio(s: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square over shells of the relative difference of two time means."""
    return float(np.sqrt(np.mean((s.mean(0) / reference.mean(0) - 1) ** 2)))


def _drift(density: np.ndarray, cell: np.ndarray) -> float:
    """Largest relative change of the number of electrons along the run."""
    electrons = n_electrons(density, cell)
    return float(np.abs(electrons / electrons[0] - 1).max())


def seconds_per_step(step: Step, state: Tensor, repeats: int = 10, threads: int = 1) -> float:
    """Median wall time of a step of a rollout, on ``threads`` cores or the GPU of the map.

    ``state`` is one (C, X, Y, Z), or a batch (B, C, X, Y, Z) that takes its steps at once.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = []
    try:
        memory, advance, show = remembering(
            step, state.reshape(-1, *state.shape[-4:]).to(device_of(step))
        )
        show(advance(memory))
        for _ in range(repeats):
            started = time.perf_counter()
            show(advance(memory)).sum().item()  # the sum waits for a GPU
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return float(np.median(seconds))


def operations_per_step(step: Step, pairs: StatePairs) -> float:
    """Floating-point operations of one member's step, counted on two members of ``pairs``."""
    states = pairs.given(step, slice(0, 2)).to(device_of(step))
    with FlopCounterMode(display=False) as counter:  # it does not know oneDNN's for one
        step(states)
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
        If "seconds_per_step_one_core" or "time_step_fs" is missing.
    """
    missing = {"seconds_per_step_one_core", "time_step_fs"} - set(attrs)
    if missing:
        raise TrajectoryError(f"the trajectory lacks the attributes {sorted(missing)}; set them")
    return attrs["seconds_per_step_one_core"] / attrs["time_step_fs"]


def cost_table(
    maps: Mapping[str, Step], test: StatePairs, attrs: Mapping[str, float]
) -> pd.DataFrame:
    """Seconds a step on one core, and how much faster than ab-initio MD on one core that is.

    Parameters
    ----------
    maps
        One-step maps.
    test
        Pairs, for a state to time with.
    attrs
        Attributes of the trajectory: "seconds_per_step_one_core" and "time_step_fs".
    """
    ab_initio = ab_initio_seconds(attrs)
    rows = []
    for name, step in maps.items():
        seconds = seconds_per_step(step, test.given(step, 0))
        rows += [
            (name, "seconds per step", seconds),
            (name, "speed-up", ab_initio * test.horizon / seconds),
        ]
    return pd.DataFrame(rows, columns=["model", "metric", "value"])


def wide_table(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One line a model, one column a metric, in the order of first appearance."""
    tidy = pd.concat(tables)
    wide = tidy.pivot_table(
        index="model", columns="metric", values="value", sort=False, dropna=False
    )
    return wide[list(dict.fromkeys(tidy.metric))]
