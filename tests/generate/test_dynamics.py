"""Molecular dynamics on springs: conservation, temperature, and what a kill may cost."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ase", reason="needs densitykit[dft]")

from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes

from densitykit.errors import GenerationError, UnfinishedError
from densitykit.generate.dynamics import energy_drift, molecular_dynamics
from densitykit.io.reader import open_trajectory
from densitykit.io.validate import validate_trajectory
from densitykit.io.writer import TrajectoryWriter

EDGE, GRID = 6.0, (8, 8, 8)


class Springs(Calculator):
    """Every pair tied by an anharmonic spring; the density is one Gaussian an atom."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, log: Path | None = None, delay: float = 0.0) -> None:
        super().__init__()
        self.log, self.delay, self.calls = log, delay, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        if self.log:
            with self.log.open("a") as log:
                log.write("call\n")
        time.sleep(self.delay)
        d = self.atoms.positions[:, None] - self.atoms.positions[None]
        r2 = np.sum(d**2, axis=-1)
        k = 0.2 / len(d)
        self.results["energy"] = 0.25 * k * np.sum(r2 + 0.02 * r2**2)
        self.results["forces"] = -k * np.sum((1 + 0.04 * r2)[..., None] * d, axis=1)

    def density(self, shape) -> np.ndarray:
        axes = [np.arange(n) / n for n in shape]
        r = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        d = (r[None] - self.atoms.positions[:, None, None, None] / EDGE + 0.5) % 1 - 0.5
        return np.exp(-np.sum((EDGE * d) ** 2, axis=-1)).sum(axis=0)

    def description(self) -> dict[str, object]:
        return {"engine": "springs"}


def atoms(n: int = 4, moving: bool = True) -> Atoms:
    rng = np.random.default_rng(3)
    system = Atoms(f"Li{n}", rng.uniform(1, 5, (n, 3)), cell=[EDGE] * 3, pbc=True)
    if moving:
        system.set_velocities(rng.normal(size=(n, 3)) * 0.05)
    return system


def run(path: Path, n_steps: int, engine: Springs | None = None, **options) -> Path:
    settings = {"time_step": 0.5, "grid": GRID, "interval": 2} | options
    return molecular_dynamics(atoms(), engine or Springs(), path, n_steps, **settings)


def test_nve_conserves_energy_to_second_order(tmp_path) -> None:
    spread = []
    for name, time_step in (("coarse", 2.0), ("fine", 1.0)):
        path = run(tmp_path / name, round(80 / time_step), time_step=time_step, interval=1)
        spread.append(float(open_trajectory(path).conserved_energy.std()))
    assert spread[1] < 1e-4
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.3)


def test_frames_hold_what_the_integrator_did(tmp_path) -> None:
    frames = open_trajectory(run(tmp_path / "run", 20, interval=1, time_step=0.1)).load()
    assert validate_trajectory(tmp_path / "run") == []
    np.testing.assert_allclose(frames.time, 0.1 * np.arange(21))
    np.testing.assert_array_equal(frames.step, np.arange(21))
    centred = (frames.positions[2:].values - frames.positions[:-2].values) / 0.2
    np.testing.assert_allclose(centred, frames.velocities[1:-1], atol=1e-5)
    mass = atoms().get_masses()[0]
    acceleration = (frames.velocities[2:].values - frames.velocities[:-2].values) / 0.2
    forces = mass * acceleration / units.fs**2
    np.testing.assert_allclose(forces, frames.forces[1:-1], rtol=1e-3, atol=1e-3)
    momentum = np.abs(frames.velocities.sum("atom")).max()
    assert float(momentum) < 1e-12
    kinetic = 0.5 * mass * np.sum(frames.velocities.values**2, axis=(1, 2)) / units.fs**2
    np.testing.assert_allclose(frames.temperature, kinetic / (4.5 * units.kB), rtol=1e-10)
    np.testing.assert_allclose(frames.conserved_energy, frames.energy + kinetic, rtol=1e-12)


