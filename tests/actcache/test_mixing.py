"""Mixed streams hold the weights and resume exactly."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_harvest import SITES

import actcache
from actcache.errors import SpecError
from actcache.filters import Where
from actcache.mixing import PERIOD, Schedule

SITE = SITES[0]


def places(batch):
    return batch.sequence.astype(np.int64) * 1000 + batch.position


@given(
    weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=5),
    seed=st.integers(0, 3),
    rows=st.lists(st.integers(0, 20_000), min_size=5, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_a_schedule_counts_by_whole_rows_and_is_exact_each_period(weights, seed, rows):
    schedule = Schedule(weights, seed)
    exact = np.array(weights) / sum(weights) * PERIOD
    assert schedule.ticks.sum() == PERIOD
    assert (np.abs(schedule.ticks - exact) < 1).all()
    counts = np.array([schedule.counts(row) for row in range(3 * PERIOD // 2)])
    steps = np.diff(counts, axis=0)
    assert ((steps == 0) | (steps == 1)).all()
    assert (steps.sum(axis=1) == 1).all()
    assert np.array_equal(schedule.counts(7 * PERIOD), 7 * schedule.ticks)
    limits = rows[: len(weights)]
    longest = schedule.longest(limits)
    assert (schedule.counts(longest) <= limits).all()
    assert (schedule.counts(longest + 1) > limits).any()


def test_the_schedule_is_the_one_that_the_page_gives():
    counts = Schedule([1, 3], seed=0)
    assert [int(counts.counts(row)[0]) for row in (0, 8, 100, 4096, 10_000)] == [0, 2, 24, 1024, 2501]


@given(
    weight=st.floats(0.1, 10),
    batch_size=st.sampled_from([1, 64, 100, 5000]),
    world_size=st.sampled_from([1, 2, 8]),
    epochs=st.sampled_from([1, 3]),
    stop=st.integers(0, 20),
    after=st.sampled_from([1, 4]),
    batch_after=st.sampled_from([64, 333]),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mix_serves_each_dataset_in_its_own_order_and_resumes_anywhere(
    tiny, other, weight, batch_size, world_size, epochs, stop, after, batch_after
):
    datasets = [tiny[0], other]
    options = {"sites": SITE, "seed": 1, "epochs": epochs, "lanes": 8, "window": 3}
    parts = [(datasets[0], weight), (datasets[1], 1.0)]
    batch_size = max(batch_size, 40) if epochs == 3 else batch_size
    ranks = [
        actcache.mix(parts, **options, batch_size=batch_size, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    n_rows = ranks[0].n_rows
    schedule = Schedule([weight, 1.0], 1)
    served, iterators = [[], []], [iter(r) for r in ranks]
    stop = min(stop, len(ranks[0]))
    for t in range(stop):
        batches = [next(i) for i in iterators]
        begin, end = t * batch_size, min((t + 1) * batch_size, n_rows)
        take(batches, served)
        wanted = schedule.counts(end) - schedule.counts(begin)
        assert [sum(int((b.source == i).sum()) for b in batches) for i in (0, 1)] == wanted.tolist()
    states = [json.loads(json.dumps(r.state())) for r in ranks]
    assert all(s == states[0] for s in states)
    for iterator in iterators:
        iterator.close()
    rest = [
        actcache.mix(parts, **options, batch_size=batch_after, rank=r, world_size=after, state=states[-1])
        for r in range(after)
    ]
    for batches in zip(*rest, strict=True):
        take(batches, served)
    totals = schedule.counts(n_rows)
    for i, dataset in enumerate(datasets):
        stream = dataset.stream(
            SITE, seed=1, epochs=epochs, lanes=8, window=3, batch_size=dataset.n_rows, metadata=True
        )
        order = np.concatenate([places(b) for b in stream])
        assert Counter(served[i]) == Counter(order[: totals[i]].tolist())
    assert max(schedule.counts(n_rows + 1) - [d.n_rows * epochs for d in datasets]) == 1


def take(batches, served):
    for batch in batches:
        for i in (0, 1):
            served[i] += places(batch)[batch.source == i].tolist()


def test_rows_of_a_mixed_batch_are_those_that_it_names(tiny, other):
    datasets = [tiny[0], other]
    where = Where(not_token_ids=[5, 6])
    stored = [
        dict(zip(places(d.rows(slice(None))).tolist(), d.read(SITE, slice(None)), strict=True))
        for d in datasets
    ]
    stream = actcache.mix([(datasets[0], 2), (other, 1)], SITE, batch_size=200, lanes=8, where=where)
    for batch in stream:
        assert len(batch) == len(batch.source) == len(batch.token_id)
        assert not set(batch.token_id.tolist()) & {5, 6}
        for row, source, place in zip(batch[SITE], batch.source, places(batch), strict=True):
            assert np.array_equal(row, stored[source][place])


def test_a_mix_states_the_statistics_of_what_it_serves(tiny, other):
    stream = actcache.mix([(tiny[0], 1), (other, 1)], SITE, lanes=8, batch_size=500, epochs=2)
    rows = [tiny[0].read(SITE, slice(None)), other.read(SITE, slice(None))]
    weight = [np.full(len(r), 0.5 / len(r)) for r in rows]
    acts_ND, weight_N = np.concatenate(rows).astype(np.float64), np.concatenate(weight)
    mean_D = weight_N @ acts_ND
    stated = stream.stats(SITE)
    assert np.allclose(stated["mean"], mean_D, atol=1e-6)
    assert np.allclose(stated["variance"], weight_N @ (acts_ND - mean_D) ** 2, rtol=1e-4)
    centred = actcache.mix([(tiny[0], 1), (other, 1)], SITE, lanes=8, batch_size=500, epochs=2, centre=True)
    plain, moved = next(iter(stream)), next(iter(centred))
    assert np.array_equal(moved[SITE], plain[SITE] - mean_D.astype(np.float32)) or np.allclose(
        moved[SITE], plain[SITE] - mean_D, atol=1e-5
    )
    assert np.abs(centred.stats(SITE)["mean"]).max() < 1e-6


def test_mixes_that_mean_nothing_are_refused(tiny, other, aligned):
    with pytest.raises(SpecError, match="above 0"):
        actcache.mix([(tiny[0], 1), (other, 0)])
    with pytest.raises(SpecError, match="1/4096"):
        actcache.mix([(tiny[0], 1), (other, 1e-6)])
    with pytest.raises(SpecError, match="no site"):
        actcache.mix([(tiny[0], 1), (aligned, 1)], SITES[1])
    state = actcache.mix([(tiny[0], 1), (other, 1)]).state()
    with pytest.raises(SpecError, match="ticks"):
        actcache.mix([(tiny[0], 1), (other, 2)], state=state)
    with pytest.raises(SpecError, match=r"parts\.1\.dataset"):
        actcache.mix([(tiny[0], 1), (tiny[0], 1)], state=state)
    with pytest.raises(SpecError, match="stands at"):
        actcache.mix([(tiny[0], 1), (other, 1)], state={**state, "row": -1})
