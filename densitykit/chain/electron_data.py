"""The data sets of electrons in time that come with the package: kicked and driven chains.

Each run is a chain of its own, with atoms displaced at random, driven in its own way: by a kick, a
laser pulse or a density wave (:mod:`densitykit.chain.electrons`), in turn. A split is one
trajectory, in which the runs follow one another: the variable `step` begins anew with each, `time`
goes on. The first frame of a run is the moment after a kick or a push, when the density is still
that of the ground state.

Splits ``train``, ``validation`` and ``test`` are of four atoms, ``longer`` of eight.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from densitykit.chain.dynamics import random_chain
from densitykit.chain.electron_runs import create_run, electron_frame
from densitykit.chain.electrons import ElectronDynamics, Kick, Pulse
from densitykit.chain.plane_waves import require
from densitykit.io.progress import progress_bar
from densitykit.io.rebuild import pack_trajectory
from densitykit.io.work import as_recipe, check_store, discard
from densitykit.io.writer import TrajectoryWriter
from densitykit.units import ATOMIC_TIME

__all__ = ["DISPLACEMENT", "SIZES", "drive", "driven_chain", "electron_dataset"]

#: runs of each split, frames of each run, and atoms; a metal gets by on half as many
SIZES = {
    "insulator": {
        "train": (48, 100, 4),
        "validation": (6, 100, 4),
        "test": (6, 200, 4),
        "longer": (3, 200, 8),
    },
    "metal": {
        "train": (24, 100, 4),
        "validation": (3, 100, 4),
        "test": (3, 200, 4),
        "longer": (3, 200, 8),
    },
}
#: of the atoms, in bohr, and of the frames and the steps between them, in atomic units (48 as)
DISPLACEMENT, SPACING, FRAME, STEPS = 1.0, 10.0, 2.0, 5
_CUTOFFS = {"insulator": 16.0, "metal": 4.0}


def drive(kind: int, rng: np.random.Generator) -> tuple[Kick | Pulse | None, tuple[int, float]]:
    """A kick (0), a pulse (1) or a wave (2) at random: the field, and the wave as (n, lambda).

    Kicks are to velocities of 0.01 to 0.1 atomic units, either way; pulses have the same
    amplitudes, frequencies of 0.1 to 0.8 hartree and last 40 to 120; waves have up to three
    periods in four atoms and 0.02 to 0.2 hartree x atomic unit of time.
    """
    size = 10 ** rng.uniform(-2, -1)
    if kind == 0:
        return Kick(size * rng.choice([-1, 1])), (0, 0.0)
    if kind == 1:
        shape = rng.uniform(0.1, 0.8), rng.uniform(40, 120), rng.uniform(0, 2 * np.pi)
        return Pulse(size, *shape), (0, 0.0)
    return None, (int(rng.integers(1, 4)), 2 * size)


def driven_chain(
    system: str, n_atoms: int, seed: int, kind: int
) -> tuple[ElectronDynamics, np.ndarray, dict[str, Any]]:
    """Electrons of a run at its first frame, positions of its nuclei in bohr, and its recipe."""
    field, wave = drive(kind, np.random.default_rng((seed, 1)))
    places = {"seed": seed, "displacement": DISPLACEMENT, "spacing": SPACING}
    model = random_chain(system, n_atoms, **places, cutoff=_CUTOFFS[system])
    electrons = ElectronDynamics.of(model, field=field, time_step=FRAME / STEPS)
    periods = wave[0] * n_atoms // 4
    electrons.push(wave[1] * np.cos(2 * np.pi * periods / model.length * electrons.r))
    driven = {} if field is None else {type(field).__name__: asdict(field)}
    driven |= {"wave": [periods, wave[1]]} if periods else {}
    return electrons, model.positions, {"seed": seed, **driven}


def electron_dataset(
    path: str | os.PathLike[str],
    system: str = "insulator",
    *,
    sizes: Mapping[str, tuple[int, int, int]] | None = None,
    progress: bool = True,
    restart: bool = False,
) -> Path:
    """Make a data set: a store with a trajectory a split; finished ones stay, others go on.

    Parameters
    ----------
    path
        The store, such as ``insulator.zarr``.
    system
        "insulator" or "metal".
    sizes
        Of each split: runs, frames, atoms; None takes `SIZES`.
    progress
        Show progress bars.
    restart
        Begin anew; the store is removed.

    Raises
    ------
    GenerationError
        There is no such system, or a ground state did not converge.
    UnfinishedError
        A split was made in another way.
    """
    require(system in _CUTOFFS, "system", repr(system), f"choose one of {sorted(_CUTOFFS)}")
    path = Path(path)
    if restart:
        discard(path)
    for number, (split, (count, frames, atoms)) in enumerate((sizes or SIZES[system]).items()):
        chains = [driven_chain(system, atoms, 1000 * number + i, i % 3) for i in range(count)]
        writer = _writer(path / split, system, frames, atoms, [own for *_, own in chains])
        if writer.n_committed == writer.n_frames:
            writer.close()
            continue
        done, late = divmod(writer.n_committed, frames)
        for run in progress_bar(range(done, count), f"{system} {split}", disable=not progress):
            electrons, positions, _ = chains[run]
            for frame in range(frames):
                if frame >= late:
                    values = electron_frame(electrons, 10 * atoms, positions)
                    values["time"] += run * frames * FRAME * ATOMIC_TIME
                    writer.append(**values)
                electrons.advance(STEPS)
            late = 0
        writer.close()
        pack_trajectory(path / split)
    return path


def _writer(
    path: Path, system: str, frames: int, atoms: int, runs: list[dict[str, Any]]
) -> TrajectoryWriter:
    """Create the trajectory of a split, or open the one there is."""
    places = {"seed": 0, "displacement": DISPLACEMENT, "spacing": SPACING}
    model = random_chain(system, atoms, **places, cutoff=_CUTOFFS[system], n_grid=10 * atoms)
    recipe = {"system": system, "widths_bohr": model.widths, "displacement_bohr": DISPLACEMENT}
    recipe |= {"time_step_au": FRAME / STEPS, "frames_of_a_run": frames, "runs": runs}
    if path.exists():
        check_store(path, recipe)
        return TrajectoryWriter(path)
    return create_run(path, model, as_recipe(recipe), frames * len(runs))
