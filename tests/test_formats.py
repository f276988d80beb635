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

from densitykit.errors import TrajectoryError
from densitykit.fields import n_electrons
from densitykit.io import formats
from densitykit.io.formats import convert, read_frames, write_cube
from densitykit.io.reader import open_split, open_trajectory
from densitykit.io.rebuild import pack_trajectory
from densitykit.io.splits import split_in_time
from densitykit.io.store import sibling
from densitykit.io.writer import create_trajectory

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


@pytest.mark.parametrize(
    "title", ["OUTER LOOP: Z, MIDDLE LOOP: Y, INNER LOOP: X", "An outer loop"]
)
def test_the_header_alone_gives_the_order(title: str, tmp_path: Path) -> None:
    path = cube(tmp_path / "a.cube")
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], title, *lines[2:]]))
    (frame,) = read_frames(path)
    np.testing.assert_allclose(frame.density, density(), rtol=2e-6)
    np.testing.assert_allclose(frame.cell, CELL, atol=1e-5)


def test_titles_and_line_ends_of_any_kind(tmp_path: Path) -> None:
    path = cube(tmp_path / "a.cube")
    _, text = path.read_text().split("\n", 1)
    path.write_bytes(f"in \N{LATIN CAPITAL LETTER A WITH RING ABOVE}\n{text}".encode("latin-1"))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (frame,) = read_frames(path)
    np.testing.assert_allclose(frame.density, density(), rtol=2e-6)


@pytest.mark.parametrize("lengths", [1, 3])
def test_cubes_in_angstrom_are_refused(lengths: int, tmp_path: Path) -> None:
    path = cube(tmp_path / "a.cube")
    lines = path.read_text().split("\n")
    for i in range(3, 3 + lengths):
        lines[i] = "-" + lines[i].strip()
    path.write_text("\n".join(lines))
    with pytest.raises(TrajectoryError, match="a.cube: .* in bohr"):
        read_frames(path)


@pytest.mark.parametrize("value", ["1.0D-03", "0.1-103", "****", "nan"])
@pytest.mark.parametrize("name", ["a.cube", "CHGCAR"])
def test_odd_values_are_refused(value: str, name: str, tmp_path: Path) -> None:
    path = (chgcar if name == "CHGCAR" else cube)(tmp_path / name)
    before, _, *after = path.read_text().rsplit(maxsplit=6)
    path.write_text(" ".join([before, value, *after]) + "\n")
    with pytest.raises(TrajectoryError, match=f"{name}: .*write"):
        read_frames(path)


def test_a_cut_in_a_header_or_in_the_last_value_is_seen(tmp_path: Path) -> None:
    text = chgcar(tmp_path / "CHG", (0.0, 0.1)).read_text()
    header = text.index("Direct", len(text) // 2)
    for end in (header + 3, len(text.rstrip()) - 1, len(text.rstrip()) - 10):
        (tmp_path / "CHG").write_text(text[:end])
        with pytest.raises(TrajectoryError, match="cut short"):
            read_frames(tmp_path / "CHG")


def test_of_spins_the_total_is_taken(tmp_path: Path) -> None:
    file = VaspChargeDensity(None)
    file.atoms, file.chg, file.chgdiff = [atoms()], [density()], [0.3 * density(0.1)]
    file.aug = file.augdiff = "augmentation occupancies   1   2\n  0.1E+00  0.2E+00\n"
    file.write(str(tmp_path / "CHGCAR"), format="chgcar")
    (frame,) = read_frames(tmp_path / "CHGCAR")
    np.testing.assert_allclose(frame.density, density(), rtol=2e-6)
    text = (tmp_path / "CHGCAR").read_text()
    (tmp_path / "CHGCAR").write_text(2 * text)
    with pytest.raises(TrajectoryError, match="each CHGCAR by itself"):
        read_frames(tmp_path / "CHGCAR")


def test_elements_without_names_are_refused(tmp_path: Path) -> None:
    lines = chgcar(tmp_path / "CHGCAR").read_text().split("\n")
    (tmp_path / "CHGCAR").write_text("\n".join(["no names", *lines[1:5], *lines[6:]]))
    with pytest.raises(TrajectoryError, match="CHGCAR: .*symbols"):
        read_frames(tmp_path / "CHGCAR")


def test_positions_must_be_numbers(tmp_path: Path) -> None:
    lines = cube(tmp_path / "a.cube").read_text().split("\n")
    (tmp_path / "a.cube").write_text("\n".join([*lines[:6], "8 0 nan 1 1", *lines[7:]]))
    with pytest.raises(TrajectoryError, match="a.cube: .*finite"):
        read_frames(tmp_path / "a.cube")


@pytest.mark.parametrize("name", ["a.cube.gz", "CHGCAR.gz", "CHG.xz"])
def test_compressed_files_are_to_be_unpacked(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08\n")
    with pytest.raises(TrajectoryError, match=f"{name}: .*unpack"):
        read_frames(tmp_path / name)


@pytest.mark.parametrize("name", ["a.cube", "CHGCAR"])
def test_folders_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(TrajectoryError, match=f"{name}: .*correct the path"):
        read_frames(tmp_path / name)


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
    assert again == (paths[1:] if kind == "cube" else paths)  # of VASP's, frames are counted
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
    with pytest.raises(TrajectoryError, match="grid, cell, atoms differ"):
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
    out.rename(sibling(out, "old"))  # as a kill in extend_trajectory leaves it
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
    for name in ("positions", "numbers", "cell", "density"):
        with pytest.raises(TrajectoryError, match="nuclei"):
            write_cube(run.drop_vars(name), 0, tmp_path / "a.cube")
    for name in ("positions", "density"):
        with pytest.raises(TrajectoryError, match="not finite"):
            write_cube(run.assign({name: np.nan * run[name]}), 0, tmp_path / "a.cube")
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.parametrize("name", ["missing/a.cube", "folder"])
def test_paths_that_cannot_be_written_are_named(
    name: str, mock_trajectory: Make, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(TrajectoryError, match=f"{name}: .*another path"):
        write_cube(open_trajectory(mock_trajectory()), 0, tmp_path / name)
    assert not list(tmp_path.glob("*.part"))
