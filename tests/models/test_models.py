"""Networks and emulators on the grid: symmetry, conservation, domains, sampler, checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import HEXAGONAL, moving_atoms, run_of
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from densitykit.assess import one_step_errors
from densitykit.data.transforms import LogNormal
from densitykit.data.windows import Window, Windows
from densitykit.errors import CheckpointError, WindowError
from densitykit.models import (
    Autoencoder,
    Domain,
    Emulator,
    FieldEmulator,
    LatentDiffusion,
    SurrogateUNet,
    checkpoint,
    load_model,
    read_provenance,
    save_model,
)
from densitykit.models.base import FieldState
from densitykit.nn.layers import UNet, circular_conv, depth_to_space, space_to_depth
from densitykit.rollout import rollout

CONSTANTS = {"mu": -1.0, "sigma": 0.5, "eps": 0.01, "horizon": 4.0}
SMALL = {
    SurrogateUNet: CONSTANTS | {"widths": [8, 16], "blocks": [1, 1]},
    LatentDiffusion: CONSTANTS
    | {
        "latent_channels": 3,
        "autoencoder_width": 8,
        "autoencoder_blocks": 1,
        "widths": [8, 16],
        "blocks": [1, 1],
        "embedding": 8,
    },
}
SPACE = (-3, -2, -1)


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move all weights away from their start, where many layers are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module.eval()


def small(kind: type[nn.Module], **changes: object) -> nn.Module:
    return stirred(kind(**(SMALL[kind] | changes)))


def physical_state(batch: int = 2, n: int = 8) -> Tensor:
    """Random density (about 0.3 angstrom**-3) and a rate of a tenth of it per fs."""
    generator = torch.Generator().manual_seed(1)
    rho = torch.exp(0.5 * torch.randn(batch, n, n, n, generator=generator) - 1.2)
    rate = 0.1 * rho * torch.randn(rho.shape, generator=generator)
    return torch.stack([rho, rate - rate.mean(SPACE, keepdim=True)], dim=1)


def as_state(x: Tensor) -> FieldState:
    """Density and rate (B, 2, X, Y, Z) as the state of an emulator on the grid."""
    mean = x[:, 0].double().mean(SPACE, keepdim=True)
    return FieldState(x, mean, tuple(x.shape[2:]))


def stepped(model: nn.Module, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Density and rate one horizon later."""
    return model.step(as_state(x), generator).fields


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


both_models = pytest.mark.parametrize("kind", list(SMALL))


