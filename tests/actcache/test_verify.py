"""Verification names every object that differs, and passes what is whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import actcache_here
from replayed import Recorded
from tiny_harvest import SITES, tiny_spec

import actcache
from actcache.errors import DamagedDataset, SpecError
from actcache.layout import array_layout
from actcache.manifest import (
    commit_manifest,
    manifest_key,
    read_manifest,
    read_records,
    record_key,
)
from actcache.segments import RecordRows, write_segment
from actcache.shard import chunk_checksums, encode_shard, shard_key
from actcache.store import open_store
from actcache.verify import verify

CODES = f"train/{SITES[0]}/codes"


@pytest.fixture(scope="module")
def whole(recorded, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "dataset"
    recorded.harvest(open_store(str(path)))
    return path


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "dataset")
    return tmp_path / "dataset"


def problems_of(path, **options):
    try:
        verify(actcache.open(str(path)), progress=False, **options)
    except DamagedDataset as err:
        return err.problems
    return []


@pytest.mark.parametrize("precision", ["fvu:1e-3", "fvu:0.1", "bf16", "fp16", "fp32"])
def test_a_whole_dataset_passes_with_every_byte_read(recorded, tmp_path, precision):
    other = recorded if precision == "fvu:1e-3" else Recorded(tmp_path / "recorded", precision=precision)
    store = open_store(str(tmp_path / "dataset"))
    other.harvest(store, other.asking(n_tokens=1024, sites=SITES[:1]))
    other.harvest(store)  # a second version, a second site
    checked = verify(actcache.open(store.url), deep=True, progress=False)
    dataset = actcache.open(store.url)
    splits = [dataset.split(name) for name in dataset.splits]
    rows = sum(split.n_rows for split in splits)
    assert checked["rows whose token, sequence and position follow from input_ids"] == rows
    assert checked["rows whose statistics follow from the stored values"] == len(SITES) * rows
    assert checked["objects read whole, crc32c right"] == checked["objects of the committed size"]
    assert checked["bytes"] == sum(split.size_bytes() for split in splits)
    assert checked["manifest versions"] == dataset.manifest.version > 1
    assert (checked["unreferenced objects"], checked["loose records"]) == (0, 0)


def test_every_problem_is_named_not_only_the_first(copy):
    (copy / CODES / "c/0/0").unlink()
    truncated = copy / "train/token_id/c/1"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (copy / "zarr.json").write_text("{}")
    (copy / f"_calibration/{SITES[1]}.json").unlink()
    (copy / "_identity.json").write_text("{}")
    found = problems_of(copy)
    wanted = (
        f"{CODES}/c/0/0 is missing",
        "train/token_id/c/1 holds",
        "zarr.json is not",
        "_calibration/",
        "_identity",
    )
    for text in wanted:
        assert [p for p in found if text in p], text
    assert len(found) == 5
    assert all("; " in p for p in found)  # each with its remedy


def test_manifest_versions_are_one_chain(recorded, tmp_path):
    store = open_store(str(tmp_path))
    for n_tokens in (1024, 2048, 3000):
        recorded.harvest(store, recorded.asking(n_tokens=n_tokens))
    assert problems_of(tmp_path) == []
    (tmp_path / "_manifest/00000002.json").unlink()
    assert ["2..2 are missing" in p for p in problems_of(tmp_path)] == [True]
    (tmp_path / "_manifest/00000001.json").unlink()  # as gc leaves them
    assert problems_of(tmp_path) == []
    newest = read_manifest(store)
    extent = newest.sites[SITES[0]]
    fewer = {**newest.sites, SITES[0]: replace(extent, n_blocks={**extent.n_blocks, "train": 1})}
    commit_manifest(store, replace(newest, version=newest.version + 1, sites=fewer))
    assert any("fewer rows" in p for p in problems_of(tmp_path))


def test_what_nobody_names_is_counted_not_refused(copy):
    (copy / "train/token_id/c/99").write_bytes(b"from a dead writer")
    (copy / "train/.actcache-tmp-0").write_bytes(b"half")
    checked = verify(actcache.open(str(copy)), progress=False)
    assert (checked["unreferenced objects"], checked["unreferenced bytes"]) == (1, 18)
    assert checked["leftovers of killed writers"] == 1


def test_loose_records_are_counted(recorded, tmp_path):
    store = open_store(str(tmp_path))
    recorded.harvest(store, recorded.asking(n_tokens=1024))
    recorded.harvester_on(store, recorded.resolved).run_block("train", 1, SITES)
    checked = verify(actcache.open(store.url), deep=True, progress=False)
    assert checked["loose records"] == 1


def rewritten(path, array_path, shard, change):
    """The dataset at `path` with one shard's rows changed and committed anew, all checksums right."""
    store, old = open_store(str(path)), read_manifest(open_store(str(path)))
    layout = array_layout(old.identity, {s: e.d_in for s, e in old.sites.items()})
    split, _, name = array_path.partition("/")
    array = layout[name]
    dataset = actcache.open(str(path)).split(split)
    n = min(array["shard_rows"], (dataset.n_sequences if name in ("input_ids", "length") else dataset.n_rows))
    rows = dataset._gather(name, np.arange(shard * n, (shard + 1) * n)).copy()
    change(rows)
    fill = np.nan if array["fill"] == "NaN" else array["fill"]
    data, chunks = encode_shard(rows, array["chunk_rows"], array["shard_rows"], fill)
    key = shard_key(array_path, shard, rows.ndim)
    store.delete(key)
    store.create(key, data)
    records = []
    for record in list(read_records(store)):
        objects = [
            replace(
                o,
                size_bytes=len(data),
                chunk_offset=tuple(c[0] for c in chunks),
                chunk_nbytes=tuple(c[1] for c in chunks),
                chunk_crc32c=tuple(chunk_checksums(data, chunks)),
            )
            if (o.path, o.shard) == (array_path, shard)
            else o
            for o in record.objects
        ]
        changed = replace(record, objects=tuple(objects))
        store.delete(record.key)
        store.create(record.key, changed.to_json())
        records.append(changed)
    for o in store.listing("_segments"):
        store.delete(o.key)
    manifest = replace(old, segments=(write_segment(store, [RecordRows.of(record) for record in records]),))
    for version in range(1, old.version + 1):  # older ones named the segments that are gone
        store.delete(manifest_key(version))
    commit_manifest(store, manifest)
    return key


