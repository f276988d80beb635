"""Static data sets: complete, in order, and whole after any death. The engine is analytic."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time as clock
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ase")

import xarray as xr
from analytic_engine import SPRING, Gaussians, gaussians, geometries
from ase import Atoms

from densitykit.errors import GenerationError, UnfinishedError
from densitykit.generate.jobs import evaluate
from densitykit.generate.snapshots import System, generate_snapshots, grid_shape
from densitykit.io.reader import open_split, open_trajectory
from densitykit.io.validate import validate_trajectory

SPLITS = {"train": 3, "validation": 1, "test": 2}


def make(log: Path, seconds: float = 0.0) -> System:
    engine = partial(Gaussians, log, seconds)
    return System("pairs", geometries, engine, spacing=0.4, keepbits=10, splits=SPLITS)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


def one_by_one(engine: Any, missing: Any, shape: Any, **options: Any) -> Any:
    """Replace the worker processes, in the worst order: all parts have to wait."""
    for index in sorted(missing, reverse=True):
        yield index, evaluate(engine, missing[index], shape, f"snapshot {index}")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densitykit.generate.snapshots.evaluate_all", one_by_one)


def count(log: Path, event: str) -> list[int]:
    """Return the indices of the snapshots with this event in the log."""
    return [int(line.split()[1]) for line in log.read_text().splitlines() if event in line]


def frames(path: Path) -> xr.Dataset:
    """Read what must not depend on the course of events."""
    return open_trajectory(path).drop_vars("seconds").drop_attrs().load()


def assert_right(path: Path, n: int = 6, seed: int = 0) -> None:
    ds = open_trajectory(path)
    assert validate_trajectory(path) == []
    expected = geometries(n, seed=seed)
    np.testing.assert_array_equal(ds["positions"], [a.positions for a in expected])
    np.testing.assert_array_equal(ds["time"], 5.0 * np.arange(1, n + 1))
    np.testing.assert_array_equal(ds["forces"], -SPRING * ds["positions"])
    np.testing.assert_allclose(
        ds["energy"], 0.5 * SPRING * (ds["positions"] ** 2).sum(("atom", "cartesian"))
    )
    density = np.array([gaussians(a, (10, 10, 10)) for a in expected])
    np.testing.assert_allclose(ds["density"], density, rtol=2.0**-10)
    np.testing.assert_allclose(ds["n_electrons"], 2, rtol=1e-3)


def test_grid_shape() -> None:
    atoms = Atoms(cell=[4.0, 5.01, 9.9])
    assert grid_shape(atoms, 0.4) == (10, 14, 26)
    assert max(atoms.cell.lengths() / grid_shape(atoms, 0.4)) <= 0.4


def test_data_set(log: Path) -> None:
    path = generate_snapshots(make(log), log.with_name("pairs.zarr"), progress=False)
    assert_right(path)
    ds = open_trajectory(path)
    assert ds.attrs["engine"] == "periodic Gaussians" and ds.attrs["seed"] == 0
    assert ds["density"].attrs["keepbits"] == 10 and (ds["seconds"] > 0).all()
    assert sorted(os.listdir(path.parent)) == ["log", "pairs.zarr"]  # no working folder
    for name, length in SPLITS.items():
        assert open_split(path, name).sizes["time"] == length
    assert sorted(count(log, "solve")) == [0, 1, 2, 3, 4, 5]
    starts = [line for line in log.read_text().splitlines() if "engine" in line]
    assert len(starts) == 1  # one engine for all snapshots of a worker
    assert log.read_text().splitlines()[-1].startswith("close")
    # once more: there is nothing to do
    before = log.read_text()
    generate_snapshots(make(log), path, progress=False)
    assert log.read_text() == before and sorted(os.listdir(path.parent)) == ["log", "pairs.zarr"]
    other = partial(geometries, seed=0)
    for changed, options, named in (
        (make(log), {"seed": 1}, "seed is 0, not 1"),
        (replace(make(log), name="other"), {}, "system is pairs, not other"),
        (replace(make(log), keepbits=9), {}, "keepbits is 10, not 9"),
        (replace(make(log), geometries=other), {}, "geometries is geometries, not geom.*seed=0"),
        (make(log, 0.1), {}, r"engine is Gaussians\(.*, 0.0\), not Gaussians\(.*, 0.1\)"),
    ):
        with pytest.raises(UnfinishedError, match=f"pairs.zarr: .*{named}.*--restart"):
            generate_snapshots(changed, path, progress=False, **options)
    assert_right(path)
    generate_snapshots(make(log), path, seed=1, progress=False, restart=True)
    assert_right(path, seed=1)


def test_runs_of_one_store(log: Path, in_this_process: None) -> None:
    root = log.with_name("pairs.zarr")
    for run, n in (("300K", 6), ("600K", 12)):
        generate_snapshots(make(log), root / run, n, seed=n, workers=2, progress=False)
        assert_right(root / run, n, seed=n)
    sizes = {"train": 3, "validation": 1, "test": 2}
    for name, size in sizes.items():
        assert open_split(root, f"{name}-300K").sizes["time"] == size
        assert open_split(root, f"{name}-600K").sizes["time"] == 2 * size
    assert validate_trajectory(root) == []
    assert sorted(os.listdir(root.parent)) == ["log", "pairs.zarr"]


@pytest.mark.parametrize(
    ("poison", "workers", "reason"),
    [
        ("raise", 1, "snapshot 2: ArithmeticError: no convergence"),
        ("nan", 1, "snapshot 2: GenerationError: the engine returned a density .* finite"),
        ("die", 2, "snapshot 2: its worker died or was lost 3 times, so it is set aside"),
    ],
)
def test_failing_snapshot(
    log: Path, monkeypatch: pytest.MonkeyPatch, poison: str, workers: int, reason: str
) -> None:
    if poison != "die":
        monkeypatch.setattr("densitykit.generate.snapshots.evaluate_all", one_by_one)
    path = log.with_name("pairs.zarr")
    log.with_name("poison-2").write_text(poison)
    with pytest.raises(GenerationError, match=reason) as caught:
        generate_snapshots(make(log), path, workers=workers, progress=False)
    kept = set(range(6)) - {int(w.split(":")[0]) for w in str(caught.value).split("snapshot ")[1:]}
    assert kept == {0, 1, 3, 4, 5} and "5 are kept; run the same" in str(caught.value)
    assert count(log, "solve").count(2) == (3 if poison == "die" else 1)
    committed = open_trajectory(path).sizes["time"] if path.exists() else 0
    assert committed == min(set(range(6)) - kept)
    log.with_name("poison-2").unlink()
    log.write_text("")
    generate_snapshots(make(log), path, progress=False)
    assert sorted(count(log, "solve")) == sorted(set(range(6)) - kept)  # nothing twice
    assert_right(path)


def test_a_dead_worker_costs_its_own_job_one_retry(log: Path) -> None:
    for index in (1, 4):
        log.with_name(f"poison-{index}").write_text("die once")
    path = log.with_name("pairs.zarr")
    assert_right(generate_snapshots(make(log, 0.05), path, workers=2, progress=False))
    assert sorted(count(log, "solve")) == [0, 1, 1, 2, 3, 4, 4, 5]
    assert sorted(count(log, "done")) == [0, 1, 2, 3, 4, 5]


def test_an_interrupt_ends_within_two_seconds_and_resumes(log: Path) -> None:
    """In the middle of solves of a minute: no worker is left, and what was done is kept."""
    path = log.with_name("pairs.zarr")
    process = _start(log, path, seconds=60.0)
    _wait_for(lambda: log.read_text().count("solve") == 2, process)
    workers = {int(line.split()[-1]) for line in log.read_text().splitlines()}
    process.send_signal(signal.SIGINT)
    start = clock.monotonic()
    assert process.wait(30) == -signal.SIGINT or process.returncode == 1
    assert not _alive(workers)
    taken = clock.monotonic() - start
    log.write_text("")
    system = make(log, 60.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", lambda _: None)
        patch.setattr("densitykit.generate.snapshots.evaluate_all", one_by_one)
        generate_snapshots(system, path, 12, progress=False)
    assert_right(path, 12)
    assert taken < 2 or os.getloadavg()[0] > os.cpu_count()  # no promise on a busy machine


def test_hopeless_engine_stops_early(log: Path, in_this_process: None) -> None:
    for index in range(6):
        log.with_name(f"poison-{index}").write_text("raise")
    with pytest.raises(GenerationError, match="3 of 6 snapshots failed, 0 are kept"):
        generate_snapshots(make(log), log.with_name("pairs.zarr"), progress=False)
    assert len(count(log, "solve")) == 3


def test_engine_is_replaced_after_an_error(log: Path) -> None:
    atoms = geometries(2, seed=0)
    factory = partial(Gaussians, log)
    log.with_name("poison-1").write_text("raise")
    results = [evaluate(factory, atoms[i], (8, 8, 8)) for i in (0, 0, 1, 0)]
    assert [set(r) == {"error"} for r in results] == [False, False, True, False]
    events = [line.split()[0] for line in log.read_text().splitlines()]
    assert events == "engine solve done done solve close engine solve done".split()
    np.testing.assert_array_equal(results[0]["density"], results[3]["density"])


def test_two_at_once_are_refused(log: Path) -> None:
    pytest.importorskip("fcntl")
    path = log.with_name("pairs.zarr")
    process = _start(log, path, seconds=0.5)
    _wait_for(lambda: "solve" in log.read_text(), process)
    with pytest.raises(GenerationError, match="another process is making these snapshots"):
        generate_snapshots(make(log), path, progress=False)
    process.kill()
    process.wait()


def _start(log: Path, path: Path, seconds: float, workers: int = 2) -> subprocess.Popen:
    """Make the data set in a process that can be killed."""
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from functools import partial
from analytic_engine import Gaussians, geometries
from densitykit.generate.snapshots import System, generate_snapshots
engine = partial(Gaussians, Path({str(log)!r}), {seconds})
system = System("pairs", geometries, engine, 0.4, 10, {SPLITS})
generate_snapshots(system, {str(path)!r}, 12, workers={workers}, progress=False)
"""
    return subprocess.Popen([sys.executable, "-c", code])


