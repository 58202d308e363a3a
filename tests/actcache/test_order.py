"""The reading order is a bijection that anybody can write down and nothing but its inputs can change."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.order import Order, default_window, lanes_of, permutation, rows_of_lanes

sizes = st.integers(0, 5000)


@given(sizes, st.integers(0, 2**63), st.text(max_size=5))
@settings(max_examples=50, deadline=None)
def test_permutation_is_a_bijection(n, seed, name):
    assert np.array_equal(np.sort(permutation(n, name, seed)), np.arange(n))


def test_permutations_never_change_between_versions_and_machines():
    golden = hashlib.sha256(permutation(10_000, "rows", 7, "train", 3).astype("<i8").tobytes()).hexdigest()
    assert golden == "cc2267c307788f8b731395dae52bcc436950b109249be9784cee275cfbb48b20"
    rows = Order(n_rows=100_003, chunk_rows=128, seed=3, epoch=1, lanes=64, window=2).rows()
    assert (
        hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        == "43d2970e7ac15522eb597f86150bc6299e478446b6c245e68a57cc2899b6797a"
    )


def test_permutation_has_no_visible_structure():
    places = permutation(100_000, "rows", 0)
    assert abs(np.corrcoef(places, np.arange(100_000))[0, 1]) < 0.02  # 6 standard errors
    assert abs(np.corrcoef(places, permutation(100_000, "rows", 1))[0, 1]) < 0.02
    steps = np.diff(places)
    assert abs(float((steps > 0).mean()) - 0.5) < 0.01


@given(
    n_rows=sizes,
    chunk_rows=st.sampled_from([1, 2, 16, 64]),
    lanes=st.sampled_from([1, 2, 8, 64]),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_order_serves_every_row_exactly_once(n_rows, chunk_rows, lanes, window, epoch):
    rows = Order(n_rows=n_rows, chunk_rows=chunk_rows, seed=1, epoch=epoch, lanes=lanes, window=window).rows()
    assert np.array_equal(np.sort(rows), np.arange(n_rows))


def shares(begin, end, lanes, world_size):
    return [rows_of_lanes(begin, end, lanes, lanes_of(rank, world_size, lanes)) for rank in range(world_size)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 6])
def test_ranks_divide_the_rows_of_every_small_batch(lanes):
    for world_size in range(1, lanes + 1):
        for begin in range(lanes + 1):
            for end in range(begin, begin + 2 * lanes + 2):
                check_shares(begin, end, lanes, world_size)


@given(
    world_size=st.integers(1, 64), begin=st.integers(0, 10**12), n=st.sampled_from([0, 1, 63, 100, 640, 4096])
)
@settings(max_examples=100, deadline=None)
def test_ranks_divide_the_rows_of_a_batch_of_64_lanes(world_size, begin, n):
    check_shares(begin, begin + n, 64, world_size)


def check_shares(begin, end, lanes, world_size):
    """Each row is of one rank, the one that its lane names; shares are as even as the page says."""
    parts = shares(begin, end, lanes, world_size)
    row_N = np.arange(begin, end)
    for rank, part in enumerate(parts):
        assert np.array_equal(part, row_N[row_N % lanes % world_size == rank])
        if lanes % world_size == 0:
            assert np.array_equal(part, row_N[row_N % world_size == rank])
    assert np.array_equal(np.sort(np.concatenate(parts)), row_N)
    sizes = [len(part) for part in parts]
    most = 1 if lanes % world_size == 0 else -(-(end - begin) // lanes) + 1
    assert max(sizes) - min(sizes) <= most


def test_order_follows_the_written_rule():
    """The rule of docs/format.md, "Reading order", written out a second time in plain loops."""
    n, chunk, lanes, window, seed, epoch = 1000, 16, 4, 2, 5, 2
    chunks = [list(range(c * chunk, min((c + 1) * chunk, n))) for c in range(-(-n // chunk))]
    order = permutation(len(chunks), "chunks", seed, epoch)
    flat = [(c, row) for c in order for row in chunks[c]]
    served = {}
    start = 0
    for lane in range(lanes):
        share = -(-(n - lane) // lanes)
        mine = flat[start : start + share]
        start += share
        runs = []
        for c, row in mine:
            if not runs or runs[-1][0] != c:
                runs.append((c, []))
            runs[-1][1].append(row)
        position = 0
        for w in range(0, len(runs), window):
            rows = [row for _, part in runs[w : w + window] for row in part]
            for place in permutation(len(rows), "window", seed, epoch, lane, w // window):
                served[position * lanes + lane] = rows[place]
                position += 1
    expected = [served[g] for g in range(n)]
    got = Order(n_rows=n, chunk_rows=chunk, seed=seed, epoch=epoch, lanes=lanes, window=window).rows()
    assert got.tolist() == expected


def test_default_window_keeps_the_excess_of_same_sequence_rows_below_a_quarter():
    for batch, context, block in [(4096, 256, 131_072), (65_536, 2048, 131_072), (8192, 1024, 65_536)]:
        window = default_window(batch, 64, context, block)
        assert window >= 2
        assert batch / 64 * context / (window * block) <= 0.25


def partners_beyond_uniform(n_rows, context, window, seeds=4):
    """Mean over rows of the other rows of their sequence in their batch of 4096, less that of a uniform draw.

    Blocks of 4096 rows and chunks of 128: with sequences of 64 rows, as long as a block allows. Every
    row of an epoch is counted, for each of some seeds.
    """
    block, batch = 4096, 4096
    kept_N = np.concatenate(
        [
            start + permutation(min(block, n_rows - start), "rows", 0, "train", start // block)
            for start in range(0, n_rows, block)
        ]
    )
    sequence_N, batch_N = kept_N // context, np.arange(n_rows) // batch
    found = []
    for seed in range(seeds):
        order = Order(n_rows=n_rows, chunk_rows=128, seed=seed, epoch=0, lanes=64, window=window)
        met = np.unique(batch_N * n_rows + sequence_N[order.rows()], return_counts=True)[1]
        found.append((met * (met - 1)).sum() / n_rows)
    of_own = (np.bincount(sequence_N).astype(float) ** 2).sum() / n_rows - 1
    others = (np.bincount(batch_N).astype(float) ** 2).sum() / n_rows - 1
    return np.mean(found) - others * of_own / (n_rows - 1)


@pytest.mark.parametrize("n_rows", [4096, 4097, 12_288, 40_460, 40_960, 73_728, 100_003, 204_800, 335_872])
@pytest.mark.parametrize("context", [16, 32, 33, 64])
def test_rows_of_a_sequence_meet_at_most_a_quarter_more_often_than_by_chance(n_rows, context):
    """At any N, lanes of less than a chunk and a last window of one chunk included, and any T.

    32 and 64 are the longest sequences that the formula serves with windows of 2 and 4 chunks.
    """
    window = default_window(4096, 64, context, 4096)
    assert partners_beyond_uniform(n_rows, context, window) <= 0.25


@pytest.mark.parametrize(("context", "window"), [(40, 2), (64, 3)])
def test_a_window_below_the_default_lets_them_meet_more_often(context, window):
    assert window == default_window(4096, 64, context, 4096) - 1
    assert partners_beyond_uniform(335_872, context, window) > 0.25
