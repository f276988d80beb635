"""An emulator of a synthetic liquid, all of whose parts are known.

Eight nuclei repel one another, and Verlet's method moves them. Each carries a Gaussian cloud,
which takes electrons from the others where it is crowded: a residual of 3 % for the superposition.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from densitykit.analysis.nuclei import match_nuclei
from densitykit.data.windows import StatePairs, load_pairs, physical_states
from densitykit.errors import RolloutError, ShapeError, TrajectoryError
from densitykit.fields import n_electrons
from densitykit.io.reader import open_trajectory
from densitykit.io.splits import write_splits
from densitykit.models import NuclearEmulator, load_model, save_model
from densitykit.models.nuclear.emulator import Liquid
from densitykit.rollout import iterate, remembering, rollout
from densitykit.training.nuclear import fit_parts
from densitykit.units import ACCELERATION, KELVIN

EDGE, MASS, STEP = 7.0, 6.94, 6.0  # angstrom, dalton, fs
CELL = EDGE * np.eye(3)
CUTOFF, HEIGHT = 3.4, 4.0  # of the pair potential, angstrom and eV
FORCE_FIELD = {"cutoff": CUTOFF, "pair": 4, "radial": 2, "degree": 1}


def pair_forces(x) -> np.ndarray:
    """-grad of the sum of HEIGHT cos(pi r / 2 CUTOFF)**4 over pairs, shape (N, 3)."""
    v = x[:, None] - x
    v -= EDGE * np.round(v / EDGE)
    r = np.linalg.norm(v, axis=-1) + np.eye(len(x))
    u = np.minimum(np.pi * r / (2 * CUTOFF), np.pi / 2)
    push = HEIGHT * 4 * np.cos(u) ** 3 * np.sin(u) * np.pi / (2 * CUTOFF) / r
    return (push[:, :, None] * v).sum(axis=1)


def verlet(frames, kelvin, seed) -> tuple[np.ndarray, ...]:
    """Positions, velocities and forces, each (frames, 8, 3), 6 fs apart."""
    rng = np.random.default_rng(seed)
    x = EDGE / 2 * np.stack(np.meshgrid(*[[0.0, 1.0]] * 3), axis=-1).reshape(8, 3)
    x += rng.normal(0, 0.2, x.shape)
    v = rng.normal(0, np.sqrt(KELVIN * kelvin / MASS), x.shape)
    v, f, path = v - v.mean(axis=0), pair_forces(x), []
    for _ in range(40 + frames):
        path.append((x, v, f))
        half = v + STEP / 2 * ACCELERATION / MASS * f
        x = x + STEP * half
        f = pair_forces(x)
        v = half + STEP / 2 * ACCELERATION / MASS * f
    return tuple(np.stack(y) for y in zip(*path[40:], strict=True))


def clouds(x, n, width) -> np.ndarray:
    """Periodic Gaussians at (*, N, 3) on n**3 points."""
    d = EDGE * np.arange(n) / n - x[..., None]
    d = (d - EDGE * np.round(d / EDGE))[..., None] + EDGE * np.array([-1, 0, 1])
    g = np.exp(-(d**2) / (2 * width**2)).sum(axis=-1)
    return np.einsum("...ax,...ay,...az->...xyz", *(g[..., c, :] for c in range(3)))


def density_of(x, n=16) -> np.ndarray:
    """One electron a nucleus."""
    crowd, space = clouds(x, n, 1.2), (-3, -2, -1)
    rho = clouds(x, n, 0.7) * (0.7 + 0.3 * crowd / crowd.mean(space, keepdims=True))
    return rho / rho.mean(space, keepdims=True) * x.shape[-2] / EDGE**3


@cache
def liquid_run(frames=40, n=16, kelvin=1200.0, seed=0) -> xr.Dataset:
    """A trajectory in memory."""
    x, v, f = verlet(frames, kelvin, seed)
    dims = ("time", "atom", "cartesian")
    atoms = {"positions": (dims, x), "velocities": (dims, v), "forces": (dims, f)}
    density = {"density": (("time", "x", "y", "z"), density_of(x, n))}
    cell = {"cell": (("vector", "cartesian"), CELL)}
    return xr.Dataset(density | atoms | cell, {"time": STEP * np.arange(frames)})


def pairs_of(run) -> StatePairs:
    states, times = physical_states(run)
    past = torch.from_numpy(run.density.values[1:-1].astype(np.float32))
    return StatePairs(states, times, 2 * STEP, CELL, past)


@cache
def fitted() -> tuple[NuclearEmulator, dict[str, Any]]:
    options = {"force_field": FORCE_FIELD, "widths": (8,), "blocks": (1,)}
    torch.manual_seed(0)
    return fit_parts(liquid_run(), every=1, **options)


@pytest.fixture
def model() -> NuclearEmulator:
    """Its residual net lets residuals be."""
    return copy.deepcopy(fitted()[0])


@pytest.fixture
def shaken(model) -> NuclearEmulator:
    """With random weights in the residual net, about as strong as trained ones."""
    net, state = model.residual_net, given(model)
    base = model.begin(state).base
    net.set_scales(base, 0.3 * base, 0.03 * base)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def given(model, index=slice(None, None, 9)) -> torch.Tensor:
    """States with a past: frames 2, 11, ... of the run."""
    return pairs_of(liquid_run()).given(model, index)


def kinetic(liquid: Liquid) -> torch.Tensor:
    return MASS * liquid.velocities.square().sum(dim=(1, 2)) / 2


def energy(model, liquid: Liquid) -> torch.Tensor:
    """Kinetic and potential, in dalton (angstrom/fs)**2, shape (B,)."""
    cell = torch.from_numpy(CELL)
    return kinetic(liquid) + ACCELERATION * model.force_field.energy(liquid.positions, cell)


def placed(model, frames, batch=1) -> Liquid:
    """Nuclei of frames of the run, as often as asked for."""
    atoms = liquid_run().isel(time=frames)
    x, v = (torch.from_numpy(atoms[name].values) for name in ("positions", "velocities"))
    return model.begin_at(x.repeat(batch, 1, 1), v.repeat(batch, 1, 1), (16, 16, 16))


def same(found, expected, tolerance) -> None:
    """Equal to so many parts of the largest value."""
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)


# --- read ------------------------------------------------------------------------------------


def test_a_start_reads_positions_and_velocities(model) -> None:
    liquid, run = model.begin(given(model)), liquid_run()
    for k, frame in enumerate(range(2, 40, 9)):
        truth = run.isel(time=frame)
        order, distances = match_nuclei(liquid.positions[k].numpy(), truth.positions.values, CELL)
        assert distances.max() < 0.005  # the grid is 0.44
        error = liquid.velocities[k].numpy()[order] - truth.velocities.values
        assert np.abs(error).max() < 0.025 * run.velocities.values.std()
        force = liquid.accelerations[k].numpy()[order] * MASS / ACCELERATION
        assert np.abs(force - truth.forces.values).max() < 0.005 * np.abs(run.forces.values).max()
    assert liquid.velocities.sum(dim=1).abs().max() < 1e-15


def test_a_start_shows_the_density_it_was_given(model) -> None:
    state = given(model)
    liquid = model.begin(state)
    same(model.density(liquid), state[:, 0], 1e-6)
    assert 0.02 < liquid.residual.norm() / state[:, 0].norm() < 0.06
    base = model.superposition(liquid.positions, model.cell((16, 16, 16)), (16, 16, 16))
    same(liquid.base, base.float(), 1e-7)


def test_nuclei_without_a_density(model) -> None:
    liquid = placed(model, [3, 8])
    assert liquid.positions.shape == (2, 8, 3) and not liquid.residual.any()
    density = model.density(liquid).numpy()
    np.testing.assert_allclose(n_electrons(density, CELL), 8, rtol=1e-6)
    truth = liquid_run().density[[3, 8]].values
    assert np.linalg.norm(density - truth) < 0.05 * np.linalg.norm(truth)
    one = placed(model, [8])
    same(liquid.accelerations[1:], one.accelerations, 1e-12)
    same(model.propagate(liquid).base[1:], model.propagate(one).base, 1e-6)


# --- move ------------------------------------------------------------------------------------


def test_nuclei_go_where_they_went_in_the_run(model) -> None:
    liquid, run = placed(model, [0]), liquid_run()
    for frame in range(2, 20, 2):
        liquid, truth = model.move(liquid), run.isel(time=frame)
        assert np.abs(liquid.positions[0].numpy() - truth.positions.values).max() < 1e-6
        assert np.abs(liquid.velocities[0].numpy() - truth.velocities.values).max() < 1e-8


def test_energy_is_conserved_without_a_thermostat(model) -> None:
    """It swings with Verlet's time step, and does not drift."""
    liquid, energies = placed(model, [0, 20]), []
    for _ in range(80):
        liquid = model.move(liquid)
        energies.append(energy(model, liquid))
    energies = torch.stack(energies) / kinetic(placed(model, [0, 20]))
    assert (energies.std(dim=0) < 0.005).all()
    assert ((energies[:30].mean(dim=0) - energies[-30:].mean(dim=0)).abs() < 0.002).all()


