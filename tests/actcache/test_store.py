"""Objects appear whole or not at all, exactly one writer wins, and keys cannot leave the prefix."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from actcache.errors import Conflict, StoreError
from actcache.store import open_store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    url = str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}"
    return open_store(url)


def test_create_then_read_whole_and_in_ranges(store):
    assert store.create("a/b/c.bin", b"0123456789")
    assert store.read("a/b/c.bin") == b"0123456789"
    assert store.read("a/b/c.bin", 2, 5) == b"234"
    assert store.read("a/b/c.bin", 7) == b"789"
    assert store.exists("a/b/c.bin")
    assert not store.exists("a/b/d.bin")
    with pytest.raises(FileNotFoundError):
        store.read("a/b/d.bin")


def test_create_again_with_the_same_bytes_is_quiet_and_with_others_is_a_conflict(store):
    assert store.create("k", b"one")
    assert not store.create("k", b"one")
    with pytest.raises(Conflict, match="other content"):
        store.create("k", b"two")
    assert store.read("k") == b"one"


def test_one_of_many_writers_wins(store):
    barrier = threading.Barrier(8)
    won, lost = [], []

    def write(i):
        barrier.wait()
        try:
            won.append(i) if store.create("contested", b"%d" % i) else None
        except Conflict:
            lost.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == 7
    assert store.read("contested") == b"%d" % won[0]


def together(n, work):
    """Run `work(i)` in n threads that start at once; returns the results, sorted."""
    barrier = threading.Barrier(n)

    def begin(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return sorted(pool.map(begin, range(n)))


def test_one_of_many_swaps_of_the_same_content_wins(store):
    store.create("contested", b"first")
    won = together(8, lambda i: store.swap("contested", b"first", b"%d" % i))
    assert won == [False] * 7 + [True]


def test_memory_does_not_trust_the_exclusive_create_of_fsspec(monkeypatch):
    """fsspec looks and then writes; with a pause between, its own create lets several win and ours one."""
    look = MemoryFileSystem.exists

    def look_slowly(self, path, **kwargs):
        found = look(self, path, **kwargs)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(MemoryFileSystem, "exists", look_slowly)

    def create_by_fsspec(i):
        try:
            MemoryFileSystem().pipe_file("/race/theirs", b"%d" % i, mode="create")
        except FileExistsError:
            return False
        return True

    def create_by_us(i):
        try:
            return open_store("memory://race").create("ours", b"%d" % i)
        except Conflict:
            return False

    assert sum(together(8, create_by_fsspec)) > 1
    assert sum(together(8, create_by_us)) == 1


def test_a_stopped_holder_of_the_lock_makes_a_swap_fail_rather_than_hang(tmp_path):
    store = open_store(str(tmp_path), {"actcache_retry": {"deadline_s": 0.2}})
    store.create("zarr.json", b"1")
    holder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="locked by another process: gave up after"):
            store.swap("zarr.json", b"1", b"2")
    finally:
        os.close(holder)
    assert store.read("zarr.json") == b"1"
    assert store.swap("zarr.json", b"1", b"2")


def test_listing_and_folders(store):
    for key in ("a/1", "a/2", "b/c/3", "ab"):
        store.create(key, b"x" * len(key))
    assert [(o.key, o.size_bytes) for o in store.listing("a")] == [("a/1", 3), ("a/2", 3)]
    assert store.listing("nothing") == []
    assert store.folders() == ["a", "b"]
    assert store.folders("b") == ["c"]
    assert store.sub("b").read("c/3") == b"xxxxx"
    assert [o.key for o in store.listing("")] == ["a/1", "a/2", "ab", "b/c/3"]


def test_listing_says_when_each_object_was_written(store):
    before = time.time()
    store.create("a/1", b"x")
    store.create("b/2", b"x")
    after = time.time()
    # a file system stamps with its own, coarser clock: up to one tick of the kernel early
    assert all(before - 0.1 <= o.modified_s <= after for o in store.listing(""))


def test_every_file_systems_name_for_the_time_is_read(tmp_path):
    store = open_store(f"memory://{tmp_path.name}")
    store.create("k", b"x")
    when = datetime(2024, 2, 29, 12, tzinfo=UTC)
    for info in (
        {"LastModified": when},
        {"last_modified": when.replace(tzinfo=None)},
        {"mtime": when.timestamp()},
        {"updated": "2024-02-29T12:00:00Z"},
    ):
        assert store._modified("unused", info) == when.timestamp()
    path = store._path("k")
    assert store._modified(path, {}) == store._fs.modified(path).timestamp()


def test_a_folder_that_appears_while_it_is_listed_is_no_object(tmp_path, monkeypatch):
    """s3fs, having found nothing, asks whether the prefix is an object, and by then it is a folder."""
    store = open_store(f"memory://{tmp_path.name}")
    folder = {"name": store._path("a"), "size": 0, "type": "directory"}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *args, **kwargs: {store._path("a"): folder})
    assert store.listing("a") == []


def test_leftovers_are_the_temporary_files_alone(tmp_path):
    store = open_store(str(tmp_path))
    store.create("a/1", b"x")
    (tmp_path / "a" / ".actcache-tmp-00").write_bytes(b"torn")
    assert [(o.key, o.size_bytes) for o in store.leftovers()] == [("a/.actcache-tmp-00", 4)]
    assert [o.key for o in store.listing("")] == ["a/1"]
    assert open_store(f"memory://{tmp_path.name}").leftovers() == []


def test_a_range_past_the_end_costs_no_memory(tmp_path):
    store = open_store(str(tmp_path))
    store.create("k", b"0123")
    tracemalloc.start()
    assert store.read("k", 1, 2**62) == b"123"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_swap_replaces_only_what_is_expected(store):
    assert store.swap("z/zarr.json", None, b"1")
    assert store.swap("z/zarr.json", b"1", b"2")
    assert not store.swap("z/zarr.json", b"1", b"3")
    assert not store.swap("z/zarr.json", None, b"3")
    assert store.swap("z/zarr.json", b"1", b"2")  # it is there: a lost reply is met like this
    assert store.read("z/zarr.json") == b"2"
    assert not store.swap("z/absent", b"1", b"2")
    assert not store.exists("z/absent")
    store.delete("z/zarr.json")
    store.delete("z/zarr.json")
    assert not store.exists("z/zarr.json")


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "", "a//b", "a/./b", "a\\..\\b", "a\0b"])
def test_keys_that_leave_the_prefix_are_refused(store, key):
    for verb in (
        store.read,
        lambda k: store.create(k, b""),
        lambda k: store.swap(k, None, b""),
        store.delete,
    ):
        with pytest.raises(StoreError, match="refused"):
            verb(key)


def test_a_writer_killed_midway_leaves_nothing_that_blocks_the_next(tmp_path):
    """The writer stops itself inside fsync, is killed there, and the key is still free."""
    code = f"""
