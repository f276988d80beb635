r"""Periodic 3-D convolutional autoencoder of the density state.

The encoder maps the two channels :math:`s = (\tilde\rho, \tau\dot{\tilde\rho})` on an
:math:`N^3` grid to a compact latent :math:`z` on an :math:`(N/p)^3` grid; the decoder maps it
back:

.. math:: z = E(s), \qquad \hat s = D(z), \qquad L_{AE} = \langle (\hat s - s)^2 \rangle .

Both have a linear path beside the residual network, because most of the variance of a smooth,
band-limited field is caught by a linear filter and the network then only learns the rest. The
latent is softly bounded, :math:`z \leftarrow z/\sqrt{1 + z^2/b^2}`, so that the noise added to it
during training cannot be made harmless by a larger scale: the decoder becomes smooth in the
latent, which the diffusion model needs. Chiang et al. (2025) give neither widths nor latent
sizes; these are choices of ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densitykit.nn.layers import ResidualBlock, circular_conv, depth_to_space, space_to_depth

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """Periodic convolutional autoencoder.

    Parameters
    ----------
    channels
        Channels of the state (2: field and rate).
    latent_channels
        Channels of the latent.
    width
        Channels of the residual blocks, a multiple of 8.
    blocks
        Residual blocks in the encoder and in the decoder.
    patch
        Ratio of the fine to the latent grid.
    bound
        Soft bound of the latent.
    noise
        Standard deviation of the noise on the latent in training mode.

    ``forward``: state with shape (B, channels, X, Y, Z) -> reconstruction, same shape.
    """

    def __init__(
        self,
        channels: int = 2,
        latent_channels: int = 6,
        width: int = 40,
        blocks: int = 2,
        patch: int = 2,
        bound: float = 5.0,
        noise: float = 0.01,
    ) -> None:
        super().__init__()
        self.patch, self.bound, self.noise = patch, bound, noise
        fine = channels * patch**3
        self.encoder = _stack(fine, latent_channels, width, blocks)
        self.encoder_linear = circular_conv(fine, latent_channels)
        self.decoder = _stack(latent_channels, fine, width, blocks)
        self.decoder_linear = circular_conv(latent_channels, fine)

    def encode(self, state: Tensor) -> Tensor:
        """State (B, channels, X, Y, Z) -> latent (B, latent_channels, X/p, Y/p, Z/p)."""
        x = space_to_depth(state, self.patch)
        z = self.encoder_linear(x) + self.encoder(x)
        return z / torch.sqrt(1 + (z / self.bound) ** 2)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (B, latent_channels, X/p, Y/p, Z/p) -> state (B, channels, X, Y, Z)."""
        return depth_to_space(self.decoder_linear(latent) + self.decoder(latent), self.patch)

    def forward(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        z = self.encode(state)
        if self.training and self.noise:
            noise = torch.randn(
                z.shape,
                generator=generator,
                dtype=z.dtype,
                device=generator.device if generator else z.device,
            )
            z = z + self.noise * noise.to(z)
        return self.decode(z)


def _stack(c_in: int, c_out: int, width: int, blocks: int) -> nn.Sequential:
    """Convolution in, residual blocks, convolution out that starts at zero."""
    inner = [ResidualBlock(width) for _ in range(blocks)]
    return nn.Sequential(
        circular_conv(c_in, width), *inner, nn.SiLU(), circular_conv(width, c_out, zero=True)
    )
