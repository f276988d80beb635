r"""Goedecker-Teter-Hutter pseudopotentials, and UPF files made from them.

A GTH pseudopotential is a handful of numbers: Gaussians, in real and in reciprocal space alike
(Goedecker, Teter, Hutter 1996, eqs. 1-4). With :math:`x = r / r_{loc}` its local part is

.. math:: V_{loc}(r) = -\frac{Z}{r}\,\mathrm{erf}\frac{x}{\sqrt 2}
          + e^{-x^2/2} \left(C_1 + C_2 x^2 + C_3 x^4 + C_4 x^6\right)

where Z is the charge of the ion, that is the number of valence electrons. The non-local part is
separable, :math:`\sum_{lm,ij} |p^l_i Y_{lm}\rangle\, h^l_{ij}\, \langle p^l_j Y_{lm}|`, with
normalised radial projectors

.. math:: p^l_i(r) = \frac{\sqrt 2\, r^{l+2(i-1)}\, e^{-r^2/2 r_l^2}}
          {r_l^{\,l+(4i-1)/2} \sqrt{\Gamma\left(l+\frac{4i-1}{2}\right)}}

Off-diagonal :math:`h_{ij}` came with Hartwigsen, Goedecker, Hutter 1998; the parameters for the
PBE functional with Krack 2005. Everything is in atomic units (bohr, hartree), but for the UPF
files, which are in rydberg.

The table below holds the elements of our data sets. Lithium comes with one electron (the liquid's
valence density, smooth enough for 14 Ry) and with three. Aluminium comes with three. An
eleven-electron aluminium (2s and 2p in the valence) does not exist in the published GTH tables:
none is in the files GTH_POTENTIALS, NLCC_POTENTIALS and POTENTIAL_UZH of CP2K 2023.1, nor in those
of PySCF 2.14, where the semicore series for PBE stops at Na (9) and Mg (10). Densities of the
2s2p shell of aluminium need a pseudopotential of another family.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gamma, pi, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import simpson
from scipy.special import erf

from densitykit.errors import GenerationError

__all__ = [
    "GTH",
    "Channel",
    "atomic_density",
    "gth",
    "local_potential",
    "projector",
    "upf_text",
    "write_upf",
]

_KRACK = "Krack 2005, Theor. Chem. Acc. 114, 145 (GTH_POTENTIALS of CP2K)"
_UZH = "Krack 2005, refined: POTENTIAL_UZH of CP2K (J. Hutter, University of Zurich)"


class Channel(NamedTuple):
    """Projectors of one angular momentum: l, radius in bohr, symmetric h_ij in hartree."""

    l: int
    r_l: float
    h: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class GTH:
    """Parameters of one pseudopotential, in bohr and hartree.

    Attributes
    ----------
    element
        Chemical symbol.
    valence
        Number of valence electrons Z.
    r_loc
        Range of the Gaussian charge of the ion.
    c
        Coefficients C_1, C_2, ... of the local part.
    projectors
        Channels with at least one projector.
    electrons_per_l
        Valence configuration of the atom: electrons in s, p, ...
    shells
        (electrons, n*, exponent) of Slater's atom (Slater 1930), for a first density only.
    functional
        Exchange-correlation functional that it was made for.
    source
        Where the numbers were published.
    """

    element: str
    valence: int
    r_loc: float
    c: tuple[float, ...]
    projectors: tuple[Channel, ...]
    electrons_per_l: tuple[int, ...]
    shells: tuple[tuple[int, int, float], ...]
    functional: str = "PBE"
    source: str = _KRACK


# In order of preference: the first of an element is its default.
_TABLE = (
    GTH("H", 1, 0.2, (-4.17890044, 0.72446331), (), (1,), ((1, 1, 1.0),)),
    GTH(
        "Li",
        1,
        0.76670177870108,
        (-1.90296655278366, 0.34217351327808),
        (
            Channel(0, 0.66601257185493, ((1.73677711010090,),)),
            Channel(1, 1.08507379195620, ((-0.01539384864460,),)),
        ),
        (1,),
        ((1, 2, 0.65),),
        source=_UZH,
    ),
    GTH(
        "Li",
        3,
        0.4,
        (-14.08115455, 9.62621962, -1.78361605, 0.08515207),
        (),
        (3,),
        ((2, 1, 2.7), (1, 2, 0.65)),
    ),
    GTH(
        "C",
        4,
        0.33847124,
        (-8.80367398, 1.33921085),
        (Channel(0, 0.30257575, ((9.62248665,),)),),
        (2, 2),
        ((4, 2, 1.625),),
    ),
    GTH(
        "O",
        6,
        0.24455430,
        (-16.66721480, 2.48731132),
        (Channel(0, 0.22095592, ((18.33745811,),)),),
        (2, 4),
        ((6, 2, 2.275),),
    ),
    GTH(
        "Al",
        3,
        0.45000971106835,
        (-7.55644997237063,),
        (
            Channel(
                0,
                0.48744057136206,
                ((6.96008533256047, -1.88883535944668), (-1.88883535944668, 2.43848344694845)),
            ),
            Channel(1, 0.56227366274780, ((1.86536320212543,),)),
        ),
        (2, 1),
        ((3, 3, 3.5 / 3),),
        source=_UZH,
    ),
    GTH(
        "Na",
        1,
        0.87948364241558,
        (-1.16444467445039,),
        (
            Channel(
                0,
                0.67053579706433,
                ((1.86827773481150, -0.22540116228205), (-0.22540116228205, 0.63725384210554)),
            ),
            Channel(1, 0.86099184094473, ((0.61384869795326,),)),
        ),
        (1,),
        ((1, 3, 2.2 / 3),),
        source=_UZH,
    ),
    GTH(
        "Cl",
        7,
        0.41014709847563,
        (-6.37852110217338,),
        (
            Channel(
                0,
                0.33955269964986,
                ((15.21928658839746, -4.93452228977013), (-4.93452228977013, 6.37068300920447)),
            ),
            Channel(1, 0.37848905310802, ((4.33859776816808,),)),
        ),
        (2, 5),
        ((7, 3, 6.1 / 3),),
        source=_UZH,
    ),
)


def gth(element: str, valence: int | None = None, functional: str = "PBE") -> GTH:
    """Return the GTH pseudopotential of an element.

    Parameters
    ----------
    element
        Chemical symbol.
    valence
        Number of valence electrons; None for the usual choice (1 for Li, 3 for Al).
    functional
        Must be the one of the calculation.

    Raises
    ------
    GenerationError
        The table has none; the message names those it has.
    """
    for entry in _TABLE:
        wanted = entry.valence if valence is None else valence
        if (entry.element, entry.valence, entry.functional) == (element, wanted, functional):
            return entry
    known = ", ".join(f"{entry.element}-q{entry.valence}" for entry in _TABLE)
    electrons = "" if valence is None else f" with {valence} valence electrons"
    raise GenerationError(
        f"no {functional} GTH pseudopotential of {element}{electrons}; the PBE table holds {known}"
    )


def local_potential(gth: GTH, r: NDArray[np.float64]) -> NDArray[np.float64]:
    """V_loc(r) in hartree at radii r >= 0 in bohr (Goedecker, Teter, Hutter 1996, eq. 1)."""
    x = np.asarray(r, dtype=float) / gth.r_loc
    origin = sqrt(2 / pi)  # limit of erf(x / sqrt 2) / x
    coulomb = np.divide(erf(x / sqrt(2)), x, out=np.full_like(x, origin), where=x > 0)
    gaussian = np.exp(-(x**2) / 2) * np.polynomial.polynomial.polyval(x**2, gth.c)
    return -gth.valence / gth.r_loc * coulomb + gaussian


def projector(l: int, i: int, r_l: float, r: NDArray[np.float64]) -> NDArray[np.float64]:
    r"""Radial projector p_i^l(r) in bohr^(-3/2), normalised: :math:`\int r^2 p^2 dr = 1`.

    Parameters
    ----------
    l
        Angular momentum.
    i
        Number of the projector in its channel, from 1.
    r_l
        Radius of the channel in bohr.
    r
        Radii in bohr.

    Source: Goedecker, Teter, Hutter 1996, eq. 3.
    """
    half = l + (4 * i - 1) / 2
    norm = sqrt(2) / (r_l**half * sqrt(gamma(half)))
    r = np.asarray(r, dtype=float)
    return norm * r ** (l + 2 * (i - 1)) * np.exp(-(r**2) / (2 * r_l**2))


def atomic_density(gth: GTH, r: NDArray[np.float64]) -> NDArray[np.float64]:
    r"""Radial density :math:`4\pi r^2\rho(r)` of Slater's atom, in 1/bohr: a start for the SCF.

    Each shell is :math:`r^{2n^*} e^{-2\zeta r}` with the exponents of Slater 1930, normalised to
    its electrons on [0, inf).
    """
    r = np.asarray(r, dtype=float)
    density = np.zeros_like(r)
    for electrons, n, zeta in gth.shells:
        norm = (2 * zeta) ** (2 * n + 1) / gamma(2 * n + 1)
        density += electrons * norm * r ** (2 * n) * np.exp(-2 * zeta * r)
    return density


def upf_text(gth: GTH, r_max: float = 10.0, dr: float = 0.005) -> str:
    """Return the pseudopotential as a UPF 2.0.1 file (norm-conserving, separable).

    Parameters
    ----------
    gth
        The pseudopotential.
    r_max
        Last point of the uniform radial mesh, bohr; 10 is where Quantum ESPRESSO stops
        integrating.
    dr
        Its spacing, bohr.

    Energies are in rydberg: the local potential and D_ij are twice those of the table, and the
    projectors are r p(r). The initial atomic density is scaled to Z electrons on the mesh.

    Raises
    ------
    GenerationError
        A projector does not fit on the mesh.
    """
    n = 2 * round(r_max / dr / 2) + 1  # odd, as Simpson's rule wants it
    r = dr * np.arange(n)
    rho = atomic_density(gth, r)
    rho *= gth.valence / simpson(rho, x=r)
    sections = [
        f"<PP_INFO>\nGTH pseudopotential, {gth.functional}. Parameters: {gth.source}\n</PP_INFO>",
        _tag("PP_HEADER", _header(gth, n)),
        _tag(
            "PP_MESH",
            {"dx": dr, "mesh": n, "xmin": 0.0, "rmax": r[-1], "zmesh": float(gth.valence)},
            _array("PP_R", r) + "\n" + _array("PP_RAB", np.full(n, dr)),
        ),
        _array("PP_LOCAL", 2 * local_potential(gth, r)),
        _tag("PP_NONLOCAL", {}, _nonlocal(gth, r)),
        _tag("PP_PSWFC", {}, ""),
        _array("PP_RHOATOM", rho),
    ]
    return _tag("UPF", {"version": "2.0.1"}, "\n".join(sections)) + "\n"


def write_upf(gth: GTH, path: str | Path) -> Path:
    """Write `upf_text` to a file and return its path."""
    path = Path(path)
    path.write_text(upf_text(gth), encoding="ascii")
    return path


def _header(gth: GTH, mesh_size: int) -> dict[str, object]:
    """Attributes of PP_HEADER; everything that a separable potential lacks is declared absent."""
    lacks = "ultrasoft paw coulomb".split()
    return {
        "generated": "densitykit",
        "author": "Goedecker, Teter, Hutter",
        "date": "",
        "comment": "",
        "element": gth.element,
        "pseudo_type": "NC",
        "relativistic": "scalar",
        **{f"is_{name}": "F" for name in lacks},
        **{f"has_{name}": "F" for name in ("so", "wfc", "gipaw")},
        "paw_as_gipaw": "F",
        "core_correction": "F",
        "functional": gth.functional,
        "z_valence": float(gth.valence),
        "total_psenergy": 0.0,
        "wfc_cutoff": 0.0,
        "rho_cutoff": 0.0,
        "l_max": max((channel.l for channel in gth.projectors), default=0),
        "l_max_rho": 0,
        "l_local": -3,  # none of the channels: the local part is a function of its own
        "mesh_size": mesh_size,
        "number_of_wfc": 0,
        "number_of_proj": sum(len(channel.h) for channel in gth.projectors),
    }


def _nonlocal(gth: GTH, r: NDArray[np.float64]) -> str:
    """PP_BETA.1, PP_BETA.2, ... and PP_DIJ, or nothing without projectors."""
    if not gth.projectors:
        return ""
    betas = [
        (l, r * projector(l, i + 1, r_l, r)) for l, r_l, h in gth.projectors for i in range(len(h))
    ]
    # One cutoff for all, on an odd number of points; beyond it all projectors are negligible.
    last = max(np.flatnonzero(np.abs(beta) > 1e-8)[-1] for _, beta in betas)
    cutoff = int(last) + 1 + int(last) % 2
    if cutoff >= len(r):
        raise GenerationError(f"the projectors of {gth.element} reach beyond {r[-1]:g} bohr")
    size = {"cutoff_radius_index": cutoff}
    size |= {name: r[cutoff - 1] for name in ("cutoff_radius", "ultrasoft_cutoff_radius")}
    blocks = [
        _array(f"PP_BETA.{k}", beta, {"index": k, "angular_momentum": l} | size)
        for k, (l, beta) in enumerate(betas, start=1)
    ]
    return "\n".join([*blocks, _array("PP_DIJ", _coupling(gth).ravel())])


def _coupling(gth: GTH) -> NDArray[np.float64]:
    """Matrix D_ij over all projectors in rydberg: blocks 2 h of the channels on the diagonal."""
    sizes = [len(channel.h) for channel in gth.projectors]
    D = np.zeros((sum(sizes), sum(sizes)))
    for end, channel in zip(np.cumsum(sizes), gth.projectors, strict=True):
        block = slice(end - len(channel.h), end)
        D[block, block] = 2 * np.array(channel.h)
    return D


def _tag(name: str, attributes: dict[str, object], body: str | None = None) -> str:
    """Return an XML element; without a body it closes itself."""
    head = " ".join([name, *(f'{key}="{_value(v)}"' for key, v in attributes.items())])
    return f"<{head}/>" if body is None else f"<{head}>\n{body}\n</{name}>"


def _array(name: str, values: Iterable[float], attributes: dict[str, object] | None = None) -> str:
    """Return an array element: 15 digits, four numbers a line."""
    numbers = [f"{v:.14E}" for v in values]
    lines = "\n".join(" ".join(numbers[k : k + 4]) for k in range(0, len(numbers), 4))
    size = {"type": "real", "size": len(numbers), "columns": 4}
    return _tag(name, size | (attributes or {}), lines)


def _value(v: object) -> str:
    """Text of an attribute; floats in full, without numpy's type name."""
    return f"{v:.12g}" if isinstance(v, float) else str(v)
