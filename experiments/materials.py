r"""Two more materials in motion, by a force field and a static map: aluminium and liquid water.

Nobody has computed a trajectory of either: a force field moves the atoms, and a map that was
fitted to independent snapshots draws their density. What the film shows can be compared with
diffraction and spectroscopy.

*Aluminium* (`aluminium-nuclear`; 108 atoms, at the lattice constant of each temperature). The mean
density of a vibrating crystal has the waves of the lattice G only, weakened by the Debye-Waller
factor,

.. math:: \langle\rho_G\rangle = \rho^0_G\, e^{-B G^2 / 16 \pi^2}, \qquad
   B = \tfrac{8 \pi^2}{3} \langle u^2 \rangle ,

with the density :math:`\rho^0` of the crystal at rest. B is fitted to this ratio, and comes
beside it from the displacements u of the nuclei; long waves that the cell does not hold are
missing. Order is :math:`\langle |\rho_G|^2 \rangle / |\rho^0_G|^2` of the strongest
shell: one in the crystal at rest, near zero in a liquid. Whether the crystal melts is asked far
above the melting point (933 K), with a lattice constant extrapolated from those below, and beyond
the temperatures that force field and map have seen.

*Water* (SPC/Fw, `deep-density-water`; 64 molecules, 300 K). Dipoles of molecules come from the
density by radical Voronoi cells (`experiments.deep_density_physics`). In between a dipole surface
that is linear in few vectors of a molecule and in the field of the others, fitted to them, tells
them each 2 fs. The infrared spectrum is that of the cell dipole M,
:math:`\omega^2 \int \langle M(0) M(t) \rangle e^{i \omega t} dt`, and the X-ray intensity that of
all electrons: valence from the map, two of each oxygen in a hydrogen-like 1s shell (exponent by
Slater's rules, 7.7).

    python -m experiments.materials aluminium
    python -m experiments.materials water

Each start is a run of its own; values are means over starts, with the standard error of the mean.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from densitykit.cells import wave_vectors
from densitykit.data.windows import step_generator
from densitykit.generate.film import CalculatorForces
from densitykit.generate.water import SPCFw
from densitykit.io.progress import progress_bar
from densitykit.io.reader import open_split
from densitykit.models import NuclearEmulator, load_model
from densitykit.models.deep_density.linear import Atoms
from densitykit.models.nuclear.emulator import NuclearState, thermal_velocities
from densitykit.units import BOHR, PER_CM
from experiments.arguments import run_script
from experiments.deep_density_physics import DEBYE, water_dipoles
from experiments.report import merge_rows

__all__ = ["debye_waller", "dipole_features", "infrared", "xray_intensity"]

KEYS = ["material", "case", "quantity"]
EDGES = {300: 4.0498, 600: 4.08115, 900: 4.1191, 1600: 4.200}  # angstrom
CHARGES = np.array([6.0, 1.0, 1.0])


def run(
    model: NuclearEmulator, state: NuclearState, steps: int, seed: int
) -> Iterator[NuclearState]:
    """States after 1, 2, ... steps of the nuclei; the density is left as it was."""
    for k in progress_bar(range(steps), f"start {seed}"):
        state = model.move(state, step_generator(seed, k))
        yield state


# --- aluminium -------------------------------------------------------------------------------


def debye_waller(mean: np.ndarray, rest: np.ndarray, cell: np.ndarray) -> float:
    """B in angstrom**2 of a mean density (X, Y, Z), beside that of the crystal at rest.

    Waves up to 6.5/angstrom that the crystal at rest has, each with the weight of its amplitude.
    """
    ours, theirs = np.fft.fftn(mean), np.fft.fftn(rest)
    square = (wave_vectors(mean.shape, cell) ** 2).sum(axis=-1)
    held = (np.abs(theirs) > 0.02 * np.abs(theirs[0, 0, 0])) & (square > 0) & (square < 6.5**2)
    ratio = np.real(ours[held] / theirs[held])
    weight, x = np.abs(theirs[held]) ** 2, square[held] / (16 * np.pi**2)
    return float(-(weight * x * np.log(ratio)).sum() / (weight * x * x).sum())


def _order(rho: np.ndarray, rest: np.ndarray, cell: np.ndarray) -> float:
    """|rho_G|^2 beside that of the crystal at rest, over the waves of its strongest shell."""
    ours, theirs = (np.abs(np.fft.fftn(x)) ** 2 for x in (rho, rest))
    length = np.linalg.norm(wave_vectors(rho.shape, cell), axis=-1)
    theirs[0, 0, 0] = 0
    strongest = length.ravel()[theirs.argmax()]
    shell = (np.abs(length - strongest) < 0.01) & (theirs > 0.5 * theirs.max())
    return float(ours[shell].sum() / theirs[shell].sum())


def crystal(model: NuclearEmulator, kelvin: int, seed: int) -> tuple[NuclearState, np.ndarray]:
    """108 atoms at their sites with velocities of twice the temperature, and the density there."""
    a = EDGES[kelvin]
    sites = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
    copies = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    x = torch.from_numpy(a * (copies + sites).reshape(1, -1, 3))
    v = thermal_velocities(x, 26.982, 2.0 * kelvin, step_generator(seed, 10**6))
    z = torch.full(x.shape[1:2], 13)
    state = model.init_at(x, v, 3 * a * torch.eye(3).double(), (42, 42, 42), z)
    return state, state.base[0].double().numpy()


def vibrations(model: NuclearEmulator, kelvin: int, seed: int, length: int) -> dict[str, float]:
    """B of density and nuclei, and the order, of one start; `length` steps after a quarter."""
    model.temperature = float(kelvin)
    state, rest = crystal(model, kelvin, seed)
    sites, paths, densities, seconds = state.positions, [], [], time.process_time()
    for k, now in enumerate(run(model, state, length + length // 4, seed)):
        if k >= length // 4:
            paths.append(now.positions[0].numpy())
            if k % (length // 12) == 0:
                densities.append(model.predict_density(now).base[0].double().numpy())
    seconds = time.process_time() - seconds
    u = np.stack(paths) - sites[0].numpy()
    u = u - u.mean(axis=1, keepdims=True)  # the cell as a whole may drift
    u = u - u.mean(axis=0)
    cell = state.cell[0].numpy()
    found = {
        "order": np.mean([_order(rho, rest, cell) for rho in densities]),
        "order at the end": np.mean([_order(rho, rest, cell) for rho in densities[-3:]]),
        "root mean square displacement, angstrom": float(np.sqrt((u**2).sum(-1).mean())),
        "seconds a picosecond": seconds / (1.25 * length * model.horizon / 1000),
    }
    if kelvin < 1000:
        found["B of the density, angstrom^2"] = debye_waller(
            np.mean(densities, axis=0), rest, cell
        )
        found["B of the nuclei, angstrom^2"] = 8 * np.pi**2 / 3 * float((u**2).sum(-1).mean())
    return found


def aluminium(checkpoints: Path, seeds: list[int], length: int) -> Iterator[dict[str, Any]]:
    model = load_model(checkpoints / "aluminium-nuclear")
    for kelvin in EDGES:
        found = [vibrations(model, kelvin, seed, length) for seed in seeds]
        yield from _rows("aluminium 108", f"{kelvin} K", found)


# --- water -----------------------------------------------------------------------------------


def dipole_features(positions: np.ndarray, edge: float) -> np.ndarray:
    """Vectors in which the dipoles of molecules are linear, (..., molecule, 4, 3).

    The sum of the two bonds; each bond times its length beyond 1 angstrom; the sum times what the
    angle is beyond 104.5 degrees; and the field of the other molecules at the oxygen (charges of
    SPC/Fw at the nearest images, e/angstrom**2). Molecules are whole: O, H, H.
    """
    o, h1, h2 = np.moveaxis(positions.reshape(*positions.shape[:-2], -1, 3, 3), -2, 0)
    b1, b2 = h1 - o, h2 - o
    r1, r2 = (np.linalg.norm(b, axis=-1, keepdims=True) for b in (b1, b2))
    bend = np.arccos((b1 * b2).sum(-1, keepdims=True) / (r1 * r2)) - np.radians(104.5)
    field = np.zeros_like(o)
    for charge, x in ((-0.82, o), (0.41, h1), (0.41, h2)):
        away = o[..., :, None, :] - x[..., None, :, :]
        away = away - edge * np.round((o[..., :, None, :] - o[..., None, :, :]) / edge)
        cube = np.linalg.norm(away, axis=-1, keepdims=True) ** 3
        own = np.eye(o.shape[-2], dtype=bool)[..., None]
        field = field + charge * np.where(own, 0, away / np.where(own, 1, cube)).sum(axis=-2)
    return np.stack([b1 + b2, (r1 - 1) * b1 + (r2 - 1) * b2, bend * (b1 + b2), field], axis=-2)


def infrared(dipole: np.ndarray, spacing: float, pieces: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Wave numbers in 1/cm and omega^2 |M(omega)|^2 of a cell dipole (time, 3), any unit.

    The mean over pieces of the run, each under a window of Hann.
    """
    length = len(dipole) // pieces
    parts = dipole[: pieces * length].reshape(pieces, length, 3)
    parts = (parts - parts.mean(axis=1, keepdims=True)) * np.hanning(length)[:, None]
    omega = 2 * np.pi * np.fft.rfftfreq(length, spacing)
    power = (np.abs(np.fft.rfft(parts, axis=1)) ** 2).sum(axis=2).mean(axis=0)
    return omega * PER_CM, omega**2 * power


