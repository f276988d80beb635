r"""What a learned emulator has to beat, on the same contract (:mod:`densitykit.models.base`):

* persistence, :math:`\rho_{t+h} = \rho_t`;
* linear extrapolation, :math:`\rho_{t+h} = \rho_t + h\dot\rho_t`;
* mean field, the time average of the training run;
* POD + linear map: the state is projected on the leading proper orthogonal modes of the training
  states and advanced by the least-squares linear map between them (dynamic mode decomposition;
  Schmid 2010, J. Fluid Mech. 656, 5). The modes of one short run hardly span the states of
  another;
* Fourier linear map: the same for a homogeneous liquid, whose orthogonal modes are plane waves
  by translation invariance. Each shell of equal :math:`|q|` has its own real 2x2 matrix,
  :math:`(\rho_q, h\dot\rho_q)_{t+h} = A_{|q|}\,(\rho_q, h\dot\rho_q)_t`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from densitykit.cells import shells
from densitykit.data.transforms import backward_rate
from densitykit.data.windows import Window, Windows
from densitykit.errors import WindowError
from densitykit.models.base import Domain, Emulator

__all__ = [
    "FourierLinearMap",
    "LinearExtrapolation",
    "MeanField",
    "Persistence",
    "ProperOrthogonalMap",
    "baselines",
]

_SNAPSHOT_BYTES = 2**29  # most memory that snapshots of a fit may take


class Persistence:
    """Nothing changes; a state is the density, (B, X, Y, Z)."""

    context = 1

    def __init__(self, horizon: float) -> None:
        self.horizon = horizon

    def init(self, window: Window) -> Tensor:
        return window.past(1).density[:, 0]

    def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return state

    def density(self, state: Tensor) -> Tensor:
        return state


class _Fitted:
    """What was fitted to windows: it serves their grid and cell only."""

    def __init__(self, windows: Windows) -> None:
        super().__init__(windows.horizon)
        self.grid, self.domain = windows.grid, Domain.of(windows)

    def init(self, window: Window) -> Tensor:
        name = f"this {type(self).__name__}"
        self.domain.check(window, name)
        if window.grid != self.grid:
            here, there = (" x ".join(map(str, grid)) for grid in (window.grid, self.grid))
            raise WindowError(f"{window.source}: grid {here}, {name} was fitted to {there}")
        return super().init(window)


class MeanField(_Fitted, Persistence):
    """The mean training density, whatever the state."""

    def __init__(self, windows: Windows) -> None:
        super().__init__(windows)
        chosen = windows.every(1, 2048)
        total = torch.zeros(windows.grid, dtype=torch.float64)
        for i in chosen:
            total += windows.frames[i + windows.context - 1]
        self.mean = (total / len(chosen)).float()

    def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.mean.to(state).expand_as(state)


class LinearExtrapolation:
    """The density moves on at its present rate, which stays as it is.

    A state is density and horizon times rate, both in angstrom**-3, (B, 2, X, Y, Z).
    """

    context = 3

    def __init__(self, horizon: float) -> None:
        self.horizon = horizon

    def init(self, window: Window) -> Tensor:
        return _states(window.past(3), self.horizon)

    def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.stack([state[:, 0] + state[:, 1], state[:, 1]], dim=1)

    def density(self, state: Tensor) -> Tensor:
        return state[:, 0]


def _states(window: Window, horizon: float) -> Tensor:
    """Density and horizon times rate of the present frame, (B, 2, X, Y, Z)."""
    rate = backward_rate(window.density, window.time_step)
    return torch.stack([window.density[:, -1], horizon * rate], dim=1)


def _pair(window: Window, windows: Windows) -> tuple[Tensor, Tensor]:
    """States now and a horizon later."""
    now, later = (_states(window.past(3, end), windows.horizon) for end in (0, windows.lag))
    return now, later


class ProperOrthogonalMap(_Fitted, LinearExtrapolation):
    """POD projection and least-squares linear map.

    Parameters
    ----------
    windows
        Training windows; as many of them are used, evenly, as fit into half a gigabyte.
    modes
        Number of proper orthogonal modes.
    ridge
        Tikhonov weight of the least squares, relative to the largest variance.
    """

    def __init__(self, windows: Windows, modes: int = 96, ridge: float = 1e-4) -> None:
        super().__init__(windows)
        limit = max(8, _SNAPSHOT_BYTES // (16 * int(np.prod(self.grid))))
        pairs = [_pair(windows[i], windows) for i in windows.every(1, limit)]
        now, later = (torch.cat(side) for side in zip(*pairs, strict=True))
        self.mean = now.mean(dim=0)
        flat, flat_later = ((x - self.mean).flatten(1) for x in (now, later))
        # the modes from the small Gram matrix (time x time), not from the grid x grid covariance
        values, vectors = torch.linalg.eigh((flat @ flat.T).double())
        keep = values.argsort(descending=True)[: min(modes, len(flat) - 1)]
        keep = keep[values[keep] > 1e-6 * values.max()]  # below is rounding in float32
        self.modes = (flat.T.double() @ vectors[:, keep] / values[keep].sqrt()).float()
        a, b = ((x @ self.modes).double() for x in (flat, flat_later))
        gram = a.T @ a
        gram += ridge * gram.diagonal().max() * torch.eye(len(gram), dtype=gram.dtype)
        self.map = torch.linalg.solve(gram, a.T @ b).float()

    def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, modes, matrix = (a.to(state) for a in (self.mean, self.modes, self.map))
        coefficients = (state - mean).flatten(1) @ modes
        return ((coefficients @ matrix) @ modes.T).reshape(state.shape) + mean


class FourierLinearMap(_Fitted, LinearExtrapolation):
    """Least-squares linear map of every shell of Fourier coefficients.

    Parameters
    ----------
    windows
        Training windows.
    every
        Use every so many of them, and at most 512.
    """

    def __init__(self, windows: Windows, every: int = 4) -> None:
        super().__init__(windows)
        self.shell = torch.from_numpy(shells(windows.grid, windows.cell.numpy()))
        gram, cross = torch.zeros(2, int(self.shell.max()) + 1, 2, 2, dtype=torch.float64)
        for i in windows.every(every, 512):
            now, later = (torch.fft.fftn(x, dim=(2, 3, 4)) for x in _pair(windows[i], windows))
            gram += self._shell_sums(now, now)
            cross += self._shell_sums(now, later)
        # a shell that holds nothing (beyond the cutoff) must not make the solve singular
        gram += 1e-12 * gram.diagonal(dim1=1, dim2=2).max() * torch.eye(2, dtype=gram.dtype)
        self.map = torch.linalg.solve(gram, cross).to(torch.complex64)
        self.map[0] = torch.eye(2)  # q = 0: the number of electrons stays, whatever the noise says

    def _shell_sums(self, a: Tensor, b: Tensor) -> Tensor:
        """Re sum a_i^* b_j over members and over the q of a shell: (shell, 2, 2)."""
        product = (a.conj()[:, :, None] * b[:, None]).real.sum(0).double()  # (2, 2, X, Y, Z)
        sums = product.new_zeros(int(self.shell.max()) + 1, 2, 2)
        return sums.index_add_(0, self.shell.flatten(), product.flatten(2).permute(2, 0, 1))

    def step(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        matrix = self.map.to(state.device)[self.shell.to(state.device)]  # (X, Y, Z, 2, 2)
        modes = torch.fft.fftn(state, dim=(2, 3, 4))
        advanced = torch.einsum("bixyz,xyzij->bjxyz", modes, matrix)
        return torch.fft.ifftn(advanced, dim=(2, 3, 4)).real


def baselines(windows: Windows) -> dict[str, Emulator]:
    """Return all baselines by name, fitted to training windows where they need it."""
    return {
        "Fourier linear map": FourierLinearMap(windows),
        "POD + linear map": ProperOrthogonalMap(windows),
        "linear extrapolation": LinearExtrapolation(windows.horizon),
        "persistence": Persistence(windows.horizon),
        "mean field": MeanField(windows),
    }
