"""Metadata that tell when they have been changed: each `zarr.json` holds its own CRC-32.

It is the attribute `metadata_crc32`, eight hexadecimal digits, and covers all bytes of the file,
with zeros in the place of these digits. Stores of format 2.0 and before have none.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

from densitykit.io.store import replacing

__all__ = ["CHECKSUM"]

CHECKSUM = "metadata_crc32"
_MARK, _BLANK = re.compile(rb'"metadata_crc32": "([0-9a-f]{8})"'), b'"metadata_crc32": "00000000"'


def _files(folder: Path) -> list[Path]:
    return [folder / "zarr.json", *sorted(folder.glob("[!.]*/zarr.json"))]


def seal(folder: Path) -> None:
    """Give the metadata of a new group, and of its arrays, their checksums."""
    for file in _files(folder):
        if not _holds(file):
            text = _sealed(json.loads(file.read_bytes()))
            file.unlink()  # it may be a link to that of another store
            file.write_bytes(text)


def seal_root(folder: Path) -> None:
    """Give the metadata of a root group the right checksum, in one piece."""
    file = folder / "zarr.json"
    if not _holds(file):
        text = _sealed(json.loads(file.read_bytes()))
        with replacing(file) as new:
            new.write(text)


def set_attributes(folder: Path, **attributes: Any) -> None:
    """Change attributes of a group or an array, in one piece; a right checksum stays right."""
    file = folder / "zarr.json"
    metadata = json.loads(file.read_bytes())
    metadata.setdefault("attributes", {}).update(attributes)
    text = _sealed(metadata) if _holds(file) else json.dumps(metadata, indent=2).encode()
    with replacing(file) as new:
        new.write(text)


def _sealed(metadata: dict[str, Any]) -> bytes:
    metadata["attributes"] = metadata.get("attributes", {}) | {CHECKSUM: "00000000"}
    text = json.dumps(metadata, indent=2).encode()
    return text.replace(_BLANK, b'"metadata_crc32": "%08x"' % zlib.crc32(text))


def _holds(file: Path) -> bool | None:
    """Whether the checksum of metadata is right; None if there is none."""
    text = file.read_bytes()
    found = _MARK.findall(text)
    if len(found) != 1:
        return None
    return int(found[0], 16) == zlib.crc32(_MARK.sub(_BLANK, text))


def metadata_problems(folder: Path, *, root: bool = False) -> list[str]:
    """List metadata that are not as they were written, of a group and its arrays; one line each.

    Where one file has a checksum, all must have. Of a `root` of runs only its own file is listed.
    """
    found = {file: _holds(file) for file in _files(folder)}
    if set(found.values()) == {None}:
        return []
    fix = "restore it from a copy, or, if it was meant, run `densitykit upgrade` on the store"
    return [
        f"{file.relative_to(folder)}: changed since it was written; {fix}"
        for file, holds in found.items()
        if not holds and not (root and file.parent != folder)
    ]
