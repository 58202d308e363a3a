"""Every permutation of the project: sequences, rows in a block, and the order a reader serves.

All are `permutation(n, *key)`: the argsort of n SplitMix64 outputs. The outputs are distinct (the
generator is a bijection on 64-bit integers), so the result depends on no sorting algorithm, no
numpy version and no machine. Specified in docs/format.md, "Permutations" and "Reading order".
Shapes: N rows of a split, C chunks, L lanes, W chunks in a window.
"""

import hashlib
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
    return np.argsort(_splitmix64(start, n))


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


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of one stored chunk."""

    chunk: int
    start: int
    stop: int


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

    def lane_windows(self, lane: int) -> list[list[Span]]:
        """The spans of each of the lane's windows, in concatenation order."""
        order_C, starts_C = _chunk_order(self.n_rows, self.chunk_rows, self.seed, self.epoch)
        begin = self.lane_start(lane)
        end = begin + self.lane_rows(lane)
        if begin == end:
            return []
        first = int(np.searchsorted(starts_C, begin, side="right")) - 1
        last = int(np.searchsorted(starts_C, end, side="left"))
        spans = []
        for i in range(first, last):
            base = int(starts_C[i])
            length = int(starts_C[i + 1]) - base
            spans.append(Span(int(order_C[i]), max(begin - base, 0), min(end - base, length)))
        return [spans[i : i + self.window] for i in range(0, len(spans), self.window)]

    def window_permutation(self, lane: int, window: int, n: int) -> np.ndarray:
        """Position p of the window serves row `permutation[p]` of its concatenated spans; int64 [n]."""
        return permutation(n, "window", self.seed, self.epoch, lane, window)

    def rows(self) -> np.ndarray:
        """Stored row index of every global row, int64 [N]; for tests and small sets (8 N bytes)."""
        out_N = np.empty(self.n_rows, np.int64)
        for lane in range(self.lanes):
            lane_rows = [self._window_rows(lane, w, spans) for w, spans in enumerate(self.lane_windows(lane))]
            if lane_rows:
                out_N[lane :: self.lanes] = np.concatenate(lane_rows)
        return out_N

    def _window_rows(self, lane: int, window: int, spans: list[Span]) -> np.ndarray:
        stored = np.concatenate([np.arange(s.start, s.stop) + s.chunk * self.chunk_rows for s in spans])
        return stored[self.window_permutation(lane, window, len(stored))]


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
