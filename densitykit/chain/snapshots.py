r"""Chains as data for maps from atoms to densities, and how good such a map is.

The map :math:`\{R_I\} \mapsto \rho(r)` of one-dimensional chains (Zepeda-Nunez et al. 2019,
section 4.1) is learned from snapshots of molecular dynamics and judged by

.. math:: \mathrm{MSE} = \langle (\rho(r_i) - \hat\rho(r_i))^2 \rangle

over all points of all snapshots (eq. 28), and by the relative errors of eqs. 21 and 22.
Stores are in angstrom; everything here is in atomic units, in which the paper states its errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from densitykit.chain.atomic_sum import AtomicSum1D, Surroundings
from densitykit.errors import ShapeError, TrajectoryError
from densitykit.io.reader import open_split
from densitykit.metrics import relative_l1, relative_l2

__all__ = ["ChainSnapshots", "load_snapshots", "score"]


@dataclass(frozen=True)
class ChainSnapshots:
    """Configurations of a chain and their densities, in atomic units.

    Attributes
    ----------
    positions
        Shape (T, N), in bohr.
    density
        Shape (T, P), in 1/bohr.
    species
        Shape (N,).
    points
        Where the density is given, shape (P,), in bohr.
    length
        Of the ring, in bohr.

    Raises
    ------
    ShapeError
        The arrays do not belong together.
    """

    positions: Tensor
    density: Tensor
    species: Tensor
    points: Tensor
    length: float

    def __post_init__(self) -> None:
        expected = (len(self.positions), len(self.points))
        if self.density.shape != expected or self.positions.shape[1:] != self.species.shape:
            raise ShapeError(
                f"positions have shape {tuple(self.positions.shape)}, species "
                f"{tuple(self.species.shape)}, points {tuple(self.points.shape)}, density "
                f"{tuple(self.density.shape)}; give (T, N), (N,), (P,) and (T, P)"
            )

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """positions, species, points and length: what models are called with."""
        return self.positions, self.species, self.points, self.length

    def evenly(self, count: int) -> ChainSnapshots:
        """The first of each of ``count`` equal stretches; ShapeError if there are too few."""
        if not 1 <= count <= len(self):
            raise ShapeError(f"count is {count}; give 1 to {len(self)}, the snapshots there are")
        return self.at(torch.arange(count) * len(self) // count)

    def at(self, rows: Tensor) -> ChainSnapshots:
        """The snapshots with these indices."""
        fields = self.positions[rows], self.density[rows]
        return ChainSnapshots(*fields, self.species, self.points, self.length)

    def seen_by(self, model: AtomicSum1D) -> Surroundings:
        """What the model needs of all configurations, on its device."""
        device = next(model.parameters()).device
        *arrays, length = self.arguments
        return model.surroundings(*(x.to(device) for x in arrays), length)


def load_snapshots(path: str | Path, split: str) -> ChainSnapshots:
    """A split of a chain, converted to atomic units by the constant in its attributes.

    Raises
    ------
    TrajectoryError
        No such split, not one-dimensional, or no constant to convert with.
    """
    ds = open_split(path, split)
    source = ds.encoding["source"]
    if ds.density.ndim != 2 or "positions" not in ds:
        raise TrajectoryError(f"{source}: variable 'density' is no chain with atoms; use 1-D data")
    if "bohr_angstrom" not in ds.attrs:
        raise TrajectoryError(f"{source}: attribute 'bohr_angstrom' is missing; make it again")
    bohr = ds.attrs["bohr_angstrom"]
    length, n_points = float(ds.cell.values[0, 0]) / bohr, ds.sizes["x"]
    return ChainSnapshots(
        torch.from_numpy(ds.positions.values[..., 0] / bohr),
        torch.from_numpy(ds.density.values.astype("float64") * bohr),
        torch.from_numpy(ds.numbers.values.astype("int64")),
        torch.arange(n_points, dtype=torch.float64) * (length / n_points),
        length,
    )


@torch.no_grad()
def score(model: AtomicSum1D, data: ChainSnapshots, **labels: Any) -> pd.DataFrame:
    """Errors of a model on snapshots, one metric a row.

    Parameters
    ----------
    model
        In evaluation.
    data
        Snapshots.
    labels
        Constant columns: system, n_near, samples, seed, variant, split.

    Returns
    -------
    pd.DataFrame
        Columns: the labels, metric and value. Metrics: "mse" (eq. 28) in 1/bohr^2; "l1" and "l2",
        the relative errors of eqs. 21 and 22, mean over snapshots, and "l1_max", the worst one.
    """
    device = next(model.parameters()).device
    species, points = data.species.to(device), data.points.to(device)
    # one snapshot at a time: the memory needed does not depend on their number
    rho = [model(R[None].to(device), species, points, data.length) for R in data.positions]
    prediction = torch.cat(rho).double().cpu()
    l1, l2 = (f(prediction, data.density, ndim=1) for f in (relative_l1, relative_l2))
    values = {"mse": (prediction - data.density).square().mean()}
    values |= {"l1": l1.mean(), "l2": l2.mean(), "l1_max": l1.max()}
    return pd.DataFrame([labels | {"metric": k, "value": v.item()} for k, v in values.items()])
