"""A store as folders and files: where it is, who may write it, how it is replaced in one piece."""

from __future__ import annotations

import errno
import glob
import io
import json
import os
import secrets
import shutil
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from densitykit.errors import TrajectoryError

try:
    import fcntl
except ImportError:  # no POSIX: no locks
    fcntl = None

__all__ = ["PathLike", "load_arrays", "save_arrays"]

PathLike = str | os.PathLike[str]
RESTORE = "restore the file from a copy"
LEASE = 300.0  # s, after which a lease that was not renewed has run out
SYNCED = ".synced"  # what is on disk for sure, see densitykit.io.durable


def fault(path: PathLike, variable: str, problem: str, fix: str) -> TrajectoryError:
    return TrajectoryError(f"{path}: {variable}: {problem}; {fix}")


def raise_any(path: PathLike, problems: list[str]) -> None:
    if problems:
        raise TrajectoryError("\n".join(f"{path}: {problem}" for problem in problems))


def real(path: PathLike) -> Path:
    """Return the path itself, or what it links to: links stay, their target is changed."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


def fresh(path: Path, role: str) -> Path:
    """Return a hidden neighbour that does not exist, by a name that nobody else gives."""
    return path.with_name(f".{path.name}.densitykit-{role}-{secrets.token_hex(4)}")


def leftovers(path: Path, role: str) -> list[Path]:
    """Return the neighbours of this role that a kill has left behind."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.densitykit-{role}-*"))


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk (fsync)."""
    if os.name == "nt":  # folders cannot be synced there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until all that is in a folder is on disk."""
    for file in folder.rglob("*"):
        sync(file)
    sync(folder)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; when it is on disk, it takes the place of `path`, in one piece."""
    for leftover in leftovers(path, "partial"):
        leftover.unlink(missing_ok=True)
    partial = fresh(path, "partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def swap(new: Path, path: Path) -> None:
    """Put the finished `new` in the place of `path`, if need be by way of an "old" neighbour.

    Folders cannot be exchanged in one step on every system: for some microseconds there is
    only "old". `locate` then reads from there, and `recover` puts it back. All is on disk
    before it takes its place, and has taken its place on disk before the old one goes.
    """
    sync_tree(new)
    old = fresh(path, "old")
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Clear away what a kill has left of a creation or a rebuilding."""
    path = real(path)
    if not leftovers(path, "old") + leftovers(path, "new"):
        return
    with Lock(path, takes=False):  # nobody is at it now
        old = leftovers(path, "old")
        if old and not path.exists():
            old.pop().rename(path)
        for leftover in [*old, *leftovers(path, "new")]:
            shutil.rmtree(leftover, ignore_errors=True)


def is_ours(path: Path) -> bool:
    """Whether a folder is a trajectory, by what this package writes into its metadata."""
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        return "schema_version" in attributes and (path / "density" / "zarr.json").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Lock:
    """The right to write a store: of one process, until it releases the lock or ends.

    A lock of the kernel on a hidden file beside the store, which tells who holds it; the file
    goes with the lock. Within a process the newest that takes the right has it: `held` tells.

    Raises
    ------
    TrajectoryError
        Another process holds it: the message names host and process.
    """

    _files: ClassVar[dict[Path, Any]] = {}
    _newest: ClassVar[dict[Path, int]] = {}
    _holders: ClassVar[Counter[Path]] = Counter()
    _process = os.getpid()

    def __init__(self, path: PathLike, *, takes: bool = True) -> None:
        if Lock._process != os.getpid():  # a fork inherits what we know, but not the locks
            Lock._process = os.getpid()
            Lock._files, Lock._newest, Lock._holders = {}, {}, Counter()
        self.key = Path(path).resolve()
        if self.key not in Lock._files:
            Lock._files[self.key] = _lock_file(self.key, path)
        Lock._holders[self.key] += 1
        self._number = Lock._newest.get(self.key, 0) + 1
        if takes:
            Lock._newest[self.key] = self._number
        self.release = weakref.finalize(self, Lock._release, self.key, os.getpid())

    @property
    def held(self) -> bool:
        """Whether nobody has taken the lock since, in this process, and it is not released."""
        return self.release.alive and Lock._newest.get(self.key) == self._number

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    @staticmethod
    def _release(key: Path, process: int) -> None:
        if process != os.getpid():
            return
        Lock._holders[key] -= 1
        if not Lock._holders[key] and (file := Lock._files.pop(key)):
            with file:  # unlinked before the lock goes, see _lock_file
                Path(file.name).unlink(missing_ok=True)


