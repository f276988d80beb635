"""CP2K: its input and output, with a program that plays its part, and the real one if present."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ase", reason="needs densitykit[dft]")

from ase import Atoms
from ase.build import molecule
from ase.units import Bohr, Hartree

from densitykit.errors import GenerationError
from densitykit.fields import n_electrons
from densitykit.generate.cp2k import CP2K, executable
from densitykit.generate.jobs import close_engines, evaluate
from densitykit.generate.snapshots import grid_shape
from densitykit.generate.systems import SIZES, gaussians_and_plane_waves, system

try:
    executable()
except GenerationError as error:
    no_program = str(error)
else:
    no_program = ""
needs_cp2k = pytest.mark.skipif(bool(no_program), reason=no_program)

OUTPUT = """ CP2K| version string:                                        CP2K version 2023.1
     1 NoMix/Diag. 0.40E+00    0.0     0.60971704       -16.5806554700 -1.66E+01
     2 Broy./Diag. 0.40E+00    0.0     0.00000120       -17.1558320300 -5.75E-01
 *** SCF run converged in     2 steps ***
 ENERGY| Total FORCE_EVAL ( QS ) energy [a.u.]:              -17.155832030000001

 ATOMIC FORCES in [a.u.]

 # Atom   Kind   Element          X              Y              Z
      1      1      O           0.00100000    -0.00200000     0.00300000
      2      2      H          -0.00000001     0.00100000    -0.00150000
      3      2      H           1.1E-04        0.00100000    -0.00150000
 SUM OF ATOMIC FORCES           0.00110999     0.00000000     0.00000000     0.00000000
"""


def water(edges: tuple[float, ...] = (4.0, 5.0, 6.0)) -> Atoms:
    atoms = molecule("H2O", cell=edges, pbc=True)
    atoms.rotate(40, (1, 2, 3))
    atoms.center()
    return atoms


def cube(values: np.ndarray, atoms: Atoms) -> str:
    """What CP2K writes: bohr, and the density in bohr**-3."""
    rows = [f"{len(atoms)} 0 0 0"]
    for n, vector in zip(values.shape, atoms.cell.array, strict=True):
        rows.append(f"{n} " + " ".join(f"{x / n / Bohr:.6f}" for x in vector))
    rows += [f"{z} 0 0 0 0" for z in atoms.numbers]
    numbers = [f"{v:.8E}" for v in (values * Bohr**3).ravel()]
    return "\n".join(["density", "by CP2K", *rows, *numbers]) + "\n"


@pytest.fixture
def play(tmp_path: Path):
    """Give `play(atoms, values, output, status) -> program`, which leaves and prints these."""

    def make(atoms: Atoms, values: np.ndarray, output: str = OUTPUT, status: int = 0) -> Path:
        (tmp_path / "played.cube").write_text(cube(values, atoms))
        (tmp_path / "output").write_text(output)
        program = tmp_path / "cp2k"
        copy = f"cp {tmp_path}/played.cube job-ELECTRON_DENSITY-1_0.cube"
        keep = f"cp job.inp {tmp_path}/job.inp"
        program.write_text(f"#!/bin/sh\n{keep}\n{copy}\ncat {tmp_path}/output\nexit {status}\n")
        program.chmod(0o755)
        return program

    return make


def values_for(atoms: Atoms, spacing: float = 0.5) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 1, grid_shape(atoms, spacing))


def test_energy_forces_and_density_are_read(play, tmp_path) -> None:
    atoms = water()
    values = values_for(atoms)
    with CP2K(spacing=0.5, program=play(atoms, values), folder=tmp_path / "scratch") as engine:
        atoms.calc = engine
        assert atoms.get_potential_energy() == pytest.approx(-17.15583203 * Hartree)
        assert atoms.get_forces()[0] * Bohr / Hartree == pytest.approx([0.001, -0.002, 0.003])
        assert atoms.get_forces()[2, 0] * Bohr / Hartree == pytest.approx(1.1e-4)
        np.testing.assert_allclose(engine.density(values.shape), values, rtol=1e-7)
        assert engine.iterations == 2
        description = engine.description()
    assert description["engine"] == "CP2K 2023.1"
    assert description["valence_charges"] == {"H": 1, "O": 6}
    assert description["pseudopotential"] == "H GTH-PBE-q1, O GTH-PBE-q6"
    assert not list((tmp_path / "scratch").iterdir())
    text = (tmp_path / "job.inp").read_text()
    assert "POTENTIAL GTH-PBE-q6" in text and "STRIDE 2" in text
    positions = [line.split()[1:] for line in text.splitlines() if line.split()[0] in ("O", "H")]
    np.testing.assert_allclose(np.array(positions, dtype=float), atoms.positions, atol=1e-11)


def test_only_the_grid_of_the_engine(play) -> None:
    atoms = water()
    engine = CP2K(spacing=0.5, program=play(atoms, values_for(atoms)))
    with pytest.raises(GenerationError, match="no density yet"):
        engine.density()
    atoms.calc = engine
    atoms.get_potential_energy()
    with pytest.raises(GenerationError, match=r"\(16, 20, 24\) points.*has \(8, 10, 12\)"):
        engine.density((16, 20, 24))


def test_another_grid_than_expected(play) -> None:
    atoms = water()
    atoms.calc = CP2K(spacing=0.5, program=play(atoms, values_for(atoms)[:-1]))
    with pytest.raises(GenerationError, match=r"\(7, 10, 12\) points instead of \(8, 10, 12\)"):
        atoms.get_potential_energy()


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [
        (OUTPUT, 3, "CP2K ended with status 3; its output ends:(.|\n)*SUM OF ATOMIC"),
        (OUTPUT.replace("run converged", "run NOT converged"), 0, "self-consistency.*=60"),
        (OUTPUT.replace("ENERGY|", ""), 0, "printed no energy"),
        (OUTPUT.replace("      3      2", "x"), 0, "forces on 2 of 3 atoms"),
    ],
)
def test_failures_say_what_happened(play, output: str, status: int, message: str) -> None:
    atoms = water()
    atoms.calc = CP2K(spacing=0.5, program=play(atoms, values_for(atoms), output, status))
    with pytest.raises(GenerationError, match=message):
        atoms.get_potential_energy()
    assert "energy" not in atoms.calc.results


def test_cutoff_makes_the_grid_a_multiple() -> None:
    """A wave is on CP2K's grid of n points where (pi n / L)**2 is above the cutoff, not below."""
    atoms = water((9.86, 9.86, 9.86))
    engine = CP2K(program="cp2k")
    cutoff = engine._cutoff(atoms)
    assert cutoff == pytest.approx(179.5, abs=0.5)
    for n, held in ((79, False), (80, True)):
        assert ((np.pi * n / (9.86 / Bohr)) ** 2 > cutoff) == held


