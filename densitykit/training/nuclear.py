r"""Fitting an emulator that goes through the nuclei, part by part.

What is linear is solved, in this order: the filter that finds nuclei (if one species stands out
of the density), the force field, the form factors of the superposition. Only the residual net is
trained, to minimise

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

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from densitykit.analysis.nuclei import NucleiFilter, find_nuclei, match_nuclei
from densitykit.analysis.tracking import implied_temperature, kinetic_temperature
from densitykit.analysis.transport import unwrap
from densitykit.data.transforms import fourier_resample, multiple_of
from densitykit.data.windows import Window, Windows
from densitykit.errors import ShapeError, TrajectoryError
from densitykit.models.base import Domain
from densitykit.models.nuclear.emulator import NuclearEmulator
from densitykit.models.nuclear.force_field import fit_force_field
from densitykit.models.nuclear.superposition import fit_superposition
from densitykit.neighbours import neighbour_pairs
from densitykit.training.loop import fit
from densitykit.units import atomic_masses

__all__ = ["ResidualLoss", "base_and_residual", "fit_parts", "residual_error", "train_emulator"]


def base_and_residual(model: NuclearEmulator, window: Window) -> tuple[Tensor, Tensor]:
    """Superposition of the nuclei of all frames of a window, and what it leaves over.

    Returns
    -------
    tuple[Tensor, Tensor]
        angstrom**-3, (B, K, X, Y, Z) each, on the working grid of the model.

    Raises
    ------
    TrajectoryError
        If the window has no positions.
    """
    if window.positions is None:
        raise TrajectoryError(
            f"{window.source}: variable 'positions' is missing; give an ab-initio run"
        )
    grid, frames = multiple_of(model.stride, window.grid), len(window.offsets)
    x, cells = window.positions.flatten(0, 1), window.cell.repeat_interleave(frames, dim=0)
    with torch.no_grad():
        base = model.superposition(x.to(cells), cells, grid, window.numbers)
    base = base.float().unflatten(0, (-1, frames))
    return base, fourier_resample(window.density, grid) - base


class ResidualLoss(nn.Module):
    """Mean squared error of the residual after a step, from a disturbed memory.

    Parameters
    ----------
    model
        The emulator whose residual net is trained, along the nuclei of windows with the offsets
        0, h, 2h, ...
    memory_noise
        Largest eta.
    white_noise
        Largest eta', in standard deviations of the residual.
    forget
        Probability p of having no memory.
    """

    def __init__(
        self,
        model: NuclearEmulator,
        memory_noise: float = 0.4,
        white_noise: float = 0.1,
        forget: float = 0.1,
    ) -> None:
        super().__init__()
        self.model, self.forget = model, forget
        self.memory_noise, self.white_noise = memory_noise, white_noise
        self.settings = {"memory_noise": memory_noise, "white_noise": white_noise}
        self.settings["forget"] = forget

    @property
    def fixed(self) -> dict[str, Tensor]:
        """What was fitted before: superposition, forces, scales."""
        weights, trained = self.model.state_dict(), "residual_net.net."
        return {k: x for k, x in weights.items() if not k.startswith(trained)}

    def inputs(self, window: Window) -> tuple[Tensor, Tensor]:
        """Normalised fields of all steps: inputs (B, step, 3, *), residuals after (B, step, *)."""
        base, residual = base_and_residual(self.model, window)
        change, net = base[:, 1:] - base[:, :-1], self.model.residual_net
        fields = torch.stack([base[:, 1:], change, residual[:, :-1]], dim=2)
        fields = net.normalise(fields.flatten(0, 1)).unflatten(0, fields.shape[:2])
        return fields, residual[:, 1:] / net.scales[2]

    def forward(
        self, fields: Tensor, residual: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        steps = enumerate(self.unrolled(fields, generator))
        errors = [(guess - residual[:, k]).square().mean() for k, guess in steps]
        return {"loss": torch.stack(errors).mean()}

    def unrolled(self, fields: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the normalised residual (B, *) after each step, from a disturbed memory."""
        memory = torch.stack([self._disturbed(x, generator) for x in fields[:, 0, 2]])[:, None]
        for k in range(fields.shape[1]):
            inputs = torch.cat([fields[:, k, :2], memory], dim=1)
            # half the time, and errors move by less than their noise; sums are in single precision
            with torch.autocast(fields.device.type, torch.bfloat16, enabled=_has_bfloat16(fields)):
                memory = self.model.residual_net.advance(inputs)
            yield memory[:, 0]

    def _disturbed(self, memory: Tensor, generator: torch.Generator) -> Tensor:
        eta, eta_white, chance = torch.rand(3, generator=generator).tolist()
        shift = [int(torch.randint(n, (), generator=generator)) for n in memory.shape]
        noise = self.memory_noise * eta * torch.roll(memory, shift, (0, 1, 2))
        white = torch.randn(memory.shape, generator=generator).to(memory)
        noise = noise + self.white_noise * eta_white * white
        return 0 * memory if chance < self.forget else memory + noise


