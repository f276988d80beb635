r"""Training examples: states, pairs a horizon apart, symmetry augmentation.

The rate of a frame comes from that frame and the ones *before* it only, so that a state never
knows its own future. The scheme is part of the state: ``backward-2`` (the default) is

.. math:: \dot\rho_t = (3\rho_t - 4\rho_{t-1} + \rho_{t-2}) / (2\,\Delta t) + O(\Delta t^2).

A cubic cell has 48 symmetries (6 permutations of the axes times 8 inversions of axes), and every
periodic shift is one more: the physics commutes with them all if the k-points of the data do (a
shifted 2x2x2 mesh does, a single general k-point does not). Batches are drawn with a generator
seeded by (seed, step, rank), so a resumed training sees what an uninterrupted one sees.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from densitykit.cells import cubic_edge
from densitykit.data.symmetry import augment
from densitykit.errors import TrajectoryError
from densitykit.fields import time_derivative
from densitykit.io.reader import open_split

__all__ = [
    "StatePairs",
    "frames_apart",
    "load_pairs",
    "physical_states",
    "step_generator",
]


def physical_states(ds: xr.Dataset, scheme: str = "backward-2") -> tuple[Tensor, np.ndarray]:
    """Density and rate of every frame that has enough frames before it.

    Parameters
    ----------
    ds
        A trajectory from :func:`densitykit.io.writer.open_trajectory`.
    scheme
        See :func:`densitykit.fields.time_derivative`.

    Returns
    -------
    tuple[Tensor, np.ndarray]
        states with shape (time, 2, X, Y, Z), float32, in angstrom**-3 and angstrom**-3/fs, and
        their times in fs with shape (time,).

    Raises
    ------
    TrajectoryError
        If frames are not equally spaced, or the field is not finite and
        non-negative.
    """
    source = ds.encoding.get("source", "trajectory")
    times = ds.time.values
    steps = np.diff(times)
    if len(times) < 3 or not (steps[0] > 0 and np.allclose(steps, steps[0], rtol=1e-6)):
        raise TrajectoryError(
            f"{source}: variable 'time' must hold at least 3 equally spaced frames to "
            "give a rate; select an equally spaced part"
        )
    density = ds.density.values
    if not np.isfinite(density).all() or density.min() < 0:
        raise TrajectoryError(
            f"{source}: variable 'density' holds NaN or negative values; run "
            f"`python -m densitykit validate {source}` and mend or drop those frames"
        )
    rate = time_derivative(density.astype(np.float64), float(steps[0]), scheme)
    valid = np.isfinite(rate.reshape(len(rate), -1)[:, 0])
    states = np.stack([density[valid], rate[valid]], axis=1, dtype=np.float32, casting="same_kind")
    return torch.from_numpy(states), times[valid]


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Generator that depends on nothing but (seed, step, rank)."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(words[0]))


def frames_apart(horizon: float, spacing: float, source: str = "") -> int:
    """How many frames a horizon spans, both in fs; TrajectoryError if no whole number of them."""
    lag = round(horizon / spacing)
    if lag < 1 or abs(lag * spacing - horizon) > 1e-6 * horizon:
        raise TrajectoryError(
            f"{source}{': ' if source else ''}horizon {horizon} fs is no multiple of the frame "
            f"spacing {spacing} fs; choose a multiple"
        )
    return lag


class StatePairs:
    """Pairs of states of one run, one horizon apart, in memory.

    Parameters
    ----------
    states
        Physical states with shape (time, 2, n, n, n); see :func:`physical_states`.
    times
        Their times in fs, equally spaced.
    horizon
        Time between the two states of a pair in fs, a multiple of the spacing.
    cell
        Lattice vectors as rows, shape (3, 3), in angstrom, for whoever rolls out.
    past
        Density of the frame before each state, shape (time, n, n, n), for maps that need it.

    Raises
    ------
    TrajectoryError
        If the horizon is no multiple of the spacing or longer than the run.
    """

    def __init__(
        self,
        states: Tensor,
        times: np.ndarray,
        horizon: float,
        cell: np.ndarray | None = None,
        past: Tensor | None = None,
    ) -> None:
        # fewer than two states have no spacing; whatever it is, they do not span the horizon
        spacing = float(times[1] - times[0]) if len(times) > 1 else horizon
        self.lag = frames_apart(horizon, spacing)
        if len(states) <= self.lag:
            raise TrajectoryError(
                f"{len(states)} states span less than the horizon {horizon} fs; use a longer run"
            )
        self.states, self.times, self.horizon, self.cell = states, times, horizon, cell
        self.past = past

    def __len__(self) -> int:
        return len(self.states) - self.lag

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        """(state, next state); each (2, n, n, n), or (B, 2, n, n, n) for a batch of indices."""
        index = torch.arange(len(self))[index]
        return self.states[index], self.states[index + self.lag]

    def given(self, step: Callable[..., Tensor], index: int | slice | Tensor) -> Tensor:
        """States as a map wants them: with the density of the frame before, if it needs a past.

        Returns
        -------
        Tensor
            Shape (*, 2, n, n, n), or (*, 3, n, n, n) with a past; * as the index is.

        Raises
        ------
        TrajectoryError
            If a past is needed and not there.
        """
        states = self.states[index]
        if not getattr(step, "needs_past", False):
            return states
        if self.past is None:
            raise TrajectoryError(
                "this map needs the frame before each state; make the pairs with load_pairs"
            )
        return torch.cat([states, self.past[index].unsqueeze(-4)], dim=-4)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch, two tensors (batch, 2, n, n, n), each pair with its own symmetry."""
        chosen = torch.randint(len(self), (batch,), generator=generator)
        pairs = [augment(*self[int(i)], generator=generator) for i in chosen]
        state, next_state = (torch.stack(side) for side in zip(*pairs, strict=True))
        return state, next_state


def load_pairs(
    path: str | Path, split: str, horizon: float, scheme: str = "backward-2"
) -> StatePairs:
    """Pairs of a stored split, ready for training or scoring.

    Parameters
    ----------
    path
        Store with splits; see :func:`densitykit.io.writer.open_split`.
    split
        "train", "validation" or "test".
    horizon, scheme
        See :class:`StatePairs` and :func:`physical_states`.

    Raises
    ------
    TrajectoryError
        If the split is missing or unusable, the cell not cubic or the grid not
        cubic and even: the models coarsen by two, the augmentation turns the cube.
    """
    ds = open_split(path, split)
    source, shape = ds.encoding["source"], ds.density.shape[1:]
    cubic_edge(ds.cell.values, source)
    if len(set(shape)) != 1 or shape[0] % 2:
        raise TrajectoryError(
            f"{source}: variable 'density' has the grid {shape}; models need the same "
            "even number of points along each axis: resample it with densitykit.fields.resample"
        )
    states, times = physical_states(ds, scheme)
    first = int(np.searchsorted(ds.time.values, times[0]))
    past = torch.from_numpy(ds.density.values[first - 1 : first - 1 + len(times)])
    return StatePairs(states, times, horizon, ds.cell.values, past)
