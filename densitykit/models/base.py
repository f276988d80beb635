r"""One-step maps of the density state, and the deterministic one: a periodic U-Net.

A :class:`StateMap` owns what all learned maps share: the log-normal variables, the horizon, and
the exact restoration of the electron count after every step. A subclass only says how a
normalised state advances. The U-Net is plain regression on the next state; it is the
baseline beside which latent diffusion has to earn its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densitykit.data.transforms import LogNormal, restore_electrons
from densitykit.fields import check_stride

__all__ = ["StateMap"]


class StateMap(nn.Module):
    """A one-step map of the density state, callable on physical densities.

    Parameters
    ----------
    mu, sigma, eps
        Constants of :class:`densitykit.data.transforms.LogNormal`.
    horizon
        Time in fs that one step covers; also the unit of time of the rate channel.

    Subclasses implement :meth:`advance` on normalised states. The map itself takes and returns
    physical states with shape (B, 2, X, Y, Z): channel 0 the density in angstrom**-3, channel 1
    its rate in angstrom**-3/fs. It conserves the number of electrons to rounding.
    """

    stride: int = 1

    def __init__(self, mu: float, sigma: float, eps: float, horizon: float) -> None:
        super().__init__()
        self.transform = LogNormal(mu, sigma, eps)
        self.horizon = horizon

    def normalise(self, physical: Tensor) -> Tensor:
        """Physical state -> normalised state (field, horizon * field rate), same shape."""
        rho, rate = physical[:, 0], physical[:, 1]
        field_rate = self.horizon * self.transform.forward_rate(rho, rate)
        return torch.stack([self.transform.forward(rho), field_rate], dim=1)

    def denormalise(self, state: Tensor, mean_density: Tensor | float) -> Tensor:
        """Normalised state -> physical state with exactly ``mean_density`` electrons per volume.

        The mean of the rate is removed for the same reason: its integral is dN/dt = 0.
        """
        rho = restore_electrons(self.transform.inverse(state[:, 0]), mean_density)
        rate = self.transform.inverse_rate(rho, state[:, 1] / self.horizon)
        rate = rate - rate.mean(dim=(-3, -2, -1), keepdim=True)
        return torch.stack([rho, rate], dim=1)

    def advance(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised state at t -> normalised state at t + horizon, shape (B, 2, X, Y, Z)."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, physical: Tensor, generator: torch.Generator | None = None) -> Tensor:
        check_stride(physical.shape[-3:], self.stride)
        mean_density = physical[:, 0].mean((-3, -2, -1), keepdim=True, dtype=torch.float64)
        advanced = self.advance(self.normalise(physical), generator)
        return self.denormalise(advanced, mean_density)
