r"""Emulators of electrons in time: density and current now, density and current a step later.

The state of each point is the deviation of the density from that of the ground state and the
current, at the last K frames; the field is given. What is learned is the increment

.. math:: (\delta\rho, j)_{t+h} = (\delta\rho, j)_t + \Phi\bigl[(\delta\rho, j)_{t},
    \dots, (\delta\rho, j)_{t-(K-1)h};\ \rho_0;\ \Delta A\bigr],

with three increments of the vector potential, before, during and after the step. The mean of the
deviation is removed: the number of electrons is exact. All maps commute with shifts, and
their kernels have a finite range in real space, so that they serve chains of any length.

* :class:`LinearMap`: the best one without :math:`\rho_0`, by least squares: dynamic mode
  decomposition (Schmid 2010, J. Fluid Mech. 656, 5) with delays, whose modes are plane waves by
  symmetry;
* :class:`FourierOperator`: convolutions over the range of half a cell, evaluated by FFT (Li et al.
  2021, arXiv 2010.08895), linear in the state as linear response is, between gates that a
  convolutional net makes of :math:`\rho_0`;
* :class:`ChainUNet`: a one-dimensional U-Net on all of it, the state scaled to unit size and back,
  so that weak and strong excitations are alike.

Both nets begin as a linear map that is given to them, and learn what it misses.

**Stability.** Modes of the linear map that would grow are put on the unit circle. And no rollout
has more energy than the field has given: that of the flow and of the charges,
:math:`\int j^2/2\rho_0 + \tfrac12\int\delta\rho\,K*\delta\rho`, is at most the whole energy of the
excitation (Cauchy and Schwarz), which is that of the first frame plus the work
:math:`\int dA\int j`; a state that exceeds it is scaled down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densitykit.chain.electron_windows import ElectronWindow, ElectronWindows
from densitykit.errors import ShapeError, WindowError
from densitykit.units import ATOMIC_TIME, BOHR

__all__ = [
    "ChainUNet",
    "ElectronState",
    "FourierOperator",
    "LinearMap",
    "OneStepObjective",
    "fit_linear_map",
]

#: atomic units times this are of order one
_SCALE = 20.0
#: far from anything physical: a map that grows can still be judged
_BOUND = 1e3
#: 4 pi / eps0 of the model
_REPULSION = 4 * torch.pi / 10
_FIELD = ATOMIC_TIME / BOHR


@dataclass(frozen=True)
class ElectronState:
    """State of an emulator.

    Attributes
    ----------
    history
        Deviation of the density and current, in 1/20 of atomic units, (B, K, 2, X), newest last.
    ground
        Density of the ground state, 1/bohr, (B, X).
    field
        Vector potential of the run, atomic units, (B, frames).
    frame
        Number of the present frame, (B,).
    energy
        The most that it can have, hartree x 400, (B,).
    """

    history: Tensor
    ground: Tensor
    field: Tensor
    frame: Tensor
    energy: Tensor

    def drive(self) -> Tensor:
        """Increments of the field before, during and after the next step, (B, 3)."""
        last = self.field.shape[1] - 1
        at = (self.frame[:, None] + torch.arange(-1, 3)).clamp(0, last)
        return _SCALE * self.field.gather(1, at).diff(dim=1)


class ElectronEmulator(nn.Module):
    """What all of them share; subclasses implement :meth:`increment`.

    Parameters
    ----------
    horizon
        Time of a step in fs, that between frames.
    context
        K, frames of the state.
    current
        False: increments are made of the density alone, an ablation.
    base
        A map of the same context to begin from, which stays as it is; None: persistence.
    """

    def __init__(
        self,
        horizon: float,
        context: int = 1,
        current: bool = True,
        base: LinearMap | None = None,
    ) -> None:
        super().__init__()
        self.base = None if base is None else base.requires_grad_(False)
        self.horizon, self.context, self.with_current = float(horizon), int(context), current
        self.channels = (2 if current else 1) * self.context

    def init(self, window: ElectronWindow) -> ElectronState:
        """The state of the present frame; WindowError if the window is none of electrons."""
        if getattr(window, "ground", None) is None:
            raise WindowError(f"{window.source}: no current; load it with load_electrons")
        window = window.past(self.context)
        if self.context > 1 and abs(window.time_step / self.horizon - 1) > 1e-3:
            problem = f"frames are {window.time_step:g} fs apart, not {self.horizon:g} fs"
            raise WindowError(f"{window.source}: {problem}; use data of that time step")
        ground, density = window.ground * BOHR, window.density[..., 0, 0] * BOHR
        fields = [density - ground[:, None], window.current * ATOMIC_TIME]
        history = _SCALE * torch.stack(fields, 2)
        energy = _energy(history.flatten(0, 1), ground.repeat_interleave(self.context, 0))
        energy = energy.unflatten(0, (-1, self.context)).amax(1)
        return ElectronState(history, ground, window.field * _FIELD, window.frame, energy)

    @torch.no_grad()
    def step(
        self, state: ElectronState, generator: torch.Generator | None = None
    ) -> ElectronState:
        """The state one horizon later."""
        return self.advance(state, generator)

    def advance(
        self, state: ElectronState, generator: torch.Generator | None = None
    ) -> ElectronState:
        """`step` with gradients."""
        x = self.seen(state)
        change = self.increment(x, state, generator)
        if self.base is not None:
            change = change + self.base.increment(x, state)
        rho, current = (state.history[:, -1] + change).clamp(-_BOUND, _BOUND).unbind(1)
        new = torch.stack([rho - rho.mean(-1, keepdim=True), current], 1)
        with torch.no_grad():
            flow = (state.history[:, -1, 1] + current).sum(-1) / 2
            most = (state.energy + state.drive()[:, 1] * flow).clamp(min=1e-9)
            scale = (most / _energy(new, state.ground).clamp(min=1e-12)).clamp(max=1).sqrt()
        new = new * scale[:, None, None]
        history = torch.cat([state.history[:, 1:], new[:, None]], 1)
        return replace(state, history=history, frame=state.frame + 1, energy=most)

    def seen(self, state: ElectronState) -> Tensor:
        """What increments are made of, (B, channels, X)."""
        used = state.history if self.with_current else state.history[:, :, :1]
        return used.flatten(1, 2)

    def density(self, state: ElectronState) -> Tensor:
        """angstrom**-1, (B, X, 1, 1)."""
        rho = state.ground + state.history[:, -1, 0] / _SCALE
        return (rho / BOHR)[..., None, None]

    def current(self, state: ElectronState) -> Tensor:
        """1/fs, (B, X)."""
        return state.history[:, -1, 1] / (_SCALE * ATOMIC_TIME)

    def increment(
        self, x: Tensor, state: ElectronState, generator: torch.Generator | None = None
    ) -> Tensor:
        """Channels (B, channels, X) and the state -> increments (B, 2, X)."""
        raise NotImplementedError


def _energy(fields: Tensor, ground: Tensor) -> Tensor:
    """Energy of flow and charges in hartree x 400; fields (B, 2, X), a point per bohr -> (B,)."""
    rho, current = fields.unbind(1)
    points = rho.shape[1]
    k = 2 * torch.pi * torch.fft.rfftfreq(points, device=rho.device)
    twice = torch.full_like(k, 2.0)  # k and -k
    twice[0] = 0
    waves = torch.fft.rfft(rho).abs().square() * twice * _REPULSION / (k**2 + 1e-4)
    flow = (current**2 / ground.clamp(min=1e-3)).sum(-1)
    return flow / 2 + waves.sum(-1) / (2 * points)


class LinearMap(ElectronEmulator):
    """A convolution of state and drive; see `fit_linear_map`.

    Parameters
    ----------
    horizon, context, current
        See `ElectronEmulator`.
    reach
        Points on each side.
    """

    def __init__(
        self, horizon: float, context: int = 1, current: bool = True, reach: int = 15
    ) -> None:
        super().__init__(horizon, context, current)
        self.reach, self._maps = reach, {}
        columns = self.channels * (2 * reach + 1) + 6
        self.weight = nn.Parameter(torch.zeros(columns, 2))

    def design(self, x: Tensor, state: ElectronState) -> Tensor:
        """What the increments are linear in, (B, X, columns)."""
        padded = F.pad(x, (self.reach, self.reach), mode="circular")
        seen = padded.unfold(2, 2 * self.reach + 1, 1).transpose(1, 2).flatten(2)
        drive = state.drive()[:, None].expand(-1, x.shape[2], -1)
        return torch.cat([seen, drive, drive * state.ground[..., None]], 2)

    def increment(
        self, x: Tensor, state: ElectronState, generator: torch.Generator | None = None
    ) -> Tensor:
        if x.shape[1] != 2:  # several frames, or the density alone: as it is
            return (self.design(x, state) @ self.weight).transpose(1, 2)
        drive = state.drive()[:, None].expand(-1, x.shape[2], -1)
        drive = torch.cat([drive, drive * state.ground[..., None]], 2) @ self.weight[-6:]
        waves = torch.einsum("kij,bjk->bik", self._stable(x.shape[2]), torch.fft.rfft(x))
        return torch.fft.irfft(waves, n=x.shape[2]) - x + drive.transpose(1, 2)

    def _stable(self, points: int) -> Tensor:
        """Matrices of all waves, (waves, 2, 2), whose modes do not grow."""
        if points not in self._maps:
            kernel = self.weight[:-6].detach().double().unflatten(0, (2, -1))  # (in, tap, out)
            at = (self.reach - torch.arange(2 * self.reach + 1)) % points
            rows = kernel.new_zeros(2, points, 2).index_add(1, at, kernel)
            matrix = torch.fft.rfft(rows, dim=1).permute(1, 2, 0) + torch.eye(2)
            values, vectors = torch.linalg.eig(matrix)
            values = values / values.abs().clamp(min=1)
            stable = vectors * values[:, None] @ torch.linalg.inv(vectors)
            self._maps[points] = stable.to(torch.complex64)
        return self._maps[points]


@torch.no_grad()
def fit_linear_map(model: LinearMap, windows: ElectronWindows, ridge: float = 1e-3) -> float:
    """Set the weights by least squares, each run scaled to unit size; returns the relative error.

    Parameters
    ----------
    model
        Changed in place.
    windows
        Training windows of one step.
    ridge
        Variance of the noise, as a share of that of the state, which the map is made to bear:
        without it waves that the training does not show grow in a rollout.
    """
    size = len(model.weight)
    normal, projected = torch.zeros(size, size).double(), torch.zeros(size, 2).double()
    total = 0.0
    each = len(windows) // len(windows.density)
    for run in range(len(windows.density)):
        M, y = _equations(model, windows[torch.arange(run * each, (run + 1) * each)])
        normal += M.T @ M
        projected += M.T @ y
        total += y.square().sum()
    normal.diagonal().add_(ridge * normal.trace() / size)
    weight = torch.linalg.solve(normal, projected)
    explained = 2 * (weight * projected).sum() - (weight * (normal @ weight)).sum()
    model.weight.copy_(weight)
    model._maps.clear()
    return float((1 - explained / total).clamp(min=0).sqrt())


def _equations(model: LinearMap, window: ElectronWindow) -> tuple[Tensor, Tensor]:
    state, after = model.init(window.past(model.context)), model.init(_later(window, 1))
    M = model.design(model.seen(state), state).flatten(0, 1)
    y = (after.history[:, -1] - state.history[:, -1]).transpose(1, 2).flatten(0, 1)
    size = state.history.square().mean().sqrt()
    return (M / size).double(), (y / size).double()


def _later(window: ElectronWindow, steps: int) -> ElectronWindow:
    """The same window seen some frames later."""
    moved = tuple(offset - steps for offset in window.offsets)
    return window.replace(offsets=moved, frame=window.frame + steps)


class _Convolution(nn.Module):
    """A circular convolution of finite range, by FFT."""

    def __init__(self, inputs: int, outputs: int, width: int, size: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            size * torch.randn(outputs, inputs, width) / (inputs * width) ** 0.5
        )

    def forward(self, x: Tensor) -> Tensor:
        points, (*_, width) = x.shape[-1], self.weight.shape
        at = (torch.arange(width) - width // 2) % points
        kernel = x.new_zeros(*self.weight.shape[:2], points).index_add(2, at, self.weight)
        waves = torch.einsum("bik,oik->bok", torch.fft.rfft(x), torch.fft.rfft(kernel))
        return torch.fft.irfft(waves, n=points)


class FourierOperator(ElectronEmulator):
    """Fourier neural operator, linear in the state, with gates from the ground state.

    Parameters
    ----------
    horizon, context, current, base
        See `ElectronEmulator`.
    width, layers, reach
        Channels, layers, and range of the kernels in points on each side.
    """

    def __init__(
        self,
        horizon: float,
        context: int = 1,
        current: bool = True,
        base: LinearMap | None = None,
        width: int = 24,
        layers: int = 4,
        reach: int = 10,
    ) -> None:
        super().__init__(horizon, context, current, base)
        taps = 2 * reach + 1
        self.see, self.again = circular(1, 32, 11), circular(32, 32, 11)
        self.gate = nn.Conv1d(32, 2 * layers * width, 1)
        self.enter = nn.Conv1d(self.channels + 6, width, 1, bias=False)
        self.far = nn.ModuleList(_Convolution(width, width, taps, 0.5) for _ in range(layers))
        self.near = nn.ModuleList(nn.Conv1d(width, width, 1, bias=False) for _ in range(layers))
        self.leave = _Convolution(width, 2, taps, 0.0)

    def increment(
        self, x: Tensor, state: ElectronState, generator: torch.Generator | None = None
    ) -> Tensor:
        ground = 10 * (state.ground - state.ground.mean(-1, keepdim=True))[:, None]
        seen = F.gelu(self.see(ground))
        seen = seen + F.gelu(self.again(seen))
        gates = 1 + 0.5 * self.gate(seen).unflatten(1, (len(self.far), 2, -1))
        drive = state.drive()[..., None].expand(-1, -1, x.shape[2])
        h = self.enter(torch.cat([x, 0.2 * drive, drive * state.ground[:, None]], 1))
        for i, (far, near) in enumerate(zip(self.far, self.near, strict=True)):
            h = h + far(h * gates[:, i, 0]) + 0.3 * near(h * gates[:, i, 1])
        return self.leave(h)


class ChainUNet(ElectronEmulator):
    """One-dimensional U-Net; arguments as those of `FourierOperator`.

    The number of points must be a multiple of 4.
    """

    def __init__(
        self,
        horizon: float,
        context: int = 1,
        current: bool = True,
        base: LinearMap | None = None,
        width: int = 32,
    ) -> None:
        super().__init__(horizon, context, current, base)
        self.enter = circular(self.channels + 8, width, 7)
        self.down = nn.ModuleList(circular(width, width, 7) for _ in range(3))
        self.up = nn.ModuleList(circular(2 * width, width, 7) for _ in range(2))
        self.leave = circular(width, 2, 7)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def increment(
        self, x: Tensor, state: ElectronState, generator: torch.Generator | None = None
    ) -> Tensor:
        if x.shape[2] % 4:
            raise ShapeError(f"{x.shape[2]} points; the U-Net needs a multiple of 4")
        drive = state.drive()[..., None]
        size = (
            x.square().mean((1, 2), keepdim=True) + drive.square().mean(1, keepdim=True)
        ).sqrt()
        ground = 10 * (state.ground - state.ground.mean(-1, keepdim=True))[:, None]
        drive = (drive / size).expand(-1, -1, x.shape[2])
        same = size.log().expand_as(ground)
        h = torch.cat([x / size, drive, drive * state.ground[:, None], ground, same], 1)
        fine = F.gelu(self.enter(h))
        middle = F.gelu(self.down[0](F.avg_pool1d(fine, 2)))
        coarse = F.gelu(self.down[1](F.avg_pool1d(middle, 2)))
        h = coarse + F.gelu(self.down[2](coarse))
        for up, skip in zip(self.up, (middle, fine), strict=True):
            h = F.gelu(up(torch.cat([h.repeat_interleave(2, dim=2), skip], 1)))
        return size * self.leave(h)


def circular(inputs: int, outputs: int, width: int, bias: bool = True) -> nn.Conv1d:
    """A convolution on a ring."""
    options: dict[str, Any] = {"padding": width // 2, "padding_mode": "circular"}
    return nn.Conv1d(inputs, outputs, width, bias=bias, **options)


class OneStepObjective(nn.Module):
    """Error of the next few steps, each run scaled to unit size; see `densitykit.training.fit`.

    Parameters
    ----------
    model
        What is trained.
    steps
        Steps that it makes; the windows must hold as many targets.
    noise
        Standard deviation of noise on the first state, as a share of it: a rollout has errors.
    """

    def __init__(self, model: ElectronEmulator, steps: int = 4, noise: float = 0.01) -> None:
        super().__init__()
        self.model, self.steps, self.noise = model, steps, noise
        self.settings = {"steps": steps, "noise": noise}

    def inputs(self, window: ElectronWindow) -> tuple[Tensor, ...]:
        state = self.model.init(window)
        ends = [self.model.init(_later(window, k + 1)).history[:, -1] for k in range(self.steps)]
        targets = torch.stack(ends, 1)
        size = targets.square().mean((1, 2, 3)).sqrt() + 1e-6
        shape = size[:, None, None, None]
        parts = state.history / shape, state.ground, state.field / size[:, None], state.frame
        return *parts, torch.full_like(size, torch.inf), targets / shape

    def forward(
        self,
        history: Tensor,
        ground: Tensor,
        field: Tensor,
        frame: Tensor,
        energy: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        noise = torch.randn(history.shape, generator=generator).to(history)
        state = ElectronState(history + self.noise * noise, ground, field, frame, energy)
        return self.terms(state, targets, generator)

    def terms(
        self, state: ElectronState, targets: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses from a disturbed state; targets (B, steps, 2, X)."""
        loss = targets.new_zeros(())
        for k in range(self.steps):
            state = self.model.advance(state)
            loss = loss + (state.history[:, -1] - targets[:, k]).square().mean() / self.steps
        return {"loss": loss}
