"""What was acknowledged is there, what is read is what was written: under every fault.

Small here, full size with `pytest -m slow tests/faults`; docs/reliability.md has the figures.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import store_jobs as jobs
from density_files import cube
from faulty_disk import Disk, Ended, run
from lost_power import Power

from densitykit.errors import TrajectoryError
from densitykit.io import durable
from densitykit.io.rebuild import extend_trajectory, pack_trajectory
from densitykit.io.validate import validate_trajectory
from densitykit.io.writer import TrajectoryWriter

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")


def sized(small: int, full: int) -> pytest.MarkDecorator:
    """Give a test its number of faults: a small one, and the full one among the slow tests."""
    both = [small, pytest.param(full, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
    return pytest.mark.parametrize("times", both)


def on(disk: Disk, job: str, durably: bool | None = None) -> Ended:
    """Run a job on a disk, with marks in its log."""
    path = Path(disk.root) / "a.zarr"
    return run(lambda disk: jobs.JOBS[job](path, disk.mark, durably), disk)


def operations(root: Path, job: str, durably: bool | None = None) -> list:
    """What a job does when nothing goes wrong; leaves nothing."""
    root.mkdir()
    ended = on(Disk(root), job, durably)
    assert ended.status == 0
    shutil.rmtree(root)
    return ended.log


def assert_goes_on(root: Path, job: str, told: int) -> None:
    """The frames that a process was told of are there (-1: no store), and the job ends well."""
    try:
        jobs.check(root / "a.zarr", told)
    except TrajectoryError as error:
        assert told < 0 and "does not exist" in str(error), error
    jobs.JOBS[job](root / "a.zarr", lambda mark: None)
    jobs.check(root / "a.zarr", jobs.MORE)
    assert os.listdir(root) == ["a.zarr"]
    shutil.rmtree(root)


# --- loss of power ---------------------------------------------------------------------------


@pytest.fixture
def started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the machine started since the store was written, by another process."""
    monkeypatch.setattr(durable, "boot", lambda: str(os.getpid()))


@sized(2, 34)
@pytest.mark.parametrize("durably", [True, None, False])
@pytest.mark.parametrize("model", ["ordered", "worst"])
def test_loss_of_power(
    tmp_path: Path, model: str, durably: bool | None, times: int, started_again: None
) -> None:
    log, rng = operations(tmp_path / "disk", "pack", durably), np.random.default_rng(0)
    for turn in range(times):
        stop, power = int(rng.integers(len(log))), Power(tmp_path / "disk")
        for kind, what in log[:stop]:
            power.do(kind, what)
        power.fail(rng, model, tmp_path / f"dark-{turn}")
        synced = [what[1] for kind, what in log[:stop] if kind == "mark"]
        assert_goes_on(tmp_path / f"dark-{turn}", "pack", synced[-1] if synced else -1)


# --- killed, and refused by the system -------------------------------------------------------


@sized(4, 200)
@pytest.mark.parametrize("fault", ["kill", "half"])
def test_killed(tmp_path: Path, fault: str, times: int) -> None:
    """At every operation in turn, or evenly among them."""
    n = sum(kind != "mark" for kind, _ in operations(tmp_path / "disk", "pack"))
    for at in np.linspace(0, n - 1, times).astype(int):
        (tmp_path / f"{at}").mkdir(exist_ok=True)
        ended = on(Disk(tmp_path / f"{at}", fault, int(at)), "pack")
        assert ended.status in (-signal.SIGKILL, 0)  # 0: this time there were fewer operations
        assert_goes_on(tmp_path / f"{at}", "pack", ended.marks[-1][0] if ended.marks else -1)


@sized(3, 1300)
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EACCES"])
def test_refused(tmp_path: Path, fault: str, times: int) -> None:
    """A conversion that the system refuses something says so in one line, and can be run again."""
    times = times if fault == "ENOSPC" else min(times, 200)
    files = [cube(tmp_path / f"{i}.cube", 0.1 * i) for i in range(4)]
    root, words = tmp_path / "disk", ["--time-step", 1, "--unit", "bohr", "--clip"]

    def convert(disk: Disk) -> tuple[int, str]:
        return jobs.command("convert", root / "a.zarr", *files, *words)

    root.mkdir()
    n = len(run(convert, Disk(root)).log)
    for at in np.linspace(0, n - 1, times).astype(int):
        shutil.rmtree(root)
        root.mkdir()
        ended = run(convert, Disk(root, fault, int(at)))
        code, text = ended.result
        assert code in (0, 2), (at, text)
        said = [line for line in text.splitlines() if not line.startswith("converting")]
        assert code == 0 or len(said) == 1 and said[0].startswith("densitykit: "), (at, text)
        assert run(convert, Disk(root)).result[0] == 0, (at, text)
        assert validate_trajectory(root / "a.zarr") == []


# --- flipped bits ----------------------------------------------------------------------------


@sized(25, 1000)
@pytest.mark.parametrize("packed", [False, True])
def test_every_flipped_bit_is_noticed(tmp_path: Path, packed: bool, times: int) -> None:
    """In densities, positions, marks, what is constant, and metadata: one at a time."""
    path, rng = tmp_path / "a.zarr", np.random.default_rng(0)
    (jobs.pack if packed else jobs.write)(path, lambda mark: None)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {f.parent.name for f in files} >= {"a.zarr", "density", "positions", "time", "cell"}
    for _ in range(times):
        file = files[rng.integers(len(files))]
        data = bytearray(whole := file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
        assert validate_trajectory(path) != [], file
        file.write_bytes(whole)
    assert validate_trajectory(path) == []


# --- two at once -----------------------------------------------------------------------------

SECOND = {
    "writer": lambda path: TrajectoryWriter(path).append(**jobs.frame(3)),
    "pack": pack_trajectory,
    "extend": lambda path: extend_trajectory(path, 20),
}


@sized(2, 100)
@pytest.mark.parametrize("second", SECOND)
def test_the_second_is_refused(tmp_path: Path, second: str, times: int) -> None:
    """While a writer appends, at any moment of it, another process does not get in."""
    for turn in range(times):
        path, (reading, writing) = tmp_path / f"{turn}.zarr", os.pipe()
        jobs.create_trajectory(path, n_frames=4, grid=(4, 4, 4), cell=3.0, numbers=[3, 3]).close()
        with TrajectoryWriter(path) as writer:
            child = os.fork()
            if not child:
                os._exit(_refused(SECOND[second], path, reading))
            writer.append(**jobs.frame(0))
            os.write(writing, b"!")
            writer.append(**jobs.frame(1))
            writer.append(**jobs.frame(2))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.close(reading), os.close(writing)
        assert jobs.check(path, 3) == 3


def _refused(act: Callable[[Path], object], path: Path, reading: int) -> int:
    """Wait for the other to be at it; 0 if we were refused."""
    os.read(reading, 1)
    try:
        act(path)
    except TrajectoryError as error:
        return int("being written" not in str(error))
    return 2