def test_time_runs_backwards_without_a_thermostat(model) -> None:
    start = placed(model, [0])
    there = start
    for _ in range(10):
        there = model.move(there)
    back = model.begin_at(there.positions, -there.velocities, (16, 16, 16))
    for _ in range(10):
        back = model.move(back)
    assert (there.positions - start.positions).abs().max() > 0.5
    same(back.positions, start.positions, 1e-9)
    same(back.velocities, -start.velocities, 1e-8)


def test_the_thermostat_holds_the_canonical_distribution(model) -> None:
    """Mean and variance of the kinetic energy are those of 21 degrees of freedom."""
    model.temperature, model.relaxation = 600.0, 40.0
    liquid = placed(model, slice(0, 40, 2), batch=2)
    assert kinetic(liquid).mean() * 2 / 21 / KELVIN > 700
    generator, kelvins = torch.Generator().manual_seed(0), []
    for k in range(120):
        liquid = model.move(liquid, generator)
        if k >= 30:
            kelvins.append(kinetic(liquid) * 2 / 21 / KELVIN)
    kelvins = torch.cat(kelvins)
    assert kelvins.mean().item() == pytest.approx(600, rel=0.05)
    assert (kelvins.std() / kelvins.mean()).item() == pytest.approx(math.sqrt(2 / 21), rel=0.15)
    assert liquid.velocities.mean(dim=1).abs().max() < 1e-12


