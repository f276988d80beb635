"""What the scripts of experiments share: arguments, errors in one line, a table of spreads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from densitykit.errors import CheckpointError, DensityKitError
from densitykit.models import NuclearEmulator, load_model

__all__ = ["ablation_parser", "load_nuclear", "print_spread", "run_script"]


def run_script(main: Callable[[], object]) -> None:
    """Call it; an error that a user can mend is one line on stderr, and exit status 2."""
    try:
        main()
    except DensityKitError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


def ablation_parser(
    text: str | None,
    variants: Iterable[str],
    checkpoint: str,
    run_dir: str | None = None,
    steps: int = 0,
) -> argparse.ArgumentParser:
    """Arguments that all ablations have.

    Parameters
    ----------
    text
        The docstring of the script, whose first line describes it.
    variants
        What there is to compare.
    checkpoint
        What the checkpoint is for.
    run_dir
        Default folder of unfinished trainings; None for a script that trains no net.
    steps
        Default length of a training.
    """
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("data", help="trajectory store with splits")
    parser.add_argument("checkpoint", type=Path, help=checkpoint)
    parser.add_argument("out", type=Path, help="CSV file; what it holds is not computed again")
    names = [*variants]
    options = {"nargs": "+", "choices": names, "default": names, "metavar": "VARIANT"}
    parser.add_argument("--variants", **options, help=", ".join(map(repr, names)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, help="of torch; default: one a core")
    if run_dir is not None:
        parser.add_argument("--steps", type=int, default=steps, help="of each training")
        parser.add_argument("--run-dir", type=Path, default=Path(run_dir), help="of trainings")
    return parser


def print_spread(rows: pd.DataFrame) -> None:
    """Mean and deviation over seeds."""
    table = rows.groupby(["metric", "variant"], sort=False)["value"].agg(["mean", "std"])
    print(table.to_string(float_format="{:.3g}".format))


def load_nuclear(path: str | Path) -> NuclearEmulator:
    """The emulator with nuclei of a checkpoint; `CheckpointError` if it is of another model."""
    model = load_model(path)
    if not isinstance(model, NuclearEmulator):
        raise CheckpointError(
            f"{path}: a {type(model).__name__}; give an emulator with nuclei, such as "
            "`densitykit train nuclear` makes"
        )
    return model
