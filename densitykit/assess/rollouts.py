r"""A rollout judged: would a referee take it for the material of a reference run?

Chaos forbids to compare frames, so averages are compared. Each is a function f of a mean over
time origins of samples x, which say how well it is known, too:

.. math:: \hat f = f\Big(\frac{1}{n} \sum_{t_0} x(t_0)\Big), \qquad
   \text{e.g. } x = \rho_q(t_0 + t)\,\rho_q^*(t_0), \quad f(F) = \min\{t: F(t) < F(0)/e\} .

A block bootstrap of the origins (Kunsch 1989) gives 95 % intervals, in blocks of the longest lag.
A run of few blocks, k, looks too certain: they are stretched, in ln f, by
:math:`t_{k-1}/1.96 \cdot [k/(k-1)]^{1/2}`, with Student's quantile. One rule makes runs of L and T
frames comparable: two of the same material differ with variance :math:`\propto 1/L + 1/T`, as if
one were exact and the other a mean over

.. math:: n = L\,T / (L + T)

frames. The interval of the reference is for that many: where another run of length L of the same
material would lie, wide for a short rollout, the reference's own for a very long one. The
reference is thinned to the time between the frames of the rollout before anything is computed.

A tolerance below this interval cannot be tested. So a quantity passes that is within its
tolerance or within the interval: read its width before you rejoice. Where a run is shorter than
four times what its density takes to forget itself, dynamics cannot be judged at all, and the row
says so. The noise level of the value-sJSD is that between halves of the reference; divergences of
equal distributions go as 1/n, so it grows to (1 + T/L)/4 of itself for rollouts shorter than T/3.

Nuclei are those that both runs store. Where the rollout has none and there is one species,
they are found in its density and followed, by a filter that has seen the training run only.
Without them, what depends on them is NaN and failed; where the reference has none either, it is
left out. Masses follow from the atomic numbers of the reference. Times are in fs, lengths in
angstrom, temperatures in K. Only modes, histograms and paths are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

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
from densitykit.analysis.transport import diffusion_coefficient, unwrap
from densitykit.data.transforms import LogNormal
from densitykit.errors import ShapeError
from densitykit.metrics import jensen_shannon, value_distribution
from densitykit.statistics import block_means
from densitykit.units import CM2_PER_S, PER_CM, SYMBOLS, atomic_masses

__all__ = ["assess_rollout", "standardised", "value_histograms", "value_sjsd_levels"]

_STATIC = ("lags", "span", "electrons", "histogram", "complete")
Samples = dict[str, np.ndarray]  # by name, first axis time origins; "lags" (lag,) in fs
Row = tuple[str | float | bool, ...]
COLUMNS = "metric value low high reference reference_low reference_high target passed".split()
NOTHING = (np.nan, np.nan)
LONGEST_FS = 480.0  # lag of time correlations: all have decayed, and the cage is left behind
Q_MAX, PEAK_WIDTH = 6.0, 0.2  # 1/angstrom; half width of the first peak of S(q)
COMPLETE = 0.5  # share of frames with all nuclei, below which tracks mean nothing
_DIMS = ("time", "x", "y", "z")
_OMEGA = np.arange(0.0, 0.12, 5e-4)  # rad/fs


class Nuclei(NamedTuple):
    """Paths of nuclei and their atomic numbers."""

    tracked: TrackedNuclei
    numbers: np.ndarray


def assess_rollout(
    rollout: xr.Dataset,
    reference: xr.Dataset,
    training: xr.Dataset,
    *,
    burn_in: float = 0.0,
    longest_lag: float = LONGEST_FS,
) -> pd.DataFrame:
    """Judge a rollout against an independent reference run.

    Parameters
    ----------
    rollout
        `density` (time, x, y, z) in angstrom**-3, equally spaced `time` in fs, and `cell`, as
        `densitykit.rollout.rollout` returns it; one member of an ensemble.
    reference
        A run of the same system that no model has seen, with frames no sparser.
    training
        The run of the model: for the standardisation of ln rho, the first peak of S(q), what
        counts as novel, and the filter that finds nuclei where it is needed.
    burn_in
        Time in fs to leave out at the start of the rollout.
    longest_lag
        Of time correlations, fs; at most half of the shorter run.

    Returns
    -------
    pd.DataFrame
        One row a quantity. metric and its value, with low and high, the 95 % interval of the
        rollout (NaN where it has none); reference with reference_low and reference_high, where
        another run as long as the rollout would lie (a share of shells is 0.95 by construction);
        target in words; passed, True or False, or NaN where there is no target or a run is too
        short to judge.

    Raises
    ------
    ShapeError
        The runs cannot be compared: other cells, grids or spacings, or too short.
    """
    rollout = rollout.isel(time=rollout["time"].values >= rollout["time"].values[0] + burn_in)
    reference = _thinned(rollout, reference)
    known = _some(training["density"], 200)
    longest = min(_spacing(run) * run.sizes["time"] / 2 for run in (rollout, reference))
    transform = LogNormal.fit(np.maximum(known, 1e-6), eps=0.0)
    lags, peak = min(longest, longest_lag), _peak(training)
    tracked = _paths(rollout, reference, training)
    ours, theirs = (
        _observe(run, transform, lags, peak) | _nuclear_samples(run, nuclei, lags)
        for run, nuclei in zip((rollout, reference), tracked, strict=True)
    )
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
        raise ShapeError(
            f"{run.encoding.get('source', 'run')}: {len(steps) + 1} frames are too short to "
            "judge; give 20 or more equally spaced frames after the burn-in"
        )
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


def _some(density: xr.DataArray, count: int) -> np.ndarray:
    """Evenly spaced frames, at most so many, and at most 256 MB of them."""
    count = max(2, min(count, int(2**26 // np.prod(density.shape[1:]))))
    return density[:: 1 + density.sizes["time"] // count].values


# --- samples ---------------------------------------------------------------------------------


def _has_nuclei(run: xr.Dataset) -> bool:
    """Whether positions are known: a store with atoms may have none."""
    return "positions" in run and bool(np.isfinite(run["positions"].values).all())


def _peak(training: xr.Dataset) -> float:
    """Wave number of the first peak of S(q): of the nuclei, or of the density without them."""
    waves = allowed_waves(training["cell"].values, Q_MAX)
    if _has_nuclei(training):
        modes = nuclear_modes(training["positions"].load(), waves)
    else:
        some = xr.DataArray(_some(training["density"], 200), dims=_DIMS)
        waves = allowed_waves(training["cell"].values, Q_MAX, some.shape[1:])
        modes = density_modes(some, waves)
    return peak_wave_number(static_structure(modes).mean("time"), PEAK_WIDTH)


def _paths(
    rollout: xr.Dataset, reference: xr.Dataset, training: xr.Dataset
) -> list[Nuclei | None]:
    """Nuclei of both runs by the same way: as stored, found in the density, or none."""
    runs = rollout, reference
    if all(map(_has_nuclei, runs)):
        paths = [unwrap(run["positions"].load(), run["cell"].values).values for run in runs]
        found = [TrackedNuclei(x, np.ones(x.shape[:2], dtype=bool)) for x in paths]
    elif _has_nuclei(training) and len(np.unique(training["numbers"].values)) == 1:
        filter, count = NucleiFilter.fit(training), training.sizes["atom"]
        found = [
            track_nuclei(_stream(x["density"]), x["cell"].values, count, filter, progress=False)
            for x in runs
        ]
    else:
        return [None, None]
    numbers = (reference if "numbers" in reference else training)["numbers"].values
    return [Nuclei(x, np.asarray(numbers)) for x in found]


def _stream(density: xr.DataArray) -> Iterator[np.ndarray]:
    """Frames, read some at a time."""
    for part in _parts(density):
        yield from part


def _parts(density: xr.DataArray) -> Iterator[np.ndarray]:
    """Pieces of a run of at most 64 MB."""
    frames = max(1, min(64, int(2**24 // np.prod(density.shape[1:]))))
    for start in range(0, density.sizes["time"], frames):
        yield density[start : start + frames].values


def _observe(run: xr.Dataset, transform: LogNormal, longest: float, peak: float) -> Samples:
    """What the density of a run tells; it is read a piece at a time."""
    waves, parts = allowed_waves(run["cell"].values, Q_MAX, run["density"].shape[1:]), []
    for part in _parts(run["density"]):
        modes = density_modes(xr.DataArray(part, dims=_DIMS), waves)
        parts.append((modes, value_histograms(part, transform)))
    modes = xr.concat([part[0] for part in parts], "time")
    near = modes.values[:, abs(waves["q"].values - peak) <= PEAK_WIDTH]
    spacing = _spacing(run)
    lags = np.arange(int(longest / spacing + 1e-6) + 1)
    return {
        "lags": spacing * lags,
        "span": np.array(spacing * run.sizes["time"]),
        "electrons": modes.isel(mode=0).real.values,
        "histogram": np.concatenate([part[1] for part in parts]),
        "S(q) of the density": static_structure(modes).values,
        "scattering": _lagged(near, lags, lambda a, b: (a * b.conj()).real.mean(axis=1)),
    }


def value_histograms(frames: np.ndarray, transform: LogNormal) -> np.ndarray:
    """How often each standardised ln rho occurs in frames (time, X, Y, Z), (time, bin).

    NaN for a frame that is not finite.
    """
    good = np.isfinite(frames).all(axis=(1, 2, 3))
    values = standardised(np.where(good[:, None, None, None], frames, 1.0), transform)
    return np.where(good[:, None], [value_distribution(v) for v in values], np.nan)


def standardised(density: np.ndarray, transform: LogNormal) -> np.ndarray:
    """Standardised logarithm of a density in angstrom**-3, in double precision, same shape."""
    # a map without a positivity constraint may fall below zero: those voxels go to the lowest bin
    return transform.forward(np.maximum(density, 1e-6, dtype=np.float64))


def _lagged(x: np.ndarray, lags: np.ndarray, product: Callable) -> np.ndarray:
    """product(x(t0 + lag), x(t0)) for the origins t0 that have all lags, (origin, lag)."""
    n = len(x) - lags[-1]
    return np.stack([product(x[lag : lag + n], x[:n]) for lag in lags], axis=1)


def _nuclear_samples(run: xr.Dataset, nuclei: Nuclei | None, longest: float) -> Samples:
    """S(q), temperature, squared displacements (1e-4 cm2/s fs), v(t).v(0), by species."""
    if nuclei is None:
        return {}
    spacing, tracked = _spacing(run), nuclei.tracked
    lags = np.arange(int(longest / spacing + 1e-6) + 1)
    whole, masses = tracked.seen.all(axis=1), atomic_masses(nuclei.numbers)
    samples = {"complete": whole, "temperature": np.array([np.nan])}
    if whole.mean() >= COMPLETE:
        samples["temperature"] = _temperatures(tracked.measured, masses, spacing)
    # relative to the centre of mass of those that are known
    weights = masses[:, None] * np.isfinite(tracked.positions)
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    paths = tracked.positions
    paths = paths - np.nansum(weights * paths, axis=1, keepdims=True) / total
    species = np.unique(nuclei.numbers)
    for number in species:
        of = f" {SYMBOLS[number]}" if len(species) > 1 else ""
        chosen = nuclei.numbers == number
        moved = paths[:, chosen] if whole.mean() >= COMPLETE else paths[:, :0]
        waves = allowed_waves(run["cell"].values, Q_MAX)
        samples[f"S(q) of the{of} nuclei"] = _structure(tracked.positions[:, chosen], whole, waves)
        samples |= _motion(moved, lags, spacing, of)
    return samples


def _structure(positions: np.ndarray, whole: np.ndarray, waves: xr.Dataset) -> np.ndarray:
    """S(q) of the frames with all nuclei, (frame, shell)."""
    if whole.mean() < COMPLETE:
        return np.full((1, waves["shell"].values.max()), np.nan)
    frames = xr.DataArray(positions[whole], dims=("time", "atom", "cartesian"))
    return static_structure(nuclear_modes(frames, waves)).values


def _motion(paths: np.ndarray, lags: np.ndarray, spacing: float, of: str) -> Samples:
    """Squared displacements and products of velocities of the nuclei seen throughout."""
    known = paths[:, np.isfinite(paths).all(axis=(0, 2))]
    if not known.shape[1]:
        nothing = np.full((1, len(lags)), np.nan)
        return {f"squares{of}": nothing, f"velocities{of}": nothing}
    speeds = (known[2:] - known[:-2]) / (2 * spacing)
    squares = _lagged(known, lags, lambda a, b: ((a - b) ** 2).sum(axis=2).mean(axis=1))
    products = _lagged(speeds, lags, lambda a, b: (a * b).sum(axis=2).mean(axis=1))
    return {f"squares{of}": 1e4 * CM2_PER_S * squares, f"velocities{of}": products}


def _temperatures(measured: np.ndarray, masses: np.ndarray, spacing: float) -> np.ndarray:
    """Temperature of each six frames in a row; it is linear in what it averages over."""
    kelvin = []
    for start in range(len(measured) - 5):
        try:
            near = implied_temperature(measured[start : start + 6], masses, spacing)
        except ShapeError:  # no nucleus was seen often enough just here
            continue
        kelvin.append(near.temperature)
    return np.array(kelvin or [np.nan])


def _novelty(density: xr.DataArray, known: np.ndarray) -> float:
    """Smallest relative l2 distance of some 40 frames to the nearest training frame."""
    some = _some(density, 40)
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
    """f of the mean of samples (origin, *), and its 95 % interval for `length` frames.

    Stretched in ln f where f is positive throughout, else in f.
    """
    value = statistic(samples.mean(axis=0, keepdims=True))[0]
    block = max(1, min(block, len(samples) // 2))
    k = max(2.0, len(samples) / block)
    draws = statistic(block_means(samples, block, round(k), draws=400))
    if np.isnan(draws).mean() > 0.1:
        return np.array([value, value + np.nan, value + np.nan])
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
    low, high = np.minimum(low, value), np.maximum(high, value)
    stretch = student.ppf(0.975, k - 1) / 1.96 * np.sqrt(k / (k - 1) * round(k) * block / length)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = [value * (bound / value) ** stretch for bound in (low, high)]
    shifted = [value + stretch * (bound - value) for bound in (low, high)]
    return np.array([value, *np.where(low > 0, scaled, shifted)])


# --- rows ------------------------------------------------------------------------------------


def _static_rows(ours: Samples, theirs: Samples, length: float) -> Iterator[Row]:
    """Electrons, nuclei found, distribution of ln rho, structure factors."""
    worst, rounding = _electron_errors(ours["electrons"], theirs["electrons"])
    ratio = value_sjsd_levels(ours["histogram"], theirs["histogram"])
    table = [("electron count, largest error", worst, rounding, "<= 1e-6", worst <= 1e-6)]
    if "complete" in ours:
        shares = ours["complete"].mean(), theirs["complete"].mean()
        table.append(("frames with all nuclei", *shares, ">= 0.99", shares[0] >= 0.99))
    table.append(("value-sJSD over its noise level", ratio, 1.0, "<= 1.5", ratio <= 1.5))
    for name in (name for name in ours if name.startswith("S(q)")):
        mean = ours[name].mean(axis=0)
        _, low, high = _interval(theirs[name], len(ours["lags"]) - 1, length)
        share = np.mean((low <= mean) & (mean <= high)) if np.isfinite(mean).all() else np.nan
        table.append((f"{name}, shells inside", share, 0.95, ">= 0.9", share >= 0.9))
    for metric, value, reference, target, passed in table:
        yield metric, float(value), *NOTHING, float(reference), *NOTHING, target, bool(passed)


def _electron_errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Largest relative deviations from the first frame, or from the reference if that is off."""
    right = theirs.mean()
    # a first frame from a store has the rounding of the store, which is no drift
    start = ours[0] if abs(ours[0] - right) <= np.ptp(theirs) else right
    return abs(ours / start - 1).max(), abs(theirs / right - 1).max()


