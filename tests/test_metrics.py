"""Metrics against hand-computed values, limits and bounds; numpy against torch; gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from densitykit.metrics import (
    LN2,
    jensen_shannon,
    reference_noise_level,
    relative_l1,
    relative_l2,
    spatial_sjsd,
    value_distribution,
    value_sjsd,
)

COARSE = {"low": -1.0, "high": 1.0, "bins": 11}


def distributions(seed: int, shape: tuple[int, ...] = (3, 20)) -> tuple[np.ndarray, np.ndarray]:
    """Two random distributions over the last axis; small concentrations make near-zeros."""
    rng = np.random.default_rng(seed)
    p, q = (
        rng.dirichlet(np.full(shape[-1], rng.choice([0.05, 1.0])), shape[:-1]) for _ in range(2)
    )
    return p, q


# --- errors ----------------------------------------------------------------------------------


def test_errors_by_hand() -> None:
    reference = np.array([1.0, 2.0, -2.0]).reshape(1, 3, 1, 1)
    prediction = np.array([1.0, 1.0, -4.0]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(relative_l1(prediction, reference), [3 / 5])
    np.testing.assert_allclose(relative_l2(prediction, reference), [np.sqrt(5 / 9)])
    np.testing.assert_allclose(
        relative_l1(prediction[0, :, 0, 0], reference[0, :, 0, 0], ndim=1), 3 / 5
    )


def test_errors_keep_leading_axes_and_kind() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 3, 5, 5, 5))
    for metric in (relative_l1, relative_l2):
        value = metric(a, b)
        assert value.shape == (4, 3)
        np.testing.assert_allclose(metric(torch.tensor(a), torch.tensor(b)), value, rtol=1e-12)
        np.testing.assert_allclose(metric(3 * a, 3 * b), value, rtol=1e-12)
        np.testing.assert_allclose(metric(1.25 * b, b), 0.25, rtol=1e-12)
        np.testing.assert_array_equal(metric(b, b), 0)


# --- Jensen-Shannon --------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    nats = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)
    np.testing.assert_allclose(jensen_shannon(p, q, z=1.0), nats, rtol=1e-12)
    np.testing.assert_allclose(jensen_shannon(p, q), nats / LN2, rtol=1e-12)


def test_divergence_at_its_ends() -> None:
    p = np.array([0.25, 0.75, 0.0, 0.0])
    assert jensen_shannon(p, p) == 0
    np.testing.assert_allclose(jensen_shannon(p, p[::-1]), 1.0, rtol=1e-12)
    np.testing.assert_allclose(jensen_shannon(p, p[::-1], z=0.1), LN2 / 0.1, rtol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_divergence_is_symmetric_and_bounded(seed: int) -> None:
    p, q = distributions(seed)
    d = jensen_shannon(p, q)
    assert d.shape == (3,) and np.all(d > 0) and np.all(d <= 1)
    np.testing.assert_allclose(jensen_shannon(q, p), d, rtol=1e-12)
    # Pinsker-type bounds with total variation V: V^2/2 <= JSD <= V ln 2 (nats)
    variation = np.abs(p - q).sum(-1) / 2
    assert np.all(d * LN2 >= variation**2 / 2) and np.all(d <= variation + 1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_in_torch(seed: int, dtype: torch.dtype) -> None:
    p, q = distributions(seed)
    p[:, :5] = 0
    p /= p.sum(-1, keepdims=True)
    value = jensen_shannon(torch.tensor(p, dtype=dtype), torch.tensor(q, dtype=dtype))
    np.testing.assert_allclose(
        value, jensen_shannon(p, q), atol=1e-6 if dtype == torch.float32 else 1e-12
    )


# --- readings --------------------------------------------------------------------------------


def test_spatial_reading_does_not_see_the_scale() -> None:
    density = np.random.default_rng(1).uniform(0.1, 1, (2, 6, 6, 6))
    np.testing.assert_allclose(spatial_sjsd(5 * density, density), 0, atol=1e-12)
    assert spatial_sjsd(density, density[::-1]).shape == (2,)


@pytest.mark.parametrize("z", [LN2, 0.02])
def test_spatial_reading_of_a_small_perturbation(z: float) -> None:
    """To second order the divergence is the chi-squared distance, (1/8) sum dp^2/p / Z."""
    rng = np.random.default_rng(2)
    density, noise = rng.uniform(0.5, 1, (6, 6, 6)), rng.normal(size=(6, 6, 6))
    p = density / density.sum()
    p_noisy = density * (1 + 1e-3 * noise)
    dp = p_noisy / p_noisy.sum() - p
    np.testing.assert_allclose(
        spatial_sjsd(p_noisy, density, z), (dp**2 / p).sum() / 8 / z, rtol=2e-3
    )


def test_spatial_reading_of_a_small_perturbation_in_single_precision() -> None:
    """A one-step error of 0.3 % on a grid of 24^3 points must not drown in rounding."""
    rng = np.random.default_rng(3)
    density = rng.uniform(0.01, 1, (24, 24, 24))
    noisy = density * (1 + 3e-3 * rng.normal(size=density.shape))
    exact = spatial_sjsd(noisy, density)
    single = [torch.tensor(a, dtype=torch.float32) for a in (noisy, density)]
    np.testing.assert_allclose(spatial_sjsd(*single), exact, rtol=0.05)


def test_value_distribution_by_hand() -> None:
    """Centres -1, -0.5, 0, 0.5, 1: each value is shared between its two neighbours."""
    values = np.array([-1.0, -0.4, 0.0, 0.625])
    expected = np.array([1, 0.8, 0.2 + 1, 0.75, 0.25]) / 4
    for a in (values, torch.tensor(values)):
        np.testing.assert_allclose(value_distribution(a, -1, 1, 5), expected, atol=1e-12)


def test_values_beyond_the_range_go_to_the_end_bins() -> None:
    values = np.array([-50.0, -1.0, 1.0, 2.0, 1e9])
    expected = np.array([2, 0, 0, 0, 3]) / 5
    for a in (values, torch.tensor(values), torch.tensor(values, dtype=torch.float32)):
        np.testing.assert_allclose(value_distribution(a, -1, 1, 5), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_value_distribution_of_any_shape_sums_to_one(dtype: type) -> None:
    values = np.random.default_rng(4).normal(size=(3, 8, 8, 8)).astype(dtype)
    for p in (value_distribution(values), value_distribution(torch.tensor(values)).numpy()):
        assert p.shape == (100,) and p.min() >= 0
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    # linear sharing keeps the mean of what lies inside the range
    centres = np.linspace(-6, 4, 100)
    np.testing.assert_allclose(value_distribution(values) @ centres, values.mean(), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_readings_agree_between_numpy_and_torch(dtype: type) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 4, 8, 8, 8)).astype(dtype)
    for reading, (x, y) in {value_sjsd: (a, b), spatial_sjsd: (np.exp(a), np.exp(b))}.items():
        np.testing.assert_allclose(
            reading(torch.tensor(x), torch.tensor(y)), reading(x, y), atol=1e-6
        )


def test_what_each_reading_sees() -> None:
    """Shuffled voxels have the same values in other places; a global factor the reverse."""
    rng = np.random.default_rng(6)
    field = rng.normal(size=(8, 8, 8))
    shuffled = rng.permutation(field.ravel()).reshape(field.shape)
    assert value_sjsd(shuffled, field) == pytest.approx(0, abs=1e-12)
    assert spatial_sjsd(np.exp(shuffled), np.exp(field)) > 0.1
    scaled = field + 1.0  # the logarithm of e times the density
    assert value_sjsd(scaled, field) > 0.05
    assert spatial_sjsd(np.exp(scaled), np.exp(field)) == pytest.approx(0, abs=1e-12)


def test_value_reading_takes_fields_of_different_length() -> None:
    values = np.tile(np.linspace(-2, 2, 50), 4)
    assert value_sjsd(values, values[:50]) == pytest.approx(0, abs=1e-12)


def test_noise_level_of_independent_halves() -> None:
    """With n values a half, K bins and linear sharing: E[JSD] = (2K/3 - 1) / (4 n)."""
    rng = np.random.default_rng(7)
    n = 5000
    levels = [
        reference_noise_level(rng.uniform(-1, 1, (2 * n // 100, 100)), z=1.0, **COARSE)
        for _ in range(60)
    ]
    assert np.mean(levels) == pytest.approx((2 * 11 / 3 - 1) / (4 * n), rel=0.25)


def test_noise_level_splits_along_time() -> None:
    values = np.concatenate([np.full((3, 8), -1.0), np.full((3, 8), 1.0)])
    assert reference_noise_level(values, **COARSE) == pytest.approx(1)
    assert reference_noise_level(values.T, **COARSE) == pytest.approx(0, abs=1e-12)


# --- gradients -------------------------------------------------------------------------------


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 3, 3, 3, dtype=torch.float64)
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jensen_shannon(x.softmax(-1), b.softmax(-1)), a)
    assert torch.autograd.gradcheck(lambda x: spatial_sjsd(x.exp(), b.exp()), a)
    assert torch.autograd.gradcheck(lambda x: value_sjsd(x, b), a)
    assert torch.autograd.gradcheck(lambda x: value_distribution(x, -3, 3, 7), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_zeros(dtype: torch.dtype) -> None:
    p = torch.tensor([0.0, 0.0, 0.5, 0.5], dtype=dtype, requires_grad=True)
    q = torch.tensor([0.0, 0.5, 0.0, 0.5], dtype=dtype, requires_grad=True)
    jensen_shannon(p, q).backward()
    assert p.grad.isfinite().all() and q.grad.isfinite().all()
    assert p.grad[1] < 0 < p.grad[2]  # towards q
    density = torch.zeros(2, 4, 4, 4, dtype=dtype)
    density[:, 0] = 1
    density.requires_grad_()
    spatial_sjsd(density, torch.ones_like(density)).sum().backward()
    assert density.grad.isfinite().all()
    values = torch.full((8,), -9.0, dtype=dtype, requires_grad=True)  # all beyond the range
    value_sjsd(values, torch.zeros(8, dtype=dtype)).backward()
    assert values.grad.isfinite().all()


def test_gradient_vanishes_at_the_reference() -> None:
    density = torch.rand(1, 4, 4, 4, dtype=torch.float64) + 0.1
    moving = density.clone().requires_grad_()
    spatial_sjsd(moving, density).sum().backward()
    np.testing.assert_allclose(moving.grad, 0, atol=1e-12)
