r"""Spectra of electrons in time: absorption, dielectric function, structure factor, with errors.

A kick to the velocity a contains all frequencies alike. What follows is the response,

.. math::
    \sigma(\omega) = \frac1a\int_0^T \bar j(t)\, w(t)\, e^{i\omega t} dt, \quad
    \epsilon(\omega) = 1 + \frac{4\pi i}{\epsilon_0\,\omega}\sigma(\omega), \quad
    \int_0^\infty \Re\sigma\, d\omega = \frac{\pi N}{2L},

with the mean current :math:`\bar j` and :math:`4\pi/\epsilon_0` the strength of the interaction
of the model (:math:`q^2K(q)` for :math:`q \gg \kappa`). :math:`\Re\sigma` is the absorption; the
zeros of :math:`\epsilon`, peaks of :math:`-\Im 1/\epsilon`, are plasmons. A potential
:math:`\lambda\cos qr` that lasts no time gives

.. math::
    \chi(q, \omega) = \frac{1}{\lambda}\int_0^T\! dt\, w(t)\, e^{i\omega t}
        \!\int\!\cos(qr)\,\delta\rho\,dr, \quad
    S(q, \omega) = -\frac{2}{\pi N}\Im\chi(q, \omega),
    \quad \int_0^\infty\!\omega S\, d\omega = \frac{q^2}{2},

the last on average over shifts of the wave, at a temperature far below :math:`\omega` (fluctuation
and dissipation, Callen and Welton 1951). The factor 2 is that of one standing wave instead of two
running ones.

**Windows.** A record of length T resolves :math:`2\pi/T`. The window w goes from 1 to 0, so that
the sum rule holds for any of them; a sharper one has narrower lines and ripples beside them.
How far a line moves from window to window, and when the record is cut, is its error bar.
Atomic units throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from densitykit.errors import ShapeError

__all__ = ["WINDOWS", "conductivity", "dielectric", "lines", "structure_factor", "transform"]

Real = NDArray[np.float64]
Complex = NDArray[np.complex128]
#: functions of t/T in [0, 1]
WINDOWS: dict[str, Callable[[Real], Real]] = {
    "polynomial": lambda x: 1 - 3 * x**2 + 2 * x**3,
    "cosine": lambda x: np.cos(0.5 * np.pi * x) ** 2,
    "gaussian": lambda x: np.exp(-0.5 * (3 * x) ** 2),
}


def transform(
    t: ArrayLike, signal: ArrayLike, omega: ArrayLike, window: str = "polynomial"
) -> Complex:
    """Integral of signal(t) w(t) exp(i omega t) from the first time to the last.

    Parameters
    ----------
    t
        Equally spaced, shape (n,); the first is 0.
    signal
        Shape (n,).
    omega
        Shape (m,).
    window
        Of `WINDOWS`.

    Raises
    ------
    ShapeError
        Arrays do not fit, or there is no such window.
    """
    t, signal, omega = (np.asarray(x, float) for x in (t, signal, omega))
    if t.ndim != 1 or signal.shape != t.shape or len(t) < 2 or window not in WINDOWS:
        raise ShapeError(
            f"times {t.shape}, signal {signal.shape}, window {window!r}; give two arrays of one "
            f"length and one of {list(WINDOWS)}"
        )
    weights = np.full(len(t), t[1] - t[0])
    weights[[0, -1]] /= 2
    windowed = weights * WINDOWS[window]((t - t[0]) / (t[-1] - t[0])) * signal
    return np.exp(1j * np.multiply.outer(omega, t)) @ windowed


def conductivity(
    t: ArrayLike, current: ArrayLike, kick: float, omega: ArrayLike, window: str = "polynomial"
) -> Complex:
    """sigma(omega) from the mean current (n,) after a kick at t = 0; its real part absorbs."""
    return transform(t, current, omega, window) / kick


def dielectric(omega: ArrayLike, sigma: ArrayLike, eps0: float = 10.0) -> Complex:
    """epsilon(omega), shape (m,), of the interaction 4 pi / eps0."""
    return 1 + 4j * np.pi / eps0 * np.asarray(sigma) / np.asarray(omega)


def structure_factor(
    t: ArrayLike,
    density_wave: ArrayLike,
    push: float,
    electrons: float,
    omega: ArrayLike,
    window: str = "polynomial",
) -> Real:
    """S(q, omega) per electron from the integral of cos(qr) times the change of density, (n,)."""
    chi = transform(t, density_wave, omega, window) / push
    return -2 * chi.imag / (np.pi * electrons)


def lines(
    t: ArrayLike,
    signal: ArrayLike,
    omega: ArrayLike,
    part: Callable[[Complex], Real] = np.real,
    least: float = 0.05,
) -> pd.DataFrame:
    """Peaks of a spectrum, the highest first, with error bars.

    Parameters
    ----------
    t, signal, omega
        As `transform`; omega is equally spaced.
    part
        What of the transform is a spectrum: `np.real`, or its negative imaginary part.
    least
        Peaks below this share of the highest are left out.

    Returns
    -------
    pd.DataFrame
        Columns position, low, high and height. The interval spans the position in all windows,
        with the whole record and with three quarters of it.
    """
    t, signal, omega = (np.asarray(x, float) for x in (t, signal, omega))
    short = max(2, 3 * len(t) // 4)
    found = [
        _maxima(omega, part(transform(t[:n], signal[:n], omega, window)), 0.0)[0]
        for window in WINDOWS
        for n in (len(t), short)
    ]
    positions, heights = _maxima(omega, part(transform(t, signal, omega)), least)
    same = [[x[np.abs(x - p).argmin()] for x in found if len(x)] for p in positions]
    table = {"position": positions, "low": [min(x) for x in same], "high": [max(x) for x in same]}
    table = pd.DataFrame(table | {"height": heights})
    return table.sort_values("height", ascending=False, ignore_index=True)


def _maxima(omega: Real, spectrum: Real, least: float) -> tuple[Real, Real]:
    """Positions and heights of local maxima, by parabolas through three points."""
    left, middle, right = spectrum[:-2], spectrum[1:-1], spectrum[2:]
    i = np.flatnonzero((middle > left) & (middle >= right) & (middle > least * spectrum.max()))
    bend = left[i] - 2 * middle[i] + right[i]
    shift = 0.5 * (left[i] - right[i]) / bend
    return omega[i + 1] + shift * (omega[1] - omega[0]), middle[i] - 0.25 * (
        left[i] - right[i]
    ) * shift
