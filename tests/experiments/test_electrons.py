"""Emulators of electrons judged: the truth is without fault, tables are tidy and go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from densitykit.chain.electron_data import driven_chain, electron_dataset
from densitykit.chain.electron_emulators import ElectronEmulator, ElectronState
from densitykit.chain.electron_orbitals import ChainOrbitals
from densitykit.chain.electron_windows import ElectronWindows, load_electrons
from densitykit.io.reader import open_trajectory
from densitykit.models import load_model
from densitykit.units import BOHR
from experiments import electrons

BUNDLED = Path(__file__).resolve().parents[2] / "data" / "electrons"


class Playback(ElectronEmulator):
    """Knows the runs by heart."""

    def __init__(self, windows: ElectronWindows) -> None:
        super().__init__(windows.horizon)
        self.windows = windows

    def increment(
        self,
        x: torch.Tensor,
        state: ElectronState,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        at = torch.full((3,), min(int(state.frame[0]) + 1, self.windows.frames - 1))
        after = self.init(self.windows.at(torch.arange(3), at))
        return after.history[:, -1] - state.history[:, -1]


def test_the_truth_is_without_fault() -> None:
    windows = load_electrons(BUNDLED / "metal.zarr", "test", 1, 0)
    rows = electrons.judge(Playback(windows), windows, 0)
    worst = rows.groupby("metric").value.agg(lambda x: x.abs().max())
    # what is not zero: the energy limit, and the f-sum rule of a short record
    assert worst[["density", "density-long", "current", "current-long"]].max() < 0.05
    assert worst[["line", "plasmon", "f-sum"]].max() < 5e-3
    assert worst["electrons"] < 1e-5


@pytest.mark.parametrize(("system", "kind"), [("insulator", 0), ("metal", 2)])
def test_bundled_runs_are_what_their_card_says(system: str, kind: int) -> None:
    model, positions, _ = driven_chain(system, 4, 2000 + kind, kind)
    with open_trajectory(BUNDLED / f"{system}.zarr" / "test") as ds:
        frame = ds.isel(time=200 * kind + 2)
        np.testing.assert_allclose(frame.positions[:, 0] / BOHR, positions)
        model.advance(10)
        found = model.on_grid(model.density, 40)
        np.testing.assert_allclose(frame.density * BOHR, found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_tables_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {s: (3, 10, 4) for s in ("train", "validation", "test", "longer")}
    electron_dataset(tmp_path / "metal.zarr", "metal", sizes=sizes, progress=False)
    monkeypatch.setattr(electrons, "SHORT", 5)
    monkeypatch.setattr(electrons, "LONG", 20)
    options = {"systems": ("metal",), "seeds": (0,), "steps": 2, "run_dir": tmp_path / "runs"}
    options["checkpoints"] = tmp_path
    rows = electrons.run_electrons(tmp_path, tmp_path / "a.csv", **options)
    assert set(rows.model) >= {
        "linear",
        *electrons.MODELS,
        electrons.UNTRAINED,
        "linear, 1 frame, density",
    }
    assert {"density", "growth", "speed-up", "one-step", "training"} <= set(rows.metric)
    assert (rows[rows.metric == "training"].value > 0).all()
    assert load_model(tmp_path / "orbitals-metal", ChainOrbitals).mean == pytest.approx(0.2)
    assert not rows.duplicated(electrons.KEYS).any()
    again = electrons.run_electrons(tmp_path, tmp_path / "a.csv", **options)
    pd.testing.assert_frame_equal(again, rows)
