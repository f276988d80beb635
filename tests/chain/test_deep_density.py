"""Deep Density of chains: symmetries, locality, fits with known answers, training, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from densitykit.chain import training as chain_training
from densitykit.chain.atomic_sum import AtomicSum1D, ordered_neighbours, points_in_reach
from densitykit.chain.deep_density import DeepDensity1D, fit_ansatz
from densitykit.chain.kohn_sham import ReducedHartreeFock1D
from densitykit.chain.recipes import train_paper, train_smooth
from densitykit.chain.smooth_density import SmoothDensity1D
from densitykit.chain.snapshots import ChainSnapshots, load_snapshots, score
from densitykit.chain.training import cosine_rate, fit_linear, train_ensemble
from densitykit.errors import ShapeError, TrajectoryError, UnfinishedError
from densitykit.io.splits import write_splits
from densitykit.io.writer import create_trajectory
from densitykit.metrics import relative_l1, relative_l2
from densitykit.models import load_model, save_model

LENGTH, SPECIES = 80.0, torch.tensor([1, 1, 6, 1, 6, 6, 1, 6])
SMALL = {
    DeepDensity1D: {"pair_nodes": [4, 3], "nodes": 6, "layers": 3},
    SmoothDensity1D: {"waves": 6, "spans": (4, 4)},
}
both = pytest.mark.parametrize("kind", list(SMALL))
EXACT = {"rtol": 0, "atol": 1e-12}


def small(kind: type[AtomicSum1D], species: tuple[int, ...] = (1, 6), **changes) -> AtomicSum1D:
    """A model in double precision, its weights moved away from their start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(species, **({"n_near": 2} | SMALL[kind] | changes)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "C":
                p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


def chain(batch: int = 3, n_atoms: int = 8, seed: int = 1) -> Tensor:
    rng = np.random.default_rng(seed)
    R = 5 + 10 * np.arange(n_atoms) + rng.uniform(-3, 3, (batch, n_atoms))
    return torch.from_numpy(R)


def grid(n: int = 160, length: float = LENGTH) -> Tensor:
    return torch.arange(n, dtype=torch.float64) * (length / n)


# --- geometry --------------------------------------------------------------------------------


def test_neighbours_in_order() -> None:
    R_JI, J = ordered_neighbours(torch.tensor([[71.0, 1.0, -6.0]]), 80.0, 2)  # -6 is 74
    assert J[0].tolist() == [[2, 1, 1, 2], [0, 2, 2, 0], [1, 0, 0, 1]]
    expected = [[3.0, -70.0, 10.0, -77.0], [70.0, -7.0, 73.0, -10.0], [7.0, -3.0, 77.0, -73.0]]
    torch.testing.assert_close(R_JI[0], torch.tensor(expected))


def test_points_in_reach_are_all_and_only_those() -> None:
    positions, points = chain() + 33.0, 300 * torch.rand(3, 41, dtype=torch.float64) - 100
    x, index, inside = points_in_reach(positions, points, LENGTH, 12.0)
    away = points[:, None] - positions[..., None]
    away -= LENGTH * (away / LENGTH).round()
    found = torch.full(away.shape, torch.nan, dtype=torch.float64)
    assert x.shape[-1] == (away.abs() < 12).sum(-1).max()
    for b, i in np.ndindex(3, 8):
        found[b, i, index[b, i, inside[b, i]]] = x[b, i, inside[b, i]]
    torch.testing.assert_close(found, away.where(away.abs() < 12, torch.nan), equal_nan=True)


# --- symmetries ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("n_near", [2, 4, 6])
def test_symmetries(kind: type[AtomicSum1D], n_near: int) -> None:
    model, R, r = small(kind, n_near=n_near), chain(), grid()
    rho = model(R, SPECIES, r, LENGTH)
    assert rho.shape == (3, 160) and rho.std() > 0.01
    shifted = model(R + 12.3456, SPECIES, r + 12.3456, LENGTH)
    torch.testing.assert_close(shifted, rho, **EXACT)
    cells = LENGTH * torch.tensor([3, 0, -1, 0, 0, 2, 0, -5])
    torch.testing.assert_close(model(R + cells, SPECIES, r - LENGTH, LENGTH), rho, **EXACT)
    order = torch.tensor([4, 0, 6, 1, 7, 2, 3, 5])
    torch.testing.assert_close(model(R[:, order], SPECIES[order], r, LENGTH), rho, **EXACT)
    mixed = torch.randperm(160)
    torch.testing.assert_close(model(R, SPECIES, r[mixed], LENGTH), rho[:, mixed], **EXACT)
    # the labels count, not only their multiset
    assert not torch.allclose(model(R, SPECIES.flip(0), r, LENGTH), rho, atol=1e-3)


@both
@pytest.mark.parametrize("n_near", [2, 6])
def test_repeated_cell_gives_the_repeated_density(kind: type[AtomicSum1D], n_near: int) -> None:
    model, R, r = small(kind, n_near=n_near), chain(), grid()
    rho = model(R, SPECIES, r, LENGTH)
    R_4 = torch.cat([R + LENGTH * i for i in range(4)], 1)
    repeated = model(R_4, SPECIES.repeat(4), grid(640, 320.0), 320.0)
    torch.testing.assert_close(repeated, rho.repeat(1, 4), **EXACT)


def test_reflection() -> None:
    """The smooth model commutes with reflection, the published one does not."""
    R, r = chain(), grid()
    for kind, symmetric in ((SmoothDensity1D, True), (DeepDensity1D, False)):
        model = small(kind, n_near=4)
        mirrored = model(-R, SPECIES, -r, LENGTH)
        assert torch.allclose(mirrored, model(R, SPECIES, r, LENGTH), **EXACT) == symmetric


def test_continuity_where_neighbours_exchange() -> None:
    """Equally far neighbours, atoms that meet: a jump as published, none in the smooth model."""
    species, r = torch.ones(8, dtype=torch.long), grid() + 0.123
    step = torch.zeros(1, 8, dtype=torch.float64)
    step[0, 3] = 1e-9
    sites = 5 + 10 * torch.arange(8, dtype=torch.float64)[None]
    meeting = sites.clone()
    meeting[0, 3] = meeting[0, 4]
    for kind, smooth in ((SmoothDensity1D, True), (DeepDensity1D, False)):
        model = small(kind, species=(1,))
        for R in (sites, meeting):
            change = [model(R + s * step, species, r, LENGTH) for s in (-1, 1)]
            jump = (change[1] - change[0]).abs().max()
            assert (jump < 1e-7) == smooth, (kind.__name__, jump)


@both
def test_locality(kind: type[AtomicSum1D]) -> None:
    """What an atom does reaches neither past the cutoff nor beyond its neighbours' reach."""
    model, R, r = small(kind, cutoff=12.0), chain(1, 16), grid(320, 160.0)
    species = SPECIES.repeat(2)
    moved = R.clone()
    moved[0, 8] += 0.5
    change = (model(moved, species, r, 160.0) - model(R, species, r, 160.0))[0].abs()
    # atoms 7 and 9 see atom 8, and with two nearest on one side perhaps 6 and 10
    near = (r > R[0, 6] - 12) & (r < R[0, 10] + 12)
    assert change[near].max() > 1e-3
    assert not change[~near].any() and (~near).sum() > 100
    parts = model.atomic_contributions(R, species, r, 160.0)
    assert parts.shape == (1, 16, 320)
    torch.testing.assert_close(parts.sum(1), model(R, species, r, 160.0), **EXACT)
    away = (r - R[0, 8]).abs()
    assert not parts[0, 8, away >= 12].any() and (parts[0, 8, away < 11] != 0).all()


def test_published_ansatz() -> None:
    """rho_I is eqs. 11 and 12, with N_I and E_I of the published descriptor."""
    model, R, r = small(DeepDensity1D), chain(1), grid()
    away = r - R[0, 1]
    away -= LENGTH * (away / LENGTH).round()
    x, others = away.abs(), R[0, [0, 2]] - R[0, 1]
    # the networks of pairs (1, 1) and (1, 6)
    d_J = torch.stack([(others.abs() - 10) / 4, others.sign()], -1)
    g_1J = [model.g.g[0 if SPECIES[J] == 1 else 1] for J in (0, 2)]
    g = torch.cat([g_1J[i](d_J[i]) for i in others.abs().argsort().tolist()])
    descriptor = torch.cat([torch.stack([x / 4, away.sign()], -1), g.expand(160, -1)], 1)

    def fitted(net: nn.Module) -> Tensor:
        weight = torch.cat([net.electron.weight, net.atomic.weight], 1)
        h = torch.tanh(descriptor @ weight.T + net.atomic.bias)
        for a, layer in zip(net.skip, net.hidden, strict=True):
            h = a * h + torch.tanh(layer(h))
        return 0.1 * net.out(h)[:, 0]

    N, E = fitted(model.linear[0]), fitted(model.exponent[0])
    A, B, C, D = (p[0] for p in (model.A, model.B, model.C, model.D))
    expected = (N + A * x + B) * torch.exp(C * (x - D) ** 2 + E)
    rho_I = model.atomic_contributions(R, SPECIES, r, LENGTH)[0, 1]
    inner = x < 15  # where the taper is 1
    torch.testing.assert_close(rho_I[inner], expected[inner])
    assert (rho_I[x >= 20] == 0).all()


@both
def test_contributions_end_smoothly(kind: type[AtomicSum1D]) -> None:
    """Just inside the cutoff rho_I is next to nothing, a little further in it is not."""
    cutoff, R = 20.0, chain(1)
    model = small(kind, cutoff=cutoff)
    edges = torch.stack([R[0, 3] + side * (cutoff - 1e-6) for side in (-1, 1)])
    inner = torch.stack([R[0, 3] + side * 0.85 * cutoff for side in (-1, 1)])
    at_edge, further_in = (
        model.atomic_contributions(R, SPECIES, r, LENGTH)[0, 3].abs() for r in (edges, inner)
    )
    assert (at_edge < 1e-9 * further_in).all()


# --- fits with known answers -----------------------------------------------------------------


def test_fit_ansatz_finds_the_constants() -> None:
    truth = DeepDensity1D((1, 6)).double()
    constants = {"A": [0.02, -0.01], "B": [0.4, 0.2], "C": [-0.3, -0.03], "D": [0.5, 1.5]}
    with torch.no_grad():
        for name, values in constants.items():
            getattr(truth, name).copy_(torch.tensor(values))
    R, r = chain(4), grid()
    s = truth.surroundings(R, SPECIES, r, LENGTH)
    rho_I = truth.ansatz(s).where(s.inside, 0).flatten(1)
    density = torch.zeros(4, 160, dtype=torch.float64).scatter_add(1, s.index.flatten(1), rho_I)
    model = DeepDensity1D((1, 6)).double()
    assert fit_ansatz(model, R, SPECIES, r, LENGTH, density.detach()) < 1e-16
    for name, values in constants.items():
        assert getattr(model, name).tolist() == pytest.approx(values, rel=1e-4), name


def test_fit_linear_finds_a_polynomial_density() -> None:
    """Also from several chains at once, of which none has all species."""
    truth = small(SmoothDensity1D, waves=3)
    one, six = torch.full((8,), 1), torch.full((8,), 6)
    R, r = chain(60), grid()

    def data(rows: slice, species: Tensor) -> ChainSnapshots:
        density = truth(R[rows], species, r, LENGTH).detach()
        return ChainSnapshots(R[rows], density, species, r, LENGTH)

    model = SmoothDensity1D((1, 6), n_near=2, **(SMALL[SmoothDensity1D] | {"waves": 3}))
    sets = [data(slice(50), SPECIES), data(slice(30), one), data(slice(30), six)]
    error = fit_linear(model, sets)
    scale = sets[0].density.square().mean()
    for species in (SPECIES, one, six):
        assert mse(model, data(slice(50, 60), species)) < 1e-8 * scale
    assert 0 <= error < 1e-8 * scale


def test_span_keeps_far_sides_apart() -> None:
    """With a span of 3, the second neighbours of the two sides do not know of each other."""

    def mixed_difference(span: int) -> float:
        model = small(SmoothDensity1D, (1,), n_near=4, spans=(4, span))
        R = chain(1).expand(4, -1).clone()
        R[[1, 3], 1] += 0.5  # second neighbours of atom 3
        R[[2, 3], 5] -= 0.7
        s = model.surroundings(R, torch.ones(8, dtype=torch.long), grid(), LENGTH)
        rho = model.local(s)[:, 3]
        return (rho[3] - rho[2] - rho[1] + rho[0]).abs().max().item()

    assert mixed_difference(span=4) > 1e-6
    assert mixed_difference(span=3) < 1e-12


@both
def test_a_point_on_top_of_an_atom_is_like_any_other(kind: type[AtomicSum1D]) -> None:
    """There |x| = 0 and the direction is undefined; it must be one that training shows."""
    model, R = small(kind), chain(1).round()
    beside = model(R - 1e-9, SPECIES, grid(), LENGTH)
    torch.testing.assert_close(model(R, SPECIES, grid(), LENGTH), beside, rtol=0, atol=1e-6)


@both
def test_gradients_reach_every_weight(kind: type[AtomicSum1D]) -> None:
    model = small(kind)
    model(chain(), SPECIES, grid(), LENGTH).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


# --- training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metal() -> tuple[ChainSnapshots, ChainSnapshots]:
    """Training and validation snapshots of the metallic chain, self-consistent densities."""
    R, widths = chain(24), [6.0] * 8
    model = ReducedHartreeFock1D(R[0].numpy(), widths, n_grid=80, tolerance=1e-8)
    density = torch.stack([torch.from_numpy(model.at(x.numpy()).solve().density) for x in R])
    species = torch.full((8,), 6)
    sets = [(R[a], density[a], species, grid(80), LENGTH) for a in (slice(18), slice(18, 24))]
    return ChainSnapshots(*sets[0]), ChainSnapshots(*sets[1])


def mse(model: AtomicSum1D, data: ChainSnapshots) -> float:
    table = score(model, data).set_index("metric")
    return table.value["mse"]


def test_paper_recipe_learns() -> None:
    """Gaussian atoms that grow with the room they have, which the bare ansatz cannot see."""
    R, r, species = chain(24), grid(80), torch.ones(8, dtype=torch.long)
    room = ordered_neighbours(R, LENGTH, 1)[0].abs().sum(-1, keepdim=True)
    away = r - R[..., None]
    away = away - LENGTH * (away / LENGTH).round()
    density = ((0.3 + 0.1 * torch.tanh((room - 20) / 4)) * torch.exp(-(away**2) / 8)).sum(1)
    sets = [(R[a], density[a], species, r, LENGTH) for a in (slice(18), slice(18, 24))]
    training, validation = (ChainSnapshots(*s) for s in sets)
    options = {"sizes": {"nodes": 12, "pair_nodes": (5, 5)}, "seeds": [0, 1]}
    models, rows = train_paper(training, validation, epochs=30, batch=3, **options)
    ansatz = fit_ansatz(DeepDensity1D((1,)), *training.arguments, training.density)
    best = [rows[f"validation_{i}"].min() for i in (0, 1)]
    assert max(best) < ansatz / 10
    assert best[0] != best[1]
    for model, error in zip(models, best, strict=True):  # every model ends with its best weights
        assert mse(model, validation) == pytest.approx(error, rel=1e-3)


def test_smooth_recipe_learns(metal: tuple[ChainSnapshots, ChainSnapshots]) -> None:
    training, validation = metal
    few, more = (train_smooth([training], n_near=2, spans=d, waves=8) for d in ((2,), (2, 2)))
    assert more.species == (6,)
    assert mse(more, training) < 0.5 * mse(few, training)
    mean = (validation.density - training.density.mean(0)).square().mean().item()
    assert mse(few, validation) < 1e-3 * mean


def test_ensemble_is_its_members(metal: tuple[ChainSnapshots, ChainSnapshots]) -> None:
    together = [small(DeepDensity1D, (6,)), small(DeepDensity1D, (6,), cutoff=20.0)]
    with torch.no_grad():
        together[1].B.add_(0.1)
    alone = DeepDensity1D((6,), **SMALL[DeepDensity1D]).double()
    alone.load_state_dict(together[1].state_dict())
    train_ensemble(together, *metal, epochs=3, batch=5)
    train_ensemble([alone], *metal, epochs=3, batch=5)
    for name, p in alone.named_parameters():
        torch.testing.assert_close(p, dict(together[1].named_parameters())[name])


class Killed(Exception):
    """Stands for the end of the process."""


def test_resumed_training_equals_an_uninterrupted_one(
    metal: tuple[ChainSnapshots, ChainSnapshots], tmp_path: Path, monkeypatch
) -> None:
    def run(folder: Path | None, epochs: int = 6) -> tuple[AtomicSum1D, pd.DataFrame]:
        model = small(DeepDensity1D, (6,))
        options = {"epochs": epochs, "batch": 7, "run_dir": folder, "save_every": 2}
        return model, train_ensemble([model], *metal, rate=cosine_rate, **options)

    whole, rows = run(None)
    save = chain_training.TrainingState.save

    def save_and_die(state, rows) -> None:
        save(state, rows)
        if len(rows) == 4:
            raise Killed

    monkeypatch.setattr(chain_training.TrainingState, "save", save_and_die)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.undo()
    assert len(pd.read_csv(tmp_path / "log.csv")) == 4
    resumed, again = run(tmp_path)
    columns = ["epoch", "training_0", "validation_0"]
    pd.testing.assert_frame_equal(again[columns], rows[columns], check_exact=True)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(UnfinishedError, match="epochs is 6, not 7"):
        run(tmp_path, epochs=7)
    (tmp_path / "state.npz").write_bytes(b"torn")
    with pytest.raises(UnfinishedError, match="whole"):
        run(tmp_path)


# --- data and files --------------------------------------------------------------------------


def test_snapshots_are_in_atomic_units(tmp_path: Path) -> None:
    bohr, path, R, r = 0.529177210903, tmp_path / "c.zarr", chain(4), grid()
    rho = 0.2 + 0.1 * torch.cos(2 * torch.pi * r / LENGTH)
    attrs = {"bohr_angstrom": bohr}
    writer = create_trajectory(
        path / "a", n_frames=4, grid=(160,), cell=LENGTH * bohr, numbers=SPECIES, attrs=attrs
    )
    for i in range(4):
        zero = np.zeros((8, 1))
        atoms = {"positions": R[i].numpy()[:, None] * bohr, "velocities": zero, "forces": zero}
        writer.append(rho.numpy() / bohr, float(i), **atoms)
    write_splits(path, {"train": {"run": "a", "start": 0, "stop": 4}})
    data = load_snapshots(path, "train")
    assert data.length == pytest.approx(LENGTH)
    torch.testing.assert_close(data.positions, R)
    torch.testing.assert_close(data.density, rho.expand(4, -1), rtol=1e-6, atol=0)
    torch.testing.assert_close(data.points, r)
    assert torch.equal(data.evenly(2).positions, data.positions[[0, 2]])
    with pytest.raises(ShapeError, match="5"):
        data.evenly(5)


def test_three_dimensions_are_no_chain(mock_trajectory) -> None:
    path = mock_trajectory("li.zarr/run-1").parent
    write_splits(path, {"train": {"run": "run-1", "start": 0, "stop": 4}})
    with pytest.raises(TrajectoryError, match="chain"):
        load_snapshots(path, "train")


def test_score(metal: tuple[ChainSnapshots, ChainSnapshots]) -> None:
    data, model = metal[1], small(DeepDensity1D, (6,))
    table = score(model, data, system="metal", seed=3)
    assert list(table.columns) == ["system", "seed", "metric", "value"]
    assert set(table.system) == {"metal"} and set(table.seed) == {3}
    value, rho = table.set_index("metric").value, model(*data.arguments).detach()
    assert value["mse"] == pytest.approx((rho - data.density).square().mean().item())
    l1, l2 = relative_l1(rho, data.density, 1), relative_l2(rho, data.density, 1)
    assert value["l1"] == pytest.approx(l1.mean().item())
    assert value["l1_max"] == pytest.approx(l1.max().item())
    assert value["l2"] == pytest.approx(l2.mean().item())


@both
def test_checkpoint_round_trip(kind: type[AtomicSum1D], tmp_path: Path) -> None:
    arguments = {"species": [1, 6], "n_near": 4} | SMALL[kind]
    model = small(kind, n_near=4)
    if kind is DeepDensity1D:
        model = model.float()
    save_model(model, tmp_path / "m", arguments)
    loaded = load_model(tmp_path / "m")
    inputs = chain(), SPECIES, grid(), LENGTH
    assert torch.equal(loaded(*inputs), model(*inputs))


@both
def test_wrong_shapes_are_refused(kind: type[AtomicSum1D]) -> None:
    model, R, r = small(kind), chain(), grid()
    for changes, match in (
        ({"positions": R[0]}, "positions"),
        ({"species": SPECIES[:-1]}, "species"),
        ({"species": torch.full((8,), 3)}, r"\[3\]"),
        ({"points": r.expand(2, -1)}, "points"),
        ({"length": 30.0}, "length"),
        ({"positions": R[:, :2], "species": SPECIES[:2]}, "n_near"),
    ):
        inputs = {"positions": R, "species": SPECIES, "points": r, "length": LENGTH} | changes
        with pytest.raises(ShapeError, match=match):
            model(**inputs)
    for arguments in ({"n_near": 0}, {"cutoff": -1.0}, {"species": ()}, {"species": (1, 1)}):
        with pytest.raises(ShapeError):
            kind(**({"species": (1,)} | arguments))
    if kind is DeepDensity1D:
        with pytest.raises(ShapeError, match="density"):
            fit_ansatz(model, R, SPECIES, r, LENGTH, torch.zeros(3, 159))


def test_snapshots_must_fit_together() -> None:
    R, r = chain(), grid()
    for density, species in ((torch.zeros(3, 159), SPECIES), (torch.zeros(3, 160), SPECIES[:7])):
        with pytest.raises(ShapeError, match="density"):
            ChainSnapshots(R, density, species, r, LENGTH)


def test_odd_number_of_neighbours_has_no_sides() -> None:
    with pytest.raises(ShapeError, match="even"):
        SmoothDensity1D((1,), n_near=3)
