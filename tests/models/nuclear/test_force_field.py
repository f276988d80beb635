"""Forces against the written-out sum, their symmetries, and a fit with a known answer."""

from __future__ import annotations

import copy
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
import torch
import xarray as xr
from made_up import made_up_run
from numpy.polynomial.chebyshev import chebval

from densitykit.errors import ShapeError, TrajectoryError
from densitykit.models.nuclear.force_field import (
    LinearForceField,
    fit_force_field,
    species_in,
)

CUBE = torch.diag(torch.full((3,), 6.0, dtype=torch.float64))
SKEW = torch.tensor([[6.0, 0.0, 0.0], [1.5, 5.5, 0.0], [-1.0, 0.8, 6.5]]).double()
SMALL = {"cutoff": 4.5, "radial": 3, "degree": 2, "pair": 5}
CELLS = pytest.mark.parametrize("cell", [CUBE, SKEW], ids=["cubic", "triclinic"])


def force_field(cutoff: float = 7.0, seed: int = 0, **arguments) -> LinearForceField:
    """One with random coefficients."""
    field = LinearForceField(cutoff, **{"radial": 3, "degree": 3, "pair": 5} | arguments)
    generator = torch.Generator().manual_seed(seed)
    field.coefficients.normal_(generator=generator)
    return field


