r"""The static data sets: molecules, liquid water, and hot aluminium.

The systems are those of Zepeda-Nunez et al. (arXiv 1912.00775, section 4.2), each in the size
that its purpose needs: models learn from small cells and are tested on larger ones.

========== ======================= ================================ ===========================
name       configurations          density                          sizes; temperatures
========== ======================= ================================ ===========================
ethane     GFN2-xTB, 350 K         PBE, GTH, TZV2P (PySCF)          one molecule
isobutane  as ethane               as ethane                        one molecule
butane     as ethane               as ethane                        one molecule
water      SPC/Fw, 300 K           PBE, GTH, TZV2P, Gamma (CP2K)    32 to 512 molecules
aluminium  EMT, at a(T)            PBE, GTH, plane waves, k-points  32, 108, 256; 300-900 K
========== ======================= ================================ ===========================

All electrons of aluminium have one temperature, 2900 K, whatever that of the ions: else the map
from atoms to density would not be one function. Its meshes of k-points are no coarser in any
size than in the smallest: shifted 3 x 3 x 3 for 32 atoms and 2 x 2 x 2 for 108 are the same
points, those of a shifted 6 x 6 x 6 mesh of the cubic cell; 2 x 2 x 2 for 256 is denser. So
errors that grow with the size of the cell are those of the model.

`generate` makes a set with one call, `convergence` the table of the errors of its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from ase import Atoms, units

from densitykit.errors import GenerationError
from densitykit.generate.convergence import Series, convergence_table
from densitykit.generate.geometries import MOLECULES, aluminium, lithium, molecule, sodium_chloride
from densitykit.generate.snapshots import System, generate_snapshots
from densitykit.generate.water import water
from densitykit.io.store import PathLike

__all__ = ["SIZES", "TEMPERATURES", "convergence", "generate", "system", "systems"]

#: molecules or atoms in a cell, the first to learn from and the others to test on
SIZES = {"water": (32, 64, 128, 256, 512), "aluminium": (32, 108, 256)}
#: of the ions, K; for the other systems only the first is made
TEMPERATURES = {"aluminium": (300.0, 600.0, 900.0), "water": (300.0,)}
TEMPERATURES |= dict.fromkeys(MOLECULES, (350.0,))

_WATER_SPACING = 0.25  # angstrom: 40, 50, 64, 80, 100 points, which CP2K's grids are twice of
_ELECTRONS = 2900.0  # K, of aluminium
#: angstrom**-3: half of the cell of a molecule holds less than ten times as much; a third of the
#: size of a store, for 1e-6 of the density and of the electrons
_FAINT = 2.0**-20
#: halves the time of a molecule and changes its density by 3e-5 (grid) and 1e-6 (fitting)
_QUICK = {"grid_level": 1, "density_fit": True}


def gaussian_dft(**settings: Any) -> Any:
    """Make a `GaussianDFT`; importing PySCF is left to the process that computes."""
    from densitykit.generate.molecular import GaussianDFT

    return GaussianDFT(**settings)


def periodic_gaussian_dft(**settings: Any) -> Any:
    """Make a `PeriodicGaussianDFT`."""
    from densitykit.generate.molecular import PeriodicGaussianDFT

    return PeriodicGaussianDFT(**settings)


def gaussians_and_plane_waves(**settings: Any) -> Any:
    """Make a `CP2K`."""
    from densitykit.generate.cp2k import CP2K

    return CP2K(**settings)


def plane_waves(cutoff_ry: float, **settings: Any) -> Any:
    """Make an `Espresso` for configurations that do not follow one another; cutoff in Ry."""
    from densitykit.generate.espresso import Espresso

    return Espresso(cutoff=cutoff_ry * units.Ry, extrapolation="atomic", **settings)


def system(name: str, size: int | None = None, temperature: float | None = None) -> System:
    """Return one static data set.

    Parameters
    ----------
    name
        "ethane", "isobutane", "butane", "water" or "aluminium".
    size
        Molecules of water or atoms of aluminium in the cell; default: the smallest of `SIZES`.
    temperature
        Of the ions, K; default: the first of `TEMPERATURES`.

    Returns
    -------
    System
        To be given to `generate_snapshots`. Only the smallest size has training data.

    Raises
    ------
    GenerationError
        There is no such system or size.
    """
    if name not in TEMPERATURES:
        raise GenerationError(f"no system {name!r}; choose one of {sorted(TEMPERATURES)}")
    sizes = SIZES.get(name, ())
    size = size if size is not None else next(iter(sizes), None)
    if size is not None and size not in sizes:
        raise GenerationError(f"{name} has no size {size}; choose one of {list(sizes)}")
    T = temperature if temperature is not None else TEMPERATURES[name][0]
    if name in MOLECULES:
        return _molecule(name, T)
    return _water(size, T) if name == "water" else _aluminium(size, T)


def _molecule(name: str, temperature: float) -> System:
    return System(
        name=f"{name}-{temperature:g}K",
        geometries=partial(molecule, name, temperature=temperature, margin=3.0),
        engine=partial(gaussian_dft, basis="gth-tzv2p", **_QUICK),
        spacing=0.25,
        keepbits=12,
        resolution=_FAINT,
        splits={"train": 100, "validation": 10, "test": 10},
    )


def _water(size: int, temperature: float) -> System:
    tests = {64: 5, 128: 3, 256: 2, 512: 1}
    small = {"train": 70, "validation": 10, "test": 20}
    solver = "diagonalisation" if size < 128 else "orbital transformation"
    return System(
        name=f"water-{size}-{temperature:g}K",
        geometries=partial(water, size, temperature=temperature),
        engine=partial(gaussians_and_plane_waves, spacing=_WATER_SPACING, solver=solver),
        spacing=_WATER_SPACING,
        keepbits=10,
        splits={"test": tests[size]} if size in tests else small,
    )


def _aluminium(size: int, temperature: float) -> System:
    small = {"train": 28, "validation": 4, "test": 8}
    return System(
        name=f"aluminium-{size}-{temperature:g}K",
        geometries=partial(aluminium, size, temperature=temperature),
        engine=_aluminium_engine(size),
        spacing=0.3,
        keepbits=10,
        splits=small if size == SIZES["aluminium"][0] else {"test": 4},
    )


def _aluminium_engine(size: int) -> Callable:
    m = {32: 3, 108: 2, 256: 2}[size]
    k_points = {"k_points": (m, m, m), "shifted": True}
    return partial(plane_waves, 20.0, temperature=_ELECTRONS, **k_points)


def systems(
    name: str, size: int | None = None, temperature: float | None = None
) -> dict[str, System]:
    """Return all runs of a data set: run name to system.

    Without a size or temperature, all of them. Runs are called "32" (water), "32-300K"
    (aluminium, whose cell depends on the temperature) and "." (a molecule, the store itself).

    Raises
    ------
    GenerationError
        There is no such system or size.
    """
    system(name, size, temperature)  # complains
    sizes = SIZES.get(name, (None,)) if size is None else (size,)
    temperatures = TEMPERATURES[name] if temperature is None else (temperature,)
    found = {}
    for N in sizes:
        for T in temperatures:
            run = {"water": f"{N}", "aluminium": f"{N}-{T:g}K"}.get(name, ".")
            found[run] = system(name, N, T)
    return found


def generate(
    name: str,
    path: PathLike,
    n: int | None = None,
    *,
    size: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    workers: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
    restart: bool = False,
) -> Path:
    """Make a static data set with all its runs, or finish it where it was interrupted.

    Parameters
    ----------
    name, size, temperature
        See `systems`.
    path
        The store: `water.zarr`.
    n, seed, workers, scheduler, progress, restart
        See `generate_snapshots`; `n` is that of each run.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    GenerationError
        See `systems` and `generate_snapshots`.
    """
    options = {"seed": seed, "workers": workers, "scheduler": scheduler, "progress": progress}
    options["restart"] = restart
    for run, found in systems(name, size, temperature).items():
        generate_snapshots(found, Path(path) / run, n, **options)
    return Path(path)


def convergence(
    name: str,
    n: int = 1,
    *,
    seed: int = 0,
    folder: PathLike | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Errors of the settings of a system's densities; see `convergence_table` for the columns.

    Parameters
    ----------
    name
        One of `systems`, in its smallest size and at its highest temperature, or "lithium" or
        "sodium-chloride", where a run of it starts.
    n
        Number of configurations.
    seed, folder, progress
        See `molecule` and `convergence_table`.

    Raises
    ------
    GenerationError
        There is no such system, or an engine failed.
    """
    if name in _DYNAMICS:
        start, series = _DYNAMICS[name]
        configurations = [start(seed=seed + i) for i in range(n)]
        return convergence_table(series(), configurations, folder=folder, progress=progress)
    hot = system(name, None, TEMPERATURES.get(name, (None,))[-1])
    configurations = hot.geometries(n, seed=seed, progress=progress)
    return convergence_table(
        _series(name), _plain(configurations), folder=folder, progress=progress
    )


