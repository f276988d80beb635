r"""The verdict: would a referee take a density trajectory for the liquid of a reference run?

Chaos forbids to compare frames, so averages are compared. Each is a function f of a mean over
time origins of samples x, which say how well it is known, too:

.. math:: \hat f = f\Big(\frac{1}{n} \sum_{t_0} x(t_0)\Big), \qquad
   \text{e.g. } x = \rho_q(t_0 + t)\,\rho_q^*(t_0), \quad f(F) = \min\{t: F(t) < F(0)/e\} .

A moving-block bootstrap of the origins (Kunsch 1989) gives 95 % intervals, in blocks of 480 fs.
A run of few blocks, k, looks too certain: they are stretched, in ln f, by
:math:`t_{k-1}/1.96 \cdot [k/(k-1)]^{1/2}`, with Student's quantile. One rule makes runs of L and T
frames comparable: two of the same liquid differ with variance :math:`\propto 1/L + 1/T`, as if
one were exact and the other a mean over

.. math:: n = L\,T / (L + T)

frames. The interval of the reference is for that many: where another run of length L of the same
liquid would lie, wide for a short rollout, the reference's own for a very long one. The
reference is thinned to the time between the frames of the rollout before anything is computed.

A tolerance below this interval cannot be tested. So a quantity passes that is within its
tolerance or within the interval: read its width before you rejoice. The floor of the value-sJSD
is that between halves of the reference; divergences of equal distributions go as 1/n, so it
grows to (1 + T/L)/4 of itself for rollouts shorter than T/3.

Nuclei are found and followed (`densitykit.analysis.tracking`) by a filter that has seen the
training run only. Without them, what depends on them is NaN and failed. Times are in fs, lengths
in angstrom, temperatures in K; one kind of nuclei. Only modes, histograms and tracks are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import t as student

from densitykit.analysis.modes import (
    allowed_waves,
    density_modes,
    nuclear_modes,
    peak_wave_number,
    static_structure,
)
from densitykit.analysis.nuclei import NucleiFilter
from densitykit.analysis.scattering import decay_time
from densitykit.analysis.tracking import TrackedNuclei, implied_temperature, track_nuclei
from densitykit.analysis.transport import diffusion_coefficient
from densitykit.assess import standardised
from densitykit.data.transforms import LogNormal
from densitykit.errors import ShapeError
from densitykit.metrics import jensen_shannon, value_distribution
from densitykit.statistics import block_means
from densitykit.units import CM2_PER_S, PER_CM

__all__ = ["verdict"]

Samples = dict[str, np.ndarray]  # by name, first axis time origins; "lags" (lag,) in fs
Row = tuple[str | float | bool, ...]
COLUMNS = "metric value low high reference reference_low reference_high target passed".split()
NOTHING = (np.nan, np.nan)
LONGEST_FS = 480.0  # lag of time correlations: all have decayed, and the cage is left behind
Q_MAX, PEAK_WIDTH = 6.0, 0.2  # 1/angstrom; half width of the first peak of S(q)
COMPLETE = 0.5  # share of frames with all nuclei, below which tracks mean nothing
_DIMS = ("time", "x", "y", "z")
_OMEGA = np.arange(0.0, 0.12, 5e-4)  # rad/fs


def verdict(
    rollout: xr.Dataset,
    reference: xr.Dataset,
    training: xr.Dataset,
    *,
    burn_in: float = 0.0,
    mass: float = 6.94,
) -> pd.DataFrame:
    """Judge a rollout against an independent reference run.

    Parameters
    ----------
    rollout
        `density` (time, x, y, z) in angstrom**-3, equally spaced `time` in fs, and
        `cell`, as `densitykit.rollout.rollout` returns it; one member of an ensemble.
    reference
        A run of the same system that no model has seen, with frames no sparser.
    training
        Run with nuclei, that of the model: for the filter that finds nuclei, the
        standardisation of ln rho, the first peak of S(q), and what counts as novel.
    burn_in
        Time in fs to leave out at the start of the rollout.
    mass
        Of a nucleus in dalton.

    Returns
    -------
    pd.DataFrame
        One row a quantity. metric and its value, with low and high, the 95 % interval of the
        rollout (NaN where it has none); reference with reference_low and reference_high, where
        another run as long as the rollout would lie (a share of shells is 0.95 by construction);
        target in words; passed, True or False, or NaN where there is no target.

    Raises
    ------
    ShapeError
        If the runs cannot be compared: other cells, grids or spacings, or too short.
    """
    rollout = rollout.isel(time=rollout["time"].values >= rollout["time"].values[0] + burn_in)
    reference = _thinned(rollout, reference)
    known = training["density"][:: 1 + training.sizes["time"] // 200].values
    longest = min(_spacing(run) * run.sizes["time"] / 2 for run in (rollout, reference))
    waves = allowed_waves(training["cell"].values, Q_MAX)
    structure = static_structure(nuclear_modes(training["positions"].load(), waves))
    observe = partial(
        _observe,
        filter=NucleiFilter.fit(training),
        transform=LogNormal.fit(np.maximum(known, 1e-6), eps=0.0),
        count=training.sizes["atom"],
        mass=mass,
        longest=min(longest, LONGEST_FS),
        peak=peak_wave_number(structure.mean("time"), PEAK_WIDTH),
    )
    ours, theirs = observe(rollout), observe(reference)
    novel = [_novelty(run["density"], known) for run in (rollout, reference)]
    last = ("nearest training frame, rel. l2", novel[0], *NOTHING, novel[1], *NOTHING, "", np.nan)
    frames = [len(samples["electrons"]) for samples in (ours, theirs)]
    length = frames[0] * frames[1] / sum(frames)
    rows = [*_static_rows(ours, theirs, length), *_dynamic_rows(ours, theirs, length), last]
    return pd.DataFrame(rows, columns=COLUMNS)


def _spacing(run: xr.Dataset) -> float:
    """Time between frames in fs."""
    steps = np.diff(run["time"].values)
    if len(steps) < 19 or steps[0] <= 0 or not np.allclose(steps, steps[0], rtol=1e-4):
        raise ShapeError("a verdict needs 20 or more equally spaced frames after the burn-in")
    return float(steps.mean())


def _thinned(rollout: xr.Dataset, reference: xr.Dataset) -> xr.Dataset:
    """The reference with frames as far apart as those of the rollout, after a look at both."""
    density = rollout["density"]
    if density.dims != _DIMS:
        raise ShapeError(f"density has dimensions {density.dims}; give one member, in 3-D")
    same = density.shape[1:] == reference["density"].shape[1:]
    if not same or not np.allclose(rollout["cell"], reference["cell"], rtol=1e-5):
        raise ShapeError("rollout and reference have other cells or grids; give the same system")
    ratio = _spacing(rollout) / _spacing(reference)
    if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-3 * ratio:
        raise ShapeError(f"frames are {ratio:g} of the reference's apart; thin out the rollout")
    return reference.isel(time=slice(None, None, round(ratio)))


# --- samples ---------------------------------------------------------------------------------


def _observe(
    run: xr.Dataset,
    filter: NucleiFilter,
    transform: LogNormal,
    count: int,
    mass: float,
    longest: float,
    peak: float,
) -> Samples:
    """All that a verdict needs to know of a run; its density is read once, 64 frames at a time."""
    cell, spacing, density, parts = run["cell"].values, _spacing(run), run["density"], []
    waves = allowed_waves(cell, Q_MAX, density.shape[1:])

    def stream() -> Iterator[np.ndarray]:
        for start in range(0, density.sizes["time"], 64):
            part = density[start : start + 64].values
            modes = density_modes(xr.DataArray(part, dims=_DIMS), waves)
            parts.append((modes, _histograms(part, transform)))
            yield from part

    tracked = track_nuclei(stream(), cell, count, filter, progress=False)
    modes = xr.concat([part[0] for part in parts], "time")
    near = modes.values[:, abs(waves["q"].values - peak) <= PEAK_WIDTH]
    lags = np.arange(int(longest / spacing + 1e-6) + 1)
    samples = {
        "lags": spacing * lags,
        "electrons": modes.isel(mode=0).real.values,
        "histogram": np.concatenate([part[1] for part in parts]),
        "density": static_structure(modes).values,
        "scattering": _lagged(near, lags, lambda a, b: (a * b.conj()).real.mean(axis=1)),
        "complete": tracked.seen.all(axis=1),
    }
    return samples | _nuclear_samples(tracked, waves, spacing, lags, mass)


def _histograms(frames: np.ndarray, transform: LogNormal) -> np.ndarray:
    """How often each standardised ln rho occurs in a frame, (frame, bin); NaN if not finite."""
    good = np.isfinite(frames).all(axis=(1, 2, 3))
    values = standardised(np.where(good[:, None, None, None], frames, 1.0), transform)
    return np.where(good[:, None], [value_distribution(v) for v in values], np.nan)


def _lagged(x: np.ndarray, lags: np.ndarray, product: Callable) -> np.ndarray:
    """product(x(t0 + lag), x(t0)) for the origins t0 that have all lags, (origin, lag)."""
    n = len(x) - lags[-1]
    return np.stack([product(x[lag : lag + n], x[:n]) for lag in lags], axis=1)


def _nuclear_samples(
    tracked: TrackedNuclei, waves: xr.Dataset, spacing: float, lags: np.ndarray, mass: float
) -> Samples:
    """S(q) of whole frames, temperature, squared displacements (1e-4 cm2/s fs), v(t).v(0)."""
    whole = tracked.seen.all(axis=1)
    paths = tracked.positions[:, np.isfinite(tracked.positions).all(axis=(0, 2))]
    if whole.mean() < COMPLETE or paths.shape[1] < 2:
        nothing = np.full((1, len(lags)), np.nan)
        missing = {"temperature": nothing[:, 0], "squares": nothing, "velocities": nothing}
        return missing | {"nuclei": np.full((1, waves["shell"].values.max()), np.nan)}
    modes = nuclear_modes(
        xr.DataArray(tracked.positions[whole], dims=("time", "atom", "cartesian")), waves
    )
    paths = paths - paths.mean(axis=1, keepdims=True)
    speeds = (paths[2:] - paths[:-2]) / (2 * spacing)
    return {
        "nuclei": static_structure(modes).values,
        "temperature": _temperatures(tracked.measured, mass, spacing),
        "squares": 1e4
        * CM2_PER_S
        * _lagged(paths, lags, lambda a, b: ((a - b) ** 2).sum(axis=2).mean(axis=1)),
        "velocities": _lagged(speeds, lags, lambda a, b: (a * b).sum(axis=2).mean(axis=1)),
    }


def _temperatures(measured: np.ndarray, mass: float, spacing: float) -> np.ndarray:
    """Implied temperature of each six frames in a row; it is linear in what it averages over."""
    kelvin = []
    for start in range(len(measured) - 5):
        try:
            near = implied_temperature(measured[start : start + 6], mass, spacing)
        except ShapeError:  # no nucleus was seen often enough just here
            continue
        kelvin.append(near.temperature)
    return np.array(kelvin or [np.nan])


def _novelty(density: xr.DataArray, known: np.ndarray) -> float:
    """Smallest relative l2 distance of some 40 frames to the nearest training frame."""
    some = density[:: 1 + density.sizes["time"] // 40].values
    a, b = (x.reshape(len(x), -1).astype(float) for x in (some, known))
    norm = (b**2).sum(axis=1)
    square = (a**2).sum(axis=1)[:, None] + norm - 2 * a @ b.T
    return float(np.sqrt((square / norm).min().clip(0)))


# --- means and intervals ---------------------------------------------------------------------


def _vibration(mean: xr.DataArray) -> xr.DataArray:
    """Where the vibrational density of states, Hann window, is highest, in 1/cm."""
    lags = mean["lag"].values
    window = np.cos(np.pi * lags / (2 * lags[-1])) ** 2 * np.where(lags > 0, 1.0, 0.5)
    spectrum = (mean.values * window) @ np.cos(np.outer(lags, _OMEGA))
    peak = _OMEGA[spectrum.argmax(axis=1)] * PER_CM
    return mean.isel(lag=0).copy(data=np.where(mean[:, 0] > 0, peak, np.nan))


def _interval(
    samples: np.ndarray, block: int, length: float, statistic: Callable = np.asarray
) -> np.ndarray:
    """f > 0 of the mean of samples (origin, *), and its 95 % interval for `length` frames."""
    value = statistic(samples.mean(axis=0, keepdims=True))[0]
    block = max(1, min(block, len(samples) // 2))
    k = max(2.0, len(samples) / block)
    draws = statistic(block_means(samples, block, round(k), draws=400))
    if np.isnan(draws).mean() > 0.1:
        return np.array([value, value + np.nan, value + np.nan])
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
    low, high = np.minimum(low, value), np.maximum(high, value)
    stretch = student.ppf(0.975, k - 1) / 1.96 * np.sqrt(k / (k - 1) * round(k) * block / length)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 of what does not move at all
        return np.array(
            [value, value * (low / value) ** stretch, value * (high / value) ** stretch]
        )


# --- rows ------------------------------------------------------------------------------------


def _static_rows(ours: Samples, theirs: Samples, length: float) -> Iterator[Row]:
    """Electrons, nuclei found, distribution of ln rho, structure factors."""
    worst, rounding = _electron_errors(ours["electrons"], theirs["electrons"])
    shares = ours["complete"].mean(), theirs["complete"].mean()
    ratio = _floors(ours["histogram"], theirs["histogram"])
    table = [
        ("electron count, largest error", worst, rounding, "<= 1e-6", worst <= 1e-6),
        ("frames with all nuclei", *shares, ">= 0.99", shares[0] >= 0.99),
        ("value-sJSD over its floor", ratio, 1.0, "<= 1.5", ratio <= 1.5),
    ]
    for name in ("density", "nuclei"):
        mean = ours[name].mean(axis=0)
        _, low, high = _interval(theirs[name], len(ours["lags"]) - 1, length)
        share = np.mean((low <= mean) & (mean <= high)) if np.isfinite(mean).all() else np.nan
        table.append((f"S(q) of the {name}, shells inside", share, 0.95, ">= 0.9", share >= 0.9))
    for metric, value, reference, target, passed in table:
        yield metric, float(value), *NOTHING, float(reference), *NOTHING, target, bool(passed)


def _electron_errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Largest relative deviations from the first frame, or from the reference if that is off."""
    right = theirs.mean()
    # a first frame from a store has the rounding of the store, which is no drift
    start = ours[0] if abs(ours[0] - right) <= np.ptp(theirs) else right
    return abs(ours / start - 1).max(), abs(theirs / right - 1).max()


