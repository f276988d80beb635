r"""The long examination of emulators: every figure that a claim about them rests on, as tidy rows.

For each checkpoint, all beside the independent test run and its statistical intervals:

* `one step`: relative errors after one horizon;
* `10 ps`: the verdict on a rollout as long as the training run, from several seeds, each from
  another state of the test run;
* `10 ps, matched`: the same for maps with a thermostat, at the mean temperature of the test run,
  to tell what a model gets wrong from what 5 ps of a thermostat leave to chance;
* `10 ps, matched, fast`: so, too, with one force a step instead of two, in single precision;
* `last 10 ps of 100`: the verdict on the end of one long rollout;
* `ensemble`: error, spread and CRPS against lead time.

One row per (model, part, seed, metric) goes to a CSV file that notebooks only read. What is there
is not computed again, so the examination may be killed and given again, and grows with its
arguments. Rollouts are kept as stores in the run directory.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pandas as pd
import xarray as xr

from densitykit.assess import one_step_table
from densitykit.assess.ensembles import ensemble_scores
from densitykit.assess.rollouts import COLUMNS as VERDICT
from densitykit.assess.rollouts import verdict
from densitykit.data.windows import StatePairs, load_pairs
from densitykit.io.reader import open_split, open_trajectory
from densitykit.models import StateMap, load_model
from densitykit.rollout import Step, Thermostat, rollout
from experiments.arguments import run_script
from experiments.report import run_missing

__all__ = ["run_long_rollouts"]

PARTS = (
    "one step",
    "ensemble",
    "10 ps",
    "10 ps, matched",
    "10 ps, matched, fast",
    "last 10 ps of 100",
)
KEYS = ["model", "part", "seed"]
COLUMNS = [*KEYS, *VERDICT, "lead"]
TEN_PS = 10_000.0
ENSEMBLE = {"steps": 40, "members": 16, "starts": 6}
TAU = 30.0  # fs, of the thermostat of maps that have none of their own


def run_long_rollouts(
    checkpoints: Sequence[Path],
    data: str | Path,
    out: Path,
    *,
    horizon: float = 12.0,
    seeds: Sequence[int] = (0, 1, 2),
    parts: Sequence[str] = PARTS,
    run_dir: Path = Path("runs/long-rollouts"),
) -> pd.DataFrame:
    """Examine checkpoints, or what of it is not in the file yet.

    Parameters
    ----------
    checkpoints
        Of one-step maps.
    data
        Store with splits train and test.
    out
        CSV file; rows are added to what it holds.
    horizon
        Of the maps, fs.
    seeds
        Of the rollouts of 10 ps; all else has the first.
    parts
        Some of :data:`PARTS`.
    run_dir
        Where rollouts are kept.

    Returns
    -------
    pd.DataFrame
        All rows of the file, with the columns of `densitykit.assess.rollouts.verdict` and model,
        part, seed and lead (fs; of ensembles only).
    """

    @cache
    def loaded() -> tuple[list[StatePairs], list[xr.Dataset]]:
        pairs = [load_pairs(data, split, horizon) for split in ("train", "test")]
        return pairs, [open_split(data, split) for split in ("test", "train")]

    def examined(model: str, part: str, seed: int) -> pd.DataFrame:
        (train, test), runs = loaded()
        place = run_dir / model / f"{part}, seed {seed}.zarr"
        return _examined(load_model(named[model]), part, seed, train, test, runs, place)

    named = {path.stem: path for path in checkpoints}
    wanted = [
        (model, part, seed)
        for model, path in named.items()
        for part in parts
        if _applies(part, path)
        for seed in (seeds if part.startswith("10 ps") else seeds[:1])
    ]
    return run_missing(out, COLUMNS, KEYS, wanted, examined)


def _applies(part: str, checkpoint: Path) -> bool:
    """Only a map with a temperature of its own can be set to another one."""
    return "matched" not in part or hasattr(load_model(checkpoint), "temperature")


def _examined(
    step: Step,
    part: str,
    seed: int,
    train: StatePairs,
    test: StatePairs,
    runs: list[xr.Dataset],
    place: Path,
) -> pd.DataFrame:
    """Rows of one part."""
    if part == "one step":
        return one_step_table({"": step}, test).drop(columns="model")
    if "matched" in part:
        step.temperature = float(runs[0]["temperature"].mean())
    if part.endswith("fast"):
        step.substeps = 1
        step.force_field.float()
    step = Thermostat(step, train, TAU) if isinstance(step, StateMap) else step
    if part == "ensemble":
        scores = ensemble_scores(step, test, **ENSEMBLE)
        # members of a map without random numbers are all the same
        return scores.groupby(["metric", "lead"], as_index=False)["value"].mean()
    length = 10 * TEN_PS if part.startswith("last") else TEN_PS
    return _judged(step, test, runs, place, seed, length)


def _judged(
    step: Step, test: StatePairs, runs: list[xr.Dataset], path: Path, seed: int, length: float
) -> pd.DataFrame:
    """The verdict on the last 10 ps of a rollout from a state of its own."""
    steps = round(length / test.horizon)
    start = (seed * 97) % len(test.states)
    shutil.rmtree(path, ignore_errors=True)  # of an examination that was killed
    state, time = test.given(step, start), float(test.times[start])
    rollout(step, state, steps, cell=test.cell, path=path, start=time, seed=seed)
    film = open_trajectory(path)
    late = length - TEN_PS
    return verdict(film, *runs, burn_in=late - 1e-6 if late > 0 else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="trajectory store with splits train and test")
    parser.add_argument("out", type=Path, help="CSV file; what it holds is not computed again")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = {"nargs": "+", "choices": PARTS, "default": PARTS, "metavar": "PART"}
    parser.add_argument("--parts", **options, help=", ".join(map(repr, PARTS)))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/long-rollouts"))
    arguments = parser.parse_args()
    rows = run_long_rollouts(
        arguments.checkpoints,
        arguments.data,
        arguments.out,
        seeds=arguments.seeds,
        parts=arguments.parts,
        run_dir=arguments.run_dir,
    )
    judged = rows[rows["passed"].notna()]
    share = judged.assign(passed=judged["passed"].astype(float))
    by = ["part", "metric", "target"]
    print(share.pivot_table("passed", by, "model", sort=False).to_string(na_rep="-"))


if __name__ == "__main__":
    run_script(main)
