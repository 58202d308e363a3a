"""`zarr.json` never shrinks: whenever a driver is overtaken, and even if it dies there."""

import itertools

import pytest
from hooked_store import HookedStore
from replayed import Recorded
from watched import DictStore

from actcache.layout import zarr_metadata
from actcache.manifest import manifest_key, read_manifest
from actcache.metadata import write_metadata
from actcache.store import open_store


class Died(Exception):
    """The driver ends here."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """All objects of a dataset but its `zarr.json`, as of version 2 and of version 4 (more rows, one more site)."""
    recorded = Recorded(tmp_path_factory.mktemp("races"))
    store = open_store(str(tmp_path_factory.mktemp("dataset")))
    found = []
    for resolved in (recorded.asking(n_tokens=1024, sites=recorded.spec.sites[:1]), recorded.resolved):
        recorded.harvest(store, resolved)
        keys = [o.key for folder in store.folders() for o in store.listing(folder)] + ["_identity.json"]
        found.append({key: store.read(key) for key in keys if not key.endswith("zarr.json")})
    assert manifest_key(4) in found[1].keys() - found[0].keys()  # two a run: blocks, then losses
    return found


@pytest.mark.parametrize("dies", ["at once", "before it looks for a newer version"])
def test_a_driver_that_is_overtaken_anywhere_never_shrinks_the_metadata(versions, dies):
    older, newer = versions
    for overtaken_at in itertools.count():
        store = DictStore(dict(older))
        operations = itertools.count()

        def before(verb, key, store=store, operations=operations, overtaken_at=overtaken_at):
            operation = next(operations)
            if operation == overtaken_at:
                for newer_key, data in newer.items():
                    store.create(newer_key, data)
                write_metadata(store, set())
            elif operation > overtaken_at and (dies == "at once" or verb == "listing"):
                raise Died

        try:
            write_metadata(HookedStore(store, before), set())
        except Died:
            pass
        else:
            if read_manifest(store).version == 2:  # it was done before it could be overtaken
                break
        wanted = zarr_metadata(read_manifest(store))
        assert {key: store.read(key) for key in wanted} == wanted, overtaken_at
    assert overtaken_at > 2 * len(zarr_metadata(read_manifest(store)))  # each key is read and swapped


def test_an_overtaken_driver_that_lives_on_writes_the_newer_version(versions):
    older, newer = versions
    store = DictStore(dict(older))
    swaps = itertools.count()

    def before(verb, key):
        if verb == "swap" and next(swaps) == 3:
            for newer_key, data in newer.items():
                store.create(newer_key, data)

    write_metadata(HookedStore(store, before), set())
    wanted = zarr_metadata(read_manifest(store, 4))
    assert {key: store.read(key) for key in wanted} == wanted
