"""A harvest to an S3-compatible server over HTTP, and reading it back."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "actcache"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """storage_options of a fresh server on 127.0.0.1, in an environment of its own (its pins clash with s3fs)."""
    venv = tmp_path_factory.mktemp("server") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin" / "python", "-m", "pip", "install", "-q", "ministack==1.5.33"], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3"}
    log = open(venv.parent / "log", "wb")  # noqa: SIM115 - closed below
    server = subprocess.Popen([venv / "bin" / "ministack"], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (venv.parent / "log").read_text()
            time.sleep(0.05)
        options = {"key": "key", "secret": "secret", "endpoint_url": f"http://127.0.0.1:{port}"}
        import s3fs

        s3fs.S3FileSystem(**options).mkdir("bucket")
        yield options
    finally:
        server.terminate()
        server.wait(timeout=10)
        log.close()


def test_create_is_exclusive_on_s3(s3):
    from actcache.errors import Conflict
    from actcache.store import open_store

    store = open_store("s3://bucket/exclusive", s3)
    assert store.create("a/b", b"one")
    assert not store.create("a/b", b"one")
    with pytest.raises(Conflict, match="other content"):
        store.create("a/b", b"two")
    assert store.read("a/b") == b"one"
    assert store.read("a/b", 1, 2) == b"n"
    listed = store.listing("a")
    assert [o.key for o in listed] == ["a/b"]
    assert abs(listed[0].modified_s - time.time()) < 60
    with pytest.raises(FileNotFoundError):
        store.read("a/absent")


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
    ours = [b.token_id for b in remote.stream(SITES[0], batch_size=500)]
    theirs = [b.token_id for b in local.stream(SITES[0], batch_size=500)]
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
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
    acts = group["codes"][:] * group["scale"][:][:, None] + group["offset"][:]
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
