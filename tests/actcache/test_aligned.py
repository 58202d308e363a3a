"""Aligned datasets serve the same tokens side by side, and resume at any world size."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_harvest import SITES

import actcache
from actcache.errors import SpecError
from actcache.filters import Where

SITE = SITES[0]


def places(batch):
    return batch.sequence.astype(np.int64) * 1000 + batch.position


@pytest.mark.parametrize(("flipped", "lanes"), [(False, 64), (True, 8), (True, 64)])  # 64 cuts within chunks
def test_aligned_datasets_serve_the_same_tokens_side_by_side(tiny, aligned, flipped, lanes):
    datasets = {"base": tiny[0], "chat": aligned}
    if flipped:
        datasets = dict(reversed(datasets.items()))
    both = actcache.zip(*datasets.values(), names=list(datasets))
    assert both.n_rows == aligned.n_rows < tiny[0].n_rows
    where_of = {int(p): i for i, p in enumerate(places(tiny[0].rows(slice(0, both.n_rows))))}
    seen = []
    sites = [f"base/{SITE}", f"chat/{SITE}"]
    stream = both.stream(sites, batch_size=150, lanes=lanes, epochs=2, seed=4)
    assert sorted(stream.sites) == sorted(sites)
    for batch in stream:
        index = [where_of[int(p)] for p in places(batch)]
        assert np.array_equal(batch[sites[0]], tiny[0].read(SITE, index))
        assert np.array_equal(batch[sites[1]], aligned.read(SITE, index))
        assert np.array_equal(batch[sites[1]], both.read(sites[1], index))
        seen += index
    assert sorted(seen) == sorted(2 * list(range(both.n_rows)))
    assert stream.stats(sites[1])["n_rows"] == aligned.n_rows


@given(stop=st.integers(0, 25), world_size=st.sampled_from([1, 2, 8]), where=st.booleans())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_aligned_streams_resume_at_any_world_size(tiny, aligned, stop, world_size, where):
    both = actcache.zip(tiny[0], aligned)
    condition = Where(not_token_ids=[3, 4, 5]) if where else None
    options = {"sites": [f"0/{SITE}", f"1/{SITE}"], "batch_size": 150, "lanes": 8, "epochs": 2}
    whole = list(both.stream(**options, where=condition))
    stream = both.stream(**options, where=condition)
    for _ in zip(range(stop), stream, strict=False):
        pass
    state = json.loads(json.dumps(stream.state()))
    rest = [
        list(both.stream(**options, where=condition, state=state, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    stop = state["epoch"] * -(-both.n_rows // 150) + state["row"] // 150
    assert {len(r) for r in rest} == {len(whole) - stop}
    for t, batch in enumerate(whole[stop:]):
        got = np.concatenate([places(r[t]) for r in rest])
        order = np.argsort(got)
        assert np.array_equal(got[order], np.sort(places(batch)))
        for site in options["sites"]:
            rows = np.concatenate([r[t][site] for r in rest])[order]
            assert np.array_equal(rows, batch[site][np.argsort(places(batch))])


def test_datasets_that_are_not_aligned_are_refused_by_name(tiny, other, tmp_path):
    dataset = tiny[0]
    with pytest.raises(SpecError, match=r"tokens\.corpus\.revision"):
        actcache.zip(dataset, other)
    with pytest.raises(SpecError, match="split is 'train' and 'validation'"):
        actcache.zip(dataset, dataset.split("validation"))
    with pytest.raises(SpecError, match="two or more"):
        actcache.zip(dataset)
    with pytest.raises(SpecError, match="two or more"):
        actcache.zip(dataset, dataset, names=["a", "a"])
    twice = actcache.zip(dataset, dataset)
    with pytest.raises(SpecError, match="norms"):
        twice.stream(where=Where(max_norm=1.0))
    with pytest.raises(SpecError, match="no site"):
        twice.stream(SITE)
    state = twice.stream().state()
    with pytest.raises(SpecError, match=r"parts\.0\.seed"):
        twice.stream(seed=1, state=state)
