r"""Autoregressive rollout: any one-step map, applied again and again.

.. math:: s_{k+1} = \Phi(s_k), \qquad \Phi : (\rho, \dot\rho)_t \mapsto (\rho, \dot\rho)_{t+h}

:math:`\Phi` is any callable on physical states, a trained model or a baseline; an ensemble is its
batch axis. A map may carry more from step to step than it shows: one with methods ``begin(state)
-> memory``, ``propagate(memory) -> memory`` and ``density(memory)`` is iterated in its memory
(`densitykit.models.nuclear`). Frames go to a trajectory store as they are made, so a rollout can
be longer than what fits into the computer, and what was committed survives a kill.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from densitykit.data.windows import StatePairs, step_generator
from densitykit.errors import RolloutError, ShapeError, TrajectoryError
from densitykit.fields import check_stride
from densitykit.io.reader import open_trajectory
from densitykit.io.writer import create_trajectory

__all__ = ["Thermostat", "device_of", "iterate", "remembering", "rollout"]

Step = Callable[..., Tensor]


def iterate(step: Step, initial: Tensor, n: int, seed: int = 0) -> Iterator[Tensor]:
    """Yield the states after 1, 2, ..., n steps.

    Parameters
    ----------
    step
        Map of physical states (B, 2, X, Y, Z). If it has a ``generator`` argument, it gets
        one seeded by (seed, step number), so a rollout can be repeated.
    initial
        Physical state with shape (B, 2, X, Y, Z), or (B, 3, X, Y, Z) for a map that
        needs a past: `StatePairs.given` makes the right one.
    n
        Number of steps.

    Raises
    ------
    ShapeError
        If the grid does not fit the map.
    RolloutError
        If a state is not finite, with the number of the step.
    """
    _check(step, initial)
    return _iterate(step, initial, n, seed)


def _check(step: Step, initial: Tensor) -> None:
    """Raise ShapeError if states of this shape do not fit the map."""
    channels = 3 if getattr(step, "needs_past", False) else 2
    if initial.ndim != 5 or initial.shape[1] != channels:
        raise ShapeError(
            f"initial state has shape {tuple(initial.shape)}; give (B, {channels}, X, Y, Z), as "
            "StatePairs.given(step, index) makes it"
        )
    check_stride(initial.shape[2:], getattr(step, "stride", 1))


def _iterate(step: Step, initial: Tensor, n: int, seed: int) -> Iterator[Tensor]:
    random = _is_random(step)
    with torch.no_grad():
        memory, advance, show = remembering(step, initial.to(device_of(step)))
    for k in range(n):
        with torch.no_grad():
            options = {"generator": step_generator(seed, k)} if random else {}
            memory = advance(memory, **options)
            state = show(memory)
        if not torch.isfinite(state).all():
            raise RolloutError(
                f"step {k + 1} of {n}: the state is not finite; the map is unstable here"
            )
        yield state


def remembering(
    step: Step, initial: Tensor
) -> tuple[Any, Callable[..., Any], Callable[[Any], Tensor]]:
    """What a map remembers at first, the map of that, and how a state shows in it.

    Parameters
    ----------
    step
        A map; one without ``begin`` remembers the state.
    initial
        As in :func:`iterate`.

    Returns
    -------
    tuple[Any, Callable[..., Any], Callable[[Any], Tensor]]
        memory, memory -> memory, memory -> states (B, 1 or 2, X, Y, Z).
    """
    if not hasattr(step, "begin"):
        return initial, step, lambda state: state
    return step.begin(initial), step.propagate, lambda memory: step.density(memory)[:, None]


def _is_random(step: Step) -> bool:
    """Whether a map takes a generator."""
    call = step.forward if isinstance(step, nn.Module) else step
    return "generator" in inspect.signature(call).parameters


class Thermostat(nn.Module):
    r"""Weak coupling of a map to the kinetic energy of its training run.

    The mean-squared-error optimal map is slightly dissipative: what it cannot predict it leaves
    out, so velocities shrink by about a percent a step and a long rollout cools down. The
    ab-initio run has a thermostat; so gets its emulator. After each step the rate is scaled by

    .. math:: \lambda = [1 + (h/\tau)(T_0/T - 1)]^{1/2}, \qquad T = \langle\dot\rho^2\rangle,

    the weak coupling of Berendsen et al. (1984, J. Chem. Phys. 81, 3684, eq. 11) with the mean
    square rate of the density for the temperature and its training average for T_0.

    Parameters
    ----------
    step
        The map.
    pairs
        Training pairs, for the mean square rate.
    tau
        Relaxation time in fs; shorter holds faster, and disturbs fluctuations more.
    """

    def __init__(self, step: Step, pairs: StatePairs, tau: float = 30.0) -> None:
        super().__init__()
        if tau < step.horizon:
            raise ShapeError(f"tau is {tau} fs; give at least the horizon, {step.horizon} fs")
        self.step, self.tau, self.horizon = step, tau, step.horizon
        self.stride, self.random = getattr(step, "stride", 1), _is_random(step)
        self.target = float(pairs.states[:, 1].square().mean())

    def forward(self, physical: Tensor, generator: torch.Generator | None = None) -> Tensor:
        random = {"generator": generator} if self.random else {}
        rho, rate = self.step(physical, **random).unbind(dim=1)
        energy = rate.square().mean(dim=(1, 2, 3), keepdim=True)
        scale = (1 + self.horizon / self.tau * (self.target / energy - 1)).clamp(0.25, 4).sqrt()
        return torch.stack([rho, scale * rate], dim=1)


def device_of(step: Step) -> torch.device:
    """Where a map wants its states: the device of its weights, the CPU if it has none."""
    parameters = step.parameters() if isinstance(step, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


def rollout(
    step: Step,
    initial: Tensor,
    n: int,
    *,
    cell: np.ndarray,
    path: str | Path | None = None,
    horizon: float | None = None,
    start: float = 0.0,
    seed: int = 0,
    attrs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Roll a map out and return the trajectory, initial state included.

    Parameters
    ----------
    step, n, seed
        See :func:`iterate`.
    initial
        Physical state (2, X, Y, Z), or (B, 2, X, Y, Z) for an ensemble of B members;
        with 3 channels for a map that needs a past.
    cell
        Lattice vectors as rows, shape (3, 3), in angstrom.
    path
        Store to stream to; members of an ensemble become its groups ``member-0``, ... None
        keeps the trajectory in memory.
    horizon
        Time of one step in fs; by default that of ``step``.
    start
        Time of the initial state in fs.
    attrs
        Provenance to store.
    progress
        Show a progress bar.

    Returns
    -------
    xr.Dataset
        Dataset with ``density`` (time, x, y, z), or (member, time, x, y, z) for an ensemble, which
        is read into memory here; its members can be opened one by one.

    Raises
    ------
    TrajectoryError
        If ``path`` is taken.
    ShapeError, RolloutError
        See :func:`iterate`.
    """
    horizon = horizon if horizon is not None else step.horizon
    ensemble = initial if initial.ndim == 5 else initial[None]
    states = iterate(step, ensemble, n, seed)
    bar = tqdm(states, "rollout", n, disable=not progress, unit="step")
    details = {"title": f"rollout of {_name(step)}", "horizon_fs": horizon, "seed": seed}
    details |= dict(attrs or {})
    frames = (x[:, 0].cpu().numpy() for x in _chain(ensemble, bar))
    if path is None:
        density = np.stack(list(frames), axis=1)
        times = start + horizon * np.arange(n + 1)
        return _in_memory(density if initial.ndim == 5 else density[0], times, cell, details)
    if Path(path).exists():
        fix = "choose another path, or remove the store"
        raise TrajectoryError(f"{path}: store: the path already exists; {fix}")
    names = [f"member-{i}" for i in range(len(ensemble))] if initial.ndim == 5 else ["."]
    paths = [Path(path) / name for name in names]
    grid = tuple(ensemble.shape[2:])
    common = {
        "n_frames": n + 1,
        "grid": grid,
        "cell": cell,
        "attrs": details,
        "allow_negative": True,
    }
    writers = [create_trajectory(p, **common) for p in paths]
    for k, members in enumerate(frames):
        for writer, density in zip(writers, members, strict=True):
            writer.append(density, start + k * horizon)
    opened = [open_trajectory(p) for p in paths]
    if initial.ndim == 4:
        return opened[0]
    moving = [name for name, variable in opened[0].data_vars.items() if "time" in variable.dims]
    return xr.concat(opened, "member", data_vars=moving, coords="minimal", compat="override")


def _name(step: Step) -> str:
    if isinstance(step, Thermostat):
        return f"{_name(step.step)} with a thermostat of {step.tau:g} fs"
    return getattr(step, "__name__", type(step).__name__)


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _in_memory(
    density: np.ndarray, times: np.ndarray, cell: np.ndarray, attrs: Mapping[str, Any]
) -> xr.Dataset:
    dims = ("member", "time", "x", "y", "z")[-density.ndim :]
    return xr.Dataset(
        {
            "density": (dims, density, {"units": "angstrom**-3"}),
            "cell": (("vector", "cartesian"), np.asarray(cell), {"units": "angstrom"}),
        },
        {"time": ("time", times, {"units": "fs"})},
        dict(attrs),
    )
