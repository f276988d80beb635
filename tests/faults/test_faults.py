"""What was acknowledged is there, what is read is what was written: under every fault.

Small here, and full size with `pytest -m slow tests/faults`; docs/reliability.md has the figures.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_jobs as jobs
from faulty_disk import Disk, run
from lost_power import Power

from densitykit.errors import TrajectoryError
from densitykit.io import durable

full_size = pytest.mark.slow
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")


def on(disk: Disk, path: Path, job: str, **options: Any) -> tuple[int, Any]:
    """Run a job on a disk, with marks in its log."""
    return run(lambda disk: jobs.JOBS[job](path, disk.mark, **options), disk)


def operations(path: Path, job: str, **options: Any) -> list[tuple[str, Any]]:
    """What a job does when nothing goes wrong; leaves nothing."""
    status, result = on(Disk(path.parent), path, job, **options)
    assert status == 0
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    return result[1]


# --- loss of power ---------------------------------------------------------------------------


def told(log: list[tuple[str, Any]]) -> int:
    """How many frames the process has been told to be synced; -1 before there is a store."""
    return ([what[1] for kind, what in log if kind == "mark"] or [-1])[-1]


def lose_power(tmp_path: Path, model: str, times: int, job: str, **options: Any) -> None:
    """Lose the power so many times, at random; then go on."""
    log = operations(tmp_path / "disk" / "a.zarr", job, **options)
    rng = np.random.default_rng(0)
    for turn in range(times):
        stop, power = int(rng.integers(len(log))), Power(tmp_path / "disk")
        for kind, what in log[:stop]:
            power.do(kind, what)
        where = tmp_path / f"dark-{turn}"
        power.fail(rng, model, where)
        synced = told(log[:stop])
        try:
            jobs.check(where / "a.zarr", synced)
        except TrajectoryError as error:
            assert synced < 0 and "does not exist" in str(error), (turn, stop, error)
        jobs.JOBS[job](where / "a.zarr", lambda mark: None)
        assert jobs.check(where / "a.zarr", jobs.MORE) >= jobs.MORE
        shutil.rmtree(where)


@pytest.fixture
def started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the machine started since the store was written, by another process."""
    monkeypatch.setattr(durable, "boot", lambda: str(os.getpid()))


@pytest.mark.parametrize("durably", [True, None, False])
@pytest.mark.parametrize("model", ["ordered", "worst"])
def test_loss_of_power(
    tmp_path: Path, model: str, durably: bool | None, started_again: None
) -> None:
    (tmp_path / "disk").mkdir()
    lose_power(tmp_path, model, 4, "pack", durable=durably)