@pytest.mark.parametrize(
    ("array_path", "cell", "message"),
    [
        (CODES, (7, 3), "is not the recorded one"),
        (f"train/{SITES[0]}/scale", 7, "is not constantly"),
        ("train/token_id", 7, "is not what input_ids"),
        ("train/sequence", 7, "is not what input_ids"),
        ("train/position", 7, "is not what input_ids"),
        ("train/input_ids", (3, 4), "is not what input_ids"),
        ("train/length", 0, "input_ids"),
    ],
)
def test_deep_sees_wrong_values_behind_right_checksums(copy, array_path, cell, message):
    def change(rows):
        rows[cell] = (
            rows[cell] + 60 if array_path == CODES else rows[cell] * 2 if "scale" in array_path else 5
        )

    key = rewritten(copy, array_path, 0, change)
    assert problems_of(copy) == []
    found = problems_of(copy, deep=True)
    assert any(message in p for p in found), found
    if "input_ids" not in array_path and "length" not in array_path:
        assert any(key in p for p in found)


def test_one_code_off_by_one_step_shows_in_the_statistics(copy):
    """A mean over 1,024 rows moves by scale / 1024: above the rounding that is allowed."""

    def change(rows):
        rows[:, 2] += 1

    rewritten(copy, CODES, 1, change)
    assert any("mean_D" in p for p in problems_of(copy, deep=True))


def test_a_replayed_row_equals_the_language_models(tiny):
    dataset, spec, _ = tiny
    checked = verify(dataset, replay=40, seed=3, model=spec.model, progress=False)
    assert checked["rows replayed"] == 40
    assert checked["rows beyond the stated error"] == 0
    assert 0.4 < checked["largest error, in units of the row's scale"] < 0.501


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_replay_holds_for_every_precision(tmp_path, precision):
    spec = tiny_spec(tmp_path, precision=precision, n_tokens=1024, sites=SITES[:1], validation_blocks=0)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    checked = verify(dataset, replay=20, model=spec.model, progress=False)
    assert checked["rows beyond the stated error"] == 0


def test_replay_sees_a_value_that_the_language_model_did_not_give(tiny, tmp_path):
    dataset, spec, _ = tiny
    shutil.copytree(dataset.url, tmp_path / "copy")
    store, block_rows = open_store(str(tmp_path / "copy")), spec.block_rows

    def change(rows):
        rows[:, 5] += 3

    rewritten(tmp_path / "copy", CODES, 0, change)
    with pytest.raises(DamagedDataset, match=r"train/.* is not the LM's value") as raised:
        verify(actcache.open(store.url), replay=200, model=spec.model, progress=False)
    assert all(int(p.split(" row ")[1].split(" ")[0]) < block_rows for p in raised.value.problems)


def test_replay_with_another_model_is_refused(tiny, tmp_path):
    dataset, spec, _ = tiny
    shutil.copytree(spec.model, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": "edited"}))
    with pytest.raises(SpecError, match="Give the model that was harvested"):
        verify(dataset, replay=1, model=str(tmp_path / "other"), progress=False)
    with pytest.raises(SpecError, match="give that directory as the model"):
        verify(dataset, replay=1, progress=False)


def test_the_command_line_prints_every_problem_and_fails(copy):
    (copy / CODES / "c/0/0").unlink()
    (copy / "zarr.json").write_text("{}")
    done = actcache_here("verify", copy, "--deep")
    assert done.returncode == 1
    assert done.stderr.count("problem: ") == 2
    assert done.stderr.splitlines()[-1] == f"error: {copy} has 2 problems"
    described = json.loads(actcache_here("verify", copy, "--json").stdout)
    assert len(described["problems"]) == 2
    assert described["checked"]["manifest version"] == 2


def test_a_record_under_another_name_is_seen(copy):
    store = open_store(str(copy))
    record = next(read_records(store))
    store.create(record_key("train", 77, SITES), record.to_json())
    found = problems_of(copy, deep=True)
    assert any("it was copied or renamed" in p for p in found)


def test_damaged_segments_do_not_hide_the_rest(copy):
    segment = next(Path(copy / "_segments").glob("*objects*"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    (copy / "zarr.json").unlink()
    found = problems_of(copy, deep=True)
    assert any(segment.name in p for p in found)
    assert any("zarr.json is missing" in p for p in found)
