"""A density for any structure: atoms in, a frame with its density out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from densitykit.errors import ShapeError
from densitykit.models.deep_density.linear import Atoms, LinearDensity

if TYPE_CHECKING:
    import ase

__all__ = ["predict"]

_VACUUM = 4.0  # angstrom around a molecule that comes without a box


def predict(
    model: LinearDensity,
    atoms: ase.Atoms,
    grid: tuple[int, ...] | None = None,
    spacing: float = 0.25,
) -> xr.Dataset:
    """Predict the density of a structure.

    Parameters
    ----------
    model
        A static map, from its checkpoint.
    atoms
        The structure; one without a cell is put into a box with 4 angstrom around it.
    grid
        Numbers of points; by default as many even numbers as keep to the spacing.
    spacing
        Largest distance of grid points, angstrom.

    Returns
    -------
    xr.Dataset
        One frame: density (time, x, y, z) in angstrom**-3, positions, numbers, cell, pbc. Its
        attribute ``warning`` says what the map has not seen, if anything.

    Raises
    ------
    WindowError
        An element that the map was not trained on.
    ShapeError
        The structure holds no atoms, or the spacing is not positive.
    """
    if not len(atoms) or not spacing > 0:
        raise ShapeError(
            f"{len(atoms)} atoms and a spacing of {spacing} angstrom give no density; give a "
            "structure, and a positive spacing"
        )
    atoms = atoms.copy()
    if atoms.cell.rank < 3:
        atoms.center(vacuum=_VACUUM)
    cell = np.asarray(atoms.cell, float)
    if grid is None:
        grid = tuple(2 * int(np.ceil(x / spacing / 2)) for x in np.linalg.norm(cell, axis=1))
    inner = Atoms(atoms.positions, atoms.numbers, cell, bool(atoms.pbc.all()))
    density = model.density(inner, grid)
    warning = _strange(model, atoms)
    return xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), density[None], {"units": "angstrom**-3"}),
            "positions": (("time", "atom", "cartesian"), atoms.positions[None]),
            "numbers": ("atom", atoms.numbers),
            "cell": (("vector", "cartesian"), cell, {"units": "angstrom"}),
            "pbc": ("cartesian", np.asarray(atoms.pbc)),
        },
        {"time": ("time", [0.0], {"units": "fs"})},
        {"warning": warning} if warning else {},
    )


def _strange(model: LinearDensity, atoms: ase.Atoms) -> str:
    """Say what lies outside of the training set: atoms that are closer than any there."""
    distances = atoms.get_all_distances(mic=True) + 1e3 * np.eye(len(atoms))
    nearest = float(distances.min())
    if nearest > 0.97 * model.nearest:
        return ""
    return (
        f"two atoms are {nearest:.3f} angstrom apart; the map was trained on distances from "
        f"{model.nearest:.3f} angstrom, and guesses here"
    )
