"""The one-dimensional Kohn-Sham model against closed forms, finite differences and symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import fourier_shift
from scipy.special import erfc

from densitykit.chain.kohn_sham import ReducedHartreeFock1D, cutoff_table
from densitykit.chain.plane_waves import PlaneWaves1D
from densitykit.chain.scf import AndersonMixing, entropy, fermi_dirac, occupation_slopes
from densitykit.chain.screening import (
    InverseDielectric,
    gaussian_potential,
    linear_response,
    polarizability,
    solve_screened,
)
from densitykit.errors import GenerationError

SITES = 10.0 * np.arange(8) + 5
WIDTHS = {"insulator": [1.0] * 8, "metal": [6.0] * 8, "mixed": [1.0] * 4 + [6.0] * 4}
#: what most tests need; the default is three times as high where atoms are narrow
CUTOFF = 12.0
GAPS = {"insulator": (0.1363, 5e-5), "metal": (0.0, 1e-6), "mixed": (0.0180, 5e-5)}


def displaced(seed: int, n_atoms: int = 8) -> np.ndarray:
    sites = 10.0 * np.arange(n_atoms) + 5
    return sites + np.random.default_rng(seed).uniform(-3, 3, n_atoms)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- plane waves -------------------------------------------------------------------------------


def quadrature(basis: PlaneWaves1D, potential: np.ndarray) -> np.ndarray:
    """<a|V|b> by summation over a grid, to compare with the matrix from coefficients."""
    waves = basis.orbitals(np.eye(basis.n_basis))
    return waves * potential @ waves.T * basis.length / basis.n_points


def test_hamiltonian_is_the_matrix_of_the_operator() -> None:
    basis = PlaneWaves1D(7.0, 5.0)
    r = np.arange(basis.n_points) * 7.0 / basis.n_points
    kr = 2 * np.pi / 7.0 * r
    V = 0.3 + np.cos(kr) - 0.4 * np.sin(2 * kr) + 0.2 * np.sin(5 * kr + 1)
    n = basis.n_basis // 2
    kinetic = np.diag(0.5 * np.concatenate([[0], basis.k[1 : n + 1], basis.k[1 : n + 1]]) ** 2)
    expected = kinetic + quadrature(basis, V)
    np.testing.assert_allclose(basis.hamiltonian(basis.coefficients(V)), expected, atol=1e-12)


def test_orbitals_are_orthonormal() -> None:
    basis = PlaneWaves1D(7.0, 5.0)
    np.testing.assert_allclose(quadrature(basis, 1.0), np.eye(basis.n_basis), atol=1e-12)


@pytest.mark.parametrize("n_grid", [5, 16, 40])
def test_fields_on_any_number_of_points(n_grid: int) -> None:
    """Also on fewer points than waves: values at points, no truncated series."""
    basis = PlaneWaves1D(5.0, 20.0)
    k = 2 * np.pi / 5.0
    r = 5.0 * np.arange(40) / 40
    field = basis.coefficients(1 + np.cos(k * r) + 0.5 * np.sin(7 * k * r))
    r = 5.0 * np.arange(n_grid) / n_grid
    expected = 1 + np.cos(k * r) + 0.5 * np.sin(7 * k * r)
    np.testing.assert_allclose(basis.on_grid(field, n_grid), expected, atol=1e-12)


def test_integral_of_a_product() -> None:
    basis = PlaneWaves1D(4.0, 20.0)
    x = 2 * np.pi * np.arange(32) / 32
    a, b = basis.coefficients(2 + np.cos(x)), basis.coefficients(3 - 4 * np.cos(x) + np.sin(x))
    np.testing.assert_allclose(basis.integral(a, b), 4.0 * (6 - 2), rtol=1e-12)


def test_few_bands_of_a_large_basis_are_the_lowest() -> None:
    """Above some size another algorithm finds them."""
    basis = PlaneWaves1D(80.0, 40.0)
    V = basis.coefficients(np.cos(2 * np.pi * np.arange(80) / 80))
    few, _ = basis.diagonalise(V, 12)
    every, _ = basis.diagonalise(V, basis.n_basis)
    assert basis.n_basis > 160
    np.testing.assert_allclose(few, every[:12], atol=1e-12)


# --- occupations and mixing --------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 0.3])
def test_occupations_sum_to_the_electrons(temperature: float) -> None:
    eps = np.sort(np.random.default_rng(0).uniform(-1, 1, 30))
    mu, f = fermi_dirac(eps, 12, temperature)
    np.testing.assert_allclose(f.sum(), 12, rtol=1e-12)
    x = np.clip((eps - mu) / temperature, -100, 100)
    np.testing.assert_allclose(f, 1 / (1 + np.exp(x)), atol=1e-12)


def test_chemical_potential_of_an_insulator_is_in_the_middle_of_the_gap() -> None:
    """By symmetry; the electron count alone would not tell at this temperature."""
    mu, _ = fermi_dirac(np.array([-1.0, -1.0, 3.0, 3.0]), 2, 1e-3)
    assert mu == pytest.approx(1.0, abs=1e-12)


def test_degenerate_pair_shares_its_electron() -> None:
    mu, f = fermi_dirac(np.array([0.0, 0.5, 0.5, 1.0]), 2, 1e-4)
    np.testing.assert_allclose(f, [1, 0.5, 0.5, 0], atol=1e-12)
    assert entropy(np.array([0.0, 0.5, 0.5, 1.0]), mu, 1e-4) == pytest.approx(2 * np.log(2))


def test_occupation_slopes() -> None:
    eps, T = np.array([0.1, 0.1 + 1e-9, 0.13, 0.4]), 0.02
    slopes = occupation_slopes(eps, 0.12, T)
    f = 1 / (1 + np.exp((eps - 0.12) / T))
    np.testing.assert_allclose(slopes[0, 2], (f[0] - f[2]) / (eps[0] - eps[2]), rtol=1e-12)
    np.testing.assert_allclose(slopes[0, 1], -f[0] * (1 - f[0]) / T, rtol=1e-6)
    np.testing.assert_allclose(np.diag(slopes), -f * (1 - f) / T, rtol=1e-12)


@pytest.mark.parametrize("dimension", [0, 4])
def test_anderson_mixing_solves_linear_equations(dimension: int) -> None:
    """In four real unknowns four differences span everything: exact; linear mixing is not."""
    A = np.diag([1.0, 0.7, 0.4, 0.1])
    mixing, x = AndersonMixing(dimension, 1.0), np.zeros(2, complex)
    for _ in range(6):
        x = mixing(x, (np.ones(4) - A @ x.view(float)).view(complex))
    error = np.abs(A @ x.view(float) - 1).max()
    assert error < 1e-12 if dimension else 0.1 < error < 1


# --- closed forms ------------------------------------------------------------------------------


def yukawa_of_gaussian(d: np.ndarray, sigma: float, kappa: float) -> np.ndarray:
    """int exp(-kappa|r'|) G(d - r') dr' for a normalised Gaussian G."""
    scale = 0.5 * np.exp(0.5 * (kappa * sigma) ** 2)
    sides = (
        np.exp(s * kappa * d) * erfc((kappa * sigma + s * d / sigma) / np.sqrt(2)) for s in (1, -1)
    )
    return scale * sum(sides)


