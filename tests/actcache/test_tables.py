"""Chunk tables: decoded array by array, from segments in any order, in few requests and bounded memory."""

import contextlib
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import LOSSES, SITES, Synthetic
from watched import DictStore, Watched

from actcache.errors import ActcacheError, CorruptObject, FormatError
from actcache.layout import n_shards
from actcache.manifest import read_manifest
from actcache.opened import Opened
from actcache.reader import Dataset
from actcache.segment_files import OBJECTS, open_segment_file
from actcache.segments import RecordRows
from actcache.tables import SegmentObjects, shard_table
from actcache.untrusted import ParquetFile

SHAPE = {"block_rows": 4096, "chunk_rows": 1024, "context_size": 64}
STREAMED = [f"train/{SITES[0]}/codes", f"train/{SITES[0]}/scale"]
STREAMED += ["train/token_id", "train/sequence", "train/position"]
COLUMNS = ("size_bytes", "chunk_offset", "chunk_nbytes", "chunk_crc32c", "constant")


def complete(n_blocks, per_commit, sites=SITES):
    """A store with a complete synthetic dataset, and its records."""
    synthetic, store = Synthetic(16, sites, **SHAPE), Watched(DictStore())
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=n_blocks)
    for block in range(n_blocks):
        state.add(RecordRows.of(synthetic.record("train", block)))
        if len(state.loose) == per_commit:
            state.commit({}, {})
    assert state.commit(dict.fromkeys(sites, LOSSES), {}).complete
    return synthetic, store


def opened(store):
    return Dataset(Opened(store, read_manifest(store)), "train")


@pytest.fixture(scope="module")
def small():
    return complete(300, 120)


@pytest.fixture
def decoded(monkeypatch):
    """Rows of each reading that decodes chunk tables, from now on."""
    rows, read = [], ParquetFile.read

    def spied(self, columns=None, groups=None, **options):
        table = read(self, columns, groups, **options)
        if columns is None or any(name.startswith("chunk_") for name in columns):
            rows.append(len(table))
        return table

    monkeypatch.setattr(ParquetFile, "read", spied)
    return rows


def up_to_the_first_chunk(store, **options):
    """What a stream reads before it asks for the first chunk (which nobody stored)."""
    keys = []
    store.before = lambda verb, key: keys.append(key)
    with pytest.raises(CorruptObject, match="is missing although it was committed"):
        next(iter(opened(store).stream(**options)))
    store.before = lambda verb, key: None
    return keys[: next(i for i, key in enumerate(keys) if "/c/" in key)]


def test_a_stream_makes_at_most_ten_requests_before_its_first_chunk():
    sites = [f"blocks.{i}.hook_resid_post" for i in range(5)]
    _, store = complete(700, 3, sites)
    keys = up_to_the_first_chunk(store)
    assert sum("-objects." in key for key in keys) == 3
    assert len(keys) + len(sites) <= 10  # a calibration each comes with the first batch


def stream_tables(store):
    """Ask for the tables of all arrays that a stream of one site reads, row metadata among them."""
    dataset = opened(store)
    stream = dataset.stream(SITES[0])
    assert {f"train/{name}" for name in stream._names} == set(STREAMED)
    for name in stream._names:
        assert dataset._tables[f"train/{name}"].path == f"train/{name}"


def test_a_stream_of_one_site_decodes_no_other_arrays_tables(decoded):
    _, store = complete(300, 300)
    decoded.clear()
    stream_tables(store)
    assert sum(decoded) == 300 * len(STREAMED)
    assert len(n_shards(read_manifest(store), "train")) > len(STREAMED)


def test_row_groups_that_arrays_share_are_decoded_once(decoded):
    """Segments of few records have row groups of several arrays."""
    _, store = complete(20, 10)
    decoded.clear()
    dataset = opened(store)
    for path in dataset._tables:
        assert dataset._tables[path].path == path
    assert sum(decoded) == sum(n_shards(dataset.manifest, "train").values())
    assert len(decoded) < len(dataset._tables)


