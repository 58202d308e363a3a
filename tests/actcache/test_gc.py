"""Only what nobody needs is removed, and a removal that is cut off anywhere leaves a correct dataset."""

import contextlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import actcache_here
from tiny_harvest import SITES
from watched import Watched

import actcache
from actcache import gc
from actcache.errors import ActcacheError, BeingWritten, CorruptObject, NotADataset
from actcache.gc import collect_garbage, plan_removal, remove_dataset
from actcache.lease import FOLDER, Lease
from actcache.manifest import read_records
from actcache.store import LocalStore, open_store
from actcache.verify import verify

DAY_S = 86_400


@pytest.fixture(scope="module")
def littered(recorded, tmp_path_factory):
    """Four versions (the first run commits blocks, then losses), with what dead writers left: a shard, a segment, a calibration, a temporary file."""
    path = tmp_path_factory.mktemp("littered") / "name-0123456789ab"
    store = open_store(str(path))
    for n_tokens in (1024, 2048, 3000):
        recorded.harvest(store, recorded.asking(n_tokens=n_tokens))
    for key in LITTER:
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(b"litter")
    return path


LITTER = (
    "train/token_id/c/77",
    f"train/{SITES[0]}/codes/c/77/0",
    "train/blocks.0.attn.hook_z/codes/c/0/0",
    f"_segments/{'0' * 16}-objects.parquet",
    "_calibration/blocks.0.attn.hook_z.json",
    f"_calibration/{SITES[0]}-0123456789abcdef.rotation",
    "train/.actcache-tmp-00",
)


@pytest.fixture
def copy(littered, tmp_path):
    path = tmp_path / littered.name
    shutil.copytree(littered, path)
    return path


def age(path, days=2.0):
    """Every file as old as that, by the store's clock."""
    for file in Path(path).rglob("*"):
        os.utime(file, (time.time() - days * DAY_S,) * 2)


def files(path):
    return {p.relative_to(path).as_posix() for p in Path(path).rglob("*") if p.is_file()}


def rows_of(path):
    dataset = actcache.open(str(path))
    return {
        (split, site): dataset.split(split).read(site, slice(None))
        for split in dataset.splits
        for site in dataset.sites
    }


def same_rows(path, wanted):
    found = rows_of(path)
    return found.keys() == wanted.keys() and all(np.array_equal(found[k], wanted[k]) for k in wanted)


def collect(path, **options):
    return collect_garbage(str(path), **({"grace_s": DAY_S, "progress": False} | options))


def test_removes_litter_old_versions_and_held_records_and_nothing_else(copy):
    age(copy)
    before, rows = files(copy), rows_of(copy)
    done = collect(copy, keep=1)
    records = {key for key in before if key.startswith("_records/")}
    manifests = {f"_manifest/0000000{v}.json" for v in (1, 2, 3)}
    assert before - files(copy) == {*LITTER, *records, *manifests}
    assert set(done["keys"]) == before - files(copy)
    assert same_rows(copy, rows)
    checked = verify(actcache.open(str(copy)), deep=True, progress=False)
    assert checked["unreferenced objects"] == checked["leftovers of killed writers"] == 0
    assert collect(copy)["keys"] == []


def test_a_dry_run_lists_the_same_and_removes_nothing(copy):
    age(copy)
    before = files(copy)
    planned = collect(copy, keep=2, dry_run=True)
    assert files(copy) == before
    done = collect(copy, keep=2)
    assert {**done, "dry_run": True} == planned
    assert before - files(copy) == set(planned["keys"])


def test_versions_younger_than_the_grace_are_kept(copy):
    age(copy)
    os.utime(copy / "_manifest/00000003.json")
    done = collect(copy, keep=1)
    assert [k for k in done["keys"] if k.startswith("_manifest/")] == [
        "_manifest/00000001.json",
        "_manifest/00000002.json",
    ]


