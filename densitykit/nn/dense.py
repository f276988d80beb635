"""Dense layers, and the cosine that takes what they see to zero at a cutoff."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["cosine_taper", "dense"]


def dense(features: int, nodes: Sequence[int]) -> nn.Sequential:
    """Layers with tanh, weights normal with the variance of Glorot and Bengio (2010)."""
    layers: list[nn.Module] = []
    for n in nodes:
        layers += [nn.Linear(features, n), nn.Tanh()]
        nn.init.xavier_normal_(layers[-2].weight)
        features = n
    return nn.Sequential(*layers)


def cosine_taper(R: Tensor, R_cs: float, R_c: float) -> Tensor:
    """1 up to R_cs, 0 from R_c on, a cosine between, once differentiable.

    Eq. 16 of Zepeda-Nunez et al. (2019) without its 1/R.
    """
    u = ((R - R_cs) / (R_c - R_cs)).clamp(0, 1)
    return 0.5 * torch.cos(torch.pi * u) + 0.5
