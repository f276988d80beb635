r"""Autoregressive rollout of any emulator, applied again and again.

.. math:: s_{k+1} = \Phi(s_k), \qquad \rho_k = \rho(s_k)

An emulator follows the contract of :mod:`densitykit.models.base`; an ensemble is the batch axis of
its window. Frames go to a trajectory store as they are made, so a rollout can be longer than what
fits into the computer. One that is killed goes on where it stopped, with the same bits as without
the kill: its state is saved beside the store every few seconds (:mod:`densitykit.io.work`). Where
that is more than tensors and plain values, it is made again from the start.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from densitykit.data.windows import Window, Windows, step_generator
from densitykit.errors import RolloutError, ShapeError
from densitykit.io.progress import progress_bar
from densitykit.io.reader import open_trajectory
from densitykit.io.rebuild import extend_trajectory
from densitykit.io.store import fault
from densitykit.io.work import Work, as_recipe, check_store, discard, fingerprint
from densitykit.io.writer import TrajectoryWriter, create_trajectory
from densitykit.models.base import Emulator, FieldEmulator, FieldState

__all__ = ["Thermostat", "check_emulator", "device_of", "iterate", "rollout", "start"]

_SAVE_SECONDS = 10.0  # between saved states


def check_emulator(emulator: Any) -> None:
    """Raise `RolloutError` unless an object follows the contract of emulators."""
    missing = [name for name in ("context", "horizon") if not hasattr(emulator, name)]
    missing += [n for n in ("init", "step", "density") if not callable(getattr(emulator, n, None))]
    if missing:
        raise RolloutError(
            f"a {type(emulator).__name__} is no emulator: {', '.join(missing)} missing; it needs "
            "context, horizon, init(window), step(state, generator) and density(state), see "
            "docs/your-own-model.md"
        )


def device_of(emulator: Emulator) -> torch.device:
    """Return where an emulator wants its windows: the device of its weights, or the CPU."""
    parameters = emulator.parameters() if isinstance(emulator, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


@torch.no_grad()
def start(emulator: Emulator, window: Window) -> Any:
    """Return the state of the present frame of a window, on the device of the emulator.

    Raises
    ------
    RolloutError
        The object does not follow the contract.
    WindowError
        The window does not fit the emulator.
    """
    check_emulator(emulator)
    return emulator.init(window.past(emulator.context).to(device_of(emulator)))


def iterate(
    emulator: Emulator, window: Window, steps: int, seed: int | None = 0
) -> Iterator[tuple[Any, Tensor]]:
    """Yield state and density after 1, 2, ... steps.

    Parameters
    ----------
    emulator
        Gets a generator seeded by (seed, step number), so a rollout can be repeated.
    window
        See :func:`start`.
    steps
        How many.
    seed
        Of the random numbers; None gives no generator.

    Raises
    ------
    RolloutError
        A density is not finite or not of the shape of the grid; the step is named.
    """
    return _iterate(emulator, start(emulator, window), window, steps, seed)


@torch.no_grad()
def _iterate(
    emulator: Emulator, state: Any, window: Window, steps: int, seed: int | None, first: int = 0
) -> Iterator[tuple[Any, Tensor]]:
    shape = (len(window), *window.grid)
    for k in range(first, steps):
        state = emulator.step(state, None if seed is None else step_generator(seed, k))
        density = emulator.density(state)
        if tuple(density.shape) != shape:
            raise RolloutError(
                f"step {k + 1} of {steps}: {type(emulator).__name__}.density gives "
                f"{tuple(density.shape)}, not {shape}"
            )
        if not torch.isfinite(density).all():
            raise RolloutError(
                f"step {k + 1} of {steps}: the density of {type(emulator).__name__} is not "
                "finite; the map is unstable here"
            )
        yield state, density


class Thermostat:
    r"""Weak coupling of a field emulator to the kinetic energy of its training run.

    The mean-squared-error optimal map is slightly dissipative: what it cannot predict it leaves
    out, so velocities shrink by about a percent a step and a long rollout cools down. The
    ab-initio run has a thermostat; so gets its emulator. After each step the rate is scaled by

    .. math:: \lambda = [1 + (h/\tau)(T_0/T - 1)]^{1/2}, \qquad T = \langle\dot\rho^2\rangle,

    the weak coupling of Berendsen et al. (1984, J. Chem. Phys. 81, 3684, eq. 11) with the mean
    square rate of the density for the temperature and its training average for T_0.

    Parameters
    ----------
    emulator
        The map on the grid.
    windows
        Training windows, for the mean square rate; at most 512 of them are read.
    tau
        Relaxation time in fs; shorter holds faster, and disturbs fluctuations more.
    """

    def __init__(self, emulator: FieldEmulator, windows: Windows, tau: float = 30.0) -> None:
        if not tau >= emulator.horizon:
            problem = f"tau is {tau} fs; give at least the horizon, {emulator.horizon} fs"
            raise ShapeError(problem)
        self.emulator, self.tau = emulator, tau
        self.context, self.horizon = emulator.context, emulator.horizon
        rates = [
            start(emulator, windows[i]).fields[:, 1].square().mean().item()
            for i in windows.every(1, 512)
        ]
        self.target = float(np.mean(rates))

    def __repr__(self) -> str:
        return f"{self.emulator!r} with a thermostat of {self.tau:g} fs"

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.emulator.parameters()

    def init(self, window: Window) -> FieldState:
        return self.emulator.init(window)

    def step(self, state: FieldState, generator: torch.Generator | None = None) -> FieldState:
        state = self.emulator.step(state, generator)
        rho, rate = state.fields.unbind(dim=1)
        energy = rate.square().mean(dim=(1, 2, 3), keepdim=True)
        scale = (1 + self.horizon / self.tau * (self.target / energy - 1)).clamp(0.25, 4).sqrt()
        return state.replace(fields=torch.stack([rho, scale * rate], dim=1))

    def density(self, state: FieldState) -> Tensor:
        return self.emulator.density(state)


def rollout(
    emulator: Emulator,
    window: Window,
    steps: int,
    *,
    path: str | Path | None = None,
    seed: int = 0,
    attrs: Mapping[str, Any] | None = None,
    progress: bool = True,
    restart: bool = False,
) -> xr.Dataset:
    """Roll an emulator out and return the trajectory, present frame included.

    Parameters
    ----------
    emulator, steps, seed
        See :func:`iterate`.
    window
        Where it begins: one member, or an ensemble (``window.expand(8)``).
    path
        Store to stream to; members of an ensemble become its groups ``member-0``, ... An
        interrupted rollout found there goes on, a finished one if more steps are asked for. None
        keeps the trajectory in memory.
    attrs
        Provenance to store.
    progress
        Show a progress bar, where the output is a terminal.
    restart
        Begin anew; the trajectory at `path` is removed.

    Returns
    -------
    xr.Dataset
        ``density`` (time, x, y, z), or (member, time, x, y, z) for an ensemble, which is read
        into memory here; its members can be opened one by one. Times are those of the window.
        ``positions`` and ``velocities`` too where the emulator knows its nuclei.

    Raises
    ------
    TrajectoryError
        `path` is taken by something else.
    UnfinishedError
        `path` holds a rollout of another emulator, window or seed.
    WindowError, RolloutError
        See :func:`start` and :func:`iterate`.
    """
    begun, first = start(emulator, window), window.past(1)
    details = {"title": f"rollout of {type(emulator).__name__}", "horizon_fs": emulator.horizon}
    details |= {"seed": seed, **(attrs or {})}
    if path is None:
        frames = _frames(emulator, begun, window, steps, seed, progress)
        return _in_memory(frames, first, _times(first, emulator, steps)[0], details)
    stored = _Stored(Path(path), emulator, window, seed, restart)
    stored.run(begun, steps, details, progress)
    opened = [open_trajectory(store) for store in stored.paths]
    if len(opened) == 1:
        return opened[0]
    moving = [name for name, variable in opened[0].data_vars.items() if "time" in variable.dims]
    return xr.concat(
        opened, "member", data_vars=moving, coords="minimal", compat="override", join="override"
    )


class _Stored:
    """A rollout that goes to a store: one writer a member, and the state beside it."""

    def __init__(
        self, path: Path, emulator: Emulator, window: Window, seed: int, restart: bool
    ) -> None:
        self.path, self.emulator, self.window, self.seed = path, emulator, window, seed
        names = [f"member-{i}" for i in range(len(window))] if len(window) > 1 else ["."]
        self.paths = [path / name for name in names]
        recipe = {"emulator": f"{type(emulator).__name__}, crc32 {fingerprint(emulator):08x}"}
        given = [getattr(window, f.name) for f in dataclasses.fields(window) if f.name != "source"]
        begin = f"{float(window.now[0]):g} fs, crc32 {fingerprint(given):08x}"
        recipe |= {"start": begin, "seed": seed, "horizon_fs": emulator.horizon}
        self.recipe, self.restart = as_recipe(recipe), restart
        self.work = Work(
            path.absolute().with_name(f".{path.name}.state.npz"), self.recipe, restart=restart
        )
        self._check()

    def _check(self) -> None:
        """Refuse what is at the path, unless it is this rollout."""
        if not self.path.exists():
            self.work.remove()  # of a store that is gone
        elif not self.restart and not any(
            store.exists() and check_store(store, self.recipe) for store in self.paths
        ):
            if {file.name for file in self.path.iterdir()} != {"zarr.json"}:  # just begun
                fix = "choose another path, or remove the store"
                raise fault(self.path, "store", "it already exists and is no such rollout", fix)

    def run(self, state: Any, steps: int, details: Mapping[str, Any], progress: bool) -> None:
        """Go on from the last state, or from this one, until all frames are there."""
        there = all(store.exists() for store in self.paths) and not self.restart
        complete = min(TrajectoryWriter(p).n_committed for p in self.paths) if there else 0
        if complete > steps:
            return
        first, state = self._resumed(state, complete)
        frames = _frames(self.emulator, state, self.window, steps, self.seed, progress, first)
        begun = list(islice(frames, 2))  # an emulator that cannot step leaves no store behind
        if self.restart:
            discard(self.path)
        writers = [self._writer(store, steps + 1, details) for store in self.paths]
        times = _times(self.window, self.emulator, steps)
        saved, last = time.monotonic(), (first, state)
        try:
            for k, (frame, state) in enumerate(chain(begun, frames), first):
                for b, writer in enumerate(writers):
                    if writer.n_committed <= k:  # else it was made before the state was saved
                        own = {name: values[b] for name, values in frame.items()}
                        writer.append(own.pop("density"), times[b][k], **own)
                last = (k, state)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._save(writers, *last)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            self._save(writers, *last)
            raise
        self.work.remove()

    def _writer(self, store: Path, frames: int, details: Mapping[str, Any]) -> TrajectoryWriter:
        if store.exists():
            writer = TrajectoryWriter(store)
            return writer if writer.n_frames >= frames else extend_trajectory(store, frames)
        first = self.window.past(1)
        return create_trajectory(
            store,
            n_frames=frames,
            grid=first.grid,
            cell=first.cell[0].cpu().numpy(),
            numbers=None if first.numbers is None else first.numbers.cpu().numpy(),
            attrs={**details, "recipe": json.dumps(self.recipe)},
            allow_negative=True,
        )

    def _save(self, writers: list[TrajectoryWriter], k: int, state: Any) -> None:
        """Save the state after step k, once its frames are on disk."""
        buffer = io.BytesIO()
        try:
            torch.save(state, buffer)
        except Exception:  # a state of classes that cannot be written: begin from the start
            return
        for writer in writers:
            writer.sync()
        self.work.save({"step": k, "state": np.frombuffer(buffer.getvalue(), np.uint8)})

    def _resumed(self, begun: Any, complete: int) -> tuple[int, Any]:
        """Return the last saved state and its step; of no use where its frame is not there."""
        saved = self.work.load()
        if saved is None or int(saved["step"]) >= complete:
            return 0, begun
        buffer = io.BytesIO(saved["state"].tobytes())
        try:
            with torch.serialization.safe_globals([*_classes(begun)]):
                state = torch.load(buffer, device_of(self.emulator), weights_only=True)
        except Exception:  # classes that are not known from the first state
            return 0, begun
        return int(saved["step"]), state


def _classes(state: Any) -> Iterator[type]:
    """Yield the dataclasses in a state, which may be loaded."""
    if dataclasses.is_dataclass(state):
        yield type(state)
        state = vars(state)
    if isinstance(state, Mapping):
        state = list(state.values())
    if isinstance(state, list | tuple):
        for part in state:
            yield from _classes(part)


def _times(window: Window, emulator: Emulator, steps: int) -> list[np.ndarray]:
    return [float(t) + emulator.horizon * np.arange(steps + 1) for t in window.now]


def _frames(
    emulator: Emulator,
    state: Any,
    window: Window,
    steps: int,
    seed: int,
    progress: bool,
    first: int = 0,
) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
    """Yield density, and positions and velocities where they are known, of all members; states.

    The frame of the state given comes first.
    """
    states = _iterate(emulator, state, window, steps, seed, first)
    hidden = None if progress else True
    bar = progress_bar(states, "rollout", steps, initial=first, disable=hidden, unit="step")
    known = getattr(emulator, "nuclei", lambda state: ())
    yield _frame(emulator.density(state) if first else window.at(0), known(state)), state
    for state, density in bar:
        yield _frame(density, known(state)), state


def _frame(density: Tensor, nuclei: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    names = ("positions", "velocities")
    atoms = {n: x.double().cpu().numpy() for n, x in zip(names, nuclei, strict=False)}
    return {"density": density.cpu().numpy(), **atoms}


def _in_memory(
    frames: Iterator[tuple[dict[str, np.ndarray], Any]],
    first: Window,
    times: np.ndarray,
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    collected = [frame for frame, _ in frames]
    dims = {"density": ("x", "y", "z")}
    units = {"density": "angstrom**-3", "positions": "angstrom", "velocities": "angstrom/fs"}
    variables: dict[str, Any] = {
        "cell": (("vector", "cartesian"), first.cell[0].cpu().numpy(), {"units": "angstrom"})
    }
    for name in collected[0]:
        values = np.stack([frame[name] for frame in collected], axis=1)
        space = dims.get(name, ("atom", "cartesian"))
        lead = ("member", "time") if len(first) > 1 else ("time",)
        values = values if len(first) > 1 else values[0]
        variables[name] = ((*lead, *space), values, {"units": units[name]})
    if first.numbers is not None:
        variables["numbers"] = ("atom", first.numbers.cpu().numpy())
    return xr.Dataset(variables, {"time": ("time", times, {"units": "fs"})}, dict(attrs))
