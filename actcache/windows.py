"""The windows of a stream's lanes, read ahead in threads: rows as they are stored, ready to be gathered.

Every lane serves one window while its next one is loaded, also from one epoch into the next. Chunks
are decoded into slots of one pool, whose size bounds the memory. Errors of a load reach whoever
gathers the first row that needs it.
Shapes: L lanes of this rank, P positions of a lane, N rows.
"""

import heapq
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .chunks import ChunkReader
from .errors import SpecError
from .order import Order, Window

_SHARED_CHUNKS = 4
"""Decoded chunks kept, of each array, for the lanes that share them: where a lane has less than one."""
_CACHE_LINE = 64


@dataclass(eq=False)
class _Coming:
    """The window that a lane serves next."""

    epoch: int
    window: Window
    order: Order
    slot: int = -1
    loaded: Future[None] | None = None
    """None while there is no slot for it."""


class Windows:
    """Rows of some arrays in the order of a stream, of the lanes of one rank.

    Args:
        chunks: reader of the split's chunks.
        names: which arrays.
        orders: the order of an epoch.
        epochs: how many there are.
        lanes: the lanes of this rank.
        begin: (epoch, lane position) of the first rows that will be asked for.
        prefetch_bytes: the most that the pool may take; by default a window and the next one of each lane.
        threads: how many load at once.

    Raises:
        SpecError: `prefetch_bytes` does not hold a window of each lane; says what does.
    """

    def __init__(
        self,
        chunks: ChunkReader,
        names: Sequence[str],
        orders: Callable[[int], Order],
        epochs: int,
        lanes: Sequence[int],
        begin: tuple[int, int],
        prefetch_bytes: int | None,
        threads: int,
    ) -> None:
        self._chunks, self._orders, self._epochs = chunks, orders, epochs
        order = orders(begin[0])
        self._order, self._slot_rows = order, order.window_rows
        layout = {name: chunks.layout[name] for name in names}
        n_lanes = len(lanes)
        n_slots = _n_slots(_slot_bytes(layout, order), n_lanes, order, prefetch_bytes)
        self._pool = {
            name: _aligned((n_slots, self._slot_rows, *array["row"]), array["dtype"])
            for name, array in layout.items()
        }
        self._scratch = threading.local()
        self._read = lru_cache(_SHARED_CHUNKS * len(layout))(chunks.read)
        self._lane_L = np.array(lanes)
        self._slot_L = np.full(n_lanes, -1)
        self._epoch_L, self._start_L, self._stop_L = (np.full(n_lanes, -1) for _ in range(3))
        self._coming_epoch_L, self._coming_start_L = np.empty((2, n_lanes), np.int64)
        self._coming: list[_Coming | None] = [None] * n_lanes
        self._upcoming = [self._windows_of(lane, *begin) for lane in lanes]
        self._free = list(range(n_slots))
        self._waiting: list[tuple[int, int, int]] = []
        self._loaders = ThreadPoolExecutor(threads, thread_name_prefix="actcache-load")
        for i in range(n_lanes):
            self._look_ahead(i)

    def close(self) -> None:
        """End the threads; what they were doing is dropped."""
        self._loaders.shutdown(cancel_futures=True)

    def gather(self, epoch: int, begin: int, end: int) -> dict[str, np.ndarray]:
        """The rank's rows among global rows [begin, end) of an epoch, by array; waits until they are loaded.

        Calls go forward: rows before `begin` are gone.
        """
        n_lanes = self._order.lanes
        n_rows = int((_count(end, self._lane_L, n_lanes) - _count(begin, self._lane_L, n_lanes)).sum())
        out = {name: np.empty((n_rows, *pool.shape[2:]), pool.dtype) for name, pool in self._pool.items()}
        self.gather_into(out, epoch, begin, end)
        return out

    def gather_into(self, out: Mapping[str, np.ndarray], epoch: int, begin: int, end: int) -> None:
        """As `gather`, into contiguous arrays of as many rows."""
        n_lanes = self._order.lanes
        position, last = begin // n_lanes, -(-end // n_lanes)
        filled = 0
        while position < last:
            self._advance(epoch, position)
            here = (self._epoch_L == epoch) & (self._stop_L > position)
            stop = int(min(last, self._stop_L[here].min(initial=last)))
            index_N = self._places(position, stop, begin, end)
            rows = slice(filled, filled + len(index_N))
            for name, pool in self._pool.items():
                # "clip" goes without the copy that "raise" makes
                pool.reshape(-1, *pool.shape[2:]).take(index_N, axis=0, out=out[name][rows], mode="clip")
            position, filled = stop, rows.stop

    def _places(self, position: int, stop: int, begin: int, end: int) -> np.ndarray:
        """Where lane positions [position, stop) of every lane lie in the pool, cut to global rows [begin, end)."""
        position_P = np.arange(position, stop)[:, None]
        slot_PL = position_P - self._start_L
        np.clip(slot_PL, 0, self._slot_rows - 1, out=slot_PL)  # lanes that have ended are cut below
        index_N = (slot_PL + self._slot_L * self._slot_rows).ravel()
        row_N = (position_P * self._order.lanes + self._lane_L).ravel()
        if row_N[0] < begin or row_N[-1] >= end:
            index_N = index_N[(row_N >= begin) & (row_N < end)]
        return index_N

    def _advance(self, epoch: int, position: int) -> None:
        """Let each lane serve the window that holds `position`, where it has one."""
        while due := self._due(epoch, position):
            for i in due:
                if self._slot_L[i] >= 0:  # all its rows were served
                    self._free.append(int(self._slot_L[i]))
                    self._slot_L[i] = -1
            self._send()
            for i in due:
                coming = self._coming[i]
                assert coming is not None
                assert coming.loaded is not None
                if coming.loaded.cancel():  # nobody has begun it
                    self._load(coming)
                else:
                    coming.loaded.result()
                self._slot_L[i], self._epoch_L[i] = coming.slot, coming.epoch
                self._start_L[i] = coming.window.start
                self._stop_L[i] = coming.window.start + coming.window.n_rows
            for i in due:
                self._look_ahead(i)

    def _due(self, epoch: int, position: int) -> list[int]:
        """The lanes whose next window holds `position` or rows before it, which nobody asked for."""
        now_L = (self._coming_epoch_L == epoch) & (self._coming_start_L <= position)
        return np.flatnonzero(now_L | (self._coming_epoch_L < epoch)).tolist()

    def _look_ahead(self, i: int) -> None:
        """Plan the next window of the i-th lane, and load it as soon as there is a slot."""
        coming = self._coming[i] = next(self._upcoming[i], None)
        if coming is None:
            self._coming_epoch_L[i] = self._epochs
            return
        self._coming_epoch_L[i], self._coming_start_L[i] = coming.epoch, coming.window.start
        heapq.heappush(self._waiting, (coming.epoch, coming.window.start, i))
        self._send()

    def _send(self) -> None:
        """Load what waits, the earliest needed first, as far as slots are free."""
        while self._free and self._waiting:
            coming = self._coming[heapq.heappop(self._waiting)[2]]
            assert coming is not None
            coming.slot = self._free.pop()
            coming.loaded = self._loaders.submit(self._load, coming)

    def _windows_of(self, lane: int, epoch: int, position: int) -> Iterator[_Coming]:
        for e in range(epoch, self._epochs):
            order = self._orders(e)
            for window in order.windows(lane, position if e == epoch else 0):
                yield _Coming(e, window, order)

    def _load(self, coming: _Coming) -> None:
        """Fill a slot with a window's rows in the order in which they are served."""
        window, permutation = coming.window, coming.order.window_permutation(coming.window)
        chunk_rows = self._chunks.layout[next(iter(self._pool))]["chunk_rows"]
        whole = [s.chunk for s in window.spans if s.stop - s.start == chunk_rows]
        data = self._chunks.bytes_of([(name, chunk) for name in self._pool for chunk in whole])
        for name, pool in self._pool.items():
            rows = self._stored_rows(name, window, data)
            # decoded rows are still in the core's cache; "clip" goes without the copy that "raise" makes
            rows.take(permutation, axis=0, out=pool[coming.slot, : window.n_rows], mode="clip")

    def _stored_rows(self, name: str, window: Window, data: Mapping[tuple[str, int], bytes]) -> np.ndarray:
        """A window's rows as they are stored, in memory that the thread uses again."""
        pool, whole = self._pool[name], self._chunks.layout[name]["chunk_rows"]
        if name not in self._scratch.__dict__:
            self._scratch.__dict__[name] = _aligned(pool.shape[1:], pool.dtype)
        rows = self._scratch.__dict__[name][: window.n_rows]
        at = 0
        for span in window.spans:
            out = rows[at : at + span.stop - span.start]
            if len(out) == whole:
                self._chunks.read_into(name, span.chunk, out, data.get((name, span.chunk)))
            else:
                out[:] = self._read(name, span.chunk)[span.start : span.stop]
            at += len(out)
        return rows


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Fresh memory that begins at a cache line, so that rows of whole lines lie in as few as they can."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % _CACHE_LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def _count(row: int, lane_L: np.ndarray, lanes: int) -> np.ndarray:
    """Global rows below `row` that are of each lane."""
    return (row - lane_L + lanes - 1) // lanes


def _slot_bytes(layout: Mapping[str, Mapping[str, Any]], order: Order) -> int:
    """What one window takes in memory."""
    row = sum(int(np.prod(a["row"], dtype=np.int64)) * a["dtype"].itemsize for a in layout.values())
    return order.window_rows * row


def _n_slots(slot_bytes: int, n_lanes: int, order: Order, prefetch_bytes: int | None) -> int:
    """Slots of the pool: one for each lane at least, two at most."""
    if prefetch_bytes is None:
        return 2 * n_lanes
    if prefetch_bytes < n_lanes * slot_bytes:
        raise SpecError(
            f"prefetch_bytes is {prefetch_bytes:,}; the windows of {n_lanes} lanes, {order.window} chunks each, "
            f"take {n_lanes * slot_bytes:,}. Give that or more, fewer lanes or a smaller window (another order), or "
            "fewer sites"
        )
    return min(2 * n_lanes, prefetch_bytes // slot_bytes)
