"""The state of an unfinished training: one file that holds all, replaced in one piece.

It holds tensors, the log so far and the settings that it belongs to (`densitykit.io.work`). So a
training killed at any moment continues, one with other settings is told so, and nothing is
unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from densitykit.errors import UnfinishedError
from densitykit.io.work import Work

__all__ = ["TrainingState", "adam_state"]

Rows = list[dict[str, float]]
FIXED = "fixed."  # tensors that are compared, not trained


def adam_state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """What Adam remembers of a parameter, made before its first step: tensors to keep."""
    state = {"step": torch.zeros(())}
    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    optimizer.state[p] = state
    return state


class TrainingState:
    """Saves tensors that change in place, the settings they belong to, and the rows so far.

    Parameters
    ----------
    run_dir
        Where ``state.npz`` and ``log.csv`` go; None keeps nothing.
    tensors
        All that the training remembers; they are written as they are then, and filled
        when a state is restored. Those called ``fixed.*`` must be the same but for rounding.
    settings
        What must be the same when it is continued.
    steps
        How many steps the training takes.
    restart
        Forget the state that is there.

    Attributes
    ----------
    ends
        Where the training ended before it went on with more steps, and where it ends now.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        tensors: Mapping[str, Tensor],
        settings: Mapping[str, Any],
        steps: int,
        *,
        restart: bool = False,
    ) -> None:
        self.dir = Path(run_dir) if run_dir is not None else None
        self.tensors, self.ends = dict(tensors), [steps]
        self.work = Work(self.dir / "state.npz", settings, restart=restart) if self.dir else None

    def save(self, rows: Rows) -> None:
        """Replace the state by that after ``len(rows)`` steps."""
        if self.work is None:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().numpy() for k, v in self.tensors.items()}
        self.work.save(tensors | {"rows": json.dumps(rows), "ends": self.ends})
        pd.DataFrame(rows).to_csv(self.dir / "log.csv", index=False)

    @torch.no_grad()
    def restore(self) -> Rows:
        """Fill the tensors from the last state and return its rows; none where there is no state.

        Raises
        ------
        UnfinishedError
            The file is broken, no state, or that of another training.
        """
        saved = self.work.load() if self.work is not None else None
        if saved is None:
            return []
        if not {"rows", "ends"} <= saved.keys():
            self._refuse("not the state of a training")
        rows, ends = json.loads(str(saved.pop("rows"))), saved.pop("ends").tolist()
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in self.tensors.items()}:
            self._refuse("state of another model")
        for name, values in saved.items():
            ours, theirs = self.tensors[name], torch.from_numpy(values)
            if name.startswith(FIXED) and not _alike(ours.detach().cpu(), theirs):
                self._refuse(f"{name.removeprefix(FIXED)}, which is not trained, was another")
            ours.copy_(theirs)
        self._go_on(len(rows), ends)
        return rows

    def _go_on(self, done: int, ends: list[int]) -> None:
        """Take the ends of the state; a finished training may have a further one."""
        steps = self.ends[-1]
        if steps != ends[-1]:
            if not done == ends[-1] < steps:
                self._refuse(f"{done} of {ends[-1]} steps are done, {steps} are asked for")
            ends = [*ends, steps]
        self.ends = ends

    def _refuse(self, problem: str) -> None:
        fix = "ask for the same again, use another run directory, or begin anew (--restart)"
        raise UnfinishedError(f"{self.work.path}: {problem}; {fix}")


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same but for rounding: fits repeat no better."""
    return bool((a.double() - b.double()).norm() <= 1e-3 * b.double().norm())
