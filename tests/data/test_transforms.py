"""Log-normal variables, rates, resampling: inverses, the chain rule, exact electron counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from analytic import run_of

from densitykit.data.transforms import (
    LogNormal,
    backward_rate,
    fourier_resample,
    multiple_of,
    restore_electrons,
)
from densitykit.data.windows import Windows
from densitykit.fields import resample

TRANSFORM = LogNormal(mu=-2.1, sigma=0.7, eps=0.01)


def density(shape: tuple[int, ...] = (2, 6, 6, 6)) -> np.ndarray:
    """Positive densities over four decades, with a zero."""
    rho = np.exp(np.random.default_rng(0).normal(-2, 2, shape))
    rho.flat[0] = 0
    return rho


def test_inverse() -> None:
    rho = density()
    np.testing.assert_allclose(
        TRANSFORM.inverse(TRANSFORM.forward(rho)), rho, rtol=1e-12, atol=1e-12
    )
    field = np.linspace(-6, 6, 50)
    np.testing.assert_allclose(
        TRANSFORM.forward(TRANSFORM.inverse(field)), field, rtol=1e-12, atol=1e-12
    )


def test_forward_by_hand() -> None:
    assert TRANSFORM.forward(np.exp(-2.1) - 0.01) == pytest.approx(0, abs=1e-12)
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
    np.testing.assert_allclose(TRANSFORM.inverse_rate(rho, there), rate, rtol=1e-12)


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
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    for ours, theirs in [
        (TRANSFORM.forward(rho), TRANSFORM.forward(rho_t)),
        (TRANSFORM.inverse(rate), TRANSFORM.inverse(rate_t)),
        (TRANSFORM.forward_rate(rho, rate), TRANSFORM.forward_rate(rho_t, rate_t)),
        (TRANSFORM.inverse_rate(rho, rate), TRANSFORM.inverse_rate(rho_t, rate_t)),
        (restore_electrons(rate, 0.3), restore_electrons(rate_t, 0.3)),
    ]:
        assert theirs.dtype == dtype
        np.testing.assert_allclose(
            theirs, ours, rtol=rtol, atol=1e-6 if dtype == torch.float32 else 1e-12
        )


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
def test_restored_density_has_the_mean_and_is_not_negative(make: object) -> None:
    rho = density()
    rho.flat[:20] = -0.009  # the transform admits values down to -eps
    restored = restore_electrons(make(rho), 0.25)
    assert restored.shape == rho.shape
    np.testing.assert_allclose(restored.mean((-3, -2, -1)), 0.25, rtol=1e-12)
    assert restored.min() > 0


def test_restoring_a_right_density_changes_nothing() -> None:
    rho = density() + 1e-3
    means = rho.mean(axis=(-3, -2, -1), keepdims=True)
    np.testing.assert_allclose(restore_electrons(rho, means), rho, rtol=1e-12)


def test_each_frame_gets_its_own_mean() -> None:
    means = np.array([0.1, 0.3]).reshape(2, 1, 1, 1)
    for restored in (
        restore_electrons(density(), means),
        restore_electrons(torch.tensor(density()), torch.tensor(means)).numpy(),
    ):
        np.testing.assert_allclose(restored.mean(axis=(-3, -2, -1)), [0.1, 0.3], rtol=1e-12)


def test_constants_of_windows_are_those_of_their_present_frames() -> None:
    rho = density((12, 4, 4, 4))
    windows = Windows(run_of(rho), 4.0)
    whole = LogNormal.fit(rho.astype(np.float32)[2:10], eps=0.02)  # frames 2 to 9 have a target
    streamed = LogNormal.of(windows, eps=0.02)
    assert streamed.eps == 0.02
    assert streamed.mu == pytest.approx(whole.mu, rel=1e-12)
    assert streamed.sigma == pytest.approx(whole.sigma, rel=1e-12)
    part = LogNormal.of(windows, eps=0.02, limit=4)
    assert part.mu == pytest.approx(LogNormal.fit(rho.astype(np.float32)[2:10:2], 0.02).mu)


# --- rates -----------------------------------------------------------------------------------


def test_rate_is_the_backward_difference() -> None:
    frames = np.random.default_rng(0).uniform(size=(2, 5, 4, 4, 4)).astype(np.float32)
    found = backward_rate(torch.tensor(frames), 2.5)
    expected = (1.5 * frames[:, -1] - 2.0 * frames[:, -2] + 0.5 * frames[:, -3]) / 2.5
    assert found.shape == (2, 4, 4, 4) and found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("time_step", [2.0, 1.0, 0.5])
def test_rate_of_moving_waves(time_step: float, mock_density: Callable) -> None:
    """Within the leading error term of the fastest wave, (omega dt)^2 / 3."""
    times = time_step * np.arange(3)
    frames = torch.tensor(np.stack([mock_density(t) for t in times]))[None]
    h = 1e-3
    exact = (mock_density(times[-1] + h) - mock_density(times[-1] - h)) / (2 * h)
    error = np.abs(backward_rate(frames, time_step)[0].numpy() - exact).max()
    angle = 2 * np.pi * 3 / 40 * time_step
    assert error < angle**2 / 3 * np.abs(exact).max()


def test_rate_of_a_parabola_is_exact() -> None:
    t = 3.0 * torch.arange(3, dtype=torch.float64).reshape(1, 3, 1, 1, 1)
    frames = (1 + 2 * t - 0.5 * t**2).expand(1, 3, 2, 2, 2)
    torch.testing.assert_close(backward_rate(frames, 3.0), torch.full((1, 2, 2, 2), -4.0).double())


# --- grids -----------------------------------------------------------------------------------


def test_multiples_of_a_stride() -> None:
    assert multiple_of(4, (8, 14, 1)) == (8, 16, 4) and multiple_of(1, (7, 8, 9)) == (7, 8, 9)


@pytest.mark.parametrize("shape", [(7, 7, 7), (8, 8, 8), (14, 9, 10), (6, 8, 12)])
@pytest.mark.parametrize("grid", [(8, 8, 8), (16, 12, 9), (5, 6, 7), (4, 4, 4)])
def test_resampling_agrees_with_numpy(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    field = np.random.default_rng(0).normal(size=(2, 3, *shape))
    found = fourier_resample(torch.tensor(field), grid)
    assert found.shape == (2, 3, *grid)
    np.testing.assert_allclose(found, resample(field, grid), rtol=0, atol=1e-12)
    mean = field.mean(axis=(-3, -2, -1))
    np.testing.assert_allclose(found.mean(dim=(-3, -2, -1)), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 7, 7), (14, 14, 14), (6, 9, 10)])
def test_refining_and_back_changes_nothing(shape: tuple[int, ...]) -> None:
    field = torch.tensor(np.random.default_rng(0).normal(size=(2, *shape)))
    back = fourier_resample(fourier_resample(field, multiple_of(4, shape)), shape)
    torch.testing.assert_close(back, field, rtol=0, atol=1e-12)


def test_resampling_evaluates_the_same_wave() -> None:
    def wave(n: int) -> torch.Tensor:
        x = torch.arange(n, dtype=torch.float64) / n
        return torch.cos(2 * torch.pi * 2 * x + 0.3)[:, None, None].expand(n, 7, 9)

    torch.testing.assert_close(fourier_resample(wave(7), (12, 8, 12))[:, 0, 0], wave(12)[:, 0, 0])
