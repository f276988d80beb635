r"""Deep Density in one dimension: the electron density of a chain of atoms as a sum over atoms.

.. math::
    \rho(r) = \sum_I \rho_I(r), \qquad
    \rho_I(r) = \big(N_I + A_s |x| + B_s\big) \, e^{C_s (|x| - D_s)^2 + E_I}, \quad x = r - R_I

(Zepeda-Nunez et al. 2019, eqs. 9, 11, 12). A to D belong to the species s of atom I. N_I and E_I
are *fitting networks* of a descriptor of the surroundings,

.. math:: D^I = \big(d_0^I,\; g_{s(I)s(J)}(d_J^I)\ \text{for the nearest atoms}\ J\big), \qquad
          d_J^I = \big(|R_J - R_I|,\; \mathrm{sgn}(R_J - R_I)\big)

(appendix A): :math:`d_0` is that of the electron, with :math:`R_0 = r`, and g a small network for
each ordered pair of species. All depends on differences of positions, so shifts of the whole
system, whole cells added to an atom and relabelled atoms of one species change nothing.

**Linear cost.** Only :math:`d_0` depends on the point. The atomic part of the descriptor, and what
the first layer makes of it, is computed once per atom. A cosine (eq. 16) takes
:math:`\rho_I` to zero between three quarters of the cutoff and the cutoff, so that an atom touches
a fixed number of points; they and the neighbours are found by sorting. The paper proposes this.

**Where it is not smooth.** Sorted by distance, two neighbours that come equally far exchange
their order in :math:`D^I`, and g need not agree there: a jump. The direction of the electron
jumps at the atom, the networks can only learn to hide it. Mirror images are different inputs with
unrelated outputs. :mod:`densitykit.chain.smooth_density` mends all three.

Lengths are in bohr, densities in 1/bohr.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

from densitykit.chain.atomic_sum import AtomicSum1D, Surroundings, ordered_neighbours, per_species
from densitykit.errors import ShapeError
from densitykit.nn.dense import cosine_taper, dense

__all__ = [
    "DeepDensity1D",
    "FittingNetwork",
    "PairNetworks",
    "fit_ansatz",
]


class PairNetworks(nn.Module):
    """g_{s(I)s(J)}: a dense network for each ordered pair of species.

    Parameters
    ----------
    count
        Number of species.
    features
        Number of inputs.
    nodes
        Of the layers; the last is M.

    ``forward``: inputs (B, N, J, features), species_I (N,), species_J (B, N, J) -> (B, N, J M).
    """

    def __init__(self, count: int, features: int, nodes: Sequence[int]) -> None:
        super().__init__()
        self.count = count
        self.g = nn.ModuleList(dense(features, nodes) for _ in range(count**2))

    def forward(self, d_J: Tensor, species_I: Tensor, species_J: Tensor) -> Tensor:
        def apply(s: int, atoms: Tensor) -> Tensor:
            mine, theirs = d_J[:, atoms], species_J[:, atoms, :, None]
            # every g of the pair (s, any), of which the neighbour's species picks one
            each = [self.g[s * self.count + t](mine) * (theirs == t) for t in range(self.count)]
            return sum(each).flatten(2)

        return per_species(apply, species_I, self.count)


class FittingNetwork(nn.Module):
    """Residual network of the descriptor, h <- a h + tanh(W h + b) with a trainable scalar a.

    Parameters
    ----------
    electron, atomic
        Features of the two parts of the descriptor.
    nodes, layers
        Of the dense layers.
    gain
        Factor of the output: a step of Adam in one weight then changes little.

    ``forward``: electron part (B, N, W, electron), atomic part (B, N, atomic)
    -> (B, N, W).
    """

    def __init__(
        self, electron: int, atomic: int, nodes: int, layers: int, gain: float = 0.1
    ) -> None:
        super().__init__()
        # one dense layer on the concatenated descriptor, split so that the larger part, which
        # is the same for all points, is multiplied once per atom
        self.atomic = nn.Linear(atomic, nodes)
        self.electron = nn.Linear(electron, nodes, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(nodes, nodes) for _ in range(layers - 1))
        self.skip = nn.Parameter(torch.ones(layers - 1))
        self.out, self.gain = nn.Linear(nodes, 1), gain
        for layer in (self.atomic, self.electron, *self.hidden, self.out):
            nn.init.xavier_normal_(layer.weight)
        with torch.no_grad():
            self.out.weight.mul_(1e-3)  # start at the ansatz that has been fitted
            self.out.bias.zero_()

    def forward(self, electron: Tensor, atomic: Tensor) -> Tensor:
        h = torch.tanh(self.electron(electron) + self.atomic(atomic)[:, :, None])
        for a, layer in zip(self.skip, self.hidden, strict=True):
            h = a * h + torch.tanh(layer(h))
        return self.gain * self.out(h)[..., 0]


class DeepDensity1D(AtomicSum1D):
    """Deep Density of the one-dimensional chains, as published (Zepeda-Nunez et al. 2019, app. A).

    Parameters
    ----------
    species, n_near, cutoff
        As in :class:`AtomicSum1D`.
    pair_nodes
        Layers of g; the last is M. The paper gives (5, 10, 20) for molecules.
    nodes, layers
        Of the two fitting networks; the paper gives 50 and 3 for molecules.
    spacing, scale
        The networks see |x| / scale and (R - spacing) / scale, in bohr.
    """

    def __init__(
        self,
        species: Sequence[int],
        n_near: int = 2,
        cutoff: float = 20.0,
        pair_nodes: Sequence[int] = (5, 10, 20),
        nodes: int = 50,
        layers: int = 3,
        spacing: float = 10.0,
        scale: float = 4.0,
    ) -> None:
        super().__init__(species, n_near, cutoff)
        count, self.spacing, self.scale = len(self.species), spacing, scale
        for name, start in {"A": 0.0, "B": 0.3, "C": -0.05, "D": 0.0}.items():
            self.register_parameter(name, nn.Parameter(torch.full((count,), start)))
        self.g = PairNetworks(count, 2, pair_nodes)
        sizes = (2, pair_nodes[-1] * n_near, nodes, layers)
        self.linear = nn.ModuleList(FittingNetwork(*sizes) for _ in range(count))
        self.exponent = nn.ModuleList(FittingNetwork(*sizes) for _ in range(count))

        #: learning rates, as shares of that of the networks: a step of Adam is of the size of the
        #: rate, whatever the gradient, and densities are far more sensitive to these four
        self.rates = dict.fromkeys("ABCD", 0.01)

    def neighbours(self, positions: Tensor, length: float) -> tuple[Tensor, Tensor]:
        # of n_near to each side, the n_near nearest
        R_JI, J = ordered_neighbours(positions, length, self.n_near)
        nearest = R_JI.abs().argsort(dim=-1, stable=True)[..., : self.n_near]
        return R_JI.gather(-1, nearest), J.gather(-1, nearest)

    def local(self, surroundings: Surroundings) -> Tensor:
        s, R_JI = surroundings, surroundings.R_JI
        d_J = torch.stack([(R_JI.abs() - self.spacing) / self.scale, R_JI.sign()], -1)
        # at the atom itself "sign" would give 0, a direction that training never shows
        d_0 = torch.stack([s.x.abs() / self.scale, 1 - 2 * (s.x < 0).to(s.x)], -1)
        g = self.g(d_J, s.species_I, s.species_J)

        def fitted(networks: nn.ModuleList) -> Tensor:
            parts = lambda k, a: networks[k](d_0[:, a], g[:, a])  # noqa: E731
            return per_species(parts, s.species_I, len(networks))

        return self.ansatz(s, fitted(self.linear), fitted(self.exponent))

    def ansatz(
        self, surroundings: Surroundings, N_I: Tensor | float = 0.0, E_I: Tensor | float = 0.0
    ) -> Tensor:
        """Eqs. 11 and 12 with given N_I and E_I, tapered to zero at the cutoff; (B, N, W)."""
        A, B, C, D = (p[surroundings.species_I, None] for p in (self.A, self.B, self.C, self.D))
        R = surroundings.x.abs()
        rho_I = (N_I + A * R + B) * torch.exp(C * (R - D) ** 2 + E_I)
        return rho_I * cosine_taper(R, 0.75 * self.cutoff, self.cutoff)


def fit_ansatz(
    model: DeepDensity1D,
    positions: Tensor,
    species: Tensor,
    points: Tensor,
    length: float,
    density: Tensor,
) -> float:
    """Set A, B, C and D to what fits densities best without networks (appendix B.1).

    Nonlinear least squares on all points given, from several widths; a few snapshots are enough.

    Parameters
    ----------
    model
        Changed in place.
    positions, species, points, length
        As for the model.
    density
        Shape (B, P), in 1/bohr.

    Returns
    -------
    float
        Mean squared error of the bare ansatz in 1/bohr^2.

    Raises
    ------
    ShapeError
        Density does not belong to these points.
    """
    if density.shape != (len(positions), points.shape[-1]):
        expected = (len(positions), points.shape[-1])
        raise ShapeError(f"density has shape {tuple(density.shape)}; give {expected}")
    s = model.surroundings(positions, species, points, length)
    count, target = len(model.species), density.to(s.x)

    @torch.no_grad()
    def residual(flat: np.ndarray) -> np.ndarray:
        for p, values in zip(
            (model.A, model.B, model.C, model.D), flat.reshape(4, count), strict=True
        ):
            p.copy_(torch.from_numpy(values))
        rho_I = model.ansatz(s).where(s.inside, 0).flatten(1)
        rho = torch.zeros_like(target).scatter_add(1, s.index.flatten(1), rho_I)
        return (rho - target).double().cpu().numpy().ravel()

    widest = np.repeat([np.inf, np.inf, 0.0, model.cutoff], count)
    fits = [
        least_squares(
            residual,
            np.repeat([0.0, float(target.max()) / 2, -0.5 / width**2, 0.0], count),
            bounds=(np.repeat([-np.inf, -np.inf, -np.inf, -model.cutoff], count), widest),
            x_scale=np.repeat([0.01, 0.1, 0.1, 1.0], count),
        )
        for width in (1.0, 2.0, 4.0)
    ]
    return float(np.square(residual(min(fits, key=lambda fit: fit.cost).x)).mean())
