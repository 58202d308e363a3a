"""The disk cache: within its limit, right whatever happens to its files, shared by processes that may die."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_harvest import SITES

import actcache
from actcache.cache import Cache, CachedStore
from actcache.errors import CorruptObject, SpecError
from actcache.shard import shard_key
from actcache.store import LocalStore


class Counting(LocalStore):
    """A local store that notes its reads."""

    def __init__(self, root):
        super().__init__(root)
        self.reads = []

    def read(self, key, start=0, stop=None):
        self.reads.append((key, start, stop))
        return super().read(key, start, stop)


@pytest.fixture
def counted(tmp_path):
    store = Counting(tmp_path / "store")
    for shard in range(3):
        store.create(f"train/x/c/{shard}", bytes(range(200)))
    store.create("zarr.json", b"{}")
    return CachedStore(store, Cache(tmp_path / "cache", 10_000)), store


def test_a_range_is_fetched_once_and_parts_of_it_never(counted):
    cached, store = counted
    for start, stop in [(10, 60), (10, 60), (20, 30), (10, 11), (59, 60)]:
        assert cached.read("train/x/c/0", start, stop) == bytes(range(start, stop))
    assert store.reads == [("train/x/c/0", 10, 60)]
    cached.read("train/x/c/0", 59, 61)
    cached.read("train/x/c/1", 10, 60)
    assert len(store.reads) == 3


def test_parts_that_are_kept_are_not_asked_for(counted):
    """A store that gives several parts at once is asked for those that are missing; what did not come is None."""
    cached, store = counted
    asked = []

    def read_parts(parts):
        asked.append(list(parts))
        return [None if key.endswith("/2") else store.read(key, start, stop) for key, start, stop in parts]

    store.read_parts = read_parts
    parts = [("train/x/c/0", 10, 60), ("train/x/c/1", 0, 5), ("train/x/c/2", 0, 5)]
    cached.read(*parts[0])
    wanted = [bytes(range(10, 60)), bytes(range(5)), None]
    assert cached.read_parts(parts) == wanted
    assert cached.read_parts(parts) == wanted
    assert asked == [parts[1:], parts[2:]]


def test_reading_again_goes_to_the_store_and_drops_what_was_kept(counted):
    cached, store = counted
    cached.read("train/x/c/0", 10, 60)
    assert cached.read_again("train/x/c/0", 20, 30) == bytes(range(20, 30))
    assert store.reads == [("train/x/c/0", 10, 60), ("train/x/c/0", 20, 30)]
    assert [path.name for path in cached.cache.directory.rglob("*-*")] == ["20-30"]


def test_what_may_change_is_never_cached(counted):
    cached, store = counted
    for _ in range(2):
        assert cached.read("zarr.json") == b"{}"
        assert cached.exists("train/x/c/2")
    assert len(store.reads) == 4
    with pytest.raises(FileNotFoundError):
        cached.read("train/x/c/9", 0, 5)
    store.create("train/x/c/9", b"later")
    assert cached.read("train/x/c/9", 0, 5) == b"later"


def test_a_short_read_is_not_kept(counted):
    cached, store = counted
    for _ in range(2):
        assert cached.read("train/x/c/0", 190, 250) == bytes(range(190, 200))
    assert len(store.reads) == 2


@given(
    entries=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 400)), min_size=1, max_size=40),
    limit=st.integers(50, 1200),
)
@settings(max_examples=40, deadline=None)
def test_files_never_exceed_the_limit(tmp_path_factory, entries, limit):
    cache = Cache(tmp_path_factory.mktemp("cache"), limit)
    for name, size in entries:
        data = random.Random(size).randbytes(size)
        cache.put(f"object-{name}", 0, size, data)
        assert cache.size_bytes() <= limit
        if size + 4 <= limit:
            assert cache.get(f"object-{name}", 0, size) == data


def test_what_was_used_longest_ago_leaves_first(tmp_path):
    cache = Cache(tmp_path, 4 * 104)
    for i in range(4):
        cache.put(f"object-{i}", 0, 100, bytes(100))
        for path in tmp_path.rglob("0-100"):  # clocks of file systems may be coarse: set them apart
            age = os.stat(path).st_mtime_ns - 10**9
            os.utime(path, ns=(age, age))
    assert cache.get("object-0", 0, 100) is not None
    cache.put("object-4", 0, 100, bytes(100))
    held = [i for i in range(5) if cache.get(f"object-{i}", 0, 100) is not None]
    assert 0 in held
    assert 4 in held
    assert 1 not in held


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_entry_is_dropped_and_fetched_again(counted, damage, caplog):
    cached, store = counted
    cached.read("train/x/c/0", 10, 60)
    (path,) = cached.cache.directory.rglob("10-60")
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes({"flip": data, "truncate": data[:20], "empty": b""}[damage])
    for _ in range(2):
        assert cached.read("train/x/c/0", 10, 60) == bytes(range(10, 60))
    assert len(store.reads) == 2
    assert "damaged" in caplog.text


@pytest.fixture
def copy(tiny, tmp_path):
    shutil.copytree(tiny[0].url, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_second_pass_reads_the_cache_alone(copy, tmp_path):
    cache = tmp_path / "cache"
    first = actcache.open(copy, cache_dir=cache)
    rows = [b[SITES[0]] for b in first.stream(batch_size=500)]
    for shard in (copy / "train").rglob("c/*"):
        if shard.is_file():
            shard.unlink()
        elif (shard / "0").is_file():
            (shard / "0").unlink()
    again = actcache.open(copy, cache_dir=cache)
    ours = [b[SITES[0]] for b in again.stream(batch_size=500)]
    assert all(np.array_equal(a, b) for a, b in zip(rows, ours, strict=True))
    assert np.array_equal(again.read(SITES[0], [5]), first.read(SITES[0], [5]))
    with pytest.raises(CorruptObject, match="missing"):
        list(actcache.open(copy).stream(batch_size=500))


def test_a_damaged_transfer_that_was_cached_is_fetched_again(copy, tmp_path):
    key = shard_key(f"train/{SITES[0]}/codes", 0, 2)
    good = (copy / key).read_bytes()
    (copy / key).write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    dataset = actcache.open(copy, cache_dir=tmp_path / "cache")
    with pytest.raises(CorruptObject, match="crc32c"):
        dataset.read(SITES[0], slice(0, 500))
    (copy / key).write_bytes(good)
    assert np.array_equal(
        dataset.read(SITES[0], slice(0, 500)), actcache.open(copy).read(SITES[0], slice(0, 500))
    )


def test_a_cache_that_cannot_be_written_costs_speed_alone(counted, caplog):
    cached, store = counted
    cached.cache.directory.write_bytes(b"a file is in the way")
    for _ in range(2):
        assert cached.read("train/x/c/0", 10, 60) == bytes(range(10, 60))
    assert len(store.reads) == 2
    assert caplog.text.count("cannot be written") == 1
    with pytest.raises(SpecError, match="cache_bytes"):
        Cache("x", 0)


WRITER = """
import random, sys
from actcache.cache import Cache
cache = Cache(sys.argv[1], int(sys.argv[2]))
chance = random.Random(int(sys.argv[3]))
print("begun", flush=True)
for _ in range(int(sys.argv[4])):
    number = chance.randrange(40)
    size = 500 + number
    data = random.Random(number).randbytes(size)
    found = cache.get(f"object-{number}", 0, size)
    assert found is None or found == data, number
    if found is None:
        cache.put(f"object-{number}", 0, size, data)
    if _ % 20 == 0:
        with cache._lock() as held:  # else files come and go while they are counted
            assert held is None or cache.size_bytes() <= cache.limit_bytes
