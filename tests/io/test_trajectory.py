"""The trajectory format: round trips, bad input, damage, splits, and killed writers."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time as clock
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.codecs import BytesCodec

from densitykit.errors import DensityKitError, TrajectoryError
from densitykit.io.describe import summarise
from densitykit.io.metadata import CHECKSUM, seal, set_attributes
from densitykit.io.reader import open_split, open_trajectory
from densitykit.io.rebuild import (
    extend_trajectory,
    free_cell,
    pack_trajectory,
    trim_trajectory,
    upgrade_trajectory,
)
from densitykit.io.schema import SCHEMA_VERSION, bit_round
from densitykit.io.splits import read_splits, write_splits
from densitykit.io.validate import validate_trajectory
from densitykit.io.writer import TrajectoryWriter, copy_frames, create_trajectory

Make = Callable[..., Path]
FIXES = "choose clip convert copy correct drop give make move open pass recompute resample "
FIXES += "restore rewrite sort use write"


def assert_helpful(message: str, *parts: str) -> None:
    """A message names the parts (file, variable, frame), and after the semicolon a fix."""
    for part in parts:
        assert part in message, message
    assert "; " in message, message
    assert message.rsplit("; ", 1)[1].split()[0] in FIXES.split(), message


# --- round trip ------------------------------------------------------------------------------


def test_round_trip(mock_trajectory: Make, mock_density: Callable) -> None:
    path = mock_trajectory(attrs={"seed": np.int64(3), "k_points": np.ones(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds = open_trajectory(path)
    assert ds["density"].dims == ("time", "x", "y", "z")
    assert ds["density"].dtype == np.float32
    assert not isinstance(ds["density"].variable._data, np.ndarray)  # still on disk
    expected = np.stack([mock_density(t) for t in ds["time"].values]).astype("f4")
    np.testing.assert_array_equal(ds["density"], expected)
    np.testing.assert_array_equal(ds["time"], 2.0 * np.arange(8))
    np.testing.assert_allclose(ds["n_electrons"], 4, rtol=1e-6)
    moved = ds["positions"][0] + ds["velocities"][0] * ds["time"]
    np.testing.assert_allclose(ds["positions"], moved.transpose("time", ...), atol=1e-12)
    np.testing.assert_array_equal(ds["cell"], 6 * np.eye(3))
    np.testing.assert_allclose(ds["x"], 0.75 * np.arange(8))
    assert ds["pbc"].dtype == bool and ds["pbc"].all()
    assert ds.attrs["seed"] == 3 and ds.attrs["k_points"] == [1, 1, 1]
    assert ds.attrs["schema_version"] == SCHEMA_VERSION and "created" in ds.attrs["history"]
    assert ds["density"].attrs["quantity"] == "valence"
    assert ds.encoding["source"] == str(path)
    assert validate_trajectory(path, progress=True) == []


def test_every_variable_is_labelled(mock_trajectory: Make) -> None:
    ds = xr.open_zarr(
        mock_trajectory(extra_scalars={"step": "1"}), consolidated=False, chunks=None
    )
    for name, variable in ds.variables.items():
        assert {"units", "long_name"} <= variable.attrs.keys(), name


def test_only_committed_frames_are_shown(mock_trajectory: Make) -> None:
    path = mock_trajectory(n_frames=8, n_committed=3)
    zarr.open_group(path)["density"][3] = 1.0  # half-written: its time is still NaN
    assert open_trajectory(path).sizes["time"] == 3
    assert validate_trajectory(path) == []
    empty = mock_trajectory("empty.zarr", n_committed=0)
    assert open_trajectory(empty).sizes["time"] == 0
    assert validate_trajectory(empty) == []


def test_resume(mock_trajectory: Make, mock_density: Callable) -> None:
    path = mock_trajectory(n_frames=6, n_committed=4, extra_scalars={"step": "1"})
    before = open_trajectory(path).load()
    for name in ("energy", "step", "positions"):  # what a killed writer may leave
        zarr.open_group(path)[name][4] = 99.0
    with TrajectoryWriter(path) as writer:
        assert (writer.n_committed, writer.n_frames) == (4, 6)
        assert writer.append(mock_density(8.0), 8.0) == 4
    after = open_trajectory(path)
    xr.testing.assert_identical(after.isel(time=slice(0, 4)).load(), before)
    for name in ("energy", "step", "positions"):
        assert np.isnan(after[name][4]).all()


def test_frames_copied(mock_trajectory: Make, tmp_path: Path) -> None:
    run = open_trajectory(mock_trajectory(n_frames=5))
    options = dict(n_frames=5, grid=run.density.shape[1:], cell=run.cell.values)
    writer = create_trajectory(tmp_path / "copy.zarr", numbers=run.numbers.values, **options)
    copy_frames(run.isel(time=slice(2)), writer)
    copy_frames(run, writer, progress=False)
    copy = open_trajectory(tmp_path / "copy.zarr")
    for name in writer.fields:
        np.testing.assert_array_equal(copy[name], run[name])


def test_dask(mock_trajectory: Make) -> None:
    pytest.importorskip("dask")
    density = open_trajectory(mock_trajectory(), chunks={})["density"]
    assert density.chunks[0] == (1,) * 8


@pytest.mark.parametrize("grid", [(16,), (8, 6)])
def test_fewer_dimensions(mock_trajectory: Make, mock_density: Callable, grid: tuple) -> None:
    path = mock_trajectory(grid=grid)
    ds = open_trajectory(path)
    dims = ("x", "y")[: len(grid)]
    assert ds["density"].dims == ("time", *dims)
    assert ds["density"].attrs["units"] == f"angstrom**-{len(grid)}"
    assert ds["cell"].shape == (len(grid), len(grid))
    assert ds["positions"].shape == (8, 4, len(grid))
    np.testing.assert_array_equal(ds["density"][3], mock_density(6.0, grid).astype("f4"))
    np.testing.assert_allclose(ds["n_electrons"], 4, rtol=1e-6)
    assert validate_trajectory(path) == []


def test_without_atoms_and_with_extra_scalars(tmp_path: Path) -> None:
    path = tmp_path / "bare.zarr"
    writer = create_trajectory(
        path, n_frames=2, grid=(4,), cell=2.0, pbc=False, extra_scalars={"conserved_energy": "eV"}
    )
    writer.append(np.ones(4), 0.0, conserved_energy=-3.0)
    ds = open_trajectory(path)
    assert not {"positions", "numbers", "atom"} & (set(ds.variables) | set(ds.dims))
    assert ds["conserved_energy"].values == [-3] and not ds["pbc"].any()


def test_skewed_cell_has_no_coordinates(tmp_path: Path) -> None:
    cell = np.array([[4.0, 0, 0], [2, 4, 0], [0, 0, 4]])
    create_trajectory(tmp_path / "a", n_frames=1, grid=(2, 2, 2), cell=cell).append(
        np.ones((2, 2, 2)), 0.0
    )
    ds = open_trajectory(tmp_path / "a")
    assert set(ds.coords) == {"time"}
    np.testing.assert_allclose(ds["n_electrons"], 64)
    with pytest.raises(TrajectoryError, match="already exists; pass overwrite=True"):
        create_trajectory(tmp_path / "a", n_frames=1, grid=(2,), cell=1.0)
    create_trajectory(tmp_path / "a", n_frames=1, grid=(2,), cell=1.0, overwrite=True)
    assert open_trajectory(tmp_path / "a").sizes == {
        "time": 0,
        "x": 2,
        "vector": 1,
        "cartesian": 1,
    }


@pytest.mark.parametrize("codec", ["lossless", "fast", "none"])
def test_codecs_keep_every_bit(tmp_path: Path, codec: str) -> None:
    values = np.random.default_rng(0).random((5, 4, 3), dtype="f4")
    writer = create_trajectory(
        tmp_path / "a", n_frames=1, grid=values.shape, cell=1.0, codec=codec, quantity="total"
    )
    writer.append(values, 0.0)
    np.testing.assert_array_equal(open_trajectory(tmp_path / "a")["density"][0], values)


def test_summary(mock_trajectory: Make) -> None:
    text = summarise(mock_trajectory())
    for part in (
        "8 frames",
        "8 x 8 x 8",
        "0 to 14 fs, every 2 fs",
        "6.0000",
        "4 atoms",
        "4.00000",
    ):
        assert part in text


# --- what moves, what is constant, what is optional -------------------------------------------

SKEW = np.array([[4.0, 0, 0], [-2, 2 * np.sqrt(3), 0], [0, 0, 5]])


def breathing(path: Path) -> Path:
    """One electron in a cell that grows: 20 angstrom**3 and 1 more a frame."""
    writer = create_trajectory(path, n_frames=4, grid=(2, 3, 4), cell=None, numbers=[11, 17])
    for frame in range(3):
        cell = np.diag([2.0, 2.0, 5 + frame / 4])
        density = np.full((2, 3, 4), 1 / (20 + frame))
        writer.append(density, float(frame), positions=np.full((2, 3), frame), cell=cell)
    return path


def test_a_cell_for_each_frame(tmp_path: Path) -> None:
    path = breathing(tmp_path / "npt.zarr")
    ds = open_trajectory(path)
    assert ds["cell"].dims == ("time", "vector", "cartesian") and set(ds.coords) == {"time"}
    np.testing.assert_allclose(ds["cell"][:, 2, 2], [5, 5.25, 5.5])
    np.testing.assert_allclose(ds["n_electrons"], 1, rtol=1e-6)
    assert validate_trajectory(path) == []
    assert "one for each frame, volume 20 to 22" in summarise(path)
    copy = create_trajectory(tmp_path / "copy", n_frames=3, grid=(2, 3, 4), cell=None)
    copy_frames(ds, copy, progress=False)
    pack_trajectory(copy.path)
    xr.testing.assert_equal(open_trajectory(copy.path)["cell"].load(), ds["cell"].load())


def test_a_cell_that_begins_to_move(mock_trajectory: Make, mock_density: Callable) -> None:
    path = mock_trajectory(n_committed=2)
    writer = free_cell(path)
    with pytest.raises(TrajectoryError, match="cell: .*nan.* spans no cell"):
        writer.append(mock_density(4.0), 4.0)
    writer.append(mock_density(4.0), 4.0, cell=6.3)
    edges = open_trajectory(path)["cell"].values[:, [0, 1, 2], [0, 1, 2]]
    np.testing.assert_allclose(edges, [[6] * 3, [6] * 3, [6.3] * 3])
    with pytest.raises(TrajectoryError, match="cell: the store has no such variable"):
        TrajectoryWriter(mock_trajectory("b.zarr", n_committed=0)).append(
            mock_density(0.0), 0.0, cell=6.0
        )


def test_spins_and_valence_charges(tmp_path: Path) -> None:
    options = {"numbers": [26, 8], "valence_charges": [8, 6], "magnetization": True}
    writer = create_trajectory(tmp_path / "a", n_frames=2, grid=(2, 2, 2), cell=1.0, **options)
    writer.append(np.ones((2, 2, 2)), 0.0, magnetization=-np.ones((2, 2, 2)))
    ds = open_trajectory(writer.path)
    assert ds["valence_charge"].values.tolist() == [8, 6]
    assert ds["magnetization"].dtype == np.float32 and (ds["magnetization"] == -1).all()
    assert "Fe" in summarise(writer.path) and "valence charges 14" in summarise(writer.path)
    assert validate_trajectory(writer.path) == []
    with pytest.raises(TrajectoryError, match="valence_charge: 1 values for 2 atoms"):
        create_trajectory(
            tmp_path / "b", n_frames=1, grid=(2,), cell=1.0, numbers=[1, 1], valence_charges=[1]
        )
    with pytest.raises(TrajectoryError, match="numbers: .* not atomic numbers"):
        create_trajectory(tmp_path / "b", n_frames=1, grid=(2,), cell=1.0, numbers=[119])


def test_trimming_leaves_the_frames(mock_trajectory: Make) -> None:
    path = mock_trajectory(n_committed=3)
    before = open_trajectory(path).load()
    assert trim_trajectory(path) == trim_trajectory(path) == 3
    plain = xr.open_zarr(path, consolidated=False, chunks=None, decode_times=False)
    np.testing.assert_array_equal(plain["time"], before["time"])
    np.testing.assert_array_equal(plain["density"], before["density"])
    assert validate_trajectory(path) == []


def test_everything_survives_netcdf(tmp_path: Path, mock_trajectory: Make) -> None:
    attrs = {"nested": {"a": [1]}, "yes": True, "unknown": None, "names": ["a", "b"], "n": [1, 2]}
    path = mock_trajectory(allow_negative=True, attrs=attrs)
    write_splits(path, {"train": {"run": ".", "start": 0, "stop": 4}})
    for ds in (
        open_trajectory(path),
        open_split(path, "train"),
        xr.open_zarr(path, consolidated=False, chunks=None, decode_times=False),
    ):
        ds.to_netcdf(tmp_path / "a.nc", engine="scipy")
        back = xr.open_dataset(tmp_path / "a.nc", engine="scipy", decode_times=False)
        assert json.loads(back.attrs["splits"])["train"]["stop"] == 4
        assert json.loads(back.attrs["nested"]) == {"a": [1]} and back.attrs["yes"] == 1
        np.testing.assert_array_equal(back["density"], ds["density"])
        back.close()


def test_splits_of_older_stores(mock_trajectory: Make) -> None:
    path, splits = mock_trajectory(), {"train": {"run": ".", "start": 0, "stop": 4}}
    set_attributes(path, splits=splits)
    assert read_splits(path) == splits and open_split(path, "train").sizes["time"] == 4
    set_attributes(path, splits="{")
    assert_helpful(validate_trajectory(path)[0], "splits")


def test_description_of_a_salt(tmp_path: Path) -> None:
    """Velocities of one component at 300 K on average give that temperature."""
    numbers, rng = [11] * 400 + [17] * 400, np.random.default_rng(0)
    masses = np.array([22.98976928] * 400 + [35.45] * 400)
    path = tmp_path / "salt.zarr"
    writer = create_trajectory(path, n_frames=2, grid=(2, 2, 2), cell=SKEW, numbers=numbers)
    for time in (0.0, 2.5):
        v = rng.normal(size=(800, 3)) * np.sqrt(8.31446e-7 * 300 / masses)[:, None]
        writer.append(np.ones((2, 2, 2)), time, velocities=v)
    write_splits(path, {"train": {"run": ".", "start": 0, "stop": 2}})
    text = summarise(path)
    for part in ("Na400Cl400", "90.00, 90.00, 120.00", "every 2.5 fs", "train .[0:2]"):
        assert part in text
    assert "known: velocities\n" in text
    assert float(text.split("temperature ")[1].split()[0]) == pytest.approx(300, rel=0.05)


# --- bit rounding ----------------------------------------------------------------------------


@pytest.mark.parametrize("keepbits", [0, 1, 7, 12, 22, 23])
def test_bit_round_error_bound(keepbits: int) -> None:
    values = np.exp(np.random.default_rng(0).normal(0, 5, 10000)).astype("f4")
    rounded = bit_round(values, keepbits)
    error = np.abs(rounded.astype("f8") / values - 1).max()
    assert error <= 2.0 ** -(keepbits + 1)
    assert keepbits == 23 or error > 2.0 ** -(keepbits + 3)  # no better than it should be
    assert not (rounded.view("u4") & ((1 << (23 - keepbits)) - 1)).any()
    np.testing.assert_array_equal(bit_round(rounded, keepbits), rounded)


def test_bit_round_details() -> None:
    ties = np.array([1.25, 1.75, -1.25, 3.5, 0.0], dtype="f4")  # one bit: 1, 1.5, 2, 3, 4
    np.testing.assert_array_equal(bit_round(ties, 1), [1.0, 2.0, -1.0, 4.0, 0.0])
    np.testing.assert_array_equal(
        bit_round([np.inf, -np.inf, np.nan], 0), [np.inf, -np.inf, np.nan]
    )
    with pytest.raises(ValueError, match="keepbits"):
        bit_round(ties, 24)


def test_writer_rounds(mock_trajectory: Make, mock_density: Callable) -> None:
    path = mock_trajectory(keepbits=9)
    ds = open_trajectory(path)
    assert ds["density"].attrs["keepbits"] == 9
    np.testing.assert_array_equal(ds["density"][1], bit_round(mock_density(2.0), 9))
    assert validate_trajectory(path, tolerance_electrons=1e-6) != []  # rounding moves the count,
    assert validate_trajectory(path) == []  # by far less than the tolerance


def test_writer_rounds_to_a_resolution(mock_trajectory: Make, mock_density: Callable) -> None:
    step = 2.0**-10
    ds = open_trajectory(mock_trajectory(resolution=step))
    assert ds["density"].attrs["resolution"] == step
    stored, exact = ds["density"][1].values, mock_density(2.0)
    np.testing.assert_array_equal(stored % step, 0)
    assert 0.4 * step < abs(stored - exact).max() <= 0.5 * step * (1 + 1e-6)


# --- bad input -------------------------------------------------------------------------------

BAD_FRAMES = {
    "shape": ({"density": np.ones((8, 8, 7))}, "density"),
    "nan": ({"density": np.full((8, 8, 8), np.nan)}, "density"),
    "overflow": ({"density": np.full((8, 8, 8), 1e300)}, "density"),
    "negative": ({"density": -np.ones((8, 8, 8))}, "density"),
    "time-repeated": ({"time": 4.0}, "time"),
    "time-nan": ({"time": np.nan}, "time"),
    "atoms": ({"positions": np.zeros((3, 3))}, "positions"),
    "velocities-nan": ({"velocities": np.full((4, 3), np.nan)}, "velocities"),
    "forces-inf": ({"forces": np.full((4, 3), np.inf)}, "forces"),
    "energy": ({"energy": np.inf}, "energy"),
    "unknown-scalar": ({"pressure": 1.0}, "pressure"),
    "own-electrons": ({"n_electrons": 4.0}, "n_electrons"),
}


def _files(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_bad_frame_writes_nothing(mock_trajectory: Make, case: str) -> None:
    changes, variable = BAD_FRAMES[case]
    path = mock_trajectory(n_committed=3)
    writer, before = TrajectoryWriter(path), _files(path)
    with pytest.raises(TrajectoryError) as caught:
        writer.append(**{"density": np.ones((8, 8, 8)), "time": 6.0} | changes)
    assert_helpful(str(caught.value), str(path), f": {variable}:")
    assert _files(path) == before
    assert writer.append(np.ones((8, 8, 8)), 6.0) == 3


def test_full_store_and_missing_atoms(mock_trajectory: Make) -> None:
    path = mock_trajectory(n_atoms=0, n_committed=7)
    writer = TrajectoryWriter(path)
    with pytest.raises(
        TrajectoryError, match="positions: the store has no such variable per frame; drop"
    ):
        writer.append(np.ones((8, 8, 8)), 14.0, positions=np.zeros((4, 3)))
    writer.append(np.ones((8, 8, 8)), 14.0)
    with pytest.raises(TrajectoryError, match="the store is full, n_frames=8; make room with"):
        writer.append(np.ones((8, 8, 8)), 16.0)


def test_negative_density_must_be_declared(mock_trajectory: Make) -> None:
    path = mock_trajectory(n_committed=0, allow_negative=True)
    TrajectoryWriter(path).append(np.linspace(-1, 2, 512).reshape(8, 8, 8), 0.0)
    assert validate_trajectory(path) == []


@pytest.mark.parametrize(
    ("changes", "variable"),
    [
        ({"n_frames": 0}, "density"),
        ({"grid": (8, 0)}, "density"),
        ({"grid": (2, 2, 2, 2)}, "density"),
        ({"codec": "jpeg"}, "density"),
        ({"quantity": "spin"}, "density"),
        ({"cell": np.ones((2, 2))}, "cell"),
        ({"cell": np.eye(3)}, "cell"),
        ({"cell": [1.0, np.nan]}, "cell"),
    ],
)
def test_bad_creation_leaves_nothing(tmp_path: Path, changes: dict, variable: str) -> None:
    path = tmp_path / "a.zarr"
    with pytest.raises(TrajectoryError) as caught:
        create_trajectory(path, **{"n_frames": 1, "grid": (8, 8), "cell": 1.0} | changes)
    assert_helpful(str(caught.value), str(path), f": {variable}:")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_spares_what_is_not_a_trajectory(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("precious")
    with pytest.raises(TrajectoryError, match="choose another path"):
        create_trajectory(tmp_path / "thesis", n_frames=1, grid=(2,), cell=1.0, overwrite=True)
    assert (tmp_path / "thesis" / "chapter-1.tex").read_text() == "precious"


# --- damage ----------------------------------------------------------------------------------


def _edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _edit_values(path: Path, name: str, index: object, change: Callable) -> None:
    array = zarr.open_array(path / name, mode="r+")
    array[index] = change(array[index])


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _transfer(pairs: np.ndarray) -> np.ndarray:
    """Make the first of two voxels negative at the cost of the second."""
    return np.stack([0 * pairs[:, 0] - 1e-4, pairs.sum(axis=1) + 1e-4], axis=1)


def _retype(path: Path, name: str, dtype: str, serializer: object = "auto") -> None:
    old = zarr.open_array(path / name)
    values, dims, attrs = old[:], old.metadata.dimension_names, dict(old.attrs)
    options = {"dimension_names": dims, "attributes": attrs, "overwrite": True}
    options["serializer"] = serializer
    options["chunk_key_encoding"] = {"name": "default", "separator": "."}
    zarr.open_group(path).create_array(name, data=values.astype(dtype), **options)


def _scale_frame(path: Path) -> None:
    _edit_values(path, "density", 4, lambda rho: rho * 1.01)
    _edit_values(path, "n_electrons", 4, lambda n: n * 1.01)


def _second_zarr(path: Path) -> None:
    shutil.rmtree(path / "energy")
    zarr.create_array(path / "energy", shape=(8,), dtype="f8", zarr_format=2)


def _resize(folder: Path, axis: int, size: int) -> None:
    """Claim another size, with a right checksum; nothing is there."""
    metadata = json.loads((folder / "zarr.json").read_text())
    metadata["shape"][axis] = size
    _edit_json(folder / "zarr.json", shape=metadata["shape"])
    seal(folder.parent)


# what makes a store unfit to be opened: damage, and what every message has to contain
UNFIT = {
    "not-a-store": (lambda p: (p / "zarr.json").unlink(), ["store", "zarr.json"]),
    "no-density": (lambda p: shutil.rmtree(p / "density"), ["density", "missing"]),
    "no-time": (lambda p: shutil.rmtree(p / "time"), ["time", "missing"]),
    "no-cell": (lambda p: shutil.rmtree(p / "cell"), ["cell", "missing"]),
    "density-units": (
        lambda p: zarr.open_array(p / "density").attrs.update(units="bohr**-3"),
        ["density", "bohr**-3", "angstrom**-3"],
    ),
    "time-units": (
        lambda p: zarr.open_array(p / "time").attrs.update(units="ps"),
        ["time", "'ps'", "convert the values to fs"],
    ),
    "forces-units": (
        lambda p: zarr.open_array(p / "forces").attrs.update(units="Ry/bohr"),
        ["forces", "Ry/bohr"],
    ),
    "dimensions": (
        lambda p: _edit_json(p / "density" / "zarr.json", dimension_names=["t", "x", "y", "z"]),
        ["density", "('t', 'x', 'y', 'z')"],
    ),
    "no-dimensions": (
        lambda p: _edit_json(p / "energy" / "zarr.json", dimension_names=None),
        ["energy", "None"],
    ),
    "length": (lambda p: zarr.open_array(p / "energy").resize((5,)), ["energy", "length 5", "8"]),
    "gap": (lambda p: _edit_values(p, "time", 3, lambda t: np.nan), ["time", "frame 3"]),
    "array-metadata": (lambda p: _truncate(p / "forces" / "zarr.json"), ["forces", "unreadable"]),
    "no-marks": (lambda p: (p / "time" / "c.0").unlink(), ["time", "first chunk is missing"]),
    "no-elements": (lambda p: (p / "numbers" / "c.0").unlink(), ["numbers", "missing"]),
    "lost-cell": (lambda p: (p / "cell" / "c.0.0").unlink(), ["cell", "missing"]),
    "no-energy": (lambda p: (p / "energy" / "c.0").unlink(), ["energy", "chunk is missing"]),
    "lost-positions": (lambda p: (p / "positions" / "c.0.0.0").unlink(), ["positions", "missing"]),
    "edited-group": (
        lambda p: zarr.open_group(p).attrs.update(title="mine"),
        ["zarr.json: changed since it was written", "densitykit upgrade"],
    ),
    "edited-array": (
        lambda p: zarr.open_array(p / "density").attrs.update(keepbits=3),
        ["density/zarr.json: changed since"],
    ),
    "time-chunk": (lambda p: _truncate(p / "time" / "c.0"), ["time", "decoded"]),
    "zarr-v2": (_second_zarr, ["energy", "zarr v3"]),
    "2**31-points": (lambda p: _resize(p / "density", 1, 2**31), ["density", "too many at once"]),
    "10**400-points": (lambda p: _resize(p / "density", 1, 10**400), ["density", "too many at"]),
}
# what opens, but is wrong
WRONG = {
    "version": (
        lambda p: _edit_json(p / "zarr.json", attributes={}),
        ["attributes", SCHEMA_VERSION],
    ),
    "not-finite": (
        lambda p: _edit_values(p, "density", (3, 0, 0, 0), lambda v: np.inf),
        ["density", "frame 3", "not finite"],
    ),
    "negative": (
        lambda p: _edit_values(p, "density", (slice(2, 4), 0, 0, slice(2)), _transfer),
        ["density", "frames 2-3", "2 negative values, down to -0.0001"],
    ),
    "count-stored": (
        lambda p: _edit_values(p, "n_electrons", 5, lambda n: n * 1.01),
        ["density", "frame 5", "stored n_electrons"],
    ),
    "count-not-stored": (
        lambda p: _edit_values(p, "n_electrons", 5, lambda n: np.nan),
        ["density", "frame 5", "stored n_electrons"],
    ),
    "count": (_scale_frame, ["density", "frame 4", "differs from 4 (worst: 4.04)"]),
    "repeated": (
        lambda p: zarr.open_array(p / "density").set_basic_selection(
            5, zarr.open_array(p / "density")[4]
        ),
        ["density", "frame 5", "equal to the frame before"],
    ),
    "time-order": (
        lambda p: _edit_values(p, "time", 6, lambda t: 10.0),
        ["time", "frame 6", "not later"],
    ),
    "missing-chunk": (
        lambda p: (p / "density" / "c.6.0.0.0").unlink(),
        ["density", "frame 6", "missing"],
    ),
    "truncated-chunk": (
        lambda p: _truncate(p / "density" / "c.2.0.0.0"),
        ["density", "frame 2", "decoded"],
    ),
    "truncated-positions": (
        lambda p: _truncate(p / "positions" / "c.0.0.0"),
        ["positions", "decoded"],
    ),
    "float-numbers": (lambda p: _retype(p, "numbers", "<f8"), ["numbers", "float64"]),
    "big-endian": (
        lambda p: _retype(p, "positions", "<f8", BytesCodec(endian="big")),
        ["positions", "big-endian"],
    ),
    "strange-elements": (
        lambda p: _edit_values(p, "numbers", 1, lambda v: 0 * v + 119),
        ["numbers", "119"],
    ),
    "flat-cell": (lambda p: _edit_values(p, "cell", 2, lambda v: 0 * v), ["cell", "volume"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_store_does_not_open(mock_trajectory: Make, case: str) -> None:
    damage, parts = UNFIT[case]
    path = mock_trajectory()
    damage(path)
    with pytest.raises(TrajectoryError) as caught:
        open_trajectory(path)
    assert_helpful(str(caught.value), str(path), *parts)
    with pytest.raises(DensityKitError):
        TrajectoryWriter(path)


@pytest.mark.parametrize("case", UNFIT | WRONG)
def test_validation_finds(mock_trajectory: Make, case: str) -> None:
    damage, parts = (UNFIT | WRONG)[case]
    path = mock_trajectory()
    damage(path)
    if case in WRONG:
        seal(path)  # as if it had been written so
    problems = validate_trajectory(path)
    assert len(problems) == 1
    assert_helpful(problems[0], *parts)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("chunks", [None, {}])
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_chunk_is_named_when_it_is_read(
    mock_trajectory: Make, packed: bool, chunks: Any
) -> None:
    """Long after the store was opened: which file, variable, frame; all the others are read."""
    path = mock_trajectory()
    if packed:
        pack_trajectory(path, frames_per_shard=1)
    run, sound = open_trajectory(path, chunks=chunks), open_trajectory(path).load()
    _flip(path / "density" / "c.3.0.0.0")
    _truncate(path / "density" / "c.5.0.0.0")
    _flip(path / "positions" / "c.0.0.0")
    for frames, frame in ((3, 3), (slice(2, 5), 3), ([7, 5], 5), (slice(4), 3)):
        named = rf"density/c\.{frame}\.0\.0\.0: density, frame {frame}: .*decoded; restore"
        with pytest.raises(TrajectoryError, match=named):
            run.density[frames].values  # noqa: B018
    with pytest.raises(TrajectoryError, match=r"c\.0\.0\.0: positions, frame 1: .*decoded"):
        run.positions[1, 0].values  # noqa: B018
    whole = [0, 2, 4, 7]
    np.testing.assert_array_equal(run.density[whole, 1:3, 2], sound.density[whole, 1:3, 2])
    (path / "density" / "c.4.0.0.0").unlink()
    with pytest.raises(TrajectoryError, match="density, frame 4: the chunk is missing"):
        run.density[whole].values  # noqa: B018
    with pytest.raises(TrajectoryError, match="frame 3: .*restore the file"):
        pack_trajectory(path)


def test_a_writer_names_what_it_cannot_go_on_from(tmp_path: Path) -> None:
    with create_trajectory(tmp_path / "a", n_frames=3, grid=(2, 2), cell=1.0) as writer:
        writer.append(np.ones((2, 2)), 0.0, energy=1.0)
    _flip(tmp_path / "a" / "energy" / "c.0")
    with pytest.raises(TrajectoryError, match=r"energy/c\.0: energy, frame 0: .*decoded"):
        TrajectoryWriter(tmp_path / "a")


def test_a_length_is_no_reason_to_wait(mock_trajectory: Make) -> None:
    """What is not there is not read: a store made for 10**11 frames has 8, and can have 9."""
    path = mock_trajectory()
    for folder in path.glob("*/"):
        if zarr.open_array(folder, mode="r").metadata.dimension_names[0] == "time":
            _resize(folder, 0, 10**11)
    assert validate_trajectory(path) == []
    assert "8 frames" in summarise(path)
    with TrajectoryWriter(path) as writer:
        frame = open_trajectory(path).isel(time=7)
        writer.append(frame["density"].values * 1.001, 16.0)
    assert open_trajectory(path).sizes["time"] == 9


@pytest.mark.parametrize("grid, part", [((512, 1, 1), "512 x 1 x 1"), ((0, 4, 4), "empty")])
def test_odd_grids_are_named(tmp_path: Path, grid: tuple[int, ...], part: str) -> None:
    path, sound = tmp_path / "a", tuple(max(1, n) for n in grid)
    create_trajectory(path, n_frames=1, grid=sound, cell=1.0).append(np.ones(sound), 0.0)
    if sound != grid:
        _edit_json(path / "density" / "zarr.json", shape=[1, *grid])
        seal(path)
    (problem,) = validate_trajectory(path)
    assert_helpful(problem, "density", part)


def test_validation_finds_everything_at_once(mock_trajectory: Make) -> None:
    path = mock_trajectory()
    for case in ("version", "negative", "missing-chunk", "time-order", "truncated-positions"):
        WRONG[case][0](path)
    seal(path)
    assert len(validate_trajectory(path)) == 5


def test_missing_paths_and_truncated_root(mock_trajectory: Make, tmp_path: Path) -> None:
    for use in (open_trajectory, TrajectoryWriter, summarise):
        with pytest.raises(TrajectoryError, match="nowhere: store: .*; correct the path"):
            use(tmp_path / "nowhere")
    assert "does not exist" in validate_trajectory(tmp_path / "nowhere")[0]
    path = mock_trajectory()
    with pytest.raises(TrajectoryError, match="density: store: this is one variable; give its g"):
        open_trajectory(path / "density")
    _truncate(path / "zarr.json")
    (problem,) = validate_trajectory(path)
    assert_helpful(problem, "zarr.json")
    with pytest.raises(TrajectoryError):
        open_trajectory(path)


def _format_1(path: Path) -> Path:
    """Make a store as it was written before checksums."""
    for folder in path.glob("*/"):
        array = zarr.open_array(folder)
        values, metadata = array[:], json.loads((folder / "zarr.json").read_text())
        metadata["codecs"] = [c for c in metadata["codecs"] if c["name"] != "crc32c"]
        metadata["attributes"].pop("always_written", None)
        metadata["attributes"].pop(CHECKSUM)
        (folder / "zarr.json").write_text(json.dumps(metadata))
        zarr.open_array(folder, mode="r+")[:] = values
    attrs = json.loads((path / "zarr.json").read_text())["attributes"]
    del attrs[CHECKSUM]
    _edit_json(path / "zarr.json", attributes=attrs | {"schema_version": "1.0"})
    return path


def test_format_1_is_read_continued_and_packed(
    mock_trajectory: Make, mock_density: Callable
) -> None:
    """Lost marks are noticed there too, as soon as there is a second density."""
    path = _format_1(mock_trajectory(n_committed=7))
    assert validate_trajectory(path) == []
    TrajectoryWriter(path).append(mock_density(14.0), 14.0)
    extend_trajectory(path, 9)
    assert open_trajectory(path).sizes["time"] == 8 and validate_trajectory(path) == []
    packed = Path(shutil.copytree(path, path.with_name("packed.zarr")))
    pack_trajectory(packed)
    assert "crc32c" in (packed / "density" / "zarr.json").read_text()
    np.testing.assert_array_equal(
        open_trajectory(packed)["density"], open_trajectory(path)["density"]
    )
    (path / "time" / "c.0").unlink()
    for use in (open_trajectory, TrajectoryWriter):
        with pytest.raises(TrajectoryError, match="time: no frames are committed, but"):
            use(path)
    assert_helpful(validate_trajectory(path)[0], "time", "no frames are committed")


def test_format_1_is_upgraded(mock_trajectory: Make) -> None:
    """In place, all bits unchanged, frames that are not there yet still to come."""
    path = _format_1(mock_trajectory(n_frames=9, n_committed=7))
    before = open_trajectory(path).load()
    assert upgrade_trajectory(path) == ["."] and upgrade_trajectory(path) == []
    after = open_trajectory(path).load()
    for name in before.variables:
        assert before[name].values.tobytes() == after[name].values.tobytes(), name
    assert after.attrs["schema_version"] == SCHEMA_VERSION
    assert "format 2.1, was 1.0" in after.attrs["history"].splitlines()[-1]
    assert zarr.open_array(path / "density").chunks == (1, 8, 8, 8)
    assert validate_trajectory(path) == [] and TrajectoryWriter(path).n_frames == 9


def test_writer_refuses_a_store_without_commit_marks(mock_trajectory: Make) -> None:
    path = mock_trajectory()
    _edit_json(path / "time" / "zarr.json", fill_value=0.0)
    with pytest.raises(TrajectoryError) as caught:
        TrajectoryWriter(path)
    assert_helpful(str(caught.value), str(path), "time")


# --- several runs, and splits ----------------------------------------------------------------


@pytest.fixture
def two_runs(mock_trajectory: Make) -> Path:
    mock_trajectory("li.zarr/run-1", n_atoms=0, grid=(8,))
    return mock_trajectory("li.zarr/run-2", n_atoms=0, grid=(8,), n_committed=6).parent


def test_splits(two_runs: Path) -> None:
    splits = {
        "train": {"run": "run-1", "start": 0, "stop": 5},
        "valid": {"run": "run-1", "start": 5, "stop": 8},
        "test": {"run": "run-2", "start": 1, "stop": 6},
    }
    write_splits(two_runs, splits)
    ds = open_split(two_runs, "test")
    assert ds.attrs["split"] == "test"
    assert ds.encoding["source"] == str(two_runs / "run-2")
    np.testing.assert_array_equal(ds["time"], 2.0 * np.arange(1, 6))
    assert open_split(two_runs, "train").sizes["time"] == 5
    assert validate_trajectory(two_runs) == []
    with pytest.raises(TrajectoryError) as caught:
        open_split(two_runs, "tset")
    assert_helpful(str(caught.value), str(two_runs), "'test', 'train', 'valid'")


@pytest.mark.parametrize(
    "bad",
    [
        {"run": "run-3", "start": 0, "stop": 2},
        {"run": "run-2", "start": 0, "stop": 7},
        {"run": "run-2", "start": 3, "stop": 3},
        {"run": "run-2", "start": -1, "stop": 3},
        {"run": "run-2"},
        {"run": "run-1", "start": 4, "stop": 6},
    ],
)
def test_bad_splits_are_refused(two_runs: Path, bad: dict) -> None:
    good = {"run": "run-1", "start": 0, "stop": 5}
    with pytest.raises(TrajectoryError) as caught:
        write_splits(two_runs, {"train": good, "test": bad})
    assert_helpful(str(caught.value), str(two_runs), "splits, test")
    assert "splits" not in zarr.open_group(two_runs, mode="r").attrs


def test_split_of_a_single_run(mock_trajectory: Make) -> None:
    path = mock_trajectory()
    write_splits(path, {"train": {"run": ".", "start": 2, "stop": 4}})
    np.testing.assert_array_equal(open_split(path, "train")["time"], [4.0, 6.0])


def test_root_group(two_runs: Path) -> None:
    with pytest.raises(TrajectoryError) as caught:
        open_trajectory(two_runs)
    assert_helpful(str(caught.value), str(two_runs), "['run-1', 'run-2']")
    _truncate(two_runs / "run-2" / "zarr.json")
    (problem,) = validate_trajectory(two_runs)
    assert_helpful(problem, "run-2: store")
    shutil.rmtree(two_runs / "run-1" / "density")
    assert len(validate_trajectory(two_runs)) == 2


# --- killed writers --------------------------------------------------------------------------

KILL_GRID = (6, 6, 6)


def _shown(folder: Path) -> list[str]:
    """What is in a folder, but for a lock file, which a kill leaves."""
    return sorted(name for name in os.listdir(folder) if not name.endswith("densitykit-lock"))


def _frame(index: int, positions: bool = True) -> dict[str, object]:
    """Return a frame that tells its index, is exact in float32, and keeps the electron number."""
    density = np.roll(np.arange(1.0, 217.0), index).reshape(KILL_GRID)
    frame = {"density": density, "time": 0.5 * index, "energy": -index}
    return frame | ({"positions": np.full((2, 3), float(index))} if positions else {})


def _create(
    path: Path, n_frames: int, numbers: tuple[int, ...] | None = (1, 1)
) -> TrajectoryWriter:
    return create_trajectory(path, n_frames=n_frames, grid=KILL_GRID, cell=6.0, numbers=numbers)


def _assert_intact(path: Path) -> int:
    """Check every committed frame against its formula; return how many there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds = open_trajectory(path).load()
    frames = [_frame(index, "positions" in ds) for index in range(ds.sizes["time"])]
    for name in frames[0] if frames else ():
        expected = np.stack([frame[name] for frame in frames])
        np.testing.assert_array_equal(ds[name], expected, err_msg=name)
    np.testing.assert_allclose(ds["n_electrons"], 216 * 217 / 2)
    assert validate_trajectory(path) == []
    return ds.sizes["time"]


