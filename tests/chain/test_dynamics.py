"""Molecular dynamics of the one-dimensional chains: conservation, reversibility, interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from densitykit.chain import dynamics as chain
from densitykit.chain.data_sets import chain_dataset
from densitykit.chain.dynamics import SYSTEMS, simulate_chain
from densitykit.chain.kohn_sham import ReducedHartreeFock1D
from densitykit.errors import GenerationError, UnfinishedError
from densitykit.io.reader import open_split, open_trajectory
from densitykit.io.validate import validate_trajectory
from densitykit.units import ATOMIC_TIME, BOHR, HARTREE

#: coarse, for speed: energies are those of the basis, and conserved whatever it is
QUICK = {"cutoff": 4.0, "progress": False}


def run(path: Path, **options: object) -> dict[str, np.ndarray]:
    """Simulate, and give everything in atomic units."""
    with open_trajectory(simulate_chain(path, **({**QUICK, **options}))) as ds:
        return {
            "t": ds.time.values / ATOMIC_TIME,
            "R": ds.positions.values[..., 0] / BOHR,
            "v": ds.velocities.values[..., 0] / (BOHR / ATOMIC_TIME),
            "F": ds.forces.values[..., 0] / (HARTREE / BOHR),
            "A": ds.energy.values / HARTREE,
            "E": ds.conserved_energy.values / HARTREE,
            "rho": ds.density.values * BOHR,
            "T": ds.temperature.values,
            "iterations": ds.iterations.values,
            "step": ds.step.values,
        }


def test_frames_are_solutions_of_the_model(tmp_path: Path) -> None:
    """Positions, forces, energies and densities read back are those of a fresh calculation."""
    data = run(tmp_path / "a.zarr", system="mixed", n_steps=12, stride=6, seed=3)
    for frame in (0, 2):
        R = data["R"][frame]
        solution = ReducedHartreeFock1D(R, [1.0] * 4 + [6.0] * 4, cutoff=4.0).solve()
        np.testing.assert_allclose(data["F"][frame], solution.forces, atol=1e-8)
        np.testing.assert_allclose(data["A"][frame], solution.energy, atol=1e-12)
        np.testing.assert_allclose(data["rho"][frame], solution.density, rtol=2e-7)
    sites = 10.0 * np.arange(8) + 5
    start = sites + np.random.default_rng(3).uniform(-3, 3, 8)
    np.testing.assert_allclose(data["R"][0], start, rtol=1e-12)
    np.testing.assert_allclose(data["t"], [0.0, 0.6, 1.2], atol=1e-12)
    assert data["step"].tolist() == [0, 6, 12] and (data["v"][0] == 0).all()


def test_motion_obeys_newton(tmp_path: Path) -> None:
    """Central differences of positions and velocities, and the role of the mass."""
    data = run(tmp_path / "a.zarr", system="metal", n_steps=30, stride=1, mass=2.5)
    h = data["t"][1]
    velocity = (data["R"][2:] - data["R"][:-2]) / (2 * h)
    np.testing.assert_allclose(velocity, data["v"][1:-1], atol=1e-12)
    acceleration = (data["R"][2:] - 2 * data["R"][1:-1] + data["R"][:-2]) / h**2
    np.testing.assert_allclose(2.5 * acceleration, data["F"][1:-1], atol=1e-9)
    assert np.abs(data["F"]).max() > 0.005
    kinetic = 0.5 * 2.5 * (data["v"] ** 2).sum(axis=1)
    np.testing.assert_allclose(data["E"], data["A"] + kinetic, atol=1e-12)
    np.testing.assert_allclose(data["T"], 2 * kinetic / 7 * 315775.02, rtol=1e-7)


@pytest.mark.parametrize("system", SYSTEMS)
def test_energy_is_conserved(tmp_path: Path, system: str) -> None:
    """The error falls with the square of the time step: the integrator's, not the forces'."""
    errors = []
    for step in (2.0, 1.0):
        path = tmp_path / f"{step}.zarr"
        data = run(path, system=system, time_step=step, n_steps=round(24 / step), stride=1)
        errors.append(np.abs(data["E"] - data["E"][0]).max())
        assert np.ptp(data["A"]) > 30 * errors[-1]
        np.testing.assert_allclose(data["v"].sum(axis=1), 0, atol=1e-7)
    assert 2.5 < errors[0] / errors[1] < 6.5


def test_extrapolation_saves_iterations(tmp_path: Path) -> None:
    data = run(tmp_path / "a.zarr", system="insulator", n_steps=40, stride=1)
    assert data["iterations"][8:].mean() < 5


def test_the_same_seed_gives_the_same_and_another_does_not(tmp_path: Path) -> None:
    a, b, c = (
        run(tmp_path / f"{i}.zarr", n_steps=2, stride=1, seed=s) for i, s in enumerate((1, 1, 2))
    )
    np.testing.assert_array_equal(a["R"], b["R"])
    assert np.abs(a["R"] - c["R"]).max() > 0.1


def test_widths_and_species(tmp_path: Path) -> None:
    path = simulate_chain(tmp_path / "a.zarr", (0.8, 6.0, 6.0, 1.2), n_steps=0, **QUICK)
    with open_trajectory(path) as ds:
        assert ds.numbers.values.tolist() == [1, 3, 3, 2]  # 0.8 and 1.2 both round to 1
        assert json.loads(ds.attrs["recipe"])["widths_bohr"] == [0.8, 6.0, 6.0, 1.2]
        assert ds.sizes["x"] == 80 and ds.cell.item() / BOHR == pytest.approx(40)
    with open_trajectory(simulate_chain(tmp_path / "b.zarr", "mixed", n_steps=0, **QUICK)) as ds:
        assert ds.numbers.values.tolist() == [1] * 4 + [6] * 4


# --- interruptions -----------------------------------------------------------------------------

SCRIPT = """
import sys
from densitykit.chain.dynamics import simulate_chain
simulate_chain(sys.argv[1], "metal", n_steps=260, stride=5, cutoff=4.0, progress=False)
"""


def test_killed_run_continues_identically(tmp_path: Path) -> None:
    """SIGKILL somewhere after the first saved state; then the rest, and no trace of it."""
    path = tmp_path / "killed.zarr"
    state = tmp_path / ".killed.zarr.state.npz"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if state.exists() and (path / "time").exists():
            with np.load(state) as saved:
                if saved["step"] >= 100:
                    break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open_trajectory(path) as ds:
        before = ds.sizes["time"]
    assert 20 <= before < 53, "the run was to be killed half way"
    options = {"system": "metal", "n_steps": 260, "stride": 5}
    killed, whole = run(path, **options), run(tmp_path / "whole.zarr", **options)
    for name in ("R", "v", "F", "A", "rho"):
        np.testing.assert_allclose(killed[name], whole[name], rtol=1e-12, atol=1e-12)
    assert not state.exists() and validate_trajectory(path) == []


def test_continuing_repeats_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by an error at step 27, with a state saved every 25: two steps are repeated."""
    monkeypatch.setattr(chain, "CHECKPOINT_STEPS", 25)
    advance, steps = chain._Dynamics.advance, []

    def stop_at_27(self: object) -> None:
        if self.state.step == 27 and 27 not in steps:
            steps.append(27)
            raise KeyboardInterrupt
        steps.append(self.state.step)
        advance(self)

    monkeypatch.setattr(chain._Dynamics, "advance", stop_at_27)
    options = {"system": "metal", "n_steps": 40, "stride": 1}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a.zarr", **options)
    data = run(tmp_path / "a.zarr", **options)
    assert steps == [*range(27), 27, 25, 26, *range(27, 40)]
    np.testing.assert_array_equal(data["step"], np.arange(41))
    steps.append(27)
    whole = run(tmp_path / "b.zarr", **options)
    np.testing.assert_allclose(data["R"], whole["R"], rtol=1e-12)


