"""A copy of a dataset reads like the original, and no push harms what is where it goes."""

import shutil
from pathlib import Path

import hub_server
import numpy as np
import pytest
from tiny_harvest import SITES

import actcache
from actcache import hub, target
from actcache.errors import Conflict, CorruptObject, StoreError
from actcache.gc import collect_garbage
from actcache.spec import digest
from actcache.store import LocalStore, open_store
from actcache.verify import verify

SITE = SITES[0]


def objects(url):
    return {
        path.relative_to(url).as_posix(): path.read_bytes() for path in Path(url).rglob("*") if path.is_file()
    }


def versions(recorded, directory, **extents):
    """A directory with some extents, harvested one after the other; the dataset as it was after each."""
    found = []
    for extent in extents.values():
        recorded.harvest(open_store(str(directory)), recorded.asking(**extent))
        found.append(actcache.open(str(directory)))
    return found


def another_kernel(site, acts_TD):
    return acts_TD * (1 + 2e-3)


@pytest.fixture(scope="module")
def grown(recorded, tmp_path_factory):
    """One dataset with one site and 1,024 rows, with both sites, and with all rows."""
    few = {"n_tokens": 1024, "test_blocks": 0}
    directory = tmp_path_factory.mktemp("grown") / "data"
    return versions(recorded, directory, one=few | {"sites": SITES[:1]}, two=few, three={})


@pytest.fixture(scope="module")
def theirs(recorded, tmp_path_factory):
    """The same Spec by another kernel, further than `grown` at first: other bytes."""
    other = recorded.with_acts(another_kernel)
    return versions(other, tmp_path_factory.mktemp("theirs") / "data", all={})[0]


@pytest.mark.parametrize("scheme", ["memory", "directory"])
def test_a_pushed_dataset_reads_like_the_original(tiny, tmp_path, scheme):
    url = f"memory://hub-{tmp_path.name}/data" if scheme == "memory" else str(tmp_path / "copy")
    there = hub.push(tiny[0], url)
    for split in tiny[0].splits:
        for site in SITES:
            ours, theirs = (d.split(split).read(site, slice(None)) for d in (tiny[0], there))
            assert np.array_equal(ours, theirs)
    assert there.manifest == tiny[0].manifest
    back = hub.pull(url, str(tmp_path / "back"))
    assert np.array_equal(back.read(SITE, slice(None)), tiny[0].read(SITE, slice(None)))
    assert np.array_equal(back.context(3), tiny[0].context(3))
    for local in ("back",) if scheme == "memory" else ("back", "copy"):
        verify(actcache.open(str(tmp_path / local)), deep=True, progress=False)


def test_a_push_that_was_cut_off_goes_on_and_shows_nothing_before_its_end(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny[0].url, source)
    path = next(p for p in sorted((source / "train").rglob("codes/c/1/0")))
    data = path.read_bytes()
    path.unlink()
    target = str(tmp_path / "target")
    with pytest.raises(CorruptObject, match="missing"):
        hub.push(actcache.open(str(source)), target)
    with pytest.raises(FileNotFoundError, match="no committed"):
        actcache.open(target)
    path.write_bytes(data)
    there = hub.push(actcache.open(str(source)), target)
    assert np.array_equal(there.read(SITE, slice(None)), tiny[0].read(SITE, slice(None)))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "_identity.json").write_text("{}")
    with pytest.raises(Conflict, match="another dataset"):
        hub.push(tiny[0], str(tmp_path / "else"))


