"""Baselines on dynamics that they can represent, where they must be exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from densitykit.cells import shells
from densitykit.data.windows import StatePairs
from densitykit.models.baselines import (
    FourierLinearMap,
    LinearExtrapolation,
    MeanField,
    Persistence,
    ProperOrthogonalMap,
)

H = 2.0  # fs, spacing and horizon
N = 6


def noise_fields(count: int, n: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, n, n, n))


def as_pairs(rho: np.ndarray, rate: np.ndarray, horizon: float = H) -> StatePairs:
    states = torch.from_numpy(np.stack([rho, rate], axis=1).astype(np.float32))
    return StatePairs(states, H * np.arange(len(rho)), horizon)


def oscillators(frames: int = 24, seed: int = 0, damping: float = 0.02) -> StatePairs:
    """Each Fourier coefficient follows the matrix of its shell: a damped rotation.

    z = (rho_q, h rate_q) -> exp(-damping) R(angle of the shell) z, from random real fields.
    """
    shell = shells((N, N, N))
    angle = 0.2 + 0.1 * shell
    decay = np.exp(-damping)
    c, s = decay * np.cos(angle), decay * np.sin(angle)
    a, b = (np.fft.fftn(f) for f in noise_fields(2, seed=seed))
    a[0, 0, 0] = b[0, 0, 0] = 0
    rho, rate = [], []
    for _ in range(frames):
        rho.append(5 + np.fft.ifftn(a).real)
        rate.append(np.fft.ifftn(b).real / H)
        a, b = c * a + s * b, -s * a + c * b
    return as_pairs(np.array(rho), np.array(rate))


def low_rank(frames: int = 60, rank: int = 4) -> StatePairs:
    """States in the span of `rank` fields whose coefficients rotate: a linear system."""
    fields = noise_fields(2 * rank, seed=1).reshape(2, rank, -1)
    angle = 2 * np.pi / frames * np.array([3, 8])[:, None] * np.arange(frames)  # whole turns
    z = np.stack([f(angle[i]) for i in range(2) for f in (np.cos, np.sin)], axis=1)
    rho = (z @ fields[0] + 7).reshape(frames, N, N, N)
    rate = (z @ fields[1]).reshape(frames, N, N, N)
    return as_pairs(rho, rate / H)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / (expected - expected.mean()).norm())


# --- persistence, extrapolation, mean --------------------------------------------------------


def test_persistence_is_the_identity():
    x = torch.rand(3, 2, 4, 4, 4)
    assert torch.equal(Persistence(H)(x), x)


def test_linear_extrapolation_is_exact_for_uniform_change():
    start, slope = noise_fields(2)
    t = H * np.arange(5)[:, None, None, None]
    pairs = as_pairs(start + slope * t, np.broadcast_to(slope, (5, N, N, N)), 2 * H)
    now, later = pairs[:]
    torch.testing.assert_close(LinearExtrapolation(2 * H)(now), later, rtol=1e-5, atol=1e-5)


def test_linear_extrapolation_leaves_half_the_acceleration():
    """rho = a t^2/2: the error of a step is a h^2/2 everywhere."""
    acceleration, t = 0.3, 5.0
    x = torch.stack([torch.full((1, 2, 2, 2), f) for f in (acceleration * t**2 / 2, 0.3 * t)], 1)
    truth = acceleration * (t + H) ** 2 / 2
    error = truth - LinearExtrapolation(H)(x)[:, 0]
    torch.testing.assert_close(error, torch.full_like(error, acceleration * H**2 / 2))


def test_mean_field_forgets_the_state():
    rho, rate = noise_fields(8), noise_fields(8, seed=1)
    found = MeanField(as_pairs(rho, rate))(torch.rand(3, 2, N, N, N))
    for member in found:
        np.testing.assert_allclose(member[0], rho.mean(axis=0), atol=1e-6)
        assert (member[1] == 0).all()


# --- Fourier linear map ----------------------------------------------------------------------


def test_fourier_map_recovers_damped_oscillators():
    step = FourierLinearMap(oscillators(), every=1)
    now, later = oscillators(seed=9)[:]  # other states of the same dynamics
    assert relative(step(now), later) < 1e-5
    shell = torch.arange(1, len(step.map))
    c, s = (0.98019867 * f(0.2 + 0.1 * shell) for f in (torch.cos, torch.sin))
    expected = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    torch.testing.assert_close(step.map[1:].real, expected, rtol=0, atol=1e-4)


def test_fourier_map_learns_from_a_part_of_the_pairs():
    now, later = oscillators(seed=9)[:]
    assert relative(FourierLinearMap(oscillators(), every=4)(now), later) < 1e-4


def test_fourier_map_conserves_electrons():
    rng = np.random.default_rng(0)
    pairs = as_pairs(rng.uniform(0.5, 1.5, (12, N, N, N)), rng.normal(size=(12, N, N, N)))
    x = pairs.states[:5]
    found = FourierLinearMap(pairs)(x)
    mean, expected = (a[:, 0].double().mean((1, 2, 3)) for a in (found, x))
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)


def test_fourier_map_commutes_with_symmetries():
    step = FourierLinearMap(oscillators(), every=1)
    x = torch.rand(1, 2, N, N, N)
    turned = x.roll((1, 2), (2, 4)).transpose(2, 3).flip(4)
    expected = step(x).roll((1, 2), (2, 4)).transpose(2, 3).flip(4)
    torch.testing.assert_close(step(turned), expected, rtol=0, atol=1e-5)


def test_fourier_map_of_a_band_limited_field_is_finite():
    """Shells that hold nothing must not blow up."""
    wave = np.cos(2 * np.pi * np.arange(N) / N)[:, None, None]
    t = np.arange(10)[:, None, None, None]
    rho = 1 + 0.1 * np.cos(0.3 * t) * wave * np.ones((N, N, N))
    rate = -0.1 * 0.3 / H * np.sin(0.3 * t) * wave * np.ones((N, N, N))
    pairs = as_pairs(rho, rate)
    now, later = pairs[:]
    found = FourierLinearMap(pairs, every=1)(now)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, later, rtol=0, atol=1e-4)


# --- proper orthogonal modes -----------------------------------------------------------------


@pytest.mark.parametrize("modes", [4, 96])
def test_proper_orthogonal_map_is_exact_on_a_low_rank_system(modes):
    """Also with more modes than the data have directions."""
    pairs = low_rank()
    step = ProperOrthogonalMap(pairs, modes=modes, ridge=1e-9)
    now, later = pairs[:]
    found = step(now)
    assert relative(found[:, 0], later[:, 0]) < 1e-3
    assert relative(found[:, 1], later[:, 1]) < 1e-3


def test_modes_are_orthonormal_and_span_the_states():
    step = ProperOrthogonalMap(low_rank(), modes=4)
    torch.testing.assert_close(step.modes.T @ step.modes, torch.eye(4), rtol=0, atol=1e-4)
    flat = (low_rank().states * step.units - step.mean).flatten(1)
    left = flat - flat @ step.modes @ step.modes.T
    assert left.norm() < 1e-3 * flat.norm()


def test_ridge_damps():
    now, later = low_rank()[:]
    sharp, damped = (ProperOrthogonalMap(low_rank(), 4, ridge=r) for r in (1e-9, 1.0))
    errors = [relative(step(now), later) for step in (sharp, damped)]
    assert errors[1] > 10 * errors[0]


# --- all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_all_keep_shape_type_and_horizon(batch):
    pairs = oscillators()
    x = pairs.states[:batch]
    maps = [Persistence(H), LinearExtrapolation(H), MeanField(pairs)]
    maps += [FourierLinearMap(pairs), ProperOrthogonalMap(pairs, modes=4)]
    for step in maps:
        found = step(x)
        assert found.shape == x.shape and found.dtype == x.dtype and step.horizon == H
        torch.testing.assert_close(found[-1], step(x[-1:])[0], rtol=1e-4, atol=1e-5)
