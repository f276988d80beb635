"""The command line of data generation: ``densitykit generate SYSTEM OUT``.

Every command may be interrupted, or killed, and given again: it goes on where it was. Engines are
imported when a command runs, so that the rest of the command line works without them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from densitykit import arguments as types

__all__ = ["add_parsers"]

#: settings of the liquid lithium data: converged to 0.7 % in the density (see the data card)
LITHIUM = {"k_points": (2, 2, 2), "bands_per_atom": 21 / 32, "relaxation": 300.0}
#: settings of the data of hot rock salt (see the data card)
SALT = {"grid": (28, 36, 24), "relaxation": 100.0}
STATIC = ("ethane", "isobutane", "butane", "water", "aluminium")


def _lithium(arguments: argparse.Namespace) -> int:
    """Molecular dynamics of liquid lithium at the density of 800 K."""
    from ase.units import Ry

    from densitykit.generate.espresso import Espresso
    from densitykit.generate.geometries import lithium

    atoms = lithium(arguments.size, arguments.seed)
    engine = Espresso(
        arguments.cutoff * Ry,
        LITHIUM["k_points"],
        temperature=arguments.temperature,
        bands=round(LITHIUM["bands_per_atom"] * len(atoms)),
    )
    edge = round(atoms.cell.lengths()[0] / 0.38)
    grid, title = (edge + edge % 2,) * 3, f"Liquid lithium, {len(atoms)} atoms"
    return _dynamics(arguments, atoms, engine, grid, LITHIUM["relaxation"], title)


def _sodium_chloride(arguments: argparse.Namespace) -> int:
    """Molecular dynamics of hot rock salt in an orthorhombic cell."""
    from ase.units import Ry

    from densitykit.generate.espresso import Espresso
    from densitykit.generate.geometries import sodium_chloride

    atoms = sodium_chloride(arguments.seed)
    engine = Espresso(arguments.cutoff * Ry, mixing_mode="plain")
    title = f"Hot rock salt, {len(atoms)} atoms"
    return _dynamics(arguments, atoms, engine, SALT["grid"], SALT["relaxation"], title)


def _dynamics(
    arguments: argparse.Namespace,
    atoms: Any,
    engine: Any,
    grid: tuple[int, ...],
    relaxation: float,
    title: str,
) -> int:
    """Run or continue what the arguments say, then tell what there is and how it drifts."""
    from densitykit.generate.dynamics import energy_drift, molecular_dynamics
    from densitykit.io.describe import summarise
    from densitykit.io.reader import open_trajectory

    with engine:
        molecular_dynamics(
            atoms,
            engine,
            arguments.out,
            arguments.steps,
            time_step=arguments.time_step,
            grid=grid,
            temperature=None if arguments.nve else arguments.temperature,
            relaxation=relaxation,
            interval=arguments.interval,
            seed=arguments.seed,
            keepbits=10,
            lowest_density=1e-4,
            attrs={"title": f"{title}, {arguments.temperature:g} K"},
            restart=arguments.restart,
        )
    print(summarise(arguments.out))
    drift = energy_drift(open_trajectory(arguments.out))
    print(f"  the conserved energy drifts by {drift:.3f} meV per atom and ps")
    return 0


def _chain(arguments: argparse.Namespace) -> int:
    """Molecular dynamics of a one-dimensional chain, or the whole data set of one."""
    from densitykit.chain.data_sets import chain_dataset
    from densitykit.chain.dynamics import simulate_chain
    from densitykit.io.describe import summarise

    if arguments.dataset:
        (path,) = chain_dataset(arguments.out, [arguments.model], restart=arguments.restart)
    else:
        path = simulate_chain(
            arguments.out,
            arguments.model,
            n_atoms=arguments.size,
            n_steps=arguments.steps,
            stride=arguments.interval,
            seed=arguments.seed,
            restart=arguments.restart,
        )
    print(summarise(path))
    return 0


def _electrons(arguments: argparse.Namespace) -> int:
    """Electrons of a chain in time after a kick, in a laser pulse, or the bundled data set."""
    from densitykit.chain.electron_data import electron_dataset
    from densitykit.chain.electron_runs import simulate_electrons
    from densitykit.chain.electrons import Kick, Pulse
    from densitykit.io.describe import summarise
    from densitykit.io.store import runs

    if arguments.dataset:
        path = electron_dataset(arguments.out, arguments.model, restart=arguments.restart)
        print("\n".join(summarise(path / split) for split in sorted(runs(path))))
        return 0
    field = Pulse(*arguments.pulse) if arguments.pulse else Kick(arguments.kick)
    path = simulate_electrons(
        arguments.out,
        arguments.model,
        field,
        n_atoms=arguments.size,
        n_frames=arguments.frames,
        seed=arguments.seed,
        restart=arguments.restart,
    )
    print(summarise(path))
    return 0


def _static(arguments: argparse.Namespace) -> int:
    """Independent snapshots, each with its density."""
    from densitykit.generate.systems import generate
    from densitykit.io.describe import summarise

    path = generate(
        arguments.system,
        arguments.out,
        arguments.snapshots,
        size=arguments.size,
        temperature=arguments.temperature,
        seed=arguments.seed,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        restart=arguments.restart,
    )
    print(summarise(path))
    return 0


def _film(arguments: argparse.Namespace) -> int:
    """Atoms, a force field and a map: a film of the density."""
    from densitykit.generate.film import film
    from densitykit.io.describe import summarise
    from densitykit.io.nuclei import read_atoms

    names = "time_step interval temperature spacing seed relaxation keepbits restart".split()
    options = {name: getattr(arguments, name) for name in names}
    structure = read_atoms(arguments.structure)
    film(structure, arguments.force, arguments.density, arguments.out, arguments.steps, **options)
    print(summarise(arguments.out))
    return 0


def _convergence(arguments: argparse.Namespace) -> int:
    from densitykit.generate.systems import convergence

    table = convergence(
        arguments.system, arguments.configurations, seed=arguments.seed, folder=arguments.folder
    )
    columns = ["density_l2", "force_rms_error", "force_rms", "energy_error", "seconds"]
    print(table.groupby(["setting", "label"], sort=False)[columns].mean().to_string())
    if arguments.out:
        table.to_csv(arguments.out, index=False)
    return 0


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add `generate` and `convergence` to the commands of a parser."""
    text = "Make densities with Kohn-Sham engines; interrupted, it continues."
    systems = commands.add_parser("generate", help=text, description=text)
    systems = systems.add_subparsers(required=True, metavar="SYSTEM")
    _add_chain(systems)
    _add_electrons(systems)
    _add_lithium(systems)
    _add_sodium_chloride(systems)
    for name in STATIC:
        _add_static(systems, name)
    _add_film(commands)
    _add_convergence(commands)


