"""Films: a force field moves the atoms, and a map draws what they look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

pytest.importorskip("ase", reason="needs densitykit[dft]")

from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.md.velocitydistribution import thermalize_momenta

from densitykit.cli import main
from densitykit.errors import CheckpointError, GenerationError
from densitykit.generate.dynamics import energy_drift
from densitykit.generate.film import Film, UncertainForces, film, force_error, force_field
from densitykit.io.reader import open_trajectory
from densitykit.io.validate import validate_trajectory
from densitykit.models import load_model
from densitykit.training.linear import atoms_of

CHECKPOINTS = Path(__file__).parents[2] / "data" / "checkpoints"
ALUMINIUM = CHECKPOINTS / "deep-density-aluminium"


@pytest.fixture(scope="module")
def model():
    return load_model(ALUMINIUM)


@pytest.fixture
def atoms() -> Atoms:
    atoms = bulk("Al", a=4.1, cubic=True)
    thermalize_momenta(atoms, temperature_K=600, rng=np.random.default_rng(0))
    return atoms


def test_a_film_keeps_energy_and_draws_where_atoms_are(model, atoms, tmp_path) -> None:
    path = film(atoms, "emt", model, tmp_path / "a.zarr", 20, interval=10, spacing=0.5)
    run = open_trajectory(path).load()
    assert validate_trajectory(path) == []
    assert run.sizes["time"] == 3 and np.abs(energy_drift(run)) < 100
    assert np.ptp(run["energy"].values) > 10 * np.ptp(run["conserved_energy"].values)
    for i in range(3):
        rho = model.density(atoms_of(run, i), run["density"].shape[1:])
        assert rho.min() > -1e-3  # at a nucleus, whose core is a pseudopotential
        expected = np.maximum(rho, 0)
        np.testing.assert_allclose(run["density"][i].values, expected, rtol=1e-5, atol=1e-6)
    assert run.attrs["forces"] == "emt" and run["valence_charge"].values.tolist() == [3] * 4


def test_a_film_goes_on_where_it_was(model, atoms, tmp_path) -> None:
    run = {"interval": 4, "spacing": 0.6, "temperature": 500.0, "seed": 1}
    film(atoms, EMT(), model, tmp_path / "parts.zarr", 4, **run)
    film(atoms, EMT(), model, tmp_path / "parts.zarr", 8, **run)
    film(atoms, EMT(), model, tmp_path / "whole.zarr", 8, **run)
    parts, whole = (open_trajectory(tmp_path / f"{n}.zarr").load() for n in ("parts", "whole"))
    np.testing.assert_allclose(parts["positions"], whole["positions"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(parts["density"], whole["density"], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(parts["time"], [0, 4, 8])


def test_what_the_map_has_not_seen_is_told(model) -> None:
    engine = Film(EMT(), model)
    close = Atoms("Al2", [[0, 0, 0], [0, 0, 1.5]], cell=[6, 6, 6], pbc=True)
    engine.get_potential_energy(close)
    with pytest.warns(UserWarning, match="13-13 come within 1.50"):
        engine.density((12, 12, 12))


def test_force_fields_have_names() -> None:
    assert isinstance(force_field("emt"), EMT)
    assert isinstance(force_field("ase.calculators.emt:EMT"), EMT)
    for name in ("no-such-field", "os:no_such_function", "no.such.module:f"):
        with pytest.raises(GenerationError, match=name.replace(".", r"\.")):
            force_field(name)
    with pytest.raises(GenerationError, match="LinearDensity has no force field"):
        force_field(str(ALUMINIUM))


def slope(atoms: Atoms, calculator: Calculator, atom: int, axis: int, h: float) -> float:
    """dE/dx by central differences."""
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[atom, axis] += sign * h
        energies.append(calculator.get_potential_energy(moved))
    return (energies[0] - energies[1]) / (2 * h)


def test_a_learned_force_field_is_a_calculator() -> None:
    field = force_field(str(CHECKPOINTS / "lithium-nuclear"))
    atoms = bulk("Li", "bcc", a=3.5, cubic=True).repeat(2)
    atoms.rattle(0.2, seed=0)
    forces = field.get_forces(atoms)
    assert np.abs(forces.sum(axis=0)).max() < 1e-8 < np.abs(forces).max()
    assert forces[3, 1] == pytest.approx(-slope(atoms, field, 3, 1, 1e-3), rel=1e-4)


def water() -> Atoms:
    single = molecule("H2O")  # O, H, H
    atoms = Atoms(cell=[6.2] * 3, pbc=True)
    for shift in np.ndindex(2, 2, 2):
        turned = single.copy()
        turned.rotate(40 * sum(shift), (1, 2, 3))
        turned.translate(3.1 * np.array(shift))
        atoms += turned
    return atoms


def test_flexible_water_is_a_calculator() -> None:
    pytest.importorskip("openmm", reason="needs densitykit[dft]")
    field, atoms = force_field("spcfw"), water()
    forces = field.get_forces(atoms)
    assert forces[4, 0] == pytest.approx(-slope(atoms, field, 4, 0, 0.01), rel=0.02, abs=0.02)
    with pytest.raises(GenerationError, match="each molecule written O, H, H"):
        field.get_potential_energy(atoms[[1, 0, 2]])


def test_a_film_needs_what_it_is_made_of(model, atoms, tmp_path) -> None:
    out = tmp_path / "a.zarr"
    with pytest.raises(GenerationError, match="no velocities"):
        film(bulk("Al", cubic=True), "emt", model, out, 5)
    with pytest.raises(GenerationError, match="give one that knows these atoms"):
        film(bulk("Fe", cubic=True), "emt", model, out, 5, temperature=300.0)
    with pytest.raises(CheckpointError, match="moves densities"):
        film(atoms, "emt", CHECKPOINTS / "lithium-nuclear", out, 5)
    assert not out.exists()


def test_the_command(atoms, tmp_path, capsys, monkeypatch) -> None:
    atoms.write(tmp_path / "atoms.xyz")
    command = ["film", f"{tmp_path}/atoms.xyz", f"{tmp_path}/out.zarr", "--force", "emt"]
    command += ["--density", str(ALUMINIUM), "--steps", "4", "--interval", "2"]
    command += ["--temperature", "600", "--spacing", "0.6"]
    monkeypatch.setattr("sys.argv", ["densitykit", *command])
    assert main() == 0
    assert "3 frames" in capsys.readouterr().out


class Still:
    """A field without forces."""

    def forces(self, positions: torch.Tensor, cell: object, numbers: object) -> torch.Tensor:
        return 0 * positions


def test_uncertain_forces_have_the_error_and_the_memory_that_they_are_given() -> None:
    field = UncertainForces(Still(), error=0.012, memory=24.0, interval=6.0, seed=1)
    x = torch.zeros(1, 100, 3, dtype=torch.float64)
    forces = torch.cat([field.forces(x, None, None) for _ in range(1500)]).numpy()
    np.testing.assert_allclose(forces.sum(axis=1), 0, atol=1e-12)
    run = xr.Dataset(
        {
            "positions": (("time", "atom", "cartesian"), np.zeros((1500, 100, 3))),
            "forces": (("time", "atom", "cartesian"), forces),
            "numbers": ("atom", np.full(100, 3)),
            "cell": (("vector", "cartesian"), 9.0 * np.eye(3)),
        },
        {"time": 6.0 * np.arange(1500)},
    )
    error, memory = force_error(Still(), run)
    assert error == pytest.approx(0.012 * (99 / 100) ** 0.5, rel=0.03)
    assert memory == pytest.approx(24.0, rel=0.1)


def test_members_of_an_ensemble_part_by_the_error_of_their_forces() -> None:
    field = UncertainForces(Still(), error=0.1, memory=24.0, interval=6.0)
    forces = field.forces(torch.zeros(3, 10, 3, dtype=torch.float64), None, None)
    assert not torch.allclose(forces[0], forces[1])
