r"""Static data sets: independent configurations, each with its converged density.

`generate_snapshots` draws configurations, has an engine compute each, and writes a trajectory.
It may be killed at any moment and started again: no finished snapshot is lost, and none is
computed twice. What makes this so is the order of the writes, each of which replaces a file in
one piece, in a hidden folder beside the store:

1. all configurations, once: a restart does not depend on repeating the dynamics;
2. the result of a snapshot, as soon as it is there, in a part file of its own;
3. parts in the order of their snapshots into the store, which commits frame by frame;
4. only then the part is removed. A part whose frame is committed is a leftover of a kill between
   3 and 4, and is removed at the next start.

Densities are stored in single precision with fewer bits, on a grid of about `System.spacing`.
Bits cost a known relative error (`bit_round`); what a grid holds of a density is tabulated by
`densitykit.generate.convergence.grid_table`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from ase import Atoms

from densitykit.errors import GenerationError
from densitykit.generate.engine import Engine, valence_charges
from densitykit.generate.jobs import Result, evaluate_all
from densitykit.io.progress import progress_bar
from densitykit.io.splits import read_splits, write_splits
from densitykit.io.store import PathLike, load_arrays, locate, recover, save_arrays
from densitykit.io.work import Work, as_recipe, check_recipe, discard, spelled
from densitykit.io.writer import TrajectoryWriter, create_trajectory

try:
    import fcntl
except ImportError:  # not a POSIX system: two generators of one store must be avoided by hand
    fcntl = None

__all__ = ["System", "generate_snapshots", "grid_shape"]

_HOPELESS = 3  # failures, without a single success, after which the rest is not tried


@dataclass(frozen=True)
class System:
    """A static data set: where configurations, densities and splits come from.

    Attributes
    ----------
    name
        Short and unique; a store belongs to the system of this name.
    geometries
        `geometries(n, seed=..., progress=...)` gives n snapshots of the same atoms in the same
        cell, whose `info` has "temperature" (K), "time" (fs, increasing) and "source".
    engine
        Picklable factory of the engine: a class, or `functools.partial` of one.
    spacing
        Largest distance of the points of the stored grid, angstrom.
    keepbits
        Mantissa bits of the stored density; see `densitykit.io.schema.bit_round`.
    splits
        Number of snapshots in each split, in order. Their sum is the default size of the set.
    quantity
        "valence", "total" or "pseudo".
    provenance
        Further attributes of the store.
    resolution
        Smallest step of the stored density, angstrom**-3; see `create_trajectory`.
    """

    name: str
    geometries: Callable[..., list[Atoms]]
    engine: Callable[[], Engine]
    spacing: float
    keepbits: int = 12
    splits: Mapping[str, int] = field(
        default_factory=lambda: {"train": 80, "validation": 10, "test": 10}
    )
    quantity: str = "valence"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    resolution: float | None = None


def grid_shape(atoms: Atoms, spacing: float) -> tuple[int, ...]:
    """Even numbers of points along the edges of a cell, at most `spacing` (angstrom) apart."""
    return tuple(2 * int(np.ceil(edge / (2 * spacing))) for edge in atoms.cell.lengths())


def generate_snapshots(
    system: System,
    path: PathLike,
    n: int | None = None,
    *,
    seed: int = 0,
    workers: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
    restart: bool = False,
) -> Path:
    """Make the static data set of a system, or finish it where it was interrupted.

    Parameters
    ----------
    system
        What to compute.
    path
        The trajectory: a store, `ethane.zarr`, or a run in one, `water.zarr/32`. Splits go to
        the root of the store, those of a run under "SPLIT-RUN": "train-32".
    n
        Number of snapshots. Default: the sum of `system.splits`; these are scaled to others.
    seed
        Of the configurations.
    workers, scheduler
        Local processes, or the address of a dask scheduler; see `evaluate_all`.
    progress
        Show bars.
    restart
        Begin anew; the trajectory at `path` is removed.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    GenerationError
        Snapshots failed (the others are kept, a further call tries them again), or another
        process is working on it.
    UnfinishedError
        The path holds snapshots of another system, or made with other settings.
    """
    path, n = Path(path), sum(system.splits.values()) if n is None else n
    key = {"system": system.name, "n_snapshots": n, "seed": seed}
    root = next((p for p in path.parents if p.suffix == ".zarr"), path)
    work = root.with_name(f".{root.name}.work") / path.relative_to(root)
    key |= _settings(system)
    if path.exists() and not restart:
        attrs = zarr.open_group(locate(path), mode="r").attrs
        older = {name: attrs.get(name) for name in ("system", "n_snapshots", "seed")}
        check_recipe(path, json.loads(attrs.get("recipe", "{}")) or older, as_recipe(key))
    with _only_one(work):
        if restart:
            discard(path)
            for file in [*work.glob("*.npz")]:
                file.unlink()
        store = _Store(system, path, work, key)
        if store.n_committed < n:
            store.configurations = _configurations(system, work, key, progress)
            store.drain()
            _compute(system, store, workers, scheduler, progress)
        _write_splits(system, root, path, n)
        shutil.rmtree(work)
    if work != root.with_name(f".{root.name}.work") and not any(work.parent.iterdir()):
        work.parent.rmdir()
    return path


def _settings(system: System) -> dict[str, Any]:
    """All that decides what the snapshots of a system are, by name."""
    told = {name: spelled(getattr(system, name)) for name in ("geometries", "engine")}
    numbers = ("spacing", "keepbits", "quantity", "resolution")
    return told | {name: getattr(system, name) for name in numbers}


def _compute(
    system: System, store: _Store, workers: int, scheduler: str | None, progress: bool
) -> None:
    """Compute what is missing; raise at the end if something could not be."""
    n = len(store.configurations)
    missing = {i: store.configurations[i] for i in store.missing()}
    options = {"workers": workers, "scheduler": scheduler}
    failures: dict[int, str] = {}
    with progress_bar(
        total=n, initial=n - len(missing), desc=system.name, disable=not progress
    ) as bar:
        for index, result in evaluate_all(system.engine, missing, store.grid, **options):
            if "error" in result:
                failures[index] = result["error"]
                if len(failures) == min(_HOPELESS, len(missing)) and not store.kept:
                    break
                continue
            store.keep(index, result)
            bar.update()
    if failures:
        reasons = "\n".join(failures[i] for i in sorted(failures))
        raise GenerationError(
            f"{system.name}: {len(failures)} of {n} snapshots failed, {n - len(store.missing())} "
            f"are kept; run the same command again to retry\n{reasons}"
        )


class _Store:
    """The trajectory, and the parts that wait for their turn."""

    def __init__(self, system: System, path: Path, work: Path, key: Mapping[str, Any]) -> None:
        self.system, self.path, self.work, self.key = system, path, work, key
        self.configurations: list[Atoms] = []
        self.kept = 0  # in this run
        recover(path)
        self._writer = TrajectoryWriter(path) if path.exists() else None
        for index in range(self.n_committed):
            self._part(index).unlink(missing_ok=True)

    @property
    def n_committed(self) -> int:
        return self._writer.n_committed if self._writer else 0

    @property
    def grid(self) -> tuple[int, ...]:
        return grid_shape(self.configurations[0], self.system.spacing)

    def _part(self, index: int) -> Path:
        return self.work / f"part-{index:06d}.npz"

    def missing(self) -> list[int]:
        """Return the snapshots that are neither committed nor waiting."""
        rest = range(self.n_committed, len(self.configurations))
        return [index for index in rest if not self._part(index).exists()]

    def keep(self, index: int, result: Result) -> None:
        """Make a result safe, then commit what is next in order."""
        save_arrays(self._part(index), result)
        self.kept += 1
        self.drain()

    def drain(self) -> None:
        """Commit parts as far as they go without a gap."""
        while (part := self._part(self.n_committed)).exists():
            self._append(self.n_committed, load_arrays(part))
            part.unlink()

    def _append(self, index: int, result: Result) -> None:
        atoms = self.configurations[index]
        if self._writer is None:
            self._writer = self._create(atoms, json.loads(str(result["description"])))
        self._writer.append(
            result["density"],
            atoms.info["time"],
            positions=atoms.positions,
            forces=result["forces"],
            energy=float(result["energy"]),
            temperature=atoms.info["temperature"],
            seconds=float(result["seconds"]),
        )
        self._writer.sync()  # before the part goes

    def _create(self, atoms: Atoms, description: Mapping[str, Any]) -> TrajectoryWriter:
        attrs = {**description, **self.system.provenance, "recipe": as_recipe(self.key)}
        attrs |= {name: self.key[name] for name in ("system", "n_snapshots", "seed")}
        attrs["configurations"] = f"{atoms.info['source']}; `time` is that of the dynamics"
        return create_trajectory(
            self.path,
            n_frames=len(self.configurations),
            grid=self.grid,
            cell=np.asarray(atoms.cell),
            numbers=atoms.numbers,
            valence_charges=valence_charges(description, atoms.numbers),
            pbc=atoms.pbc,
            quantity=self.system.quantity,
            attrs=attrs,
            extra_scalars={"seconds": "s"},
            keepbits=self.system.keepbits,
            resolution=self.system.resolution,
            allow_negative=True,  # a truncated Fourier series dips below zero where nothing is
        )


def _configurations(
    system: System, folder: Path, key: Mapping[str, Any], progress: bool
) -> list[Atoms]:
    """Return the configurations, drawn at the first call and read ever after."""
    work = Work(folder / "configurations.npz", key)
    if (found := work.load()) is None:
        drawn = system.geometries(key["n_snapshots"], seed=key["seed"], progress=progress)
        arrays: Result = {"positions": np.array([atoms.positions for atoms in drawn])}
        arrays |= {"numbers": drawn[0].numbers, "cell": np.array(drawn[0].cell)}
        arrays |= {name: [a.info[name] for a in drawn] for name in ("time", "temperature")}
        work.save(arrays | {"pbc": drawn[0].pbc, "source": drawn[0].info["source"]})
        found = work.load()
    configurations = []
    for R, time, T in zip(found["positions"], found["time"], found["temperature"], strict=True):
        atoms = Atoms(found["numbers"], R, cell=found["cell"], pbc=found["pbc"])
        atoms.info = {"time": float(time), "temperature": float(T), "source": str(found["source"])}
        configurations.append(atoms)
    return configurations


def _write_splits(system: System, root: Path, path: Path, n: int) -> None:
    """Add the splits of this run to those of the store, in proportion to the planned ones."""
    run = str(path.relative_to(root))
    ends = np.array([0, *accumulate(system.splits.values())])
    ends = np.rint(ends * (n / ends[-1])).astype(int).tolist()
    splits = read_splits(root)
    for name, start, stop in zip(system.splits, ends, ends[1:], strict=False):
        if start < stop:
            label = name if run == "." else f"{name}-{run}"
            splits[label] = {"run": run, "start": start, "stop": stop}
    write_splits(root, splits)


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Keep a second process off; the lock ends with the process that holds it."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                reason = "another process is making these snapshots; wait for it, or end it"
                raise GenerationError(f"{work}: {reason}") from error
        yield