def _add_film(commands: argparse._SubParsersAction) -> None:
    text = "A film of the density: atoms, a force field, and a map from atoms to density."
    sub = commands.add_parser("film", help=text, description=text)
    sub.set_defaults(action=_film)
    sub.add_argument("structure", help="any file of atoms that ASE reads")
    sub.add_argument("out", type=Path, help="trajectory store to write or continue")
    text = "emt, lj, tblite, spcfw, a checkpoint of `train nuclear`, or module:function"
    sub.add_argument("--force", required=True, metavar="FIELD", help=text)
    text = "checkpoint of a static map"
    sub.add_argument("--density", required=True, metavar="CHECKPOINT", help=text)
    text = "of the dynamics (default: 1000)"
    sub.add_argument("--steps", type=types.frames, default=1000, metavar="N", help=text)
    text = "fs (default: 1)"
    sub.add_argument("--time-step", type=types.positive, default=1.0, metavar="FS", help=text)
    text = "steps between stored frames (default: 10)"
    sub.add_argument("--interval", type=types.positive_count, default=10, metavar="N", help=text)
    text = "K, Bussi's thermostat (default: constant energy, from the velocities of STRUCTURE)"
    sub.add_argument("--temperature", type=types.positive, metavar="T", help=text)
    text = "time of the thermostat, fs (default: 300)"
    sub.add_argument("--relaxation", type=types.positive, default=300.0, metavar="FS", help=text)
    text = "largest distance of grid points, angstrom (default: 0.25)"
    sub.add_argument("--spacing", type=types.positive, default=0.25, metavar="A", help=text)
    text = "mantissa bits of the stored density (default: all)"
    sub.add_argument("--keepbits", type=types.keepbits, metavar="N", help=text)
    sub.add_argument("--seed", type=types.seed, default=0, help="of velocities and thermostat")
    sub.add_argument("--restart", action="store_true", help="begin anew; OUT is removed")


def _system(
    systems: argparse._SubParsersAction, name: str, action: Callable, text: str
) -> argparse.ArgumentParser:
    sub = systems.add_parser(name, help=text, description=text)
    sub.set_defaults(action=action, system=name)
    sub.add_argument("out", type=Path, help="trajectory store to write or continue")
    text = "of all random numbers (default: 0; a chain: its recipe's)"
    sub.add_argument("--seed", type=types.seed, default=None if name == "chain" else 0, help=text)
    sub.add_argument("--restart", action="store_true", help="begin anew; OUT is removed")
    return sub


def _add_chain(systems: argparse._SubParsersAction) -> None:
    text = "Dynamics of a chain in one dimension (no engine needed)."
    sub = _system(systems, "chain", _chain, text)
    models = ("insulator", "metal", "mixed")
    text = "of the chain (default: insulator)"
    sub.add_argument("--model", choices=models, default="insulator", help=text)
    sub.add_argument("--dataset", action="store_true", help="the bundled set, in folder OUT")
    text = "of the dynamics (default: 30000)"
    sub.add_argument("--steps", type=types.frames, default=30_000, metavar="N", help=text)
    sub.add_argument("--size", type=types.batch, default=8, help="atoms (default: 8)")
    text = "steps between stored frames (default: 20)"
    sub.add_argument("--interval", type=types.positive_count, default=20, metavar="N", help=text)


