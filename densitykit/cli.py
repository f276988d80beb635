"""The command line, ``densitykit COMMAND``: a few lines over the modules."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densitykit import __version__
from densitykit.assess import (
    cost_table,
    one_step_table,
    rollout_table,
    validation_error,
    wide_table,
)
from densitykit.assess.rollouts import verdict
from densitykit.data.transforms import LogNormal
from densitykit.data.windows import load_pairs
from densitykit.errors import DensityKitError, TrajectoryError
from densitykit.generate.commands import add_parsers
from densitykit.io.formats import convert, split_in_time, write_cube
from densitykit.io.reader import open_runs, open_split, open_trajectory, summarise
from densitykit.io.validate import validate_trajectory
from densitykit.models import (
    LatentDiffusion,
    NuclearEmulator,
    SurrogateUNet,
    load_model,
    save_model,
)
from densitykit.models.baselines import baseline_maps
from densitykit.rollout import Thermostat, rollout
from densitykit.training.loop import adopt_autoencoder, train_latent_diffusion, train_surrogate
from densitykit.training.nuclear import fit_parts, train_emulator

Trained = tuple[nn.Module, dict[str, Any], list[dict[str, float]]]
HORIZON = 12.0  # fs
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
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return int(arguments.action(arguments))
    except DensityKitError as error:
        print(f"densitykit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
