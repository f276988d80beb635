"""The state of an unfinished training: one file that holds all, replaced in one piece.

Tensors go to safetensors; the steps done, the settings that they belong to and the log so far go
to its header as JSON. So a training killed at any moment continues, one with other settings is
told so, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from densitykit.errors import CheckpointError

__all__ = ["TrainingState", "adam_state"]

Rows = list[dict[str, float]]


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
        Where ``state.safetensors`` and ``log.csv`` go; None keeps nothing.
    tensors
        All that the training remembers; they are written as they are then, and filled
        when a state is restored.
    settings
        What must be the same when it is continued.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        tensors: Mapping[str, Tensor],
        settings: Mapping[str, Any],
    ) -> None:
        self.dir = Path(run_dir) if run_dir is not None else None
        self.tensors, self.settings = dict(tensors), json.loads(json.dumps(dict(settings)))

    def save(self, rows: Rows) -> None:
        """Replace the state by that after ``len(rows)`` steps."""
        if self.dir is None:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        path = self.dir / "state.safetensors"
        meta = {"settings": json.dumps(self.settings), "rows": json.dumps(rows)}
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}
        save_file(tensors, f"{path}.part", metadata=meta | {"step": str(len(rows))})
        os.replace(f"{path}.part", path)
        pd.DataFrame(rows).to_csv(self.dir / "log.csv", index=False)

    @torch.no_grad()
    def restore(self) -> Rows:
        """Fill the tensors from the last state and return its rows; none where there is no state.

        Raises
        ------
        CheckpointError
            The file is broken, no state, or that of another training.
        """
        path = self.dir / "state.safetensors" if self.dir is not None else None
        if path is None or not path.exists():
            return []
        saved, rows = self._read(path)
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in self.tensors.items()}:
            raise CheckpointError(f"{path}: state of another model; use another run directory")
        for name, values in saved.items():
            self.tensors[name].copy_(values)
        return rows

    def _read(self, path: Path) -> tuple[dict[str, Tensor], Rows]:
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata()
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: not a whole training state ({error}); delete it"
            ) from error
        if meta is None or not {"step", "settings", "rows"} <= meta.keys():
            raise CheckpointError(f"{path}: not a training state; use another run directory")
        if json.loads(meta["settings"]) != self.settings:
            raise CheckpointError(
                f"{path}: made with settings {meta['settings']}, not "
                f"{json.dumps(self.settings)}; use these settings or another run directory"
            )
        return tensors, json.loads(meta["rows"])
