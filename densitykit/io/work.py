"""Unfinished work knows whose it is: its recipe, the data it learns from, the code that made it.

Trainings, rollouts, dynamics and snapshots that were interrupted go on where they were. What they
have to remember is in one file, replaced in one piece, with the recipe that it belongs to; stores
that are made by a recipe keep it as an attribute. Work of another recipe or of other data is
refused, with both named, or begun anew where that is asked for (``restart``, ``--restart``). Work
of another version of this package goes on, with a warning.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from densitykit import __version__
from densitykit.errors import UnfinishedError
from densitykit.io.store import Lock, is_ours, load_arrays, runs, save_arrays

__all__ = ["Work", "as_recipe", "check_recipe", "check_store", "discard", "fingerprint", "spelled"]


class Work:
    """The state of unfinished work, in one file that says what it belongs to.

    Parameters
    ----------
    path
        The file.
    recipe
        What must be the same when the work is continued: settings, and fingerprints of data.
    restart
        Forget what is there.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path, self.recipe = Path(path), as_recipe(recipe)
        if restart:
            self.remove()

    def load(self) -> dict[str, NDArray] | None:
        """Return what was saved last, None where there is nothing.

        Raises
        ------
        UnfinishedError
            The file is broken, or of another recipe.
        """
        if not self.path.exists():
            return None
        try:
            arrays = load_arrays(self.path)
            recipe = json.loads(str(arrays.pop("recipe")))
        except Exception as error:  # zip, numpy, json and the file system each raise their own
            raise UnfinishedError(
                f"{self.path}: not a whole state of unfinished work ({_short(error)}); remove the "
                "file, or begin anew (--restart)"
            ) from error
        check_recipe(self.path, recipe, self.recipe)
        return arrays

    def save(self, arrays: Mapping[str, Any]) -> None:
        """Replace the file, in one piece."""
        save_arrays(self.path, {**arrays, "recipe": json.dumps(self.recipe)})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def as_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON gives them back, with the version of the code."""
    plain = json.dumps({**settings, "densitykit": __version__}, default=lambda x: x.tolist())
    return json.loads(plain)


def check_recipe(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare what both recipes tell; raise `UnfinishedError` naming each difference."""
    other = [*_differences(found, wanted)]
    code = [line for line in other if line.startswith("densitykit ")]
    if code:
        warnings.warn(f"{path}: begun by another version: {code[0]}", stacklevel=3)
    if other := [line for line in other if line not in code]:
        raise UnfinishedError(
            f"{path}: begun with another recipe: {'; '.join(other)}; ask for the same again, "
            "choose another path, or begin anew (--restart)"
        )


def _differences(found: Mapping, wanted: Mapping, prefix: str = "") -> Iterator[str]:
    for key in [key for key in wanted if key in found]:
        ours, theirs = wanted[key], found[key]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(theirs, ours, f"{prefix}{key} ")
        elif ours != theirs:
            yield f"{prefix}{key} is {_short(theirs)}, not {_short(ours)}"


def check_store(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a store was made by a recipe, or knows of none; `UnfinishedError`: by another."""
    text = zarr.open_group(path, mode="r").attrs.get("recipe")
    if text is None:
        return False
    check_recipe(path, json.loads(text), as_recipe(recipe))
    return True


def discard(path: Path) -> None:
    """Remove a store, to begin anew; refuse what is none of ours, or being written."""
    if not path.exists():
        return
    found = [path / run for run in runs(path)]
    if not all(map(is_ours, found)):
        raise UnfinishedError(f"{path}: no trajectory, so it is not replaced; choose another path")
    for run in found:
        with Lock(run):
            shutil.rmtree(run)
    if path.exists():
        shutil.rmtree(path)


def fingerprint(value: Any, crc: int = 0) -> int:
    """CRC-32 of what a value holds: text, numbers to 7 digits, arrays bit by bit, else attributes.

    Of objects, public attributes; of networks, their weights as well.
    """
    if hasattr(value, "detach"):
        value = np.asarray(value.detach().cpu())
    if isinstance(value, np.ndarray):
        crc = zlib.crc32(f"{value.dtype} {value.shape}".encode(), crc)
        return zlib.crc32(np.ascontiguousarray(value).tobytes(), crc)
    if isinstance(value, float):
        value = f"{value:.7g}"
    if value is None or isinstance(value, str | bytes | int | bool):
        return zlib.crc32(repr(value).encode(), crc)
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        crc = zlib.crc32(spelled(value).encode(), crc)
        value = {} if callable(value) and not hasattr(value, "__dict__") else _attributes(value)
    for key, part in value.items():
        crc = fingerprint(part, zlib.crc32(str(key).encode(), crc))
    return crc


def _attributes(value: Any) -> dict[str, Any]:
    weights = ("_parameters", "_buffers", "_modules")
    found = getattr(value, "__dict__", {})
    return {k: v for k, v in found.items() if k in weights or k[0] != "_" and k != "training"}


def spelled(value: Any) -> str:
    """Return the name of a function, a class or the class of an object, with bound arguments."""
    if isinstance(value, partial):
        words = {k: spelled(v) if callable(v) else repr(v) for k, v in value.keywords.items()}
        given = [*map(repr, value.args), *(f"{k}={v}" for k, v in words.items())]
        return f"{spelled(value.func)}({', '.join(given)})"
    return getattr(value, "__qualname__", type(value).__qualname__)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) < 100 else f"{text[:60]}... ({zlib.crc32(text.encode()):08x})"
