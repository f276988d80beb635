r"""Training the published Deep Density network (Zepeda-Nunez et al. 2019, appendix B.1).

First A, B, C and D are fitted to the density without networks, by least squares on all atoms at
once (the paper takes one atom of each species). Then Nadam lowers the mean squared error at points
that are drawn with probability :math:`\propto |\rho|^\alpha`, on 5 snapshots, then on 20, then on
all, while the rate falls exponentially.

**The published schedule** is 4 million steps of 64 points, 256 million points: one million on 5
snapshots, one on 20, two on 80, the rate 0.003 times 0.95 every 20 000 steps. One core makes some
10 000 points a second of a molecule, so that it would take seven hours there, and minutes to an
hour on a GPU. `train_deep_density` keeps its shape for any number of steps: a quarter on 5
snapshots, a quarter on 20, half on all, and a rate that falls exponentially by a given factor in
all. The snapshots of a step are few and share its points, so that atoms are seen to once.

A training that was killed continues from its state and gives the same bits
(:mod:`densitykit.training.state`); seed and step give the random numbers.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.optimize import least_squares
from torch import Tensor

from densitykit.data.windows import step_generator
from densitykit.io.progress import progress_bar
from densitykit.metrics import relative_l1, relative_l2
from densitykit.models.deep_density.network import (
    DeepDensity,
    Neighbourhood,
    PointsInReach,
    distances,
)
from densitykit.training.linear import atoms_of
from densitykit.training.state import TrainingState, adam_state

__all__ = ["SampledDensities", "fit_ansatz", "stage_of", "train_deep_density"]

Rows = list[dict[str, float]]
_CHECKED = 500  # voxels of a validation snapshot that are looked at each round
_EMA = 0.998  # of the average of the weights, which is what is checked and kept
_STAGES = ((0.25, 5), (0.5, 20))  # up to a part of the training: only so many snapshots


def stage_of(progress: float, snapshots: int) -> int:
    """How many snapshots are drawn from after a part of the training."""
    for end, count in _STAGES:
        if progress < end:
            return min(count, snapshots)
    return snapshots


class SampledDensities:
    """Snapshots of a run in memory, and points drawn from them by :math:`|\\rho|^\\alpha`.

    Parameters
    ----------
    run
        With densities and atoms; 12 bytes a voxel are held.
    model
        Whose neighbourhoods are prepared, on its device.
    alpha
        The paper has 1/2 for molecules, 6/5 for water, 1 for aluminium; 0 is uniform.
    """

    def __init__(self, run: xr.Dataset, model: DeepDensity, alpha: float) -> None:
        self.model, self.grid = model, run["density"].shape[1:]
        self.atoms = [atoms_of(run, i) for i in range(run.sizes["time"])]
        self.seen = [model.neighbourhood(atoms) for atoms in self.atoms]
        self.reach = [PointsInReach(atoms, model.cutoff) for atoms in self.atoms]
        self.rho = [np.asarray(run["density"][i], np.float32).ravel() for i in range(len(self))]
        self.chance = [np.cumsum(np.abs(rho).astype(float) ** alpha) for rho in self.rho]

    def __len__(self) -> int:
        return len(self.atoms)

    def draw(self, snapshots: list[int], points: int, generator: torch.Generator) -> Batch:
        """Points of each of some snapshots, drawn independently."""
        u = torch.rand(len(snapshots), points, generator=generator, dtype=torch.float64).numpy()
        parts = [self.chance[k] for k in snapshots]
        chosen = [
            np.searchsorted(sums, row * sums[-1]).clip(max=len(sums) - 1)
            for sums, row in zip(parts, u, strict=True)
        ]
        return self.batch(snapshots, chosen)

    def batch(self, snapshots: list[int], voxels: list[np.ndarray]) -> Batch:
        """Given voxels of some snapshots, as flat indices."""
        point, atom, vectors, rho, first, start = [], [], [], [], 0, 0
        for k, flat in zip(snapshots, voxels, strict=True):
            s = np.stack(np.unravel_index(flat, self.grid), axis=1) / np.array(self.grid)
            i, j, v = self.reach[k].pairs(s @ self.atoms[k].cell)
            point.append(i + first)
            atom.append(j + start)
            vectors.append(v)
            rho.append(self.rho[k][flat])
            first, start = first + len(flat), start + len(self.atoms[k].numbers)
        seen = Neighbourhood.join([self.seen[k] for k in snapshots])
        return Batch(self.model, seen, *map(np.concatenate, (point, atom, vectors, rho)))


class Batch:
    """Points of some snapshots with the atoms that reach them, and the density there (P,)."""

    def __init__(
        self,
        model: DeepDensity,
        seen: Neighbourhood,
        point: np.ndarray,
        atom: np.ndarray,
        vectors: np.ndarray,
        rho: np.ndarray,
    ) -> None:
        place = model.A.device
        self.seen, self.vectors, self.rho = seen, model.as_vectors(vectors), model.as_vectors(rho)
        self.point, self.atom = (torch.from_numpy(x).long().to(place) for x in (point, atom))

    def predicted(self, model: DeepDensity) -> Tensor:
        """Density of the model at the points."""
        h = model.atomic(self.seen)
        return self.summed(model.local(h, self.seen.species, self.atom, self.vectors))

    def ansatz(self, model: DeepDensity) -> Tensor:
        """Density of the bare ansatz at the points."""
        R, species = distances(self.vectors), self.seen.species[self.atom]
        rho_I = torch.zeros_like(R)
        for s in range(len(model.species)):
            mine = torch.nonzero(species == s).flatten()
            rho_I = rho_I.index_copy(0, mine, model.ansatz(s, R[mine]))
        return self.summed(rho_I)

    def summed(self, rho_I: Tensor) -> Tensor:
        """Add the local densities up at each point."""
        return torch.zeros_like(self.rho).index_add(0, self.point, rho_I)


def fit_ansatz(model: DeepDensity, batch: Batch) -> float:
    """Set A, B, C and D to what fits the density best without networks.

    Nonlinear least squares, from several widths.

    Returns
    -------
    float
        Mean squared error of the bare ansatz, in angstrom**-6.
    """
    count, names = len(model.species), (model.A, model.B, model.C, model.D)

    @torch.no_grad()
    def residual(flat: np.ndarray) -> np.ndarray:
        for p, values in zip(names, flat.reshape(4, count), strict=True):
            p.copy_(torch.from_numpy(values))
        return (batch.ansatz(model) - batch.rho).double().cpu().numpy()

    widest = np.repeat([np.inf, np.inf, 0.0, model.cutoff], count)
    top = float(batch.rho.max()) / 2
    fits = [
        least_squares(
            residual,
            np.repeat([0.0, top, -0.5 / width**2, 0.0], count),
            bounds=(np.repeat([-np.inf, -np.inf, -np.inf, -model.cutoff], count), widest),
            x_scale=np.repeat([0.1, 0.1, 0.3, 0.3], count),
            diff_step=1e-3,  # the model is in single precision
            max_nfev=40,
        )
        for width in (0.4, 0.7, 1.2)
    ]
    return float(np.square(residual(min(fits, key=lambda fit: fit.cost).x)).mean())


def train_deep_density(
    training: xr.Dataset,
    validation: xr.Dataset,
    arguments: dict[str, Any] | None = None,
    *,
    steps: int = 40_000,
    batch: int = 128,
    snapshots: int = 8,
    learning_rate: float = 6e-3,
    decay: float = 1e-2,
    alpha: float = 0.5,
    round_steps: int = 200,
    seed: int = 0,
    run_dir: str | Path | None = None,
    device: str | None = None,
) -> tuple[DeepDensity, dict[str, Any], Rows]:
    """Train the published network on the snapshots of a run.

    Parameters
    ----------
    training, validation
        Runs with atoms; the best weights are those of the lowest validation error (l1).
    arguments
        Of `DeepDensity` but species and nearest.
    steps, batch, snapshots
        Length; points of a step, and of how many snapshots they are.
    learning_rate, decay
        First rate, and what is left of it at the end.
    alpha
        See `SampledDensities`.
    round_steps
        Steps between two rows, which also save the state.
    seed
        Of weights and points.
    run_dir
        Where ``state.safetensors`` and ``log.csv`` go; an unfinished training found there is
        continued. None keeps nothing on disk.
    device
        By default a GPU, if there is one.

    Returns
    -------
    DeepDensity
        With its best weights, on the CPU.
    dict
        What it is constructed with, for its checkpoint.
    list of dict
        One row a round: steps, points, rate, loss, validation errors (l1, l2; per cent), and
        seconds (of processor time). The first is that of the bare ansatz.

    Raises
    ------
    CheckpointError
        ``run_dir`` holds the state of another training.
    """
    numbers = np.unique(training["numbers"].values).tolist()
    card = {"species": numbers} | dict(arguments or {}) | {"nearest": _nearest(training)}
    settings = {"steps": steps, "batch": batch, "snapshots": snapshots, "decay": decay}
    settings |= {"learning_rate": learning_rate, "alpha": alpha, "round": round_steps}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DeepDensity(**card)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = SampledDensities(training, model, alpha)
    run = _Run(model, data, _checked(validation, model), seed, settings)
    whole = settings | {"seed": seed, "arguments": card, "data": _fingerprint(training)}
    state = TrainingState(run_dir, run.tensors, whole)
    rows = state.restore() or run.begin()
    started = time.process_time() - rows[-1]["seconds"]
    total = math.ceil(steps / round_steps)
    bar = progress_bar(range(len(rows) - 1, total), "train", total, initial=len(rows) - 1)
    for number in bar:
        row = run.round(number)
        rows.append(row | {"seconds": time.process_time() - started})
        bar.set_postfix_str(f"validation l1 {row['validation_l1']:.3f} %")
        state.save(rows)
    run.keep_best()
    return model.cpu().eval(), card, rows


def _nearest(run: xr.Dataset) -> float:
    """Smallest distance of two atoms, images included, in all snapshots."""
    from densitykit.neighbours import neighbour_pairs

    least = math.inf
    for i in range(run.sizes["time"]):
        atoms = atoms_of(run, i)
        a, b, shift = neighbour_pairs(atoms.positions, atoms.wide_cell, 5.0)
        R = atoms.positions[b] - atoms.positions[a] + shift @ atoms.wide_cell
        least = min(least, float(np.linalg.norm(R, axis=1).min(initial=5.0)))
    return least


def _fingerprint(run: xr.Dataset) -> str:
    """Digest of the configurations, to tell data sets apart."""
    return hashlib.sha256(np.ascontiguousarray(run["positions"].values)).hexdigest()[:16]


def _checked(run: xr.Dataset, model: DeepDensity) -> list[Batch]:
    """Random voxels of all snapshots, the same in every round."""
    data, rng = SampledDensities(run, model, 0.0), np.random.default_rng(0)
    size = len(data.rho[0])
    voxels = [rng.choice(size, min(_CHECKED, size), replace=False) for _ in range(len(data))]
    return [data.batch([i], [chosen]) for i, chosen in enumerate(voxels)]


class _Run:
    """Nadam on one model; ``tensors`` is all that it remembers from round to round."""

    def __init__(
        self,
        model: DeepDensity,
        data: SampledDensities,
        checked: list[Batch],
        seed: int,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.data, self.checked, self.seed = model, data, checked, seed
        self.settings = settings
        named = dict(model.named_parameters())
        groups = [
            {
                "params": [p for n, p in named.items() if model.rates.get(n, 1.0) == share],
                "share": share,
            }
            for share in sorted({model.rates.get(name, 1.0) for name in named})
        ]
        self.optimizer = torch.optim.NAdam(groups, foreach=True)
        self.average = [p.detach().clone() for p in named.values()]
        self.best = {name: x.clone() for name, x in model.state_dict().items()}
        self.least = torch.full((), math.inf, dtype=torch.float64)
        self.tensors = {"least": self.least}
        self.tensors |= {f"best.{name}": x for name, x in self.best.items()}
        self.tensors |= {f"model.{name}": x for name, x in model.state_dict().items()}
        self.tensors |= {f"average.{n}": x for n, x in zip(named, self.average, strict=True)}
        for name, p in named.items():
            moments = adam_state(self.optimizer, p)
            moments["mu_product"] = torch.ones(())
            self.tensors |= {f"{key}.{name}": value for key, value in moments.items()}

    def begin(self) -> Rows:
        """Fit the ansatz and the scales of the inputs; return the row of the bare ansatz."""
        generator = step_generator(self.seed, 0, rank=1)
        few = list(range(min(20, len(self.data))))
        batch = self.data.draw(few, 3000 // len(few), generator)
        loss = fit_ansatz(self.model, batch)
        self.model.standardise(batch.seen, batch.atom, batch.vectors)
        for p, mean in zip(self.model.parameters(), self.average, strict=True):
            mean.copy_(p.detach())
        row = {"step": 0, "points": 0, "rate": 0.0, "loss": loss} | self._errors()
        return [row | {"seconds": time.process_time()}]

    def round(self, number: int) -> dict[str, float]:
        """Go on by one round; return its row but for the time."""
        size, total = self.settings["round"], 0.0
        steps = range(number * size, min((number + 1) * size, self.settings["steps"]))
        for step in steps:
            total += self._step(step)
        row = {"step": steps.stop, "points": steps.stop * self.settings["batch"]}
        row |= {"rate": self._rate(steps.stop), "loss": total / len(steps)}
        return row | self._errors()

    def _rate(self, step: int) -> float:
        progress = step / self.settings["steps"]
        warm = min(1.0, (step + 1) / 200)
        return self.settings["learning_rate"] * self.settings["decay"] ** progress * warm

    def _step(self, step: int) -> float:
        generator = step_generator(self.seed, step)
        few, batch = self.settings["snapshots"], self.settings["batch"]
        known = stage_of(step / self.settings["steps"], len(self.data))
        chosen = torch.randint(known, (few,), generator=generator).tolist()
        points = self.data.draw(chosen, max(1, batch // few), generator)
        loss = (points.predicted(self.model) - points.rho).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step) * group["share"]
        self.optimizer.step()
        decay = min(_EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            self.average, [p.detach() for p in self.model.parameters()], 1 - decay
        )
        return loss.item()

    @torch.no_grad()
    def _errors(self) -> dict[str, float]:
        """Validation errors in per cent, means over snapshots; keep the weights if best."""
        self._swap()
        pairs = [(b.predicted(self.model), b.rho) for b in self.checked]
        l1 = 100 * float(np.mean([float(relative_l1(p, r, 1)) for p, r in pairs]))
        l2 = 100 * float(np.mean([float(relative_l2(p, r, 1)) for p, r in pairs]))
        if l1 < self.least:
            self.least.fill_(l1)
            for name, x in self.model.state_dict().items():
                self.best[name].copy_(x)
        self._swap()
        return {"validation_l1": l1, "validation_l2": l2}

    def _swap(self) -> None:
        """Exchange the weights with their average."""
        for p, mean in zip(self.model.parameters(), self.average, strict=True):
            p.data, mean.data = mean.data, p.data

    @torch.no_grad()
    def keep_best(self) -> None:
        """Leave the best weights in the model."""
        self.model.load_state_dict(self.best)
