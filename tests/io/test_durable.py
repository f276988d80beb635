"""Chunks that a writer encodes itself are those that zarr would have written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from densitykit.io.durable import chunk_file, chunk_writer

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
