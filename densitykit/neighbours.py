"""Neighbours in any cell, by `vesin`: the cost grows with the number of atoms, not of pairs.

A pair is an atom and an image of another, or of the same: in a cell smaller than twice the cutoff
an atom sees several images. Lengths are in angstrom.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import vesin

from densitykit.errors import ShapeError

__all__ = ["neighbour_pairs"]


@lru_cache(maxsize=16)
def _finder(cutoff: float, both_ways: bool) -> vesin.NeighborList:
    # one thread: pairs come in one order, so that sums over them are the same in each run
    return vesin.NeighborList(cutoff=cutoff, full_list=both_ways, n_threads=1)


def neighbour_pairs(
    positions: np.ndarray, cell: np.ndarray, cutoff: float, both_ways: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of atoms that are closer than a cutoff, images included.

    Parameters
    ----------
    positions
        Shape (N, 3) in angstrom, wrapped or not.
    cell
        Lattice vectors as rows, shape (3, 3), in angstrom; periodic along all.
    cutoff
        In angstrom.
    both_ways
        Also from j to i; otherwise each pair comes once.

    Returns
    -------
    tuple[np.ndarray, np.ndarray, np.ndarray]
        i and j, shapes (pair,), and the integers n, shape (pair, 3), of the image: the vector
        from i to j is ``positions[j] - positions[i] + n @ cell``.

    Raises
    ------
    ShapeError
        If the positions are not finite, or the cell is none.
    """
    positions, cell = np.asarray(positions, np.float64), np.asarray(cell, np.float64)
    if positions.ndim != 2 or positions.shape[1] != 3 or cell.shape != (3, 3):
        raise ShapeError(
            f"neighbours need positions (N, 3) and a cell (3, 3), not {positions.shape} and "
            f"{cell.shape}"
        )
    if not np.isfinite(positions).all() or not abs(np.linalg.det(cell)) > 0 or cutoff <= 0:
        raise ShapeError(
            "no neighbours: positions must be finite, the cell must have a volume and the cutoff "
            f"be positive; here the cell is {cell.tolist()} and the cutoff {cutoff}"
        )
    i, j, n = _finder(float(cutoff), both_ways).compute(positions, cell, True, "ijS")
    return i.astype(np.int64), j.astype(np.int64), n.astype(np.float64)