def _has_bfloat16(x: Tensor) -> bool:
    """Whether products in half precision are fast; a processor that emulates them takes 13x."""
    return x.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def residual_error(
    model: NuclearEmulator, windows: Windows, every: int = 20, batch: int = 4
) -> dict[str, float]:
    """Relative l2 error of the density, given the true nuclei, after one step and after the last.

    Parameters
    ----------
    model
        The emulator whose residual net is judged.
    windows
        Of a held-out run, with context 1 and as many steps as the longer rollout takes.
    every
        Take every so many windows.
    batch
        Rollouts at once.
    """
    device, errors, net = model.species_masses.device, [], model.residual_net
    starts = windows.every(every)
    for k in range(0, len(starts), batch):
        window = windows[starts[k : k + batch]].to(device)
        base, truth = base_and_residual(model, window)
        residual, part = truth[:, 0], []
        for step in range(1, base.shape[1]):
            residual = net(base[:, step], base[:, step - 1], residual)
            wrong, right = residual - truth[:, step], base[:, step] + truth[:, step]
            part.append(wrong.flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1))
        errors.append(torch.stack(part, dim=1))
    mean = torch.cat(errors).mean(dim=0)
    last = f"validation_l2_after_{len(mean)}"
    return {"validation_l2": float(mean[0]), last: float(mean[-1])}


def fit_parts(
    run: xr.Dataset,
    horizon: float | None = None,
    every: int = 8,
    volumes: Sequence[xr.Dataset] = (),
    **arguments: Any,
) -> tuple[NuclearEmulator, dict[str, Any]]:
    """An emulator with all that is linear fitted to a run, its residual net untrained.

    Parameters
    ----------
    run
        Trajectory with `density`, `positions`, `forces`, `numbers` and `cell`.
    horizon
        Time of one step in fs; by default `densitykit.data.windows.suitable_horizon`.
    every
        Take every so many frames for the linear fits.
    volumes
        Trajectories in other cells, for the pressure of the force field.
    **arguments
        Others of :class:`densitykit.models.nuclear.emulator.NuclearEmulator`. By default the
        thermostat holds the mean temperature of the run, and the nuclei step from frame to frame.

    Returns
    -------
    tuple[NuclearEmulator, dict[str, Any]]
        The emulator, and the arguments it was constructed with, for its checkpoint.

    Raises
    ------
    TrajectoryError
        If the run lacks something, is too short, or its cell changes.
    """
    windows = Windows(run, horizon, context=1)
    for name in ("positions", "forces", "numbers"):
        if name not in run or not np.isfinite(run[name].values).all():
            raise TrajectoryError(
                f"{windows.source}: variable '{name}' is missing or not finite; give an ab-initio "
                "run that has it"
            )
    run = run.assign(cell=(("vector", "cartesian"), windows.cell.numpy()))  # where it is per frame
    superposition = fit_superposition(run, every)
    filter = _filter(run)
    card = {
        "horizon": windows.horizon,
        "domain": asdict(Domain.of(windows)),
        "filter_nodes": 0 if filter is None else len(filter.weights),
        "knots": len(superposition.knots),
        "substeps": windows.lag,
        **_thermostat(run, windows),
    } | arguments
    given = dict(arguments.get("force_field", {}))
    card["force_field"] = _reach(run, every, **given) | given
    model = NuclearEmulator(**card)
    if filter is not None:
        model.filter_nodes.copy_(torch.from_numpy(filter.wave_numbers))
        model.filter_weights.copy_(torch.from_numpy(filter.weights))
    model.superposition.load_state_dict(superposition.state_dict())
    options = {"species": model.species} | card["force_field"]
    force_field = fit_force_field(run, every, volumes=volumes, **options)
    model.force_field.load_state_dict(force_field.state_dict())
    return model, card


