r"""Latent diffusion of electrons in time: draws of what density and current become a step later.

What a base map misses of the increment, scaled to unit size, is encoded by a strided convolution
E and decoded by another, G, both linear: r = G a y, with scales a that give each latent channel y
unit variance. :math:`p(y | (\delta\rho, j)_t;\ \rho_0;\ \Delta A)` is learned and sampled as in
:mod:`densitykit.models.diffusion` (Karras et al. 2022),

.. math:: L = \frac{\langle (G E r - r)^2\rangle}{\langle r^2\rangle}
    + \langle c_{out}^{-2} (D(y + \sigma n; \sigma) - y)^2 \rangle, \qquad a\,y = E r .

The equation has one solution: the conditional mean, a single sampler step, is what one wants, and
the spread of draws shows what the state does not tell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densitykit.chain.electron_emulators import (
    ElectronEmulator,
    ElectronState,
    LinearMap,
    OneStepObjective,
    circular,
)
from densitykit.errors import ShapeError
from densitykit.models.diffusion import noise_levels
from densitykit.nn.layers import LogFourierEmbedding

__all__ = ["ChainDiffusion", "LatentObjective"]

_PATCH = 2


class ChainDiffusion(ElectronEmulator):
    """Conditional latent diffusion of the increment; points must be a multiple of 2.

    Parameters
    ----------
    horizon, context, current, base
        See `ElectronEmulator`.
    latent_channels, width, blocks
        Channels of the latent and of the denoiser, and its residual blocks.
    sampler_steps
        Of a draw; 1 gives the conditional mean.
    sigma_min, sigma_max
        Range of noise levels of the sampler, in units of the latent increment.
    """

    def __init__(
        self,
        horizon: float,
        context: int = 1,
        current: bool = True,
        base: LinearMap | None = None,
        latent_channels: int = 4,
        width: int = 64,
        blocks: int = 4,
        sampler_steps: int = 1,
        sigma_min: float = 0.02,
        sigma_max: float = 20.0,
    ) -> None:
        super().__init__(horizon, context, current, base)
        self.sampler_steps, self.sigma_min, self.sigma_max = sampler_steps, sigma_min, sigma_max
        self.encode = circular(2 * _PATCH, latent_channels, 5, bias=False)
        self.decode = circular(latent_channels, 2 * _PATCH, 5, bias=False)
        seen = _PATCH * (self.channels + 2) + 4
        self.embed = LogFourierEmbedding(width)
        self.enter = circular(seen + latent_channels, width, 7)
        self.first = nn.ModuleList(circular(width, width, 7) for _ in range(blocks))
        self.second = nn.ModuleList(circular(width, width, 7) for _ in range(blocks))
        self.film = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.leave = circular(width, latent_channels, 7)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.register_buffer("scale", torch.zeros(latent_channels, 1))  # untrained: the base

    def increment(
        self, x: Tensor, state: ElectronState, generator: torch.Generator | None = None
    ) -> Tensor:
        size, condition = self.condition(x, state)
        noise = torch.randn(len(x), len(self.scale), condition.shape[2], generator=generator)
        latent = self.sigma_max * noise.to(x)
        levels = noise_levels(self.sampler_steps, self.sigma_min, self.sigma_max)
        for s, after in zip(levels[:-1], levels[1:], strict=True):
            denoised = self.denoise(latent, latent.new_full((len(x),), s), condition)
            latent = denoised + (after / s) * (latent - denoised)
        return size * _unfolded(self.decode(self.scale * latent))

    def condition(self, x: Tensor, state: ElectronState) -> tuple[Tensor, Tensor]:
        """Size of state and drive, (B, 1, 1), and what the denoiser sees of them in this unit."""
        if x.shape[2] % _PATCH:
            raise ShapeError(f"{x.shape[2]} points; latent diffusion needs a multiple of {_PATCH}")
        drive = state.drive()[..., None]
        size = x.square().mean((1, 2), keepdim=True) + drive.square().mean(1, keepdim=True)
        size = size.sqrt() + 1e-9
        ground = 10 * (state.ground - state.ground.mean(-1, keepdim=True))[:, None]
        pushed = drive[:, 1:2] / size * ground
        fine = _folded(torch.cat([x / size, ground, pushed], 1))
        flat = torch.cat([drive / size, size.log()], 1).expand(-1, -1, fine.shape[2])
        return size, torch.cat([fine, flat], 1)

    def denoise(self, latent: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """D(y; sigma), (B, C, X/2): the clean latent increment; sigma (B,)."""
        s = sigma[:, None, None]
        c_in = (1 + s**2).rsqrt()
        level = self.embed(sigma)
        h = self.enter(torch.cat([c_in * latent, condition], 1))
        for first, film, second in zip(self.first, self.film, self.second, strict=True):
            scale, shift = film(level)[..., None].chunk(2, 1)
            h = h + second(F.silu((1 + scale) * first(F.silu(h)) + shift))
        return c_in**2 * latent + s * c_in * self.leave(F.silu(h))


class LatentObjective(OneStepObjective):
    """Reconstruction and denoising of one increment; see `densitykit.training.fit`.

    Parameters
    ----------
    model, noise
        As `OneStepObjective`.
    """

    def __init__(self, model: ChainDiffusion, noise: float = 0.01) -> None:
        super().__init__(model, 1, noise)

    def terms(
        self, state: ElectronState, targets: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        model = self.model
        x = model.seen(state)
        missed = targets[:, 0] - state.history[:, -1]
        if model.base is not None:
            missed = missed - model.base.increment(x, state)
        size, condition = model.condition(x, state)
        r = _folded(missed / size)
        code = model.encode(r)
        rebuilt = (model.decode(code) - r).square().mean() / r.square().mean()
        if self.training:
            spread = code.detach().std((0, 2))[:, None]
            model.scale.lerp_(spread, 0.05 if model.scale.any() else 1.0)
        y = code.detach() / model.scale.clamp(min=1e-12)
        sigma = torch.randn(len(x), generator=generator).mul(1.5).add(0.5).exp().to(x)
        n = torch.randn(y.shape, generator=generator).to(y)
        s = sigma[:, None, None]
        denoised = model.denoise(y + s * n, sigma, condition)
        weight = (1 + s**2) / s**2
        denoising = (weight * (denoised - y) ** 2).mean()
        return {"loss": rebuilt + denoising, "rebuilt": rebuilt, "denoising": denoising}


def _folded(x: Tensor) -> Tensor:
    """(B, C, X) -> (B, 2 C, X / 2)."""
    return x.unflatten(2, (-1, _PATCH)).transpose(2, 3).flatten(1, 2)


def _unfolded(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, _PATCH)).transpose(2, 3).flatten(2, 3)
