r"""Two tools of self-consistent field iterations: occupations at a temperature, and mixing.

**Fermi-Dirac occupations** are :math:`f_i = 1/(1 + e^{(\varepsilon_i - \mu)/T})` with
:math:`\sum_i f_i = N`. In an insulator the sum is :math:`N` to the last digit for any
:math:`\mu` in the gap, so that solving this for :math:`\mu` gives noise. We balance electrons
above with holes below instead,

.. math:: \ln \sum_{i > N} f_i = \ln \sum_{i \le N} (1 - f_i),

which is the same equation without cancellation: monotonic in :math:`\mu`, with a slope between 1/T
and 2/T near the solution, so that Newton's method ends in a few steps at any temperature.

**Anderson mixing** (Anderson 1965) looks for :math:`x` with :math:`F(x) = 0`. Of the last
differences :math:`\Delta x_j, \Delta F_j` it takes the combination that removes most of F,

.. math:: \gamma = \arg\min \|F - \gamma_j \Delta F_j\|, \quad
          x' = x - \gamma_j \Delta x_j + \beta\,(F - \gamma_j \Delta F_j).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lstsq
from scipy.special import entr, expit, log_expit, logsumexp

from densitykit.errors import GenerationError

__all__ = ["AndersonMixing", "entropy", "fermi_dirac", "occupation_slopes"]

Real = NDArray[np.float64]
Complex = NDArray[np.complex128]
_NEWTON_STEPS = 100


def fermi_dirac(eps: Real, n_electrons: int, temperature: float) -> tuple[float, Real]:
    """Chemical potential and occupations (Mermin 1965) of spinless levels.

    Parameters
    ----------
    eps
        Levels in hartree, ascending, shape (n_bands,).
    n_electrons
        N, with 0 < N < n_bands.
    temperature
        T in hartree.

    Returns
    -------
    tuple[float, Real]
        The chemical potential in hartree and the occupations, shape (n_bands,).

    Raises
    ------
    GenerationError
        The levels are not finite.
    """
    low, high = eps[:n_electrons], eps[n_electrons:]
    mu = 0.5 * (low[-1] + high[0])
    for _ in range(_NEWTON_STEPS):
        electrons, holes = (mu - high) / temperature, (low - mu) / temperature
        log_f, log_h = log_expit(electrons), log_expit(holes)
        total_f, total_h = logsumexp(log_f), logsumexp(log_h)
        slope = np.exp(log_f - total_f) @ expit(-electrons)
        slope += np.exp(log_h - total_h) @ expit(-holes)
        step = temperature * (total_f - total_h) / slope
        mu -= step
        # rounding of the exponents is what limits mu
        if abs(step) <= 1e-14 * (np.abs(eps).max() + temperature):
            return float(mu), expit((mu - eps) / temperature)
    raise GenerationError(
        f"no chemical potential for {n_electrons} electrons in levels from {eps[0]:.3g} to "
        f"{eps[-1]:.3g} hartree at temperature {temperature:g}; check the potential"
    )


def entropy(eps: Real, mu: float, temperature: float) -> float:
    """S = -sum_i [f ln f + (1 - f) ln(1 - f)], in units of the Boltzmann constant."""
    x = (mu - eps) / temperature
    return float(entr(expit(x)).sum() + entr(expit(-x)).sum())


def occupation_slopes(eps: Real, mu: float, temperature: float) -> Real:
    """(f_i - f_j) / (eps_i - eps_j), or df/deps where two levels agree.

    Parameters
    ----------
    eps
        Levels in hartree, shape (n_bands,).
    mu, temperature
        In hartree.

    Returns
    -------
    Real
        Symmetric, non-positive, shape (n_bands, n_bands), in 1/hartree.
    """
    x = (eps - mu) / temperature
    f, apart = expit(-x), np.subtract.outer(eps, eps)
    # both branches are good to 1e-11 here: the quotient loses digits, the derivative is O(apart^2)
    close = np.abs(apart) < 1e-5 * temperature
    middle = np.add.outer(x, x) / 2
    derivative = -expit(middle) * expit(-middle) / temperature
    return np.where(close, derivative, np.subtract.outer(f, f) / np.where(close, 1.0, apart))


class AndersonMixing:
    """Next iterate of x from F(x); see the module docstring.

    Parameters
    ----------
    dimension
        Differences kept; 0 is linear mixing, x + beta F.
    beta
        Share of the remaining F that is added.
    """

    def __init__(self, dimension: int, beta: float) -> None:
        self.dimension, self.beta = dimension, beta
        self._pairs: list[tuple[Real, Real]] = []

    def __call__(self, x: Complex, F: Complex) -> Complex:
        """Give the next x; both complex, shape (n,), contiguous."""
        a, b = x.view(float), F.view(float)
        past, self._pairs = self._pairs, [*self._pairs, (a, b)][-self.dimension - 1 :]
        if not past or not self.dimension:
            return x + self.beta * F
        dx, dF = (np.diff([pair[i] for pair in self._pairs], axis=0) for i in (0, 1))
        # near convergence differences become parallel: least squares with a rank cut
        gamma = lstsq(dF.T, b, cond=1e-13, lapack_driver="gelsy", check_finite=False)[0]
        return (a - gamma @ dx + self.beta * (b - gamma @ dF)).view(complex)
