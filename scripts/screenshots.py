"""Pictures of figures, to be looked at: python scripts/screenshots.py FOLDER [NAME ...]

Surfaces of lithium and of a difference in ethane, with atoms, a (111) plane of aluminium, the same
crystal in a hexagonal cell, drawn as it is, and the figures of the explorer; pages of the site, on
a screen of 1280 x 720, where `make docs` has built it. Needs kaleido and a Chromium browser.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from itertools import product
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from choreographer import Browser

from densitykit import plot
from densitykit.io.reader import open_trajectory
from densitykit.models.nuclear.superposition import superposed
from densitykit.plot.explore import compare, explore
from densitykit.plot.planes import values_at

ROOT = Path(__file__).parents[1]
DATA, SITE = ROOT / "data", ROOT / "build" / "site"
#: pages of the site, and what is brought to the middle of the screen
PAGES = {
    "site-front": ("index.html", "h1"),
    "site-gallery": ("gallery.html", "h1"),
    "site-lesson": ("notebooks/04_looking.html", ".js-plotly-plot"),
    "site-equations": ("notebooks/14_electrons_in_time.html", "mjx-container[display]"),
    "site-module": ("api/densitykit.plot.slices.html", "dl"),
}


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


async def photograph(names: list[str], out: Path) -> None:
    """Pages of the site, as a reader with a small screen sees them."""
    async with Browser(headless=True) as browser:
        tab = await browser.create_tab()
        screen = dict(width=1280, height=720, deviceScaleFactor=2, mobile=False)
        await tab.send_command("Emulation.setDeviceMetricsOverride", screen)
        for name in names:
            page, middle = PAGES[name]
            await tab.send_command("Page.navigate", {"url": (SITE / page).as_uri()})
            found = f"document.querySelector('{middle}')"
            look = f"!!{found} && ({found}.scrollIntoView({{block: 'center'}}), true)"
            for _ in range(60):  # until equations and figures are there
                await asyncio.sleep(1)
                reply = await tab.send_command("Runtime.evaluate", {"expression": look})
                if reply["result"]["result"]["value"]:
                    break
            await asyncio.sleep(2)
            reply = await tab.send_command("Page.captureScreenshot", {"format": "png"})
            (out / f"{name}.png").write_bytes(base64.b64decode(reply["result"]["data"]))


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
    names = sys.argv[2:] or [*wanted, *(PAGES if SITE.exists() else [])]
    for name in (name for name in names if name not in PAGES):
        wanted[name]().write_image(out / f"{name}.png", scale=2)
    if pages := [name for name in names if name in PAGES]:
        asyncio.run(photograph(pages, out))


if __name__ == "__main__":
    main()