def test_long_steps_leave_places_at_the_temperature(model, monkeypatch) -> None:
    """Springs with omega delta = 1.2 would be 1.56 times too hot under one at a step's ends."""
    model.substeps, model.relaxation = 1, 60.0
    stiffness = (1.2 / model.horizon) ** 2  # over the mass
    liquid = placed(model, [0], batch=60)
    centre = liquid.positions

    def springs(x: Tensor, _: Tensor) -> Tensor:
        return -stiffness * (x - centre)

    monkeypatch.setattr(model, "_accelerations", springs)
    liquid = replace(liquid, accelerations=springs(liquid.positions, None))
    generator, kelvins, seen = torch.Generator().manual_seed(0), [], []
    for k in range(200):
        before, liquid = liquid.positions, model.move(liquid, generator)
        if k >= 60:
            potential = stiffness * MASS * (liquid.positions - centre).square().sum(dim=(1, 2))
            between = MASS * ((liquid.positions - before) / model.horizon).square().sum(dim=(1, 2))
            kelvins.append(potential.mean() / 21 / KELVIN)
            seen.append(between.mean() / 21 / KELVIN)
    assert torch.stack(kelvins).mean().item() == pytest.approx(model.temperature, rel=0.05)
    assert torch.stack(seen).mean().item() == pytest.approx(model.temperature, rel=0.05)