def test_thermostat_reaches_the_temperature_and_accounts_for_its_heat(tmp_path) -> None:
    """189 degrees of freedom: a relative variance of 2/189, correlated over some 40 fs."""
    options = {"temperature": 600.0, "relaxation": 20.0, "time_step": 2.0, "interval": 2}
    path = molecular_dynamics(atoms(64), Springs(), tmp_path / "a", 400, grid=(2,) * 3, **options)
    frames = open_trajectory(path).load()
    settled = frames.temperature.values[50:]
    assert float(frames.temperature[0]) < 300
    error = 600 * np.sqrt(2 / 189 / (len(settled) * 4 / 40))
    assert abs(settled.mean() - 600) < 4 * error
    assert float(frames.conserved_energy.std()) < 0.01 * float(frames.energy.std())
    assert frames.attrs["ensemble"] == "NVT" and "20 fs" in frames.attrs["thermostat"]


def test_velocities_are_drawn_for_the_temperature(tmp_path) -> None:
    cold = atoms(moving=False)
    molecular_dynamics(
        cold, Springs(), tmp_path / "a", 1, time_step=0.5, grid=GRID, temperature=50
    )
    assert float(open_trajectory(tmp_path / "a").temperature[0]) == pytest.approx(50)


@pytest.mark.parametrize("temperature", [None, 300.0])
def test_interrupted_run_continues_bit_for_bit(tmp_path, temperature) -> None:
    whole = open_trajectory(run(tmp_path / "whole", 30, temperature=temperature)).load()
    for last in (7, 8, 19, 30):  # ends between frames and on them
        run(tmp_path / "parts", last, temperature=temperature, seed=0)
    parts = open_trajectory(tmp_path / "parts").load()
    assert parts.identical(whole.assign_attrs(parts.attrs))
    assert validate_trajectory(tmp_path / "parts") == []


def test_a_finished_run_computes_nothing(tmp_path) -> None:
    run(tmp_path / "run", 10)
    engine = Springs()
    run(tmp_path / "run", 10, engine)
    assert engine.calls == 0


