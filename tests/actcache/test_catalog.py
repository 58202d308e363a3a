"""What lies under a prefix is listed in few requests, damaged or not, and found by Spec."""

import json
import threading
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import pytest
from command_line import actcache_here
from tiny_harvest import SITES

import actcache
from actcache import catalog
from actcache.catalog import coverage, find, list_datasets
from actcache.errors import NotADataset
from actcache.manifest import commit_manifest, read_manifest
from actcache.spec import digest
from actcache.store import ObjectStore, open_store


class Counting(ObjectStore):
    """memory:// that counts its requests by verb."""

    requests: ClassVar[Counter[str]] = Counter()
    together: ClassVar[threading.Barrier | None] = None
    lock = threading.Lock()
    running = most = 0

    def counted(self, verb, *arguments):
        with Counting.lock:
            Counting.requests[verb] += 1
            Counting.running += 1
            Counting.most = max(Counting.most, Counting.running)
        try:
            if verb == "listing" and Counting.together:
                Counting.together.wait(timeout=60)
            return getattr(ObjectStore, verb)(self, *arguments)
        finally:
            with Counting.lock:
                Counting.running -= 1

    def read(self, *arguments):
        return self.counted("read", *arguments)

    def listing(self, *arguments):
        return self.counted("listing", *arguments)

    def folders(self, *arguments):
        return self.counted("folders", *arguments)

    def sub(self, name):
        return Counting(f"{self.url}/{name}", {})


@pytest.fixture
def counted(monkeypatch):
    Counting.requests = Counter()
    Counting.most = 0
    monkeypatch.setattr(catalog, "open_store", lambda url, options=None: Counting(url, {}))
    return Counting.requests


@pytest.fixture(scope="module")
def manifest(recorded):
    """A real one, with the figures that a finished harvest adds."""
    store = open_store("memory://catalog-template")
    recorded.harvest(store)
    found = read_manifest(store)
    splits = {split: {**size, "size_bytes": 1000} for split, size in found.splits.items()}
    fidelity = {site: {**f, "fvu_core": 9e-4 + i / 1e4} for i, (site, f) in enumerate(found.fidelity.items())}
    return replace(found, splits=splits, fidelity=fidelity)


def place(base, manifest, seed, **changes):
    """A dataset of another identity under `base`: its manifest alone."""
    identity = {**manifest.identity, "seed": seed}
    name = f"name-{digest(identity)[:12]}"
    commit_manifest(base.sub(name), replace(manifest, identity=identity, id=digest(identity), **changes))
    return name


def test_a_thousand_datasets_take_one_listing_and_two_requests_each(manifest, counted, tmp_path):
    base = open_store(f"memory://{tmp_path.name}")
    big = {
        split: {**size, "n_blocks": 10**6, "n_rows": 10**6 * manifest.identity["block_rows"]}
        for split, size in manifest.splits.items()
    }
    names = [place(base, manifest, seed, splits=big if seed % 2 else manifest.splits) for seed in range(1000)]
    entries = list_datasets(base.url)
    assert [e.name for e in entries] == sorted(names)
    assert counted == {"folders": 1, "listing": 1000, "read": 1000}
    assert Counting.most <= 16
    assert list_datasets(base.url) == entries


def test_requests_of_several_datasets_are_under_way_at_once(manifest, counted, tmp_path, monkeypatch):
    base = open_store(f"memory://{tmp_path.name}")
    names = [place(base, manifest, seed) for seed in range(8)]
    monkeypatch.setattr(Counting, "together", threading.Barrier(8))  # each listing waits for all the others
    assert len(list_datasets(base.url)) == len(names)


