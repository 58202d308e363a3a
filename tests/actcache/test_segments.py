"""Segments: statistics of runs of blocks, objects in parts, and what manifests of format 1 held, continued."""

import hashlib
import io
import itertools
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import LOSSES, SITES, Synthetic
from test_committed import SHAPE, check_manifest, opened
from watched import DictStore, Watched

import actcache
from actcache import segment_files
from actcache.committed import Committed
from actcache.errors import FormatError
from actcache.manifest import (
    MANIFEST_FORMAT,
    ObjectRecord,
    canonical_json,
    digest,
    read_manifest,
)
from actcache.segment_files import (
    OBJECTS,
    STATISTICS,
    open_segment_file,
    segment_records,
    segment_statistics,
    statistics_of,
    statistics_row,
)
from actcache.segments import RecordRows, merge_segments, write_segment
from actcache.statistics import Statistics, merge
from actcache.store import open_store

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def small_parts(monkeypatch):
    """Parts and row groups that end after a few arrays, or within one."""
    monkeypatch.setattr(segment_files, "PART_BYTES", 6_000)
    monkeypatch.setattr(segment_files, "_GROUP_ROWS", 4)
    monkeypatch.setattr(segment_files, "_GROUP_CHUNKS", 32)


def filled(n_blocks, per_commit, sites=SITES):
    """A synthetic dataset in a store that counts."""
    synthetic, store = Synthetic(16, sites, **SHAPE), Watched(DictStore())
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=n_blocks)
    for block in range(n_blocks):
        state.add(synthetic.rows("train", block))
        if (block + 1) % per_commit == 0:
            state.commit(dict.fromkeys(sites, LOSSES), {})
    return synthetic, store, state.manifest


def assert_tables_are_the_records(synthetic, store, n_blocks):
    dataset = opened(store)
    for block in range(n_blocks):
        for o in synthetic.record("train", block).objects:
            table = dataset._tables[o.path]
            assert table.size_bytes[o.shard] == o.size_bytes
            assert_chunks(table, o)
    return dataset


def assert_chunks(table, o):
    """A constant shard may have none."""
    for name in ("chunk_offset", "chunk_nbytes", "chunk_crc32c"):
        found = getattr(table, name)[o.shard].tolist()
        assert found == list(getattr(o, name)) or (o.constant is not None and not any(found))
    np.testing.assert_equal(table.constant[o.shard], np.nan if o.constant is None else o.constant)


@pytest.mark.parametrize("per_commit", [40, 3])
def test_objects_in_parts_say_what_the_records_say_and_a_reader_fetches_those_of_its_arrays(
    small_parts, per_commit
):
    sites = [f"blocks.{i}.hook_resid_post" for i in range(12)]
    synthetic, store, manifest = filled(40 - 40 % per_commit, per_commit, sites)
    for segment in manifest.segments:
        parts = segment.objects
        assert len(parts) > 4 or segment.n_records < 8
        for part, after in itertools.pairwise(parts):
            assert part.first <= part.last <= after.first
        for part in parts:
            paths = open_segment_file(store, segment, part).read(("path",))["path"].to_pylist()
            assert (min(paths), max(paths)) == (part.first, part.last)
    largest = max(manifest.segments, key=lambda s: s.n_records)
    assert any(a.last == b.first for a, b in itertools.pairwise(largest.objects))
    assert_tables_are_the_records(synthetic, store, 40 - 40 % per_commit)
    store.requests.clear()
    dataset = opened(store)
    path = f"train/{sites[3]}/codes"
    assert len(dataset._tables[path].size_bytes) == 40 - 40 % per_commit
    wanted = sum(part.has(path) for segment in manifest.segments for part in segment.objects)
    assert store.requests.total() == 2 + wanted  # the listing, the manifest
    assert wanted < sum(len(segment.objects) for segment in manifest.segments) / 3


