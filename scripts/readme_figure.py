"""Draw the figure of README: the test run and emulators that start from one of its states.

python scripts/readme_figure.py docs/rollouts.webp
"""

from __future__ import annotations

import sys
from pathlib import Path

from densitykit.data.windows import Windows
from densitykit.io.reader import open_split
from densitykit.models import load_model
from densitykit.plot import panels_figure
from densitykit.rollout import rollout

DATA = Path(__file__).parents[1] / "data"
START, STEPS = 100, (1, 8, 40)  # a state of the test run; steps of 12 fs after it
MODELS = {
    "through nuclei": "lithium-nuclear",
    "latent, sJSD": "lithium-latent-sjsd",
    "U-Net": "lithium-unet",
}


def main() -> None:
    run = open_split(DATA / "lithium-800K.zarr", "test")
    window = Windows(run, horizon=12.0)[START]
    runs = {"ab initio": run}
    for name, checkpoint in MODELS.items():
        model = load_model(DATA / "checkpoints" / checkpoint)
        runs[name] = rollout(model, window, STEPS[-1], progress=False)
    begun = float(window.now[0])
    runs = {name: some.assign_coords(time=some.time - begun) for name, some in runs.items()}
    fig = panels_figure(runs, picks=STEPS)
    out = Path(sys.argv[1])
    out.parent.mkdir(exist_ok=True)
    fig.write_image(out, scale=2)


if __name__ == "__main__":
    main()
