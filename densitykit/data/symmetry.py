r"""Symmetry."""

from __future__ import annotations

from itertools import permutations, product

import torch
from torch import Tensor

__all__ = [
    "augment",
]


CUBIC_SYMMETRIES = [
    (p, s) for p in permutations(range(3)) for s in product((False, True), repeat=3)
]


def augment(*fields: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The same random cubic symmetry and periodic shift applied to fields (*, n, n, n)."""
    n = fields[0].shape[-1]
    shifts = torch.randint(n, (3,), generator=generator).tolist()
    axes, flips = CUBIC_SYMMETRIES[int(torch.randint(48, (1,), generator=generator))]
    flipped = [a - 3 for a in range(3) if flips[a]]

    def act(x: Tensor) -> Tensor:
        lead = x.ndim - 3
        x = torch.roll(x, shifts, (-3, -2, -1)).permute(*range(lead), *(lead + a for a in axes))
        return x.flip(flipped).contiguous()

    return [act(x) for x in fields]
