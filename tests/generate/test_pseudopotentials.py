"""GTH pseudopotentials against their closed forms, and the UPF files against their own rules."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import simpson

from densitykit.errors import GenerationError
from densitykit.generate.pseudopotentials import (
    GTH,
    atomic_density,
    gth,
    local_potential,
    projector,
    upf_text,
    write_upf,
)

TABLE = [gth("H"), gth("Li"), gth("Li", 3), gth("C"), gth("O"), gth("Al"), gth("Na"), gth("Cl")]
each = pytest.mark.parametrize("pseudo", TABLE, ids=lambda p: f"{p.element}-q{p.valence}")
RADII = np.linspace(0, 25, 25001)


def numbers(upf: ElementTree.Element, name: str) -> np.ndarray:
    """Values of an array element, after a check of the size that it declares."""
    element = upf.find(f".//{name}")
    values = np.array(element.text.split(), dtype=float)
    assert len(values) == int(element.get("size"))
    return values


# --- parameters --------------------------------------------------------------------------------


def test_defaults() -> None:
    assert [gth(e).valence for e in ("H", "Li", "C", "O", "Al", "Na", "Cl")] == [
        1,
        1,
        4,
        6,
        3,
        1,
        7,
    ]


@each
def test_electrons_add_up(pseudo: GTH) -> None:
    assert sum(pseudo.electrons_per_l) == pseudo.valence
    assert sum(electrons for electrons, _, _ in pseudo.shells) == pseudo.valence


@each
def test_coupling_is_symmetric(pseudo: GTH) -> None:
    for _, _, h in pseudo.projectors:
        np.testing.assert_array_equal(h, np.transpose(h))


@each
def test_parameters_are_those_of_pyscf(pseudo: GTH) -> None:
    """PySCF carries the tables of CP2K as they are."""
    basis = pytest.importorskip("pyscf.gto.basis")
    table = "POTENTIAL_UZH" if "UZH" in pseudo.source else "GTH_POTENTIALS"
    text = (Path(basis._GTH_PP_DIR) / table).read_text(encoding="utf-8")
    _, _, block = text.partition(f"\n{pseudo.element} GTH-PBE-q{pseudo.valence} ")
    lines = itertools.takewhile(lambda line: line.strip() and line[0] != "#", block.splitlines())
    electrons, r_loc, n_c, c, _, *channels = basis.parse_cp2k_pp._parse(list(lines))
    assert pseudo.electrons_per_l == tuple(electrons[: len(pseudo.electrons_per_l)])
    assert (pseudo.r_loc, len(pseudo.c)) == (r_loc, n_c)
    np.testing.assert_array_equal(pseudo.c, c)
    kept = [(l, *channel) for l, channel in enumerate(channels) if channel[1]]
    assert len(kept) == len(pseudo.projectors)
    for channel, (l, r_l, n, h) in zip(pseudo.projectors, kept, strict=True):
        assert (channel.l, channel.r_l, len(channel.h)) == (l, r_l, n)
        np.testing.assert_array_equal(channel.h, h)


@pytest.mark.parametrize("query", [("Al", 11), ("Fe",), ("H", None, "BLYP")])
def test_unknown_pseudopotential(query: tuple) -> None:
    with pytest.raises(GenerationError, match=rf"{query[0]}.*holds H-q1, Li-q1, Li-q3"):
        gth(*query)


# --- radial functions --------------------------------------------------------------------------


@each
def test_local_potential_has_a_coulomb_tail(pseudo: GTH) -> None:
    r = np.array([8.0, 10.0, 20.0])
    np.testing.assert_allclose(local_potential(pseudo, r), -pseudo.valence / r, rtol=1e-12)


@each
def test_local_potential_is_continuous_at_the_origin(pseudo: GTH) -> None:
    at_zero, nearby = local_potential(pseudo, np.array([0.0, 1e-6]))
    np.testing.assert_allclose(at_zero, nearby, rtol=1e-9)
    expected = -pseudo.valence * np.sqrt(2 / np.pi) / pseudo.r_loc + pseudo.c[0]
    np.testing.assert_allclose(at_zero, expected, rtol=1e-12)


@each
@pytest.mark.parametrize("q", [0.3, 1.0, 4.0])
def test_fourier_transform_of_the_local_potential(pseudo: GTH, q: float) -> None:
    """Closed form: Goedecker, Teter, Hutter 1996, eq. 5; the tail -Z/r is transformed by hand."""
    r, y = RADII, (q * pseudo.r_loc) ** 2
    short = r * local_potential(pseudo, r) + pseudo.valence
    numeric = 4 * np.pi / q * simpson(short * np.sin(q * r), x=r)
    numeric -= 4 * np.pi * pseudo.valence / q**2
    series = [1, 3 - y, 15 - 10 * y + y**2, 105 - 105 * y + 21 * y**2 - y**3]
    gaussian = sum(c * p for c, p in zip(pseudo.c, series, strict=False))
    closed = -4 * np.pi * pseudo.valence / q**2 + (2 * np.pi) ** 1.5 * pseudo.r_loc**3 * gaussian
    np.testing.assert_allclose(numeric, closed * np.exp(-y / 2), rtol=1e-8)


@pytest.mark.parametrize("l", [0, 1, 2])
@pytest.mark.parametrize("i", [1, 2, 3])
def test_projectors_are_normalised(l: int, i: int) -> None:
    p = projector(l, i, 0.6, RADII)
    np.testing.assert_allclose(simpson((RADII * p) ** 2, x=RADII), 1.0, rtol=1e-10)


@each
def test_atomic_density_holds_the_valence(pseudo: GTH) -> None:
    rho = atomic_density(pseudo, RADII)
    assert rho.min() >= 0
    np.testing.assert_allclose(simpson(rho, x=RADII), pseudo.valence, rtol=1e-6)


# --- UPF ---------------------------------------------------------------------------------------


@each
def test_upf_holds_what_its_header_declares(pseudo: GTH) -> None:
    upf = ElementTree.fromstring(upf_text(pseudo))
    header = upf.find("PP_HEADER")
    size, count = int(header.get("mesh_size")), int(header.get("number_of_proj"))
    assert (upf.get("version"), header.get("pseudo_type")) == ("2.0.1", "NC")
    assert float(header.get("z_valence")) == pseudo.valence
    assert size % 2 == 1 and int(upf.find("PP_MESH").get("mesh")) == size
    for name in ("PP_R", "PP_RAB", "PP_LOCAL", "PP_RHOATOM"):
        assert len(numbers(upf, name)) == size
    assert count == sum(len(channel.h) for channel in pseudo.projectors)
    betas = [element for element in upf.iter() if element.tag.startswith("PP_BETA")]
    assert [b.get("index") for b in betas] == [str(k + 1) for k in range(count)]
    assert all(len(numbers(upf, b.tag)) == size for b in betas)
    assert max((int(b.get("angular_momentum")) for b in betas), default=0) == int(
        header.get("l_max")
    )


@each
def test_upf_gives_the_pseudopotential_back(pseudo: GTH, tmp_path: Path) -> None:
    """Local part, projectors within their cutoff and D_ij = 2 h_ij, from the file alone."""
    upf = ElementTree.parse(write_upf(pseudo, tmp_path / "x.UPF")).getroot()
    r = numbers(upf, "PP_R")
    V = local_potential(pseudo, r)
    np.testing.assert_allclose(numbers(upf, "PP_LOCAL"), 2 * V, rtol=1e-12)
    np.testing.assert_allclose(simpson(numbers(upf, "PP_RHOATOM"), x=r), pseudo.valence)
    expected = [
        (l, projector(l, i + 1, r_l, r)) for l, r_l, h in pseudo.projectors for i in range(len(h))
    ]
    for k, (l, p) in enumerate(expected, start=1):
        beta = upf.find(f".//PP_BETA.{k}")
        assert int(beta.get("angular_momentum")) == l
        values = numbers(upf, beta.tag)
        np.testing.assert_allclose(values, r * p, rtol=1e-12, atol=1e-12)
        assert np.abs(values[int(beta.get("cutoff_radius_index")) :]).max() < 1e-8
    if expected:
        D = numbers(upf, "PP_DIJ").reshape(len(expected), -1)
        o = 0
        for _, _, h in pseudo.projectors:
            inside = slice(o, o + len(h))
            np.testing.assert_allclose(D[inside, inside], 2 * np.array(h), rtol=1e-12)
            D[inside, inside] = 0
            o += len(h)
        assert not D.any()


def test_upf_refuses_a_mesh_shorter_than_its_projectors() -> None:
    with pytest.raises(GenerationError, match="projectors of Li reach beyond 4 bohr"):
        upf_text(gth("Li"), r_max=4.0)
