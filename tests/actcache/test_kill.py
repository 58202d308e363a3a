"""SIGKILL at every point of a harvest: what was committed reads whole, and a re-run ends as an undisturbed one."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr
from killing import Nursery
from tiny_harvest import SITES
from watched import Watched

import actcache
from actcache import driver
from actcache.manifest import latest_version, read_manifest
from actcache.store import open_store

EXTENT = {"n_tokens": 2048, "test_blocks": 0}
ARRAYS = ("token_id", "sequence", "position")
WRITE = "(create|swap) "


@pytest.fixture(scope="module")
def nursery(recorded, tmp_path_factory):
    with Nursery(recorded, tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def undisturbed(recorded, nursery, tmp_path_factory):
    """Of a harvest that nobody killed: its bytes by key, and the rows of every split."""
    url = str(tmp_path_factory.mktemp("undisturbed") / "dataset")
    assert nursery.harvest(url, **EXTENT) == 0
    return stored(url), rows(url)


def stored(url):
    """What does not depend on the order in which blocks were done: all but segments and manifests."""
    files = {p.relative_to(url).as_posix(): p for p in Path(url).rglob("*") if p.is_file()}
    return {
        key: path.read_bytes()
        for key, path in files.items()
        if not key.startswith(("_segments/", "_manifest/")) and ".actcache-tmp-" not in key
    }


def rows(url):
    dataset, out = actcache.open(url), {}
    for split in dataset.splits:
        part = dataset.split(split)
        found = part.rows(slice(None))
        out[split] = {name: getattr(found, name) for name in ARRAYS}
        out[split] |= {site: part.read(site, slice(None)) for site in part.sites}
    return out


def check_what_is_visible(url, whole):
    """Every version reads as a prefix of the whole; plain zarr shows no row beyond the newest version."""
    store = open_store(url)
    newest = latest_version(store)
    for version in range(1, newest + 1):
        dataset = actcache.open(url, version=version)
        for split in dataset.splits:
            part = dataset.split(split)
            found = part.rows(slice(None))
            for name in ARRAYS:
                assert np.array_equal(getattr(found, name), whole[split][name][: part.n_rows])
            for site in part.sites:
                n = part.manifest.sites[site].n_blocks[split] * 1024
                acts_ND = part.read(site, slice(None)) if n else np.zeros((0, 32), np.float32)
                assert np.array_equal(acts_ND, whole[split][site][:n])
    for path in Path(url).glob("*/**/zarr.json"):
        metadata = json.loads(path.read_text())
        if metadata["node_type"] != "array":
            continue
        split, *array = path.parent.relative_to(url).parts
        manifest = read_manifest(store)
        limit = manifest.splits[split]["n_rows"]
        if len(array) == 2 and array[1] not in ("offset", "channel"):
            limit = min(limit, manifest.sites[array[0]].n_blocks[split] * 1024)
        values = zarr.open_array(str(path.parent), mode="r")
        if array[-1] in (*ARRAYS, "codes", "scale"):
            assert values.shape[0] <= limit
        assert not np.isnan(values[:].astype(np.float64)).any()
        if array[-1] in ARRAYS and split in whole:
            assert np.array_equal(values[:], whole[split][array[-1]][: values.shape[0]])
    if Path(url, "zarr.json").exists():
        for split, group in zarr.open_group(url, mode="r").groups():
            for site in (s for s in SITES if split in whole and s in group):
                node = group[site]
                acts_ND = (
                    node["codes"][:] * node["scale"][:][:, None] * node["channel"][:] + node["offset"][:]
                )
                assert np.array_equal(acts_ND, whole[split][site][: len(acts_ND)])


def check_case(recorded, nursery, undisturbed, url, pattern, when, n=0):
    """Whether the harvest came to that point; if so, it died there and the next one ends as it should."""
    files, whole = undisturbed
    status = nursery.harvest(url, pattern, when, n, **EXTENT)
    assert status in (0, -9)
    if status == 0:
        return False
    check_what_is_visible(url, whole)
    before = records(url)
    recorded.harvest(open_store(url), recorded.asking(**EXTENT))
    assert before.items() <= records(url).items(), "a committed block was computed again"
    assert stored(url) == files
    check_what_is_visible(url, whole)
    assert {split: {k: v.tobytes() for k, v in part.items()} for split, part in rows(url).items()} == {
        split: {k: v.tobytes() for k, v in part.items()} for split, part in whole.items()
    }
    manifest = actcache.open(url).manifest
    assert manifest.complete
    again = Watched(open_store(url))
    recorded.harvest(again, recorded.asking(**EXTENT))
    assert not again.requests["create"]
    assert actcache.open(url).manifest == manifest
    return True


def records(url):
    return {p: p.stat().st_mtime_ns for p in Path(url).glob("_records/*/*.json")}


SITE = re.escape(SITES[0])
POINTS = {
    "before calibration": (rf"create _calibration/{SITE}\.json", "before"),
    "in a calibration": (rf"create _calibration/{SITE}\.json", "inside"),
    "between calibrations": (rf"create _calibration/{SITE}\.json", "after"),
    "after encode": (rf"create train/{SITE}/scale/c/0", "before"),
    "in the write of a scale": (rf"create train/{SITE}/scale/c/0", "inside"),
    "after a scale": (rf"create train/{SITE}/scale/c/0", "after"),
    "in the write of codes": (rf"create train/{SITE}/codes/c/1/0", "inside"),
    "after codes": (rf"create train/{SITE}/codes/c/1/0", "after"),
    "after row metadata": ("create train/sequence/c/0", "after"),
    "after input_ids": ("create train/input_ids/c/0/0", "after"),
    "before a record": ("create _records/train/00000000.*", "before"),
    "in the write of a record": ("create _records/train/00000000.*", "inside"),
    "after a record": ("create _records/train/00000000.*", "after"),
    "after a segment": ("create _segments/.*-statistics.parquet", "after"),
    "in the write of a manifest": ("create _manifest/00000002.json", "inside"),
    "after a manifest": ("create _manifest/00000002.json", "after"),
    "before an array's zarr.json": (rf"{WRITE}train/{SITE}/codes/zarr.json", "before"),
    "in the write of zarr.json": (rf"{WRITE}train/{SITE}/codes/zarr.json", "inside"),
    "between zarr.json": (rf"{WRITE}train/token_id/zarr.json", "after"),
    "before the root's zarr.json": (rf"{WRITE}zarr.json", "before"),
    "after the root's zarr.json": (rf"{WRITE}zarr.json", "after"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_harvest_killed_anywhere_ends_as_an_undisturbed_one(
    recorded, nursery, undisturbed, tmp_path, point
):
    assert check_case(recorded, nursery, undisturbed, str(tmp_path / "dataset"), *POINTS[point])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_a_harvest_killed_at_any_write_of_any_object_ends_as_an_undisturbed_one(
    recorded, nursery, undisturbed, tmp_path, when, monkeypatch
):
    monkeypatch.setattr(driver, "_COMPACT_EVERY_BLOCKS", 1)  # as the nursery does
    swaps = Counter()
    counted = Watched(
        open_store(str(tmp_path / "counted")), after=lambda verb, key: swaps.update([key] * (verb == "swap"))
    )
    recorded.harvest(counted, recorded.asking(**EXTENT))
    keys = [re.escape(key) for key in undisturbed[0]]
    keys += [f"_manifest/0000000{i}.json" for i in (1, 2, 3)]
    cases = [(f"{WRITE}{key}", 0) for key in keys]
    cases += [
        (rf"create _segments/.*-{kind}.parquet", n) for kind in ("objects", "statistics") for n in (0, 1, 2)
    ]
    cases += [(f"swap {re.escape(key)}", n) for key, times in swaps.items() for n in range(1, times)]
    came = [
        check_case(recorded, nursery, undisturbed, str(tmp_path / str(i)), pattern, when, n)
        for i, (pattern, n) in enumerate(cases)
    ]
    assert all(came[: len(keys)])
    # which zarr.json a version changes, and so how often it is written, depends on which block ends first
    assert sum(came) > 100


def test_a_harvest_killed_again_and_again_ends_as_an_undisturbed_one(
    recorded, nursery, undisturbed, tmp_path
):
    """Each run gets one create further than the one before, until one gets through."""
    files, whole = undisturbed
    url, deaths = str(tmp_path / "dataset"), 0
    while (status := nursery.harvest(url, "create .*", "after", 4 * deaths, **EXTENT)) != 0:
        assert status == -9
        check_what_is_visible(url, whole)
        deaths += 1
        assert deaths < 60
    recorded.harvest(open_store(url), recorded.asking(**EXTENT))
    assert deaths >= 3
    assert stored(url) == files


def test_two_processes_of_one_spec_killed_and_finished_make_one_dataset(
    recorded, nursery, undisturbed, tmp_path
):
    """One more site and more tokens at once: an extension of either kind dies, the other finishes."""
    files, whole = undisturbed
    url = str(tmp_path / "dataset")
    assert (
        nursery.harvest(url, "create _records/train/00000001.*", "before", **EXTENT | {"sites": SITES[:1]})
        == -9
    )
    assert nursery.harvest(url, WRITE + "zarr.json", "before", **EXTENT | {"n_tokens": 1024}) == -9
    check_what_is_visible(url, whole)
    recorded.harvest(open_store(url), recorded.asking(**EXTENT))
    check_what_is_visible(url, whole)
    shards = {key: data for key, data in stored(url).items() if not key.startswith("_records/")}
    assert shards == {key: data for key, data in files.items() if not key.startswith("_records/")}


@pytest.mark.parametrize("killed", [False, True])
def test_processes_that_extend_one_dataset_at_once_make_the_same_one(
    recorded, nursery, undisturbed, tmp_path, killed
):
    """One wants more sites, one more tokens, one both; all are told that they have what they asked for."""
    files, whole = undisturbed
    runs = [
        {"extent": EXTENT | {"sites": SITES[:1]}},
        {"extent": EXTENT | {"n_tokens": 1024}},
        {"extent": EXTENT},
    ]
    if killed:
        runs.append({"extent": EXTENT, "pattern": "create .*", "when": "after", "n": 35})
    for i in range(2):
        url = str(tmp_path / str(i))
        assert nursery.harvest_together(url, runs) in ([0, 0, 0], [0, 0, 0, -9], [0, 0, 0, 0])
        check_what_is_visible(url, whole)
        manifest = actcache.open(url).manifest
        assert manifest.complete
        assert manifest.wanted == {site: {"train": 2, "validation": 1, "test": 0} for site in SITES}
        shards = {key: data for key, data in stored(url).items() if not key.startswith("_records/")}
        assert shards == {key: data for key, data in files.items() if not key.startswith("_records/")}
