r"""Electrons in time: the time-dependent Kohn-Sham equation of the one-dimensional model.

Occupied orbitals of :mod:`densitykit.chain.kohn_sham` move while the nuclei stand still (reduced
Hartree-Fock, that is the time-dependent Hartree equation; atomic units),

.. math::
    i\,\dot\psi_j = \Bigl[\tfrac12\bigl(-i\,\partial_r + A(t)\bigr)^2 + V(r, t)\Bigr]\psi_j, \quad
    V = K * (\rho + m) + V_\text{ext}(t), \quad \rho = \sum_j f_j|\psi_j|^2 .

A uniform electric field enters as the vector potential A (velocity gauge), :math:`E = -\dot A`: on
a ring there is no dipole, but there is a current. An electron is pushed by :math:`-E`, so that a
step of A by a is a kick to the velocity a. Occupations :math:`f_j`, also fractional ones of a
metal, are those of the ground state and stay. The current (of particles), continuity and energy
are

.. math::
    j = \sum_j f_j \Im(\psi_j^*\partial_r\psi_j) + A\rho, \quad \dot\rho = -\partial_r j, \quad
    \mathcal E = \tfrac12\sum_j f_j\|(-i\partial_r + A)\psi_j\|^2
      + \tfrac12\!\int(\rho + m) K * (\rho + m) + \!\int V_\text{ext}\rho, \quad
    \dot{\mathcal E} = \dot A \int j .

**Scheme.** Kinetic and potential parts in turn, each exactly: the first is diagonal in plane
waves, with the integral of A over the part of the step; the second on the grid, where it changes
phases only, so that the density and with it the potential stay as they are *during* it. No
predictor is needed: the splitting is unitary, time-reversible and symplectic for the nonlinear
equation as well (Lubich 2008, Math. Comp. 77, 2141). The composition of order four is by Blanes
and Moan (2002, J. Comput. Appl. Math. 142, 313). Among the schemes that Castro, Marques and Rubio
compare (2004, J. Chem. Phys. 121, 3425) it is the split operator, with better coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.fft import fft, ifft, irfft, rfft

from densitykit.chain.kohn_sham import KohnShamSolution, ReducedHartreeFock1D
from densitykit.chain.plane_waves import finite, require

__all__ = ["ElectronDynamics", "Kick", "Pulse"]

Real = NDArray[np.float64]
Complex = NDArray[np.complex128]

_A = (0.0792036964311957, 0.353172906049774, -0.0420650803577195)
_B = (0.209515106613362, -0.143851773179818)
_HALF_A, _HALF_B = (*_A, 1 - 2 * sum(_A)), (*_B, 0.5 - sum(_B))
#: shares of a step: kinetic, then potential and kinetic in turn
_KINETIC, _POTENTIAL = (*_HALF_A, *_A[::-1]), (*_HALF_B, *_HALF_B[::-1])
_GAUSS = 0.5 + np.array([-0.5, 0.5]) / np.sqrt(3)
#: occupations below are none
_EMPTY = 1e-12


@dataclass(frozen=True)
class Kick:
    """A uniform field that lasts no time: A steps from 0 to ``amplitude`` (a velocity, a.u.)."""

    amplitude: float

    def __call__(self, t: float) -> float:
        return self.amplitude if t >= 0 else 0.0


@dataclass(frozen=True)
class Pulse:
    """A laser pulse, A(t) = amplitude sin^2(pi t / duration) cos(frequency t + phase), else 0.

    Attributes
    ----------
    amplitude
        Of the vector potential, atomic units; that of the field is ``frequency`` times it.
    frequency, phase
        Hartree, and radians.
    duration
        Atomic units of time, from t = 0.
    """

    amplitude: float
    frequency: float
    duration: float
    phase: float = 0.0

    def __call__(self, t: float) -> float:
        if not 0 < t < self.duration:
            return 0.0
        envelope = np.sin(np.pi * t / self.duration) ** 2
        return float(self.amplitude * envelope * np.cos(self.frequency * t + self.phase))


class ElectronDynamics:
    """Orbitals that move; atomic units.

    Parameters
    ----------
    orbitals
        On an even grid of the ring, shape (n_orbitals, n_points), of unit norm.
    occupations
        Shape (n_orbitals,).
    length
        Of the ring in bohr.
    potential
        V_ext that is there without electrons: on the grid, shape (n_points,), or a function of
        time that returns it.
    field
        A(t); None: none.
    kernel, charge
        Coefficients of K and of the nuclear charges m, each shape (n_waves,), for k >= 0;
        None: electrons that do not interact.
    time_step
        In atomic units.

    Raises
    ------
    GenerationError
        An argument is not what it should be; the message names it.
    """

    def __init__(
        self,
        orbitals: ArrayLike,
        occupations: ArrayLike,
        length: float,
        potential: ArrayLike | Callable[[float], Real] = 0.0,
        field: Callable[[float], float] | None = None,
        *,
        kernel: Real | None = None,
        charge: Complex | None = None,
        time_step: float = 0.2,
    ) -> None:
        psi, self.f = finite("orbitals", orbitals).astype(complex), finite("f", occupations)
        require(psi.ndim == 2, "orbitals", psi.shape, "give shape (n_orbitals, n_points)")
        require(self.f.shape == psi.shape[:1], "occupations", self.f.shape, "give one an orbital")
        require(0 < time_step < np.inf, "time_step", time_step, "give a positive number")
        self.length, self.n_points = float(length), psi.shape[1]
        self.time, self.time_step, self.steps = 0.0, time_step, 0
        self.k = 2 * np.pi * np.fft.fftfreq(self.n_points, self.length / self.n_points)
        self.waves = fft(psi)
        self.field = field if field is not None else lambda t: 0.0
        fixed = None if callable(potential) else finite("potential", potential)
        self.potential = potential if callable(potential) else lambda t: fixed
        none = np.zeros(1)
        self._kernel = (none if kernel is None else kernel)[: self.n_points // 2 + 1]
        self._charge = none if charge is None else charge[: len(self._kernel)]

    @classmethod
    def of(
        cls,
        model: ReducedHartreeFock1D,
        solution: KohnShamSolution | None = None,
        field: Callable[[float], float] | None = None,
        *,
        interacting: bool = True,
        time_step: float = 0.2,
    ) -> Self:
        """Start from the ground state of a model (solved here if None is given).

        Electrons that do not interact feel the potential of the ground state, which stays.
        """
        solution = model.solve() if solution is None else solution
        basis = model.basis
        eps, C = basis.diagonalise(solution.V_k, model.n_bands)
        filled = solution.occupations > _EMPTY
        psi = basis.orbitals(C[:, filled])
        state = psi, solution.occupations[filled], model.length
        if not interacting:
            V = basis.on_grid(solution.V_k, basis.n_points)
            return cls(*state, V, field, time_step=time_step)
        own = {"kernel": model.K, "charge": model.pseudo_charge()}
        return cls(*state, 0.0, field, **own, time_step=time_step)

    @property
    def r(self) -> Real:
        """Points of the grid, shape (n_points,), in bohr."""
        return np.arange(self.n_points) * self.length / self.n_points

    @property
    def orbitals(self) -> Complex:
        """On the grid, shape (n_orbitals, n_points)."""
        return ifft(self.waves)

    def resume(self, waves: Complex, steps: int) -> None:
        """Go on with the ``waves`` that another one had after so many steps."""
        self.waves, self.steps, self.time = waves, steps, steps * self.time_step

    def push(self, potential: ArrayLike) -> None:
        """Apply a potential (n_points,), hartree x a.u. of time, for no time: phases exp(-iV)."""
        self.waves = fft(self.orbitals * np.exp(-1j * np.asarray(potential)))

    def advance(self, steps: int = 1) -> None:
        """Move on by a number of steps."""
        for _ in range(steps):
            t = self.steps * self.time_step
            t = self._kinetic(t, _KINETIC[0])
            for potential, kinetic in zip(_POTENTIAL, _KINETIC[1:], strict=True):
                psi = ifft(self.waves, overwrite_x=True)
                V = self._hartree(self._density(psi)) + self.potential(t)
                psi *= np.exp(-1j * potential * self.time_step * V)
                self.waves = fft(psi, overwrite_x=True)
                t = self._kinetic(t, kinetic)
            self.steps += 1
            self.time = self.steps * self.time_step

    def _kinetic(self, t: float, share: float) -> float:
        """The kinetic part alone for a share of the step; returns the time after it."""
        h = share * self.time_step
        # from one end to the other: a kick at t = 0 has happened
        A = np.array([self.field(t + h * node) for node in _GAUSS])
        action = 0.5 * h * (self.k**2 + 2 * self.k * A.mean() + (A**2).mean())
        self.waves *= np.exp(-1j * action)
        return t + h

    def _density(self, psi: Complex) -> Real:
        return self.f @ (psi.real**2 + psi.imag**2)

    def _hartree(self, rho: Real) -> Real:
        """K * (rho + m) on the grid, of waves that the ground state knows."""
        waves = rfft(rho)[: len(self._kernel)] / self.n_points + self._charge
        return irfft(self._kernel * waves, self.n_points) * self.n_points

    @property
    def density(self) -> Real:
        """In 1/bohr, shape (n_points,)."""
        return self._density(self.orbitals)

    @property
    def current(self) -> Real:
        """Of particles, through each point, in atomic units, shape (n_points,)."""
        A = self.field(self.time)
        psi, velocity = self.orbitals, ifft((self.k + A) * self.waves)
        return self.f @ (psi.real * velocity.real + psi.imag * velocity.imag)

    @property
    def electrons(self) -> float:
        """Number of electrons."""
        return float(self.density.mean() * self.length)

    @property
    def energy(self) -> float:
        """Kinetic, electrostatic (nuclei included) and external energy in hartree."""
        rho, step = self.density, self.length / self.n_points
        moving = ((self.k + self.field(self.time)) * np.abs(self.waves)) ** 2
        kinetic = 0.5 * self.f @ moving.sum(axis=1) * step / self.n_points
        charge = rfft(rho)[: len(self._kernel)] / self.n_points + self._charge
        waves = self._kernel * np.abs(charge) ** 2
        hartree = self.length * (waves.sum() - 0.5 * waves[0])
        outside = step * float(np.sum(rho * self.potential(self.time)))
        return float(kinetic + hartree + outside)

    def on_grid(self, field: Real, n_grid: int) -> Real:
        """A field of the grid on fewer points: waves that these do not hold are left out."""
        waves = rfft(field)[: (n_grid + 1) // 2]
        return irfft(waves, n_grid) * (n_grid / self.n_points)
