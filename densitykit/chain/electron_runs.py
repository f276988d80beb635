"""Runs of electrons in time, written straight into a trajectory.

Electrons move as in :mod:`densitykit.chain.electrons`, nuclei stand still. Each frame has density,
current, energy, number of electrons and the vector potential, with times in fs; frames are some
tens of attoseconds apart. A killed run goes on at the last saved state, at most a hundred frames
back, and gives what it would have given.

The format's units are angstrom, fs and eV; the attributes `bohr_angstrom`, `atomic_time_fs` and
`hartree_eV` convert. The vector potential is stored as the velocity that it is to an electron.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densitykit.chain.dynamics import chain_attributes, chain_species, random_chain
from densitykit.chain.electrons import ElectronDynamics, Kick, Pulse
from densitykit.chain.kohn_sham import ReducedHartreeFock1D
from densitykit.chain.plane_waves import require
from densitykit.io.progress import progress_bar
from densitykit.io.store import locate
from densitykit.io.work import Work, check_store, discard
from densitykit.io.writer import TrajectoryWriter, create_trajectory
from densitykit.units import ATOMIC_TIME, BOHR, HARTREE

__all__ = ["create_run", "electron_frame", "simulate_electrons"]

Real = NDArray[np.float64]

#: frames between saved states
_SAVE_FRAMES = 100


def simulate_electrons(
    path: str | os.PathLike[str],
    system: str | Sequence[float] = "metal",
    field: Kick | Pulse | None = None,
    *,
    wave: tuple[int, float] = (0, 0.0),
    charges: ArrayLike = 2.0,
    n_atoms: int = 8,
    n_frames: int = 500,
    stride: int = 2,
    time_step: float = 0.25,
    seed: int = 0,
    displacement: float = 1.0,
    spacing: float = 10.0,
    keepbits: int | None = None,
    progress: bool = True,
    restart: bool = False,
    **model_options: Any,
) -> Path:
    """Drive the electrons of a chain and write what they do; go on if it is there already.

    Parameters
    ----------
    path
        The group to write.
    system
        "insulator", "metal" or "mixed", or the widths of the atoms in bohr, shape (n_atoms,).
    field
        Uniform: a `Kick` or a `Pulse`.
    wave
        n and lambda of a potential lambda cos(2 pi n r / L) that acts for no time, at t = 0.
    charges
        Z_I, one number or shape (n_atoms,).
    n_atoms
        Atoms of a named system.
    n_frames
        Frames to write; the first is t = 0, just after a kick.
    stride, time_step
        Steps from frame to frame, and their length in atomic units.
    seed, displacement, spacing
        Atoms sit ``spacing`` apart, each displaced by a random number of at most ``displacement``,
        in bohr.
    keepbits
        Mantissa bits of density and current to keep.
    progress
        Show a progress bar.
    restart
        Begin anew; the trajectory at `path` is removed.
    **model_options
        To `ReducedHartreeFock1D`; ``n_grid`` is two points per bohr by default.

    Raises
    ------
    GenerationError
        An argument is unusable, or the ground state did not converge.
    UnfinishedError
        The trajectory at ``path`` was made with other arguments.
    TrajectoryError
        What is at ``path`` is no trajectory.
    """
    path = Path(path)
    for name, value in {"n_frames": n_frames, "stride": stride, "spacing": spacing}.items():
        require(value > 0, name, value, "give a positive number")
    places = {"seed": seed, "displacement": displacement, "spacing": spacing}
    model = random_chain(system, n_atoms, charges, **places, **model_options)
    driven = None if field is None else {type(field).__name__: asdict(field)}
    recipe = {"widths_bohr": model.widths, "charges": model.charges, **places}
    recipe |= {"field": driven, "wave": wave}
    recipe |= {"time_step_au": time_step, "stride": stride, "model": model_options}
    work = Work(path.absolute().with_name(f".{path.name}.state.npz"), recipe, restart=restart)
    if restart:
        discard(path)
    writer = _open_writer(path, model, work, n_frames, keepbits)
    if writer.n_committed < writer.n_frames:
        _run(writer, model, work, field, wave, progress)
    return path


def _open_writer(
    path: Path, model: ReducedHartreeFock1D, work: Work, n_frames: int, keepbits: int | None
) -> TrajectoryWriter:
    """Create the trajectory, or open the one there is if it was made in the same way."""
    if path.exists():
        made = check_store(locate(path), work.recipe)
        require(made, f"{path}: recipe", "missing", "choose another path")
        return TrajectoryWriter(path)
    work.remove()  # of a store that was here before
    return create_run(path, model, work.recipe, n_frames, keepbits)


def create_run(
    path: Path,
    model: ReducedHartreeFock1D,
    recipe: Mapping[str, Any],
    n_frames: int,
    keepbits: int | None = None,
) -> TrajectoryWriter:
    """Create an empty trajectory of electrons in the grid and the cell of a model."""
    return create_trajectory(
        path,
        n_frames=n_frames,
        grid=(model.n_grid,),
        cell=model.length * BOHR,
        numbers=chain_species(model.widths),
        current=True,
        attrs=chain_attributes(model, recipe, "densitykit.chain.electron_runs"),
        extra_scalars={"vector_potential": "angstrom/fs", "step": "1"},
        keepbits=keepbits,
    )


def _run(
    writer: TrajectoryWriter,
    model: ReducedHartreeFock1D,
    work: Work,
    field: Callable[[float], float] | None,
    wave: tuple[int, float],
    progress: bool,
) -> None:
    """Go on from the saved state, if there is one, to the last frame."""
    recipe, saved = work.recipe, work.load()
    electrons = ElectronDynamics.of(model, field=field, time_step=recipe["time_step_au"])
    if saved is None:
        electrons.push(wave[1] * np.cos(2 * np.pi * wave[0] / model.length * electrons.r))
    else:
        electrons.resume(saved["waves"], int(saved["steps"]))
    first = electrons.steps // recipe["stride"]
    frames = range(first, writer.n_frames)
    hidden = None if progress else True
    for frame in progress_bar(frames, "electrons", writer.n_frames, initial=first, disable=hidden):
        # frames written after the last saved state are met again and passed over
        if frame == writer.n_committed:
            writer.append(**electron_frame(electrons, model.n_grid, model.positions))
        if frame % _SAVE_FRAMES == 0:
            writer.sync()
            work.save({"waves": electrons.waves, "steps": electrons.steps})
        electrons.advance(recipe["stride"])
    writer.close()
    work.remove()


def electron_frame(electrons: ElectronDynamics, n_grid: int, positions: Real) -> dict[str, Any]:
    """The present frame in the units of the format, as `TrajectoryWriter.append` takes it.

    Parameters
    ----------
    electrons
        What moves.
    n_grid
        Points to store.
    positions
        Of the nuclei, (n_atoms,), in bohr.
    """
    return {
        "density": electrons.on_grid(electrons.density, n_grid) / BOHR,
        "current": electrons.on_grid(electrons.current, n_grid) / ATOMIC_TIME,
        "time": electrons.time * ATOMIC_TIME,
        "positions": positions[:, None] * BOHR,
        "energy": electrons.energy * HARTREE,
        "vector_potential": electrons.field(electrons.time) * (BOHR / ATOMIC_TIME),
        "step": electrons.steps,
    }
