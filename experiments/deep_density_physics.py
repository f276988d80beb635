r"""Physics of predicted densities: what an error of the density does to what one makes of it.

======================== ====================================================================
quantity                 error of it, beside Kohn-Sham, a snapshot each
======================== ====================================================================
dipole, debye            of a molecule, :math:`\mu = \sum_I Z_I R_I - \int r \rho`; of a water
                         molecule in the liquid, over its part of a radical Voronoi tessellation
                         (Thomas, Brehm, Kirchner 2015, Phys. Chem. Chem. Phys. 17, 3207)
structure factor         :math:`|\rho(q)|^2`, mean of shells below 6/angstrom, relative rms
potential, eV            Hartree potential, rms over the grid
Coulomb energy, meV      :math:`\frac12 \int\!\int \Delta\rho \Delta\rho / r` an atom: a density
                         functional's energy is wrong by about as much, in second order
force on H, eV/angstrom  Hellmann-Feynman force of the electrons on hydrogen, whose
                         pseudopotential is local; rms over components
======================== ====================================================================

Rows are tidy: system, split, variant (free atoms, the bundled map), quantity, the mean error over
the snapshots, the standard error of this mean, and the size of the quantity in the reference. All
are of the valence density on the grid of the store, up to its Nyquist wave.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy.spatial import cKDTree

from densitykit.cells import minimum_image, wave_vectors
from densitykit.generate.pseudopotentials import gth
from densitykit.io.reader import open_splits
from densitykit.models import load_model
from densitykit.models.deep_density.linear import Atoms
from densitykit.training.linear import atoms_of
from densitykit.units import BOHR, HARTREE, SYMBOLS
from experiments.arguments import run_script
from experiments.deep_density import superposition
from experiments.report import merge_rows

__all__ = ["coulomb_potential", "dipole", "force_on_hydrogen", "structure_factor", "water_dipoles"]

SYSTEMS = ("ethane", "isobutane", "butane", "water", "aluminium")
KEYS = ["system", "split", "variant", "quantity"]
DEBYE = 4.80320471  # of e angstrom
COULOMB = HARTREE * BOHR  # e^2 / (4 pi epsilon_0), eV angstrom
RADII = {1: 1.20, 8: 1.52}  # van der Waals, angstrom (Bondi 1964)


def _points(atoms: Atoms, grid: tuple[int, ...]) -> np.ndarray:
    """Grid points, (X, Y, Z, 3), angstrom."""
    fractions = np.stack(np.meshgrid(*(np.arange(n) / n for n in grid), indexing="ij"), axis=-1)
    return fractions @ atoms.cell


def dipole(rho: np.ndarray, atoms: Atoms, charges: np.ndarray) -> np.ndarray:
    """Dipole moment of a molecule (3,), e angstrom, beside the centre of its ions' charge."""
    origin = charges @ atoms.positions / charges.sum()
    volume = abs(np.linalg.det(atoms.cell)) / rho.size
    return -volume * np.tensordot(rho, _points(atoms, rho.shape) - origin, axes=3)


def water_dipoles(rho: np.ndarray, atoms: Atoms, charges: np.ndarray) -> np.ndarray:
    """Dipole moments of the water molecules of a periodic cell (molecule, 3), e angstrom."""
    oxygen = np.flatnonzero(atoms.numbers == 8)
    inverse = np.linalg.inv(atoms.cell)
    vectors = atoms.positions[:, None] - atoms.positions[oxygen]
    molecule = np.linalg.norm(minimum_image(vectors @ inverse, atoms.cell), axis=2).argmin(axis=1)
    owner = molecule[_nearest_atoms(rho.shape, atoms).ravel()]
    away = _points(atoms, rho.shape).reshape(-1, 3) - atoms.positions[oxygen][owner]
    weights = rho.reshape(-1, 1) * abs(np.linalg.det(atoms.cell)) / rho.size
    out = np.zeros((len(oxygen), 3))
    np.add.at(out, owner, -weights * minimum_image(away @ inverse, atoms.cell))
    ions = atoms.positions - atoms.positions[oxygen][molecule]
    np.add.at(out, molecule, charges[:, None] * minimum_image(ions @ inverse, atoms.cell))
    return out


def _nearest_atoms(grid: tuple[int, ...], atoms: Atoms, reach: float = 4.0) -> np.ndarray:
    """Index of the atom to which each grid point belongs, by distance^2 - radius^2."""
    shifts = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    inverse = np.linalg.inv(atoms.cell)
    home = atoms.positions - np.floor(atoms.positions @ inverse) @ atoms.cell
    images = (home[:, None] + shifts @ atoms.cell).reshape(-1, 3)
    margin = reach * np.linalg.norm(inverse, axis=0)
    near = ((images @ inverse > -margin) & (images @ inverse < 1 + margin)).all(axis=1)
    which = np.repeat(np.arange(len(home)), len(shifts))[near]
    radii = np.array([RADII[z] for z in atoms.numbers[which].tolist()])
    lifted = np.column_stack([images[near], np.sqrt(radii.max() ** 2 - radii**2)])
    points = _points(atoms, grid).reshape(-1, 3)
    return which[cKDTree(lifted).query(np.pad(points, ((0, 0), (0, 1))))[1]].reshape(grid)


