"""A harvest to an S3-compatible server over HTTP, and reading it back."""

import contextlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from actcache.errors import Conflict, StoreError
from actcache.store import open_store

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "actcache"))

pytestmark = pytest.mark.slow


def test_create_is_exclusive_on_s3(s3):
    store = open_store("s3://bucket/exclusive", s3)
    assert store.create("a/b", b"one")
    assert not store.create("a/b", b"one")
    with pytest.raises(Conflict, match="other content"):
        store.create("a/b", b"two")
    assert store.read("a/b") == b"one"
    listed = store.listing("a")
    assert [o.key for o in listed] == ["a/b"]
    assert abs(listed[0].modified_s - time.time()) < 60
    with pytest.raises(FileNotFoundError):
        store.read("a/absent")


def test_ranges_on_s3_are_those_of_a_file(s3, tmp_path):
    stores = [open_store("s3://bucket/ranges", s3), open_store(str(tmp_path))]
    for store in stores:
        store.create("ten", b"0123456789")
        store.create("empty", b"")
        assert store.exists("empty")
    for key in ("ten", "empty"):
        for start, stop in (
            (0, None),
            (0, 3),
            (3, 3),
            (3, 7),
            (7, None),
            (7, 99),
            (10, 12),
            (10, None),
            (50, 60),
        ):
            remote, local = (store.read(key, start, stop) for store in stores)
            assert remote == local, (key, start, stop)


def test_parts_are_asked_for_together_and_what_did_not_come_is_none(s3):
    store = open_store("s3://bucket/parts", s3)
    for n in range(3):
        store.create(f"object-{n}", bytes(range(n, n + 100)))
    parts = [(f"object-{n}", start, start + 10) for n in range(3) for start in (0, 50, 85)]
    wanted = [bytes(range(n + start, n + start + 10)) for n in range(3) for start in (0, 50, 85)]
    assert store.read_parts(parts) == wanted
    assert store.read_parts([("object-0", 95, 120)]) == [bytes(range(95, 100))]
    assert store.read_parts([parts[0], ("absent", 0, 10), parts[1], ("object-0", 100, 110)]) == [
        wanted[0],
        None,
        wanted[1],
        None,
    ]
    assert store.read_parts([]) == []


def test_one_of_many_writers_wins_on_s3(s3):
    """Eight threads with clients of their own: creating, then swapping."""
    stores = [open_store("s3://bucket/contested", s3) for _ in range(8)]
    barrier = threading.Barrier(8)

    def write(i):
        barrier.wait()
        with contextlib.suppress(Conflict):
            return stores[i].create("key", b"created by %d" % i)
        return False

    def swap(i):
        barrier.wait()
        return stores[i].swap("key", created, b"swapped by %d" % i)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
        created = stores[0].read("key")
        assert [i for i in range(8) if won[i]] == [int(created.split()[-1])]
        won = list(pool.map(swap, range(8)))
    assert [i for i in range(8) if won[i]] == [int(stores[0].read("key").split()[-1])]


def test_swap_on_s3_replaces_only_what_is_expected(s3):
    store = open_store("s3://bucket/swap", s3)
    assert store.swap("k", None, b"1")
    assert not store.swap("k", None, b"2")
    assert store.swap("k", b"1", b"2")
    assert not store.swap("k", b"1", b"3")
    assert store.swap("k", b"1", b"2")  # it is there: a lost reply is met like this
    assert not store.swap("absent", b"1", b"2")
    assert store.read("k") == b"2"


def test_objects_that_are_uploaded_in_parts_are_exclusive_and_swapped_too(s3):
    store = open_store("s3://bucket/parts", s3)
    data = bytes(101 * 2**20)
    assert store.create("large", data)
    assert not store.create("large", data)
    with pytest.raises(Conflict):
        store.create("large", data[:-1] + b"x")
    assert store.swap("large", data, data[:-1] + b"x")
    assert store.read("large", len(data) - 2) == b"\0x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"endpoint_url": "nonsense"}, "Invalid endpoint: nonsense"),
        ({"endpoint_url": "http://nowhere.invalid"}, "Check endpoint_url"),
        ({"endpoint_url": "http://127.0.0.1:1", "actcache_retry": {"deadline_s": 0.3}}, "gave up after"),
        ({"profile": "no-such-profile"}, "no-such-profile"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
)
def test_a_store_that_cannot_be_reached_is_one_line(s3, change, message):
    with pytest.raises(StoreError) as failed:
        open_store("s3://bucket/x", s3 | change).listing("y")
    assert message in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_missing_bucket_is_one_line_whatever_is_asked(s3):
    store = open_store("s3://no-such-bucket/x", s3)
    for verb in (
        lambda: store.create("k", b"1"),
        lambda: store.read("k"),
        lambda: store.swap("k", b"1", b"2"),
        lambda: store.swap("k", None, b"2"),
        lambda: store.listing("k"),
        lambda: store.folders(),
    ):
        with pytest.raises(StoreError, match=r"no-such-bucket/x.*bucket does not exist.*[Bb]ucket"):
            verb()


