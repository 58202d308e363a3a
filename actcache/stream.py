"""Streams: shuffled batches of aligned sites, each row once an epoch, with an exact cursor.

The order is `actcache.order.Order`; it depends on neither world size nor prefetching. Windows hold
codes as stored (`actcache.windows`), and rows are decoded when they are served. Specified in
docs/format.md, "Reading order".
Shapes: N rows, D = d_in.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import SpecError
from .filters import Filter, Where
from .gathering import Gather, Gathering, check_ranks
from .order import DEFAULT_LANES, Order, default_window, lanes_of, rows_of_lanes
from .output import Output, TrainStats
from .spec import digest
from .windows import Windows

if TYPE_CHECKING:
    from .reader import Dataset


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
    place: np.ndarray
    """int64 [n], always numpy: the place of each row in the batch that a single reader without a filter gets."""

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


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """The options of `Dataset.stream`, which describes them; a mix and aligned datasets take the same."""

    batch_size: int = 4096
    seed: int = 0
    epochs: int = 1
    rank: int = 0
    world_size: int = 1
    lanes: int = DEFAULT_LANES
    window: int | None = None
    prefetch_bytes: int | None = None
    metadata: bool = True
    where: Where | None = None
    drop_last: bool = False
    dtype: Any = "float32"
    device: Any = None
    centre: bool = False
    unit_norm: bool = False
    rotated: bool = False
    gather: Gather | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.epochs < 1:
            raise SpecError(
                f"batch_size is {self.batch_size} and epochs {self.epochs}; both must be at least 1"
            )
        if not 0 <= self.rank < self.world_size <= self.lanes:
            raise SpecError(
                f"rank {self.rank} of world_size {self.world_size} with {self.lanes} lanes: world_size must lie in "
                "1..lanes, and rank below it"
            )
        if self.gather is not None:
            check_ranks(self.gather.ranks, self.rank, self.world_size)

    def sendable(self) -> "StreamOptions":
        """The options as they are pickled.

        Raises:
            SpecError: they hold a `gather`, which belongs to this process.
        """
        if self.gather is not None:
            raise SpecError(
                "a stream with gather= cannot be pickled; send one without it, and call for_rank(rank, world_size, "
                "gather) where it arrives"
            )
        return self


class Stream:
    """An iterator of batches. `state()` between any two batches resumes exactly there.

    Background threads read ahead, one window a lane and one batch; an error there reaches the
    consumer at the batch that needs the data. The end, or leaving the loop, ends the threads.

    A pickle of it holds its dataset's URL, version and storage options, its own options and its state:
    another process opens it again and goes on where it stood. One of `memory://` opens in its own process only.
    """

    def __init__(
        self,
        dataset: "Dataset",
        sites: list[str],
        options: StreamOptions,
        state: Mapping[str, Any] | None = None,
        train_stats: TrainStats | None = None,
    ) -> None:
        """`train_stats`: what to centre and scale by, if not the dataset's own."""
        identity = dataset.manifest.identity
        self.dataset, self.sites, self.options = dataset, sites, options
        self.batch_size, self.epochs = options.batch_size, options.epochs
        self._output = Output(
            dataset,
            sites,
            options.metadata,
            options.dtype,
            options.device,
            options.centre,
            options.unit_norm,
            train_stats,
            options.rotated,
        )
        self._filter = None if options.where is None else Filter(options.where, dataset, sites)
        self._lanes = lanes_of(options.rank, options.world_size, options.lanes)
        self._served_lanes: Sequence[int] = self._lanes
        self.n_rows = min(dataset._site_rows(site) for site in sites)
        if not self.n_rows:
            raise SpecError(
                f"{dataset.url} holds no rows of {', '.join(sites)} in split {dataset.split_name}"
            )
        if options.drop_last and self.batch_size > self.n_rows:
            raise SpecError(
                f"drop_last with batch_size {self.batch_size} serves nothing: there are {self.n_rows} rows; "
                "take a smaller batch"
            )
        self.window = options.window or default_window(
            self.batch_size, options.lanes, identity["tokens"]["context_size"], identity["block_rows"]
        )
        self._chunk_rows = identity["chunk_rows"]
        self._epoch, self._row = 0, 0
        if state is not None:
            self.restore(state)
        self._names = [f"{site}/codes" for site in sites]
        if dataset._shared.precision.quantised:
            self._names += [f"{site}/scale" for site in sites]
        by_row = ["token_id", "sequence", "position"] if options.metadata else []
        self._names += by_row or (self._filter.arrays if self._filter else [])
        self._gathering: Gathering | None = None
        if options.gather is not None:
            arrays = {name: dataset._layout[name] for name in self._names}
            self._gathering = Gathering(
                options.gather, options.rank, options.world_size, options.lanes, arrays
            )
            self._served_lanes = self._gathering.lanes

    @property
    def dataset_url(self) -> str:
        return self.dataset.url

    def stats(self, site: str) -> dict[str, Any]:
        """As `Dataset.stats`, of the rows as served: centred and scaled if that was asked for."""
        return self._output.stats(self.dataset.stats(site), site)

    def rotation(self, site: str) -> np.ndarray | None:
        """float32 [D, D] by which rows served in rotated coordinates return: rows @ rotation; else None."""
        return self.dataset._shared.calibration(site).rotation_DD if self.options.rotated else None

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: the order's parameters and the next global row."""
        return {**self._order_id(), "epoch": self._epoch, "row": self._row}

    def __reduce__(self) -> tuple[Any, ...]:
        return Stream, (self.dataset, self.sites, self.options.sendable(), self.state())

    def for_rank(self, rank: int, world_size: int, gather: Gather | None = None) -> "Stream":
        """The same stream, from where this one stands, as one rank of `world_size` serves it."""
        options = replace(self.options, rank=rank, world_size=world_size, gather=gather)
        return Stream(self.dataset, self.sites, options, self.state())

    def __len__(self) -> int:
        """Batches in all epochs."""
        whole, rest = divmod(self.n_rows, self.batch_size)
        return self.epochs * (whole + (rest > 0 and not self.options.drop_last))

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the stream stands to the end of the last epoch."""
        self.dataset._shared.check_process()
        steps = self._steps()
        step = next(steps, None)
        if step is not None:
            windows = self._windows(step)
            gatherer = ThreadPoolExecutor(1, thread_name_prefix="actcache-gather")
            try:
                coming = gatherer.submit(self._stage, windows, step)
                while step is not None:
                    self.dataset._shared.check_process()
                    staged, place = coming.result()
                    after = next(steps, None)
                    if after is not None:  # made while this one is used
                        coming = gatherer.submit(self._stage, windows, after)
                    acts, rows = self._output.finish(staged)
                    same_epoch = after is not None and after.epoch == step.epoch
                    self._epoch, self._row = (step.epoch, step.end) if same_epoch else (step.epoch + 1, 0)
                    step = after
                    yield Batch(acts, None if rows is None else Rows(**rows), place)
            finally:
                try:
                    gatherer.shutdown()  # first: other ranks may wait for what it gathers
                finally:
                    windows.close()
        if self._row:  # resumed where no whole batch is left
            self._epoch, self._row = self._epoch + 1, 0

    def _steps(self) -> Iterator["_Step"]:
        """The batches from here to the end of the last epoch."""
        row = self._row
        for epoch in range(self._epoch, self.epochs):
            for end in self._ends(epoch, row):
                yield _Step(epoch, row, end)
                row = end
            row = 0

    def _ends(self, epoch: int, row: int) -> Iterator[int]:
        """Where the batches of the rest of an epoch end, the first of which begins at `row`."""
        yield from range(row + self.batch_size, self.n_rows + 1, self.batch_size)
        if not self.options.drop_last and (self.n_rows - row) % self.batch_size:
            yield self.n_rows

    def _windows(self, step: "_Step") -> Windows:
        """What reads ahead from the batch `step` on."""
        options = self.options
        return Windows(
            self.dataset._chunks,
            self._names,
            self._order,
            self.epochs,
            self._lanes,
            (step.epoch, step.begin // options.lanes),
            options.prefetch_bytes,
            self.dataset._shared.store.concurrent_reads,
        )

    def _stage(self, windows: Windows, step: "_Step") -> tuple[dict[str, Any], np.ndarray]:
        """The rows that are served of a batch, as far as a background thread makes them, and their places in it."""
        batch = step.epoch, step.begin, step.end
        if self._gathering is None:
            parts = windows.gather(*batch)
        else:
            parts = self._gathering.rows(*batch, self._digest, lambda out: windows.gather_into(out, *batch))
        row_N = rows_of_lanes(step.begin, step.end, self.options.lanes, self._served_lanes)
        parts["place"] = row_N - step.begin
        if self._filter is not None:
            parts = self._filter.apply(parts)
        return self._output.stage(parts), parts["place"]

    def _order(self, epoch: int) -> Order:
        options = self.options
        return Order(self.n_rows, self._chunk_rows, options.seed, epoch, options.lanes, self.window)

    @cached_property
    def _digest(self) -> str:
        """Digest of all that ranks which exchange rows must agree on."""
        order, options = self._order(0), self.options
        return digest(
            {
                **self._order_id(),
                "chunk_rows": order.chunk_rows,
                "arrays": self._names,
                "world_size": options.world_size,
                "epochs": self.epochs,
            }
        )

    def _order_id(self) -> dict[str, Any]:
        return {
            "format": 1,
            "dataset": self.dataset.id,
            "version": self.dataset.manifest.version,
            "split": self.dataset.split_name,
            "n_rows": self.n_rows,
            "seed": self.options.seed,
            "lanes": self.options.lanes,
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


@dataclass(frozen=True)
class _Step:
    """One batch: the global rows [begin, end) of an epoch."""

    epoch: int
    begin: int
    end: int
