"""The command line, ``python -m densitykit COMMAND``: a few lines over the modules."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from densitykit import __version__
from densitykit.ablations import VARIANTS, compare_variants, run_ablations
from densitykit.baselines import baseline_maps
from densitykit.chain_experiments import run_experiments
from densitykit.demo import HORIZON, run
from densitykit.errors import DensityKitError, TrajectoryError
from densitykit.evaluation import (
    cost_table,
    one_step_table,
    rollout_table,
    validation_error,
    wide_table,
)
from densitykit.formats import convert, split_in_time, write_cube
from densitykit.generate.commands import add_parsers
from densitykit.models import (
    LatentDiffusion,
    NuclearEmulator,
    SurrogateUNet,
    load_model,
    save_model,
)
from densitykit.motion_ablations import MOTIONS, run_motion_ablations
from densitykit.nuclear_training import fit_parts, train_emulator
from densitykit.residual_ablations import RESIDUALS, run_residual_ablations
from densitykit.rollout import Thermostat, rollout
from densitykit.sampling import load_pairs
from densitykit.study import PARTS, run_study
from densitykit.training import adopt_autoencoder, train_latent_diffusion, train_surrogate
from densitykit.trajectory import open_runs, open_split, open_trajectory, summarise
from densitykit.transforms import LogNormal
from densitykit.validation import validate_trajectory
from densitykit.verdict import verdict

Trained = tuple[nn.Module, dict[str, Any], list[dict[str, float]]]
FULL = {"latent_channels": 8, "autoencoder_width": 40, "autoencoder_blocks": 1}


def _validate(arguments: argparse.Namespace) -> int:
    problems = validate_trajectory(arguments.path)
    for problem in problems:
        print(problem)
    print(
        f"{arguments.path}: {len(problems)} problem(s)" if problems else f"{arguments.path}: valid"
    )
    return bool(problems)


def _describe(arguments: argparse.Namespace) -> int:
    print(summarise(arguments.path))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    options = {"keepbits": arguments.keepbits, "allow_negative": arguments.allow_negative}
    convert(arguments.files, arguments.out, time_step=arguments.time_step, **options)
    if arguments.splits:
        split_in_time(arguments.out, arguments.splits, arguments.gap)
    return _describe(argparse.Namespace(path=arguments.out))


def _export(arguments: argparse.Namespace) -> int:
    write_cube(open_trajectory(arguments.path), arguments.frame, arguments.out)
    print(arguments.out)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    """Train one model on the split "train", watched on "validation"; never reads "test"."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    options = {
        "steps": arguments.steps,
        "batch": arguments.batch,
        "learning_rate": arguments.rate,
        "seed": arguments.seed,
        "run_dir": arguments.run_dir or Path("runs") / arguments.out.stem,
    }
    train = _train_nuclear if arguments.model == "nuclear" else _train_fields
    model, card, rows = train(arguments, options)
    provenance = {
        "data": f"{arguments.data}, split train",
        "command": " ".join(["python -m densitykit", *sys.argv[1:]]),
        "minutes": round(rows[-1]["seconds"] / 60, 1),
        "last": rows[-1],
    }
    print(save_model(model, arguments.out, card, provenance))
    return 0


def _train_nuclear(arguments: argparse.Namespace, options: dict[str, Any]) -> Trained:
    run, held_out = (open_split(arguments.data, s).load() for s in ("train", "validation"))
    volumes = open_runs(arguments.volumes) if arguments.volumes else ()
    model, card = fit_parts(run, HORIZON, volumes=volumes)
    return model, card, train_emulator(model, run, held_out, **options)


