"""Streams: shuffled batches of aligned sites, each row once an epoch, with an exact cursor.

The order is `actcache.order.Order`; it depends on neither world size nor prefetching. Windows hold
codes as stored, and rows are decoded when they are served. Specified in docs/format.md, "Reading
order".
Shapes: N rows, D = d_in, L lanes, P positions of a lane.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import SpecError
from .order import Order, Span, default_window

if TYPE_CHECKING:
    from .reader import Dataset

_PREFETCH_THREADS = 2


@dataclass(frozen=True, eq=False)
class Rows:
    """Which token each row is: integer arrays [N]."""

    token_id: np.ndarray
    sequence: np.ndarray
    position: np.ndarray


@dataclass(frozen=True, eq=False)
class Batch(Mapping[str, np.ndarray]):
    """Rows of aligned sites: `batch[site]` is float32 [n, D]; `len(batch)` is n."""

    acts: Mapping[str, np.ndarray]
    _rows: Rows | None

    def __getitem__(self, site: str) -> np.ndarray:
        return self.acts[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.acts)

    def __len__(self) -> int:
        """Rows, not sites."""
        return len(next(iter(self.acts.values())))

    @property
    def token_id(self) -> np.ndarray:
        return self._metadata.token_id

    @property
    def sequence(self) -> np.ndarray:
        return self._metadata.sequence

    @property
    def position(self) -> np.ndarray:
        return self._metadata.position

    @property
    def _metadata(self) -> Rows:
        if self._rows is None:
            raise SpecError("this stream was opened with metadata=False; open it with metadata=True")
        return self._rows


@dataclass
class _Lane:
    """Where one lane stands: its current window in the pool and the next one on its way."""

    number: int
    windows: list[list[Span]]
    next_window: int
    start: int
    """Lane position of the current window's first row."""
    stop: int
    coming: Future[dict[str, np.ndarray]] | None


