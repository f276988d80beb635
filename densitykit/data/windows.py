r"""Windows: the only sample. A few raw frames of a run, with everything a model may ask.

A window holds frames at *offsets* from the present one, 0: ``(-2, -1, 0)`` is the present and two
frames before it, as a rate of second order wants them,

.. math:: \dot\rho_t = (3\rho_t - 4\rho_{t-1} + \rho_{t-2}) / (2\,\Delta t) + O(\Delta t^2),

which never knows its own future; targets lie whole horizons ahead. Rates, log-normal variables and
nuclei are made from the window by the model that wants them: nothing is dropped that is later
rebuilt.

`Windows` reads frames from the store when they are asked for, through a cache of bounded size, so
a run may be larger than memory. Batches are drawn with a generator seeded by (seed, step, rank):
a resumed training sees what an uninterrupted one sees.
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from densitykit.data.symmetry import augment
from densitykit.errors import TrajectoryError, WindowError
from densitykit.io.reader import open_split
from densitykit.io.work import fingerprint

__all__ = [
    "Window",
    "Windows",
    "lag_in_frames",
    "load_windows",
    "step_generator",
    "suitable_horizon",
]

CACHE_BYTES = 2**28
_BLOCK = 32  # frames read at once
_MOVING = ("density", "times", "cell", "positions", "velocities")


@dataclass(frozen=True)
class Window:
    """Frames of B members, K each.

    Attributes
    ----------
    density
        angstrom**-3, shape (B, K, X, Y, Z), float32.
    times
        fs, shape (B, K).
    cell
        Lattice vectors in rows, angstrom, shape (B, 3, 3).
    offsets
        Frames from the present one, ascending; by default the present is the last.
    numbers
        Atomic numbers, shape (N,), or None.
    positions, velocities
        angstrom and angstrom/fs, shape (B, K, N, 3), or None where the store has none.
    source
        Where the frames come from, for messages.
    """

    density: Tensor
    times: Tensor
    cell: Tensor
    offsets: tuple[int, ...] = ()
    numbers: Tensor | None = None
    positions: Tensor | None = None
    velocities: Tensor | None = None
    source: str = "window"

    def __post_init__(self) -> None:
        if self.density.ndim != 5 or self.cell.shape != (len(self.density), 3, 3):
            raise WindowError(
                f"{self.source}: density {tuple(self.density.shape)} and cell "
                f"{tuple(self.cell.shape)}; give (B, K, X, Y, Z) and (B, 3, 3)"
            )
        frames = self.density.shape[1]
        if not self.offsets:
            object.__setattr__(self, "offsets", tuple(range(1 - frames, 1)))

    def __len__(self) -> int:
        return len(self.density)

    def __repr__(self) -> str:
        frames, atoms = len(self.offsets), 0 if self.numbers is None else len(self.numbers)
        return (
            f"Window of {len(self)} x {frames} frames {self.time_step:g} fs apart, "
            f"grid {' x '.join(map(str, self.grid))}, {atoms} atoms, from {self.source}"
        )

    def __getitem__(self, members: slice | Tensor) -> Self:
        return self._map(lambda x: x[members])

    @property
    def grid(self) -> tuple[int, ...]:
        """Numbers of points, (X, Y, Z)."""
        return tuple(self.density.shape[-3:])

    @property
    def time_step(self) -> float:
        """Time between neighbouring frames in fs; NaN for a single frame."""
        if len(self.offsets) < 2:
            return float("nan")
        span = float(self.times[0, -1] - self.times[0, 0])
        return span / (self.offsets[-1] - self.offsets[0])

    @property
    def now(self) -> Tensor:
        """Time of the present frame in fs, shape (B,)."""
        return self.times[:, self.offsets.index(0)]

    def at(self, offset: int) -> Tensor:
        """Return the density of one frame, (B, X, Y, Z)."""
        return self.density[:, self.offsets.index(offset)]

    def past(self, context: int, end: int = 0) -> Self:
        """Return the window of ``context`` frames that ends at an offset, which is its present.

        Raises
        ------
        WindowError
            Frames are missing; both numbers are named.
        """
        wanted = range(end - context + 1, end + 1)
        if not set(wanted) <= set(self.offsets):
            have = sum(offset <= end for offset in self.offsets)
            raise WindowError(
                f"{self.source}: {context} frames up to the present are needed, the window has "
                f"{have}; load it with context={context} or more"
            )
        if end == 0 and context == len(self.offsets):
            return self
        chosen = [self.offsets.index(offset) for offset in wanted]
        parts = {name: x[:, chosen] for name, x in self._moving().items() if name != "cell"}
        return self.replace(**parts, offsets=tuple(range(1 - context, 1)))

    def replace(self, **changes: Any) -> Self:
        """Return a window with other values of some attributes."""
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> Self:
        """Return the window on another device; cell and times stay in double precision."""
        return self._map(lambda x: x.to(device))

    def expand(self, members: int) -> Self:
        """Return an ensemble of equal members of a window of one."""
        return self._map(lambda x: x.expand(members, *x.shape[1:]))

    @classmethod
    def stack(cls, windows: Sequence[Window]) -> Self:
        """Return one window of all members."""
        names = windows[0]._moving()
        joined = {name: torch.cat([w._moving()[name] for w in windows]) for name in names}
        return windows[0].replace(**joined)

    def _moving(self) -> dict[str, Tensor]:
        fields = {name: getattr(self, name) for name in _MOVING}
        return {name: x for name, x in fields.items() if x is not None}

    def _map(self, function: Any) -> Self:
        return self.replace(**{name: function(x) for name, x in self._moving().items()})


class Windows:
    """Windows of one run, read when they are asked for.

    Parameters
    ----------
    run
        Equally spaced frames, from `densitykit.io.open_trajectory` or `open_split`.
    horizon
        Time from the present to a target in fs, a multiple of the time between frames; by default
        `suitable_horizon`.
    context
        Frames up to the present, and up to each target.
    steps
        Targets, a horizon apart.
    cache_bytes
        Most memory that frames may take.

    Raises
    ------
    TrajectoryError
        Frames are not equally spaced, too few, in a cell that changes, or not in 3-D.
    """

    def __init__(
        self,
        run: xr.Dataset,
        horizon: float | None = None,
        context: int = 3,
        steps: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.run, self.source = run, run.encoding.get("source", "trajectory")
        self.times, self.time_step = _equal_times(run, self.source)
        self.cell = torch.from_numpy(_constant_cell(run, self.source))
        self.frames = _Frames(run["density"], self.source, cache_bytes)
        self.context, self.steps, self.attrs = context, steps, dict(run.attrs)
        self.horizon = suitable_horizon(run) if horizon is None else float(horizon)
        self.lag = lag_in_frames(self.horizon, self.time_step, self.source)
        ends = (k * self.lag for k in range(steps + 1))
        self.offsets = tuple(sorted({end - j for end in ends for j in range(context)}))
        if len(self) < 1:
            raise TrajectoryError(
                f"{self.source}: {len(self.times)} frames are fewer than the "
                f"{self.offsets[-1] + context} of one window ({context} frames and {steps} x "
                f"{self.horizon:g} fs); use a longer run or a shorter horizon"
            )
        self.numbers = _optional(run, "numbers")
        self.positions, self.velocities = (_optional(run, n) for n in ("positions", "velocities"))
        self._electrons = _optional(run, "n_electrons")

    def __len__(self) -> int:
        return max(0, len(self.times) - self.offsets[-1] - self.context + 1)

    def __repr__(self) -> str:
        grid = " x ".join(map(str, self.grid))
        return (
            f"{len(self)} windows of {self.source}: grid {grid}, {self.context} frames "
            f"{self.time_step:g} fs apart, {self.steps} target(s) after {self.horizon:g} fs"
        )

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Window:
        """Return the windows of these indices as one; a single index gives a window of one."""
        try:
            chosen = torch.arange(len(self))[index].reshape(-1).tolist()
        except IndexError:
            raise WindowError(
                f"{self.source}: there is no window {index}; choose 0 to {len(self) - 1}"
            ) from None
        needed = 4 * len(chosen) * len(self.offsets) * int(np.prod(self.grid))
        if needed > _memory():
            raise WindowError(
                f"{self.source}: {len(chosen)} windows at once take {needed / 1e9:.0f} GB; take "
                "fewer (--batch)"
            )
        frames = np.array([[i + self.context - 1 + k for k in self.offsets] for i in chosen])
        atoms = {name: getattr(self, name) for name in ("positions", "velocities")}
        return Window(
            torch.stack([torch.stack([self.frames[int(j)] for j in row]) for row in frames]),
            torch.from_numpy(self.times[frames]),
            self.cell.expand(len(chosen), 3, 3),
            self.offsets,
            self.numbers,
            **{name: None if x is None else x[frames] for name, x in atoms.items()},
            source=self.source,
        )

    @property
    def grid(self) -> tuple[int, ...]:
        """Numbers of points, (X, Y, Z)."""
        return self.frames.grid

    def sample_batch(self, batch: int, generator: torch.Generator) -> Window:
        """Return a random batch, each member with a symmetry and a shift of its own."""
        chosen = torch.randint(len(self), (batch,), generator=generator)
        return augment(self[chosen], generator)

    def every(self, stride: int, limit: int | None = None) -> list[int]:
        """Return the indices of each so many windows, thinned evenly to a limit."""
        indices = range(0, len(self), stride)
        return list(indices[:: max(1, -(-len(indices) // limit))] if limit else indices)

    def fingerprint(self) -> str:
        """Return a short word for what the windows hold.

        Times, cell, atoms, electron counts of all frames as they are stored, and three densities.
        """
        middle = {0, len(self.times) // 2, len(self.times) - 1}
        atoms = [self.numbers, self.positions, self.velocities, self._electrons]
        parts = [self.times, self.cell, *atoms, *(self.frames[i] for i in sorted(middle))]
        return f"{len(self)} windows, {self.horizon:g} fs, crc32 {fingerprint(parts):08x}"


def _memory() -> float:
    """Bytes of this machine; no bound where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return np.inf