def test_the_thermostat_takes_its_time(model) -> None:
    """Without forces a step of it is known in closed form, from twice the kinetic energy it holds.

    K' = c K + (1 - c) K_0 chi^2_21 / 21 + a normal part, with c = exp(-horizon / relaxation).
    """
    model.force_field.coefficients.zero_()
    model.substeps, model.relaxation = 1, 8.0
    liquid = placed(model, [0], batch=1000)
    start = kinetic(liquid)[0].item()
    model.temperature = start / KELVIN / 21  # half of the start's
    moved = kinetic(model.move(liquid, torch.Generator().manual_seed(0))) / (start / 2)
    c = math.exp(-12.0 / 8.0)
    assert moved.mean().item() == pytest.approx(1 + c, rel=0.03)
    variance = 2 / 21 * (1 - c) ** 2 + 4 / 21 * c * (1 - c) * 2
    assert moved.var().item() == pytest.approx(variance, rel=0.15)


def test_a_thermostat_that_never_relaxes_is_none(model) -> None:
    model.relaxation = math.inf
    liquid = placed(model, [5])
    found = model.move(liquid, torch.Generator().manual_seed(0))
    expected = model.move(liquid)
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.velocities, expected.velocities)


# --- draw ------------------------------------------------------------------------------------


@pytest.mark.parametrize("electrons", [1.0, 1.01])
def test_electrons_are_kept(shaken, electrons) -> None:
    """Those of the start, whatever the net says, in every step."""
    state = electrons * given(shaken)
    expected = n_electrons(state[:, 0].numpy(), CELL)
    found = shaken(state)
    assert found.shape == (5, 1, 16, 16, 16) and found.dtype == torch.float32
    np.testing.assert_allclose(n_electrons(found[:, 0].numpy(), CELL), expected, rtol=1e-6)
    for later in iterate(shaken, state[:2], 3):
        np.testing.assert_allclose(n_electrons(later[:, 0].numpy(), CELL), expected[:2], rtol=1e-6)
        assert later.min() > 0


def test_a_step_of_the_density_is_near_the_run(model) -> None:
    state = given(model, slice(0, 30, 9))
    truth = torch.from_numpy(liquid_run().density.values[4:34:9]).float()
    error = (model(state)[:, 0] - truth).norm() / truth.norm()
    assert error < 0.03 and (state[:, 0] - truth).norm() / truth.norm() > 4 * error


def test_the_net_sees_both_superpositions_and_the_residual(shaken) -> None:
    before = shaken.begin(given(shaken))
    after = shaken.propagate(before)
    base = shaken.superposition(after.positions, shaken.cell((16, 16, 16)), (16, 16, 16))
    same(after.base, base.float(), 1e-6)
    with torch.no_grad():
        residual = shaken.residual_net(after.base, before.base, before.residual)
    same(after.residual, residual - residual.mean(dim=(1, 2, 3), keepdim=True), 1e-6)


def test_a_residual_has_no_electrons(shaken) -> None:
    liquid = shaken.propagate(shaken.begin(given(shaken)))
    untouched = shaken.residual_net(liquid.base, liquid.base, liquid.residual)
    assert untouched.mean(dim=(1, 2, 3)).abs().max() > 1e-6
    assert liquid.residual.mean(dim=(1, 2, 3)).abs().max() < 1e-8


def test_steps_are_those_of_the_memory(shaken) -> None:
    """`forward` is the first; later ones do not go through the density again."""
    state = given(shaken)[:2]
    states = list(iterate(shaken, state, 3, seed=4))
    assert all(s.shape == (2, 1, 16, 16, 16) for s in states)
    memory, advance, show = remembering(shaken, state)
    assert memory.positions.shape == (2, 8, 3)
    same(show(memory), state[:, :1], 1e-6)
    shaken.relaxation = math.inf
    quiet = list(iterate(shaken, state, 3))
    for later in quiet:
        memory = advance(memory)
        torch.testing.assert_close(later, show(memory), rtol=0, atol=0)
    torch.testing.assert_close(shaken(state), quiet[0], rtol=0, atol=0)


