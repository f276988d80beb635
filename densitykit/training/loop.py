r"""Training: the poster's loss, and one resumable loop on Lightning Fabric.

.. math:: L = L_{AE} + \lambda_1 L_{LDM} + \lambda_2 L_{sJSD}

(Chiang et al. 2025). :math:`L_{AE}` is the mean squared reconstruction error of the normalised
state, :math:`L_{LDM}` the denoising loss of :mod:`densitykit.models.diffusion`, and
:math:`L_{sJSD}` the scaled Jensen-Shannon divergence between the decoded one-step prediction
(the denoised estimate at the drawn noise level) and the true next density. The denoiser
sees latents without gradient, so :math:`L_{AE}` does not depend on the denoiser nor
:math:`L_{LDM}` on the autoencoder; the sum can therefore be minimised block by block, first the
autoencoder, then, with it frozen, the denoiser. That is what :func:`train_latent_diffusion` does:
half the cost, and a latent that stands still while its dynamics is learned.

The loop is a function of (seed, step, rank) only: batch, noise and learning rate of a step are
drawn from a generator seeded by these. State is written as safetensors by an atomic rename, so a
training killed at any moment continues with the loss curve of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm.auto import tqdm

from densitykit.data.windows import StatePairs, step_generator
from densitykit.errors import ShapeError
from densitykit.metrics import spatial_sjsd, value_sjsd
from densitykit.models.base import StateMap
from densitykit.models.diffusion import LatentDiffusion
from densitykit.models.unet import SurrogateUNet
from densitykit.training.state import Keeper, adam_state

__all__ = [
    "OneStepLoss",
    "PosterLoss",
    "adopt_autoencoder",
    "fit",
    "train_latent_diffusion",
    "train_surrogate",
]


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise from a CPU generator, so that every device draws the same numbers."""
    return torch.randn(like.shape, generator=generator).to(like)


