"""An engine for tests: analytic, cheap, willing to fail, and light to import in workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

EDGE, SIGMA, SPRING = 4.0, 0.6, 0.3  # angstrom, angstrom, eV/angstrom**2


class Gaussians(Calculator):
    """One electron per atom, Gaussian; atoms bound to the origin by springs.

    Each start, solve and end of a solve is a line of the log: a process may be killed between.
    A file `poison-INDEX` beside the log makes that snapshot fail: "die" kills the worker,
    "die once" so that the next one lives.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self, log: Path, seconds: float = 0.0, sigma: float = SIGMA) -> None:
        super().__init__()
        self.log, self.seconds, self.sigma = log, seconds, sigma
        self._note("engine")

    def _note(self, text: str) -> None:
        with self.log.open("a") as file:  # short lines reach the file in one piece
            file.write(f"{text} {os.getpid()}\n")

    def calculate(
        self, atoms: Atoms, properties: Any = ("energy",), changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, changes)
        self.index = round(atoms.positions[0, 0] * 10)
        self._note(f"solve {self.index}")
        poison = self.log.with_name(f"poison-{self.index}")
        if poison.exists() and poison.read_text() in ("die", "die once"):
            if poison.read_text() == "die once":
                poison.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if poison.exists() and poison.read_text() == "raise":
            raise ArithmeticError("no convergence")
        time.sleep(self.seconds)
        R = atoms.positions
        self.results = {"energy": 0.5 * SPRING * (R**2).sum(), "forces": -SPRING * R}

    def density(self, shape: tuple[int, int, int]) -> np.ndarray:
        density = gaussians(self.atoms, shape, self.sigma)
        poison = self.log.with_name(f"poison-{self.index}")
        if poison.exists() and poison.read_text() == "nan":
            density[0, 0, 0] = np.nan
        self._note(f"done {self.index}")
        return density

    def description(self) -> dict[str, Any]:
        return {"engine": "periodic Gaussians", "sigma": self.sigma}

    def close(self) -> None:
        self._note("close")


def gaussians(atoms: Atoms, shape: tuple[int, int, int], sigma: float = SIGMA) -> np.ndarray:
    """Return the density in an orthorhombic cell, from its Fourier series."""
    axes = [
        2 * np.pi * np.fft.fftfreq(n, edge / n)
        for n, edge in zip(shape, atoms.cell.lengths(), strict=True)
    ]
    waves = np.zeros(shape, complex)
    for R in atoms.positions:
        x, y, z = (
            np.exp(-1j * q * r - 0.5 * (sigma * q) ** 2) for q, r in zip(axes, R, strict=True)
        )
        waves += x[:, None, None] * y[:, None] * z
    return np.fft.ifftn(waves).real * waves.size / atoms.get_volume()


def geometries(n: int, *, seed: int, progress: bool = False) -> list[Atoms]:
    """Two hydrogen atoms; the first tells the index of the snapshot by its position."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(n):
        R = np.array([[0.1 * index, 0.0, 0.0], rng.uniform(0, EDGE, 3)])
        found.append(Atoms("H2", R, cell=3 * [EDGE], pbc=True))
        found[-1].info = {"temperature": 300.0, "time": 5.0 * (index + 1), "source": "random"}
    return found
