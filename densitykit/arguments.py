"""Types of command-line values: what is out of range is a usage error that names the range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = ["count", "fraction", "keepbits", "non_negative", "positive", "positive_count", "seed"]
__all__ += ["batch", "frames", "processes"]


def _number(
    kind: Callable[[str], float], name: str, accepts: Callable[[float], bool], wanted: str
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {name}") from None
        if not (math.isfinite(value) and accepts(value)):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    return _number(int, "whole number", lambda x: low <= x <= high, f"in {low}..{high}")


def _real(accepts: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    return _number(float, "number", accepts, wanted)


#: frames, steps, sizes: far beyond what a machine can do, and within what every library can count
count = _integer(0, 10**9)
positive_count = _integer(1, 10**9)
frames = _integer(1, 10**7)  # of a store, which is made at its full length
batch = _integer(1, 10**5)  # samples, grid points along an edge
processes = _integer(1, 4096)  # and threads
keepbits = _integer(1, 23)  # of a float32
seed = _integer(0, 2**32 - 1)  # the smallest range among the libraries that take one
positive = _real(lambda x: x > 0, "a positive number")
non_negative = _real(lambda x: x >= 0, "a number from zero on")
fraction = _real(lambda x: 0 <= x <= 1, "between 0 and 1")