def test_potential_of_a_bare_nucleus() -> None:
    """Real space, with all periodic images: sign and size of the kernel."""
    model = ReducedHartreeFock1D([31.7], 2.5, 2.0, kappa=0.05, eps0=7.0)
    images = model.r[:, None] - 31.7 - 80.0 * np.arange(-12, 13)
    expected = -2.0 * 2 * np.pi / (0.05 * 7.0) * yukawa_of_gaussian(images, 2.5, 0.05).sum(axis=1)
    potential = model.basis.on_grid(model.ionic_potential(), model.n_grid)
    np.testing.assert_allclose(potential, expected, rtol=1e-12)


def test_uniform_background_gives_free_electrons() -> None:
    """Nuclei as wide as the ring cancel the electrons: levels k^2/2, density N/L, no force."""
    solution = ReducedHartreeFock1D(SITES, 500.0, cutoff=3.0).solve()
    k = 2 * np.pi / 80.0 * np.array([0, *np.repeat(np.arange(1, 9), 2)])
    np.testing.assert_allclose(solution.eigenvalues[:17], 0.5 * k**2, atol=1e-12)
    np.testing.assert_allclose(solution.density, 16 / 80.0, rtol=1e-12)
    np.testing.assert_allclose(solution.forces, 0, atol=1e-12)
    assert solution.energy == pytest.approx(0.5 * np.sum(k[:16] ** 2) - 1e-3 * 2 * np.log(2))


