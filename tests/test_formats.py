"""Files of other programs: units, orders and origins, long conversions, damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.vasp import VaspChargeDensity
from ase.io.cube import write_cube as ase_write_cube
from ase.units import Bohr

from densitykit import formats
from densitykit.errors import TrajectoryError
from densitykit.formats import convert, read_frames, split_in_time, write_cube
from densitykit.grid import n_electrons
from densitykit.trajectory import open_split, open_trajectory

Make = Callable[..., Path]
CELL = np.array([[5.0, 0.0, 0.0], [1.0, 6.0, 0.0], [0.0, -0.5, 7.0]])
SHAPE = (4, 6, 8)


def density(time: float = 0.0) -> np.ndarray:
    """Six electrons, unlike along each axis, in angstrom**-3."""
    x, y, z = np.meshgrid(*(np.arange(n) / n for n in SHAPE), indexing="ij")
    wave = 1 + 0.5 * np.sin(2 * np.pi * (x + time)) + 0.3 * np.cos(2 * np.pi * (y + 2 * z))
    return 6 / np.linalg.det(CELL) * wave


def atoms() -> Atoms:
    return Atoms("OH2", [[1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, 2.0, 1.5]], cell=CELL, pbc=True)


def cube(path: Path, time: float = 0.0, origin: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Path:
    """As a program with atomic units writes it."""
    with path.open("w") as file:
        moved = atoms()
        moved.positions += origin
        ase_write_cube(file, moved, density(time) * Bohr**3, origin=origin)
    return path


def chgcar(path: Path, times: tuple[float, ...] = (0.0,)) -> Path:
    """As VASP writes it: density times volume, x fastest."""
    file = VaspChargeDensity(None)
    file.atoms, file.chg = [atoms() for _ in times], [density(t) for t in times]
    file.write(str(path), format="chgcar" if len(times) == 1 else "chg")
    return path


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [cube, chgcar])
def test_density_has_our_units_and_order(write: Callable, tmp_path: Path) -> None:
    name = {cube: "water.cube", chgcar: "CHGCAR"}[write]
    (frame,) = read_frames(write(tmp_path / name))
    np.testing.assert_allclose(frame.density, density(), rtol=2e-6)
    np.testing.assert_allclose(frame.cell, CELL, atol=1e-5)
    np.testing.assert_allclose(frame.positions, atoms().positions, atol=1e-5)
    assert frame.numbers.tolist() == [8, 1, 1]
    assert n_electrons(frame.density, frame.cell) == pytest.approx(6, rel=1e-5)


def test_a_cube_begins_at_its_origin(tmp_path: Path) -> None:
    (frame,) = read_frames(cube(tmp_path / "a.cube", origin=(-2.5, -3.0, 0.5)))
    np.testing.assert_allclose(frame.positions, atoms().positions, atol=1e-5)


def test_numbers_of_a_text_by_hand(tmp_path: Path) -> None:
    """A cell of 2 x 1 x 1 bohr with two points; the header is the format's own."""
    lines = ["comment", "comment", "1 0.0 0.0 0.0", "2 1.0 0.0 0.0", "1 0.0 1.0 0.0"]
    lines += ["1 0.0 0.0 1.0", "3 3.0 1.0 0.5 0.5", "0.25 0.75"]
    path = tmp_path / "by-hand.cube"
    path.write_text("\n".join(lines) + "\n")
    (frame,) = read_frames(path)
    np.testing.assert_allclose(frame.density.ravel(), np.array([0.25, 0.75]) / 0.529177**3, 1e-5)
    np.testing.assert_allclose(np.diag(frame.cell), [1.058354, 0.529177, 0.529177], 1e-5)
    assert n_electrons(frame.density, frame.cell) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["water.cube", "CHGCAR"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.9])
def test_files_cut_short_are_named(name: str, keep: float, tmp_path: Path) -> None:
    path = (cube if "cube" in name else chgcar)(tmp_path / name)
    text = path.read_text()
    path.write_text(text[: int(keep * len(text))])
    with pytest.raises(TrajectoryError, match=f"{name}: .*write"):
        read_frames(path)


@pytest.mark.parametrize("name", ["water.xyz", "missing.cube"])
def test_what_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match=name):
        read_frames(tmp_path / name)


# --- converting ------------------------------------------------------------------------------


def test_files_become_a_trajectory(tmp_path: Path) -> None:
    paths = [cube(tmp_path / f"{i}.cube", 0.1 * i) for i in range(3)]
    out = convert(paths, tmp_path / "run.zarr", time_step=0.5, start=2.0, progress=False)
    run = open_trajectory(out)
    assert run["time"].values.tolist() == [2.0, 2.5, 3.0]
    for i in range(3):
        np.testing.assert_allclose(run["density"][i], density(0.1 * i), rtol=2e-6)
    np.testing.assert_allclose(run["n_electrons"], 6, rtol=1e-5)
    np.testing.assert_allclose(run["positions"][0], atoms().positions, atol=1e-5)