def nuclei(cell: torch.Tensor = CUBE, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Five of the eight corners of half the cell, displaced: (batch, 5, 3)."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor(list(product((0.0, 0.5), repeat=3)))[:5].double()
    jitter = torch.rand(batch, 5, 3, generator=generator, dtype=torch.float64) - 0.5
    return (corners + 0.2 * jitter) @ cell


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Equal to so many parts of the largest value, which is not zero."""
    size = float(expected.detach().abs().max())
    assert size > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)


# --- energy and its gradient -----------------------------------------------------------------


@CELLS
def test_energy_is_the_sum_over_pairs_and_angles(cell) -> None:
    """Every triplet by hand, images included: the power spectrum is a sum over (u . v)**l."""
    field = force_field(5.0, radial=2, degree=2, pair=3)
    x, c = nuclei(cell)[0].numpy(), field.coefficients.numpy()
    images = np.array(list(product((-2, -1, 0, 1, 2), repeat=3))) @ cell.numpy()
    energy = 0.0
    for i in range(len(x)):
        v = (x[None] - x[i] + images[:, None]).reshape(-1, 3)
        r = np.linalg.norm(v, axis=1)
        v, r = v[(r > 1e-6) & (r < 5.0)], r[(r > 1e-6) & (r < 5.0)]
        scaled = 2 * (r - field.closest) / (5.0 - field.closest) - 1
        cut = np.cos(np.pi * r / 10.0) ** 4
        g = [chebval(scaled, row) * cut for row in np.eye(3)]
        energy += sum(c[p] * g[p].sum() for p in range(3))
        cosine = (v @ v.T) / np.outer(r, r)
        angular = product(range(3), combinations_with_replacement(range(2), 2))
        for k, (l, (n, m)) in enumerate(angular):
            energy += c[3 + k] * g[n] @ cosine**l @ g[m]
    assert field.energy(nuclei(cell), cell).item() == pytest.approx(energy, rel=1e-11)


@CELLS
def test_forces_are_the_gradient(cell) -> None:
    field, x = force_field(), nuclei(cell, batch=2).requires_grad_()
    (gradient,) = torch.autograd.grad(field.energy(x, cell).sum(), x)
    same(field.forces(x.detach(), cell), -gradient)


def test_forces_are_the_differences_of_energy() -> None:
    field, x, h = force_field(), nuclei(SKEW), 1e-3
    steps = h * torch.eye(15, dtype=torch.float64).reshape(15, 5, 3)
    difference = field.energy(x + steps, SKEW) - field.energy(x - steps, SKEW)
    same(field.forces(x, SKEW), -difference.reshape(1, 5, 3) / (2 * h), 2e-5)


def test_single_precision_tells_the_same() -> None:
    field, x = force_field(), nuclei(SKEW, batch=3)
    forces, energy = field.forces(x, SKEW), field.energy(x, SKEW)
    single = copy.deepcopy(field).float()
    for found, expected in ((single.forces(x, SKEW), forces), (single.energy(x, SKEW), energy)):
        assert found.dtype == torch.float64  # as the nuclei that it moves
        same(found, expected, 1e-5 * expected.abs().max().item())
        assert not torch.equal(found, expected)


@pytest.mark.parametrize("degree", [0, 1, 4])
def test_forces_of_any_degree_are_the_gradient(degree) -> None:
    field, x = force_field(4.0, radial=1, degree=degree, pair=1), nuclei().requires_grad_()
    (gradient,) = torch.autograd.grad(field.energy(x, CUBE).sum(), x)
    same(field.forces(x.detach(), CUBE), -gradient)


def test_energy_is_smooth_where_a_pair_parts() -> None:
    """It ends as the fourth power of the distance to the cutoff, the force as the third."""
    field, cell = force_field(5.0), 20.0 * torch.eye(3, dtype=torch.float64)
    gap = torch.tensor([2e-3, 1e-3, -1e-3]).double()
    x = torch.zeros(3, 2, 3).double()
    x[:, 1, 0] = 5.0 - gap
    energy, force = field.energy(x, cell), field.forces(x, cell)[:, 1, 0]
    assert (energy[0] / energy[1]).item() == pytest.approx(16, rel=0.05)
    assert (force[0] / force[1]).item() == pytest.approx(8, rel=0.05)
    assert energy[2] == 0 and force[2] == 0 and energy[0].abs() < 1e-10


# --- symmetries ------------------------------------------------------------------------------


def turned(seed: int) -> torch.Tensor:
    """A random orthogonal matrix; every other one is improper."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix)[0] * (-1) ** seed


@CELLS
def test_translation_changes_nothing(cell) -> None:
    field, x = force_field(), nuclei(cell)
    moved = x + torch.tensor([1.234, -7.7, 0.5]).double()
    same(field.energy(moved, cell), field.energy(x, cell))
    same(field.forces(moved, cell), field.forces(x, cell))


def test_permutation_permutes_the_forces() -> None:
    field, x, order = force_field(), nuclei(), [3, 0, 4, 2, 1]
    same(field.energy(x[:, order], CUBE), field.energy(x, CUBE))
    same(field.forces(x[:, order], CUBE), field.forces(x, CUBE)[:, order])


@pytest.mark.parametrize("axes", [(1, 2, 0), (1, 0, 2)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
def test_a_symmetry_of_the_cube_turns_the_forces(axes, signs) -> None:
    """The cell stays as it is."""
    field, x = force_field(), nuclei()
    matrix = torch.eye(3).double()[list(axes)] * torch.tensor(signs).double()
    same(field.energy(x @ matrix, CUBE), field.energy(x, CUBE))
    same(field.forces(x @ matrix, CUBE), field.forces(x, CUBE) @ matrix)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_rotation_of_all_turns_the_forces(seed) -> None:
    field, x, matrix = force_field(), nuclei(SKEW), turned(seed)
    same(field.energy(x @ matrix, SKEW @ matrix), field.energy(x, SKEW))
    same(field.forces(x @ matrix, SKEW @ matrix), field.forces(x, SKEW) @ matrix)


@CELLS
def test_no_net_force(cell) -> None:
    forces = force_field().forces(nuclei(cell, batch=2), cell)
    assert forces.abs().max() > 0.1
    assert forces.sum(dim=1).abs().max() < 1e-12 * forces.abs().sum()


@CELLS
def test_wrapped_or_not(cell) -> None:
    field, x = force_field(), nuclei(cell)
    laps = torch.tensor([[0, 0, 0], [1, 0, -2], [0, 5, 0], [-1, -1, -1], [0, 0, 3]])
    unwrapped = x + laps.double() @ cell
    same(field.energy(unwrapped, cell), field.energy(x, cell))
    same(field.forces(unwrapped, cell), field.forces(x, cell))


@pytest.mark.parametrize("choice", [[[1, 0, 0], [0, 1, 0], [1, 0, 1]], [[1, 2, 0], [0, 1, 0]]])
@CELLS
def test_any_choice_of_lattice_vectors(cell, choice) -> None:
    """(a, b, c + a) and (a + 2b, b, c) span the same lattice."""
    field, x = force_field(), nuclei(cell)
    other = torch.tensor([*choice, [0, 0, 1]][:3]).double() @ cell
    same(field.energy(x, other), field.energy(x, cell), 1e-11)
    same(field.forces(x, other), field.forces(x, cell), 1e-11)


@pytest.mark.parametrize("cutoff", [4.0, 7.0, 10.0])
@pytest.mark.parametrize("times", [(2, 1, 1), (2, 2, 1)])
@CELLS
def test_a_supercell_feels_the_same(cell, times, cutoff) -> None:
    """Images beyond half the cell count, those of the same nucleus, too."""
    field, x = force_field(cutoff), nuclei(cell)
    shifts = torch.tensor(list(product(*map(range, times)))).double() @ cell
    tiled = (x[:, None] + shifts[:, None]).flatten(1, 2)
    larger = torch.tensor(times)[:, None] * cell
    same(field.energy(tiled, larger), len(shifts) * field.energy(x, cell))
    forces = field.forces(tiled, larger).unflatten(1, (len(shifts), 5))
    same(forces, field.forces(x, cell)[:, None].expand_as(forces))


def test_a_nucleus_far_from_all_feels_nothing() -> None:
    field, cell = force_field(), 30.0 * torch.eye(3, dtype=torch.float64)
    alone = torch.tensor([[[1.0, 2.0, 3.0]]]).double()
    assert field.energy(alone, cell) == 0 and not field.forces(alone, cell).any()


def test_a_batch_is_its_members() -> None:
    field, x = force_field(), nuclei(SKEW, batch=3)
    energy, forces = field.energy(x, SKEW), field.forces(x, SKEW)
    assert energy.shape == (3,) and energy.std() > 0.1
    for i in range(3):
        same(energy[i : i + 1], field.energy(x[i : i + 1], SKEW))
        same(forces[i : i + 1], field.forces(x[i : i + 1], SKEW))


def test_forces_are_linear_in_the_coefficients() -> None:
    field, x = force_field(), nuclei()
    a, b = field.coefficients, force_field(seed=1).coefficients
    expected = 2 * field.forces(x, CUBE) - 3 * field.forces(x, CUBE, None, b)
    same(field.forces(x, CUBE, None, 2 * a - 3 * b), expected)
    assert not LinearForceField().forces(x, CUBE).any()


# --- several species -------------------------------------------------------------------------

SALT = torch.tensor([11, 17, 17, 11, 17])


def salt_field(cutoff: float = 5.0, **arguments) -> LinearForceField:
    return force_field(cutoff, species=(11, 17), radial=2, degree=2, pair=3, **arguments)


@CELLS
def test_energy_of_two_species_by_hand(cell) -> None:
    """A pair has the coefficients of its two species, a power spectrum those of its centre."""
    field = salt_field()
    x, c = nuclei(cell)[0].numpy(), field.coefficients.numpy()
    images = np.array(list(product((-2, -1, 0, 1, 2), repeat=3))) @ cell.numpy()
    kind, pairs = (SALT == 17).long().numpy(), {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 2}
    couples, energy = list(combinations_with_replacement(range(4), 2)), 0.0
    for i in range(len(x)):
        v = (x[None] - x[i] + images[:, None]).reshape(-1, 3)
        r, other = np.linalg.norm(v, axis=1), np.tile(kind, len(images))
        v, other, r = (y[(r > 1e-6) & (r < 5.0)] for y in (v, other, r))
        scaled = 2 * (r - field.closest) / (5.0 - field.closest) - 1
        cut = np.cos(np.pi * r / 10.0) ** 4
        g = np.stack([chebval(scaled, row) * cut for row in np.eye(3)])
        for k, o in enumerate(other):
            first = 3 * pairs[kind[i], o]
            energy += c[first : first + 3] @ g[:, k]
        channels = np.concatenate([g[:2] * (other == s) for s in (0, 1)])
        cosine = (v @ v.T) / np.outer(r, r)
        for k, (l, (n, m)) in enumerate(product(range(3), couples)):
            place = 9 + kind[i] * 3 * len(couples) + k
            energy += c[place] * channels[n] @ cosine**l @ channels[m]
    assert field.energy(nuclei(cell), cell, SALT).item() == pytest.approx(energy, rel=1e-10)


@CELLS
def test_forces_of_two_species_are_the_gradient(cell) -> None:
    field, x = salt_field(), nuclei(cell, batch=2).requires_grad_()
    (gradient,) = torch.autograd.grad(field.energy(x, cell, SALT).sum(), x)
    same(field.forces(x.detach(), cell, SALT), -gradient)


def test_species_follow_their_atoms() -> None:
    """Reordered alike, forces are reordered; exchanged species feel something else."""
    field, x, order = salt_field(), nuclei(SKEW), [3, 0, 4, 2, 1]
    forces = field.forces(x, SKEW, SALT)
    same(field.forces(x[:, order], SKEW, SALT[order]), forces[:, order])
    assert (field.forces(x, SKEW, 28 - SALT) - forces).abs().max() > 0.1


def test_a_cell_for_each_member() -> None:
    field, x = salt_field(), torch.cat([nuclei(CUBE), nuclei(SKEW)])
    cells = torch.stack([CUBE, SKEW])
    forces, pressure = field.forces(x, cells, SALT), field.pressure(x, cells, SALT)
    for k in range(2):
        same(forces[k], field.forces(x[k : k + 1], cells[k], SALT)[0])
        expected = field.pressure(x[k : k + 1], cells[k], SALT)[0]
        same(216 * pressure[k], 216 * expected, 1e-6)


@pytest.mark.parametrize("name", ["sodium", "nacl", "hexagonal"])
def test_a_fit_to_made_up_runs(name) -> None:
    """Forces of a known field in place of the stored ones; species from the run."""
    run = made_up_run(name)
    truth = force_field(5.0, species=species_in(run), radial=2, degree=1, pair=4)
    x, cell, numbers = (torch.from_numpy(run[k].values) for k in ("positions", "cell", "numbers"))
    run = run.assign(forces=(run.forces.dims, truth.forces(x, cell, numbers).numpy()))
    options = {"cutoff": 5.0, "radial": 2, "degree": 1, "pair": 4}
    fitted = fit_force_field(run, every=2, ridge=1e-13, progress=False, **options)
    assert fitted.species == truth.species == tuple(sorted(set(numbers.tolist())))
    later = x[1::2]
    expected = truth.forces(later, cell, numbers)
    same(fitted.forces(later, cell, numbers), expected, 1e-4)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (None, "5 atoms and no atomic numbers"),
        (SALT[:4], "5 atoms and 4 atomic numbers"),
        (torch.tensor([11, 17, 19, 11, 17]), r"\[11, 17, 19\] in the data, \[11, 17\] in the"),
    ],
)
def test_other_species_are_refused(numbers, words) -> None:
    with pytest.raises(ShapeError, match=words):
        salt_field().forces(nuclei(), CUBE, numbers)


# --- the fit ---------------------------------------------------------------------------------


def run_of(field: LinearForceField, frames: int = 12) -> xr.Dataset:
    """Random frames, with the forces of a field."""
    x = nuclei(SKEW, frames, seed=5)
    dims = ("time", "atom", "cartesian")
    run = xr.Dataset(
        {
            "positions": (dims, x.numpy()),
            "forces": (dims, field.forces(x, SKEW).numpy()),
            "cell": (("vector", "cartesian"), SKEW.numpy()),
        }
    )
    run.encoding["source"] = "runs/li.zarr"
    return run


def test_a_fit_recovers_known_forces() -> None:
    truth = force_field(**SMALL, seed=3)
    fitted = fit_force_field(run_of(truth), every=1, ridge=1e-12, progress=False, **SMALL)
    x = nuclei(CUBE, 4, seed=6)  # another cell, frames not seen
    same(fitted.forces(x, CUBE), truth.forces(x, CUBE), 1e-7)


def test_a_fit_takes_every_so_many_frames() -> None:
    truth = force_field(**SMALL, seed=3)
    run = run_of(truth, 24)
    run["forces"][1::2] = 7.0
    fitted = fit_force_field(run, every=2, ridge=1e-12, progress=False, **SMALL)
    x = nuclei(SKEW, 4, seed=6)
    same(fitted.forces(x, SKEW), truth.forces(x, SKEW), 1e-7)


def test_features_that_never_act_keep_their_zero() -> None:
    """One nucleus among its images feels no force, whatever the coefficients."""
    run = run_of(force_field(**SMALL)).isel(atom=[0])
    run["forces"][:] = 0.0
    fitted = fit_force_field(run, progress=False, **SMALL)
    assert not fitted.coefficients.any()


def scaled_crystal(field: LinearForceField, edge: float) -> xr.Dataset:
    """Two frames of one nucleus among its images: no force, but an energy, up to a constant."""
    cell = SKEW * edge
    x = torch.zeros(2, 1, 3).double()
    run = run_of(field, 2).isel(atom=[0]).drop_vars(["positions", "cell"])
    run["positions"] = (("time", "atom", "cartesian"), x.numpy())
    run["forces"] = (("time", "atom", "cartesian"), np.zeros((2, 1, 3)))
    run["cell"] = (("vector", "cartesian"), cell.numpy())
    run["energy"] = ("time", field.energy(x, cell).numpy() - 7.0)
    run.encoding["source"] = "runs/volumes.zarr"
    return run


def test_other_volumes_tell_the_pressure() -> None:
    """Forces of a crystal are zero at any volume; its energies are not the same."""
    truth, x = force_field(**SMALL, seed=3), torch.zeros(1, 1, 3).double()
    volumes = [scaled_crystal(truth, edge) for edge in np.linspace(0.4, 0.7, 12)]
    run, options = scaled_crystal(truth, 0.5), {"every": 1, "progress": False, "ridge": 1e-12}
    blind = fit_force_field(run, **options, **SMALL)
    fitted = fit_force_field(run, volumes=volumes, **options, **SMALL)
    expected = truth.pressure(x, 0.55 * SKEW).item()
    assert blind.pressure(x, 0.55 * SKEW).item() == 0 != expected
    assert fitted.pressure(x, 0.55 * SKEW).item() == pytest.approx(expected, rel=0.01)
    with pytest.raises(TrajectoryError, match=r"runs/volumes\.zarr: variable 'energy' is missing"):
        fit_force_field(run, volumes=[volumes[0].drop_vars("energy")], **options, **SMALL)


def test_pressure_of_a_cluster_is_its_virial() -> None:
    field, cell = force_field(), 30.0 * torch.eye(3, dtype=torch.float64)
    x = nuclei(CUBE, batch=2) + 10.0  # 24 angstrom from the next image
    virial = (x * field.forces(x, cell)).sum(dim=(1, 2)) / 3
    same(30.0**3 * field.pressure(x, cell), virial, 1e-6)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"cutoff": 1.5},
        {"closest": 0.0},
        {"radial": 0},
        {"radial": 5, "pair": 4},
        {"degree": -1},
        {"species": (11, 11)},
        {"species": ()},
    ],
)
def test_arguments_that_make_no_field(arguments) -> None:
    with pytest.raises(
        ShapeError, match="give 0 < closest < cutoff, 1 <= radial <= pair and degree"
    ):
        LinearForceField(**arguments)


@pytest.mark.parametrize(
    ("positions", "cell"),
    [((5, 3), (3, 3)), ((1, 5, 2), (3, 3)), ((1, 5, 3), (3,)), ((1, 5, 3), (2, 3, 3))],
)
@pytest.mark.parametrize("method", ["energy", "forces"])
def test_wrong_shapes(method, positions, cell) -> None:
    with pytest.raises(ShapeError, match=r"positions \(B, N, 3\) and a cell \(3, 3\)"):
        getattr(force_field(), method)(torch.ones(positions), torch.ones(cell))


@pytest.mark.parametrize("name", ["positions", "forces"])
@pytest.mark.parametrize("fault", ["missing", "nan", "inf"])
def test_a_fit_needs_positions_and_forces(name, fault) -> None:
    run = run_of(force_field(**SMALL))
    if fault == "missing":
        run = run.drop_vars(name)
        run.encoding["source"] = "runs/li.zarr"
    else:
        run[name][3, 1, 2] = float(fault)
    with pytest.raises(TrajectoryError, match=rf"runs/li\.zarr: variable '{name}' .*; a force"):
        fit_force_field(run, progress=False)
