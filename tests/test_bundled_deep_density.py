"""Bundled maps from atoms to density in space: their errors, electrons, and `predict`."""

from __future__ import annotations

import sys
from pathlib import Path

import ase.io
import numpy as np
import pandas as pd
import pytest
from ase import Atoms

from densitykit.cli import main
from densitykit.io.formats import read_frames
from densitykit.io.reader import open_splits
from densitykit.metrics import relative_l1
from densitykit.models import load_model
from densitykit.training.linear import atoms_of

DATA = Path(__file__).resolve().parents[1] / "data"
#: relative l1 error, per cent, that no snapshot looked at here may pass
LIMITS = {"ethane": 0.08, "isobutane": 0.2, "butane": 0.2, "water": 0.6, "aluminium": 0.5}


@pytest.mark.parametrize("system", LIMITS)
def test_error_electrons_and_estimate_on_a_test_snapshot(system: str) -> None:
    model = load_model(DATA / f"checkpoints/deep-density-{system}")
    run = open_splits(DATA / f"{system}.zarr", "test")[-1]
    atoms, truth = atoms_of(run, 0), run["density"][0].values.astype(float)
    rho = model.density(atoms, truth.shape)
    assert 100 * relative_l1(rho, truth) < LIMITS[system]
    n = float(run["valence_charge"].sum())
    exact = 1e-12 if atoms.periodic else 1e-3  # the box cuts the tails of a molecule
    assert rho.mean() * abs(np.linalg.det(atoms.cell)) == pytest.approx(n, rel=exact)
    rows = pd.read_csv(DATA / "deep-density-3d/results.csv").query("system == @system")
    rows = rows[rows.snapshots == rows.snapshots.max()]
    tables = rows.set_index(["variant", "split"]).l1
    linear = tables["linear"]
    assert linear[run.attrs["split"]] < 0.5 * tables["superposition"][run.attrs["split"]]
    assert 100 * linear.max() < LIMITS[system]


def test_predict_gives_the_density_of_a_structure_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_splits(DATA / "ethane.zarr", "test")[0]
    atoms, truth = atoms_of(run, 1), run["density"][1].values.astype(float)
    structure, out = tmp_path / "ethane.extxyz", tmp_path / "ethane.cube"
    ase.io.write(structure, Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=False))
    checkpoint = str(DATA / "checkpoints/deep-density-ethane")
    sizes = [str(n) for n in truth.shape]
    command = ["densitykit", "predict", checkpoint, str(structure), str(out), "--grid", *sizes]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    (frame,) = read_frames(out)
    assert 100 * relative_l1(np.asarray(frame.density), truth) < LIMITS["ethane"]