@pytest.mark.parametrize("wrong", [{"secret": "wrong-secret-987"}, {"key": "unknown-key-987"}])
def test_a_wrong_secret_is_refused_in_one_line_without_it(signed_s3, wrong):
    command = [sys.executable, "-m", "actcache", "ls", "s3://bucket/acts"]
    options = [f"--storage-option={k}={v}" for k, v in (signed_s3 | wrong).items()]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "Check the access key, secret and token" in line
    assert "s3://bucket/acts" in line
    for secret in (signed_s3["secret"], *wrong.values()):
        assert secret not in line


def test_signatures_that_a_server_verifies_are_right(signed_s3):
    """rclone ignores conditions, and states the whole object's checksum for a range, which botocore refuses."""
    config = {"response_checksum_validation": "when_required"}
    store = open_store("s3://bucket/signed", signed_s3 | {"config_kwargs": config})
    assert store.create("a/b", b"0123456789")
    assert store.read("a/b") == b"0123456789"
    assert store.read("a/b", 2, 5) == b"234"
    assert [o.key for o in store.listing("a")] == ["a/b"]
    store.delete("a/b")
    assert not store.exists("a/b")


def test_harvest_to_s3_equals_the_harvest_to_disk(s3, tmp_path):
    from tiny_harvest import SITES, tiny_spec

    import actcache
    from actcache.verify import verify

    spec = tiny_spec(tmp_path)
    local = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    remote = actcache.harvest(spec, "s3://bucket/acts", storage_options=s3, progress=False)
    assert remote.id == local.id
    for site in SITES:
        assert np.array_equal(remote.read(site, slice(None)), local.read(site, slice(None)))
    ours, theirs = (d.stream(SITES[0], batch_size=500, epochs=2) for d in (remote, local))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.token_id, b.token_id)
        assert np.array_equal(a[SITES[0]], b[SITES[0]])
    assert verify(remote, deep=True, progress=False)["unreferenced objects"] == 0
    again = actcache.harvest(spec, "s3://bucket/acts", storage_options=s3, progress=False)
    assert again.manifest.version == remote.manifest.version
    entries = actcache.list_datasets("s3://bucket/acts", storage_options=s3)
    assert [e.name for e in entries] == [remote.url.split("/")[-1]]
    for path in Path(tmp_path / "root").rglob("*.json"):
        assert "secret" not in path.read_text()


def test_plain_zarr_reads_from_s3(s3, tmp_path):
    import zarr
    from tiny_harvest import SITES, tiny_spec

    import actcache

    remote = actcache.harvest(tiny_spec(tmp_path), "s3://bucket/plain", storage_options=s3, progress=False)
    group = zarr.open_group(remote.url, mode="r", storage_options=s3)["train"][SITES[0]]
    acts = group["codes"][:] * group["scale"][:][:, None] * group["channel"][:] + group["offset"][:]
    assert np.array_equal(acts, remote.read(SITES[0], slice(None)))


def test_verify_gc_and_rm_on_s3(s3, tmp_path):
    from tiny_harvest import tiny_spec

    import actcache
    from actcache.errors import BeingWritten, NotADataset
    from actcache.gc import collect_garbage, plan_removal, remove_dataset
    from actcache.store import open_store
    from actcache.verify import verify

    spec = tiny_spec(tmp_path)
    dataset = actcache.harvest(spec, "s3://bucket/removed", storage_options=s3, progress=False)
    assert actcache.find(spec, "s3://bucket/removed", s3).id == dataset.id
    verify(dataset, deep=True, replay=5, model=spec.model, progress=False)
    store = open_store(dataset.url, s3)
    store.create("train/token_id/c/99", b"of a dead writer")
    with pytest.raises(BeingWritten):
        collect_garbage(dataset.url, grace_s=3600, storage_options=s3, progress=False)
    done = collect_garbage(dataset.url, grace_s=0, storage_options=s3, progress=False)
    assert "train/token_id/c/99" in done["keys"]
    assert verify(actcache.open(dataset.url, storage_options=s3), progress=False)["unreferenced objects"] == 0
    remove_dataset(plan_removal(dataset.url, s3), progress=False)
    assert store.listing("") == []
    with pytest.raises(NotADataset):
        actcache.open(dataset.url, storage_options=s3)


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"ignored": ("if-none-match",)}, "ignores If-None-Match"),
        ({"ignored": ("if-match",)}, "ignores If-Match"),
        (
            {"choose": lambda method, target, nth: "unimplemented" if method == "PUT" and nth else None},
            "HTTP 501",
        ),
    ],
)
def test_a_harvest_to_a_store_without_conditions_ends_before_the_lm_is_loaded(
    s3, tmp_path, monkeypatch, server, said
):
    from fault_proxy import FaultProxy
    from tiny_harvest import tiny_spec

    import actcache
    from actcache import lm

    def load(*arguments, **options):
        raise AssertionError("the LM was loaded")

    monkeypatch.setattr(lm, "load_lm", load)
    port = int(s3["endpoint_url"].rpartition(":")[2])
    root = f"s3://bucket/{tmp_path.name}"
    with FaultProxy(port, **({"choose": lambda *_: None} | server)) as proxy:
        options = s3 | {"endpoint_url": f"http://127.0.0.1:{proxy.port}"}
        with pytest.raises(StoreError, match=f"{said}.*use a store that honours") as failed:
            actcache.harvest(tiny_spec(tmp_path), root, storage_options=options, progress=False)
    assert "\n" not in str(failed.value)
    assert open_store(root, s3).listing("") == []
