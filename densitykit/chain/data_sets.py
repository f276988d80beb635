"""The data sets of one-dimensional chains that come with the package: runs, splits, packing.

They follow section 4.1 and appendix A of Zepeda-Nunez et al. (2019): one simulation of 8 atoms a
system, of which the first 8000 steps are for training, the next 400 for validation and later ones
for testing; and one of a chain four times as long, on which a model trained on the short one is
tested without training it again (their figure 6). All frames are solutions of
:mod:`densitykit.chain.kohn_sham`, met in the dynamics of :mod:`densitykit.chain.dynamics`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from densitykit.chain.dynamics import SYSTEMS, TIME_STEP, simulate_chain
from densitykit.chain.plane_waves import require
from densitykit.io.reader import open_trajectory
from densitykit.io.rebuild import pack_trajectory
from densitykit.io.splits import write_splits
from densitykit.io.work import discard
from densitykit.io.writer import copy_frames, create_trajectory

__all__ = ["BUNDLED_STEPS", "TRANSFER_SEEDS", "TRANSFER_STEPS", "chain_dataset"]

#: steps of each run of a bundled data set (Zepeda-Nunez et al. 2019, section 4.1 and appendix A):
#: every fourth training frame makes their set of 100; 2019 and 29000 are figures 4 and 5
BUNDLED_STEPS = {
    "train": tuple(range(0, 8000, 20)),
    "validation": tuple(range(8000, 8401, 20)),
    "test": (2019, *range(10_000, 30_000, 1000), 29_900),
}
#: of the chains four times as long, figure 6; started from displacements of their own
TRANSFER_STEPS = tuple(range(45, 451, 45))
_TRANSFER_WIDTHS = {"insulator": (1.0,) * 32, "metal": (6.0,) * 32}
_TRANSFER_WIDTHS["mixed"] = (1.0,) * 8 + (6.0,) * 24
#: of the lowest energy among 40: among four times as many atoms some start closer than any of 8 do
TRANSFER_SEEDS = {"insulator": 29, "metal": 8, "mixed": 26}


def chain_dataset(
    folder: str | os.PathLike[str],
    systems: Sequence[str] = tuple(SYSTEMS),
    *,
    steps: Mapping[str, Sequence[int]] | None = None,
    transfer_steps: Sequence[int] = TRANSFER_STEPS,
    progress: bool = True,
    restart: bool = False,
    **options: Any,
) -> list[Path]:
    """Make the bundled data sets: ``folder/<system>.zarr`` with runs and splits; restartable.

    Runs ``train``, ``validation`` and ``test`` are frames of one simulation of 8 atoms;
    ``transfer`` is one of 32 atoms, in the mixed chain 8 narrow ones and 24 wide ones. Splits of
    the same names hold all frames of a run, but for the first of ``test``: that one lies
    between frames of the training run (step 2019) and is the split ``test-within``.

    Parameters
    ----------
    folder
        Made if need be; unfinished simulations live in ``folder/.work``.
    systems
        Of `SYSTEMS`.
    steps
        Steps of the three runs; None takes `BUNDLED_STEPS`.
    transfer_steps
        Of the transfer run; none leaves it out.
    progress
        Show progress bars.
    restart
        Begin anew what is unfinished or finished; without it stores that are there are left.
    **options
        To `simulate_chain`; the transfer run has twice its time step.

    Returns
    -------
    list[Path]
        The stores made. Those that are there already are left as they are.

    Raises
    ------
    GenerationError
        As `simulate_chain`.
    """
    steps = BUNDLED_STEPS if steps is None else steps
    options |= {"progress": progress, "restart": restart}
    work, made = Path(folder) / ".work", []
    for system in systems:
        require(system in SYSTEMS, "system", repr(system), f"choose one of {sorted(SYSTEMS)}")
        made.append(Path(folder) / f"{system}.zarr")
        if restart:
            discard(made[-1])
        if made[-1].exists():
            continue
        parts = _simulate(work, system, steps, transfer_steps, options)
        build = work / f"{system}-build.zarr"
        shutil.rmtree(build, ignore_errors=True)
        for run, (source, chosen) in parts.items():
            _copy_frames(source, build / run, chosen)
        write_splits(build, _splits({run: chosen for run, (_, chosen) in parts.items()}))
        build.rename(made[-1])
        for finished in {source for source, _ in parts.values()}:
            shutil.rmtree(finished)
    if work.exists() and not any(work.iterdir()):
        work.rmdir()
    return made


def _simulate(
    work: Path,
    system: str,
    steps: Mapping[str, Sequence[int]],
    transfer_steps: Sequence[int],
    options: Mapping[str, Any],
) -> dict[str, tuple[Path, Sequence[int]]]:
    """Run the dynamics, or finish it; name of a run to the store and the steps it is made of."""
    union = sorted({step for run in steps.values() for step in run})
    source = simulate_chain(work / f"{system}.zarr", system, steps=union, **options)
    parts = {run: (source, chosen) for run, chosen in steps.items()}
    if len(transfer_steps):
        slow = {"time_step": 2 * options.get("time_step", TIME_STEP)}
        options = {**options, **slow, "seed": TRANSFER_SEEDS[system], "steps": transfer_steps}
        source = work / f"{system}-32.zarr"
        parts["transfer"] = (
            simulate_chain(source, _TRANSFER_WIDTHS[system], **options),
            transfer_steps,
        )
    return parts


def _splits(runs: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """One split per run; a first test frame among those of training gets its own."""
    splits = {run: {"run": run, "start": 0, "stop": len(steps)} for run, steps in runs.items()}
    if "test" in runs and "train" in runs and runs["test"][0] < max(runs["train"]):
        splits["test-within"] = splits["test"] | {"stop": 1}
        splits["test"] = splits["test"] | {"start": 1}
    return splits


def _copy_frames(source: Path, target: Path, steps: Sequence[int]) -> None:
    """Copy the frames of these steps to a trajectory of their own, packed into few files."""
    with open_trajectory(source) as ds:
        frames = np.flatnonzero(np.isin(ds["step"].values, steps))
        scalars = ["conserved_energy", "gap", "iterations", "step"]
        writer = create_trajectory(
            target,
            n_frames=len(frames),
            grid=ds["density"].shape[1:],
            cell=ds["cell"].values,
            numbers=ds["numbers"].values,
            attrs={key: value for key, value in ds.attrs.items() if key != "schema_version"},
            extra_scalars={name: ds[name].attrs["units"] for name in scalars},
        )
        copy_frames(ds.isel(time=frames).load(), writer, progress=False)
    pack_trajectory(target)
