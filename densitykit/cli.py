"""The command line, ``densitykit COMMAND``: a few lines over the modules.

Every command imports what it needs when it runs, so that ``--help`` is quick. Exit status 0: done,
1: `validate` found problems, 2: wrong usage, or an error that is told in one line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from densitykit import __version__
from densitykit import arguments as types
from densitykit.errors import DensityKitError
from densitykit.generate.commands import add_parsers

Commands = argparse._SubParsersAction
HORIZON = 12.0  # fs
FULL = {"latent_channels": 8, "autoencoder_width": 40, "autoencoder_blocks": 1}


def _command(
    commands: Commands, name: str, action: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(action=action)
    return parser


# --- stores ----------------------------------------------------------------------------------


def _validate(arguments: argparse.Namespace) -> int:
    from densitykit.io.validate import validate_trajectory

    problems = validate_trajectory(arguments.path)
    for problem in problems:
        print(problem)
    verdict = f"{len(problems)} problem(s)" if problems else "valid"
    print(f"{arguments.path}: {verdict}")
    return int(bool(problems))


def _describe(arguments: argparse.Namespace) -> int:
    from densitykit.io.reader import summarise

    print(summarise(arguments.path))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from densitykit.io.formats import convert, split_in_time

    options = {"keepbits": arguments.keepbits, "allow_negative": arguments.allow_negative}
    convert(arguments.files, arguments.out, time_step=arguments.time_step, **options)
    if arguments.splits:
        split_in_time(arguments.out, arguments.splits, arguments.gap)
    return _describe(argparse.Namespace(path=arguments.out))


def _export(arguments: argparse.Namespace) -> int:
    from densitykit.io.formats import write_cube
    from densitykit.io.reader import open_trajectory

    write_cube(open_trajectory(arguments.path), arguments.frame, arguments.out)
    print(arguments.out)
    return 0


def _add_stores(commands: Commands) -> None:
    sub = _command(commands, "validate", _validate, "Say precisely what is wrong with a store.")
    sub.add_argument("path", type=Path, help="trajectory store")
    text = "Frames, span, grid, cell and atoms of a trajectory store."
    sub = _command(commands, "describe", _describe, text)
    sub.add_argument("path", type=Path, help="trajectory store, or a folder of runs")
    text = "Make a trajectory of cube files or VASP's CHGCAR."
    sub = _command(commands, "convert", _convert, text)
    sub.add_argument("out", type=Path, help="trajectory store to write")
    sub.add_argument("files", type=Path, nargs="+", help="density files in the order of time")
    step = "between frames, fs"
    sub.add_argument("--time-step", type=types.positive, required=True, metavar="FS", help=step)
    bits = "bits of the mantissa to keep, such as 10 of 23 (default: all)"
    sub.add_argument("--keepbits", type=types.keepbits, metavar="BITS", help=bits)
    sub.add_argument("--allow-negative", action="store_true", help="take negative densities as is")
    names = ("TRAIN", "VALIDATION", "TEST")
    text = "fractions of the run, in the order of time, to write as splits"
    sub.add_argument("--splits", type=types.fraction, nargs=3, metavar=names, help=text)
    text = "fs to leave out between splits (default: 0)"
    sub.add_argument("--gap", type=types.non_negative, default=0.0, metavar="FS", help=text)
    sub = _command(commands, "export", _export, "Write a frame of a trajectory as a cube file.")
    sub.add_argument("path", type=Path, help="trajectory store")
    sub.add_argument("out", type=Path, help="file to write, such as frame.cube")
    text = "number of the frame (default: 0)"
    sub.add_argument("--frame", type=types.count, default=0, metavar="N", help=text)


# --- training --------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    """Train one model on the split "train", watched on "validation"; never reads "test"."""
    import torch

    from densitykit.models import save_model

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
        "command": " ".join(["densitykit", *sys.argv[1:]]),
        "minutes": round(rows[-1]["seconds"] / 60, 1),
        "last": rows[-1],
    }
    print(save_model(model, arguments.out, card, provenance))
    return 0


def _train_nuclear(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple:
    from densitykit.io.reader import open_runs, open_split
    from densitykit.training.nuclear import fit_parts, train_emulator

    run, held_out = (open_split(arguments.data, s).load() for s in ("train", "validation"))
    volumes = open_runs(arguments.volumes) if arguments.volumes else ()
    model, card = fit_parts(run, arguments.horizon, volumes=volumes)
    return model, card, train_emulator(model, run, held_out, **options)


def _train_fields(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple:
    from densitykit.assess import validation_error
    from densitykit.data.transforms import LogNormal
    from densitykit.data.windows import load_pairs
    from densitykit.models import LatentDiffusion, SurrogateUNet, load_model
    from densitykit.training.loop import (
        adopt_autoencoder,
        train_latent_diffusion,
        train_surrogate,
    )

    horizon = arguments.horizon
    train, held_out = (load_pairs(arguments.data, s, horizon) for s in ("train", "validation"))
    transform = LogNormal.fit(train.states[:, 0].numpy())
    card = {"mu": transform.mu, "sigma": transform.sigma, "eps": transform.eps, "horizon": horizon}
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


def _add_train(commands: Commands) -> None:
    text = "Train an emulator on the split 'train' of a store; interrupted, it continues."
    sub = _command(commands, "train", _train, text)
    text = "latent diffusion, force field and residual net on the nuclei, or a plain U-Net"
    sub.add_argument("model", choices=("latent", "nuclear", "surrogate"), help=text)
    sub.add_argument("data", help="trajectory store with the splits 'train' and 'validation'")
    sub.add_argument("out", type=Path, help="checkpoint to write")
    text = f"time of a step, fs (default: {HORIZON:g})"
    sub.add_argument("--horizon", type=types.positive, default=HORIZON, metavar="FS", help=text)
    text = "optimiser steps (default: 6000)"
    sub.add_argument("--steps", type=types.positive_count, default=6000, metavar="N", help=text)
    sub.add_argument("--batch", type=types.positive_count, default=2, help="samples a step")
    sub.add_argument("--rate", type=types.positive, default=1e-3, help="learning rate")
    sub.add_argument("--seed", type=types.seed, default=0, help="of weights and batches")
    sub.add_argument("--threads", type=types.positive_count, help="threads (default: torch's)")
    sub.add_argument("--run-dir", type=Path, help="training state (default: runs/NAME)")
    latent = sub.add_argument_group("latent")
    text = "steps of the autoencoder before (default: 6000)"
    latent.add_argument(
        "--autoencoder-steps", type=types.positive_count, default=6000, metavar="N", help=text
    )
    text = "take the autoencoder of this checkpoint"
    latent.add_argument("--autoencoder", type=Path, help=text)
    text = "weight of the sJSD (default: 0)"
    latent.add_argument("--lambda-2", type=types.non_negative, default=0.0, help=text)
    text = "what P and Q of the sJSD are (default: spatial)"
    latent.add_argument("--reading", choices=("spatial", "value"), default="spatial", help=text)
    nuclear = sub.add_argument_group("nuclear")
    nuclear.add_argument("--volumes", help="store of runs in other volumes, for the force field")


# --- rollouts and tables ---------------------------------------------------------------------


def _rollout(arguments: argparse.Namespace) -> int:
    from densitykit.data.windows import load_pairs
    from densitykit.errors import TrajectoryError
    from densitykit.io.reader import summarise
    from densitykit.models import NuclearEmulator, load_model
    from densitykit.rollout import Thermostat, rollout

    step = load_model(arguments.checkpoint)
    horizon = getattr(step, "horizon", HORIZON)
    pairs = load_pairs(arguments.data, arguments.split, horizon)
    if arguments.thermostat and isinstance(step, NuclearEmulator):
        step.relaxation = arguments.thermostat
    elif arguments.thermostat:
        step = Thermostat(step, load_pairs(arguments.data, "train", horizon), arguments.thermostat)
    if arguments.frame >= len(pairs.states):
        raise TrajectoryError(
            f"{arguments.data}: split '{arguments.split}' has no state {arguments.frame}; "
            f"choose --frame in 0..{len(pairs.states) - 1}"
        )
    time = float(pairs.times[arguments.frame])
    rollout(
        step,
        pairs.given(step, arguments.frame),
        arguments.steps,
        cell=pairs.cell,
        path=arguments.out,
        start=time,
        seed=arguments.seed,
        attrs={"checkpoint": str(arguments.checkpoint), "initial": f"{arguments.data}, {time} fs"},
    )
    print(summarise(arguments.out))
    return 0


def _add_rollout(commands: Commands) -> None:
    text = "Roll a checkpoint out from a stored frame."
    sub = _command(commands, "rollout", _rollout, text)
    sub.add_argument("checkpoint", type=Path, help="checkpoint of an emulator")
    sub.add_argument("data", help="trajectory store with the initial frame")
    sub.add_argument("out", type=Path, help="trajectory store to write")
    text = "steps to go (default: 1000)"
    sub.add_argument("--steps", type=types.positive_count, default=1000, metavar="N", help=text)
    sub.add_argument("--split", default="test", help="of the initial frame (default: test)")
    text = "number of the initial state in its split (default: 0)"
    sub.add_argument("--frame", type=types.count, default=0, metavar="N", help=text)
    text = "relaxation time of a thermostat, fs (default: the model's own, or none)"
    sub.add_argument("--thermostat", type=types.positive, metavar="FS", help=text)
    sub.add_argument("--seed", type=types.seed, default=0, help="of all noise (default: 0)")


def _evaluate(arguments: argparse.Namespace) -> int:
    """Error table of checkpoints and baselines on a split, and statistics of stored rollouts."""
    from densitykit.assess import cost_table, one_step_table, rollout_table, wide_table
    from densitykit.data.transforms import LogNormal
    from densitykit.data.windows import load_pairs
    from densitykit.io.reader import open_split, open_trajectory
    from densitykit.models import load_model
    from densitykit.models.baselines import baseline_maps

    horizon = arguments.horizon
    train, test = (load_pairs(arguments.data, s, horizon) for s in ("train", arguments.split))
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
    from densitykit.assess.rollouts import verdict
    from densitykit.io.reader import open_split, open_trajectory

    training, reference = (open_split(arguments.data, s) for s in ("train", arguments.split))
    rollout = open_trajectory(arguments.rollout)
    table = verdict(rollout, reference, training, burn_in=arguments.burn_in)
    print(table.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))
    if arguments.out:
        table.to_csv(arguments.out, index=False)
    return 0


def _add_tables(commands: Commands) -> None:
    text = "Error table of checkpoints, baselines and stored rollouts."
    sub = _command(commands, "evaluate", _evaluate, text)
    sub.add_argument("data", help="trajectory store with splits")
    sub.add_argument("checkpoints", type=Path, nargs="*", help="of emulators")
    text = "trajectory stores of rollouts"
    sub.add_argument("--rollouts", type=Path, nargs="*", default=[], metavar="STORE", help=text)
    sub.add_argument("--split", default="test", help="to compare with (default: test)")
    text = f"time of a step, fs (default: {HORIZON:g})"
    sub.add_argument("--horizon", type=types.positive, default=HORIZON, metavar="FS", help=text)
    sub.add_argument("--cost", action="store_true", help="time a step on one core as well")
    text = "Structure and dynamics of a rollout beside a reference."
    sub = _command(commands, "verdict", _verdict, text)
    sub.add_argument("data", help="trajectory store with splits")
    sub.add_argument("rollout", type=Path, help="trajectory store of the rollout")
    sub.add_argument("--split", default="test", help="to compare with (default: test)")
    text = "fs of the rollout to leave out at its start (default: 0)"
    sub.add_argument("--burn-in", type=types.non_negative, default=0.0, metavar="FS", help=text)
    sub.add_argument("--out", type=Path, help="CSV file to write the table to")


# --- the program -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Parser of the whole command line; each command has its function in `action`."""
    result = argparse.ArgumentParser("densitykit", description="Electron density in motion.")
    result.add_argument("--version", action="version", version=__version__)
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_stores, _add_train, _add_rollout, _add_tables, add_parsers):
        add(commands)
    return result


def main() -> int:
    """Run the command line and return its exit status."""
    arguments = parser().parse_args()
    try:
        return int(arguments.action(arguments))
    except DensityKitError as error:
        print(f"densitykit: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader has seen enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"densitykit: {where}{error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
