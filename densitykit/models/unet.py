r"""The deterministic one-step map: a periodic U-Net.

It is plain regression on the next state: the baseline beside which latent diffusion has to earn
its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densitykit.models.base import Domain, FieldEmulator
from densitykit.nn.layers import UNet

__all__ = ["SurrogateUNet"]


class SurrogateUNet(FieldEmulator):
    """Deterministic periodic U-Net, the strongest baseline: regression on the next state.

    The network corrects linear extrapolation, (field + rate, rate). Arguments as in
    :class:`FieldEmulator` and :class:`densitykit.nn.layers.UNet`.
    """

    def __init__(
        self,
        mu: float,
        sigma: float,
        eps: float,
        horizon: float,
        domain: Domain | Mapping[str, Any] | None = None,
        widths: tuple[int, ...] = (48, 96),
        blocks: tuple[int, ...] = (2, 3),
        patch: int = 2,
    ) -> None:
        super().__init__(mu, sigma, eps, horizon, domain)
        self.net = UNet(2, 2, tuple(widths), tuple(blocks), patch)
        self.stride = self.net.stride

    def advance(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        extrapolated = torch.stack([state[:, 0] + state[:, 1], state[:, 1]], dim=1)
        return extrapolated + self.net(state)
