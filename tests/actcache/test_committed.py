"""A commit costs the same at any size, and drivers that share a dataset lose and double nothing."""

import itertools
from collections import Counter
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import LOSSES, SITES, Synthetic
from tiny_harvest import SITES as TINY_SITES
from watched import DictStore, Watched

from actcache import committed
from actcache.committed import _Runs
from actcache.driver import _version_due
from actcache.errors import FormatError, SpecError
from actcache.layout import n_shards
from actcache.manifest import (
    SPLITS,
    BlockRecord,
    latest_version,
    read_manifest,
)
from actcache.opened import Opened
from actcache.reader import Dataset
from actcache.segment_files import open_segment_file
from actcache.segments import COMPLETE_SEGMENTS, FAN_IN, RecordRows, tallies
from actcache.statistics import Statistics, merge

SHAPE = {"block_rows": 4096, "chunk_rows": 1024, "context_size": 64}


def opened(store, version=None):
    """As `actcache.open`, of any store."""
    return Dataset(Opened(store, read_manifest(store, version)), "train")


def committed_with(n_blocks, per_commit, store=None):
    """A synthetic dataset that was committed in steps: its driver's state and what each commit cost."""
    synthetic, store = Synthetic(16, **SHAPE), store or Watched(DictStore())
    synthetic.calibrate(store)
    state, costs = synthetic.committed(store, train=10**6), []
    for first in range(0, n_blocks, per_commit):
        for block in range(first, first + per_commit):
            state.add(synthetic.rows("train", block))
        before = store.requests.total(), store.n_bytes.total()
        state.commit({}, {"rows": 1})
        costs.append((store.requests.total() - before[0], store.n_bytes.total() - before[1]))
    return synthetic, store, state, costs


def test_a_commit_costs_the_same_however_many_blocks_there_are():
    """64 commits each: every one that merges nothing costs the same 4 requests; merging costs once a tier."""
    _, _, state, costs = committed_with(640, 2)
    assert state.manifest.splits["train"]["n_blocks"] == 640
    early, late = costs[8:72], costs[-64:]
    for some in (early, late):
        plain = [c for c in some if c[0] == min(some)[0]]
        assert {requests for requests, _ in plain} == {4}  # three files of the segment, the manifest
    plain_early, plain_late = ([b for r, b in some if r == 4] for some in (early, late))
    # the manifest lists at most 7 segments a tier: a tier more is 7 lines more
    assert np.mean(plain_late) < 1.5 * np.mean(plain_early)
    tiers = np.log(640) / np.log(FAN_IN)
    requests, n_bytes = (np.sum(costs, axis=0) / len(costs)).tolist()
    # a tier: its files are read once and written once by 8 of them together
    assert requests <= 4 + tiers * (3 + 3 / FAN_IN)
    assert n_bytes <= np.mean(plain_late) * (1 + 2 * tiers)


def test_a_month_of_commits_leaves_few_segments_and_a_complete_version_at_most_three():
    synthetic, store, state, _ = committed_with(360, 1)
    segments = state.manifest.segments
    tiers = Counter((s.n_records.bit_length() - 1) // 3 for s in segments)
    assert max(tiers.values()) < FAN_IN
    assert sum(s.n_records for s in segments) == 360
    assert len(segments) > COMPLETE_SEGMENTS
    again = synthetic.committed(store, train=360)
    assert again.missing() == []
    assert not again.covered()
    manifest = again.commit(dict.fromkeys(SITES, LOSSES), {})
    assert not manifest.complete  # the first driver's million is still wanted
    fresh = DictStore(dict(store.store.objects))
    for key in [k for k in fresh.objects if k.startswith("_manifest/")]:
        del fresh.objects[key]
    whole = synthetic.committed(fresh, train=360)
    for block in range(360):
        whole.add(synthetic.rows("train", block))
    assert whole.commit(dict.fromkeys(SITES, LOSSES), {}).complete
    assert len(whole.manifest.segments) <= COMPLETE_SEGMENTS


def test_a_reader_is_at_ten_requests_before_its_first_chunk():
    synthetic, store = (
        Synthetic(16, [f"blocks.{i}.hook_resid_post" for i in range(5)], **SHAPE),
        Watched(DictStore()),
    )
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=700)
    for block in range(700):
        state.add(synthetic.rows("train", block))
        if block % 3 == 0 or block == 699:
            state.commit(dict.fromkeys(synthetic.sites, LOSSES), {})
    assert state.manifest.complete
    store.requests.clear()
    dataset = opened(store)
    for site in dataset.sites:
        dataset._shared.calibration(site)
        assert len(dataset._tables[f"train/{site}/codes"].size_bytes) == 700
    assert store.requests.total() <= 10


