r"""What a learned one-step map has to beat.

All are callables on physical states (B, 2, X, Y, Z), density in angstrom**-3 and its rate in
angstrom**-3/fs, and carry the ``horizon`` :math:`h` in fs that one call covers:

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

from collections.abc import Callable

import torch
from torch import Tensor

from densitykit.cells import shells
from densitykit.data.windows import StatePairs

__all__ = [
    "FourierLinearMap",
    "LinearExtrapolation",
    "MeanField",
    "Persistence",
    "ProperOrthogonalMap",
    "baseline_maps",
]


class Persistence:
    """Nothing changes."""

    def __init__(self, horizon: float) -> None:
        self.horizon = horizon

    def __call__(self, state: Tensor) -> Tensor:
        return state


class LinearExtrapolation:
    """The density moves on at its present rate, which stays as it is."""

    def __init__(self, horizon: float) -> None:
        self.horizon = horizon

    def __call__(self, state: Tensor) -> Tensor:
        rho, rate = state[:, 0], state[:, 1]
        return torch.stack([rho + self.horizon * rate, rate], dim=1)


class MeanField:
    """The mean training density, at rest, whatever the state.

    Parameters
    ----------
    pairs
        Training pairs.
    """

    def __init__(self, pairs: StatePairs) -> None:
        self.horizon = pairs.horizon
        mean = pairs.states[:, 0].mean(dim=0)
        self.state = torch.stack([mean, torch.zeros_like(mean)])

    def __call__(self, state: Tensor) -> Tensor:
        return self.state.to(state).expand_as(state)


class ProperOrthogonalMap:
    """POD projection and least-squares linear map.

    Parameters
    ----------
    pairs
        Training pairs.
    modes
        Number of proper orthogonal modes.
    ridge
        Tikhonov weight of the least squares, relative to the largest variance.

    The rate enters in units of density per horizon, so that both channels weigh alike.
    """

    def __init__(self, pairs: StatePairs, modes: int = 96, ridge: float = 1e-4) -> None:
        self.horizon = pairs.horizon
        self.units = torch.tensor([1.0, pairs.horizon]).reshape(2, 1, 1, 1)
        states, lag = pairs.states * self.units, pairs.lag
        self.mean = states.mean(dim=0)
        flat = (states - self.mean).flatten(1)
        # the modes from the small Gram matrix (time x time), not from the grid x grid covariance
        values, vectors = torch.linalg.eigh((flat @ flat.T).double())
        keep = values.argsort(descending=True)[: min(modes, len(flat) - 1)]
        keep = keep[values[keep] > 1e-6 * values.max()]  # below is rounding in float32
        self.modes = (flat.T.double() @ vectors[:, keep] / values[keep].sqrt()).float()
        coefficients = (flat @ self.modes).double()
        now, later = coefficients[:-lag], coefficients[lag:]
        gram = now.T @ now
        gram += ridge * gram.diagonal().max() * torch.eye(len(gram), dtype=gram.dtype)
        self.map = torch.linalg.solve(gram, now.T @ later).float()

    def __call__(self, state: Tensor) -> Tensor:
        units, mean, modes, matrix = (
            a.to(state) for a in (self.units, self.mean, self.modes, self.map)
        )
        coefficients = (state * units - mean).flatten(1) @ modes
        flat = (coefficients @ matrix) @ modes.T
        return (flat.reshape(state.shape) + mean) / units


class FourierLinearMap:
    """Least-squares linear map of every shell of Fourier coefficients.

    Parameters
    ----------
    pairs
        Training pairs.
    every
        Use every so many pairs.
    """

    def __init__(self, pairs: StatePairs, every: int = 4) -> None:
        self.horizon, self.units = pairs.horizon, torch.tensor([1.0, pairs.horizon])
        grid = tuple(pairs.states.shape[2:])
        self.shell = torch.from_numpy(shells(grid))
        now, later = (self._spectrum(x) for x in pairs[::every])
        gram = self._shell_sums(now, now)
        cross = self._shell_sums(now, later)
        # a shell that holds nothing (beyond the cutoff) must not make the solve singular
        gram += 1e-12 * gram.diagonal(dim1=1, dim2=2).max() * torch.eye(2, dtype=gram.dtype)
        self.map = torch.linalg.solve(gram, cross).to(torch.complex64)
        self.map[0] = torch.eye(2)  # q = 0: the number of electrons stays, whatever the noise says

    def _spectrum(self, state: Tensor) -> Tensor:
        return torch.fft.fftn(state * self.units.to(state)[:, None, None, None], dim=(2, 3, 4))

    def _shell_sums(self, a: Tensor, b: Tensor) -> Tensor:
        """Re sum a_i^* b_j over pairs and over the q of a shell: (shell, 2, 2)."""
        product = (a.conj()[:, :, None] * b[:, None]).real.sum(0).double()  # (2, 2, X, Y, Z)
        sums = product.new_zeros(int(self.shell.max()) + 1, 2, 2)
        return sums.index_add_(0, self.shell.flatten(), product.flatten(2).permute(2, 0, 1))

    def __call__(self, state: Tensor) -> Tensor:
        matrix = self.map.to(state.device)[self.shell.to(state.device)]  # (X, Y, Z, 2, 2)
        advanced = torch.einsum("bixyz,xyzij->bjxyz", self._spectrum(state), matrix)
        field = torch.fft.ifftn(advanced, dim=(2, 3, 4)).real
        return field / self.units.to(state)[:, None, None, None]


def baseline_maps(train: StatePairs) -> dict[str, Callable[[Tensor], Tensor]]:
    """All baselines by name, fitted where they need it."""
    return {
        "Fourier linear map": FourierLinearMap(train),
        "POD + linear map": ProperOrthogonalMap(train),
        "linear extrapolation": LinearExtrapolation(train.horizon),
        "persistence": Persistence(train.horizon),
        "mean field": MeanField(train),
    }
