"""What is on a disk after a loss of power, given what a process did to it.

Two models. *ordered*, as ext4 does by default: changes of folders reach the disk in their order,
up to some point, at least the last sync of anything; a file that was not synced is empty, half or
whole. *worst*: each folder gets as far as it likes, at least to its own last sync, and a file that
was not synced is as it was when it was, empty, half, whole, or zeros. A rename is one change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(eq=False)
class File:
    data: bytes = b""
    synced: bytes | None = None


@dataclass(eq=False)
class Folder:
    """Changes of its names, each with its number: name to file, folder or None."""

    changes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    synced: int = 0

    def names(self, n: int | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _, change in self.changes[:n]:
            found |= change
        return {name: node for name, node in found.items() if node is not None}


class Power:
    """The operations of a log (see `faulty_disk`), up to one of them, then darkness."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = Path(root), Folder()
        self.last_sync = self.number = 0

    def _at(self, path: str) -> tuple[Folder, str]:
        *folders, name = Path(path).relative_to(self.root).parts
        folder = self.top
        for part in folders:
            folder = folder.names()[part]
        return folder, name

    def _node(self, path: str) -> Any:
        if Path(path) == self.root:
            return self.top
        folder, name = self._at(path)
        return folder.names()[name]

    def _change(self, path: str, **names: Any) -> None:
        self._at(path)[0].changes.append((self.number, names))

    def do(self, kind: str, what: Any) -> None:
        self.number += 1
        if kind == "create":
            self._change(what[0], **{Path(what[0]).name: File()})
        elif kind == "write":
            file, (_, where, data) = self._node(what[0]), what
            file.data = file.data[:where] + data + file.data[where + len(data) :]
        elif kind == "mkdir":
            self._change(what[0], **{Path(what[0]).name: Folder()})
        elif kind in ("rename", "link"):
            assert Path(what[0]).parent == Path(what[1]).parent or kind == "link"
            new = {Path(what[1]).name: self._node(what[0])}
            self._change(what[1], **({Path(what[0]).name: None} if kind == "rename" else {}) | new)
        elif kind in ("unlink", "rmdir"):
            self._change(what[0], **{Path(what[0]).name: None})
        elif kind == "fsync":
            self._sync(self._node(what[0]))

    def _sync(self, node: File | Folder) -> None:
        self.last_sync = self.number
        if isinstance(node, Folder):
            node.synced = len(node.changes)
        else:
            node.synced = node.data

    def fail(self, rng: np.random.Generator, model: str, into: Path) -> None:
        """Write what is on the disk when it is dark."""
        reached = int(rng.integers(self.last_sync, self.number + 1))
        self._write(self.top, into, rng, model, reached)

    def _write(
        self, folder: Folder, into: Path, rng: np.random.Generator, model: str, reached: int
    ) -> None:
        into.mkdir()
        if model == "ordered":
            n = sum(number <= reached for number, _ in folder.changes)
        else:
            n = int(rng.integers(folder.synced, len(folder.changes) + 1))
        for name, node in folder.names(n).items():
            if isinstance(node, Folder):
                self._write(node, into / name, rng, model, reached)
            else:
                (into / name).write_bytes(_content(node, rng, model))


def _content(file: File, rng: np.random.Generator, model: str) -> bytes:
    if file.data == file.synced:
        return file.data
    states = [b"", file.data[: len(file.data) // 2], file.data]
    if model == "worst":
        states += [file.synced or b"", bytes(len(file.data))]
    return states[rng.integers(len(states))]
