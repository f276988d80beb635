"""The command line, ``densitykit COMMAND``: a few lines over the modules.

Every command imports what it needs when it runs, so that ``--help`` is quick. Exit status 0: done,
1: `validate` found problems, 2: wrong usage, or an error that is told in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from densitykit import __version__
from densitykit import arguments as types
from densitykit.errors import DensityKitError

Commands = argparse._SubParsersAction
STEPS = {"steps": 6000, "batch": 2, "learning_rate": 1e-3}
POINTS = {"steps": 40_000, "batch": 128, "learning_rate": 6e-3}  # of a network of points
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
    said = f"{len(problems)} problem(s)" if problems else "valid"
    print(f"{arguments.path}: {said}")
    return int(bool(problems))


def _describe(arguments: argparse.Namespace) -> int:
    from densitykit.io.describe import summarise

    print(summarise(arguments.path))
    return 0


def _upgrade(arguments: argparse.Namespace) -> int:
    from densitykit.io.rebuild import upgrade_trajectory

    done = upgrade_trajectory(arguments.path)
    said = f"rewritten: {', '.join(done)}" if done else "nothing to do, it is in this version"
    print(f"{arguments.path}: {said}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from densitykit.io.convert import convert
    from densitykit.io.formats import Reading

    taken = "time_step start clip trajectory splits gap keepbits allow_negative".split()
    options = {name: getattr(arguments, name) for name in taken}
    options |= {} if arguments.quantity is None else {"quantity": arguments.quantity}
    reading = Reading(arguments.unit, arguments.lengths, arguments.endpoint)
    convert(arguments.files, arguments.out, reading=reading, add=arguments.sum, **options)
    return _describe(argparse.Namespace(path=arguments.out))


def _export(arguments: argparse.Namespace) -> int:
    from densitykit.io.export import export_frame
    from densitykit.io.reader import open_trajectory

    export_frame(open_trajectory(arguments.path), arguments.frame, arguments.out)
    print(arguments.out)
    return 0


def _add_stores(commands: Commands) -> None:
    sub = _command(commands, "validate", _validate, "Say precisely what is wrong with a store.")
    sub.add_argument("path", type=Path, help="trajectory store")
    text = "Frames, span, grid, cell and atoms of a trajectory store."
    sub = _command(commands, "describe", _describe, text)
    sub.add_argument("path", type=Path, help="trajectory store, or a folder of runs")
    text = "Rewrite an older store in the present version of the format; accept edited metadata."
    sub = _command(commands, "upgrade", _upgrade, text)
    sub.add_argument("path", type=Path, help="trajectory store, or a folder of runs")
    _add_convert(commands)
    text = "Write a frame of a trajectory as cube, CHGCAR, XSF or zarr, by the name of the file."
    sub = _command(commands, "export", _export, text)
    sub.add_argument("path", type=Path, help="trajectory store")
    sub.add_argument("out", type=Path, help="file to write, such as frame.cube")
    text = "number of the frame (default: 0)"
    sub.add_argument("--frame", type=types.count, default=0, metavar="N", help=text)


def _add_convert(commands: Commands) -> None:
    text = "Make a trajectory of cube files, VASP's CHGCAR or CHG, or XSF files (also .gz, .xz)."
    sub = _command(commands, "convert", _convert, text)
    sub.add_argument("out", type=Path, help="trajectory store to write")
    sub.add_argument("files", type=Path, nargs="+", help="density files in the order of time")
    step = "between frames, fs"
    sub.add_argument("--time-step", type=types.positive, required=True, metavar="FS", help=step)
    text = "time of the first frame, fs (default: 0)"
    sub.add_argument("--start", type=types.non_negative, default=0.0, metavar="FS", help=text)
    units, text = ("bohr", "angstrom"), "values are per cubic UNIT (cube, XSF; default: bohr)"
    sub.add_argument("--unit", choices=units, metavar="UNIT", help=text)
    text = "lengths of a cube file are in UNIT (default: as its header says)"
    sub.add_argument("--lengths", choices=units, metavar="UNIT", help=text)
    text = "grids hold both end points of each edge (default: XSF do, cube files do not)"
    sub.add_argument("--endpoint", action=argparse.BooleanOptionalAction, help=text)
    text = "files are parts of a density, to add: AECCAR0 and AECCAR2, or all files"
    sub.add_argument("--sum", action="store_true", help=text)
    quantities, text = ("valence", "total", "core", "pseudo"), "what the density counts"
    sub.add_argument("--quantity", choices=quantities, help=text)
    text = "file with energies, forces, velocities (default: vasprun.xml, OUTCAR, extxyz if there)"
    sub.add_argument("--trajectory", type=Path, metavar="FILE", help=text)
    text = "set small negative values to 0, and count them"
    sub.add_argument("--clip", action="store_true", help=text)
    sub.add_argument("--allow-negative", action="store_true", help="take negative densities as is")
    bits = "bits of the mantissa to keep, such as 10 of 23 (default: all)"
    sub.add_argument("--keepbits", type=types.keepbits, metavar="BITS", help=bits)
    names = ("TRAIN", "VALIDATION", "TEST")
    text = "fractions of the run, in the order of time, to write as splits"
    sub.add_argument("--splits", type=types.fraction, nargs=3, metavar=names, help=text)
    text = "fs to leave out between splits (default: 0)"
    sub.add_argument("--gap", type=types.non_negative, default=0.0, metavar="FS", help=text)


# --- training --------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    """Train one model on the split "train", watched on "validation"; never reads "test"."""
    import torch

    from densitykit.models import save_model
    from densitykit.models.checkpoint import check_target

    check_target(arguments.out)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    network = arguments.model == "deep-density-network"
    options = (POINTS if network else STEPS) | {
        "seed": arguments.seed,
        "run_dir": arguments.run_dir or Path("runs") / arguments.out.stem,
        "restart": arguments.restart,
    }
    given = {name: getattr(arguments, name) for name in STEPS}
    options |= {name: value for name, value in given.items() if value is not None}
    train = {"nuclear": _train_nuclear, "deep-density": _train_density}
    train["deep-density-network"] = _train_network
    train = train.get(arguments.model, _train_fields)
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


def _train_density(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple:
    from densitykit.io.reader import open_splits
    from densitykit.training.linear import default_recipe, fit_linear_density

    train, held_out = (open_splits(arguments.data, s) for s in ("train", "validation"))
    recipe = default_recipe(train[0])
    if arguments.recipe:
        recipe |= json.loads(arguments.recipe.read_text())
    points = {"points": arguments.points} if arguments.points else {}
    return fit_linear_density(train, held_out, recipe, seed=options["seed"], **points)


def _train_network(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple:
    from densitykit.io.reader import open_split
    from densitykit.training.network import train_deep_density

    train, held_out = (open_split(arguments.data, s) for s in ("train", "validation"))
    return train_deep_density(train, held_out, **options)


def _train_fields(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple:
    from densitykit.data.windows import load_windows
    from densitykit.models import LatentDiffusion, SurrogateUNet, load_model
    from densitykit.training import copy_autoencoder, train

    windows = load_windows(arguments.data, "train", arguments.horizon)
    held_out = load_windows(arguments.data, "validation", windows.horizon)
    print(windows)
    model_class = SurrogateUNet if arguments.model == "surrogate" else LatentDiffusion
    card = model_class.arguments_for(windows) | {"widths": [48, 96], "blocks": [2, 3]}
    card |= {} if arguments.model == "surrogate" else FULL
    model = model_class(**card)
    if model.working_grid(windows.grid) != windows.grid:
        print(f"resampled to {model.working_grid(windows.grid)}: a multiple of {model.stride}")
    if arguments.model == "latent":
        names = ("autoencoder_steps", "lambda_2", "reading")
        options |= {name: getattr(arguments, name) for name in names}
        if arguments.autoencoder:
            copy_autoencoder(model, load_model(arguments.autoencoder))
    return model, card, train(model, windows, held_out, **options)


def _add_train(commands: Commands) -> None:
    text = "Train an emulator on the split 'train' of a store; interrupted, it continues, and "
    text += "finished, it goes on if more steps are asked for."
    sub = _command(commands, "train", _train, text)
    text = "latent diffusion, an emulator through the nuclei, a plain U-Net, or a static map: "
    text += "linear, or the network of Deep Density"
    models = ("latent", "nuclear", "surrogate", "deep-density", "deep-density-network")
    sub.add_argument("model", choices=models, help=text)
    sub.add_argument("data", help="trajectory store with the splits 'train' and 'validation'")
    sub.add_argument("out", type=Path, help="checkpoint to write")
    text = "time of a step, fs (default: as long as the density stays correlated)"
    sub.add_argument("--horizon", type=types.positive, metavar="FS", help=text)
    text = "optimiser steps (default: 6000; network of Deep Density: 40000)"
    sub.add_argument("--steps", type=types.positive_count, metavar="N", help=text)
    text = "samples a step (default: 2; network of Deep Density: 128 points)"
    sub.add_argument("--batch", type=types.batch, help=text)
    text = "learning rate (default: 1e-3; network of Deep Density: 6e-3)"
    sub.add_argument(
        "--rate", type=types.positive, dest="learning_rate", metavar="RATE", help=text
    )
    sub.add_argument("--seed", type=types.seed, default=0, help="of weights and batches")
    sub.add_argument("--threads", type=types.processes, help="threads (default: torch's)")
    sub.add_argument("--run-dir", type=Path, help="training state (default: runs/NAME)")
    sub.add_argument("--restart", action="store_true", help="forget that state and begin anew")
    latent = sub.add_argument_group("latent")
    text = "steps of the autoencoder before (default: 6000)"
    latent.add_argument(
        "--autoencoder-steps", type=types.count, default=6000, metavar="N", help=text
    )
    text = "take the autoencoder of this checkpoint"
    latent.add_argument("--autoencoder", type=Path, help=text)
    text = "weight of the sJSD (default: 0)"
    latent.add_argument("--lambda-2", type=types.non_negative, default=0.0, help=text)
    text = "what P and Q of the sJSD are (default: spatial)"
    latent.add_argument("--reading", choices=("spatial", "value"), default="spatial", help=text)
    nuclear = sub.add_argument_group("nuclear")
    nuclear.add_argument("--volumes", help="store of runs in other volumes, for the force field")
    static = sub.add_argument_group("deep-density")
    text = "points of a frame (default: 6000 of a molecule, 4000 of a liquid, 600 of a metal)"
    static.add_argument("--points", type=types.positive_count, metavar="N", help=text)
    text = "JSON file with arguments of LinearDensity, in place of the defaults"
    static.add_argument("--recipe", type=Path, metavar="FILE", help=text)


# --- static maps -----------------------------------------------------------------------------


def _predict(arguments: argparse.Namespace) -> int:
    from densitykit.errors import CheckpointError
    from densitykit.io.export import export_frame
    from densitykit.io.nuclei import read_atoms
    from densitykit.models import load_model
    from densitykit.models.deep_density.linear import LinearDensity
    from densitykit.models.deep_density.network import DeepDensity
    from densitykit.models.deep_density.predict import predict

    model = load_model(arguments.checkpoint)
    if not isinstance(model, LinearDensity | DeepDensity):
        raise CheckpointError(
            f"{arguments.checkpoint}: a {type(model).__name__} moves densities; give a static "
            "map, such as `densitykit train deep-density` makes"
        )
    grid = tuple(arguments.grid) if arguments.grid else None
    sure = arguments.uncertainty is None
    frame = predict(model, read_atoms(arguments.structure), grid, arguments.spacing, not sure)
    if "warning" in frame.attrs:
        print(f"densitykit: {frame.attrs['warning']}", file=sys.stderr)
    if not sure:
        print(f"estimated error: {100 * frame.attrs['expected_l1']:.3f} % (relative l1)")
        sigma = frame.assign(density=frame["uncertainty"])
        export_frame(sigma, 0, arguments.uncertainty)
    export_frame(frame.drop_vars("uncertainty", errors="ignore"), 0, arguments.out)
    print(arguments.out)
    return 0


def _add_predict(commands: Commands) -> None:
    text = "Predict the density of a structure with a static map."
    sub = _command(commands, "predict", _predict, text)
    sub.add_argument("checkpoint", type=Path, help="checkpoint of a static map")
    sub.add_argument("structure", help="any file of atoms that ASE reads")
    sub.add_argument("out", type=Path, help="*.cube, CHGCAR, *.vasp, *.xsf or *.zarr")
    names, text = ("NX", "NY", "NZ"), "numbers of points (default: by --spacing)"
    sub.add_argument("--grid", type=types.batch, nargs=3, metavar=names, help=text)
    text = "estimate the error, and write its standard deviation to this file"
    sub.add_argument("--uncertainty", type=Path, metavar="FILE", help=text)
    text = "largest distance of grid points, angstrom (default: 0.25)"
    sub.add_argument("--spacing", type=types.positive, default=0.25, metavar="A", help=text)


# --- rollouts and tables ---------------------------------------------------------------------


def _rollout(arguments: argparse.Namespace) -> int:
    from densitykit.data.windows import Windows
    from densitykit.io.describe import summarise
    from densitykit.io.reader import open_split
    from densitykit.models import FieldEmulator, load_model
    from densitykit.rollout import Thermostat, check_emulator, rollout

    emulator = load_model(arguments.checkpoint)
    check_emulator(emulator)
    horizon = emulator.horizon
    windows = Windows(open_split(arguments.data, arguments.split), horizon, emulator.context, 0)
    if arguments.thermostat and isinstance(emulator, FieldEmulator):
        train = Windows(open_split(arguments.data, "train"), horizon, emulator.context)
        emulator = Thermostat(emulator, train, arguments.thermostat)
    elif arguments.thermostat:
        emulator.relaxation = arguments.thermostat
    window = windows[arguments.frame]
    source = f"{window.source}, {float(window.now[0]):g} fs"
    attrs = {"checkpoint": str(arguments.checkpoint), "initial": source}
    options = {"path": arguments.out, "seed": arguments.seed, "attrs": attrs}
    rollout(emulator, window, arguments.steps, restart=arguments.restart, **options)
    print(summarise(arguments.out))
    return 0


def _add_rollout(commands: Commands) -> None:
    text = "Roll a checkpoint out from a stored frame; interrupted, it continues."
    sub = _command(commands, "rollout", _rollout, text)
    sub.add_argument("checkpoint", type=Path, help="checkpoint of an emulator")
    sub.add_argument("data", help="trajectory store with the initial frame")
    sub.add_argument("out", type=Path, help="trajectory store to write")
    text = "steps to go (default: 1000)"
    sub.add_argument("--steps", type=types.frames, default=1000, metavar="N", help=text)
    sub.add_argument("--split", default="test", help="of the initial frame (default: test)")
    text = "number of the initial state in its split (default: 0)"
    sub.add_argument("--frame", type=types.count, default=0, metavar="N", help=text)
    text = "relaxation time of a thermostat, fs (default: the model's own, or none)"
    sub.add_argument("--thermostat", type=types.positive, metavar="FS", help=text)
    sub.add_argument("--seed", type=types.seed, default=0, help="of all noise (default: 0)")
    sub.add_argument("--restart", action="store_true", help="begin anew; OUT is removed")


def _evaluate(arguments: argparse.Namespace) -> int:
    """Error table of checkpoints, baselines and stored rollouts on a split."""
    from densitykit.assess import assess
    from densitykit.data.windows import load_windows
    from densitykit.io.reader import open_trajectory
    from densitykit.models import baselines, load_model
    from densitykit.models.checkpoint import import_emulator
    from densitykit.rollout import check_emulator

    emulators = {path.stem: load_model(path) for path in arguments.checkpoints}
    emulators |= {name: import_emulator(name) for name in arguments.emulator}
    for emulator in emulators.values():
        check_emulator(emulator)
    horizon = arguments.horizon or next((e.horizon for e in emulators.values()), None)
    if emulators or not arguments.rollouts:
        emulators |= baselines(load_windows(arguments.data, "train", horizon))
    rollouts = {path.stem: open_trajectory(path) for path in arguments.rollouts}
    options = {"split": arguments.split, "burn_in": arguments.burn_in, "cost": arguments.cost}
    table = assess(arguments.data, emulators, rollouts, **options)
    for _, rows in table.groupby("metric" if not rollouts else "model", sort=False):
        print(rows.dropna(axis=1, how="all").to_string(index=False, na_rep="-"), end="\n\n")
    if arguments.out:
        table.to_csv(arguments.out, index=False)
    return 0


def _add_tables(commands: Commands) -> None:
    text = "One error table: checkpoints and baselines after a step, stored rollouts."
    sub = _command(commands, "evaluate", _evaluate, text)
    sub.add_argument("data", help="trajectory store with splits")
    sub.add_argument("checkpoints", type=Path, nargs="*", help="of emulators")
    text = "your own, made by a class or function without arguments: its code is run"
    sub.add_argument("--emulator", nargs="*", default=[], metavar="MODULE:NAME", help=text)
    text = "trajectory stores of rollouts"
    sub.add_argument("--rollouts", type=Path, nargs="*", default=[], metavar="STORE", help=text)
    sub.add_argument("--split", default="test", help="to compare with (default: test)")
    text = "time of a step of the baselines, fs (default: that of the first checkpoint)"
    sub.add_argument("--horizon", type=types.positive, metavar="FS", help=text)
    text = "fs of the rollouts to leave out at their start (default: 0)"
    sub.add_argument("--burn-in", type=types.non_negative, default=0.0, metavar="FS", help=text)
    sub.add_argument("--cost", action="store_true", help="time a step on one core as well")
    sub.add_argument("--out", type=Path, help="CSV file to write the table to")


# --- the program -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Parser of the whole command line; each command has its function in `action`."""
    from densitykit.generate.commands import add_parsers

    result = argparse.ArgumentParser("densitykit", description="Electron density in motion.")
    result.add_argument("--version", action="version", version=__version__)
    result.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_stores, _add_train, _add_predict, _add_rollout, _add_tables, add_parsers):
        add(commands)
    return result


def main() -> int:
    """Run the command line and return its exit status."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(words) < len(sys.argv) - 1
    warnings.formatwarning = lambda message, *_, **__: f"densitykit: {_line(message)}\n"
    arguments = parser().parse_args(words)
    try:
        return int(arguments.action(arguments))
    except BrokenPipeError:  # the reader has seen enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("densitykit: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"densitykit: {_told(error)}", file=sys.stderr)
    return 2


def _told(error: Exception) -> str:
    """What went wrong, in one line; an error that nobody has thought of says so."""
    if isinstance(error, DensityKitError):
        first, *more = str(error).splitlines() or [type(error).__name__]
        return first + (f" (and {len(more)} more: densitykit validate)" if more else "")
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return where + _line(error.strerror or error)
    if isinstance(error, MemoryError) or "not enough memory" in str(error):  # numpy's, and torch's
        return f"out of memory; take less at once ({_line(error)})"
    kind = type(error).__name__
    return f"unexpected {kind}: {_line(error)}; please report it with what --debug shows"


def _line(text: object) -> str:
    return " ".join(str(text).split())


if __name__ == "__main__":
    sys.exit(main())
