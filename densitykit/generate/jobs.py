r"""Independent Kohn-Sham solves, spread over processes or over a cluster.

A job is one configuration; its result is density, energy and forces. Jobs share nothing, so the
speed-up is that of the number of workers. What takes care is that they fail one by one:

* an engine that raises costs its own snapshot and is replaced by a fresh one;
* a worker that dies (killed for its memory, a crash in Fortran) costs what was being computed, and
  the pool is built again;
* workers end with the process that started them, even when that is killed.

Each worker process starts its engine once and keeps it, since a start is expensive and many
engines keep their state in global variables.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import threading
import time
from collections import deque
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
    waiting = deque(sorted(configurations))
    while waiting:
        with _executor(workers, scheduler) as (executor, window):
            running: dict[Future, int] = {}
            intact = True
            while running or (waiting and intact):
                while waiting and intact and len(running) < window:
                    index = waiting.popleft()
                    job = (engine, configurations[index], tuple(shape), f"snapshot {index}")
                    try:
                        running[executor.submit(evaluate, *job)] = index
                    except BrokenExecutor:
                        waiting.appendleft(index)
                        intact = False
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    error = future.exception()
                    intact &= not isinstance(error, BrokenExecutor)
                    lost = {"error": f"snapshot {index}: its worker died or was lost ({error!r})"}
                    yield index, lost if error else future.result()


@contextmanager
def _executor(workers: int, scheduler: str | None) -> Iterator[tuple[Executor, int]]:
    """Give an executor and how many jobs to hand it at a time."""
    if scheduler is not None:
        try:
            from distributed import Client

            client = Client(scheduler, timeout=30, set_as_default=False)
        except ImportError as error:
            hint = 'pip install "densitykit[dft]"'
            raise GenerationError(f"dask.distributed is not installed; {hint}") from error
        except OSError as error:
            hint = "start one with `dask scheduler`, or correct the address"
            raise GenerationError(f"no dask scheduler at {scheduler}; {hint}") from error
        with client, client.get_executor(pure=False) as executor:
            yield executor, 10**6  # the scheduler keeps the queue: workers may come and go
        return
    context = multiprocessing.get_context("spawn")  # fork would copy locks and open stores
    with _shared_cores(workers):
        pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
        try:
            yield pool, workers  # no more: all that is in a broken pool is lost
        finally:
            pool.shutdown(cancel_futures=True)


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
    """End this process when the one that spawned it ends, however it ends."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
