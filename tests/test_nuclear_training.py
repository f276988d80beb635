"""Training of the residual net: what it draws, what it forgets, that it falls and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from test_nuclear import FORCE_FIELD, liquid_run
from torch import Tensor, nn

from densitykit.data.windows import step_generator
from densitykit.errors import CheckpointError, ShapeError, TrajectoryError
from densitykit.models import NuclearEmulator, load_model, save_model
from densitykit.models.nuclear.emulator import ResidualNet
from densitykit.models.nuclear.superposition import Superposition, fit_superposition
from densitykit.training.nuclear import (
    ResidualLoss,
    ResidualPairs,
    fit_parts,
    residual_error,
    train_emulator,
)

N = 12  # grid points along an edge
TINY = {"widths": (8,), "blocks": (1,), "patch": 2}
STEPS = 40
SHORT = {"steps": STEPS, "batch": 4, "learning_rate": 0.02, "seed": 5, "save_every": 8}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, so that two trainings can be compared to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def superposition() -> Superposition:
    return fit_superposition(liquid_run(n=N), every=2)


@pytest.fixture(scope="module")
def pairs(superposition) -> ResidualPairs:
    return ResidualPairs(liquid_run(n=N), superposition, 12.0)


@pytest.fixture(scope="module")
def trained(superposition):
    """(emulator, rows): with the superposition, and a net trained for 40 steps."""
    return train(superposition)


def untrained(superposition) -> NuclearEmulator:
    torch.manual_seed(0)
    knots = len(superposition.knots)
    model = NuclearEmulator(12.0, 6.0, 7.0 / N, 2, knots, FORCE_FIELD, **TINY)
    model.superposition.load_state_dict(superposition.state_dict())
    return model


def train(superposition, run_dir: Path | None = None, **options):
    model = untrained(superposition)
    options = SHORT | {"fabric": Fabric(accelerator="cpu", devices=1), "ema": 0.9} | options
    return model, train_emulator(model, liquid_run(n=N), run_dir=run_dir, **options)


def mean_loss(rows) -> float:
    return float(np.mean([row["loss"] for row in rows]))


# --- pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("horizon", "lag"), [(6.0, 1), (12.0, 2), (60.0, 10)])
def test_pairs_are_a_horizon_apart(superposition, horizon, lag) -> None:
    pairs = ResidualPairs(liquid_run(n=N), superposition, horizon)
    assert pairs.lag == lag and len(pairs) == 40 - lag
    assert pairs.base.shape == pairs.residual.shape == (40, N, N, N)
    fields, residual = pairs.draw(5, step_generator(0, 0))
    assert fields.shape == (5, 3, N, N, N) and residual.shape == (5, 1, N, N, N)
    assert fields.dtype == residual.dtype == torch.float32


def test_superposition_and_residual_are_the_density(superposition, pairs) -> None:
    run = liquid_run(n=N)
    density = torch.from_numpy(run.density.values).float()
    torch.testing.assert_close(pairs.base + pairs.residual, density)
    x, cell = (torch.from_numpy(run[name].values) for name in ("positions", "cell"))
    expected = superposition(x[7:9], cell, (N, N, N)).float()
    torch.testing.assert_close(pairs.base[7:9], expected)


def columns(fields: Tensor) -> Tensor:
    """Values of several fields (C, n, n, n), voxel by voxel in the order of the first."""
    flat = fields.flatten(1)
    return flat[:, flat[0].argsort()]


def test_a_draw_is_one_pair_under_one_symmetry(pairs) -> None:
    """What belongs to one voxel stays together; voxels move, each member in its own way."""
    fields, residual = pairs.draw(8, step_generator(3, 0))
    drawn, found = torch.cat([fields, residual], dim=1), []
    for member in drawn:
        mine = columns(member)
        for i in range(len(pairs)):
            after = pairs.base[i + pairs.lag]
            change = after - pairs.base[i]
            own = [after, change, pairs.residual[i], pairs.residual[i + pairs.lag]]
            if torch.equal(mine, columns(torch.stack(own))):
                found.append(i)
                assert not torch.equal(member[0], after)
    assert len(found) == 8 and len(set(found)) > 3


def test_steps_of_a_draw_follow_one_another(superposition) -> None:
    """Under one symmetry: the residual after a step is the one before the next."""
    pairs = ResidualPairs(liquid_run(n=N), superposition, 12.0, unroll=3)
    assert len(pairs) == 40 - 3 * 2
    fields, residual = (x.unflatten(0, (-1, 3)) for x in pairs.draw(4, step_generator(0, 0)))
    assert fields.shape == (4, 3, 3, N, N, N) and residual.shape == (4, 3, 1, N, N, N)
    assert torch.equal(fields[:, 1:, 2], residual[:, :-1, 0])
    change = fields[:, 1:, 0] - fields[:, :-1, 0]
    torch.testing.assert_close(fields[:, 1:, 1], change, rtol=0, atol=1e-6)
    with pytest.raises(TrajectoryError, match="shorter than the horizon of 36.0 fs"):
        ResidualPairs(liquid_run(n=N).isel(time=slice(6)), superposition, 12.0, unroll=3)


def test_draws_follow_from_the_generator(pairs) -> None:
    (a, b), (c, d) = (pairs.draw(3, step_generator(1, 2)) for _ in range(2))
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, pairs.draw(3, step_generator(1, 3))[0])


def test_pairs_need_positions(superposition) -> None:
    run = liquid_run(n=N).drop_vars("positions")
    run.encoding["source"] = "runs/li.zarr"
    with pytest.raises(TrajectoryError, match=r"runs/li\.zarr: variable 'positions' is missing"):
        ResidualPairs(run, superposition, 12.0)


@pytest.mark.parametrize("horizon", [9.0, 0.0, -6.0])
def test_horizon_must_be_a_multiple(superposition, horizon) -> None:
    with pytest.raises(TrajectoryError, match=rf"horizon {horizon} fs is no multiple of .* 6\.0"):
        ResidualPairs(liquid_run(n=N), superposition, horizon)


def test_run_must_be_longer_than_the_horizon(superposition) -> None:
    run = liquid_run(n=N).isel(time=slice(0, 2))
    with pytest.raises(TrajectoryError, match="shorter than the horizon of 12.0 fs"):
        ResidualPairs(run, superposition, 12.0)


def test_cell_must_be_cubic(superposition) -> None:
    run = liquid_run(n=N).copy()
    run["cell"] = run["cell"] * np.array([1.0, 1.0, 1.1])
    run.encoding["source"] = "runs/li.zarr"
    with pytest.raises(TrajectoryError, match=r"runs/li\.zarr: variable 'cell' is not cubic"):
        ResidualPairs(run, superposition, 12.0)


# --- loss ------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Keeps what it is fed; predicts a constant."""

    def __init__(self, constant: float = 0.0) -> None:
        super().__init__()
        self.constant = constant

    def advance(self, fields: Tensor) -> Tensor:
        self.fed = fields
        return torch.full_like(fields[:, 2:], self.constant)


