"""A stream serves every row once in an order anybody can write down, and resumes exactly."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_harvest import SITES

import actcache
from actcache.errors import CorruptObject, FormatError, NotADataset, SpecError
from actcache.order import Order
from actcache.shard import shard_key
from actcache.spec import canonical_json, digest

CHUNK = 64


def places(batches):
    """Sequence and position of every served row as one number, in order."""
    return np.concatenate([b.sequence.astype(np.int64) * 1000 + b.position for b in batches])


def stored_places(dataset):
    rows = dataset.rows(slice(None))
    return rows.sequence.astype(np.int64) * 1000 + rows.position


def test_stream_serves_the_written_order_and_the_right_values(tiny):
    dataset, _, _ = tiny
    stream = dataset.stream(batch_size=100, seed=3, epochs=2, lanes=8)
    batches = list(stream)
    expected = [
        Order(n_rows=dataset.n_rows, chunk_rows=CHUNK, seed=3, epoch=e, lanes=8, window=stream.window).rows()
        for e in (0, 1)
    ]
    rows = np.concatenate(expected)
    assert np.array_equal(places(batches), stored_places(dataset)[rows])
    for site in SITES:
        served = np.concatenate([b[site] for b in batches])
        assert np.array_equal(served, dataset.read(site, rows))
    assert np.array_equal(np.concatenate([b.token_id for b in batches]), dataset.rows(rows).token_id)
    per_epoch = -(-dataset.n_rows // 100)
    assert len(stream) == len(batches) == 2 * per_epoch
    assert [len(b) for b in batches[:per_epoch]] == [100] * (per_epoch - 1) + [dataset.n_rows % 100 or 100]
    assert not np.array_equal(expected[0], expected[1])


@given(
    batch_size=st.sampled_from([1, 7, 64, 100, 999, 5000]),
    lanes=st.sampled_from([1, 4, 64]),
    world_size=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 3]),
    split=st.sampled_from(["train", "validation"]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_together_serve_each_batch_of_the_single_reader(
    tiny, batch_size, lanes, world_size, window, split
):
    dataset = tiny[0].split(split)
    world_size = min(world_size, lanes)
    options = {"batch_size": batch_size, "lanes": lanes, "window": window, "seed": 1, "sites": SITES[0]}
    window = dataset.stream(**options).window
    alone = list(dataset.stream(**options | {"window": window}))
    ranks = [
        list(dataset.stream(**options | {"window": window}, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert all(len(rank) == len(alone) for rank in ranks)
    for t, whole in enumerate(alone):
        shares = [len(rank[t]) for rank in ranks]
        assert max(shares) - min(shares) <= 1
        merged = np.empty(len(whole), np.int64)
        start = t * batch_size
        for r, rank in enumerate(ranks):
            merged[(np.arange(start, start + len(whole)) % world_size) == r] = places([rank[t]])
        assert np.array_equal(merged, places([whole]))


@given(
    stop=st.integers(0, 60),
    before=st.sampled_from([1, 2, 4]),
    after=st.sampled_from([1, 2, 8]),
    batch=st.sampled_from([60, 128]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resume_continues_at_the_next_batch_at_any_world_size(tiny, stop, before, after, batch):
    dataset, _, _ = tiny
    options = {"batch_size": batch, "epochs": 2, "lanes": 8, "sites": SITES[0]}
    whole = list(dataset.stream(**options))
    stop = min(stop, len(whole))
    streams = [dataset.stream(**options, rank=r, world_size=before) for r in range(before)]
    for stream in streams:
        for _ in zip(range(stop), stream, strict=False):
            pass
    states = [json.loads(json.dumps(s.state())) for s in streams]
    assert all(state == states[0] for state in states)
    rest = [list(dataset.stream(**options, rank=r, world_size=after, state=states[-1])) for r in range(after)]
    assert all(len(r) == len(whole) - stop for r in rest)
    for t in range(len(whole) - stop):
        got = np.sort(np.concatenate([places([r[t]]) for r in rest]))
        assert np.array_equal(got, np.sort(places([whole[stop + t]])))


def test_a_stream_can_be_continued_in_place(tiny):
    dataset, _, _ = tiny
    stream = dataset.stream(batch_size=500)
    first = [batch for batch, _ in zip(stream, range(2), strict=False)]
    rest = list(stream)
    whole = list(dataset.stream(batch_size=500))
    # zip drew a third batch before it stopped
    assert np.array_equal(places(first), places(whole[:2]))
    assert np.array_equal(places(rest), places(whole[3:]))


@pytest.mark.parametrize("change", [{"seed": 1}, {"lanes": 4}, {"window": 7}])
def test_a_state_of_another_order_is_refused(tiny, change):
    dataset, _, _ = tiny
    state = dataset.stream(batch_size=100).state()
    with pytest.raises(SpecError, match=next(iter(change))):
        dataset.stream(batch_size=100, state=state, **change)
    with pytest.raises(SpecError, match="split"):
        dataset.split("validation").stream(batch_size=100, state=state)
    with pytest.raises(SpecError, match="stands at"):
        dataset.stream(batch_size=100, state=state | {"row": 10**9})


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"epochs": 0},
        {"world_size": 65},
        {"world_size": 3, "lanes": 2},
        {"world_size": 0},
        {"rank": 1},
        {"rank": -1},
        {"lanes": 0},
    ],
)
def test_bad_arguments_are_refused(tiny, bad):
    with pytest.raises(SpecError):
        tiny[0].stream(**bad)


def test_unknown_sites_and_splits_name_what_there_is(tiny):
    dataset, _, _ = tiny
    with pytest.raises(SpecError, match=r"did you mean 'blocks\.1\.hook_mlp_out'"):
        dataset.stream("blocks.1.hook_mlp_oot")
    with pytest.raises(SpecError, match="no split 'valid'"):
        dataset.split("valid")


def test_random_access_in_any_order(tiny):
    dataset, _, _ = tiny
    whole = dataset.read(SITES[1], slice(None))
    index = np.random.default_rng(0).integers(0, dataset.n_rows, 500)
    assert np.array_equal(dataset.read(SITES[1], index), whole[index])
    assert np.array_equal(dataset.read(SITES[1], -1)[0], whole[-1])
    assert np.array_equal(dataset.read(SITES[1], slice(10, 200, 3)), whole[10:200:3])
    assert np.array_equal(dataset.read(SITES[1], whole[:, 0] > 0), whole[whole[:, 0] > 0])
    assert dataset.read(SITES[1], []).shape == (0, whole.shape[1])
    with pytest.raises(IndexError, match="out of range"):
        dataset.read(SITES[1], [dataset.n_rows])


def test_context_gives_the_sequence_that_rows_point_into(tiny):
    dataset, _, _ = tiny
    rows = dataset.rows([0, 100, 2000])
    for token, sequence, position in zip(rows.token_id, rows.sequence, rows.position, strict=True):
        assert dataset.context(int(sequence))[position] == token


def test_metadata_is_not_read_unless_asked_for(tiny):
    stream = tiny[0].stream(SITES[0], batch_size=100, metadata=False)
    batch = next(iter(stream))
    assert list(batch) == [SITES[0]]
    with pytest.raises(SpecError, match="metadata=True"):
        _ = batch.position


def test_leaving_a_stream_early_leaves_no_thread(tiny):
    import threading

    before = threading.active_count()
    for _ in tiny[0].stream(batch_size=64):
        break
    import gc

    gc.collect()
    assert threading.active_count() == before


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny dataset that a test may damage."""
    shutil.copytree(tiny[0].url, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_damaged_shard_is_named_and_the_others_still_read(copy):
    path = copy / shard_key(f"train/{SITES[0]}/codes", 1, 2)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    dataset = actcache.open(str(copy))
    with pytest.raises(CorruptObject, match="codes/c/1/0"):
        dataset.read(SITES[0], 1024)
    with pytest.raises(CorruptObject, match="codes/c/1/0"):
        list(dataset.stream(SITES[0]))
    assert len(dataset.read(SITES[0], slice(0, 1000))) == 1000
    assert sum(len(b) for b in dataset.stream(SITES[1])) == dataset.n_rows


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_an_error_not_zeros(copy, damage):
    path = copy / shard_key(f"train/{SITES[0]}/codes", 0, 2)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CorruptObject, match=damage):
        list(actcache.open(str(copy)).stream())


