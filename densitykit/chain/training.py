r"""Training maps of chains: Adam on several models at once, and one linear solve.

Several seeds are trained as one batched model (`torch.func`): they see the same batches and
differ in their initial weights. On one core, where a batch of one model is too small to keep the
arithmetic busy, further seeds are nearly free.

What a training remembers is a function of seed and epochs done, and is saved by an atomic rename:
one that was killed gives what it would have given. (:func:`densitykit.training.loop.fit` serves
other ends: pairs of states, averaged weights, one model.)
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from densitykit.chain.atomic_sum import AtomicSum1D, Surroundings
from densitykit.chain.smooth_density import SmoothDensity1D, design_matrix
from densitykit.chain.snapshots import ChainSnapshots
from densitykit.data.windows import step_generator
from densitykit.io.progress import progress_bar
from densitykit.io.work import fingerprint
from densitykit.training.state import TrainingState, adam_state

__all__ = [
    "constant_rate",
    "cosine_rate",
    "fit_linear",
    "train_ensemble",
]

#: snapshots whose equations are in memory at a time
_BATCH = 8


def constant_rate(progress: float) -> float:
    """Factor of the learning rate at a progress of 0 to 1: always 1."""
    return 1.0


def cosine_rate(progress: float) -> float:
    """Factor of the learning rate at a progress of 0 to 1: from 1 down to 0 as a cosine."""
    return 0.5 * (1 + math.cos(math.pi * progress))


class _OnSurroundings(nn.Module):
    """The model as a function of prepared surroundings, for `functional_call`."""

    def __init__(self, model: AtomicSum1D, n_points: int) -> None:
        super().__init__()
        self.model, self.n_points = model, n_points

    def forward(self, surroundings: Surroundings) -> Tensor:
        return self.model.density(surroundings, self.n_points)


class _Ensemble:
    """Models of one architecture as one batched function; ``weights`` have a leading axis S."""

    def __init__(self, models: Sequence[AtomicSum1D], n_points: int) -> None:
        wrapped = [_OnSurroundings(model, n_points) for model in models]
        self.models, self.skeleton = wrapped, copy.deepcopy(wrapped[0])
        self.weights, self.buffers = stack_module_state(wrapped)

    def errors(self, weights: Mapping[str, Tensor], s: Surroundings, density: Tensor) -> Tensor:
        """Mean squared error of each model, shape (S,)."""

        def error(weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
            rho = functional_call(self.skeleton, (weights, buffers), (s,))
            return (rho - density).square().mean()

        return vmap(error)(dict(weights), self.buffers)

    @torch.no_grad()
    def give_back(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights to the models that they came from."""
        for i, model in enumerate(self.models):
            for name, p in model.named_parameters():
                p.copy_(weights[name][i])


class _AdamRun:
    """Adam on an ensemble; ``tensors`` is all that it remembers from epoch to epoch."""

    def __init__(
        self,
        models: Sequence[AtomicSum1D],
        training: ChainSnapshots,
        validation: ChainSnapshots,
        batch: int,
        seed: int,
    ) -> None:
        self.ensemble = _Ensemble(models, len(training.points))
        self.weights, self.batch, self.seed = self.ensemble.weights, batch, seed
        self.best = {name: p.detach().clone() for name, p in self.weights.items()}
        self.least = torch.full((len(models),), math.inf, dtype=torch.float64)
        shares = {f"model.{name}": share for name, share in models[0].rates.items()}
        groups = [{"params": [p], "share": shares.get(n, 1.0)} for n, p in self.weights.items()]
        self.optimizer = torch.optim.Adam(groups)
        self.tensors = {"least": self.least}
        for name, p in self.weights.items():
            moments = adam_state(self.optimizer, p)
            self.tensors |= {f"{key}.{name}": value for key, value in moments.items()}
            self.tensors |= {f"weight.{name}": p, f"best.{name}": self.best[name]}
        self.seen, self.checked = (d.seen_by(models[0]) for d in (training, validation))
        self.rho, self.reference = (d.density.to(self.seen.x) for d in (training, validation))

    def epoch(self, number: int, rate: Callable[[float], float]) -> dict[str, float]:
        """One pass; ``rate`` gives the learning rate after a part of it. Returns the errors."""
        count, total = len(self.rho), 0.0
        order = torch.randperm(count, generator=step_generator(self.seed, number))
        for i, rows in enumerate(order.to(self.rho.device).split(self.batch)):
            for group in self.optimizer.param_groups:
                group["lr"] = group["share"] * rate(i * self.batch / count)
            errors = self.ensemble.errors(self.weights, self.seen.at(rows), self.rho[rows])
            self.optimizer.zero_grad()
            errors.sum().backward()  # no weight belongs to two models
            self.optimizer.step()
            total = total + errors.detach() * (len(rows) / count)
        validation = self._validate()
        errors = {f"training_{i}": e for i, e in enumerate(total.tolist())}
        return errors | {f"validation_{i}": e for i, e in enumerate(validation.tolist())}

    @torch.no_grad()
    def _validate(self) -> Tensor:
        errors = self.ensemble.errors(self.weights, self.checked, self.reference).double().cpu()
        for i in torch.nonzero(errors < self.least).flatten().tolist():
            self.least[i] = errors[i]
            for name, p in self.best.items():
                p[i] = self.weights[name][i]
        return errors


