r"""Lithium in larger cells: up to 2 048 atoms for 10 ps, what they cost, and their longest waves.

A frame of the test run is copied along all axes, gets new velocities, and runs for 2 ps to forget
that; then 10 ps are watched. The structure factor at long waves has a law,

.. math:: S(q \to 0) = n\,k_B T / B , \qquad B = -V\,(\partial p / \partial V)_T ,

with B from pressures of the force field at two volumes, nuclei at rest, to which those in motion
add :math:`n k_B T`. A cell of edge L knows no wave below :math:`2\pi/L`. Of the density, converged
at a few moments, S(q) is that of charge: it has the same limit for one electron an atom.

Errors are standard errors over ten stretches of the run. Seconds are of one core, of a step of the
nuclei and of a density, an atom.

    python -m experiments.larger_cells data/checkpoints/lithium-nuclear data/lithium-800K.zarr \
        data/lithium-emulators/larger-cells.csv
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from densitykit.analysis.modes import (
    allowed_waves,
    density_modes,
    nuclear_modes,
    static_structure,
)
from densitykit.analysis.tracking import kinetic_temperature
from densitykit.data.windows import step_generator
from densitykit.io.reader import open_split
from densitykit.models import NuclearEmulator, load_model
from densitykit.models.nuclear.emulator import NuclearState, supercell, thermal_velocities
from densitykit.units import BOLTZMANN_HARTREE, HARTREE
from experiments.arguments import run_script
from experiments.materials import run
from experiments.report import run_missing

__all__ = ["compressibility_limit", "copies"]

KEYS = ["copies"]
COLUMNS = [*KEYS, "atoms", "metric", "q", "value", "error"]
REST_FS, LENGTH_FS, Q_MAX = 2_000.0, 10_000.0, 1.2
DENSITIES, STRETCHES = 10, 10


def copies(model: NuclearEmulator, frame: xr.Dataset, n: int, seed: int = 0) -> NuclearState:
    """n copies of a frame along each axis, with velocities of the model's temperature."""
    x = torch.from_numpy(frame["positions"].values[None].astype(float))
    x = supercell(x, frame["cell"].values, (n, n, n))
    z = torch.from_numpy(np.tile(frame["numbers"].values, n**3))
    v = thermal_velocities(x, model.masses(z), model.temperature, step_generator(seed, 10**6))
    cell = torch.from_numpy(n * frame["cell"].values)
    return model.init_at(x, v, cell, tuple(n * k for k in frame["density"].shape), z)


def compressibility_limit(model: NuclearEmulator, run: xr.Dataset) -> float:
    """n k T / B, from the pressures of the frames of a run at 0.99 and 1.01 of its lengths."""
    x, cell = (torch.from_numpy(run[k].values.astype(float)) for k in ("positions", "cell"))
    p = [float(model.force_field.pressure(k * x, k * cell).mean()) for k in (0.99, 1.01)]
    density = x.shape[1] / float(torch.linalg.det(cell))
    ideal = density * BOLTZMANN_HARTREE * HARTREE * model.temperature
    return ideal / ((p[0] - p[1]) / (3 * np.log(1.01 / 0.99)) + ideal)


def watch(model: NuclearEmulator, state: NuclearState, seed: int = 0) -> pd.DataFrame:
    """Run a cell, and tell cost, temperature and structure factors of nuclei and density."""
    rest, steps = (round(t / model.horizon) for t in (REST_FS, LENGTH_FS))
    paths, speeds, densities, drawing, began = [], [], [], 0.0, time.process_time()
    for k, now in enumerate(run(model, state, rest + steps, seed)):
        if k < rest:
            continue
        paths.append(now.positions[0].numpy())
        speeds.append(now.velocities[0].numpy())
        if len(paths) % (steps // DENSITIES) == 0:
            paused = time.process_time()
            densities.append(model.density(model.converge_density(now))[0].numpy())
            drawing += time.process_time() - paused
    moving = time.process_time() - began - drawing
    atoms, masses = state.positions.shape[1], model.masses(state.numbers).numpy()
    kelvin = kinetic_temperature(np.stack(speeds), masses)
    rows = [
        ("temperature, K", np.nan, kelvin.mean(), _error(kelvin)),
        (
            "nuclei, microseconds an atom and step",
            np.nan,
            _each(moving, atoms, rest + steps),
            np.nan,
        ),
        (
            "density, microseconds an atom",
            np.nan,
            _each(drawing, atoms, DENSITIES),
            np.nan,
        ),
        ("peak memory, GB", np.nan, _gigabytes(), np.nan),
    ]
    cell = state.cell[0].numpy()
    dims = ("time", "atom", "cartesian")
    waves = allowed_waves(cell, Q_MAX)
    nuclei = static_structure(nuclear_modes(xr.DataArray(np.stack(paths)[::3], dims=dims), waves))
    rho = xr.DataArray(np.stack(densities), dims=("time", "x", "y", "z"))
    charge = static_structure(density_modes(rho, allowed_waves(cell, Q_MAX, rho.shape[1:])))
    for name, s in (("S(q) of the nuclei", nuclei), ("S(q) of the density", charge)):
        values = s.values
        rows += [
            (name, q, values[:, i].mean(), _error(values[:, i]))
            for i, q in enumerate(s["q"].values)
        ]
    return pd.DataFrame(rows, columns=COLUMNS[2:]).assign(atoms=atoms)


def _gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _each(seconds: float, atoms: int, count: int) -> float:
    return 1e6 * seconds / atoms / count


def _error(series: np.ndarray) -> float:
    """Standard error of a mean over time, from stretches."""
    means = [part.mean() for part in np.array_split(series, STRETCHES)]
    return float(np.std(means, ddof=1) / np.sqrt(STRETCHES))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="its trajectory store")
    parser.add_argument("out", type=Path, help="CSV file; what it holds is not computed again")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2, 4], help="along each axis")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(arguments.checkpoint)
    test = open_split(arguments.data, "test").isel(time=slice(0, None, 200)).load()

    def examined(n: int) -> pd.DataFrame:
        return watch(model, copies(model, test.isel(time=0), n))

    pieces = [(n,) for n in arguments.copies]
    rows = run_missing(arguments.out, COLUMNS, KEYS, pieces, examined)
    print(f"n k T / B = {compressibility_limit(model, test):.4f}")
    few = rows[rows["q"].isna() | (rows["q"] < 0.75)]
    print(few.to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    run_script(main)
