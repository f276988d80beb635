"""How long a reader waits: import, --help, the first figure; and how fast the explorers follow.

    python benchmarks/first_look.py

Each row is a process of its own, the best of three. Explorers are moved from frame to frame as
fast as the kernel can make their figures, counted in processor time; what the browser needs to
draw them comes on top of that.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import densitykit as dk
run = dk.open_trajectory("data/lithium-800K.zarr/run-2")
"""
MOVE = """
def move(explorer, frames=20):
    values = [value for _, value in explorer.time.options[:frames]]
    explorer.time.value = values[1]
    started = time.process_time()
    for value in values:
        explorer.time.value = value
    print("rate", len(values) / (time.process_time() - started))
"""
JOBS = {
    "python itself": "",
    "import densitykit": "import densitykit",
    "densitykit --help": "import sys; sys.argv = ['densitykit', '--help']\n"
    "from densitykit.cli import main\n"
    "try:\n    main()\nexcept SystemExit:\n    pass",
    "open a trajectory": RUN,
    "first slice": RUN + "dk.plot.slice_figure(run.isel(time=[0])).to_json()",
    "first surface in space": RUN + "dk.plot.isosurface(run.isel(time=[0])).to_json()",
    "first explorer": RUN + "dk.explore(run)",
    "explorer, from frame to frame": RUN + MOVE + "move(dk.explore(run))",
    "comparison, from frame to frame": RUN
    + MOVE
    + "from densitykit.plot.explore import compare\n"
    + "other = dk.open_trajectory('data/lithium-800K.zarr/run-1')\n"
    + "move(compare(run, other))",
}
TIMED = "import time, resource; _started = time.perf_counter()\n{job}\n"
TIMED += "_used = resource.getrusage(resource.RUSAGE_SELF)\n"
TIMED += "print('wall', time.perf_counter() - _started, _used.ru_utime + _used.ru_stime)"


def measure(job: str) -> dict[str, float]:
    """Seconds of a job, also of the processor with the start of python, and frames a second."""
    found = subprocess.run(
        [sys.executable, "-c", TIMED.format(job=job)], cwd=ROOT, capture_output=True, text=True
    )
    found.check_returncode()
    words = [line.split() for line in found.stdout.splitlines() if line[:4] in ("wall", "rate")]
    wall, processor = map(float, words[-1][1:])
    row = {"frames a second": float(words[0][1])} if words[0][0] == "rate" else {}
    return {"seconds": wall, "of the processor": processor} | row


def main() -> None:
    rows = {}
    for name, job in JOBS.items():
        tries = pd.DataFrame([measure(job) for _ in range(3)])
        rows[name] = tries.agg({c: "max" if "frames" in c else "min" for c in tries})
        print(f"{name}: {rows[name].round(2).to_dict()}", flush=True)
    table = pd.DataFrame(rows).T
    table.loc[table["frames a second"].notna(), ["seconds", "of the processor"]] = None
    print(table.map(lambda x: "" if pd.isna(x) else f"{x:.2f}").to_string())


if __name__ == "__main__":
    main()
