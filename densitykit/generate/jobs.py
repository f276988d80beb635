r"""Independent Kohn-Sham solves, spread over processes or over a cluster.

A job is one configuration; its result is density, energy and forces. Jobs share nothing, so the
speed-up is that of the number of workers. What takes care is that they fail one by one:

* an engine that raises costs its own snapshot and is replaced by a fresh one;
* a worker that dies (killed for its memory, a crash in Fortran) costs its own job a further try,
  and a fresh worker takes its place; a job that has lost three workers is named and set aside;
* workers end with the process that started them, even when that is killed; interrupted (Ctrl-C),
  it ends them at once.

Each worker process starts its engine once and keeps it, since a start is expensive and many
engines keep their state in global variables.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
from ase import Atoms

from densitykit.errors import GenerationError
from densitykit.generate.engine import Engine

__all__ = ["Result", "close_engines", "evaluate", "evaluate_all"]

#: arrays and the description of a snapshot, or {"error": reason}
Result = dict[str, Any]

_PATIENCE = 3  # workers that a job may cost
_ENGINES: dict[bytes, Engine] = {}
_LOCK = threading.Lock()  # engines are not thread-safe; dask workers have threads


def evaluate(
    engine: Callable[[], Engine],
    atoms: Atoms,
    shape: Sequence[int],
    label: str = "snapshot",
) -> Result:
    """Compute one configuration in this process; never raise.

    Parameters
    ----------
    engine
        Picklable factory. The engine it makes is kept for the next call with an equal factory.
    atoms
        The configuration.
    shape
        Grid points along each lattice vector.
    label
        Stands before the reason when it fails.

    Returns
    -------
    dict
        "density" (shape `shape`, angstrom**-3), "forces" (atom, 3; eV/angstrom), "energy" (eV),
        "seconds", "description" (JSON text); or "error", why there is nothing of this.
    """
    key = pickle.dumps(engine)
    with _LOCK:
        try:
            if key not in _ENGINES:
                _ENGINES[key] = engine()
                Finalize(None, _close, args=(key,), exitpriority=10)  # atexit is not for children
            return _checked(_solve(_ENGINES[key], atoms.copy(), shape), atoms, shape)
        except Exception as error:
            _close(key)
            return {"error": f"{label}: {type(error).__name__}: {error}"}


def _solve(engine: Engine, atoms: Atoms, shape: Sequence[int]) -> Result:
    start = time.perf_counter()
    atoms.calc = engine
    result: Result = {"energy": float(atoms.get_potential_energy()), "forces": atoms.get_forces()}
    result["density"] = np.asarray(engine.density(tuple(shape)))
    result["seconds"] = time.perf_counter() - start
    result["description"] = json.dumps(engine.description())
    return result


def _checked(result: Result, atoms: Atoms, shape: Sequence[int]) -> Result:
    expected = {"density": tuple(shape), "forces": (len(atoms), 3), "energy": ()}
    for name, wanted in expected.items():
        if np.shape(result[name]) != wanted or not np.isfinite(result[name]).all():
            problem = f"{name} of shape {np.shape(result[name])}, expected {wanted} and all finite"
            raise GenerationError(f"the engine returned a {problem}")
    return result


def _close(key: bytes) -> None:
    engine = _ENGINES.pop(key, None)
    if engine is not None:
        with suppress(Exception):  # it is given up either way
            engine.close()


def close_engines() -> None:
    """Close the engines that this process has started."""
    for key in list(_ENGINES):
        _close(key)


def evaluate_all(
    engine: Callable[[], Engine],
    configurations: Mapping[int, Atoms],
    shape: Sequence[int],
    *,
    workers: int = 1,
    scheduler: str | None = None,
) -> Iterator[tuple[int, Result]]:
    """Compute many configurations and yield `(index, result)` as they finish, in any order.

    Parameters
    ----------
    engine, shape
        See `evaluate`.
    configurations
        By index.
    workers
        Local processes. Unless OMP_NUM_THREADS is set, they share the cores evenly. They are
        spawned: a script that calls this needs the guard `if __name__ == "__main__":`.
    scheduler
        Address of a dask scheduler, on whose workers densitykit is installed. Replaces the local
        processes.

    Yields
    ------
    tuple
        Index and result. A result is that of `evaluate`, with "error" also where a worker died.

    Raises
    ------
    GenerationError
        The scheduler does not answer, or dask is missing.
    """
    waiting, lost = deque(sorted(configurations)), Counter[int]()
    with _slots(workers, scheduler, len(configurations)) as idle:
        running: dict[Future, tuple[int, _Slot]] = {}
        try:
            while running or waiting:
                while waiting and idle:
                    index, slot = waiting.popleft(), idle.pop()
                    job = (engine, configurations[index], tuple(shape), f"snapshot {index}")
                    running[slot.submit(evaluate, *job)] = index, slot
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, slot = running.pop(future)
                    idle.append(slot)
                    if (error := future.exception()) is None:
                        yield index, future.result()
                        continue
                    lost[index] += slot.losses
                    if lost[index] < _PATIENCE:
                        waiting.append(index)
                        continue
                    reason = f"its worker died or was lost {_PATIENCE} times, so it is set aside"
                    yield index, {"error": f"snapshot {index}: {reason} ({error!r})"}
        finally:
            _end([slot for _, slot in running.values()])  # interrupted


class _Slot:
    """One local worker process at a time, started when it is needed."""

    losses = 1

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def submit(self, *job: Any) -> Future:
        """Hand a job to the worker, or to a fresh one if that is dead."""
        try:
            if self.pool is not None:
                return self.pool.submit(*job)
        except BrokenExecutor:
            self.pool.shutdown(wait=False)
        spawn = multiprocessing.get_context("spawn")  # fork would copy locks and open stores
        self.pool = ProcessPoolExecutor(1, spawn, initializer=_end_with_parent)
        return self.pool.submit(*job)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def processes(self) -> list[Any]:
        return list((self.pool._processes or {}).values()) if self.pool is not None else []


class _Remote:
    """Room for one job on a scheduler, which keeps the queue and tries again by itself."""

    losses = _PATIENCE

    def __init__(self, executor: Executor) -> None:
        self.submit = executor.submit

    def processes(self) -> list[Any]:
        return []  # the client cancels what is left


def _end(slots: Sequence[_Slot | _Remote]) -> None:
    """End busy workers; what they have started gets a moment to end before them."""
    processes = [process for slot in slots for process in slot.processes()]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 0.5
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


@contextmanager
def _slots(workers: int, scheduler: str | None, jobs: int) -> Iterator[list[Any]]:
    """Give what takes one job at a time, each."""
    if scheduler is not None:
        try:
            from distributed import Client

            client = Client(scheduler, timeout=30, set_as_default=False)
        except ImportError as error:
            hint = 'in a clone: pip install -e ".[dft]"'
            raise GenerationError(f"dask.distributed is not installed; {hint}") from error
        except OSError as error:
            hint = "start one with `dask scheduler`, or correct the address"
            raise GenerationError(f"no dask scheduler at {scheduler}; {hint}") from error
        with client, client.get_executor(pure=False) as executor:
            yield [_Remote(executor) for _ in range(jobs)]
        return
    slots = [_Slot() for _ in range(min(workers, jobs))]
    with _shared_cores(workers):
        try:
            yield [*slots]
        finally:
            for slot in slots:
                slot.close()


@contextmanager
def _shared_cores(workers: int) -> Iterator[None]:
    """Leave OMP_NUM_THREADS to processes started meanwhile, unless the user has set it."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _end_with_parent() -> None:
    """End this process when the one that spawned it ends, however it ends, or says so."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what `subprocess.run` runs

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
