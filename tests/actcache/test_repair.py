"""A damaged shard is replaced only while it is the damaged shard."""

import numpy as np
import pytest
from hooked_store import HookedStore

from actcache.commit import create_shard
from actcache.shard import encode_shard
from actcache.store import open_store

ARRAY = {"chunk_rows": 4, "shard_rows": 8, "fill": 0, "by_column": False}
OURS, THEIRS = np.arange(8, dtype=np.uint32), np.arange(8, 16, dtype=np.uint32)


@pytest.fixture
def torn(tmp_path):
    """A store with half a shard in it."""
    store = open_store(str(tmp_path))
    store.create("a/c/0", encode_shard(OURS, 4, 8, 0)[0][:20])
    return store


def test_a_torn_shard_is_replaced(torn):
    stored = create_shard(torn, "a", 0, OURS, ARRAY)
    assert torn.read("a/c/0") == stored.data
    assert np.array_equal(stored.rows, OURS)
    assert stored.ours


def test_a_shard_that_another_writer_repaired_first_is_adopted(torn):
    theirs = encode_shard(THEIRS, 4, 8, 0)[0]

    def before(verb, key):
        if verb == "swap":
            torn.delete(key)
            torn.create(key, theirs)

    stored = create_shard(HookedStore(torn, before), "a", 0, OURS, ARRAY)
    assert stored.data == theirs == torn.read("a/c/0")
    assert np.array_equal(stored.rows, THEIRS)
    assert not stored.ours
