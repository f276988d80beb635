"""Rollouts against analytic trajectories; streaming, seeds, errors, a kill; the thermostat."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from densitykit.data.windows import StatePairs
from densitykit.errors import RolloutError, ShapeError, TrajectoryError
from densitykit.io.reader import open_trajectory
from densitykit.io.validate import validate_trajectory
from densitykit.io.writer import TrajectoryWriter
from densitykit.models.baselines import LinearExtrapolation, Persistence
from densitykit.rollout import Thermostat, iterate, rollout

CELL = 6.0 * np.eye(3)
QUIET = {"cell": CELL, "horizon": 2.0, "progress": False}


def state(seed: int = 0, n: int = 4, batch: int | None = None) -> Tensor:
    """A positive density and a rate of either sign, ([batch,] 2, n, n, n)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, n, n, n) if batch is None else (batch, 2, n, n, n)
    x = torch.rand(shape, generator=generator)
    return x - torch.tensor([-0.5, 0.5])[:, None, None, None]


def kick(x: Tensor, generator: torch.Generator) -> Tensor:
    """A stochastic map, the same noise for each member of a batch."""
    return x + 0.01 * torch.randn(x.shape[1:], generator=generator)


def explode(x: Tensor) -> Tensor:
    """Squares: 1e10 -> 1e20 -> inf in float32."""
    return x**2


# --- analytic trajectories -------------------------------------------------------------------


def test_persistence_stays():
    density = rollout(Persistence(2.0), state(), 5, cell=CELL, progress=False).density
    assert density.dims == ("time", "x", "y", "z") and density.dtype == np.float32
    np.testing.assert_array_equal(density, np.broadcast_to(state()[0], (6, 4, 4, 4)))


def test_advection_shifts_the_density_by_one_point_a_step():
    ds = rollout(lambda x: x.roll(1, dims=3), state(), 6, start=10.0, **QUIET)
    first = state()[0].numpy()
    expected = np.stack([np.roll(first, k, axis=1) for k in range(7)])
    np.testing.assert_array_equal(ds.density, expected)
    np.testing.assert_array_equal(ds.time, 10 + 2.0 * np.arange(7))
    np.testing.assert_array_equal(ds.cell, CELL)


def test_damped_rate_gives_the_geometric_series():
    """rho' = rho + h v, v' = d v: rho_k = rho_0 + h v_0 (1 - d^k)/(1 - d)."""
    d, h = 0.8, 2.0

    def step(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] + h * x[:, 1], d * x[:, 1]], dim=1)

    density = rollout(step, state(), 12, **QUIET).density.values
    rho, rate = state().double().numpy()
    series = (1 - d ** np.arange(13)) / (1 - d)
    np.testing.assert_allclose(
        density, rho + h * rate * series[:, None, None, None], rtol=0, atol=3e-6
    )


def test_iterate_yields_the_states_after_each_step():
    x = state(batch=2)
    states = list(iterate(lambda x: 2 * x, x, 3))
    assert len(states) == 3
    for k, found in enumerate(states):
        torch.testing.assert_close(found, x * 2 ** (k + 1), rtol=0, atol=0)


# --- stores, ensembles, seeds ----------------------------------------------------------------


def test_a_store_holds_the_same_as_memory(tmp_path):
    options = {**QUIET, "seed": 3, "start": 5.0, "attrs": {"checkpoint": "li"}}
    memory = rollout(kick, state(), 7, **options)
    stored = rollout(kick, state(), 7, path=tmp_path / "run.zarr", **options)
    np.testing.assert_array_equal(memory.density, stored.density)
    np.testing.assert_array_equal(memory.time, stored.time)
    again = open_trajectory(tmp_path / "run.zarr")
    np.testing.assert_array_equal(again.density, memory.density)
    for key, value in {"checkpoint": "li", "seed": 3, "horizon_fs": 2.0}.items():
        assert again.attrs[key] == memory.attrs[key] == value


