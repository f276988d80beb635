"""A progress bar that is quiet where nobody watches."""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import tqdm.auto
import tqdm.std

__all__ = ["progress_bar"]

_INTERVAL = 60.0  # s


class _Lines(tqdm.std.tqdm):
    """Writes a plain line where a bar would be redrawn, at most one a minute of all bars."""

    last = time.monotonic()

    def __init__(self, *args: Any, **options: Any) -> None:
        hidden = bool(options.get("disable"))  # None, "where there is no terminal", is not hidden
        super().__init__(*args, **options | {"file": io.StringIO(), "disable": hidden})

    def display(self, *_: Any, **__: Any) -> None:
        if time.monotonic() - _Lines.last >= _INTERVAL:
            _Lines.last = time.monotonic()
            print(self, file=sys.stderr, flush=True)


def progress_bar(*args: Any, **options: Any) -> tqdm.std.tqdm:
    """`tqdm.auto.tqdm` with its arguments; where stderr is no terminal, a line a minute."""
    watched = sys.stderr.isatty() or tqdm.auto.notebook_tqdm is not tqdm.std.tqdm
    return (tqdm.auto.tqdm if watched else _Lines)(*args, **options)