def test_all_boxes_of_water_have_grids_of_cp2k() -> None:
    edges = {32: 9.86, 64: 12.43, 128: 15.66, 256: 19.73, 512: 24.85}
    for size in SIZES["water"]:
        found = system("water", size)
        assert found.engine.keywords["spacing"] == found.spacing
        engine = CP2K(**found.engine.keywords, program="cp2k")
        assert "CUTOFF" in engine.input_text(water((edges[size],) * 3))
    assert "&OT" in engine.input_text(water((24.85,) * 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spacing": 0.0}, "spacing=0.0 angstrom"),
        ({"multiple": 0}, "multiple=0"),
        ({"solver": "magic"}, "solver='magic'.*diagonalisation"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        CP2K(program="cp2k", **settings)


def test_cells_that_cp2k_cannot_take() -> None:
    engine, hexagonal = CP2K(program="cp2k"), water()
    hexagonal.set_cell([[4, 0, 0], [-2, 3.46, 0], [0, 0, 6]])
    with pytest.raises(GenerationError, match="edges along x, y and z"):
        engine.input_text(hexagonal)
    with pytest.raises(GenerationError, match="pbc="):
        engine.input_text(molecule("H2O", vacuum=3))
    with pytest.raises(GenerationError, match="28 is no product of 2, 3"):
        engine.input_text(water((3.5, 4.0, 4.0)))


def test_program_that_is_named_but_missing(monkeypatch) -> None:
    monkeypatch.setenv("DENSITYKIT_CP2K", "/nowhere/cp2k")
    with pytest.raises(GenerationError, match="no CP2K: /nowhere/cp2k not found"):
        executable()


@needs_cp2k
def test_a_molecule_of_water() -> None:
    """Electrons, forces as slopes of the energy, and the density moved by one point."""
    atoms = water((4.0, 4.5, 5.0))
    with CP2K(threshold=1e-6) as engine:
        atoms.calc = engine
        forces, rho = atoms.get_forces(), engine.density()
        assert rho.shape == (16, 18, 20) and rho.min() > -1e-4
        assert n_electrons(rho, atoms.cell.array) == pytest.approx(8, abs=0.1)
        energies = []
        for h in (-0.01, 0.01):
            moved = atoms.copy()
            moved.positions[1] += [h, 0, 0]
            moved.calc = engine
            energies.append(moved.get_potential_energy())
        assert forces[1, 0] == pytest.approx((energies[0] - energies[1]) / 0.02, abs=0.05)
        atoms.positions[:, 2] += atoms.cell[2, 2] / rho.shape[2]
        atoms.get_potential_energy()
        np.testing.assert_allclose(engine.density(), np.roll(rho, 1, axis=2), atol=1e-4)


@needs_cp2k
def test_jobs_take_it() -> None:
    atoms = water((4.0, 4.5, 5.0))
    result = evaluate(gaussians_and_plane_waves, atoms, grid_shape(atoms, 0.25))
    close_engines()
    assert "error" not in result and result["density"].shape == (16, 18, 20)
    assert '"engine": "CP2K ' in result["description"]