def fields(batch: int = 6, n: int = 4) -> Tensor:
    return torch.randn(batch, 3, n, n, n, generator=step_generator(9, 9))


def fed(batch: int = 6, seed: int = 0, **options) -> Tensor:
    """Memory as a loss feeds it."""
    recorder, x = Recorder(), fields(batch)
    ResidualLoss(recorder, **options)(x, x[:, 2:], step_generator(seed, 0))
    torch.testing.assert_close(recorder.fed[:, :2], x[:, :2], rtol=0, atol=0)
    return recorder.fed[:, 2]


QUIET = {"memory_noise": 0.0, "white_noise": 0.0, "forget": 0.0}


def test_loss_is_the_mean_square_error() -> None:
    x, residual = fields(), fields()[:, :1]
    loss = ResidualLoss(Recorder(0.5))(x, residual, step_generator(0, 0))
    assert loss.keys() == {"loss"}
    torch.testing.assert_close(loss["loss"], (residual - 0.5).square().mean())


class Doubler(nn.Module):
    """Adds the base to twice the memory."""

    def advance(self, fields: Tensor) -> Tensor:
        return fields[:, :1] + 2 * fields[:, 2:]


def test_unrolled_loss_feeds_on_its_own_memory() -> None:
    x, residual = fields(6), fields(6)[:, :1] - 1
    loss = ResidualLoss(Doubler(), unroll=2, **QUIET)(x, residual, step_generator(0, 0))
    first, second = x[::2], x[1::2]
    memory = first[:, 0] + 2 * first[:, 2]
    errors = memory - residual[::2, 0], second[:, 0] + 2 * memory - residual[1::2, 0]
    expected = torch.stack(errors).square().mean()
    torch.testing.assert_close(loss["loss"], expected, rtol=1e-2, atol=0)  # bfloat16 inside


def test_memory_without_noise_is_left() -> None:
    torch.testing.assert_close(fed(**QUIET), fields()[:, 2], rtol=0, atol=0)