def value_sjsd_levels(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Value-sJSD from histograms (time, bin), in noise levels of a run of the length of ours."""
    level = jensen_shannon(*(half.mean(axis=0) for half in np.array_split(theirs, 2)))
    level = max(level * max(1.0, (1 + len(theirs) / len(ours)) / 4), 1e-12)  # rounding
    return float(jensen_shannon(ours.mean(axis=0), theirs.mean(axis=0)) / level)


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
    short = _too_short(ours, theirs, lagged(decay_time))
    for name in [n for n in ours if n not in _STATIC and not n.startswith("S(q)")]:
        key, _, of = name.partition(" ")
        of = f" of {of}" if of else ""
        metric, statistic, tolerance = {
            "scattering": ("decay of F(q, t), peak of S(q), fs", lagged(decay_time), 0.2),
            "squares": (f"diffusion coefficient{of}, 1e-4 cm2/s", lagged(slope), 0.0),
            "temperature": ("temperature, K", np.asarray, 0.05),
            "velocities": (f"vibrations{of}, peak, 1/cm", lagged(_vibration), None),
        }[key]
        known = _interval(ours[name], block, len(ours["electrons"]), statistic)
        truth, low, high = _interval(theirs[name], block, length, statistic)
        near = low <= known[0] <= high or abs(known[0] - truth) <= (tolerance or 0) * abs(truth)
        words = f"within {tolerance:.0%} or the interval" if tolerance else "within the interval"
        judged = ("", np.nan) if tolerance is None else (words, bool(near))
        if tolerance is not None and short:
            judged = (short, np.nan)
        yield metric, *known.tolist(), float(truth), float(low), float(high), *judged


def _too_short(ours: Samples, theirs: Samples, decay: Callable) -> str:
    """Which run is too short to judge dynamics, in words; empty where both are long enough."""
    needed = 4 * decay(theirs["scattering"].mean(axis=0, keepdims=True))[0]
    spans = {"rollout": float(ours["span"]), "reference": float(theirs["span"])}
    # a correlation that does not decay within its lags needs more than these
    needed = needed if np.isfinite(needed) else 4 * ours["lags"][-1]
    short = [f"{name} of {span:.0f} fs" for name, span in spans.items() if span < needed]
    return f"too short to judge: {' and '.join(short)}, {needed:.0f} needed" if short else ""
