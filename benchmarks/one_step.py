"""Cost of one step of each bundled model, as ratios measured in one run.

    python benchmarks/one_step.py

Prints, for one CPU core: floating-point operations of a step, the rate reached, its ratio to the
rate of a large matrix product in the same process (the arithmetic limit), and the ratio of
ab-initio MD time (from the attributes of the trajectory) to emulator time for the same simulated
time.
"""

from __future__ import annotations

from pathlib import Path

import torch

from densitykit.assess.cost import (
    ab_initio_seconds,
    matrix_rate,
    operations_per_step,
    seconds_per_step,
)
from densitykit.data.windows import load_windows
from densitykit.models import load_model

DATA = "data/lithium-800K.zarr"


def main() -> None:
    torch.set_num_threads(1)
    test = load_windows(DATA, "test", 12.0)
    attrs, ab_initio = test.attrs, ab_initio_seconds(test.attrs) * test.horizon
    limit = matrix_rate()
    print(f"ab-initio MD: {attrs['seconds_per_step_one_core']} s per {attrs['time_step_fs']} fs")
    print(f"matrix product {limit / 1e9:.0f} GFLOP/s on one core")
    print(f"{'model':<24}{'GFLOP':>8}{'ms/step':>9}{'of limit':>10}{'x ab initio':>13}")
    for path in sorted(Path("data/checkpoints").glob("lithium-*.safetensors")):
        model = load_model(path)
        operations = operations_per_step(model, test)
        seconds = seconds_per_step(model, test[0])
        share = operations / seconds / limit
        print(
            f"{path.stem:<24}{operations / 1e9:>8.2f}{seconds * 1e3:>9.1f}{share:>10.0%}"
            f"{ab_initio / seconds:>13.0f}"
        )


if __name__ == "__main__":
    main()
