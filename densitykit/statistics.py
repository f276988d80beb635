r"""Error bars of averages over correlated frames.

Frames of a run are correlated: error bars come from a bootstrap of circular blocks (Politis and
Romano 1992), which resamples blocks longer than the decorrelation time (`decorrelation_time`). The
end of the run is joined to its beginning, so that every frame is drawn as often as the others, and
an interval lies around its value. What is no mean over frames, such as a time correlation or a
diffusion coefficient, is computed for each of a few segments of the run (`over_segments`), and
these are resampled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.fft
import xarray as xr

from densitykit.errors import ShapeError

__all__ = ["block_bootstrap", "block_means", "decorrelation_time", "over_segments"]


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


def decorrelation_time(series: np.ndarray, spacing: float = 1.0) -> float:
    r"""Time after which a stationary series has forgotten itself: long enough for a block.

    The shortest lag M that is five times the integrated autocorrelation time up to itself,
    :math:`\tau(M) = 1/2 + \sum_{k=1}^{M} C(k)/C(0)` (Sokal 1997), but no more than half of the
    series, beyond which it tells nothing.

    Parameters
    ----------
    series
        Shape (time, *); the autocorrelations of all columns are added.
    spacing
        Of the frames, in any unit.

    Returns
    -------
    float
        In the unit of the spacing; one spacing at least, as for white noise or a constant.

    Raises
    ------
    ShapeError
        If there are fewer than four frames, or values that are not finite.
    """
    columns = np.asarray(series, dtype=np.float64).reshape(len(series), -1)
    n = len(columns)
    if n < 4 or not np.isfinite(columns).all():
        raise ShapeError(f"no decorrelation time of {n} frames; give 4 or more finite ones")
    columns = columns - columns.mean(axis=0)
    size = scipy.fft.next_fast_len(2 * n)
    power = (abs(scipy.fft.rfft(columns, size, axis=0)) ** 2).sum(axis=1)
    correlation = scipy.fft.irfft(power, size)[: n // 2 + 1] / (n - np.arange(n // 2 + 1))
    if correlation[0] <= 1e-24 * (np.square(series).mean() + 1e-300):  # constant but for rounding
        return spacing
    tau = np.cumsum(correlation / correlation[0]) - 0.5
    settled = np.flatnonzero(np.arange(len(tau)) >= 5 * tau)
    return spacing * max(1, settled[0] if len(settled) else n // 2)


def block_bootstrap(
    samples: np.ndarray, block: int, draws: int = 500, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over time and its percentile interval by the bootstrap of circular blocks.

    Parameters
    ----------
    samples
        Shape (time, *).
    block
        Frames per block, at least the `decorrelation_time`.
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
    mean = samples.mean(axis=0)
    low, high = np.quantile(replicas, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return mean, np.minimum(low, mean), np.maximum(high, mean)  # both but for rounding


def block_means(
    samples: np.ndarray, block: int, count: int, draws: int, seed: int = 0
) -> np.ndarray:
    """Replicas of the mean over time: means of so many circular blocks, drawn with replacement.

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
    starts = rng.integers(len(samples), size=(draws, count))
    # sums of all blocks once, so that a replica is a mean over a few rows
    ring = np.concatenate([np.zeros_like(samples[:1]), samples, samples[: block - 1]])
    cumulative = np.cumsum(ring, axis=0)
    blocks = (cumulative[block:] - cumulative[:-block]) / block
    return blocks[starts].mean(axis=1)
