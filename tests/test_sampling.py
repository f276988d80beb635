"""States, pairs and augmentation; the errors for data that cannot give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from densitykit.data.symmetry import augment
from densitykit.data.windows import StatePairs, physical_states, step_generator
from densitykit.errors import TrajectoryError
from densitykit.fields import time_derivative
from densitykit.io.reader import open_trajectory


def dataset(density: np.ndarray, spacing: float = 2.0) -> xr.Dataset:
    """Trajectory in memory with equally spaced frames."""
    time = spacing * np.arange(len(density))
    ds = xr.Dataset({"density": (("time", "x", "y", "z"), density)}, {"time": time})
    ds.encoding["source"] = "runs/li.zarr"
    return ds


def noise(frames: int = 6, n: int = 4) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1, (frames, n, n, n)).astype(np.float32)


# --- states ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "kept"),
    [("backward-1", slice(1, 8)), ("backward-2", slice(2, 8)), ("central", slice(1, 7))],
)
def test_states_of_a_trajectory(
    scheme: str, kept: slice, mock_trajectory: Callable[..., Path], mock_density: Callable
) -> None:
    ds = open_trajectory(mock_trajectory(n_frames=8))
    states, times = physical_states(ds, scheme)
    np.testing.assert_array_equal(times, ds["time"].values[kept])
    assert states.shape == (len(times), 2, 8, 8, 8) and states.dtype == torch.float32
    np.testing.assert_array_equal(states[:, 0], ds["density"].values[kept])
    h = 1e-3
    exact = np.stack([mock_density(t + h) - mock_density(t - h) for t in times]) / (2 * h)
    error = np.abs(states[:, 1].numpy() - exact).max() / np.abs(exact).max()
    angle = 2 * np.pi * 3 / 40 * 2  # of the fastest wave in one step; leading error terms
    assert (
        error
        < {"backward-1": angle / 2, "backward-2": angle**2 / 3, "central": angle**2 / 6}[scheme]
    )


def test_states_do_not_know_the_future() -> None:
    density = noise(7)
    changed = density.copy()
    changed[5:] = 1.0
    before, after = (physical_states(dataset(d))[0] for d in (density, changed))
    torch.testing.assert_close(before[:3], after[:3], rtol=0, atol=0)  # frames 2, 3 and 4
    assert not torch.equal(before[3], after[3])


@pytest.mark.parametrize(
    "times",
    [[0, 2, 4, 7], [0, 2], [0, 2, np.nan, np.nan], [0, 0, 0, 0], [6, 4, 2, 0]],
    ids=["unequal", "too few", "uncommitted", "repeated", "backwards"],
)
def test_states_refuse_bad_times(times: list[float]) -> None:
    ds = dataset(noise(len(times)))
    ds["time"] = np.array(times, dtype=float)
    ds.encoding["source"] = "runs/li.zarr"
    with pytest.raises(TrajectoryError, match=r"runs/li\.zarr: variable 'time' .*; select"):
        physical_states(ds)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-3])
def test_states_refuse_bad_densities(value: float) -> None:
    density = noise()
    density[3, 1, 2, 3] = value
    with pytest.raises(
        TrajectoryError, match=r"runs/li\.zarr: variable 'density' .*; run `python -m"
    ):
        physical_states(dataset(density))


def test_states_of_a_stored_trajectory_name_its_path(mock_trajectory: Callable[..., Path]) -> None:
    path = mock_trajectory(n_frames=6)
    with pytest.raises(TrajectoryError, match=str(path)):
        physical_states(open_trajectory(path).isel(time=[0, 1, 3]))


# --- pairs -----------------------------------------------------------------------------------


def counting_pairs(frames: int = 10, spacing: float = 3.0, horizon: float = 12.0) -> StatePairs:
    """Pairs whose states hold nothing but their own time."""
    times = 100 + spacing * np.arange(frames)
    states = torch.tensor(times, dtype=torch.float32)[:, None, None, None, None].expand(
        -1, 2, 2, 2, 2
    )
    return StatePairs(states, times, horizon)


@pytest.mark.parametrize(("horizon", "length"), [(3.0, 9), (12.0, 6), (27.0, 1)])
def test_pairs_are_a_horizon_apart(horizon: float, length: int) -> None:
    pairs = counting_pairs(horizon=horizon)
    assert len(pairs) == length
    state, later = pairs[:]
    assert len(state) == length and (later - state == horizon).all()
    assert state[:, 0, 0, 0, 0].tolist() == pairs.times[:length].tolist()
    one, one_later = pairs[length - 1]
    assert one.shape == (2, 2, 2, 2) and (one_later - one == horizon).all()
    some, some_later = pairs[torch.tensor([0, length - 1, 0])]
    assert some.shape == (3, 2, 2, 2, 2) and (some_later - some == horizon).all()
    drawn, drawn_later = pairs.draw(5, step_generator(0, 0))
    assert drawn.shape == (5, 2, 2, 2, 2) and (drawn_later - drawn == horizon).all()


def test_pairs_index_from_the_end_of_the_pairs() -> None:
    pairs = counting_pairs()
    torch.testing.assert_close(pairs[-1][1], pairs.states[-1])
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_draws_reach_every_pair() -> None:
    drawn, _ = counting_pairs().draw(100, step_generator(0, 0))
    assert set(drawn[:, 0, 0, 0, 0].tolist()) == {100, 103, 106, 109, 112, 115}


@pytest.mark.parametrize("horizon", [4.0, 1.0, 0.0, -3.0])
def test_horizon_must_be_a_multiple(horizon: float) -> None:
    with pytest.raises(TrajectoryError, match=rf"horizon {horizon} fs .* 3\.0 fs; choose"):
        counting_pairs(horizon=horizon)


@pytest.mark.parametrize("frames", [4, 1, 0])
def test_run_must_be_longer_than_the_horizon(frames: int) -> None:
    with pytest.raises(TrajectoryError, match="12.0 fs; use a longer run"):
        counting_pairs(frames=frames)


# --- augmentation ----------------------------------------------------------------------------


def linear_part(moved: torch.Tensor, n: int) -> np.ndarray:
    """Signed permutation that took the field of flat indices to ``moved``."""
    corners = [moved[0, 0, 0], moved[1, 0, 0], moved[0, 1, 0], moved[0, 0, 1]]
    places = np.array([np.unravel_index(int(c), (n, n, n)) for c in corners])
    return (places[1:] - places[0] + 1) % n - 1  # differences are -1, 0 or 1


def test_augmentation_reaches_every_symmetry_and_shift() -> None:
    n = 3
    field = torch.arange(n**3).reshape(n, n, n)
    operations, origins = set(), set()
    for step in range(600):
        (moved,) = augment(field, generator=step_generator(0, step))
        matrix = linear_part(moved, n)
        np.testing.assert_array_equal(np.abs(matrix) @ np.ones(3), 1)
        np.testing.assert_array_equal(matrix @ matrix.T, np.eye(3))
        assert sorted(moved.flatten().tolist()) == list(range(n**3))
        operations.add(tuple(matrix.flatten()))
        origins.add(int(moved[0, 0, 0]))
    assert len(operations) == 48 and len(origins) == n**3


def test_augmentation_is_an_isometry_of_the_torus() -> None:
    """It keeps the distances between all points: the field autocorrelation by |displacement|."""
    n = 5
    field = torch.randn(n, n, n, generator=step_generator(1, 0), dtype=torch.float64)
    frequency = np.abs(np.fft.fftfreq(n, 1 / n)) ** 2
    shells = (frequency[:, None, None] + frequency[:, None] + frequency).round().astype(int)

    def shell_power(x: torch.Tensor) -> np.ndarray:
        return np.bincount(shells.ravel(), (np.abs(np.fft.fftn(x.numpy())) ** 2).ravel())

    for step in range(5):
        (moved,) = augment(field, generator=step_generator(2, step))
        np.testing.assert_allclose(shell_power(moved), shell_power(field), rtol=1e-10)


def test_augmentation_acts_alike_on_all_fields() -> None:
    """Fields of any number of leading axes; one is a function of the other, point by point."""
    a = torch.rand(2, 3, 4, 4, 4, generator=step_generator(3, 0))
    for step in range(10):
        left, right = augment(a, a[0, 0].square(), generator=step_generator(3, step))
        assert left.shape == a.shape and left.is_contiguous()
        torch.testing.assert_close(left[0, 0].square(), right, rtol=0, atol=0)


def test_rates_transform_as_scalars() -> None:
    """The rate of moved frames is the moved rate of the frames."""
    frames = torch.tensor(noise().astype(np.float64))
    rates = torch.tensor(time_derivative(frames.numpy(), 2.0))
    for step in range(10):
        moved, moved_rates = augment(frames, rates, generator=step_generator(4, step))
        np.testing.assert_array_equal(time_derivative(moved.numpy(), 2.0), moved_rates)


def test_each_pair_of_a_batch_has_its_own_symmetry() -> None:
    states = torch.rand(1, 2, 4, 4, 4).expand(3, -1, -1, -1, -1)
    state, later = StatePairs(states, 2.0 * np.arange(3), 2.0).draw(8, step_generator(0, 0))
    torch.testing.assert_close(state, later, rtol=0, atol=0)
    assert len({tuple(s.flatten().tolist()) for s in state}) == 8


def test_generator_depends_on_seed_step_and_rank_alone() -> None:
    def draw(*key: int) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=step_generator(*key)).tolist())

    keys = [(s, t, r) for s in range(4) for t in range(4) for r in range(4)]
    first = [draw(*key) for key in keys]
    torch.rand(10)  # the global generator plays no part
    assert [draw(*key) for key in keys] == first
    assert len(set(first)) == len(keys)
    assert draw(1, 2) == draw(1, 2, 0)
    pairs = counting_pairs()
    for a, b in zip(
        pairs.draw(4, step_generator(7, 3)), pairs.draw(4, step_generator(7, 3)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