def test_dying_between_state_and_frame_loses_no_step(tmp_path, monkeypatch) -> None:
    whole = open_trajectory(run(tmp_path / "whole", 12)).load()
    append = TrajectoryWriter.append
    engine = Springs()

    def dies(writer, density, time, **rest) -> int:
        if time == 3.0:
            raise KeyboardInterrupt
        return append(writer, density, time, **rest)

    monkeypatch.setattr(TrajectoryWriter, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", 12, engine)
    monkeypatch.undo()
    run(tmp_path / "run", 12, engine)
    parts = open_trajectory(tmp_path / "run").load()
    assert parts.identical(whole.assign_attrs(parts.attrs))
    assert engine.calls == 13  # the first configuration and twelve steps


def test_dying_before_the_first_frame_starts_again(tmp_path, monkeypatch) -> None:
    whole = open_trajectory(run(tmp_path / "whole", 6, temperature=300.0)).load()
    monkeypatch.setattr("densitykit.generate.dynamics._resume", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", 6, temperature=300.0)
    monkeypatch.undo()
    parts = open_trajectory(run(tmp_path / "run", 6, temperature=300.0)).load()
    assert parts.identical(whole.assign_attrs(parts.attrs))


def test_killed_again_and_again(tmp_path) -> None:
    """SIGKILL at any moment: the same trajectory, and no finished step computed twice."""
    log, path, n_steps = tmp_path / "calls.log", tmp_path / "run.zarr", 36
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_dynamics import Springs, run
        run(Path({str(path)!r}), {n_steps}, Springs(Path({str(log)!r}), 0.02), temperature=300.0)
        """
    )
    rng, kills = np.random.default_rng(0), 0

    def calls() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    while True:
        most = calls() + rng.integers(8, 14)
        child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        while child.poll() is None and calls() < most:
            time.sleep(0.001)
        time.sleep(0.05 * rng.random())
        child.kill()  # does nothing to one that is done
        if child.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    assert n_steps + 1 <= calls() <= n_steps + 1 + kills  # what was in flight when it was killed
    whole = open_trajectory(run(tmp_path / "whole", n_steps, temperature=300.0)).load()
    parts = open_trajectory(path).load()
    assert parts.identical(whole.assign_attrs(parts.attrs))


def test_without_a_state_file_it_continues_from_the_last_frame(tmp_path) -> None:
    path = run(tmp_path / "run", 20, temperature=300.0, interval=5)
    (tmp_path / "run.state.npz").unlink()
    run(path, 40, temperature=300.0, interval=5, seed=7)
    frames = open_trajectory(path).load()
    np.testing.assert_allclose(frames.time, 2.5 * np.arange(9))
    np.testing.assert_array_equal(frames.step, 5 * np.arange(9))
    assert float(frames.conserved_energy.std()) < 1e-3  # continuous across the join


def test_energy_drift_is_a_slope_per_atom(tmp_path) -> None:
    frames = open_trajectory(run(tmp_path / "run", 10)).load()
    frames["conserved_energy"] = 1.0 + 4e-3 * frames.time / 1000  # 4 meV/ps on four atoms
    assert energy_drift(frames) == pytest.approx(1.0)


def test_another_system_or_time_step_is_refused(tmp_path) -> None:
    path = run(tmp_path / "run", 4)
    for change, named in (
        ({"time_step": 1.0}, "time_step_fs is 0.5, not 1.0"),
        ({"temperature": 300.0}, "ensemble is NVE, not NVT; thermostat is none, not .*300 K"),
        ({"interval": 1}, "interval is 2, not 1"),
        ({"seed": 1}, r"run\.state\.npz: .*seed is 0, not 1"),
    ):
        with pytest.raises(UnfinishedError, match=f"{named}.*--restart"):
            run(path, 8, **change)
    other = atoms()
    other.numbers[0] = 13
    options = {"time_step": 0.5, "grid": GRID}
    with pytest.raises(UnfinishedError, match=r"numbers is \[3, 3, 3, 3\], not \[13, 3, 3, 3\]"):
        molecular_dynamics(other, Springs(), path, 8, **options)
    with pytest.raises(UnfinishedError, match=r"numbers is \[3, 3, 3, 3\], not \[3, 3, 3, 3, 3\]"):
        molecular_dynamics(atoms(5), Springs(), path, 8, **options)
    moved = atoms()
    moved.positions[1, 2] += 0.01
    for other in (moved, atoms(moving=False)):
        with pytest.raises(UnfinishedError, match="positions and velocities at the start is"):
            molecular_dynamics(other, Springs(), path, 8, interval=2, **options)
    with pytest.raises(GenerationError, match="time_step=0"):
        run(path, 8, time_step=0.0)
    assert open_trajectory(path).sizes["time"] == 3
    anew = open_trajectory(run(path, 4, restart=True, time_step=1.0)).load()
    np.testing.assert_array_equal(anew.time, [0, 2, 4])


def test_a_broken_state_file_is_named(tmp_path) -> None:
    path = run(tmp_path / "run", 4)
    (tmp_path / "run.state.npz").write_bytes(b"not a state")
    with pytest.raises(UnfinishedError, match=r"run\.state\.npz.*remove the file"):
        run(path, 8)


def test_a_trajectory_of_something_else_is_not_continued(tmp_path) -> None:
    from densitykit.io.writer import create_trajectory

    writer = create_trajectory(
        tmp_path / "rho", n_frames=2, grid=GRID, cell=EDGE, numbers=atoms().numbers
    )
    writer.append(np.ones(GRID), 0.0, positions=atoms().positions)
    with pytest.raises(GenerationError, match="lacks conserved_energy, step"):
        run(tmp_path / "rho", 8)


def test_a_failing_engine_leaves_nothing_behind(tmp_path) -> None:
    class Fails(Springs):
        def calculate(self, *_) -> None:
            raise GenerationError("no convergence")

    with pytest.raises(GenerationError):
        run(tmp_path / "run", 4, Fails())
    assert not any(tmp_path.iterdir())