@pytest.mark.parametrize("per_commit", [1, 5, 64])
def test_merged_segments_say_what_the_records_said(per_commit):
    synthetic, store, *_ = committed_with(per_commit * (FAN_IN + 3), per_commit)
    n = per_commit * (FAN_IN + 3)
    dataset = opened(store)
    records = [synthetic.record("train", block) for block in range(n)]
    for path, count in n_shards(dataset.manifest, "train").items():
        table = dataset._tables[f"train/{path}"]
        named = {o.shard: o for r in records for o in r.objects if o.path == f"train/{path}"}
        assert len(table.size_bytes) == count
        for shard in range(count):
            o = named[shard]
            assert table.size_bytes[shard] == o.size_bytes
            if o.constant is None:
                assert tuple(table.chunk_offset[shard]) == o.chunk_offset
                assert tuple(table.chunk_crc32c[shard]) == o.chunk_crc32c
            else:
                assert table.constant[shard] == o.constant
    for site in SITES:
        expected = merge([synthetic.statistics(block, site) for block in range(n)]).summary()
        found = dataset.stats(site)
        assert found["n_rows"] == expected["n_rows"]
        assert np.allclose(found["variance"], expected["variance"])


def check_manifest(store, manifest):
    """What a version says of sizes and fidelity is what its segments say."""
    for split in SPLITS:
        dataset = Dataset(Opened(store, manifest), split)
        assert manifest.splits[split]["size_bytes"] == dataset.size_bytes()
    for site in manifest.sites:
        split = next((s for s in SPLITS if manifest.sites[site].n_blocks[s]), None)
        if split is None:
            continue
        stats = Dataset(Opened(store, manifest), split).stats(site)
        for name in ("n_rows", "max_error", "rows_rescaled"):
            assert manifest.fidelity[site][name] == stats[name]
        for name in ("fvu_core", "fvu_all", "bits_per_value"):
            assert manifest.fidelity[site][name] == pytest.approx(stats[name], rel=1e-12)


def test_every_version_states_its_size_and_fidelity_as_its_segments_give_them(recorded):
    store = DictStore()
    recorded.harvest(store, recorded.asking(n_tokens=1024, sites=TINY_SITES[:1], validation_blocks=0))
    recorded.harvest(store, recorded.asking(n_tokens=3000, sites=TINY_SITES[1:]))
    recorded.harvest(store, recorded.asking(n_tokens=2048))
    recorded.harvest(store)
    for version in range(1, latest_version(store) + 1):
        check_manifest(store, read_manifest(store, version))
    assert read_manifest(store).complete


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(9)), st.data())
def test_running_values_are_those_of_all_blocks_at_once_in_any_order(order, data):
    """Blocks come out of order, twice, by site or together, over many commits and drivers."""
    synthetic, store = Synthetic(4, **SHAPE), DictStore()
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=9)
    for block in order:
        sites = data.draw(st.sampled_from([SITES, SITES[:1], SITES[1:]]))
        record = synthetic.record("train", block, sites)
        store.create(record.key, record.to_json())
        if data.draw(st.booleans()):
            state.add(RecordRows.of(record))
        if data.draw(st.booleans()):
            state.commit({}, {})
        if data.draw(st.booleans()):
            state = synthetic.committed(store, train=9)
    fresh = synthetic.committed(store, train=9)
    manifest = fresh.commit({}, {})
    done = {site: set() for site in SITES}
    for key in [k for k in store.objects if k.startswith("_records/")]:
        record = BlockRecord.from_json(store.objects[key], key)
        for site in record.statistics:
            done[site].add(record.block)
    for site in SITES:
        prefix = next(n for n in itertools.count() if n not in done[site])
        assert manifest.sites[site].n_blocks["train"] == prefix
    if manifest.splits["train"]["n_blocks"]:
        check_manifest(store, manifest)


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(8)))
def test_runs_hold_the_statistics_of_an_unbroken_prefix(order):
    synthetic = Synthetic(3, SITES[:1], **SHAPE)
    parts = [synthetic.statistics(block, SITES[0]) for block in range(len(order))]
    runs, seen = _Runs(), set()
    for block in order:
        runs.add(range(block, block + 1), *tallies(synthetic.rows("train", block).statistics))
        seen.add(block)
        n = next(i for i in itertools.count() if i not in seen)
        assert runs.prefix == n
        if n:
            expected = merge(parts[:n])
            assert runs.tally.fidelity() == pytest.approx(
                {name: expected.summary()[name] for name in runs.tally.fidelity()}, rel=1e-12
            )
            assert np.allclose(runs.tally.mean_D, expected.mean_D, rtol=1e-12)
        else:
            assert runs.tally is None


