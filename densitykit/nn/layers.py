r"""Building blocks of periodic 3-D networks.

A field on a cell-periodic grid lives on a torus, so every convolution pads *circularly*: the
network then commutes with shifts by one (coarsest) grid cell and can be evaluated on any
supercell whose edges are divisible by its total stride.

Going from a fine to a coarse grid is done by *space-to-depth*: the :math:`p^3` points of a patch
become channels, which loses nothing; depth-to-space is its inverse. A convolution of width 3
before depth-to-space equals a transposed convolution of width :math:`3p` and stride
:math:`p`, at the cost of the coarse grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = [
    "LogFourierEmbedding",
    "PeriodicConv3d",
    "ResidualBlock",
    "UNet",
    "circular_conv",
    "depth_to_space",
    "space_to_depth",
]


class PeriodicConv3d(nn.Conv3d):
    """Circularly padded 3-D convolution of odd width and stride 1.

    ``forward``: (B, in_channels, X, Y, Z) -> (B, out_channels, X, Y, Z).
    """

    def __init__(self, in_channels: int, out_channels: int, width: int = 3) -> None:
        circular = {"padding": width // 2, "padding_mode": "circular"}
        super().__init__(in_channels, out_channels, width, **circular)

    def forward(self, x: Tensor) -> Tensor:
        # for one small field on a CPU PyTorch 2.13 takes a plain loop, half as fast as oneDNN,
        # which it takes for two; rollouts of one member are such fields
        plain = len(x) == 1 and x.device.type == "cpu" and x.dtype == torch.float32
        if (
            not plain
            or not torch.backends.mkldnn.is_available()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        padded = nn.functional.pad(x, self._reversed_padding_repeated_twice, mode="circular")
        return torch.ops.aten.mkldnn_convolution(
            padded, self.weight, self.bias, [0] * 3, self.stride, self.dilation, self.groups
        )


def circular_conv(
    in_channels: int, out_channels: int, width: int = 3, zero: bool = False
) -> PeriodicConv3d:
    """A :class:`PeriodicConv3d`; with ``zero`` it starts as the zero map."""
    conv = PeriodicConv3d(in_channels, out_channels, width)
    if zero:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    return conv


def space_to_depth(x: Tensor, patch: int) -> Tensor:
    """(B, C, X, Y, Z) -> (B, C p^3, X/p, Y/p, Z/p)."""
    if patch == 1:
        return x
    b, c, *n = x.shape
    p = patch
    x = x.reshape(b, c, n[0] // p, p, n[1] // p, p, n[2] // p, p)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * p**3, *(k // p for k in n))


def depth_to_space(x: Tensor, patch: int) -> Tensor:
    """(B, C p^3, X, Y, Z) -> (B, C, X p, Y p, Z p), the inverse of :func:`space_to_depth`."""
    if patch == 1:
        return x
    b, c, *n = x.shape
    p = patch
    x = x.reshape(b, c // p**3, p, p, p, *n)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // p**3, *(k * p for k in n))


class LogFourierEmbedding(nn.Module):
    """Sines and cosines of the logarithm of a noise level, then a small perceptron.

    Parameters
    ----------
    features
        Width of the embedding.

    ``forward``: noise level with shape (B,) -> embedding with shape (B, features).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer(
            "frequency", 2.0 ** torch.linspace(-2, 3, features // 2), persistent=False
        )
        self.mlp = nn.Sequential(
            nn.Linear(features, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU()
        )

    def forward(self, sigma: Tensor) -> Tensor:
        phase = sigma.log()[:, None] * self.frequency * (math.pi / 4)
        return self.mlp(torch.cat([phase.sin(), phase.cos()], dim=1))


class ResidualBlock(nn.Module):
    """x + conv(SiLU(FiLM(conv(SiLU(norm(x)))))), with FiLM (scale and shift) by an embedding.

    Parameters
    ----------
    channels
        Number of channels in and out; a multiple of 8.
    embedding
        Width of the conditioning embedding; 0 for none.
    """

    def __init__(self, channels: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.conv_1 = circular_conv(channels, channels)
        self.conv_2 = circular_conv(channels, channels)
        nn.init.zeros_(self.conv_2.bias)
        with torch.no_grad():
            self.conv_2.weight.mul_(0.3)  # start near the identity: deep stacks train faster
        self.film = nn.Linear(embedding, 2 * channels) if embedding else None
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv_1(nn.functional.silu(self.norm(x)))
        if self.film is not None:
            scale, shift = self.film(embedding)[:, :, None, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv_2(nn.functional.silu(h))


class UNet(nn.Module):
    """Periodic 3-D U-Net on a patched grid, with a linear path from input to output.

    ``forward``: x with shape (B, in_channels, X, Y, Z) and, if conditioned, an embedding with
    shape (B, embedding) -> (B, out_channels, X, Y, Z). X, Y and Z must be divisible by
    :attr:`stride`. At the start of training the output is zero.

    Parameters
    ----------
    in_channels, out_channels
        Channels of the fields.
    widths
        Channels of each level; the grid halves from one level to the next.
    blocks
        Residual blocks per level (each level but the last has them twice: down and up).
    patch
        Edge of the space-to-depth patch at the entrance.
    embedding
        Width of the conditioning embedding; 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: tuple[int, ...] = (48, 96),
        blocks: tuple[int, ...] = (2, 3),
        patch: int = 1,
        embedding: int = 0,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.stride = patch * 2 ** (len(widths) - 1)
        c_in, c_out = in_channels * patch**3, out_channels * patch**3
        levels = range(len(widths))

        def stack(i: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(widths[i], embedding) for _ in range(blocks[i]))

        self.enter = circular_conv(c_in, widths[0])
        self.down = nn.ModuleList(stack(i) for i in levels)
        self.coarsen = nn.ModuleList(
            nn.Conv3d(widths[i], widths[i + 1], 2, stride=2) for i in levels[:-1]
        )
        self.refine = nn.ModuleList(
            nn.ConvTranspose3d(widths[i + 1], widths[i], 2, stride=2) for i in levels[:-1]
        )
        self.up = nn.ModuleList(stack(i) for i in levels[:-1])
        self.leave = circular_conv(widths[0], c_out, zero=True)
        self.linear = circular_conv(c_in, c_out, zero=True)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = space_to_depth(x, self.patch)
        h, skips = self.enter(x), []
        for i, level in enumerate(self.down):
            for block in level:
                h = block(h, embedding)
            if i < len(self.coarsen):
                skips.append(h)
                h = self.coarsen[i](h)
        for i in reversed(range(len(self.up))):
            h = self.refine[i](h) + skips[i]
            for block in self.up[i]:
                h = block(h, embedding)
        return depth_to_space(self.leave(nn.functional.silu(h)) + self.linear(x), self.patch)
