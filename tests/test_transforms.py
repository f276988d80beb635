"""The log-normal variables: inverses, the chain rule, and exact electron counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from densitykit.data.transforms import LogNormal, restore_electrons

TRANSFORM = LogNormal(mu=-2.1, sigma=0.7, eps=0.01)


def density(shape: tuple[int, ...] = (2, 6, 6, 6)) -> np.ndarray:
    """Positive densities over four decades, with a zero."""
    rho = np.exp(np.random.default_rng(0).normal(-2, 2, shape))
    rho.flat[0] = 0
    return rho


def test_inverse() -> None:
    rho = density()
    np.testing.assert_allclose(
        TRANSFORM.inverse(TRANSFORM.forward(rho)), rho, rtol=1e-12, atol=1e-14
    )
    field = np.linspace(-6, 6, 50)
    np.testing.assert_allclose(
        TRANSFORM.forward(TRANSFORM.inverse(field)), field, rtol=1e-12, atol=1e-12
    )


def test_forward_by_hand() -> None:
    assert TRANSFORM.forward(np.exp(-2.1) - 0.01) == pytest.approx(0, abs=1e-14)
    assert TRANSFORM.forward(np.exp(-2.1 + 0.7) - 0.01) == pytest.approx(1)
    assert TRANSFORM.inverse(np.array(-1e3)) == -0.01


def test_rate_by_finite_differences() -> None:
    """d/dt of the transformed path rho(t) = rho_0 + t rate, at t = 0."""
    rho = density() + 0.05
    rate = np.random.default_rng(1).normal(0, 0.01, rho.shape)
    h = 1e-4
    numeric = (TRANSFORM.forward(rho + h * rate) - TRANSFORM.forward(rho - h * rate)) / (2 * h)
    np.testing.assert_allclose(TRANSFORM.forward_rate(rho, rate), numeric, rtol=1e-8, atol=1e-10)
    field, field_rate = TRANSFORM.forward(rho), TRANSFORM.forward_rate(rho, rate)
    numeric = (
        TRANSFORM.inverse(field + h * field_rate) - TRANSFORM.inverse(field - h * field_rate)
    ) / (2 * h)
    np.testing.assert_allclose(
        TRANSFORM.inverse_rate(rho, field_rate), numeric, rtol=1e-7, atol=1e-9
    )


def test_rates_are_inverse() -> None:
    rho = density()
    rate = np.random.default_rng(1).normal(size=rho.shape)
    there = TRANSFORM.forward_rate(rho, rate)
    np.testing.assert_allclose(TRANSFORM.inverse_rate(rho, there), rate, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fit_standardises_its_data(dtype: type) -> None:
    rho = density().astype(dtype)
    field = LogNormal.fit(rho, eps=0.02).forward(rho.astype(np.float64))
    assert field.mean() == pytest.approx(0, abs=1e-12)
    assert field.std() == pytest.approx(1, abs=1e-12)


def test_fit_recovers_a_log_normal() -> None:
    rho = np.exp(np.random.default_rng(2).normal(-1.5, 0.4, 40_000)) - 1e-3
    fitted = LogNormal.fit(rho, eps=1e-3)
    assert (fitted.mu, fitted.sigma, fitted.eps) == (
        pytest.approx(-1.5, abs=0.01),
        pytest.approx(0.4, abs=0.01),
        1e-3,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_and_torch_agree(dtype: torch.dtype) -> None:
    rho = density()
    rate = np.random.default_rng(3).normal(size=rho.shape)
    rho_t, rate_t = torch.tensor(rho, dtype=dtype), torch.tensor(rate, dtype=dtype)
    rtol = 1e-5 if dtype == torch.float32 else 1e-13
    for ours, theirs in [
        (TRANSFORM.forward(rho), TRANSFORM.forward(rho_t)),
        (TRANSFORM.inverse(rate), TRANSFORM.inverse(rate_t)),
        (TRANSFORM.forward_rate(rho, rate), TRANSFORM.forward_rate(rho_t, rate_t)),
        (TRANSFORM.inverse_rate(rho, rate), TRANSFORM.inverse_rate(rho_t, rate_t)),
        (restore_electrons(rate, 0.3), restore_electrons(rate_t, 0.3)),
    ]:
        assert theirs.dtype == dtype
        np.testing.assert_allclose(
            theirs, ours, rtol=rtol, atol=1e-6 if dtype == torch.float32 else 1e-14
        )


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
def test_restored_density_has_the_mean_and_is_not_negative(make: object) -> None:
    rho = density()
    rho.flat[:20] = -0.009  # the transform admits values down to -eps
    restored = restore_electrons(make(rho), 0.25)
    assert restored.shape == rho.shape
    np.testing.assert_allclose(restored.mean((-3, -2, -1)), 0.25, rtol=1e-14)
    assert restored.min() > 0


def test_restoring_a_right_density_changes_nothing() -> None:
    rho = density() + 1e-3
    means = rho.mean(axis=(-3, -2, -1), keepdims=True)
    np.testing.assert_allclose(restore_electrons(rho, means), rho, rtol=1e-14)


def test_each_frame_gets_its_own_mean() -> None:
    means = np.array([0.1, 0.3]).reshape(2, 1, 1, 1)
    for restored in (
        restore_electrons(density(), means),
        restore_electrons(torch.tensor(density()), torch.tensor(means)).numpy(),
    ):
        np.testing.assert_allclose(restored.mean(axis=(-3, -2, -1)), [0.1, 0.3], rtol=1e-14)
