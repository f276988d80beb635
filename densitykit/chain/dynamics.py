r"""Molecular dynamics of the one-dimensional chains of Deep Density.

Nuclei of mass M move on the Born-Oppenheimer surface of the reduced Hartree-Fock model,
:math:`M\ddot R_I = -\partial A/\partial R_I`, by velocity Verlet (Swope et al. 1982). They start
at rest, each displaced by a random number in [-3, 3] bohr from a chain with 10 bohr spacing
(Zepeda-Nunez et al. 2019, section 4.1). Three systems: widths of 1 bohr make an insulator, of 6
bohr a metal, half and half a mixed chain.

**Mass and time step**, which the paper leaves open. With M = 1 (in electron masses; a mass only
rescales time) atoms swing with periods of 50 to 200 atomic units of time. With a step of 0.1
the 8000 steps of training data hold 4 to 16 periods. Wide atoms pass through one another where
the energy suffices, which is a model of nothing: hence the seed of the mixed chain is one of
low energy, with which they stay apart for all 30 000 steps.

**Few diagonalisations.** The density of the next step is extrapolated from the last ones (a
polynomial in time), the nuclei that belong to it are known exactly, and the residual is
multiplied by the inverse dielectric matrix of a recent step.

**Interruptions.** Every 100 steps all that the dynamics remembers goes to a file next to the
store, replaced in one piece. A killed run repeats at most 100 steps and then gives what it would
have given without the interruption.

The format's units are angstrom, fs and eV; `BOHR`, `ATOMIC_TIME` and `HARTREE` convert, and are
written to the attributes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densitykit import __version__
from densitykit.chain.kohn_sham import KohnShamSolution, ReducedHartreeFock1D
from densitykit.chain.plane_waves import require
from densitykit.chain.screening import InverseDielectric, solve_screened
from densitykit.io.progress import progress_bar
from densitykit.io.store import locate
from densitykit.io.work import Work, check_store, discard
from densitykit.io.writer import TrajectoryWriter, create_trajectory
from densitykit.units import ATOMIC_TIME, BOHR, BOLTZMANN_HARTREE, HARTREE

__all__ = [
    "SEEDS",
    "SYSTEMS",
    "TIME_STEP",
    "chain_attributes",
    "chain_species",
    "chain_widths",
    "random_chain",
    "simulate_chain",
]

#: widths in bohr, for any multiple of their number of atoms
SYSTEMS = {"insulator": (1.0,), "metal": (6.0,), "mixed": (1.0, 6.0)}
#: default seeds: of median energy among 40 for the insulator; of the lowest among 200 for the
#: mixed chain, whose soft atoms then stay apart for 30 000 steps
SEEDS = {"insulator": 13, "metal": 0, "mixed": 15}
#: in atomic units of time
TIME_STEP = 0.1
#: steps between saved states, and between refreshed preconditioners (a divisor)
CHECKPOINT_STEPS, _REFRESH_STEPS = 100, 25
#: past densities that are extrapolated
_PAST = 4
#: k_max in 1/bohr of the preconditioner
_SCREENED = 3.0


@dataclass
class _State:
    """What the dynamics remembers; atomic units, arrays of shape (n_atoms,)."""

    step: int
    R: NDArray[np.float64]
    v: NDArray[np.float64]
    F: NDArray[np.float64]
    rho: NDArray[np.complex128]  # coefficients, shape (past steps, n_waves), newest first


class _Dynamics:
    """Velocity Verlet with extrapolated densities.

    Parameters
    ----------
    model
        At the initial positions.
    mass, time_step
        In electron masses and atomic units of time.
    state
        To continue from; None starts at rest.
    """

    def __init__(
        self, model: ReducedHartreeFock1D, mass: float, time_step: float, state: _State | None
    ) -> None:
        self.mass, self.time_step = mass, time_step
        if state is None:
            first = solve_screened(model)
            rest = np.zeros_like(model.positions)
            state = _State(0, model.positions, rest, first.forces, first.rho_k[None])
        self.state, self.model = state, model.at(state.R)
        self.refresh()
        # also after an interruption: the same potential, hence the same solution as without one
        self.solution = self._solve(state.rho[0])

    def refresh(self) -> None:
        """Renew the preconditioner at the present state."""
        V = self.model.K * (self.state.rho[0] + self.model.pseudo_charge())
        self._screen = InverseDielectric(self.model, V, _SCREENED)

    def _solve(self, rho: NDArray[np.complex128]) -> KohnShamSolution:
        V = self.model.K * (rho + self.model.pseudo_charge())
        return self.model.solve(V, precondition=self._screen)

    def advance(self) -> None:
        """One step; then ``state`` and ``solution`` are those of the new time."""
        old, half = self.state, 0.5 * self.time_step / self.mass
        v = old.v + half * old.F
        R = old.R + self.time_step * v
        self.model = self.model.at(R)
        order = len(old.rho)
        weights = [(-1) ** j * comb(order, j + 1) for j in range(order)]
        self.solution = self._solve(np.tensordot(weights, old.rho, axes=1))
        F = self.solution.forces
        rho = np.concatenate([self.solution.rho_k[None], old.rho])[:_PAST]
        self.state = _State(old.step + 1, R, v + half * F, F, rho)
        if self.state.step % _REFRESH_STEPS == 0:
            self.refresh()

    def frame(self) -> dict[str, Any]:
        """The present frame in the units of the format, as `TrajectoryWriter.append` takes it."""
        state, solution = self.state, self.solution
        kinetic = 0.5 * self.mass * float(state.v @ state.v)
        freedom = max(1, len(state.R) - 1)  # the centre of mass is at rest
        return {
            "density": solution.density / BOHR,
            "time": state.step * self.time_step * ATOMIC_TIME,
            "positions": state.R[:, None] * BOHR,
            "velocities": state.v[:, None] * (BOHR / ATOMIC_TIME),
            "forces": state.F[:, None] * (HARTREE / BOHR),
            "energy": solution.energy * HARTREE,
            "temperature": 2 * kinetic / (freedom * BOLTZMANN_HARTREE),
            "conserved_energy": (solution.energy + kinetic) * HARTREE,
            "gap": solution.gap * HARTREE,
            "iterations": solution.iterations,
            "step": state.step,
        }


def simulate_chain(
    path: str | os.PathLike[str],
    system: str | Sequence[float] = "insulator",
    *,
    charges: ArrayLike = 2.0,
    n_atoms: int = 8,
    n_steps: int = 30_000,
    stride: int = 20,
    steps: Sequence[int] | None = None,
    time_step: float = TIME_STEP,
    mass: float = 1.0,
    seed: int | None = None,
    displacement: float = 3.0,
    spacing: float = 10.0,
    progress: bool = True,
    restart: bool = False,
    **model_options: Any,
) -> Path:
    """Run molecular dynamics into a one-dimensional trajectory; go on if it is there already.

    Parameters
    ----------
    path
        The group to write, for example ``metal.zarr``.
    system
        One of `SYSTEMS`, or the widths of the atoms in bohr, shape (n_atoms,).
    charges
        Z_I, one number or shape (n_atoms,).
    n_atoms
        Atoms of a named system.
    n_steps, stride
        Steps to run, and between frames written; frame 0 is the start.
    steps
        The steps to write, ascending, instead of these two.
    time_step, mass
        In atomic units (of time; electron masses).
    seed
        Of the displacements; None takes that of `SEEDS`, or 0.
    displacement
        Largest, in bohr; the distribution is uniform.
    spacing
        Of the undisplaced chain, in bohr.
    progress
        Show a progress bar.
    restart
        Begin anew; the trajectory at `path` is removed.
    **model_options
        To `ReducedHartreeFock1D`; ``n_grid`` is two points per bohr by default.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    GenerationError
        An argument is unusable, or a density did not converge.
    UnfinishedError
        The trajectory at ``path`` was made with other arguments.
    TrajectoryError
        What is at ``path`` is no trajectory.
    """
    path, name = Path(path), system if isinstance(system, str) else "custom"
    widths = chain_widths(system, n_atoms)
    wanted = np.asarray(range(0, n_steps + 1, stride) if steps is None else steps, dtype=int)
    _check(wanted, displacement, time_step=time_step, mass=mass, spacing=spacing)
    seed = SEEDS.get(name, 0) if seed is None else seed
    model_options = {"n_grid": round(2 * spacing * len(widths))} | model_options
    places = {"seed": seed, "displacement": displacement, "spacing": spacing}
    model = random_chain(widths, n_atoms, charges, **places, **model_options)
    recipe = {"system": name, "widths_bohr": widths, "charges": model.charges.tolist()}
    recipe |= {"seed": seed, "displacement_bohr": displacement, "spacing_bohr": spacing}
    recipe |= {"mass_electron": mass, "time_step_au": time_step, "steps": wanted.tolist()}
    recipe |= {"model": model_options}
    work = Work(path.absolute().with_name(f".{path.name}.state.npz"), recipe, restart=restart)
    if restart:
        discard(path)
    writer = _open_writer(path, model, work)
    if writer.n_committed < writer.n_frames:
        _run(writer, model, work, progress)
    return path


def random_chain(
    system: str | Sequence[float],
    n_atoms: int,
    charges: ArrayLike = 2.0,
    *,
    seed: int,
    displacement: float,
    spacing: float,
    **model_options: Any,
) -> ReducedHartreeFock1D:
    """The model of a chain with displaced atoms; arguments as those of `simulate_chain`."""
    widths = chain_widths(system, n_atoms)
    shifts = np.random.default_rng(seed).uniform(-displacement, displacement, len(widths))
    length = spacing * len(widths)
    R = spacing * (np.arange(len(widths)) + 0.5) + shifts
    return ReducedHartreeFock1D(
        R, widths, charges, length, **{"n_grid": round(2 * length)} | model_options
    )


def _check(steps: NDArray[np.int64], displacement: float, **positive: float) -> None:
    """Raise GenerationError for numbers that describe no dynamics."""
    ascending = steps.size > 0 and steps[0] >= 0 and bool((np.diff(steps) > 0).all())
    require(ascending, "steps", f"{steps[:3]}...", "give ascending steps from 0 on")
    for key, value in positive.items():
        require(np.isfinite(value) and value > 0, key, value, "give a positive number")
    near = 0 <= displacement < positive["spacing"] / 2
    require(near, "displacement", displacement, "give 0 to half the spacing, or the order is lost")


def chain_widths(system: str | Sequence[float], n_atoms: int) -> list[float]:
    """Widths of the atoms: in a mixed chain the narrow ones come first."""
    if not isinstance(system, str):
        return [float(width) for width in system]
    require(system in SYSTEMS, "system", repr(system), f"choose one of {sorted(SYSTEMS)}")
    different = SYSTEMS[system]
    whole = n_atoms > 0 and n_atoms % len(different) == 0
    require(whole, "n_atoms", n_atoms, f"give a positive multiple of {len(different)}")
    return [width for width in different for _ in range(n_atoms // len(different))]


def _open_writer(path: Path, model: ReducedHartreeFock1D, work: Work) -> TrajectoryWriter:
    """Create the trajectory, or open the one there is if it was made in the same way."""
    recipe = work.recipe
    if path.exists():
        fix = "choose another path"
        require(check_store(locate(path), recipe), f"{path}: recipe", "missing", fix)
        return TrajectoryWriter(path)
    work.remove()  # of a store that was here before

    attrs = chain_attributes(model, recipe, "densitykit.chain.dynamics")
    attrs |= {"thermostat": "none (NVE)"}
    return create_trajectory(
        path,
        n_frames=len(recipe["steps"]),
        grid=(model.n_grid,),
        cell=model.length * BOHR,
        numbers=chain_species(model.widths),
        attrs=attrs,
        extra_scalars={"conserved_energy": "eV", "gap": "eV", "iterations": "1", "step": "1"},
    )


def chain_attributes(
    model: ReducedHartreeFock1D, recipe: Mapping[str, Any], module: str
) -> dict[str, Any]:
    """Provenance of a trajectory: what made it, and what converts its units to atomic ones."""
    return {
        "engine": f"densitykit {__version__}, {module}",
        "functional": "reduced Hartree-Fock, one dimension, spinless, Yukawa kernel",
        "recipe": recipe,
        "temperature_electrons_hartree": model.temperature,
        "cutoff_basis_functions": model.basis.n_basis,
        "scf_tolerance": model.tolerance,
        "time_step_fs": recipe["time_step_au"] * ATOMIC_TIME,
        "units_note": "model in atomic units; divide lengths by bohr_angstrom, times by "
        "atomic_time_fs, energies by hartree_eV. numbers: the widths in bohr, rounded",
        "bohr_angstrom": BOHR,
        "atomic_time_fs": ATOMIC_TIME,
        "hartree_eV": HARTREE,
        "license": "CC-BY-4.0",
    }


def chain_species(widths: NDArray[np.float64]) -> NDArray[np.int64]:
    """One integer per width: the width rounded, or its rank where rounding makes two the same."""
    different, rank = np.unique(widths, return_inverse=True)
    rounded = np.round(different).astype(int)
    clear = len(np.unique(rounded)) == len(different) and rounded[0] > 0
    return (rounded if clear else np.arange(1, len(different) + 1))[rank]


def _run(
    writer: TrajectoryWriter,
    model: ReducedHartreeFock1D,
    work: Work,
    progress: bool,
) -> None:
    """Go on from the saved state, if there is one, to the last frame wanted."""
    recipe, saved = work.recipe, work.load()
    keys = ("R", "v", "F", "rho")
    state = None if saved is None else _State(int(saved["step"]), *(saved[key] for key in keys))
    dynamics = _Dynamics(model, recipe["mass_electron"], recipe["time_step_au"], state)
    steps = recipe["steps"]
    bar = progress_bar(
        total=steps[-1],
        initial=dynamics.state.step,
        desc=f"{recipe['system']} chain",
        unit="step",
        mininterval=1.0,
        disable=not progress,
    )
    with bar:
        while True:
            step = dynamics.state.step
            # frames written after the last saved state are met again and passed over
            if step == steps[writer.n_committed]:
                writer.append(**dynamics.frame())
            if writer.n_committed == writer.n_frames:
                break
            if step % CHECKPOINT_STEPS == 0:
                writer.sync()
                work.save(vars(dynamics.state))
            dynamics.advance()
            bar.update()
    writer.sync()
    work.remove()