class PosterLoss(nn.Module):
    """L_AE + lambda_1 L_LDM + lambda_2 L_sJSD of a latent diffusion model.

    Parameters
    ----------
    model
        The model to train; parts whose parameters need no gradient are not trained.
    lambda_1, lambda_2
        Weights; a term of weight zero is not computed.
    reading
        "spatial" or "value", what P and Q of the sJSD are (:mod:`densitykit.metrics`).
    condition_noise
        Largest standard deviation of the noise on the conditioning latent.
    log_sigma
        Mean and standard deviation of the logarithm of the drawn noise levels.

    ``forward``: normalised states at t and t + horizon, each (B, 2, X, Y, Z), and a CPU generator
    -> the terms, scalars in a dictionary; their weighted sum is "loss".
    """

    def __init__(
        self,
        model: LatentDiffusion,
        lambda_1: float = 1.0,
        lambda_2: float = 0.0,
        reading: str = "spatial",
        condition_noise: float = 0.1,
        log_sigma: tuple[float, float] = (1.5, 1.5),
    ) -> None:
        super().__init__()
        self.model = model
        self.lambda_1, self.lambda_2 = lambda_1, lambda_2
        if reading not in ("spatial", "value"):
            raise ShapeError(f"reading is '{reading}'; choose 'spatial' or 'value'")
        self.divergence = self._spatial if reading == "spatial" else self._value
        self.condition_noise, self.log_sigma = condition_noise, log_sigma
        self.settings = {
            "lambda_1": lambda_1,
            "lambda_2": lambda_2,
            "reading": reading,
            "condition_noise": condition_noise,
            "log_sigma": list(log_sigma),
        }
        self.trains_autoencoder = next(model.autoencoder.parameters()).requires_grad

    def forward(
        self, state: Tensor, next_state: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.trains_autoencoder:
            both = torch.cat([state, next_state])
            terms["ae"] = (self.model.autoencoder(both, generator) - both).square().mean()
        if self.lambda_1 or self.lambda_2:
            terms |= self._dynamics(state, next_state, generator)
        weights = {"ae": 1.0, "ldm": self.lambda_1, "sjsd": self.lambda_2}
        terms["loss"] = sum(weights[k] * v for k, v in terms.items())
        return terms

    def _dynamics(
        self, state: Tensor, next_state: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        model = self.model
        with torch.no_grad():
            z, z_next = model.encode(state), model.encode(next_state)
            level = self.condition_noise * torch.rand(len(z), 1, 1, 1, 1, generator=generator).to(
                z
            )
            z_noisy = z + level * _randn(z, generator)
            # the target is the true next latent: from a noisy state the map has to come back
            y = (z_next - z_noisy) / model.increment_scale
        mean, std = self.log_sigma
        sigma = (mean + std * torch.randn(len(z), generator=generator)).exp()
        sigma = sigma.clamp(model.sigma_min, model.sigma_max).to(z)
        s = sigma.reshape(-1, 1, 1, 1, 1)
        denoised = model.denoise(y + s * _randn(y, generator), sigma, z_noisy)
        error = (denoised - y).square().mean(dim=(1, 2, 3, 4))
        terms = {"ldm": (error * (1 + sigma**2) / sigma**2).mean()}
        if self.lambda_2:
            predicted = model.decode(z_noisy + model.increment_scale * denoised)
            # in single precision always: a divergence is a difference of near equals
            terms["sjsd"] = self.divergence(predicted[:, 0].float(), next_state[:, 0].float())
        return terms

    def _spatial(self, field: Tensor, reference: Tensor) -> Tensor:
        inverse = self.model.transform.inverse
        return spatial_sjsd(
            inverse(field).clamp(min=1e-6), inverse(reference).clamp(min=1e-6)
        ).mean()

    def _value(self, field: Tensor, reference: Tensor) -> Tensor:
        return value_sjsd(field, reference)


class OneStepLoss(nn.Module):
    """Mean squared error of a deterministic one-step map, with noise on its input.

    Parameters
    ----------
    model
        The map to train.
    input_noise
        Largest standard deviation of the noise on the normalised input state.
    """

    def __init__(self, model: StateMap, input_noise: float = 0.15) -> None:
        super().__init__()
        self.model, self.input_noise = model, input_noise
        self.settings = {"input_noise": input_noise}

    def forward(
        self, state: Tensor, next_state: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        level = self.input_noise * torch.rand(len(state), 1, 1, 1, 1, generator=generator).to(
            state
        )
        noisy = state + level * _randn(state, generator)
        return {"loss": (self.model.advance(noisy) - next_state).square().mean()}


def fit(
    objective: nn.Module,
    pairs: StatePairs,
    *,
    steps: int,
    batch: int = 4,
    learning_rate: float = 1e-3,
    seed: int = 0,
    run_dir: str | Path | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    validate_every: int = 250,
    save_every: int = 100,
    ema: float = 0.999,
    fabric: Fabric | None = None,
    label: str = "train",
) -> list[dict[str, float]]:
    """Minimise ``objective`` with AdamW, a warmed-up cosine rate and averaged weights.

    At the end the model holds the exponential moving average of its weights.

    Parameters
    ----------
    objective
        Module with attribute ``model``, mapping (state, next state, generator) to
        terms with key "loss".
    pairs
        Training pairs.
    steps, batch, learning_rate
        Length, pairs a step and device, peak rate.
    seed
        Everything random follows from it.
    run_dir
        Where ``state.safetensors`` and ``log.csv`` go; an unfinished training found there
        is continued. None keeps nothing on disk.
    validate
        Called with the averaged weights in place; its figures go to the log.
    validate_every, save_every
        Intervals in steps.
    ema
        Decay of the average of the weights.
    fabric
        Devices, strategy and precision; by default one device, a GPU if there is one.
    label
        Name on the progress bar.

    Returns
    -------
    list[dict[str, float]]
        One row a step: step, the terms, learning rate, seconds so far, and validation figures
        where they were made.

    Raises
    ------
    CheckpointError
        If ``run_dir`` holds a state that does not belong to this training.
    """
    fabric = fabric or Fabric(accelerator="auto", devices=1)
    model = objective.model
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    wrapped, optimizer = fabric.setup(objective, optimizer)
    # only now: the set-up moves the weights to the device and gives every rank those of rank 0
    average = [p.detach().clone() for p in trained]
    settings = {
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "ema": ema,
        "ranks": fabric.world_size,
        "pairs": len(pairs),
        "objective": {"name": type(objective).__name__} | getattr(objective, "settings", {}),
    }
    keeper = Keeper(run_dir, _remembered(trained, average, optimizer), settings)
    rows = keeper.restore()
    first = len(rows)
    started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)
    bar = tqdm(range(first, steps), label, steps, initial=first, disable=fabric.global_rank > 0)
    wrapped.train()
    for step in bar:
        rate = (
            learning_rate
            * min(1.0, (step + 1) / 50)
            * 0.5
            * (1 + math.cos(math.pi * step / steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = step_generator(seed, step, fabric.global_rank)
        physical = pairs.draw(batch, generator)
        state, next_state = (model.normalise(fabric.to_device(x)) for x in physical)
        terms = wrapped(state, next_state, generator)
        optimizer.zero_grad()
        fabric.backward(terms["loss"])
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
        decay = min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in trained], 1 - decay)
        row = {"step": step, **{k: v.item() for k, v in terms.items()}, "learning_rate": rate}
        if validate is not None and ((step + 1) % validate_every == 0 or step + 1 == steps):
            with _Swapped(trained, average):
                wrapped.eval()
                row |= validate()
                wrapped.train()
            bar.set_postfix({k: f"{v:.4f}" for k, v in row.items() if k.startswith("validation")})
        row["seconds"] = time.perf_counter() - started
        rows.append(row)
        if fabric.is_global_zero and ((step + 1) % save_every == 0 or step + 1 == steps):
            keeper.save(rows)
    with torch.no_grad():
        for p, mean in zip(trained, average, strict=True):
            p.copy_(mean)
    objective.eval()
    return rows


def _remembered(
    trained: list[Tensor], average: list[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Weights, their average, and the moments of Adam, which are made for it."""
    tensors = {}
    for i, (p, mean) in enumerate(zip(trained, average, strict=True)):
        moments = {f"{name}.{i}": x for name, x in adam_state(optimizer, p).items()}
        tensors |= {f"weight.{i}": p, f"average.{i}": mean} | moments
    return tensors


class _Swapped:
    """Puts averaged weights in place of the trained ones for the length of a block."""

    def __init__(self, trained: list[Tensor], average: list[Tensor]) -> None:
        self.trained, self.average = trained, average

    def _swap(self) -> None:
        for p, mean in zip(self.trained, self.average, strict=True):
            p.data, mean.data = mean.data, p.data

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *exception: object) -> None:
        self._swap()


def train_latent_diffusion(
    model: LatentDiffusion,
    pairs: StatePairs,
    *,
    autoencoder_steps: int,
    steps: int,
    lambda_1: float = 1.0,
    lambda_2: float = 0.0,
    reading: str = "spatial",
    loss: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    **options: object,
) -> list[dict[str, float]]:
    """Train the autoencoder, standardise its latent, then train the denoiser on it.

    Parameters
    ----------
    model, pairs
        The model and its training pairs.
    autoencoder_steps, steps
        Steps of the two blocks; zero skips a block.
    lambda_1, lambda_2, reading
        See :class:`PosterLoss`.
    loss
        Other arguments of :class:`PosterLoss`, for the denoiser.
    run_dir
        Each block keeps its state in a folder of its own below it.
    options
        Passed to :func:`fit`.

    Returns
    -------
    list[dict[str, float]]
        Rows of both blocks, with "block" 0 and 1.
    """
    folder = Path(run_dir) if run_dir is not None else None
    rows = []
    if autoencoder_steps:
        _train_only(model, model.autoencoder)
        ae_options = {k: v for k, v in options.items() if k not in ("validate", "validate_every")}
        history = fit(
            PosterLoss(model, lambda_1=0),
            pairs,
            steps=autoencoder_steps,
            run_dir=folder and folder / "autoencoder",
            label="autoencoder",
            **ae_options,
        )
        rows += [{"block": 0, **row} for row in history]
        device = next(model.parameters()).device
        some = torch.arange(len(pairs))[:: max(1, len(pairs) // 32)]
        model.set_latent_scales(*(model.normalise(x.to(device)) for x in pairs[some]))
    if steps:
        _train_only(model, model.net, model.embed)
        history = fit(
            PosterLoss(model, lambda_1, lambda_2, reading, **(loss or {})),
            pairs,
            steps=steps,
            run_dir=folder and folder / "denoiser",
            label="denoiser",
            **options,
        )
        rows += [{"block": 1, **row} for row in history]
    return rows


def train_surrogate(
    model: SurrogateUNet, pairs: StatePairs, *, input_noise: float = 0.15, **options: object
) -> list[dict[str, float]]:
    """Train the deterministic U-Net; options as in :func:`fit`."""
    return fit(OneStepLoss(model, input_noise), pairs, label="surrogate", **options)


def adopt_autoencoder(model: LatentDiffusion, donor: LatentDiffusion) -> None:
    """Copy the autoencoder and the scales of its latent, so that only the denoisers differ."""
    model.autoencoder.load_state_dict(donor.autoencoder.state_dict())
    for name in ("latent_mean", "latent_scale", "increment_scale"):
        getattr(model, name).copy_(getattr(donor, name))


def _train_only(model: nn.Module, *parts: nn.Module) -> None:
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
