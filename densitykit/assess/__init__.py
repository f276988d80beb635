"""One error table: one step, rollouts, cost; every value beside its reference and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import xarray as xr

from densitykit.assess.cost import cost_table
from densitykit.assess.ensembles import ensemble_scores
from densitykit.assess.one_step import (
    error_curves,
    one_step_errors,
    one_step_table,
    validation_error,
)
from densitykit.assess.rollouts import assess_rollout
from densitykit.data.windows import load_windows
from densitykit.io.reader import open_split
from densitykit.models.base import Emulator

__all__ = [
    "assess",
    "assess_rollout",
    "cost_table",
    "ensemble_scores",
    "error_curves",
    "one_step_errors",
    "one_step_table",
    "pivot_metrics",
    "validation_error",
]


def assess(
    data: str | Path,
    emulators: Mapping[str, Emulator] | None = None,
    rollouts: Mapping[str, xr.Dataset] | None = None,
    *,
    split: str = "test",
    every: int = 1,
    burn_in: float = 0.0,
    cost: bool = False,
) -> pd.DataFrame:
    """Judge emulators and rollouts beside a split that no model has seen.

    Parameters
    ----------
    data
        Store with splits "train" and ``split``.
    emulators
        By name; their errors after one step, each at its own horizon.
    rollouts
        By name; see :func:`assess_rollout`.
    split
        The reference.
    every
        Take every so many windows for one step.
    burn_in
        Time in fs to leave out at the start of rollouts.
    cost
        Time a step on one core as well.

    Returns
    -------
    pd.DataFrame
        Tidy rows: model, metric, value, low, high, and for rollouts reference, reference_low,
        reference_high, target and passed.
    """
    tables = []
    for name, emulator in (emulators or {}).items():
        windows = load_windows(data, split, emulator.horizon, max(3, emulator.context))
        tables.append(one_step_table({name: emulator}, windows, every))
        if cost:
            tables.append(cost_table({name: emulator}, windows))
    training, reference = (open_split(data, s) for s in ("train", split))
    for name, run in (rollouts or {}).items():
        table = assess_rollout(run, reference, training, burn_in=burn_in)
        table.insert(0, "model", name)
        tables.append(table)
    if not tables:
        return pd.DataFrame(columns=["model", "metric", "value", "low", "high"])
    joined = pd.concat(tables, ignore_index=True)
    return joined.assign(target=joined["target"].fillna("")) if "target" in joined else joined


def pivot_metrics(tables: Sequence[pd.DataFrame] | pd.DataFrame) -> pd.DataFrame:
    """Return one line a model, one column a metric, in the order of first appearance."""
    tidy = tables if isinstance(tables, pd.DataFrame) else pd.concat(tables)
    wide = tidy.pivot_table(
        index="model", columns="metric", values="value", sort=False, dropna=False
    )
    return wide[list(dict.fromkeys(tidy["metric"]))]
