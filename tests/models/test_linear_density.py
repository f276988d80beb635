"""The linear map from atoms to density: its symmetries, its reach, a fit that must be exact."""

from __future__ import annotations

import ase
import numpy as np
import pytest
import torch
import xarray as xr

from densitykit.errors import ShapeError, WindowError
from densitykit.models.deep_density.basis import GaussianBasis, coupling, spherical_harmonics
from densitykit.models.deep_density.linear import Atoms, LinearDensity
from densitykit.models.deep_density.predict import predict
from densitykit.training.linear import atoms_of, fit_linear_density

BASES = {z: dict(counts=(3, 3, 2), start=0.6, ratio=2.0, radius=3.0) for z in ("1", "8")}
SURROUNDINGS = dict(cutoff=3.5, n=4, l_max=2, channels=2, products=6)
RECIPE = {"bases": BASES, "surroundings": SURROUNDINGS}
GRID, EDGE = (12, 12, 12), 6.0


def configurations(count: int, seed: int = 0) -> list[Atoms]:
    rng = np.random.default_rng(seed)
    start = np.array([[1.0, 1, 1], [2.2, 1.2, 0.9], [0.8, 2.3, 1.4], [4.2, 4.4, 4.0]])
    numbers = np.array([8, 1, 1, 8])
    return [
        Atoms(start + rng.normal(0, 0.15, start.shape), numbers, EDGE * np.eye(3))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> LinearDensity:
    """A map with features of made-up atoms and random weights."""
    from densitykit.training.linear import _fit_features

    result = LinearDensity(BASES, SURROUNDINGS)
    _fit_features(result, configurations(12))
    blocks = result.blocks(configurations(1)[0])
    count = sum(n * k for n, k in (b.shape for b in blocks))
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)).double()
    result.set_weights(weights, blocks)
    return result


