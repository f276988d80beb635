"""A store as folders and files: where it is, and how it is replaced in one piece."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from densitykit.errors import TrajectoryError

__all__ = ["PathLike", "load_arrays", "save_arrays"]

PathLike = str | os.PathLike[str]
RESTORE = "restore the file from a copy"


def fault(path: PathLike, variable: str, problem: str, fix: str) -> TrajectoryError:
    return TrajectoryError(f"{path}: {variable}: {problem}; {fix}")


def raise_any(path: PathLike, problems: list[str]) -> None:
    if problems:
        raise TrajectoryError("\n".join(f"{path}: {problem}" for problem in problems))


def sibling(path: Path, role: str) -> Path:
    """Return the hidden neighbour of `path`: `new` while it is built, `old` while replaced."""
    return path.with_name(f".{path.name}.{role}")


def swap(path: Path) -> None:
    """Put the finished `new` in the place of `path`, if need be by way of `old`.

    Folders cannot be exchanged in one step on every system: for some microseconds there is
    only `old`. `locate` then reads from there, and `recover` puts it back.
    """
    old = sibling(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    sibling(path, "new").rename(path)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Clear away what a killed `create_trajectory` or `rebuilt` left behind."""
    old = sibling(path, "old")
    if not path.exists() and old.exists():
        old.rename(path)
    for leftover in (old, sibling(path, "new")):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def rebuilt(path: Path, event: str) -> Iterator[zarr.Group]:
    """Give a copy to change; when that is done, it takes the place of the store.

    A change of several variables in place would leave a store with conflicting lengths if
    killed between two of them. In the copy the data are hard links (copies where the file
    system has none); zarr replaces files, so that the store does not see the change.
    """
    new = sibling(path, "new")
    shutil.copytree(path, new, copy_function=_link)
    group = zarr.open_group(new, mode="r+")
    yield group
    group.attrs["history"] = history(event, group.attrs.get("history"))
    swap(path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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
        old = sibling(path, "old")
        if not old.exists():
            fix = "correct the path, or make the store with create_trajectory"
            raise fault(path, "store", "the path does not exist", fix)
        path = old
    if not (path / "zarr.json").is_file():
        fix = "give the folder that holds it, or write the data with create_trajectory"
        raise fault(path, "store", "not a zarr v3 group, zarr.json is missing", fix)
    try:
        is_group = json.loads((path / "zarr.json").read_bytes())["node_type"] == "group"
    except (ValueError, KeyError, TypeError) as error:
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
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_arrays(path: Path) -> dict[str, NDArray]:
    """Read what `save_arrays` wrote. Texts and numbers come as arrays without dimensions."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