def test_opening_asking_for_what_the_manifest_says_and_refusals_decode_nothing(small, decoded):
    _, store = small
    dataset = opened(store)
    assert dataset.n_rows == 300 * SHAPE["block_rows"]
    assert dataset.sites == sorted(SITES)
    assert "train/token_id" in dataset._tables
    assert "train/nothing" not in dataset._tables
    with pytest.raises(KeyError):
        _ = dataset._tables["train/nothing"]
    assert not decoded


@pytest.mark.slow
def test_at_ten_thousand_blocks_only_what_is_streamed_is_decoded(decoded):
    _, store = complete(10_000, 1_000)
    decoded.clear()
    assert len(up_to_the_first_chunk(store, sites=SITES[0])) <= 10
    decoded.clear()
    stream_tables(store)
    assert sum(decoded) == 10_000 * len(STREAMED)
    decoded.clear()
    dataset = opened(store)
    assert dataset.size_bytes() == dataset.manifest.splits["train"]["size_bytes"]
    assert sum(decoded) == sum(n_shards(dataset.manifest, "train").values())


def test_tables_say_what_the_records_say(small):
    synthetic, store = small
    dataset = opened(store)
    records = [synthetic.record("train", block) for block in range(300)]
    for path, table in dataset._tables.items():
        named = {o.shard: o for r in records for o in r.objects if o.path == path}
        for shard in range(len(table.size_bytes)):
            assert_holds(table, shard, named[shard])
    assert len(dataset._tables) == len(n_shards(dataset.manifest, "train"))


def assert_holds(table, shard, o):
    for name in COLUMNS:
        wanted = np.nan if getattr(o, name) is None else getattr(o, name)
        if name.startswith("chunk") and o.constant is not None:
            wanted = 0  # nobody reads them
        np.testing.assert_array_equal(getattr(table, name)[shard], wanted, name)


def parquet(table, **options):
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return ParquetFile(sink.getvalue(), OBJECTS, "here")


@pytest.mark.parametrize("seed", range(5))
def test_rows_in_any_order_and_any_row_groups_give_the_same_tables(small, seed):
    """As earlier writers stored them, or others: with repetitions, and rows of other splits."""
    _, store = small
    dataset, rng = opened(store), np.random.default_rng(seed)
    segments = dataset.manifest.segments
    rows = pa.concat_tables(open_segment_file(store, s, part).read() for s in segments for part in s.objects)
    order = rng.permutation(np.concatenate([np.arange(len(rows)), rng.integers(0, len(rows), 50)]))
    other = rows.slice(0, 40).set_column(0, "path", pa.array(["test/token_id"] * 40))
    other = other.set_column(2, "size_bytes", pa.array([10**6] * 40))
    mixed = pa.concat_tables([other, rows.take(pa.array(order)), other])
    objects = SegmentObjects(
        parquet(mixed, row_group_size=int(rng.integers(7, 900)), compression=["none", "snappy"][seed % 2])
    )
    paths = list(dataset._tables)
    for path in rng.permutation(paths).tolist():
        wanted = dataset._tables[path]
        found = shard_table(path, *wanted.chunk_nbytes.shape, objects.take(path))
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), name)
    fewer = shard_table("train/token_id", 7, 4, SegmentObjects(parquet(mixed)).take("train/token_id"))
    np.testing.assert_array_equal(fewer.chunk_nbytes, dataset._tables["train/token_id"].chunk_nbytes[:7])


