"""Shard bytes: zarr itself reads what we write, and no damage passes."""

import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import CorruptObject
from actcache.shard import (
    array_metadata,
    decode_chunk,
    decode_shard,
    encode_chunk,
    encode_shard,
    parse_index,
    shard_key,
)

DTYPES = {"<i1": -128, "<u2": 0, "<u4": 0, "<f2": "NaN", "<f4": "NaN", "<i8": 0, "columns": 65535}


def fill_of(value):
    return np.nan if value == "NaN" else value


@given(
    n=st.integers(1, 200),
    width=st.sampled_from([None, 1, 7]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_zarr_reads_our_shards(tmp_path_factory, n, width, dtype, seed):
    directory = tmp_path_factory.mktemp("array")
    shard_rows, chunk_rows = 64, 16
    shape = (n,) if width is None else (n, width)
    fill, by_column = DTYPES[dtype], dtype == "columns"
    if by_column:
        dtype, shape = "<u2", (n, width or 33)
    values = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    for shard in range(-(-n // shard_rows)):
        data, chunks = encode_shard(
            values[shard * shard_rows : (shard + 1) * shard_rows],
            chunk_rows,
            shard_rows,
            fill_of(fill),
            by_column,
        )
        path = directory / shard_key("a", shard, len(shape))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        assert len(chunks) == shard_rows // chunk_rows
    metadata = array_metadata(shape, shard_rows, chunk_rows, np.dtype(dtype), fill, {"unit": "x"}, by_column)
    (directory / "a" / "zarr.json").write_text(json.dumps(metadata))
    array = zarr.open_array(directory / "a", mode="r")
    assert np.array_equal(array[:], values)
    assert array.dtype == np.dtype(dtype)
    assert array.attrs["unit"] == "x"


@pytest.mark.parametrize(("dtype", "fill", "by_column"), [("<i1", -128, False), ("<u2", 65535, True)])
def test_zarr_writes_shards_that_we_read(tmp_path, dtype, fill, by_column):
    values = np.random.default_rng(0).integers(-50, 50, (100, 5)).astype(dtype)
    metadata = array_metadata((100, 5), 64, 16, values.dtype, fill, {}, by_column)
    (tmp_path / "zarr.json").write_text(json.dumps(metadata))
    array = zarr.open_array(tmp_path, mode="r+")
    array[:] = values
    for shard, rows in ((0, values[:64]), (1, values[64:])):
        data = (tmp_path / "c" / str(shard) / "0").read_bytes()
        assert np.array_equal(decode_shard(data, len(rows), (16, 5), 64, values.dtype, "k", by_column), rows)


@pytest.mark.parametrize(("dtype", "by_column"), [("<i1", False), ("<u2", True)])
def test_every_flipped_bit_is_seen(dtype, by_column):
    values = np.random.default_rng(0).integers(-50, 50, (40, 4)).astype(dtype)
    data, _ = encode_shard(values, 16, 64, 1, by_column)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptObject, match="some/key"):
            decode_shard(bytes(damaged), 40, (16, 4), 64, values.dtype, "some/key", by_column)


@pytest.mark.parametrize(("dtype", "by_column"), [("<i1", False), ("<u2", True)])
def test_every_truncation_is_seen(dtype, by_column):
    values = np.random.default_rng(0).integers(-50, 50, (40, 4)).astype(dtype)
    data, _ = encode_shard(values, 16, 64, 1, by_column)
    for length in range(len(data)):
        with pytest.raises(CorruptObject):
            decode_shard(data[:length], 40, (16, 4), 64, values.dtype, "k", by_column)


@pytest.mark.parametrize(("dtype", "by_column"), [("<i1", False), ("<u2", True)])
def test_a_chunk_that_would_decode_to_another_size_is_refused_before_it_is_allocated(dtype, by_column):
    huge, _ = encode_shard(np.zeros((2**20, 8), dtype), 2**20, 2**20, 0, by_column)
    index = parse_index(huge[-20:], 1, "k")
    chunk = huge[: index[0][1]]
    with pytest.raises(CorruptObject, match="another size"):
        decode_chunk(chunk, (16, 8), np.dtype(dtype), "k", by_column=by_column)


@pytest.mark.parametrize(("dtype", "by_column"), [("<i1", False), ("<u2", True)])
def test_a_chunk_decodes_into_the_memory_it_is_given(dtype, by_column):
    values = np.random.default_rng(0).integers(-50, 50, (64, 40)).astype(dtype)
    out = np.zeros_like(values)
    assert (
        decode_chunk(encode_chunk(values, by_column), out.shape, out.dtype, "k", None, by_column, out) is out
    )
    assert np.array_equal(out, values)
