"""What is drawn: densities, and the cell, atoms and times that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from densitykit.errors import ShapeError

__all__ = ["Drawable", "Run", "as_floats", "as_run", "as_runs", "at_common_times", "difference"]


@dataclass(frozen=True)
class Run:
    """Frames of one density; a store is read frame by frame, where it is drawn.

    Attributes
    ----------
    density
        Shape (T, X, Y, Z), in angstrom**-3.
    times
        Shape (T,), in fs, or None.
    cell
        Shape (3, 3) or (T, 3, 3), in angstrom, or None: lengths are then grid steps.
    numbers, positions
        Shapes (N,), and (T, N, 3) in angstrom, or None.
    reference
        A density of the same shape that is taken off, or None.
    """

    density: Any
    times: NDArray[np.floating] | None = None
    cell: NDArray[np.floating] | None = None
    numbers: NDArray[np.integer] | None = None
    positions: Any = None
    reference: Any = None

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.density.shape[1:])

    @property
    def unit(self) -> str:
        return "grid point" if self.cell is None else "Å"

    @property
    def signed(self) -> bool:
        """Whether it is a difference of densities."""
        return self.reference is not None

    @property
    def kind(self) -> str:
        return "Δρ" if self.signed else "ρ"

    def field(self, frame: int = 0) -> NDArray[np.floating]:
        """Density of one frame, shape (X, Y, Z)."""
        field = np.asarray(self.density[frame])
        return field - np.asarray(self.reference[frame]) if self.signed else field

    def finite_field(self, frame: int = 0) -> NDArray[np.float64]:
        """Density of one frame, which has neither NaN nor infinities, or ShapeError."""
        field = self.field(frame).astype(float)
        if not np.isfinite(field).all():
            raise ShapeError("the density is not finite; draw a frame without NaN and infinities")
        return field

    def cell_at(self, frame: int = 0) -> NDArray[np.float64]:
        """Lattice vectors of one frame; grid steps where they are unknown."""
        if self.cell is None:
            return np.diag(self.grid).astype(float)
        return self.cell if self.cell.ndim == 2 else self.cell[frame]

    def atoms(self, frame: int = 0) -> tuple[NDArray[np.integer], NDArray[np.float64]] | None:
        """Atomic numbers and positions of one frame, where they and the cell are known."""
        if self.positions is None or self.numbers is None or self.cell is None:
            return None
        positions = np.asarray(self.positions[frame], float)
        known = np.isfinite(positions).all(axis=1)
        return self.numbers[known], positions[known]

    def moment(self, frame: int = 0) -> str:
        """Time of one frame in words; empty where it is unknown."""
        return "" if self.times is None else f"t = {self.label(frame)}"

    def label(self, frame: int = 0) -> str:
        """Time of one frame, or its number."""
        return f"frame {frame}" if self.times is None else f"{self.times[frame]:.7g} fs"

    def take(self, frames: Sequence[int]) -> Run:
        """Only these frames."""
        moves = ["cell"] * (np.ndim(self.cell) == 3)
        names = ["density", "reference", "times", "positions", *moves]
        moving = {key: getattr(self, key) for key in names}
        frames = np.asarray(frames)
        return replace(self, **{k: v if v is None else v[frames] for k, v in moving.items()})

    def shown(self, max_frames: int) -> range:
        """Frames of a film: all, or every so many, `max_frames` at most."""
        if not max_frames >= 1:
            raise ShapeError(f"max_frames={max_frames}; pass how many frames to show, 1 or more")
        n = len(self.density)
        return range(0, n, -(-n // int(max_frames)))


#: a trajectory, or a density of shape (X, Y, Z) or (T, X, Y, Z) in angstrom**-3
Drawable = xr.Dataset | ArrayLike | Run


def as_floats(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """An array, or ShapeError where it is none of numbers."""
    try:
        return np.asarray(values, float)
    except (ValueError, TypeError) as error:
        raise ShapeError(f"{name}: {error}; pass an array of numbers") from error


def as_run(
    drawn: Drawable,
    name: str = "density",
    cell: ArrayLike | None = None,
    times: ArrayLike | None = None,
) -> Run:
    """Take a trajectory, or a density with what its coordinates and `cell`, `times` say.

    Raises
    ------
    ShapeError
        No density, not one run in three dimensions, or a cell or times that do not fit.
    """
    if isinstance(drawn, Run):
        return drawn
    is_dataset = isinstance(drawn, xr.Dataset)
    if is_dataset and "density" not in drawn:
        raise ShapeError(f"{name}: there is no variable 'density'; give a trajectory")
    density = _frames(drawn["density"] if is_dataset else drawn, name)
    near = drawn if is_dataset else getattr(drawn, "coords", {})
    known = {key: near[key].values for key in ("cell", "numbers", "time") if key in near}
    times = known.get("time") if times is None else times
    times = None if times is None else np.atleast_1d(as_floats(times, "times"))
    cell = _lattice(known.get("cell") if cell is None else cell)
    per_frame = {"times": times, "a cell for each frame": cell if np.ndim(cell) == 3 else None}
    for what, values in per_frame.items():
        if values is not None and len(values) != len(density):
            problem = f"{name} has shape {tuple(density.shape)}, {what} {values.shape}"
            raise ShapeError(f"{problem}; pass one for each frame")
    positions = near.get("positions")
    if positions is not None and "time" not in positions.dims:
        positions = positions.expand_dims(time=len(density))
    return Run(density, times, cell, known.get("numbers"), positions)


def _frames(density: ArrayLike, name: str) -> Any:
    """A density as (T, X, Y, Z)."""
    is_labelled = isinstance(density, xr.DataArray)
    density = as_floats(density, name) if isinstance(density, list | tuple) else density
    sizes = f"dimensions {dict(density.sizes)}" if is_labelled else f"shape {np.shape(density)}"
    if is_labelled and {"x", "y", "z"} <= set(density.dims):
        density = density.transpose(..., "x", "y", "z")
        density = density if "time" in density.dims else density.expand_dims("time")
    elif np.ndim(density) == 3 and "time" not in getattr(density, "dims", ()):
        density = np.asarray(density)[None]
    if np.ndim(density) != 4 or 0 in density.shape:
        fix = "give one run in 3-D, (X, Y, Z) or (T, X, Y, Z), that is not empty"
        hint = "a store: dk.open_trajectory; ensembles: isel(member=0); chains: curve_film"
        raise ShapeError(f"{name} has {sizes}; {fix} ({hint})")
    return density


def _lattice(cell: ArrayLike | None) -> NDArray[np.float64] | None:
    """Lattice vectors (3, 3) or (T, 3, 3) from an edge, three edges, or vectors, in angstrom."""
    if cell is None:
        return None
    cell = as_floats(cell, "the cell")
    cell = np.eye(3) * cell if cell.shape in ((), (3,)) else cell
    fix = "pass an edge, three edges or three lattice vectors in rows, in angstrom"
    if cell.ndim not in (2, 3) or cell.shape[-2:] != (3, 3):
        raise ShapeError(f"the cell has shape {cell.shape}; {fix}")
    if not np.isfinite(cell).all() or (abs(np.linalg.det(cell)) < 1e-9).any():
        raise ShapeError(f"the cell {cell.tolist()} has no volume; {fix}")
    return cell


def difference(density: Drawable, reference: Drawable) -> Run:
    """A density less a reference, at the times of both, to be drawn by any figure.

    Positive and negative values have colours of their own. The reference may be another run, a
    rollout, or what atoms that know nothing of one another would have
    (`models.nuclear.superposition.superposed`); one frame serves all.
    """
    run, base = as_run(density), as_run(reference, "reference")
    if len(base.density) == 1:
        base = replace(run, density=np.broadcast_to(base.field(), (len(run.density), *base.grid)))
    both = at_common_times(as_runs({"density": run, "reference": base}))
    run, base = both.values()
    return replace(run, reference=base.density)


def as_runs(
    drawn: Drawable | Mapping[str, Drawable],
    cell: ArrayLike | None = None,
    times: ArrayLike | None = None,
) -> dict[str, Run]:
    """One density, named "", or several on one grid; those without a cell take the first one's."""
    if not isinstance(drawn, Mapping) or isinstance(drawn, xr.Dataset):
        drawn = {"": drawn}
    if not drawn:
        raise ShapeError("there is nothing to draw; pass at least one field")
    runs = {name: as_run(thing, name or "density", cell, times) for name, thing in drawn.items()}
    first, *_ = runs.values()
    for name, run in runs.items():
        if run.grid != first.grid:
            problem = f"{name} has the grid {run.grid}, not {first.grid}"
            raise ShapeError(f"{problem}; pass fields on one grid (densitykit.fields.resample)")
    lone = {name: replace(r, cell=first.cell) for name, r in runs.items() if r.cell is None}
    return runs | lone