def test_the_rows_of_a_record_say_what_the_record_says_and_survive_the_way_from_a_worker():
    synthetic = Synthetic(16, **SHAPE)
    record = synthetic.record("train", 3)
    rows = synthetic.rows("train", 3)
    assert rows.key == record.key
    assert (rows.split, rows.block) == ("train", 3)
    assert (rows.n_rows, rows.n_sequences) == (record.n_rows, record.n_sequences)
    assert rows.sizes == [(o.path, o.shard, o.size_bytes) for o in record.objects]
    parsed = RecordRows.of(BlockRecord.from_json(record.to_json(), record.key))
    assert rows.objects.equals(parsed.objects)
    assert rows.statistics.equals(parsed.statistics)
    written = {
        name: rows.objects[name].to_pylist() for name in ("chunk_offset", "chunk_nbytes", "chunk_crc32c")
    }
    for name, found in written.items():
        wanted = [[] if o.constant is not None else list(getattr(o, name)) for o in record.objects]
        assert found == wanted
    for site, found in zip(SITES, rows.statistics.to_pylist(), strict=True):
        for f in fields(Statistics):
            value = getattr(record.statistics[site], f.name)
            assert found[f.name] == (value.tobytes() if isinstance(value, np.ndarray) else value)


def test_damaged_statistics_are_one_error():
    rows = Synthetic(16, **SHAPE).rows("train", 0)
    at = rows.statistics.schema.get_field_index("m2_D")
    for cells, message in (([b"12345", b""], "buffer size"), ([bytes(8), bytes(8)], "different lengths")):
        with pytest.raises(FormatError, match=message):
            tallies(rows.statistics.set_column(at, "m2_D", pa.array(cells, pa.binary())))


def test_many_loose_records_go_into_a_segment_ahead_of_its_version_and_count_once(monkeypatch):
    """A driver that dies with such a segment leaves its records; one that loses a version reads them again."""
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    synthetic.calibrate(store)
    monkeypatch.setattr(committed, "_LOOSE_BYTES", 3 * synthetic.rows("train", 0).nbytes)
    state, other = (synthetic.committed(store, train=12) for _ in range(2))
    for block in range(10):
        record = synthetic.record("train", block)
        store.create(record.key, record.to_json())
        state.add(RecordRows.of(record))
        assert len(state.loose) <= 3
        assert state.n_waiting == block + 1
    assert latest_version(store) == 0
    assert len([key for key in store.objects if key.startswith("_segments/")]) == 2 * 3
    again = synthetic.committed(store, train=12)
    assert len(again.missing()) == 2
    for block in (10, 11):
        record = synthetic.record("train", block)
        store.create(record.key, record.to_json())
        other.refresh()
    other.commit({}, {})
    manifest = state.commit(dict.fromkeys(SITES, LOSSES), {})
    assert manifest.version == 2
    assert manifest.complete
    assert (state.n_waiting, state.loose) == (0, [])
    check_manifest(store, manifest)
    for site in SITES:
        assert manifest.fidelity[site]["n_rows"] == 12 * SHAPE["block_rows"]
    fresh = synthetic.committed(store, train=12)
    assert fresh.loose == []
    assert fresh.covered()


def test_the_loser_of_a_version_takes_in_what_the_winner_committed():
    """Two drivers that each did every second block and know nothing of each other."""
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    synthetic.calibrate(store)
    states = [synthetic.committed(store, train=20) for _ in range(2)]
    for block in range(20):
        record = synthetic.record("train", block)
        store.create(record.key, record.to_json())
        states[block % 2].add(RecordRows.of(record))
        if block % 7 == 6:
            for state in states:
                state.commit({}, {})
    manifests = [state.commit(dict.fromkeys(SITES, LOSSES), {}) for state in states]
    assert manifests[0].version < manifests[1].version
    assert [m.splits["train"]["n_blocks"] for m in manifests] == [20, 20]
    assert all(m.complete for m in manifests)
    check_manifest(store, manifests[1])
    versions = [read_manifest(store, v) for v in range(1, latest_version(store) + 1)]
    blocks = [m.splits["train"]["n_blocks"] for m in versions]
    assert blocks == sorted(blocks)


