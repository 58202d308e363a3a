"""Every permutation of the project: sequences, rows in a block, and the order a reader serves.

All are `permutation(n, *key)`: the argsort of n SplitMix64 outputs. The outputs are distinct (the
generator is a bijection on 64-bit integers), so the result depends on no sorting algorithm, no
numpy version and no machine. Specified in docs/format.md, "Permutations" and "Reading order".
Shapes: N rows of a split, C chunks, L lanes, W chunks in a window.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DEFAULT_LANES = 64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A permutation of range(n), int64 [n], fixed by the key; O(n log n) time, 16 n bytes.

    The key's parts are joined by "/" and hashed with sha256; its first 8 bytes (little-endian)
    start the SplitMix64 sequence (Steele, Lea and Flood 2014, "Fast splittable PRNGs").
    """
    start = int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "little")
    return _argsort_distinct(_splitmix64(start, n))


def _argsort_distinct(values_N: np.ndarray) -> np.ndarray:
    """`argsort` of distinct uint64 values, by radix sorts of their upper digits: 3 times as fast for a window."""
    digits = 2 if len(values_N) <= 2**14 else 3
    order_N: np.ndarray | None = None
    for shift in range(64 - 16 * digits, 64, 16):  # 16 bits is what numpy's stable sort does by radix
        digit_N = (values_N >> np.uint64(shift)).astype(np.uint16)
        if order_N is None:
            order_N = np.argsort(digit_N, kind="stable")
        else:
            order_N = order_N.take(np.argsort(digit_N.take(order_N), kind="stable"))
    assert order_N is not None
    upper_N = values_N.take(order_N) >> np.uint64(64 - 16 * digits)
    return np.argsort(values_N) if (upper_N[1:] == upper_N[:-1]).any() else order_N


def _splitmix64(start: int, n: int) -> np.ndarray:
    z = np.arange(1, n + 1, dtype=np.uint64)
    z *= _GOLDEN
    z += np.uint64(start)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def default_window(batch_size: int, lanes: int, context_size: int, block_rows: int) -> int:
    """Chunks in a window so that same-sequence rows in a batch exceed chance by at most 0.25.

    A lane gives batch_size / lanes rows to a batch; of the W * block's rows they are drawn from,
    context_size - 1 share a sequence with a given one. The excess is (B/L - 1) * T / (W * R).
    """
    return max(2, -(-batch_size * context_size * 4 // (lanes * block_rows)))


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The lanes that a rank serves, ascending: those whose number is `rank` modulo `world_size`."""
    return range(rank, lanes, world_size)


def rows_of_lanes(begin: int, end: int, lanes: int, lane_L: Sequence[int] | np.ndarray) -> np.ndarray:
    """The global rows [begin, end) that some of the lanes (ascending) serve, in order; int64 [n]."""
    position_P = np.arange(begin // lanes, -(-end // lanes))[:, None]
    row_N = (position_P * lanes + np.asarray(lane_L)).ravel()
    first, last = np.searchsorted(row_N, [begin, end])
    return row_N[first:last]


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of one stored chunk."""

    chunk: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows of some chunks that a lane serves permuted."""

    lane: int
    number: int
    """Counted from 0 in the lane."""
    start: int
    """Lane position of its first row."""
    spans: list[Span]

    @property
    def n_rows(self) -> int:
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True)
class Order:
    """The order in which one epoch's rows are served, whoever reads.

    The chunks are permuted and concatenated; lane l of L takes the next ceil((N - l) / L) rows;
    each run of W chunks in a lane is a window and is permuted; global row g is position g div L
    of lane g mod L.
    """

    n_rows: int
    chunk_rows: int
    seed: int
    epoch: int
    lanes: int
    window: int

    @property
    def n_chunks(self) -> int:
        return -(-self.n_rows // self.chunk_rows)

    def lane_rows(self, lane: int) -> int:
        """How many rows the lane serves."""
        return max(0, -(-(self.n_rows - lane) // self.lanes))

    def lane_start(self, lane: int) -> int:
        """Where the lane begins in the concatenation of the permuted chunks."""
        share, extra = divmod(self.n_rows, self.lanes)
        return lane * share + min(lane, extra)

    def windows(self, lane: int, position: int = 0) -> Iterator["Window"]:
        """The lane's windows in order, from the one that holds lane position `position`."""
        order_C, starts_C = _chunk_order(self.n_rows, self.chunk_rows, self.seed, self.epoch)
        begin = self.lane_start(lane)
        end = begin + self.lane_rows(lane)
        if begin + position >= end:
            return
        first, holds = (np.searchsorted(starts_C, [begin, begin + position], side="right") - 1).tolist()
        last = int(np.searchsorted(starts_C, end, side="left"))
        for number in range((holds - first) // self.window, -(-(last - first) // self.window)):
            i = first + number * self.window
            j = min(i + self.window, last)
            base_W = starts_C[i : j + 1].tolist()
            spans = [
                Span(chunk, max(begin - base, 0), min(end, after) - base)
                for chunk, base, after in zip(order_C[i:j].tolist(), base_W, base_W[1:], strict=False)
            ]
            yield Window(lane, number, max(base_W[0] - begin, 0), self._stored(spans))

    def _stored(self, spans: list[Span]) -> list[Span]:
        """The same rows as spans of the chunks that are stored."""
        return spans

    def window_permutation(self, window: "Window") -> np.ndarray:
        """Position p of the window serves row `permutation[p]` of its concatenated spans; int64 [n]."""
        return permutation(window.n_rows, "window", self.seed, self.epoch, window.lane, window.number)

    @property
    def window_rows(self) -> int:
        """The most rows that a window has."""
        return min(self.window * self.chunk_rows, self.lane_rows(0))

    def rows(self) -> np.ndarray:
        """Stored row index of every global row, int64 [N]; for tests and small sets (8 N bytes)."""
        out_N = np.empty(self.n_rows, np.int64)
        for lane in range(self.lanes):
            for window in self.windows(lane):
                begin = window.start * self.lanes + lane
                out_N[begin : begin + window.n_rows * self.lanes : self.lanes] = self.stored_rows(window)
        return out_N

    def stored_rows(self, window: "Window") -> np.ndarray:
        """Stored row index of each row that the window serves, in that order; int64 [n]."""
        stored = np.concatenate(
            [np.arange(s.start, s.stop) + s.chunk * self.chunk_rows for s in window.spans]
        )
        return stored[self.window_permutation(window)]


@lru_cache(maxsize=4)
def _chunk_order(n_rows: int, chunk_rows: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The permuted chunks [C] and where each starts in their concatenation [C + 1]."""
    n_chunks = -(-n_rows // chunk_rows)
    order_C = permutation(n_chunks, "chunks", seed, epoch)
    lengths_C = np.full(n_chunks, chunk_rows, np.int64)
    if n_chunks:
        lengths_C[-1] = n_rows - (n_chunks - 1) * chunk_rows
    starts_C = np.concatenate([[0], np.cumsum(lengths_C[order_C])])
    return order_C, starts_C
