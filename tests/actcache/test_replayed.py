"""The replayed harvest is the real one, LM aside."""

import numpy as np
from tiny_harvest import SITES

import actcache
from actcache.store import open_store


def test_a_replayed_harvest_stores_what_a_real_one_does(recorded, tmp_path):
    real = actcache.harvest(recorded.spec, str(tmp_path / "root"), lm_batch=8, progress=False)
    store = open_store(str(tmp_path / "replayed"))
    recorded.harvest(store, recorded.asking(n_tokens=1024, sites=SITES[:1]))
    recorded.harvest(store)
    replayed = actcache.open(store.url)
    assert replayed.id == real.id
    for site in SITES:
        assert np.array_equal(replayed.read(site, slice(None)), real.read(site, slice(None)))
