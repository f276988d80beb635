"""Error bars of correlated frames against closed forms: white noise, autoregression, drift."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from densitykit.errors import ShapeError
from densitykit.statistics import (
    block_bootstrap,
    block_means,
    decorrelation_time,
    over_segments,
)

# --- segments --------------------------------------------------------------------------------


def test_segments_of_a_run():
    x = xr.DataArray(np.arange(23.0), {"time": np.arange(23.0)}, ("time",))
    means = over_segments(lambda part: part.mean("time"), x, 4)
    np.testing.assert_array_equal(means, [2, 7, 12, 17])  # the last three frames are left out
    assert means.dims == ("segment",)
    with pytest.raises(ShapeError, match="segments"):
        over_segments(lambda part: part, x, 12)


def test_interval_over_segments_covers_the_variance():
    """AR(1): of 60 intervals (95 %) over 10 segments nearly all hold the variance."""
    runs = np.stack([autoregressive(2000, 0.8, seed) for seed in range(60)])
    hits = 0
    for run in runs:
        parts = over_segments(lambda x: (x**2).mean("time"), xr.DataArray(run, dims="time"), 10)
        _, low, high = block_bootstrap(parts.values, 1)
        hits += low <= 1 / (1 - 0.8**2) <= high
    assert 0.75 * 60 < hits < 60


# --- block bootstrap -------------------------------------------------------------------------


def width(samples: np.ndarray, block: int, **options: float) -> np.ndarray:
    _, low, high = block_bootstrap(samples, block, **options)
    return high - low


def autoregressive(n: int, phi: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=n)
    x = np.empty(n)
    x[0] = noise[0] / np.sqrt(1 - phi**2)
    for i in range(1, n):
        x[i] = phi * x[i - 1] + noise[i]
    return x


@pytest.mark.parametrize("block", [1, 8])
def test_interval_of_white_noise(block):
    """95 %: 2 x 1.96 sd/sqrt(n)."""
    x = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    mean, low, high = block_bootstrap(x, block, draws=2000)
    assert mean == pytest.approx(x.mean()) and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * x.std() / np.sqrt(len(x)), rel=0.12)


def test_level_is_the_coverage():
    x = np.random.default_rng(0).normal(size=2000)
    ratio = width(x, 1, level=0.5, draws=4000) / width(x, 1, draws=4000)
    assert ratio == pytest.approx(0.6745 / 1.96, rel=0.1)


def test_long_blocks_see_correlation():
    """AR(1): the error of the mean is sqrt((1 + phi)/(1 - phi)) times that of white noise."""
    phi = 0.8
    x = autoregressive(20000, phi)
    ratio = width(x, 200, draws=2000) / width(x, 1, draws=2000)
    assert ratio == pytest.approx(np.sqrt((1 + phi) / (1 - phi)), rel=0.2)


def test_bootstrap_acts_on_each_column_and_repeats():
    x = np.random.default_rng(0).normal(size=(200, 2, 3))
    first = block_bootstrap(x, 10, seed=1)
    for a, b in zip(first, block_bootstrap(x, 10, seed=1), strict=True):
        assert a.shape == (2, 3)
        np.testing.assert_array_equal(a, b)
    assert (first[1] != block_bootstrap(x, 10, seed=2)[1]).all()
    column = block_bootstrap(x[:, 1, 2], 10, seed=1)
    np.testing.assert_allclose([a[1, 2] for a in first], column, rtol=1e-12)


def test_constant_samples_have_no_error():
    mean, low, high = block_bootstrap(np.full(50, 0.25), 7)
    assert mean == low == high == 0.25


@pytest.mark.parametrize("block", [20, 1000])
def test_a_block_as_long_as_the_run_claims_no_certainty(block):
    """With one block there is nothing to resample; the interval must not collapse."""
    samples = np.random.default_rng(0).normal(size=20)
    mean, low, high = block_bootstrap(samples, block)
    assert not (low == mean == high)


# --- circular blocks -------------------------------------------------------------------------


def test_blocks_go_round():
    """All blocks of four, weighed alike: the mean of their means is that of the series."""
    x = np.arange(10.0) ** 2
    means = np.unique(block_means(x, 4, 1, draws=500).round(9))
    rings = [np.roll(x, -k)[:4].mean() for k in range(10)]
    np.testing.assert_allclose(means, np.unique(np.round(rings, 9)))
    assert np.mean(rings) == pytest.approx(x.mean())


@pytest.mark.parametrize("block", [5, 20, 45])
def test_an_interval_holds_its_value_where_the_ends_are_high(block):
    """Plain blocks hardly ever draw the ends: all their means lie below that of the run."""
    t = np.linspace(-1, 1, 90)
    x = 1.6 + 0.1 * t**10 + 0.002 * np.random.default_rng(0).normal(size=90)
    plain = np.lib.stride_tricks.sliding_window_view(x, block).mean(axis=1).mean()
    mean, low, high = block_bootstrap(x, block)
    assert low < mean < high
    assert mean - plain > 0.1 * (high - low)


# --- decorrelation ---------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.5, 0.9])
def test_decorrelation_of_an_autoregression(phi):
    """Its integrated time is (1 + phi)/(1 - phi)/2: blocks are five of these."""
    series = np.stack([autoregressive(20000, phi, seed) for seed in range(8)], axis=1)
    expected = 2.5 * (1 + phi) / (1 - phi)
    assert decorrelation_time(series) == pytest.approx(expected, rel=0.15)
    assert decorrelation_time(series, 6.0) == pytest.approx(6 * expected, rel=0.15)
    one = decorrelation_time(series[:, 0])
    assert one == pytest.approx(expected, rel=0.3)


def test_blocks_of_that_length_give_the_error_of_the_mean():
    """Within 15 % of sqrt((1 + phi)/(1 - phi)) times that of white noise."""
    phi, ratios = 0.8, []
    for seed in range(5):
        x = autoregressive(10000, phi, seed)
        block = round(decorrelation_time(x))
        ratios.append(width(x, block, draws=1000) / width(x, 1, draws=1000))
    assert np.mean(ratios) == pytest.approx(np.sqrt((1 + phi) / (1 - phi)), rel=0.15)


def test_decorrelation_has_limits():
    noise = np.random.default_rng(0).normal(size=5000)
    assert 1 <= decorrelation_time(noise) <= 4
    assert decorrelation_time(1e9 + np.zeros(50), 2.0) == 2.0
    assert decorrelation_time(np.full(50, 0.1)) == 1.0
    assert decorrelation_time(np.arange(100.0)) <= 50  # a drift never settles
    for bad in (np.ones(3), np.full(20, np.nan)):
        with pytest.raises(ShapeError, match="4 or more finite"):
            decorrelation_time(bad)
