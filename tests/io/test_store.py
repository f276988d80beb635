"""Stores as folders: one writer at a time, and hands off what is not ours."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr

from densitykit.errors import TrajectoryError
from densitykit.io import store
from densitykit.io.reader import open_split, open_trajectory
from densitykit.io.rebuild import (
    extend_trajectory,
    free_cell,
    pack_trajectory,
    trim_trajectory,
)
from densitykit.io.splits import write_splits
from densitykit.io.store import load_arrays, save_arrays
from densitykit.io.writer import TrajectoryWriter, create_trajectory

Make = Callable[..., Path]
RHO = np.ones((8, 8, 8))
ONE = {"train": {"run": ".", "start": 0, "stop": 2}}
CHANGES = {
    "append": TrajectoryWriter,
    "extend": lambda path: extend_trajectory(path, 20),
    "trim": trim_trajectory,
    "free": free_cell,
    "pack": pack_trajectory,
    "splits": lambda path: write_splits(path, ONE),
    "create": lambda path: create_trajectory(
        path, n_frames=1, grid=(2,), cell=1.0, overwrite=True
    ),
}
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locks")
HOLD = """
import sys
from densitykit.io.writer import TrajectoryWriter
writer = TrajectoryWriter(sys.argv[1])
print("holding", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_writer(path: Path) -> Iterator[subprocess.Popen]:
    words = [sys.executable, "-c", HOLD, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, **pipes, env=environment, text=True) as process:
        assert process.stdout.readline() == "holding\n"
        try:
            yield process
        finally:
            process.kill()


# --- one writer ------------------------------------------------------------------------------


@posix
def test_a_second_process_is_refused_until_the_first_is_gone(mock_trajectory: Make) -> None:
    """Also through a link; reading never waits, and a kill releases the lock."""
    path = mock_trajectory(n_committed=3)
    link = path.with_name("link.zarr")
    link.symlink_to(path)
    with another_writer(path) as process:
        for change in CHANGES.values():
            for name in (path, link):
                with pytest.raises(TrajectoryError) as caught:
                    change(name)
                for part in ("being written", f"process {process.pid} ", socket.gethostname()):
                    assert part in str(caught.value)
        assert open_trajectory(path).sizes["time"] == 3
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert TrajectoryWriter(path).append(RHO, 6.0) == 3
    assert sorted(os.listdir(path.parent)) == ["link.zarr", path.name]  # no lock is left


@posix
def test_a_fork_does_not_inherit_the_lock(mock_trajectory: Make) -> None:
    path = mock_trajectory(n_committed=3)
    with TrajectoryWriter(path) as writer:
        process = multiprocessing.get_context("fork").Process(target=TrajectoryWriter, args=[path])
        process.start()
        process.join()
        assert process.exitcode == 1  # refused
        assert writer.append(RHO, 6.0) == 3


def test_the_newest_writer_of_a_process_has_the_store(mock_trajectory: Make) -> None:
    path = mock_trajectory(n_committed=3)
    old, new = TrajectoryWriter(path), TrajectoryWriter(path)
    write_splits(path, ONE)  # changes no frames: the writer goes on
    assert new.append(RHO, 6.0) == 3
    newest = extend_trajectory(path, 20)
    for writer in (old, new):
        with pytest.raises(TrajectoryError, match="opened since; use the newest writer"):
            writer.append(RHO, 8.0)
    assert newest.append(RHO, 8.0) == 4
    newest.close()
    with pytest.raises(TrajectoryError, match="this writer is closed"):
        newest.append(RHO, 10.0)


@posix
def test_where_there_are_no_locks_a_lease_runs_out(
    mock_trajectory: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process is refused while the lease lasts, and has the store when it has run out."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.fcntl, "lockf", no_locks)
    path = mock_trajectory(n_committed=3)
    lease = path.with_name(".mock.zarr.densitykit-lease")
    with TrajectoryWriter(path) as writer:
        assert f"process {os.getpid()} on {socket.gethostname()}" in lease.read_text()
        assert writer.append(RHO, 6.0) == 3
    assert not lease.exists()
    lease.write_text("process 1 on node-7\n")
    with pytest.raises(TrajectoryError, match="written by process 1 on node-7; wait [23]"):
        TrajectoryWriter(path)
    long_ago = lease.stat().st_mtime - store.LEASE
    os.utime(lease, (long_ago, long_ago))
    TrajectoryWriter(path).close()
    assert os.listdir(path.parent) == [path.name]


# --- what is not ours ------------------------------------------------------------------------


def test_overwriting_spares_what_only_looks_like_a_store(tmp_path: Path) -> None:
    path = tmp_path / "thesis"
    for zarr_group in (False, True):
        (path / "density").mkdir(parents=True, exist_ok=True)
        (path / "density" / "chapter-1.tex").write_text("precious")
        if zarr_group:
            zarr.open_group(path).create_array("density", shape=(2,), dtype="f4", overwrite=False)
        with pytest.raises(TrajectoryError, match="choose another path"):
            create_trajectory(path, n_frames=1, grid=(2,), cell=1.0, overwrite=True)
        assert (path / "density" / "chapter-1.tex").read_text() == "precious"


def test_neighbours_of_similar_names_are_spared(mock_trajectory: Make, tmp_path: Path) -> None:
    path, mine = mock_trajectory("a.zarr", n_committed=3), []
    for name in (".a.zarr.new", ".a.zarr.old", ".a.zarr.partial", "a.zarr.part", "a.zarr.lock"):
        mine.append(tmp_path / name)
        mine[-1].write_text("precious")
    (tmp_path / ".b.zarr.new").mkdir()
    extend_trajectory(path, 20)
    trim_trajectory(path)
    pack_trajectory(path)
    create_trajectory(path, n_frames=1, grid=(2,), cell=1.0, overwrite=True)
    save_arrays(tmp_path / "a.zarr.npz", {"x": np.ones(2)})
    assert load_arrays(tmp_path / "a.zarr.npz")["x"].tolist() == [1, 1]
    assert all(file.read_text() == "precious" for file in mine)
    names = {".b.zarr.new", "a.zarr", "a.zarr.npz", *(file.name for file in mine)}
    assert set(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - {"append"}))
def test_links_stay_and_their_target_is_changed(
    name: str, mock_trajectory: Make, tmp_path: Path
) -> None:
    (tmp_path / "far").mkdir()
    path, link = mock_trajectory("far/a.zarr", n_committed=3), tmp_path / "link.zarr"
    link.symlink_to(path)
    CHANGES[name](link)
    assert link.is_symlink() and link.resolve() == path.resolve()
    assert os.listdir(tmp_path / "far") == ["a.zarr"]
    assert sorted(os.listdir(tmp_path)) == ["far", "link.zarr"]
    if name == "splits":
        assert open_split(path, "train").sizes["time"] == 2
    elif name != "create":
        last = open_trajectory(path).attrs["history"].splitlines()[-1]
        assert any(word in last for word in ("extended", "trimmed", "a cell for", "packed"))
