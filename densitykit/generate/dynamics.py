r"""Ab-initio molecular dynamics, written straight into a trajectory, safe against being killed.

Nuclei move on the Born-Oppenheimer surface by velocity Verlet (Swope, Andersen, Berens, Wilson
1982). Without a temperature this is NVE, and the total energy is conserved up to the error of the
integrator and of self-consistency. With one it is NVT by stochastic velocity rescaling (Bussi,
Donadio, Parrinello 2007): before each step the kinetic energy K moves towards its canonical
distribution by a factor alpha^2 drawn from eq. A7, which leaves the directions of motion alone;
conserved is then :math:`E + K - \sum (\alpha^2 - 1) K`, the total energy less what the thermostat
has put in. The centre of mass is at rest: 3N - 3 degrees of freedom.

**Kill-safe.** After every step the whole state (step, positions, momenta, forces, thermostat and
random generator, and the density where this step is a frame) replaces the state file beside the
store in one piece; then the frame is appended. Wherever the process dies, the next call goes on
from the state: nothing committed is lost, no finished step is computed twice, and the numbers that
drive the dynamics continue bit for bit. (An engine that extrapolates orbitals starts afresh, so
its forces agree to its own threshold only.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xarray as xr
from ase import Atoms, units
from ase.constraints import FixCom
from ase.md.bussi import Bussi
from ase.md.verlet import VelocityVerlet
from numpy.typing import NDArray
from tqdm.std import tqdm

from densitykit.errors import GenerationError
from densitykit.generate.engine import Engine, valence_charges
from densitykit.io.progress import progress_bar
from densitykit.io.reader import open_trajectory
from densitykit.io.rebuild import extend_trajectory
from densitykit.io.store import locate
from densitykit.io.work import Work, as_recipe, check_store, discard, fingerprint
from densitykit.io.writer import TrajectoryWriter, create_trajectory

__all__ = ["energy_drift", "molecular_dynamics"]


@dataclass
class State:
    """All that the next step depends on; ASE's units (angstrom, eV, its own time)."""

    step: int
    origin: int  # a step that is a frame: every `interval`-th from here is one
    time: float  # fs
    time_step: float  # fs
    positions: NDArray[np.float64]  # (atom, 3)
    momenta: NDArray[np.float64]  # (atom, 3)
    forces: NDArray[np.float64]  # (atom, 3)
    energy: float
    transferred: float  # energy that the thermostat has put in
    generator: str  # state of the random generator, JSON
    density: NDArray[np.float64]  # of this step where it is a frame, else empty

    @classmethod
    def of(cls, values: Mapping[str, NDArray]) -> Self:
        """The state of arrays that `Work` has saved."""
        scalars = {name: v.item() for name, v in values.items() if v.ndim == 0}
        return cls(**{**values, **scalars})


def molecular_dynamics(
    atoms: Atoms,
    engine: Engine,
    path: str | Path,
    n_steps: int,
    *,
    time_step: float,
    grid: Sequence[int],
    temperature: float | None = None,
    relaxation: float = 300.0,
    interval: int = 1,
    seed: int = 0,
    keepbits: int | None = None,
    lowest_density: float = 0.0,
    attrs: Mapping[str, Any] | None = None,
    restart: bool = False,
) -> Path:
    """Run ab-initio molecular dynamics to step `n_steps`, or continue it to there.

    Where `path` is a trajectory of the same recipe it is continued: from its state file if there
    is one (an interrupted run), otherwise from its last frame with new random numbers. Then
    `atoms` tells elements and cell only.

    Parameters
    ----------
    atoms
        Initial configuration in its cell, with velocities or (given a temperature) without.
    engine
        ASE calculator with `density` and `description`.
    path
        Trajectory to write; its state is kept beside it in `NAME.state.npz`.
    n_steps
        Number of the last step; the first configuration is step 0.
    time_step
        Fs.
    grid
        Points of the stored density along the lattice vectors.
    temperature
        K, for NVT; None for NVE.
    relaxation
        Time of the thermostat, fs.
    interval
        Steps between stored frames.
    seed
        Of initial velocities and thermostat.
    keepbits
        Mantissa bits of the stored density (see `create_trajectory`).
    lowest_density
        Smallest stored density, angstrom**-3. Dropping Fourier components can leave values
        below zero near cores.
    attrs
        Further attributes of the trajectory.
    restart
        Begin anew; the trajectory at `path` is removed.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    GenerationError
        The engine failed, or `path` holds no molecular dynamics.
    UnfinishedError
        `path` holds another system, or other settings.
    TrajectoryError
        The store is broken.
    """
    path = Path(path)
    if n_steps < 1 or interval < 1 or not time_step > 0 or not relaxation > 0:
        raise GenerationError(
            f"n_steps={n_steps}, interval={interval}, time_step={time_step}, relaxation="
            f"{relaxation}; all must be positive"
        )
    atoms = atoms.copy()
    atoms.set_constraint(FixCom())
    atoms.calc = engine
    generator, ensemble = np.random.default_rng(seed), _ensemble(temperature, relaxation)
    recipe = _recipe(atoms, engine) | {"time_step_fs": time_step, "grid": list(grid), **ensemble}
    recipe |= {"interval": interval, "lowest_density": lowest_density, "keepbits": keepbits}
    begin = np.round([atoms.positions, atoms.get_velocities()], 6) + 0.0  # no -0
    begin = f"crc32 {fingerprint(begin):08x}"
    own = {"seed": seed, "positions and velocities at the start": begin}
    work = Work(_state_file(path), recipe | own, restart=restart)
    if restart:
        discard(path)
    if not path.exists():
        work.remove()  # of a trajectory that was deleted
        attrs = {"time_step_fs": time_step, "seed": seed, **ensemble, **dict(attrs or {})}
        atoms.get_potential_energy()  # a failing engine fails before anything is on disk
        description = engine.description()
        create_trajectory(
            path,
            n_frames=n_steps // interval + 1,
            grid=tuple(grid),
            cell=atoms.cell.array,
            numbers=atoms.numbers,
            valence_charges=valence_charges(description, atoms.numbers),
            extra_scalars={"conserved_energy": "eV", "step": "1"},
            keepbits=keepbits,
            attrs=description | attrs | {"recipe": json.dumps(as_recipe(recipe))},
        )
    else:
        check_store(locate(path), recipe)
    state, writer = _resume(work, path, atoms, generator, time_step, temperature, grid)
    _check_same(path, atoms, state, time_step)
    n_frames = writer.n_committed + (n_steps - state.step) // interval + 1
    if writer.n_frames < n_frames:
        writer = extend_trajectory(path, n_frames)
    dynamics = _integrator(atoms, temperature, relaxation, time_step, generator)
    dynamics.transferred_energy = state.transferred
    _run(dynamics, state, writer, work, n_steps, interval, grid, lowest_density, generator)
    return path


