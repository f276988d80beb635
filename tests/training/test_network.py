"""Training the published Deep Density network: its ansatz, its points, its schedule, its state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from densitykit.errors import UnfinishedError
from densitykit.models.deep_density.network import DeepDensity, distances
from densitykit.training.network import (
    SampledDensities,
    fit_ansatz,
    snapshots_seen,
    train_deep_density,
)

GRID, EDGE = (12, 12, 12), 6.0
SMALL = {"cutoff": 3.0, "pair_nodes": (4, 6), "nodes": 8, "layers": 2}
SHORT = {"steps": 60, "batch": 64, "snapshots": 4, "round_steps": 20}


def made_up_run(count: int, seed: int = 0) -> xr.Dataset:
    """Two hydrogens about an oxygen; clouds that grow as the bond gets longer."""
    rng = np.random.default_rng(seed)
    start = np.array([[3.0, 3.0, 3.0], [4.0, 3.0, 3.0], [2.8, 3.9, 3.1]])
    positions = start + rng.normal(0, 0.08, (count, 3, 3))
    axis = np.arange(12) / 12 * EDGE
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    bonds = np.linalg.norm(positions[:, 1:] - positions[:, :1], axis=-1)
    heights = np.concatenate([np.full((count, 1), 2.0), 1 + 2 * (bonds - 1)], axis=1)
    R2 = ((points[None, None] - positions[:, :, None, None, None]) ** 2).sum(axis=-1)
    rho = (heights[..., None, None, None] * np.exp(-1.5 * R2)).sum(axis=1)
    return xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), rho.astype(np.float32)),
            "positions": (("time", "atom", "cartesian"), positions),
            "numbers": ("atom", np.array([8, 1, 1])),
            "cell": (("vector", "cartesian"), EDGE * np.eye(3)),
        }
    )


def test_the_ansatz_is_found_that_made_the_density():
    with torch.random.fork_rng():
        model = DeepDensity([1, 8], cutoff=5.0, pair_nodes=(3,), nodes=4).double()
    run = made_up_run(2)
    values = {"A": [0.4, -0.5], "B": [1.1, 2.0], "C": [-1.5, -0.9], "D": [0.1, 0.2]}
    for name, of_species in values.items():
        getattr(model, name).data.copy_(torch.tensor(of_species))
    data = SampledDensities(run, model, 0.5)
    points = data.draw([0, 1], 1500, torch.Generator().manual_seed(0))
    R, species = distances(points.vectors), points.seen.species[points.atom]
    points = points._replace(rho=points.summed(model.ansatz(species, R)).detach())
    for name in values:
        getattr(model, name).data.zero_()
    mean_square = fit_ansatz(model, points)
    assert mean_square < 1e-4 * float(points.rho.square().mean())


def test_points_are_drawn_in_proportion_to_the_density():
    model = DeepDensity([1, 8], **SMALL)
    data = SampledDensities(made_up_run(1), model, 0.5)
    batch = data.draw([0], 20_000, torch.Generator().manual_seed(0))
    root = np.sqrt(np.abs(data.rho[0].astype(float)))
    expected = (root * data.rho[0]).sum() / root.sum()  # mean of rho under |rho|^(1/2)
    assert float(batch.rho.mean()) == pytest.approx(expected, rel=0.03)


def test_a_batch_of_snapshots_is_what_they_are_one_by_one():
    model = DeepDensity([1, 8], **SMALL).double()
    data = SampledDensities(made_up_run(3), model, 0.5)
    voxels = [np.array([700, 900, 901]), np.array([850, 905])]
    with torch.no_grad():
        joined = data.points([2, 0], voxels).predicted(model)
        single = [
            data.points([k], [v]).predicted(model) for k, v in zip([2, 0], voxels, strict=True)
        ]
    torch.testing.assert_close(joined, torch.cat(single))
    grid = model.density(data.atoms[2], GRID).ravel()
    np.testing.assert_allclose(single[0].numpy(), grid[voxels[0]], atol=1e-12)


def test_the_schedule_has_five_then_twenty_then_all_snapshots():
    assert [snapshots_seen(p, 80) for p in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)] == [
        5,
        5,
        20,
        20,
        80,
        80,
    ]
    assert snapshots_seen(0.3, 3) == 3


def test_training_lowers_the_error_below_that_of_the_ansatz():
    run, held_out = made_up_run(20), made_up_run(4, seed=1)
    options = SHORT | {"steps": 300, "round_steps": 100}
    model, card, rows = train_deep_density(run, held_out, SMALL, **options)
    assert [row["points"] for row in rows] == [0, 6400, 12800, 19200]
    assert rows[-1]["validation_l2"] < 0.6 * rows[0]["validation_l2"]
    assert 0.5 < card["nearest"]["1-8"] < 1.0
    again = DeepDensity(**card)
    again.load_state_dict(model.state_dict())
    best = min(row["validation_l1"] for row in rows)
    truth = held_out["density"].values
    data = SampledDensities(held_out, again, 0.0)
    guess = np.stack([again.density(atoms, GRID) for atoms in data.atoms])
    error = 100 * np.mean(
        abs(guess - truth).sum(axis=(1, 2, 3)) / truth.sum(axis=(1, 2, 3), dtype=float)
    )
    assert error == pytest.approx(best, rel=0.2)  # there on some voxels, here on all


def test_an_interrupted_training_gives_the_same_bits(tmp_path, monkeypatch):
    run, held_out = made_up_run(8), made_up_run(2, seed=1)
    whole, _, rows = train_deep_density(run, held_out, SMALL, **SHORT)
    from densitykit.training import network

    def killed(self, steps):
        if steps.start == 40:
            raise KeyboardInterrupt
        return original(self, steps)

    original = network._Run.steps
    monkeypatch.setattr(network._Run, "steps", killed)
    with pytest.raises(KeyboardInterrupt):
        train_deep_density(run, held_out, SMALL, **SHORT, run_dir=tmp_path)
    monkeypatch.setattr(network._Run, "steps", original)
    resumed, _, again = train_deep_density(run, held_out, SMALL, **SHORT, run_dir=tmp_path)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(rows, again, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    with pytest.raises(UnfinishedError, match="seed is .*another path"):
        train_deep_density(run, held_out, SMALL, **SHORT | {"seed": 1}, run_dir=tmp_path)
