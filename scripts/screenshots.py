"""Pictures of figures, to be looked at: python scripts/screenshots.py FOLDER [NAME ...]

Surfaces of lithium and of a difference in ethane, with atoms, a (111) plane of aluminium, the same
crystal in a hexagonal cell, drawn as it is, and the figures of the explorer. Needs kaleido and a
Chromium browser.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from densitykit import plot
from densitykit.io.reader import open_trajectory
from densitykit.models.nuclear.superposition import superposed
from densitykit.plot.explore import compare, explore
from densitykit.plot.planes import values_at

DATA = Path(__file__).parents[1] / "data"


def hexagonal(run: xr.Dataset) -> xr.Dataset:
    """The first frame of a cubic crystal in a hexagonal cell of three times its volume."""
    turn = np.array([[1, -1, 0], [0, 1, -1], [1, 1, 1]])
    s = np.stack(np.meshgrid(*(np.arange(n) / n for n in (36, 36, 44)), indexing="ij"), axis=-1)
    field, cell = run["density"][0].values, run["cell"].values
    density = [values_at(field, layer.reshape(-1, 3) @ turn).reshape(36, 44) for layer in s]
    images = np.array(list(product(range(-3, 4), repeat=3)))
    atoms = run["positions"][0].values @ np.linalg.inv(cell) % 1
    atoms = (atoms + images[:, None]).reshape(-1, 3) @ np.linalg.inv(turn)
    atoms = atoms[((atoms > -1e-9) & (atoms < 1 - 1e-9)).all(axis=1)] @ turn @ cell
    numbers = np.full(len(atoms), int(run["numbers"][0]))
    return xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), np.array(density)[None]),
            "cell": (("vector", "cartesian"), turn @ cell),
            "numbers": ("atom", numbers),
            "positions": (("time", "atom", "cartesian"), atoms[None]),
        }
    )


def main() -> None:
    lithium = open_trajectory(DATA / "lithium-800K.zarr" / "run-2")
    aluminium = open_trajectory(DATA / "aluminium.zarr" / "32-300K")
    ethane = open_trajectory(DATA / "ethane.zarr")
    water = open_trajectory(DATA / "water.zarr" / "32")
    later = lithium.isel(time=slice(8, None)).assign_coords(time=lithium.time[:-8])
    wanted = {
        "isosurface-lithium": lambda: plot.isosurface(lithium),
        "isosurface-water": lambda: plot.isosurface(water),
        "plane-111-aluminium": lambda: plot.plane(aluminium, (1, 1, 1)),
        "hexagonal-cell": lambda: plot.slice_figure(hexagonal(aluminium), "z", 0),
        "hexagonal-cell-in-space": lambda: plot.isosurface(hexagonal(aluminium), [0.24]),
        "difference-ethane": lambda: plot.isosurface(plot.difference(ethane, superposed(ethane))),
        "explorer": lambda: go.Figure(explore(lithium).figure),
        "explorer-comparison": lambda: go.Figure(compare(lithium, later).figure),
    }
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or wanted:
        wanted[name]().write_image(out / f"{name}.png", scale=2)


if __name__ == "__main__":
    main()