def test_an_ensemble_is_groups_equal_to_single_runs(tmp_path):
    x = state(batch=3)
    stored = rollout(kick, x, 4, path=tmp_path / "run.zarr", **QUIET)
    memory = rollout(kick, x, 4, **QUIET)
    assert stored.density.dims == memory.density.dims == ("member", "time", "x", "y", "z")
    np.testing.assert_array_equal(stored.density, memory.density)
    for i in range(3):
        single = rollout(kick, x[i], 4, **QUIET).density
        member = open_trajectory(tmp_path / "run.zarr" / f"member-{i}").density
        np.testing.assert_array_equal(member, single)


def test_seeds_repeat_a_stochastic_map():
    a, b, c = (rollout(kick, state(), 4, seed=s, **QUIET).density.values for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[0], c[0])
    assert all((x != y).any() for x, y in zip(a[1:], c[1:], strict=True))
    steps = np.diff(a, axis=0)
    assert np.abs(steps[0] - steps[1]).max() > 1e-3  # new noise each step


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 4, 4, 4), (1, 1, 2, 4, 4, 4)])
def test_wrong_shape_says_which_to_give(shape):
    with pytest.raises(ShapeError, match=r"give \(B, 2, X, Y, Z\)"):
        rollout(Persistence(2.0), torch.ones(shape), 2, cell=CELL, progress=False)


class Coarse(Persistence):
    stride = 4


@pytest.mark.parametrize("thermostat", [False, True])
def test_a_grid_that_does_not_divide_says_resample(thermostat):
    x = state(n=6)
    step = Coarse(2.0)
    if thermostat:
        step = Thermostat(step, pairs_with(1.0))
    with pytest.raises(ShapeError, match="stride 4.*densitykit.fields.resample"):
        rollout(step, x, 2, cell=CELL, progress=False)


def test_a_bad_shape_leaves_no_store(tmp_path):
    path = tmp_path / "run.zarr"
    with pytest.raises(ShapeError):
        rollout(Coarse(2.0), state(n=6), 2, cell=CELL, path=path, progress=False)
    assert not path.exists()


def test_divergence_names_the_step_and_keeps_what_came_before(tmp_path):
    path = tmp_path / "run.zarr"
    x = torch.full((2, 4, 4, 4), 1e10)
    with pytest.raises(RolloutError, match="step 2 of 9"):
        rollout(explode, x, 9, path=path, **QUIET)
    density = open_trajectory(path).density
    assert density.shape == (2, 4, 4, 4)
    np.testing.assert_allclose(density[:, 0, 0, 0], [1e10, 1e20], rtol=1e-6)
    assert isinstance(RolloutError(""), ArithmeticError)


@pytest.mark.parametrize("batch", [None, 2])
def test_a_taken_path_is_refused(tmp_path, batch):
    path = tmp_path / "run.zarr"
    rollout(Persistence(2.0), state(batch=batch), 1, cell=CELL, path=path, progress=False)
    with pytest.raises(TrajectoryError, match="run.zarr.*already exists.*another path"):
        rollout(Persistence(2.0), state(batch=batch), 1, cell=CELL, path=path, progress=False)


def test_an_ensemble_does_not_move_into_a_single_run(tmp_path):
    path = tmp_path / "run.zarr"
    rollout(Persistence(2.0), state(), 1, cell=CELL, path=path, progress=False)
    with pytest.raises(TrajectoryError, match="already exists"):
        rollout(Persistence(2.0), state(batch=2), 1, cell=CELL, path=path, progress=False)
    assert not (path / "member-0").exists()


KILLED = """
import sys, time, numpy as np, torch
from densitykit.rollout import rollout
def step(x):
    time.sleep(0.01)
    return x.roll(1, dims=2)
x = torch.arange(128.0).reshape(2, 4, 4, 4) + 1
rollout(step, x, 5000, cell=6.0 * np.eye(3), path=sys.argv[1], horizon=2.0, progress=False)
"""