def test_harmonic_oscillator() -> None:
    """An external parabola that dwarfs all else: levels at (n + 1/2) omega above the bottom."""
    model = ReducedHartreeFock1D([40.0], 300.0, 1.0, eps0=1e9, cutoff=12.0, n_grid=400)
    parabola = 0.5 * 0.2**2 * np.minimum((model.r - 40) ** 2, 30.0**2)
    solution = model.solve(external=parabola)
    np.testing.assert_allclose(solution.eigenvalues[:6], 0.2 * (np.arange(6) + 0.5), rtol=1e-5)


# --- the three systems -------------------------------------------------------------------------


@pytest.mark.parametrize("system", WIDTHS)
def test_gap_of_the_paper(system: str) -> None:
    """Appendix A of the paper: 0.136, 5.5e-8, 0.018."""
    solution = ReducedHartreeFock1D(SITES, WIDTHS[system]).solve()
    value, tolerance = GAPS[system]
    assert solution.gap == pytest.approx(value, abs=tolerance)
    assert len(solution.eigenvalues) == 26
    occupied = solution.occupations[:15]
    assert occupied.min() > 0.999 and solution.occupations[17:].max() < 1e-4


@pytest.mark.parametrize("system", WIDTHS)
def test_every_displaced_chain_converges(system: str) -> None:
    model = ReducedHartreeFock1D(SITES, WIDTHS[system], cutoff=CUTOFF)
    for seed in range(20):
        solution = model.at(displaced(seed)).solve()
        assert solution.residual <= 1e-10 and solution.iterations <= 60
        assert solution.density.min() > 0
        assert solution.density.sum() * 0.5 == pytest.approx(16, rel=1e-12)
        assert solution.residual == solution.history[-1]
        assert len(solution.history) == solution.iterations


@pytest.mark.parametrize("system", WIDTHS)
def test_forces_are_the_derivative_of_the_free_energy(system: str) -> None:
    charges = [2, 1, 3, 2, 2, 2, 1, 3]
    model = ReducedHartreeFock1D(displaced(3), WIDTHS[system], charges, cutoff=CUTOFF)
    here, h = model.solve(), 2e-3
    for atom in (0, 5):
        energies = []
        for step in (-2, -1, 1, 2):
            R = model.positions.copy()
            R[atom] += step * h
            energies.append(model.at(R).solve(here.V_k).energy)
        slope = np.dot([1, -8, 8, -1], energies) / (12 * h)  # fourth order
        assert here.forces[atom] == pytest.approx(-slope, abs=1e-8)
    assert abs(here.forces.sum()) < 1e-8
    assert np.abs(here.forces).max() > 1e-3


@pytest.mark.parametrize("system", WIDTHS)
def test_energy_is_stationary(system: str) -> None:
    """Stopped early at residual e, the energy is too high by the order of e squared."""
    options = {"widths": WIDTHS[system], "cutoff": CUTOFF}
    exact = ReducedHartreeFock1D(displaced(1), **options).solve()
    for tolerance in (1e-2, 1e-4, 1e-5):
        rough = ReducedHartreeFock1D(displaced(1), **options, tolerance=tolerance).solve()
        error = rough.energy - exact.energy
        assert -1e-12 < error < 1e-12 + 300 * rough.residual**2
    assert rough.residual > 1e-7