def _add_electrons(systems: argparse._SubParsersAction) -> None:
    text = "Electrons in time: time-dependent Kohn-Sham in one dimension (no engine needed)."
    sub = _system(systems, "electrons", _electrons, text)
    models = ("insulator", "metal")
    text = "of the chain (default: insulator)"
    sub.add_argument("--model", choices=models, default="insulator", help=text)
    sub.add_argument("--dataset", action="store_true", help="the bundled set, in store OUT")
    text = "velocity that a kick gives, atomic units (default: 0.001)"
    sub.add_argument("--kick", type=types.positive, default=1e-3, metavar="V", help=text)
    text = "a laser pulse instead: amplitude of A, frequency and duration, atomic units"
    names = ("A", "OMEGA", "T")
    sub.add_argument("--pulse", type=types.positive, nargs=3, metavar=names, help=text)
    text = "to store, 0.5 atomic units apart (default: 800)"
    sub.add_argument("--frames", type=types.positive_count, default=800, metavar="N", help=text)
    sub.add_argument("--size", type=types.batch, default=8, help="atoms (default: 8)")


def _add_lithium(systems: argparse._SubParsersAction) -> None:
    sub = _system(systems, "lithium", _lithium, "Ab-initio molecular dynamics of liquid lithium.")
    text = "number of the last step (default: 1000)"
    sub.add_argument("--steps", type=types.frames, default=1000, metavar="N", help=text)
    text = "atoms in the cell (default: 32)"
    sub.add_argument("--size", type=types.batch, default=32, metavar="N", help=text)
    _add_dynamics(sub, temperature=800.0, time_step=3.0, interval=2, cutoff=16.0)


def _add_sodium_chloride(systems: argparse._SubParsersAction) -> None:
    text = "Ab-initio molecular dynamics of hot rock salt, 24 atoms in an orthorhombic cell."
    sub = _system(systems, "sodium-chloride", _sodium_chloride, text)
    text = "number of the last step (default: 400)"
    sub.add_argument("--steps", type=types.frames, default=400, metavar="N", help=text)
    _add_dynamics(sub, temperature=900.0, time_step=5.0, interval=1, cutoff=24.0)


def _add_dynamics(
    sub: argparse.ArgumentParser,
    *,
    temperature: float,
    time_step: float,
    interval: int,
    cutoff: float,
) -> None:
    """Add what dynamics with plane waves can be told, with these defaults."""
    text = f"K (default: {temperature:g})"
    sub.add_argument(
        "--temperature", type=types.positive, default=temperature, metavar="T", help=text
    )
    text = f"fs (default: {time_step:g})"
    sub.add_argument(
        "--time-step", type=types.positive, default=time_step, metavar="FS", help=text
    )
    text = f"steps between stored frames (default: {interval})"
    sub.add_argument(
        "--interval", type=types.positive_count, default=interval, metavar="N", help=text
    )
    text = f"of the plane waves, Ry (default: {cutoff:g})"
    sub.add_argument("--cutoff", type=types.positive, default=cutoff, metavar="RY", help=text)
    sub.add_argument("--nve", action="store_true", help="no thermostat")


def _add_static(systems: argparse._SubParsersAction, name: str) -> None:
    sub = _system(systems, name, _static, f"Snapshots of {name} and their densities.")
    text = "how many (default: the size of the data set)"
    sub.add_argument("--snapshots", type=types.frames, metavar="N", help=text)
    text = "molecules of water, atoms of aluminium"
    sub.add_argument("--size", type=types.batch, metavar="N", help=text)
    text = "K (default: that of the data set)"
    sub.add_argument("--temperature", type=types.positive, metavar="T", help=text)
    text = "local processes (default: 1)"
    sub.add_argument("--workers", type=types.processes, default=1, metavar="N", help=text)
    sub.add_argument("--scheduler", help="address of a dask scheduler to spread over")


def _add_convergence(commands: argparse._SubParsersAction) -> None:
    text = "Errors of density and forces against cutoff or basis, and k-points."
    sub = commands.add_parser("convergence", help=text, description=text)
    sub.set_defaults(action=_convergence)
    sub.add_argument(
        "system", choices=("lithium", "sodium-chloride", *STATIC), help="what to compute"
    )
    text = "of the atoms (default: 1)"
    sub.add_argument(
        "--configurations", type=types.positive_count, default=1, metavar="N", help=text
    )
    sub.add_argument("--seed", type=types.seed, default=0, help="of the configurations")
    sub.add_argument("--folder", type=Path, default=Path("runs/convergence"), help="of results")
    sub.add_argument("--out", type=Path, help="CSV file to write the table to")