def _floors(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Value-sJSD from histograms (time, bin), in floors of a run of this length."""
    floor = jensen_shannon(*(half.mean(axis=0) for half in np.array_split(theirs, 2)))
    floor *= max(1.0, (1 + len(theirs) / len(ours)) / 4)
    return float(jensen_shannon(ours.mean(axis=0), theirs.mean(axis=0)) / floor)


def _dynamic_rows(ours: Samples, theirs: Samples, length: float) -> Iterator[Row]:
    """Decay of F(q, t), diffusion, temperature, vibrations."""
    lags, block = ours["lags"], len(ours["lags"]) - 1

    def lagged(f: Callable) -> Callable:
        def statistic(mean: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):  # of a density without modes
                value = f(xr.DataArray(mean, {"lag": lags}, ("draw", "lag"))).values
            return np.where(np.isnan(mean).any(axis=1), np.nan, value)

        return statistic

    slope = partial(diffusion_coefficient, start=lags[-1] / 2, stop=lags[-1])
    for metric, name, statistic, tolerance in (
        ("decay of F(q, t), peak of S(q), fs", "scattering", lagged(decay_time), 0.2),
        ("diffusion coefficient, 1e-4 cm2/s", "squares", lagged(slope), 0.0),
        ("temperature, K", "temperature", np.asarray, 0.05),
        ("vibrations, peak, 1/cm", "velocities", lagged(_vibration), None),
    ):
        known = _interval(ours[name], block, len(ours["electrons"]), statistic)
        truth, low, high = _interval(theirs[name], block, length, statistic)
        near = low <= known[0] <= high or abs(known[0] / truth - 1) <= (tolerance or 0.0)
        words = f"within {tolerance:.0%} or the interval" if tolerance else "within the interval"
        judged = ("", np.nan) if tolerance is None else (words, bool(near))
        yield metric, *known.tolist(), float(truth), float(low), float(high), *judged