def test_an_intact_shard_in_the_place_of_another_is_seen(copy):
    first, second = (copy / shard_key(f"train/{site}/codes", 0, 2) for site in SITES)
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptObject, match="not the one that was committed|truncated|does not match"):
        actcache.open(str(copy)).read(SITES[0], slice(0, 1024))


def rewrite_manifest(copy, change):
    """Replace the newest manifest by a changed one whose digest is right: a hostile writer."""
    path = max((copy / "_manifest").iterdir())
    value = json.loads(path.read_text())
    value.pop("digest")
    change(value)
    value["digest"] = digest(value)
    path.write_text(canonical_json(value))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format=99),
        lambda m: m.pop("format"),
        lambda m: m["segments"][0].update(objects="../../etc/passwd"),
        lambda m: m["segments"][0].update(objects="s3://elsewhere/x"),
        lambda m: m["sites"].update({"../x": m["sites"][SITES[0]]}),
        lambda m: m["sites"][SITES[0]].update(d_in=2**60),
        lambda m: m["sites"][SITES[0]].update(d_in="wide"),
        lambda m: m["identity"].update(chunk_rows=0),
        lambda m: m["identity"].update(block_rows=2**62),
        lambda m: m["splits"]["train"].update(n_rows=10**15),
        lambda m: m["splits"].update({"..": {"n_rows": 1, "n_blocks": 1, "n_sequences": 1}}),
        lambda m: m.update(splits=[]),
        lambda m: m.update(surprise=1),
    ],
)
def test_hostile_manifests_are_refused_with_a_reason(copy, change):
    rewrite_manifest(copy, change)
    with pytest.raises(FormatError):
        actcache.open(str(copy)).read(SITES[0], 0)


