"""Emulators of electrons: windows, the contract, exact electrons, symmetry, learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from densitykit.chain import electron_emulators as emulators
from densitykit.chain.electron_data import electron_dataset
from densitykit.chain.electron_diffusion import ChainDiffusion, LatentObjective
from densitykit.chain.electron_emulators import (
    ChainUNet,
    FourierOperator,
    LinearMap,
    OneStepObjective,
    fit_linear_map,
)
from densitykit.chain.electron_windows import ElectronWindows, load_electrons
from densitykit.errors import TrajectoryError, WindowError
from densitykit.io.reader import open_trajectory
from densitykit.models.base import Emulator
from densitykit.rollout import rollout
from densitykit.training import fit

KINDS = [LinearMap, FourierOperator, ChainUNet, ChainDiffusion]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
sure_kind = pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.__name__)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("electrons") / "metal.zarr"
    return electron_dataset(path, "metal", sizes={"train": (3, 14, 4)}, progress=False)


@pytest.fixture
def windows(data: Path) -> ElectronWindows:
    return load_electrons(data, "train", 2, 2)


def made(kind: type, windows: ElectronWindows) -> emulators.ElectronEmulator:
    """An emulator with weights that do something."""
    torch.manual_seed(0)
    model = kind(windows.horizon, context=2)
    for p in (*model.parameters(), *model.buffers()):
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model


def test_windows_are_frames_of_one_run(data: Path, windows: ElectronWindows) -> None:
    ds = open_trajectory(data / "train")
    assert len(windows) == 3 * 11
    window = windows[11 + 4]
    assert window.frame.tolist() == [5]  # of the second run
    np.testing.assert_array_equal(window.at(2).squeeze(), ds.density[14 + 7])
    np.testing.assert_array_equal(window.current[0, 1], ds.current[14 + 5])
    np.testing.assert_array_equal(window.ground[0], ds.density[14])
    assert abs(window.time_step - 0.0483777) < 1e-6
    with pytest.raises(TrajectoryError, match="runs of 14 frames are shorter"):
        load_electrons(data, "train", 14, 1)
    with pytest.raises(TrajectoryError, match="variable 'current' is missing"):
        ElectronWindows(ds.drop_vars("current"))


@each_kind
def test_contract(kind: type, windows: ElectronWindows) -> None:
    """A rollout like any other, with exactly the electrons of the chain."""
    model = made(kind, windows)
    assert isinstance(model, Emulator)
    film = rollout(model, windows[3], 5, progress=False)
    assert film.density.shape == (6, 40, 1, 1)
    start = windows[3].at(0).squeeze()
    number = film.density.values.sum((1, 2, 3))
    assert np.ptp(film.density.values, axis=0).max() > 1e-4 * float(start.max())
    np.testing.assert_allclose(number, number[0], rtol=1e-6)


@sure_kind
def test_shifts_commute(kind: type, windows: ElectronWindows) -> None:
    """By four points, the patch of the U-Net."""
    model, window = made(kind, windows), windows[7]
    moved = window.replace(
        density=window.density.roll(8, 2),
        current=window.current.roll(8, 2),
        ground=window.ground.roll(8, 1),
    )
    plain, shifted = (model.density(model.step(model.init(w))) for w in (window, moved))
    assert (plain - window.at(0)).abs().max() > 1e-5
    torch.testing.assert_close(shifted, plain.roll(8, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: kind.__name__)
def test_longer_chains_are_the_same_map(kind: type, windows: ElectronWindows) -> None:
    """A cell twice in a row does twice what one does."""
    model, window = made(kind, windows), windows[20]
    double = window.replace(
        density=window.density.repeat(1, 1, 2, 1, 1),
        current=window.current.repeat(1, 1, 2),
        ground=window.ground.repeat(1, 2),
    )
    one, two = (model.density(model.step(model.init(w))) for w in (window, double))
    torch.testing.assert_close(two, one.repeat(1, 2, 1, 1), rtol=1e-5, atol=1e-6)


def test_a_linear_map_is_found_again(data: Path) -> None:
    """Least squares on what a linear map has made."""
    windows = load_electrons(data, "train", 1, 1)
    truth = LinearMap(windows.horizon, context=1, reach=2)
    with torch.no_grad():
        truth.weight.copy_(0.02 * torch.randn(truth.weight.shape, generator=torch.manual_seed(1)))
        truth.weight[[2, 7], [0, 1]] -= 0.2  # of a point itself: nothing grows
    state = replace(truth.init(windows.first()), energy=torch.tensor(torch.inf))
    density, current = [truth.density(state)[..., 0, 0]], [truth.current(state)]
    for _ in range(windows.frames - 1):
        state = truth.step(state)
        density.append(truth.density(state)[..., 0, 0])
        current.append(truth.current(state))
    windows.density, windows.current = torch.stack(density, 1), torch.stack(current, 1)
    assert (windows.density - windows.density[:, :1]).abs().max() > 1e-4
    found = LinearMap(windows.horizon, context=1, reach=2)
    assert fit_linear_map(found, windows, 1e-10) < 0.01


def test_nothing_grows_without_bound(windows: ElectronWindows) -> None:
    """Modes of a wild linear map end on the unit circle, energies of a wild net at the limit."""
    wild = LinearMap(windows.horizon, context=1)
    torch.nn.init.normal_(wild.weight, generator=torch.manual_seed(0))
    size = torch.linalg.eigvals(wild._stable(40)).abs()
    assert size.max() < 1 + 1e-5 and (size > 1 - 1e-5).sum() > 20
    model = FourierOperator(windows.horizon)
    torch.nn.init.normal_(model.leave.weight, std=0.5, generator=torch.manual_seed(0))
    state = model.init(windows.first())
    for _ in range(60):
        state = model.step(state)
    has = emulators._energy(state.history[:, -1], state.ground)
    assert (has < 1.001 * state.energy + 1e-9).all() and state.energy.max() > 1e-4


def test_the_limit_is_no_limit_for_the_truth(data: Path) -> None:
    """What the electrons have of flow and charge is never more than what the field gave."""
    windows = load_electrons(data, "train", 1, 1)
    model = LinearMap(windows.horizon, context=1)
    for run in range(3):
        state, most = None, 0.0
        for frame in range(windows.frames - 1):
            at = model.init(windows.at(torch.tensor([run]), torch.tensor([frame])))
            has = float(at.energy)
            if state is None:
                most = has
            else:
                flow = (state.history[0, -1, 1] + at.history[0, -1, 1]).sum() / 2
                most += float(state.drive()[0, 1] * flow)
            assert has < 1.02 * most + 1e-6
            state = at


def test_a_training_lowers_the_loss_and_starts_at_its_base(windows: ElectronWindows) -> None:
    base = LinearMap(windows.horizon, context=2)
    assert fit_linear_map(base, windows, 1e-4) < 0.5
    model = FourierOperator(windows.horizon, context=2, base=base, width=8, layers=2)
    window = windows[5]
    first, there = (m.density(m.step(m.init(window))) for m in (model, base))
    torch.testing.assert_close(first, there)
    rows = fit(OneStepObjective(model, 2), windows, steps=25, batch=8, learning_rate=3e-3)
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_diffusion_learns_and_draws(windows: ElectronWindows) -> None:
    """Both losses fall; one sampler step is the mean, more steps draw."""
    base = LinearMap(windows.horizon, context=2)
    fit_linear_map(base, windows, 1e-4)
    torch.manual_seed(0)
    model = ChainDiffusion(windows.horizon, context=2, base=base, width=32, blocks=1)
    rows = fit(LatentObjective(model), windows, steps=150, batch=16, learning_rate=4e-3)
    for name in ("rebuilt", "denoising"):
        values = [row[name] for row in rows]
        assert np.mean(values[-30:]) < 0.7 * np.mean(values[:15]), name

    def spread(steps: int) -> float:
        model.sampler_steps = steps
        states = model.init(windows[torch.full((16,), 5)])
        after = model.density(model.step(states, torch.Generator().manual_seed(1)))
        return float(after.std(0).mean())

    assert 0 < 2 * spread(1) < spread(8)
    again = [model.step(model.init(windows[5]), torch.Generator().manual_seed(2)) for _ in "ab"]
    torch.testing.assert_close(*(model.density(state) for state in again), rtol=0, atol=0)


def test_what_does_not_fit_is_refused(windows: ElectronWindows) -> None:
    model, window = made(LinearMap, windows), windows[0]
    with pytest.raises(WindowError, match="load it with load_electrons"):
        model.init(window.replace(ground=None))
    with pytest.raises(WindowError, match="frames are .* apart, not"):
        LinearMap(1.0, context=2).init(window)
