"""Windows of raw frames: what they hold, how they are read, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from analytic import moving_atoms, run_of

from densitykit.assess.one_step import validation_error
from densitykit.data.transforms import LogNormal
from densitykit.data.windows import (
    Window,
    Windows,
    lag_in_frames,
    load_windows,
    step_generator,
    suitable_horizon,
)
from densitykit.errors import TrajectoryError, WindowError
from densitykit.io.reader import open_trajectory
from densitykit.io.splits import write_splits
from densitykit.models.base import FieldEmulator
from densitykit.models.baselines import Persistence


def noise(frames: int = 6, n: int = 4) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1, (frames, n, n, n)).astype(np.float32)


def counting(frames: int = 10, spacing: float = 3.0, **options: object) -> Windows:
    """Windows whose densities hold nothing but their own time."""
    times = 100 + spacing * np.arange(frames)
    density = np.broadcast_to(times[:, None, None, None], (frames, 2, 2, 2))
    run = run_of(density, spacing, start=100.0)
    return Windows(run, **({"horizon": 12.0, "context": 1} | options))


def value(frames: torch.Tensor) -> list:
    """The number that constant fields (*, X, Y, Z) hold."""
    return frames[..., 0, 0, 0].tolist()


# --- what a window holds ---------------------------------------------------------------------


def test_a_window_is_raw_frames_with_all_that_was_stored() -> None:
    run = moving_atoms([11, 11, 17], frames=12, time_step=2.5, cell=np.diag([4.0, 5.0, 6.0]))
    window = Windows(run, 5.0, context=3)[4]
    assert window.offsets == (-2, -1, 0, 1, 2)  # the target is two frames ahead
    frames = slice(4, 9)
    np.testing.assert_array_equal(window.density[0], run.density[frames])
    np.testing.assert_array_equal(window.times[0], run.time[frames])
    np.testing.assert_array_equal(window.positions[0], run.positions[frames])
    np.testing.assert_array_equal(window.velocities[0], run.velocities[frames])
    np.testing.assert_array_equal(window.cell, run.cell.values[None])
    assert window.numbers.tolist() == [11, 11, 17] and window.density.dtype == torch.float32
    assert window.time_step == 2.5 and window.now.tolist() == [15.0]
    assert len(window) == 1 and window.grid == (8, 8, 8)
    for word in ("1 x 5 frames", "2.5 fs apart", "8 x 8 x 8", "3 atoms", "runs/li.zarr"):
        assert word in repr(window)


@pytest.mark.parametrize(
    ("context", "lag", "steps", "offsets"),
    [
        (1, 4, 1, (0, 4)),
        (3, 1, 1, (-2, -1, 0, 1)),
        (3, 6, 1, (-2, -1, 0, 4, 5, 6)),
        (2, 2, 3, (-1, 0, 1, 2, 3, 4, 5, 6)),
        (3, 2, 0, (-2, -1, 0)),
    ],
)
def test_offsets_are_the_contexts_of_the_present_and_of_every_target(
    context: int, lag: int, steps: int, offsets: tuple[int, ...]
) -> None:
    windows = counting(24, horizon=3.0 * lag, context=context, steps=steps)
    assert windows.offsets == offsets
    assert len(windows) == 24 - offsets[-1] - context + 1
    now = 100 + 3.0 * (context - 1)
    assert value(windows[0].density[0]) == [now + 3.0 * k for k in offsets]
    assert value(windows[-1].density)[0][-1] == 100 + 3.0 * 23


def test_frames_are_found_by_their_offset() -> None:
    window = counting(context=3)[2]
    assert value(window.at(0)) == [112.0] and value(window.at(4)) == [124.0]
    assert value(window.past(2).density) == [[109.0, 112.0]]
    later = window.past(3, end=4)
    assert value(later.density) == [[118.0, 121.0, 124.0]]
    assert later.offsets == (-2, -1, 0) and later.now.tolist() == [124.0]
    assert later.times.tolist() == [[118.0, 121.0, 124.0]]


def test_the_past_of_a_target_is_a_window_with_a_new_present() -> None:
    """Also where the frames that are asked for are all that there are."""
    window = counting(horizon=3.0, steps=2)[0]
    later = window.past(3, end=2)
    assert later.offsets == (-2, -1, 0) and later.now.tolist() == [106.0]
    assert value(later.at(0)) == [106.0]


def test_atoms_move_with_their_frames() -> None:
    run = moving_atoms([3, 3], frames=12)
    window = Windows(run, 4.0)[3].past(2, end=2)
    np.testing.assert_array_equal(window.positions[0], run.positions[6:8])
    np.testing.assert_array_equal(window.velocities[0], run.velocities[6:8])


def test_a_past_that_is_not_there_names_both_numbers() -> None:
    with pytest.raises(WindowError, match=r"runs/li\.zarr: 5 frames .* has 3; .*context=5"):
        counting(context=3)[0].past(5)


def test_an_ensemble_is_equal_members() -> None:
    run = moving_atoms([3, 3], frames=12)
    window = Windows(run, 4.0)[1].expand(4)
    assert len(window) == 4 and window.density.shape[0] == 4
    for name in ("density", "times", "cell", "positions", "velocities"):
        x = getattr(window, name)
        assert len(x) == 4
        torch.testing.assert_close(x[3], x[0], rtol=0, atol=0)
    assert window.numbers.tolist() == [3, 3]


def test_stacked_windows_are_those_of_several_indices() -> None:
    windows = Windows(moving_atoms([3, 3], frames=12), 4.0)
    stacked, together = Window.stack([windows[1], windows[5]]), windows[[1, 5]]
    for name in ("density", "times", "cell", "positions", "velocities"):
        assert torch.equal(getattr(stacked, name), getattr(together, name))
    assert stacked.now.tolist() == together.now.tolist() == [6.0, 14.0]
    assert torch.equal(together[1:].density, windows[5].density)


def test_a_window_made_by_hand_ends_in_the_present() -> None:
    window = Window(torch.ones(1, 3, 2, 2, 2), torch.tensor([[0.0, 1, 2]]), torch.eye(3)[None])
    assert window.offsets == (-2, -1, 0) and window.time_step == 1 and window.now.item() == 2


@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 4, 4, 4), (1, 1, 2, 4, 4, 4), (2, 3, 4, 4, 4)])
def test_wrong_shape_says_which_to_give(shape: tuple[int, ...]) -> None:
    with pytest.raises(WindowError, match=r"give \(B, K, X, Y, Z\) and \(B, 3, 3\)"):
        Window(torch.ones(shape), torch.zeros(1, 3), torch.eye(3)[None])


# --- which frames ----------------------------------------------------------------------------


@pytest.mark.parametrize(("horizon", "length"), [(3.0, 9), (12.0, 6), (27.0, 1)])
def test_targets_are_a_horizon_ahead(horizon: float, length: int) -> None:
    windows = counting(horizon=horizon)
    assert len(windows) == length
    for chosen in (slice(None), length - 1, torch.tensor([0, length - 1, 0])):
        window = windows[chosen]
        assert (window.at(windows.lag) - window.at(0) == horizon).all()
    assert value(windows[:].at(0)) == windows.times[:length].tolist()
    assert len(windows[torch.tensor([0, length - 1, 0])]) == 3
    drawn = windows.sample_batch(5, step_generator(0, 0))
    assert len(drawn) == 5 and (drawn.at(windows.lag) - drawn.at(0) == horizon).all()


def test_windows_index_from_the_end() -> None:
    windows = counting()
    torch.testing.assert_close(windows[-1].at(windows.lag)[0], windows.frames[9])
    with pytest.raises(WindowError, match="there is no window 6; choose 0 to 5"):
        windows[len(windows)]


def test_draws_reach_every_window() -> None:
    drawn = counting().sample_batch(100, step_generator(0, 0))
    assert set(value(drawn.at(0))) == {100, 103, 106, 109, 112, 115}


def test_every_so_many_windows_thinned_to_a_limit() -> None:
    windows = counting(104)
    assert windows.every(1) == list(range(100)) and windows.every(30) == [0, 30, 60, 90]
    assert windows.every(1, 10) == list(range(0, 100, 10)) and windows.every(1, 1000)[-1] == 99
    assert len(windows.every(1, 7)) <= 7


@pytest.mark.parametrize("horizon", [4.0, 1.0, 0.0, -3.0, float("nan")])
def test_horizon_must_be_a_multiple(horizon: float) -> None:
    expected = rf"runs/li\.zarr: horizon {horizon:g} fs .* 3 fs between frames; choose 3 or 6 fs"
    with pytest.raises(TrajectoryError, match=expected):
        counting(horizon=horizon)


def test_the_nearest_horizons_are_named() -> None:
    with pytest.raises(TrajectoryError, match=r"choose 10 or 12\.5 fs"):
        lag_in_frames(12.0, 2.5)
    assert lag_in_frames(12.5, 2.5) == 5 and lag_in_frames(0.3, 0.1) == 3


@pytest.mark.parametrize("frames", [4, 3, 2])
def test_run_must_be_longer_than_the_horizon(frames: int) -> None:
    with pytest.raises(TrajectoryError, match=rf"{frames} frames .* 5 of one window .*12 fs"):
        counting(frames)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times",
    [[0, 2, 4, 7], [0], [], [0, 2, np.nan, np.nan], [0, 0, 0, 0], [6, 4, 2, 0]],
    ids=["unequal", "one", "none", "uncommitted", "repeated", "backwards"],
)
def test_bad_times_are_refused(times: list[float]) -> None:
    run = run_of(noise(len(times))).assign_coords(time=np.array(times, dtype=float))
    run.encoding["source"] = "runs/li.zarr"
    found = rf"runs/li\.zarr: time: {len(times)} frames, not equally spaced; .*select"
    with pytest.raises(TrajectoryError, match=found):
        Windows(run, 2.0)


def test_two_frames_are_too_few_for_a_rate() -> None:
    with pytest.raises(TrajectoryError, match="2 frames are fewer than the 4 of one window"):
        Windows(run_of(noise(2)), 2.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-3])
def test_bad_densities_are_refused_when_they_are_read(bad: float) -> None:
    density = noise(80)
    density[73, 1, 2, 3] = bad
    windows = Windows(run_of(density), 2.0)
    assert windows[0].density.isfinite().all()  # a lazy run is not read through
    found = r"runs/li\.zarr: density, frame 73: .*; run `densitykit validate runs/li\.zarr`"
    with pytest.raises(TrajectoryError, match=found):
        windows[72]


def test_a_density_that_is_not_3d_is_refused() -> None:
    with pytest.raises(TrajectoryError, match="not 3-D"):
        Windows(run_of(noise()[..., 0]), 2.0)


def test_a_cell_that_changes_is_refused() -> None:
    run = run_of(noise())
    cells = 6.0 * np.eye(3) * np.linspace(1, 1.01, 6)[:, None, None]
    moved = run.assign(cell=(("time", "vector", "cartesian"), cells))
    with pytest.raises(TrajectoryError, match=r"li\.zarr: cell: it changes .*constant volume"):
        Windows(moved, 2.0)
    still = run.assign(cell=(("time", "vector", "cartesian"), np.array([6.0 * np.eye(3)] * 6)))
    np.testing.assert_array_equal(Windows(still, 2.0).cell, 6.0 * np.eye(3))


def test_errors_name_the_path_of_a_store(mock_trajectory: Callable[..., Path]) -> None:
    path = mock_trajectory(n_frames=6)
    with pytest.raises(TrajectoryError, match=str(path)):
        Windows(open_trajectory(path).isel(time=[0, 1, 3]), 2.0)


def test_atoms_that_were_never_given_are_none(mock_trajectory: Callable[..., Path]) -> None:
    window = Windows(open_trajectory(mock_trajectory(n_atoms=0)), 2.0)[0]
    assert window.numbers is window.positions is window.velocities is None
    run = moving_atoms([3, 3], frames=8).drop_vars("velocities")
    window = Windows(run, 2.0)[0]
    assert window.velocities is None and window.positions.shape == (1, 4, 2, 3)


def test_no_window_knows_its_future() -> None:
    """The present state of a model is the same whatever happens afterwards."""
    density = noise(7)
    changed = density.copy()
    changed[5:] = 1.0
    model = FieldEmulator(-1.0, 0.5, 0.01, 2.0)
    before, after = (
        [model.init(w[i]).fields for i in range(len(w))]
        for w in (Windows(run_of(d), 2.0) for d in (density, changed))
    )
    for i in range(3):  # present frames 2, 3 and 4
        torch.testing.assert_close(before[i], after[i], rtol=0, atol=0)
    assert not torch.equal(before[3], after[3])


# --- lazy ------------------------------------------------------------------------------------


class Counted:
    """Densities that remember which parts were asked for."""

    def __init__(self, density: xr.DataArray) -> None:
        self.density, self.asked = density, []

    def __getitem__(self, part: slice) -> xr.DataArray:
        self.asked.append((part.start, part.stop))
        return self.density[part]


def counted(windows: Windows) -> Counted:
    windows.frames.density = Counted(windows.frames.density)
    return windows.frames.density


def test_nothing_is_read_before_it_is_asked_for() -> None:
    windows = Windows(run_of(noise(80)), 2.0, cache_bytes=6 * 4 * 4**3)
    frames = counted(windows)
    assert not windows.frames.kept
    windows[10]
    assert sorted(frames.asked) == [(10, 11), (11, 12), (12, 13), (13, 14)]


def test_a_run_that_fits_is_read_once_in_blocks() -> None:
    windows = Windows(run_of(noise(80)), 2.0)
    frames = counted(windows)
    for _ in range(3):
        for i in range(len(windows)):
            windows[i]
    assert sorted(frames.asked) == [(0, 32), (32, 64), (64, 96)]
    assert len(windows.frames.kept) == 80


def test_a_run_larger_than_the_budget_keeps_its_room_only() -> None:
    room, density = 6, noise(80)
    windows = Windows(run_of(density), 4.0, cache_bytes=room * 4 * 4**3)
    assert windows.frames.room == room
    for i in [*range(len(windows)), 3, 70, 0]:
        np.testing.assert_array_equal(windows[i].density[0], density[i : i + 5])
        assert len(windows.frames.kept) <= room


def test_neighbouring_windows_share_their_frames() -> None:
    """Each frame is read once on the way through, however long the run."""
    windows = Windows(run_of(noise(80)), 2.0, cache_bytes=6 * 4 * 4**3)
    frames = counted(windows)
    for i in range(len(windows)):
        windows[i]
    assert len(frames.asked) == 80


def test_one_frame_is_kept_at_least() -> None:
    windows = Windows(run_of(noise(8)), 2.0, cache_bytes=1)
    np.testing.assert_array_equal(windows[2].density[0], noise(8)[2:6])
    assert len(windows.frames.kept) == 1


def test_fits_and_scores_keep_no_more_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows(run_of(noise(80)), 2.0, cache_bytes=6 * 4 * 4**3)
    most, read = [], windows.frames._read

    def watched(start: int) -> None:
        read(start)
        most.append(len(windows.frames.kept))

    monkeypatch.setattr(windows.frames, "_read", watched)
    whole = LogNormal.fit(noise(80)[2:79])  # every frame that is the present of a window
    streamed = LogNormal.of(windows)
    assert (streamed.mu, streamed.sigma) == (pytest.approx(whole.mu), pytest.approx(whole.sigma))
    validation_error(Persistence(2.0), windows)
    for step in range(5):
        windows.sample_batch(4, step_generator(0, step))
    assert max(most) == 6


def test_a_stored_split_is_read_lazily(mock_trajectory: Callable[..., Path]) -> None:
    path = mock_trajectory(n_frames=40)
    write_splits(path, {"train": {"run": ".", "start": 4, "stop": 40}})
    windows = load_windows(path, "train", 4.0, cache_bytes=5 * 4 * 8**3)
    frames = counted(windows)
    window = windows[20]
    assert len(frames.asked) == 5 and window.now.item() == 2.0 * (4 + 22)
    np.testing.assert_array_equal(window.density[0], open_trajectory(path).density[24:29])


# --- horizon, fingerprint, seeds -------------------------------------------------------------


def travelling(period: float, spacing: float, frames: int) -> xr.Dataset:
    """A wave that crosses the cell: its density correlates as cos(2 pi t / period)."""
    x, t = np.arange(8) / 8, spacing * np.arange(frames)[:, None, None, None]
    wave = np.cos(2 * np.pi * (x[:, None, None] - t / period))
    return run_of(0.3 + 0.1 * wave * np.ones((1, 8, 8, 8)), spacing)


@pytest.mark.parametrize(
    ("period", "spacing", "horizon"),
    [
        (60.0, 1.0, 4.0),  # cos 24 deg = 0.914, cos 30 deg = 0.866
        (120.0, 2.0, 8.0),
        (100.0, 0.5, 7.0),  # cos 25.2 deg = 0.905, cos 27 deg = 0.891
        (20.0, 2.0, 2.0),  # cos 36 deg is less than 0.9 already: one frame
    ],
)
def test_suitable_horizon_of_a_wave(period: float, spacing: float, horizon: float) -> None:
    assert suitable_horizon(travelling(period, spacing, 401)) == pytest.approx(horizon)


def test_the_horizon_of_a_split_is_that_of_its_training_run(
    mock_trajectory: Callable[..., Path],
) -> None:
    path = mock_trajectory(n_frames=60)
    bounds = {"train": (0, 40), "test": (50, 60)}
    write_splits(path, {k: {"run": ".", "start": a, "stop": b} for k, (a, b) in bounds.items()})
    train, test = load_windows(path, "train"), load_windows(path, "test")
    assert (
        test.horizon
        == train.horizon
        == suitable_horizon(open_trajectory(path)[{"time": slice(40)}])
    )


def test_fingerprint_knows_the_data() -> None:
    run = moving_atoms([3, 3], frames=40)
    words = {Windows(run, 4.0).fingerprint(), Windows(run.copy(), 4.0).fingerprint()}
    assert len(words) == 1
    changed = run.density.values.copy()
    changed[20] *= 1.01
    others = [
        (run.assign(density=(run.density.dims, changed)), 4.0),
        (run.isel(time=slice(0, 39)), 4.0),
        (run.assign_coords(time=run.time + 1.0), 4.0),
        (run.assign(cell=1.01 * run.cell), 4.0),
        (run.assign(numbers=run.numbers + 1), 4.0),
        (run, 6.0),
    ]
    for other, horizon in others:
        words.add(Windows(other, horizon).fingerprint())
    assert len(words) == 1 + len(others)


def test_generator_depends_on_seed_step_and_rank_alone() -> None:
    def draw(*key: int) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=step_generator(*key)).tolist())

    keys = [(s, t, r) for s in range(4) for t in range(4) for r in range(4)]
    first = [draw(*key) for key in keys]
    torch.rand(10)  # the global generator plays no part
    assert [draw(*key) for key in keys] == first
    assert len(set(first)) == len(keys)
    assert draw(1, 2) == draw(1, 2, 0)
    windows = Windows(run_of(noise(12)), 2.0)
    one, same = (windows.sample_batch(4, step_generator(7, 3)).density for _ in range(2))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
