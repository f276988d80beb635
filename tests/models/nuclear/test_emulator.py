"""An emulator of a synthetic liquid, all of whose parts are known.

Eight nuclei repel one another, and Verlet's method moves them. Each carries a Gaussian cloud,
which takes electrons from the others where it is crowded: a residual of 3 % for the superposition.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet
from ase.units import fs
from liquid import CELL, EDGE, FORCE_FIELD, MASS, density_of, liquid_run
from made_up import gaussians, made_up_run
from torch import Tensor

from densitykit.analysis.nuclei import match_nuclei
from densitykit.data.windows import Window, Windows
from densitykit.errors import RolloutError, ShapeError, TrajectoryError, WindowError
from densitykit.fields import n_electrons
from densitykit.generate.film import CalculatorForces
from densitykit.io.reader import open_split
from densitykit.models import NuclearEmulator, load_model, save_model
from densitykit.models.base import Domain, Emulator
from densitykit.models.checkpoint import read_arguments
from densitykit.models.deep_density.linear import Atoms
from densitykit.models.nuclear.emulator import NuclearState, thermal_velocities
from densitykit.rollout import iterate, rollout
from densitykit.training.nuclear import fit_parts
from densitykit.units import ACCELERATION, KELVIN, atomic_masses


@cache
def fitted() -> tuple[NuclearEmulator, dict[str, Any]]:
    options = {"force_field": FORCE_FIELD, "widths": (8,), "blocks": (1,)}
    torch.manual_seed(0)
    return fit_parts(liquid_run(), 12.0, every=1, temperature=800.0, **options)


@pytest.fixture
def model() -> NuclearEmulator:
    """Its residual net lets residuals be."""
    return copy.deepcopy(fitted()[0])


@pytest.fixture
def shaken(model) -> NuclearEmulator:
    """With random weights in the residual net, about as strong as trained ones."""
    net, base = model.residual_net, model.init(given()).base
    net.set_scales(base, 0.3 * base, 0.03 * base)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def given(index=slice(None, None, 9), atoms: bool = False) -> Window:
    """Frames 2, 11, ... of the run with those before, as read from the density or with atoms."""
    window = Windows(liquid_run(), 12.0)[index].past(3)
    return window if atoms else window.replace(positions=None, velocities=None)


def kinetic(liquid: NuclearState) -> torch.Tensor:
    return MASS * liquid.velocities.square().sum(dim=(1, 2)) / 2


def energy(model, liquid: NuclearState) -> torch.Tensor:
    """Kinetic and potential, in dalton (angstrom/fs)**2, shape (B,)."""
    cell = torch.from_numpy(CELL)
    return kinetic(liquid) + ACCELERATION * model.force_field.energy(liquid.positions, cell)


def placed(model, frames, batch=1) -> NuclearState:
    """Nuclei of frames of the run, as often as asked for."""
    atoms = liquid_run().isel(time=frames)
    x, v = (torch.from_numpy(atoms[name].values) for name in ("positions", "velocities"))
    x, v = (y.repeat(batch, 1, 1) for y in (x, v))
    return model.init_at(x, v, torch.from_numpy(CELL), (16, 16, 16))


def same(found, expected, tolerance) -> None:
    """Equal to so many parts of the largest value."""
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)


# --- read ------------------------------------------------------------------------------------


def test_it_follows_the_contract(model) -> None:
    assert isinstance(model, Emulator) and model.context == 3 and model.horizon == 12.0
    assert "of Li, step 12 fs" in repr(model)


def test_a_start_reads_positions_and_velocities(model) -> None:
    liquid, run = model.init(given()), liquid_run()
    for k, frame in enumerate(range(2, 38, 9)):
        truth = run.isel(time=frame)
        order, distances = match_nuclei(liquid.positions[k].numpy(), truth.positions.values, CELL)
        assert distances.max() < 0.005  # the grid is 0.44
        error = liquid.velocities[k].numpy()[order] - truth.velocities.values
        assert np.abs(error).max() < 0.025 * run.velocities.values.std()
        force = liquid.accelerations[k].numpy()[order] * MASS / ACCELERATION
        assert np.abs(force - truth.forces.values).max() < 0.005 * np.abs(run.forces.values).max()
    assert liquid.velocities.sum(dim=1).abs().max() < 1e-15


def test_a_start_takes_what_the_window_has(model) -> None:
    """Positions and velocities as they are; without velocities those of three frames, wrapped."""
    window, run = given(atoms=True), liquid_run()
    liquid = model.init(window)
    same(liquid.positions, window.positions[:, -1], 1e-12)
    same(liquid.velocities, window.velocities[:, -1], 1e-9)
    inside = window.positions.remainder(EDGE)
    assert (inside - window.positions).abs().max() > 1
    liquid = model.init(window.replace(positions=inside, velocities=None))
    same(liquid.positions, inside[:, -1], 1e-12)
    error = liquid.velocities - window.velocities[:, -1]
    assert error.abs().max() < 0.02 * run.velocities.values.std()
    x, v = model.nuclei(liquid)
    assert x is liquid.positions and v is liquid.velocities


def test_a_start_shows_the_density_it_was_given(model) -> None:
    window = given()
    liquid, density = model.init(window), window.at(0)
    same(model.density(liquid), density, 1e-6)
    assert 0.02 < liquid.residual.norm() / density.norm() < 0.06
    base = model.superposition(liquid.positions, torch.from_numpy(CELL), (16, 16, 16))
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
    same(model.step(liquid).base[1:], model.step(one).base, 1e-6)


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
    back = model.init_at(there.positions, -there.velocities, there.cell, (16, 16, 16))
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


def test_long_steps_leave_positions_at_the_temperature(model, monkeypatch) -> None:
    """Springs with omega delta = 1.2 would be 1.56 times too hot under one at a step's ends."""
    model.substeps, model.relaxation = 1, 60.0
    stiffness = (1.2 / model.horizon) ** 2  # over the mass
    liquid = placed(model, [0], batch=60)
    centre = liquid.positions

    def springs(x: Tensor, *_: Tensor) -> Tensor:
        return -stiffness * (x - centre)

    monkeypatch.setattr(model, "_accelerations", springs)
    liquid = liquid.replace(accelerations=springs(liquid.positions))
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