# --- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("width", [1, 3])
def test_convolution_is_that_of_torch_however_many_fields(batch: int, width: int) -> None:
    ours = circular_conv(3, 5, width)
    plain = nn.Conv3d(3, 5, width, padding=width // 2, padding_mode="circular")
    plain.load_state_dict(ours.state_dict())
    x, y = (torch.randn(batch, 3, 6, 4, 8, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    expected, found = plain(y), ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for out in (expected, found):
        out.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_depth_to_space_inverts_space_to_depth(patch: int) -> None:
    x = torch.arange(2 * 3 * 6 * 12 * 6).reshape(2, 3, 6, 12, 6)
    y = space_to_depth(x, patch)
    assert y.shape == (2, 3 * patch**3, 6 // patch, 12 // patch, 6 // patch)
    torch.testing.assert_close(depth_to_space(y, patch), x)
    # the channels of a coarse cell are the points of its patch
    points = x[1, :, :patch, patch : 2 * patch, :patch].flatten().tolist()
    assert sorted(y[1, :, 0, 1, 0].tolist()) == sorted(points)


def test_circular_convolution_is_the_one_of_the_torus() -> None:
    conv = circular_conv(1, 1).double()
    x = torch.randn(1, 1, 4, 5, 6, dtype=torch.float64)
    expected = conv.bias.reshape(1, 1, 1, 1, 1) + sum(
        conv.weight[0, 0, i, j, k] * x.roll((1 - i, 1 - j, 1 - k), SPACE)
        for i in range(3)
        for j in range(3)
        for k in range(3)
    )
    torch.testing.assert_close(conv(x), expected)
    assert not circular_conv(2, 2, zero=True)(torch.randn(1, 2, 4, 4, 4)).any()


@pytest.mark.parametrize(("patch", "widths"), [(1, (8,)), (2, (8, 16)), (1, (8, 8, 8))])
def test_unet_shapes(patch: int, widths: tuple[int, ...]) -> None:
    net = UNet(2, 3, widths, (1,) * len(widths), patch, embedding=4)
    assert net.stride == patch * 2 ** (len(widths) - 1)
    x, embedding = torch.randn(2, 2, 4, 8, 12), torch.randn(2, 4)
    assert not net(x, embedding).any()  # zero at the start of training
    out = stirred(net)(x, embedding)
    assert out.shape == (2, 3, 4, 8, 12) and out.isfinite().all()
    assert not torch.allclose(out, net(x, embedding + 1))


# --- symmetry and conservation ---------------------------------------------------------------


@both_models
def test_shapes(kind: type[nn.Module]) -> None:
    model, x = small(kind), physical_state()
    out = stepped(model, x, generator())
    assert isinstance(model, Emulator)
    assert out.shape == x.shape and out.dtype == torch.float32
    assert out.isfinite().all() and not out.requires_grad
    assert model.stride == 4


def test_latent_shapes() -> None:
    model, state = small(LatentDiffusion), torch.randn(2, 2, 8, 8, 8)
    latent = model.encode(state)
    assert latent.shape == (2, 3, 4, 4, 4)
    assert model.decode(latent).shape == state.shape
    assert model.sample(latent, generator()).shape == latent.shape


@both_models
def test_normalised_state_is_inverted(kind: type[nn.Module]) -> None:
    model, x = small(kind).double(), physical_state().double()
    x[:, 1] -= x[:, 1].mean(SPACE, keepdim=True)
    back = model.denormalise(model.normalise(x), x[:, 0].mean(SPACE, keepdim=True))
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    rho, rate = x.unbind(1)
    expected = torch.stack([(rho + 0.01).log() + 1, 4.0 * rate / (rho + 0.01)], 1) / 0.5
    torch.testing.assert_close(model.normalise(x), expected, rtol=1e-12, atol=1e-12)


@both_models
@pytest.mark.parametrize("cells", [(1, 0, 0), (0, 1, -1), (1, 2, 3)])
def test_shift_equivariance(kind: type[nn.Module], cells: tuple[int, ...]) -> None:
    """Every step commutes with periodic shifts by the stride; the sampler's noise moves along."""
    model, x = small(kind), torch.randn(2, 2, 12, 12, 12, generator=generator())
    shift = [c * model.stride for c in cells]
    if kind is LatentDiffusion:
        latent = model.encode(x)
        moved = model.encode(x.roll(shift, SPACE))
        steps = [c * model.stride // 2 for c in cells]  # the latent grid is coarser by the patch
        torch.testing.assert_close(moved, latent.roll(steps, SPACE), rtol=0, atol=1e-5)
        level = torch.tensor([0.3, 3.0])
        noisy = latent + torch.randn(latent.shape, generator=generator())
        ours = model.denoise(noisy, level, latent).roll(steps, SPACE)
        theirs = model.denoise(noisy.roll(steps, SPACE), level, moved)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        ours = model.decode(latent).roll(shift, SPACE)
        torch.testing.assert_close(model.decode(moved), ours, rtol=0, atol=1e-5)
    else:
        ours = model.advance(x).roll(shift, SPACE)
        torch.testing.assert_close(model.advance(x.roll(shift, SPACE)), ours, rtol=0, atol=1e-5)


@both_models
def test_supercell_of_copies(kind: type[nn.Module]) -> None:
    """The step of a 2x2x2 supercell of copies is the supercell of the step."""
    model, x = small(kind), physical_state(1)
    tiled = x.repeat(1, 1, 2, 2, 2)
    if (
        kind is LatentDiffusion
    ):  # without noise, which would break the periodicity of the small cell
        model.sample = lambda latent, generator: model.denoise(
            latent, latent.new_full((1,), 0.5), latent
        )
    ours = stepped(model, x).repeat(1, 1, 2, 2, 2)
    torch.testing.assert_close(stepped(model, tiled), ours, rtol=1e-4, atol=1e-5)


@both_models
def test_electron_count_is_exact(kind: type[nn.Module]) -> None:
    model, x = small(kind), physical_state(3)
    x[1] *= 2
    out = stepped(model, x, generator()).double()
    mean = x[:, 0].double().mean(SPACE)
    assert not torch.allclose(out[:, 0], x[:, 0].double(), rtol=0.01)  # the step does something
    torch.testing.assert_close(out[:, 0].mean(SPACE), mean, rtol=1e-6, atol=0)
    assert out[:, 0].min() > 0
    assert (out[:, 1].mean(SPACE).abs() <= 1e-6 * out[:, 1].std()).all()


# --- from raw frames, and back ---------------------------------------------------------------


def frames(grid: tuple[int, ...] = (8, 8, 8), **options: object) -> Windows:
    """Windows of two species in an orthorhombic cell, 2 fs apart, targets 4 fs ahead."""
    cell = options.pop("cell", np.diag([4.0, 5.0, 6.0]))
    run = moving_atoms([11, 11, 17], frames=12, cell=cell, grid=grid, **options)
    return Windows(run, 4.0)


class Identity(FieldEmulator):
    """A step that changes nothing, on a grid of multiples of four."""

    stride = 4

    def advance(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return state


@both_models
def test_init_makes_density_and_rate_of_raw_frames(kind: type[nn.Module]) -> None:
    model, window = small(kind), frames()[[0, 3]]
    state = model.init(window)
    rho = window.density.double()
    rate = (3 * rho[:, 2] - 4 * rho[:, 1] + rho[:, 0]) / (2 * 2.0)
    torch.testing.assert_close(state.fields[:, 0], window.at(0), rtol=0, atol=0)
    torch.testing.assert_close(state.fields[:, 1], rate.float(), rtol=0, atol=1e-7)
    assert torch.equal(model.density(state), window.at(0))


@both_models
def test_a_pair_is_two_states_a_horizon_apart(kind: type[nn.Module]) -> None:
    model, window = small(kind), frames()[[0, 3]]
    now, later = model.normalised_pair(window, 2)
    for found, end in ((now, 0), (later, 2)):
        expected = model.normalise(model.init(window.past(3, end)).fields)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(later[:, 0], model.transform.forward(window.at(2)))


@pytest.mark.parametrize("grid", [(14, 14, 14), (7, 9, 10), (8, 8, 8), (5, 4, 6)])
def test_any_grid_goes_in_and_comes_out(grid: tuple[int, ...]) -> None:
    """Resampled to the stride and back, the density is what it was, and so are the electrons."""
    model, window = Identity(**CONSTANTS), frames(grid)[[0, 3]]
    window = window.replace(density=window.density + 0.1)  # positive between the points, too
    state = model.init(window)
    assert all(n % 4 == 0 for n in state.fields.shape[2:])
    assert model.working_grid(grid) == tuple(state.fields.shape[2:])
    counts = window.at(0).double().mean(SPACE)
    for _ in range(3):
        density = model.density(state)
        assert tuple(density.shape) == (2, *grid)
        torch.testing.assert_close(density.double().mean(SPACE), counts, rtol=1e-6, atol=0)
        torch.testing.assert_close(density, window.at(0), rtol=1e-5, atol=0)
        state = model.step(state)


@both_models
@pytest.mark.parametrize("grid", [(14, 14, 14), (6, 9, 10)])
def test_networks_step_on_any_grid(kind: type[nn.Module], grid: tuple[int, ...]) -> None:
    model, window = small(kind), frames(grid)[[0, 3]]
    density = model.density(model.step(model.init(window), generator()))
    assert tuple(density.shape) == (2, *grid) and density.isfinite().all()
    counts = window.at(0).double().mean(SPACE)
    torch.testing.assert_close(density.double().mean(SPACE), counts, rtol=1e-6, atol=0)
    for state in model.normalised_pair(window, 2):
        assert tuple(state.shape[2:]) == model.working_grid(grid)


def test_arguments_follow_from_the_training_windows() -> None:
    windows = frames()
    card = SurrogateUNet.arguments_for(windows)
    assert json.loads(json.dumps(card))["horizon"] == 4.0
    whole = LogNormal.of(windows)
    assert (card["mu"], card["sigma"], card["eps"]) == (whole.mu, whole.sigma, whole.eps)
    model = SurrogateUNet(**card, widths=(8, 16), blocks=(1, 1))
    assert model.domain == Domain.of(windows)
    assert model.domain.time_step == 2.0 and model.domain.species == (11, 17)
    np.testing.assert_allclose(model.domain.voxel, np.diag([0.5, 0.625, 0.75]))
    assert "4 fs" in repr(model) and "0.5, 0.625, 0.75" in repr(model)
    assert str(sum(p.numel() for p in model.parameters())) in repr(model)


# --- domains ---------------------------------------------------------------------------------


def trained_on(windows: Windows) -> FieldEmulator:
    return Identity(**Identity.arguments_for(windows))


@pytest.mark.parametrize(
    ("other", "numbers"),
    [
        (lambda: frames(time_step=1.0), "frames are 1 fs apart.* 2 fs apart"),
        (lambda: frames((10, 8, 8)), r"0\.4, 0\.625, 0\.75 .*0\.5, 0\.625, 0\.75"),
        (lambda: frames(cell=np.diag([4.0, 5.0, 6.6])), r"0\.5, 0\.625, 0\.825 .*0\.75"),
        (
            lambda: frames(cell=np.array([[4.0, 0, 0], [0, 5, 0], [1, 0, 5.916]])),
            r"angles 90, 80\.\d+, 90.*angles 90, 90, 90",
        ),
        (lambda: species([3, 3]), r"numbers \[3\].*trained on \[11, 17\]"),
        (lambda: species([11, 17, 35]), r"numbers \[11, 17, 35\].*trained on \[11, 17\]"),
    ],
    ids=["time step", "grid spacing", "cell", "angles", "species", "one species more"],
)
def test_what_does_not_fit_is_refused_with_both_numbers(
    other: Callable[[], Windows], numbers: str
) -> None:
    model = trained_on(frames())
    with pytest.raises(WindowError, match=rf"runs/li\.zarr: .*{numbers}"):
        model.init(other()[0])


def species(numbers: list[int]) -> Windows:
    cell = np.diag([4.0, 5.0, 6.0])
    return Windows(moving_atoms(numbers, frames=12, cell=cell), 4.0)


def test_too_few_frames_are_refused_with_both_numbers() -> None:
    window = frames()[0].past(2)
    with pytest.raises(WindowError, match="3 frames .* the window has 2; .*context=3"):
        trained_on(frames()).init(window)


def test_what_fits_is_taken() -> None:
    """A supercell, a turned cell, fewer species, unknown species, 1 % of strain."""
    model = trained_on(frames())
    turned = np.array([[0.0, 4, 0], [0, 0, 5], [6, 0, 0]])
    for windows in (
        frames((16, 8, 8), cell=np.diag([8.0, 5.0, 6.0])),
        frames(cell=turned),
        frames(cell=1.01 * np.diag([4.0, 5.0, 6.0])),
        species([11, 11]),
        Windows(run_of(np.full((6, 8, 8, 8), 0.1), cell=np.diag([4.0, 5.0, 6.0])), 4.0),
    ):
        assert model.density(model.init(windows[0])).shape[0] == 1
    hexagonal = trained_on(frames(cell=HEXAGONAL))
    hexagonal.init(frames(cell=HEXAGONAL)[0])
    with pytest.raises(WindowError, match=r"angles 90, 90, 90.*angles 90, 90, 120"):
        hexagonal.init(frames(cell=np.diag([5.0, 5.0, 6.0]))[0])


def test_without_a_domain_nothing_is_checked() -> None:
    window: Window = species([3, 3])[0]
    Identity(**CONSTANTS).init(window)


def test_the_domain_is_stored_with_the_checkpoint(tmp_path: Path) -> None:
    windows = frames()
    card = SurrogateUNet.arguments_for(windows) | {"widths": [8, 16], "blocks": [1, 1]}
    path = save_model(SurrogateUNet(**card), tmp_path / "nacl", card)
    assert load_model(path).domain == Domain.of(windows)
    with pytest.raises(WindowError, match="1 fs apart, this SurrogateUNet .* 2 fs apart"):
        load_model(path).init(frames(time_step=1.0)[0])


def test_an_untrained_denoiser_has_no_dynamics() -> None:
    """An autoencoder alone would roll out as persistence does, and nobody would notice."""
    model, window = LatentDiffusion(**SMALL[LatentDiffusion]).eval(), frames()[0]
    words = "denoiser .* never trained.*--autoencoder"
    with pytest.raises(CheckpointError, match=words):
        model.step(model.init(window))
    with pytest.raises(CheckpointError, match=words):
        rollout(model, window, 2, progress=False)
    with pytest.raises(CheckpointError, match=words):
        one_step_errors(model, frames())
    one_step_errors(stirred(model), frames())


# --- autoencoder -----------------------------------------------------------------------------


def test_latent_is_bounded() -> None:
    autoencoder = stirred(Autoencoder(2, 3, 8, 1, bound=5.0))
    assert autoencoder.encode(1e4 * torch.randn(1, 2, 8, 8, 8)).abs().max() <= 5.0


def test_latent_noise_only_in_training() -> None:
    autoencoder, x = stirred(Autoencoder(2, 3, 8, 1, noise=0.1)), torch.randn(1, 2, 8, 8, 8)
    torch.testing.assert_close(
        autoencoder(x), autoencoder.decode(autoencoder.encode(x)), rtol=0, atol=0
    )
    autoencoder.train()
    once, again = autoencoder(x, generator()), autoencoder(x, generator())
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    assert not torch.allclose(once, autoencoder(x, torch.Generator().manual_seed(5)))


def test_latent_scales_standardise() -> None:
    model = small(LatentDiffusion)
    state, later = torch.randn(2, 4, 2, 8, 8, 8, generator=generator())
    model.set_latent_scales(state, later)
    z, z_later = model.encode(state), model.encode(later)
    dims = (0, 2, 3, 4)
    torch.testing.assert_close(z.mean(dims), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(dims), torch.ones(3))
    torch.testing.assert_close((z_later - z).std(dims), model.increment_scale.flatten())
    plain = model.autoencoder.decode(model.autoencoder.encode(state))
    torch.testing.assert_close(model.decode(z), plain, rtol=1e-4, atol=1e-5)


# --- denoiser and sampler --------------------------------------------------------------------


def test_preconditioning_limits() -> None:
    """A clean input comes back; from pure noise the network alone speaks: D -> F."""
    model = small(LatentDiffusion)
    latent, x = torch.randn(2, 2, 3, 4, 4, 4, generator=generator())
    clean = model.denoise(x, torch.full((2,), 1e-6), latent)
    torch.testing.assert_close(clean, x, rtol=0, atol=1e-4)
    level = torch.full((2,), 1e4)
    raw = model.net(torch.cat([x, latent], 1), model.embed(level))
    torch.testing.assert_close(model.denoise(1e4 * x, level, latent), raw, rtol=0, atol=1e-3)


def gaussian_model(steps: int, mean: float, spread: float) -> LatentDiffusion:
    """A model whose denoiser is the posterior mean of data drawn from N(mean, spread^2)."""
    model = LatentDiffusion(**SMALL[LatentDiffusion] | {"sampler_steps": steps})

    def denoise(x: Tensor, sigma: Tensor, latent: Tensor) -> Tensor:
        s2 = sigma.reshape(-1, 1, 1, 1, 1) ** 2
        return (spread**2 * x + s2 * mean) / (spread**2 + s2)

    model.denoise = denoise
    return model


def sampler_error(steps: int, mean: float, spread: float) -> float:
    """Largest distance to the exact solution of the probability-flow ODE of a Gaussian."""
    model = gaussian_model(steps, mean, spread)
    latent = torch.zeros(2, 3, 6, 6, 6, dtype=torch.float64)
    start = model.sigma_max * torch.randn(latent.shape, generator=generator()).double()
    exact = mean + (start - mean) * spread / math.hypot(spread, model.sigma_max)
    return float((model.sample(latent, generator()) - exact).abs().max())


def test_sampler_draws_the_gaussian() -> None:
    latent = torch.zeros(8, 3, 8, 8, 8, dtype=torch.float64)
    drawn = gaussian_model(128, 0.7, 0.5).sample(latent, generator())
    assert drawn.mean().item() == pytest.approx(0.7, abs=0.03)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.03)


def test_sampler_converges_to_the_exact_flow() -> None:
    """First order in the number of steps."""
    errors = [sampler_error(steps, 0.7, 0.5) for steps in (32, 64, 128)]
    assert errors[2] < 0.1
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def test_one_sampler_step_gives_the_mean() -> None:
    drawn = gaussian_model(1, 0.7, 0.5).sample(torch.zeros(4, 3, 8, 8, 8), generator())
    assert drawn.mean().item() == pytest.approx(0.7, abs=1e-2)
    assert drawn.std().item() < 0.03  # spread^2 / sigma_max = 0.0125


def test_sampler_repeats_with_its_generator() -> None:
    model, latent = small(LatentDiffusion, sampler_steps=3), torch.randn(2, 3, 4, 4, 4)
    once, again = model.sample(latent, generator()), model.sample(latent, generator())
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    assert not torch.allclose(once, model.sample(latent, torch.Generator().manual_seed(8)))


# --- checkpoints -----------------------------------------------------------------------------


def saved(tmp_path: Path, kind: type[nn.Module] = SurrogateUNet, name: str = "li") -> Path:
    return save_model(small(kind), tmp_path / name, SMALL[kind], {"seed": 3})


@both_models
def test_checkpoint_round_trip(kind: type[nn.Module], tmp_path: Path) -> None:
    model = small(kind)
    if kind is LatentDiffusion:
        model.increment_scale.mul_(0.3)
    path = save_model(
        model, tmp_path / "deep" / "li.safetensors", SMALL[kind], {"seed": 3, "steps": 10}
    )
    assert path == tmp_path / "deep" / "li.safetensors"
    assert sorted(p.name for p in path.parent.iterdir()) == ["li.json", "li.safetensors"]
    loaded = load_model(path)
    assert type(loaded) is kind and not loaded.training and loaded.horizon == 4.0
    x = physical_state()
    assert torch.equal(stepped(loaded, x, generator()), stepped(model, x, generator()))
    assert read_provenance(path) == {"seed": 3, "steps": 10}


def test_checkpoint_is_found_without_its_suffix(tmp_path: Path) -> None:
    path = saved(tmp_path)
    x = physical_state()
    found, expected = (stepped(load_model(p), x) for p in (path.with_suffix(""), path))
    assert torch.equal(found, expected)


def test_names_with_a_point_stay_apart(tmp_path: Path) -> None:
    """ "horizon-4.5" has no suffix to replace."""
    first, second = saved(tmp_path, name="horizon-4.5"), saved(tmp_path, name="horizon-4.8")
    assert first != second
    assert load_model(tmp_path / "horizon-4.5").horizon == 4.0


def test_a_class_of_ones_own_is_handed_over(tmp_path: Path) -> None:
    card = {"in_features": 2, "out_features": 3}
    path = save_model(model := nn.Linear(**card), tmp_path / "mine", card)
    assert torch.equal(load_model(path, nn.Linear).weight, model.weight)
    with pytest.raises(CheckpointError, match=r"'Linear'; known: .*load_model\(path, YourModel"):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"'Linear'; known: \['Conv1d'\]"):
        load_model(path, nn.Conv1d)


def rewrite_card(path: Path, **changes: object) -> None:
    """As `save_model` would have written it: the digest is right, whatever the card says."""
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["card"])
    fields = {k: v for k, v in (card | changes).items() if v is not None}
    seal(path, json.dumps(fields), load_file(path))


def seal(path: Path, card: str, tensors: dict[str, Tensor]) -> None:
    digest = checkpoint._digest(card, save(tensors))
    save_file(tensors, path, {"card": card, "sha256": digest})


def reweigh(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with safe_open(path, framework="pt") as file:
        card = file.metadata()["card"]
    tensors = load_file(path)
    change(tensors)
    seal(path, card, tensors)


def older(path: Path) -> Path:
    """As checkpoints were until now: the card in the JSON file only, with a digest."""
    save_file(load_file(path), path)
    card = path.with_suffix(".json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    card.write_text(json.dumps(json.loads(card.read_text()) | {"sha256": digest}))
    return card


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def swap_weights(tensors: dict[str, Tensor]) -> None:
    other = SurrogateUNet(**SMALL[SurrogateUNet] | {"widths": [8, 24]})
    tensors.update(other.state_dict())


def arguments(**changes: object) -> dict[str, object]:
    return {"arguments": SMALL[SurrogateUNet] | changes}


FIRST = "net.coarsen.0.bias"
DAMAGE = {
    "missing": (lambda p: p.unlink(), "not found"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole"),
    "cut": (truncate, "not a whole"),
    "garbage": (lambda p: p.write_bytes(os.urandom(500)), "not a whole"),
    "a flipped bit": (flip_a_bit, "not the weights that its card describes"),
    "other shapes": (lambda p: reweigh(p, swap_weights), "24.*not.*16"),
    "tensor missing": (lambda p: reweigh(p, lambda t: t.pop(FIRST)), f"{FIRST}' is missing"),
    "tensor too many": (lambda p: reweigh(p, lambda t: t.update(x=t[FIRST] + 0)), "'x' is unk"),
    "NaN": (lambda p: reweigh(p, lambda t: t[FIRST].fill_(math.nan)), f"{FIRST}'.*not finite"),
    "another precision": (
        lambda p: reweigh(p, lambda t: t.update({FIRST: t[FIRST].double()})),
        "float64",
    ),
    "card no object": (lambda p: seal(p, "[]", load_file(p)), "not a JSON object"),
    "card no JSON": (lambda p: seal(p, "{", load_file(p)), "not JSON"),
    "card too deep": (lambda p: seal(p, "[" * 9**5, load_file(p)), "not JSON"),
    "no arguments": (lambda p: rewrite_card(p, arguments=None), "'arguments'"),
    "arguments no object": (lambda p: rewrite_card(p, arguments=[1]), "'arguments'"),
    "unknown class": (lambda p: rewrite_card(p, model="subprocess.Popen"), "subprocess.Popen"),
    "class not a name": (lambda p: rewrite_card(p, model=["SurrogateUNet"]), "'model'"),
    "unknown argument": (lambda p: rewrite_card(p, **arguments(depth=3)), "depth"),
    "impossible argument": (lambda p: rewrite_card(p, **arguments(widths=[4, 12])), "arguments"),
    "wrong kind": (lambda p: rewrite_card(p, **arguments(widths="wide")), "'widths' is 'wide'"),
    "text for a number": (lambda p: rewrite_card(p, **arguments(horizon="12")), "'horizon'"),
    "negative time": (lambda p: rewrite_card(p, **arguments(horizon=-1.0)), "horizon -1"),
    "not finite": (lambda p: rewrite_card(p, **arguments(mu=math.inf)), "'mu': inf"),
    "beyond floats": (lambda p: rewrite_card(p, **arguments(mu=10**400)), "'mu': 10+"),
    "endless": (lambda p: rewrite_card(p, **arguments(blocks=[1, 10**9])), "'blocks': 10+ is"),
    "huge": (lambda p: rewrite_card(p, **arguments(widths=[8, 10**6])), r"\(16,\).*not.*1000000"),
    "no vectors": (
        lambda p: rewrite_card(p, **arguments(domain={"time_step": 1.0, "voxel": [[1]]})),
        "voxel",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damaged_checkpoint(name: str, tmp_path: Path) -> None:
    """One line, which names the file, what is wrong, and what to do."""
    path = saved(tmp_path)
    damage, message = DAMAGE[name]
    path.with_suffix(".json").unlink()
    damage(path)
    with pytest.raises(
        CheckpointError, match=rf"li\.(safetensors|json): .*{message}.*; "
    ) as found:
        load_model(path)
    assert "\n" not in str(found.value)


OLDER_DAMAGE = {
    "weights missing": lambda card: card.with_suffix(".safetensors").unlink(),
    "missing": lambda card: card.unlink(),
    "cut": truncate,
    "not text": lambda card: card.write_bytes(b"\xff\xfe\x00"),
    "a number": lambda card: card.write_text("5"),
}


@pytest.mark.parametrize("name", list(OLDER_DAMAGE))
def test_damaged_card_of_an_older_checkpoint(name: str, tmp_path: Path) -> None:
    card = older(saved(tmp_path))
    OLDER_DAMAGE[name](card)
    with pytest.raises(CheckpointError, match=r"li\..*; "):
        load_model(card)


def test_older_checkpoints_load(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = load_model(path)
    older(path)
    x = physical_state()
    assert torch.equal(stepped(load_model(path), x), stepped(model, x))
    assert read_provenance(path) == {"seed": 3}


def test_card_of_another_training_is_noticed(tmp_path: Path) -> None:
    """Same shapes, other mu and sigma: these are in the card, and weights mean nothing without."""
    path = saved(tmp_path)
    changed = SMALL[SurrogateUNet] | {"mu": 2.0}
    other = save_model(stirred(SurrogateUNet(**changed), seed=9), tmp_path / "other", changed)
    os.replace(older(other), older(path))
    with pytest.raises(CheckpointError, match=r"li\.safetensors"):
        load_model(path)


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_kill_leaves_the_old_or_the_new(
    survivors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two replacements of files, and before the first."""
    path, left = saved(tmp_path), [None] * survivors
    replace = Path.replace

    def killed(self: Path, target: Path) -> None:
        left.pop() if left else os._exit(9)
        replace(self, target)

    changed = SMALL[SurrogateUNet] | {"mu": 2.0}
    if not (child := os.fork()):
        Path.replace = killed
        save_model(SurrogateUNet(**changed), path, changed, {"seed": 4})
        os._exit(0)
    os.waitpid(child, 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = load_model(path)
    assert (model.transform.mu, read_provenance(path)["seed"]) == (
        (2.0, 4) if survivors else (-1.0, 3)
    )
    assert len(told) == (survivors == 1)  # the card for reading is that of before
    save_model(model, path, changed, {"seed": 5})  # clears away what was left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["li.json", "li.safetensors"]


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))]
)
def test_loading_executes_no_code(write: Callable[[object, Path], None], tmp_path: Path) -> None:
    path = saved(tmp_path)
    write({"weight": Bomb(tmp_path / "boom")}, path)
    with pytest.raises(CheckpointError, match=r"li\.safetensors"):
        load_model(path)
    assert not (tmp_path / "boom").exists()


def test_weights_are_stored_bit_by_bit(tmp_path: Path) -> None:
    model = small(LatentDiffusion)
    path = save_model(model, tmp_path / "li", SMALL[LatentDiffusion])
    stored = load_file(path)
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(stored[name].numpy(), tensor.numpy())


def test_a_part_may_be_stored_in_half_precision(tmp_path: Path) -> None:
    """Half the bytes; loaded as single precision, a rounding away."""
    model = small(LatentDiffusion)
    whole = save_model(model, tmp_path / "whole", SMALL[LatentDiffusion])
    model.net.half()
    path = save_model(model, tmp_path / "half", SMALL[LatentDiffusion])
    assert path.stat().st_size < 0.8 * whole.stat().st_size
    found, true = load_model(path).state_dict(), load_model(whole).state_dict()
    for name, tensor in true.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6)
    reweigh(path, lambda t: t.update(latent_mean=t["latent_mean"].to(torch.int8)))
    with pytest.raises(CheckpointError, match="'latent_mean' is torch.int8"):
        load_model(path)
