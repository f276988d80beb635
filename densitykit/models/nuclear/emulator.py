r"""An emulator that knows what moves: nuclei lead, the density follows.

The density of a material in its ground state is decided by where the nuclei are. So the smallest
latent of a frame is its nuclei, and the map of a step has two parts, after a start from a window:

.. math::
   \text{start:} \quad & (R_t, V_t) \text{ of the frames, or read from } \rho, \\
   \text{move:} \quad & M \ddot R = -\nabla E(R) + \text{thermostat}, \\
   \text{density:} \quad & \rho_{t+h} = \rho_0(R_{t+h}) + e_{t+h}, \quad
   e_{t+h} = e_t + U[\rho_0(R_{t+h}),\, \rho_0(R_{t+h}) - \rho_0(R_t),\, e_t] .

E is linear in invariants (`force_field`), or that of any calculator of ASE. :math:`\rho_0` is a
sum of atomic contributions, spherical ones (`superposition`) or those of a static map, which know
their surroundings (`densitykit.models.deep_density.linear`); e is what that leaves over, and U a
periodic U-Net, or none: e = 0. The net sees e of the frame before, which holds what nuclei within
its receptive field do not tell (a small metallic cell has few levels, and each feels all nuclei).
Given the path of the nuclei there is no chaos, so errors of e do not grow.

**Start.** Positions and velocities are those of the window. Where it has none, and one species
stands out of the density, a filter reads the nuclei (`densitykit.analysis.nuclei`). Velocities
that are missing are backward differences of second order: these miss by
:math:`\tau^2 \dddot R/3`; Verlet's with time step :math:`\delta` are those of a path at
:math:`\delta^2 \dddot R/6` more. Both are added, with the jerk from the force field.
**Thermostat**: stochastic velocity rescaling (Bussi, Donadio, Parrinello 2007, eq. A7), as in the
ab-initio runs, once a time step, in the middle of it: velocities between two positions have the
thermostat's temperature, and positions the right distribution even where steps are long (Zhang et
al. 2017; at its ends, Verlet's velocities tell too little, and positions are too hot by
:math:`(\omega\delta)^2/4`). Its random numbers are the only ones here: without a generator a step
is the motion without thermostat.

Cell and grid are those of the window: a map trained on 32 atoms serves any supercell.
Lengths are in angstrom, densities in angstrom**-3, times in fs, temperatures in K.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from densitykit.analysis.nuclei import NucleiFilter, assign, find_nuclei
from densitykit.data.transforms import fourier_resample, multiple_of, restore_electrons
from densitykit.data.windows import Window
from densitykit.errors import ShapeError, WindowError
from densitykit.fields import check_stride
from densitykit.models.base import Domain
from densitykit.models.deep_density.linear import LinearDensity
from densitykit.models.nuclear.force_field import LinearForceField, species_index
from densitykit.models.nuclear.superposition import Superposition
from densitykit.nn.layers import UNet
from densitykit.units import ACCELERATION, KELVIN, SYMBOLS, atomic_masses

__all__ = ["NuclearEmulator", "NuclearState", "ResidualNet", "supercell", "thermal_velocities"]

REACH = 1.0  # farthest that a nucleus moves between two frames, angstrom


@dataclass(frozen=True)
class NuclearState:
    """What the emulator remembers from step to step, of B members.

    Attributes
    ----------
    positions, velocities, accelerations
        Unwrapped, (B, N, 3), in angstrom, angstrom/fs and angstrom/fs**2.
    base, residual
        The superposition and what it leaves over, angstrom**-3, (B, X, Y, Z), on the working grid.
    mean_density
        To be kept, angstrom**-3, (B, 1, 1, 1), double precision.
    cell
        Lattice vectors in rows, angstrom, (B, 3, 3).
    numbers
        Atomic numbers, (N,).
    grid
        That of the window.
    """

    positions: Tensor
    velocities: Tensor
    accelerations: Tensor
    base: Tensor
    residual: Tensor
    mean_density: Tensor
    cell: Tensor
    numbers: Tensor
    grid: tuple[int, ...]

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


def supercell(
    positions: Tensor, cell: np.ndarray, times: tuple[int, int, int] = (2, 2, 2)
) -> Tensor:
    """Nuclei of copies of a cell.

    Parameters
    ----------
    positions
        Shape (B, N, 3) in angstrom.
    cell
        Lattice vectors of one copy as rows, shape (3, 3), in angstrom.
    times
        Copies along each axis.

    Returns
    -------
    Tensor
        Shape (B, N prod(times), 3), copy after copy; vectors of the cell of all are those of
        ``cell``, each so many times, and atomic numbers repeat.
    """
    copies = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in times])
    shifts = copies.to(positions) @ torch.from_numpy(np.asarray(cell, float)).to(positions)
    return (positions[:, None] + shifts[:, None]).flatten(1, 2)


def thermal_velocities(
    positions: Tensor, masses: Tensor | float, temperature: float, generator: torch.Generator
) -> Tensor:
    """Maxwell's velocities in angstrom/fs for nuclei (B, N, 3), at rest as a whole.

    Without them the copies in a supercell would move alike. The kinetic energy is exactly that of
    the temperature (K) for 3N - 3 degrees of freedom; masses in dalton, one or (N,).
    """
    m = torch.as_tensor(masses, dtype=torch.float64).to(positions).expand(positions.shape[1])
    v = torch.randn(positions.shape, generator=generator, dtype=torch.float64).to(positions)
    v = _at_rest(v / m.sqrt()[:, None], m)
    energy = _twice_kinetic(v, m) / (3 * (positions.shape[1] - 1))
    return v * (KELVIN * temperature / energy).sqrt()[:, None, None]


def _at_rest(v: Tensor, m: Tensor) -> Tensor:
    """Velocities (B, N, 3) relative to the centre of mass."""
    return v - (m[:, None] * v).sum(dim=1, keepdim=True) / m.sum()


def _twice_kinetic(v: Tensor, m: Tensor) -> Tensor:
    """Sum of m v**2, shape (B,)."""
    return (m[:, None] * v.square()).sum(dim=(1, 2))


class ResidualNet(nn.Module):
    """U: the residual of the superposition after a step, from the one before.

    The scales of its inputs are buffers, set by :meth:`set_scales`.

    Parameters
    ----------
    widths, blocks, patch
        Of :class:`densitykit.nn.layers.UNet`.
    """

    def __init__(
        self, widths: tuple[int, ...] = (48, 96), blocks: tuple[int, ...] = (2, 3), patch: int = 2
    ) -> None:
        super().__init__()
        self.net = UNet(3, 1, tuple(widths), tuple(blocks), patch)
        self.stride = self.net.stride
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scales", torch.ones(3))  # of base, its change, residual

    @torch.no_grad()
    def set_scales(self, base: Tensor, change: Tensor, residual: Tensor) -> None:
        """Standardise the inputs by their statistics on training frames, (*, X, Y, Z) each."""
        self.mean.copy_(base.mean())
        self.scales.copy_(torch.stack([x.std() for x in (base, change, residual)]))

    def normalise(self, fields: Tensor) -> Tensor:
        """Physical fields (B, C, X, Y, Z) as the training makes them -> the same.

        Parameters
        ----------
        fields
            Base, its change and the residual before (C = 3), or the residual (C = 1).
        """
        if fields.shape[1] == 1:
            return fields / self.scales[2]
        shift = torch.stack([self.mean, 0 * self.mean, 0 * self.mean])
        return (fields - shift.reshape(3, 1, 1, 1)) / self.scales.reshape(3, 1, 1, 1)

    def advance(self, fields: Tensor) -> Tensor:
        """Normalised inputs (B, 3, X, Y, Z) -> normalised residual (B, 1, X, Y, Z)."""
        return fields[:, 2:] + self.net(fields)

    def forward(self, base: Tensor, before: Tensor, residual: Tensor) -> Tensor:
        """Residual after a step; superposition after and before it, residual before it.

        All (B, X, Y, Z) in angstrom**-3. A residual of zero everywhere means "unknown".
        """
        check_stride(base.shape[1:], self.stride)
        fields = torch.stack([base, base - before, residual], dim=1)
        return self.advance(self.normalise(fields))[:, 0] * self.scales[2]


class NuclearEmulator(nn.Module):
    """One-step map through the nuclei; see the module's docstring.

    Parameters
    ----------
    horizon
        Time of one step, fs.
    domain
        What it is fitted to, a `densitykit.models.base.Domain` or its fields. None: a static map
        draws on any grid, and tells the species; it starts from one frame with velocities.
    filter_nodes
        Nodes of the filter that finds nuclei in a density; 0 if there is none.
    knots
        Of the splines of the superposition.
    temperature, relaxation
        Of the thermostat, K and fs; it acts where a generator is given. None: constant energy.
    force_field
        Arguments of :class:`densitykit.models.nuclear.force_field.LinearForceField`, or such a
        field itself, or what has its `forces`, as
        `densitykit.generate.film.CalculatorForces` of a calculator of ASE.
    substeps
        Time steps of the nuclei in one step.
    widths, blocks, patch
        Of :class:`ResidualNet`; without widths there is none.
    density
        A `densitykit.models.deep_density.linear.LinearDensity`, or its arguments; None: a
        superposition.

    Raises
    ------
    ShapeError
        Numbers out of range, or parts that are none.
    """

    context = 3

    def __init__(
        self,
        horizon: float,
        domain: Domain | Mapping[str, Any] | None = None,
        filter_nodes: int = 0,
        knots: int = 0,
        temperature: float | None = None,
        relaxation: float = 300.0,
        force_field: Mapping[str, Any] | Any = None,
        substeps: int = 2,
        widths: tuple[int, ...] = (48, 96),
        blocks: tuple[int, ...] = (2, 3),
        patch: int = 2,
        density: Mapping[str, Any] | LinearDensity | None = None,
    ) -> None:
        super().__init__()
        if not (min(horizon, relaxation, substeps) > 0 and (temperature or 0) >= 0):
            problem = f"horizon {horizon} fs, relaxation {relaxation} fs, substeps {substeps}"
            raise ShapeError(f"{problem}, temperature {temperature} K; give positive numbers")
        density = LinearDensity(**density) if isinstance(density, Mapping) else density
        if density is None and (domain is None or not knots):
            raise ShapeError("neither a domain with knots nor a density; give one of them")
        self.domain = Domain(**domain) if isinstance(domain, Mapping) else domain
        self.context = 1 if self.domain is None else 3
        self.species = tuple((density or self.domain).species)
        self.horizon, self.substeps = horizon, substeps
        self.temperature, self.relaxation = temperature, relaxation
        self.force_field = _forces_of(force_field, self.species)
        self.superposition = Superposition(knots, self.species) if density is None else density
        self.residual_net = ResidualNet(widths, blocks, patch) if widths else None
        self.stride = self.residual_net.stride if widths else 1
        masses = torch.from_numpy(atomic_masses(self.species))
        self.register_buffer("species_masses", masses, persistent=False)
        self.register_buffer("filter_nodes", torch.zeros(filter_nodes, dtype=torch.float64))
        self.register_buffer("filter_weights", torch.zeros(filter_nodes, dtype=torch.float64))

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        elements = ", ".join(SYMBOLS[z] for z in self.species)
        return f"NuclearEmulator of {elements}, step {self.horizon:g} fs, {count} parameters"

    @property
    def filter(self) -> NucleiFilter | None:
        """The filter that finds nuclei in a density, if it has one."""
        if not len(self.filter_nodes):
            return None
        return NucleiFilter(self.filter_nodes.cpu().numpy(), self.filter_weights.cpu().numpy())

    def masses(self, numbers: Tensor) -> Tensor:
        """Masses of nuclei (N,) in dalton."""
        kinds = species_index(numbers, self.species, len(numbers))
        return self.species_masses[kinds.to(self.species_masses.device)]

    @torch.no_grad()
    def init(self, window: Window) -> NuclearState:
        """State of the present frame of a window.

        Raises
        ------
        WindowError
            The window is of another domain, or its nuclei are not known and not found.
        """
        window = window.past(self.context)
        moving = window.positions is not None and window.velocities is not None
        if not moving and self.context < 3:
            raise WindowError(
                f"{window.source}: no positions or no velocities, and without a domain this "
                "NuclearEmulator starts from both; write them to the store"
            )
        if self.domain is not None:
            # the time between frames matters only where they are differenced
            self.domain.check(window.past(1) if moving else window, "this NuclearEmulator")
        cell, numbers = window.cell.to(self.filter_nodes), self._numbers(window)
        if moving:
            x, v = (y[:, -1].to(cell) for y in (window.positions, window.velocities))
        else:
            x, v = self._differenced(window, cell, numbers)
        rho = window.at(0)
        mean = rho.mean((1, 2, 3), keepdim=True, dtype=torch.float64)
        state = self.init_at(x, _at_rest(v, self.masses(numbers)), cell, window.grid, numbers)
        rho = fourier_resample(rho, tuple(state.base.shape[1:]))
        return state.replace(residual=rho - state.base, mean_density=mean)

    def init_at(
        self,
        positions: Tensor,
        velocities: Tensor,
        cell: Tensor,
        grid: tuple[int, ...],
        numbers: Tensor | None = None,
    ) -> NuclearState:
        """State of given nuclei, without a residual; :meth:`converge_density` finds it.

        Parameters
        ----------
        positions, velocities
            Shape (B, N, 3) in angstrom and angstrom/fs.
        cell
            Lattice vectors in rows, angstrom, (3, 3) or (B, 3, 3).
        grid
            Numbers of points, (X, Y, Z).
        numbers
            Atomic numbers, (N,); one species needs none.
        """
        if positions.ndim != 3 or positions.shape != velocities.shape or len(grid) != 3:
            raise ShapeError(
                f"positions {tuple(positions.shape)}, velocities {tuple(velocities.shape)} and "
                f"grid {tuple(grid)} do not fit; give (B, N, 3), (B, N, 3) and (X, Y, Z)"
            )
        x, v, cell = (y.to(self.filter_nodes) for y in (positions, velocities, cell))
        cell, grid = cell.expand(len(x), 3, 3), tuple(grid)
        if numbers is None and len(self.species) == 1:
            numbers = torch.full((x.shape[1],), self.species[0])
        base = self.superposition(x, cell, multiple_of(self.stride, grid), numbers)
        mean, base = base.mean((1, 2, 3), keepdim=True), base.float()
        a = self._accelerations(x, cell, numbers)
        return NuclearState(x, v, a, base, torch.zeros_like(base), mean, cell, numbers, grid)

    def _numbers(self, window: Window) -> Tensor:
        """Atomic numbers of a window; of one species without any, from the electrons."""
        if window.numbers is not None:
            return window.numbers
        if len(self.species) > 1:
            raise WindowError(
                f"{window.source}: no atomic numbers, and this NuclearEmulator knows "
                f"{list(self.species)}; write `numbers` to the store"
            )
        if window.positions is not None:
            return torch.full(window.positions.shape[2:3], self.species[0])
        if self.filter is None:
            raise self._unread(window)
        volume, charge = torch.linalg.det(window.cell[0]).abs(), self.superposition.charges[0]
        count = round(float(window.at(0)[0].mean(dtype=torch.float64) * volume / charge))
        return torch.full((max(count, 1),), self.species[0])

    def _differenced(self, window: Window, cell: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and velocities now, from those of three frames."""
        tau, delta = window.time_step, self.horizon / self.substeps
        if window.positions is None:
            x = torch.stack([self._read(one, len(numbers)) for one in _members(window)]).to(cell)
        else:
            x = window.positions.to(cell)
        now, laps = x[:, -1:], (x - x[:, -1:]) @ torch.linalg.inv(cell)[:, None]
        x = now + (laps - laps.round()) @ cell[:, None]
        v = (3 * x[:, 2] - 4 * x[:, 1] + x[:, 0]) / (2 * tau)
        a = self._accelerations(x[:, 2], cell, numbers)
        jerk = (a - self._accelerations(x[:, 2] - v * tau, cell, numbers)) / tau
        return x[:, 2], v + (tau**2 / 3 + delta**2 / 6) * jerk

    def _read(self, window: Window, count: int) -> Tensor:
        """Nuclei of the three frames of a member, read from the density: (3, N, 3)."""
        if self.filter is None:
            raise self._unread(window)
        frames, cell = window.density[0].double().cpu().numpy(), window.cell[0].cpu().numpy()
        found = [find_nuclei(f, cell, count, self.filter) for f in frames]
        if any(len(x) != count for x in found):
            raise WindowError(
                f"{window.source}: {[len(x) for x in found]} nuclei found in three frames of "
                f"{count}; give a density like that of the training run, or positions"
            )
        paths = [found[-1]]
        for x in found[:-1]:
            pairs, vectors = assign(x, found[-1], cell, np.full(count, REACH))
            if (pairs < 0).any():
                raise WindowError(
                    f"{window.source}: nuclei move more than {REACH} angstrom between frames; "
                    f"give frames {self.domain.time_step:g} fs apart"
                )
            paths.insert(-1, found[-1] + vectors)
        return torch.from_numpy(np.stack(paths))

    def _unread(self, window: Window) -> WindowError:
        return WindowError(
            f"{window.source}: no positions, and this NuclearEmulator cannot read those of "
            f"{list(self.species)} from a density; write positions to the store"
        )

    def _accelerations(self, positions: Tensor, cell: Tensor, numbers: Tensor) -> Tensor:
        forces = self.force_field.forces(positions, cell, numbers)
        return ACCELERATION * forces / self.masses(numbers)[:, None]

    @torch.no_grad()
    def move(self, state: NuclearState, generator: torch.Generator | None = None) -> NuclearState:
        """The nuclei one step later; the density is left as it was."""
        delta, cell, numbers = self.horizon / self.substeps, state.cell, state.numbers
        x, v, a = state.positions, state.velocities, state.accelerations
        for _ in range(self.substeps):
            v = v + delta / 2 * a
            free = generator is None or self.temperature is None
            held = v if free else self._rescaled(v, numbers, delta, generator)
            x = x + delta / 2 * (v + held)
            a = self._accelerations(x, cell, numbers)
            v = held + delta / 2 * a
        return state.replace(positions=x, velocities=v, accelerations=a)

    def _rescaled(
        self, v: Tensor, numbers: Tensor, delta: float, generator: torch.Generator
    ) -> Tensor:
        """Velocities after the thermostat (Bussi et al. 2007, eq. A7)."""
        if v.shape[1] < 2 or not v.any(dim=2).any(dim=1).all():
            raise ShapeError(
                "a thermostat scales velocities: give 2 nuclei or more that move, such as with "
                "densitykit.models.nuclear.emulator.thermal_velocities, or no generator"
            )
        freedom = 3 * (v.shape[1] - 1)
        r = torch.randn(len(v), freedom, generator=generator, dtype=torch.float64).to(v)
        kinetic = _twice_kinetic(v, self.masses(numbers)) / 2
        share = KELVIN * self.temperature / 2 / kinetic  # of one degree of freedom
        c = math.exp(-delta / self.relaxation)
        square = c + share * (1 - c) * r.square().sum(dim=1)
        square = square + 2 * r[:, 0] * (share * c * (1 - c)).sqrt()
        return v * square.sqrt()[:, None, None]

    @torch.no_grad()
    def predict_density(self, state: NuclearState) -> NuclearState:
        """The density of nuclei that have moved."""
        base = self._base(state)
        if self.residual_net is None:
            return state.replace(base=base, residual=torch.zeros_like(base))
        residual = self.residual_net(base, state.base, state.residual)
        return state.replace(base=base, residual=residual - residual.mean((1, 2, 3), True))

    def _base(self, state: NuclearState) -> Tensor:
        shape = tuple(state.base.shape[1:])
        return self.superposition(state.positions, state.cell, shape, state.numbers).float()

    def converge_density(self, state: NuclearState, repeats: int = 3) -> NuclearState:
        """The density of nuclei that have not moved: predicted again and again, at rest.

        What it remembers of other positions is forgotten first, so the result depends on where
        the nuclei are, and on nothing else.
        """
        base = self._base(state)
        state = state.replace(base=base, residual=torch.zeros_like(base))
        for _ in range(repeats if self.residual_net is not None else 0):
            state = self.predict_density(state)
        return state

    def step(self, state: NuclearState, generator: torch.Generator | None = None) -> NuclearState:
        """State one horizon later."""
        return self.predict_density(self.move(state, generator))

    def density(self, state: NuclearState) -> Tensor:
        """Density in angstrom**-3, (B, X, Y, Z), with the number of electrons of the start."""
        rho = fourier_resample(state.base + state.residual, state.grid)
        return restore_electrons(rho, state.mean_density)

    def nuclei(self, state: NuclearState) -> tuple[Tensor, Tensor]:
        """Positions, unwrapped, and velocities, (B, N, 3), in angstrom and angstrom/fs."""
        return state.positions, state.velocities


def _forces_of(given: Any, species: tuple[int, ...]) -> Any:
    """A field from its arguments, or what is one."""
    if given is None or isinstance(given, Mapping):
        return LinearForceField(**(given or {}) | {"species": species})
    if not callable(getattr(given, "forces", None)):
        raise ShapeError(
            f"a {type(given).__name__} has no method forces; give a LinearForceField, or a "
            "calculator of ASE in densitykit.generate.film.CalculatorForces"
        )
    return given


def _members(window: Window) -> list[Window]:
    return [window[b : b + 1] for b in range(len(window))]
