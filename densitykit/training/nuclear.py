r"""Fitting an emulator that goes through the nuclei, part by part.

What is linear is solved, in this order: the filter that finds nuclei, the force field, the form
factor of the superposition. Only the residual net is trained, to minimise

.. math:: L = \Big\langle \big| e_{t+h} - \hat e_{t+h}[\tilde e_t] \big|^2 \Big\rangle, \qquad
   \tilde e_t = \begin{cases} 0 & \text{with probability } p \\
   e_t + \eta\, e_t(\cdot + s) + \eta' w & \text{else}, \end{cases}

along the true path of the nuclei. The noise on what it remembers has two parts: a residual shifted
by a random s and scaled by a random :math:`\eta`, which has the spectrum of the errors that a long
rollout makes, and white noise w of random deviation :math:`\eta'`, for waves that residuals hardly
have (without it those at the edge of the grid's spectrum grow, tenfold in 20 steps). The net
learns to forget both. With probability p it has to do without memory. The mean may run over
several steps, each from what the one before has made: an unrolled loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from densitykit.analysis.nuclei import NucleiFilter
from densitykit.cells import cubic_edge
from densitykit.data.symmetry import augment
from densitykit.data.windows import frames_apart
from densitykit.errors import TrajectoryError
from densitykit.models.nuclear.emulator import NuclearEmulator, ResidualNet
from densitykit.models.nuclear.force_field import as_double, fit_force_field
from densitykit.models.nuclear.superposition import Superposition, fit_superposition
from densitykit.training.loop import fit

__all__ = ["ResidualLoss", "ResidualPairs", "fit_parts", "residual_error", "train_emulator"]


def _spacing(run: xr.Dataset, source: str) -> float:
    """Time between frames in fs."""
    if run.sizes["time"] < 2:
        raise TrajectoryError(f"{source}: one frame has no spacing; give a longer run")
    return float(run["time"][1] - run["time"][0])


class ResidualPairs:
    """Superpositions and residuals of a run, a horizon apart, in memory.

    Parameters
    ----------
    run
        Trajectory with `density`, `positions` and `cell`, equally spaced; cubic.
    superposition
        The one whose residuals these are.
    horizon
        Time of one step in fs, a multiple of the spacing.
    unroll
        Steps that follow one another in a draw.

    Raises
    ------
    TrajectoryError
        If positions are missing, or the horizon does not fit.
    """

    def __init__(
        self, run: xr.Dataset, superposition: Superposition, horizon: float, unroll: int = 1
    ) -> None:
        source = run.encoding.get("source", "trajectory")
        cubic_edge(run["cell"].values, source)
        self.lag = frames_apart(horizon, _spacing(run, source), source)
        if "positions" not in run:
            raise TrajectoryError(
                f"{source}: variable 'positions' is missing; give an ab-initio run"
            )
        self.unroll = unroll
        if len(run["time"]) <= unroll * self.lag:
            raise TrajectoryError(f"{source}: shorter than the horizon of {unroll * horizon} fs")
        density = torch.from_numpy(run["density"].values.astype(np.float32))
        cell, positions = as_double(run["cell"]), as_double(run["positions"])
        shape = tuple(density.shape[1:])
        self.base = torch.cat([superposition(x, cell, shape).float() for x in positions.split(64)])
        self.residual = density - self.base

    def __len__(self) -> int:
        return len(self.base) - self.unroll * self.lag

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch, each with its own symmetry, its steps one after the other.

        Returns
        -------
        tuple[Tensor, Tensor]
            base after, its change and residual before, (batch * unroll, 3, n, n, n); residual
            after, (batch * unroll, 1, n, n, n); all in angstrom**-3.
        """
        drawn = []
        for i in torch.randint(len(self), (batch,), generator=generator).tolist():
            fields = [x for k in range(self.unroll) for x in self._step(i + k * self.lag)]
            drawn += torch.stack(augment(*fields, generator=generator)).split(4)
        fields = torch.stack(drawn)
        return fields[:, :3], fields[:, 3:]

    def _step(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From frame i: base after, its change, residual before and after."""
        after = self.base[i + self.lag]
        return after, after - self.base[i], self.residual[i], self.residual[i + self.lag]


class ResidualLoss(nn.Module):
    """Mean squared error of the residual after a step, from a disturbed memory.

    Parameters
    ----------
    model
        The net to train.
    memory_noise
        Largest eta.
    white_noise
        Largest eta', in standard deviations of the residual.
    forget
        Probability p of having no memory.
    unroll
        Steps that follow one another in a batch, as :class:`ResidualPairs` draws them.
    """

    def __init__(
        self,
        model: ResidualNet,
        memory_noise: float = 0.4,
        white_noise: float = 0.1,
        forget: float = 0.1,
        unroll: int = 1,
    ) -> None:
        super().__init__()
        self.model, self.forget, self.unroll = model, forget, unroll
        self.memory_noise, self.white_noise = memory_noise, white_noise
        self.settings = {
            "memory_noise": memory_noise,
            "white_noise": white_noise,
            "forget": forget,
            "unroll": unroll,
        }

    def forward(
        self, fields: Tensor, residual: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        fields, residual = (x.unflatten(0, (-1, self.unroll)) for x in (fields, residual))
        memory = torch.stack([self._disturbed(x, generator) for x in fields[:, 0, 2]])[:, None]
        errors = []
        for k in range(self.unroll):
            inputs = torch.cat([fields[:, k, :2], memory], dim=1)
            # half the time, and errors move by less than their noise; sums are in single precision
            with torch.autocast(fields.device.type, torch.bfloat16):
                memory = self.model.advance(inputs)
            errors.append((memory - residual[:, k]).square().mean())
        return {"loss": torch.stack(errors).mean()}

    def _disturbed(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        eta, eta_white, chance = torch.rand(3, generator=generator).tolist()
        shift = [int(torch.randint(n, (), generator=generator)) for n in memory.shape]
        noise = self.memory_noise * eta * torch.roll(memory, shift, (0, 1, 2))
        white = torch.randn(memory.shape, generator=generator).to(memory)
        noise = noise + self.white_noise * eta_white * white
        return 0 * memory if chance < self.forget else memory + noise


@torch.no_grad()
def residual_error(
    net: ResidualNet, pairs: ResidualPairs, steps: int = 40, every: int = 20, batch: int = 8
) -> dict[str, float]:
    """Relative l2 error of the density, given the true nuclei, after one step and after several.

    Parameters
    ----------
    net
        The net to judge.
    pairs
        Of a held-out run.
    steps
        Length of the longer rollout.
    every
        Take every so many frames.
    batch
        Rollouts at once.
    """
    if len(pairs) <= (steps - 1) * pairs.lag:
        raise TrajectoryError(
            f"{steps} steps outlast a held-out run of {len(pairs.base)} frames; give "
            f"{steps * pairs.lag + 1} or more"
        )
    device, errors = net.mean.device, []
    first = torch.arange(0, len(pairs) - (steps - 1) * pairs.lag, every)
    for start in first.split(batch):
        residual, part = pairs.residual[start].to(device), []
        for k in range(1, steps + 1):
            now, before = start + k * pairs.lag, start + (k - 1) * pairs.lag
            base = pairs.base[now].to(device)
            residual = net(base, pairs.base[before].to(device), residual)
            truth = pairs.residual[now].to(device)
            part.append(
                (residual - truth).flatten(1).norm(dim=1) / (base + truth).flatten(1).norm(dim=1)
            )
        errors.append(torch.stack(part, dim=1))
    mean = torch.cat(errors).mean(dim=0)
    return {"validation_l2": float(mean[0]), f"validation_l2_after_{steps}": float(mean[-1])}


def fit_parts(
    run: xr.Dataset,
    horizon: float = 12.0,
    every: int = 8,
    volumes: Sequence[xr.Dataset] = (),
    **arguments: Any,
) -> tuple[NuclearEmulator, dict[str, Any]]:
    """An emulator with all that is linear fitted to a run, its residual net untrained.

    Parameters
    ----------
    run
        Trajectory with `density`, `positions`, `forces` and `cell`; cubic.
    horizon
        Time of one step in fs.
    every
        Take every so many frames for the linear fits.
    volumes
        Trajectories in other cells, for the pressure of the force field.
    **arguments
        Others of :class:`densitykit.models.nuclear.emulator.NuclearEmulator`.

    Returns
    -------
    tuple[NuclearEmulator, dict[str, Any]]
        The emulator, and the arguments it was constructed with, for its checkpoint.

    Raises
    ------
    TrajectoryError
        If the run lacks something, is too short, not cubic or not finite.
    """
    source = run.encoding.get("source", "trajectory")
    edge = cubic_edge(run["cell"].values, source)
    if not np.isfinite(run["density"].values).all():
        raise TrajectoryError(
            f"{source}: variable 'density' is not finite; run `python -m densitykit validate`"
        )
    filter = NucleiFilter.fit(run)
    superposition = fit_superposition(run, every, charge=arguments.get("charge", 1.0))
    card = {
        "horizon": horizon,
        "frame_spacing": _spacing(run, source),
        "spacing": edge / run["density"].shape[1],
        "filter_nodes": len(filter.weights),
        "knots": len(superposition.knots),
        "force_field": {},
    } | arguments
    model = NuclearEmulator(**card)
    model.filter_nodes.copy_(torch.from_numpy(filter.wave_numbers))
    model.filter_weights.copy_(torch.from_numpy(filter.weights))
    model.superposition.load_state_dict(superposition.state_dict())
    force_field = fit_force_field(run, every, volumes=volumes, **card["force_field"])
    model.force_field.load_state_dict(force_field.state_dict())
    return model, card


def train_emulator(
    model: NuclearEmulator,
    run: xr.Dataset,
    held_out: xr.Dataset | None = None,
    *,
    steps: int,
    batch: int = 4,
    learning_rate: float = 2e-3,
    loss: Mapping[str, float] | None = None,
    unroll: int = 1,
    run_dir: str | Path | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train the residual net of an emulator from :func:`fit_parts`.

    Parameters
    ----------
    model
        The emulator.
    run
        The run to learn from, that of the linear fits.
    held_out
        Another one, to watch; None watches nothing.
    steps, batch, learning_rate, run_dir, options
        See :func:`densitykit.training.loop.fit`.
    loss
        Other arguments of :class:`ResidualLoss`.
    unroll
        Steps in a row that the loss looks at.

    Returns
    -------
    list[dict[str, float]]
        One row a step, see :func:`densitykit.training.loop.fit`.
    """
    pairs = ResidualPairs(run, model.superposition, model.horizon, unroll)
    net = model.residual_net
    change = pairs.base[pairs.lag :] - pairs.base[: -pairs.lag]
    net.set_scales(pairs.base, change, pairs.residual)
    if held_out is not None:
        watched = ResidualPairs(held_out, model.superposition, model.horizon)
        longest = (len(watched.base) - 1) // watched.lag
        options["validate"] = partial(residual_error, net, watched, steps=min(40, longest))
    return fit(
        ResidualLoss(net, unroll=unroll, **(loss or {})),
        pairs,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        run_dir=run_dir,
        label="residual net",
        **options,
    )