@pytest.mark.parametrize("system", WIDTHS)
def test_entropy_is_the_derivative_of_the_free_energy(system: str) -> None:
    """dA/dT = -S with the atoms at rest: energy, entropy and occupations belong together."""
    T, h = 2e-3, 2e-5
    options = {"widths": WIDTHS[system], "cutoff": CUTOFF}
    low, middle, high = (
        ReducedHartreeFock1D(displaced(2), temperature=t, **options).solve()
        for t in (T - h, T, T + h)
    )
    slope = (high.energy - low.energy) / (2 * h)
    assert slope == pytest.approx(middle.entropy_term / T, rel=1e-4, abs=1e-6)


# --- symmetries --------------------------------------------------------------------------------


@pytest.mark.parametrize("system", WIDTHS)
@pytest.mark.parametrize("shift", [0.5, 3.7137, -11.03])
def test_translation(system: str, shift: float) -> None:
    """No grid enters: the shift need not be a multiple of anything. Bounded by the tolerance."""
    model = ReducedHartreeFock1D(displaced(5), WIDTHS[system], n_grid=480, cutoff=CUTOFF)
    here, there = model.solve(), model.at(model.positions + shift).solve()
    assert there.energy == pytest.approx(here.energy, abs=1e-12)
    np.testing.assert_allclose(there.forces, here.forces, atol=1e-10)
    steps = shift / 80.0 * len(here.density)
    moved = np.fft.ifft(fourier_shift(np.fft.fft(here.density), steps)).real
    assert relative(there.density, moved) < 1e-10


@pytest.mark.parametrize("system", WIDTHS)
def test_permutation_and_images(system: str) -> None:
    """Neither the order of the atoms matters nor the cell that they are given in."""
    R, widths, order = (
        displaced(6),
        np.array(WIDTHS[system]),
        np.random.default_rng(0).permutation(8),
    )
    a = ReducedHartreeFock1D(R, widths, cutoff=CUTOFF).solve()
    b = ReducedHartreeFock1D(
        R[order] + 80.0 * np.arange(-4, 4), widths[order], cutoff=CUTOFF
    ).solve()
    assert relative(b.density, a.density) < 1e-10
    np.testing.assert_allclose(b.forces, a.forces[order], atol=1e-10)


@pytest.mark.parametrize("system", WIDTHS)
def test_reflection(system: str) -> None:
    model = ReducedHartreeFock1D(displaced(7), WIDTHS[system], cutoff=CUTOFF)
    here, there = model.solve(), model.at(-model.positions).solve()
    assert relative(np.roll(there.density[::-1], 1), here.density) < 1e-10
    np.testing.assert_allclose(there.forces, -here.forces, atol=1e-10)


@pytest.mark.parametrize("system", ["insulator", "metal"])
def test_repeating_the_cell_repeats_the_density(system: str) -> None:
    """Twice the ring is k = 0 and k = pi/L of the single one: equal for an insulator only."""
    R, widths = displaced(8), WIDTHS[system]
    one = ReducedHartreeFock1D(R, widths, cutoff=4.0).solve()
    two = ReducedHartreeFock1D([*R, *(R + 80)], widths * 2, 2.0, 160.0, n_grid=320, cutoff=4.0)
    density = two.solve().density
    assert relative(density[160:], density[:160]) < 1e-9
    assert relative(density[:160], one.density) < (0.02 if system == "insulator" else 0.2)


# --- convergence with the basis ----------------------------------------------------------------


@pytest.mark.parametrize("system", WIDTHS)
def test_doubling_the_grid(system: str) -> None:
    """Twice the points and four times the cutoff (twice the waves) change nothing."""
    R, widths = displaced(9), WIDTHS[system]
    model = ReducedHartreeFock1D(R, widths)
    fine = ReducedHartreeFock1D(R, widths, n_grid=320, cutoff=2.5 * model.basis.cutoff)
    here, there = model.solve(), fine.solve()
    assert relative(here.density, there.density[::2]) < 1e-8
    assert here.energy == pytest.approx(there.energy, abs=1e-12)