def _waves(rho: np.ndarray, atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rho(G), angstrom**-3, wave vectors, and the cell; a molecule's box is doubled."""
    wide = 1 if atoms.periodic else 2
    grid = tuple(wide * n for n in rho.shape)
    rho_g = np.fft.fftn(rho, s=grid, axes=(0, 1, 2)) / np.prod(grid)
    return rho_g, wave_vectors(grid, wide * atoms.cell), wide * atoms.cell


def coulomb_potential(rho: np.ndarray, atoms: Atoms) -> np.ndarray:
    """Energy of an electron in the Hartree potential of rho (X, Y, Z), eV; its mean is zero."""
    rho_g, g, _ = _waves(rho, atoms)
    square = (g**2).sum(axis=-1)
    square[0, 0, 0] = np.inf
    v = np.fft.ifftn(4 * np.pi * COULOMB * rho_g / square).real * rho_g.size
    return v[tuple(slice(n) for n in rho.shape)]


def structure_factor(rho: np.ndarray, atoms: Atoms, largest: float = 6.0) -> np.ndarray:
    """|rho(q)|^2 an atom, means over shells of 0.25/angstrom below `largest`."""
    rho_g, g, cell = _waves(rho, atoms)
    shell = np.floor(np.linalg.norm(g, axis=-1) / 0.25).astype(int)
    kept = shell < largest / 0.25
    kept[0, 0, 0] = False
    square = np.abs(rho_g[kept] * abs(np.linalg.det(cell))) ** 2 / len(atoms.numbers)
    count = np.bincount(shell[kept])
    return np.bincount(shell[kept], square)[count > 0] / count[count > 0]


def force_on_hydrogen(rho: np.ndarray, atoms: Atoms) -> np.ndarray:
    r"""Force of the electrons on hydrogen (atom, 3), eV/angstrom.

    :math:`F = -\int \rho\, \partial v(r - R) / \partial R`, by plane waves; v is the local
    potential of Goedecker, Teter, Hutter (1996), eq. 5.
    """
    rho_g, g, cell = _waves(rho, atoms)
    pseudo, k = gth("H"), np.linalg.norm(g, axis=-1) * BOHR
    x = (k * pseudo.r_loc) ** 2
    k[0, 0, 0] = np.inf
    c1, c2 = pseudo.c
    gaussian = np.sqrt(8 * np.pi**3) * pseudo.r_loc**3 * (c1 + c2 * (3 - x))
    v = np.exp(-x / 2) * (gaussian - 4 * np.pi * pseudo.valence / k**2) * HARTREE * BOHR**3
    terms = (np.conj(rho_g) * v).ravel()
    waves = g.reshape(-1, 3)
    hydrogen = atoms.positions[atoms.numbers == 1]
    phases = (np.exp(-1j * waves @ R) * terms for R in hydrogen)
    return np.array([-(waves.T @ p).imag for p in phases])


def errors(guess: np.ndarray, truth: np.ndarray, atoms: Atoms) -> dict[str, tuple[float, float]]:
    """Error of each quantity, and the size of the quantity."""
    charges = np.array([gth(SYMBOLS[z]).valence for z in atoms.numbers.tolist()])
    difference, n = guess - truth, len(atoms.numbers)
    potential = coulomb_potential(difference, atoms)
    volume = abs(np.linalg.det(atoms.cell)) / truth.size
    energy = 0.5 * volume * float((potential * difference).sum())
    s, s_true = structure_factor(guess, atoms), structure_factor(truth, atoms)
    found = {
        "potential, eV": (_rms(potential), _rms(coulomb_potential(truth, atoms))),
        "Coulomb energy, meV/atom": (1e3 * energy / n, np.nan),
        "structure factor": (_rms(s / s_true - 1), 1.0),
    }
    if 1 in atoms.numbers:
        force = force_on_hydrogen(truth, atoms)
        change = force_on_hydrogen(guess, atoms) - force
        found["force on H, eV/angstrom"] = (_rms(change), _rms(force))
        moment = water_dipoles if atoms.periodic else dipole
        mu = moment(truth, atoms, charges) * DEBYE
        change = moment(guess, atoms, charges) * DEBYE - mu
        found["dipole, debye"] = (_length(change), _length(mu))
    return found


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _length(vectors: np.ndarray) -> float:
    return float(np.linalg.norm(vectors, axis=-1).mean())


def rows(system: str, data: Path, checkpoints: Path) -> Iterator[dict[str, Any]]:
    """Errors of both variants on all test splits of a system."""
    store = data / f"{system}.zarr"
    maps = {
        "superposition": superposition(store),
        "linear": load_model(checkpoints / f"deep-density-{system}"),
    }
    for run in open_splits(store, "test"):
        for variant, model in maps.items():
            found = [of_frame(model, run, i) for i in range(run.sizes["time"])]
            for quantity in found[0]:
                values = np.array([f[quantity] for f in found])
                labels = {"system": system, "split": run.attrs["split"], "variant": variant}
                error = (
                    values[:, 0].std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.nan
                )
                mean = {"error": values[:, 0].mean(), "standard_error": error}
                yield labels | {"quantity": quantity} | mean | {"size": values[:, 1].mean()}


def of_frame(model: Any, run: xr.Dataset, i: int) -> dict[str, tuple[float, float]]:
    """Errors of a map on one frame."""
    truth, atoms = run["density"][i].values.astype(float), atoms_of(run, i)
    return errors(model.density(atoms, truth.shape), truth, atoms)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("data/deep-density-3d/physics.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for system in arguments.systems:
        new = pd.DataFrame(rows(system, arguments.data, arguments.data / "checkpoints"))
        merge_rows(arguments.out, new, KEYS)
    print(pd.read_csv(arguments.out).to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    run_script(main)
