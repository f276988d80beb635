r"""An emulator of electrons in time with orbitals inside: it learns a potential, not a motion.

Density and current do not tell what several electrons do next: their orbitals do. Those of the
ground state follow from its density, for there is but one potential that has it (Hohenberg and
Kohn 1964, Phys. Rev. 136, B864). This map is what is learned (atomic units, spinless electrons),

.. math:: V_\theta[\rho_0] = -\tfrac{\pi^2}{2}\rho_0^2 + s\,N_\theta[\rho_0],

the potential of Thomas and Fermi and a convolutional net, both of finite range, so that it serves
chains of any length. The potential is right when the density of its ground state,
occupied as at a temperature, is the density that was given: no run is needed to learn that. Its
gradient is the static response (Adler 1962, Phys. Rev. 126, 413; Wiser 1963, Phys. Rev. 129, 62),

.. math:: \frac{\partial\rho(r)}{\partial V(r')} = \sum_{ij} \frac{f_i - f_j}{\epsilon_i -
    \epsilon_j}\,\psi_i(r)\psi_j(r)\psi_i(r')\psi_j(r'),

whose terms stay finite where levels meet. From then on the orbitals move on a coarse grid,

.. math:: i\,\dot\psi_j = \bigl[\tfrac12(-i\,\partial_r + A)^2 + V_\theta[\rho_0]
    + K * (\rho - \rho_\theta)\bigr]\psi_j, \qquad \rho_\theta = \rho(t = 0),

with the interaction K of the data. The propagator in the ground state's potential is exact, made
once; the field acts before and after it, and the interaction between such steps of length h. A
force that acts in pulses also excites the frequencies :math:`2\pi m/h`, at which electrons answer
as free ones, by :math:`S/\omega^2` with :math:`S = -\partial_r\rho_0\partial_r`. The sum of these
answers, :math:`\delta\rho' - \delta\rho = (h^2/12)\,S K \delta\rho`, is taken out of what the
orbitals have, :math:`\delta\rho'`, before it is shown and acts: lines are where those of
continuous motion are, to fourth order. The motion is unitary: nothing grows, no electron is lost.
What a push has done before the first frame is in its current: the phase whose gradient is the
velocity :math:`j/\rho_0 - A`.

The field is given at the frames of the record alone; between them it is the sum of cosines through
them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densitykit.chain.electron_emulators import circular
from densitykit.chain.electron_windows import ElectronWindow, ElectronWindows
from densitykit.errors import WindowError
from densitykit.units import ATOMIC_TIME, BOHR

__all__ = ["ChainOrbitals", "GroundStateObjective", "OrbitalState", "ground_density"]

#: points of the orbitals' grid to a point of the density's
_FINER = 2
#: error of the density of the ground state, over its variation, of chains that were not learned
_MISS = 0.01
#: occupations below are none
_EMPTY = 1e-12


@dataclass(frozen=True)
class OrbitalState:
    """State of `ChainOrbitals`, atomic units.

    Attributes
    ----------
    waves
        Fourier coefficients of the orbitals, (B, orbitals, 2 X), complex.
    occupations
        (B, orbitals).
    change
        Of the density from that of the ground state, (B, 2 X).
    propagator
        Of a substep in the potential of the ground state, between plane waves, (B, 2 X, 2 X).
    quiet
        What takes the answer to pulses out of a change of the density, (B, 2 X, 2 X).
    start
        The density of its ground state, (B, 2 X).
    ground
        The one that was given, (B, X).
    field
        Cosine coefficients of the vector potential, (B, frames).
    frame
        Number of the present frame.
    """

    waves: Tensor
    occupations: Tensor
    change: Tensor
    propagator: Tensor
    quiet: Tensor
    start: Tensor
    ground: Tensor
    field: Tensor
    frame: int = 0


class ChainOrbitals(nn.Module):
    """Orbitals in a learned potential; an emulator that starts in the ground state.

    Parameters
    ----------
    horizon
        Time of a step in fs, that between frames.
    mean, spread
        Of the densities of ground states, 1/bohr: they scale what the net sees.
    width, reach
        Channels of the net, and points to each side that a layer of it sees, half a bohr apart.
    temperature
        Of the occupations, hartree.
    substeps
        Of a step.
    kappa, eps0
        Of the interaction, see `densitykit.chain.kohn_sham`.
    spacing
        Of the points of the density, bohr.
    """

    context = 1

    def __init__(
        self,
        horizon: float,
        mean: float,
        spread: float,
        width: int = 32,
        reach: int = 7,
        temperature: float = 1e-3,
        substeps: int = 3,
        kappa: float = 0.01,
        eps0: float = 10.0,
        spacing: float = 1.0,
    ) -> None:
        super().__init__()
        self.horizon, self.mean, self.spread = float(horizon), float(mean), float(spread)
        self.temperature, self.substeps = temperature, substeps
        self.kappa, self.eps0, self.spacing = kappa, eps0, spacing / _FINER
        sizes = [(2, width), (width, width), (width, width), (width, 1)]
        self.layers = nn.ModuleList(circular(a, b, 2 * reach + 1) for a, b in sizes)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    @classmethod
    def arguments_for(cls, windows: ElectronWindows) -> dict[str, Any]:
        """Horizon, spacing, and mean and spread of the ground states of training windows."""
        ground = windows.density[:, 0] * BOHR
        spacing = float(windows.cell[0, 0]) / BOHR / windows.grid[0]
        scale = {"mean": float(ground.mean()), "spread": float(ground.std())}
        return {"horizon": windows.horizon, "spacing": spacing, **scale}

    def potential(self, ground: Tensor) -> Tensor:
        """V[rho_0] in hartree, up to a constant, (B, 2 X), of a density (B, X) in 1/bohr."""
        rho = resample(ground, _FINER * ground.shape[1])
        low = rho.clamp(min=1e-3 * self.mean) / self.mean
        seen = [(rho - self.mean) / self.spread, low.log() * self.mean / self.spread]
        h = F.silu(self.layers[0](torch.stack(seen, 1).to(self.layers[0].weight)))
        for layer in self.layers[1:-1]:
            h = h + F.silu(layer(h))
        size = torch.pi**2 * self.mean * self.spread
        return size * self.layers[-1](h)[:, 0].double() - torch.pi**2 / 2 * rho**2

    def kinetic(self, points: int) -> Tensor:
        """Matrix of the kinetic energy on a ring of so many points, hartree."""
        return _kinetic_matrix(points, self.spacing)

    def init(self, window: ElectronWindow) -> OrbitalState:
        """The state at the first frame of a run.

        Raises
        ------
        WindowError
            The window is none of electrons, of another grid, or not in the ground state.
        """
        window = window.past(1)
        self._check(window)
        ground, density = (
            x.double() * BOHR for x in (window.ground, window.density[:, -1, :, 0, 0])
        )
        V = self.potential(ground).detach()
        energies, psi = torch.linalg.eigh(self.kinetic(V.shape[1]) + torch.diag_embed(V))
        f = occupations(energies, self._electrons(ground), self.temperature)
        propagator = _propagator(energies, psi, self.time_step)
        filled = (f > _EMPTY).any(0)
        f, psi = f[:, filled], psi[..., filled].mT / self.spacing**0.5
        field = window.field.double() * ATOMIC_TIME / BOHR
        velocity = window.current[:, -1].double() * ATOMIC_TIME / density - field[:, :1]
        phase = _integral(resample(velocity, V.shape[1]), self.spacing)
        start = _density(f, psi.to(torch.complex128))
        waves = torch.fft.fft(psi * torch.exp(1j * phase)[:, None])
        self._warn(window, resample(start, ground.shape[1]), ground)
        return OrbitalState(
            waves,
            f,
            torch.zeros_like(start),
            propagator,
            self._quiet(start),
            start,
            ground,
            _cosines(field),
        )

    def _check(self, window: ElectronWindow) -> None:
        if getattr(window, "ground", None) is None:
            raise WindowError(f"{window.source}: no current; load it with load_electrons")
        late = int(window.frame.max())
        if late or not torch.allclose(window.density[:, -1, :, 0, 0], window.ground, rtol=1e-4):
            raise WindowError(
                f"{window.source}: frame {late} of a run is not the ground state, from which "
                "orbitals can be made; begin at frame 0, as `first` of the windows does"
            )
        spacing = float(window.cell[0, 0, 0]) / BOHR / window.grid[0] / _FINER
        if abs(spacing / self.spacing - 1) > 1e-3:
            problem = f"points are {_FINER * spacing:g} bohr apart, not {_FINER * self.spacing:g}"
            raise WindowError(f"{window.source}: {problem}; use data of that grid")

    def _warn(self, window: ElectronWindow, found: Tensor, ground: Tensor) -> None:
        """Say where the potential does not have the density that it was made for."""
        varies = ground - ground.mean(1, keepdim=True)
        miss = float(((found - ground).norm(dim=1) / varies.norm(dim=1)).max())
        if miss > _MISS:
            warnings.warn(
                f"{window.source}: the ground state of the learned potential misses the density "
                f"by {miss:.1%} of its variation; train these orbitals on such chains",
                stacklevel=3,
            )

    def _electrons(self, ground: Tensor) -> int:
        return round(float(ground[0].sum()) * self.spacing * _FINER)

    @property
    def time_step(self) -> float:
        """Of a substep, atomic units."""
        return self.horizon / ATOMIC_TIME / self.substeps

    @torch.no_grad()
    def step(self, state: OrbitalState, generator: torch.Generator | None = None) -> OrbitalState:
        """The state one horizon later."""
        change, psi = state.change, torch.fft.ifft(state.waves)
        for part, moved in enumerate(self._phases(state)):
            psi = psi * self._turn(change, 1 if part else 0.5)
            waves = (torch.fft.fft(psi) * moved) @ state.propagator.mT
            psi = torch.fft.ifft(waves * moved)
            change = _density(state.occupations, psi) - state.start
            change = (change[:, None] @ state.quiet)[:, 0]
        waves = torch.fft.fft(psi * self._turn(change, 0.5))
        return replace(state, waves=waves, change=change, frame=state.frame + 1)

    def _turn(self, change: Tensor, share: float) -> Tensor:
        """Phases by the potential of a change of the density in a share of a substep."""
        V = change @ self._interaction(change.shape[1])
        return torch.polar(torch.ones_like(V), -share * self.time_step * V)[:, None]

    def _phases(self, state: OrbitalState) -> list[Tensor]:
        """Those of the field in each half of a substep, (B, 1, P) each."""
        k = _wave_numbers(state.waves.shape[-1], self.spacing)
        middles = (torch.arange(self.substeps) + 0.5) / self.substeps
        A = self._field(state, middles)[..., None]
        phase = -0.5 * self.time_step * A * (k + 0.5 * A)
        return list(torch.polar(torch.ones_like(phase), phase)[:, :, None].unbind(1))

    def _field(self, state: OrbitalState, shares: Tensor) -> Tensor:
        """A after shares of the coming step, (B, shares)."""
        frames = state.field.shape[1]
        t = (state.frame + shares.double()).clamp(max=frames - 1)
        return state.field @ torch.cos(
            torch.pi / frames * torch.outer(torch.arange(frames), t + 0.5)
        )

    def _interaction(self, points: int) -> Tensor:
        """From a density to its potential, a symmetric matrix."""
        return _interaction(points, self.spacing, self.kappa, self.eps0)

    def _quiet(self, start: Tensor) -> Tensor:
        """What takes the answer to pulses out of a change of a density (B, P); acts on rows."""
        points, slope = start.shape[1], _derivative(start.shape[1], self.spacing)
        S = slope.T @ (start[..., None] * slope)
        unit = torch.eye(points, dtype=torch.float64)
        return torch.linalg.inv(unit + self.time_step**2 / 12 * (S @ self._interaction(points))).mT

    def density(self, state: OrbitalState) -> Tensor:
        """angstrom**-1, (B, X, 1, 1)."""
        rho = state.ground + resample(state.change, state.ground.shape[1])
        return (rho / BOHR).float()[..., None, None]

    def current(self, state: OrbitalState) -> Tensor:
        """1/fs, (B, X)."""
        k = _wave_numbers(state.waves.shape[-1], self.spacing)
        A = self._field(state, torch.zeros(1))[..., None]
        psi, velocity = torch.fft.ifft(state.waves), torch.fft.ifft((k + A) * state.waves)
        j = torch.einsum("bn,bnp->bp", state.occupations, (psi.conj() * velocity).real)
        return (resample(j, state.ground.shape[1]) / ATOMIC_TIME).float()


class GroundStateObjective(nn.Module):
    """Mean square error of the density of the ground state, in squares of its spread.

    Parameters
    ----------
    model
        What is trained, by `densitykit.training.fit`.
    """

    def __init__(self, model: ChainOrbitals) -> None:
        super().__init__()
        self.model, self.settings = model, {"objective": "density of the ground state"}

    def inputs(self, window: ElectronWindow) -> tuple[Tensor, ...]:
        return (window.ground.double() * BOHR,)

    def forward(self, ground: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        model, V = self.model, self.model.potential(ground)
        electrons = model._electrons(ground)
        rho = ground_density(V, model.kinetic(V.shape[1]), electrons, model.temperature)
        error = resample(rho / model.spacing, ground.shape[1]) - ground
        return {"loss": (error / model.spread).square().mean()}


class _GroundDensity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, V: Tensor, kinetic: Tensor, electrons: int, temperature: float
    ) -> Tensor:
        energies, psi = torch.linalg.eigh(kinetic + torch.diag_embed(V))
        f = occupations(energies, electrons, temperature)
        ctx.save_for_backward(energies, psi, f)
        ctx.temperature = temperature
        return (psi**2 * f[:, None]).sum(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        energies, psi, f = ctx.saved_tensors
        gap = energies[..., :, None] - energies[..., None, :]
        near = gap.abs() < 1e-2 * ctx.temperature
        slope = -f * (1 - f) / ctx.temperature
        ratio = (f[..., :, None] - f[..., None, :]) / torch.where(near, 1.0, gap)
        response = torch.where(near, (slope[..., :, None] + slope[..., None, :]) / 2, ratio)
        pairs = response * (psi.mT @ (gradient[..., None] * psi))
        return ((psi @ pairs) * psi).sum(-1), None, None, None


def ground_density(V: Tensor, kinetic: Tensor, electrons: int, temperature: float) -> Tensor:
    """Electrons at each point of the ground state of a potential, with gradient.

    The chemical potential counts as fixed in the gradient, which so is right for changes that keep
    the number of electrons.

    Parameters
    ----------
    V
        (B, P), hartree.
    kinetic
        (P, P), hartree.
    electrons
        Their number, the same in all.
    temperature
        Of the occupations, hartree.
    """
    return _GroundDensity.apply(V, kinetic, electrons, temperature)


def occupations(energies: Tensor, electrons: int, temperature: float) -> Tensor:
    """Occupations of Fermi and Dirac, same shape (B, levels), by bisection."""
    low, high = energies[:, :1] - 1, energies[:, -1:] + 1
    for _ in range(60):
        mu = (low + high) / 2
        many = torch.sigmoid((mu - energies) / temperature).sum(-1, keepdim=True) > electrons
        low, high = torch.where(many, low, mu), torch.where(many, mu, high)
    return torch.sigmoid((mu - energies) / temperature)


def resample(values: Tensor, points: int) -> Tensor:
    """Real values on a ring on other points; the highest wave of an even number is lost."""
    known = values.shape[-1]
    waves = torch.fft.rfft(values)[..., : (min(points, known) + 1) // 2]
    return torch.fft.irfft(waves, n=points) * (points / known)


@lru_cache(maxsize=8)
def _wave_numbers(points: int, spacing: float) -> Tensor:
    return 2 * torch.pi * torch.fft.fftfreq(points, spacing, dtype=torch.float64)


@lru_cache(maxsize=8)
def _kinetic_matrix(points: int, spacing: float) -> Tensor:
    return _filter(0.5 * _wave_numbers(points, spacing) ** 2)


@lru_cache(maxsize=8)
def _interaction(points: int, spacing: float, kappa: float, eps0: float) -> Tensor:
    return _filter(4 * torch.pi / eps0 / (_wave_numbers(points, spacing) ** 2 + kappa**2))


@lru_cache(maxsize=8)
def _derivative(points: int, spacing: float) -> Tensor:
    k = _wave_numbers(points, spacing)
    return _on_grid(1j * k * (k.abs() < torch.pi / spacing))


def _filter(factors: Tensor) -> Tensor:
    """Matrix on the grid that multiplies waves by even factors, symmetric."""
    matrix = _on_grid(factors)
    return (matrix + matrix.T) / 2


def _on_grid(factors: Tensor) -> Tensor:
    """Matrix on the grid that multiplies waves by factors."""
    unit = torch.eye(len(factors), dtype=torch.float64)
    return torch.fft.ifft(factors[:, None] * torch.fft.fft(unit, dim=0), dim=0).real


def _propagator(energies: Tensor, psi: Tensor, h: float) -> Tensor:
    """exp(-i H h) between plane waves, (B, P, P), of eigenvectors in columns."""
    waves = torch.fft.fft(psi.to(torch.complex128), dim=1, norm="ortho")
    return (waves * torch.exp(-1j * h * energies)[:, None]) @ waves.mH


def _density(f: Tensor, psi: Tensor) -> Tensor:
    return (f[:, None] @ (psi.real.square() + psi.imag.square()))[:, 0]


def _integral(values: Tensor, spacing: float) -> Tensor:
    """Integral of values on a ring without their mean."""
    k = 2 * torch.pi * torch.fft.rfftfreq(values.shape[-1], spacing, dtype=torch.float64)
    waves = torch.fft.rfft(values) / torch.where(k > 0, 1j * k, 1)
    waves[..., 0] = 0
    return torch.fft.irfft(waves, n=values.shape[-1])


def _cosines(values: Tensor) -> Tensor:
    """Coefficients of the sum of cosines through values (B, n) at points t = 0, ..., n - 1."""
    n = values.shape[1]
    k = torch.arange(n, dtype=torch.float64)
    waves = torch.cos(torch.pi / n * k[:, None] * (k + 0.5)) * (2 / n)
    waves[0] /= 2
    return values @ waves.T
