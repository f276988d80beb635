r"""All materials in motion in one table: how true each film of the density is, and what it costs.

*Materials with an ab-initio run* (lithium, rock salt) are judged beside one that no model has seen
(`densitykit.assess`): errors of a step, then a rollout from other states of it. Those of lithium
are read from `experiments.long_rollouts`.

*Materials with independent snapshots only* (aluminium, water) have no run to predict. Their atoms
move by the force field that made the snapshots, EMT and SPC/Fw, so that the film has the
statistics of the snapshots if its densities are right. "One step" is the error of the density of
given nuclei. Let there be L frames of a film and T test snapshots, independent of each other. The
value-sJSD is that of ln rho, standardised by training snapshots, in units of that between halves
of the test snapshots, which grows to (1 + T/L)/4 of itself for short films. A shell of S(q) counts
as inside if

.. math:: |\bar S_L - \bar S_T| \le t_{T-1}\, s_T\, (1/L + 1/T)^{1/2} ,

with the standard deviation s of the snapshots and Student's 97.5 % quantile t: another T of them
would have 0.95 of the shells inside.

Seconds are those of one core, all told, each density that the film keeps included: two a
picosecond where atoms may move on without one. The speed-up is over ab-initio dynamics of
the same system: a step of the run for those that have one, else a Kohn-Sham solve from scratch for
each usual time step (3 fs of aluminium, 0.5 fs of water), by the times stored with the snapshots.

    python -m experiments.all_materials data data/materials/all.csv

What is in the file is not computed again. Values are means over starts, with the standard error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from ase.calculators.emt import EMT
from scipy.stats import t as student
from torch import nn

from densitykit.analysis.modes import allowed_waves, density_modes, static_structure
from densitykit.analysis.tracking import kinetic_temperature
from densitykit.analysis.transport import diffusion_coefficient, mean_square_displacement
from densitykit.assess import assess
from densitykit.assess.cost import ab_initio_seconds
from densitykit.assess.rollouts import Q_MAX, value_histograms, value_sjsd_levels
from densitykit.data.transforms import LogNormal
from densitykit.data.windows import load_windows, step_generator
from densitykit.generate.film import CalculatorForces
from densitykit.generate.water import SPCFw
from densitykit.io.reader import open_split
from densitykit.models import Emulator, NuclearEmulator, load_model
from densitykit.models.baselines import Persistence
from densitykit.models.nuclear.emulator import thermal_velocities
from densitykit.rollout import rollout, start
from densitykit.units import CM2_PER_S
from experiments.arguments import run_script
from experiments.deep_density import score, superposition
from experiments.materials import run
from experiments.report import run_missing

__all__ = ["Material", "judge_run", "judge_snapshots", "markdown", "static_scores"]

KEYS = ["material", "emulator", "seed"]
COLUMNS = [*KEYS, "metric", "value"]
DIMS = ("time", "x", "y", "z")
#: metric of the table: its heading
HEADINGS = {
    "one-step l1": "one step, l1, %",
    "one-step l2": "one step, l2, %",
    "value-sJSD over its noise level": "value-sJSD / noise",
    "S(q) of the density, shells inside": "S(q), shells inside",
    "decay of F(q, t), peak of S(q), fs": "decay of F(q, t), fs",
    "diffusion coefficient, 1e-4 cm2/s": "diffusion, 1e-4 cm2/s",
    "temperature, K": "temperature, K",
    "seconds a picosecond": "s / ps",
    "speed-up": "speed-up",
}


class Material(NamedTuple):
    """A material whose snapshots a force field has made."""

    store: str
    split: str  # what follows train- and test-
    kelvin: float
    force: Callable[[], Any]
    horizon: float  # fs, from one look at the nuclei to the next
    substeps: int
    usual: float  # time step of ab-initio dynamics, fs
    relaxation: float = 50.0  # fs: short, so that few picoseconds have the temperature


FILMS = {
    **{
        f"aluminium, {kelvin} K": Material("aluminium", f"32-{kelvin}K", kelvin, EMT, 6.0, 2, 3.0)
        for kelvin in (300, 600, 900)
    },
    "water, 300 K": Material("water", "32", 300, SPCFw, 4.0, 8, 0.5),
}
RUNS = {"lithium, 800 K": "lithium-800K", "rock salt, 900 K": "sodium-chloride-900K"}
FILM_PS, FRAMES, REST_PS = 6.0, 12, 1.0  # of a start: length, densities, time before it


# --- snapshots -------------------------------------------------------------------------------


def static_scores(
    film: np.ndarray, snapshots: xr.Dataset, training: xr.Dataset
) -> dict[str, float]:
    """Distribution of ln rho and structure factor of a film (L, X, Y, Z) beside snapshots."""
    transform = LogNormal.fit(np.maximum(training["density"].values, 1e-6), eps=0.0)
    truth = snapshots["density"].values
    ours, theirs = (value_histograms(frames, transform) for frames in (film, truth))
    waves = allowed_waves(snapshots["cell"].values, Q_MAX, truth.shape[1:])
    s, known = (
        static_structure(density_modes(xr.DataArray(x, dims=DIMS), waves)).values
        for x in (film, truth)
    )
    width = np.sqrt(1 / len(film) + 1 / len(truth)) * student.ppf(0.975, len(truth) - 1)
    inside = np.abs(s.mean(axis=0) - known.mean(axis=0)) <= width * known.std(axis=0, ddof=1)
    return {
        "value-sJSD over its noise level": value_sjsd_levels(ours, theirs),
        "S(q) of the density, shells inside": float(inside.mean()),
    }


def judge_snapshots(name: str, emulator: str, seed: int, data: Path) -> pd.DataFrame:
    """A film from a test snapshot, by the force field and a map or free atoms."""
    film, map_ = FILMS[name], _map(FILMS[name].store, emulator, data)
    test = open_split(data / f"{film.store}.zarr", f"test-{film.split}").load()
    training = open_split(data / f"{film.store}.zarr", f"train-{film.split}").load()
    model = NuclearEmulator(
        film.horizon,
        substeps=film.substeps,
        temperature=float(film.kelvin),
        relaxation=film.relaxation,
        widths=(),
        force_field=CalculatorForces(film.force()),
        density=map_,
    )
    densities, found = _filmed(model, test.isel(time=[seed]), film, seed)
    errors = score(map_, test.isel(time=[seed]))
    found |= {f"one-step {name}": errors[name] for name in ("l1", "l2")}
    found |= static_scores(densities, test, training)
    solve = float(np.median(test["seconds"].values))
    found["speed-up"] = solve / film.usual * 1000 / found["seconds a picosecond"]
    return pd.DataFrame({"metric": found.keys(), "value": found.values()})


def _filmed(
    model: NuclearEmulator, start: xr.Dataset, film: Material, seed: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Densities (FRAMES, X, Y, Z) of a film, and what its nuclei do."""
    names = "positions", "numbers", "cell"
    x, z, cell = (torch.from_numpy(start[k].values.copy()) for k in names)
    v = thermal_velocities(x, model.masses(z), model.temperature, step_generator(seed, 10**6))
    state = model.init_at(x, v, cell, start["density"].shape[1:], z)
    rest, steps = (round(1000 * ps / film.horizon) for ps in (REST_PS, FILM_PS))
    paths, speeds, densities, began = [], [], [], time.process_time()
    for k, now in enumerate(run(model, state, rest + steps, seed)):
        if k >= rest:
            paths.append(now.positions[0].numpy())
            speeds.append(now.velocities[0].numpy())
        if k >= rest and len(paths) % (steps // FRAMES) == 0:
            densities.append(model.predict_density(now).base[0].double().numpy())
    seconds = (time.process_time() - began) / (REST_PS + FILM_PS)
    kelvin = kinetic_temperature(np.stack(speeds), model.masses(z).numpy()).mean()
    found = {"temperature, K": float(kelvin), "seconds a picosecond": seconds}
    if film.store == "water":  # a crystal does not diffuse
        oxygen = np.stack(paths)[:, z.numpy() == 8]
        found["diffusion coefficient, 1e-4 cm2/s"] = _diffusion(oxygen, film.horizon)
    return np.stack(densities[:FRAMES]), found


def _diffusion(paths: np.ndarray, spacing: float) -> float:
    """Einstein's coefficient of paths (time, atom, 3), 1e-4 cm2/s, from lags of 0.5 to 2 ps."""
    times = {"time": spacing * np.arange(len(paths))}
    walk = xr.DataArray(paths, times, ("time", "atom", "cartesian"))
    msd = mean_square_displacement(walk, round(2000 / spacing)).mean("atom")
    return 1e4 * CM2_PER_S * float(diffusion_coefficient(msd, 500, 2000))


@cache
def _map(store: str, emulator: str, data: Path) -> nn.Module:
    if emulator == "free atoms":
        return superposition(data / f"{store}.zarr")
    return load_model(data / "checkpoints" / f"deep-density-{store}")


# --- runs ------------------------------------------------------------------------------------


def judge_run(name: str, emulator: str, seed: int, data: Path) -> pd.DataFrame:
    """A rollout from a state of the test run, as long as that; errors of a step and cost once."""
    store = data / f"{RUNS[name]}.zarr"
    if emulator == "persistence":
        return assess(store, {emulator: Persistence(load_windows(store, "test").horizon)})
    model = load_model(data / "checkpoints" / emulator)
    measured = _measured(name, emulator, seed, data)
    if measured is None:
        test = load_windows(store, "test", model.horizon, max(3, model.context), steps=0)
        steps = round((test.times[-1] - test.times[0]) / model.horizon)
        film = rollout(model, test[(seed * 97) % len(test)], steps, seed=seed)
        measured = assess(store, {}, {emulator: film})
    return pd.concat([measured, *(_once(store, model) if seed == 0 else ())])


@torch.no_grad()
def _once(store: Path, model: Emulator, steps: int = 10) -> list[pd.DataFrame]:
    """Errors of a step, and processor seconds a picosecond."""
    test = load_windows(store, "test", model.horizon, max(3, model.context))
    state, began = start(model, test[0]), time.process_time()
    for _ in range(steps):
        state = model.step(state)
        model.density(state)
    seconds = (time.process_time() - began) / steps / model.horizon * 1000
    gain = ab_initio_seconds(test.attrs) * 1000 / seconds
    cost = {"metric": ["seconds a picosecond", "speed-up"], "value": [seconds, gain]}
    return [assess(store, {"": model}), pd.DataFrame(cost)]


def _measured(name: str, emulator: str, seed: int, data: Path) -> pd.DataFrame | None:
    """Rows of a rollout of lithium, from `experiments.long_rollouts`."""
    if not name.startswith("lithium"):
        return None
    rows = pd.read_csv(data / "lithium-emulators" / "results.csv")
    return rows[(rows[["model", "part", "seed"]] == [emulator, "10 ps", seed]).all(axis=1)]


# --- the table -------------------------------------------------------------------------------


def wanted(seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """All lines of the table, a piece for each seed."""
    lithium = ("lithium-nuclear", "lithium-latent-sjsd", "lithium-latent", "lithium-unet")
    lines = {"lithium, 800 K": lithium, "rock salt, 900 K": ("sodium-chloride-nuclear",)}
    pieces = [(m, e, s) for m, emulators in lines.items() for e in emulators for s in seeds]
    pieces += [(m, "persistence", 0) for m in lines]
    return pieces + [(m, e, s) for m in FILMS for e in ("map", "free atoms") for s in seeds]


def markdown(rows: pd.DataFrame) -> str:
    """The table in Markdown: a line each emulator of a material, mean +- standard error."""
    lines = ["| material | emulator | " + " | ".join(HEADINGS.values()) + " |"]
    lines.append("|---" * (2 + len(HEADINGS)) + "|")
    for material, emulator in dict.fromkeys(piece[:2] for piece in wanted([0])):
        found = rows[(rows["material"] == material) & (rows["emulator"] == emulator)]
        cells = [_cell(metric, found[found["metric"] == metric]["value"]) for metric in HEADINGS]
        name = emulator.removeprefix("lithium-").removeprefix("sodium-chloride-")
        if len(found):
            lines.append(f"| {material} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(metric: str, values: pd.Series) -> str:
    values = values.dropna() * (100 if metric.startswith("one-step") else 1)
    if values.empty:
        return ""
    mean = f"{values.mean():.0f}" if values.mean() >= 1000 else f"{values.mean():.3g}"
    return mean if len(values) == 1 else f"{mean} +- {float(f'{values.sem():.1g}'):g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of the bundled data")
    parser.add_argument("out", type=Path, help="CSV file; what it holds is not computed again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def judged(material: str, emulator: str, seed: int) -> pd.DataFrame:
        judge = judge_run if material in RUNS else judge_snapshots
        return judge(material, emulator, seed, arguments.data)

    print(markdown(run_missing(arguments.out, COLUMNS, KEYS, wanted(arguments.seeds), judged)))


if __name__ == "__main__":
    run_script(main)
