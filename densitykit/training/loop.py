r"""One resumable loop, on Lightning Fabric: AdamW, a warmed-up cosine rate, averaged weights.

The loop is a function of (seed, step, rank) only: batch, noise and learning rate of a step are
drawn from a generator seeded by these. State is one file, replaced in one piece, so a
training killed at any moment continues with the loss curve of an uninterrupted one; it belongs to
its settings and its data, and is refused for others. A finished one goes on with more steps, for
which the rate rises and falls anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from densitykit.data.windows import Window, Windows, step_generator
from densitykit.io.progress import progress_bar
from densitykit.training.state import FIXED, TrainingState, adam_state

__all__ = ["Objective", "fit"]

Rows = list[dict[str, float]]
_WARM_UP = 50  # steps


class Objective(Protocol):
    """What a training minimises: a module with ``inputs`` and ``forward``.

    ``inputs(window)`` makes the tensors of a batch, on the device of the window;
    ``forward(*inputs, generator)`` returns terms, scalars in a dictionary, with key "loss". It may
    have ``settings``, and ``fixed``, tensors by name that are not trained: what must be the same
    when the training is continued.
    """

    def inputs(self, window: Window) -> tuple[Tensor, ...]: ...


def fit(
    objective: nn.Module,
    windows: Windows,
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
    restart: bool = False,
) -> Rows:
    """Minimise an objective over windows; at the end it holds the average of its weights.

    Parameters
    ----------
    objective
        See `Objective`; what of it needs no gradient is not trained.
    windows
        Training windows.
    steps, batch, learning_rate
        Length, windows a step and device, peak rate.
    seed
        Everything random follows from it.
    run_dir
        Where ``state.npz`` and ``log.csv`` go; an unfinished training found there is
        continued, and a finished one goes on if more steps are asked for. None keeps nothing.
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
    restart
        Begin anew, whatever is in ``run_dir``.

    Returns
    -------
    list of dict
        One row a step: step, the terms, learning rate, seconds so far, and validation figures
        where they were made.

    Raises
    ------
    UnfinishedError
        ``run_dir`` holds a state that does not belong to this training.
    """
    run = _Run(objective, fabric or Fabric(accelerator="auto", devices=1), learning_rate, ema)
    settings = {
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "ema": ema,
        "ranks": run.fabric.world_size,
        "data": windows.fingerprint(),
        "objective": {"name": type(objective).__name__} | getattr(objective, "settings", {}),
    }
    state = TrainingState(run_dir, run.tensors(), settings, steps, restart=restart)
    rows = state.restore()
    started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)
    for step in run.bar(label, len(rows), steps):
        generator = step_generator(seed, step, run.fabric.global_rank)
        inputs = objective.inputs(windows.sample_batch(batch, generator).to(run.fabric.device))
        row = {"step": step, **run.step(inputs, generator, step, state.ends)}
        last = step + 1 == steps
        if validate is not None and ((step + 1) % validate_every == 0 or last):
            with run.averaged():
                row |= validate()
        row["seconds"] = time.perf_counter() - started
        rows.append(row)
        if run.fabric.is_global_zero and ((step + 1) % save_every == 0 or last):
            state.save(rows)
    run.finish()
    return rows


class _Run:
    """Weights, their average and the optimiser of one training."""

    def __init__(
        self, objective: nn.Module, fabric: Fabric, learning_rate: float, ema: float
    ) -> None:
        self.objective, self.fabric, self.ema = objective, fabric, ema
        self.learning_rate = learning_rate
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(self.trained, learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        self.wrapped, self.optimizer = fabric.setup(objective, adam)
        # only now: the set-up moves the weights to the device and gives every rank those of rank 0
        self.average = [p.detach().clone() for p in self.trained]
        self.wrapped.train()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their average, and the moments of Adam, which are made for it."""
        tensors = {}
        for i, (p, mean) in enumerate(zip(self.trained, self.average, strict=True)):
            state = adam_state(self.optimizer, p)
            moments = {f"{name}.{i}": x for name, x in state.items()}
            tensors |= {f"weight.{i}": p, f"average.{i}": mean} | moments
        fixed = getattr(self.objective, "fixed", {})
        return tensors | {FIXED + name: x for name, x in fixed.items()}

    def bar(self, label: str, first: int, steps: int) -> Iterable[int]:
        """Steps left, with a progress bar where the output is a terminal."""
        hidden = True if self.fabric.global_rank > 0 else None
        return progress_bar(range(first, steps), label, steps, initial=first, disable=hidden)

    def step(
        self, inputs: tuple[Tensor, ...], generator: torch.Generator, step: int, ends: list[int]
    ) -> dict[str, float]:
        """Take one step; return its terms and learning rate, which falls to zero at each end."""
        start, end = next((a, b) for a, b in pairwise([0, *ends]) if step < b)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - start) / (end - start)))
        rate = self.learning_rate * min(1.0, (step - start + 1) / _WARM_UP) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        terms = self.wrapped(*inputs, generator)
        self.optimizer.zero_grad()
        self.fabric.backward(terms["loss"])
        self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=1.0)
        self.optimizer.step()
        decay = min(self.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - decay)
        return {**{k: v.item() for k, v in terms.items()}, "learning_rate": rate}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put averaged weights in place of the trained ones for the length of a block."""
        self._swap()
        self.wrapped.eval()
        try:
            yield
        finally:
            self.wrapped.train()
            self._swap()

    def _swap(self) -> None:
        for p, mean in zip(self.trained, self.average, strict=True):
            p.data, mean.data = mean.data, p.data

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the average as the weights."""
        for p, mean in zip(self.trained, self.average, strict=True):
            p.copy_(mean)
        self.objective.eval()
