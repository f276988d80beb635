"""Real plane-wave DFT on cells of two atoms, and what happens when the worker dies.

These tests need the environment that `make espresso` makes (`make test` tries to).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ase", reason="needs densitykit[dft]")

from ase import Atoms
from ase.build import bulk
from ase.units import Ry

from densitykit.errors import GenerationError
from densitykit.fields import n_electrons, resample
from densitykit.generate.dynamics import molecular_dynamics
from densitykit.generate.espresso import Espresso, make_environment, worker_python
from densitykit.io.reader import open_trajectory

BUNDLED = Path(__file__).parents[2] / "data" / "lithium-800K.zarr" / "run-1"
LITHIUM = {"cutoff": 16 * Ry, "k_points": (2, 2, 2), "temperature": 800.0, "bands": 21}

try:
    worker_python()
except GenerationError as error:
    no_worker = str(error)
else:
    no_worker = ""
needs_worker = pytest.mark.skipif(bool(no_worker), reason=no_worker)


def lithium() -> Atoms:
    atoms = bulk("Li", "bcc", a=3.49, cubic=True)
    atoms.positions += [[0.1, 0.05, -0.08], [-0.05, 0.0, 0.03]]
    return atoms


@pytest.fixture(scope="module")
def engine():
    with Espresso(12 * Ry, (2, 2, 2), temperature=3000.0, threshold=1e-9 * Ry) as engine:
        yield engine


def solve(engine: Espresso, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    atoms.calc = engine
    return atoms.get_potential_energy(), atoms.get_forces(), engine.density()


@needs_worker
def test_density_counts_the_valence_electrons(engine) -> None:
    atoms = lithium()
    rho = solve(engine, atoms)[2]
    assert n_electrons(rho, atoms.cell.array) == pytest.approx(2, abs=1e-6)
    assert rho.min() > 0
    coarse = engine.density((8, 8, 8))
    np.testing.assert_allclose(coarse, resample(rho, (8, 8, 8)))
    assert n_electrons(coarse, atoms.cell.array) == pytest.approx(2, abs=1e-6)


@needs_worker
def test_a_good_density_is_a_good_start(engine) -> None:
    atoms = lithium()
    energy, _, rho = solve(engine, atoms)
    options = {"temperature": 3000.0, "threshold": 1e-7 * Ry, "extrapolation": "atomic"}
    with Espresso(12 * Ry, (2, 2, 2), **options) as fresh:
        atomic = fresh.get_potential_energy(atoms), fresh.iterations
        fresh.start_from(resample(rho, (10, 10, 10)))
        assert fresh.get_potential_energy(atoms) == pytest.approx(energy, abs=1e-5)
        assert atomic[0] == pytest.approx(energy, abs=1e-5)
        assert fresh.iterations < atomic[1]
        disturbed = rho * (1 + 0.05 * np.cos(2 * np.pi * np.arange(len(rho)) / len(rho)))
        errors = [fresh.one_shot(atoms, guess) - energy for guess in (rho, disturbed)]
    assert abs(errors[0]) < 1e-5 and 1e-4 < abs(errors[1]) < 0.1


@needs_worker
def test_forces_are_derivatives_of_the_free_energy(engine) -> None:
    atoms, h = lithium(), 0.01
    forces = solve(engine, atoms)[1]
    for axis in (0, 2):
        energies = []
        for step in (-2, -1, 1, 2):
            moved = lithium()
            moved.positions[0, axis] += step * h
            energies.append(solve(engine, moved)[0])
        slope = np.dot([1, -8, 8, -1], energies) / (12 * h)
        assert forces[0, axis] == pytest.approx(-slope, abs=2e-4)
    assert np.abs(forces.sum(axis=0)).max() < 1e-4
    assert np.abs(forces).max() > 0.05


@needs_worker
def test_moving_all_atoms_moves_the_density(engine) -> None:
    """One grid step along x: the same energy, and the density one point further on."""
    energy, forces, rho = solve(engine, lithium())
    moved = lithium()
    moved.positions[:, 0] += moved.cell[0, 0] / rho.shape[0]
    its_energy, its_forces, its_rho = solve(engine, moved)
    assert its_energy == pytest.approx(energy, abs=1e-6)
    np.testing.assert_allclose(its_forces, forces, atol=1e-4)
    shifted = np.roll(rho, 1, axis=0)
    assert np.linalg.norm(its_rho - shifted) < 1e-4 * np.linalg.norm(rho)


@needs_worker
def test_another_cell_gets_another_worker(engine) -> None:
    energy = solve(engine, lithium())[0]
    wide = lithium()
    wide.set_cell(wide.cell * 1.1, scale_atoms=True)
    assert abs(solve(engine, wide)[0] - energy) > 0.01
    assert solve(engine, lithium())[0] == pytest.approx(energy, abs=1e-5)


@needs_worker
def test_description_names_what_a_reader_needs(engine) -> None:
    solve(engine, lithium())
    description = engine.description()
    assert description["pseudopotential"] == "Li GTH-PBE-q1"
    assert description["cutoff_rydberg"] == 12
    assert description["k_points"] == "shifted 2x2x2"
    assert description["smearing"] == "Fermi-Dirac, 3000 K"
    assert "7.2" in description["engine"]
    assert "openblas" in description["blas"]


@needs_worker
def test_a_worker_that_dies_says_so_with_its_log() -> None:
    with Espresso(8 * Ry, (1, 1, 1), temperature=3000.0) as engine:
        atoms = lithium()
        solve(engine, atoms)
        scratch = engine._worker.scratch
        engine._worker._process.kill()
        atoms.rattle(0.01)
        with pytest.raises(GenerationError, match=r"ended with status -9(.|\n)*pw\.log"):
            atoms.get_potential_energy()
    assert not scratch.exists()


@needs_worker
def test_input_that_quantum_espresso_refuses() -> None:
    atoms = lithium()
    with (
        Espresso(8 * Ry, (1, 1, 1), temperature=300.0, mixing_mode="nonsense") as engine,
        pytest.raises(GenerationError, match="mixing"),
    ):
        solve(engine, atoms)


@needs_worker
def test_no_self_consistency_is_an_error() -> None:
    with (
        Espresso(8 * Ry, (1, 1, 1), temperature=300.0, max_iterations=1) as engine,
        pytest.raises(GenerationError, match="self-consistency not reached"),
    ):
        solve(engine, lithium())


def solve_frame(engine: Espresso, frame) -> np.ndarray:
    atoms = Atoms(frame.numbers.values, frame.positions.values, cell=frame.cell.values, pbc=True)
    return solve(engine, atoms)


@pytest.mark.slow
@needs_worker
def test_bundled_lithium_is_reproduced(tmp_path) -> None:
    """The settings on the data card give the stored density, energy and forces."""
    frame = open_trajectory(BUNDLED).isel(time=0).load()
    with Espresso(**LITHIUM, folder=tmp_path) as engine:
        energy, forces, rho = solve_frame(engine, frame)
    assert energy == pytest.approx(float(frame.energy), abs=1e-3)
    assert np.abs(forces - frame.forces.values).max() < 3e-3
    difference = resample(rho, frame.density.shape) - frame.density.values
    assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(frame.density)


@pytest.mark.slow
@needs_worker
def test_bundled_lithium_goes_on(tmp_path) -> None:
    """Two steps from a stored frame give the next one, up to the thermostat's random numbers."""
    frames = open_trajectory(BUNDLED).isel(time=slice(0, 2)).load()
    first = frames.isel(time=0)
    atoms = Atoms(first.numbers.values, first.positions.values, cell=first.cell.values, pbc=True)
    atoms.set_velocities(first.velocities.values * 10.180505671156725)  # per fs to per ASE's time
    with Espresso(**LITHIUM, folder=tmp_path) as engine:
        path = molecular_dynamics(
            atoms, engine, tmp_path / "run", 2, time_step=3.0, grid=(24, 24, 24), interval=2
        )
    second = open_trajectory(path).isel(time=1).load()
    assert np.abs(second.positions.values - frames.positions[1].values).max() < 3e-3
    difference = second.density.values - frames.density[1].values
    assert np.linalg.norm(difference) < 5e-3 * np.linalg.norm(second.density)


