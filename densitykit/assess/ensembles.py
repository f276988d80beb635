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

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from densitykit.data.windows import StatePairs
from densitykit.errors import ShapeError
from densitykit.metrics import crps
from densitykit.rollout import Step, iterate

__all__ = ["ensemble_scores"]


def ensemble_scores(
    step: Step,
    pairs: StatePairs,
    steps: int,
    members: int = 16,
    starts: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Scores of ensembles from several states of a reference run.

    Parameters
    ----------
    step
        A map that draws random numbers; a deterministic one has no spread.
    pairs
        States of the reference run.
    steps
        Length of each rollout.
    members
        Rollouts from each state.
    starts
        Equally spaced initial states.
    seed
        Of the random numbers.
    progress
        Show a progress bar.

    Returns
    -------
    pd.DataFrame
        Tidy rows: start (time in fs), lead (fs), metric ("error", "spread", "crps" or "member",
        the error of a single member) and value.

    Raises
    ------
    ShapeError
        If the rollouts outlast the run.
    """
    last = len(pairs.states) - 1 - steps * pairs.lag
    if last < 0 or members < 2:
        raise ShapeError(
            f"{steps} steps of {members} members do not fit a run of {len(pairs.states)} states; "
            "ask fewer steps, and 2 members or more"
        )
    rows = []
    first = np.unique(np.linspace(0, last, starts).astype(int))
    with tqdm(total=steps * len(first), desc="ensembles", delay=2, disable=not progress) as bar:
        for i in first:
            state = pairs.given(step, int(i))
            batch = state.expand(members, *state.shape)
            for k, cloud in enumerate(iterate(step, batch, steps, seed + int(i)), start=1):
                truth = pairs.states[int(i) + k * pairs.lag, 0]
                scores = _scores(cloud[:, 0].cpu(), truth)
                lead = k * pairs.horizon
                rows += [(float(pairs.times[i]), lead, *score) for score in scores.items()]
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