def _lock_file(key: Path, path: PathLike) -> Any:
    """Open and lock the file beside a store; where there are no locks, take a lease."""
    while fcntl:
        file = key.with_name(f".{key.name}.densitykit-lock").open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                fix = "wait until it is done, or write to another path"
                raise fault(path, "store", f"it is being written by {owner}", fix) from error
            Path(file.name).unlink(missing_ok=True)
            break
        try:  # the last holder may have removed the file after it was opened here
            if os.path.samestat(os.stat(file.name), os.fstat(file.fileno())):
                file.truncate(0)
                file.write(_owner())
                file.flush()
                return file
        except FileNotFoundError:
            pass
        file.close()
    return _Lease(key, path)


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}\n"


class _Lease:
    """A lock where there is none (NFS): a file that its owner renews, and that runs out."""

    def __init__(self, key: Path, path: PathLike) -> None:
        self.name = str(key.with_name(f".{key.name}.densitykit-lease"))
        self._ended = threading.Event()
        now = fresh(key, "now")
        try:
            now.touch()  # by the clock of the file server
            self._take(path, now.stat().st_mtime)
        finally:
            now.unlink(missing_ok=True)
        threading.Thread(target=self._renew, daemon=True).start()

    def _take(self, path: PathLike, now: float) -> None:
        with suppress(FileNotFoundError):
            owner, since = Path(self.name).read_text().strip(), os.stat(self.name).st_mtime
            if now - since < LEASE:
                fix = f"wait {LEASE - now + since:.0f} s if that was killed, or until it is done"
                raise fault(path, "store", f"it is being written by {owner}", fix)
            Path(self.name).unlink()
        try:
            with open(self.name, "x") as file:
                file.write(_owner())
        except FileExistsError as error:
            fix = "wait until it is done, or write to another path"
            raise fault(path, "store", "it is being written by another process", fix) from error

    def _renew(self) -> None:
        while not self._ended.wait(LEASE / 10):
            with suppress(OSError):
                os.utime(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()


def history(event: str, previous: str | None = None) -> str:
    """Return the provenance with one more line."""
    from densitykit import __version__

    line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} densitykit {__version__}: {event}"
    return f"{previous}\n{line}" if previous else line


def plain_attributes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes that netCDF can hold: numbers, text, lists of numbers.

    Truth values become 0 and 1, mappings and other nested values JSON; None is left out.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            value = value.tolist()
        if isinstance(value, bool):
            return int(value)
        if isinstance(value, tuple | list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in value
        ):
            return list(value)
        return value if isinstance(value, int | float | str) else _json(value)

    return {name: plain(value) for name, value in attrs.items() if value is not None}


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))


def locate(path: PathLike) -> Path:
    """Return the folder that holds the zarr group `path`; raise if there is none."""
    path = Path(path)
    if not path.exists():
        old = leftovers(path, "old")
        if not old:
            fix = "correct the path, or make the store with create_trajectory"
            raise fault(path, "store", "the path does not exist", fix)
        path = old[-1]
    if not (path / "zarr.json").is_file():
        fix = "give the folder that holds it, or write the data with create_trajectory"
        raise fault(path, "store", "not a zarr v3 group, zarr.json is missing", fix)
    try:
        node = json.loads((path / "zarr.json").read_bytes())
        is_group = node["node_type"] == "group"
        if repr(node["zarr_format"]) != "3" or not isinstance(node.get("attributes", {}), dict):
            raise ValueError("zarr_format is not 3, or the attributes are no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise fault(path, "store", f"zarr.json is unreadable ({error!r})", RESTORE) from error
    if not is_group:
        raise fault(path, "store", "this is one variable", f"give its group, {path.parent}")
    return path


def runs(path: Path) -> list[str]:
    """Return the names of the runs in a root group; `["."]` where `path` is itself a run."""
    names = sorted({file.parent.parent.name for file in path.glob("[!.]*/*/zarr.json")})
    return ["."] if (path / "density").is_dir() or not names else names


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays, numbers and texts to one npz file, in one piece: it is whole or not there."""
    whole = io.BytesIO()
    np.savez(whole, **arrays)
    with replacing(path) as file:
        file.write(whole.getbuffer())


def load_arrays(path: Path) -> dict[str, NDArray]:
    """Read what `save_arrays` wrote. Texts and numbers come as arrays without dimensions."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
