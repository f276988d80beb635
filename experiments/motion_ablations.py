r"""What the nuclei need to move as they should: force field, time step, thermostat, one at a time.

In the emulator of `densitykit.models.nuclear` the density does not act back on the nuclei, so
their motion can be examined alone, at milliseconds a step. Each variant starts from positions and
velocities of the independent test run and is judged by

* the error of its forces there, and the pressure, of which forces at one volume tell nothing (the
  energies of `data/lithium-volumes.zarr` tell -0.5 GPa),
* how far its paths are from those of the run after some time, without random numbers (the run has
  those of its thermostat, which no model can know),
* temperature and diffusion over 10 ps with the thermostat, one rollout a seed. Displacements tell
  the temperature, as they would of a measured trajectory; a Verlet integrator's own velocities
  tell a little less.

One row per (variant, seed, metric) goes to a CSV file. What is there is not computed again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr

from densitykit.analysis.tracking import implied_temperature
from densitykit.analysis.transport import (
    diffusion_coefficient,
    mean_square_displacement,
)
from densitykit.cells import minimum_image
from densitykit.data.windows import lag_in_frames, step_generator
from densitykit.io.reader import open_runs, open_split
from densitykit.models import NuclearEmulator
from densitykit.models.nuclear.force_field import (
    LinearForceField,
    as_double,
    fit_force_field,
    numbers_of,
)
from densitykit.units import ACCELERATION, CM2_PER_S, KELVIN
from experiments.arguments import ablation_parser, load_nuclear, print_spread, run_script
from experiments.report import run_missing

__all__ = ["MOTIONS", "Motion", "run_motion_ablations"]


class Motion(NamedTuple):
    """Arguments of the force field, Verlet steps in a step, thermostat's time in fs or None.

    And whether the force field has seen other volumes.
    """

    force_field: dict[str, float] = {}  # noqa: RUF012
    substeps: int = 2
    relaxation: float | None = 300.0
    volumes: bool = True


MOTIONS = {
    "as bundled": Motion(),
    "cutoff 6 angstrom": Motion({"cutoff": 6.0}),
    "cutoff 5 angstrom": Motion({"cutoff": 5.0}),
    "degree 2, 3 radial": Motion({"degree": 2, "radial": 3}),
    "degree 1": Motion({"degree": 1}),
    "degree 0: distances only": Motion({"degree": 0}),
    "degree 4, 8 radial, cutoff 7.5": Motion({"degree": 4, "radial": 8, "cutoff": 7.5}),
    "one volume": Motion(volumes=False),
    "one force a step": Motion(substeps=1),
    "four forces a step": Motion(substeps=4),
    "thermostat 100 fs": Motion(relaxation=100.0),
    "thermostat 1000 fs": Motion(relaxation=1000.0),
    "no thermostat": Motion(relaxation=None),
}
GPA = 160.21766  # 1 eV/angstrom**3
COLUMNS = ["variant", "seed", "metric", "value"]
LEADS = (60.0, 144.0, 300.0)  # fs
LENGTH, SETTLED = 10_000.0, 1_000.0  # fs, of a rollout and of its start that is left out
FIT = (240.0, 480.0)  # fs, of the slope that is the diffusion coefficient, as in the verdict
STARTS = 16


def run_motion_ablations(
    data: str | Path,
    checkpoint: str | Path,
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(MOTIONS),
    volumes: Sequence[xr.Dataset] = (),
) -> pd.DataFrame:
    """Examine every variant with every seed, or what of it is not in the file yet.

    Parameters
    ----------
    data
        Store with splits train, for the force fields, and test.
    checkpoint
        Of a `NuclearEmulator`, that all variants start from.
    out
        CSV file; rows are added to what it holds.
    seeds
        Each has other starts in the test run, and other random numbers.
    variants
        Names of `MOTIONS`.
    volumes
        Trajectories in other volumes, for the force fields.

    Returns
    -------
    pd.DataFrame
        All rows of the file: variant, seed, metric, value.
    """
    train, test = (open_split(data, split) for split in ("train", "test"))
    model = load_nuclear(checkpoint)

    @cache
    def fitted(arguments: str, several: bool) -> LinearForceField:
        others = volumes if several else ()
        return fit_force_field(train, volumes=others, **json.loads(arguments))

    def judged(variant: str, seed: int) -> pd.DataFrame:
        arguments, model.substeps, relaxation, several = MOTIONS[variant]
        model.force_field = fitted(json.dumps(arguments, sort_keys=True), several)
        model.relaxation = relaxation or np.inf
        new = _force_error(model.force_field, test) | _path_errors(model, test, seed)
        new |= _statistics(model, test, seed, relaxation is not None)
        return pd.DataFrame({"metric": new.keys(), "value": new.values()})

    wanted = [(v, s) for v in variants for s in seeds]
    return run_missing(out, COLUMNS, COLUMNS[:2], wanted, judged)


def _force_error(field: LinearForceField, test: xr.Dataset) -> dict[str, float]:
    """Of some forty frames, with the size of the forces."""
    some = test.isel(time=slice(None, None, 1 + test.sizes["time"] // 40))
    forces = as_double(some["forces"])
    x, cell = as_double(some["positions"]), as_double(test["cell"])
    numbers = numbers_of(test)
    error = field.forces(x, cell, numbers) - forces
    kinetic = KELVIN / ACCELERATION * float(some["temperature"].mean())  # k_B T in eV
    moving = x.shape[1] * kinetic / cell.det()
    return {
        "rms force error, meV/angstrom": 1e3 * float(error.square().mean().sqrt()),
        "pressure, GPa": GPA * float(field.pressure(x, cell, numbers).mean() + moving),
        "rms force, meV/angstrom": 1e3 * float(forces.square().mean().sqrt()),
    }


def _path_errors(model: NuclearEmulator, test: xr.Dataset, seed: int) -> dict[str, float]:
    """Rms distance a coordinate from the nuclei of the run, in angstrom, at each lead time."""
    spacing = float(test["time"][1] - test["time"][0])
    lag = lag_in_frames(model.horizon, spacing)
    steps = [round(lead / model.horizon) for lead in LEADS]
    last = test.sizes["time"] - steps[-1] * lag
    starts = (np.arange(STARTS) * last // STARTS + 7 * seed) % last
    x, v = (as_double(test[name][starts]) for name in ("positions", "velocities"))
    cell, errors = test["cell"].values, {}
    state = model.init_at(x, v, torch.from_numpy(cell), _grid(test), numbers_of(test))
    for step in range(1, steps[-1] + 1):
        state = model.move(state)
        if step in steps:
            miss = state.positions.numpy() - test["positions"][starts + step * lag].values
            miss = minimum_image(miss @ np.linalg.inv(cell), cell)
            miss -= miss.mean(axis=1, keepdims=True)
            lead = step * model.horizon
            errors[f"path error after {lead:g} fs, angstrom"] = float(np.sqrt((miss**2).mean()))
    return errors


def _statistics(
    model: NuclearEmulator, test: xr.Dataset, seed: int, thermostat: bool
) -> dict[str, float]:
    """Temperature and diffusion of one rollout; other starts for other seeds."""
    start = [(97 * seed) % test.sizes["time"]]
    x, v = (as_double(test[name][start]) for name in ("positions", "velocities"))
    cell, paths = torch.from_numpy(test["cell"].values), []
    state = model.init_at(x, v, cell, _grid(test), numbers_of(test))
    for step in range(round(LENGTH / model.horizon)):
        state = model.move(state, step_generator(seed, step) if thermostat else None)
        paths.append(state.positions[0].numpy())
    settled = np.stack(paths)[round(SETTLED / model.horizon) :]
    settled -= settled.mean(axis=1, keepdims=True)
    times = {"time": model.horizon * np.arange(len(settled))}
    run = xr.DataArray(settled, times, ("time", "atom", "cartesian"))
    squares = mean_square_displacement(run).mean("atom")
    masses = model.masses(state.numbers).numpy()
    kelvin = implied_temperature(settled, masses, model.horizon).temperature
    diffusion = 1e4 * CM2_PER_S * float(diffusion_coefficient(squares, *FIT))
    return {"temperature, K": kelvin, "diffusion coefficient, 1e-4 cm2/s": diffusion}


def _grid(run: xr.Dataset) -> tuple[int, ...]:
    return tuple(run["density"].shape[1:])


def main() -> None:
    parser = ablation_parser(__doc__, MOTIONS, "emulator with nuclei that all start from")
    parser.add_argument("--volumes", help="store of runs in other volumes, for the force fields")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    volumes = open_runs(arguments.volumes) if arguments.volumes else ()
    rows = run_motion_ablations(
        arguments.data,
        arguments.checkpoint,
        arguments.out,
        seeds=arguments.seeds,
        variants=arguments.variants,
        volumes=volumes,
    )
    print_spread(rows)


if __name__ == "__main__":
    run_script(main)
