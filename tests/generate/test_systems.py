"""The catalogue of static data sets, and the tables of what their settings cost in accuracy."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ase")

from analytic_engine import SIGMA, Gaussians, gaussians, geometries

from densitykit.errors import GenerationError
from densitykit.generate import systems as catalogue
from densitykit.generate.convergence import Series, convergence_table, grid_table
from densitykit.generate.engine import valence_charges
from densitykit.generate.geometries import MOLECULES, aluminium, molecule
from densitykit.generate.snapshots import generate_snapshots
from densitykit.generate.systems import convergence, gaussian_dft, generate, system, systems
from densitykit.io.reader import open_split, open_trajectory
from densitykit.io.validate import validate_trajectory


@pytest.mark.parametrize("name", [*MOLECULES, "water", "aluminium"])
def test_systems_can_be_sent_to_workers(name: str) -> None:
    names = []
    for run, found in systems(name).items():
        assert (run == ".") == (name in MOLECULES)
        copy = pickle.loads(pickle.dumps(found.engine))
        assert (copy.func, copy.keywords) == (found.engine.func, found.engine.keywords)
        names.append(found.name)
        assert (
            found.name.startswith(name)
            and found.geometries.keywords["temperature"] in (catalogue.TEMPERATURES[name])
        )
    assert len(set(names)) == len(names)  # a store knows its system by name


def test_only_the_smallest_size_is_trained_on() -> None:
    for name, sizes in catalogue.SIZES.items():
        for found in systems(name).values():
            assert ("train" in found.splits) == (found.geometries.args == (sizes[0],))
    assert sum(system("ethane").splits.values()) == 120


def test_runs() -> None:
    assert list(systems("ethane")) == ["."]
    assert list(systems("water")) == ["32", "64", "128", "256", "512"]
    assert list(systems("water", 64)) == ["64"]
    assert list(systems("aluminium", 108)) == ["108-300K", "108-600K", "108-900K"]
    assert list(systems("aluminium", temperature=450.0))[0] == "32-450K"
    assert system("aluminium").name == "aluminium-32-300K"


def test_unknown_systems() -> None:
    with pytest.raises(GenerationError, match="no system 'iron'; choose one of .*'aluminium'"):
        system("iron")
    with pytest.raises(GenerationError, match=r"water has no size 33; choose one of \[32, 64"):
        generate("water", "nowhere.zarr", size=33)
    with pytest.raises(GenerationError, match="no system 'iron'"):
        convergence("iron")
    assert not Path("nowhere.zarr").exists()


def test_meshes_of_k_points() -> None:
    """Those of 32 and 108 atoms are one mesh of the cubic cell; that of 256 is no coarser."""
    found = {}
    for size, cells in ((32, 2), (108, 3), (256, 4)):
        settings = system("aluminium", size).engine.keywords
        m, *_ = mesh = settings["k_points"]
        assert mesh == (m, m, m) and settings["shifted"]
        found[size] = np.sort([(i + 0.5) / m / cells for i in range(m * cells)])
    np.testing.assert_allclose(found[32], found[108])
    assert len(found[256]) >= len(found[32])


@pytest.mark.parametrize("name", ["lithium", "sodium-chloride"])
def test_convergence_of_what_moves(name: str) -> None:
    start, series = catalogue._DYNAMICS[name]
    assert start(seed=1).pbc.all()
    for each in series():
        assert each.reference in each.engines
        assert all(pickle.loads(pickle.dumps(make)).args for make in each.engines.values())


def test_valence_charges_of_a_description() -> None:
    known = {"valence_charges": {"Na": 1, "Cl": 7}}
    np.testing.assert_array_equal(valence_charges(known, [11, 17, 17]), [1, 7, 7])
    assert valence_charges(known, [11, 1]) is None and valence_charges({}, [11]) is None


def test_generate_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = partial(aluminium, interval=30.0, equilibration=30.0)
    monkeypatch.setattr(catalogue, "aluminium", quick)
    engine = partial(Gaussians, tmp_path / "log")
    monkeypatch.setattr(catalogue, "_aluminium_engine", lambda size: engine)
    path = generate("aluminium", tmp_path / "al.zarr", 4, size=32, workers=2, progress=False)
    assert validate_trajectory(path) == []
    cells = set()
    for T in (300, 600, 900):
        ds = open_trajectory(path / f"32-{T}K")
        assert ds.sizes["time"] == 4 and set(ds["temperature"].values) == {T}
        assert ds.attrs["system"] == f"aluminium-32-{T}K"
        cells.add(float(ds["cell"][0, 0]))
        assert open_split(path, f"train-32-{T}K").sizes["time"] == 3  # 28 of 40
        assert open_split(path, f"test-32-{T}K").sizes["time"] == 1
    assert len(cells) == 3  # they expand


def test_a_molecule_with_the_real_engines(tmp_path: Path) -> None:
    """GFN2-xTB and PySCF, in a small basis, through the same calls as the real data."""
    pytest.importorskip("tblite")
    pytest.importorskip("pyscf")
    quick = replace(
        system("ethane"),
        geometries=partial(molecule, "ethane", interval=10.0, equilibration=10.0, margin=3.0),
        engine=partial(gaussian_dft, basis="gth-szv"),
    )
    ds = open_trajectory(generate_snapshots(quick, tmp_path / "e.zarr", 1, progress=False))
    assert abs(float(ds["n_electrons"][0]) / 14 - 1) < 1e-3
    assert float(ds["density"].min()) >= 0 and not ds["pbc"].any()
    assert np.abs(ds["forces"].sum("atom")).max() < 0.05
    edge = max(float(ds["density"][0][i].max()) for i in (0, -1))
    assert edge < 1e-3 * float(ds["density"].max())  # nothing left at the walls


# --- tables of errors ------------------------------------------------------------------------


@pytest.fixture
def series(tmp_path: Path) -> Series:
    log = tmp_path / "log"
    engines = {f"{s:g}": partial(Gaussians, log, sigma=s) for s in (0.8, 0.7, SIGMA)}
    return Series("width", engines, f"{SIGMA:g}")


def test_convergence_table(series: Series, tmp_path: Path) -> None:
    atoms, folder = geometries(2, seed=0), tmp_path / "kept"
    table = convergence_table([series], atoms, spacing=0.25, folder=folder, progress=False)
    assert table["label"].tolist() == ["0.8", "0.8", "0.7", "0.7", "0.6", "0.6"]
    assert table["configuration"].tolist() == 3 * [0, 1]
    for _, row in table.iterrows():
        a, b = (
            gaussians(atoms[row["configuration"]], (16, 16, 16), s)
            for s in (float(row["label"]), SIGMA)
        )
        expected = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert row["density_l2"] == pytest.approx(expected, abs=1e-12)
    assert (table["density_l2"][4:] == 0).all() and (table["force_rms"] > 0).all()
    assert (table["force_rms_error"] == 0).all()  # the springs do not depend on the width
    # again, with one configuration more: only that is computed
    log = tmp_path / "log"
    log.write_text("")
    longer = convergence_table(
        [series], geometries(3, seed=0), spacing=0.25, folder=folder, progress=False
    )
    assert log.read_text().count("solve") == 3
    same = longer[longer["configuration"] < 2].reset_index(drop=True)
    assert same.equals(table)
    convergence_table([series], atoms, spacing=0.5, folder=folder, progress=False)
    assert log.read_text().count("solve") == 9  # another grid is another result
    assert log.read_text().count("engine") == log.read_text().count("close")


def test_convergence_table_names_what_failed(series: Series, tmp_path: Path) -> None:
    (tmp_path / "poison-1").write_text("raise")
    with pytest.raises(GenerationError, match="width: 0.8, configuration 1: Arith.*no converg"):
        convergence_table([series], geometries(2, seed=0), progress=False)
    assert (tmp_path / "log").read_text().count("close") == 2


def test_grid_table() -> None:
    atoms = geometries(1, seed=0)[0]
    fine = gaussians(atoms, (32, 32, 32))
    table = grid_table(fine, np.asarray(atoms.cell), (1.0, 0.5, 0.25, 0.125))
    assert table["grid"].tolist() == [" x ".join(3 * [str(n)]) for n in (4, 8, 16, 32)]
    assert (np.diff(table["density_l2"]) < 0).all() and table["density_l2"].iloc[-1] < 1e-12
    coefficients = np.abs(np.fft.fftn(fine)) ** 2
    for limit, sign in ((4, 1), (3, -1)):  # of 8 points, half of the Nyquist terms survive
        keep = np.abs(np.fft.fftfreq(32, 1 / 32)) <= limit
        inside = coefficients[np.ix_(keep, keep, keep)].sum()
        bound = np.sqrt(max(0.0, 1 - inside / coefficients.sum()))
        assert sign * (table["density_l2"][1] - bound) >= 0
    hard = grid_table(gaussians(atoms, (32, 32, 32), 0.3), np.asarray(atoms.cell), (0.5, 0.125))
    assert hard["minimum"][0] < -0.01 and hard["minimum"][1] > -1e-9  # ripples, gone