def test_sigkill_leaves_a_valid_store(tmp_path):
    path = tmp_path / "run.zarr"
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment)
    try:
        patience = time.monotonic() + 120
        while len(list(path.glob("density/c.*"))) < 6:
            assert process.poll() is None and time.monotonic() < patience
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert validate_trajectory(path) == []
    density = open_trajectory(path).density.values
    assert 5 <= len(density) < 5001
    first = np.arange(64.0).reshape(4, 4, 4) + 1
    np.testing.assert_array_equal(
        density, [np.roll(first, k, axis=0) for k in range(len(density))]
    )
    writer = TrajectoryWriter(path)  # and it can go on
    assert writer.append(first, 2.0 * len(density)) == len(density)


# --- thermostat ------------------------------------------------------------------------------


def pairs_with(mean_square: float, n: int = 4) -> StatePairs:
    """Training pairs whose mean-square rate is known exactly."""
    states = torch.full((4, 2, n, n, n), mean_square**0.5)
    states[:, 1, ::2] *= -1
    return StatePairs(states, 2.0 * np.arange(4), 2.0)


class Damped:
    """rho + h v and a rate that loses a factor a step."""

    horizon = 2.0

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] + 2.0 * x[:, 1], self.factor * x[:, 1]], dim=1)


@pytest.mark.parametrize("tau", [10.0, 40.0])
def test_thermostat_relaxes_to_the_fixed_point(tau):
    """E' = d^2 (1 - a) E + a T0 with a = h/tau: geometric approach to a T0/(1 - d^2 (1 - a))."""
    d, target, a = 0.97, 0.09, 2.0 / tau
    step = Thermostat(Damped(d), pairs_with(target), tau)
    assert step.target == pytest.approx(target) and step.horizon == 2.0
    energies = [float(x[:, 1].square().mean()) for x in iterate(step, state()[None], 60)]
    energy, expected = float(state()[1].square().mean()), []
    for _ in range(60):
        energy = d**2 * (1 - a) * energy + a * target
        expected.append(energy)
    np.testing.assert_allclose(energies, expected, rtol=1e-4)
    fixed = a * target / (1 - d**2 * (1 - a))
    ratio = d**2 * (1 - a)
    first = expected[0] - fixed
    assert energies[-1] - fixed == pytest.approx(ratio**59 * first, abs=1e-4 * fixed)


def test_thermostat_leaves_the_density_and_the_direction_of_the_rate():
    x = state(batch=3)
    plain = Damped(0.5)(x)
    held = Thermostat(Damped(0.5), pairs_with(0.5), 10.0)(x)
    torch.testing.assert_close(held[:, 0], plain[:, 0], rtol=0, atol=0)
    ratio = held[:, 1] / plain[:, 1]
    for sample in ratio:
        torch.testing.assert_close(sample, sample[0, 0, 0].expand_as(sample))
        assert sample[0, 0, 0] > 1.1


def test_thermostat_acts_on_each_sample_alone():
    x = state(batch=3) * torch.tensor([0.3, 1.0, 3.0])[:, None, None, None, None]
    step = Thermostat(Damped(0.9), pairs_with(0.1), 20.0)
    together = step(x)
    for i in range(3):
        torch.testing.assert_close(together[i], step(x[i : i + 1])[0])
    scale = (together[:, 1] / Damped(0.9)(x)[:, 1])[:, 0, 0, 0]
    assert scale[0] > 1 > scale[2]


def test_thermostat_does_nothing_at_the_target():
    x = state(batch=1)
    step = Thermostat(LinearExtrapolation(2.0), pairs_with(float(x[:, 1].square().mean())))
    torch.testing.assert_close(step(x), LinearExtrapolation(2.0)(x), rtol=1e-6, atol=0)


def test_thermostat_survives_a_state_at_rest():
    x = state()[None]
    x[:, 1] = 0
    assert torch.isfinite(Thermostat(Persistence(2.0), pairs_with(0.1))(x)).all()


def test_thermostat_passes_the_generator_on():
    x, step = state(), Thermostat(_Noisy(), pairs_with(0.1))
    a, b, c = (rollout(step, x, 3, seed=s, **QUIET).density.values for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a[1:] != c[1:]).any()


class _Noisy:
    horizon = 2.0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return kick(x, generator)