def test_folders_that_are_no_datasets_are_left_out_and_damaged_ones_named(manifest, counted, tmp_path):
    base = open_store(f"memory://{tmp_path.name}")
    good = place(base, manifest, 1)
    partial = place(base, manifest, 2, complete=False)
    for key in ("photos/a.jpg", "tokens/x/_manifest/00000001.json", "_hidden/a", "notes.txt", ".git/config"):
        base.create(key, b"{}")
    base.create("started-000000000000/_identity.json", b"{}")
    base.create("torn-000000000000/_manifest/00000001.json", b"{")
    base.create("newer-000000000000/_manifest/00000001.json", b'{"format":99}')
    found = {e.name: e for e in list_datasets(base.url)}
    assert found[good].state == "complete"
    assert found[partial].state == "partial"
    wanted = {"started": "nothing is committed yet", "torn": "not JSON", "newer": "Upgrade"}
    for name, reason in wanted.items():
        entry = found.pop(f"{name}-000000000000")
        assert entry.state == "unreadable"
        assert reason in entry.error
    assert set(found) == {good, partial}
    assert counted["listing"] + counted["read"] <= 2 * 6


def test_what_a_listing_says_comes_from_the_manifest_alone(manifest, tmp_path):
    base = open_store(f"memory://{tmp_path.name}")
    place(base, manifest, 1)
    (entry,) = list_datasets(base.url)
    summary = entry.summary()
    assert summary["size_bytes"] == 3000
    assert summary["sites"][SITES[0]]["fvu_core"] == manifest.fidelity[SITES[0]]["fvu_core"]
    assert summary["rows"]["train"] == manifest.splits["train"]["n_rows"]
    bare = replace(manifest, fidelity={}, splits={k: {n: v for n, v in s.items() if n != "size_bytes"} for k, s in manifest.splits.items()})  # fmt: skip
    summary = catalog.Entry("name", bare).summary()
    assert summary["size_bytes"] is None
    assert summary["sites"][SITES[0]] == {"fvu_core": None, "ce_change": None}


def test_find_reads_no_other_dataset(recorded, counted, tmp_path):
    root = str(tmp_path)
    assert find(recorded.spec, root) is None
    real = actcache.harvest(recorded.spec, root, progress=False)
    base = open_store(root)
    for i in range(20):
        base.create(f"other-{i:012x}/_manifest/00000001.json", b"damaged")
    found = find(recorded.spec, root)
    assert found.id == real.id
    assert found.url == real.url
    assert find(replace(recorded.spec, n_tokens=1, sites=SITES[:1]), root).id == real.id
    assert find(replace(recorded.spec, seed=7), root) is None


def test_find_says_how_much_of_the_extent_is_there(recorded, tmp_path, caplog):
    store = open_store(str(tmp_path / "dataset"))
    asked = recorded.asking(n_tokens=1024, sites=SITES[:1], test_blocks=0).spec
    recorded.harvest(store, recorded.asking(n_tokens=1024, sites=SITES[:1], test_blocks=0))
    part = read_manifest(store)
    assert coverage(part, asked, SITES[:1], {}) == (2, 2)
    assert coverage(part, recorded.spec, SITES, {}) == (2, 10)
    rows = {"train": 4000, "validation": 1, "test": 0}
    assert coverage(part, replace(recorded.spec, n_tokens=10**9), SITES, rows) == (2, 10)
    actcache.harvest(asked, str(tmp_path), progress=False)
    with caplog.at_level("INFO"):
        assert find(recorded.spec, str(tmp_path)) is not None
    assert "holds 2 of the 10 blocks asked for" in caplog.text


def test_the_command_line_lists_in_json_and_in_narrow_and_wide_terminals(manifest, tmp_path):
    base = open_store(str(tmp_path))
    name = place(base, manifest, 1)
    base.create("torn-000000000000/_manifest/00000001.json", b"{")
    piped = actcache_here("ls", tmp_path)
    assert piped.returncode == 0
    line = next(line for line in piped.stdout.splitlines() if name in line)
    for cell in (manifest.identity["model"]["id"], "complete", "2.9 KiB", "1.0e-03"):
        assert cell in line
    assert piped.stderr.startswith("unreadable: torn-000000000000: ")
    lines = [json.loads(x) for x in actcache_here("ls", tmp_path, "--json").stdout.splitlines()]
    assert [x["state"] for x in lines] == ["complete", "unreadable"]


def test_an_empty_prefix_is_said(tmp_path):
    with pytest.raises(NotADataset, match="nothing at"):
        list_datasets(str(tmp_path))
