"""Fixtures shared by all tests: an analytic trajectory of any size.

The density is a sum of plane waves that move through the cell: smooth, positive, periodic, and
with an electron number that is exact on any grid, because each wave sums to zero.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densitykit.io.writer import create_trajectory

TIME_STEP = 2.0  # fs
PERIOD = 40.0  # fs, after which the slowest wave has crossed the cell


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here tests a loss of power but tests/faults, which has its own disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def _mock_density(
    time: float, grid: tuple[int, ...] = (8, 8, 8), edge: float = 6.0, n_electrons: float = 4.0
) -> np.ndarray:
    """Return the density at a time in fs, in angstrom**-d, shape `grid`."""
    axes = np.meshgrid(*(np.arange(n) / n for n in grid), indexing="ij")
    waves = np.zeros(grid)
    for i, axis in enumerate(axes):
        phase = time / PERIOD * (i + 1)
        waves += 0.5 * np.cos(2 * np.pi * (axis - phase)) + 0.2 * np.sin(4 * np.pi * axis + phase)
    return n_electrons / edge ** len(grid) * (1 + waves / len(grid))


@pytest.fixture
def mock_density() -> Callable[..., np.ndarray]:
    """Give the analytic density as a function of time (fs), grid, edge and electron number."""
    return _mock_density


def _write(
    path: Path,
    *,
    n_frames: int = 8,
    n_committed: int | None = None,
    grid: tuple[int, ...] = (8, 8, 8),
    n_atoms: int = 4,
    edge: float = 6.0,
    **options: Any,
) -> None:
    rng = np.random.default_rng(0)
    start = rng.uniform(0, edge, (n_atoms, len(grid)))
    velocities = rng.normal(0, 0.01, start.shape)
    numbers = [3] * n_atoms if n_atoms else None
    writer = create_trajectory(
        path, n_frames=n_frames, grid=grid, cell=edge, numbers=numbers, **options
    )
    for frame in range(n_frames if n_committed is None else n_committed):
        time, atoms = TIME_STEP * frame, {}
        if n_atoms:
            atoms = {"positions": start + velocities * time, "velocities": velocities}
            atoms["forces"] = np.zeros_like(start)
        density = _mock_density(time, grid, edge, n_atoms or 4.0)
        writer.append(density, time, **atoms, energy=-1.0, temperature=300.0)


@pytest.fixture(scope="session")
def _templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give a cache of written trajectories: to copy one is far cheaper than to write it."""
    return defaultdict(lambda: tmp_path_factory.mktemp("template") / "mock.zarr")


@pytest.fixture
def mock_trajectory(tmp_path: Path, _templates: dict[str, Path]) -> Callable[..., Path]:
    """Give `make(name="mock.zarr", **options) -> path`, which writes an analytic trajectory.

    Options and defaults: `n_frames=8`, `n_committed=None` (all), `grid=(8, 8, 8)`, `n_atoms=4`,
    `edge=6.0`; others go to `create_trajectory`. Frames are 2 fs apart in a cubic cell, with one
    electron per atom (4 without atoms); the atoms move uniformly. A name such as
    `"li.zarr/run-1"` makes one run of a bigger store.
    """

    def make(name: str = "mock.zarr", **options: Any) -> Path:
        path = tmp_path / name
        if path.parent != tmp_path:
            _write(path, **options)
            return path
        template = _templates[repr(sorted(options.items()))]
        if not template.exists():
            _write(template, **options)
        return Path(shutil.copytree(template, path))

    return make