@pytest.mark.parametrize("key", LITTER)
def test_a_young_unreferenced_object_means_that_somebody_writes(copy, key):
    age(copy)
    os.utime(copy / key)
    before = files(copy)
    with pytest.raises(BeingWritten, match="seems to be written"):
        collect(copy)
    assert files(copy) == before


def test_loose_records_and_what_they_name_are_never_removed(recorded, tmp_path):
    store = open_store(str(tmp_path))
    recorded.harvest(store, recorded.asking(n_tokens=1024, sites=SITES[:1]))
    harvester = recorded.harvester_on(store, recorded.resolved)
    harvester.calibrate()
    harvester.run_block("train", 1, SITES)
    with pytest.raises(BeingWritten):
        collect(tmp_path)
    age(tmp_path)
    held = {r.key for r in read_records(store) if r.block == 0}
    done = collect(tmp_path)
    assert set(done["keys"]) <= held
    loose = [r for r in read_records(store) if r.block == 1]
    assert len(loose) == 1
    assert all(store.listing(o.path) for o in loose[0].objects)
    recorded.harvest(store)
    verify(actcache.open(str(tmp_path)), deep=True, progress=False)


def test_ages_are_by_the_stores_clock(copy, monkeypatch):
    """This machine's clock a week ahead: nothing young may look old."""
    age(copy)
    for key in LITTER:
        os.utime(copy / key)
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 7 * DAY_S)
    with pytest.raises(BeingWritten):
        collect(copy)


def test_foreign_files_are_reported_and_kept(copy):
    age(copy)
    foreign = (
        "notes.txt",
        "train/notes.txt",
        "_manifest/latest",
        "train/a/b/c/codes/c/0",
        "elsewhere/zarr.json",
    )
    for key in foreign:
        (copy / key).parent.mkdir(parents=True, exist_ok=True)
        (copy / key).write_text("mine")
        os.utime(copy / key, (0, 0))
    assert set(collect(copy)["unknown_keys"]) == set(foreign)
    remove_dataset(plan_removal(str(copy)), progress=False)
    assert files(copy) == set(foreign)


def test_a_reader_of_a_removed_version_is_told(copy):
    age(copy)
    pinned = actcache.open(str(copy), version=1)
    late = actcache.open(str(copy), version=3)
    late.read(SITES[0], 0)
    collect(copy, keep=1)
    with pytest.raises(NotADataset, match=r"has versions 4 to 4, wanted 1: `actcache gc` removed it"):
        actcache.open(str(copy), version=1)
    for file in (copy / "_segments").iterdir():
        file.unlink()  # as a compaction and a later gc would
    with pytest.raises(NotADataset, match="wanted 1"):
        pinned.read(SITES[0], 0)
    assert len(late.read(SITES[0], [1, 2])) == 2


class Dying(LocalStore):
    """A store whose process dies after so many deletes."""

    left = 0

    def delete(self, key):
        if key.startswith("_gc/"):
            return super().delete(key)
        if Dying.left == 0:
            raise KeyboardInterrupt
        Dying.left -= 1
        super().delete(key)


def dies(monkeypatch, deletes, work):
    """Run `work` with one thread in a process that dies after `deletes` deletes; False once it did not."""
    Dying.left = deletes
    with monkeypatch.context() as patched:
        patched.setattr(gc, "open_store", lambda url, options=None: Dying(Path(url)))
        patched.setattr(gc, "_THREADS", 1)
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False


def test_a_collection_killed_after_any_delete_leaves_a_correct_dataset(littered, tmp_path, monkeypatch):
    rows, n = rows_of(littered), 0
    while True:
        path = tmp_path / str(n)
        shutil.copytree(littered, path)
        age(path)
        died = dies(monkeypatch, n, lambda p=path: collect(p, keep=1))
        assert same_rows(path, rows)
        verify(actcache.open(str(path)), progress=False)
        if not died:
            break
        for version in range(1, 5):  # every version that is still there reads
            try:
                actcache.open(str(path), version=version).read(SITES[0], slice(None))
            except NotADataset:
                continue
        collect(path, keep=1)
        assert same_rows(path, rows)
        shutil.rmtree(path)
        n += 1
    assert n > len(LITTER) + 2


