"""Rollouts against analytic trajectories; streaming, seeds, errors, a kill; the thermostat."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import HEXAGONAL, moving_atoms, run_of
from torch import Tensor, nn

from densitykit.assess import assess_rollout, one_step_errors, one_step_table
from densitykit.data.windows import Window, Windows
from densitykit.errors import (
    RolloutError,
    ShapeError,
    TrajectoryError,
    UnfinishedError,
    WindowError,
)
from densitykit.io.reader import open_trajectory
from densitykit.io.store import SYNCED, load_arrays
from densitykit.io.validate import validate_trajectory
from densitykit.io.work import Work
from densitykit.models.base import Emulator, FieldEmulator, FieldState
from densitykit.models.baselines import LinearExtrapolation, Persistence
from densitykit.rollout import Thermostat, check_emulator, iterate, rollout, start

CELL = 6.0 * np.eye(3)


class Map(Persistence):
    """A function of density and generator, every 2 fs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__(2.0)
        self.function = function

    def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.function(state, generator)


def field(seed: int = 0, n: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, (n, n, n)).astype(np.float32)


def as_window(density: np.ndarray, now: float = 0.0, **atoms: Any) -> Window:
    """Frames (K, X, Y, Z), 2 fs apart, that end in the present."""
    times = now + 2.0 * np.arange(1 - len(density), 1)
    x, t = torch.tensor(np.asarray(density, np.float32))[None], torch.tensor(times)[None]
    return Window(x, t, torch.tensor(CELL)[None], **atoms)


def still(now: float = 0.0) -> Window:
    return as_window(field()[None], now)


def ensemble() -> Window:
    return Window.stack([as_window(field(i)[None]) for i in range(3)])


def uniform(seed: int = 0, now: float = 0.0) -> tuple[Window, np.ndarray, np.ndarray]:
    """A density that changes at a constant rate: window of three frames, density now, rate."""
    rho, rate = field(seed).astype(float) + 3, field(seed + 50).astype(float) - 1
    frames = np.stack([rho + 2.0 * k * rate for k in (-2, -1, 0)])
    return as_window(frames, now), rho, rate


kick = Map(lambda x, generator: x + 0.01 * torch.randn(x.shape[1:], generator=generator))
shift = Map(lambda x, generator: x.roll(1, dims=2))
explode = Map(lambda x, generator: x**2)  # 1e10 -> 1e20 -> inf in float32


def quiet(emulator: Emulator, window: Window, steps: int, **options: Any) -> Any:
    return rollout(emulator, window, steps, progress=False, **options)


# --- analytic trajectories -------------------------------------------------------------------


def test_persistence_stays():
    density = quiet(Persistence(2.0), still(), 5).density
    assert density.dims == ("time", "x", "y", "z") and density.dtype == np.float32
    np.testing.assert_array_equal(density, np.broadcast_to(field(), (6, 4, 4, 4)))


def test_advection_shifts_the_density_by_one_point_a_step():
    """Times begin at that of the window's present frame."""
    ds = quiet(shift, still(now=10.0), 6)
    expected = np.stack([np.roll(field(), k, axis=1) for k in range(7)])
    np.testing.assert_array_equal(ds.density, expected)
    np.testing.assert_array_equal(ds.time, 10 + 2.0 * np.arange(7))
    np.testing.assert_array_equal(ds.cell, CELL)


def test_damped_rate_gives_the_geometric_series():
    """rho' = rho + h v, v' = d v: rho_k = rho_0 + h v_0 (1 - d^k)/(1 - d)."""
    d, h = 0.8, 2.0

    class Damping(LinearExtrapolation):
        def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.stack([state[:, 0] + state[:, 1], d * state[:, 1]], dim=1)

    window, rho, rate = uniform()
    density = quiet(Damping(h), window, 12).density.values
    series = (1 - d ** np.arange(13)) / (1 - d)
    expected = rho + h * rate * series[:, None, None, None]
    np.testing.assert_allclose(density, expected, rtol=0, atol=1e-5)