def test_coupled_harmonics_turn_with_the_vectors() -> None:
    """|sum C Y1 Y2|^2 does not depend on the orientation of a pair of vectors."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    for l1, l2, l in ((1, 1, 0), (1, 1, 2), (2, 1, 3), (2, 2, 4), (3, 2, 1)):
        norms = []
        for matrix in (np.eye(3), turn):
            y1, y2 = (
                spherical_harmonics(k, (matrix @ v)[None])[0, k * k :]
                for k, v in ((l1, a), (l2, b))
            )
            norms.append(np.square(np.einsum("abc,a,b->c", coupling(l1, l2, l), y1, y2)).sum())
        assert norms[0] == pytest.approx(norms[1], rel=1e-10)


def test_functions_are_orthonormal_and_neutral_ones_have_no_moments() -> None:
    wide = GaussianBasis((4, 3), 0.5, 1.8, radius=40.0)
    x = np.linspace(-8, 8, 81)
    points = np.stack(np.meshgrid(x, x, x, indexing="ij"), axis=-1).reshape(-1, 3)
    values = wide.values(points)
    overlap = values.T @ values * (x[1] - x[0]) ** 3
    np.testing.assert_allclose(
        overlap, np.eye(wide.size), atol=0.05
    )  # the envelope is not quite 1
    neutral = GaussianBasis((4, 3), 0.5, 1.8, radius=4.0, neutral=True)
    assert neutral.counts == (3, 2)
    values = neutral.values(points) * (x[1] - x[0]) ** 3
    scale = abs(values).sum(axis=0).max()
    assert abs(values[:, :3].sum(axis=0)).max() < 1e-3 * scale
    assert abs(points.T @ values[:, 3:]).max() < 1e-3 * abs(points * 1.0).max() * scale


@pytest.mark.parametrize("counts", [(4, 3, 2), (5,)])
def test_density_is_the_sum_of_the_functions(counts: tuple[int, ...]) -> None:
    basis = GaussianBasis(counts, 0.5, 1.8, radius=4.0)
    rng = np.random.default_rng(0)
    points, c = rng.normal(size=(50, 3)), rng.normal(size=basis.size)
    sums = basis.density(points, basis.contract(c[None]))
    np.testing.assert_allclose(sums[0], basis.values(points) @ c, rtol=1e-10)


def test_it_turns_shifts_and_permutes_with_the_atoms(model: LinearDensity) -> None:
    atoms = configurations(1, seed=5)[0]
    rho = model.density(atoms, GRID)
    size = abs(rho).max()
    order = np.array([3, 2, 1, 0])
    swapped = Atoms(atoms.positions[order], atoms.numbers[order], atoms.cell)
    np.testing.assert_allclose(model.density(swapped, GRID), rho, atol=1e-10 * size)
    step = EDGE / GRID[0]
    shifted = Atoms(atoms.positions + [3 * step, 0, -2 * step], atoms.numbers, atoms.cell)
    expected = np.roll(rho, (3, 0, -2), (0, 1, 2))
    np.testing.assert_allclose(model.density(shifted, GRID), expected, atol=1e-9 * size)
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])  # x -> y, y -> -x
    turned = Atoms(atoms.positions @ turn.T, atoms.numbers, atoms.cell)
    expected = np.roll(np.flip(rho.transpose(1, 0, 2), 0), 1, 0)
    np.testing.assert_allclose(model.density(turned, GRID), expected, atol=1e-9 * size)


def test_far_atoms_do_not_matter(model: LinearDensity) -> None:
    """Two copies far apart have twice the density of one: finite reach, any cell."""
    one = configurations(1, seed=3)[0]
    big = np.diag([2 * EDGE, EDGE, EDGE])
    two = Atoms(
        np.concatenate([one.positions, one.positions + [EDGE, 0, 0]]), np.tile(one.numbers, 2), big
    )
    double = model.density(two, (24, 12, 12))
    single = model.density(one, GRID)
    np.testing.assert_allclose(double[:12], single, atol=1e-9 * abs(single).max())
    np.testing.assert_allclose(double[12:], single, atol=1e-9 * abs(single).max())


def run_of(model: LinearDensity, count: int, seed: int, **variables: object) -> xr.Dataset:
    """Configurations with the densities that a map gives them."""
    frames = configurations(count, seed)
    rho = np.stack([model.density(a, GRID) for a in frames])
    return xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), rho),
            "positions": (("time", "atom", "cartesian"), [a.positions for a in frames]),
            "numbers": ("atom", frames[0].numbers),
            "cell": (("vector", "cartesian"), frames[0].cell),
            **variables,
        }
    )


def test_a_fit_finds_the_map_that_made_the_data(model: LinearDensity) -> None:
    train, held_out = run_of(model, 12, 0), run_of(model, 3, 1)
    options = {"points": 1500, "ridges": (1e-6, 1e-10), "progress": False}
    fitted, card, rows = fit_linear_density([train], [held_out], RECIPE, **options)
    assert rows[-1]["validation_l1"] < 1e-3
    assert rows[-1]["validation_l1"] == min(row["validation_l1"] for row in rows)
    assert rows[-1]["validation_l1"] < rows[0]["validation_l1"]
    again = LinearDensity(**card)
    again.load_state_dict(fitted.state_dict())
    atoms = configurations(1, seed=9)[0]
    np.testing.assert_array_equal(again.density(atoms, GRID), fitted.density(atoms, GRID))


def test_an_unknown_species_is_refused(model: LinearDensity) -> None:
    atoms = configurations(1)[0]
    strange = Atoms(atoms.positions, np.array([8, 1, 1, 16]), atoms.cell)
    with pytest.raises(WindowError, match=r"\[16\].*\[1, 8\]"):
        model.density(strange, GRID)


FREE = {z: dict(counts=(4,), start=0.2, ratio=2.0, radius=5.0) for z in ("1", "8")}
CHARGES = {1: 1.0, 8: 6.0}


@pytest.fixture(scope="module")
def neutral() -> tuple[LinearDensity, xr.Dataset]:
    """A map with free atoms, fitted to Gaussian clouds that the surroundings polarise."""
    frames = configurations(14)
    valence = np.array([CHARGES[z] for z in frames[0].numbers.tolist()])
    run = xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), np.stack([clouds(a, valence) for a in frames])),
            "positions": (("time", "atom", "cartesian"), [a.positions for a in frames]),
            "numbers": ("atom", frames[0].numbers),
            "cell": (("vector", "cartesian"), frames[0].cell),
            "valence_charge": ("atom", valence),
        }
    )
    bases = {z: {**b, "neutral": True} for z, b in BASES.items()}
    recipe = {"bases": bases, "surroundings": SURROUNDINGS, "free": FREE}
    train, held_out = run.isel(time=slice(0, 11)), run.isel(time=slice(11, 14))
    options = {"points": 1500, "ridges": (1e-5, 1e-7), "members": 3, "progress": False}
    return fit_linear_density([train], [held_out], recipe, **options)[0], held_out


def clouds(atoms: Atoms, valence: np.ndarray) -> np.ndarray:
    """A Gaussian for each atom, moved a little towards its neighbours; sums to the valence."""
    x = np.arange(GRID[0]) * EDGE / GRID[0]
    points = np.stack(np.meshgrid(x, x, x, indexing="ij"), axis=-1)
    total = np.zeros(GRID)
    for i, charge in enumerate(valence):
        away = atoms.positions - atoms.positions[i]
        away -= EDGE * np.round(away / EDGE)
        pull = (away * np.exp(-(away**2).sum(axis=1))[:, None]).sum(axis=0)
        d = points - atoms.positions[i] - 0.2 * pull
        d -= EDGE * np.round(d / EDGE)
        cloud = np.exp(-1.2 * (d**2).sum(axis=-1))
        total += charge * cloud / (cloud.sum() * (EDGE / GRID[0]) ** 3)
    return total


def test_free_atoms_hold_all_electrons_and_the_rest_is_neutral(
    neutral: tuple[LinearDensity, xr.Dataset],
) -> None:
    model, _ = neutral
    for z, charge in CHARGES.items():
        weight = getattr(model, f"weight_{z}_free")[:, 0].numpy()
        assert model.free[z].electrons(weight) == pytest.approx(charge, rel=1e-3)
    own = model.coefficients(configurations(1, seed=8)[0])[0]
    basis, c = next((b, c) for b, c in own if b is model.bases[8])
    assert abs(basis.electrons(c)) < 1e-6


def test_a_prediction_has_the_electrons_of_its_atoms(
    neutral: tuple[LinearDensity, xr.Dataset],
) -> None:
    model, _ = neutral
    atoms = configurations(1, seed=8)[0]
    volume = abs(np.linalg.det(atoms.cell))
    assert model.density(atoms, GRID).mean() * volume == pytest.approx(14, rel=1e-12)
    alone = Atoms(atoms.positions, atoms.numbers, 20 * np.eye(3), periodic=False)
    shifted = Atoms(alone.positions + 8, alone.numbers, alone.cell, periodic=False)
    grid = (70, 70, 70)
    assert model.density(shifted, grid).mean() * 20**3 == pytest.approx(14, rel=1e-3)


def test_a_floor_makes_densities_positive(
    neutral: tuple[LinearDensity, xr.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All electrons stay, and what is far above the floor stays as it is."""
    model, run = neutral
    atoms = atoms_of(run, 0)
    wide = Atoms(atoms.positions, atoms.numbers, 1.6 * atoms.cell)
    raw = model.density(wide, GRID)
    assert raw.min() < 0
    monkeypatch.setattr(model, "floor", 0.01 * raw.max())
    rho = model.density(wide, GRID)
    assert rho.min() > 0
    assert rho.mean() == pytest.approx(raw.mean(), rel=1e-12)
    high = raw > 0.2 * raw.max()
    ratio = rho[high] / raw[high]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-6)


