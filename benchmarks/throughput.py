"""Frames a second of the bundled models as a function of batch, on a GPU if there is one.

    python benchmarks/throughput.py [--batches 1 4 16 64]

One CPU core otherwise. Beside each rate stands the share of a large matrix product in single
precision on the same device, which is the arithmetic limit; for the emulator with nuclei the
operations of its residual net alone are counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from densitykit.assess.cost import matrix_rate, operations_per_step, seconds_per_step
from densitykit.data.windows import load_windows
from densitykit.models import load_model

DATA = "data/lithium-800K.zarr"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    batches = parser.parse_args().batches
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = matrix_rate(8192 if device.type == "cuda" else 1536, device=device)
    print(f"{device}: matrix product {limit / 1e12:.3g} TFLOP/s")
    print(f"{'model':<24}{'batch':>6}{'frames/s':>10}{'of limit':>10}")
    test = load_windows(DATA, "test", 12.0)
    for path in sorted(Path("data/checkpoints").glob("lithium-*.safetensors")):
        model = load_model(path).to(device)
        flop = operations_per_step(model, test)
        for batch in batches:
            window = test[torch.arange(batch) * (len(test) // batch)]
            rate = batch / seconds_per_step(model, window, repeats=5)
            print(
                f"{path.stem:<24}{batch:>6}{rate:>10.1f}{rate * flop / limit:>10.0%}", flush=True
            )


if __name__ == "__main__":
    main()