def test_finished_run_is_left_alone_and_another_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a.zarr", n_steps=2, stride=1)
    before = (tmp_path / "a.zarr" / "zarr.json").stat().st_mtime_ns
    run(tmp_path / "a.zarr", n_steps=2, stride=1)
    assert (tmp_path / "a.zarr" / "zarr.json").stat().st_mtime_ns == before
    with pytest.raises(UnfinishedError, match="time_step_au is 0.1, not 0.2; .*another path"):
        run(tmp_path / "a.zarr", n_steps=2, stride=1, time_step=0.2)
    anew = run(tmp_path / "a.zarr", n_steps=2, stride=1, time_step=0.2, restart=True)
    whole = run(tmp_path / "b.zarr", n_steps=2, stride=1, time_step=0.2)
    np.testing.assert_array_equal(anew["R"], whole["R"])


def test_a_state_belongs_to_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed early, its store removed, another one at the same path: nothing is left."""
    path, options = tmp_path / "a.zarr", {"system": "metal", "n_steps": 4, "stride": 2}

    def killed(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chain._Dynamics, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            run(path, seed=1, **options)
    assert (tmp_path / ".a.zarr.state.npz").exists()
    with pytest.raises(
        UnfinishedError, match="a.zarr: begun with another recipe: seed is 1, not 2"
    ):
        run(path, seed=2, **options)
    kept = path.rename(tmp_path / "kept.zarr")
    run(path, seed=2, **options | {"n_steps": 0})  # nothing of seed 1 is taken over
    shutil.rmtree(path)
    kept.rename(path)
    run(path, seed=1, **options)
    shutil.rmtree(path)
    again, whole = run(path, seed=2, **options), run(tmp_path / "b.zarr", seed=2, **options)
    np.testing.assert_array_equal(again["R"], whole["R"])


# --- data sets ---------------------------------------------------------------------------------


def test_dataset_has_runs_and_splits(tmp_path: Path) -> None:
    steps = {"train": range(0, 20, 4), "validation": range(20, 25, 2), "test": (7, 26, 28)}
    options = {"steps": steps, "transfer_steps": (1, 2), "progress": False, "cutoff": 2.0}
    made = chain_dataset(tmp_path, ["metal"], **options)
    assert made == [tmp_path / "metal.zarr"] and list(tmp_path.iterdir()) == made
    for name, expected in {**steps, "test": (26, 28), "test-within": (7,)}.items():
        with open_split(made[0], name) as ds:
            assert ds.step.values.tolist() == list(expected)
            np.testing.assert_allclose(ds.time.values, ds.step.values * 0.1 * ATOMIC_TIME)
            assert np.isfinite(ds.forces.values).all()
    with open_split(made[0], "transfer") as ds:
        assert dict(ds.sizes) | {"atom": 32, "x": 640, "time": 2} == dict(ds.sizes)
    assert chain_dataset(tmp_path, ["metal"], **options) == made  # nothing to do
    direct = run(tmp_path / "direct.zarr", system="metal", n_steps=7, stride=7, cutoff=2.0)
    with open_split(made[0], "test-within") as ds:
        np.testing.assert_allclose(ds.density.values[0] * BOHR, direct["rho"][1], rtol=3e-7)


# --- bad input ---------------------------------------------------------------------------------

BAD = {
    "system": ({"system": "liquid"}, "system is 'liquid'; choose one of"),
    "odd mixed": ({"system": "mixed", "n_atoms": 7}, "n_atoms is 7; give a positive multiple"),
    "no atoms": ({"n_atoms": 0}, "n_atoms is 0"),
    "mass": ({"mass": 0.0}, "mass is 0.0; give a positive"),
    "time step": ({"time_step": np.inf}, "time_step is inf"),
    "steps": ({"steps": [0, 5, 5]}, "steps is .*; give ascending"),
    "displacement": ({"displacement": 7.0}, "displacement is 7.0; give"),
    "widths": ({"system": (1.0, -2.0)}, "widths is -2.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(GenerationError, match=message):
        simulate_chain(tmp_path / "a.zarr", **(QUICK | arguments))
    assert list(tmp_path.iterdir()) == []


def test_bad_system_of_a_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="system is 'glass'; choose"):
        chain_dataset(tmp_path, ["glass"], progress=False)