def train_ensemble(
    models: Sequence[AtomicSum1D],
    training: ChainSnapshots,
    validation: ChainSnapshots,
    *,
    epochs: int = 400,
    batch: int = 4,
    learning_rate: float = 1e-3,
    rate: Callable[[float], float] = constant_rate,
    seed: int = 0,
    run_dir: str | Path | None = None,
    save_every: int = 20,
    label: str = "train",
) -> pd.DataFrame:
    """Train models of one architecture with Adam; each ends with its best weights.

    Parameters
    ----------
    models
        On one device, of one precision; they differ in their weights.
    training, validation
        Snapshots; the best weights are those of the lowest validation error.
    epochs, batch, learning_rate
        Passes, snapshots a step, Adam's rate.
    rate
        Factor of the rate as a function of progress.
    seed
        Of the order of the snapshots, the same for all models.
    run_dir
        Where ``state.npz`` and ``log.csv`` go; an unfinished training found there
        is continued.
    save_every
        Epochs between saved states.
    label
        Name on the progress bar.

    Returns
    -------
    pd.DataFrame
        One row per epoch: epoch, seconds (of processor time), and for each model i the errors
        training_i (mean over the epoch) and validation_i, in 1/bohr^2.

    Raises
    ------
    UnfinishedError
        ``run_dir`` holds the state of another training.
    """
    run = _AdamRun(models, training, validation, batch, seed)
    settings = {"epochs": epochs, "batch": batch, "learning_rate": learning_rate, "seed": seed}
    settings |= {"rate": rate.__name__, "snapshots": len(training)}
    settings |= {"data": f"crc32 {fingerprint([training, validation]):08x}"}
    state = TrainingState(run_dir, run.tensors, settings, epochs)
    rows = state.restore()
    started = time.process_time() - (rows[-1]["seconds"] if rows else 0.0)
    bar = progress_bar(range(len(rows), epochs), label, epochs, initial=len(rows))
    for epoch in bar:
        errors = run.epoch(epoch, lambda part: learning_rate * rate((epoch + part) / epochs))  # noqa: B023
        rows.append({"epoch": epoch} | errors | {"seconds": time.process_time() - started})
        bar.set_postfix_str(f"best validation {run.least.min().item():.2e}")
        if (epoch + 1) % save_every == 0 or epoch + 1 == epochs:
            state.save(rows)
    run.ensemble.give_back(run.best)
    return pd.DataFrame(rows)


@torch.no_grad()
def fit_linear(
    model: SmoothDensity1D, sets: Sequence[ChainSnapshots], ridge: float = 1e-12
) -> float:
    """Set A and B to what fits the densities of all sets best.

    Linear least squares on all points, by normal equations of columns scaled to unit norm.
    ``ridge`` is added to their diagonal: functions of neighbouring atoms can nearly stand
    for one another. Monomials that no set shows keep no weight.

    Parameters
    ----------
    model
        Changed in place.
    sets
        Snapshots; those of different chains are different sets.
    ridge
        See above.

    Returns
    -------
    float
        Mean squared error in 1/bohr^2, of the residuals: the same from the normal equations is a
        difference of large numbers, and may come out negative.
    """
    seen = [data.seen_by(model) for data in sets]
    used = _used_columns(model, seen)
    size = int(used.sum())
    normal = torch.zeros(size, size, dtype=torch.float64)
    projected = torch.zeros(size, dtype=torch.float64)
    for M, rho in _equations(model, sets, seen):
        M = M[:, used]
        normal.addmm_(M.T, M)
        projected += M.T @ rho
    norm = normal.diagonal().sqrt()
    scaled = normal / norm / norm[:, None]
    scaled.diagonal().add_(ridge)
    w = torch.linalg.solve(scaled, projected / norm) / norm
    every = w.new_zeros(len(used))
    every[used] = w
    model.A.copy_(every[: model.A.numel()].view_as(model.A))
    model.B.copy_(every[model.A.numel() :].view_as(model.B))
    residuals = [
        model.density(s.at(rows), len(data.points)) - data.density[rows]
        for data, s in zip(sets, seen, strict=True)
        for rows in torch.arange(len(data)).split(_BATCH)
    ]
    return float(torch.cat([r.flatten() for r in residuals]).square().mean())


def _used_columns(model: SmoothDensity1D, sets: Sequence[Surroundings]) -> Tensor:
    """Which numbers of A and B belong to monomials that some atom of some set shows."""
    shown = [torch.zeros(x.shape[:2], dtype=torch.bool) for x in (model.A, model.B)]
    for seen in sets:
        for shown_by_species, q in zip(shown, model.polynomials(seen), strict=True):
            for s in seen.species_I.unique().tolist():
                shown_by_species[s] |= (q[:, seen.species_I == s] != 0).flatten(0, 1).any(0)
    waves = (model.waves + 1, model.waves)
    every = [m[..., None].expand(*m.shape, k) for m, k in zip(shown, waves, strict=True)]
    return torch.cat([mask.flatten() for mask in every])


def _equations(
    model: SmoothDensity1D,
    sets: Sequence[ChainSnapshots],
    all_seen: Sequence[Surroundings],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Derivatives by A and B, and densities, of a few snapshots at a time."""
    for data, seen in zip(sets, all_seen, strict=True):
        n_points = len(data.points)
        for rows in progress_bar(torch.arange(len(data)).split(_BATCH), "equations"):
            M = [design_matrix(model, seen.at(row[None]), n_points) for row in rows]
            yield torch.cat(M), data.density[rows].flatten().double()