def test_a_version_says_complete_only_when_nothing_that_anybody_wants_is_left():
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    synthetic.calibrate(store)
    large, small = synthetic.committed(store, train=4), synthetic.committed(store, train=2)
    for block in range(2):
        record = synthetic.record("train", block)
        store.create(record.key, record.to_json())
        large.add(RecordRows.of(record))
    assert not large.commit({}, {}).complete
    small.refresh()
    assert small.missing() == []
    manifest = small.commit(dict.fromkeys(SITES, LOSSES), {})
    assert small.covered()
    assert not manifest.complete  # four are wanted
    assert manifest.wanted == {site: {"train": 4, "validation": 0, "test": 0} for site in SITES}
    for block in range(2, 4):
        record = synthetic.record("train", block)
        store.create(record.key, record.to_json())
        large.add(RecordRows.of(record))
    assert large.commit({}, {}).complete
    assert large.covered()
    less = synthetic.committed(store, train=1)
    assert less.covered()
    assert less.commit({}, {}).complete


def test_sites_and_tokens_are_extended_by_two_runs_without_asking_for_their_product():
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    synthetic.calibrate(store)
    wide = synthetic.committed(store, train=1)
    longer = Synthetic(16, SITES[:1], **SHAPE).committed(store, train=3)
    for block in range(3):
        record = synthetic.record("train", block, SITES if block == 0 else SITES[:1])
        store.create(record.key, record.to_json())
    for state in (wide, longer):
        state.refresh()
        assert state.missing() == []
        manifest = state.commit(dict.fromkeys(state.widths, LOSSES), {})
    assert manifest.complete
    assert [manifest.sites[site].n_blocks["train"] for site in SITES] == [3, 1]
    check_manifest(store, manifest)


def test_a_run_whose_loss_was_never_measured_is_not_covered():
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=1)
    state.add(synthetic.rows("train", 0))
    manifest = state.commit({}, {})
    assert manifest.fidelity[SITES[0]]["n_rows"] > 0
    assert not state.covered()
    assert not manifest.complete
    assert state.unmeasured() == list(SITES)
    assert state.commit({SITES[0]: LOSSES}, {}).fidelity[SITES[0]]["ce_change"] == LOSSES["ce_change"]
    assert state.unmeasured() == [SITES[1]]


def test_a_month_makes_fewer_versions_than_one_page_of_a_listing_holds():
    now, last, versions = 0.0, 0.0, 0
    while now < 30 * 86_400:
        now += 10
        if _version_due(now - last, now, 1):
            last, versions = now, versions + 1
    assert 500 < versions < 1000
    assert _version_due(1, 86_400, 1000)


def test_a_version_without_a_block_reads_as_empty():
    """As the first run leaves it if every block of it failed."""
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    synthetic.calibrate(store)
    synthetic.committed(store, train=1).commit({}, {})
    dataset = opened(store)
    assert dataset.n_rows == dataset.size_bytes() == 0
    with pytest.raises(SpecError, match="holds no rows"):
        dataset.stream(SITES)


def test_one_block_named_by_two_records_counts_once_through_merged_segments():
    synthetic, store = Synthetic(16, **SHAPE), DictStore()
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=FAN_IN)
    for block in range(FAN_IN):
        for sites in (SITES, SITES[:1], SITES[1:]):
            record = synthetic.record("train", block, sites)
            store.create(record.key, record.to_json())
            state.add(RecordRows.of(record))
        state.commit({}, {})
    manifest = state.commit(dict.fromkeys(SITES, LOSSES), {})
    assert manifest.complete
    check_manifest(store, manifest)
    assert manifest.fidelity[SITES[0]]["n_rows"] == FAN_IN * SHAPE["block_rows"]
    (merged,) = manifest.segments
    (part,) = merged.objects
    objects = open_segment_file(store, merged, part).read()
    named = list(zip(objects["path"].to_pylist(), objects["shard"].to_pylist(), strict=True))
    assert len(named) == len(set(named))
    assert merged.n_records == 3 * FAN_IN
    again = synthetic.committed(store, train=FAN_IN)
    assert again.loose == []
    assert again.covered()
    assert len(opened(store)._tables["train/token_id"].size_bytes) == FAN_IN