class _Frames:
    """Densities of a run by frame, float32, the last used of them kept in memory.

    A run that fits into the budget is read in blocks, which costs a store of shards a tenth of
    single frames; of a longer one only what is asked for is read. They lie in one block of memory:
    frames allocated one by one between what is thrown away cost several times their size.
    """

    def __init__(self, density: xr.DataArray, source: str, budget: int) -> None:
        if density.ndim != 4:
            raise TrajectoryError(f"{source}: the density is not 3-D; models need (time, x, y, z)")
        self.density, self.source = density, source
        self.grid = tuple(density.shape[1:])
        self.room = max(1, int(budget // (4 * np.prod(self.grid))))
        self.block = _BLOCK if len(density) <= self.room else 1
        self.kept: OrderedDict[int, int] = OrderedDict()  # frame: place
        self.memory = torch.empty((min(self.room, len(density)), *self.grid))

    def __getitem__(self, frame: int) -> Tensor:
        if frame not in self.kept:
            self._read(frame - frame % self.block)
        self.kept.move_to_end(frame)
        return self.memory[self.kept[frame]].clone()

    def _read(self, start: int) -> None:
        """Read a block, look for values that are no density, make room for it."""
        part = np.asarray(self.density[start : start + self.block].values, np.float32)
        for frame, values in enumerate(part, start):
            if not (values.min() >= 0 and values.max() < np.inf):  # a NaN is neither
                raise TrajectoryError(
                    f"{self.source}: density, frame {frame}: NaN, infinite or negative values; "
                    f"run `densitykit validate {self.source}`, mend or drop the frame, or clip "
                    "small negative values with `densitykit convert --clip`"
                )
            full = len(self.kept) == len(self.memory)
            self.kept[frame] = self.kept.popitem(last=False)[1] if full else len(self.kept)
            self.memory[self.kept[frame]] = torch.from_numpy(values)


def load_windows(
    path: str | Path,
    split: str,
    horizon: float | None = None,
    context: int = 3,
    steps: int = 1,
    cache_bytes: int = CACHE_BYTES,
) -> Windows:
    """Return the windows of a stored split, ready for training or scoring; see `Windows`.

    Parameters
    ----------
    path
        Store with splits, see :func:`densitykit.io.open_split`.
    split
        "train", "validation" or "test".
    horizon, context, steps, cache_bytes
        See `Windows`. The default horizon is that of the training split.

    Raises
    ------
    TrajectoryError
        The split is missing or unusable.
    """
    if horizon is None:
        horizon = suitable_horizon(open_split(path, "train"))
    return Windows(open_split(path, split), horizon, context, steps, cache_bytes)


def suitable_horizon(run: xr.Dataset, correlation: float = 0.9) -> float:
    r"""Return the longest horizon over which the density stays correlated, in fs.

    It is the largest multiple of the time between frames at which
    :math:`\langle\delta\rho_t\,\delta\rho_{t+h}\rangle / \langle\delta\rho^2\rangle` is at least
    ``correlation``, and one frame where none is: shorter steps cost more rollout for the same
    time, longer ones lose what the present tells of the future.
    """
    times, spacing = _equal_times(run, run.encoding.get("source", "trajectory"))
    last = len(times) - 1
    starts = np.unique(np.linspace(0, last, 24).astype(int))
    density = run["density"]
    coarse = tuple(slice(None, None, -(-n // 32)) for n in density.shape[1:])  # voxels will do

    def frame(i: int) -> np.ndarray:
        return density[i].values[coarse].astype(np.float64)

    some = np.stack([frame(int(i)) for i in starts])
    mean = some.mean(axis=0)
    variance = np.mean((some - mean) ** 2)
    lag = 1
    for k in range(2, max(2, len(times) // 4)):
        pairs = [(x, int(i) + k) for x, i in zip(some, starts, strict=True) if i + k <= last]
        later = [np.mean((x - mean) * (frame(j) - mean)) for x, j in pairs]
        if np.mean(later) < correlation * variance:
            break
        lag = k
    return lag * spacing


def lag_in_frames(horizon: float, spacing: float, source: str = "trajectory") -> int:
    """Return how many frames a horizon spans, both in fs.

    Raises
    ------
    TrajectoryError
        It is no whole number of frames; the nearest horizons are named.
    """
    lag = round(horizon / spacing) if np.isfinite(horizon) else 0
    if lag < 1 or abs(lag * spacing - horizon) > 1e-6 * horizon:
        near = max(1, int(horizon // spacing)) if np.isfinite(horizon) else 1
        raise TrajectoryError(
            f"{source}: horizon {horizon:g} fs is no multiple of the {spacing:g} fs between "
            f"frames; choose {near * spacing:g} or {(near + 1) * spacing:g} fs (--horizon)"
        )
    return lag


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Return a generator that depends on nothing but (seed, step, rank)."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(words[0]))


def _equal_times(run: xr.Dataset, source: str) -> tuple[np.ndarray, float]:
    """Return times and the time between frames, in fs."""
    times = np.asarray(run["time"].values, float)
    steps = np.diff(times)
    if len(times) < 2 or not (steps[0] > 0 and np.allclose(steps, steps[0], rtol=1e-6)):
        raise TrajectoryError(
            f"{source}: time: {len(times)} frames, not equally spaced; windows need two or "
            "more at equal times: select an equally spaced part"
        )
    return times, float(steps.mean())


def _constant_cell(run: xr.Dataset, source: str) -> np.ndarray:
    """Return the one cell of a run, (3, 3)."""
    cell = np.asarray(run["cell"].values, float)
    if cell.ndim == 3:
        if len(cell) and np.ptp(cell, axis=0).max() > 1e-6:
            raise TrajectoryError(
                f"{source}: cell: it changes from frame to frame, and emulators "
                "need a constant one; give a run at constant volume"
            )
        cell = cell[0]
    return cell.copy()


def _optional(run: xr.Dataset, name: str) -> Tensor | None:
    """Return a variable as a tensor, or None where it is missing or was never given."""
    if name not in run:
        return None
    values = np.array(run[name].values)
    return torch.from_numpy(values) if np.isfinite(values).all() else None
