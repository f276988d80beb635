r"""Error bars of averages over correlated frames.

Frames of a run are correlated: error bars come from a moving-block bootstrap (Kunsch 1989), which
resamples blocks longer than the decorrelation time. What is no mean over frames, such as a
time correlation or a diffusion coefficient, is computed for each of a few segments of the run
(`over_segments`), and these are resampled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from densitykit.errors import ShapeError

__all__ = [
    "block_bootstrap",
    "block_means",
    "over_segments",
]


def over_segments(
    statistic: Callable[[xr.DataArray], xr.DataArray], frames: xr.DataArray, count: int
) -> xr.DataArray:
    """A statistic of each of a few consecutive pieces of a run, to be resampled.

    ``block_bootstrap(over_segments(f, x, 8).values, block=1)`` is mean, low and high of f.

    Parameters
    ----------
    statistic
        Map of frames (time, *) to any array.
    frames
        (time, *).
    count
        Number of pieces. Each should outlast the decorrelation time many times over; the
        bootstrap over 5 to 10 of them gives intervals that are some 10 to 20 % too narrow.

    Returns
    -------
    xr.DataArray
        (segment, *). Frames beyond count times the length are left out.
    """
    length = frames.sizes["time"] // count
    if count < 2 or length < 2:
        raise ShapeError(
            f"{count} segments of {frames.sizes['time']} frames; give 2 or more of >= 2"
        )
    starts = range(0, count * length, length)
    pieces = [statistic(frames.isel(time=slice(i, i + length))) for i in starts]
    return xr.concat(pieces, "segment", join="override", coords="minimal", compat="override")


def block_bootstrap(
    samples: np.ndarray, block: int, draws: int = 500, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over time and its percentile interval by the moving-block bootstrap.

    Parameters
    ----------
    samples
        Shape (time, *).
    block
        Frames per block, at least the decorrelation time.
    draws
        Bootstrap replicas.
    level
        Coverage of the interval.
    seed
        Of the resampling.

    Returns
    -------
    tuple[np.ndarray, np.ndarray, np.ndarray]
        mean, low and high, each with shape (*,).
    """
    block = max(1, min(block, len(samples) // 2))
    replicas = block_means(samples, block, -(-len(samples) // block), draws, seed)
    low, high = np.quantile(replicas, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return samples.mean(axis=0), low, high


def block_means(
    samples: np.ndarray, block: int, count: int, draws: int, seed: int = 0
) -> np.ndarray:
    """Replicas of the mean over time: means of so many blocks, drawn with replacement.

    Parameters
    ----------
    samples
        Shape (time, *).
    block
        Frames per block, at most those there are.
    count
        Blocks in a replica.
    draws
        Replicas.
    seed
        Of the resampling.

    Returns
    -------
    np.ndarray
        Shape (draws, *).
    """
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(samples) - block + 1, size=(draws, count))
    # sums of all blocks once, so that a replica is a mean over a few rows
    cumulative = np.concatenate([np.zeros_like(samples[:1]), np.cumsum(samples, axis=0)])
    blocks = (cumulative[block:] - cumulative[:-block]) / block
    return blocks[starts].mean(axis=1)
