"""Appending and reading a frame, of this tree beside an older one.

    git worktree add ../before 9e0a9cd
    python benchmarks/store.py ../before

Both trees run in turns, a process each, on one core. Printed are medians over all turns, in
milliseconds of wall time and of processor time, and, of an append, how much of it is waiting for
the disk to have it (fsync); on a busy machine a low quantile says more. Frames are of 32 atoms
with positions, velocities and forces.
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
CODE = """
import json, os, sys, tempfile, time
import numpy as np
from densitykit.io.reader import open_trajectory
from densitykit.io.writer import TrajectoryWriter, create_trajectory

n, frames, durable = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "durable"
rng, waited, fsync = np.random.default_rng(0), [0.0], os.fsync
rho = np.exp(rng.normal(size=(n, n, n)).cumsum(0) / n).astype(np.float32)
atoms = {name: rng.normal(size=(32, 3)) for name in ("positions", "velocities", "forces")}
found = {"append": [], "append, cpu": [], "append, fsync": [], "read": [], "read, cpu": []}

def timed_fsync(descriptor):
    began = time.perf_counter()
    fsync(descriptor)
    waited[0] += time.perf_counter() - began

def timed(name, act):
    began, cpu, waited[0] = time.perf_counter(), time.process_time(), 0.0
    act()
    found[name].append(time.perf_counter() - began)
    found[name + ", cpu"].append(time.process_time() - cpu)
    if name == "append":
        found["append, fsync"].append(waited[0])

os.fsync = timed_fsync
with tempfile.TemporaryDirectory(dir=".") as folder:
    path, options = folder + "/a.zarr", {"grid": (n, n, n), "cell": 8.0, "numbers": [3] * 32}
    create_trajectory(path, n_frames=frames, **options)
    writer = TrajectoryWriter(path, durable=True) if durable else TrajectoryWriter(path)
    for i in range(frames):
        timed("append", lambda: writer.append(rho, float(i), energy=0.0, **atoms))
    run = open_trajectory(path)
    for i in range(frames):
        timed("read", lambda: run["density"][i].values)
    writer.close()
print(json.dumps(found))
"""


def measure(tree: Path, n: int, frames: int, durable: bool) -> dict[str, list[float]]:
    """Seconds of each append and each read."""
    words = [sys.executable, "-c", CODE, str(n), str(frames), "durable" if durable else ""]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        words, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="work tree of the older commit")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--frames", type=int, default=100, help="of each turn")
    parser.add_argument("--quantile", type=float, default=0.5, help="of the times (median)")
    arguments = parser.parse_args()
    kinds = [("before", arguments.before.resolve(), False), ("now", ROOT, False)]
    kinds.append(("now, durable", ROOT, True))
    times: dict[tuple[int, str, str], list[float]] = {}
    for _ in range(arguments.turns):
        for n in (24, 64):
            for label, tree, durable in kinds:
                for name, values in measure(tree, n, arguments.frames, durable).items():
                    times.setdefault((n, name, label), []).extend(values)
    print(f"{'ms a frame':<24}" + "".join(f"{label:>14}" for label, *_ in kinds))
    for n, name in dict.fromkeys(key[:2] for key in times):
        found = [times[n, name, label] for label, *_ in kinds]
        row = 1e3 * np.quantile(found, arguments.quantile, axis=1)
        print(f"{f'{n}**3 {name}':<24}" + "".join(f"{value:>14.2f}" for value in row))


if __name__ == "__main__":
    main()
