"""The commands convert, describe, validate, export: what a user sees."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase.io.cube import write_cube as ase_write_cube
from density_files import atoms, chgcar, cube, density

from densitykit.cli import main
from densitykit.io.reader import open_trajectory

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Give `command(*words) -> (exit code, stdout, stderr)`."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["densitykit", *map(str, words)])
        return main(), *capsys.readouterr()

    return call


def test_from_files_to_files(command: Command, tmp_path: Path) -> None:
    """Convert with splits, describe, validate, export, convert again: the same density."""
    paths, out = [cube(tmp_path / f"{i}.cube", 0.1 * i) for i in range(6)], tmp_path / "run.zarr"
    words = ["--time-step", 2.5, "--splits", 0.5, 0.25, 0.25, "--unit", "bohr"]
    code, text, _ = command("convert", out, *paths, *words)
    assert code == 0
    for part in ("6 frames", "every 2.5 fs", "OH2, 3 atoms", "splits: train .[0:3]", "finite"):
        assert part in text
    assert command("describe", out) == (0, text, "")
    assert command("validate", out)[:2] == (0, f"{out}: valid\n")
    for name in ("frame.cube", "CHGCAR", "a.xsf"):
        path = tmp_path / name
        assert command("export", out, path, "--frame", 3)[:2] == (0, f"{path}\n")
        assert command("convert", tmp_path / f"{name}.zarr", path, "--time-step", 1)[0] == 0
        back = open_trajectory(tmp_path / f"{name}.zarr")
        np.testing.assert_allclose(back["density"][0], density(0.3), rtol=2e-6)
    code, _, error = command("export", out, tmp_path / "frame.dat")
    assert code == 2 and "frame.dat" in error and "cube" in error


def test_units_are_asked_for(command: Command, tmp_path: Path) -> None:
    with (tmp_path / "a.cube").open("w") as file:
        ase_write_cube(file, atoms(), density())
    words = ["convert", tmp_path / "run.zarr", tmp_path / "a.cube", "--time-step", 1]
    code, _, error = command(*words)
    assert code == 2 and "--unit angstrom" in error and error.count("\n") == 1
    code, text, _ = command(*words, "--unit", "angstrom", "--quantity", "total", "--clip")
    assert code == 0 and "electrons" in text and "total density" in text


def test_parts_are_added(command: Command, tmp_path: Path) -> None:
    parts = [chgcar(tmp_path / name) for name in ("AECCAR0", "AECCAR2")]
    code, text, _ = command("convert", tmp_path / "a.zarr", *parts, "--time-step", 1, "--sum")
    assert code == 0 and "total density" in text and "electrons 12.000" in text


def test_nothing_is_converted_in_vain(command: Command, tmp_path: Path) -> None:
    paths = [cube(tmp_path / f"{i}.cube") for i in range(3)]
    words = ["convert", tmp_path / "run.zarr", *paths, "--time-step", 1]
    code, _, error = command(*words, "--splits", 0.6, 0.2, 0.2, "--gap", 40)
    assert code == 2 and "gaps of 40 fs leave a split empty" in error
    assert not (tmp_path / "run.zarr").exists()
    code, _, error = command("convert", tmp_path / "run.zarr", "nothere-*", "--time-step", 1)
    assert code == 2 and "nothere-*: no such file" in error


def test_files_can_be_validated(command: Command, tmp_path: Path) -> None:
    path = cube(tmp_path / "a.cube")
    assert command("validate", path)[:2] == (0, f"{path}: valid\n")
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], "3 0 0 0 2", *lines[3:]]))
    code, text, _ = command("validate", path)
    assert code == 1 and "2 fields in one file" in text


def test_attributes_are_plain(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    words = ["--time-step", 1, "--splits", 0.4, 0.3, 0.3]
    command("convert", out, *(cube(tmp_path / f"{i}.cube", 0.1 * i) for i in range(10)), *words)
    attrs = json.loads((out / "zarr.json").read_text())["attributes"]
    assert all(isinstance(value, str | int | float) for value in attrs.values())