# --- density ---------------------------------------------------------------------------------


@pytest.mark.parametrize("electrons", [1.0, 1.01])
def test_electrons_are_kept(shaken, electrons) -> None:
    """Those of the start, whatever the net says, in every step."""
    window = given()
    window = window.replace(density=electrons * window.density)
    expected = n_electrons(window.at(0).numpy(), CELL)
    for _, later in iterate(shaken, window, 3):
        assert later.shape == (4, 16, 16, 16) and later.dtype == torch.float32
        np.testing.assert_allclose(n_electrons(later.numpy(), CELL), expected, rtol=1e-6)
        assert later.min() > 0


@pytest.mark.parametrize("atoms", [False, True])
def test_a_step_of_the_density_is_near_the_run(model, atoms) -> None:
    window = given(slice(0, 30, 9), atoms)
    truth = torch.from_numpy(liquid_run().density.values[4:34:9]).float()
    error = (model.density(model.step(model.init(window))) - truth).norm() / truth.norm()
    assert error < 0.03 and (window.at(0) - truth).norm() / truth.norm() > 4 * error


def test_the_net_sees_both_superpositions_and_the_residual(shaken) -> None:
    before = shaken.init(given())
    after = shaken.step(before)
    base = shaken.superposition(after.positions, torch.from_numpy(CELL), (16, 16, 16))
    same(after.base, base.float(), 1e-6)
    with torch.no_grad():
        residual = shaken.residual_net(after.base, before.base, before.residual)
    same(after.residual, residual - residual.mean(dim=(1, 2, 3), keepdim=True), 1e-6)


def test_a_residual_has_no_electrons(shaken) -> None:
    liquid = shaken.step(shaken.init(given()))
    with torch.no_grad():
        untouched = shaken.residual_net(liquid.base, liquid.base, liquid.residual)
    assert untouched.mean(dim=(1, 2, 3)).abs().max() > 1e-6
    assert liquid.residual.mean(dim=(1, 2, 3)).abs().max() < 1e-8


def test_a_density_of_its_own(shaken) -> None:
    """Converged for nuclei at rest; what was remembered before does not matter."""
    liquid = placed(shaken, [3, 8])
    other = liquid.replace(residual=0.01 * torch.rand_like(liquid.residual))
    found = shaken.converge_density(liquid)
    assert torch.equal(shaken.converge_density(other).residual, found.residual)
    assert found.residual.any() and torch.equal(found.positions, liquid.positions)


# --- rollouts --------------------------------------------------------------------------------


def rolled(model, index=0, steps=3, **options) -> np.ndarray:
    return rollout(
        model,
        given([index] if isinstance(index, int) else index),
        steps,
        **({"progress": False} | options),
    ).density.values


