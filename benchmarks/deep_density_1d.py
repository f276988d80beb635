"""Cost of a Deep Density prediction of one-dimensional chains, and its scaling with size.

    python benchmarks/deep_density_1d.py

Prints, for one CPU core and chains of 8 to 1024 atoms: milliseconds per density, points per
second, and the exponent p of time ~ N**p between the larger sizes; then the ratio of one
self-consistent solution of the 8-atom chain to one prediction, both measured in the same run. The
cost does not depend on the weights: the models are untrained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch

from densitykit.chain.atomic_sum import AtomicSum1D
from densitykit.chain.deep_density import DeepDensity1D
from densitykit.chain.kohn_sham import ReducedHartreeFock1D
from densitykit.chain.smooth_density import SmoothDensity1D

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
SPACING, POINTS_PER_BOHR = 10.0, 2


def best_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Shortest of several runs, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def chain(n_atoms: int) -> np.ndarray:
    """Displaced chain, shape (n_atoms,), in bohr."""
    displaced = np.random.default_rng(0).uniform(-3, 3, n_atoms)
    return SPACING * (np.arange(n_atoms) + 0.5) + displaced


@torch.no_grad()
def prediction_seconds(model: AtomicSum1D, n_atoms: int) -> float:
    """Time of one density on two points per bohr."""
    length = SPACING * n_atoms
    points = torch.arange(int(POINTS_PER_BOHR * length)) / POINTS_PER_BOHR
    R, species = torch.from_numpy(chain(n_atoms))[None], torch.ones(n_atoms, dtype=torch.long)
    return best_seconds(lambda: model(R, species, points, length))


def main() -> None:
    torch.set_num_threads(1)
    models = {"paper, N_near = 2": DeepDensity1D((1,), n_near=2), "smooth": SmoothDensity1D((1,))}
    small = {}
    for name, model in models.items():
        model.eval()
        print(f"{name}\n{'atoms':>8}{'ms':>10}{'points/s':>12}")
        seconds = [prediction_seconds(model, n) for n in SIZES]
        for n, t in zip(SIZES, seconds, strict=True):
            print(f"{n:>8}{1e3 * t:>10.2f}{POINTS_PER_BOHR * SPACING * n / t:>12.2e}")
        rise = np.polyfit(np.log(SIZES[3:]), np.log(seconds[3:]), 1)[0]
        print(f"time ~ N**{rise:.2f} from {SIZES[3]} to {SIZES[-1]} atoms\n")
        small[name] = seconds[0]
    for system, width in (("insulator", 1.0), ("metal", 6.0)):
        kohn_sham = ReducedHartreeFock1D(chain(8), width, tolerance=1e-8)
        solve = best_seconds(kohn_sham.solve, repeats=2)
        ratios = ", ".join(f"{math.floor(solve / t)} x {name}" for name, t in small.items())
        print(f"{system}: a self-consistent solution takes {1e3 * solve:.0f} ms = {ratios}")


if __name__ == "__main__":
    main()
