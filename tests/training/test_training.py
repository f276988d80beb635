"""Losses against closed forms; the loop: falls, survives SIGKILL, runs on two processes.

Run as a script, this file is a training that is killed, or one of two ranks (see the end).
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import moving_atoms, run_of
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from densitykit.assess import one_step_errors
from densitykit.data.transforms import LogNormal
from densitykit.data.windows import Window, Windows, step_generator
from densitykit.errors import ShapeError, TrajectoryError, UnfinishedError
from densitykit.models import LatentDiffusion, SurrogateUNet
from densitykit.training import (
    LatentDiffusionLoss,
    OneStepLoss,
    copy_autoencoder,
    fit,
    train,
    train_latent_diffusion,
)

HORIZON = 4.0
STEPS = 12
SHORT = {"steps": STEPS, "batch": 2, "learning_rate": 0.02, "seed": 5, "save_every": 4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that two trainings can be compared to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_windows(frames: int = 18, n: int = 8, horizon: float = HORIZON) -> Windows:
    """A wave that moves through the cell, 2 fs apart."""
    x = np.arange(n) / n
    t = 2.0 * np.arange(frames)[:, None, None, None]
    omega = 2 * np.pi / 60
    phase = 2 * np.pi * (x[:, None, None] + 2 * x[:, None]) - omega * t
    other = 2 * np.pi * (x - x[:, None]) + 2 * omega * t
    return Windows(run_of(0.3 + 0.1 * np.sin(phase) + 0.1 * np.cos(other), 2.0), horizon)


def constants() -> dict[str, float]:
    transform = LogNormal.of(small_windows())
    return {"mu": transform.mu, "sigma": transform.sigma, "eps": 0.01, "horizon": HORIZON}


def small_surrogate(seed: int = 0) -> SurrogateUNet:
    torch.manual_seed(seed)
    return SurrogateUNet(**constants(), widths=(8, 16), blocks=(1, 1))


def small_diffusion(seed: int = 0) -> LatentDiffusion:
    torch.manual_seed(seed)
    options = {
        "autoencoder_width": 8,
        "autoencoder_blocks": 1,
        "widths": (8, 16),
        "blocks": (1, 1),
    }
    return LatentDiffusion(**constants(), latent_channels=4, embedding=8, **options)


def cpu(**options: object) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **options)


def train_short(
    run_dir: Path | None = None, **changes: object
) -> tuple[SurrogateUNet, list[dict[str, float]]]:
    model = small_surrogate()
    options = {"fabric": cpu()} | SHORT | changes
    return model, train(model, small_windows(), run_dir=run_dir, **options)


def curve(rows: list[dict[str, float]], *keys: str) -> list[tuple[float, ...]]:
    return [tuple(row[k] for k in ("step", "loss", "learning_rate", *keys)) for row in rows]


def normalised(model: nn.Module, count: int = 8) -> tuple[Tensor, Tensor]:
    windows = small_windows()
    return model.normalised_pair(windows[:count], windows.lag)


def one_step_l2(model: nn.Module) -> float:
    return one_step_errors(model, small_windows())[:, 1].mean()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# --- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lambda_1", "lambda_2", "frozen", "names"),
    [
        (0.0, 0.0, False, {"ae"}),
        (1.0, 0.0, False, {"ae", "ldm"}),
        (0.5, 2.0, False, {"ae", "ldm", "sjsd"}),
        (0.5, 2.0, True, {"ldm", "sjsd"}),
        (1.0, 0.0, True, {"ldm"}),
    ],
)
@pytest.mark.parametrize("reading", ["spatial", "value"])
def test_terms_of_the_loss(
    lambda_1: float, lambda_2: float, frozen: bool, names: set[str], reading: str
) -> None:
    model = small_diffusion()
    model.autoencoder.requires_grad_(not frozen)
    loss = LatentDiffusionLoss(model, lambda_1, lambda_2, reading)
    terms = loss(*normalised(model), step_generator(0, 0))
    assert terms.keys() == names | {"loss"}
    weights = {"ae": 1.0, "ldm": lambda_1, "sjsd": lambda_2}
    expected = sum(weights[k] * terms[k].item() for k in names)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert all(v.ndim == 0 and v.item() > 0 for v in terms.values())


def test_each_term_trains_its_own_part() -> None:
    """L_AE moves the autoencoder alone, L_LDM the denoiser alone."""
    model = small_diffusion()
    terms = LatentDiffusionLoss(model, 1.0)(*normalised(model), step_generator(0, 0))
    autoencoder = list(model.autoencoder.parameters())
    denoiser = [*model.net.parameters(), *model.embed.parameters()]

    def reached(term: Tensor, parameters: list[Tensor]) -> bool:
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        return any(g is not None and bool(g.any()) for g in grads)

    assert reached(terms["ae"], autoencoder) and not reached(terms["ae"], denoiser)
    assert reached(terms["ldm"], denoiser) and not reached(terms["ldm"], autoencoder)


def test_reconstruction_term_by_hand() -> None:
    model = small_diffusion().eval()
    state, later = normalised(model)
    both = torch.cat([state, later])
    expected = (model.decode(model.encode(both)) - both).square().mean()
    terms = LatentDiffusionLoss(model, 0.0)(state, later, step_generator(0, 0))
    torch.testing.assert_close(terms["ae"], expected)


def test_untrained_denoising_loss_is_one() -> None:
    """With F = 0 and increments of unit variance, every noise level costs one."""
    model = small_diffusion()
    state, later = normalised(model, len(small_windows()))
    model.set_latent_scales(state, later)
    loss = LatentDiffusionLoss(model, condition_noise=0.0)
    values = [loss(state, later, step_generator(0, i))["ldm"].item() for i in range(20)]
    assert np.mean(values) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("reading", ["spatial", "value"])
def test_perfect_prediction_costs_nothing(reading: str) -> None:
    """The target is the true next latent, whatever the noise on the conditioning latent."""
    model = small_diffusion()
    model.encode = model.decode = lambda x: x
    model.increment_scale = torch.full((2, 1, 1, 1), 0.3)
    state, later = normalised(model)
    model.denoise = lambda x, sigma, latent: (later - latent) / 0.3
    terms = LatentDiffusionLoss(model, 1.0, 1.0, reading, condition_noise=0.5)(
        state, later, step_generator(0, 0)
    )
    assert abs(terms["ldm"].item()) < 1e-6
    assert abs(terms["sjsd"].item()) < 1e-6
    model.denoise = lambda x, sigma, latent: torch.zeros_like(x)  # persistence of a noisy state
    terms = LatentDiffusionLoss(model, 1.0, 1.0, reading, condition_noise=0.5)(
        state, later, step_generator(0, 0)
    )
    assert terms["ldm"].item() > 0.1 and terms["sjsd"].item() > 1e-3


@pytest.mark.parametrize("reading", ["spatial", "value"])
def test_divergence_of_a_half_precision_prediction(reading: str) -> None:
    """In mixed precision the decoder returns bfloat16; the divergence is still one of float32."""
    model = small_diffusion()
    model.encode, model.decode = (lambda x: x), (lambda x: x.bfloat16())
    model.increment_scale = torch.ones(2, 1, 1, 1)
    state, later = normalised(model)
    model.denoise = lambda x, sigma, latent: later - latent
    terms = LatentDiffusionLoss(model, 1.0, 1.0, reading)(state, later, step_generator(0, 0))
    assert terms["sjsd"].dtype == torch.float32
    assert 0 <= terms["sjsd"].item() < 1e-4


def test_regression_loss_of_linear_extrapolation() -> None:
    model = small_surrogate()
    state, later = normalised(model)
    extrapolated = torch.stack([state.sum(1), state[:, 1]], 1)
    terms = OneStepLoss(model, input_noise=0.0)(state, later, step_generator(0, 0))
    torch.testing.assert_close(terms["loss"], (extrapolated - later).square().mean())
    noisy = OneStepLoss(model, input_noise=0.5)(state, later, step_generator(0, 0))
    assert noisy["loss"] > terms["loss"] + 0.05


def test_copied_autoencoder() -> None:
    """The receiver encodes as the donor does and keeps its own denoiser."""
    donor, receiver, untouched = small_diffusion(1), small_diffusion(2), small_diffusion(2)
    state, later = normalised(donor)
    donor.set_latent_scales(state, later)
    copy_autoencoder(receiver, donor)
    assert torch.equal(receiver.encode(state), donor.encode(state))
    assert torch.equal(receiver.increment_scale, donor.increment_scale)
    assert same_weights(receiver.net, untouched.net) and not same_weights(receiver.net, donor.net)


# --- the loop --------------------------------------------------------------------------------


def test_surrogate_overfits() -> None:
    model, windows = small_surrogate(), small_windows()
    start = one_step_l2(model)
    rows = train(
        model,
        windows,
        steps=100,
        batch=4,
        learning_rate=1e-2,
        input_noise=0.0,
        ema=0.9,
        fabric=cpu(),
    )
    assert np.mean([r["loss"] for r in rows[-10:]]) < 0.3 * np.mean([r["loss"] for r in rows[:10]])
    assert one_step_l2(model) < 0.6 * start
    assert not model.training


def test_latent_diffusion_overfits() -> None:
    model = small_diffusion()
    rows = train_latent_diffusion(
        model,
        small_windows(),
        autoencoder_steps=60,
        steps=60,
        lambda_2=1.0,
        batch=4,
        learning_rate=1e-2,
        ema=0.9,
        fabric=cpu(),
    )
    for block, term, factor in [(0, "ae", 0.3), (1, "ldm", 0.8)]:
        values = [r[term] for r in rows if r["block"] == block]
        assert len(values) == 60
        assert np.mean(values[-10:]) < factor * np.mean(values[:10])
    z = model.encode(normalised(model, len(small_windows()))[0])
    assert z.std(dim=(0, 2, 3, 4)).tolist() == pytest.approx([1] * 4, rel=0.05)
    assert np.isfinite(one_step_errors(model, small_windows())).all()


def test_rows_and_schedule() -> None:
    checks: list[float] = []

    def validate() -> dict[str, float]:
        checks.append(1.0)
        return {"validation_x": float(len(checks))}

    _, rows = train_short(validate=validate, validate_every=5)
    assert [r["step"] for r in rows] == list(range(STEPS))
    assert [r["step"] for r in rows if "validation_x" in r] == [4, 9, STEPS - 1]
    for step, row in enumerate(rows):
        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        assert row["learning_rate"] == pytest.approx(0.02 * (step + 1) / 50 * cosine)


def test_averaged_weights() -> None:
    """The model ends with the average of its weights; ``ema=0`` is the last weights themselves."""
    seen: list[dict[str, Tensor]] = []

    class Watched(OneStepLoss):
        def forward(self, *batch: Tensor) -> dict[str, Tensor]:
            seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
            return super().forward(*batch)

    last, averaged = small_surrogate(), small_surrogate()
    fit(Watched(last), small_windows(), **SHORT, ema=0.0, fabric=cpu())
    trace = [*seen[1:], last.state_dict()]
    expected = {k: v.clone() for k, v in seen[0].items()}
    for step, weights in enumerate(trace):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, weight in weights.items():
            expected[name].lerp_(weight, 1 - decay)
    fit(OneStepLoss(averaged), small_windows(), **SHORT, ema=0.5, fabric=cpu())
    for name, weight in averaged.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)


def test_validation_sees_the_averaged_weights_and_leaves_no_trace() -> None:
    model, seen = small_surrogate(), []

    def validate() -> dict[str, float]:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        assert not model.training
        return {}

    options = SHORT | {"fabric": cpu(), "validate": validate, "validate_every": 5}
    rows = train(model, small_windows(), **options)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, seen[-1][name])
    _, plain = train_short()
    assert curve(rows) == curve(plain)


def test_training_repeats() -> None:
    (model, rows), (again, rows_again) = train_short(), train_short()
    assert curve(rows) == curve(rows_again) and same_weights(model, again)
    assert curve(train_short(seed=6)[1]) != curve(rows)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precision(precision: str) -> None:
    """Mixed precision trains, and its loss terms are near those of single precision."""
    model = small_diffusion()
    loss = LatentDiffusionLoss(model, 1.0, 1.0)
    # weights away from zero, so that every term has something to measure
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    single = loss(*normalised(model, 2), step_generator(5, 0))
    windows = small_windows()
    windows.sample_batch = lambda batch, generator: windows[:2]
    rows = fit(loss, windows, **SHORT | {"steps": 3}, fabric=cpu(precision=precision))
    assert all(math.isfinite(v) for row in rows for v in row.values())
    for name in ("ae", "ldm", "sjsd"):
        assert rows[0][name] == pytest.approx(single[name].item(), rel=0.1), name
    assert all(p.dtype == torch.float32 for p in model.parameters())


# --- one front door --------------------------------------------------------------------------


class Line(nn.Module):
    """A module of one's own: the factor by which the density grows in a horizon."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.lag = 2

    def inputs(self, window: Window) -> tuple[Tensor, Tensor]:
        return window.at(0), window.at(self.lag)

    def forward(self, now: Tensor, later: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": (self.factor * now - later).square().mean()}


def test_a_module_of_ones_own_is_trained() -> None:
    growth = 1.1 ** np.arange(18)[:, None, None, None]
    windows = Windows(run_of(growth * np.ones((18, 4, 4, 4)), 2.0), HORIZON)
    model = Line()
    options = {"learning_rate": 0.05, "ema": 0.0, "fabric": cpu()}
    rows = train(model, windows, steps=150, batch=4, **options)
    assert len(rows) == 150 and rows[-1].keys() == {"step", "loss", "learning_rate", "seconds"}
    assert model.factor.item() == pytest.approx(1.1**2, rel=1e-2)


def test_what_cannot_be_trained_is_named() -> None:
    with pytest.raises(ShapeError, match="a Linear says not how it is trained; .*inputs"):
        train(nn.Linear(2, 2), small_windows(), steps=2)


@pytest.mark.parametrize("make", [small_surrogate, small_diffusion])
def test_held_out_windows_are_watched(make: Callable[[], nn.Module]) -> None:
    """The figure of the last row is the one-step error of the trained model."""
    model, held_out = make(), small_windows(24)
    options = {"batch": 2, "fabric": cpu(), "validate_every": 2}
    more = {"autoencoder_steps": 3} if isinstance(model, LatentDiffusion) else {}
    rows = train(model, small_windows(), held_out, steps=5, **options, **more)
    watched = [row["step"] for row in rows if "validation_l2" in row]
    assert watched == [1, 3, 4]
    expected = one_step_errors(model, held_out, every=4)[:, 1].mean()
    assert rows[-1]["validation_l2"] == pytest.approx(expected, rel=1e-6)


def test_training_in_any_cell_on_any_grid() -> None:
    """Two species, orthorhombic, 2.5 fs, a grid that is no multiple of the stride."""
    cell = np.diag([4.0, 5.0, 6.0])
    run = moving_atoms([11, 17], frames=16, time_step=2.5, cell=cell, grid=(7, 9, 10))
    windows = Windows(run, 5.0)
    model = SurrogateUNet(**SurrogateUNet.arguments_for(windows), widths=(8, 16), blocks=(1, 1))
    rows = train(model, windows, windows, steps=3, batch=2, fabric=cpu())
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert 0 < rows[-1]["validation_l2"] < 1


def test_training_keeps_no_more_frames_than_it_may() -> None:
    """However long the run: frames in memory, not bytes of the process, are counted."""
    density = np.random.default_rng(0).uniform(0.2, 0.4, (120, 8, 8, 8))
    windows = Windows(run_of(density, 2.0), HORIZON, cache_bytes=12 * 4 * 8**3)
    most, read = [], windows.frames._read

    def watched(start: int) -> None:
        read(start)
        most.append(len(windows.frames.kept))

    windows.frames._read = watched
    train(small_surrogate(), windows, windows, steps=6, batch=4, fabric=cpu())
    assert len(most) > 20 and max(most) == 12


def test_a_bad_frame_stops_the_training_by_name() -> None:
    density = np.random.default_rng(0).uniform(0.2, 0.4, (18, 8, 8, 8))
    density[11, 0, 0, 0] = np.nan
    with pytest.raises(TrajectoryError, match="frame 11"):
        train(small_surrogate(), Windows(run_of(density), HORIZON), steps=3, fabric=cpu())


# --- killed and resumed ----------------------------------------------------------------------


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """This file as a program, with one thread."""
    paths = [str(Path(__file__).parents[k]) for k in (1, 2)]  # what tests share, and the package
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_killed_training_resumes_exactly(tmp_path: Path) -> None:
    """SIGKILL half-way through the second save: the same curve, the same weights."""
    model, rows = train_short(validate=lambda: {"validation_x": 1.5}, validate_every=3)
    done = run_script("killed", tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert steps_saved(tmp_path) == 4
    assert len(list(tmp_path.glob(".state.npz.densitykit-partial-*"))) == 1
    resumed, continued = train_short(
        tmp_path, validate=lambda: {"validation_x": 1.5}, validate_every=3
    )
    assert curve(continued) == curve(rows)
    assert [r.get("validation_x") for r in continued] == [r.get("validation_x") for r in rows]
    assert same_weights(model, resumed)
    assert all(
        b["seconds"] >= a["seconds"] for a, b in zip(continued, continued[1:], strict=False)
    )
    with open(tmp_path / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    assert [float(r["loss"]) for r in log] == [r["loss"] for r in rows]
    assert log[2]["validation_x"] == "1.5" and log[3]["validation_x"] == ""


def steps_saved(run_dir: Path) -> int:
    return len(json.loads(str(np.load(run_dir / "state.npz")["rows"])))


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    model, rows = train_short(tmp_path)
    before = (tmp_path / "state.npz").stat().st_mtime_ns
    again, rows_again = train_short(tmp_path)
    assert rows_again == rows and same_weights(model, again)
    assert (tmp_path / "state.npz").stat().st_mtime_ns == before


def test_both_blocks_resume(tmp_path: Path) -> None:
    """A latent diffusion model interrupted in its second block ends as if nothing had happened."""
    options = {"autoencoder_steps": 6, "steps": 8, "batch": 2, "save_every": 3}

    class Stop(Exception):
        pass

    def stop() -> dict[str, float]:
        raise Stop

    def trained(
        run_dir: Path | None, **more: object
    ) -> tuple[LatentDiffusion, list[dict[str, float]]]:
        model = small_diffusion()
        rows = train_latent_diffusion(
            model, small_windows(), run_dir=run_dir, fabric=cpu(), **options, **more
        )
        return model, rows

    model, rows = trained(None)
    with pytest.raises(Stop):
        trained(tmp_path, validate=stop, validate_every=5)
    resumed, continued = trained(tmp_path)
    assert curve(continued, "block") == curve(rows, "block")
    assert same_weights(model, resumed)


def test_finished_training_goes_on_with_more_steps(tmp_path: Path) -> None:
    """The rate rises and falls anew; killed in between, it ends as if nothing had happened."""
    _, first = train_short(tmp_path / "a")
    more = {"steps": 2 * STEPS, "save_every": 5}
    model, rows = train_short(tmp_path / "a", **more)
    assert curve(rows)[:STEPS] == curve(first) and len(rows) == 2 * STEPS
    rates = [row["learning_rate"] for row in rows]
    assert rates[STEPS:] == rates[:STEPS]

    class Stop(Exception):
        pass

    def stop() -> dict[str, float]:
        raise Stop

    train_short(tmp_path / "b")
    with pytest.raises(Stop):
        train_short(tmp_path / "b", validate=stop, validate_every=18, **more)
    with pytest.raises(UnfinishedError, match="15 of 24 steps are done, 30 are asked for"):
        train_short(tmp_path / "b", steps=30)
    again, resumed = train_short(tmp_path / "b", **more)
    assert curve(resumed) == curve(rows) and same_weights(model, again)
    with pytest.raises(UnfinishedError, match="24 of 24 steps are done, 12 are asked for"):
        train_short(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch": 3}, "batch is 2, not 3"),
        ({"seed": 6}, "seed is 5, not 6"),
        ({"learning_rate": 0.1}, "learning_rate is 0.02, not 0.1"),
        ({"ema": 0.5}, "ema is 0.999, not 0.5"),
    ],
)
def test_other_settings_are_refused_or_begun_anew(
    change: dict[str, float], named: str, tmp_path: Path
) -> None:
    train_short(tmp_path)
    with pytest.raises(UnfinishedError, match=rf"state\.npz: .*{named}; .*--restart"):
        train_short(tmp_path, **change)
    model, rows = train_short(None, **change)
    again, repeated = train_short(tmp_path, restart=True, **change)
    assert curve(repeated) == curve(rows) and same_weights(model, again)


def test_another_version_of_the_code_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = train_short(tmp_path)
    monkeypatch.setattr("densitykit.io.work.__version__", "9.9")
    with pytest.warns(UserWarning, match=r"densitykit is .*, not 9\.9"):
        assert curve(train_short(tmp_path)[1]) == curve(rows)


def test_another_autoencoder_below_is_refused(tmp_path: Path) -> None:
    """One that differs by rounding is not: fits repeat no better."""

    def run(factor: float) -> list[tuple[float, ...]]:
        model = small_diffusion()
        with torch.no_grad():
            model.autoencoder.encoder_linear.weight.mul_(factor)
        options = {"autoencoder_steps": 0, "steps": 2, "batch": 1, "fabric": cpu()}
        return curve(train_latent_diffusion(model, small_windows(), run_dir=tmp_path, **options))

    assert run(1.0) == run(1 + 1e-6)
    with pytest.raises(UnfinishedError, match="encoder_linear.weight, which is not trained, was"):
        run(1.1)


def test_state_of_another_objective_is_refused(tmp_path: Path) -> None:
    """The same network under another loss is another training."""
    model = small_diffusion()
    fit(LatentDiffusionLoss(model, 1.0), small_windows(), **SHORT, run_dir=tmp_path, fabric=cpu())
    with pytest.raises(UnfinishedError, match=r"state\.npz"):
        fit(
            LatentDiffusionLoss(model, 1.0, 1.0),
            small_windows(),
            **SHORT,
            run_dir=tmp_path,
            fabric=cpu(),
        )


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    train_short(tmp_path)
    torch.manual_seed(0)
    wider = SurrogateUNet(**constants(), widths=(8, 24), blocks=(1, 1))
    with pytest.raises(UnfinishedError, match=r"state\.npz: state of another model; "):
        train(wider, small_windows(), run_dir=tmp_path, fabric=cpu(), **SHORT)


def test_state_of_other_data_is_refused(tmp_path: Path) -> None:
    """The same settings, another run, another horizon: another training."""
    train_short(tmp_path)
    with pytest.raises(UnfinishedError, match="data is .*crc32 .* not .*crc32 .*another path"):
        train(small_surrogate(), small_windows(19), run_dir=tmp_path, fabric=cpu(), **SHORT)
    with pytest.raises(UnfinishedError, match="windows, 4 fs.*windows, 6 fs"):
        other = small_windows(horizon=6.0)
        train(small_surrogate(), other, run_dir=tmp_path, fabric=cpu(), **SHORT)


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "pickle", "foreign", "one bit", "moments missing"]
)
def test_damaged_state_is_refused(damage: str, tmp_path: Path) -> None:
    train_short(tmp_path)
    path = tmp_path / "state.npz"
    arrays = dict(np.load(path))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        torch.save({"weight.0": torch.ones(3)}, path)
    elif damage == "foreign":
        np.savez(path, **{"weight.0": np.ones(3), "recipe": arrays["recipe"]})
    elif damage == "one bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    else:
        np.savez(path, **{k: v for k, v in arrays.items() if k != "exp_avg.3"})
    with pytest.raises(UnfinishedError, match=r"^[^\n]*state\.npz: [^\n]*; [^\n]*$"):
        train_short(tmp_path)


