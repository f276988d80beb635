"""Error tables of maps whose errors are known by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from analytic import run_of
from torch import Tensor

from densitykit.assess import (
    assess,
    cost_table,
    error_curves,
    one_step_errors,
    one_step_table,
    pivot_metrics,
    validation_error,
)
from densitykit.assess.cost import ab_initio_seconds, operations_per_step, seconds_per_step
from densitykit.data.windows import Windows
from densitykit.errors import ShapeError, TrajectoryError
from densitykit.io.reader import open_trajectory
from densitykit.io.splits import write_splits
from densitykit.models.baselines import LinearExtrapolation, Persistence
from densitykit.rollout import rollout

H, N = 2.0, 4


def growing(frames: int = 14, lag: int = 1) -> Windows:
    """A fixed positive field times (1 + frame)."""
    field = np.random.default_rng(0).uniform(0.5, 1.5, (N, N, N))
    return Windows(run_of(field * np.arange(1.0, frames + 1)[:, None, None, None], H), lag * H)


class WrongBy(LinearExtrapolation):
    """Knows the truth and overshoots it by the fraction e."""

    def __init__(self, e: float, horizon: float = H) -> None:
        super().__init__(horizon)
        self.e = e

    def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (1 + self.e) * super().step(state)


# --- one step --------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 3])
def test_one_step_errors_of_a_known_error(lag):
    errors = one_step_errors(WrongBy(-0.03, lag * H), growing(lag=lag))
    assert errors.shape == (14 - 2 - lag, 2)
    np.testing.assert_allclose(errors, 0.03, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 5])
def test_every_takes_a_part_of_the_windows(batch):
    """Persistence of the third frame on: 3 against 4, ..."""
    errors = one_step_errors(Persistence(H), growing(), every=3, batch=batch)
    expected = 1 / (np.arange(0, 11, 3) + 4)
    np.testing.assert_allclose(errors, np.stack([expected] * 2, 1), rtol=1e-5)


def test_one_step_table_is_tidy():
    table = one_step_table({"a": WrongBy(0.05), "b": Persistence(H)}, growing())
    assert list(table) == ["model", "metric", "value", "low", "high"]
    assert list(table.model) == ["a", "a", "b", "b"]
    assert list(table.metric) == ["one-step l1", "one-step l2"] * 2
    np.testing.assert_allclose(table.value[:2], 0.05, rtol=1e-4)
    np.testing.assert_allclose(table.value[2:], (1 / np.arange(4, 15)).mean(), rtol=1e-5)
    assert (table.low <= table.value + 1e-9).all() and (table.value <= table.high + 1e-9).all()


# --- along rollouts --------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 2])
def test_error_curves_of_persistence(lag):
    """From frame f + 2 after k steps: (f + 3) against (f + 3 + k lag)."""
    steps, windows = 3, growing(14, lag)
    maps = {"still": Persistence(lag * H), "linear": LinearExtrapolation(lag * H)}
    times, curves = error_curves(maps, windows, steps, starts=4)
    np.testing.assert_allclose(times, lag * H * np.array([1, 2, 3]))
    first = np.linspace(0, 11 - steps * lag, 4).astype(int)
    ahead = lag * np.arange(1, steps + 1)[:, None]
    np.testing.assert_allclose(curves["still"], ahead / (first + 3 + ahead), rtol=1e-5)
    np.testing.assert_allclose(curves["linear"], 0, atol=1e-6)


def test_the_longest_rollout_is_named():
    with pytest.raises(ShapeError, match="12 steps of 2 fs outlast the run of 14 frames; .* 11"):
        error_curves({"still": Persistence(H)}, growing(), 12)
    assert error_curves({"still": Persistence(H)}, growing(), 11)[1]["still"].shape == (11, 1)


def test_validation_is_the_mean_error():
    expected = (1 / (np.arange(0, 11, 4) + 4)).mean()
    assert validation_error(Persistence(H), growing()) == {
        "validation_l2": pytest.approx(expected, rel=1e-5)
    }


# --- the one table ---------------------------------------------------------------------------


def test_emulators_and_rollouts_in_one_table(mock_trajectory):
    """Each emulator at its own horizon; rollouts with reference, target and verdict."""
    path = mock_trajectory(n_frames=120)
    bounds = {"train": (0, 60), "test": (60, 120)}
    write_splits(path, {k: {"run": ".", "start": a, "stop": b} for k, (a, b) in bounds.items()})
    test = open_trajectory(path).isel(time=slice(60, 120))
    film = rollout(Persistence(2.0), Windows(test, 2.0)[0], 25, progress=False)
    emulators = {"short": Persistence(2.0), "long": Persistence(8.0)}
    table = assess(path, emulators, {"film": film}, cost=True)
    assert list(table.columns[:5]) == ["model", "metric", "value", "low", "high"]
    assert {"reference", "reference_low", "reference_high", "target", "passed"} <= {*table}
    assert list(table.model.unique()) == ["short", "long", "film"]
    wide = pivot_metrics(table)
    assert 2 * wide["one-step l2"]["short"] < wide["one-step l2"]["long"]
    expected = one_step_errors(Persistence(8.0), Windows(test, 8.0)).mean(axis=0)
    assert wide.loc["long", ["one-step l1", "one-step l2"]].tolist() == pytest.approx(expected)
    assert (wide["seconds per step"].dropna() > 0).all() and len(wide["seconds per step"]) == 3
    count = table[(table.model == "film") & table.metric.str.startswith("electron count")]
    assert count.passed.item() is True and count.value.item() < 1e-6


def test_nothing_to_assess_is_an_empty_table(mock_trajectory):
    path = mock_trajectory(n_frames=40)
    write_splits(
        path,
        {k: {"run": ".", "start": 0, "stop": 20} for k in ("train",)}
        | {"test": {"run": ".", "start": 20, "stop": 40}},
    )
    assert list(assess(path)) == ["model", "metric", "value", "low", "high"]


# --- cost and layout -------------------------------------------------------------------------


class Watched(Persistence):
    """Notes members and threads of each step."""

    def __init__(self, fails: bool) -> None:
        super().__init__(H)
        self.fails, self.calls = fails, []

    def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.calls.append((tuple(state.shape), torch.get_num_threads()))
        if self.fails:
            raise RuntimeError("boom")
        return state


@pytest.mark.parametrize("fails", [False, True])
def test_seconds_per_step_restores_the_threads(fails):
    emulator, window = Watched(fails), growing()[[0, 3]]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="boom"):
                seconds_per_step(emulator, window)
        else:
            assert 0 < seconds_per_step(emulator, window, repeats=3) < 1
            assert emulator.calls == [((2, N, N, N), 1)] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_speed_up_over_ab_initio_dynamics():
    """Of one member; without the cost of the run it is left out."""
    windows = growing()
    emulator = Watched(False)
    table = cost_table({"a": emulator}, windows)
    assert list(table.metric) == ["seconds per step"]
    assert {shape for shape, _ in emulator.calls} == {(1, N, N, N)}
    windows.attrs.update({"seconds_per_step_one_core": 3.0, "time_step_fs": 1.5})
    seconds, gain = cost_table({"a": emulator}, windows).value
    assert gain == pytest.approx(3.0 / 1.5 * H / seconds)
    assert ab_initio_seconds(windows.attrs) == 2.0
    with pytest.raises(TrajectoryError, match="time_step_fs"):
        ab_initio_seconds({"seconds_per_step_one_core": 3.0})


def test_pivot_metrics_keeps_the_order_of_models_and_metrics():
    columns = ["model", "metric", "value"]
    first = pd.DataFrame([("z", "l2", 1.0), ("z", "l1", 2.0), ("a", "l2", 3.0)], columns=columns)
    second = pd.DataFrame([("a", "cost", 4.0), ("m", "cost", 5.0)], columns=columns)
    wide = pivot_metrics([first, second])
    assert list(wide.index) == ["z", "a", "m"] and list(wide) == ["l2", "l1", "cost"]
    assert wide.loc["z", "l1"] == 2 and wide.loc["a", "cost"] == 4
    assert np.isnan(wide.loc["m", "l2"])


def test_pivot_metrics_shows_what_could_not_be_computed():
    table = pd.DataFrame(
        [("a", "l1", 1.0), ("a", "l2", np.nan), ("b", "l1", np.nan), ("b", "l2", np.nan)],
        columns=["model", "metric", "value"],
    )
    wide = pivot_metrics([table])
    assert list(wide.index) == ["a", "b"] and list(wide) == ["l1", "l2"]
    assert wide.loc["a", "l1"] == 1 and wide.isna().sum().sum() == 3


class Mixing(Persistence):
    """A linear map along z."""

    def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return state @ torch.eye(N)


def test_operations_are_those_of_one_member():
    """N^3 points, N products and N sums each."""
    assert operations_per_step(Mixing(H), growing()) == 2 * N**3 * N
