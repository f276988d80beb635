r"""Losses: what a training minimises, each a function of a window of raw frames.

The loss of Chiang et al. (2025),

.. math:: L = L_{AE} + \lambda_1 L_{LDM} + \lambda_2 L_{sJSD} :

:math:`L_{AE}` is the mean squared reconstruction error of the normalised state,
:math:`L_{LDM}` the denoising loss of :mod:`densitykit.models.diffusion`, and
:math:`L_{sJSD}` the scaled Jensen-Shannon divergence between the decoded one-step prediction
(the denoised estimate at the drawn noise level) and the true next density. The denoiser
sees latents without gradient, so :math:`L_{AE}` does not depend on the denoiser nor
:math:`L_{LDM}` on the autoencoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densitykit.data.windows import Window
from densitykit.errors import ShapeError
from densitykit.metrics import spatial_sjsd, value_sjsd
from densitykit.models.base import FieldEmulator
from densitykit.models.diffusion import LatentDiffusion

__all__ = ["LatentDiffusionLoss", "OneStepLoss"]


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise from a CPU generator, so that every device draws the same numbers."""
    return torch.randn(like.shape, generator=generator).to(like)


class LatentDiffusionLoss(nn.Module):
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

    @property
    def fixed(self) -> dict[str, Tensor]:
        """What the denoiser is trained on top of."""
        return {} if self.trains_autoencoder else self.model.autoencoder.state_dict()

    def inputs(self, window: Window) -> tuple[Tensor, Tensor]:
        """Return the normalised states now and at the target of a window."""
        return self.model.normalised_pair(window, window.offsets[-1])

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

    def __init__(self, model: FieldEmulator, input_noise: float = 0.15) -> None:
        super().__init__()
        self.model, self.input_noise = model, input_noise
        self.settings = {"input_noise": input_noise}

    def inputs(self, window: Window) -> tuple[Tensor, Tensor]:
        """Return the normalised states now and at the target of a window."""
        return self.model.normalised_pair(window, window.offsets[-1])

    def forward(
        self, state: Tensor, next_state: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        level = self.input_noise * torch.rand(len(state), 1, 1, 1, 1, generator=generator).to(
            state
        )
        noisy = state + level * _randn(state, generator)
        return {"loss": (self.model.advance(noisy) - next_state).square().mean()}