def test_a_store_holds_the_same_as_memory(shaken, tmp_path) -> None:
    memory = rollout(shaken, given([0]), 3, progress=False)
    stored = rollout(shaken, given([0]), 3, path=tmp_path / "run.zarr", progress=False)
    assert memory.density.shape == (4, 16, 16, 16)
    np.testing.assert_array_equal(stored.density, memory.density)
    for name in ("positions", "velocities"):
        np.testing.assert_allclose(stored[name], memory[name], rtol=1e-6)
        assert np.abs(np.diff(memory[name], axis=0)).max() > 1e-4
    assert (stored.time.values - stored.time.values[0]).tolist() == [0, 12, 24, 36]


def test_seeds_repeat_the_thermostat(model) -> None:
    a, b, c = (rolled(model, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[0], c[0])
    assert all(np.abs(x - y).max() > 1e-6 for x, y in zip(a[1:], c[1:], strict=True))


def test_an_ensemble_is_its_single_runs(shaken) -> None:
    shaken.relaxation = math.inf
    whole = rolled(shaken, [0, 17])
    assert whole.shape == (2, 4, 16, 16, 16)
    for i, index in enumerate((0, 17)):
        np.testing.assert_allclose(whole[i], rolled(shaken, index), rtol=0, atol=1e-6)


def test_members_of_an_ensemble_have_noise_of_their_own(model) -> None:
    a, b = rolled(model, [4, 4])
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1:] - b[1:]).max() > 1e-6


def later(model, window) -> list[Tensor]:
    return [density for _, density in iterate(model, window, 3)]


def test_a_supercell_goes_the_same_way(shaken) -> None:
    shaken.relaxation = math.inf
    window = given([0, 20]).replace(numbers=None)
    cell = window.cell * torch.tensor([2.0, 1.0, 1.0]).double()[:, None]
    tiled = window.replace(density=window.density.tile(1, 1, 2, 1, 1), cell=cell)
    assert shaken.init(tiled).positions.shape == (2, 16, 3)
    for found, expected in zip(later(shaken, tiled), later(shaken, window), strict=True):
        same(found, expected.tile(1, 2, 1, 1), 1e-6)


def test_a_shifted_start_goes_the_same_way(shaken) -> None:
    """By the stride of the net, here two points."""
    shaken.relaxation = math.inf
    window, steps = given([0]), (2, -4, 8)
    moved = window.replace(density=window.density.roll(steps, (2, 3, 4)))
    for found, expected in zip(later(shaken, moved), later(shaken, window), strict=True):
        same(found, expected.roll(steps, (1, 2, 3)), 1e-6)


def test_checkpoint_round_trip(shaken, tmp_path) -> None:
    path = save_model(shaken, tmp_path / "liquid", fitted()[1])
    loaded = load_model(path)
    assert isinstance(loaded, NuclearEmulator) and loaded.horizon == 12.0
    np.testing.assert_array_equal(rolled(loaded), rolled(shaken))


def test_an_unstable_map_says_where(model) -> None:
    with torch.no_grad():
        model.residual_net.net.linear.bias.fill_(math.nan)
    with pytest.raises(RolloutError, match="step 1 of 3: .* is not finite"):
        rolled(model)


# --- other elements and cells ----------------------------------------------------------------


@cache
def other(name: str) -> NuclearEmulator:
    torch.manual_seed(0)
    field = {"cutoff": 4.0, "radial": 2, "degree": 1, "pair": 4}
    options = {"force_field": field, "widths": (8,), "blocks": (1,), "temperature": 300.0}
    return fit_parts(made_up_run(name), 10.0, every=2, **options)[0]


@pytest.mark.parametrize("name", ["sodium", "nacl", "hexagonal"])
def test_any_element_in_any_cell(name) -> None:
    """Without forces the nuclei fly on; the density of Gaussians follows them exactly."""
    model, run = copy.deepcopy(other(name)), made_up_run(name)
    model.force_field.coefficients.zero_()
    window = Windows(run, 10.0)[[0, 20]]
    state = model.init(window.past(3))
    assert state.cell.shape == (2, 3, 3) and state.mean_density.dtype == torch.float64
    drift = (model.masses(state.numbers)[:, None] * state.velocities).sum(dim=1)
    assert drift.abs().max() < 1e-12
    moved = model.step(state)
    same(moved.positions, state.positions + 10.0 * state.velocities, 1e-12)
    density, shape = model.density(moved), model.density(moved).shape[1:]
    x, numbers = moved.positions.numpy(), run.numbers.values
    truth = torch.from_numpy(gaussians(x, run.cell.values, numbers, shape)).float()
    assert (density - truth).norm() < 0.02 * truth.norm()
    counts = n_electrons(density.numpy(), run.cell.values)
    before = n_electrons(window.at(0).numpy(), run.cell.values)
    np.testing.assert_allclose(counts, before, rtol=1e-6)


