"""Chunks that we encode and decode ourselves are those of zarr."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from densitykit.errors import TrajectoryError
from densitykit.io.durable import _read_chunk, chunk_file, chunk_writer, read

CODECS = {
    "small": [ZstdCodec(), Crc32cCodec()],
    "lossless": [BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"), Crc32cCodec()],
    "fast": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec()],
    "packed": [BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle"), Crc32cCodec()],
    "none": [Crc32cCodec()],
    "before checksums": [ZstdCodec(level=5)],
    "strange": [GzipCodec()],  # left to zarr
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64"])
@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
def test_bytes_are_those_of_zarr(tmp_path: Path, codecs: list, dtype: str) -> None:
    rng, options = np.random.default_rng(0), {"shape": (10, 5, 3), "chunks": (4, 5, 3)}
    options |= {"dtype": dtype, "fill_value": 0, "compressors": codecs}
    options |= {"chunk_key_encoding": {"name": "default", "separator": "."}}
    ours, theirs = (zarr.create_array(tmp_path / name, **options) for name in ("a", "b"))
    values = (100 * rng.normal(size=(10, 5, 3))).astype(dtype)
    for start in (0, 4, 8):  # the last chunk reaches beyond the array
        chunk_writer(ours)(start, values[start : start + 4])
        theirs[start : start + 4] = values[start : start + 4]
        if codecs != CODECS["strange"]:  # gzip writes the time
            assert chunk_file(ours, start).read_bytes() == chunk_file(theirs, start).read_bytes()
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a")[:], values)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("dtype", ["float64", "float32", ">f4"])
@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
def test_values_are_those_of_zarr(tmp_path: Path, codecs: list, dtype: str) -> None:
    options = {"shape": (4, 5, 3), "chunks": (1, 5, 3), "dtype": dtype, "compressors": codecs}
    options |= {"chunk_key_encoding": {"name": "default", "separator": "."}}
    array = zarr.create_array(tmp_path / "a", dimension_names=["time", "y", "z"], **options)
    array[:3] = np.random.default_rng(0).normal(size=(3, 5, 3))
    for key in [(1,), (2, slice(1, 4), slice(None)), (np.int64(0), slice(None), slice(0, 3, 2))]:
        values = read(array, *key)
        np.testing.assert_array_equal(values, array[key])
        assert values.dtype == array[key].dtype
        assert values.flags.writeable
        ours = codecs != CODECS["strange"] and dtype != ">f4"
        assert (_read_chunk(array, key) is not None) == ours
    for key in [(3,), (slice(0, 2),), (np.array([0, 2]), slice(None), slice(None)), (0, 1)]:
        assert _read_chunk(array, key) is None  # not there, or not whole


def test_a_chunk_of_another_size_is_refused(tmp_path: Path) -> None:
    separated = {"name": "default", "separator": "."}
    for name, n in (("a", 3), ("b", 2)):
        array = zarr.create_array(
            tmp_path / name,
            shape=(2, 5, n),
            chunks=(1, 5, n),
            dtype="float32",
            dimension_names=["time", "y", "z"],
            chunk_key_encoding=separated,
        )
        array[:] = 1.0
    other, array = (zarr.open_array(tmp_path / name) for name in ("b", "a"))
    chunk_file(array, 1).write_bytes(chunk_file(other, 1).read_bytes())
    with pytest.raises(TrajectoryError, match=r"frame 1.*cannot be decoded"):
        read(array, 1)
