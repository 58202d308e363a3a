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
from .filters import Filter
from .order import Order, Span, default_window
from .output import Output

if TYPE_CHECKING:
    from .reader import Dataset

_READ_THREADS = 2


@dataclass(frozen=True, eq=False)
class Rows:
    """Which token each row is: integer arrays [N]."""

    token_id: np.ndarray
    sequence: np.ndarray
    position: np.ndarray


@dataclass(frozen=True, eq=False)
class Batch(Mapping[str, np.ndarray]):
    """Rows of aligned sites: `batch[site]` is float32 [n, D]; `len(batch)` is n.

    Arrays are numpy's, or torch tensors where the stream was given a device.
    """

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
    """Where one lane stands: its current window and the next one on its way."""

    number: int
    slot: int
    """Where the current window lies in the pool."""
    windows: list[list[Span]]
    next_window: int
    start: int
    """Lane position of the current window's first row."""
    stop: int
    coming: Future[int] | None
    """The slot of the next window, once it is loaded."""


class Stream:
    """An iterator of batches. `state()` between any two batches resumes exactly there.

    Background threads read ahead, one window a lane and one batch; an error there reaches the
    consumer at the batch that needs the data. The end, or leaving the loop, ends the threads.
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
        output: Output,
        row_filter: Filter | None = None,
        drop_last: bool = False,
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
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self._output, self._filter = output, row_filter
        self.seed, self.lanes = seed, lanes
        self.n_rows = min(dataset._site_rows(site) for site in sites)
        if not self.n_rows:
            raise SpecError(
                f"{dataset.url} holds no rows of {', '.join(sites)} in split {dataset.split_name}"
            )
        if drop_last and batch_size > self.n_rows:
            raise SpecError(
                f"drop_last with batch_size {batch_size} serves nothing: there are {self.n_rows} rows; "
                "take a smaller batch"
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
        by_row = ["token_id", "sequence", "position"] if output.metadata else []
        self._names += by_row or (row_filter.arrays if row_filter else [])

    @property
    def dataset_url(self) -> str:
        return self.dataset.url

    def stats(self, site: str) -> dict[str, Any]:
        """As `Dataset.stats`, of the rows as served: centred and scaled if that was asked for."""
        return self._output.stats(self.dataset.stats(site), site)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: the order's parameters and the next global row."""
        return {**self._order_id(), "epoch": self._epoch, "row": self._row}

    def __len__(self) -> int:
        """Batches in all epochs."""
        whole, rest = divmod(self.n_rows, self.batch_size)
        return self.epochs * (whole + (rest > 0 and not self.drop_last))

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the stream stands to the end of the last epoch."""
        while self._epoch < self.epochs:
            self.dataset._shared.check_process()
            reader = _EpochReader(self, self._order(self._epoch), self._row // self.lanes)
            try:
                yield from self._epoch_batches(reader)
            finally:
                reader.close()

    def _epoch_batches(self, reader: "_EpochReader") -> Iterator[Batch]:
        """The rest of the epoch, each batch sent for while the one before it is used."""
        ends = self._ends(self._row)
        stop = next(ends, None)
        coming = None if stop is None else reader.send_for(self._row, stop)
        while coming is not None and stop is not None:
            self.dataset._shared.check_process()
            acts, rows = self._output.finish(coming.result())
            after = next(ends, None)
            coming = None if after is None else reader.send_for(stop, after)
            self._epoch, self._row = (self._epoch + 1, 0) if after is None else (self._epoch, stop)
            stop = after
            yield Batch(acts, None if rows is None else Rows(**rows))
        if self._row:  # resumed where no whole batch is left
            self._epoch, self._row = self._epoch + 1, 0

    def _ends(self, row: int) -> Iterator[int]:
        """Where the batches of the rest of an epoch end, the first of which begins at `row`."""
        yield from range(row + self.batch_size, self.n_rows + 1, self.batch_size)
        if not self.drop_last and (self.n_rows - row) % self.batch_size:
            yield self.n_rows

    def _order(self, epoch: int) -> Order:
        return Order(self.n_rows, self._chunk_rows, self.seed, epoch, self.lanes, self.window)

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
            "where": self._filter.digest if self._filter else None,
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
                    "open the same dataset version with the same seed, lanes, window and where to resume"
                )
        epoch, row = state.get("epoch"), state.get("row")
        if not (isinstance(epoch, int) and isinstance(row, int) and epoch >= 0 and 0 <= row < self.n_rows):
            raise SpecError(
                f"the stream state stands at epoch {epoch!r}, row {row!r}; wanted a row below {self.n_rows}"
            )
        self._epoch, self._row = epoch, row


class _EpochReader:
    """The windows of one epoch's lanes: codes and metadata, in slots of one pool.

    A lane reads from one slot while its next window is loaded into another. Loading and decoding
    happen in `_READ_THREADS` threads, the gathering of the next batch in one more.
    """

    def __init__(self, stream: Stream, order: Order, position: int) -> None:
        self.stream, self.order = stream, order
        layout = stream.dataset._layout
        numbers = range(stream.rank, stream.lanes, stream.world_size)
        windows = [order.lane_windows(number) for number in numbers]
        self.slot_rows = max((_length(spans) for lane in windows for spans in lane), default=0)
        shape = (2 * len(windows), self.slot_rows)
        self.data = {
            name: np.empty((*shape, *layout[name]["row"]), layout[name]["dtype"]) for name in stream._names
        }
        self.free = list(range(len(windows), 2 * len(windows)))
        self.readers = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="actcache-read")
        self.gatherer = ThreadPoolExecutor(1, thread_name_prefix="actcache-gather")
        self.lanes = [
            _lane_at(number, slot, lane, position)
            for slot, (number, lane) in enumerate(zip(numbers, windows, strict=True))
        ]
        for lane in self.lanes:
            self._send_for(lane, lane.slot)
        for lane in self.lanes:
            self._next_window(lane)

    def close(self) -> None:
        """End the threads; what they were doing is dropped."""
        self.gatherer.shutdown(cancel_futures=True)
        self.readers.shutdown(cancel_futures=True)

    def send_for(self, begin: int, end: int) -> Future[dict[str, Any]]:
        """This rank's rows among global rows [begin, end), gathered in the background."""
        return self.gatherer.submit(self._take, begin, end)

    def _take(self, begin: int, end: int) -> dict[str, Any]:
        n_lanes = self.stream.lanes
        first, last = begin // n_lanes, -(-end // n_lanes)
        parts: list[dict[str, np.ndarray]] = []
        position = first
        while position < last:
            for lane in self.lanes:
                if position >= lane.stop:
                    self._next_window(lane)
            stop = min([last, *(lane.stop for lane in self.lanes if lane.stop > position)])
            parts.append(self._gather(position, stop, begin, end))
            position = stop
        joined = (
            {name: np.concatenate([p[name] for p in parts]) for name in self.data}
            if len(parts) > 1
            else parts[0]
        )
        if self.stream._filter is not None:
            joined = self.stream._filter.apply(joined)
        return self.stream._output.stage(joined)

    def _gather(self, position: int, stop: int, begin: int, end: int) -> dict[str, np.ndarray]:
        """Lane positions [position, stop) of every lane, cut to the global rows [begin, end)."""
        start_L, slot_L, number_L = np.array([(lane.start, lane.slot, lane.number) for lane in self.lanes]).T
        position_P = np.arange(position, stop)[:, None]
        within_PL = position_P - start_L
        np.clip(within_PL, 0, self.slot_rows - 1, out=within_PL)  # lanes that have ended are cut below
        index = (within_PL + slot_L * self.slot_rows).ravel()
        row = (position_P * self.stream.lanes + number_L).ravel()
        if row[0] < begin or row[-1] >= end:
            index = index[(row >= begin) & (row < end)]
        return {
            name: pool.reshape(-1, *pool.shape[2:]).take(index, axis=0) for name, pool in self.data.items()
        }

    def _next_window(self, lane: _Lane) -> None:
        """Let the lane serve the window that was sent for, and send for the one after it."""
        if lane.coming is None:
            return
        slot = lane.coming.result()
        if slot != lane.slot:
            self.free.append(lane.slot)
        lane.slot, lane.start = slot, lane.stop
        lane.stop += _length(lane.windows[lane.next_window])
        lane.next_window += 1
        lane.coming = None
        if lane.next_window < len(lane.windows):
            self._send_for(lane, self.free.pop())

    def _send_for(self, lane: _Lane, slot: int) -> None:
        if lane.next_window < len(lane.windows):
            lane.coming = self.readers.submit(self._load, lane, lane.next_window, slot)

    def _load(self, lane: _Lane, window: int, slot: int) -> int:
        """Fill a slot with a window's rows in the order in which they are served."""
        spans = lane.windows[window]
        n = _length(spans)
        permutation = self.order.window_permutation(lane.number, window, n)
        read = self.stream.dataset._chunks.read
        for name, pool in self.data.items():
            rows = np.concatenate([read(name, span.chunk)[span.start : span.stop] for span in spans])
            rows.take(permutation, axis=0, out=pool[slot, :n], mode="clip")  # "raise" would copy twice
        return slot


def _lane_at(number: int, slot: int, windows: list[list[Span]], position: int) -> _Lane:
    """The lane just before the window that holds lane position `position`."""
    start, window = 0, 0
    while window < len(windows) and position >= start + _length(windows[window]):
        start += _length(windows[window])
        window += 1
    return _Lane(number, slot, windows, window, start, start, None)


def _length(spans: list[Span]) -> int:
    return sum(span.stop - span.start for span in spans)
