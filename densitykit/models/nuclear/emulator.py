r"""An emulator that knows what moves: nuclei lead, the density follows.

The density of a liquid in its ground state is decided by where the nuclei are. So the smallest
latent of a frame is its nuclei, which the density itself shows (`densitykit.analysis.nuclei`), and
the map of a step has three parts:

.. math::
   \text{read:} \quad & (\rho_t, \rho_{t-\tau}, \rho_{t-2\tau}) \mapsto (R_t, V_t), \\
   \text{move:} \quad & M \ddot R = -\nabla E(R) + \text{thermostat}, \\
   \text{draw:} \quad & \rho_{t+h} = \rho_0(R_{t+h}) + e_{t+h}, \quad
   e_{t+h} = e_t + U[\rho_0(R_{t+h}),\, \rho_0(R_{t+h}) - \rho_0(R_t),\, e_t] .

E is linear in invariants (`force_field`), :math:`\rho_0` is a superposition of equal pieces
(`superposition`), e what that leaves over, and U a periodic U-Net. It sees e of the frame
before, which holds what nuclei within its sight do not tell (a small metallic cell has few
levels, and each feels all nuclei). Given the path of the nuclei there is no chaos, so errors of
e do not grow.

**Velocities.** Backward differences of second order miss by :math:`\tau^2 \dddot R/3`; Verlet's
with time step :math:`\delta` are those of a path at :math:`\delta^2 \dddot R/6` more. Both are
added, with the jerk from the force field. **Thermostat**: stochastic velocity rescaling (Bussi,
Donadio, Parrinello 2007, eq. A7), as in the ab-initio runs, once a time step, in the middle of it:
velocities between two places have the thermostat's temperature, and places the right distribution
even where steps are long (Zhang et al. 2017; at its ends, Verlet's velocities tell too little, and
places are too hot by :math:`(\omega\delta)^2/4`). Its random numbers are the only ones here:
without a generator a step is the motion without thermostat.

The cell follows from the grid, whose points are always the same distance apart: a map trained on
32 atoms serves any orthorhombic supercell.
Lengths are in angstrom, densities in angstrom**-3, times in fs, temperatures in K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from densitykit.analysis.nuclei import NucleiFilter, assign, find_nuclei
from densitykit.data.transforms import restore_electrons
from densitykit.errors import ShapeError
from densitykit.fields import check_stride
from densitykit.models.nuclear.force_field import LinearForceField
from densitykit.models.nuclear.superposition import Superposition
from densitykit.nn.layers import UNet
from densitykit.units import ACCELERATION, KELVIN

__all__ = ["Liquid", "NuclearEmulator", "ResidualNet", "supercell", "thermal_velocities"]

REACH = 1.0  # farthest that a nucleus moves between two frames, angstrom


@dataclass(frozen=True)
class Liquid:
    """What the emulator remembers from step to step, of B members.

    positions (B, N, 3), unwrapped, in angstrom; velocities (B, N, 3) in angstrom/fs; accelerations
    (B, N, 3) in angstrom/fs**2; base, the superposition, and residual (B, X, Y, Z) in
    angstrom**-3; electrons, the mean density to keep, (B, 1, 1, 1).
    """

    positions: Tensor
    velocities: Tensor
    accelerations: Tensor
    base: Tensor
    residual: Tensor
    electrons: Tensor


def supercell(positions: Tensor, cell: np.ndarray, times: int = 2) -> Tensor:
    """Nuclei of times**3 copies of a cell.

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
        Shape (B, N times**3, 3), copy after copy; the cell of all is ``times * cell``.
    """
    copies = torch.cartesian_prod(*[torch.arange(times, dtype=torch.float64)] * 3)
    shifts = copies.to(positions) @ torch.from_numpy(np.asarray(cell, float)).to(positions)
    return (positions[:, None] + shifts[:, None]).flatten(1, 2)


def thermal_velocities(
    positions: Tensor, mass: float, temperature: float, generator: torch.Generator
) -> Tensor:
    """Maxwell's velocities in angstrom/fs for nuclei (B, N, 3), at rest as a whole.

    Without them the copies in a supercell would move alike. The kinetic energy is exactly that of
    the temperature (K) for 3N - 3 degrees of freedom; mass in dalton.
    """
    v = torch.randn(positions.shape, generator=generator, dtype=torch.float64).to(positions)
    v = v - v.mean(dim=1, keepdim=True)
    square = v.square().sum(dim=(1, 2), keepdim=True) / (3 * (positions.shape[1] - 1))
    return v * (KELVIN * temperature / mass / square).sqrt()


class ResidualNet(nn.Module):
    """U: the residual of the superposition after a step, from the one before.

    Parameters
    ----------
    widths, blocks, patch
        Of :class:`densitykit.nn.layers.UNet`.

    The scales of its inputs are buffers, set by :meth:`set_scales`.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (48, 96),
        blocks: tuple[int, ...] = (2, 3),
        patch: int = 2,
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
        """Physical fields (B, C, X, Y, Z) as :class:`ResidualPairs` draws them -> the same.

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
    frame_spacing
        Time between the frames that a start is read from, fs.
    spacing
        Distance of grid points, angstrom.
    substeps
        Time steps of the nuclei in one step.
    mass
        Of a nucleus, dalton.
    charge
        Valence electrons of a nucleus.
    temperature, relaxation
        Of the thermostat, K and fs; it acts where a generator is given.
    filter_nodes
        Nodes of the filter that finds nuclei.
    knots
        Of the spline of the superposition.
    force_field
        Arguments of :class:`densitykit.models.nuclear.force_field.LinearForceField`.
    widths, blocks, patch
        Of :class:`ResidualNet`.

    A map of states with a past, (B, 3, X, Y, Z): the density in angstrom**-3, its rate (second
    order, backward) and the density one frame spacing before; see
    :meth:`densitykit.data.windows.StatePairs.given`. It returns the density at t + horizon, (B, 1,
    X, Y, Z). For more than one step use `densitykit.rollout`, which keeps the memory of
    :meth:`begin` and :meth:`propagate`.

    Raises
    ------
    ShapeError
        If a grid does not fit, or nuclei are not found in a frame.
    """

    needs_past = True

    def __init__(
        self,
        horizon: float,
        frame_spacing: float,
        spacing: float,
        filter_nodes: int,
        knots: int,
        force_field: dict[str, float],
        substeps: int = 2,
        mass: float = 6.94,
        charge: float = 1.0,
        temperature: float = 800.0,
        relaxation: float = 300.0,
        widths: tuple[int, ...] = (48, 96),
        blocks: tuple[int, ...] = (2, 3),
        patch: int = 2,
    ) -> None:
        super().__init__()
        self.horizon, self.frame_spacing, self.spacing = horizon, frame_spacing, spacing
        self.substeps, self.mass, self.charge = substeps, mass, charge
        self.temperature, self.relaxation = temperature, relaxation
        self.force_field = LinearForceField(**force_field)
        self.superposition = Superposition(knots)
        self.residual_net = ResidualNet(widths, blocks, patch)
        self.stride = self.residual_net.stride
        self.register_buffer("filter_nodes", torch.zeros(filter_nodes, dtype=torch.float64))
        self.register_buffer("filter_weights", torch.zeros(filter_nodes, dtype=torch.float64))

    @property
    def filter(self) -> NucleiFilter:
        """The filter that finds nuclei in a density."""
        return NucleiFilter(self.filter_nodes.cpu().numpy(), self.filter_weights.cpu().numpy())

    def cell(self, shape: tuple[int, ...]) -> Tensor:
        """Lattice vectors of a grid (X, Y, Z), as rows, in angstrom."""
        edges = torch.tensor(shape, dtype=torch.float64, device=self.filter_nodes.device)
        return torch.diag(edges * self.spacing)

    @torch.no_grad()
    def forward(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.density(self.propagate(self.begin(state), generator))[:, None]

    @torch.no_grad()
    def begin(self, state: Tensor) -> Liquid:
        """Memory at time t from a state with a past, (B, 3, X, Y, Z)."""
        if state.ndim != 5 or state.shape[1] != 3:
            raise ShapeError(
                f"state has shape {tuple(state.shape)}; this map needs the density, its rate and "
                "the density of the frame before, (B, 3, X, Y, Z): StatePairs.given makes them"
            )
        check_stride(state.shape[2:], self.stride)
        tau, delta = self.frame_spacing, self.horizon / self.substeps
        cell, frames = self.cell(state.shape[2:]), self._frames(state.double())
        x = torch.stack([self._read(f, cell.cpu().numpy()) for f in frames.cpu()]).to(cell)
        v = (3 * x[:, 0] - 4 * x[:, 1] + x[:, 2]) / (2 * tau)
        a = self._accelerations(x[:, 0], cell)
        jerk = (a - self._accelerations(x[:, 0] - v * tau, cell)) / tau
        v = v + (tau**2 / 3 + delta**2 / 6) * jerk
        v = v - v.mean(dim=1, keepdim=True)
        liquid, rho = self._liquid(x[:, 0], v, a, tuple(state.shape[2:])), state[:, 0]
        electrons = rho.mean((1, 2, 3), keepdim=True)
        return replace(liquid, residual=rho - liquid.base, electrons=electrons)

    def _frames(self, state: Tensor) -> Tensor:
        """Densities at t, t - tau and t - 2 tau: the rate, "backward-2", holds the last."""
        rho, rate, before = state.unbind(dim=1)
        return torch.stack(
            [rho, before, 2 * self.frame_spacing * rate - 3 * rho + 4 * before], dim=1
        )

    def begin_at(self, positions: Tensor, velocities: Tensor, shape: tuple[int, ...]) -> Liquid:
        """Memory of nuclei (B, N, 3), angstrom and angstrom/fs; :meth:`settle` draws its density.

        Parameters
        ----------
        positions, velocities
            Shape (B, N, 3).
        shape
            Grid (X, Y, Z); the cell is as large as its points are apart.
        """
        check_stride(shape, self.stride)
        if positions.ndim != 3 or positions.shape != velocities.shape or len(shape) != 3:
            raise ShapeError(
                f"positions {tuple(positions.shape)}, velocities {tuple(velocities.shape)} and "
                f"grid {tuple(shape)} do not fit; give (B, N, 3), (B, N, 3) and (X, Y, Z)"
            )
        x, v = (y.to(self.filter_nodes) for y in (positions, velocities))
        return self._liquid(x, v, self._accelerations(x, self.cell(shape)), shape)

    def _liquid(self, x: Tensor, v: Tensor, a: Tensor, shape: tuple[int, ...]) -> Liquid:
        """Memory without a residual."""
        cell = self.cell(shape)
        base = self.superposition(x, cell, shape).float()
        mean = self.charge * x.shape[1] / torch.linalg.det(cell)
        electrons = mean.float().expand(len(x), 1, 1, 1)
        return Liquid(x, v, a, base, torch.zeros_like(base), electrons)

    def _read(self, frames: Tensor, cell: np.ndarray) -> Tensor:
        """Nuclei of three frames (3, X, Y, Z), in one order and unwrapped: (3, N, 3)."""
        if not torch.isfinite(frames).all():
            raise ShapeError("no nuclei in a density that is not finite; give another state")
        volume = abs(np.linalg.det(cell))
        count = round(float(frames[0].mean()) * volume / self.charge)
        found = [find_nuclei(f.numpy(), cell, max(count, 1), self.filter) for f in frames]
        if count < 1 or any(len(x) != count for x in found):
            raise ShapeError(
                f"{[len(x) for x in found]} nuclei found in three frames of {count} x "
                f"{self.charge:g} electrons; give a density like that of the training run"
            )
        paths = [found[0]]
        for x in found[1:]:
            pairs, vectors = assign(x, paths[0], cell, np.full(count, REACH))
            if (pairs < 0).any():
                raise ShapeError(
                    f"nuclei move more than {REACH} angstrom between frames; give frames "
                    f"{self.frame_spacing:g} fs apart"
                )
            paths.append(paths[0] + vectors)
        return torch.from_numpy(np.stack(paths))

    def _accelerations(self, positions: Tensor, cell: Tensor) -> Tensor:
        return ACCELERATION / self.mass * self.force_field.forces(positions, cell)

    @torch.no_grad()
    def move(self, liquid: Liquid, generator: torch.Generator | None = None) -> Liquid:
        """The nuclei one step later; the density is left as it was."""
        delta, cell = self.horizon / self.substeps, self.cell(liquid.base.shape[1:])
        x, v, a = liquid.positions, liquid.velocities, liquid.accelerations
        for _ in range(self.substeps):
            v = v + delta / 2 * a
            held = v if generator is None else self._rescaled(v, delta, generator)
            x = x + delta / 2 * (v + held)
            a = self._accelerations(x, cell)
            v = held + delta / 2 * a
        return replace(liquid, positions=x, velocities=v, accelerations=a)

    def _rescaled(self, v: Tensor, delta: float, generator: torch.Generator) -> Tensor:
        """Velocities after the thermostat (Bussi et al. 2007, eq. A7)."""
        if v.shape[1] < 2 or not v.any(dim=2).any(dim=1).all():
            raise ShapeError(
                "a thermostat scales velocities: give 2 nuclei or more that move, such as with "
                "densitykit.models.nuclear.emulator.thermal_velocities, or no generator"
            )
        freedom = 3 * (v.shape[1] - 1)
        r = torch.randn(len(v), freedom, generator=generator, dtype=torch.float64).to(v)
        kinetic = self.mass * v.square().sum(dim=(1, 2)) / 2
        share = KELVIN * self.temperature / 2 / kinetic  # of one degree of freedom
        c = math.exp(-delta / self.relaxation)
        square = c + share * (1 - c) * r.square().sum(dim=1)
        square = square + 2 * r[:, 0] * (share * c * (1 - c)).sqrt()
        return v * square.sqrt()[:, None, None]

    @torch.no_grad()
    def draw(self, liquid: Liquid) -> Liquid:
        """The density of nuclei that have moved."""
        shape = tuple(liquid.base.shape[1:])
        base = self.superposition(liquid.positions, self.cell(shape), shape).float()
        residual = self.residual_net(base, liquid.base, liquid.residual)
        return replace(liquid, base=base, residual=residual - residual.mean((1, 2, 3), True))

    def settle(self, liquid: Liquid, draws: int = 3) -> Liquid:
        """The density of nuclei that have not moved: drawn again and again, at rest.

        What it remembers of other places is forgotten first, so the result depends on where the
        nuclei are, and on nothing else.
        """
        shape = tuple(liquid.base.shape[1:])
        base = self.superposition(liquid.positions, self.cell(shape), shape).float()
        liquid = replace(liquid, base=base, residual=torch.zeros_like(base))
        for _ in range(draws):
            liquid = self.draw(liquid)
        return liquid

    def propagate(self, liquid: Liquid, generator: torch.Generator | None = None) -> Liquid:
        """Memory one step later."""
        return self.draw(self.move(liquid, generator))

    def density(self, liquid: Liquid) -> Tensor:
        """Density in angstrom**-3, (B, X, Y, Z), with the number of electrons of the start."""
        return restore_electrons(liquid.base + liquid.residual, liquid.electrons)