def test_all_is_forgotten() -> None:
    assert not fed(forget=1.0).any()
    assert not fed(**QUIET | {"forget": 1.0}).any()


def test_some_is_forgotten() -> None:
    forgotten = (fed(300, **QUIET | {"forget": 0.3}) == 0).all(dim=(1, 2, 3))
    assert 60 < forgotten.sum() < 120


def test_memory_noise_is_the_shifted_memory() -> None:
    """Of each member by its own share, up to the largest."""
    memory = fields(40)[:, 2]
    noise = fed(40, **QUIET | {"memory_noise": 0.4}) - memory
    share = noise.flatten(1).norm(dim=1) / memory.flatten(1).norm(dim=1)
    assert 0.3 < share.max() <= 0.4 and share.min() < 0.1
    unshifted = 0
    for x, y, eta in zip(memory, noise, share, strict=True):
        torch.testing.assert_close(
            y.flatten().sort().values, eta * x.flatten().sort().values, rtol=0, atol=1e-5
        )
        powers = [torch.fft.fftn(z).abs() for z in (eta * x, y)]
        torch.testing.assert_close(*powers, rtol=0, atol=1e-4)
        unshifted += torch.allclose(y, eta * x, atol=1e-5)
    assert unshifted < 5  # 64 shifts


def test_white_noise_is_white() -> None:
    noise = fed(200, **QUIET | {"white_noise": 0.1}) - fields(200)[:, 2]
    deviation = noise.std(dim=(1, 2, 3))
    assert 0.09 < deviation.max() < 0.13 and deviation.min() < 0.02
    power = torch.fft.fftn(noise, dim=(1, 2, 3)).abs().square().mean(dim=0) / 64
    assert power.mean().item() == pytest.approx(0.1**2 / 3, rel=0.2)  # eta' is uniform
    assert power.max() < 2 * power.mean() and power.min() > 0.5 * power.mean()


def test_noise_follows_from_the_generator() -> None:
    assert torch.equal(fed(), fed()) and not torch.equal(fed(), fed(seed=1))


def test_normalised_fields_have_unit_variance(pairs) -> None:
    net = ResidualNet(**TINY)
    change = pairs.base[pairs.lag :] - pairs.base[: -pairs.lag]
    net.set_scales(pairs.base, change, pairs.residual)
    inputs, residual = (net.normalise(x) for x in pairs.draw(32, step_generator(0, 0)))
    assert inputs[:, 0].mean().abs() < 1e-5
    deviations = [*inputs.std(dim=(0, 2, 3, 4)).tolist(), residual.std().item()]
    assert deviations == pytest.approx([1] * 4, rel=0.1)
    torch.testing.assert_close(
        net.normalise(pairs.residual[:2, None]) * net.scales[2], pairs.residual[:2, None]
    )


def test_an_untrained_net_lets_the_residual_be(pairs) -> None:
    net, b, e = ResidualNet(**TINY), pairs.base, pairs.residual
    net.set_scales(b, b, e)
    torch.testing.assert_close(net(b[2:4], b[:2], e[:2]), e[:2])
    with pytest.raises(ShapeError, match="stride 2"):
        net(b[:1, 1:], b[:1, 1:], e[:1, 1:])


# --- error -----------------------------------------------------------------------------------


def test_error_of_persistence(pairs) -> None:
    """An untrained net leaves the residual of the start, the true nuclei move on."""
    net = ResidualNet(**TINY)
    net.set_scales(pairs.base, pairs.base, pairs.residual)
    found = residual_error(net, pairs, steps=4, every=7, batch=2)
    starts, density = np.arange(0, 32, 7), (pairs.base + pairs.residual).flatten(1)
    expected = {}
    for name, frames in {"validation_l2": 2, "validation_l2_after_4": 8}.items():
        after = density[starts + frames]
        change = (pairs.residual[starts + frames] - pairs.residual[starts]).flatten(1)
        expected[name] = (change.norm(dim=1) / after.norm(dim=1)).mean().item()
    assert found == pytest.approx(expected, rel=1e-4)


# --- the training ----------------------------------------------------------------------------


def test_training_lowers_loss_and_error(superposition, pairs, trained) -> None:
    model, rows = trained
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert mean_loss(rows[-8:]) < 0.75 * mean_loss(rows[:8])
    start, end = (
        residual_error(m.residual_net, pairs, steps=5, every=4)
        for m in (untrained(superposition), model)
    )
    assert end["validation_l2"] < 0.85 * start["validation_l2"]
    assert end["validation_l2_after_5"] < 0.8 * start["validation_l2_after_5"]
    assert not model.residual_net.training


