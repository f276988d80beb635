r"""Dynamics of densities in reciprocal space: F(q, t) and its spectrum S(q, w).

From the modes a, b of the electron density or of the nuclei (`densitykit.analysis.modes`) come the
intermediate scattering function and the dynamic structure factor (van Hove 1954; Hansen and
McDonald, Theory of Simple Liquids, section 7.4)

.. math:: F_{ab}(q, t) = \frac{\langle a_q(t_0 + t)\, b_q^*(t_0) \rangle}{\sqrt{N_a N_b}}, \qquad
   S_{ab}(q, \omega) = \frac{1}{2\pi} \int F_{ab}(q, t)\, e^{i\omega t}\, dt .

Sum rules: the zeroth moment is the static structure factor, the second is that of the velocities,

.. math:: \int S(q, \omega)\, d\omega = F(q, 0) = S(q), \qquad
   \int \omega^2 S(q, \omega)\, d\omega = -\ddot F(q, 0) = \frac{q^2 k_B T}{m},

the last step for classical nuclei of one kind, whatever their forces. All these averages are
classical: even in t, without detailed balance. The FFT gives all lags at once (Wiener-Khinchin).

Lazy on dask, as in `densitykit.analysis.modes`; the modes are few, so that a correlation in time
holds them whole. Times are in fs, angular frequencies in rad/fs. Error bars: `over_segments`.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import xarray as xr
from scipy.signal import get_window

from densitykit.analysis.modes import apply_lazily, same_waves, shell_mean
from densitykit.errors import ShapeError

__all__ = ["decay_time", "dynamic_structure", "intermediate_scattering", "spectral_moment"]
__all__ += ["time_correlation"]


def time_correlation(
    a: xr.DataArray, b: xr.DataArray | None = None, max_lag: int | None = None
) -> xr.DataArray:
    """Average of a(t_0 + t) b*(t_0) over all origins t_0, by FFT, for every other index.

    Parameters
    ----------
    a, b
        With dimension time, equally spaced, in fs; b = a by default.
    max_lag
        Longest lag in frames; half of the run by default. The mean at lag t is over
        what there is, n - t origins (unbiased, but noisy where few are left).

    Returns
    -------
    xr.DataArray
        (lag, *), lag in fs; real if a and b are.
    """
    b = a if b is None else b
    lag = _lags(a, max_lag)
    n, real = a.sizes["time"], not (np.iscomplexobj(a) or np.iscomplexobj(b))
    size = scipy.fft.next_fast_len(n + len(lag))  # zeros, so that the end does not meet the start

    def correlate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        product = scipy.fft.fft(x, size) * scipy.fft.fft(y, size).conj()
        sums = scipy.fft.ifft(product)[..., : len(lag)]
        return (sums.real if real else sums) / (n - np.arange(len(lag)))

    core, dtype = [["time"], ["time"]], float if real else complex
    out = apply_lazily(correlate, a, b, core=core, out={"lag": len(lag)}, dtype=dtype)
    return out.assign_coords(lag=lag).transpose("lag", ...)


def _lags(frames: xr.DataArray, max_lag: int | None) -> xr.DataArray:
    """Lag times 0 ... max_lag in fs, after a look at the spacing of the frames."""
    n = frames.sizes["time"]
    max_lag = n // 2 if max_lag is None else max_lag
    if not 0 < max_lag < n:
        raise ShapeError(f"a lag of {max_lag} frames needs more than {n}; give 0 < max_lag < {n}")
    if "time" not in frames.coords:
        raise ShapeError("the frames have no times; give them a coordinate time in fs")
    steps = np.diff(frames["time"].values.astype(np.float64))
    if steps[0] <= 0 or not np.allclose(steps, steps[0], rtol=1e-4):
        raise ShapeError(
            f"frames are {steps.min():g} to {steps.max():g} fs apart; "
            "select or interpolate to equally spaced frames"
        )
    return xr.DataArray(steps.mean() * np.arange(max_lag + 1), dims="lag", attrs={"units": "fs"})


def intermediate_scattering(
    a: xr.DataArray, b: xr.DataArray | None = None, max_lag: int | None = None
) -> xr.DataArray:
    """Intermediate scattering function F_ab(q, t), averaged over origins and shells.

    Parameters
    ----------
    a, b
        Modes (time, mode) on the same waves, frames equally spaced; b = a by default.
        `fluctuation` of them leaves out the elastic line of a solid.
    max_lag
        Longest lag in frames, see `time_correlation`.

    Returns
    -------
    xr.DataArray
        (lag, q), dimensionless, with F(q, 0) = S(q).
    """
    b = same_waves(a, b)
    n_a, n_b = (modes.isel(mode=0, drop=True).real.mean("time") for modes in (a, b))
    # q and -q are each other's conjugates, so that their mean is the real part
    return shell_mean(time_correlation(a, b, max_lag).real) / np.sqrt(n_a * n_b)


def decay_time(correlation: xr.DataArray, level: float = float(np.exp(-1))) -> xr.DataArray:
    """First time, in fs, at which C(t)/C(0) falls to a level (1/e); NaN where it never does.

    Parameters
    ----------
    correlation
        (lag, *), such as F(q, t); linear between its points.
    level
        Fraction of C(0).

    Returns
    -------
    xr.DataArray
        Shape (*,).
    """
    lag = correlation["lag"].values

    def first(values: np.ndarray) -> np.ndarray:
        ratio = values / values[..., :1]
        after = np.argmax(ratio <= level, axis=-1)[..., None]
        high, low = (np.take_along_axis(ratio, i, -1)[..., 0] for i in (after - 1, after))
        after = after[..., 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            time = lag[after] - (level - low) / (high - low) * (lag[after] - lag[after - 1])
        return np.where(after > 0, time, np.nan)

    return apply_lazily(first, correlation, core=[["lag"]], out={}, dtype=float)


def dynamic_structure(
    correlation: xr.DataArray, window: str | tuple[str, float] = "hann"
) -> xr.DataArray:
    r"""Spectrum :math:`\frac{1}{\pi} \int_0^\infty w(t) C(t) \cos \omega t\, dt`; of F: S(q, w).

    Parameters
    ----------
    correlation
        (lag, *), from lag 0 on, in fs.
    window
        Its name for `scipy.signal.get_window`, 1 at t = 0; "boxcar" is none. It keeps the
        zeroth moment exactly and smooths the rest; Hann, :math:`w = \cos^2(\pi t/2t_{max})`,
        adds :math:`C(0) \pi^2 / 2t_{max}^2` to the second moment.

    Returns
    -------
    xr.DataArray
        (omega, *) with omega >= 0 in rad/fs, even in omega, in units of the correlation times fs.
    """
    last = correlation.sizes["lag"] - 1
    spacing = float(correlation["lag"][-1]) / last
    taper = get_window(window, 2 * last + 1, fftbins=False)[last:]
    scale = spacing / (2 * np.pi)

    def transform(values: np.ndarray) -> np.ndarray:
        return scale * scipy.fft.dct(values * taper, type=1, axis=-1)

    out = apply_lazily(
        transform, correlation, core=[["lag"]], out={"omega": last + 1}, dtype=float
    )
    omega = np.pi * np.arange(last + 1) / (last * spacing)
    return out.assign_coords(omega=("omega", omega, {"units": "rad/fs"})).transpose("omega", ...)


def spectral_moment(spectrum: xr.DataArray, order: int = 0) -> xr.DataArray:
    """Moment of an even spectrum over all frequencies, negative ones too: 0 gives C(0) exactly.

    Parameters
    ----------
    spectrum
        (omega, *), from `dynamic_structure`.
    order
        Even.
    """
    return 2 * (spectrum["omega"] ** order * spectrum).integrate("omega")
