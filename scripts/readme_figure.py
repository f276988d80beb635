"""Draw the figure of README: a liquid in space and time, computed and learned.

Two surfaces of equal density and the nuclei. The emulator starts from a state of a run that it has
not seen. Needs kaleido and a Chromium browser.

python scripts/readme_figure.py docs/space-and-time.webp
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import plotly.graph_objects as go
import xarray as xr
from PIL import Image

from densitykit.data.windows import Windows
from densitykit.io.reader import open_split
from densitykit.models import load_model
from densitykit.plot import TEMPLATE, isosurface
from densitykit.rollout import rollout

DATA = Path(__file__).parents[1] / "data"
START, STEPS = 100, (1, 8, 40)  # a state of the test run; steps of 12 fs after it
LEVELS = (0.05, 0.066)  # angstrom**-3
SIZE, LEFT, TOP = 270, 34, 34  # pixels of a panel, and of the labels beside and above them
LIGHT = dict(ambient=0.5, diffuse=0.8, specular=0.5, roughness=0.35, fresnel=0.2)


def panel(frame: xr.Dataset) -> Image.Image:
    """A scene, drawn alone: on one page several would share what lies before what."""
    fig = isosurface(frame, LEVELS, points=40).update_traces(
        lighting=LIGHT, selector=dict(type="mesh3d")
    )
    fig.update_layout(title="", showlegend=False, margin=dict(l=0, r=0, t=0, b=0))
    return Image.open(io.BytesIO(fig.to_image("png", width=SIZE, height=SIZE, scale=3)))


def main() -> None:
    run = open_split(DATA / "lithium-800K.zarr", "test")
    window = Windows(run, horizon=12.0)[START]
    emulator = load_model(DATA / "checkpoints" / "lithium-nuclear")
    runs = {"ab initio": run, "emulator": rollout(emulator, window, STEPS[-1], progress=False)}
    begun = float(window.now[0])
    wide, tall = LEFT + len(STEPS) * SIZE, TOP + len(runs) * SIZE
    layout = dict(template=TEMPLATE, width=wide, height=tall, margin=dict(l=0, r=0, t=0, b=0))
    fig = go.Figure(layout=layout)
    fig.update_xaxes(visible=False, range=[0, wide]).update_yaxes(visible=False, range=[tall, 0])
    look = dict(showarrow=False, font_size=17)
    for row, (name, some) in enumerate(runs.items()):
        y = TOP + row * SIZE
        fig.add_annotation(
            x=LEFT / 2, y=y + SIZE / 2, text=f"<b>{name}</b>", textangle=-90, **look
        )
        for column, step in enumerate(STEPS):
            x = LEFT + column * SIZE
            frame = some.sel(time=[begun + 12 * step], method="nearest")
            place = dict(x=x, y=y, sizex=SIZE, sizey=SIZE, xref="x", yref="y")
            fig.add_layout_image(source=panel(frame), **place)
            if row == 0:
                fig.add_annotation(x=x + SIZE / 2, y=TOP / 2, text=f"{12 * step} fs", **look)
    out = Path(sys.argv[1])
    out.parent.mkdir(exist_ok=True)
    fig.write_image(out, scale=2)


if __name__ == "__main__":
    main()
