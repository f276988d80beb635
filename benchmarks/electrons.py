"""Cost of a step of the time-dependent Kohn-Sham equation of a chain, beside matrix products.

    OMP_NUM_THREADS=1 python benchmarks/electrons.py

A step has six potential parts with two FFTs of all orbitals each. Beside it: those FFTs alone; the
same by dense matrices (each FFT pair a complex product, points x points by points x orbitals); and
the time that the operations of the FFTs, 5 n log2 n each, would take at the rate of that product,
which no code reaches. CPU times of one run; compare ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from scipy.fft import fft, ifft

from densitykit.chain.dynamics import SYSTEMS, random_chain
from densitykit.chain.electrons import ElectronDynamics, Kick


def milliseconds(task: Callable[[], object], repeats: int = 20) -> float:
    """Shortest CPU time of some repetitions."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        task()
        best = min(best, time.process_time() - started)
    return 1e3 * best


def main() -> None:
    print(f"{'8 atoms':<11}{'orbitals':>9}{'points':>8}{'step (ms)':>11}", end="")
    print(f"{'step/FFTs':>11}{'step/dense':>12}{'step/limit':>12}")
    for system in SYSTEMS:
        model = random_chain(system, 8, seed=0, displacement=1.0, spacing=10.0)
        electrons = ElectronDynamics.of(model, field=Kick(0.01))
        psi, (count, points) = electrons.orbitals, electrons.waves.shape
        step = milliseconds(electrons.advance)
        ffts = 6 * milliseconds(lambda psi=psi: fft(ifft(psi)))
        matrix = np.exp(1j * np.outer(np.arange(points), np.arange(points)))
        product = milliseconds(lambda m=matrix, p=psi: p @ m)
        rate = 8 * count * points**2 / product  # operations a millisecond
        limit = 12 * count * 5 * points * np.log2(points) / rate
        row = f"{system:<11}{count:>9}{points:>8}{step:>11.2f}{step / ffts:>11.1f}"
        print(f"{row}{step / (6 * product):>12.2f}{step / limit:>12.1f}")


if __name__ == "__main__":
    main()