def test_iterate_yields_state_and_density_after_each_step():
    window = ensemble()
    found = list(iterate(Map(lambda x, generator: 2 * x), window, 3))
    assert len(found) == 3
    for k, (state, density) in enumerate(found):
        torch.testing.assert_close(density, window.at(0) * 2 ** (k + 1), rtol=0, atol=0)
        assert density is state  # what this map's states are


def test_a_rollout_starts_from_the_present_frame_of_a_run():
    """Frames of the future and of the far past play no part."""
    run = moving_atoms([3, 3], frames=20, time_step=2.5)
    windows = Windows(run, 5.0, context=3)
    ds = quiet(Persistence(5.0), windows[4], 3)
    np.testing.assert_array_equal(ds.density[0], run.density[6])
    np.testing.assert_allclose(ds.time, 15.0 + 5.0 * np.arange(4))
    assert ds.numbers.values.tolist() == [3, 3] and "positions" not in ds


# --- emulators of one's own ------------------------------------------------------------------


class Translation:
    """Everything moves at one velocity: the example of ten lines, with nuclei."""

    context, horizon = 2, 4.0

    def init(self, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        return window.at(0), window.positions[:, -1], window.velocities[:, -1]

    def step(self, state: tuple, generator: torch.Generator | None = None) -> tuple:
        density, positions, velocities = state
        return density.roll(1, dims=1), positions + self.horizon * velocities, velocities

    def density(self, state: tuple) -> Tensor:
        return state[0]

    def nuclei(self, state: tuple) -> tuple[Tensor, Tensor]:
        return state[1], state[2]


def drifting(frames: int = 48, cell: np.ndarray | None = None) -> Any:
    """A crystal of two species that moves as a whole, one grid point along a in 4 fs."""
    cell = np.diag([4.0, 5.0, 6.0]) if cell is None else cell
    run = moving_atoms([11, 17], frames=1, cell=cell, kelvin=1e-9)
    v = cell[0] / 8 / 4.0
    t = 2.0 * np.arange(frames)
    first = run.density.values[0].astype(float) + 0.01
    modes = np.fft.fft(first, axis=0)
    phase = np.exp(-2j * np.pi * np.fft.fftfreq(8, 1 / 8)[None] * (t[:, None] / 4.0 / 8))
    phase[:, 4] = phase[:, 4].real  # the Nyquist wave
    density = np.fft.ifft(modes * phase[:, :, None, None], axis=1).real
    positions = run.positions.values[0] + t[:, None, None] * v
    velocities = np.broadcast_to(v, positions.shape)
    return run_of(density, 2.0, cell, numbers=[11, 17], positions=positions, velocities=velocities)


@pytest.mark.parametrize("cell", [np.diag([4.0, 5.0, 6.0]), HEXAGONAL])
def test_an_emulator_of_ten_lines(cell, tmp_path):
    """Through the rollout, memory or store, the one-step table and the table of rollouts."""
    run = drifting(cell=cell)
    windows, emulator = Windows(run, 4.0), Translation()
    assert isinstance(emulator, Emulator)
    errors = one_step_errors(emulator, windows)
    assert errors.shape == (len(windows), 2) and errors.max() < 1e-5
    table = one_step_table({"mine": emulator, "persistence": Persistence(4.0)}, windows, every=5)
    mine, persistence = (table[table.model == m].value for m in ("mine", "persistence"))
    assert mine.max() < 1e-5 < 0.05 < persistence.min()
    memory = quiet(emulator, windows[0], 21)
    stored = quiet(emulator, windows[0], 21, path=tmp_path / "mine.zarr")
    for film in (memory, stored):
        # the run's present frame is its third; every second frame is a step
        np.testing.assert_allclose(film.density, run.density[2:46:2], rtol=0, atol=1e-5)
        np.testing.assert_allclose(film.positions, run.positions[2:46:2], rtol=0, atol=1e-9)
        np.testing.assert_allclose(film.velocities, run.velocities[2:46:2], rtol=1e-6)
        np.testing.assert_array_equal(film.time, run.time[2:46:2])
        assert film.numbers.values.tolist() == [11, 17]
        assert film.attrs["title"] == "rollout of Translation" and film.attrs["horizon_fs"] == 4.0
        judged = assess_rollout(film, run, run).set_index("metric")
        assert judged.value["electron count, largest error"] < 1e-6
        assert judged.value["frames with all nuclei"] == 1
    assert validate_trajectory(tmp_path / "mine.zarr") == []


def test_an_ensemble_stores_the_nuclei_of_each_member(tmp_path):
    windows = Windows(drifting(), 4.0)
    window = windows[[0, 3]]
    memory = quiet(Translation(), window, 3)
    stored = quiet(Translation(), window, 3, path=tmp_path / "two.zarr")
    for film in (memory, stored):
        assert film.positions.dims == ("member", "time", "atom", "cartesian")
        for b in (0, 1):
            expected = window.positions[b, -3] + 4.0 * window.velocities[b, -3]
            np.testing.assert_allclose(film.positions[b, 1], expected, rtol=0, atol=1e-9)
    times = [open_trajectory(tmp_path / "two.zarr" / f"member-{i}").time.values for i in (0, 1)]
    np.testing.assert_array_equal(times[0], 4.0 + 4.0 * np.arange(4))
    np.testing.assert_array_equal(times[1], 10.0 + 4.0 * np.arange(4))


@pytest.mark.parametrize(
    ("thing", "missing"),
    [
        (lambda x: x, "context, horizon, init, step, density missing"),
        (nn.Linear(2, 2), "context, horizon, init, step, density missing"),
        (FieldState(torch.ones(1), torch.ones(1), (1,)), "context, horizon, init, step, density"),
    ],
    ids=["function", "module", "state"],
)
def test_what_is_no_emulator_is_refused_by_name(thing, missing):
    for use in (
        lambda: check_emulator(thing),
        lambda: start(thing, still()),
        lambda: quiet(thing, still(), 2),
        lambda: one_step_errors(thing, Windows(drifting(), 4.0)),
    ):
        with pytest.raises(RolloutError, match=rf"a {type(thing).__name__} is no.*{missing}"):
            use()


def test_what_is_missing_of_an_emulator_is_named():
    class Half:
        context, horizon, density = 1, 2.0, 3.0

        def init(self, window: Window) -> Tensor:
            return window.at(0)

    with pytest.raises(RolloutError, match="a Half is no emulator: step, density missing"):
        check_emulator(Half())


def test_a_density_of_another_shape_is_refused_by_name():
    coarse = Map(lambda x, generator: x[:, ::2, ::2, ::2])
    with pytest.raises(RolloutError, match=r"step 1 of 3: Map.density gives \(1, 2, 2, 2\), not"):
        quiet(coarse, still(), 3)
    with pytest.raises(RolloutError, match=r"Map.density gives \(1, 1, 4, 4, 4\)"):
        quiet(Map(lambda x, generator: x[None]), still(), 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_density_that_is_not_finite_is_refused_by_name(value):
    def spoil(x: Tensor, generator: torch.Generator) -> Tensor:
        return x * torch.tensor([1.0, value])[torch.randint(2, x.shape, generator=generator)]

    with pytest.raises(RolloutError, match="step 1 of 3: the density of Map is not finite"):
        quiet(Map(spoil), still(), 3)
    run = Windows(drifting(), 2.0)
    with pytest.raises(RolloutError, match="step 1 of 1: the density of Map is not finite"):
        one_step_errors(Map(spoil), run)


def test_another_horizon_is_refused_with_both_numbers():
    with pytest.raises(WindowError, match="targets are 4 fs ahead, Persistence steps 2 fs"):
        one_step_errors(Persistence(2.0), Windows(drifting(), 4.0))


def test_too_few_frames_are_refused_with_both_numbers(tmp_path):
    with pytest.raises(WindowError, match="3 frames up to the present .* has 1"):
        quiet(LinearExtrapolation(2.0), still(), 2, path=tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()


# --- stores, ensembles, seeds ----------------------------------------------------------------


def test_a_store_holds_the_same_as_memory(tmp_path):
    options = {"seed": 3, "attrs": {"checkpoint": "li"}}
    memory = quiet(kick, still(5.0), 7, **options)
    stored = quiet(kick, still(5.0), 7, path=tmp_path / "run.zarr", **options)
    np.testing.assert_array_equal(memory.density, stored.density)
    np.testing.assert_array_equal(memory.time, stored.time)
    assert memory.time[0] == 5.0
    again = open_trajectory(tmp_path / "run.zarr")
    np.testing.assert_array_equal(again.density, memory.density)
    for key, value in {"checkpoint": "li", "seed": 3, "horizon_fs": 2.0}.items():
        assert again.attrs[key] == memory.attrs[key] == value


def test_an_ensemble_is_groups_equal_to_single_runs(tmp_path):
    x = ensemble()
    stored = quiet(kick, x, 4, path=tmp_path / "run.zarr")
    memory = quiet(kick, x, 4)
    assert stored.density.dims == memory.density.dims == ("member", "time", "x", "y", "z")
    np.testing.assert_array_equal(stored.density, memory.density)
    for i in range(3):
        single = quiet(kick, x[i : i + 1], 4).density
        member = open_trajectory(tmp_path / "run.zarr" / f"member-{i}").density
        np.testing.assert_array_equal(member, single)


def test_members_of_one_window_differ_by_their_noise():
    each = Map(lambda x, generator: x + 0.01 * torch.randn(x.shape, generator=generator))
    cloud = quiet(each, still().expand(3), 2).density
    np.testing.assert_array_equal(cloud[0, 0], cloud[2, 0])
    assert (cloud[0, 1] != cloud[2, 1]).all()


def test_seeds_repeat_a_stochastic_map():
    a, b, c = (quiet(kick, still(), 4, seed=s).density.values for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[0], c[0])
    assert all((x != y).any() for x, y in zip(a[1:], c[1:], strict=True))
    steps = np.diff(a, axis=0)
    assert np.abs(steps[0] - steps[1]).max() > 1e-3  # new noise each step


def test_divergence_names_the_step_and_keeps_what_came_before(tmp_path):
    path = tmp_path / "run.zarr"
    window = as_window(np.full((1, 4, 4, 4), 1e10))
    with pytest.raises(RolloutError, match="step 2 of 9"):
        quiet(explode, window, 9, path=path)
    density = open_trajectory(path).density
    assert density.shape == (2, 4, 4, 4)
    np.testing.assert_allclose(density[:, 0, 0, 0], [1e10, 1e20], rtol=1e-6)
    assert isinstance(RolloutError(""), ArithmeticError)


@pytest.mark.parametrize("make", [still, ensemble])
def test_a_taken_path_is_refused(tmp_path, make, mock_trajectory):
    path = mock_trajectory("run.zarr")
    before = open_trajectory(path).load()
    with pytest.raises(TrajectoryError, match="run.zarr.*already exists.*another path"):
        quiet(Persistence(2.0), make(), 1, path=path)
    assert open_trajectory(path).load().identical(before)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("dear diary")
    with pytest.raises(UnfinishedError, match="mine: no trajectory, so it is not replaced"):
        quiet(Persistence(2.0), make(), 1, path=tmp_path / "mine", restart=True)
    assert (tmp_path / "mine" / "notes").exists()


def test_an_ensemble_does_not_move_into_a_single_run(tmp_path):
    path = tmp_path / "run.zarr"
    quiet(Persistence(2.0), still(), 1, path=path)
    with pytest.raises(TrajectoryError, match="already exists"):
        quiet(Persistence(2.0), ensemble(), 1, path=path)
    assert not (path / "member-0").exists()


# --- interrupted -----------------------------------------------------------------------------


class Wrapped:
    """A state of a class that no file may bring back."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Strange(Map):
    def init(self, window: Window) -> Wrapped:
        return Wrapped(super().init(window))

    def step(self, state: Wrapped, generator: torch.Generator | None = None) -> Wrapped:
        return Wrapped(kick.step(state.x, generator))

    def density(self, state: Wrapped) -> Tensor:
        return state.x


def interrupted(emulator: Any, monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Let the emulator stop once, as by Ctrl-C, before its n-th step; give the steps taken."""
    step, taken = type(emulator).step, []

    def stops(self: Any, state: Any, generator: torch.Generator | None = None) -> Any:
        taken.append(len(taken))
        if len(taken) == at:
            raise KeyboardInterrupt
        return step(self, state, generator)

    monkeypatch.setattr(type(emulator), "step", stops)
    return taken


STARTS = {
    "tensor": (lambda: Map(kick.function), still, 10),
    "ensemble": (lambda: Map(kick.function), ensemble, 10),
    "fields": (lambda: Noisy(0.9), lambda: uniform()[0], 10),
    "tuple": (Translation, lambda: Windows(drifting(), 4.0)[0], 10),
    "strange": (lambda: Strange(None), still, 15),  # from the start: five steps twice
}


@pytest.mark.parametrize("name", STARTS)
def test_an_interrupted_rollout_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    make, window, steps = STARTS[name]
    emulator, path = make(), tmp_path / "run.zarr"
    whole = quiet(make(), window(), 9, path=tmp_path / "whole.zarr").load()
    taken = interrupted(emulator, monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        quiet(emulator, window(), 9, path=path)
    monkeypatch.undo()  # the emulator is as it was
    stopped, after = len(taken), make()
    again = interrupted(after, monkeypatch, 1000)
    parts = quiet(after, window(), 9, path=path).load()
    assert stopped + len(again) == steps
    for name in whole:
        np.testing.assert_array_equal(parts[name], whole[name])
    assert not list(tmp_path.glob(".*"))
    count = len(again)
    quiet(after, window(), 9, path=path)
    assert len(again) == count  # it is finished
    longer = quiet(after, window(), 12, path=path).load()
    expected = quiet(make(), window(), 12).density
    np.testing.assert_array_equal(longer.density, expected)


def test_a_rollout_of_another_recipe_is_refused_or_begun_anew(tmp_path, monkeypatch):
    path, emulator = tmp_path / "run.zarr", Noisy(0.9)
    window, _, _ = uniform()
    interrupted(emulator, monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        quiet(emulator, window, 9, path=path)
    monkeypatch.undo()
    for other, options, named in (
        (Noisy(0.9), {"seed": 1}, "seed is 0, not 1"),
        (Noisy(0.8), {}, "emulator is Noisy, crc32 .*, not Noisy, crc32 "),
        (Damped(0.9), {}, "emulator is Noisy, .* not Damped, "),
    ):
        with pytest.raises(UnfinishedError, match=rf"run.zarr: begun with .*{named}.*--restart"):
            quiet(other, window, 9, path=path, **options)
    with pytest.raises(UnfinishedError, match="start is 0 fs, crc32 .*, not 2 fs, crc32 "):
        quiet(Noisy(0.9), uniform(now=2.0)[0], 9, path=path)
    anew = quiet(Noisy(0.9), window, 9, path=path, seed=1, restart=True)
    np.testing.assert_array_equal(anew.density, quiet(Noisy(0.9), window, 9, seed=1).density)


@pytest.mark.parametrize("window", [still, ensemble])
def test_frames_are_on_disk_before_the_state_goes_on(window, tmp_path, monkeypatch):
    """A loss of power may take what was not synced: never the frame of the saved state."""
    path, save, steps = tmp_path / "run.zarr", Work.save, []

    def look(work: Work, arrays: dict) -> None:
        for file in path.rglob(SYNCED):
            assert load_arrays(file)["n"] > arrays["step"]
        steps.append(arrays["step"])
        save(work, arrays)

    monkeypatch.setattr(Work, "save", look)
    monkeypatch.setattr("densitykit.rollout._SAVE_SECONDS", 0.0)
    monkeypatch.setattr("densitykit.io.durable.SHARE", 0.0)  # no syncing but this
    quiet(Map(kick.function), window(), 9, path=path)
    assert steps == list(range(10))


def test_a_state_ahead_of_its_store_is_not_used(tmp_path, monkeypatch):
    """As after a power loss that has taken the last frames."""
    path, emulator = tmp_path / "run.zarr", Map(kick.function)
    interrupted(emulator, monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        quiet(emulator, still(), 9, path=path)
    monkeypatch.undo()
    state = tmp_path / ".run.zarr.state.npz"
    content = state.read_bytes()
    quiet(Map(kick.function), still(), 2, path=path, restart=True)
    state.write_bytes(content)
    whole = quiet(Map(kick.function), still(), 9)
    np.testing.assert_array_equal(
        quiet(Map(kick.function), still(), 9, path=path).density, whole.density
    )


KILLED = """
import sys, time, torch
from densitykit.data.windows import Window
from densitykit.models.baselines import Persistence
from densitykit import rollout as module
from densitykit.rollout import rollout
module._SAVE_SECONDS = 0.02
class Shift(Persistence):
    def step(self, state, generator=None):
        time.sleep(0.01)
        return state.roll(1, dims=1)
x = torch.arange(64.0).reshape(1, 1, 4, 4, 4) + 1
window = Window(x, torch.zeros(1, 1), 6.0 * torch.eye(3)[None])
rollout(Shift(2.0), window, 5000, path=sys.argv[1], progress=False)
"""


def test_killed_rollouts_go_on(tmp_path):
    """SIGKILL at any moment, twice: a valid store each time, in the end the right one."""
    path, first = tmp_path / "run.zarr", np.arange(64.0).reshape(4, 4, 4) + 1
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    made = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment)
        try:
            patience = time.monotonic() + 120
            while len(list(path.glob("density/c.*"))) < made + 12:
                assert process.poll() is None and time.monotonic() < patience
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert validate_trajectory(path) == []
        density = open_trajectory(path).density.values
        assert made + 11 <= len(density) < 5001
        np.testing.assert_array_equal(
            density, [np.roll(first, k, axis=0) for k in range(len(density))]
        )
        with np.load(tmp_path / ".run.zarr.state.npz") as saved:
            assert made < int(saved["step"]) < len(density)
        made = len(density)


# --- thermostat ------------------------------------------------------------------------------


def windows_with(mean_square: float, n: int = 4) -> Windows:
    """Training windows whose mean-square rate is known exactly."""
    rate = np.full((n, n, n), mean_square**0.5)
    rate[::2] *= -1
    frames = 10 + 2.0 * np.arange(6)[:, None, None, None] * rate
    return Windows(run_of(frames, 2.0), 2.0)


class Damped(FieldEmulator):
    """rho + h v and a rate that loses a factor a step, on any grid."""

    def __init__(self, factor: float) -> None:
        super().__init__(0.0, 1.0, 0.01, 2.0)
        self.factor = factor

    def step(self, state: FieldState, generator: torch.Generator | None = None) -> FieldState:
        rho, rate = state.fields.unbind(1)
        return state.replace(fields=torch.stack([rho + 2.0 * rate, self.factor * rate], dim=1))


class Noisy(Damped):
    """Kicks the rate."""

    def step(self, state: FieldState, generator: torch.Generator | None = None) -> FieldState:
        noise = 0.01 * torch.randn(state.fields.shape[1:], generator=generator)
        return super().step(state.replace(fields=state.fields + noise))


def energy(state: FieldState) -> Tensor:
    return state.fields[:, 1].square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("tau", [10.0, 40.0])
def test_thermostat_relaxes_to_the_fixed_point(tau):
    """E' = d^2 (1 - a) E + a T0 with a = h/tau: geometric approach to a T0/(1 - d^2 (1 - a))."""
    d, target, a = 0.97, 0.09, 2.0 / tau
    step = Thermostat(Damped(d), windows_with(target), tau)
    assert step.target == pytest.approx(target, rel=1e-4) and step.horizon == 2.0
    window = uniform()[0]
    # the density runs away at this rate; only its rate is looked at
    energies = [float(energy(state)) for state, _ in iterate(step, window, 60)]
    expected, now = [], float(energy(start(step, window)))
    for _ in range(60):
        now = d**2 * ((1 - a) * now) + a * target
        expected.append(now)
    np.testing.assert_allclose(energies, expected, rtol=1e-3)
    ratio = d**2 * (1 - a)
    fixed = a * target / (1 - ratio)
    first = expected[0] - fixed
    assert energies[-1] - fixed == pytest.approx(ratio**59 * first, abs=1e-3 * fixed)


def test_thermostat_leaves_the_density_and_the_direction_of_the_rate():
    state = start(Damped(0.5), Window.stack([uniform(i)[0] for i in range(3)]))
    plain = Damped(0.5).step(state).fields
    held = Thermostat(Damped(0.5), windows_with(0.5), 10.0).step(state).fields
    torch.testing.assert_close(held[:, 0], plain[:, 0], rtol=0, atol=0)
    for sample in held[:, 1] / plain[:, 1]:
        torch.testing.assert_close(sample, sample[0, 0, 0].expand_as(sample))
        assert sample[0, 0, 0] > 1.1


def test_thermostat_acts_on_each_member_alone():
    state = start(Damped(0.9), Window.stack([uniform(i)[0] for i in range(3)]))
    scales = torch.tensor([0.3, 1.0, 3.0])[:, None, None, None, None]
    state = state.replace(fields=state.fields * scales)
    target = float(energy(state)[1])
    step = Thermostat(Damped(0.9), windows_with(target), 20.0)
    together = step.step(state).fields
    for i in range(3):
        alone = step.step(state.replace(fields=state.fields[i : i + 1])).fields[0]
        torch.testing.assert_close(together[i], alone)
    scale = (together[:, 1] / Damped(0.9).step(state).fields[:, 1])[:, 0, 0, 0]
    assert scale[0] > 1 > scale[2]


def test_thermostat_does_nothing_at_the_target():
    window = uniform()[0]
    state = start(Damped(1.0), window)
    step = Thermostat(Damped(1.0), windows_with(float(energy(state))))
    held, plain = step.step(state).fields, Damped(1.0).step(state).fields
    torch.testing.assert_close(held, plain, rtol=1e-4, atol=0)


def test_thermostat_survives_a_state_at_rest():
    step = Thermostat(Damped(1.0), windows_with(0.1))
    assert step.step(start(step, as_window(np.stack([field()] * 3)))).fields.isfinite().all()


def test_thermostat_passes_the_generator_on():
    step, window = Thermostat(Noisy(0.9), windows_with(0.1)), uniform()[0]
    a, b, c = (quiet(step, window, 3, seed=s).density.values for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a[1:] != c[1:]).any()


def test_thermostat_is_an_emulator_and_says_what_it_is():
    step = Thermostat(Damped(0.9), windows_with(0.1), 30.0)
    assert isinstance(step, Emulator) and step.context == 3
    assert "Damped" in repr(step) and "30 fs" in repr(step)


@pytest.mark.parametrize("tau", [0.0, 1.0, -30.0, float("nan")])
def test_a_thermostat_is_not_faster_than_a_step(tau):
    with pytest.raises(ShapeError, match="give at least the horizon, 2"):
        Thermostat(Damped(0.9), windows_with(0.1), tau)
