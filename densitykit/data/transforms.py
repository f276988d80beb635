r"""Log-normal to normal: the variables in which density dynamics is learned.

Where the density is log-normally distributed, :math:`\ln\rho` is normal. With a small offset
:math:`\epsilon` that keeps the pseudised cores (where :math:`\rho \to 0`) from dominating, the
standardised field is

.. math:: \tilde\rho = (\ln(\rho + \epsilon) - \mu) / \sigma,
          \qquad \dot{\tilde\rho} = \dot\rho / (\sigma (\rho + \epsilon)),

the second by the chain rule. :math:`\mu` and :math:`\sigma` come from training frames only. The
state of the dynamics is the pair :math:`(\tilde\rho, \tau\dot{\tilde\rho})`: two channels on
the grid. The time :math:`\tau` (the horizon of the one-step map) brings both channels to
comparable size.

Source: Chiang, Choi and Osei-Kuffuor (2025), "Generative latent space dynamics of electron
density", which leaves the offset and the scheme of the time derivative open; both are choices
of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

__all__ = ["LogNormal", "restore_electrons"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class LogNormal:
    """The map between a density and its standardised logarithm (numpy arrays or torch tensors).

    Parameters
    ----------
    mu, sigma
        Mean and standard deviation of ln(density + eps); sigma is without unit.
    eps
        Offset in angstrom**-3.
    """

    mu: float
    sigma: float
    eps: float

    @classmethod
    def fit(cls, density: np.ndarray, eps: float = 0.01) -> LogNormal:
        """Constants of a set of training densities (angstrom**-3, any shape).

        The default offset is a quarter of the mean valence density of lithium. It brings the
        excess kurtosis of the field from 18 (no offset) to 3. What the best linear code of 3/8 as
        many numbers loses of state variance falls from 2.7 % (eps = 3e-4) to 0.35 %.
        """
        log_density = np.log(np.asarray(density, dtype=np.float64) + eps)
        return cls(float(log_density.mean()), float(log_density.std()), eps)

    def forward(self, density: Array) -> Array:
        """Density in angstrom**-3 -> standardised field, same shape."""
        log = torch.log if isinstance(density, torch.Tensor) else np.log
        return (log(density + self.eps) - self.mu) / self.sigma

    def inverse(self, field: Array) -> Array:
        """Standardised field -> density in angstrom**-3, same shape; always above -eps."""
        exp = torch.exp if isinstance(field, torch.Tensor) else np.exp
        return exp(field * self.sigma + self.mu) - self.eps

    def forward_rate(self, density: Array, rate: Array) -> Array:
        """d density/dt (angstrom**-3/fs) -> d field/dt (1/fs), by the chain rule."""
        return rate / (self.sigma * (density + self.eps))

    def inverse_rate(self, density: Array, field_rate: Array) -> Array:
        """d field/dt (1/fs) -> d density/dt (angstrom**-3/fs), by the chain rule."""
        return field_rate * self.sigma * (density + self.eps)


def restore_electrons(density: Array, mean_density: Array | float, floor: float = 1e-6) -> Array:
    """Non-negative density with exactly the given mean (angstrom**-3).

    Values below ``floor`` are raised to it (the offset of the log-normal transform admits values
    down to -eps), then the field is scaled. Trailing three axes are space; ``mean_density`` is a
    number, or has those axes with length one.
    """
    clamped = density.clip(floor)
    # in double precision: a factor rounded to single is wrong for all voxels alike, and such
    # errors would add up over a rollout
    if isinstance(density, torch.Tensor):
        mean = clamped.mean(dim=(-3, -2, -1), keepdim=True, dtype=torch.float64)
        return (clamped.double() * (mean_density / mean)).to(density.dtype)
    mean = clamped.mean(axis=(-3, -2, -1), keepdims=True, dtype=np.float64)
    return (clamped * (mean_density / mean)).astype(density.dtype)
