"""Cost of the one-dimensional Kohn-Sham model: a solution, an MD step, and where the time goes.

    OMP_NUM_THREADS=1 python benchmarks/kohn_sham_1d.py

All numbers are CPU times of one run of this script; compare ratios, not times. The dense solver
beside it is the textbook one: a matrix of 256 grid points, diagonalised in full.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from densitykit.chain.dynamics import SYSTEMS, TIME_STEP, _Dynamics
from densitykit.chain.kohn_sham import ReducedHartreeFock1D
from densitykit.chain.scf import AndersonMixing, fermi_dirac
from densitykit.chain.screening import InverseDielectric, solve_screened


def milliseconds(task: Callable[[], object], repeats: int = 7) -> float:
    """Shortest CPU time of some repetitions."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        task()
        best = min(best, time.process_time() - started)
    return 1e3 * best


def chain(widths: list[float], **options: float) -> ReducedHartreeFock1D:
    n = len(widths)
    R = 10.0 * np.arange(n) + 5 + np.random.default_rng(0).uniform(-3, 3, n)
    return ReducedHartreeFock1D(R, widths, 2.0, 10.0 * n, n_grid=20 * n, **options)


def widths_of(system: str, n: int) -> list[float]:
    kinds = SYSTEMS[system]
    return [width for width in kinds for _ in range(n // len(kinds))]


def parts(model: ReducedHartreeFock1D) -> dict[str, float]:
    """Milliseconds of the parts of one iteration."""
    solution, basis = solve_screened(model), model.basis
    eps, C = basis.diagonalise(solution.V_k, model.n_bands)
    _, f = fermi_dirac(eps, model.n_electrons, model.temperature)
    rng, shape = np.random.default_rng(0), len(basis.k)
    mixing = AndersonMixing(model.mixing_dimension, model.mixing)
    for _ in range(model.mixing_dimension):
        mixing(*(rng.normal(size=(2, shape)) + 1j))
    build = milliseconds(partial(basis.hamiltonian, solution.V_k))
    return {
        "build": build,
        "diagonalise": milliseconds(partial(basis.diagonalise, solution.V_k, model.n_bands))
        - build,
        "occupations": milliseconds(partial(fermi_dirac, eps, model.n_electrons, 1e-3)),
        "density": milliseconds(partial(basis.density, C, f)),
        "mixing": milliseconds(lambda: mixing(*(rng.normal(size=(2, shape)) + 1j))),
    }


def dense_iteration(n: int = 256, length: float = 80.0) -> float:
    """Milliseconds of one iteration on a grid: matrix, all eigenvectors, density."""
    k = 2 * np.pi * np.fft.fftfreq(n, length / n)
    kinetic = np.fft.ifft(0.5 * k[:, None] ** 2 * np.fft.fft(np.eye(n), axis=0), axis=0).real
    V = np.cos(2 * np.pi * np.arange(n) / n)

    def iterate() -> np.ndarray:
        _, psi = np.linalg.eigh(kinetic + np.diag(V))
        return (psi**2) @ np.ones(n)

    return milliseconds(iterate)


def main() -> None:
    dense = dense_iteration()
    print(f"dense grid of 256 points: {dense:.1f} ms an iteration\n")
    print("8 atoms, share of an iteration")
    names = ("build", "diagonalise", "occupations", "density", "mixing")
    print(f"{'':<11}{'basis':>6}{'ms':>7}{'dense/this':>12}" + "".join(f"{n:>13}" for n in names))
    for system in SYSTEMS:
        model = chain(widths_of(system, 8))
        shares = parts(model)
        total = sum(shares.values())
        row = "".join(f"{shares[name] / total:>13.0%}" for name in names)
        print(f"{system:<11}{model.basis.n_basis:>6}{total:>7.2f}{dense / total:>12.1f}{row}")
    print("\n8 atoms, a solution to 1e-10 (ms) and a step of molecular dynamics")
    print(f"{'':<11}{'solve':>8}{'iterations':>12}{'screened':>10}{'iterations':>12}", end="")
    print(f"{'MD step':>9}{'iterations':>12}{'preconditioner':>16}")
    for system in SYSTEMS:
        model = chain(widths_of(system, 8))
        solve = milliseconds(model.solve, 3)
        screened = milliseconds(partial(solve_screened, model), 3)
        quick = solve_screened(model)
        dynamics, count, iterations = _Dynamics(model, 1.0, TIME_STEP, None), 100, 0
        started = time.process_time()
        for _ in range(count):
            dynamics.advance()
            iterations += dynamics.solution.iterations
        step = 1e3 * (time.process_time() - started) / count
        matrix = milliseconds(partial(InverseDielectric, model, quick.V_k, 3.0), 3)
        print(f"{system:<11}{solve:>8.1f}{model.solve().iterations:>12}{screened:>10.1f}", end="")
        print(f"{quick.iterations:>12}{step:>9.2f}{iterations / count:>12.1f}{matrix:>16.1f}")
    print("\nscaling of an iteration (metal): ms, and exponent from the row above")
    previous = None
    for n in (8, 16, 32, 64, 128):
        model = chain([6.0] * n)
        V = model.K * (model.initial_density() + model.pseudo_charge())
        cost = milliseconds(partial(model.basis.diagonalise, V, model.n_bands), 3)
        exponent = "" if previous is None else f"{np.log2(cost / previous):>8.1f}"
        print(f"{n:>5} atoms{model.basis.n_basis:>7} functions{cost:>10.2f}{exponent}")
        previous = cost


if __name__ == "__main__":
    main()
