r"""Training the published Deep Density network (Zepeda-Nunez et al. 2019, appendix B.1).

First A, B, C and D are fitted to the density without networks, by least squares on all atoms at
once (the paper takes one atom of each species). Then Nadam lowers the mean squared error at points
that are drawn with probability :math:`\propto |\rho|^\alpha`, on 5 snapshots, then on 20, then on
all, while the rate falls exponentially.

**The published schedule** is 4 million steps of 64 points, 256 million points: one million on 5
snapshots, one on 20, two on 80, the rate 0.003 times 0.95 every 20 000 steps. A crowded core makes
4 000 to 6 500 points of ethane a second, so that all of it takes 11 to 18 hours there; on a GPU it
was not measured. `train_deep_density` keeps its shape for any number of steps: a quarter on 5
snapshots, a quarter on 20, half on all, and a rate that falls exponentially by a given factor in
all. The snapshots of a step are few and share its points, so that atoms are seen to once.

A training that was killed continues from its state and gives the same bits
(:mod:`densitykit.training.state`); seed and step give the random numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from scipy.optimize import least_squares
from torch import Tensor, nn

from densitykit.data.windows import step_generator
from densitykit.io.progress import progress_bar
from densitykit.io.work import fingerprint
from densitykit.metrics import relative_l1, relative_l2
from densitykit.models.deep_density.network import (
    DeepDensity,
    Neighbourhood,
    PointsInReach,
    distances,
)
from densitykit.training.linear import atoms_of, nearest_in
from densitykit.training.state import TrainingState, adam_state

__all__ = ["Points", "SampledDensities", "fit_ansatz", "snapshots_seen", "train_deep_density"]

Rows = list[dict[str, float]]
_CHECKED = 500  # voxels of a validation snapshot that are looked at each round
_EMA = 0.998  # of the average of the weights, which is what is checked and kept
#: of the rate that A to D get: a step is of the size of the rate, whatever the gradient, and the
#: density is far more sensitive to these four than to a weight
_SHARES = (0.01, 1.0)
_WARM_UP = 200  # steps
_STAGES = ((0.25, 5), (0.5, 20))  # up to a part of the training: only so many snapshots


def snapshots_seen(progress: float, snapshots: int) -> int:
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
        self.sums = [np.cumsum(np.abs(rho).astype(float) ** alpha) for rho in self.rho]

    def __len__(self) -> int:
        return len(self.atoms)

    def draw(self, snapshots: Sequence[int], points: int, generator: torch.Generator) -> Points:
        """Points of each of some snapshots, drawn independently."""
        u = torch.rand(len(snapshots), points, generator=generator, dtype=torch.float64).numpy()
        sums = [self.sums[k] for k in snapshots]
        voxels = [
            np.searchsorted(x, row * x[-1]).clip(max=len(x) - 1)
            for x, row in zip(sums, u, strict=True)
        ]
        return self.points(snapshots, voxels)

    def points(self, snapshots: Sequence[int], voxels: Sequence[np.ndarray]) -> Points:
        """Given voxels of some snapshots, as flat indices."""
        parts, first, start = [], 0, 0
        for k, flat in zip(snapshots, voxels, strict=True):
            s = np.stack(np.unravel_index(flat, self.grid), axis=1) / np.array(self.grid)
            point, atom, vectors = self.reach[k].pairs(s @ self.atoms[k].cell)
            parts.append((point + first, atom + start, vectors, self.rho[k][flat]))
            first, start = first + len(flat), start + len(self.atoms[k].numbers)
        point, atom, vectors, rho = map(np.concatenate, zip(*parts, strict=True))
        index = (torch.from_numpy(x).long().to(self.model.A.device) for x in (point, atom))
        seen = Neighbourhood.join([self.seen[k] for k in snapshots])
        return Points(seen, *index, *map(self.model.as_tensor, (vectors, rho)))


class Points(NamedTuple):
    """Points of some snapshots: their atoms, pairs (point, atom, vector), and the density (P,)."""

    seen: Neighbourhood
    point: Tensor
    atom: Tensor
    vectors: Tensor
    rho: Tensor

    def predicted(self, model: DeepDensity) -> Tensor:
        """Density of the model at the points."""
        h = model.atomic(self.seen)
        return self.summed(model.local(h, self.seen.species, self.atom, self.vectors))

    def summed(self, rho_I: Tensor) -> Tensor:
        """Add the local densities up at each point."""
        return torch.zeros_like(self.rho).index_add(0, self.point, rho_I)


def fit_ansatz(model: DeepDensity, points: Points) -> float:
    """Set A, B, C and D to what fits the density best without networks.

    Nonlinear least squares, from several widths.

    Returns
    -------
    float
        Mean squared error of the bare ansatz, in angstrom**-6.
    """
    count, names = len(model.species), (model.A, model.B, model.C, model.D)
    R, species = distances(points.vectors), points.seen.species[points.atom]

    @torch.no_grad()
    def residual(flat: np.ndarray) -> np.ndarray:
        for p, values in zip(names, flat.reshape(4, count), strict=True):
            p.copy_(torch.from_numpy(values))
        return (points.summed(model.ansatz(species, R)) - points.rho).double().cpu().numpy()

    least = np.repeat([-np.inf, -np.inf, -np.inf, -model.cutoff], count)
    most = np.repeat([np.inf, np.inf, 0.0, model.cutoff], count)
    height = float(points.rho.max()) / 2
    options = {"x_scale": np.repeat([0.1, 0.1, 0.3, 0.3], count), "max_nfev": 40}
    options |= {"bounds": (least, most), "diff_step": 1e-3}  # the model is in single precision
    starts = [np.repeat([0.0, height, -0.5 / w**2, 0.0], count) for w in (0.4, 0.7, 1.2)]
    fits = [least_squares(residual, start, **options) for start in starts]
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
    restart: bool = False,
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
        Where ``state.npz`` and ``log.csv`` go; an unfinished training found there is
        continued. None keeps nothing on disk.
    device
        By default a GPU, if there is one.
    restart
        Begin anew, whatever is in ``run_dir``.

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
    UnfinishedError
        ``run_dir`` holds the state of another training.
    """
    card = {"species": np.unique(training["numbers"].values).tolist()} | dict(arguments or {})
    card["nearest"] = nearest_in([(training, i) for i in range(training.sizes["time"])])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DeepDensity(**card)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = {"steps": steps, "snapshots": snapshots, "points": max(1, batch // snapshots)}
    settings |= {"rate": learning_rate, "decay": decay, "alpha": alpha, "seed": seed}
    run = _Run(model, training, validation, settings)
    known = [training[n].values for n in ("positions", "n_electrons") if n in training]
    settings |= {"arguments": card, "data": f"crc32 {fingerprint(known):08x}"}
    settings |= {"round": round_steps}
    state = TrainingState(run_dir, run.tensors, settings, steps, restart=restart)
    rows = state.restore() or [run.start()]
    since = time.process_time() - rows[-1]["seconds"]
    total = math.ceil(steps / round_steps)
    bar = progress_bar(range(len(rows) - 1, total), "train", total, initial=len(rows) - 1)
    for k in bar:
        row = run.steps(range(k * round_steps, min((k + 1) * round_steps, steps)))
        rows.append(row | {"seconds": time.process_time() - since})
        bar.set_postfix_str(f"validation l1 {row['validation_l1']:.3f} %")
        state.save(rows)
    run.copy(run.best, run.weights)
    return model.cpu().eval(), card, rows


class _Run:
    """Nadam on one model; ``tensors`` is all that it remembers from step to step.

    The weights are two long tensors, A to D and the rest, of which those of the model are views:
    one step of Nadam for all.
    """

    def __init__(
        self,
        model: DeepDensity,
        training: xr.Dataset,
        validation: xr.Dataset,
        settings: Mapping[str, Any],
    ) -> None:
        self.model, self.settings = model, dict(settings)
        self.data = SampledDensities(training, model, settings["alpha"])
        self.checked = _random_voxels(SampledDensities(validation, model, 0.0))
        named = dict(model.named_parameters())
        ansatz = [named.pop(name) for name in "ABCD"]
        self.parts = (ansatz, list(named.values()))
        self.weights = [_joined(part) for part in self.parts]
        groups = [{"params": [x], "lr": 0.0} for x in self.weights]
        self.optimizer = torch.optim.NAdam(groups)
        self.average, self.best = ([x.clone() for x in self.weights] for _ in range(2))
        self.least = torch.full((), math.inf, dtype=torch.float64)
        self.tensors = {"least": self.least, **dict(model.named_buffers())}
        self.tensors.pop("upper")
        for i, x in enumerate(self.weights):
            moments = adam_state(self.optimizer, x)
            moments["mu_product"] = torch.ones(())
            named = moments | {"weight": x, "average": self.average[i], "best": self.best[i]}
            self.tensors |= {f"{name}.{i}": value for name, value in named.items()}

    def start(self) -> dict[str, float]:
        """Fit the ansatz and the scales of the inputs; return the row of the bare ansatz."""
        few = list(range(min(20, len(self.data))))
        generator = step_generator(self.settings["seed"], 0, rank=1)
        points = self.data.draw(few, 3000 // len(few), generator)
        loss = fit_ansatz(self.model, points)
        self.model.standardise(points.seen, points.atom, points.vectors)
        self.copy(self.weights, self.average)
        row = {"step": 0, "points": 0, "rate": 0.0, "loss": loss} | self.errors()
        return row | {"seconds": time.process_time()}

    def steps(self, steps: range) -> dict[str, float]:
        """Take some steps; return their row but for the time."""
        losses = [self.step(step) for step in steps]
        points = self.settings["points"] * self.settings["snapshots"]
        row = {"step": steps.stop, "points": steps.stop * points, "rate": self.rate(steps.stop)}
        return row | {"loss": float(np.mean(losses))} | self.errors()

    def rate(self, step: int) -> float:
        s = self.settings
        return s["rate"] * s["decay"] ** (step / s["steps"]) * min(1.0, (step + 1) / _WARM_UP)

    def step(self, step: int) -> float:
        """Take one step; return the mean squared error before it."""
        s, generator = self.settings, step_generator(self.settings["seed"], step)
        known = snapshots_seen(step / s["steps"], len(self.data))
        chosen = torch.randint(known, (s["snapshots"],), generator=generator).tolist()
        points = self.data.draw(chosen, s["points"], generator)
        loss = (points.predicted(self.model) - points.rho).square().mean()
        self.model.zero_grad()
        loss.backward()
        for x, part in zip(self.weights, self.parts, strict=True):
            x.grad = torch.cat([p.grad.flatten() for p in part])
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for group, share in zip(self.optimizer.param_groups, _SHARES, strict=True):
            group["lr"] = self.rate(step) * share
        self.optimizer.step()
        decay = min(_EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)
        return loss.item()

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Validation errors in per cent, means over snapshots; keep the average if best."""
        kept = [x.clone() for x in self.weights]
        self.copy(self.average, self.weights)
        pairs = [(points.predicted(self.model), points.rho) for points in self.checked]
        self.copy(kept, self.weights)
        l1, l2 = (
            100 * float(np.mean([float(error(p, r, 1)) for p, r in pairs]))
            for error in (relative_l1, relative_l2)
        )
        if l1 < self.least:
            self.least.fill_(l1)
            self.copy(self.average, self.best)
        return {"validation_l1": l1, "validation_l2": l2}

    @staticmethod
    @torch.no_grad()
    def copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        torch._foreach_copy_(target, source)


def _joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One long tensor, of which the parameters become views."""
    whole = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    return whole


def _random_voxels(data: SampledDensities) -> list[Points]:
    """Some of each snapshot, the same whenever asked."""
    rng, size = np.random.default_rng(0), len(data.rho[0])
    voxels = [rng.choice(size, min(_CHECKED, size), replace=False) for _ in range(len(data))]
    return [data.points([i], [chosen]) for i, chosen in enumerate(voxels)]