def _plain(configurations: list[Atoms]) -> list[Atoms]:
    """Drop what is not part of a configuration."""
    return [Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in configurations]


def _series(name: str) -> list[Series]:
    if name == "aluminium":
        return _plane_wave_series((12.0, 16.0, 20.0, 24.0, 32.0), 16.0, _ELECTRONS)
    make = periodic_gaussian_dft if name == "water" else gaussian_dft
    bases = ("gth-dzvp", "gth-tzvp", "gth-tzv2p", "gth-qzv3p")
    return [Series("basis", {b: partial(make, basis=b) for b in bases}, bases[-1])]


def _lithium_series() -> list[Series]:
    return _plane_wave_series((12.0, 14.0, 16.0, 20.0, 30.0), 14.0, 800.0)


def _sodium_chloride_series() -> list[Series]:
    """Vary the cutoff at Gamma, then the mesh at 20 Ry; an insulator, without smearing."""
    make = partial(plane_waves, mixing_mode="plain")
    cutoff = {f"{c:g} Ry": partial(make, c) for c in (20.0, 24.0, 30.0, 40.0)}
    k: dict[str, Callable] = {"Gamma": partial(make, 20.0)}
    k["2 x 2 x 2, shifted"] = partial(make, 20.0, k_points=(2, 2, 2), shifted=True)
    return [Series("cutoff", cutoff, list(cutoff)[-1]), Series("k-points", k, list(k)[-1])]


#: systems in motion: the configuration that a run starts from, and what to vary
_DYNAMICS = {
    "lithium": (lithium, _lithium_series),
    "sodium-chloride": (sodium_chloride, _sodium_chloride_series),
}


def _plane_wave_series(cutoffs: tuple, at: float, temperature: float) -> list[Series]:
    """Vary the cutoff (Ry) with a shifted 2 x 2 x 2 mesh, then the mesh with the cutoff `at`."""
    make = partial(plane_waves, temperature=temperature)
    mesh = {"k_points": (2, 2, 2), "shifted": True}
    cutoff = {f"{c:g} Ry": partial(make, c, **mesh) for c in cutoffs}
    meshes: dict[str, dict] = {"Gamma": {}}
    for m, shifted in ((2, False), (2, True), (3, False), (3, True), (4, True)):
        label = f"{m} x {m} x {m}{', shifted' if shifted else ''}"
        meshes[label] = {"k_points": (m, m, m), "shifted": shifted}
    k = {label: partial(make, at, **options) for label, options in meshes.items()}
    return [Series("cutoff", cutoff, list(cutoff)[-1]), Series("k-points", k, list(k)[-1])]