def test_unrolled_training_runs(superposition, pairs) -> None:
    model, rows = train(superposition, unroll=2)
    assert mean_loss(rows[-8:]) < 0.75 * mean_loss(rows[:8])
    start, end = (
        residual_error(m.residual_net, pairs, steps=5, every=4)["validation_l2_after_5"]
        for m in (untrained(superposition), model)
    )
    assert end < 0.8 * start


def test_scales_are_those_of_the_run(pairs, trained) -> None:
    net = trained[0].residual_net
    change = pairs.base[2:] - pairs.base[:-2]
    scales = [pairs.base.std(), change.std(), pairs.residual.std()]
    torch.testing.assert_close(net.scales, torch.stack(scales))
    torch.testing.assert_close(net.mean, pairs.base.mean())


@pytest.mark.parametrize("white_noise", [0.3, 0.0])
def test_memory_of_a_long_rollout_does_not_grow(superposition, pairs, white_noise) -> None:
    """Three times along the path of the nuclei and back, from a memory far off.

    Without white noise in training it does: waves that residuals hardly have.
    """
    model, _ = train(superposition, steps=80, loss={"white_noise": white_noise})
    residual, sizes = 3 * pairs.residual[:1].roll(4, 1), []
    path = [*range(0, 38, 2), *range(38, 0, -2)]
    with torch.no_grad():
        for _ in range(3):
            for i, j in zip(path, [*path[1:], path[0]], strict=True):
                fields = pairs.base[j, None], pairs.base[i, None], residual
                residual = model.residual_net(*fields)
                sizes.append(float(residual.norm() / pairs.residual[j].norm()))
    assert max(sizes[:3]) > 1.3
    if white_noise:
        assert max(sizes[-len(path) :]) < 1.5
    else:
        assert max(sizes[-len(path) :]) > 4


def test_held_out_run_is_watched(superposition) -> None:
    held_out = liquid_run(90, N, seed=1)
    options = {"validate_every": 2, "steps": 3, "batch": 1}
    _, rows = train(superposition, held_out=held_out, **options)
    names = {"validation_l2", "validation_l2_after_40"}
    assert [names <= row.keys() for row in rows] == [False, True, True]
    assert all(0 < rows[-1][name] < 0.2 for name in names)
    _, plain = train(superposition, **options)
    assert [row["loss"] for row in plain] == [row["loss"] for row in rows]


class Stop(Exception):
    pass


def test_a_stopped_training_resumes_exactly(superposition, trained, tmp_path) -> None:
    def stop() -> dict[str, float]:
        raise Stop

    with pytest.raises(Stop):
        train(superposition, tmp_path, validate=stop, validate_every=21)
    assert (tmp_path / "state.safetensors").exists()
    model, rows = train(superposition, tmp_path)
    expected_model, expected = trained
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    weights, others = (m.residual_net.state_dict() for m in (model, expected_model))
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_settings_of_the_loss_are_kept(superposition, tmp_path) -> None:
    """They belong to the training: another loss does not continue it."""
    options = {"steps": 2, "batch": 1}
    train(superposition, tmp_path, loss={"forget": 0.5}, **options)
    with pytest.raises(CheckpointError, match='"forget": 0.5'):
        train(superposition, tmp_path, loss={"forget": 0.2}, **options)


# --- all parts -------------------------------------------------------------------------------


def test_a_card_makes_the_emulator_again(tmp_path) -> None:
    model, card = fit_parts(
        liquid_run(),
        18.0,
        every=2,
        force_field=FORCE_FIELD,
        substeps=3,
        temperature=500.0,
        **TINY,
    )
    assert (model.horizon, model.frame_spacing, model.spacing) == (18.0, 6.0, 7.0 / 16)
    assert (model.substeps, model.temperature, model.force_field.cutoff) == (3, 500.0, 3.4)
    save_model(model, tmp_path / "liquid", card)
    again = load_model(tmp_path / "liquid")
    assert again.substeps == 3 and again.residual_net.stride == 2
    weights = model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in again.state_dict().items())
    for name in ("filter_nodes", "filter_weights", "superposition.weights"):
        assert weights[name].any()
    assert weights["force_field.coefficients"].any()


@pytest.mark.parametrize(
    ("name", "error"), [("positions", ShapeError), ("forces", TrajectoryError)]
)
def test_parts_need_an_ab_initio_run(name, error) -> None:
    with pytest.raises(error, match=f"'{name}'"):
        fit_parts(liquid_run(n=N).drop_vars(name), every=4, force_field=FORCE_FIELD)
