"""Windows of electrons in time: what emulators of them learn from.

A :class:`densitykit.data.windows.Window` of a chain, whose density is (B, K, X, 1, 1), with what
the density does not tell: the current, the density before anything happened, and the vector
potential of the whole run, which is given from outside and so known ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from densitykit.data.windows import Window
from densitykit.errors import TrajectoryError
from densitykit.io.reader import open_trajectory
from densitykit.io.work import fingerprint

__all__ = ["ElectronWindow", "ElectronWindows", "load_electrons"]


@dataclass(frozen=True)
class ElectronWindow(Window):
    """A window of electrons.

    Attributes
    ----------
    current
        Electrons through each point, 1/fs, shape (B, K, X).
    ground
        Density of the first frame of the run, that of the ground state, angstrom**-1, (B, X).
    field
        Vector potential at all frames of the run, angstrom/fs, shape (B, frames).
    frame
        Number of the present frame in its run, shape (B,).
    """

    current: Tensor | None = None
    ground: Tensor | None = None
    field: Tensor | None = None
    frame: Tensor | None = None

    def _moving(self) -> dict[str, Tensor]:
        return super()._moving() | {"current": self.current}

    def _map(self, function: Any) -> ElectronWindow:
        fixed = {name: function(getattr(self, name)) for name in ("ground", "field", "frame")}
        return super()._map(function).replace(**fixed)


class ElectronWindows:
    """All windows of runs that follow one another in a trajectory.

    Parameters
    ----------
    split
        A trajectory with `current`, `vector_potential` and `step`, which is 0 where a run begins.
    context, steps
        Frames up to the present one, and after it.

    Raises
    ------
    TrajectoryError
        It is no trajectory of electrons, or its runs are too short.
    """

    def __init__(self, split: xr.Dataset, context: int = 4, steps: int = 1) -> None:
        self.source = split.encoding.get("source", "trajectory")
        for name in ("current", "vector_potential", "step", "positions"):
            if name not in split:
                problem = f"{self.source}: variable '{name}' is missing"
                raise TrajectoryError(f"{problem}; make it with `densitykit generate electrons`")
        self.context, self.steps = context, steps
        self.offsets = tuple(range(1 - context, steps + 1))
        starts = np.flatnonzero(split.step.values == 0)
        self.frames = int(np.diff([*starts, split.sizes["time"]]).min())
        if self.frames < len(self.offsets):
            raise TrajectoryError(
                f"{self.source}: runs of {self.frames} frames are shorter than a window of "
                f"{len(self.offsets)}; use longer runs"
            )
        rows = starts[:, None] + np.arange(self.frames)
        self.time_step = self.horizon = float(np.diff(split.time.values[rows[0, :2]])[0])
        self.density, self.current, self.field = (
            torch.from_numpy(split[name].values[rows].astype(np.float32))
            for name in ("density", "current", "vector_potential")
        )
        self.energy = split.energy.values[rows]
        self.positions = torch.from_numpy(split.positions.values[rows])
        self.numbers = torch.from_numpy(split.numbers.values)
        length = float(split.cell.values[0, 0])
        self.cell = torch.diag(torch.tensor([length, 1.0, 1.0], dtype=torch.float64))
        self.grid = (self.density.shape[-1], 1, 1)

    def __len__(self) -> int:
        return len(self.density) * (self.frames - len(self.offsets) + 1)

    def __getitem__(self, index: int | list[int] | Tensor) -> ElectronWindow:
        """The windows of these indices as one."""
        chosen = torch.arange(len(self))[index].reshape(-1)
        each = self.frames - len(self.offsets) + 1
        return self.at(chosen // each, chosen % each + self.context - 1)

    def at(self, run: Tensor, frame: Tensor) -> ElectronWindow:
        """The windows of these runs, (B,), with these frames as the present, (B,)."""
        chosen = frame[:, None] + torch.tensor(self.offsets)
        run_ = run[:, None]
        return ElectronWindow(
            self.density[run_, chosen][..., None, None],
            chosen * self.time_step,
            self.cell.expand(len(run), 3, 3),
            self.offsets,
            self.numbers,
            current=self.current[run_, chosen],
            ground=self.density[run, 0],
            field=self.field[run],
            frame=frame,
            source=self.source,
        )

    def first(self) -> ElectronWindow:
        """The first possible windows of all runs."""
        runs = torch.arange(len(self.density))
        return self.at(runs, torch.full_like(runs, self.context - 1))

    def sample_batch(self, batch: int, generator: torch.Generator) -> ElectronWindow:
        """A random batch, shifted by a random number of points, and seen in a mirror or not."""
        window = self[torch.randint(len(self), (batch,), generator=generator)]
        shift = int(torch.randint(self.grid[0], (), generator=generator))
        mirrored = bool(torch.rand((), generator=generator) < 0.5)

        def moved(x: Tensor, axis: int) -> Tensor:
            return (x.flip(axis) if mirrored else x).roll(shift, axis)

        sign = -1 if mirrored else 1
        return window.replace(
            density=moved(window.density, 2),
            current=sign * moved(window.current, 2),
            ground=moved(window.ground, 1),
            field=sign * window.field,
        )

    def fingerprint(self) -> str:
        """A short word for what the windows hold."""
        parts = [self.density, self.current, self.field]
        return f"{len(self)} windows, crc32 {fingerprint(parts):08x}"


def load_electrons(
    path: str | Path, split: str, context: int = 4, steps: int = 1
) -> ElectronWindows:
    """The windows of a split of a data set; TrajectoryError if there is no such split."""
    return ElectronWindows(open_trajectory(Path(path) / split), context, steps)
