r"""How far a density is from another: errors, divergences, electron count.

Relative errors (Zepeda-Nunez et al. 2019, eqs. 21 and 22), over all grid points:

.. math:: \mathrm{err}_{l^1} = \frac{\sum_i |\rho_i - \hat\rho_i|}{\sum_i |\rho_i|}, \qquad
   \mathrm{err}_{l^2} = \left(\frac{\sum_i (\rho_i - \hat\rho_i)^2}{\sum_i \rho_i^2}\right)^{1/2} .

Scaled Jensen-Shannon divergence (Chiang et al. 2025), with :math:`M = (P + Q)/2`:

.. math:: \mathrm{sJSD}(P, Q) = \frac{1}{2Z} [D_{KL}(P \| M) + D_{KL}(Q \| M)] .

:math:`Z = \ln 2` bounds it to [0, 1]. The source does not say what P and Q are; both readings
are offered. *Spatial*: :math:`P = \rho / \sum\rho` over the voxels of a frame; it sees where the
density is. *Value*: the histogram of the values of a standardised logarithm; it sees only how
often a value occurs, so shuffled voxels score perfectly. The histogram shares each value linearly
between the two nearest bin centres, which makes it differentiable, and is the
same in numpy and in torch. A value-sJSD says something only beside its noise
level, the divergence between two halves of the reference (`reference_noise_level`).
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch

from densitykit.errors import ShapeError

__all__ = ["jensen_shannon", "reference_noise_level", "relative_l1", "relative_l2"]
__all__ += ["spatial_sjsd", "value_distribution", "value_sjsd"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)
LN2 = math.log(2.0)
SPACE = (-3, -2, -1)


def relative_l1(prediction: Array, reference: Array, ndim: int = 3) -> Array:
    """Relative l1 error over the trailing ``ndim`` axes (eq. 21); leading axes are kept."""
    dims = tuple(range(-ndim, 0))
    return abs(prediction - reference).sum(dims) / abs(reference).sum(dims)


def relative_l2(prediction: Array, reference: Array, ndim: int = 3) -> Array:
    """Relative l2 error over the trailing ``ndim`` axes (eq. 22); leading axes are kept."""
    dims = tuple(range(-ndim, 0))
    return (((prediction - reference) ** 2).sum(dims) / (reference**2).sum(dims)) ** 0.5


def jensen_shannon(p: Array, q: Array, z: float = LN2) -> Array:
    """Scaled Jensen-Shannon divergence over the last axis of two distributions.

    Parameters
    ----------
    p, q
        Non-negative, summing to one over the last axis, shape (*, n).
    z
        The scale Z; ln 2 bounds the result to [0, 1].

    Returns
    -------
    Array
        sJSD with shape (*,). Zero if p = q, ln 2 / Z if their supports are disjoint.
    """
    m = (p + q) / 2
    return (_xlogy(p, m) + _xlogy(q, m)).sum(-1) / (2 * z)


def _xlogy(p: Array, m: Array) -> Array:
    """p ln(p/m) with 0 ln 0 = 0; the clip keeps the gradient finite at p = 0."""
    tiny = 1e-30
    log = torch.log if isinstance(p, torch.Tensor) else np.log
    return p * (log(p.clip(tiny)) - log(m.clip(tiny)))


def spatial_sjsd(density: Array, reference: Array, z: float = LN2, ndim: int = 3) -> Array:
    """sJSD of where the electrons are: P = rho / sum rho over the trailing ``ndim`` axes."""
    p, q = (a.reshape(*a.shape[: a.ndim - ndim], -1) for a in (density, reference))
    return jensen_shannon(p / p.sum(-1)[..., None], q / q.sum(-1)[..., None], z)


def value_distribution(
    values: Array, low: float = -6.0, high: float = 4.0, bins: int = 100
) -> Array:
    """Histogram of all values with linear sharing between bin centres, shape (bins,), sum one.

    Parameters
    ----------
    values
        Standardised logarithm of a density, any shape.
    low, high
        Centres of the first and of the last bin; values beyond go to these bins.
    bins
        Number of bins.
    """
    flat = ((values.reshape(-1) - low) * ((bins - 1) / (high - low))).clip(0, bins - 1)
    if isinstance(values, torch.Tensor):
        left = flat.detach().floor().clamp(max=bins - 2).long()
        weight = flat - left
        counts = flat.new_zeros(bins).index_add(0, left, 1 - weight)
        return counts.index_add(0, left + 1, weight) / flat.numel()
    left = np.minimum(flat.astype(np.int64), bins - 2)
    weight = flat - left
    counts = np.bincount(left, 1 - weight, bins) + np.bincount(left + 1, weight, bins)
    return counts / flat.size


def value_sjsd(
    values: Array,
    reference: Array,
    z: float = LN2,
    low: float = -6.0,
    high: float = 4.0,
    bins: int = 100,
) -> Array:
    """sJSD of how often a value occurs; arguments as in :func:`value_distribution`."""
    p, q = (value_distribution(a, low, high, bins) for a in (values, reference))
    return jensen_shannon(p, q, z)


def reference_noise_level(values: Array, z: float = LN2, **bins: float) -> Array:
    """Value-sJSD between the two halves of a run (first axis is time): what no model can beat."""
    half = len(values) // 2
    return value_sjsd(values[:half], values[half:], z, **bins)


def crps(members: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Fair continuous ranked probability score at each point.

    Parameters
    ----------
    members
        Shape (M, *), M at least 2.
    truth
        Shape (*,).

    Raises
    ------
    ShapeError
        If there are fewer than two members, or shapes do not fit.
    """
    if len(members) < 2 or members.shape[1:] != truth.shape:
        raise ShapeError(
            f"members {members.shape} and truth {truth.shape} do not fit; give (M, *), (*), M > 1"
        )
    m = len(members)
    # sum of |x_m - x_n|: the k-th smallest is the larger of k pairs, the smaller of m - 1 - k
    rank = (2 * np.arange(m) - m + 1).reshape(-1, *[1] * truth.ndim)
    pairs = 2 * (rank * np.sort(members, axis=0)).sum(axis=0)
    return abs(members - truth).mean(axis=0) - pairs / (2 * m * (m - 1))
