"""The interface of all Kohn-Sham engines: an ASE calculator that can also give its density.

Positions go in through ASE (`atoms.calc = engine`), energy (eV) and forces (eV/angstrom) come out
through ASE, so that its dynamics and optimisers apply. Three methods are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

__all__ = ["Engine"]


class Engine(Protocol):
    """What computes a density: an ASE calculator with three methods more."""

    def get_potential_energy(self, atoms: Atoms) -> float:
        """Energy in eV."""

    def get_forces(self, atoms: Atoms) -> NDArray[np.float64]:
        """Forces in eV/angstrom, shape (atom, 3)."""

    def density(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """Density of the configuration solved last on a cell-periodic grid, angstrom**-3."""

    def description(self) -> dict[str, Any]:
        """Provenance: engine, version, functional, cutoff, ... (JSON)."""

    def close(self) -> None:
        """Give back what the engine holds."""