def test_any_changed_byte_of_a_manifest_is_seen(copy):
    path = max((copy / "_manifest").iterdir())
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises((CorruptObject, FormatError)):
            actcache.open(str(copy))


def test_changed_segments_are_seen(copy):
    for path in (copy / "_segments").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(CorruptObject, match="sha256"):
        actcache.open(str(copy)).read(SITES[0], 0)


def test_what_is_no_dataset_is_said(tmp_path):
    with pytest.raises(NotADataset, match="no committed actcache dataset"):
        actcache.open(str(tmp_path))


def test_verify_counts_what_it_checked_and_finds_damage(copy):
    from actcache.verify import verify

    dataset = actcache.open(str(copy))
    report = verify(dataset, deep=True, progress=False)
    shards = [p for p in copy.rglob("c/*") if p.is_file() and not {"offset", "channel"} & {*p.parts}]
    shards += [p for p in copy.rglob("c/*/0") if p.is_file()]
    assert report["objects of the committed size"] == len(shards)
    assert report["objects read whole, crc32c right"] == len(shards)
    assert report["unreferenced objects"] == 0
    zarr_json = copy / "train" / "zarr.json"
    whole = zarr_json.read_bytes()
    zarr_json.write_bytes(whole.replace(b"3", b"2", 1))
    with pytest.raises(CorruptObject, match="train/zarr.json"):
        verify(dataset, progress=False)
    zarr_json.write_bytes(whole)
    path = Path(copy) / shard_key("train/token_id", 0, 1)
    data = bytearray(path.read_bytes())
    data[10] ^= 4
    path.write_bytes(data)
    verify(dataset, progress=False)  # the size is right
    with pytest.raises(CorruptObject, match="token_id"):
        verify(dataset, deep=True, progress=False)


def test_verify_names_what_is_missing(copy):
    from actcache.verify import verify

    (copy / "zarr.json").unlink()
    with pytest.raises(CorruptObject, match=r"zarr\.json is missing"):
        verify(actcache.open(str(copy)), progress=False)
