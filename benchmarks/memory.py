"""Peak memory of reading windows, a one-step table, a training and a rollout, against run length.

    python benchmarks/memory.py [--frames 50 100 200] [--points 64] [--before WORKTREE]

Each number is the largest resident set of a process of its own, in MB; the first row only imports.
The stores are made up, of plane waves, in a temporary folder. With the work tree of an
older commit (before windows were read lazily), its numbers stand beside.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

MAKE = """
import sys
import numpy as np
path, frames, points = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
writer = create_trajectory(path, n_frames=frames, grid=(points,) * 3, cell=12.0)
x = 2 * np.pi * np.arange(points) / points
for k in range(frames):
    a, b, c = (np.cos(x - 0.05 * (i + 1) * k) for i in range(3))
    writer.append(0.05 + 0.01 * np.add.outer(np.add.outer(a, b), c), 2.0 * k)
write_splits(path, {"train": {"run": ".", "start": 0, "stop": frames}})
print(frames)
"""
FIRST = """
import resource, sys
import torch
torch.set_num_threads(1)
from densitykit.models import SurrogateUNet
path, model = sys.argv[1], SurrogateUNet(-3.0, 0.5, 0.01, 4.0, widths=(8,), blocks=(1,))
"""
LAST = """
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
NOW = {
    "make": """
from densitykit.io.splits import write_splits
from densitykit.io.writer import create_trajectory
""",
    "imports": "import densitykit.training, densitykit.assess, densitykit.data.windows",
    "all windows": """
from densitykit.data.windows import load_windows
windows = load_windows(path, "train", 4.0)
for i in range(len(windows)):
    windows[i].density.sum()
""",
    "one-step table": """
from densitykit.assess import one_step_table
from densitykit.data.windows import load_windows
from densitykit.models.baselines import LinearExtrapolation
one_step_table({"": LinearExtrapolation(4.0)}, load_windows(path, "train", 4.0))
""",
    "20 training steps": """
from densitykit.data.windows import load_windows
from densitykit.training import train
train(model, load_windows(path, "train", 4.0), steps=20, batch=1)
""",
    "rollout of 5 steps": """
from densitykit.data.windows import load_windows
from densitykit.rollout import rollout
rollout(model, load_windows(path, "train", 4.0)[0], 5, progress=False)
""",
}
BEFORE = {
    "make": "from densitykit.trajectory import create_trajectory, write_splits",
    "imports": "import densitykit.training, densitykit.evaluation, densitykit.sampling",
    "all windows": """
from densitykit.sampling import load_pairs
pairs = load_pairs(path, "train", 4.0)
for i in range(len(pairs)):
    pairs[i][0].sum()
""",
    "one-step table": """
from densitykit.baselines import LinearExtrapolation
from densitykit.evaluation import one_step_table
from densitykit.sampling import load_pairs
one_step_table({"": LinearExtrapolation(4.0)}, load_pairs(path, "train", 4.0))
""",
    "20 training steps": """
from densitykit.sampling import load_pairs
from densitykit.training import train_surrogate
train_surrogate(model, load_pairs(path, "train", 4.0), steps=20, batch=1)
""",
    "rollout of 5 steps": """
from densitykit.rollout import rollout
from densitykit.sampling import load_pairs
pairs = load_pairs(path, "train", 4.0)
rollout(model, pairs.given(model, 0), 5, cell=pairs.cell, progress=False)
""",
}


def peak(tree: Path, code: str, *arguments: object) -> float:
    """What a process prints last: its largest resident set in MB."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--points", type=int, default=64, help="of an edge of the grid")
    parser.add_argument("--before", type=Path, help="work tree of an older commit")
    arguments = parser.parse_args()
    trees = {"now": (ROOT, NOW)}
    if arguments.before:
        trees = {"before": (arguments.before.resolve(), BEFORE)} | trees
    print(f"{'frames':>8}{'MB':>8}  {'':<20}" + "".join(f"{label:>10}" for label in trees))
    with tempfile.TemporaryDirectory() as folder:
        for frames in arguments.frames:
            size, stores = 4 * frames * arguments.points**3 / 1e6, {}
            for label, (tree, code) in trees.items():
                stores[label] = Path(folder) / f"{label}-{frames}.zarr"
                peak(tree, code["make"] + MAKE, stores[label], frames, arguments.points)
            for work in [name for name in NOW if name != "make"]:
                used = [
                    peak(tree, FIRST + code[work] + LAST, stores[label])
                    for label, (tree, code) in trees.items()
                ]
                row = "".join(f"{mb:>10.0f}" for mb in used)
                print(f"{frames:>8}{size:>8.0f}  {work:<20}{row}", flush=True)


if __name__ == "__main__":
    main()
