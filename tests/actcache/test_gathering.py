"""Ranks that gather each other's rows serve what a single reader serves, bit for bit, and never hang."""

import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from exchanging import Group, in_threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_harvest import SITES

import actcache
from actcache.errors import CorruptObject, RankFailed, SpecError
from actcache.filters import Where
from actcache.shard import shard_key

SITE = SITES[0]
DOCS = Path(__file__).parents[2] / "docs"
KINDS = ("stream", "mix", "zip")


@pytest.fixture(scope="module")
def opens(tiny, other, aligned):
    """By kind, a function that opens a stream of that kind."""
    both = actcache.zip(tiny[0], aligned)
    return {
        "stream": lambda **options: tiny[0].stream(SITES, **options),
        "mix": lambda **options: actcache.mix([(tiny[0], 2), (other, 1)], SITE, **options),
        "zip": lambda **options: both.stream([f"0/{SITE}", f"1/{SITE}"], **options),
    }


def numbers(batch):
    """Every figure of a batch's rows: float64 [figures, n]."""
    rows = [batch.token_id, batch.sequence, batch.position, *(batch[site].T for site in batch)]
    return np.vstack([batch.place, *rows, *([batch.source] if hasattr(batch, "source") else [])])


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        np.array_equal(numbers(a), numbers(b)) for a, b in zip(ours, theirs, strict=True)
    )


def gathered(stream, islands):
    """A stream for each rank of a world, whose ranks are joined by islands."""
    world_size = sum(map(len, islands))
    groups = {rank: Group(island) for island in map(sorted, islands) for rank in island}
    groups = {rank: groups[min(groups[rank].ranks)] for rank in range(world_size)}
    return [stream.for_rank(rank, world_size, groups[rank].member(rank)) for rank in range(world_size)]