def _recipe(atoms: Atoms, engine: Engine) -> dict[str, Any]:
    """What a run is of; of the engine what it knows before its first solve."""
    settings = ("functional", "cutoff_rydberg", "k_points", "smearing", "basis", "bands")
    settings += ("forces", "map")
    told = {k: v for k, v in engine.description().items() if k in settings and v != "none"}
    cell = np.round(atoms.cell.array, 6).tolist()
    return {"numbers": atoms.numbers.tolist(), "cell": cell, "engine": told}


def _ensemble(temperature: float | None, relaxation: float) -> dict[str, str]:
    if temperature is None:
        return {"ensemble": "NVE", "thermostat": "none"}
    kind = f"stochastic velocity rescaling (Bussi), {relaxation:g} fs, {temperature:g} K"
    return {"ensemble": "NVT", "thermostat": kind}


def _prepare_velocities(
    atoms: Atoms, temperature: float | None, generator: np.random.Generator
) -> None:
    """Draw Maxwell-Boltzmann velocities if there are none; bring the centre of mass to rest."""
    momenta = atoms.get_momenta()
    if temperature is not None and not momenta.any():
        momenta = generator.normal(size=momenta.shape) * np.sqrt(atoms.get_masses())[:, None]
        atoms.set_momenta(momenta)  # FixCom takes out the motion of the centre of mass
        momenta = atoms.get_momenta() * np.sqrt(temperature / atoms.get_temperature())
    atoms.set_momenta(momenta)


def _integrator(
    atoms: Atoms,
    temperature: float | None,
    relaxation: float,
    time_step: float,
    generator: np.random.Generator,
) -> VelocityVerlet:
    if temperature is None:
        return VelocityVerlet(atoms, time_step * units.fs)
    return Bussi(atoms, time_step * units.fs, temperature, relaxation * units.fs, rng=generator)


def _state_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.state.npz")


def _resume(
    work: Work,
    path: Path,
    atoms: Atoms,
    generator: np.random.Generator,
    time_step: float,
    temperature: float | None,
    grid: Sequence[int],
) -> tuple[State, TrajectoryWriter]:
    """Return the state to go on from, with `atoms` and `generator` set to it."""
    writer = TrajectoryWriter(path)
    if (saved := work.load()) is not None:
        state = State.of(saved)
        generator.bit_generator.state = json.loads(state.generator)
    elif writer.n_committed:
        state = _last_frame(path, atoms, generator, time_step)
    else:
        _prepare_velocities(atoms, temperature, generator)
        state = _initial(atoms, generator, time_step, grid)
        work.save(vars(state))
    if state.positions.shape != atoms.positions.shape:
        raise GenerationError(
            f"{path}: its state has {len(state.positions)} atoms, not {len(atoms)}; give the "
            "system that it was started with, or another path"
        )
    atoms.set_positions(state.positions, apply_constraint=False)
    atoms.set_momenta(state.momenta, apply_constraint=False)
    return state, writer


