"""The whole way from the shell, for data as others have them: no cell, grid or element is special.

Cube files of Gaussian clouds on oscillators are converted, described, learned, rolled out and
judged: an orthorhombic and a hexagonal cell with two species each, an odd grid, and densities with
small negative values.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.cube import write_cube
from ase.units import Bohr
from made_up import CUBE, HEXAGONAL, ROCK_SALT, gaussians

from densitykit.cli import main
from densitykit.io.reader import open_trajectory

FRAMES, SPLITS = 110, ("0.4", "0.1", "0.5")


class Kind(NamedTuple):
    cell: np.ndarray
    numbers: list[int]
    fractions: list
    grid: tuple[int, int, int]
    time_step: float  # fs
    horizon: float  # fs
    offset: float = 0.0  # of the density, angstrom**-3


PAIR = [[0.1, 0.1, 0.1], [0.6, 0.6, 0.6]]
TRIPLE = [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75], [1 / 3, 2 / 3, 0.7]]
KINDS = {
    "orthorhombic": Kind(np.diag([5.6, 5.8, 6.0]), ROCK_SALT, CUBE, (12, 12, 14), 2.5, 5),
    "hexagonal": Kind(HEXAGONAL, [3, 3, 9], TRIPLE, (12, 12, 16), 2.0, 4),
    "odd grid": Kind(5 * np.eye(3), [3, 3], PAIR, (9, 9, 9), 2.0, 4),
    "negative values": Kind(6 * np.eye(3), [3, 3], PAIR, (12, 12, 12), 2.0, 4, offset=-1e-5),
}


def write_run(kind: Kind, folder: Path) -> tuple[list[Path], Path]:
    """Write a cube file a frame, and energies and forces of all frames."""
    rng, shape = np.random.default_rng(0), (len(kind.numbers), 3)
    frequency = 2 * np.pi / rng.uniform(30, 40, shape)  # rad/fs
    phase = 2 * np.pi * rng.random(shape)
    times = kind.time_step * np.arange(FRAMES)[:, None, None]
    moved = 0.15 * np.sin(frequency * times + phase)
    positions = kind.fractions @ kind.cell + moved
    densities = gaussians(positions, kind.cell, kind.numbers, kind.grid) + kind.offset
    cubes, steps = [folder / f"{i:03d}.cube" for i in range(FRAMES)], []
    for path, density, x, u in zip(cubes, densities, positions, moved, strict=True):
        atoms = Atoms(kind.numbers, x, cell=kind.cell, pbc=True)
        with path.open("w") as file:
            write_cube(file, atoms, density * Bohr**3)
        atoms.calc = SinglePointCalculator(atoms, energy=np.square(u).sum(), forces=-2 * u)
        steps.append(atoms)
    ase.io.write(folder / "steps.extxyz", steps)
    return cubes, folder / "steps.extxyz"


@pytest.fixture
def run(monkeypatch, capsys):
    """Give `run(*words) -> stdout`, which fails where the command does."""

    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["densitykit", *map(str, words)])
        code = main()
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@pytest.mark.parametrize("name", KINDS)
def test_from_files_to_a_table(name: str, run, tmp_path: Path) -> None:
    kind, store, film = KINDS[name], tmp_path / "run.zarr", tmp_path / "film.zarr"
    cubes, steps = write_run(kind, tmp_path)
    words = ["--time-step", kind.time_step, "--splits", *SPLITS, "--trajectory", steps]
    run("convert", store, *cubes, *words, *(["--clip"] if kind.offset else []))
    said = run("describe", store)
    assert f"{FRAMES} frames" in said and " x ".join(map(str, kind.grid)) in said
    assert f"every {kind.time_step:g} fs" in said and "splits" in said
    threads = torch.get_num_threads()
    words = ["--steps", 2, "--batch", 1, "--horizon", kind.horizon, "--threads", 1]
    run("train", "surrogate", store, tmp_path / "unet", *words, "--run-dir", tmp_path / "u")
    few = ["--autoencoder-steps", 2, "--run-dir", tmp_path / "l"]
    run("train", "latent", store, tmp_path / "latent", *words, *few)
    emulators = [tmp_path / "unet", tmp_path / "latent"]
    if len(set(kind.numbers)) > 1:
        emulators.append(tmp_path / "nuclear")
        run("train", "nuclear", store, emulators[-1], *words, "--run-dir", tmp_path / "n")
    torch.set_num_threads(threads)
    words = ["--steps", 22, "--thermostat", 40]
    assert "23 frames" in run("rollout", tmp_path / "unet", store, film, *words)
    rolled = open_trajectory(film)
    assert rolled.density.shape[1:] == kind.grid
    np.testing.assert_allclose(np.diff(rolled.time), kind.horizon)
    electrons = float(open_trajectory(store).n_electrons.mean())
    np.testing.assert_allclose(rolled.n_electrons, electrons, rtol=1e-3)
    said = run("evaluate", store, *emulators, "--rollouts", film)
    names = [path.name for path in emulators]
    for word in (*names, "persistence", "one-step l2", "film", "value-sJSD"):
        assert word in said
