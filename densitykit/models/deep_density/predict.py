"""A density for any structure: atoms in, a frame with its density out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from densitykit.errors import CheckpointError, ShapeError
from densitykit.models.deep_density.linear import Atoms, LinearDensity, nearest_pairs

if TYPE_CHECKING:
    import ase

__all__ = ["boxed", "grid_of", "predict", "too_close"]

_VACUUM = 4.0  # angstrom around a molecule that comes without a box
_CLOSE, _UNSURE = 0.95, 3.0  # times the nearest pair, and the error, of the training set


def predict(
    model: LinearDensity,
    atoms: ase.Atoms,
    grid: tuple[int, ...] | None = None,
    spacing: float = 0.25,
    uncertainty: bool = False,
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
    uncertainty
        Also estimate the error, which takes as long again for each member of the map.

    Returns
    -------
    xr.Dataset
        One frame: density (time, x, y, z) in angstrom**-3, positions, numbers, cell, pbc; with
        ``uncertainty`` also the standard deviation of its error, and the attribute
        ``expected_l1`` of the whole. Its attribute ``warning`` says what the map has not seen,
        if anything.

    Raises
    ------
    WindowError
        An element that the map was not trained on.
    CheckpointError
        The map cannot tell its uncertainty.
    ShapeError
        The structure holds no atoms, is periodic along some axes only, or the spacing is not
        positive.
    """
    atoms = boxed(atoms, spacing)
    cell = np.asarray(atoms.cell, float)
    grid = grid or grid_of(cell, spacing)
    inner = Atoms(atoms.positions, atoms.numbers, cell, bool(atoms.pbc.all()))
    axes, units = ("time", "x", "y", "z"), {"units": "angstrom**-3"}
    fields = {"density": (axes, model.density(inner, grid)[None], units)}
    warnings, attrs = too_close(model, inner), {}
    if uncertainty and not hasattr(model, "uncertainty"):
        raise CheckpointError(
            f"a {type(model).__name__} cannot tell its uncertainty; train a linear map for it"
        )
    if uncertainty:
        sigma = model.uncertainty(inner, grid)
        fields["uncertainty"] = (axes, sigma[None], units)
        mean_error = np.sqrt(2 / np.pi) * sigma.sum()  # of a normal error
        attrs["expected_l1"] = float(mean_error / np.abs(fields["density"][1]).sum())
        warnings += _unsure(model, attrs["expected_l1"])
    return xr.Dataset(
        fields
        | {
            "positions": (("time", "atom", "cartesian"), atoms.positions[None]),
            "numbers": ("atom", atoms.numbers),
            "cell": (("vector", "cartesian"), cell, {"units": "angstrom"}),
            "pbc": ("cartesian", np.asarray(atoms.pbc)),
        },
        {"time": ("time", [0.0], {"units": "fs"})},
        attrs | ({"warning": "; ".join(warnings)} if warnings else {}),
    )


def grid_of(cell: np.ndarray, spacing: float) -> tuple[int, ...]:
    """Even numbers of points along the vectors of a cell, no further apart than the spacing."""
    return tuple(2 * int(np.ceil(x / spacing / 2)) for x in np.linalg.norm(cell, axis=1))


def boxed(atoms: ase.Atoms, spacing: float) -> ase.Atoms:
    """Return a copy in a cell: a molecule without one gets a box with 4 angstrom around it.

    Raises
    ------
    ShapeError
        See `predict`.
    """
    if not len(atoms) or not spacing > 0:
        raise ShapeError(
            f"{len(atoms)} atoms and a spacing of {spacing} angstrom give no density; give a "
            "structure, and a positive spacing"
        )
    if atoms.pbc.any() and not atoms.pbc.all():
        raise ShapeError(
            f"a structure with pbc {atoms.pbc.tolist()} is periodic along some axes only; make it "
            "a molecule in a box (pbc=False), or periodic along all"
        )
    atoms = atoms.copy()
    if atoms.cell.rank < 3:
        atoms.pbc = False
        atoms.center(vacuum=_VACUUM)
    return atoms


def too_close(model: LinearDensity, atoms: Atoms) -> list[str]:
    """Say which species are closer than in any configuration of the training set."""
    found, known = nearest_pairs(atoms), model.nearest
    if not isinstance(known, Mapping):
        known = dict.fromkeys(found, known)
    return [
        f"species {pair} come within {r:.2f} angstrom, in training within "
        f"{known[pair]:.2f}; the map guesses there"
        if pair in known
        else f"species {pair} are {r:.2f} angstrom apart, in training never so near"
        for pair, r in found.items()
        if r < _CLOSE * known.get(pair, np.inf)
    ]


def _unsure(model: LinearDensity, expected: float) -> list[str]:
    if expected < _UNSURE * model.expected:
        return []
    return [
        f"the estimated error is {100 * expected:.2f} %, where it was "
        f"{100 * model.expected:.2f} % on structures like those of training"
    ]