# --- rollouts --------------------------------------------------------------------------------


def rolled(model, index=0, steps=3, **options) -> np.ndarray:
    options = {"cell": CELL, "progress": False} | options
    return rollout(model, given(model, index), steps, **options).density.values


def test_a_store_holds_the_same_as_memory(shaken, tmp_path) -> None:
    memory = rolled(shaken)
    assert memory.shape == (4, 16, 16, 16)
    np.testing.assert_array_equal(memory[0], given(shaken, 0)[0])
    np.testing.assert_array_equal(rolled(shaken, path=tmp_path / "run.zarr"), memory)
    stored = open_trajectory(tmp_path / "run.zarr")
    np.testing.assert_array_equal(stored.density, memory)
    assert stored.time.values.tolist() == [0, 12, 24, 36]
    assert stored.attrs["title"] == "rollout of NuclearEmulator"


def test_seeds_repeat_the_thermostat(model) -> None:
    a, b, c = (rolled(model, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[0], c[0])
    assert all(np.abs(x - y).max() > 1e-6 for x, y in zip(a[1:], c[1:], strict=True))


def test_an_ensemble_is_its_single_runs(shaken, tmp_path) -> None:
    shaken.relaxation = math.inf
    whole = rolled(shaken, [0, 17], path=tmp_path / "run.zarr")
    assert whole.shape == (2, 4, 16, 16, 16)
    for i, index in enumerate((0, 17)):
        np.testing.assert_allclose(whole[i], rolled(shaken, index), rtol=0, atol=1e-6)


def test_members_of_an_ensemble_have_noise_of_their_own(model) -> None:
    a, b = rolled(model, [4, 4])
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1:] - b[1:]).max() > 1e-6


def test_a_supercell_goes_the_same_way(shaken) -> None:
    shaken.relaxation = math.inf
    state = given(shaken, [0, 20])
    tiled = state.tile(1, 1, 2, 1, 1)
    assert shaken.begin(tiled).positions.shape == (2, 16, 3)
    small, large = iterate(shaken, state, 3), iterate(shaken, tiled, 3)
    for found, expected in zip(large, small, strict=True):
        same(found, expected.tile(1, 1, 2, 1, 1), 1e-6)


def test_a_shifted_start_goes_the_same_way(shaken) -> None:
    """By the stride of the net, here two points."""
    shaken.relaxation = math.inf
    state = given(shaken, [0])
    moved = state.roll((2, -4, 8), (2, 3, 4))
    for found, expected in zip(iterate(shaken, moved, 3), iterate(shaken, state, 3), strict=True):
        same(found, expected.roll((2, -4, 8), (2, 3, 4)), 1e-6)


def test_checkpoint_round_trip(shaken, tmp_path) -> None:
    path = save_model(shaken, tmp_path / "liquid", fitted()[1])
    loaded = load_model(path)
    assert isinstance(loaded, NuclearEmulator) and loaded.horizon == 12.0
    np.testing.assert_array_equal(rolled(loaded), rolled(shaken))


def test_an_unstable_map_says_where(model) -> None:
    with torch.no_grad():
        model.residual_net.net.linear.bias.fill_(math.nan)
    with pytest.raises(RolloutError, match="step 1 of 3: the state is not finite"):
        rolled(model)


# --- the frame before ------------------------------------------------------------------------