def test_cutoff_table() -> None:
    rows = cutoff_table(displaced(9), 3.0, [2.0, 4.0, 8.0, 24.0])
    errors = np.array([row["density error"] for row in rows])
    assert [row["cutoff"] for row in rows] == [2.0, 4.0, 8.0]
    assert (errors[1:] < errors[:-1] / 5).all() and errors[-1] < 1e-6
    assert rows[-1]["energy error"] < 1e-10 and rows[-1]["force error"] < 1e-7


def test_long_chain() -> None:
    """32 atoms, also without the help of the inverse dielectric matrix."""
    for widths, cutoff in (([6.0] * 32, 3.0), ([1.0] * 8 + [6.0] * 24, 3.0)):
        R = displaced(0, 32)
        model = ReducedHartreeFock1D(R, widths, 2.0, 320.0, n_grid=640, cutoff=cutoff)
        plain, screened = model.solve(), solve_screened(model)
        assert max(plain.residual, screened.residual) <= 1e-10
        assert relative(screened.density, plain.density) < 1e-9
        assert plain.density.sum() * 0.5 == pytest.approx(64, rel=1e-12)


# --- what makes it converge --------------------------------------------------------------------


def test_preconditioner_and_mixing_matter() -> None:
    options = {"tolerance": 1e-8, "max_iterations": 80}
    model = ReducedHartreeFock1D(displaced(0), 6.0, **options)
    assert model.solve().iterations < 20
    for worse in ({"kerker": None, "mixing_dimension": 0}, {"mixing_dimension": 0}):
        slow = ReducedHartreeFock1D(displaced(0), 6.0, **options, **worse)
        with pytest.raises(
            GenerationError, match=r"did not converge: residual .*; raise"
        ) as error:
            slow.solve()
        assert len(error.value.history) == 80 and error.value.history[-1] > 1e-8
    kerker = ReducedHartreeFock1D(displaced(0), 6.0, **options, kerker=None).solve()
    assert kerker.iterations > 40


def test_starting_from_the_solution_takes_one_iteration() -> None:
    model = ReducedHartreeFock1D(displaced(0), WIDTHS["mixed"], cutoff=CUTOFF)
    first = model.solve()
    assert model.solve(first.V_k).iterations == 1
    assert model.solve(first.potential).iterations < first.iterations  # 160 points lose waves


# --- response ----------------------------------------------------------------------------------


@pytest.mark.parametrize("system", WIDTHS)
def test_linear_response_against_finite_differences(system: str) -> None:
    """Without screening by one diagonalisation, with it by two self-consistent solutions."""
    options = {"temperature": 3e-3, "tolerance": 1e-12, "cutoff": 8.0}
    model = ReducedHartreeFock1D(displaced(4), WIDTHS[system], **options)
    solution, h = model.solve(), 2e-5
    dV = gaussian_potential(model.r, 80.0)
    bare, screened = linear_response(model, solution, dV)
    densities = []
    for sign in (1, -1):
        V = solution.V_k + sign * h * model.basis.coefficients(dV)
        eps, C = model.basis.diagonalise(V, model.n_bands)
        rho = model.basis.density(C, fermi_dirac(eps, 16, 3e-3)[1])
        densities.append(model.basis.on_grid(rho, 160))
    assert relative((densities[0] - densities[1]) / (2 * h), bare) < 1e-4
    plus, minus = (model.solve(solution.V_k, external=s * h * dV).density for s in (1, -1))
    assert relative((plus - minus) / (2 * h), screened) < 1e-4
    for induced in (bare, screened):  # no electron is lost
        assert abs(induced.sum()) < 1e-9 * np.abs(induced).sum()


