"""Files of other programs: units, orders and origins, damage."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tomllib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr
from ase.calculators.vasp import VaspChargeDensity
from ase.io.cube import write_cube as ase_write_cube
from ase.units import Bohr
from density_files import CELL, SHAPE, Make, atoms, chgcar, cube, density

from densitykit.errors import TrajectoryError
from densitykit.fields import n_electrons
from densitykit.io.engine import DensityFiles
from densitykit.io.export import export_frame
from densitykit.io.formats import Reading, count_frames, format_of, read_frames
from densitykit.io.reader import open_trajectory
from densitykit.io.writer import create_trajectory

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


def electrons(path: Path, **reading: object) -> float:
    (frame,) = read_frames(path, Reading(**reading))
    return n_electrons(frame.density, frame.cell)


def with_head(path: Path, change: Callable[[list[str]], None]) -> Path:
    """Change the header of a cube file of three atoms, line by line."""
    lines = path.read_text().split("\n")
    change(lines)
    path.write_text("\n".join(lines))
    return path


def in_angstrom(lines: list[str]) -> None:
    for i in [*range(2, 6), *range(6, 9)]:
        skip = 2 if i > 5 else 1
        words = lines[i].split()
        numbers = [f"{float(word) * Bohr:.6f}" for word in words[skip:]]
        lines[i] = " ".join([*words[:skip], *numbers])


def test_titles_may_say_angstrom(tmp_path: Path) -> None:
    def change(lines: list[str]) -> None:
        in_angstrom(lines)
        lines[1] = "Atomic coordinates in Angstroms"

    path = with_head(cube(tmp_path / "a.cube"), change)
    assert electrons(path) == pytest.approx(6, rel=1e-4)
    np.testing.assert_allclose(read_frames(path)[0].cell, CELL, atol=1e-4)
    np.testing.assert_allclose(read_frames(path)[0].positions, atoms().positions, atol=1e-4)


@pytest.mark.parametrize("axes", [1, 3])
def test_negative_numbers_of_points_mean_angstrom(axes: int, tmp_path: Path) -> None:
    def change(lines: list[str]) -> None:
        in_angstrom(lines)
        for i in range(3, 3 + axes):
            lines[i] = "-" + lines[i].strip()

    path = with_head(cube(tmp_path / "a.cube"), change)
    if axes == 3:
        np.testing.assert_allclose(read_frames(path)[0].cell, CELL, atol=1e-4)
        assert electrons(path) == pytest.approx(6, rel=1e-4)
    else:
        with pytest.raises(TrajectoryError, match="a.cube: .*unlike sign.*write"):
            read_frames(path)


def test_lengths_that_nobody_names_are_asked_about(tmp_path: Path) -> None:
    """0.889 electrons as it stands, 6.00 with lengths in angstrom."""
    path = with_head(cube(tmp_path / "a.cube"), in_angstrom)
    with pytest.raises(TrajectoryError, match="6.00 if the lengths are in angstrom.*--lengths"):
        read_frames(path)
    assert electrons(path, lengths="angstrom") == pytest.approx(6, rel=1e-4)
    assert electrons(path, lengths="bohr") == pytest.approx(6 * Bohr**3, rel=1e-4)


def per_cubic_angstrom(path: Path, numbers: tuple[int, ...] = (8, 1, 1)) -> Path:
    """As FHI-aims wrote it: lengths in bohr, values not."""
    system = atoms()
    system.numbers[:] = numbers
    with path.open("w") as file:
        ase_write_cube(file, system, density())
    return path


def test_more_electrons_than_nuclear_charge_is_another_unit(tmp_path: Path) -> None:
    path = per_cubic_angstrom(tmp_path / "a.cube")
    with pytest.raises(TrajectoryError, match="40.49 electrons.* 10 .*unit='angstrom'"):
        read_frames(path)
    assert electrons(path, unit="angstrom") == pytest.approx(6, rel=1e-5)


def test_a_count_that_speaks_for_another_unit_is_asked_about(tmp_path: Path) -> None:
    """Heavy nuclei could have 40.49 electrons, but 6.00 is a likelier number."""
    path = per_cubic_angstrom(tmp_path / "a.cube", (74, 74, 74))
    with pytest.raises(TrajectoryError, match="40.49 electrons, 6.00 if .*--unit bohr"):
        read_frames(path)
    assert electrons(path, unit="angstrom") == pytest.approx(6, rel=1e-5)
    assert electrons(path, unit="bohr") == pytest.approx(6 / Bohr**3, rel=1e-5)
    with pytest.raises(TrajectoryError, match="'feet'.*choose"):
        Reading(unit="feet")


def test_both_end_points_are_seen_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.cube"
    larger = atoms()
    larger.set_cell((np.array(SHAPE) + 1)[:, None] / np.array(SHAPE)[:, None] * CELL)
    with path.open("w") as file:
        ase_write_cube(file, larger, np.pad(density(), ((0, 1),) * 3, mode="wrap") * Bohr**3)
    with pytest.warns(UserWarning, match="a.cube: opposite faces are equal.*--endpoint"):
        read_frames(path)
    (frame,) = read_frames(path, Reading(endpoint=True))
    np.testing.assert_allclose(frame.density, density(), rtol=2e-6)
    np.testing.assert_allclose(frame.cell, CELL, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_frames(cube(tmp_path / "periodic.cube"))


def test_frames_appended_in_one_cube_file(tmp_path: Path) -> None:
    texts = [cube(tmp_path / "a.cube", t).read_text() for t in (0.0, 0.1, 0.2)]
    (tmp_path / "a.cube").write_text("\n".join(texts) + "\n\n")
    frames = read_frames(tmp_path / "a.cube")
    for frame, time in zip(frames, (0.0, 0.1, 0.2), strict=True):
        np.testing.assert_allclose(frame.density, density(time), rtol=2e-6)
    assert count_frames(tmp_path / "a.cube") == 3


def test_several_fields_are_refused(tmp_path: Path) -> None:
    path = with_head(cube(tmp_path / "a.cube"), lambda lines: lines.__setitem__(2, "3 0 0 0 2"))
    with pytest.raises(TrajectoryError, match="2 fields"):
        read_frames(path)
    orbitals = with_head(cube(tmp_path / "b.cube"), lambda lines: lines.__setitem__(2, "-3 0 0 0"))
    text = orbitals.read_text().split("\n")
    orbitals.write_text("\n".join([*text[:9], " 2 5 6", *text[9:]]))
    with pytest.raises(TrajectoryError, match="2 fields"):
        read_frames(orbitals)


def test_charges_of_ions_are_kept(tmp_path: Path) -> None:
    def change(lines: list[str], charges: tuple[float, ...]) -> None:
        for i, charge in enumerate(charges, 6):
            words = lines[i].split()
            lines[i] = " ".join([words[0], str(charge), *words[2:]])

    for charges, kept in (((6.0, 1.0, 1.0), True), ((8.0, 1.0, 1.0), False), ((0, 0, 0), False)):
        path = with_head(cube(tmp_path / "a.cube"), partial(change, charges=charges))
        (frame,) = read_frames(path)
        assert (frame.valence is not None and frame.valence.tolist() == list(charges)) == kept


@pytest.mark.parametrize(("change", "match"), [((2, "119"), "elements"), ((0, "1.5"), "whole")])
def test_strange_headers_are_refused(change: tuple, match: str, tmp_path: Path) -> None:
    def strange(lines: list[str]) -> None:
        at, word = change
        line = 6 if at else 3
        lines[line] = " ".join([word, *lines[line].split()[1:]])

    with pytest.raises(TrajectoryError, match=f"a.cube: .*{match}"):
        read_frames(with_head(cube(tmp_path / "a.cube"), strange))
    flat = with_head(cube(tmp_path / "b.cube"), lambda lines: lines.__setitem__(5, "8 0 0 0"))
    with pytest.raises(TrajectoryError, match="span no cell"):
        read_frames(flat)
    empty = with_head(cube(tmp_path / "c.cube"), lambda lines: lines.__setitem__(5, "0 0 0 1"))
    with pytest.raises(TrajectoryError, match="empty grid"):
        read_frames(empty)


def replaced(path: Path, value: str) -> tuple[Path, int]:
    """Put a text in the place of the fifth value from the end; its line, from one."""
    before, _, *after = path.read_text().rsplit(maxsplit=5)
    path.write_text(" ".join([before, value, *after]) + "\n")
    return path, before.count("\n") + 1


@pytest.mark.parametrize("value", ["0.1+103", "****", "nan"])
@pytest.mark.parametrize("name", ["a.cube", "CHGCAR"])
def test_odd_values_are_refused(value: str, name: str, tmp_path: Path) -> None:
    path, line = replaced((chgcar if name == "CHGCAR" else cube)(tmp_path / name), value)
    where = "not finite" if value == "nan" else f"line {line}: '{re.escape(value)}'"
    with pytest.raises(TrajectoryError, match=f"{name}: .*{where}.*write"):
        read_frames(path)


@pytest.mark.parametrize(("value", "number"), [("0.1-101", 0.0), ("1.5D-02", 1.5e-2)])
@pytest.mark.parametrize("name", ["a.cube", "CHGCAR"])
def test_numbers_of_fortran(value: str, number: float, name: str, tmp_path: Path) -> None:
    path = chgcar(tmp_path / name) if name == "CHGCAR" else cube(tmp_path / name)
    rho = read_frames(path)[0].density
    (frame,) = read_frames(replaced(path, value)[0])
    order = "F" if name == "CHGCAR" else "C"
    unit = np.linalg.det(CELL) if name == "CHGCAR" else Bohr**3
    found, expected = frame.density.ravel(order), rho.ravel(order).copy()
    expected[-5] = number / unit
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_cut_in_a_header_or_in_the_last_value_is_seen(tmp_path: Path) -> None:
    text = chgcar(tmp_path / "CHG", (0.0, 0.1)).read_text()
    header = text.index("Direct", len(text) // 2)
    for end in (header + 3, len(text.rstrip()) - 1, len(text.rstrip()) - 10):
        (tmp_path / "CHG").write_text(text[:end])
        with pytest.raises(TrajectoryError, match="cut short"):
            read_frames(tmp_path / "CHG")


def spin_polarised(path: Path) -> Path:
    """As VASP writes it: augmentation, moments, and a second block."""
    file = VaspChargeDensity(None)
    file.atoms, file.chg, file.chgdiff = [atoms()], [density()], [0.3 * density(0.1)]
    occupancies = "augmentation occupancies   1   2\n  0.1E+00  0.2E+00\n"
    file.aug, file.augdiff = occupancies + "  0.1E+01  0.0E+00  0.0E+00\n", occupancies
    file.write(str(path), format="chgcar")
    return path


def test_both_spin_channels_are_kept(tmp_path: Path) -> None:
    path = spin_polarised(tmp_path / "CHGCAR")
    path.write_text(2 * path.read_text())  # and a second frame
    frames = read_frames(path)
    assert len(frames) == 2
    for frame in frames:
        np.testing.assert_allclose(frame.density, density(), rtol=2e-6)
        np.testing.assert_allclose(frame.magnetization, 0.3 * density(0.1), rtol=2e-6)


@pytest.mark.parametrize(("name", "pack"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
@pytest.mark.parametrize("kind", ["a.cube", "CHGCAR"])
def test_packed_files_are_read(name: str, pack: ModuleType, kind: str, tmp_path: Path) -> None:
    path = (cube if "cube" in kind else chgcar)(tmp_path / kind)
    packed = tmp_path / f"{kind}.{name}"
    packed.write_bytes(pack.compress(path.read_bytes()))
    (frame,) = read_frames(packed)
    np.testing.assert_allclose(frame.density, density(), rtol=2e-6)
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(TrajectoryError, match=f"{kind}.{name}: .*write"):
        read_frames(packed)
    packed.write_bytes(b"no such thing")
    with pytest.raises(TrajectoryError, match=f"{kind}.{name}: .*write"):
        read_frames(packed)


@pytest.mark.parametrize("title", ["direct", "Direct configuration", "f\xfcr"])
def test_titles_of_vasp_do_not_matter(title: str, tmp_path: Path) -> None:
    path = chgcar(tmp_path / "CHG", (0.0, 0.1))
    text = path.read_text()
    first = text.split("\n")[0]
    path.write_bytes(text.replace(first, title).encode("latin-1"))
    assert [frame.density.shape for frame in read_frames(path)] == [SHAPE, SHAPE]


def test_selective_and_cartesian_positions_and_scaled_cells(tmp_path: Path) -> None:
    """2 angstrom edges by a factor, by a volume, or by three factors."""
    for scale in ("2.0", "-8.0", "2.0 2.0 2.0"):
        lines = ["title", scale, "1 0 0", "0 1 0", "0 0 1", "Na_pv Cl", "1 1"]
        lines += ["Selective dynamics", "Cartesian", "0 0 0 T T T", "0.5 0.25 0 T F T", ""]
        (tmp_path / "CHGCAR").write_text("\n".join([*lines, "1 1 2", "3.0 5.0", ""]))
        (frame,) = read_frames(tmp_path / "CHGCAR")
        np.testing.assert_allclose(frame.cell, 2 * np.eye(3))
        np.testing.assert_allclose(frame.positions[1], [1.0, 0.5, 0.0])
        np.testing.assert_allclose(frame.density.ravel(), [3 / 8, 5 / 8])
        assert frame.numbers.tolist() == [11, 17]


@pytest.mark.parametrize("name", ["POTCAR", "OUTCAR"])
def test_valence_charges_of_vasp(name: str, tmp_path: Path) -> None:
    line = "   POMASS =   16.000; ZVAL   =    {}    mass and valenz\n"
    (tmp_path / name).write_text(line.format("6.000") + "other\n" + line.format("1.000"))
    (frame,) = read_frames(chgcar(tmp_path / "CHGCAR"))
    assert frame.valence.tolist() == [6, 1, 1]
    (tmp_path / name).write_text(line.format("6.000"))
    assert read_frames(tmp_path / "CHGCAR")[0].valence is None


HEX = np.array([[3.2, 0.0, 0.0], [-1.6, 1.6 * np.sqrt(3), 0.0], [0.0, 0.0, 5.2]])


def xsf(path: Path, field: np.ndarray, extra: str = "", begin: str = "BEGIN_") -> Path:
    """A hexagonal crystal of LiF with values as given, by hand."""
    vectors = "\n".join(" ".join(f"{x:.6f}" for x in row) for row in HEX)
    text = f"# made by hand\nCRYSTAL\nPRIMVEC\n{vectors}\nPRIMCOORD\n2 1\n"
    text += f"3 0.0 1.847521 1.3 {extra}\nF 0.5 0.923760 3.12 {extra}\n"
    text += f"BEGIN_BLOCK_DATAGRID_3D\nname\n{begin}DATAGRID_3D_rho\n"
    text += " ".join(map(str, field.shape)) + f"\n0 0 0.1\n{vectors}\n"
    values = "\n".join(f"{value:.8e}" for value in field.ravel(order="F"))
    path.write_text(f"{text}{values}\nEND_DATAGRID_3D\nEND_BLOCK_DATAGRID_3D\n")
    return path


def salt() -> np.ndarray:
    """Eight electrons, unlike along each axis, in angstrom**-3."""
    x, y, z = np.meshgrid(*(np.arange(n) / n for n in (4, 5, 6)), indexing="ij")
    wave = 1 + 0.4 * np.sin(2 * np.pi * (x + 2 * y)) + 0.3 * np.cos(2 * np.pi * z)
    return 8 / np.linalg.det(HEX) * wave


@pytest.mark.parametrize("begin", ["BEGIN_", ""])
@pytest.mark.parametrize("unit", ["bohr", "angstrom"])
def test_hexagonal_xsf(unit: str, begin: str, tmp_path: Path) -> None:
    """The last planes repeat the first; the unit, which no file names, by the count."""
    factor = Bohr**3 if unit == "bohr" else 1.0
    path = xsf(tmp_path / "a.xsf", factor * np.pad(salt(), ((0, 1),) * 3, "wrap"), begin=begin)
    (frame,) = read_frames(path, Reading(unit=unit))
    np.testing.assert_allclose(frame.density, salt(), rtol=1e-6)
    np.testing.assert_allclose(frame.cell, HEX, atol=1e-6)
    np.testing.assert_allclose(frame.positions[0], [0, 1.847521, 1.2])
    assert frame.numbers.tolist() == [3, 9] and frame.forces is None
    if unit == "angstrom":
        with pytest.warns(UserWarning, match="a.xsf: .*per angstrom.*8.00 electrons"):
            assert electrons(path) == pytest.approx(8)
    else:
        assert electrons(path) == pytest.approx(8)


def test_what_is_odd_in_xsf(tmp_path: Path) -> None:
    path = xsf(tmp_path / "a.xsf", Bohr**3 * salt(), extra="0.1 0.2 0.3")
    with pytest.raises(TrajectoryError, match="a.xsf: .*opposite faces of the grid differ"):
        read_frames(path)
    (frame,) = read_frames(path, Reading(endpoint=False))
    assert frame.density.shape == (4, 5, 6)
    np.testing.assert_allclose(frame.forces[1], np.array([0.1, 0.2, 0.3]) * 27.211386, rtol=1e-6)
    text = path.read_text()
    grid = text[text.index("BEGIN_DATAGRID") : text.index("END_BLOCK")]
    for strange in (text.replace(grid, 2 * grid), text.replace("3.200000", "3.300000", 1)):
        path.write_text(strange)
        with pytest.raises(TrajectoryError, match="2 grids|another cell"):
            read_frames(path)


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


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "water.xyz").touch()
    with pytest.raises(TrajectoryError, match="water.xyz: neither .*rename"):
        read_frames(tmp_path / "water.xyz")
    for name in ("missing.cube", "nothere-*"):
        with pytest.raises(TrajectoryError, match=f"{re.escape(name)}: no such file"):
            read_frames(tmp_path / name)


# --- writing ---------------------------------------------------------------------------------


def test_cube_files_come_back(mock_trajectory: Make, tmp_path: Path) -> None:
    run = open_trajectory(mock_trajectory())
    export_frame(run, -1, tmp_path / "last.cube")
    (frame,) = read_frames(tmp_path / "last.cube")
    np.testing.assert_allclose(frame.density, run["density"][-1], rtol=2e-6)
    np.testing.assert_allclose(frame.positions, run["positions"][-1] % 6.0, atol=1e-5)
    np.testing.assert_allclose(frame.cell, run["cell"], atol=1e-5)
    assert [path.name for path in tmp_path.glob("*last*")] == ["last.cube"]


def test_bad_frames_are_not_written(mock_trajectory: Make, tmp_path: Path) -> None:
    run = open_trajectory(mock_trajectory())
    with pytest.raises(TrajectoryError, match="choose from 0 to 7"):
        export_frame(run, 8, tmp_path / "a.cube")
    for name in ("positions", "numbers", "cell", "density"):
        with pytest.raises(TrajectoryError, match="nuclei"):
            export_frame(run.drop_vars(name), 0, tmp_path / "a.cube")
    for name in ("positions", "density"):
        with pytest.raises(TrajectoryError, match="not finite"):
            export_frame(run.assign({name: np.nan * run[name]}), 0, tmp_path / "a.cube")
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.parametrize("name", ["missing/a.cube", "folder.cube"])
def test_paths_that_cannot_be_written_are_named(
    name: str, mock_trajectory: Make, tmp_path: Path
) -> None:
    (tmp_path / "folder.cube").mkdir()
    with pytest.raises(TrajectoryError, match=f"{name}: .*another path"):
        export_frame(open_trajectory(mock_trajectory()), 0, tmp_path / name)
    assert not list(tmp_path.glob(".*"))


NAMES = ["a.cube", "CHGCAR-7", "frame.vasp", "a.xsf", "a.zarr"]


@pytest.mark.parametrize("name", NAMES)
def test_exports_come_back(name: str, tmp_path: Path) -> None:
    """Wrapped atoms, charges, spins where the format has them, and the electrons."""
    options = {"numbers": [8, 1, 1], "valence_charges": [6, 1, 1], "magnetization": True}
    store = tmp_path / "run.zarr"
    writer = create_trajectory(store, n_frames=2, grid=SHAPE, cell=CELL, **options)
    for t in (0.0, 0.1):
        outside = atoms().positions + [CELL[0], -CELL[1], 2 * CELL[2]]
        writer.append(density(t), t, positions=outside, magnetization=0.3 * density(2 * t))
    path = tmp_path / name
    export_frame(open_trajectory(store), 1, path)
    if name == "a.zarr":
        one, run = open_trajectory(path), open_trajectory(store).isel(time=[1])
        for variable in ("density", "positions", "cell", "valence_charge", "magnetization"):
            np.testing.assert_array_equal(one[variable], run[variable])
        return
    (frame,) = read_frames(path)
    assert n_electrons(frame.density, frame.cell) == pytest.approx(6, rel=2e-6)
    np.testing.assert_allclose(frame.density, density(0.1), rtol=2e-6)
    np.testing.assert_allclose(frame.positions, atoms().positions, atol=1e-6)
    if "cube" in name:
        assert frame.valence.tolist() == [6, 1, 1]
    if format_of(path) == "CHGCAR":
        np.testing.assert_allclose(frame.magnetization, 0.3 * density(0.2), rtol=2e-6)


@pytest.mark.parametrize("name", ["frame.dat", "frame", "a.cube.gz"])
def test_names_without_a_format_are_refused(
    name: str, mock_trajectory: Make, tmp_path: Path
) -> None:
    with pytest.raises(TrajectoryError, match=name):
        export_frame(open_trajectory(mock_trajectory()), 0, tmp_path / name)
    assert not (tmp_path / name).exists()


# --- xarray ----------------------------------------------------------------------------------


def test_xarray_opens_files(tmp_path: Path) -> None:
    spins = spin_polarised(tmp_path / "CHGCAR")
    ds = xr.open_dataset(spins, engine=DensityFiles)
    assert ds["density"].dims == ("time", "x", "y", "z") and ds.sizes["time"] == 1
    np.testing.assert_allclose(ds["density"][0], density(), rtol=2e-6)
    np.testing.assert_allclose(ds["magnetization"][0], 0.3 * density(0.1), rtol=2e-6)
    np.testing.assert_allclose(ds["cell"], CELL, atol=1e-5)
    assert ds["density"].attrs["units"] == "angstrom**-3"
    ds = xr.open_dataset(chgcar(tmp_path / "CHG", (0.0, 0.1)), engine=DensityFiles)
    assert ds.sizes["time"] == 2
    ds = xr.open_dataset(tmp_path / "CHG", engine=DensityFiles, drop_variables="cell")
    assert "cell" not in ds
    guess = DensityFiles().guess_can_open
    assert guess("a.cube") and guess(tmp_path / "CHGCAR.gz") and not guess("a.nc")
    assert not guess("run.zarr") and not guess(b"bytes")


def test_the_engine_is_registered() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    name = project["entry-points"]["xarray.backends"]["densitykit"]
    assert name == f"{DensityFiles.__module__}:{DensityFiles.__name__}"
