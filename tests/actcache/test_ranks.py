"""Any number of ranks up to that of the lanes serves, batch by batch, what one reader serves."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_harvest import SITES

import actcache
from actcache.filters import Where

SITE = SITES[0]
WORLD_SIZES = (1, 2, 3, 4, 5, 6, 7, 12, 24, 48, 63, 64)
KINDS = ("stream", "mix", "zip")


@pytest.fixture(scope="module")
def opens(tiny, other, aligned):
    """By kind, a function that opens a stream of that kind."""
    validation = [dataset.split("validation") for dataset in (tiny[0], other, aligned)]
    both = actcache.zip(validation[0], validation[2])
    return {
        "stream": lambda **options: validation[0].stream(SITES, **options),
        "mix": lambda **options: actcache.mix([(validation[0], 2), (validation[1], 1)], SITE, **options),
        "zip": lambda **options: both.stream([f"0/{SITE}", f"1/{SITE}"], **options),
    }


def rows_of(batch):
    """Every figure of a batch's rows side by side: float64 [n, ...]."""
    numbers = [batch.token_id, batch.sequence, batch.position, *(batch[site].T for site in batch)]
    return np.vstack([*numbers, *([batch.source] if hasattr(batch, "source") else [])]).T


def check_ranks(alone, kept, ranks, lanes):
    """`alone` is the single reader without a filter, `kept` with one; `ranks` all with it."""
    world_size = len(ranks)
    assert {len(rank) for rank in ranks} == {len(alone)} == {len(kept)}
    for whole, filtered, *shares in zip(alone, kept, *ranks, strict=True):
        assert np.array_equal(whole.place, np.arange(len(whole)))
        rows = rows_of(whole)
        assert np.array_equal(rows_of(filtered), rows[filtered.place])
        for share in shares:
            assert share.place.dtype == np.int64
            assert (np.diff(share.place) > 0).all()
            assert np.array_equal(rows_of(share), rows[share.place])
        served = np.concatenate([share.place for share in shares])
        assert np.array_equal(np.sort(served), filtered.place)
        if lanes % world_size == 0 and len(filtered) == len(whole) and not hasattr(whole, "source"):
            assert np.ptp([len(share) for share in shares]) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_serve_each_row_of_each_batch_once(opens, kind, world_size):
    """The last batch is short: here it has fewer rows than there are lanes, and some ranks have none."""
    n_rows = opens[kind](seed=2).n_rows
    batch_size = n_rows // 2 - 5
    options = {"batch_size": batch_size, "seed": 2}
    alone = list(opens[kind](**options))
    assert 0 < len(alone[-1]) < 64
    ranks = [list(opens[kind](**options, rank=r, world_size=world_size)) for r in range(world_size)]
    check_ranks(alone, alone, ranks, 64)
    empty = sum(len(rank[-1]) == 0 for rank in ranks)
    assert kind != "stream" or empty == max(0, world_size - len(alone[-1]))


@given(
    kind=st.sampled_from(KINDS),
    world_sizes=st.tuples(st.sampled_from(WORLD_SIZES), st.sampled_from(WORLD_SIZES)),
    batch_sizes=st.tuples(st.sampled_from([1, 60, 64, 333]), st.sampled_from([77, 128, 5000])),
    stop=st.integers(0, 4),
    epochs=st.sampled_from([1, 2]),
    where=st.booleans(),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_resume_at_another_world_size_and_batch_size(
    opens, kind, world_sizes, batch_sizes, stop, epochs, where
):
    options = {"seed": 1, "epochs": epochs, "window": 2}
    filtered = options | {"where": Where(not_token_ids=range(3, 40))} if where else options
    first = [
        opens[kind](**filtered, batch_size=batch_sizes[0], rank=r, world_size=world_sizes[0])
        for r in range(world_sizes[0])
    ]
    begun = [[batch for batch, _ in zip(stream, range(stop), strict=False)] for stream in first]
    states = [json.loads(json.dumps(stream.state())) for stream in first]
    assert all(state == states[0] for state in states)
    stopped = opens[kind](**options, batch_size=batch_sizes[0])
    kept = opens[kind](**filtered, batch_size=batch_sizes[0])
    pairs = [[b for b, _ in zip(s, range(stop), strict=False)] for s in (stopped, kept)]
    check_ranks(*pairs, begun, 64)
    ranks = [
        list(
            opens[kind](**filtered, batch_size=batch_sizes[1], rank=r, world_size=world_sizes[1], state=state)
        )
        for state in states[:1]
        for r in range(world_sizes[1])
    ]
    alone = list(opens[kind](**options, batch_size=batch_sizes[1], state=stopped.state()))
    kept = list(opens[kind](**filtered, batch_size=batch_sizes[1], state=kept.state()))
    check_ranks(alone, kept, ranks, 64)


@pytest.mark.parametrize("world_size", [2, 3, 7, 48])
def test_only_chunks_that_are_cut_between_lanes_are_read_by_two_ranks(tiny, world_size):
    stream = tiny[0].stream(SITE, batch_size=500, seed=3)
    order = stream._order(0)
    cut, read = set(), []
    for rank in range(world_size):
        spans = [s for lane in range(rank, 64, world_size) for w in order.windows(lane) for s in w.spans]
        cut |= {s.chunk for s in spans if s.stop - s.start < order.chunk_rows}
        read.append(chunks_read(tiny[0], rank, world_size))
    assert sum(map(len, read)) > len(set().union(*read)) == order.n_chunks
    twice = {chunk for mine in read for chunk in mine if sum(chunk in rank for rank in read) > 1}
    assert twice <= cut


def chunks_read(dataset, rank, world_size):
    """The chunks of codes that a rank asks the chunk reader for, told by a real one."""
    from actcache.chunks import ChunkReader

    asked = set()

    class Telling(ChunkReader):
        def read(self, path, chunk):
            asked.add((path, chunk))
            return super().read(path, chunk)

        def read_into(self, path, chunk, out, data=None):
            asked.add((path, chunk))
            super().read_into(path, chunk, out, data)

    again = actcache.open(dataset.url)
    again.__dict__["_chunks"] = Telling(again._shared.store, "train", again._layout, again._tables)
    assert list(again.stream(SITE, batch_size=500, seed=3, rank=rank, world_size=world_size))
    return {chunk for path, chunk in asked if path == f"{SITE}/codes"}


def test_batches_without_rows_have_every_form_of_an_output(tiny, rotated, aligned):
    """Rank 63 of 64 has no row of a batch of the first 10; of int8, zigzag and bf16 codes."""
    for dataset in (tiny[0], rotated, aligned):
        for options in ({}, {"device": "cpu", "dtype": "bfloat16"}, {"metadata": False}, {"centre": True}):
            batch = next(iter(dataset.stream(SITE, batch_size=10, rank=63, world_size=64, **options)))
            assert len(batch) == len(batch.place) == 0
            assert batch[SITE].shape == (0, dataset.d_in(SITE))
    where = Where(max_norm=1e9, documents=range(10**5))
    batch = next(iter(tiny[0].stream(SITE, batch_size=10, rank=63, world_size=64, where=where)))
    assert len(batch.token_id) == len(batch) == 0
