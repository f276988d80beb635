"""Speed of a training step and of a rollout step, of this tree beside an older one.

    git worktree add ../before ab719f8
    python benchmarks/house.py ../before

Both trees run in turns, a process each, on one core, with their own copies of the bundled data and
checkpoints; compare ratios, not times. Printed are medians over all turns, in milliseconds of
processor time, and the ratio of this tree to the other: above 1 is slower. Both have read the
training split before their first step: a row of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("lithium-unet", "lithium-latent-sjsd", "lithium-nuclear")

COMMON = """
import json, sys, time
import numpy as np, torch
time.perf_counter = time.process_time  # what else runs on the machine does not count
torch.set_num_threads(1)
torch.manual_seed(0)
DATA, found = "data/lithium-800K.zarr", {}

def loading(load):
    started = time.perf_counter()
    data = load()
    found["loading"] = [1e3 * (time.perf_counter() - started)]
    return data

def training(name, rows):
    found["training " + name] = (1e3 * np.diff([row["seconds"] for row in rows])[1:]).tolist()

def stepping(name, roll):
    roll(1)
    found["rollout " + name] = []
    for _ in range(5):
        started = time.perf_counter()
        roll(STEPS)
        found["rollout " + name].append(1e3 * (time.perf_counter() - started) / STEPS)

from densitykit.models import SurrogateUNet, load_model
card = {"mu": -2.9, "sigma": 0.8, "eps": 0.01, "horizon": 12.0}
unet, options = SurrogateUNet(**card), {"steps": STEPS, "batch": 2}
"""
BEFORE = """
from densitykit.rollout import rollout
from densitykit.sampling import load_pairs
from densitykit.training import train_latent_diffusion, train_surrogate
pairs = loading(lambda: load_pairs(DATA, "train", 12.0))
training("lithium-unet", train_surrogate(unet, pairs, **options))
latent = load_model("data/checkpoints/lithium-latent-sjsd")
rows = train_latent_diffusion(latent, pairs, autoencoder_steps=0, lambda_2=300.0, **options)
training("lithium-latent-sjsd", rows)
test = load_pairs(DATA, "test", 12.0)
for name in MODELS:
    model = load_model("data/checkpoints/" + name)
    given = test.given(model, 0)
    stepping(name, lambda n: rollout(model, given, n, cell=test.cell, progress=False))
"""
NOW = """
from densitykit.data.windows import load_windows
from densitykit.rollout import rollout
from densitykit.training import train, train_latent_diffusion
windows = load_windows(DATA, "train", 12.0)
loading(lambda: [windows[i] for i in range(len(windows))])  # as the older tree does, at once
training("lithium-unet", train(unet, windows, **options))
latent = load_model("data/checkpoints/lithium-latent-sjsd")
rows = train_latent_diffusion(latent, windows, autoencoder_steps=0, lambda_2=300.0, **options)
training("lithium-latent-sjsd", rows)
test = load_windows(DATA, "test", 12.0)
for name in MODELS:
    model = load_model("data/checkpoints/" + name)
    stepping(name, lambda n: rollout(model, test[0], n, progress=False))
"""
LAST = """
print(json.dumps(found))
"""


def measure(tree: Path, code: str, steps: int) -> dict[str, list[float]]:
    """Milliseconds of each piece of work, by name."""
    head = f"STEPS, MODELS = {steps}, {MODELS}\n"
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", head + COMMON + code + LAST]
    run = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="work tree of the older commit")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each training and rollout")
    arguments = parser.parse_args()
    trees = {"before": (arguments.before.resolve(), BEFORE), "now": (ROOT, NOW)}
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.turns):
        for label, (tree, code) in trees.items():
            for name, values in measure(tree, code, arguments.steps).items():
                times.setdefault(name, {}).setdefault(label, []).extend(values)
            print(f"{label}: done", file=sys.stderr, flush=True)
    print(f"{'':<32}{'before, ms':>12}{'now, ms':>12}{'ratio':>8}")
    for name, both in times.items():
        before, now = (float(np.median(both[label])) for label in trees)
        print(f"{name:<32}{before:>12.1f}{now:>12.1f}{now / before:>8.3f}")


if __name__ == "__main__":
    main()