def test_statistics_take_a_row_a_site_however_many_blocks_there_are():
    synthetic, store, manifest = filled(40, 40)
    (segment,) = manifest.segments
    table = segment_statistics(store, segment)
    assert sorted(zip(table["site"].to_pylist(), table["block"].to_pylist(), table["n_blocks"].to_pylist(), strict=True)) == [
        (site, 0, 40) for site in SITES
    ]  # fmt: skip
    for site in SITES:
        ((blocks, found),) = statistics_of(table, "train", site, 40)
        expected = merge([synthetic.statistics(block, site) for block in range(40)])
        assert blocks == range(40)
        for f in fields(Statistics):
            np.testing.assert_allclose(getattr(found, f.name), getattr(expected, f.name), rtol=1e-12)
    assert len(segment_records(store, segment)) == 40


def test_a_run_ends_where_a_block_is_missing_and_goes_on_once_it_is_there():
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=20)
    for block in [0, 1, 2, 5, 6, 9]:
        state.add(synthetic.rows("train", block))
    manifest = state.commit({}, {})
    table = segment_statistics(store, manifest.segments[0]).to_pylist()
    assert [(r["block"], r["n_blocks"]) for r in table if r["site"] == SITES[0]] == [(0, 3), (5, 2), (9, 1)]
    assert manifest.splits["train"]["n_blocks"] == 3
    check_manifest(store, manifest)
    for block in [3, 4]:
        state.add(synthetic.rows("train", block))
    manifest = state.commit({}, {})
    assert manifest.splits["train"]["n_blocks"] == 7
    check_manifest(store, manifest)
    merged = merge_segments(store, manifest.segments)
    table = segment_statistics(store, merged).to_pylist()
    assert [(r["block"], r["n_blocks"]) for r in table if r["site"] == SITES[1]] == [(0, 7), (9, 1)]
    older = opened(store, 1)
    assert older.stats(SITES[0])["n_rows"] == 3 * SHAPE["block_rows"]


def test_a_record_whose_statistics_are_all_stated_elsewhere_is_committed_and_never_read_again():
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=1)
    for sites in (SITES[:1], SITES[1:]):
        state.add(synthetic.rows("train", 0, sites))
    state.commit({}, {})
    record = synthetic.record("train", 0, SITES)
    store.create(record.key, record.to_json())
    late = synthetic.committed(store, train=1)
    assert [r.key for r in late.loose] == [record.key]
    manifest = late.commit(dict.fromkeys(SITES, LOSSES), {})
    assert [len(segment_statistics(store, s)) for s in manifest.segments] == [2, 0]
    check_manifest(store, manifest)
    again = synthetic.committed(store, train=1)
    assert again.loose == []
    assert again.covered()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 4), (3, 2)], "are in two runs"),
        ([(0, 2), (3, 2)], "statistics of 4 blocks .* wanted 5"),
        ([(0, 6)], "statistics of 6 blocks .* wanted 5"),
        ([(-1, 6)], "blocks from"),
        ([(0, 5), (4, 0)], "blocks from"),
        ([(1, 4)], "statistics of 4 blocks .* wanted 5"),
        ([], "statistics of 0 blocks .* wanted 5"),
    ],
)
def test_statistics_that_do_not_tile_the_blocks_are_refused(runs, message):
    found = Synthetic(4, **SHAPE).statistics(0, SITES[0])
    rows = [
        statistics_row("train", "x", range(block, block + 1), found) | {"n_blocks": n} for block, n in runs
    ]
    with pytest.raises(FormatError, match=message):
        statistics_of(pa.Table.from_pylist(rows, STATISTICS), "train", "x", 5)


# Format 1


def parquet(rows, schema):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink, compression="zstd")
    return sink.getvalue()


def segment_1(store, records):
    """The JSON of a segment as manifests of format 1 listed them: written by hand."""
    named = [("split", pa.string()), ("block", pa.int64())]
    objects, statistics = [], []
    for record in records:
        name = {"split": record.split, "block": record.block, "sites": ",".join(sorted(record.statistics))}
        objects += [name | {f.name: getattr(o, f.name) for f in fields(ObjectRecord)} for o in record.objects]
        for site, found in record.statistics.items():
            row = statistics_row(record.split, site, range(record.block, record.block + 1), found)
            statistics.append(row | name | {"n_sequences": record.n_sequences})
    columns = [("site", pa.string()), ("sites", pa.string()), ("n_sequences", pa.int64())]
    schemas = {
        "objects": pa.schema([*named, ("sites", pa.string()), *OBJECTS]),
        "statistics": pa.schema(
            [*named, *columns, *(f for f in list(STATISTICS)[4:] if f.name != "core_sse_D")]
        ),
    }
    found = {"n_records": len(records)}
    for kind, rows in (("objects", objects), ("statistics", statistics)):
        data = parquet([{k: row[k] for k in schemas[kind].names} for row in rows], schemas[kind])
        sha256 = hashlib.sha256(data).hexdigest()
        found |= {kind: f"_segments/{sha256[:16]}-{kind}.parquet", f"{kind}_sha256": sha256}
        store.create(found[kind], data)
    return found


