"""Structure factors of plane waves in closed form; error bars of noise with known correlation."""

from __future__ import annotations

import numpy as np
import pytest

from densitykit.correlations import block_bootstrap, structure_factor
from densitykit.errors import ShapeError

EDGE = 6.0
CELL = EDGE * np.eye(3)
UNIT = 2 * np.pi / EDGE
RHO_0 = 0.05


def wave(index: tuple[int, int, int], amplitude: float, n: int = 12) -> np.ndarray:
    """rho_0 + a cos(2 pi index . s), one frame."""
    axes = np.meshgrid(*[np.arange(n) / n] * 3, indexing="ij")
    phase = 2 * np.pi * sum(i * axis for i, axis in zip(index, axes, strict=True))
    return (RHO_0 + amplitude * np.cos(phase))[None]


# --- structure factor ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "multiplicity"), [((1, 0, 0), 6), ((1, 1, 0), 12), ((1, -1, 1), 8), ((2, 1, 0), 24)]
)
def test_a_plane_wave_is_alone_on_its_shell(index, multiplicity):
    """|rho_q| = a V/2 at +-q: S = 2 (a V/2)^2 / (m rho_0 V) = a^2 V / (2 m rho_0)."""
    a = 0.01
    q, m, s = structure_factor(wave(index, a), CELL)
    k = np.argmin(np.abs(q - UNIT * np.linalg.norm(index)))
    assert q[k] == pytest.approx(UNIT * np.linalg.norm(index), abs=1e-6)
    assert m[k] == multiplicity
    assert s[0, k] == pytest.approx(a**2 * EDGE**3 / (2 * multiplicity * RHO_0), rel=1e-9)
    assert np.abs(np.delete(s[0], k)).max() < 1e-20


def test_shells_of_a_cubic_cell():
    q, m, _ = structure_factor(wave((1, 0, 0), 0.01), CELL, q_max=3.01 * UNIT)
    np.testing.assert_allclose(q, UNIT * np.sqrt([1, 2, 3, 4, 5, 6, 8, 9]), atol=1e-6)
    np.testing.assert_array_equal(m, [6, 12, 8, 6, 24, 24, 12, 30])
    assert (np.diff(q) > 0).all()


def test_sum_over_all_shells_is_the_variance():
    """Parseval: sum_q |rho_q|^2 = V^2 var(rho), if nothing lies at or beyond Nyquist."""
    rng = np.random.default_rng(0)
    n, keep = 8, 3
    density = np.empty((4, n, n, n))
    for frame in density:
        spectrum = np.fft.fftn(rng.normal(size=(n, n, n)))
        index = np.abs(np.fft.fftfreq(n, 1 / n)) <= keep
        spectrum *= index[:, None, None] & index[:, None] & index
        frame[:] = 1 + 0.1 * np.fft.ifftn(spectrum).real
    _, m, s = structure_factor(density, CELL, q_max=100.0)
    assert m.sum() == (2 * keep + 1) ** 3 - 1
    electrons, variance = density.mean((1, 2, 3)) * EDGE**3, density.var((1, 2, 3))
    np.testing.assert_allclose((s * m).sum(1), EDGE**6 * variance / electrons, rtol=1e-10)


def test_nyquist_waves_are_left_out():
    _, m, s = structure_factor(wave((4, 0, 0), 0.01, n=8), CELL, q_max=100.0)
    assert np.abs(s).max() < 1e-20 and m.sum() == 7**3 - 1


def test_shifts_change_nothing():
    density = np.random.default_rng(0).uniform(0.5, 1, (3, 6, 6, 6))
    s = structure_factor(density, CELL)[2]
    moved = structure_factor(np.roll(density, (1, 3, 2), (1, 2, 3)), CELL)[2]
    np.testing.assert_allclose(moved, s, rtol=1e-9)


def test_s_scales_like_the_square_over_the_number():
    density = np.random.default_rng(0).uniform(0.5, 1, (2, 6, 6, 6))
    s = structure_factor(density, CELL)[2]
    np.testing.assert_allclose(structure_factor(3 * density, CELL)[2], 3 * s, rtol=1e-12)


def test_a_cell_that_is_not_cubic():
    """A monoclinic cell: the shell is the |q| of the reciprocal vector, all others are apart."""
    cell = np.array([[5.0, 0.0, 0.0], [1.3, 6.0, 0.0], [0.4, 0.7, 7.0]])
    a, index = 0.01, (1, -1, 2)
    q, m, s = structure_factor(wave(index, a), cell)
    length = np.linalg.norm(2 * np.pi * np.linalg.inv(cell) @ index)
    k = np.argmin(np.abs(q - length))
    assert q[k] == pytest.approx(length, abs=1e-6) and m[k] == 2
    volume = np.linalg.det(cell)
    assert s[0, k] == pytest.approx(a**2 * volume / (4 * RHO_0), rel=1e-9)
    assert np.abs(np.delete(s[0], k)).max() < 1e-20


def test_no_wave_vector_says_raise_q_max():
    with pytest.raises(ShapeError, match="raise q_max"):
        structure_factor(wave((1, 0, 0), 0.01), CELL, q_max=0.5 * UNIT)


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