def test_what_appears_during_a_collection_stops_it(copy, recorded, monkeypatch):
    age(copy)
    store = open_store(str(copy))
    real = gc._plan

    def plan_then_commit(*arguments):
        plan = real(*arguments)
        recorded.harvester_on(store, recorded.resolved).run_block("test", 0, SITES[:1])
        for record in read_records(store):
            if record.key not in plan.records:
                return plan
        raise AssertionError("no new record")

    (copy / "_records/test").mkdir(exist_ok=True)
    monkeypatch.setattr(gc, "_plan", plan_then_commit)
    before = files(copy)
    with pytest.raises(BeingWritten, match="appeared since"):
        collect(copy)
    assert before <= files(copy)


def test_a_record_that_named_a_removed_object_meanwhile_is_an_error(copy, recorded, monkeypatch):
    """The last word: no removal of what a new record names stays unsaid."""
    age(copy)
    store = open_store(str(copy))
    record = next(read_records(store))
    named = replace(record.objects[0], path="train/token_id", shard=77)
    monkeypatch.setattr(gc, "_check_quiet", lambda *_: None)
    real = gc._delete

    def delete_then_commit(*arguments, **options):
        real(*arguments, **options)
        new = replace(record, block=77, objects=(named,))
        store.create(new.key, new.to_json())

    monkeypatch.setattr(gc, "_delete", delete_then_commit)
    with pytest.raises(CorruptObject, match="token_id/c/77, which it had removed"):
        collect(copy)


def hold(path, renewed_s_ago=0.0):
    """A lease of another host, as a harvest of the dataset keeps it; returns its file."""
    held = Path(path).parent / FOLDER / f"{Path(path).name}.json"
    held.parent.mkdir(exist_ok=True)
    held.write_text('{"host": "elsewhere", "pid": 7, "process": "b/n/1", "since": "2026-01-01 00:00:00Z"}')
    os.utime(held, (time.time() - renewed_s_ago,) * 2)
    return held


@pytest.mark.parametrize("remove", ["gc", "rm"])
def test_nothing_is_removed_while_a_lease_is_renewed_whatever_this_clock_says(copy, remove, monkeypatch):
    age(copy)
    before, held = files(copy), hold(copy)
    work = (
        (lambda: collect(copy, grace_s=0))
        if remove == "gc"
        else (lambda: remove_dataset(plan_removal(str(copy)), progress=False))
    )
    for skew in (-DAY_S, 0, DAY_S):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda real=time.time, skew=skew: real() + skew)
            with pytest.raises(BeingWritten, match="process 7 on elsewhere since"):
                work()
        assert files(copy) == before
        assert held.exists()
    os.utime(held, (time.time() - 61,) * 2)  # nobody has renewed it for a minute: the harvest has died
    work()
    assert len(files(copy)) < len(before)
    assert not held.exists()


def test_a_harvest_that_begins_during_a_collection_finds_the_lease_taken(copy, monkeypatch):
    age(copy)
    base, real, seen = open_store(str(copy.parent)), gc._delete, []

    def delete(*arguments, **options):
        with (
            pytest.raises(BeingWritten, match=f"process {os.getpid()} on"),
            Lease(base, copy.name, now_s=time.time()),
        ):
            raise AssertionError("the lease was free")
        seen.append(1)
        real(*arguments, **options)

    monkeypatch.setattr(gc, "_delete", delete)
    collect(copy, keep=1)
    assert seen
    assert not base.listing(FOLDER)


