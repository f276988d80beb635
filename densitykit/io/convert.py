"""A trajectory made of the files of other programs.

Frames have one grid and one set of atoms; the cell may move with small steps from frame to frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from densitykit.errors import TrajectoryError
from densitykit.io.formats import Frame, Reading, count_frames, iter_frames
from densitykit.io.metadata import set_attributes
from densitykit.io.nuclei import Steps, differentiate
from densitykit.io.progress import progress_bar
from densitykit.io.reader import open_trajectory
from densitykit.io.rebuild import extend_trajectory, free_cell, trim_trajectory
from densitykit.io.splits import cut_in_time, split_in_time
from densitykit.io.store import PathLike, fault, recover
from densitykit.io.writer import TrajectoryWriter, create_trajectory

__all__ = ["convert"]

_STRAIN = 0.05  # largest relative change of the cell from frame to frame of one run
_CLIPPED = 0.01  # largest share of electrons that may be clipped


def convert(
    paths: Sequence[PathLike],
    out: PathLike,
    *,
    time_step: float,
    start: float = 0.0,
    reading: Reading | None = None,
    add: bool = False,
    clip: bool = False,
    trajectory: PathLike | None = None,
    splits: Sequence[float] | None = None,
    gap: float = 0.0,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Make a trajectory of files, in the order given; a killed conversion continues.

    To continue, or to add files that came later, give all files again, the old ones first.

    Parameters
    ----------
    paths
        See `iter_frames`. A file may hold several frames.
    out
        The trajectory. One without committed frames is made anew.
    time_step
        Time between frames, fs.
    start
        Time of the first frame, fs.
    reading
        What the files do not say: units, end points.
    add
        The files are parts of densities: AECCAR0 and AECCAR2 of one name are added, others all.
    clip
        Set small negative values to 0; `n_clipped` and `clipped_electrons` tell of each frame.
    trajectory
        Energies, forces, velocities: a file that ASE reads. None takes vasprun.xml, OUTCAR or
        an extxyz file beside the densities, if there. Velocities that are not there are made.
    splits, gap
        See `split_in_time`; looked at before anything is converted.
    progress
        Show a progress bar over the files.
    **options
        Of `create_trajectory`: `quantity`, `keepbits`, `allow_negative`, `overwrite`, ...

    Returns
    -------
    Path
        `out`, with as many frames as the files.

    Raises
    ------
    TrajectoryError
        No files, one that cannot be read, one with another cell, grid or atoms, or `out` was
        made of other files or with other options.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not paths or not 0 < time_step < np.inf:
        raise TrajectoryError(f"{len(paths)} files, {time_step} fs apart; give some, and a time")
    for path in [*paths, *([Path(trajectory)] if trajectory else [])]:
        if not path.exists():
            raise TrajectoryError(f"{path}: no such file; correct the path")
    groups, out = _groups(paths, add), Path(out)
    if splits:
        n = _expected(groups, reading)
        cut_in_time(start + time_step * np.arange(n), splits, gap, f"{paths[0]} and on")
    steps = Steps(Path(trajectory) if trajectory else None)
    options = {"quantity": _quantity(groups[0]), **options}
    store = _Store(out, options, clip, len(groups))
    for index, path, frame in store.frames(groups, reading, progress):
        store.add(index, path, frame, start + time_step * index, steps)
    _finish(out, steps, clip)
    if splits:
        split_in_time(out, splits, gap)
    return out


def _groups(paths: list[Path], add: bool) -> list[tuple[Path, ...]]:
    """Return the files of each density, or series of densities."""
    if not add:
        return [(path,) for path in paths]
    groups: dict[str, list[Path]] = {}
    for path in paths:
        whole = re.sub(r"AECCAR[012]", "AECCAR", path.name)
        key = str(path.with_name(whole)) if whole != path.name else ""
        groups.setdefault(key, []).append(path)
    if len({len(group) for group in groups.values()}) > 1 or len(paths) == len(groups):
        names = ", ".join(" + ".join(p.name for p in group) for group in groups.values())
        fix = "give the parts of each density, such as AECCAR0 and AECCAR2"
        raise TrajectoryError(f"{paths[0]}: no parts to add in {names}; {fix}")
    return [tuple(group) for group in groups.values()]


def _expected(groups: list[tuple[Path, ...]], reading: Reading | None) -> int:
    """Return the number of frames, as far as it can be told without reading everything."""
    first = count_frames(groups[0][0], reading)
    rest = (count_frames(group[0], reading) for group in groups[1:]) if first > 1 else groups[1:]
    return first + (sum(rest) if first > 1 else len(groups) - 1)


def _quantity(group: tuple[Path, ...]) -> str:
    name = group[0].name.upper()
    core = "core" if "AECCAR0" in name else "valence"
    return "total" if "AECCAR" in name and len(group) > 1 else core


class _Store:
    """The trajectory while it is made: begun with the first frame, or continued."""

    def __init__(self, out: Path, options: dict[str, Any], clip: bool, n_frames: int) -> None:
        self.out, self.options, self.clip, self.n_frames = out, options, clip, n_frames
        self.writer = _continued(out, options, clip)
        self.run = open_trajectory(out) if self.writer else None
        self.done = self.writer.n_committed if self.writer else 0

    def frames(
        self, groups: list[tuple[Path, ...]], reading: Reading | None, progress: bool
    ) -> Iterator[tuple[int, Path, Frame]]:
        """Yield index, file and frame; of what was done before, only the last file again."""
        first_file = first = 0
        if self.done and "source_file" in self.run:
            files = self.run["source_file"].values
            first_file = int(min(files[-1], len(groups) - 1))
            first = int(np.searchsorted(files, first_file))
        self.file, index = first_file, first
        bar = progress_bar(groups[first_file:], "converting", unit="file", disable=not progress)
        for self.file, group in enumerate(bar, first_file):
            for frame in _summed(group, reading):
                yield index, group[0], frame
                index += 1

    def add(self, index: int, path: Path, frame: Frame, time: float, steps: Steps) -> None:
        """Append a frame, or compare it with the one that is there."""
        if self.clip:
            frame, clipped = _clipped(path, frame)
        if self.writer is None:
            self._create(frame)
        self._compare(path, frame, index)
        if index < self.done:
            _compare_again(path, frame, time, self.run, index)
            return
        if self.writer.n_committed == self.writer.n_frames:
            self.writer = extend_trajectory(self.out, 2 * self.writer.n_frames)
        values = {"positions": frame.positions, "source_file": self.file}
        values |= {} if frame.forces is None else {"forces": frame.forces}
        values |= steps.of(path, frame) | (clipped if self.clip else {})
        if "magnetization" in self.run:
            values["magnetization"] = frame.magnetization
        if "cell" in self.writer.fields:
            values["cell"] = frame.cell
        try:
            self.writer.append(frame.density, time, **values)
        except TrajectoryError as error:
            raise TrajectoryError(f"{path}, for {error}") from error
        self.cell = frame.cell

    def _create(self, frame: Frame) -> None:
        scalars = {"n_clipped": "1", "clipped_electrons": "1"} if self.clip else {}
        given = {"grid": frame.density.shape, "cell": frame.cell, "numbers": frame.numbers}
        given |= {"extra_scalars": {"source_file": "1", **scalars}}
        given |= {"magnetization": frame.magnetization is not None}
        count = float(frame.density.mean() * abs(np.linalg.det(frame.cell)))
        if frame.valence is not None and self.options["quantity"] == "valence":
            if abs(frame.valence.sum() - count) < max(2, 0.05 * count):  # charged cells, too
                given["valence_charges"] = frame.valence
        options = given | self.options | {"overwrite": True}
        self.writer = create_trajectory(self.out, n_frames=self.n_frames, **options)
        self.run, self.cell = open_trajectory(self.out), frame.cell

    def _compare(self, path: Path, frame: Frame, index: int) -> None:
        """Complain about a frame that is not of this run; let the cell move if it does."""
        cell = self.run["cell"].values
        cell = (
            cell if cell.ndim == 2 else cell[min(index, len(cell) - 1)] if len(cell) else self.cell
        )
        before = cell if index < self.done else getattr(self, "cell", cell)
        grid = frame.density.shape == self.run["density"].shape[1:]
        near = not grid or np.abs(frame.cell @ np.linalg.inv(before) - np.eye(3)).max() < _STRAIN
        numbers = self.run["numbers"].values if "numbers" in self.run else None
        same = {"grid": grid, "cell": near, "atoms": np.array_equal(frame.numbers, numbers)}
        if wrong := _differing(same):
            problem = f"{wrong} differ from those of {self.out}"
            raise TrajectoryError(f"{path}: {problem}; give files of one run, in one trajectory")
        moved = not np.allclose(frame.cell, before, atol=1e-4)
        if moved and "cell" not in self.writer.fields and index >= self.done:
            self.writer = free_cell(self.out)
            self.run = open_trajectory(self.out)


def _continued(out: Path, options: dict[str, Any], clip: bool) -> TrajectoryWriter | None:
    """The writer of a store that has frames; None where one is to be made."""
    recover(out)  # a kill may have left it under another name
    if not out.exists() or options.get("overwrite"):
        return None
    writer = TrajectoryWriter(out)
    if not writer.n_committed:  # nothing to lose, and options that refused a frame may be new
        return None
    kept = open_trajectory(out)["density"].attrs | {"clip": "n_clipped" in writer.fields}
    given = {name: options.get(name) for name in ("keepbits", "resolution", "allow_negative")}
    for name, value in {"quantity": options["quantity"], **given, "clip": clip}.items():
        if value and value != kept.get(name):
            problem = f"was made with {name}={kept.get(name)}, not {value}"
            fix = "give another path, or overwrite=True to begin anew"
            raise fault(out, "density", problem, fix)
    return writer


def _summed(group: tuple[Path, ...], reading: Reading | None) -> Iterator[Frame]:
    """Yield frames, each the sum of those of all files of the group."""
    series = [iter_frames(path, reading) for path in group]
    try:
        for first, *others in zip(*series, strict=True):
            for path, other in zip(group[1:], others, strict=True):
                same = {
                    "grid": other.density.shape == first.density.shape,
                    "cell": np.allclose(other.cell, first.cell, atol=1e-4),
                    "atoms": np.array_equal(other.numbers, first.numbers),
                }
                if wrong := _differing(same):
                    fix = "give the parts of one density"
                    raise TrajectoryError(f"{path}: {wrong} unlike {group[0]}; {fix}")
                first = replace(first, density=first.density + other.density, valence=None)
            yield first
    except ValueError as error:
        if isinstance(error, TrajectoryError):
            raise
        fix = "give files with as many frames"
        raise TrajectoryError(f"{', '.join(map(str, group))}: {error}; {fix}") from error


def _clipped(path: Path, frame: Frame) -> tuple[Frame, dict[str, float]]:
    """Return a frame without negative values, and how many there were."""
    negative = frame.density < 0
    voxel = abs(np.linalg.det(frame.cell)) / frame.density.size
    electrons = -float(frame.density[negative].sum() * voxel)
    if electrons > _CLIPPED * np.abs(frame.density).sum() * voxel:
        problem = f"negative values hold {electrons:.3g} electrons, too many to clip"
        raise TrajectoryError(f"{path}: {problem}; give a density, or --allow-negative")
    told = {"n_clipped": int(negative.sum()), "clipped_electrons": electrons}
    return replace(frame, density=np.maximum(frame.density, 0)), told


def _compare_again(path: Path, frame: Frame, time: float, run: xr.Dataset, index: int) -> None:
    """Complain about a frame that is not the committed one whose place it has."""
    kept, attrs = run.isel(time=index), run["density"].attrs
    rounded = {"rtol": 2.0 ** -attrs.get("keepbits", 23), "atol": attrs.get("resolution", 1e-30)}
    same = {
        "time": np.isclose(time, kept["time"].values, rtol=0, atol=1e-6),
        "positions": np.allclose(frame.positions, kept["positions"].values, rtol=0, atol=1e-6),
        "density": np.allclose(frame.density, kept["density"].values, **rounded),
    }
    if wrong := _differing(same):
        problem = f"unlike frame {index} of {run.encoding['source']} in {wrong}"
        fix = "give all files of before, in that order and with those times, then the new ones"
        raise TrajectoryError(f"{path}: {problem}; {fix}; or give another path")


def _differing(same: dict[str, bool]) -> str:
    """Names of what is not the same."""
    return ", ".join(name for name, equal in same.items() if not equal)


def _finish(out: Path, steps: Steps, clip: bool) -> None:
    """Leave no empty frames; say where the motion comes from, and what was clipped."""
    trim_trajectory(out)
    for name, source in steps.sources.items():
        set_attributes(out / name, source=source)
    if clip:
        n, most = (zarr.open_array(out / name) for name in ("n_clipped", "clipped_electrons"))
        clipped = {"n_clipped": int(n[:].sum()), "clipped_electrons": float(most[:].max())}
        set_attributes(out / "density", **clipped)
    differentiate(out)
