"""A disk that fails when it is told to: between a process and all its files below one folder.

Every call that opens or changes a file is an operation with a number. All are recorded, and at one
of them the process is killed, or a half of what it writes gets through, or the call fails.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import pickle
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

CHANGES = ("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir")
FULL = ("create", "write", "mkdir", "link", "rename")  # what a full disk refuses


class _File:
    """A file whose writes are operations."""

    def __init__(self, disk: Disk, path: str, file: Any) -> None:
        self._disk, self._path, self._file = disk, path, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        raw = data.encode() if isinstance(data, str) else bytes(data)

        def half() -> None:
            part = raw[: len(raw) // 2]
            self._file.write(part.decode() if isinstance(data, str) else part)
            self._file.flush()

        where = self._file.tell()
        return self._disk.do("write", (self._path, where, raw), lambda: self._put(data), half)

    def _put(self, data: Any) -> int:
        n = self._file.write(data)
        self._file.flush()
        return n


class Disk:
    """The operations of this process below `root`; what happens at number `at`, if anything.

    fault: "kill", "half" (a half of a write, then killed), or the name of an error of the system.
    A full disk (ENOSPC) stays full.
    """

    def __init__(self, root: Path, fault: str = "", at: int = -1) -> None:
        self.root, self.fault, self.at = str(root), fault, at
        self.log: list[tuple[str, Any]] = []
        self._files: dict[int, str] = {}
        self._lock = threading.RLock()
        self._number = 0
        self.pipe: Any = None

    def do(
        self, kind: str, what: Any, call: Callable, half: Callable[[], None] = lambda: None
    ) -> Any:
        """Do one operation, unless it is its turn to fail."""
        with self._lock:
            number, self._number = self._number, self._number + 1
            full = self.fault == "ENOSPC" and number > self.at >= 0 and kind in FULL
            if number == self.at or full:
                self._fail(kind, what, half)
            result = call()
            self.log.append((kind, what))
            return result

    def _fail(self, kind: str, what: Any, half: Callable[[], None]) -> None:
        if self.fault in ("half", "ENOSPC", "EIO"):
            half()
        if self.fault in ("kill", "half"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault != "ENOSPC" or kind in FULL:
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number), str(what[0]))

    def mark(self, what: Any) -> None:
        """Note what the process has been told so far, for those who outlive it, too."""
        self.log.append(("mark", what))
        self.pipe.write(pickle.dumps(("mark", what)))

    def install(self) -> None:
        """Stand between this process and its files, for good."""
        self._wrap_open(io.open)
        for name in CHANGES:
            self._wrap_change(name, getattr(os, name))
        os_open = os.open

        def open_descriptor(path: Any, *args: Any, **kwargs: Any) -> int:
            descriptor = os_open(path, *args, **kwargs)
            self._files[descriptor] = self._full(path, kwargs.get("dir_fd"))
            return descriptor

        os.open = open_descriptor
        os.fsync = lambda fd: self.do("fsync", (self._files[fd],), lambda: None)

    def _full(self, path: Any, folder: int | None = None) -> str:
        path = os.fspath(path)
        return os.path.abspath(path if folder is None else f"{self._files[folder]}/{path}")

    def _wrap_open(self, real_open: Callable) -> None:
        def open_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, int) or not self._full(path).startswith(self.root):
                return real_open(path, mode, *args, **kwargs)
            full = self._full(path)
            new = not os.path.exists(full) or "w" in mode
            kind = "create" if set(mode) & set("wax") and new else "open"
            file = self.do(kind, (full,), lambda: real_open(path, mode, *args, **kwargs))
            self._files[file.fileno()] = full
            return _File(self, full, file) if set(mode) & set("wax+") else file

        io.open = builtins.open = open_file

    def _wrap_change(self, name: str, call: Callable) -> None:
        def change(*args: Any, **kwargs: Any) -> None:
            paths = tuple(
                self._full(a, kwargs.get("dir_fd")) for a in args if isinstance(a, str | Path)
            )
            if not paths[0].startswith(self.root):
                return call(*args, **kwargs)
            kind = {"replace": "rename", "remove": "unlink"}.get(name, name)
            return self.do(kind, paths, lambda: call(*args, **kwargs))

        setattr(os, name, change)


class Ended(NamedTuple):
    """How a process ended (-9: killed), what it was told, what its job returned, what it did."""

    status: int
    marks: list[Any]
    result: Any = None
    log: list[tuple[str, Any]] = []


def run(job: Callable[[Disk], Any], disk: Disk) -> Ended:
    """Run a job on a disk, in a process of its own."""
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        status = 99
        try:
            os.close(receiving)
            with os.fdopen(sending, "wb", buffering=0) as disk.pipe:
                disk.install()
                disk.pipe.write(pickle.dumps(("end", (job(disk), disk.log))))
            status = 0
        finally:
            os._exit(status)
    os.close(sending)
    marks, end = [], (None, [])
    with os.fdopen(receiving, "rb") as pipe, suppress(EOFError):
        while True:
            kind, what = pickle.load(pipe)
            if kind == "end":
                end = what
            else:
                marks.append(what)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(status, marks, *end)