def test_metal_screens() -> None:
    """Figure 1: the screened response is a small fraction of the bare one, and shorter."""
    model = ReducedHartreeFock1D(SITES, 6.0)
    bare, screened = linear_response(model, model.solve(), gaussian_potential(model.r, 80.0))
    assert np.abs(screened).max() < 0.2 * np.abs(bare).max()
    far = np.abs(model.r - 40) > 20
    shares = [np.abs(f[far]).sum() / np.abs(f).sum() for f in (screened, bare)]
    assert shares[0] < 0.5 * shares[1]


def test_polarizability_is_symmetric_and_negative() -> None:
    model = ReducedHartreeFock1D(displaced(4), WIDTHS["mixed"], cutoff=6.0)
    chi0 = polarizability(model, model.solve().V_k)
    np.testing.assert_allclose(chi0, chi0.T, atol=1e-12)
    assert np.linalg.eigvalsh(chi0).max() < 1e-12
    np.testing.assert_allclose(chi0[0], 0, atol=1e-10)  # a constant potential moves nothing


def test_inverse_dielectric_saves_iterations() -> None:
    model = ReducedHartreeFock1D(displaced(4), WIDTHS["insulator"], cutoff=CUTOFF)
    here = model.solve()
    near = model.at(model.positions + np.random.default_rng(0).uniform(-0.05, 0.05, 8))
    plain = near.solve(here.V_k)
    quick = near.solve(here.V_k, precondition=InverseDielectric(model, here.V_k, 3.0))
    assert 2 * quick.iterations < plain.iterations
    assert relative(quick.density, plain.density) < 1e-9


# --- bad input ---------------------------------------------------------------------------------

BAD = {
    "positions": ({"positions": [1.0, np.nan]}, "positions is not finite"),
    "shape": ({"positions": [[1.0, 2.0]]}, "positions is"),
    "widths": ({"widths": [1.0, -1.0]}, "widths is -1.0; give positive"),
    "zero width": ({"widths": 0.0}, "widths is 0.0; give positive"),
    "lengths": ({"widths": [1.0, 1.0, 1.0]}, r"widths is of shape \(3,\); give"),
    "charges": ({"charges": [2.0, 1.0, 1.0]}, r"charges is of shape \(3,\)"),
    "electrons": ({"charges": [1.0, 0.5]}, "charges is 1.5; their sum"),
    "length": ({"length": -80.0}, "length is -80.0; give a positive"),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0"),
    "cutoff": ({"cutoff": 1e-5}, "cutoff is 1e-05; give more than"),
    "cutoff nan": ({"cutoff": np.nan}, "cutoff is nan"),
    "bands": ({"n_bands": 4}, "n_bands is 4 of .*; give more than 4"),
    "too few functions": ({"cutoff": 0.01}, "n_bands is .*cutoff"),
    "iterations": ({"max_iterations": 0}, "max_iterations is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    arguments, message = BAD[case]
    good = {"positions": [20.0, 60.0], "widths": 2.0, "charges": 2.0}
    with pytest.raises(GenerationError, match=message):
        ReducedHartreeFock1D(**(good | arguments))


def test_bad_moves_and_starts_are_named() -> None:
    model = ReducedHartreeFock1D([20.0, 60.0], 2.0)
    with pytest.raises(GenerationError, match=r"positions is \(3,\); give shape \(2,\)"):
        model.at([1.0, 2.0, 3.0])
    with pytest.raises(GenerationError, match="field is not finite"):
        model.solve(np.full(160, np.nan))
    with pytest.raises(GenerationError, match="field is"):
        model.solve(np.zeros((2, 160)))
    with pytest.raises(GenerationError, match="n_waves is 0"):
        polarizability(model, model.pseudo_charge(), 0)


def test_electrons_in_the_highest_band_are_refused() -> None:
    with pytest.raises(GenerationError, match="highest of n_bands .*raise n_bands"):
        ReducedHartreeFock1D([20.0, 60.0], 2.0, n_bands=5, temperature=0.05).solve()
