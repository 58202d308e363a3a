"""A flipped bit, a missing or a truncated object is seen on reading, or by `verify --deep`, and named."""

import random
import shutil

import numpy as np
import pytest
from replayed import Recorded
from tiny_harvest import SITES

import actcache
from actcache.errors import ActcacheError, DamagedDataset
from actcache.store import open_store
from actcache.verify import verify

CHUNKED = (
    f"train/{SITES[0]}/codes/c/0/0",
    f"train/{SITES[1]}/scale/c/1",
    "train/token_id/c/2",
    "train/sequence/c/0",
    "train/position/c/0",
    "validation/input_ids/c/0/0",
    "train/length/c/0",
    "train/zarr.json",
    "zarr.json",
    f"train/{SITES[0]}/offset/c/0",
    "_identity.json",
)
WHOLE = ("_manifest", "_segments/objects", "_segments/statistics", "_segments/records", "_calibration")
"""Objects that a reader takes whole, before any row."""
LOOSE_RECORDS = ("_records",)
"""What readers need not, but a harvest reads."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("corruption") / "dataset"
    Recorded(tmp_path_factory.mktemp("recorded")).harvest(open_store(str(path)))
    *older, _ = sorted((path / "_manifest").glob("*.json"))
    for file in older:  # as gc leaves them: an older version would be read where the newest is missing
        file.unlink()
    return path


def key_of(dataset, kind):
    folder, _, part = kind.partition("/")
    if kind in WHOLE + LOOSE_RECORDS:
        found = sorted(p for p in (dataset / folder).rglob("*") if p.is_file() and part in p.name)
        return found[0].relative_to(dataset).as_posix()
    return kind


def read_everything(path):
    """What a training run and a look at the data would touch."""
    opened = actcache.open(str(path))
    for split in opened.splits:
        view = opened.split(split)
        for site in view.sites:
            view.read(site, slice(None))
            view.stats(site)
            view.sequence_activations(site, 0)
        view.rows(slice(None))
        view.sequences(slice(None))


def flips(size, seed, n):
    """The first bit, the last and n others by seed; every one where there are not many more."""
    bits = range(8 * size)
    return bits if len(bits) <= 4 * n else sorted({0, 8 * size - 1, *random.Random(seed).sample(bits, n)})


def seen(path, key, *, deep):
    """Whether reading (or verifying) says that this object is damaged."""
    try:
        verify(actcache.open(str(path)), deep=True, progress=False) if deep else read_everything(path)
    except DamagedDataset as err:
        return any(key in problem for problem in err.problems)
    except ActcacheError as err:
        return key in str(err)
    return False


@pytest.mark.parametrize("n", [3, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CHUNKED + WHOLE + LOOSE_RECORDS)
def test_every_flipped_bit_is_seen_and_names_its_object(dataset, kind, n):
    key = key_of(dataset, kind)
    file = dataset / key
    whole = file.read_bytes()
    try:
        for i, bit in enumerate(flips(len(whole), key, n)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            if kind in WHOLE:
                assert seen(dataset, key, deep=False), f"bit {bit} of {key} went unseen by a reader"
            if kind not in WHOLE or i % 10 == 0:
                assert seen(dataset, key, deep=True), f"bit {bit} of {key} went unseen by verify --deep"
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    "kind", [k for k in CHUNKED if "/c/" in k and "offset" not in k and "scale" not in k]
)
def test_a_flipped_bit_in_a_chunk_is_seen_by_the_reader_itself(dataset, kind):
    """No bit that a reader uses may pass: all but the shard's index, which it has from the manifest."""
    file = dataset / kind
    whole = file.read_bytes()
    tables = actcache.open(str(dataset)).split(kind.split("/")[0])._tables
    path, _, shard = kind.partition("/c/")
    end = int(tables[path].chunk_nbytes[int(shard.split("/")[0])].sum())
    assert end < len(whole)
    try:
        for bit in flips(end, kind, 8):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            assert seen(dataset, kind, deep=False), f"bit {bit} of {kind} went unseen"
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", CHUNKED + WHOLE)
@pytest.mark.parametrize(
    "cut",
    [
        "missing",
        "one byte short",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("empty", "half", "one byte long")),
    ],
)
def test_missing_and_truncated_objects_are_seen(dataset, kind, cut):
    key = key_of(dataset, kind)
    file = dataset / key
    whole = file.read_bytes()
    damaged = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "one byte long": whole + b"\0",
    }
    try:
        file.unlink()
        if cut in damaged:
            file.write_bytes(damaged[cut])
        if kind == "_manifest" and cut == "missing":
            assert seen(dataset, "no committed actcache dataset", deep=False)
        else:
            assert seen(dataset, key, deep=True)
        if kind in WHOLE:
            assert seen(
                dataset, key if cut != "missing" or kind != "_manifest" else "no committed", deep=False
            )
    finally:
        file.write_bytes(whole)


def test_a_newest_version_that_is_damaged_leaves_the_older_ones_readable(tmp_path):
    recorded = Recorded(tmp_path / "recorded")
    store = open_store(str(tmp_path / "dataset"))
    recorded.harvest(store, recorded.asking(n_tokens=1024))
    recorded.harvest(store)
    rows = actcache.open(store.url, version=1).read(SITES[0], slice(None))
    file = max((tmp_path / "dataset" / "_manifest").glob("*.json"))
    file.write_bytes(file.read_bytes()[:-5])
    assert seen(tmp_path / "dataset", f"_manifest/{file.name}", deep=False)
    assert np.array_equal(actcache.open(store.url, version=1).read(SITES[0], slice(None)), rows)


def test_the_sample_itself_is_of_a_whole_dataset(dataset, tmp_path):
    """The tests above can fail: nothing is seen where nothing is wrong."""
    shutil.copytree(dataset, tmp_path / "copy")
    for kind in CHUNKED + WHOLE:
        assert (tmp_path / "copy" / key_of(dataset, kind)).is_file()
    read_everything(tmp_path / "copy")
    verify(actcache.open(str(tmp_path / "copy")), deep=True, progress=False)
