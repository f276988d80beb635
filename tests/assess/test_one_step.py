"""Error tables of maps whose errors are known by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from densitykit.assess import (
    error_curves,
    one_step_errors,
    one_step_table,
    operations_per_step,
    rollout_table,
    seconds_per_step,
    wide_table,
)
from densitykit.data.transforms import LogNormal
from densitykit.data.windows import StatePairs
from densitykit.models.baselines import LinearExtrapolation, Persistence

H, N = 2.0, 4
CELL = 6.0 * np.eye(3)
TRANSFORM = LogNormal(-3.0, 0.3, 0.0)


def growing(frames: int = 12, lag: int = 1) -> StatePairs:
    """A fixed positive field times (1 + frame)."""
    field = torch.rand((N, N, N), generator=torch.Generator().manual_seed(0)) + 0.5
    rho = field * torch.arange(1.0, frames + 1)[:, None, None, None]
    rate = (field / H).expand_as(rho)
    return StatePairs(torch.stack([rho, rate], 1), H * np.arange(frames), lag * H, CELL)


def liquid(frames: int = 16, seed: int = 0) -> np.ndarray:
    """Log-normal noise with the same number of electrons in each frame."""
    rho = np.exp(np.random.default_rng(seed).normal(-3, 0.3, (frames, 6, 6, 6)))
    return rho * (0.05 / rho.mean((1, 2, 3), keepdims=True))


def wrong_by(e: float, horizon: float = H):
    """A map that knows the truth and overshoots it by the fraction e."""

    def step(x: Tensor) -> Tensor:
        return (1 + e) * LinearExtrapolation(horizon)(x)

    return step


# --- one step --------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 3])
def test_one_step_errors_of_a_known_error(lag):
    pairs = growing(lag=lag)
    errors = one_step_errors(wrong_by(-0.03, lag * H), pairs)
    assert errors.shape == (12 - lag, 2)
    np.testing.assert_allclose(errors, 0.03, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 5])
def test_every_takes_a_part_of_the_pairs(batch):
    """Persistence of k + 1 against k + 2: 1/(k + 2)."""
    errors = one_step_errors(Persistence(H), growing(), every=3, batch=batch)
    expected = 1 / (np.arange(0, 11, 3) + 2)
    np.testing.assert_allclose(errors, np.stack([expected] * 2, 1), rtol=1e-5)


def test_one_step_table_is_tidy():
    table = one_step_table({"a": wrong_by(0.05), "b": Persistence(H)}, growing())
    assert list(table) == ["model", "metric", "value", "low", "high"]
    assert list(table.model) == ["a", "a", "b", "b"]
    assert list(table.metric) == ["one-step l1", "one-step l2"] * 2
    np.testing.assert_allclose(table.value[:2], 0.05, rtol=1e-4)
    np.testing.assert_allclose(table.value[2:], (1 / np.arange(2, 13)).mean(), rtol=1e-5)
    assert (table.low <= table.value + 1e-9).all() and (table.value <= table.high + 1e-9).all()


# --- along rollouts --------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 2])
def test_error_curves_of_persistence(lag):
    """From frame f after k steps: (f + 1) against (f + 1 + k lag)."""
    steps = 3
    pairs = growing(12, lag)
    maps = {"still": Persistence(lag * H), "linear": LinearExtrapolation(lag * H)}
    times, curves = error_curves(maps, pairs, steps, starts=4)
    np.testing.assert_allclose(times, lag * H * np.array([1, 2, 3]))
    first = np.linspace(0, 11 - steps * lag, 4).astype(int)
    ahead = lag * np.arange(1, steps + 1)[:, None]
    np.testing.assert_allclose(curves["still"], ahead / (first + 1 + ahead), rtol=1e-5)
    np.testing.assert_allclose(curves["linear"], 0, atol=1e-6)


# --- statistics of rollouts ------------------------------------------------------------------


def scores(table: pd.DataFrame, model: str) -> pd.Series:
    return table[table.model == model].set_index("metric").value


def test_the_reference_agrees_with_itself():
    reference = liquid()
    table = rollout_table({"same": reference.copy()}, reference, CELL, TRANSFORM)
    same, halves = (scores(table, name) for name in ("same", "reference halves"))
    assert same["value-sJSD"] == pytest.approx(0, abs=1e-12)
    assert same["value-sJSD / floor"] == pytest.approx(0, abs=1e-9)
    assert same["S(q) error"] == 0 and same["sd ln rho / reference"] == 1
    assert same["electron drift"] < 1e-14
    assert halves["value-sJSD"] > 0 and halves["value-sJSD / floor"] == 1
    assert 0 < halves["S(q) error"] < 1
    assert halves["sd ln rho / reference"] == pytest.approx(1, abs=0.05)


def test_planted_faults_are_measured():
    reference = liquid()
    drifting = reference * (1 + 1e-3 * np.arange(16) / 15)[:, None, None, None]
    mean = reference.mean()
    calm = mean * (reference / mean) ** 0.5
    fluctuation = mean + 2 * (reference - mean)
    table = rollout_table(
        {"drifting": drifting, "calm": calm, "wild": fluctuation}, reference, CELL, TRANSFORM
    )
    assert scores(table, "drifting")["electron drift"] == pytest.approx(1e-3, rel=1e-9)
    assert scores(table, "calm")["sd ln rho / reference"] == pytest.approx(0.5, rel=1e-9)
    assert scores(table, "wild")["S(q) error"] == pytest.approx(3, rel=1e-9)  # 2^2 - 1
    assert scores(table, "calm")["value-sJSD / floor"] > 10


def test_negative_densities_do_not_break_the_table():
    reference = liquid()
    below = reference.copy()
    below[3, 0, 0, 0] = -1e-3
    table = rollout_table({"below": below}, reference, CELL, TRANSFORM)
    assert np.isfinite(table.value).all()


# --- cost and layout -------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_seconds_per_step_restores_the_threads(fails):
    calls = []

    def step(x: Tensor) -> Tensor:
        calls.append((tuple(x.shape), torch.get_num_threads()))
        if fails:
            raise RuntimeError("boom")
        return x

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="boom"):
                seconds_per_step(step, torch.ones(2, 4, 4, 4))
        else:
            assert 0 < seconds_per_step(step, torch.ones(2, 4, 4, 4), repeats=3) < 1
            assert calls == [((1, 2, 4, 4, 4), 1)] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_wide_table_keeps_the_order_of_models_and_metrics():
    columns = ["model", "metric", "value"]
    first = pd.DataFrame([("z", "l2", 1.0), ("z", "l1", 2.0), ("a", "l2", 3.0)], columns=columns)
    second = pd.DataFrame([("a", "cost", 4.0), ("m", "cost", 5.0)], columns=columns)
    wide = wide_table([first, second])
    assert list(wide.index) == ["z", "a", "m"] and list(wide) == ["l2", "l1", "cost"]
    assert wide.loc["z", "l1"] == 2 and wide.loc["a", "cost"] == 4
    assert np.isnan(wide.loc["m", "l2"])


def test_wide_table_shows_what_could_not_be_computed():
    table = pd.DataFrame(
        [("a", "l1", 1.0), ("a", "l2", np.nan), ("b", "l1", np.nan), ("b", "l2", np.nan)],
        columns=["model", "metric", "value"],
    )
    wide = wide_table([table])
    assert list(wide.index) == ["a", "b"] and list(wide) == ["l1", "l2"]
    assert wide.loc["a", "l1"] == 1 and wide.isna().sum().sum() == 3


def test_operations_are_those_of_one_member():
    """A linear map along z: N^3 points, N products and N sums each, for rho and for its rate."""
    weights = torch.eye(N)
    assert operations_per_step(lambda x: x @ weights, growing()) == 2 * 2 * N**3 * N
