"""Grid operations against trigonometric polynomials, whose values are known at every point."""

from __future__ import annotations

import numpy as np
import pytest

from densitykit.cells import wave_vectors
from densitykit.errors import ShapeError
from densitykit.fields import n_electrons, resample

TRICLINIC = np.array([[4.0, 0.0, 0.0], [1.0, 5.0, 0.0], [0.5, -1.0, 6.0]])


def polynomial(shape: tuple[int, ...], shift: tuple[float, ...] | None = None) -> np.ndarray:
    """Trigonometric polynomial of degree 2 along each axis, with mean 3, moved by ``shift``."""
    shift = shift or (0.0,) * len(shape)
    axes = np.meshgrid(
        *(np.arange(n) / n - s for n, s in zip(shape, shift, strict=True)), indexing="ij"
    )
    waves = [np.cos(2 * np.pi * (2 * a + 0.1)) + 0.3 * np.sin(2 * np.pi * a) for a in axes]
    return 3 + sum(waves) + 0.7 * np.prod(waves, axis=0)


# --- electron count --------------------------------------------------------------------------


def test_electron_count_of_one_dimension() -> None:
    density = np.stack([polynomial((9,)), 2 * polynomial((9,))])
    np.testing.assert_allclose(n_electrons(density, np.array([[7.0]])), [21.0, 42.0], rtol=1e-12)


@pytest.mark.parametrize("cell", [np.diag([4.0, 5.0, 6.0]), TRICLINIC, TRICLINIC[[1, 0, 2]]])
def test_electron_count_of_three_dimensions(cell: np.ndarray) -> None:
    """The last cell is left-handed: its determinant is negative, its volume is not."""
    density = np.broadcast_to(np.cos(2 * np.pi * np.arange(8) / 8) + 2, (2, 6, 7, 8))
    np.testing.assert_allclose(n_electrons(density, cell), [240.0, 240.0], rtol=1e-12)


def test_electron_count_of_a_gaussian() -> None:
    """A Gaussian integrates to one: the sum over a periodic grid converges exponentially."""
    x = np.arange(24) / 4 - 3
    bump = np.exp(-(x**2) / 0.5) / np.sqrt(0.5 * np.pi)
    density = bump[:, None, None] * bump[:, None] * bump
    np.testing.assert_allclose(n_electrons(density, 6 * np.eye(3)), 1.0, rtol=1e-7)


def test_electron_count_sums_in_double_precision() -> None:
    density = np.full((48, 48, 48), 0.1, np.float32)
    count = n_electrons(density, 10 * np.eye(3))
    assert count.dtype == np.float64
    np.testing.assert_allclose(count, 1000 * np.float64(np.float32(0.1)), rtol=1e-12)


# --- resampling ------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [(5, 6, 7), (8, 8, 8)])
@pytest.mark.parametrize("new", [(9, 10, 11), (8, 12, 7), (5, 5, 6)])
def test_resample_a_band_limited_field(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Degree 2 fits on 5 points or more: both ways, odd and even, the result is the polynomial."""
    np.testing.assert_allclose(resample(polynomial(old), new), polynomial(new), atol=1e-12)


def test_resample_keeps_batch_axes_and_precision() -> None:
    batch = np.stack([polynomial((6, 6)), polynomial((6, 6), (0.2, 0.4))])[:, None]
    fine = resample(batch, (8, 9))
    assert fine.shape == (2, 1, 8, 9)
    np.testing.assert_allclose(fine[1, 0], polynomial((8, 9), (0.2, 0.4)), atol=1e-12)
    assert resample(batch.astype(np.float32), (8, 9)).dtype == np.float32


@pytest.mark.parametrize("n", [7, 8])
@pytest.mark.parametrize("m", [9, 10, 15, 16])
def test_refining_any_field_can_be_undone(n: int, m: int) -> None:
    noise = np.random.default_rng(0).normal(size=(2, n, n))
    np.testing.assert_allclose(resample(resample(noise, (m, m)), (n, n)), noise, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 5, 6), (9, 8, 7), (12, 13, 14), (3, 2, 1)])
def test_resample_keeps_the_electron_count(shape: tuple[int, ...]) -> None:
    density = np.random.default_rng(1).uniform(0, 1, (2, 8, 9, 10))
    before, after = (
        n_electrons(density, TRICLINIC),
        n_electrons(resample(density, shape), TRICLINIC),
    )
    np.testing.assert_allclose(after, before, rtol=1e-12)


def test_resample_obeys_parseval() -> None:
    """Refining keeps the mean square; coarsening leaves that of the coefficients it keeps."""
    noise = np.random.default_rng(2).normal(size=(9, 9))
    power = np.abs(np.fft.fftn(noise, norm="forward")) ** 2
    np.testing.assert_allclose(np.mean(resample(noise, (13, 14)) ** 2), power.sum(), rtol=1e-12)
    low = np.abs(np.fft.fftfreq(9, 1 / 9)) <= 2
    kept = power[np.ix_(low, low)].sum()
    np.testing.assert_allclose(np.mean(resample(noise, (5, 5)) ** 2), kept, rtol=1e-12)


def test_resample_nyquist_is_the_cosine() -> None:
    """(-1)^j on 8 points is cos(8 pi x): the smallest function through these points."""
    alternating = (-1.0) ** np.arange(8)
    for m in (9, 12, 16):
        np.testing.assert_allclose(
            resample(alternating, (m,)), np.cos(8 * np.pi * np.arange(m) / m), atol=1e-12
        )
    np.testing.assert_allclose(resample(alternating, (7,)), 0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4, 4, 4), (0, 4, 4), (4, -1, 4)])
def test_resample_refuses_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"shape \(6, 6, 6\).*; give"):
        resample(np.ones((6, 6, 6)), shape)


# --- wave vectors ----------------------------------------------------------------------------


def test_wave_vectors_of_a_box() -> None:
    q = wave_vectors((4, 5, 6), np.diag([2.0, 3.0, 4.0]))
    assert q.shape == (4, 5, 6, 3)
    np.testing.assert_allclose(q[0, 0, 0], 0)
    np.testing.assert_allclose(
        q[1, 2, -1], 2 * np.pi * np.array([1 / 2, 2 / 3, -1 / 4]), rtol=1e-12
    )
    np.testing.assert_allclose(wave_vectors((5,), np.array([[8.0]]))[-2, 0], -2 * np.pi * 2 / 8)


def test_wave_vectors_label_the_fft() -> None:
    """exp(i q r) of every q of the list has exactly one Fourier coefficient: its own."""
    shape = (4, 5, 6)
    fractions = np.stack(np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij"), -1)
    q = wave_vectors(shape, TRICLINIC)
    for index in [(1, 0, 0), (0, 3, 0), (0, 0, 4), (1, 4, 2), (3, 2, 5)]:
        wave = np.exp(1j * (fractions @ TRICLINIC @ q[index]))
        expected = np.zeros(shape)
        expected[index] = 1
        np.testing.assert_allclose(np.fft.fftn(wave, norm="forward"), expected, atol=1e-12)