def _wait_for(condition: Any, process: subprocess.Popen) -> None:
    while process.poll() is None and not condition():
        clock.sleep(0.005)


def _safe(path: Path) -> set[int]:
    """Return the snapshots that are committed or in a part file."""
    committed = open_trajectory(path).sizes["time"] if path.exists() else 0
    parts = path.with_name(f".{path.name}.work").glob("part-*.npz")
    return set(range(committed)) | {int(part.stem.split("-")[1]) for part in parts}


def _alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_sigkill(log: Path) -> None:
    """Kill at random moments until it is done: nothing lost, nothing twice, workers gone."""
    path, rng, kills = log.with_name("pairs.zarr"), np.random.default_rng(0), 0
    safe: set[int] = set()
    while True:
        before = log.read_text()
        process = _start(log, path, seconds=0.02)
        _wait_for(lambda seen=before: "solve" in log.read_text()[len(seen) :], process)
        if kills < 2:
            clock.sleep(rng.uniform(0, 0.12))
            process.kill()
        code = process.wait()
        kills += code == -signal.SIGKILL
        lines = log.read_text()[len(before) :].splitlines()
        workers = {int(line.split()[-1]) for line in lines}
        _wait_for_end(workers)
        assert not safe & {int(line.split()[1]) for line in lines if "solve" in line}
        now = set(range(12)) if code == 0 else _safe(path)
        assert now >= safe
        safe = now
        if code != -signal.SIGKILL:
            break
    assert code == 0 and kills >= 1  # it may have ended just before
    assert_right(path, 12)
    undisturbed = generate_snapshots(make(log), log.with_name("b.zarr"), 12, progress=False)
    xr.testing.assert_identical(frames(path), frames(undisturbed))
    assert sorted(os.listdir(path.parent)) == ["b.zarr", "log", "pairs.zarr"]


