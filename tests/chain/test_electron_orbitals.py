"""Orbitals in a learned potential: gradient, motion, contract, learning, refusals."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from densitykit.chain.dynamics import random_chain
from densitykit.chain.electron_data import DISPLACEMENT, SPACING, electron_dataset
from densitykit.chain.electron_orbitals import (
    ChainOrbitals,
    GroundStateObjective,
    ground_density,
    occupations,
    resample,
)
from densitykit.chain.electron_windows import ElectronWindows, load_electrons
from densitykit.errors import WindowError
from densitykit.models import load_model, save_model
from densitykit.models.base import Emulator
from densitykit.rollout import iterate, rollout
from densitykit.training import fit
from densitykit.units import ATOMIC_TIME, BOHR

BUNDLED = Path(__file__).resolve().parents[2] / "data" / "electrons" / "orbitals-insulator"


@pytest.fixture(scope="module", params=["metal", "insulator"])
def windows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A kick, a pulse and a push, of chains of their own."""
    path = tmp_path_factory.mktemp("electrons") / f"{request.param}.zarr"
    electron_dataset(path, request.param, sizes={"train": (3, 30, 4)}, progress=False)
    return load_electrons(path, "train", 1)


@pytest.fixture
def model(windows: ElectronWindows) -> ChainOrbitals:
    torch.manual_seed(0)
    return ChainOrbitals(**ChainOrbitals.arguments_for(windows), width=8)


def self_consistent(windows: ElectronWindows) -> Tensor:
    """The potentials of the ground states, on two points a bohr."""
    metal = float(windows.numbers[0]) > 3
    places = {"displacement": DISPLACEMENT, "spacing": SPACING}
    name, cutoff = ("metal", 4.0) if metal else ("insulator", 16.0)
    chains = [random_chain(name, 4, seed=i, cutoff=cutoff, n_grid=80, **places) for i in range(3)]
    return torch.from_numpy(np.stack([chain.solve().potential for chain in chains]))


def film(model: ChainOrbitals, windows: ElectronWindows) -> tuple[Tensor, Tensor]:
    """Change of the density and mean current of all runs, (run, frame, ...), from the first."""
    begin = windows.first()
    density, current = [begin.at(0)[..., 0, 0]], [windows.current[:, 0]]
    for state, rho in iterate(model, begin, windows.frames - 1):
        density.append(rho[..., 0, 0])
        current.append(model.current(state))
    return torch.stack(density, 1) - windows.density[:, :1], torch.stack(current, 1).mean(-1)


def test_occupations_count_the_electrons() -> None:
    energies = torch.linspace(-1, 1, 12).double().repeat(2, 1)
    energies[1] = energies[1] ** 3
    f = occupations(energies, 5, 0.05)
    torch.testing.assert_close(f.sum(1), torch.full((2,), 5.0).double())
    cold = occupations(energies, 5, 1e-5)
    torch.testing.assert_close(cold[0], (torch.arange(12) < 5).double())


def test_gradient_is_the_static_response() -> None:
    """Beside finite differences, with levels that are degenerate and with a gap."""
    k = 2 * torch.pi * torch.fft.fftfreq(16, 1.0, dtype=torch.float64)
    waves = torch.fft.fft(torch.eye(16, dtype=torch.float64))
    kinetic = torch.fft.ifft(0.5 * k[:, None] ** 2 * waves, dim=0).real
    V = torch.cos(torch.arange(16) * torch.pi / 4).double()[None].requires_grad_()
    weight = torch.sin(torch.arange(16) ** 2).double()
    along = torch.cos(torch.arange(16) * 1.3).double()

    def value(potential: Tensor) -> Tensor:
        return ground_density(potential, kinetic, 2, 1e-2)[0] @ weight

    (gradient,) = torch.autograd.grad(value(V), V)
    with torch.no_grad():
        change = (value(V + 1e-4 * along) - value(V - 1e-4 * along)) / 2e-4
    torch.testing.assert_close(gradient[0] @ along, change, rtol=1e-3, atol=1e-6)