def test_sodium_moves_by_the_mass_of_sodium() -> None:
    model, run = other("sodium"), made_up_run("sodium")
    assert model.masses(torch.tensor([11])).item() == pytest.approx(22.98977)
    state = model.init(Windows(run, 10.0)[0].past(3))
    forces = model.force_field.forces(state.positions, state.cell, state.numbers)
    same(state.accelerations, forces * ACCELERATION / 22.98977, 1e-12)
    salt = other("nacl")
    masses = salt.masses(torch.tensor([17, 11]))
    np.testing.assert_allclose(masses, atomic_masses([17, 11]))


def test_thermal_velocities_of_two_masses() -> None:
    """Equal energies for all, 300 K exactly, no drift."""
    m = torch.tensor([22.98977, 35.45] * 200).double()
    v = thermal_velocities(torch.zeros(4, 400, 3).double(), m, 300.0, torch.Generator())
    energy = (m[:, None] * v.square()).sum(dim=(1, 2)) / (3 * 399) / KELVIN
    np.testing.assert_allclose(energy, 300.0)
    assert (m[:, None] * v).sum(dim=1).abs().max() < 1e-10
    light, heavy = ((m[k::2, None] * v[:, k::2].square()).mean() / KELVIN for k in (0, 1))
    assert light.item() == pytest.approx(300, rel=0.05) and heavy.item() == pytest.approx(
        300, rel=0.05
    )


def test_a_grid_that_is_no_multiple_of_the_stride(model) -> None:
    """States live on 16 points an edge, densities on 15, and electrons are kept."""
    run = liquid_run(n=15)
    domain = Domain.of(Windows(run, 12.0))
    model.domain = domain
    window = Windows(run, 12.0)[[0, 9]].past(3)
    state = model.init(window)
    assert state.base.shape == (2, 16, 16, 16)
    same(model.density(state), window.at(0), 1e-4)
    stepped = model.density(model.step(state))
    assert stepped.shape == (2, 15, 15, 15)
    truth = Windows(run, 12.0)[[0, 9]].at(2)
    assert (stepped - truth).norm() < 0.04 * truth.norm()
    counts = n_electrons(stepped.numpy(), CELL)
    np.testing.assert_allclose(counts, n_electrons(window.at(0).numpy(), CELL), rtol=1e-6)


# --- errors ----------------------------------------------------------------------------------


def test_windows_of_another_domain(model) -> None:
    """Both numbers are named."""
    window = given([0])
    wrong = {
        r"frames are 12 fs apart, .* 6 fs": window.replace(times=2 * window.times),
        r"0\.4594, 0\.4594, 0\.4594 ang.* with 0\.4375, 0\.4375": window.replace(
            cell=1.05 * window.cell
        ),
        r"\[11\], .* on \[3\]": window.replace(numbers=torch.full((8,), 11)),
        "3 frames up to the present are needed, the window has 1": window.past(1),
    }
    for words, bad in wrong.items():
        with pytest.raises(WindowError, match=words):
            model.init(bad)
    # with velocities of its own the time between frames does not matter
    model.init(given([0], atoms=True).replace(times=2 * window.times))


def test_a_density_without_nuclei(model) -> None:
    window = given([0])
    flat = window.density.mean(dim=(2, 3, 4), keepdim=True).expand_as(window.density)
    with pytest.raises(WindowError, match=r"\[0, 0, 0\] nuclei found in three frames of 8"):
        model.init(window.replace(density=flat))


def test_several_species_are_not_read_from_a_density() -> None:
    window = Windows(made_up_run("nacl"), 10.0)[0].past(3)
    with pytest.raises(WindowError, match="no positions, and .* write positions"):
        other("nacl").init(window.replace(positions=None, velocities=None))
    with pytest.raises(WindowError, match="no atomic numbers"):
        other("nacl").init(window.replace(numbers=None))