def test_a_file_with_many_frames_makes_the_store_grow(tmp_path: Path) -> None:
    times = tuple(0.1 * i for i in range(5))
    out = convert([chgcar(tmp_path / "CHG", times)], tmp_path / "run.zarr", time_step=1.0)
    run = open_trajectory(out)
    assert run.sizes["time"] == 5
    np.testing.assert_allclose(run["density"][4], density(0.4), rtol=1e-4)  # CHG has five digits


@pytest.mark.parametrize("kind", ["cube", "CHGCAR"])
def test_a_killed_conversion_continues(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cube if kind == "cube" else chgcar
    times = [0.0, 0.1, 0.2, 0.3]
    paths = [
        write(tmp_path / f"{kind}-{i}{'.cube' * (kind == 'cube')}", t if kind == "cube" else (t,))
        for i, t in enumerate(times)
    ]
    read, whole = [], formats.read_frames

    def dying(path: Path) -> list[formats.Frame]:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(path)
        return whole(path)

    monkeypatch.setattr(formats, "read_frames", dying)
    out = tmp_path / "run.zarr"
    with pytest.raises(KeyboardInterrupt):
        convert(paths, out, time_step=1.0, progress=False)
    assert open_trajectory(out).sizes["time"] == 2
    again = []
    monkeypatch.setattr(formats, "read_frames", lambda path: again.append(path) or whole(path))
    convert(paths, out, time_step=1.0, progress=False)
    assert again == (paths[2:] if kind == "cube" else paths)  # of VASP's, frames are counted
    run = open_trajectory(out)
    assert run["time"].values.tolist() == [0.0, 1.0, 2.0, 3.0]
    for i, t in enumerate(times):
        np.testing.assert_allclose(run["density"][i], density(t), rtol=2e-6)


@pytest.mark.parametrize("change", ["grid", "cell", "atoms"])
def test_another_system_is_refused_and_loses_nothing(change: str, tmp_path: Path) -> None:
    first, other = cube(tmp_path / "0.cube"), tmp_path / "1.cube"
    strange, rho = atoms(), density()
    if change == "grid":
        rho = rho[:, :, ::2]
    elif change == "cell":
        strange.set_cell(1.1 * CELL)
    else:
        strange.numbers[1] = 3
    with other.open("w") as file:
        ase_write_cube(file, strange, rho)
    with pytest.raises(TrajectoryError, match=f"1.cube: {change} differ"):
        convert([first, other], tmp_path / "run.zarr", time_step=1.0)
    assert open_trajectory(tmp_path / "run.zarr").sizes["time"] == 1


@pytest.mark.parametrize("paths, step", [([], 1.0), (["a.cube"], 0.0)])
def test_nothing_to_convert_is_refused(paths: list[str], step: float, tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="files"):
        convert(paths, tmp_path / "run.zarr", time_step=step)


# --- splits ----------------------------------------------------------------------------------


def test_splits_follow_in_time_with_gaps(mock_trajectory: Make) -> None:
    path = mock_trajectory(n_frames=20)  # 2 fs apart
    split_in_time(path, (0.5, 0.2, 0.3), gap=3.0)
    steps = {name: open_split(path, name).time.values / 2 for name in ("train", "validation")}
    assert steps["train"].tolist() == [*range(10)]
    assert steps["validation"].tolist() == [12, 13]
    assert (open_split(path, "test").time.values / 2).tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.2, 0.2), (1.0, -0.2, 0.2), (0.9, 0, 0)])
def test_impossible_splits_are_refused(fractions: tuple, mock_trajectory: Make) -> None:
    with pytest.raises(TrajectoryError, match="fractions"):
        split_in_time(mock_trajectory(n_frames=20), fractions)


def test_gaps_must_leave_something(mock_trajectory: Make) -> None:
    with pytest.raises(TrajectoryError, match="gaps of 10 fs"):
        split_in_time(mock_trajectory(n_frames=20), (0.7, 0.1, 0.2), gap=10.0)


# --- writing ---------------------------------------------------------------------------------


def test_cube_files_come_back(mock_trajectory: Make, tmp_path: Path) -> None:
    run = open_trajectory(mock_trajectory())
    write_cube(run, -1, tmp_path / "last.cube")
    (frame,) = read_frames(tmp_path / "last.cube")
    np.testing.assert_allclose(frame.density, run["density"][-1], rtol=2e-6)
    np.testing.assert_allclose(frame.positions, run["positions"][-1], atol=1e-5)
    np.testing.assert_allclose(frame.cell, run["cell"], atol=1e-5)
    assert not (tmp_path / "last.part").exists()


def test_bad_frames_are_not_written(mock_trajectory: Make, tmp_path: Path) -> None:
    run = open_trajectory(mock_trajectory())
    with pytest.raises(TrajectoryError, match="choose from 0 to 7"):
        write_cube(run, 8, tmp_path / "a.cube")
    with pytest.raises(TrajectoryError, match="nuclei"):
        write_cube(run.drop_vars("positions"), 0, tmp_path / "a.cube")
    assert not list(tmp_path.glob("a.*"))