def _train_fields(arguments: argparse.Namespace, options: dict[str, Any]) -> Trained:
    train, held_out = (load_pairs(arguments.data, s, HORIZON) for s in ("train", "validation"))
    transform = LogNormal.fit(train.states[:, 0].numpy())
    card = {"mu": transform.mu, "sigma": transform.sigma, "eps": transform.eps, "horizon": HORIZON}
    surrogate = arguments.model == "surrogate"
    card |= {"widths": [48, 96], "blocks": [2, 3]} | ({} if surrogate else FULL)
    model = SurrogateUNet(**card) if surrogate else LatentDiffusion(**card)
    options |= {"validate": partial(validation_error, model, held_out)}
    if surrogate:
        return model, card, train_surrogate(model, train, **options)
    if arguments.autoencoder:
        adopt_autoencoder(model, load_model(arguments.autoencoder))
    options |= {"autoencoder_steps": arguments.autoencoder_steps, "lambda_2": arguments.lambda_2}
    return model, card, train_latent_diffusion(model, train, reading=arguments.reading, **options)


def _rollout(arguments: argparse.Namespace) -> int:
    pairs = load_pairs(arguments.data, arguments.split, HORIZON)
    step = load_model(arguments.checkpoint)
    if arguments.thermostat and isinstance(step, NuclearEmulator):
        step.relaxation = arguments.thermostat
    elif arguments.thermostat:
        step = Thermostat(step, load_pairs(arguments.data, "train", HORIZON), arguments.thermostat)
    if not 0 <= arguments.frame < len(pairs.states):
        raise TrajectoryError(
            f"{arguments.data}: split '{arguments.split}' has no state {arguments.frame}; "
            f"choose --frame in 0..{len(pairs.states) - 1}"
        )
    initial = pairs.given(step, arguments.frame)
    time = float(pairs.times[arguments.frame])
    rollout(
        step,
        initial,
        arguments.steps,
        cell=pairs.cell,
        path=arguments.out,
        start=time,
        seed=arguments.seed,
        attrs={"checkpoint": str(arguments.checkpoint), "initial": f"{arguments.data}, {time} fs"},
    )
    print(summarise(arguments.out))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    """Error table of checkpoints and baselines on a split, and statistics of stored rollouts."""
    train, test = (load_pairs(arguments.data, s, HORIZON) for s in ("train", arguments.split))
    maps = {path.stem: load_model(path) for path in arguments.checkpoints} | baseline_maps(train)
    runs = {p.stem: open_trajectory(p).density.values for p in arguments.rollouts}
    transform = LogNormal.fit(train.states[:, 0].numpy(), eps=0.0)
    tables = [one_step_table(maps, test)]
    if runs:
        tables.append(rollout_table(runs, test.states[:, 0].numpy(), test.cell, transform))
    if arguments.cost:
        tables.append(cost_table(maps, test, open_split(arguments.data, arguments.split).attrs))
    print(tables[0].to_string(index=False, float_format="{:.3%}".format), end="\n\n")
    print(wide_table(tables).to_string(float_format=lambda x: f"{x:.4g}", na_rep="-"))
    return 0


def _verdict(arguments: argparse.Namespace) -> int:
    """A stored rollout beside the run of a split, in ten rows with intervals."""
    training, reference = (open_split(arguments.data, s) for s in ("train", arguments.split))
    rollout = open_trajectory(arguments.rollout)
    table = verdict(rollout, reference, training, burn_in=arguments.burn_in)
    print(table.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))
    if arguments.out:
        table.to_csv(arguments.out, index=False)
    return 0


def _study(arguments: argparse.Namespace) -> int:
    """Everything that is claimed about lithium emulators, as tidy rows."""
    rows = run_study(
        arguments.checkpoints,
        arguments.data,
        arguments.out,
        horizon=HORIZON,
        seeds=arguments.seeds,
        parts=arguments.parts,
        run_dir=arguments.run_dir,
    )
    judged = rows[rows["passed"].notna()]
    by = ["part", "metric", "target"]
    share = judged.assign(passed=judged["passed"].astype(float))
    print(share.pivot_table("passed", by, "model", sort=False).to_string(na_rep="-"))
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    """Small maps on the grid, one thing changed at a time, seed by seed."""
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    rows = run_ablations(
        arguments.data,
        arguments.autoencoder,
        arguments.out,
        variants=arguments.variants,
        seeds=arguments.seeds,
        steps=arguments.steps,
        run_dir=arguments.run_dir,
    )
    print(compare_variants(rows).to_string(index=False, float_format="{:.3f}".format))
    return 0