def test_a_writer_that_outlived_its_lease_stores_again_what_a_collection_took(recorded, tmp_path):
    """Its block lasted longer than lease and grace: its new calibration and every shard of it are gone."""
    path = tmp_path / "name"
    store = open_store(str(path))
    recorded.harvest(
        store, recorded.asking(n_tokens=1024, sites=SITES[:1], validation_blocks=0, test_blocks=0)
    )
    collected = []

    def collect_first(operation, key):
        if operation == "create" and key.startswith("_records/"):
            age(path)
            hold(path, renewed_s_ago=3600)
            collected.extend(collect(path, grace_s=1)["keys"])

    stalled = recorded.harvester_on(store, recorded.resolved)
    stalled.calibrate()
    stalled.store = Watched(store, collect_first)
    stalled.run_block("train", 1, SITES)
    assert f"_calibration/{SITES[1]}.json" in collected
    assert {f"train/{site}/codes/c/1/0" for site in SITES} <= set(collected)
    recorded.harvest(store)
    rows = rows_of(path)
    fresh = open_store(str(tmp_path / "fresh"))
    recorded.harvest(fresh)
    assert same_rows(fresh.url, rows)
    verify(actcache.open(str(path)), deep=True, progress=False)


def test_damage_stops_a_collection_before_anything_is_removed(copy):
    age(copy)
    (copy / "_segments").rename(copy / "moved")
    before = files(copy)
    with pytest.raises(CorruptObject):
        collect(copy)
    assert files(copy) == before


# Whole datasets


def test_a_removed_dataset_leaves_nothing(copy, recorded):
    removal = plan_removal(str(copy))
    assert removal.name == copy.name
    assert removal.n_rows["train"] == 3072
    assert removal.size_bytes == sum((copy / key).stat().st_size for key in files(copy))
    remove_dataset(removal, progress=False)
    assert not copy.exists()
    with pytest.raises(NotADataset):
        plan_removal(str(copy))


@pytest.mark.slow
def test_a_removal_killed_after_any_delete_reads_as_before_or_not_at_all_and_harvests_again(
    littered, recorded, tmp_path, monkeypatch
):
    rows = rows_of(littered)
    total = len(files(littered))
    for n in [*range(8), *range(8, total, 13), *range(total - 4, total)]:
        path = tmp_path / str(n)
        shutil.copytree(littered, path)
        assert dies(monkeypatch, n, lambda p=path: remove_dataset(gc.plan_removal(str(p)), progress=False))
        with contextlib.suppress(NotADataset):
            assert same_rows(path, rows)
        recorded.harvest(open_store(str(path)))
        assert same_rows(path, rows), n
        verify(actcache.open(str(path)), deep=True, progress=False)
        remove_dataset(plan_removal(str(path)), progress=False)
        assert not path.exists()


def test_only_datasets_are_removed(tmp_path, littered):
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    for url in (tmp_path, tmp_path / "absent", littered.parent):
        with pytest.raises(ActcacheError, match="no actcache dataset"):
            plan_removal(str(url))
    assert files(tmp_path) == {"photo.jpg"}


def test_the_command_lines(copy):
    age(copy)
    listed = actcache_here("gc", copy, "--dry-run", "--keep", 1)
    assert listed.returncode == 0, listed.stderr
    assert set(LITTER) <= set(listed.stdout.splitlines())
    assert listed.stdout.splitlines()[-1].startswith("would remove 3 manifest versions, ")
    refused = actcache_here("rm", copy)
    assert refused.returncode == 2
    assert "give --yes" in refused.stderr
    assert actcache_here("gc", copy, "--grace", "1 day").returncode == 2
    os.utime(copy / LITTER[0])
    held = hold(copy)
    for command in (("gc", copy), ("rm", copy, "--yes")):
        harvested = actcache_here(*command)
        assert harvested.returncode == 1
        assert harvested.stderr.startswith(f"error: {copy} is being written by process 7 on elsewhere")
    held.unlink()
    busy = actcache_here("gc", copy)
    assert busy.returncode == 1
    assert busy.stderr.startswith(f"error: {copy} seems to be written: {LITTER[0]}")
    gone = actcache_here("rm", copy, "--yes")
    assert gone.returncode == 0, gone.stderr
    assert not copy.exists()
