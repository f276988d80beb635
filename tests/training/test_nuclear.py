"""Training of the residual net: what it draws, what it forgets, that it falls and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from lightning_fabric import Fabric
from liquid import FORCE_FIELD, liquid_run
from made_up import made_up_run
from torch import Tensor, nn

import densitykit
from densitykit.analysis.tracking import kinetic_temperature
from densitykit.data.windows import Windows, step_generator
from densitykit.errors import TrajectoryError, UnfinishedError
from densitykit.models import NuclearEmulator, load_model, save_model
from densitykit.models.base import Domain
from densitykit.models.nuclear.superposition import Superposition, fit_superposition
from densitykit.training.nuclear import (
    ResidualLoss,
    base_and_residual,
    fit_parts,
    residual_error,
    train_emulator,
)
from densitykit.units import atomic_masses

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


def windows(steps: int = 1, run: xr.Dataset | None = None) -> Windows:
    return Windows(liquid_run(n=N) if run is None else run, 12.0, context=1, steps=steps)


@pytest.fixture(scope="module")
def run_fields(superposition) -> tuple[Tensor, Tensor]:
    """Superposition and residual of each frame of the run, (40, N, N, N)."""
    every = Windows(liquid_run(n=N), 6.0, context=1)[:]
    base, residual = base_and_residual(untrained(superposition), every)
    return tuple(torch.cat([x[:, 0], x[-1:, 1]]) for x in (base, residual))


@pytest.fixture(scope="module")
def trained(superposition):
    """(emulator, rows): with the superposition, and a net trained for 40 steps."""
    return train(superposition)


def untrained(superposition) -> NuclearEmulator:
    torch.manual_seed(0)
    options = {"filter_nodes": 0, "knots": len(superposition.knots), "temperature": 800.0}
    domain = Domain.of(windows())
    model = NuclearEmulator(12.0, domain, **options, force_field=FORCE_FIELD, **TINY)
    model.superposition.load_state_dict(superposition.state_dict())
    return model


def train(superposition, run_dir: Path | None = None, **options):
    model = untrained(superposition)
    options = SHORT | {"fabric": Fabric(accelerator="cpu", devices=1), "ema": 0.9} | options
    return model, train_emulator(model, liquid_run(n=N), run_dir=run_dir, **options)


def mean_loss(rows) -> float:
    return float(np.mean([row["loss"] for row in rows]))


# --- windows ---------------------------------------------------------------------------------


def test_superposition_and_residual_are_the_density(superposition, run_fields) -> None:
    run, (base, residual) = liquid_run(n=N), run_fields
    density = torch.from_numpy(run.density.values).float()
    torch.testing.assert_close(base + residual, density)
    x, cell = (torch.from_numpy(run[name].values) for name in ("positions", "cell"))
    expected = superposition(x[7:9], cell, (N, N, N)).float()
    torch.testing.assert_close(base[7:9], expected)


@pytest.mark.parametrize("unroll", [1, 3])
def test_a_window_has_its_steps_in_a_row(superposition, run_fields, unroll) -> None:
    """Base, change and residual before of each step, residual after; standardised."""
    model, (base, residual) = untrained(superposition), run_fields
    net = model.residual_net
    net.set_scales(base, base[2:] - base[:-2], residual)
    inputs, after = ResidualLoss(model).inputs(windows(unroll)[[4, 9]])
    assert inputs.shape == (2, unroll, 3, N, N, N) and after.shape == (2, unroll, N, N, N)
    for b, frame in enumerate((4, 9)):
        for k in range(unroll):
            now, then = frame + 2 * k, frame + 2 * k + 2
            rows = torch.stack([base[then], base[then] - base[now], residual[now]])
            torch.testing.assert_close(inputs[b, k], net.normalise(rows[None])[0])
            torch.testing.assert_close(after[b, k], residual[then] / net.scales[2])


@pytest.mark.parametrize("name", ["liquid", "nacl", "hexagonal"])
def test_nuclei_move_with_their_density(superposition, name) -> None:
    """Under each symmetry and shift of a batch the residual stays as small as it was."""
    if name == "liquid":
        model, some = untrained(superposition), windows()
    else:
        run = made_up_run(name)
        model, _ = fit_parts(run, 10.0, every=2, force_field=FORCE_FIELD, **TINY)
        some = Windows(run, 10.0, context=1)
    plain = base_and_residual(model, some[[0, 5, 9]])[1].flatten(2).norm(dim=2)
    batch = some.sample_batch(12, step_generator(3, 0))
    base, moved = (x.flatten(2).norm(dim=2) for x in base_and_residual(model, batch))
    assert not torch.allclose(batch.density[0], batch.density[1], atol=1e-3)
    assert (moved < 1.5 * plain.max()).all() and (base > 10 * moved).all()


def test_windows_need_positions(superposition) -> None:
    run = liquid_run(n=N).drop_vars("positions")
    run.encoding["source"] = "runs/li.zarr"
    with pytest.raises(TrajectoryError, match=r"runs/li\.zarr: variable 'positions' is missing"):
        base_and_residual(untrained(superposition), windows(run=run)[[0]])


# --- loss ------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """In place of an emulator and its net: keeps what it is fed; predicts a constant."""

    def __init__(self, constant: float = 0.0) -> None:
        super().__init__()
        self.constant = constant

    @property
    def residual_net(self) -> Recorder:
        return self

    def advance(self, fields: Tensor) -> Tensor:
        self.fed = fields
        return torch.full_like(fields[:, 2:], self.constant)


def fields(batch: int = 6, n: int = 4) -> Tensor:
    return torch.randn(batch, 3, n, n, n, generator=step_generator(9, 9))


def fed(batch: int = 6, seed: int = 0, **options) -> Tensor:
    """Memory as a loss feeds it."""
    recorder, x = Recorder(), fields(batch)
    ResidualLoss(recorder, **options)(x[:, None], x[:, None, 2], step_generator(seed, 0))
    torch.testing.assert_close(recorder.fed[:, :2], x[:, :2], rtol=0, atol=0)
    return recorder.fed[:, 2]


QUIET = {"memory_noise": 0.0, "white_noise": 0.0, "forget": 0.0}


def test_loss_is_the_mean_square_error() -> None:
    x, residual = fields()[:, None], fields()[:, None, 0]
    loss = ResidualLoss(Recorder(0.5))(x, residual, step_generator(0, 0))
    assert loss.keys() == {"loss"}
    torch.testing.assert_close(loss["loss"], (residual - 0.5).square().mean())


class Doubler(Recorder):
    """Adds the base to twice the memory."""

    def advance(self, fields: Tensor) -> Tensor:
        return fields[:, :1] + 2 * fields[:, 2:]


def test_unrolled_loss_feeds_on_its_own_memory() -> None:
    x = fields(6).unflatten(0, (3, 2))
    residual = x[:, :, 0] - 1
    loss = ResidualLoss(Doubler(), **QUIET)(x, residual, step_generator(0, 0))
    memory = x[:, 0, 0] + 2 * x[:, 0, 2]
    errors = memory - residual[:, 0], x[:, 1, 0] + 2 * memory - residual[:, 1]
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


def test_normalised_fields_have_unit_variance(superposition, run_fields) -> None:
    model, (base, residual) = untrained(superposition), run_fields
    model.residual_net.set_scales(base, base[2:] - base[:-2], residual)
    batch = windows().sample_batch(32, step_generator(0, 0))
    inputs, after = ResidualLoss(model).inputs(batch)
    assert inputs[:, :, 0].mean().abs() < 1e-5
    deviations = [*inputs.std(dim=(0, 1, 3, 4, 5)).tolist(), after.std().item()]
    assert deviations == pytest.approx([1] * 4, rel=0.1)


def test_an_untrained_net_lets_the_residual_be(superposition, run_fields) -> None:
    net, (b, e) = untrained(superposition).residual_net, run_fields
    net.set_scales(b, b, e)
    with torch.no_grad():
        torch.testing.assert_close(net(b[2:4], b[:2], e[:2]), e[:2])


# --- error -----------------------------------------------------------------------------------


def test_error_of_persistence(superposition, run_fields) -> None:
    """An untrained net leaves the residual of the start, the true nuclei move on."""
    model, (base, residual) = untrained(superposition), run_fields
    model.residual_net.set_scales(base, base, residual)
    found = residual_error(model, windows(4), every=7, batch=2)
    starts, density = np.arange(0, 32, 7), (base + residual).flatten(1)
    expected = {}
    for name, frames in {"validation_l2": 2, "validation_l2_after_4": 8}.items():
        after = density[starts + frames]
        change = (residual[starts + frames] - residual[starts]).flatten(1)
        expected[name] = (change.norm(dim=1) / after.norm(dim=1)).mean().item()
    assert found == pytest.approx(expected, rel=1e-4)


# --- the training ----------------------------------------------------------------------------


def test_training_lowers_loss_and_error(superposition, trained) -> None:
    model, rows = trained
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert mean_loss(rows[-8:]) < 0.75 * mean_loss(rows[:8])
    start, end = (
        residual_error(m, windows(5), every=4) for m in (untrained(superposition), model)
    )
    assert end["validation_l2"] < 0.85 * start["validation_l2"]
    assert end["validation_l2_after_5"] < 0.8 * start["validation_l2_after_5"]
    assert not model.residual_net.training


def test_unrolled_training_runs(superposition) -> None:
    model, rows = train(superposition, unroll=2)
    assert mean_loss(rows[-8:]) < 0.75 * mean_loss(rows[:8])
    start, end = (
        residual_error(m, windows(5), every=4)["validation_l2_after_5"]
        for m in (untrained(superposition), model)
    )
    assert end < 0.8 * start


def test_the_front_door_trains_it_too(superposition) -> None:
    models = [untrained(superposition) for _ in range(2)]
    options = {"steps": 2, "batch": 1, "fabric": Fabric(accelerator="cpu", devices=1)}
    rows = densitykit.train(models[0], Windows(liquid_run(n=N), 12.0), **options)
    again = train_emulator(models[1], liquid_run(n=N), **options)
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]


def test_scales_are_those_of_the_run(run_fields, trained) -> None:
    net, (base, residual) = trained[0].residual_net, run_fields
    scales = [base.std(), (base[2:] - base[:-2]).std(), residual.std()]
    torch.testing.assert_close(net.scales, torch.stack(scales), rtol=0.02, atol=0)
    torch.testing.assert_close(net.mean, base.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("white_noise", [0.3, 0.0])
def test_memory_of_a_long_rollout_does_not_grow(superposition, run_fields, white_noise) -> None:
    """Three times along the path of the nuclei and back, from a memory far off.

    Without white noise in training it does: waves that residuals hardly have.
    """
    model, _ = train(superposition, steps=80, loss={"white_noise": white_noise})
    base, true = run_fields
    residual, sizes = 3 * true[:1].roll(4, 1), []
    path = [*range(0, 38, 2), *range(38, 0, -2)]
    with torch.no_grad():
        for _ in range(3):
            for i, j in zip(path, [*path[1:], path[0]], strict=True):
                residual = model.residual_net(base[j, None], base[i, None], residual)
                sizes.append(float(residual.norm() / true[j].norm()))
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


def test_a_stopped_training_resumes_where_it_was(superposition, trained, tmp_path) -> None:
    """The same to rounding: two threads do not add in the same order twice."""

    def stop() -> dict[str, float]:
        raise Stop

    with pytest.raises(Stop):
        train(superposition, tmp_path, validate=stop, validate_every=21)
    assert (tmp_path / "state.npz").exists()
    model, rows = train(superposition, tmp_path)
    expected_model, expected = trained
    losses, others = ([row["loss"] for row in found] for found in (rows, expected))
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    weights, others = (m.residual_net.state_dict() for m in (model, expected_model))
    for name in others:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-3, atol=1e-4)


def test_settings_of_the_loss_are_kept(superposition, tmp_path) -> None:
    """They belong to the training: another loss does not continue it."""
    options = {"steps": 2, "batch": 1}
    train(superposition, tmp_path, loss={"forget": 0.5}, **options)
    with pytest.raises(UnfinishedError, match="objective forget is 0.5, not 0.2"):
        train(superposition, tmp_path, loss={"forget": 0.2}, **options)


# --- all parts -------------------------------------------------------------------------------


def test_a_card_makes_the_emulator_again(tmp_path) -> None:
    options = {"force_field": FORCE_FIELD, "substeps": 4, "temperature": 500.0, **TINY}
    model, card = fit_parts(liquid_run(), 18.0, every=2, **options)
    assert (model.horizon, model.domain.time_step, model.species) == (18.0, 6.0, (3,))
    np.testing.assert_allclose(model.domain.voxel, 7.0 / 16 * np.eye(3))
    assert (model.substeps, model.temperature, model.force_field.cutoff) == (4, 500.0, 3.4)
    save_model(model, tmp_path / "liquid", card)
    again = load_model(tmp_path / "liquid")
    assert again.substeps == 4 and again.residual_net.stride == 2
    weights = model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in again.state_dict().items())
    for name in ("filter_nodes", "filter_weights", "superposition.weights"):
        assert weights[name].any()
    assert weights["force_field.coefficients"].any()


@pytest.mark.parametrize("name", ["sodium", "nacl", "hexagonal"])
def test_parts_follow_from_the_run(name, tmp_path) -> None:
    """Temperature by the masses, steps from frame to frame, radial functions from distances."""
    run = made_up_run(name)
    options = {"cutoff": 4.0, "degree": 1, "pair": 6}
    model, card = fit_parts(run, 10.0, every=4, force_field=options, **TINY)
    kelvin = kinetic_temperature(run.velocities.values, atomic_masses(run.numbers)).mean()
    assert model.temperature == pytest.approx(kelvin, rel=1e-3)
    assert (model.substeps, model.domain.time_step) == (2, 5.0)
    several = len(model.species) > 1
    assert model.force_field.radial == (3 if several else 6)
    assert (model.filter is None) == several
    assert 0.5 < model.force_field.closest <= 2.0
    still = fit_parts(run.drop_vars("velocities"), 10.0, every=4, force_field=options, **TINY)[0]
    assert still.temperature == pytest.approx(kelvin, rel=0.1)
    told = run.assign_attrs(thermostat="velocity rescaling, 250 fs, 290 K")
    told = fit_parts(told, 10.0, every=4, force_field=options, **TINY)[0]
    assert (told.relaxation, told.temperature) == (250.0, 290.0)
    rows = train_emulator(model, run, run, steps=2, batch=2, validate_every=2)
    assert rows[-1]["validation_l2"] < 0.02
    save_model(model, tmp_path / name, card)
    assert load_model(tmp_path / name).species == model.species


def test_a_horizon_is_a_multiple_of_the_time_between_frames() -> None:
    with pytest.raises(TrajectoryError, match="horizon 9 fs is no multiple of the 6 fs"):
        fit_parts(liquid_run(n=N), 9.0)


@pytest.mark.parametrize("name", ["positions", "forces", "numbers"])
def test_parts_need_an_ab_initio_run(name) -> None:
    with pytest.raises(TrajectoryError, match=f"'{name}' is missing or not finite"):
        fit_parts(liquid_run(n=N).drop_vars(name), every=4, force_field=FORCE_FIELD)


def test_a_density_that_is_not_finite_is_named() -> None:
    run = liquid_run(n=N).copy(deep=True)
    run["density"][8, 1, 2, 3] = np.nan
    with pytest.raises(TrajectoryError, match="density.* frame 8"):
        fit_parts(run, 12.0, every=8, force_field=FORCE_FIELD)