def _initial(
    atoms: Atoms, generator: np.random.Generator, time_step: float, grid: Sequence[int]
) -> State:
    forces = atoms.get_forces(md=True)
    return State(
        step=0,
        origin=0,
        time=0.0,
        time_step=time_step,
        positions=atoms.get_positions(),
        momenta=atoms.get_momenta(),
        forces=forces,
        energy=atoms.get_potential_energy(),
        transferred=0.0,
        generator=json.dumps(generator.bit_generator.state),
        density=atoms.calc.density(tuple(grid)),
    )


def _last_frame(
    path: Path, atoms: Atoms, generator: np.random.Generator, time_step: float
) -> State:
    """Rebuild the state at the last frame; all but the random generator is stored with it."""
    last = open_trajectory(path).isel(time=-1).load()
    missing = {"positions", "velocities", "forces", "conserved_energy", "step"} - set(last)
    if missing or not np.isfinite([float(last.energy), float(last.conserved_energy)]).all():
        raise GenerationError(
            f"{path}: the last frame lacks {', '.join(sorted(missing)) or 'its energy'}; only a "
            "trajectory of molecular dynamics can be continued"
        )
    momenta = last.velocities.values / units.fs * atoms.get_masses()[:, None]
    kinetic = 0.5 * np.sum(momenta**2 / atoms.get_masses()[:, None])
    return State(
        step=int(last.step),
        origin=int(last.step),
        time=float(last.time),
        time_step=time_step,
        positions=last.positions.values,
        momenta=momenta,
        forces=last.forces.values,
        energy=float(last.energy),
        transferred=float(last.energy) + kinetic - float(last.conserved_energy),
        generator=json.dumps(generator.bit_generator.state),
        density=np.empty(0),
    )


def _check_same(path: Path, atoms: Atoms, state: State, time_step: float) -> None:
    stored = open_trajectory(path)
    same_cell = np.allclose(stored.cell.values, atoms.cell.array, rtol=0, atol=1e-6)
    if not same_cell or not np.array_equal(stored.numbers.values, atoms.numbers):
        raise GenerationError(
            f"{path}: cell or numbers differ from those of the atoms; give the system that it was "
            "started with, or another path"
        )
    if state.time_step != time_step:
        raise GenerationError(
            f"{path}: its time step is {state.time_step} fs, not {time_step}; keep it, or start "
            "another trajectory"
        )


def _run(
    dynamics: VelocityVerlet,
    state: State,
    writer: TrajectoryWriter,
    work: Work,
    n_steps: int,
    interval: int,
    grid: Sequence[int],
    lowest_density: float,
    generator: np.random.Generator,
) -> None:
    """Step to `n_steps`: state first, then the frame, so that no kill point loses a step."""
    atoms = dynamics.atoms
    _commit(writer, state, atoms, lowest_density)  # a frame whose append was interrupted
    with progress_bar(
        total=n_steps, initial=state.step, unit="step", desc=writer.path.name
    ) as bar:
        while state.step < n_steps:
            forces = dynamics.step(state.forces)
            state.step += 1
            state.time += state.time_step
            state.positions, state.momenta = atoms.get_positions(), atoms.get_momenta()
            state.forces, state.energy = forces, atoms.get_potential_energy()
            state.transferred = dynamics.transferred_energy
            state.generator = json.dumps(generator.bit_generator.state)
            due = (state.step - state.origin) % interval == 0
            state.density = atoms.calc.density(tuple(grid)) if due else np.empty(0)
            work.save(vars(state))
            _commit(writer, state, atoms, lowest_density)
            _report(bar, state, atoms)


def _commit(writer: TrajectoryWriter, state: State, atoms: Atoms, lowest_density: float) -> None:
    """Append the state as a frame if it is one and is not in the store yet."""
    if not state.density.size or state.time <= writer.last_time:
        return
    writer.append(
        np.maximum(state.density, lowest_density),
        state.time,
        positions=state.positions,
        velocities=atoms.get_velocities() * units.fs,
        forces=state.forces,
        energy=state.energy,
        temperature=atoms.get_temperature(),
        conserved_energy=_conserved(state, atoms),
        step=state.step,
    )
    writer.sync()  # before the state goes on


def _conserved(state: State, atoms: Atoms) -> float:
    """Total energy less what the thermostat has put in."""
    return state.energy + atoms.get_kinetic_energy() - state.transferred


def _report(bar: tqdm, state: State, atoms: Atoms) -> None:
    """Show steps per hour and what must stay constant; tqdm adds the time left."""
    bar.update()
    rate = (bar.n - bar.initial) / bar.format_dict["elapsed"]
    conserved = _conserved(state, atoms)
    temperature = atoms.get_temperature()
    bar.set_postfix_str(
        f"{3600 * rate:.0f} steps/h, {temperature:.0f} K, conserved {conserved:.4f} eV", False
    )


def energy_drift(trajectory: xr.Dataset) -> float:
    """Return the slope of the conserved energy, meV per atom and ps (least squares).

    Parameters
    ----------
    trajectory
        With `conserved_energy(time)` in eV and `time` in fs.
    """
    slope = np.polyfit(trajectory.time.values, trajectory.conserved_energy.values, 1)[0]
    return float(1e6 * slope / trajectory.sizes["atom"])
