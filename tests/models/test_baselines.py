"""Baselines on dynamics that they can represent, where they must be exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import HEXAGONAL, moving_atoms, run_of
from torch import Tensor

from densitykit.cells import shells
from densitykit.data.windows import Window, Windows
from densitykit.errors import WindowError
from densitykit.models.base import Emulator
from densitykit.models.baselines import (
    FourierLinearMap,
    LinearExtrapolation,
    MeanField,
    Persistence,
    ProperOrthogonalMap,
    baselines,
)

H = 2.0  # fs, time step and horizon
N = 6


def noise_fields(count: int, n: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, n, n, n))


def as_windows(rho: np.ndarray, horizon: float = H, **options: object) -> Windows:
    return Windows(run_of(rho, H, **options), horizon)


def pair(windows: Windows) -> tuple[Tensor, Tensor]:
    """States of all windows now and a horizon later: density and horizon times rate."""
    step = LinearExtrapolation(windows.horizon)
    window = windows[:]
    now, later = (step.init(window.past(3, end)) for end in (0, windows.lag))
    return now, later


def oscillators(frames: int = 24, seed: int = 0, damping: float = 0.02) -> Windows:
    """Each Fourier coefficient is a damped rotation by the angle of its shell a step.

    Such a coefficient and its backward difference advance by a real 2x2 matrix: the dynamics of
    the pair is linear, whatever the difference is worth as a rate.
    """
    shell = shells((N, N, N))
    angle = 0.2 + 0.1 * shell
    decay = np.exp(-damping)
    c, s = decay * np.cos(angle), decay * np.sin(angle)
    a, b = (np.fft.fftn(f) for f in noise_fields(2, seed=seed))
    a[0, 0, 0] = b[0, 0, 0] = 0
    rho = []
    for _ in range(frames):
        rho.append(50 + np.fft.ifftn(a).real)
        a, b = c * a + s * b, -s * a + c * b
    return as_windows(np.array(rho))


def shell_matrices(count: int, damping: float = 0.02) -> Tensor:
    """What the map of each shell of :func:`oscillators` must be, (shell, 2, 2).

    With z = exp(-damping + i angle), a coefficient is Re(A z^t), its scaled backward difference
    Re(d A z^t) with d = (3 - 4/z + 1/z^2)/2; (1, d) and its conjugate are eigenvectors.
    """
    matrices = []
    for shell in range(count):
        z = np.exp(-damping + 1j * (0.2 + 0.1 * shell))
        d = (3 - 4 / z + z**-2) / 2
        vectors = np.array([[1, 1], [d, d.conj()]])
        advance = vectors @ np.diag([z, z.conj()]) @ np.linalg.inv(vectors)
        matrices.append(advance.real.T)  # states are rows
    return torch.tensor(np.array(matrices), dtype=torch.float32)


def low_rank(frames: int = 62, rank: int = 4) -> Windows:
    """Densities in the span of `rank` fields whose coefficients rotate: a linear system."""
    fields = noise_fields(rank, seed=1).reshape(rank, -1)
    angle = 2 * np.pi / (frames - 3) * np.array([3, 8])[:, None] * np.arange(frames)  # whole turns
    z = np.stack([f(angle[i]) for i in range(2) for f in (np.cos, np.sin)], axis=1)
    return as_windows((z @ fields + 20).reshape(frames, N, N, N))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / (expected - expected.mean()).norm())


# --- persistence, extrapolation, mean --------------------------------------------------------


def test_persistence_stays():
    windows = as_windows(noise_fields(6) + 5)
    step = Persistence(H)
    state = step.init(windows[[0, 2]].past(1))
    torch.testing.assert_close(step.density(step.step(state)), windows[[0, 2]].at(0))


def test_linear_extrapolation_is_exact_for_uniform_change():
    start, slope = noise_fields(2)
    t = H * np.arange(9)[:, None, None, None]
    windows = as_windows(90 + start + slope * t, 2 * H)
    step = LinearExtrapolation(2 * H)
    state = step.init(windows[:].past(3))
    for k in (1, 2):
        state = step.step(state)
        truth = windows[: len(windows) - 2 * (k - 1)].at(0) + k * 2 * H * torch.tensor(slope)
        torch.testing.assert_close(
            step.density(state)[: len(truth)], truth.float(), rtol=1e-5, atol=0
        )


def test_linear_extrapolation_leaves_half_the_acceleration():
    """rho = 1 + a t^2/2: the error of a step is a h^2/2 everywhere."""
    acceleration, t = 0.3, H * np.arange(6)
    rho = 1 + acceleration * t**2 / 2
    windows = as_windows(np.broadcast_to(rho[:, None, None, None], (6, 2, 2, 2)))
    step, window = LinearExtrapolation(H), windows[:]
    error = window.at(1) - step.density(step.step(step.init(window.past(3))))
    expected = torch.full_like(error, acceleration * H**2 / 2)
    torch.testing.assert_close(error, expected, rtol=0, atol=1e-5)


def test_mean_field_forgets_the_state():
    rho = noise_fields(8) + 5
    step = MeanField(as_windows(rho))
    state = step.step(step.init(as_windows(noise_fields(6, seed=1) + 5)[:3].past(1)))
    assert len(state) == 3
    for member in step.density(state):
        # of the frames that are the present of a window
        np.testing.assert_allclose(member, rho[2:7].mean(axis=0), atol=1e-6)


# --- Fourier linear map ----------------------------------------------------------------------


def test_fourier_map_recovers_damped_oscillators():
    step = FourierLinearMap(oscillators(), every=1)
    now, later = pair(oscillators(seed=9))  # other states of the same dynamics
    found = step.step(now)
    assert all(relative(found[:, i], later[:, i]) < 1e-4 for i in (0, 1))
    expected = shell_matrices(len(step.map))
    torch.testing.assert_close(step.map[1:].real, expected[1:], rtol=0, atol=1e-3)


def test_fourier_map_learns_from_a_part_of_the_pairs():
    now, later = pair(oscillators(seed=9))
    found = FourierLinearMap(oscillators(), every=4).step(now)
    assert all(relative(found[:, i], later[:, i]) < 1e-3 for i in (0, 1))


def test_fourier_map_conserves_electrons():
    windows = as_windows(np.random.default_rng(0).uniform(0.5, 1.5, (12, N, N, N)))
    step = FourierLinearMap(windows)
    x = step.init(windows[:5].past(3))
    found = step.step(x)
    mean, expected = (a[:, 0].double().mean((1, 2, 3)) for a in (found, x))
    # the rate of the mean moves nothing
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)


def test_fourier_map_commutes_with_symmetries():
    step = FourierLinearMap(oscillators(), every=1)
    x = torch.rand(1, 2, N, N, N)
    turned = x.roll((1, 2), (2, 4)).transpose(2, 3).flip(4)
    expected = step.step(x).roll((1, 2), (2, 4)).transpose(2, 3).flip(4)
    torch.testing.assert_close(step.step(turned), expected, rtol=0, atol=1e-5)


def test_fourier_map_of_a_band_limited_field_is_finite():
    """Shells that hold nothing must not blow up."""
    wave = np.cos(2 * np.pi * np.arange(N) / N)[:, None, None]
    t = np.arange(12)[:, None, None, None]
    windows = as_windows(1 + 0.1 * np.cos(0.3 * t) * wave * np.ones((N, N, N)))
    now, later = pair(windows)
    found = FourierLinearMap(windows, every=1).step(now)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, later, rtol=0, atol=1e-4)


def test_fourier_map_takes_the_shells_of_the_cell():
    """In an orthorhombic cell, waves along x and z have lengths, and so matrices, of their own."""
    axes = [np.cos(2 * np.pi * np.arange(N) / N).reshape(s) for s in [(N, 1, 1), (1, 1, N)]]
    t = np.arange(16)[:, None, None, None]
    waves = sum(np.cos(w * t) * axis for w, axis in zip((0.2, 0.5), axes, strict=True))
    rho = 1 + 0.1 * waves * np.ones((1, N, N, N))
    for cell, worst in ((np.diag([4.0, 5.0, 6.0]), 1e-3), (6 * np.eye(3), None)):
        windows = as_windows(rho, cell=cell)
        now, later = pair(windows)
        error = (FourierLinearMap(windows, every=1).step(now) - later).abs().max()
        assert error < worst if worst else error > 1e-3


# --- proper orthogonal modes -----------------------------------------------------------------


@pytest.mark.parametrize("modes", [4, 96])
def test_proper_orthogonal_map_is_exact_on_a_low_rank_system(modes):
    """Also with more modes than the data have directions."""
    windows = low_rank()
    step = ProperOrthogonalMap(windows, modes=modes, ridge=1e-9)
    now, later = pair(windows)
    found = step.step(now)
    assert relative(found[:, 0], later[:, 0]) < 1e-3
    assert relative(found[:, 1], later[:, 1]) < 1e-3


def test_modes_are_orthonormal_and_span_the_states():
    step = ProperOrthogonalMap(low_rank(), modes=4)
    torch.testing.assert_close(step.modes.T @ step.modes, torch.eye(4), rtol=0, atol=1e-4)
    flat = (pair(low_rank())[0] - step.mean).flatten(1)
    left = flat - flat @ step.modes @ step.modes.T
    assert left.norm() < 1e-3 * flat.norm()


def test_ridge_damps():
    now, later = pair(low_rank())
    sharp, damped = (ProperOrthogonalMap(low_rank(), 4, ridge=r) for r in (1e-9, 1.0))
    errors = [relative(step.step(now), later) for step in (sharp, damped)]
    assert errors[1] > 10 * errors[0]


# --- all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cell", [6 * np.eye(3), HEXAGONAL], ids=["cubic", "hexagonal"])
def test_all_keep_shape_type_and_horizon(batch: int, cell: np.ndarray) -> None:
    windows = Windows(moving_atoms([3, 9], frames=16, cell=cell, grid=(6, 6, 8)), 2 * H)
    window: Window = windows[:batch]
    found = baselines(windows)
    assert list(found)[-2:] == ["persistence", "mean field"] and len(found) == 5
    for step in found.values():
        assert isinstance(step, Emulator) and step.horizon == 2 * H
        state = step.init(window.past(step.context))
        density = step.density(step.step(state))
        assert density.shape == (batch, 6, 6, 8) and density.dtype == torch.float32
        torch.testing.assert_close(step.density(state), window.at(0), rtol=1e-5, atol=1e-6)
        alone = step.step(step.init(windows[batch - 1].past(step.context)))
        torch.testing.assert_close(density[-1], step.density(alone)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [FourierLinearMap, ProperOrthogonalMap, MeanField])
def test_a_fit_belongs_to_its_grid_and_cell(kind: type) -> None:
    fitted = kind(as_windows(noise_fields(12) + 5))
    context = fitted.context
    for n, cell, numbers in (
        (8, 6 * np.eye(3), r"0\.75, 0\.75, 0\.75 .* 1, 1, 1 angstrom"),
        (N, np.diag([6.0, 6.0, 9.0]), r"1, 1, 1\.5 .* 1, 1, 1 angstrom"),
        (2 * N, 12 * np.eye(3), "12 x 12 x 12.*6 x 6 x 6"),
    ):
        window = as_windows(noise_fields(6, n=n) + 5, cell=cell)[0].past(context)
        with pytest.raises(WindowError, match=rf"runs/li\.zarr: .*{numbers}"):
            fitted.init(window)
