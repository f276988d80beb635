r"""How far densities are from the limits of basis, k-points and grid.

A learned density cannot be better than its data, so each data set states the error of its
settings: the same configurations are computed with finer ones, and compared by

.. math::
    \epsilon_2 = \frac{\lVert \rho - \rho_\text{ref} \rVert_2}{\lVert \rho_\text{ref} \rVert_2},
    \qquad
    \Delta F = \Bigl(\tfrac{1}{3N} \sum_{I\alpha} (F - F_\text{ref})_{I\alpha}^2\Bigr)^{1/2}.

One setting is varied at a time (a `Series`), all others kept, else their errors would mix.
The stored grid is a setting of its own: `grid_table` tells what Fourier components beyond it
were worth.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms
from numpy.typing import NDArray

from densitykit.errors import GenerationError
from densitykit.fields import resample
from densitykit.generate.engine import Engine
from densitykit.generate.jobs import Result, close_engines, evaluate
from densitykit.generate.snapshots import grid_shape
from densitykit.io.progress import progress_bar
from densitykit.io.store import PathLike, load_arrays, save_arrays

__all__ = ["Series", "convergence_table", "grid_table"]


@dataclass(frozen=True)
class Series:
    """One setting varied: engines by label, and the engine they are measured against.

    Attributes
    ----------
    setting
        What is varied: "cutoff", "k-points", "basis".
    engines
        Label to picklable factory.
    reference
        Label of the best of them.
    """

    setting: str
    engines: Mapping[str, Callable[[], Engine]]
    reference: str


def convergence_table(
    series: Sequence[Series],
    configurations: Sequence[Atoms],
    *,
    spacing: float = 0.2,
    folder: PathLike | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Errors of density, forces and energy against the reference of each series.

    Parameters
    ----------
    series
        Settings to vary.
    configurations
        Periodic or boxed atoms; a few snapshots are enough.
    spacing
        Of the grid on which densities are compared, angstrom.
    folder
        Keeps each result, so that an interrupted table continues, and a longer one costs only
        what is new. Results are told apart by engine settings, atoms and grid.
    progress
        Show a bar.

    Returns
    -------
    pandas.DataFrame
        One row per series, label and configuration: "setting", "label", "configuration",
        "density_l2" (relative), "force_rms_error" and "force_rms" of the reference (eV/angstrom),
        "energy_error" (eV per atom), "seconds".

    Raises
    ------
    GenerationError
        An engine failed; what was computed before is in the folder.
    """
    rows = []
    jobs = [
        (s, label, i) for s in series for label in s.engines for i in range(len(configurations))
    ]
    results: dict[tuple[str, str, int], Result] = {}
    for s, label, i in progress_bar(jobs, desc="convergence", disable=not progress):
        atoms = configurations[i]
        name = f"{s.setting}: {label}, configuration {i}"
        try:
            results[s.setting, label, i] = _result(s.engines[label], atoms, spacing, folder, name)
        finally:
            close_engines()
    for s, label, i in jobs:
        reference = results[s.setting, s.reference, i]
        row = {"setting": s.setting, "label": label, "configuration": i}
        rows.append(row | _errors(results[s.setting, label, i], reference))
    return pd.DataFrame(rows)


def _result(
    engine: Callable[[], Engine],
    atoms: Atoms,
    spacing: float,
    folder: PathLike | None,
    name: str,
) -> Result:
    """Compute a configuration, or read it from the folder."""
    shape = grid_shape(atoms, spacing)
    identity = (engine, atoms.numbers, atoms.positions, np.array(atoms.cell), shape)
    file = Path(folder or ".") / f"{hashlib.sha256(pickle.dumps(identity)).hexdigest()[:24]}.npz"
    if folder is not None and file.exists():
        return load_arrays(file)
    result = evaluate(engine, atoms, shape, name)
    if "error" in result:
        raise GenerationError(f"{result['error']}; change its settings, or leave it out")
    if folder is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(file, result)
    return result


def _errors(result: Result, reference: Result) -> dict[str, Any]:
    n_atoms = len(reference["forces"])
    return {
        "density_l2": _relative(result["density"], reference["density"]),
        "force_rms_error": float(np.sqrt(np.mean((result["forces"] - reference["forces"]) ** 2))),
        "force_rms": float(np.sqrt(np.mean(np.square(reference["forces"])))),
        "energy_error": float(result["energy"] - reference["energy"]) / n_atoms,
        "seconds": float(result["seconds"]),
    }


def _relative(density: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    return float(np.linalg.norm(density - reference) / np.linalg.norm(reference))


def grid_table(
    density: NDArray[np.floating], cell: NDArray[np.floating], spacings: Sequence[float]
) -> pd.DataFrame:
    """What coarser grids lose of a density: relative l2 norm of the Fourier components dropped.

    Parameters
    ----------
    density
        On a grid fine enough to count as exact, shape (X, Y, Z).
    cell
        Lattice vectors in rows, angstrom, shape (3, 3).
    spacings
        Of the coarser grids, angstrom.

    Returns
    -------
    pandas.DataFrame
        "spacing" (angstrom), "grid", "points", "density_l2", and "minimum" (of the coarse density,
        in units of its maximum): below zero it overshoots.
    """
    rows = []
    for spacing in spacings:
        shape = grid_shape(Atoms(cell=cell), spacing)
        coarse = resample(density, shape)
        row = {"spacing": spacing, "grid": " x ".join(map(str, shape)), "points": coarse.size}
        row["density_l2"] = _relative(resample(coarse, density.shape), density)
        rows.append(row | {"minimum": float(coarse.min() / coarse.max())})
    return pd.DataFrame(rows)