class Killed(BaseException):
    """Ends a write in the middle, like SIGKILL but within the process."""


# A context variable reaches the threads in which zarr writes: those of a killed life stay dead,
# even if they get to run only after the next one has begun.
LIFE: ContextVar[dict[str, int]] = ContextVar("LIFE")


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], object]:
    """Begin a new life, in which the n-th change of the file system and all later ones fail."""

    def guard(function: Callable) -> Callable:
        def guarded(*args: object, **kwargs: object) -> object:
            if LIFE.get()["left"] == 0:
                raise Killed
            LIFE.get()["left"] -= 1
            return function(*args, **kwargs)

        return guarded

    LIFE.set({"left": 10**9})
    # zarr replaces files with Path.replace; when that is killed, its temporary file remains
    monkeypatch.setattr(Path, "replace", guard(Path.replace))
    monkeypatch.setattr(Path, "rename", guard(Path.rename))
    monkeypatch.setattr(os, "link", guard(os.link))
    monkeypatch.setattr(os, "unlink", guard(os.unlink))
    return lambda n: LIFE.set({"left": n})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killed_append(tmp_path: Path, kill_at: Callable) -> None:
    """Kill an append before each of its writes: nothing is lost, and the next one goes on."""
    path = tmp_path / "a.zarr" / "run-1"
    _create(path, 20).append(**_frame(0))
    for point in range(20):
        writer = TrajectoryWriter(path, durable=False)  # its syncs are killed in tests/faults
        committed = writer.n_committed
        kill_at(point)
        try:
            writer.append(**_frame(committed))
        except Killed:
            kill_at(10**9)
            assert _assert_intact(path) == committed
            TrajectoryWriter(path).append(**_frame(committed))
            assert not list(path.rglob("*.partial"))
        else:
            break
    assert point >= 5  # density, positions, energy, n_electrons, time: all were tried
    kill_at(10**9)
    assert _assert_intact(path) == point + 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killed_creation(tmp_path: Path, kill_at: Callable) -> None:
    path = tmp_path / "a.zarr" / "run-1"
    for point in range(100):
        kill_at(point)
        try:
            _create(path, 4)
        except Killed:
            kill_at(10**9)
            assert not path.exists() or _assert_intact(path) == 0
            shutil.rmtree(tmp_path / "a.zarr", ignore_errors=True)
        else:
            break
    assert point > 12
    assert _shown(path.parent) == ["run-1", "zarr.json"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killed_extension(tmp_path: Path, kill_at: Callable) -> None:
    """Kill an extension before each change: the store has its old or its new length."""
    path = tmp_path / "a.zarr" / "run-1"
    _create(path, 2, numbers=None).append(**_frame(0, positions=False))
    length = 2
    for point in range(200):
        kill_at(point)
        try:
            extend_trajectory(path, length + 1)
        except Killed:
            kill_at(10**9)
            assert _assert_intact(path) == 1
            length = TrajectoryWriter(path).n_frames
            assert _shown(path.parent) == ["run-1", "zarr.json"]
        else:
            break
    kill_at(10**9)
    assert point > 20 and length > 2  # killed late enough to have the new length, too
    assert TrajectoryWriter(path).append(**_frame(1, positions=False)) == 1
    assert _assert_intact(path) == 2


def test_extension_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_trajectory: Make, mock_density: Callable
) -> None:
    def only_within_a_folder(source: object, target: object) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError("no links here")
        link(source, target)  # zarr needs these

    link = os.link
    monkeypatch.setattr(os, "link", only_within_a_folder)
    path = mock_trajectory()
    before = open_trajectory(path).load()
    writer = extend_trajectory(path, 12)
    assert (writer.n_frames, writer.n_committed) == (12, 8)
    writer.append(mock_density(16.0), 16.0)
    xr.testing.assert_equal(open_trajectory(path).isel(time=slice(0, 8)).load(), before)
    assert "extended to 12 frames" in open_trajectory(path).attrs["history"]
    with pytest.raises(TrajectoryError, match="no longer than 12; use more"):
        extend_trajectory(path, 12)