def test_members_estimate_the_error(neutral: tuple[LinearDensity, xr.Dataset]) -> None:
    """On configurations not seen; and the map is less sure where species have changed places."""
    model, _ = neutral
    frames = configurations(6, seed=4)
    valence = np.array([CHARGES[z] for z in frames[0].numbers.tolist()])
    error = sum(abs(model.density(a, GRID) - clouds(a, valence)).sum() for a in frames)
    sigma = sum(model.uncertainty(a, GRID).sum() for a in frames)
    assert 0.4 < error / (np.sqrt(2 / np.pi) * sigma) < 2.5
    strange = Atoms(frames[0].positions, 9 - frames[0].numbers, frames[0].cell)
    assert model.uncertainty(strange, GRID).sum() > 2 * sigma / len(frames)


def test_prediction_of_a_structure_says_what_it_has_not_seen(
    neutral: tuple[LinearDensity, xr.Dataset],
) -> None:
    model, _ = neutral
    a = configurations(1, seed=8)[0]
    structure = ase.Atoms(a.numbers, a.positions, cell=a.cell, pbc=True)
    seen = predict(model, structure, grid=GRID, uncertainty=True)
    assert "warning" not in seen.attrs
    assert seen.attrs["expected_l1"] == pytest.approx(model.expected, rel=1.0)
    assert (seen["uncertainty"] >= 0).all()
    structure.positions[1] = structure.positions[0] + [0.4, 0, 0]
    close = predict(model, structure, grid=GRID)
    assert "1-8 come within 0.40" in close.attrs["warning"]
    structure.pbc = (True, True, False)
    with pytest.raises(ShapeError, match="some axes only"):
        predict(model, structure)


def test_superposition_is_a_map_of_free_atoms_alone(
    neutral: tuple[LinearDensity, xr.Dataset],
) -> None:
    _, run = neutral
    options = {"points": 1500, "ridges": (1e-9,), "members": 2, "progress": False}
    recipe = {"bases": {}, "surroundings": SURROUNDINGS, "free": FREE}
    model, card, _ = fit_linear_density([run], [run], recipe, **options)
    assert {name.partition("_")[2] for name in model.state_dict()} == {"1_free", "8_free"}
    atoms = configurations(1, seed=8)[0]
    rho = model.density(atoms, GRID)
    again = LinearDensity(**card)
    again.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(again.density(atoms, GRID), rho)