def served(streams, n=None):
    """The next `n` batches of each, or all; a thread a rank."""
    return in_threads([lambda s=s: list(itertools.islice(s, n)) for s in streams])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_each_of_the_joined_ranks_serves_the_batches_of_a_single_reader(opens, kind, world_size):
    options = {"batch_size": 450, "seed": 3, "epochs": 2}
    for where in (None, Where(not_token_ids=range(3, 20))):
        alone = opens[kind](**options, where=where)
        ranks = served(gathered(alone, [range(world_size)]))
        whole = list(alone)
        assert len(whole[-1]) < 450
        assert where or all(np.array_equal(b.place, np.arange(len(b))) for b in whole)
        assert all(same(rank, whole) for rank in ranks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("islands", [[[0, 1], [2, 3]], [[0, 2, 4], [1, 3]], [[1], [0, 2]]])
def test_an_island_serves_the_rows_of_its_ranks_in_global_order(opens, kind, islands):
    alone = opens[kind](batch_size=450, seed=3)
    ranks = served(gathered(alone, islands))
    single = opens[kind](batch_size=450, seed=3)
    apart = [list(single.for_rank(r, len(ranks))) for r in range(len(ranks))]
    for t, batch in enumerate(single):
        rows = numbers(batch)
        for island in islands:
            place = np.sort(np.concatenate([apart[r][t].place for r in island]))
            for rank in island:
                assert np.array_equal(numbers(ranks[rank][t]), rows[:, place])


@pytest.mark.parametrize("fixture", ["tiny", "aligned", "rotated"])  # int8, bf16 and zigzag codes
@pytest.mark.parametrize("metadata", [True, False])
def test_rows_travel_as_they_are_stored(request, fixture, metadata):
    """A rank's message has the bytes of its share's codes, scales and metadata, each a multiple of 64, and 512."""
    dataset = request.getfixturevalue(fixture)
    dataset = dataset[0] if fixture == "tiny" else dataset
    options = {"batch_size": 640, "metadata": metadata, "device": "cpu", "dtype": "bfloat16"}
    alone = dataset.stream(SITE, **options)
    group = Group([0, 1, 2])
    ranks = served([alone.for_rank(r, 3, group.member(r)) for r in range(3)])
    whole = list(alone)
    for rank in ranks:
        for a, b in zip(rank, whole, strict=True):
            assert np.array_equal(a.place, b.place)
            assert a[SITE].equal(b[SITE])
            assert not metadata or (a.token_id.equal(b.token_id) and a.position.equal(b.position))
    code = {"tiny": 1, "aligned": 2, "rotated": 2}[fixture]
    widths = [code * dataset.d_in(SITE), *([4] if fixture != "aligned" else [])]
    layout = dataset._layout
    widths += [layout[n]["dtype"].itemsize for n in ("token_id", "sequence", "position")] if metadata else []
    share = 640 // 64 * 22  # rank 0 has 22 of 64 lanes
    (room,) = group.rooms
    assert room.sizes[0] == 512 + sum(-(-share * width // 64) * 64 for width in widths)
    assert len(room.sizes) == len(alone)


@given(
    kind=st.sampled_from(KINDS),
    world_size=st.integers(1, 5),
    other_world_size=st.integers(1, 5),
    dealt=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    batch_size=st.sampled_from([130, 333, 4000]),
    stop=st.integers(0, 4),
    where=st.booleans(),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_that_leave_at_one_batch_resume_in_any_other_grouping(
    opens, kind, world_size, other_world_size, dealt, batch_size, stop, where
):
    """Threads end, and the state of each rank is that of a single reader."""
    options = {"batch_size": batch_size, "seed": 1, "epochs": 2, "window": 1}
    alone = opens[kind](**options, where=Where(not_token_ids=range(3, 20)) if where else None)
    threads = threading.active_count()
    streams = gathered(alone, [range(world_size)])
    begun = served(streams, stop)
    assert threading.active_count() == threads
    rest = alone.for_rank(0, 1)
    assert all(same(rank, list(itertools.islice(rest, stop))) for rank in begun[:1])
    assert all(same(rank, begun[0]) for rank in begun)
    states = [json.loads(json.dumps(stream.state())) for stream in streams]
    assert all(state == rest.state() for state in states)
    again = served(streams, 2)  # continued in place, by the same channels
    assert all(same(rank, list(itertools.islice(rest.for_rank(0, 1), 2))) for rank in again)
    ranks = range(other_world_size)
    islands = [island for i in range(3) if (island := [r for r in ranks if dealt[r] == i])]
    shares = served(gathered(rest, islands))
    for t, batch in enumerate(rest):
        rows, of_place = numbers(batch), {int(p): i for i, p in enumerate(batch.place)}
        for island in islands:
            for rank in island:
                index = [of_place[int(p)] for p in shares[rank][t].place]
                assert np.array_equal(numbers(shares[rank][t]), rows[:, index])
        firsts = [shares[island[0]][t].place for island in islands]
        assert np.array_equal(np.sort(np.concatenate(firsts)), batch.place)


def test_ranks_that_leave_finish_the_exchange_under_way(tiny):
    """The batch ahead needs windows that nobody has begun to load; it is gathered by every rank all the same."""
    group = Group([0, 1])
    options = {"batch_size": 700, "lanes": 4, "window": 1, "world_size": 2}
    streams = [tiny[0].stream(SITE, **options, rank=r, gather=group.member(r)) for r in (0, 1)]
    for n in (1, 2):
        assert [len(batches) for batches in served(streams, n)] == [n, n]
    (room,) = group.rooms
    assert (len(room.sizes), room.errors) == (2 + 3, [])


def test_a_part_of_a_mix_has_a_channel_of_its_own(opens):
    group = Group([0, 1])
    alone = opens["mix"](batch_size=450, seed=3)
    streams = [alone.for_rank(r, 2, group.member(r)) for r in range(2)]
    assert len(group.rooms) == 2
    served(streams)
    assert [len(room.sizes) for room in group.rooms] == [len(alone)] * 2


def test_a_rank_that_can_not_read_its_rows_tells_the_others(tiny, tmp_path):
    """All of them fail at the same batch, none waits."""
    shutil.copytree(tiny[0].url, tmp_path / "copy")
    path = tmp_path / "copy" / shard_key(f"train/{SITE}/codes", 2, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    group, threads = Group(range(3)), threading.active_count()
    datasets = [tiny[0], actcache.open(str(tmp_path / "copy")), tiny[0]]
    streams = [
        d.stream(SITE, batch_size=100, window=1, rank=r, world_size=3, gather=group.member(r))
        for r, d in enumerate(datasets)
    ]
    errors = served(streams)
    assert [type(error) for error in errors] == [RankFailed, CorruptObject, RankFailed]
    assert "rank 1 could not read its part of rows" in str(errors[0])
    assert f"CorruptObject: {tmp_path}/copy" in str(errors[0])
    assert len({stream.state()["row"] for stream in streams}) == 1
    assert [text.decode() for text in group.rooms[0].errors] == [str(errors[0]).partition(": ")[2]]
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("change", "found"),
    [({"state": 200}, "rows 200 to 300 of epoch 0 of the same"), ({"seed": 1}, "another")],
)
def test_ranks_that_are_not_at_one_batch_of_one_stream_are_told_so(tiny, change, found):
    group = Group([0, 1])
    options = {"sites": SITE, "batch_size": 100, "world_size": 2}
    if "state" in change:
        change = {"state": {**tiny[0].stream(SITE, batch_size=100).state(), "row": change["state"]}}
    streams = [
        tiny[0].stream(**options, rank=0, gather=group.member(0)),
        tiny[0].stream(**options, rank=1, gather=group.member(1), **change),
    ]
    errors = served(streams)
    assert [type(error) for error in errors] == [SpecError, SpecError]
    assert found in str(errors[0])
    assert "from the same state" in str(errors[1])


def test_a_rank_that_waits_is_freed_when_the_group_is_closed(tiny):
    group, threads = Group([0, 1]), threading.active_count()
    stream = tiny[0].stream(SITE, batch_size=100, world_size=2, gather=group.member(0))

    def close():
        group.room(0).waited_for.wait()
        group.close()

    error, _ = in_threads([lambda: list(stream), close])
    assert isinstance(error, threading.BrokenBarrierError)
    assert stream.state()["row"] == 0
    assert threading.active_count() == threads


def test_an_exchange_that_returns_something_else_is_refused(tiny):
    class Short(Group):
        def channel(self):
            return lambda message: [message, message[:-1]]

    stream = tiny[0].stream(SITE, batch_size=100, world_size=2, gather=Short([0, 1]))
    with pytest.raises(SpecError, match="the exchange returned .*wanted uint8 .* for each of the ranks"):
        next(iter(stream))


@pytest.mark.parametrize("ranks", [[1, 0], [0, 0], [1, 2], [0, 3], [-1, 0], []])
def test_ranks_that_are_not_those_of_the_world_are_refused(tiny, ranks):
    with pytest.raises(SpecError, match=r"gather joins ranks .* of world_size 3 on rank 0"):
        tiny[0].stream(SITE, world_size=3, gather=Group(ranks).member(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_gathers_is_sent_without_its_exchange(opens, kind):
    stream = opens[kind](world_size=2, gather=Group([0, 1]).member(0))
    with pytest.raises(SpecError, match="for_rank"):
        pickle.dumps(stream)
    assert pickle.loads(pickle.dumps(stream.for_rank(0, 2))).options.gather is None


RANK = """
import sys
import numpy as np
import actcache
import torch.distributed as dist
url, site, store, rank, page = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
ds = actcache.open(url)
exec(page)
alone = ds.stream(site, batch_size=4096)
pairs = [(ours[site], theirs[site]) for ours, theirs in zip(stream, alone, strict=True)]
assert pairs and all(np.array_equal(*pair) for pair in pairs)
mixed = actcache.mix([(ds, 1), (ds.split("validation"), 1)], batch_size=300)
ranks = mixed.for_rank(rank, world_size, AllRanks())
for n, (ours, theirs) in enumerate(zip(ranks, mixed, strict=True)):
    assert np.array_equal(ours[site], theirs[site])
    if n == 1:
        break
del n, ours, theirs
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_exchange_of_the_page_joins_two_processes(tiny, tmp_path):
    (page,) = re.findall(r"```python\n(import datetime\n.*?)```", (DOCS / "reading.md").read_text(), re.S)
    assert "gather=AllRanks()" in page
    arguments = [tiny[0].url, SITE, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments, str(rank), page], stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