import os, signal
from actcache import store
real = os.fsync
def stop(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = stop
store.open_store({str(tmp_path)!r}).create("block/0", b"x" * 1000)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    store = open_store(str(tmp_path))
    assert store.listing("block") == []
    assert len(os.listdir(tmp_path / "block")) == 1  # the temporary file, which nobody reads
    assert store.create("block/0", b"y" * 1000)
    assert store.read("block/0") == b"y" * 1000


def test_a_full_disk_is_one_clear_error_and_leaves_the_rest_intact(tmp_path):
    code = f"""
import resource, signal
from actcache import store, errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
s = store.open_store({str(tmp_path)!r})
s.create("small", b"x" * 500)
try:
    s.create("large", b"x" * 5000)
except errors.StoreError as err:
    print(err)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "large: File too large" in done.stdout
    store = open_store(str(tmp_path))
    assert store.read("small") == b"x" * 500
    assert [o.key for o in store.listing("large")] == []


def test_unknown_protocols_are_one_clear_error():
    with pytest.raises(StoreError, match="nonsense"):
        open_store("nonsense://bucket/x")


def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    store = open_store(str(tmp_path / "root"))
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="root is on a file system without hard links.*Use a local disk"):
        store.create("k", b"one")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_client_that_drops_conditions_writes_nothing(monkeypatch):
    """As s3fs 2024.10 and botocore 1.35.36 do: arguments that they do not know vanish."""
    from actcache import s3

    options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}
    store = open_store("s3://bucket/x", options | {"client_kwargs": {"region_name": "us-east-1"}})
    monkeypatch.setattr(s3, "_CONDITIONS", (*s3._CONDITIONS, ("PutObject", "IfMoon")))
    with pytest.raises(StoreError, match=r"s3fs 20.*know nothing of IfMoon of PutObject.*pip install -U"):
        store.create("k", b"one")