def xray_intensity(rho: np.ndarray, atoms: Atoms, largest: float = 8.0) -> pd.Series:
    """Intensity a molecule of valence and 1s electrons, in shells of 0.25/angstrom."""
    cell = atoms.cell
    q = wave_vectors(rho.shape, cell)
    length = np.linalg.norm(q, axis=-1)
    kept = (length < largest) & (length > 0)
    volume = abs(np.linalg.det(cell))
    amplitude = np.fft.fftn(rho)[kept] / rho.size * volume
    oxygen = atoms.positions[atoms.numbers == 8]
    core = 2 / (1 + (length[kept] * BOHR / (2 * 7.7)) ** 2) ** 2
    amplitude = amplitude + core * np.exp(-1j * q[kept] @ oxygen.T).sum(axis=1)
    square = np.abs(amplitude) ** 2 / len(oxygen)
    shell = 0.25 * np.floor(length[kept] / 0.25) + 0.125
    return pd.Series(square).groupby(shell).mean()


def liquid(
    checkpoints: Path, data: Path, seed: int, length: int, frames: int
) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]], list[pd.Series], float, float]:
    """Positions each 2 fs, those of some frames with dipoles, intensities, edge and cost."""
    options = {"temperature": 300.0, "relaxation": 1000.0, "widths": ()}
    density = load_model(checkpoints / "deep-density-water")
    model = NuclearEmulator(
        2.0, substeps=4, force_field=CalculatorForces(SPCFw()), density=density, **options
    )
    start = open_split(data, "test-64").isel(time=seed).load()
    x, cell = torch.from_numpy(start.positions.values[None].astype(float)), start.cell.values
    z = torch.from_numpy(start.numbers.values)
    v = thermal_velocities(x, model.masses(z), 300.0, step_generator(seed, 10**6))
    state = model.init_at(x, v, torch.from_numpy(cell), start.density.shape, z)
    paths, drawn, intensities, began = [], [], [], time.process_time()
    for k, now in enumerate(run(model, state, length + length // 5, seed)):
        if k < length // 5:
            continue
        paths.append(now.positions[0].numpy())
        if len(paths) % (length // frames) == 0:
            rho = model.predict_density(now).base[0].double().numpy()
            atoms = Atoms(paths[-1], start.numbers.values, cell)
            drawn.append((paths[-1], water_dipoles(rho, atoms, np.tile(CHARGES, 64))))
            intensities.append(xray_intensity(rho, atoms))
    cost = (time.process_time() - began) / (1.2 * length * 2e-3)
    return paths, drawn, intensities, float(cell[0, 0]), cost


def water(
    checkpoints: Path, data: Path, seeds: list[int], length: int, frames: int, spectra: Path
) -> Iterator[dict[str, Any]]:
    runs = [liquid(checkpoints, data, seed, length, frames) for seed in seeds]
    edge = runs[0][3]
    x, mu = (np.stack([one[i] for r in runs for one in r[1]]) for i in (0, 1))
    features = dipole_features(x, edge)
    design = np.moveaxis(features, -2, -1).reshape(-1, features.shape[-2])
    slopes = np.linalg.lstsq(design, mu.reshape(-1), rcond=None)[0]
    left = mu.reshape(-1) - design @ slopes
    explained = 1 - left.var() / mu.reshape(-1).var()
    found, curves = [], []
    for paths, drawn, intensities, _, cost in runs:
        known = dipole_features(np.stack(paths), edge)
        cell_dipole = np.einsum("k,tmkc->tc", slopes, known)
        k, power = infrared(cell_dipole, 2.0)
        intensity = pd.concat(intensities, axis=1).mean(axis=1)
        curves += [("infrared", k, power / power.max())]
        curves += [("X-ray", intensity.index.values, intensity.values)]
        one = np.concatenate([d for _, d in drawn])
        found.append(
            {
                "dipole of a molecule, D": DEBYE * np.linalg.norm(one, axis=-1).mean(),
                "X-ray maximum, 1/angstrom": float(intensity.loc[1:4].idxmax()),
                "libration, 1/cm": _peak(k, power, 350, 1100),
                "bend, 1/cm": _peak(k, power, 1300, 1900),
                "stretch, 1/cm": _peak(k, power, 2900, 4000),
                "cell dipole^2 / (N mu^2)": float(
                    (cell_dipole**2).sum(1).mean() / 64 / (one**2).sum(-1).mean()
                ),
                "dipole surface, variance explained": float(explained),
                "seconds a picosecond": cost,
            }
        )
    rows = [
        {"curve": name, "start": i // 2, "x": a, "y": b}
        for i, (name, xs, ys) in enumerate(curves)
        for a, b in zip(xs, ys, strict=True)
        if name == "X-ray" or a < 4500
    ]
    pd.DataFrame(rows).to_csv(spectra, index=False, float_format="%.5g")
    yield from _rows("water 64", "300 K", found)


def _peak(k: np.ndarray, power: np.ndarray, low: float, high: float) -> float:
    """Where a band has half of its area, 1/cm."""
    band = (k > low) & (k < high)
    area = np.cumsum(power[band])
    return float(np.interp(0.5 * area[-1], area, k[band]))


def _rows(material: str, case: str, found: list[dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Mean over starts and its standard error, a row for each quantity."""
    for quantity in found[0]:
        values = np.array([f[quantity] for f in found])
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        row = {"material": material, "case": case, "quantity": quantity, "value": values.mean()}
        yield row | {"standard_error": error, "starts": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("material", choices=("aluminium", "water"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("data/materials"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--length", type=int, help="steps of a start (12 fs; water: 2 fs)")
    parser.add_argument("--frames", type=int, default=8, help="densities of a start, of water")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoints, seeds = arguments.data / "checkpoints", arguments.seeds
    if arguments.material == "aluminium":
        rows = aluminium(checkpoints, seeds, arguments.length or 320)
    else:
        spectra = arguments.out / "water-spectra.csv"
        length, frames = arguments.length or 5000, arguments.frames
        rows = water(checkpoints, arguments.data / "water.zarr", seeds, length, frames, spectra)
    merge_rows(arguments.out / "results.csv", pd.DataFrame(rows), KEYS)
    print(pd.read_csv(arguments.out / "results.csv").to_string(index=False))


if __name__ == "__main__":
    run_script(main)