def _keep_appending(path: Path, written: ctypes.c_int, extend: bool) -> None:
    """Continue a trajectory for ever. Runs in a process that is going to be killed."""
    writer = TrajectoryWriter(path)
    while True:
        if writer.n_committed == writer.n_frames or extend:
            writer = extend_trajectory(path, writer.n_frames + 1)
        writer.append(**_frame(writer.n_committed))
        written.value += 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize(("extend", "kills"), [(False, 10), (True, 5)])
def test_sigkill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extend: bool, kills: int
) -> None:
    """Kill a busy writer at random moments, again and again: no committed frame is ever lost."""
    path = tmp_path / "a.zarr" / "run-1"
    _create(path, 4 if extend else 400)
    # the server imports once, before any thread exists; each writer is then a cheap fork
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["densitykit.io.writer", __name__])
    rng, committed = np.random.default_rng(0), 0
    for _ in range(kills):
        written = context.Value("i", 0, lock=False)  # a lock would die with its holder
        process = context.Process(target=_keep_appending, args=(path, written, extend))
        process.start()
        while written.value < 1 and process.is_alive():
            clock.sleep(0.001)
        clock.sleep(rng.uniform(0, 0.03))  # an append or two
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it did not fail by itself before
        now = _assert_intact(path)
        assert now >= committed + written.value
        committed = now
    assert TrajectoryWriter(path).n_committed == committed
    assert not list(path.parent.rglob("*.partial"))
