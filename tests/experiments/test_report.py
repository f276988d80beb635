"""Tidy rows on disk."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.report import merge_rows, paired_ratios, run_missing


def test_rows_of_one_key_are_replaced(tmp_path: Path) -> None:
    first = pd.DataFrame({"model": "a", "metric": ["x", "y"], "value": 1.0})
    merge_rows(tmp_path / "new" / "r.csv", first, ["model", "metric"])
    rows = merge_rows(tmp_path / "new" / "r.csv", first[:1].assign(value=2.0), ["model", "metric"])
    assert dict(zip(rows.metric, rows.value, strict=True)) == {"x": 2.0, "y": 1.0}


def test_rows_of_one_key_stay_together_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    merge_rows(path, pd.DataFrame({"model": "b", "value": [3.0, 1.0, 2.0]}), ["model"])
    rows = merge_rows(path, pd.DataFrame({"model": "a", "value": [9.0, 8.0]}), ["model"])
    assert rows.model.tolist() == ["a", "a", "b", "b", "b"]
    assert rows.value.tolist() == [9.0, 8.0, 3.0, 1.0, 2.0]
    assert not path.with_suffix(".part").exists()


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    path, columns, made = tmp_path / "r.csv", ["model", "seed", "value"], []

    def make(model: str, seed: int) -> pd.DataFrame:
        if (model, seed) == ("b", 1):
            raise KeyboardInterrupt
        made.append((model, seed))
        return pd.DataFrame({"value": [float(seed)], "unasked": 1})

    wanted = [("b", 0), ("a", 0), ("b", 1), ("a", 1)]
    with pytest.raises(KeyboardInterrupt):
        run_missing(path, columns, columns[:2], wanted, make)
    assert made == wanted[:2]
    rows = run_missing(path, columns, columns[:2], [*wanted[:2], ("a", 7)], make)
    assert made == [*wanted[:2], ("a", 7)] and list(rows) == columns
    assert rows.values.tolist() == [["a", 0, 0.0], ["a", 7, 7.0], ["b", 0, 0.0]]
    assert run_missing(tmp_path / "none.csv", columns, columns[:2], [], make).empty


# --- ratios, seed by seed ---------------------------------------------------------------------


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    return paired_ratios(rows, "no sJSD", ["seed", "steps"])


def rows_of(values):
    """Rows of one metric from {variant: one value a seed}."""
    rows = [(v, s, 10, "l2", x) for v, xs in values.items() for s, x in enumerate(xs)]
    return pd.DataFrame(rows, columns=["variant", "seed", "steps", "metric", "value"])


def test_ratios_are_paired_by_seed():
    """The same ratio for every seed is certain, however much seeds differ."""
    table = ratios(rows_of({"no sJSD": [1.0, 2.0, 9.0], "value": [0.5, 1.0, 4.5]}))
    assert table.variant.tolist() == ["value"] and table.seeds.tolist() == [3]
    np.testing.assert_allclose(table[["ratio", "low", "high"]], 0.5, rtol=1e-12)


def test_the_interval_is_that_of_student():
    """ln ratios 0 and 2: mean 1, standard error 1, and t(0.975, 1) = 12.706."""
    table = ratios(rows_of({"no sJSD": [1.0, 1.0], "spatial": [1.0, np.exp(2.0)]}))
    found = np.log(table[["ratio", "low", "high"]].values[0])
    np.testing.assert_allclose(found, [1, 1 - 12.7062, 1 + 12.7062], rtol=1e-5)


def test_one_seed_has_no_interval():
    table = ratios(rows_of({"no sJSD": [1.0], "spatial": [2.0]}))
    assert table.ratio[0] == pytest.approx(2.0) and np.isnan(table.low[0])
