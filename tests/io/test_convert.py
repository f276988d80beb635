"""Trajectories made of files: long conversions, other systems, motion, splits."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import ase.io
import numpy as np
import pytest
import xarray as xr
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.calculators.vasp import VaspChargeDensity
from ase.io.cube import write_cube as ase_write_cube
from ase.units import Bohr
from density_files import CELL, SHAPE, Make, atoms, chgcar, cube, density

from densitykit.errors import TrajectoryError
from densitykit.io.convert import convert
from densitykit.io.describe import summarise
from densitykit.io.formats import Frame, Reading
from densitykit.io.reader import open_split, open_trajectory
from densitykit.io.rebuild import pack_trajectory
from densitykit.io.splits import split_in_time
from densitykit.io.store import fresh
from densitykit.io.validate import validate_trajectory
from densitykit.io.writer import create_trajectory

conversion = importlib.import_module("densitykit.io.convert")

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


def test_a_finished_conversion_has_no_empty_frames(tmp_path: Path) -> None:
    """Also for xarray alone, and all of it survives netCDF."""
    out = convert(
        [chgcar(tmp_path / "CHG", (0.0, 0.1, 0.2))], tmp_path / "run.zarr", time_step=1.0
    )
    plain = xr.open_zarr(out, consolidated=False, chunks=None, decode_times=False)
    assert plain["time"].values.tolist() == [0, 1, 2] and plain["density"].notnull().all()
    plain.to_netcdf(tmp_path / "run.nc", engine="scipy")
    assert validate_trajectory(out) == []


@pytest.mark.parametrize("kind", ["cube", "CHG"])
def test_a_killed_conversion_continues(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cube files of one frame, CHG of two; only the last file begun is read again."""
    times = [0.0, 0.1, 0.2, 0.3]
    if kind == "cube":
        paths = [cube(tmp_path / f"{i}.cube", t) for i, t in enumerate(times)]
    else:
        paths = [chgcar(tmp_path / f"CHG-{i}", (t, t + 0.05)) for i, t in enumerate(times)]
    read, whole = [], conversion.iter_frames

    def dying(path: Path, reading: Reading | None) -> Iterator[Frame]:
        for frame in whole(path, reading):
            if len(read) == 3:
                raise KeyboardInterrupt
            read.append(path)
            yield frame

    monkeypatch.setattr(conversion, "iter_frames", dying)
    out, n = tmp_path / "run.zarr", 4 if kind == "cube" else 8
    with pytest.raises(KeyboardInterrupt):
        convert(paths, out, time_step=1.0, progress=False)
    assert open_trajectory(out).sizes["time"] == 3
    again = []
    monkeypatch.setattr(
        conversion, "iter_frames", lambda path, reading: again.append(path) or whole(path, reading)
    )
    convert(paths, out, time_step=1.0, progress=False)
    assert again == (paths[2:] if kind == "cube" else paths[1:])
    run = open_trajectory(out)
    assert run["time"].values.tolist() == [*range(n)]
    for i, t in enumerate(times):
        np.testing.assert_allclose(run["density"][i * n // 4], density(t), rtol=1e-4)


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
        ase_write_cube(file, strange, rho * Bohr**3)
    with pytest.raises(TrajectoryError, match=f"1.cube: {change} differ"):
        convert([first, other], tmp_path / "run.zarr", time_step=1.0)
    assert open_trajectory(tmp_path / "run.zarr").sizes["time"] == 1


@pytest.mark.parametrize("options", [{}, {"keepbits": 9}, {"resolution": 2.0**-12}])
def test_later_files_are_added(options: dict, tmp_path: Path) -> None:
    paths = [cube(tmp_path / f"{i}.cube", 0.1 * i) for i in range(5)]
    out = tmp_path / "run.zarr"
    for n, pack in ((3, True), (3, False), (5, False), (2, False)):  # the last adds nothing
        convert(paths[:n], out, time_step=1.0, start=2.0, progress=False, **options)
        if pack:
            pack_trajectory(out)
    run = open_trajectory(out)
    assert run["time"].values.tolist() == [2.0, 3.0, 4.0, 5.0, 6.0]
    np.testing.assert_allclose(run["density"][4], density(0.4), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("case", ["only new", "another run", "time_step", "start", "keepbits"])
@pytest.mark.parametrize("write", [cube, chgcar])
def test_other_files_than_before_are_refused(write: Make, case: str, tmp_path: Path) -> None:
    suffix, times = (".cube", range(5)) if write is cube else ("", [(t,) for t in range(5)])
    paths = [write(tmp_path / f"CHG{t}{suffix}", time) for t, time in enumerate(times)]
    paths = [write(p, 0.1 * t if write is cube else (0.1 * t,)) for t, p in enumerate(paths)]
    out = convert(paths[:2], tmp_path / "run.zarr", time_step=1.0, progress=False)
    given = paths[2:] if case == "only new" else paths[3:4] if case == "another run" else paths
    options = {case: 9} if given is paths else {}
    with pytest.raises(TrajectoryError, match="unlike frame|was made with keepbits=None, not 9"):
        convert(given, out, progress=False, **{"time_step": 1.0} | options)
    assert open_trajectory(out)["time"].values.tolist() == [0.0, 1.0]


def test_stores_of_another_kind_are_refused(mock_trajectory: Make, tmp_path: Path) -> None:
    path = cube(tmp_path / "0.cube")
    for out in (mock_trajectory(), mock_trajectory("b.zarr", n_atoms=0, grid=SHAPE)):
        with pytest.raises(TrajectoryError, match="0.cube: .*atoms differ"):
            convert([path], out, time_step=1.0, progress=False)
        assert open_trajectory(out).sizes["time"] == 8
    flat = create_trajectory(tmp_path / "flat.zarr", n_frames=1, grid=(4, 4), cell=1.0)
    flat.append(np.ones((4, 4)), 0.0)
    with pytest.raises(TrajectoryError, match="grid, atoms differ"):
        convert([path], flat.path, time_step=1.0, progress=False)


def test_a_refused_frame_is_named_and_may_be_allowed(tmp_path: Path) -> None:
    path, out = tmp_path / "0.cube", tmp_path / "run.zarr"
    with path.open("w") as file:
        ase_write_cube(file, atoms(), density() - 0.02)
    with pytest.raises(TrajectoryError, match="0.cube, .*allow_negative"):
        convert([path], out, time_step=1.0, progress=False)
    convert([path], out, time_step=1.0, progress=False, allow_negative=True)
    assert open_trajectory(out).sizes["time"] == 1


def test_a_store_is_replaced_on_demand(tmp_path: Path) -> None:
    paths = [cube(tmp_path / f"{i}.cube", 0.1 * i) for i in range(3)]
    out = convert(paths[:2], tmp_path / "run.zarr", time_step=1.0, progress=False)
    convert(paths[2:], out, time_step=1.0, progress=False, overwrite=True)
    np.testing.assert_allclose(open_trajectory(out)["density"], [density(0.2)], rtol=2e-6)


def test_a_store_left_under_another_name_is_continued(tmp_path: Path) -> None:
    paths = [cube(tmp_path / f"{i}.cube", 0.1 * i) for i in range(3)]
    out = convert(paths[:2], tmp_path / "run.zarr", time_step=1.0, progress=False)
    out.rename(fresh(out, "old"))  # as a kill in extend_trajectory leaves it
    convert(paths, out, time_step=1.0, progress=False)
    assert open_trajectory(out).sizes["time"] == 3


@pytest.mark.parametrize("given", [str, Path, lambda path: iter([path])])
def test_one_path_or_an_iterator_will_do(given: Callable, tmp_path: Path) -> None:
    paths = given(cube(tmp_path / "0.cube"))
    out = convert(paths, tmp_path / "run.zarr", time_step=1.0, progress=False)
    assert open_trajectory(out).sizes["time"] == 1


@pytest.mark.parametrize("paths, step", [([], 1.0), (["a.cube"], 0.0), (["a.cube"], np.nan)])
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


@pytest.mark.parametrize("gap", [np.nan, np.inf, -3.0])
def test_gaps_are_lengths_of_time(gap: float, mock_trajectory: Make) -> None:
    with pytest.raises(TrajectoryError, match="a gap of"):
        split_in_time(mock_trajectory(n_frames=20), gap=gap)


def test_gaps_are_times_where_steps_change(tmp_path: Path) -> None:
    times = [*range(0, 20, 2), *np.arange(20, 25, 0.5)]
    writer = create_trajectory(tmp_path / "run.zarr", n_frames=20, grid=(4,), cell=1.0)
    for time in times:
        writer.append(np.ones(4), time)
    splits = split_in_time(writer.path, (0.5, 0.25, 0.25), gap=2.0)
    assert [times[split["start"]] for split in splits.values()] == [0, 22.0, 24.5]


def test_splits_are_looked_at_first(tmp_path: Path) -> None:
    paths = [cube(tmp_path / f"{i}.cube", 0.1 * i) for i in range(6)]
    out, options = tmp_path / "run.zarr", {"time_step": 2.0, "splits": (0.5, 0.25, 0.25)}
    for wrong in ({"gap": 50.0}, {"splits": (0.5, 0.6, 0.2)}):
        with pytest.raises(TrajectoryError, match="gaps of 50 fs leave a split empty|no splits"):
            convert(paths, out, **options | wrong)
        assert not out.exists()
    with pytest.raises(TrajectoryError, match="leave a split empty"):
        convert(chgcar(tmp_path / "CHG", (0.0, 0.1)), out, **options)
    convert(paths, out, **options)
    assert json.loads(open_trajectory(out).attrs["splits"])["train"]["stop"] == 3
    assert validate_trajectory(out) == []


# --- cells that move, sums, spins, negative values -------------------------------------------


def strained(path: Path, strain: float, time: float = 0.0) -> Path:
    system = atoms()
    system.set_cell(CELL * (1 + strain), scale_atoms=True)
    with path.open("w") as file:
        ase_write_cube(file, system, density(time) * Bohr**3 / (1 + strain) ** 3)
    return path


def test_a_cell_that_moves(tmp_path: Path) -> None:
    strains = [0.0, 0.0, 0.02, 0.05, -0.01]
    paths = [strained(tmp_path / f"{i}.cube", s, 0.1 * i) for i, s in enumerate(strains[:4])]
    out = tmp_path / "run.zarr"
    for n in (3, 4):  # the second goes on where the first ended
        convert(paths[:n], out, time_step=1.0, progress=False)
        run = open_trajectory(out)
        assert run.sizes["time"] == n and validate_trajectory(out) == []
        scale = 1 + np.array(strains[:n])
        np.testing.assert_allclose(run["cell"], scale[:, None, None] * CELL, atol=1e-4)
        np.testing.assert_allclose(run["n_electrons"], 6, rtol=1e-5)
        np.testing.assert_allclose(run["velocities"], 0, atol=1e-5)  # atoms go with the cell
    with pytest.raises(TrajectoryError, match="4.cube: cell differ"):  # 6 % in one step
        convert([*paths, strained(tmp_path / "4.cube", strains[4])], out, time_step=1.0)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_core_and_valence_are_added(order: tuple[int, ...], tmp_path: Path) -> None:
    names = ["AECCAR0-a", "AECCAR2-a", "AECCAR0-b", "AECCAR2-b"]
    paths = [chgcar(tmp_path / name, (0.1 * i,)) for i, name in enumerate(names)]
    given = [paths[i] for i in order]
    run = open_trajectory(convert(given, tmp_path / "run.zarr", time_step=1.0, add=True))
    assert run["density"].attrs["quantity"] == "total"
    np.testing.assert_allclose(run["density"][0], density() + density(0.1), rtol=2e-6)
    np.testing.assert_allclose(run["density"][1], density(0.2) + density(0.3), rtol=2e-6)
    core = open_trajectory(convert(paths[0], tmp_path / "core.zarr", time_step=1.0))
    assert core["density"].attrs["quantity"] == "core"
    options = {"time_step": 1.0, "quantity": "pseudo"}
    valence = open_trajectory(convert(paths[1], tmp_path / "valence.zarr", **options))
    assert valence["density"].attrs["quantity"] == "pseudo"


def test_parts_must_belong_together(tmp_path: Path) -> None:
    up, down = (chgcar(tmp_path / f"CHG-{i}", (0.0, 0.1)) for i in ("up", "down"))
    both = open_trajectory(convert([up, down], tmp_path / "a.zarr", time_step=1.0, add=True))
    np.testing.assert_allclose(both["density"][1], 2 * density(0.1), rtol=1e-4)
    with pytest.raises(TrajectoryError, match="no parts to add"):
        convert([up], tmp_path / "b.zarr", time_step=1.0, add=True)
    with pytest.raises(TrajectoryError, match="as many frames"):
        convert([up, chgcar(tmp_path / "CHG-one")], tmp_path / "c.zarr", time_step=1.0, add=True)


def test_spins_and_valence_charges_are_kept(tmp_path: Path) -> None:
    file = VaspChargeDensity(None)
    file.atoms, file.chg, file.chgdiff = [atoms()], [density()], [0.3 * density(0.1)]
    file.write(str(tmp_path / "CHGCAR"), format="chgcar")
    line = "POMASS = 1.0; ZVAL = {} mass and valenz\n"
    (tmp_path / "POTCAR").write_text(line.format("4.000") + line.format("1.000"))
    run = open_trajectory(convert([tmp_path / "CHGCAR"], tmp_path / "run.zarr", time_step=1.0))
    np.testing.assert_allclose(run["magnetization"][0], 0.3 * density(0.1), rtol=2e-6)
    assert run["valence_charge"].values.tolist() == [4, 1, 1]


def test_small_negative_values_are_clipped_and_counted(tmp_path: Path) -> None:
    """Convert, validate and describe have no dead end."""
    rho, paths = density(), []
    rho[0, 0, :3] = -1e-4
    for i in range(2):
        paths.append(tmp_path / f"{i}.cube")
        with paths[-1].open("w") as file:
            ase_write_cube(file, atoms(), (rho + 1e-6 * i * (rho > 0)) * Bohr**3)
    out = tmp_path / "run.zarr"
    options = {"time_step": 1.0, "reading": Reading(unit="bohr")}
    with pytest.raises(TrajectoryError, match="0.cube, .*--clip"):
        convert(paths, out, **options)
    options["clip"] = True
    for _ in range(2):  # again: nothing to do
        run = open_trajectory(convert(paths, out, **options))
        assert run["n_clipped"].values.tolist() == [3, 3]
        voxel = np.linalg.det(CELL) / np.prod(SHAPE)
        np.testing.assert_allclose(run["clipped_electrons"], 3e-4 * voxel, rtol=1e-3)
        assert run["density"].attrs["n_clipped"] == 6 and run["density"].min() == 0
    assert validate_trajectory(out) == [] and "6 negative values" in summarise(out)
    with pytest.raises(TrajectoryError, match="too many to clip"):
        with paths[0].open("w") as file:
            ase_write_cube(file, atoms(), (density() - density().mean()) * Bohr**3)
        convert(paths[:1], tmp_path / "b.zarr", **options)


# --- what is known of the nuclei -------------------------------------------------------------


def moving(folder: Path, n: int = 6, known: tuple[str, ...] = ("energy", "forces")) -> list[Atoms]:
    """Steps of a run: each atom on a circle through a face of the cell, 40 fs around."""
    steps = []
    for i in range(n):
        system, phase = atoms(), 2 * np.pi * i / 40
        system.positions += 0.3 * np.array([np.cos(phase), np.sin(phase), 0]) - 1
        rate = 0.3 * 2 * np.pi / 40 * np.array([-np.sin(phase), np.cos(phase), 0])
        if "velocities" in known:
            system.set_velocities(np.tile(rate / units.fs, (3, 1)))
        results = {"energy": -float(i), "forces": np.full((3, 3), 0.1 * i)}
        results = {name: results[name] for name in results if name in known}
        system.calc = SinglePointCalculator(system, **results)
        steps.append(system)
    return steps


def densities(folder: Path, steps: list[Atoms]) -> list[Path]:
    paths = []
    for i, system in enumerate(steps):
        paths.append(folder / f"{i}.cube")
        wrapped = Atoms(system.numbers, system.positions, cell=CELL, pbc=True)
        wrapped.wrap()
        with paths[-1].open("w") as file:
            ase_write_cube(file, wrapped, density(0.01 * i) * Bohr**3)
    return paths


@pytest.mark.parametrize("given", [True, False])
def test_energies_and_forces_beside_the_densities(given: bool, tmp_path: Path) -> None:
    """Every second step has a density; velocities come from the positions, and say so."""
    steps = moving(tmp_path, 12)
    ase.io.write(tmp_path / "md.extxyz", steps)
    paths = densities(tmp_path, steps[::2])
    options = {"trajectory": tmp_path / "md.extxyz"} if given else {}
    out = convert(paths, tmp_path / "run.zarr", time_step=2.0, **options)
    run = open_trajectory(out)
    assert run["energy"].values.tolist() == [0, -2, -4, -6, -8, -10]
    np.testing.assert_allclose(run["forces"][:, 0, 0], 0.2 * np.arange(6))
    assert run["energy"].attrs["source"] == "md.extxyz"
    speed = np.linalg.norm(run["velocities"][1:-1], axis=2)
    np.testing.assert_allclose(speed, 0.3 * 2 * np.pi / 40, rtol=0.02)  # (2 pi 2/40)**2 / 6
    assert "finite differences" in run["velocities"].attrs["source"]
    assert "velocities (finite differences of the positions)" in summarise(out)


def test_velocities_that_are_there_are_taken(tmp_path: Path) -> None:
    steps = moving(tmp_path, known=("velocities",))
    ase.io.write(tmp_path / "md.traj", steps)
    options = {"time_step": 1.0, "trajectory": tmp_path / "md.traj"}
    run = open_trajectory(convert(densities(tmp_path, steps), tmp_path / "run.zarr", **options))
    expected = np.stack([step.get_velocities() * units.fs for step in steps])
    np.testing.assert_allclose(run["velocities"], expected, rtol=1e-6)
    assert run["velocities"].attrs["source"] == "md.traj" and np.isnan(run["energy"]).all()


def test_another_trajectory_is_refused_or_left_out(tmp_path: Path) -> None:
    steps = moving(tmp_path)
    paths = densities(tmp_path, steps)
    for step in steps:
        step.positions[1] += 0.5
    ase.io.write(tmp_path / "other.extxyz", steps)
    options = {"time_step": 1.0, "trajectory": tmp_path / "other.extxyz"}
    with pytest.raises(TrajectoryError, match="other.extxyz: none of 6 steps.*0.cube"):
        convert(paths, tmp_path / "a.zarr", **options)
    with pytest.warns(UserWarning, match="other.extxyz: .*left out"):
        run = open_trajectory(convert(paths, tmp_path / "a.zarr", time_step=1.0))
    assert np.isnan(run["energy"]).all()
    (tmp_path / "other.extxyz").write_text("nonsense")
    with pytest.raises(TrajectoryError, match="other.extxyz: not readable"):
        convert(paths, tmp_path / "b.zarr", **options)
    with pytest.raises(TrajectoryError, match="nowhere.xml: no such file"):
        convert(paths, tmp_path / "b.zarr", time_step=1.0, trajectory=tmp_path / "nowhere.xml")


def test_a_file_that_is_not_there_is_named_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="nothere-.*: no such file"):
        convert([cube(tmp_path / "0.cube"), "nothere-*"], tmp_path / "run.zarr", time_step=1.0)
    assert not (tmp_path / "run.zarr").exists()
