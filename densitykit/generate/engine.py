"""The interface of all Kohn-Sham engines: an ASE calculator that can also give its density.

Positions go in through ASE (`atoms.calc = engine`), energy (eV) and forces (eV/angstrom) come out
through ASE, so that its dynamics and optimisers apply. Three methods are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import ArrayLike, NDArray

__all__ = ["Engine", "valence_charges"]


class Engine(Protocol):
    """What computes a density: an ASE calculator with three methods more."""

    def get_potential_energy(self, atoms: Atoms) -> float:
        """Energy in eV."""

    def get_forces(self, atoms: Atoms) -> NDArray[np.float64]:
        """Forces in eV/angstrom, shape (atom, 3)."""

    def density(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """Density of the configuration solved last on a cell-periodic grid, angstrom**-3."""

    def description(self) -> dict[str, Any]:
        """Provenance: engine, version, functional, cutoff, ... (JSON).

        "valence_charges", where the engine knows them: electrons of each element, by symbol.
        """

    def close(self) -> None:
        """Give back what the engine holds."""


def valence_charges(
    description: Mapping[str, Any], numbers: ArrayLike
) -> NDArray[np.float64] | None:
    """Electrons that each atom gives the density, as the description of an engine has them.

    Parameters
    ----------
    description
        See `Engine.description`.
    numbers
        Atomic numbers, shape (atom,).

    Returns
    -------
    ndarray or None
        Shape (atom,); None where the engine does not say, or not for all elements.
    """
    known = description.get("valence_charges", {})
    symbols = [chemical_symbols[int(z)] for z in np.ravel(numbers)]
    if not set(symbols) <= known.keys():
        return None
    return np.array([float(known[symbol]) for symbol in symbols])
