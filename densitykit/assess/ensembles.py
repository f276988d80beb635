r"""Ensembles of rollouts: is a map as sure as it has a right to be?

Chaos and a random thermostat make one future no better than another, so a map is run M times
from one state, and the cloud of members :math:`x_m` is judged beside what came true, y:

.. math:: \text{error}^2 = \langle (\bar x - y)^2 \rangle, \quad
   \text{spread}^2 = \tfrac{M + 1}{M} \langle s^2 \rangle, \quad
   \mathrm{CRPS} = \Big\langle \tfrac{1}{M} \sum_m |x_m - y| -
   \tfrac{1}{2 M (M - 1)} \sum_{m, n} |x_m - x_n| \Big\rangle .

If y could be one of the members, error and spread agree (Fortin et al. 2014): more error than
spread is overconfidence. The CRPS (Gneiting and Raftery 2007; fair for small M, Ferro 2014) is the
mean absolute error of a single certain forecast, and rewards an honest cloud. All over the points
of the grid, in units of the root mean square (error, spread) or mean (CRPS) of y.
The spread also bounds what any map can do: two members differ by the thermostat's random numbers
alone, and the ab-initio run had such numbers, too.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from densitykit.assess.one_step import spread_starts, true_density
from densitykit.data.windows import Windows
from densitykit.errors import ShapeError
from densitykit.io.progress import progress_bar
from densitykit.metrics import crps
from densitykit.models.base import Emulator
from densitykit.rollout import iterate

__all__ = ["ensemble_scores"]


def ensemble_scores(
    emulator: Emulator,
    windows: Windows,
    steps: int,
    members: int = 16,
    starts: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Scores of ensembles from several frames of a reference run.

    Parameters
    ----------
    emulator
        One that draws random numbers; a deterministic one has no spread.
    windows
        Of the reference run.
    steps
        Length of each rollout.
    members
        Rollouts from each start.
    starts
        Equally spaced present frames.
    seed
        Of the random numbers.
    progress
        Show a progress bar, where the output is a terminal.

    Returns
    -------
    pd.DataFrame
        Tidy rows: start (time in fs), lead (fs), metric ("error", "spread", "crps" or "member",
        the error of a single member) and value.

    Raises
    ------
    ShapeError
        The rollouts outlast the run, or there are fewer than two members.
    """
    if members < 2:
        raise ShapeError(f"{members} member(s) have no spread; ask 2 or more")
    rows = []
    first = spread_starts(windows, steps, starts)
    hidden = None if progress else True
    with progress_bar(total=steps * len(first), desc="ensembles", delay=2, disable=hidden) as bar:
        for i in first.tolist():
            window = windows[i].expand(members)
            for k, (_, cloud) in enumerate(iterate(emulator, window, steps, seed + i), start=1):
                truth = true_density(windows, torch.tensor([i]), k)[0]
                scores = _scores(cloud.cpu(), truth)
                lead = k * windows.horizon
                rows += [(float(window.now[0]), lead, *score) for score in scores.items()]
                bar.update()
    return pd.DataFrame(rows, columns=["start", "lead", "metric", "value"])


def _scores(cloud: Tensor, truth: Tensor) -> dict[str, float]:
    """Scores of one cloud (M, X, Y, Z) beside one frame."""
    x, y = cloud.double(), truth.double()
    m, norm = len(x), y.square().mean().sqrt()
    spread = ((m + 1) / m * x.var(dim=0).mean()).sqrt()
    squares = {
        "error": (x.mean(dim=0) - y).square().mean().sqrt() / norm,
        "member": (x - y).square().mean().sqrt() / norm,
        "spread": spread / norm,
    }
    score = crps(x.numpy(), y.numpy()).mean() / float(y.mean())
    return {name: float(value) for name, value in squares.items()} | {"crps": float(score)}