def test_a_map_with_a_past_is_given_one(model) -> None:
    pairs = pairs_of(liquid_run())
    density = liquid_run().density.values.astype(np.float32)
    for index, shape in ((7, ()), (slice(3, 9), (6,)), (torch.tensor([5, 0, 37]), (3,))):
        state = pairs.given(model, index)
        assert state.shape == (*shape, 3, 16, 16, 16)
        torch.testing.assert_close(state[..., :2, :, :, :], pairs.states[index], rtol=0, atol=0)
        frames = torch.arange(38)[index].numpy()
        np.testing.assert_array_equal(state[..., 0, :, :, :], density[frames + 2])
        np.testing.assert_array_equal(state[..., 2, :, :, :], density[frames + 1])


def test_other_maps_are_given_states() -> None:
    pairs = pairs_of(liquid_run())
    for index in (7, slice(3, 9), torch.tensor([5, 0, 37])):
        found = pairs.given(lambda x: x, index)
        torch.testing.assert_close(found, pairs.states[index], rtol=0, atol=0)


def test_pairs_without_a_past_say_where_it_is(model) -> None:
    pairs = pairs_of(liquid_run())
    pairs = StatePairs(pairs.states, pairs.times, pairs.horizon)
    assert pairs.given(lambda x: x, 0).shape == (2, 16, 16, 16)
    with pytest.raises(TrajectoryError, match="needs the frame before.*load_pairs"):
        pairs.given(model, 0)


@pytest.mark.parametrize(("scheme", "first"), [("backward-1", 1), ("backward-2", 2)])
def test_stored_pairs_come_with_a_past(model, mock_trajectory, scheme, first) -> None:
    path: Path = mock_trajectory("li.zarr", n_frames=9)
    write_splits(path, {"train": {"run": ".", "start": 1, "stop": 8}})
    pairs = load_pairs(path, "train", 2.0, scheme)
    state, density = pairs.given(model, slice(None)), open_trajectory(path).density.values[1:8]
    np.testing.assert_array_equal(state[:, 0], density[first:])
    np.testing.assert_array_equal(state[:, 2], density[first - 1 : -1])


# --- errors ----------------------------------------------------------------------------------


def test_a_state_without_a_past_says_what_makes_one(model) -> None:
    state = given(model)[:, :2]
    for call in (model, model.begin):
        with pytest.raises(ShapeError, match=r"\(5, 2, 16, 16, 16\).*StatePairs.given"):
            call(state)
    with pytest.raises(ShapeError, match=r"give \(B, 3, X, Y, Z\), as StatePairs.given"):
        iterate(model, state, 2)
    with pytest.raises(ShapeError, match=r"give \(B, 2, X, Y, Z\), as StatePairs.given"):
        iterate(lambda x: x, given(model), 2)


def test_a_density_without_nuclei(model) -> None:
    state = given(model)
    flat = state.mean(dim=(2, 3, 4), keepdim=True).expand_as(state)
    with pytest.raises(ShapeError, match=r"\[0, 0, 0\] nuclei found in three frames of 8 x 1"):
        model(flat)


def test_a_density_that_is_not_finite(model) -> None:
    state = given(model)
    state[1, 0, 3, 4, 5] = math.nan
    with pytest.raises(ShapeError, match="nuclei"):
        model(state)


def test_frames_too_far_apart(model) -> None:
    x = liquid_run().positions.values[10] + np.array([[[0.0]], [[-0.8]], [[-1.6]]])
    now, before, first = torch.from_numpy(density_of(x)).float()
    state = torch.stack([now, (3 * now - 4 * before + first) / (2 * STEP), before])
    with pytest.raises(ShapeError, match="more than 1.0 angstrom.*give frames 6 fs apart"):
        model(state[None])


def test_a_grid_that_does_not_divide_says_resample(model) -> None:
    places = torch.zeros(1, 8, 3)
    for call in (
        lambda: model(torch.ones(1, 3, 15, 16, 16)),
        lambda: iterate(model, torch.ones(1, 3, 16, 16, 15), 1),
        lambda: model.begin_at(places, places, (16, 15, 16)),
    ):
        with pytest.raises(ShapeError, match="stride 2.*densitykit.fields.resample"):
            call()