def _print_spread(rows: pd.DataFrame) -> None:
    """Mean and deviation over seeds."""
    table = rows.groupby(["metric", "variant"], sort=False)["value"].agg(["mean", "std"])
    print(table.to_string(float_format="{:.3g}".format))


def _motion(arguments: argparse.Namespace) -> int:
    """Ablations of the motion of the nuclei."""
    rows = run_motion_ablations(
        arguments.data,
        arguments.checkpoint,
        arguments.out,
        seeds=arguments.seeds,
        variants=arguments.variants,
        volumes=open_runs(arguments.volumes) if arguments.volumes else (),
    )
    _print_spread(rows)
    return 0


def _residual(arguments: argparse.Namespace) -> int:
    """Ablations of the net that draws the density of given nuclei."""
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    rows = run_residual_ablations(
        arguments.data,
        arguments.checkpoint,
        arguments.out,
        seeds=arguments.seeds,
        variants=arguments.variants,
        steps=arguments.steps,
        run_dir=arguments.run_dir,
        large=open_trajectory(arguments.large).load() if arguments.large else None,
    )
    _print_spread(rows)
    return 0


def _chains(arguments: argparse.Namespace) -> int:
    """Tables and checkpoints of Deep Density in one dimension."""
    torch.set_num_threads(1)  # more threads only slow these small matrices
    rows = run_experiments(
        arguments.data,
        arguments.out,
        tables=arguments.tables,
        seeds=arguments.seeds,
        run_dir=arguments.run_dir,
    )
    best = rows.pivot_table(
        index=["variant", "system", "n_near", "samples"],
        columns=["split", "metric"],
        values="value",
        aggfunc="min",
    )
    print(best.loc[:, [("validation", "mse"), ("test", "l1"), ("transfer", "l1")]].to_string())
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    run(arguments.data, arguments.checkpoints, arguments.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("densitykit", description="Electron density in motion.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(action=action)
        return sub

    sub = command("validate", _validate, "Say precisely what is wrong with a trajectory store.")
    sub.add_argument("path", type=Path)
    sub = command(
        "describe", _describe, "Frames, span, grid, cell and atoms of a trajectory store."
    )
    sub.add_argument("path", type=Path)
    sub = command("convert", _convert, "Make a trajectory of cube files or VASP's CHGCAR.")
    sub.add_argument("out", type=Path, help="trajectory store to write")
    sub.add_argument("files", type=Path, nargs="+", help="in the order of time")
    sub.add_argument("--time-step", type=float, required=True, help="between frames, fs")
    sub.add_argument("--keepbits", type=int, help="mantissa bits to keep, such as 10 of 23")
    sub.add_argument("--allow-negative", action="store_true")
    sub.add_argument(
        "--splits", type=float, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help="fractions"
    )
    sub.add_argument("--gap", type=float, default=0.0, help="fs to leave out between splits")
    sub = command("export", _export, "Write a frame of a trajectory as a cube file.")
    sub.add_argument("path", type=Path)
    sub.add_argument("out", type=Path, help="such as frame.cube")
    sub.add_argument("--frame", type=int, default=0)
    sub = command("train", _train, "Train a one-step map on the split 'train' of a store.")
    sub.add_argument("model", choices=("latent", "nuclear", "surrogate"))
    sub.add_argument("data")
    sub.add_argument("out", type=Path, help="checkpoint to write")
    sub.add_argument("--steps", type=int, default=6000)
    sub.add_argument("--autoencoder-steps", type=int, default=6000)
    sub.add_argument("--autoencoder", type=Path, help="take the autoencoder of this checkpoint")
    sub.add_argument("--volumes", help="store of runs in other volumes, for a force field")
    sub.add_argument("--lambda-2", type=float, default=0.0, help="weight of the sJSD")
    sub.add_argument("--reading", choices=("spatial", "value"), default="spatial")
    sub.add_argument("--batch", type=int, default=2)
    sub.add_argument("--rate", type=float, default=1e-3)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--threads", type=int)
    sub.add_argument("--run-dir", type=Path, help="training state; default runs/NAME")
    sub = command("rollout", _rollout, "Roll a checkpoint out from a stored frame.")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("data")
    sub.add_argument("out", type=Path, help="trajectory store to write")
    sub.add_argument("--steps", type=int, default=1000)
    sub.add_argument("--split", default="test")
    sub.add_argument("--frame", type=int, default=0)
    sub.add_argument("--thermostat", type=float, metavar="TAU", help="relaxation time in fs")
    sub.add_argument("--seed", type=int, default=0)
    sub = command(
        "evaluate", _evaluate, "Error table of checkpoints, baselines and stored rollouts."
    )
    sub.add_argument("data")
    sub.add_argument("checkpoints", type=Path, nargs="*")
    sub.add_argument("--rollouts", type=Path, nargs="*", default=[])
    sub.add_argument("--split", default="test")
    sub.add_argument("--cost", action="store_true", help="time a step on one core as well")
    add_parsers(commands)
    sub = command("verdict", _verdict, "Structure and dynamics of a rollout beside a reference.")
    sub.add_argument("data")
    sub.add_argument("rollout", type=Path)
    sub.add_argument("--split", default="test")
    sub.add_argument("--burn-in", type=float, default=0.0, help="fs of the rollout to leave out")
    sub.add_argument("--out", type=Path, help="CSV file to write the table to")
    sub = command("study", _study, "Examine emulators of lithium: rollouts of 10 and 100 ps.")
    sub.add_argument("data")
    sub.add_argument("out", type=Path, help="CSV file; what it holds is not computed again")
    sub.add_argument("checkpoints", type=Path, nargs="+")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sub.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    sub.add_argument("--run-dir", type=Path, default=Path("runs/study"))
    sub = command("ablate", _ablate, "What helps a map on the grid? Small ones, seed by seed.")
    _add_ablation(sub, VARIANTS, "autoencoder", "checkpoint with the autoencoder of all")
    _add_trainings(sub, 1200, "runs/ablations")
    sub = command("motion", _motion, "What the nuclei need: force field, time step, thermostat.")
    _add_ablation(sub, MOTIONS)
    sub.add_argument("--volumes", help="store of runs in other volumes, for the force fields")
    sub = command("residual", _residual, "What the net needs that draws a density: memory, noise.")
    _add_ablation(sub, RESIDUALS)
    sub.add_argument("--large", help="store of a larger cell, to judge by as well")
    _add_trainings(sub, 1000, "runs/residuals")
    sub = command("chains", _chains, "Deep Density in one dimension: tables and checkpoints.")
    sub.add_argument("--data", type=Path, default=Path("data/chain"))
    sub.add_argument("--out", type=Path, default=Path("data/deep-density-1d"))
    sub.add_argument("--tables", nargs="+", default=["table3", "table4", "smooth"])
    sub.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    sub.add_argument("--run-dir", type=Path, default=Path("runs/deep-density-1d"))
    sub = command("demo", _demo, "Train, roll out, compare, report.")
    sub.add_argument("--data", default="data/lithium-800K.zarr")
    sub.add_argument("--checkpoints", default="data/checkpoints")
    sub.add_argument("--out", default="demo")
    return parser


def _add_ablation(
    sub: argparse.ArgumentParser,
    variants: Iterable[str],
    place: str = "checkpoint",
    what: str = "of an emulator with nuclei",
) -> None:
    sub.add_argument("data")
    sub.add_argument(place, type=Path, help=what)
    sub.add_argument("out", type=Path, help="CSV file; what it holds is not computed again")
    sub.add_argument("--variants", nargs="+", choices=[*variants], default=[*variants])
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def _add_trainings(sub: argparse.ArgumentParser, steps: int, run_dir: str) -> None:
    sub.add_argument("--steps", type=int, default=steps)
    sub.add_argument("--threads", type=int)
    sub.add_argument("--run-dir", type=Path, default=Path(run_dir))


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return int(arguments.action(arguments))
    except DensityKitError as error:
        print(f"densitykit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
