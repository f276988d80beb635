"""Draw the figure of README: a liquid in space and time, computed and learned.

Surfaces of equal density and atoms. The emulator starts from a state of a run that it has not
seen. Needs kaleido and a Chromium browser.

python scripts/readme_figure.py docs/space-and-time.webp
"""

from __future__ import annotations

import sys
from pathlib import Path

from plotly.subplots import make_subplots

from densitykit.data.windows import Windows
from densitykit.io.reader import open_split
from densitykit.models import load_model
from densitykit.plot import TEMPLATE, isosurface
from densitykit.rollout import rollout

DATA = Path(__file__).parents[1] / "data"
START, STEPS = 100, (1, 8, 40)  # a state of the test run; steps of 12 fs after it
LEVEL = 0.052  # angstrom**-3


def main() -> None:
    run = open_split(DATA / "lithium-800K.zarr", "test")
    window = Windows(run, horizon=12.0)[START]
    emulator = load_model(DATA / "checkpoints" / "lithium-nuclear")
    runs = {"ab initio": run, "emulator": rollout(emulator, window, STEPS[-1], progress=False)}
    begun = float(window.now[0])
    names = [f"<b>{name}</b>" for name in runs]
    columns = [f"{12 * step} fs" for step in STEPS]
    gaps = dict(horizontal_spacing=0.01, vertical_spacing=0.01)
    specs = [[dict(type="scene")] * 3] * 2
    fig = make_subplots(2, 3, specs=specs, row_titles=names, column_titles=columns, **gaps)
    for row, some in enumerate(runs.values(), start=1):
        for column, step in enumerate(STEPS, start=1):
            frame = some.sel(time=[begun + 12 * step], method="nearest")
            panel = isosurface(frame, [LEVEL], points=36)
            fig.add_traces(panel.data, row, column)
            scene = panel.layout.scene.to_plotly_json()
            scene.pop("domain", None)
            fig.update_scenes(scene, row=row, col=column)
    fig.update_annotations(font_size=16)
    fig.update_layout(template=TEMPLATE, width=840, height=560, showlegend=False)
    fig.update_layout(margin=dict(l=5, r=35, t=35, b=5))
    out = Path(sys.argv[1])
    out.parent.mkdir(exist_ok=True)
    fig.write_image(out, scale=2)


if __name__ == "__main__":
    main()
