r"""Conditional latent diffusion: the one-step map of the density dynamics.

Given the latent :math:`z_t` of the current state, the next latent is written
:math:`z_{t+1} = z_t + a\,y` with a per-channel scale :math:`a` that gives the increment
:math:`y` unit variance. :math:`p(y | z_t)` is learned by a denoiser with the preconditioning of
Karras et al. (2022, "Elucidating the design space of diffusion-based generative models", table 1,
eq. 7),

.. math:: D(x; \sigma, z_t) = c_{skip}\,x + c_{out}\,F(c_{in}\,x, z_t; \tfrac14\ln\sigma),
   \qquad L_{LDM} = \langle c_{out}^{-2} (D(y + \sigma n; \sigma, z_t) - y)^2 \rangle,

and sampled by Euler steps of the probability-flow ODE on their noise levels (eqs. 4 and 5). Their
second-order (Heun) step needs more than some ten levels to pay: on validation pairs it left
2.6 % at 4 steps and 1.5 % at 8 where Euler leaves 1.0 % and 1.2 %.
A single sampler step from the largest noise level returns :math:`D(\sigma_{max} n; \sigma_{max},
z_t)`, the conditional mean; more steps draw from the distribution about it. Born-Oppenheimer
dynamics is almost deterministic over one step, so the mean has the lower error and samples the
better spread.

Noise on the conditioning latent during training imitates the errors of earlier steps of a
rollout, and so teaches the map to contract them instead of letting them grow.

The training loss of the whole model is that of Chiang et al. (2025),
:math:`L = L_{AE} + \lambda_1 L_{LDM} + \lambda_2 L_{sJSD}`; see :mod:`densitykit.training.loop`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densitykit.errors import CheckpointError, ShapeError
from densitykit.models.autoencoder import Autoencoder
from densitykit.models.base import Domain, FieldEmulator, FieldState
from densitykit.nn.layers import LogFourierEmbedding, UNet

__all__ = ["LatentDiffusion", "noise_levels"]


class LatentDiffusion(FieldEmulator):
    """Autoencoder and conditional latent denoiser.

    Parameters
    ----------
    mu, sigma, eps, horizon, domain
        As in :class:`FieldEmulator`.
    latent_channels, autoencoder_width, autoencoder_blocks, patch
        See
        :class:`densitykit.models.autoencoder.Autoencoder`.
    widths, blocks
        Levels of the denoising U-Net.
    embedding
        Width of the noise-level embedding.
    sampler_steps
        Steps of the sampler; 1 gives the conditional mean.
    sigma_min, sigma_max
        Range of noise levels of the sampler, in units of the increment.
    """

    def __init__(
        self,
        mu: float,
        sigma: float,
        eps: float,
        horizon: float,
        domain: Domain | Mapping[str, Any] | None = None,
        latent_channels: int = 6,
        autoencoder_width: int = 40,
        autoencoder_blocks: int = 2,
        patch: int = 2,
        widths: tuple[int, ...] = (48, 96),
        blocks: tuple[int, ...] = (2, 3),
        embedding: int = 64,
        sampler_steps: int = 1,
        sigma_min: float = 0.02,
        sigma_max: float = 20.0,
    ) -> None:
        super().__init__(mu, sigma, eps, horizon, domain)
        if sampler_steps < 1:
            raise ShapeError(f"sampler_steps is {sampler_steps}; give at least 1")
        self.autoencoder = Autoencoder(
            2, latent_channels, autoencoder_width, autoencoder_blocks, patch
        )
        self.embed = LogFourierEmbedding(embedding)
        self.net = UNet(
            2 * latent_channels, latent_channels, tuple(widths), tuple(blocks), 1, embedding
        )
        self.stride = patch * self.net.stride
        self.sampler_steps, self.sigma_min, self.sigma_max = sampler_steps, sigma_min, sigma_max
        shape = (latent_channels, 1, 1, 1)
        self.register_buffer("latent_mean", torch.zeros(shape))
        self.register_buffer("latent_scale", torch.ones(shape))
        self.register_buffer("increment_scale", torch.ones(shape))

    def step(self, state: FieldState, generator: torch.Generator | None = None) -> FieldState:
        """Return the state one horizon later; see :meth:`FieldEmulator.step`.

        Raises
        ------
        CheckpointError
            Only the autoencoder has been trained: there is no dynamics in it.
        """
        if not (self.net.leave.weight.any() or self.net.linear.weight.any()):
            raise CheckpointError(
                "the denoiser of this LatentDiffusion was never trained, only its autoencoder: it "
                "has no dynamics; train it with `densitykit train latent --autoencoder`"
            )
        return super().step(state, generator)

    def encode(self, state: Tensor) -> Tensor:
        """Normalised state -> standardised latent (B, C, X/p, Y/p, Z/p)."""
        return (self.autoencoder.encode(state) - self.latent_mean) / self.latent_scale

    def decode(self, latent: Tensor) -> Tensor:
        """Standardised latent -> normalised state (B, 2, X, Y, Z)."""
        return self.autoencoder.decode(latent * self.latent_scale + self.latent_mean)

    @torch.no_grad()
    def set_latent_scales(self, state: Tensor, next_state: Tensor) -> None:
        """Standardise the latent and its increment by their statistics on training states."""
        z, z_next = self.autoencoder.encode(state), self.autoencoder.encode(next_state)
        dims = (0, 2, 3, 4)
        self.latent_mean.copy_(z.mean(dims).reshape(-1, 1, 1, 1))
        self.latent_scale.copy_(z.std(dims).reshape(-1, 1, 1, 1))
        increment = (z_next - z) / self.latent_scale
        self.increment_scale.copy_(increment.std(dims).reshape(-1, 1, 1, 1))

    def denoise(self, x: Tensor, sigma: Tensor, latent: Tensor) -> Tensor:
        """D(x; sigma, z_t): the clean increment; x and latent (B, C, ...), sigma (B,)."""
        s = sigma.reshape(-1, 1, 1, 1, 1)
        c_in = (1 + s**2).rsqrt()
        c_skip, c_out = c_in**2, s * c_in
        return c_skip * x + c_out * self.net(torch.cat([c_in * x, latent], 1), self.embed(sigma))

    def sample(self, latent: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Increment drawn from p(y | z_t) along the probability flow; same shape as ``latent``."""
        device = generator.device if generator is not None else latent.device
        noise = torch.randn(latent.shape, generator=generator, device=device).to(latent)
        levels = noise_levels(self.sampler_steps, self.sigma_min, self.sigma_max)
        x = self.sigma_max * noise
        for s, s_next in zip(levels[:-1], levels[1:], strict=True):
            denoised = self.denoise(x, x.new_full((len(x),), s), latent)
            x = denoised + (s_next / s) * (x - denoised)
        return x

    def advance(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        z = self.encode(state)
        return self.decode(z + self.increment_scale * self.sample(z, generator))


def noise_levels(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """Karras et al. (2022), eq. 5, and a final zero; for one step just (sigma_max, 0)."""
    if steps == 1:
        return [sigma_max, 0.0]
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]