def _filter(run: xr.Dataset) -> NucleiFilter | None:
    """The filter that finds all nuclei of some frames of a run; None if there is none."""
    if len(set(run["numbers"].values.tolist())) > 1:
        return None
    try:
        cell, filter = run["cell"].values, NucleiFilter.fit(run)
    except ShapeError:  # a grid too coarse for one
        return None
    for k in np.linspace(0, run.sizes["time"] - 1, 5).round().astype(int):
        found = find_nuclei(run["density"][k].values, cell, run.sizes["atom"], filter)
        if (match_nuclei(found, run["positions"][k].values, cell, radius=0.2)[0] < 0).any():
            return None
    return filter


def _thermostat(run: xr.Dataset, windows: Windows) -> dict[str, float]:
    """Of the run, as `densitykit.generate.dynamics` writes it; else its mean temperature."""
    told = re.search(r"([\d.]+) fs, ([\d.]+) K", str(run.attrs.get("thermostat")))
    if told:
        return {"relaxation": float(told[1]), "temperature": float(told[2])}
    masses = atomic_masses(run["numbers"].values)
    if "velocities" in run:
        kelvin = kinetic_temperature(run["velocities"].values, masses).mean()
    else:
        paths = unwrap(run["positions"].load(), run["cell"].values).values
        kelvin = implied_temperature(paths, masses, windows.time_step).temperature
    return {"temperature": round(float(kelvin), 1)}


def _reach(run: xr.Dataset, every: int, cutoff: float = 7.0, **_: float) -> dict[str, Any]:
    """Where radial functions begin, a little below the shortest distance; how many there are."""
    cell, shortest = run["cell"].values, 0.5 * cutoff / 0.85
    for x in run["positions"].values[::every]:
        i, j, n = neighbour_pairs(x, cell, cutoff)
        shortest = np.linalg.norm(x[j] - x[i] + n @ cell, axis=1).min(initial=shortest)
    species = len(set(run["numbers"].values.tolist()))
    # channels are species times radial functions, and their couples the cost
    return {"closest": round(0.85 * float(shortest), 1), "radial": max(3, 6 // species)}


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
    windows = Windows(run, model.horizon, context=1, steps=unroll)
    some = windows[windows.every(1, max(4, min(512, 2**24 // int(np.prod(windows.grid)))))]
    base, residual = base_and_residual(model, some)
    model.residual_net.set_scales(base, base[:, 1:] - base[:, :-1], residual)
    if held_out is not None:
        longest = (held_out.sizes["time"] - 1) // windows.lag
        watched = Windows(held_out, model.horizon, context=1, steps=min(40, longest))
        options["validate"] = partial(residual_error, model, watched)
    return fit(
        ResidualLoss(model, **(loss or {})),
        windows,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        run_dir=run_dir,
        label="residual net",
        **options,
    )
