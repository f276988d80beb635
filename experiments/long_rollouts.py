r"""The long examination of emulators: every figure that a claim about them rests on, as tidy rows.

For each checkpoint, all beside the independent test run and its statistical intervals:

* `one step`: relative errors after one horizon;
* `10 ps`: a rollout as long as the training run, from several seeds, each from
  another state of the test run;
* `10 ps, matched`: the same for emulators with a thermostat, at the mean temperature of the test
  run, to tell what a model gets wrong from what 5 ps of a thermostat leave to chance;
* `10 ps, matched, fast`: so, too, with one force a step instead of two, in single precision;
* `last 10 ps of 100`: the end of one long rollout;
* `ensemble`: error, spread and CRPS against lead time;
* `ensemble, uncertain forces`: the same where each member errs in its forces as the field does on
  the validation run (`densitykit.generate.film.UncertainForces`).

One row per (model, part, seed, metric) goes to a CSV file that notebooks only read. What is there
is not computed again, so the examination may be killed and given again, and grows with its
arguments. Rollouts are kept as stores in the run directory.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from densitykit.assess import assess_rollout, ensemble_scores, one_step_table
from densitykit.data.windows import load_windows
from densitykit.generate.film import UncertainForces, force_error
from densitykit.io.reader import open_split, open_trajectory
from densitykit.models import Emulator, FieldEmulator, NuclearEmulator, load_model
from densitykit.rollout import Thermostat, rollout
from experiments.arguments import run_script
from experiments.report import run_missing

__all__ = ["run_long_rollouts"]

PARTS = (
    "one step",
    "ensemble",
    "ensemble, uncertain forces",
    "10 ps",
    "10 ps, matched",
    "10 ps, matched, fast",
    "last 10 ps of 100",
)
KEYS = ["model", "part", "seed"]
JUDGED = "metric value low high reference reference_low reference_high target passed".split()
COLUMNS = [*KEYS, *JUDGED, "lead"]
TEN_PS = 10_000.0
ENSEMBLE = {"steps": 40, "members": 16, "starts": 6}
TAU = 30.0  # fs, of the thermostat of emulators that have none of their own


def run_long_rollouts(
    checkpoints: Sequence[Path],
    data: str | Path,
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    parts: Sequence[str] = PARTS,
    run_dir: Path = Path("runs/long-rollouts"),
) -> pd.DataFrame:
    """Examine checkpoints, or what of it is not in the file yet.

    Parameters
    ----------
    checkpoints
        Of emulators.
    data
        Store with splits train and test.
    out
        CSV file; rows are added to what it holds.
    seeds
        Of the rollouts of 10 ps; all else has the first.
    parts
        Some of :data:`PARTS`.
    run_dir
        Where rollouts are kept.

    Returns
    -------
    pd.DataFrame
        All rows of the file, with the columns of `densitykit.assess.assess_rollout` and model,
        part, seed and lead (fs; of ensembles only).
    """

    def examined(model: str, part: str, seed: int) -> pd.DataFrame:
        path = run_dir / model / f"{part}, seed {seed}.zarr"
        return _examined(load_model(named[model]), part, seed, data, path)

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
    """Only an emulator with nuclei has a temperature of its own, and forces."""
    nuclear = "matched" in part or "forces" in part
    return not nuclear or isinstance(load_model(checkpoint), NuclearEmulator)


def _examined(
    emulator: Emulator, part: str, seed: int, data: str | Path, path: Path
) -> pd.DataFrame:
    """Rows of one part."""
    options = {"horizon": emulator.horizon, "context": max(3, emulator.context)}
    test = load_windows(data, "test", **options)
    if part == "one step":
        return one_step_table({"": emulator}, test).drop(columns="model")
    if "matched" in part:
        emulator.temperature = float(open_split(data, "test")["temperature"].mean())
    if part.endswith("fast"):
        emulator.substeps = 1
        emulator.force_field.float()
    if isinstance(emulator, FieldEmulator):
        emulator = Thermostat(emulator, load_windows(data, "train", **options), TAU)
    if part.endswith("uncertain forces"):
        known = force_error(emulator.force_field, open_split(data, "validation").load())
        each = emulator.horizon / emulator.substeps
        emulator.force_field = UncertainForces(emulator.force_field, *known, each, seed)
    if part.startswith("ensemble"):
        scores = ensemble_scores(emulator, test, **ENSEMBLE)
        # members of a map without random numbers are all the same
        return scores.groupby(["metric", "lead"], as_index=False)["value"].mean()
    length = 10 * TEN_PS if part.startswith("last") else TEN_PS
    return _judged(emulator, data, path, seed, length)


def _judged(
    emulator: Emulator, data: str | Path, path: Path, seed: int, length: float
) -> pd.DataFrame:
    """The last 10 ps of a rollout from a frame of its own, beside the test run."""
    context = max(3, emulator.context)
    starts = load_windows(data, "test", emulator.horizon, context, steps=0)
    steps = round(length / emulator.horizon)
    shutil.rmtree(path, ignore_errors=True)  # of an examination that was killed
    rollout(emulator, starts[(seed * 97) % len(starts)], steps, path=path, seed=seed)
    late = length - TEN_PS
    burn_in = late - 1e-6 if late > 0 else 0.0
    test, train = (open_split(data, split) for split in ("test", "train"))
    return assess_rollout(open_trajectory(path), test, train, burn_in=burn_in)


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
