r"""What moves in time: the contract of all emulators, and what emulators on the grid share.

An :class:`Emulator` starts from a window of raw frames, steps, and shows a density. That is all
that rollouts and error tables know. Models, baselines, thermostats around them follow it, and a
map of your own does with a class of ten lines.

A :class:`FieldEmulator` steps the density itself and its rate, in log-normal variables
(:mod:`densitykit.data.transforms`). It owns their making from raw frames, the resampling of grids
that are no multiple of the stride of its network, and the exact number of electrons. A subclass
only says how a normalised state advances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from densitykit.data.transforms import (
    LogNormal,
    backward_rate,
    fourier_resample,
    multiple_of,
    restore_electrons,
)
from densitykit.data.windows import Window, Windows
from densitykit.errors import ShapeError, WindowError

__all__ = ["Domain", "Emulator", "FieldEmulator", "FieldState"]


@runtime_checkable
class Emulator(Protocol):
    """What a rollout needs of a map.

    Attributes
    ----------
    context
        Frames that ``init`` needs, up to the present one.
    horizon
        Time of one step in fs.

    ``init`` gets a window of just ``context`` frames; a state is whatever the emulator makes of
    it. ``step`` may draw random numbers from the generator. ``density`` shows a state:
    (B, X, Y, Z) in angstrom**-3, on the grid of the window. One that knows its nuclei may have
    ``nuclei(state)``, which returns positions and velocities, (B, N, 3).
    """

    context: int
    horizon: float

    def init(self, window: Window) -> Any: ...

    def step(self, state: Any, generator: torch.Generator | None = None) -> Any: ...

    def density(self, state: Any) -> Tensor: ...


@dataclass(frozen=True)
class Domain:
    """What a model was trained on, as far as it must be the same where it is used.

    Attributes
    ----------
    time_step
        Between the frames that a rate is made of, fs.
    voxel
        Vectors from grid point to grid point in rows, angstrom, (3, 3).
    species
        Atomic numbers in ascending order, each once; empty where they are not known.
    """

    time_step: float
    voxel: tuple[tuple[float, ...], ...]
    species: tuple[int, ...] = ()

    def __post_init__(self) -> None:  # a checkpoint's card has lists
        object.__setattr__(self, "voxel", tuple(map(tuple, self.voxel)))
        object.__setattr__(self, "species", tuple(self.species))
        whole = np.shape(self.voxel) == (3, 3) and np.linalg.matrix_rank(self.voxel) == 3
        # NaN: of a single frame
        if self.time_step <= 0 or not whole or not all(0 <= z <= 118 for z in self.species):
            raise ShapeError(
                f"domain: time_step {self.time_step}, voxel {self.voxel}, species {self.species}; "
                "give a positive time, three independent vectors and atomic numbers"
            )

    @classmethod
    def of(cls, windows: Windows | Window) -> Self:
        """Return the domain of training windows."""
        cell = windows.cell if windows.cell.ndim == 2 else windows.cell[0]
        voxel = cell.cpu().numpy() / np.array(windows.grid)[:, None]
        known = () if windows.numbers is None else tuple(np.unique(windows.numbers.cpu()).tolist())
        return cls(windows.time_step, tuple(map(tuple, voxel.tolist())), known)

    def check(self, window: Window, model: str, tolerance: float = 0.02) -> None:
        """Raise `WindowError` unless a window is of this domain; both numbers are named."""
        here = Domain.of(window)
        if np.isfinite(here.time_step) and abs(here.time_step / self.time_step - 1) > 1e-3:
            self._refuse(
                window,
                f"frames are {here.time_step:g} fs apart, {model} was trained on frames "
                f"{self.time_step:g} fs apart; select frames at that time",
            )
        ours, theirs = _shape(self.voxel), _shape(here.voxel)
        if abs(ours[:3] / theirs[:3] - 1).max() > tolerance or abs(ours - theirs)[3:].max() > 2:
            self._refuse(
                window,
                f"grid points are {_spell(theirs)} apart, {model} was trained with "
                f"{_spell(ours)}; resample the density with densitykit.fields.resample",
            )
        if self.species and here.species and set(here.species) - set(self.species):
            self._refuse(
                window,
                f"atomic numbers {list(here.species)}, {model} was trained on "
                f"{list(self.species)}; use a model of this material",
            )

    @staticmethod
    def _refuse(window: Window, problem: str) -> None:
        raise WindowError(f"{window.source}: {problem}")


def _shape(vectors: tuple[tuple[float, ...], ...]) -> np.ndarray:
    """Three lengths in angstrom and three angles in degrees."""
    a = np.asarray(vectors)
    lengths = np.linalg.norm(a, axis=1)
    cosines = [a[i] @ a[j] / lengths[i] / lengths[j] for i, j in ((1, 2), (0, 2), (0, 1))]
    return np.concatenate([lengths, np.degrees(np.arccos(np.clip(cosines, -1, 1)))])


def _spell(shape: np.ndarray) -> str:
    lengths, angles = (", ".join(f"{x:.4g}" for x in part) for part in (shape[:3], shape[3:]))
    return f"{lengths} angstrom (angles {angles})"


@dataclass(frozen=True)
class FieldState:
    """State of a `FieldEmulator`.

    Attributes
    ----------
    fields
        Density in angstrom**-3 and rate in angstrom**-3/fs, (B, 2, X, Y, Z), on the working grid.
    mean_density
        To be kept, angstrom**-3, (B, 1, 1, 1), double precision.
    grid
        That of the window.
    """

    fields: Tensor
    mean_density: Tensor
    grid: tuple[int, ...]

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


class FieldEmulator(nn.Module):
    """One-step map of density and rate; see the module's docstring.

    Subclasses implement :meth:`advance` on normalised states, (B, 2, X, Y, Z).

    Parameters
    ----------
    mu, sigma, eps
        Constants of :class:`densitykit.data.transforms.LogNormal`.
    horizon
        Time in fs that one step covers; also the unit of time of the rate channel.
    domain
        What it is trained on, a `Domain` or its fields; None checks nothing.
    """

    context: int = 3
    stride: int = 1

    def __init__(
        self,
        mu: float,
        sigma: float,
        eps: float,
        horizon: float,
        domain: Domain | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not (sigma > 0 and eps >= 0 and horizon > 0):
            problem = f"sigma {sigma}, eps {eps}, horizon {horizon} fs"
            raise ShapeError(f"{problem}; give positive numbers")
        self.transform = LogNormal(mu, sigma, eps)
        self.horizon = horizon
        self.domain = Domain(**domain) if isinstance(domain, Mapping) else domain

    @classmethod
    def arguments_for(cls, windows: Windows) -> dict[str, Any]:
        """Return mu, sigma, eps, horizon and domain for training windows."""
        domain = dataclasses.asdict(Domain.of(windows))
        return vars(LogNormal.of(windows)) | {"horizon": windows.horizon, "domain": domain}

    def extra_repr(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        where = "" if self.domain is None else f", {_spell(_shape(self.domain.voxel))}"
        return f"{count} parameters, step {self.horizon:g} fs{where}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def working_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the grid that states live on: the next multiple of the stride."""
        return multiple_of(self.stride, grid)

    def init(self, window: Window) -> FieldState:
        """Return the state of the present frame.

        Raises
        ------
        WindowError
            The window has too few frames or is of another domain.
        """
        window = window.past(self.context)
        if self.domain is not None:
            self.domain.check(window, f"this {type(self).__name__}")
        density = window.density
        mean = density[:, -1].mean((-3, -2, -1), keepdim=True, dtype=torch.float64)
        grid = self.working_grid(window.grid)
        if grid != window.grid:
            density = restore_electrons(fourier_resample(density, grid), mean[:, None])
        rate = backward_rate(density, window.time_step)
        return FieldState(torch.stack([density[:, -1], rate], dim=1), mean, window.grid)

    @torch.no_grad()
    def step(self, state: FieldState, generator: torch.Generator | None = None) -> FieldState:
        """Return the state one horizon later."""
        advanced = self.advance(self.normalise(state.fields), generator)
        return state.replace(fields=self.denormalise(advanced, state.mean_density))

    def density(self, state: FieldState) -> Tensor:
        """Return the density on the grid of the window, (B, X, Y, Z)."""
        rho = state.fields[:, 0]
        if tuple(rho.shape[1:]) == state.grid:
            return rho
        return restore_electrons(fourier_resample(rho, state.grid), state.mean_density)

    def normalised_pair(self, window: Window, lag: int) -> tuple[Tensor, Tensor]:
        """Return normalised states now and ``lag`` frames later, (B, 2, X, Y, Z) each."""
        ends = (window.past(self.context, end) for end in (0, lag))
        now, later = (self.normalise(self.init(part).fields) for part in ends)
        return now, later

    def normalise(self, fields: Tensor) -> Tensor:
        """Density and rate -> normalised state (field, horizon * field rate), same shape."""
        rho, rate = fields[:, 0], fields[:, 1]
        field_rate = self.horizon * self.transform.forward_rate(rho, rate)
        return torch.stack([self.transform.forward(rho), field_rate], dim=1)

    def denormalise(self, state: Tensor, mean_density: Tensor | float) -> Tensor:
        """Normalised state -> density with exactly ``mean_density`` electrons a volume, and rate.

        The mean of the rate is removed for the same reason: its integral is dN/dt = 0.
        """
        rho = restore_electrons(self.transform.inverse(state[:, 0]), mean_density)
        rate = self.transform.inverse_rate(rho, state[:, 1] / self.horizon)
        rate = rate - rate.mean(dim=(-3, -2, -1), keepdim=True)
        return torch.stack([rho, rate], dim=1)

    def advance(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised state at t -> normalised state at t + horizon, shape (B, 2, X, Y, Z)."""
        raise NotImplementedError
