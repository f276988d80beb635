"""Electrons in time: conservation, gauges, exact solutions of one electron, linear response."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from densitykit.chain.electron_spectra import (
    WINDOWS,
    conductivity,
    dielectric,
    lines,
    structure_factor,
    transform,
)
from densitykit.chain.electrons import ElectronDynamics, Kick, Pulse
from densitykit.chain.excitations import casida
from densitykit.chain.kohn_sham import KohnShamSolution, ReducedHartreeFock1D
from densitykit.errors import GenerationError, ShapeError

PULSE = Pulse(0.08, 0.4, 30.0, 0.3)


def chain(width: float, n: int = 2) -> tuple[ReducedHartreeFock1D, KohnShamSolution]:
    R = 10.0 * np.arange(n) + 5 + np.random.default_rng(0).uniform(-1, 1, n)
    model = ReducedHartreeFock1D(R, width, length=10.0 * n, cutoff=16.0 / width)
    return model, model.solve()


@pytest.fixture(scope="module", params=[1.0, 6.0], ids=["insulator", "metal"])
def ground(request: pytest.FixtureRequest) -> tuple[ReducedHartreeFock1D, KohnShamSolution]:
    return chain(request.param)


def well(
    potential: Callable[[np.ndarray], np.ndarray], length: float = 40.0, n: int = 128
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distance from the middle, the potential there, levels and orbitals of the grid, in rows."""
    x = (np.arange(n) - n // 2) * length / n
    k = 2 * np.pi * np.fft.fftfreq(n, length / n)
    kinetic = np.fft.ifft(0.5 * k[:, None] ** 2 * np.fft.fft(np.eye(n), axis=0), axis=0)
    eps, psi = np.linalg.eigh(kinetic.real + np.diag(potential(x)))
    return x, potential(x), eps, psi.T / np.sqrt(length / n)


def soft_coulomb(x: np.ndarray) -> np.ndarray:
    return -1 / np.sqrt(x**2 + 1)


def test_the_ground_state_stays(ground: tuple) -> None:
    """Norms, electrons and energy to round-off; the density as far as the basis is converged."""
    model, solution = ground
    electrons = ElectronDynamics.of(*ground, time_step=0.2)
    before, energy = electrons.density, electrons.energy
    assert abs(energy - (solution.energy - solution.entropy_term)) < 1e-10
    electrons.advance(500)
    norms = (np.abs(electrons.orbitals) ** 2).mean(axis=1) * model.length
    np.testing.assert_allclose(norms, 1, rtol=1e-11)
    assert abs(electrons.electrons - model.n_electrons) < 1e-10
    assert abs(electrons.energy - energy) < 1e-10
    np.testing.assert_allclose(electrons.density, before, atol=1e-5 * before.max())
    assert np.abs(electrons.current).max() < 1e-5


def test_energy_after_a_kick_is_kept_to_the_order_of_the_scheme(ground: tuple) -> None:
    errors = []
    for step in (0.8, 0.4):
        electrons = ElectronDynamics.of(*ground, Kick(0.1), time_step=step)
        energy = electrons.energy
        electrons.advance(round(80 / step))
        errors.append(abs(electrons.energy - energy))
    assert errors[1] < 1e-6
    assert errors[1] < errors[0] / 10


def test_the_scheme_is_of_fourth_order_and_reversible() -> None:
    ground, end = chain(1.0), {}
    for step in (0.1, 0.4, 0.8):
        electrons = ElectronDynamics.of(*ground, PULSE, time_step=step)
        electrons.advance(round(40 / step))
        end[step] = electrons.density
    coarse, fine = (np.abs(end[s] - end[0.1]).max() for s in (0.8, 0.4))
    assert coarse / fine > 12
    back = ElectronDynamics.of(*ground, lambda t: -PULSE(40 - t), time_step=0.8)
    electrons = ElectronDynamics.of(*ground, PULSE, time_step=0.8)
    before = electrons.density
    electrons.advance(50)
    assert np.abs(electrons.density - before).max() > 1e-3
    back.waves = np.fft.fft(electrons.orbitals.conj())
    back.advance(50)
    np.testing.assert_allclose(back.density, before, atol=1e-10)


def test_continuity_holds_to_round_off(ground: tuple) -> None:
    """d rho/dt of the Hamiltonian on the grid is minus the divergence of the current."""
    electrons = ElectronDynamics.of(*ground, PULSE, time_step=0.2)
    electrons.push(0.1 * np.cos(2 * np.pi * electrons.r / electrons.length))
    electrons.advance(50)
    A, psi = PULSE(electrons.time), electrons.orbitals
    assert abs(A) > 0.01
    moving = np.fft.ifft(0.5 * (electrons.k + A) ** 2 * electrons.waves)
    rate = 2 * electrons.f @ (psi.conj() * moving).imag
    divergence = np.fft.ifft(1j * electrons.k * np.fft.fft(electrons.current)).real
    assert np.abs(rate).max() > 1e-3
    np.testing.assert_allclose(rate, -divergence, atol=1e-11)


def test_continuity_in_time() -> None:
    """What has flowed through a point is missing there, by Simpson's rule."""
    electrons = ElectronDynamics.of(*chain(6.0), PULSE, time_step=0.1)
    electrons.advance(100)
    density, flow = [electrons.density], [electrons.current]
    for _ in range(2):
        electrons.advance()
        density.append(electrons.density)
        flow.append(electrons.current)
    flowed = (flow[0] + 4 * flow[1] + flow[2]) * 0.1 / 3
    divergence = np.fft.ifft(1j * electrons.k * np.fft.fft(flowed)).real
    change = density[2] - density[0]
    np.testing.assert_allclose(change, -divergence, atol=1e-5 * np.abs(change).max())


def test_the_field_does_the_work() -> None:
    """The energy absorbed is the integral of dA/dt times the current."""
    electrons = ElectronDynamics.of(*chain(1.0), PULSE, time_step=0.1)
    energy, work = electrons.energy, 0.0
    for _ in range(300):
        t = electrons.time
        slope = (PULSE(t + 1e-4) - PULSE(t - 1e-4)) / 2e-4
        work += 0.1 * slope * electrons.current.mean() * electrons.length
        electrons.advance()
    assert electrons.energy - energy > 0.01
    assert abs(electrons.energy - energy - work) < 1e-6


def test_a_constant_vector_potential_is_a_gauge(ground: tuple) -> None:
    """Of 2 pi / L: the orbitals get a phase, and nothing else is seen."""
    step = 2 * np.pi / ground[0].length
    plain = ElectronDynamics.of(*ground, PULSE)
    other = ElectronDynamics.of(*ground, lambda t: PULSE(t) + 3 * step)
    other.waves = np.fft.fft(plain.orbitals * np.exp(-3j * step * plain.r))
    for electrons in (plain, other):
        electrons.advance(60)
    np.testing.assert_allclose(other.density, plain.density, atol=1e-9)
    np.testing.assert_allclose(other.current, plain.current, atol=1e-9)
    assert abs(other.energy - plain.energy) < 1e-9


def test_velocity_and_length_gauge_agree() -> None:
    """One electron in a well, far from the ends: E r does what A(t) does."""
    x, V, _, psi = well(soft_coulomb, 60.0, 256)

    def tilted(t: float) -> np.ndarray:
        slope = (PULSE(t + 1e-5) - PULSE(t - 1e-5)) / 2e-5
        return V - slope * x

    velocity = ElectronDynamics(psi[:1], [1.0], 60.0, V, PULSE, time_step=0.1)
    length = ElectronDynamics(psi[:1], [1.0], 60.0, tilted, time_step=0.1)
    for electrons in (velocity, length):
        electrons.advance(250)
    assert abs(velocity.density @ x) > 1e-2
    np.testing.assert_allclose(length.density, velocity.density, atol=1e-5)
    np.testing.assert_allclose(length.current, velocity.current, atol=1e-5)


def test_a_kicked_harmonic_oscillator_swings() -> None:
    """A coherent state: the ground state, moved to (a / w) sin(w t)."""
    w, a = 0.7, 0.4
    x, V, eps, psi = well(lambda x: 0.5 * w**2 * x**2)
    assert abs(eps[0] - w / 2) < 1e-10
    electrons = ElectronDynamics(psi[:1], [1.0], 40.0, V, Kick(a), time_step=0.05)
    electrons.advance(200)
    shift = a / w * np.sin(w * electrons.time)
    exact = np.sqrt(w / np.pi) * np.exp(-w * (x - shift) ** 2)
    np.testing.assert_allclose(electrons.density, exact, atol=1e-7)
    speed = electrons.current.sum() * 40 / 128
    assert abs(speed - a * np.cos(w * electrons.time)) < 1e-7


def test_an_electron_in_a_soft_coulomb_well_follows_its_levels() -> None:
    """After a push: sum of exp(-i E t) over all levels of the grid."""
    x, V, eps, psi = well(soft_coulomb)
    electrons = ElectronDynamics(psi[:1], [1.0], 40.0, V, time_step=0.05)
    electrons.push(0.5 * np.sin(6 * np.pi * x / 40))
    start = electrons.orbitals[0]
    electrons.advance(400)
    overlap = psi @ start * 40 / 128
    exact = np.abs((overlap * np.exp(-1j * eps * electrons.time)) @ psi) ** 2
    assert np.abs(exact - np.abs(start) ** 2).max() > 5e-3
    np.testing.assert_allclose(electrons.density, exact, atol=1e-6)


@pytest.fixture(scope="module")
def kicked() -> dict[str, tuple]:
    """Weakly kicked and pushed chains: t, current and density wave over amplitude, Casida."""
    found = {}
    for name, width, a, step in (("insulator", 1.0, 2e-4, 0.4), ("metal", 6.0, 1e-4, 0.8)):
        model, solution = chain(width, 2)
        electrons = ElectronDynamics.of(model, solution, Kick(a), time_step=step)
        pushed = ElectronDynamics.of(model, solution, time_step=step)
        wave, before = np.cos(2 * np.pi * pushed.r / model.length), pushed.density
        pushed.push(a * wave)
        J, d = [], []
        for _ in range(round(400 / step)):
            J.append(electrons.current.mean() * model.length / a)
            d.append((pushed.density - before) @ wave * model.length / pushed.n_points / a)
            electrons.advance()
            pushed.advance()
        t = step * np.arange(len(J))
        found[name] = t, np.array(J), np.array(d), casida(model, solution), wave, model, before
    return found


def test_a_weak_kick_rings_as_linear_response_says(kicked: dict) -> None:
    """Current and density, at all times, to a thousandth of their ranges."""
    for t, J, d, excitations, wave, *_ in kicked.values():
        exact = excitations.current(t)
        np.testing.assert_allclose(J, exact, atol=1e-3 * max(np.ptp(exact), exact[0]))
        exact = excitations.density_wave(wave, t)
        np.testing.assert_allclose(d, exact, atol=2e-3 * np.ptp(exact))


def test_absorption_peaks_are_excitation_energies(kicked: dict) -> None:
    t, J, _, excitations, *_ = kicked["insulator"]
    table = lines(t, J, np.arange(0.05, 1.0, 1e-3))
    bright = np.argsort(-excitations.strengths)[:3]
    energies = excitations.energies[bright]
    for energy in energies:
        near = table.iloc[(table.position - energy).abs().argmin()]
        assert abs(near.position / energy - 1) < 1e-3
        assert near.low <= near.position <= near.high
        assert near.high - near.low < 2e-3
    pairs = casida(*chain(1.0), interacting=False)
    assert abs(pairs.energies[0] - chain(1.0)[1].gap) < 1e-9  # no line of its own, all shifted
    assert np.abs(energies[0] / pairs.energies - 1).min() > 1e-2


def test_f_sum_rule(kicked: dict) -> None:
    """To half a percent from the spectrum, to round-off from the strengths."""
    for name, (t, J, _, excitations, _, model, _) in kicked.items():
        omega = np.arange(0, 3.9, 2e-3)
        for window in WINDOWS:
            sigma = conductivity(t, J / model.length, 1.0, omega, window)
            total = np.trapezoid(sigma.real, omega)
            exact = np.pi * model.n_electrons / (2 * model.length)
            assert abs(total / exact - 1) < 5e-3, name
        total = excitations.drude + excitations.strengths.sum()
        assert abs(total - model.n_electrons) < 1e-9


def test_the_plasmon(kicked: dict) -> None:
    """One line of S(q, w), where Casida's equation has it and near that of a free gas."""
    t, _, d, excitations, wave, model, before = kicked["metal"]
    omega = np.arange(0.3, 0.8, 1e-3)
    table = lines(t, d, omega, lambda z: -z.imag)
    energy = excitations.energies[np.argmax(excitations.coupling(wave) ** 2)]
    assert abs(table.position[0] / energy - 1) < 1e-3
    q, n = 2 * np.pi / model.length, model.n_electrons / model.length
    free = np.sqrt(4 * np.pi * n / 10 * q**2 / (q**2 + 1e-4) + (np.pi * n * q) ** 2)
    assert abs(table.position[0] / free - 1) < 0.02
    omega = np.arange(0, 3.9, 2e-3)
    S = structure_factor(t, d, 1.0, model.n_electrons, omega)
    step = model.length / len(before)
    moment = q**2 * step * (before @ (1 - wave**2)) / model.n_electrons
    assert abs(np.trapezoid(omega * S, omega) / moment - 1) < 5e-3


def test_the_loss_function_of_the_metal_peaks_at_the_plasma_frequency(kicked: dict) -> None:
    t, J, *_, model, _ = kicked["metal"]
    omega = np.arange(0.3, 0.8, 1e-3)
    sigma = conductivity(t, J / model.length, 1.0, omega)
    loss = -(1 / dielectric(omega, sigma)).imag
    plasma = np.sqrt(4 * np.pi * model.n_electrons / model.length / 10)
    assert abs(omega[loss.argmax()] / plasma - 1) < 0.01


def test_transform_of_a_cosine() -> None:
    t = np.linspace(0, 500, 2001)
    table = lines(t, np.cos(0.3 * t) + 0.2 * np.cos(0.7 * t), np.arange(0.1, 1, 1e-3))
    np.testing.assert_allclose(table.position[:2], [0.3, 0.7], rtol=1e-3)
    assert abs(transform(t, np.ones(2001), [0.0])[0] - 250) < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GenerationError, match="occupations"):
        ElectronDynamics(np.ones((2, 8)), [1.0], 4.0)
    with pytest.raises(GenerationError, match="time_step is 0"):
        ElectronDynamics(np.ones((1, 8)), [1.0], 4.0, time_step=0)
    with pytest.raises(ShapeError, match="window 'none'"):
        transform([0, 1], [0, 1], [0.0], "none")
