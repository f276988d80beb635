r"""A film of the density of any material: atoms, a force field, and a map from atoms to density.

Nuclei move in the forces of a classical or learned force field, and at each frame a static map
draws the density of where they are,

.. math:: \ddot R_I = -\frac{1}{m_I} \frac{\partial U}{\partial R_I}, \qquad
   \rho(r, t) = \hat\rho(r; R(t)) .

The map does not act on the nuclei, so the film is as good as both its parts: U decides where
atoms go, and the map what they look like there. `Film` joins the two to an engine, which
`densitykit.generate.dynamics.molecular_dynamics` drives as it does those of Kohn-Sham DFT: NVE or
a Bussi thermostat, safe against being killed, any cell and any elements that both parts know.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.calculator import get_calculator_class as ase_calculator
from numpy.typing import NDArray

from densitykit.analysis.scattering import time_correlation
from densitykit.analysis.transport import without_drift
from densitykit.errors import CheckpointError, DensityKitError, GenerationError
from densitykit.generate.dynamics import molecular_dynamics
from densitykit.models import load_model
from densitykit.models.deep_density.linear import Atoms as Configuration
from densitykit.models.deep_density.predict import boxed, grid_of, too_close
from densitykit.units import SYMBOLS

__all__ = [
    "CalculatorForces",
    "Film",
    "UncertainForces",
    "film",
    "force_error",
    "force_field",
]


class Film(Calculator):
    """Forces of one calculator, densities of a map.

    Parameters
    ----------
    force
        Any ASE calculator with energy and forces.
    model
        A static map, from its checkpoint.
    names
        Of both, for the attributes of the trajectory.

    Raises
    ------
    GenerationError
        The force field fails, as where it does not know an element; the message is its own.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces"]

    def __init__(self, force: Calculator, model: Any, names: Sequence[str] = ("", "")) -> None:
        super().__init__()
        self.force, self.model, self.names = force, model, tuple(names)
        self._warned = False

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Take energy and forces of the force field; called by ASE."""
        super().calculate(atoms, properties, system_changes)
        try:
            energy = float(self.force.get_potential_energy(self.atoms))
            forces = np.array(self.force.get_forces(self.atoms), float)
        except DensityKitError:
            raise
        except Exception as error:  # calculators have no errors in common
            raise GenerationError(
                f"force field {self.names[0] or type(self.force).__name__}: "
                f"{type(error).__name__}: {error}; give one that knows these atoms"
            ) from error
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}

    def density(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """Density that the map draws for the present atoms, angstrom**-3.

        The first configuration with atoms nearer than in the training set of the map is warned of.
        """
        a = self.atoms
        inner = Configuration(a.positions, a.numbers, np.asarray(a.cell), bool(a.pbc.all()))
        if not self._warned and hasattr(self.model, "nearest"):
            if found := too_close(self.model, inner):
                warnings.warn("; ".join(found), stacklevel=2)
                self._warned = True
        return self.model.density(inner, tuple(shape))

    def description(self) -> dict[str, Any]:
        """What the attributes of a trajectory say."""
        force, density = self.names
        charges = getattr(self.model, "charges", {})
        return {
            "engine": "a force field and a map from atoms to density",
            "forces": force,
            "map": density,
            "valence_charges": {SYMBOLS[z]: q for z, q in charges.items()},
        }

    def close(self) -> None:
        """Nothing is held."""


class CalculatorForces:
    """Forces of a calculator of ASE, as a `LinearForceField` gives them."""

    def __init__(self, calculator: Any) -> None:
        self.calculator = calculator

    def forces(
        self, positions: torch.Tensor, cell: torch.Tensor, numbers: torch.Tensor
    ) -> torch.Tensor:
        """Forces in eV/angstrom, (B, N, 3), of nuclei that are periodic along all axes."""
        cells, z = cell.expand(len(positions), 3, 3).cpu().numpy(), numbers.cpu().numpy()
        members = zip(positions.cpu().numpy(), cells, strict=True)
        atoms = (Atoms(z, x, cell=a, pbc=True) for x, a in members)
        forces = np.stack([self.calculator.get_forces(some) for some in atoms])
        return torch.from_numpy(forces).to(positions)


class UncertainForces(torch.nn.Module):
    r"""Forces with the error that a field is known to have: each member of an ensemble its own.

    .. math:: F = F_0 + \xi, \qquad
       \langle \xi(t)\, \xi(t') \rangle = \sigma^2 e^{-|t - t'| / \tau} ,

    independent for all components but for their sum over nuclei, which is zero. An error of forces
    is a function of the surroundings, so it lasts as long as these do.

    Parameters
    ----------
    field
        With ``forces(positions, cell, numbers)``, such as the ``force_field`` of an emulator.
    error, memory
        sigma in eV/angstrom and tau in fs, see :func:`force_error`.
    interval
        Time in fs between two evaluations: horizon over substeps.
    seed
        Of the errors.
    """

    def __init__(
        self, field: Any, error: float, memory: float, interval: float, seed: int = 0
    ) -> None:
        super().__init__()
        self.field, self.error, self.kept = field, error, float(np.exp(-interval / memory))
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = torch.zeros(0)

    def forces(
        self, positions: torch.Tensor, cell: torch.Tensor, numbers: torch.Tensor
    ) -> torch.Tensor:
        """Forces in eV/angstrom, (B, N, 3); each call is one interval later."""
        right = self.field.forces(positions, cell, numbers)
        fresh = self.error * torch.randn(
            right.shape, generator=self.generator, dtype=torch.float64
        )
        fresh = (fresh - fresh.mean(dim=1, keepdim=True)).to(right)
        if self.noise.shape == fresh.shape:
            fresh = self.kept * self.noise + (1 - self.kept**2) ** 0.5 * fresh
        self.noise = fresh
        return right + fresh


@torch.no_grad()
def force_error(field: Any, run: xr.Dataset) -> tuple[float, float]:
    """Standard deviation and memory of what a field misses along a run it has not seen.

    Parameters
    ----------
    field
        See :class:`UncertainForces`.
    run
        Trajectory with positions, forces, numbers and a cell, close enough in time to see an error
        change.

    Returns
    -------
    tuple[float, float]
        In eV/angstrom, and in fs: the integral of the correlation up to its first zero.
    """
    cell, z = (torch.from_numpy(run[k].values.copy()) for k in ("cell", "numbers"))
    x = torch.from_numpy(run["positions"].values.astype(float))
    guess = torch.cat([field.forces(some, cell, z) for some in x.split(16)]).cpu().numpy()
    wrong = without_drift(guess - run["forces"])
    known = time_correlation(wrong).mean(["atom", "cartesian"]).values
    last = int(np.argmax(known <= 0)) or len(known)
    spacing = float(run["time"][1] - run["time"][0])
    return float(wrong.std()), spacing * float(known[:last].sum() / known[0] - 0.5)


class Learned(Calculator):
    """The linear force field of an emulator with nuclei, as an ASE calculator."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def __init__(self, field: torch.nn.Module) -> None:
        super().__init__()
        self.field = field.double()

    @torch.no_grad()
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Evaluate the field; called by ASE."""
        super().calculate(atoms, properties, system_changes)
        R, cell = torch.from_numpy(self.atoms.positions)[None], torch.tensor(self.atoms.cell.array)
        numbers = torch.from_numpy(self.atoms.numbers)
        energy, forces = (f(R, cell, numbers) for f in (self.field.energy, self.field.forces))
        self.results = {"energy": float(energy), "forces": forces[0].numpy()}


def force_field(name: str) -> Calculator:
    """Return a force field by name.

    Parameters
    ----------
    name
        One of ASE's calculators ("emt", "lj", "tblite"), "spcfw" (flexible water, see
        `densitykit.generate.water`), a checkpoint of an emulator with nuclei, or an importable
        `module:function`, such as "mace.calculators:mace_mp", that makes a calculator when it is
        called. Only the last runs code that is not ours or ASE's, and you name it.

    Raises
    ------
    GenerationError
        There is no such force field, or it cannot be made.
    """
    if Path(f"{name}.safetensors").exists() or Path(name).suffix == ".safetensors":
        return _of_checkpoint(name)
    if name == "spcfw":
        from densitykit.generate.water import SPCFw

        return SPCFw()
    module, _, attribute = name.partition(":")
    try:
        if attribute:
            return getattr(importlib.import_module(module), attribute)()
        return ase_calculator(name)()
    except Exception as error:
        raise GenerationError(
            f"force field {name!r}: {type(error).__name__}: {error}; give a calculator of ASE "
            "such as 'emt', 'spcfw', a checkpoint of `densitykit train nuclear`, or "
            "'module:function'"
        ) from error


def _of_checkpoint(name: str) -> Calculator:
    model = load_model(name)
    if not hasattr(model, "force_field"):
        raise GenerationError(
            f"{name}: a {type(model).__name__} has no force field; give a checkpoint of "
            "`densitykit train nuclear`"
        )
    return Learned(model.force_field)


def film(
    structure: Atoms,
    force: str | Calculator,
    model: Any,
    path: str | Path,
    n_steps: int,
    *,
    time_step: float = 1.0,
    interval: int = 10,
    temperature: float | None = None,
    spacing: float = 0.25,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Make a film of the density of a structure, or continue it to `n_steps`.

    Parameters
    ----------
    structure
        Atoms, with velocities for a film at constant energy; a molecule without a cell gets a box.
    force
        An ASE calculator, or the name of one; see `force_field`.
    model
        A static map, or the name of its checkpoint.
    path, n_steps, time_step, interval, temperature, seed
        See `molecular_dynamics`; times in fs.
    spacing
        Largest distance of grid points, angstrom.
    options
        Further arguments of `molecular_dynamics`: relaxation, keepbits, restart, attrs.

    Returns
    -------
    Path
        `path`, a trajectory with positions, velocities and forces.

    Raises
    ------
    GenerationError
        Atoms at rest without a temperature, or see `Film` and `molecular_dynamics`.
    CheckpointError
        The model cannot draw a density of atoms.
    """
    atoms = boxed(structure, spacing)
    if temperature is None and not atoms.get_momenta().any():
        raise GenerationError(
            "the structure has no velocities; give a temperature (--temperature K), or a file "
            "with velocities"
        )
    names = [x if isinstance(x, str) else type(x).__name__ for x in (force, model)]
    model = load_model(model) if isinstance(model, str | Path) else model
    if not hasattr(model, "density") or hasattr(model, "step"):
        raise CheckpointError(
            f"{names[1]}: a {type(model).__name__} moves densities; give a static map, such as "
            "`densitykit train deep-density` makes"
        )
    engine = Film(force_field(force) if isinstance(force, str) else force, model, names)
    run = {"time_step": time_step, "interval": interval, "temperature": temperature, "seed": seed}
    grid = grid_of(np.asarray(atoms.cell), spacing)
    return molecular_dynamics(atoms, engine, path, n_steps, grid=grid, **run, **options)