def test_a_dataset_goes_to_the_hub_in_a_few_commits_and_comes_back(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "_COMMIT_BYTES", 200_000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on loopback
    with hub_server.hub() as server:
        server.repos["lab/acts"] = {}
        options = {"endpoint": server.endpoint, "token": "hf_of_nobody", "skip_instance_cache": True}
        url = "hf://datasets/lab/acts/run"
        there = hub.push(tiny[0], url, storage_options=options)
        assert there.url == url
        assert np.array_equal(there.read(SITE, [5, 0, 900]), tiny[0].read(SITE, [5, 0, 900]))
        objects = sum(len(paths) for paths in server.commits)
        assert objects > 10 * len(server.commits) > 20
        last = {"run/README.md", "run/zarr.json", f"run/{tiny[0].manifest.key}"}
        assert last <= set(server.commits[-1])  # at once, so that nobody sees one without the other
        assert not any(last & set(paths) for paths in server.commits[:-1])
        before = len(server.commits)
        hub.push(tiny[0], url, storage_options=options)
        assert (
            sum(len(paths) for paths in server.commits[before:]) < 2 * objects / 3
        )  # what is there is passed over
        back = hub.pull(url, str(tmp_path / "back"), storage_options=options)
        assert np.array_equal(back.read(SITE, slice(None)), tiny[0].read(SITE, slice(None)))
        other = {**server.repos["lab/acts"], "run/_calibration/" + SITE + ".json": b"{}"}
        server.repos["lab/acts"] = dict(other)
        with pytest.raises(Conflict, match="choose an empty place"):
            hub.push(tiny[0], url, storage_options=options)
        assert server.repos["lab/acts"] == other
        with pytest.raises(StoreError, match="hf://datasets/lab/none.*then push again"):
            hub.push(tiny[0], "hf://datasets/lab/none", storage_options=options)


def test_the_card_has_a_header_and_the_figures_of_the_manifest(tiny):
    import yaml

    card = hub.dataset_card(tiny[0])
    _, header, body = card.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["size_categories"] == ["1K<n<10K"]
    assert "sparse-autoencoder" in fields["tags"]
    for site in SITES:
        stats = tiny[0].stats(site)
        assert f"| {site} | {tiny[0].d_in(site)} | {stats['mean_norm']:.4g} |" in body
    assert f"| train | {tiny[0].n_rows:,} |" in body


@pytest.mark.parametrize("way", ["push", "pull"])
def test_another_harvest_of_the_same_spec_is_refused_and_stays_as_it_is(grown, theirs, tmp_path, way):
    for ours in (grown[0], grown[2]):
        there = shutil.copytree(theirs.url, tmp_path / f"{way}-{ours.manifest.version}")
        before = objects(there)
        with pytest.raises(Conflict, match="not of one harvest|newer than|holds another"):
            hub.push(ours, str(there)) if way == "push" else hub.pull(ours.url, str(there))
        assert objects(there) == before
        assert np.array_equal(
            actcache.open(str(there)).read(SITE, slice(None)), theirs.read(SITE, slice(None))
        )


def test_a_newer_version_goes_on_top_of_an_older_one_which_stays_readable(grown, tmp_path):
    url = str(tmp_path / "copy")
    for dataset in grown:
        there = hub.push(dataset, url)
        assert there.manifest == dataset.manifest
    for dataset in grown:
        then = actcache.open(url, version=dataset.manifest.version)
        for site in dataset.sites:
            assert np.array_equal(then.read(site, slice(None)), dataset.read(site, slice(None)))
    card = (tmp_path / "copy" / "README.md").read_text()
    assert card == hub.dataset_card(grown[2])
    verify(actcache.open(url), deep=True, progress=False)
    with pytest.raises(Conflict, match="holds version 5, newer than version 2"):
        hub.push(grown[0], url)


def test_a_version_that_its_source_has_removed_since_is_known_by_its_objects(grown, tmp_path):
    source = shutil.copytree(grown[2].url, tmp_path / "source")
    url = str(tmp_path / "copy")
    hub.push(grown[1], url)
    collect_garbage(str(source), grace_s=0, keep=1, progress=False)
    newest = actcache.open(str(source))
    assert not (source / grown[1].manifest.key).exists()
    assert np.array_equal(hub.push(newest, url).read(SITE, slice(None)), newest.read(SITE, slice(None)))


def test_a_cut_off_push_goes_on_for_the_same_harvest_only_and_reads_no_shard_again(
    grown, theirs, tmp_path, monkeypatch
):
    there = Path(hub.push(grown[2], str(tmp_path / "there"), card=False).url)
    shutil.rmtree(there / "_manifest")
    for path in [*there.rglob("zarr.json"), there / "train" / SITE / "codes" / "c" / "2" / "0"]:
        path.unlink()
    cut = objects(there)
    with pytest.raises(Conflict, match="not of one harvest"):
        hub.push(theirs, str(there))
    assert objects(there) == cut
    with monkeypatch.context() as patch:
        keys = []
        read = LocalStore.read

        def noted(self, key, *part):
            keys.append(key) if self.url == str(there) else None
            return read(self, key, *part)

        patch.setattr(LocalStore, "read", noted)
        hub.push(grown[2], str(there), card=False)
    assert "_identity.json" in keys
    assert not [key for key in keys if "/codes/c/" in key]
    verify(actcache.open(str(there)), deep=True, progress=False)


def test_shards_that_a_harvest_may_have_left_are_compared_byte_by_byte(grown, tmp_path):
    there = shutil.copytree(
        grown[2].url, tmp_path / "there", ignore=shutil.ignore_patterns("_records", "zarr.json", "_manifest")
    )
    (tmp_path / "tokens" / f"x-{digest(grown[2].manifest.identity['tokens'])[:12]}").mkdir(parents=True)
    shard = there / "train" / SITE / "codes" / "c" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Conflict, match=f"{SITE}/codes/c/1/0 has other bytes"):
        hub.push(grown[2], str(there))
    assert shard.read_bytes() == data


@pytest.mark.parametrize(
    ("foreign", "why"),
    [
        ("_records/train/00000000-0123456789ab.json", "holds no version"),
        ("zarr.json", "holds no version"),
        ("train/zarr.json", "holds no version"),
    ],
)
def test_other_data_is_refused_before_anything_is_written(tiny, tmp_path, foreign, why):
    path = tmp_path / "there" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(Conflict, match=why):
        hub.push(tiny[0], str(tmp_path / "there"))
    assert objects(tmp_path / "there") == {foreign: b"{}"}


def test_a_copy_that_somebody_harvests_on_is_not_pushed_to(recorded, grown, tmp_path):
    url = str(tmp_path / "copy")
    hub.push(grown[1], url)
    shutil.copytree(Path(grown[2].url, "_records"), tmp_path / "copy" / "_records")
    with pytest.raises(Conflict, match="a harvest that goes on there"):
        hub.push(grown[2], url)


def test_a_card_of_a_persons_own_is_left_as_it_is(tiny, tmp_path, caplog):
    (tmp_path / "copy").mkdir()
    card = tmp_path / "copy" / "README.md"
    card.write_text("# Ours")
    hub.push(tiny[0], str(tmp_path / "copy"))
    assert card.read_text() == "# Ours"
    assert "was not written by a push" in caplog.text


def test_a_commit_that_comes_between_is_an_error_and_stays(tiny, monkeypatch):
    monkeypatch.setattr(target, "_COMMIT_BYTES", 200_000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server.hub() as server:
        server.repos["lab/acts"] = {}
        options = {"endpoint": server.endpoint, "token": "hf_of_nobody", "skip_instance_cache": True}
        server.before_commit = lambda n: server.put("lab/acts", {"zarr.json": b"theirs"}) if n == 2 else None
        with pytest.raises(StoreError, match="commit has happened since"):
            hub.push(tiny[0], "hf://datasets/lab/acts", storage_options=options)
        assert server.repos["lab/acts"]["zarr.json"] == b"theirs"