# without a worker


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoff": -1.0}, "cutoff=-1.0"),
        ({"cutoff": 200.0, "temperature": -5.0}, "temperature=-5.0"),
        ({"cutoff": 200.0, "extrapolation": "cubic"}, "extrapolation='cubic'"),
        ({"cutoff": 200.0, "k_points": (2, 2)}, r"k_points=\(2, 2\)"),
    ],
)
def test_bad_settings_are_refused(options, message) -> None:
    with pytest.raises(GenerationError, match=message):
        Espresso(python="python", **options)


def test_bad_atoms_are_refused() -> None:
    engine = Espresso(200.0, python="python")
    with pytest.raises(GenerationError, match="periodic in three"):
        solve(engine, Atoms("Li", cell=[4, 4, 4]))
    with pytest.raises(GenerationError, match="there is no density yet"):
        engine.density((4, 4, 4))
    with pytest.raises(GenerationError, match="no such pseudopotential for Li"):
        solve(Espresso(200.0, pseudopotentials={"Li": "no.UPF"}, python="python"), lithium())


def test_missing_environment_says_how_to_make_one(monkeypatch) -> None:
    monkeypatch.setenv("DENSITYKIT_ESPRESSO_PYTHON", "/nowhere/python")
    with pytest.raises(GenerationError, match="/nowhere/python not found; make one"):
        worker_python()


def test_input_file_says_what_was_asked_for() -> None:
    text = Espresso(10 * Ry, (3, 2, 1), shifted=False, bands=7, python="python").input_text(
        lithium()
    )
    assert "ecutwfc=10.0" in text and "nbnd=7" in text and "occupations='fixed'" in text
    assert "K_POINTS automatic\n3 2 1 0 0 0" in text
    assert "K_POINTS gamma" in Espresso(10 * Ry, python="python").input_text(lithium())


@pytest.mark.parametrize("name", ["a folder", "a file"])
def test_a_folder_with_something_else_is_no_environment(name, tmp_path) -> None:
    folder = tmp_path / name
    if name == "a folder":
        folder.mkdir()
    kept = folder / "thesis.tex" if folder.is_dir() else folder
    kept.write_text("years of work")
    with pytest.raises(GenerationError, match=f"{name}: no virtual environment; choose"):
        make_environment(folder)
    assert kept.read_text() == "years of work"