def _wait_for_end(pids: set[int]) -> None:
    """Workers of a killed process end by themselves."""
    if sys.platform == "linux":
        deadline = clock.monotonic() + 20
        while alive := _alive(pids):
            assert clock.monotonic() < deadline, f"orphans: {alive}"
            clock.sleep(0.01)


@pytest.mark.parametrize("point", range(9))
def test_killed_between_writes(
    log: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """End before the n-th file of the working folder is replaced or removed, then go on."""

    class Killed(BaseException):
        pass

    left = [point]

    def guard(function: Any) -> Any:
        def guarded(self: Path, *args: Any, **options: Any) -> Any:
            if ".work" in str(self):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            return function(self, *args, **options)

        return guarded

    path, system = log.with_name("pairs.zarr"), make(log)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", guard(Path.replace))
        patch.setattr(Path, "unlink", guard(Path.unlink))
        with pytest.raises(Killed):
            generate_snapshots(system, path, 4, progress=False)
    safe = _safe(path)
    log.write_text("")
    generate_snapshots(system, path, 4, progress=False)
    assert sorted(count(log, "done")) == sorted(set(range(4)) - safe)
    assert_right(path, 4)
    assert len(safe) == min(4, max(0, point - 1))


def test_configurations_are_drawn_once(log: Path, in_this_process: None) -> None:
    """A restart reads them: the dynamics need not be repeatable to the last bit."""
    log.with_name("poison-2").write_text("raise")
    path = log.with_name("pairs.zarr")
    with pytest.raises(GenerationError, match="snapshot 2"):
        generate_snapshots(make(log), path, progress=False)
    log.with_name("poison-2").unlink()
    with pytest.raises(UnfinishedError, match="configurations.npz: .*seed is 0, not 1"):
        shutil.move(path, log.with_name("away"))
        generate_snapshots(make(log), path, seed=1, progress=False)
    shutil.move(log.with_name("away"), path)
    again = make(log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometries, "__code__", (lambda n, *, seed, progress=False: 1 / 0).__code__)
        generate_snapshots(again, path, progress=False)
    assert_right(path)


@pytest.mark.filterwarnings("ignore")
def test_dask(log: Path) -> None:
    distributed = pytest.importorskip("distributed")
    path = log.with_name("pairs.zarr")
    log.with_name("poison-2").write_text("raise")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None
    ) as cluster:
        options = {"scheduler": cluster.scheduler_address, "progress": False}
        with pytest.raises(GenerationError, match="1 of 6 .* 5 are kept"):
            generate_snapshots(make(log), path, **options)
        log.with_name("poison-2").unlink()
        generate_snapshots(make(log), path, **options)
    assert_right(path)
    assert sorted(count(log, "done")) == [0, 1, 2, 3, 4, 5]
    assert str(os.getpid()) not in log.read_text()  # the worker did it
    with pytest.raises(GenerationError, match="no dask scheduler at tcp://127.0.0.1:1; start"):
        list(_unreachable(log))


def _unreachable(log: Path) -> Any:
    from densitykit.generate import jobs

    atoms = dict(enumerate(geometries(1, seed=0)))
    return jobs.evaluate_all(
        partial(Gaussians, log), atoms, (8, 8, 8), scheduler="tcp://127.0.0.1:1"
    )


def test_attributes_are_json(log: Path, in_this_process: None) -> None:
    path = generate_snapshots(make(log), log.with_name("pairs.zarr"), 2, progress=False)
    attrs = json.loads((path / "zarr.json").read_text())["attributes"]
    assert attrs["system"] == "pairs" and attrs["n_snapshots"] == 2
    assert attrs["configurations"].startswith("random")