def as_format_1(store, segments):
    """The newest manifest of a store with these segments and format 1 in its place."""
    manifest = read_manifest(store)
    value = json.loads(manifest.to_json()) | {"format": 1, "segments": segments}
    del value["digest"]
    store.delete(manifest.key)
    store.create(manifest.key, canonical_json(value | {"digest": digest(value)}).encode())


def test_a_dataset_of_format_1_reads_the_same_and_goes_on_in_format_3():
    """Its segments state a block twice where two records did."""
    synthetic, store, manifest = filled(6, 6)
    wanted = opened(store).stats(SITES[0])
    records = [synthetic.record("train", block) for block in range(6)]
    twice = [synthetic.record("train", block, SITES[:1]) for block in (2, 3)]
    as_format_1(store, [segment_1(store, records[:4]), segment_1(store, [*records[4:], *twice])])
    before = assert_tables_are_the_records(synthetic, store, 6)
    assert all(s.records is None for s in before.manifest.segments)
    assert before.stats(SITES[0])["n_rows"] == wanted["n_rows"]
    np.testing.assert_allclose(before.stats(SITES[0])["variance"], wanted["variance"], rtol=1e-12)
    assert before._shared.sequence_ends("train").tolist() == [(b + 1) * 64 for b in range(6)]
    state = synthetic.committed(store, train=7)
    assert state.missing() == [("train", 6, SITES)]
    state.add(synthetic.rows("train", 6))
    manifest = state.commit(dict.fromkeys(SITES, LOSSES), {})
    assert json.loads(manifest.to_json())["format"] == MANIFEST_FORMAT == 3
    assert manifest.complete
    check_manifest(store, manifest)
    assert [s.n_records for s in manifest.segments] == [1, 8]
    assert_tables_are_the_records(synthetic, store, 7)
    assert len(opened(store, 1)._tables[f"train/{SITES[0]}/codes"].size_bytes) == 6
    fresh = synthetic.committed(store, train=7)
    assert fresh.covered()
    assert fresh.loose == []


@pytest.mark.parametrize("name", ["fvu", "rotated", "bf16"])
def test_golden_data_of_format_1_is_continued(tmp_path, name):
    shutil.copytree(GOLDEN / "1" / name, tmp_path / name)
    store = open_store(str(tmp_path / name))
    before = read_manifest(store)
    widths = {site: extent.d_in for site, extent in before.sites.items()}
    wanted = {split: size["n_blocks"] for split, size in before.splits.items()}
    manifest = Committed(store, before.identity, before.source, widths, wanted).commit({}, {})
    assert all(s.records is not None for s in manifest.segments)
    assert replace(manifest, version=1, segments=before.segments, fidelity=before.fidelity) == before
    for site in widths:
        later = dict(manifest.fidelity[site])
        assert later.pop("fvu_median_channel") is None  # its blocks were recorded without
        assert later == pytest.approx(before.fidelity[site], rel=1e-12)
    old, new = (actcache.open(str(tmp_path / name), version=v) for v in (1, 2))
    for split in ("train", "validation"):
        for site in widths:
            rows = old.split(split).read(site, slice(None))
            assert np.array_equal(new.split(split).read(site, slice(None)), rows)
            for key, value in old.split(split).stats(site).items():
                np.testing.assert_equal(new.split(split).stats(site)[key], value, key)


def test_a_segment_of_many_records_takes_rows_from_each(small_parts):
    """Written at once, or merged from segments of single records: the same files."""
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    rows = [RecordRows.of(synthetic.record("train", block)) for block in range(9)]
    whole = write_segment(store, rows)
    merged = merge_segments(store, [write_segment(store, [r]) for r in reversed(rows)])
    assert whole.objects == merged.objects
    assert whole.records == merged.records