class Stream:
    """An iterator of batches. `state()` between any two batches resumes exactly there.

    Two background threads read ahead, one window a lane; an error there reaches the consumer at
    the batch that needs the data. `close()`, exhaustion or garbage collection ends them.
    """

    def __init__(
        self,
        dataset: "Dataset",
        sites: list[str],
        batch_size: int,
        seed: int,
        epochs: int,
        rank: int,
        world_size: int,
        state: Mapping[str, Any] | None,
        lanes: int,
        window: int | None,
        metadata: bool,
    ) -> None:
        identity = dataset.manifest.identity
        if batch_size < 1 or epochs < 1:
            raise SpecError(f"batch_size is {batch_size} and epochs {epochs}; both must be at least 1")
        if lanes < 1 or world_size < 1 or lanes % world_size or not 0 <= rank < world_size:
            raise SpecError(
                f"rank {rank} of world_size {world_size} with {lanes} lanes: world_size must divide lanes, "
                "and rank lie below it"
            )
        self.dataset, self.sites, self.batch_size, self.epochs = dataset, sites, batch_size, epochs
        self.rank, self.world_size, self.metadata = rank, world_size, metadata
        self.seed, self.lanes = seed, lanes
        self.n_rows = min(dataset._site_rows(site) for site in sites)
        if not self.n_rows:
            raise SpecError(
                f"{dataset.url} holds no rows of {', '.join(sites)} in split {dataset.split_name}"
            )
        self.window = window or default_window(
            batch_size, lanes, identity["tokens"]["context_size"], identity["block_rows"]
        )
        self._chunk_rows = identity["chunk_rows"]
        self._epoch, self._row = 0, 0
        if state is not None:
            self.restore(state)
        self._names = [f"{site}/codes" for site in sites]
        if dataset._shared.precision.quantised:
            self._names += [f"{site}/scale" for site in sites]
        if metadata:
            self._names += ["token_id", "sequence", "position"]
        self._pool: ThreadPoolExecutor | None = None

    @property
    def dataset_url(self) -> str:
        return self.dataset.url

    def stats(self, site: str) -> dict[str, Any]:
        """As `Dataset.stats`."""
        return self.dataset.stats(site)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: the order's parameters and the next global row."""
        return {**self._order_id(), "epoch": self._epoch, "row": self._row}

    def __len__(self) -> int:
        """Batches in all epochs."""
        return self.epochs * -(-self.n_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the stream stands to the end of the last epoch."""
        while self._epoch < self.epochs:
            order = Order(self.n_rows, self._chunk_rows, self.seed, self._epoch, self.lanes, self.window)
            with ThreadPoolExecutor(_PREFETCH_THREADS, thread_name_prefix="actcache-read") as pool:
                self._pool = pool
                try:
                    reader = _EpochReader(self, order, pool, self._row // self.lanes)
                    while self._row < self.n_rows:
                        stop = min(self._row + self.batch_size, self.n_rows)
                        batch = reader.take(self._row, stop)
                        self._advance(stop)
                        yield batch
                        if self._row == 0:
                            break
                finally:
                    pool.shutdown(cancel_futures=True)
                    self._pool = None

    def _advance(self, row: int) -> None:
        self._row = row
        if row == self.n_rows:
            self._epoch, self._row = self._epoch + 1, 0

    def _order_id(self) -> dict[str, Any]:
        return {
            "format": 1,
            "dataset": self.dataset.id,
            "version": self.dataset.manifest.version,
            "split": self.dataset.split_name,
            "n_rows": self.n_rows,
            "seed": self.seed,
            "lanes": self.lanes,
            "window": self.window,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says; O(1). Call it between iterations, not during one.

        Raises:
            SpecError: the state is of another dataset version or order.
        """
        for name, ours in self._order_id().items():
            if state.get(name) != ours:
                raise SpecError(
                    f"the stream state has {name} {state.get(name)!r}, this stream {ours!r}; "
                    "open the same dataset version with the same seed, lanes and window to resume"
                )
        epoch, row = state.get("epoch"), state.get("row")
        if not (isinstance(epoch, int) and isinstance(row, int) and epoch >= 0 and 0 <= row < self.n_rows):
            raise SpecError(
                f"the stream state stands at epoch {epoch!r}, row {row!r}; wanted a row below {self.n_rows}"
            )
        self._epoch, self._row = epoch, row


class _EpochReader:
    """The windows of one epoch's lanes: codes and metadata of the current window of each, in one pool."""

    def __init__(self, stream: Stream, order: Order, pool: ThreadPoolExecutor, position: int) -> None:
        self.stream, self.order, self.pool = stream, order, pool
        layout = stream.dataset._layout
        numbers = range(stream.rank, stream.lanes, stream.world_size)
        self.rows_per_lane = order.window * order.chunk_rows
        shape = (len(numbers), self.rows_per_lane)
        self.data = {
            name: np.empty((*shape, *layout[name]["row"]), layout[name]["dtype"]) for name in stream._names
        }
        self.permutation_LP = np.zeros(shape, np.int64)
        self.lanes = [self._lane_at(slot, number, position) for slot, number in enumerate(numbers)]
        for slot in range(len(self.lanes)):
            self._next_window(slot)

    def take(self, begin: int, end: int) -> Batch:
        """This rank's rows among global rows [begin, end)."""
        n_lanes = self.stream.lanes
        first, last = begin // n_lanes, -(-end // n_lanes)
        parts: list[dict[str, np.ndarray]] = []
        position = first
        while position < last:
            for slot, lane in enumerate(self.lanes):
                if position >= lane.stop and lane.next_window < len(lane.windows):
                    self._next_window(slot)
            stop = min([last, *(lane.stop for lane in self.lanes if lane.stop > position)])
            parts.append(self._gather(position, stop, begin, end))
            position = stop
        joined = (
            {name: np.concatenate([p[name] for p in parts]) for name in self.data}
            if len(parts) > 1
            else parts[0]
        )
        return self._decode(joined)

    def _gather(self, position: int, stop: int, begin: int, end: int) -> dict[str, np.ndarray]:
        """Lane positions [position, stop) of every lane, cut to the global rows [begin, end)."""
        starts_L = np.array([lane.start for lane in self.lanes])
        numbers_L = np.array([lane.number for lane in self.lanes])
        within_PL = np.arange(position, stop)[:, None] - starts_L
        np.clip(within_PL, 0, self.rows_per_lane - 1, out=within_PL)  # lanes that have ended are cut below
        slot_L = np.arange(len(self.lanes))
        index = (self.permutation_LP[slot_L, within_PL] + slot_L * self.rows_per_lane).ravel()
        row = (np.arange(position, stop)[:, None] * self.stream.lanes + numbers_L).ravel()
        if row[0] < begin or row[-1] >= end:
            index = index[(row >= begin) & (row < end)]
        return {
            name: pool.reshape(-1, *pool.shape[2:]).take(index, axis=0) for name, pool in self.data.items()
        }

    def _decode(self, parts: dict[str, np.ndarray]) -> Batch:
        shared = self.stream.dataset._shared
        acts = {
            site: shared.decode(site, parts[f"{site}/codes"], parts.get(f"{site}/scale"))
            for site in self.stream.sites
        }
        rows = Rows(parts["token_id"], parts["sequence"], parts["position"]) if self.stream.metadata else None
        return Batch(acts, rows)

    def _lane_at(self, slot: int, number: int, position: int) -> _Lane:
        """The lane just before the window that holds lane position `position`."""
        windows = self.order.lane_windows(number)
        start, window = 0, 0
        while window < len(windows) and position >= start + _length(windows[window]):
            start += _length(windows[window])
            window += 1
        lane = _Lane(number, windows, window, start, start, None)
        if window < len(windows):
            lane.coming = self.pool.submit(self._load, windows[window])
        return lane

    def _next_window(self, slot: int) -> None:
        """Put the lane's next window into the pool and send for the one after it."""
        lane = self.lanes[slot]
        if lane.coming is None:
            return
        loaded = lane.coming.result()
        lane.start, window = lane.stop, lane.next_window
        lane.stop += _length(lane.windows[window])
        n = lane.stop - lane.start
        for name, values in loaded.items():
            self.data[name][slot, :n] = values
        self.permutation_LP[slot, :n] = self.order.window_permutation(lane.number, window, n)
        lane.next_window += 1
        more = lane.next_window < len(lane.windows)
        lane.coming = self.pool.submit(self._load, lane.windows[lane.next_window]) if more else None

    def _load(self, spans: list[Span]) -> dict[str, np.ndarray]:
        read = self.stream.dataset._read_chunk
        return {
            name: np.concatenate([read(name, span.chunk)[span.start : span.stop] for span in spans])
            for name in self.data
        }


def _length(spans: list[Span]) -> int:
    return sum(span.stop - span.start for span in spans)