def test_frames_too_far_apart(model) -> None:
    x = liquid_run().positions.values[10] + np.array([[[-1.6]], [[-0.8]], [[0.0]]])
    density = torch.from_numpy(density_of(x)).float()[None]
    with pytest.raises(WindowError, match=r"more than 1\.0 angstrom.*give frames 6 fs apart"):
        model.init(given([0]).replace(density=density))


def test_shapes_that_do_not_fit(model) -> None:
    x = torch.zeros(1, 8, 3)
    with pytest.raises(ShapeError, match=r"\(1, 8, 3\), velocities \(1, 7, 3\)"):
        model.init_at(x, x[:, :7], torch.eye(3), (16, 16, 16))
    net = model.residual_net
    with pytest.raises(ShapeError, match="stride 2"):
        net(*[torch.ones(1, 16, 15, 16)] * 3)


def test_parts_need_atomic_numbers() -> None:
    run = liquid_run().drop_vars("numbers")
    run.encoding["source"] = "li.zarr"
    with pytest.raises(TrajectoryError, match=r"li\.zarr: variable 'numbers' is missing"):
        fit_parts(run, 12.0)


# any force, any map

ALUMINIUM = Path(__file__).parents[3] / "data" / "aluminium.zarr"
MAP = ALUMINIUM.parent / "checkpoints" / "deep-density-aluminium"


def of_aluminium(**parts: Any) -> tuple[NuclearEmulator, Window]:
    """Give an emulator of a calculator and a static map, and a hot snapshot."""
    run = open_split(ALUMINIUM, "test-32-900K").isel(time=[0, 1]).load()
    v = 0.006 * np.random.default_rng(0).normal(size=run["positions"].shape)  # angstrom/fs
    run["velocities"] = run["positions"].dims, v - v.mean(axis=1, keepdims=True)
    run["density"] = run["density"].clip(min=1e-6)
    parts = {
        "force_field": CalculatorForces(EMT()),
        "density": load_model(MAP),
        "widths": (),
        **parts,
    }
    return NuclearEmulator(8.0, substeps=4, **parts), Windows(run, context=1, steps=0)[[0]]


def test_a_calculator_moves_and_a_static_map_draws() -> None:
    model, window = of_aluminium()
    state = model.init(window)
    torch.testing.assert_close(model.density(state), window.at(0))  # of the start, as it is
    atoms = ase.Atoms("Al32", state.positions[0].numpy(), cell=window.cell[0].numpy(), pbc=True)
    atoms.set_velocities(state.velocities[0].numpy() / fs)
    atoms.calc, energy = EMT(), []
    for _ in range(2):
        state = model.step(state, torch.Generator())  # without a temperature none is drawn
        VelocityVerlet(atoms, 2.0 * fs).run(4)
        np.testing.assert_allclose(state.positions[0], atoms.positions, atol=1e-8)
        energy.append(atoms.get_total_energy())
    here = Atoms(atoms.positions, atoms.numbers, window.cell[0].numpy())
    expected = load_model(MAP).density(here, window.grid)
    np.testing.assert_allclose(model.density(state)[0], expected, rtol=1e-3, atol=1e-3)
    assert model.density(state).mean() == pytest.approx(float(window.at(0).mean()), rel=1e-6)
    assert abs(np.diff(energy)) < 1e-2


def test_a_static_map_goes_into_the_checkpoint(tmp_path: Path) -> None:
    card = {"force_field": FORCE_FIELD, "density": read_arguments(MAP), "widths": []}
    card |= {"horizon": 8.0, "temperature": 900.0}
    given = load_model(MAP)
    model = NuclearEmulator(**card | {"density": given})
    model.force_field.coefficients.normal_(generator=torch.Generator().manual_seed(0)).mul_(1e-3)
    again = load_model(save_model(model, tmp_path / "al", card))
    window = of_aluminium()[1]
    first, second = (m.density(m.step(m.init(window))) for m in (model, again))
    assert torch.equal(first, second) and again.species == (13,)


def test_parts_that_are_none() -> None:
    with pytest.raises(ShapeError, match="neither a domain with knots nor a density"):
        NuclearEmulator(8.0, force_field=CalculatorForces(EMT()))
    with pytest.raises(ShapeError, match="a str has no method forces"):
        of_aluminium(force_field="emt")
    model, window = of_aluminium()
    blind = dataclasses.replace(window, positions=None, velocities=None)
    with pytest.raises(WindowError, match="no positions or no velocities, and without a domain"):
        model.init(blind)
