"""Draw the figure of README: the test run and emulators that start from one of its states.

python scripts/readme_figure.py docs/rollouts.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from densitykit.data.windows import load_pairs
from densitykit.models import load_model
from densitykit.plot import figures as plot
from densitykit.rollout import rollout

DATA = Path(__file__).parents[1] / "data"
START, TIMES = 100, (12, 96, 192, 480)  # a state of the test run; fs after it
MAPS = {
    "through nuclei": "lithium-nuclear",
    "latent, sJSD": "lithium-latent-sjsd",
    "U-Net": "lithium-unet",
}


def main() -> None:
    test = load_pairs(DATA / "lithium-800K.zarr", "test", horizon=12.0)
    frames = [round(t / test.horizon) for t in TIMES]
    fields = {"ab initio": test.states[START + test.lag * np.array(frames), 0].numpy()}
    for name, checkpoint in MAPS.items():
        model = load_model(DATA / "checkpoints" / checkpoint)
        film = rollout(model, test.given(model, START), frames[-1], cell=test.cell)
        fields[name] = film.density.values[frames]
    picks = range(len(TIMES))
    fig = plot.panels_figure(fields, np.array(TIMES, float), picks, edge=test.cell[0, 0])
    out = Path(sys.argv[1])
    out.parent.mkdir(exist_ok=True)
    fig.write_image(out, scale=1.5)


if __name__ == "__main__":
    main()