def test_threads_that_ask_at_once_get_one_table(small, decoded):
    _, store = small
    dataset = opened(store)
    with ThreadPoolExecutor(16) as pool:
        asked = [path for path in dataset._tables for _ in range(8)]
        found = list(pool.map(lambda path: dataset.split("train")._tables[path], asked))
    for i in range(0, len(found), 8):
        assert len({id(table) for table in found[i : i + 8]}) == 1
    assert sum(decoded) == sum(n_shards(dataset.manifest, "train").values())


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**40])
def test_offsets_of_small_objects_take_half_the_memory_and_of_large_ones_are_whole(size):
    row = {"path": "train/x", "shard": 0, "size_bytes": size}
    row |= {"chunk_offset": [0, size - 9], "chunk_nbytes": [size - 9, 9], "chunk_crc32c": [2**32 - 1, 0]}
    table = shard_table("train/x", 1, 2, [pa.Table.from_pylist([row | {"constant": None}], OBJECTS)])
    assert table.chunk_offset.tolist() == [row["chunk_offset"]]
    assert table.chunk_nbytes.tolist() == [row["chunk_nbytes"]]
    assert table.chunk_crc32c.tolist() == [row["chunk_crc32c"]]
    assert table.chunk_offset.itemsize == (4 if size < 2**31 else 8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shard": -1}, "lists 0 shards"),
        ({"shard": 1}, "lists 0 shards"),
        ({"chunk_offset": [2**62, 2**62], "chunk_nbytes": [2**62, 2**62]}, "outside its object"),
        ({"chunk_offset": [-1, 0]}, "outside its object"),
        ({"chunk_nbytes": [1]}, "have 1..2 entries, wanted 2"),
        ({"chunk_crc32c": [1, 2, 3]}, "have 2..3 entries, wanted 2"),
        ({"chunk_offset": [0] * 3, "chunk_nbytes": [0] * 3, "chunk_crc32c": [0] * 3}, "wanted 2"),
        ({"chunk_offset": [], "chunk_nbytes": [], "chunk_crc32c": []}, "have 0..0 entries, wanted 2"),
        ({"chunk_offset": [], "constant": 0.5}, "have 0..2 entries, wanted 2"),
    ],
    ids=str,
)
def test_a_table_that_lies_is_refused(change, reason):
    row = {"path": "train/x", "shard": 0, "size_bytes": 100}
    row |= {"chunk_offset": [0, 50], "chunk_nbytes": [50, 30], "chunk_crc32c": [1, 2], "constant": None}
    with pytest.raises(FormatError, match=reason):
        shard_table("train/x", 1, 2, [pa.Table.from_pylist([row | change], OBJECTS)])


def test_an_array_without_rows_is_refused_and_not_allocated():
    with pytest.raises(FormatError, match="lists 0 shards"):
        shard_table("train/x", 2**40, 2, [])


def test_row_groups_that_are_small_alone_are_refused_once_they_are_large_together():
    """A limit for each row group would let a small file with many of them decode to anything."""
    n = 2**20
    row = {"path": "train/x", "shard": 0, "size_bytes": 100}
    row |= {"chunk_offset": [0] * n, "chunk_nbytes": [0] * n, "chunk_crc32c": [0] * n, "constant": None}
    one = pa.Table.from_pylist([row], OBJECTS)
    file = parquet(pa.concat_tables([one] * 8), row_group_size=1, compression="zstd")
    assert len(file._data) < 2**16
    assert len(file.read(("chunk_offset",), [0])) == 1
    assert len(file.read(("chunk_offset",), [0])) == 1  # the same again is no more memory
    objects = SegmentObjects(file)
    with pytest.raises(FormatError, match="decode"):
        objects.take("train/x")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_changed_bytes_give_a_table_or_a_refusal(small, data):
    """Footers, page headers, levels and text are the attacker's: whatever they say, one kind of error."""
    _, store = small
    segment = min(read_manifest(store).segments, key=lambda s: s.n_records)
    raw = bytearray(store.read(segment.objects[0].key))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(4, len(raw) - 5))] = data.draw(st.integers(0, 255))
    try:
        objects = SegmentObjects(ParquetFile(bytes(raw), OBJECTS, "here"))
    except ActcacheError:
        return
    for path in objects.paths:
        with contextlib.suppress(ActcacheError):
            assert shard_table(path, 3, 4, objects.take(path)).path == path


def test_a_path_that_is_no_text_is_refused(small):
    _, store = small
    segment = read_manifest(store).segments[0]
    rows = open_segment_file(store, segment, segment.objects[0]).read()
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="none")
    raw = sink.getvalue().replace(b"train/token_id", b"train/token_\xff\xff")
    with pytest.raises(FormatError, match="here"):
        SegmentObjects(ParquetFile(raw, OBJECTS, "here"))
