"""The command line of data generation."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("ase", reason="needs densitykit[dft]")

from test_espresso import needs_worker

from densitykit.cli import main
from densitykit.io.reader import open_trajectory
from densitykit.io.writer import create_trajectory


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["densitykit", *map(str, arguments)])
    return main()


@needs_worker
def test_lithium_runs_and_goes_on(tmp_path, monkeypatch, capsys) -> None:
    command = ["generate", "lithium", tmp_path / "li.zarr", "--size", 4, "--cutoff", 8]
    for last in (2, 4):
        assert run(monkeypatch, *command, "--steps", last) == 0
        frames = open_trajectory(tmp_path / "li.zarr")
        np.testing.assert_allclose(frames.time, 3.0 * np.arange(0, last + 1, 2))
    assert frames.attrs["thermostat"] == "stochastic velocity rescaling (Bussi), 300 fs, 800 K"
    assert frames.attrs["cutoff_rydberg"] == 8
    assert float(frames.n_electrons[-1]) == pytest.approx(4, abs=2e-3)
    printed = capsys.readouterr().out
    assert "3 frames" in printed and "meV per atom and ps" in printed


@needs_worker
def test_sodium_chloride_runs(tmp_path, monkeypatch, capsys) -> None:
    """At a cutoff of no use but speed."""
    command = ["generate", "sodium-chloride", tmp_path / "salt.zarr", "--cutoff", 4, "--steps", 1]
    assert run(monkeypatch, *command) == 0
    frames = open_trajectory(tmp_path / "salt.zarr")
    np.testing.assert_allclose(frames.time, [0, 5])
    assert frames.density.shape[1:] == (28, 36, 24)
    np.testing.assert_array_equal(frames.valence_charge, [1] * 12 + [7] * 12)
    assert frames.attrs["pseudopotential"] == "Cl GTH-PBE-q7, Na GTH-PBE-q1"
    assert float(frames.n_electrons[-1]) == pytest.approx(96, abs=0.5)
    assert "2 frames" in capsys.readouterr().out


def test_chain_is_simulated(tmp_path, monkeypatch, capsys) -> None:
    command = ["generate", "chain", tmp_path / "m.zarr", "--model", "metal", "--size", 4]
    assert run(monkeypatch, *command, "--steps", 6, "--interval", 3) == 0
    frames = open_trajectory(tmp_path / "m.zarr")
    np.testing.assert_array_equal(frames.step, [0, 3, 6])
    np.testing.assert_allclose(frames.n_electrons, 8, atol=1e-5)
    assert "3 frames, valence density on 80" in capsys.readouterr().out


def test_chain_data_set_is_made_in_its_folder(tmp_path, monkeypatch) -> None:
    seen = []

    def dataset(folder, systems, restart) -> list[Path]:
        seen.append((folder, list(systems)))
        path = tmp_path / "mixed.zarr"
        create_trajectory(path, n_frames=1, grid=(4,), cell=4.0).append(np.ones(4), 0)
        return [path]

    monkeypatch.setattr("densitykit.chain.data_sets.chain_dataset", dataset)
    command = ["generate", "chain", tmp_path, "--model", "mixed", "--dataset"]
    assert run(monkeypatch, *command) == 0
    assert seen == [(tmp_path, ["mixed"])]


def test_static_sets_get_what_was_asked_for(tmp_path, monkeypatch, capsys) -> None:
    seen = {}

    def generate(name, path, n, **options) -> Path:
        seen.update(name=name, n=n, **options)
        create_trajectory(path, n_frames=1, grid=(2, 2, 2), cell=4.0).append(np.ones((2,) * 3), 0)
        return path

    monkeypatch.setattr("densitykit.generate.systems.generate", generate)
    options = ["--snapshots", 3, "--size", 108, "--temperature", 600, "--workers", 2]
    assert run(monkeypatch, "generate", "aluminium", tmp_path / "al.zarr", *options) == 0
    expected = {"name": "aluminium", "n": 3, "size": 108, "temperature": 600.0, "seed": 0}
    assert seen == expected | {"workers": 2, "scheduler": None, "restart": False}
    assert "1 frame" in capsys.readouterr().out


def test_a_size_that_there_is_not(tmp_path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "generate", "water", tmp_path / "w.zarr", "--size", 33) == 2
    assert "water has no size 33; choose one of [32, 64" in capsys.readouterr().err
    assert not (tmp_path / "w.zarr").exists()


def test_convergence_prints_means_and_writes_rows(tmp_path, monkeypatch, capsys) -> None:
    columns = ["density_l2", "force_rms_error", "force_rms", "energy_error", "seconds"]
    rows = [{"setting": "cutoff", "label": "8 Ry", "configuration": i} for i in (0, 1)]
    table = pd.DataFrame(rows).assign(**dict.fromkeys(columns, 0.0))
    table["density_l2"] = [0.01, 0.03]
    monkeypatch.setattr("densitykit.generate.systems.convergence", lambda *_, **__: table)
    out = tmp_path / "table.csv"
    assert run(monkeypatch, "convergence", "lithium", "--out", out) == 0
    assert "8 Ry" in (printed := capsys.readouterr().out) and "0.02" in printed
    assert pd.read_csv(out)["density_l2"].tolist() == [0.01, 0.03]