"""


def writer(directory, limit, seed, rounds):
    command = [sys.executable, "-c", WRITER, str(directory), str(limit), str(seed), str(rounds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n", process.stderr.read()
    return process


def test_processes_that_are_killed_leave_a_cache_that_others_go_on_with(tmp_path):
    """Four writers die by SIGKILL wherever they are, while two others run to their end."""
    limit = 8_000
    staying = [writer(tmp_path, limit, seed, 600) for seed in (1, 2)]
    chance = random.Random(0)
    for process in [writer(tmp_path, limit, seed, 10**9) for seed in range(10, 14)]:
        time.sleep(chance.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
    for process in staying:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    cache = Cache(tmp_path, limit)
    assert 0 < cache.size_bytes() <= limit
    for number in range(40):
        data = random.Random(number).randbytes(500 + number)
        cache.put(f"object-{number}", 0, 500 + number, data)
        assert cache.get(f"object-{number}", 0, 500 + number) == data
        assert cache.size_bytes() <= limit
    cache._evict(limit)
    assert not list(tmp_path.rglob(".tmp-*"))


STOPPED = """
import os, signal, sys
from actcache.cache import Cache
with Cache(sys.argv[1])._lock():
    print("holds it", flush=True)
    signal.pause()
"""


def test_a_stopped_holder_of_the_lock_does_not_hold_up_reading(counted):
    cached, store = counted
    command = [sys.executable, "-c", STOPPED, str(cached.cache.directory)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "holds it\n"
        assert cached.read("train/x/c/0", 10, 60) == bytes(range(10, 60))
        assert cached.cache.size_bytes() == 0
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    cached.read("train/x/c/0", 10, 60)
    cached.read("train/x/c/0", 10, 60)
    assert len(store.reads) == 2