def at_common_times(runs: Mapping[str, Run]) -> dict[str, Run]:
    """The frames at times that all runs have, to 0.005 fs; without times, all of them.

    Raises
    ------
    ShapeError
        No common times, times that do not increase, or unlike numbers of frames without times.
    """
    first, *others = runs.values()
    if not others:
        return dict(runs)
    lengths = {name: len(run.density) for name, run in runs.items()}
    if any(run.times is None for run in runs.values()):
        if len(set(lengths.values())) > 1:
            raise ShapeError(f"unlike numbers of frames, {lengths}; pass runs with times")
        return dict(runs)
    times = [pd.Index(run.times) for run in runs.values()]
    if not all(t.is_monotonic_increasing and t.is_unique for t in times):
        raise ShapeError("times do not increase; sort the runs, and drop frames of equal times")
    picks = np.array([t.get_indexer(times[0], method="nearest", tolerance=5e-3) for t in times])
    picks = picks[:, (picks >= 0).all(axis=0)]
    if not picks.size:
        spans = " and ".join(f"{t[0]:g} to {t[-1]:g} fs" for t in times)
        raise ShapeError(f"no common times in {spans}; shift the times of one")
    return {
        name: run.take(frames) for (name, run), frames in zip(runs.items(), picks, strict=True)
    }
