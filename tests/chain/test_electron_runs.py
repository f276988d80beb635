"""Runs of electrons on disk: what is stored, interruptions, data sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densitykit.chain import electron_runs
from densitykit.chain.dynamics import random_chain
from densitykit.chain.electron_data import driven_chain, electron_dataset
from densitykit.chain.electron_runs import simulate_electrons
from densitykit.chain.electrons import ElectronDynamics, Kick, Pulse
from densitykit.cli import main
from densitykit.errors import GenerationError, UnfinishedError
from densitykit.io.reader import open_trajectory
from densitykit.io.validate import validate_trajectory
from densitykit.units import ATOMIC_TIME, BOHR, HARTREE

QUICK: dict[str, Any] = {"n_atoms": 2, "cutoff": 4.0, "time_step": 0.5, "progress": False}


def test_what_is_stored_is_what_moved(tmp_path: Path) -> None:
    pulse = Pulse(0.1, 0.3, 10.0)
    path = simulate_electrons(tmp_path / "a.zarr", "metal", pulse, n_frames=8, **QUICK)
    model = random_chain("metal", 2, seed=0, displacement=1.0, spacing=10.0, cutoff=4.0)
    electrons = ElectronDynamics.of(model, field=pulse, time_step=0.5)
    electrons.advance(14)
    assert not validate_trajectory(path)
    with open_trajectory(path) as ds:
        last = ds.isel(time=-1)
        np.testing.assert_allclose(ds.time[1], ATOMIC_TIME)  # 24 as
        np.testing.assert_allclose(last.energy / HARTREE, electrons.energy, rtol=1e-12)
        np.testing.assert_allclose(
            last.vector_potential, pulse(7.0) * BOHR / ATOMIC_TIME, rtol=1e-12
        )
        np.testing.assert_allclose(ds.n_electrons, 4, rtol=1e-6)
        spectrum = np.fft.rfft(last.density * BOHR)[:8] / 40
        np.testing.assert_allclose(
            spectrum, np.fft.rfft(electrons.density)[:8] / electrons.n_points, atol=1e-7
        )
        np.testing.assert_allclose(
            last.current.mean() * ATOMIC_TIME, electrons.current.mean(), rtol=1e-5
        )
        np.testing.assert_allclose(last.positions[:, 0] / BOHR, model.positions)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives what it would have given, and other work at its path is refused."""
    options = {"system": "metal", "wave": (1, 0.1), "n_frames": 9, **QUICK}
    monkeypatch.setattr(electron_runs, "_SAVE_FRAMES", 2)
    whole = open_trajectory(simulate_electrons(tmp_path / "whole.zarr", **options))
    path, advance = tmp_path / "killed.zarr", ElectronDynamics.advance

    def killed(self: ElectronDynamics, steps: int = 1) -> None:
        if self.steps == 10:
            raise KeyboardInterrupt
        advance(self, steps)

    monkeypatch.setattr(ElectronDynamics, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        simulate_electrons(path, **options)
    monkeypatch.setattr(ElectronDynamics, "advance", advance)
    with pytest.raises(UnfinishedError, match="wave"):
        simulate_electrons(path, **{**options, "wave": (2, 0.1)})
    again = open_trajectory(simulate_electrons(path, **options))
    for name in ("density", "current", "energy", "time"):
        np.testing.assert_array_equal(again[name], whole[name])
    assert not list(tmp_path.glob(".*state*"))


def test_a_data_set_is_runs_in_a_row(tmp_path: Path) -> None:
    sizes = {"train": (3, 3, 4), "longer": (1, 3, 8)}
    path = electron_dataset(tmp_path / "metal.zarr", "metal", sizes=sizes, progress=False)
    for split, (count, frames, atoms) in sizes.items():
        assert not validate_trajectory(path / split)
        with open_trajectory(path / split) as ds:
            assert ds.sizes["time"] == count * frames and ds.sizes["x"] == 10 * atoms
            assert ds.step.values.tolist() == [0, 5, 10] * count
            np.testing.assert_allclose(ds.n_electrons, 2 * atoms, rtol=1e-5)
    with open_trajectory(path / "train") as ds:
        electrons, positions, _ = driven_chain("metal", 4, seed=1, kind=1)
        electrons.advance(10)
        np.testing.assert_allclose(ds.positions[5, :, 0] / BOHR, positions)
        np.testing.assert_allclose(ds.energy[5] / HARTREE, electrons.energy)
    electron_dataset(path, "metal", sizes=sizes, progress=False)  # finished: nothing to do
    with pytest.raises(UnfinishedError, match="frames_of_a_run"):
        electron_dataset(path, "metal", sizes={"train": (3, 4, 4)}, progress=False)
    with pytest.raises(GenerationError, match="system is 'glass'"):
        electron_dataset(path, "glass")


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["densitykit", "generate", "electrons", str(tmp_path / "a.zarr"), "--model", "metal"]
    words += ["--size", "2", "--frames", "3", "--kick", "0.01"]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    assert "3 frames" in capsys.readouterr().out
    with open_trajectory(tmp_path / "a.zarr") as ds:
        kick = ds.current.mean("x")[0] / ds.density.mean("x")[0] * ATOMIC_TIME / BOHR
        np.testing.assert_allclose(kick, Kick(0.01)(0.0), rtol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="n_frames is 0"):
        simulate_electrons(tmp_path / "a.zarr", n_frames=0)
    assert not (tmp_path / "a.zarr").exists()