# --- two processes ---------------------------------------------------------------------------


def averaged_gradients(seed: int) -> SurrogateUNet:
    """What two ranks have to arrive at, step by step in one process."""
    model = small_surrogate(seed)
    objective, windows = OneStepLoss(model), small_windows()
    trained = list(model.parameters())
    average = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in (0, 1):
            generator = step_generator(SHORT["seed"], step, rank)
            inputs = objective.inputs(windows.sample_batch(SHORT["batch"], generator))
            (objective(*inputs, generator)["loss"] / 2).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = SHORT["learning_rate"] * (step + 1) / 50 * cosine
        optimizer.step()
        for mean, p in zip(average, trained, strict=True):
            mean.lerp_(p.detach(), 1 - (1 + step) / (10 + step))
    model.load_state_dict(
        dict(zip(dict(model.named_parameters()), average, strict=True)), strict=False
    )
    return model


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    """Two ranks, initialised differently, start as rank 0 and follow the averaged gradients."""
    done = run_script("ranks", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"rank-{r}.safetensors") for r in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    expected, alone = averaged_gradients(seed=0).state_dict(), train_short()[0].state_dict()
    for name, weight in first.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
    assert max((first[k] - alone[k]).abs().max().item() for k in first) > 1e-3
    assert steps_saved(tmp_path) == STEPS
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "log.csv",
        "rank-0.safetensors",
        "rank-1.safetensors",
        "state.npz",
    ]


# --- this file as a program ------------------------------------------------------------------


def killed_training(run_dir: Path) -> None:
    """A short training that kills itself in its second save (step 8): written, not yet renamed."""

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def validate() -> dict[str, float]:
        if (run_dir / "state.npz").exists():
            Path.replace = kill
        return {"validation_x": 1.5}

    train_short(run_dir, validate=validate, validate_every=3)


def train_as_rank(run_dir: Path) -> None:
    """One of two ranks; Fabric starts the other with the same command line."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model = small_surrogate(seed=fabric.global_rank)
    train(model, small_windows(), run_dir=run_dir, fabric=fabric, **SHORT)
    save_file(model.state_dict(), run_dir / f"rank-{fabric.global_rank}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        killed_training(Path(sys.argv[2]))
    else:
        train_as_rank(Path(sys.argv[2]))
