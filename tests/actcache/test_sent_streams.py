"""Streams are sent by reference: another process, or another rank, opens them where they stand."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from replayed import Recorded
from tiny_harvest import SITES

import actcache
from actcache import hub
from actcache.errors import NotADataset, SpecError
from actcache.filters import Where
from actcache.store import open_store

SITE = SITES[0]
KINDS = ("stream", "mix", "zip")


def open_kind(kind, tiny, other, aligned, **options):
    if kind == "stream":
        return tiny[0].stream(SITES, **options)
    if kind == "mix":
        return actcache.mix([(tiny[0], 2), (other, 1)], SITE, **options)
    return actcache.zip(tiny[0], aligned, names=["a", "b"]).stream([f"b/{SITE}", f"a/{SITE}"], **options)


def numbers(batches):
    """Every figure of the batches' rows."""
    return [
        np.vstack([b.place, b.token_id, b.sequence, b.position, *(b[site].T for site in b)]) for b in batches
    ]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        np.array_equal(a, b) for a, b in zip(numbers(ours), numbers(theirs), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_stream_goes_on_where_it_stood(tiny, other, aligned, kind):
    """Also while it is iterated, with its threads running; it holds options of every kind and no row."""
    where = Where(not_token_ids={4, 5}, sequences=range(100))
    options = {"batch_size": 300, "seed": 4, "epochs": 2, "where": where, "rank": 1, "world_size": 3}
    stream = open_kind(kind, tiny, other, aligned, **options, centre=kind == "mix")
    batches = iter(stream)
    next(batches)
    data = pickle.dumps(stream)
    assert len(data) < 4000
    again = pickle.loads(data)
    assert type(again) is type(stream)
    assert (again.state(), again.options, again.sites) == (stream.state(), stream.options, stream.sites)
    assert same(list(again), list(batches))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_dealt_to_ranks_from_where_it_stands(tiny, other, aligned, kind):
    stream = open_kind(kind, tiny, other, aligned, batch_size=400, seed=4, epochs=2)
    batches = iter(stream)
    next(batches)
    ranks = [stream.for_rank(rank, 5) for rank in range(5)]
    again = [rank.for_rank(0, 1) for rank in pickle.loads(pickle.dumps(ranks))]
    rest = list(batches)
    assert all(same(list(whole), rest) for whole in again[:2])
    for whole, *shares in zip(rest, *ranks, strict=True):
        (rows,) = numbers([whole])
        assert all(np.array_equal(numbers([share])[0], rows[:, share.place]) for share in shares)
        assert sorted(np.concatenate([share.place for share in shares])) == list(range(len(whole)))
    with pytest.raises(SpecError, match="rank 5 of world_size 5"):
        stream.for_rank(5, 5)


ELSEWHERE = """
import pickle, sys
stream = pickle.load(sys.stdin.buffer).for_rank(0, 1)
assert not {"torch", "ray"} & set(sys.modules)
batches = [(batch.place, batch.token_id, batch.sequence, batch.position) for batch in stream]
pickle.dump((batches, stream.state()), sys.stdout.buffer)
"""


def test_another_process_opens_what_it_is_sent(tiny, other, aligned):
    """A zip, which sends two datasets; of the three kinds it holds the most."""
    stream = open_kind("zip", tiny, other, aligned, batch_size=400)
    data = pickle.dumps(stream)
    out = subprocess.run([sys.executable, "-c", ELSEWHERE], input=data, capture_output=True, timeout=60)
    assert out.returncode == 0, out.stderr.decode()
    batches, state = pickle.loads(out.stdout)
    for ours, theirs in zip(stream, batches, strict=True):
        assert np.array_equal([ours.place, ours.token_id, ours.sequence, ours.position], theirs)
    assert state == stream.state()


def test_a_sent_stream_opens_the_version_that_was_pinned(tmp_path):
    recorded = Recorded(tmp_path, n_tokens=1_000, sites=[SITE])
    store = open_store(str(tmp_path / "data"))
    recorded.harvest(store)
    stream = actcache.open(store.url).stream(SITE, batch_size=500)
    data = pickle.dumps(stream)
    recorded.harvest(store, recorded.asking(n_tokens=2_500))
    assert actcache.open(store.url).n_rows > stream.n_rows
    again = pickle.loads(data)
    assert again.dataset.manifest == stream.dataset.manifest
    assert same(list(again), list(stream))


def test_a_stream_in_memory_is_opened_in_its_own_process_only(tiny):
    stream = hub.push(tiny[0].split("test"), "memory://sent/data").split("test").stream(SITE, batch_size=400)
    data = pickle.dumps(stream)
    assert same(list(pickle.loads(data)), list(stream))
    out = subprocess.run([sys.executable, "-c", ELSEWHERE], input=data, capture_output=True, timeout=60)
    assert out.returncode == 1
    assert NotADataset.__name__ in out.stderr.decode()