def test_in_the_right_potential_electrons_move_as_the_equation_says(
    windows: ElectronWindows, model: ChainOrbitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kick, pulse and push; steps of 2/3 on half a bohr beside 0.4 on less."""
    exact = self_consistent(windows)
    monkeypatch.setattr(model, "potential", lambda ground: exact)
    change, current = film(model, windows)
    true = windows.density - windows.density[:, :1]
    error = (change - true).norm(dim=(1, 2)) / true.norm(dim=(1, 2))
    assert error.max() < 0.03, error
    pushed, mean = windows.current.mean(-1), current[:2]
    assert ((mean - pushed[:2]).norm(dim=1) / pushed[:2].norm(dim=1)).max() < 0.01
    model.substeps = 1
    coarse = (film(model, windows)[0] - true).norm(dim=(1, 2)) / true.norm(dim=(1, 2))
    assert (coarse > 3 * error).all()  # of higher than first order


def test_contract(windows: ElectronWindows, model: ChainOrbitals) -> None:
    """A rollout like any other; electrons stay, and nothing grows in ten times the record."""
    assert isinstance(model, Emulator)
    made = rollout(model, windows.first()[1:2], 300, progress=False)
    assert made.density.shape == (301, 40, 1, 1)
    number = made.density.values.astype(float).sum((1, 2, 3))
    np.testing.assert_allclose(number, number[0], rtol=1e-6)
    change = np.abs(made.density.values - made.density.values[0]).max((1, 2, 3))
    assert change[200:].max() < 3 * change[:100].max()
    assert change.max() > 1e-4


def test_nothing_moves_without_a_drive(windows: ElectronWindows, model: ChainOrbitals) -> None:
    begin = windows.first()
    still = begin.replace(
        field=torch.zeros_like(begin.field), current=torch.zeros_like(begin.current)
    )
    *_, (state, rho) = iterate(model, still, 20)
    torch.testing.assert_close(rho, begin.at(0), rtol=0, atol=1e-6)
    assert model.current(state).abs().max() < 1e-5


def test_the_current_is_that_of_the_window_at_first(
    windows: ElectronWindows, model: ChainOrbitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, begin = self_consistent(windows), windows.first()
    monkeypatch.setattr(model, "potential", lambda ground: exact)
    found = model.current(model.init(begin))
    size = begin.current[:, 0].abs().amax()
    assert (found - begin.current[:, 0]).abs().max() < 0.01 * size


def test_longer_chains_are_the_same_map(windows: ElectronWindows, model: ChainOrbitals) -> None:
    """Two cells in a row do what one does, and a shift is a shift."""
    torch.nn.init.normal_(model.layers[-1].weight, std=0.02)
    ground = windows.density[:, 0].double() * BOHR
    V = model.potential(ground)
    torch.testing.assert_close(model.potential(ground.repeat(1, 2)), V.repeat(1, 2))
    torch.testing.assert_close(model.potential(ground.roll(3, 1)), V.roll(6, 1))
    assert V.std() > 1e-3


def test_a_training_finds_the_density(windows: ElectronWindows, model: ChainOrbitals) -> None:
    rows = fit(GroundStateObjective(model), windows, steps=40, batch=3, learning_rate=3e-3)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_resampling_keeps_what_both_grids_hold() -> None:
    x = torch.arange(12).double() / 12 * 2 * torch.pi
    fine = torch.arange(24).double() / 24 * 2 * torch.pi
    torch.testing.assert_close(resample(torch.cos(5 * x), 24), torch.cos(5 * fine))
    torch.testing.assert_close(resample(torch.cos(5 * fine), 12), torch.cos(5 * x))


def test_a_checkpoint_holds_it(
    windows: ElectronWindows, model: ChainOrbitals, tmp_path: Path
) -> None:
    torch.nn.init.normal_(model.layers[-1].weight, std=0.02)
    arguments = ChainOrbitals.arguments_for(windows) | {"width": 8}
    loaded = load_model(save_model(model, tmp_path / "orbitals", arguments), ChainOrbitals)
    ground = windows.density[:, 0].double() * BOHR
    torch.testing.assert_close(loaded.potential(ground), model.potential(ground))


def test_chains_of_another_kind_are_told(windows: ElectronWindows) -> None:
    """What has learned insulators knows them, and says so of a metal."""
    metal = float(windows.numbers[0]) > 3
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_model(BUNDLED, ChainOrbitals).init(windows.first())
    assert metal == any("misses the density" in str(one.message) for one in told)


def test_what_does_not_fit_is_refused(windows: ElectronWindows, model: ChainOrbitals) -> None:
    with pytest.raises(WindowError, match="frame 7 of a run is not the ground state"):
        model.init(windows[7])
    with pytest.raises(WindowError, match="load it with load_electrons"):
        model.init(windows[0].replace(ground=None))
    with pytest.raises(WindowError, match="points are 2 bohr apart, not 1"):
        model.init(windows[0].replace(cell=2 * windows[0].cell))
    assert model.horizon == pytest.approx(2 * ATOMIC_TIME, rel=1e-5)
