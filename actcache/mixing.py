"""Several datasets in one stream, mixed by weight.

`mix` says how many rows of each dataset every batch has; each dataset keeps its own order. It resumes
exactly, at any batch and world size. Specified in docs/format.md, "Mixed order".
Shapes: N rows, K datasets, P rows in a period.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import SpecError
from .gathering import Gather
from .order import permutation
from .stream import Batch, Rows, Stream, StreamOptions

if TYPE_CHECKING:
    from .reader import Dataset

PERIOD = 4096
"""Rows after which the shares of a mix are exact; weights are rounded to 1 / PERIOD."""


@dataclass(frozen=True, eq=False)
class MixedBatch(Batch):
    """A batch of several datasets' rows, dataset by dataset."""

    source: np.ndarray
    """int64 [n]: which of the mixed datasets each row is of."""


class Schedule:
    """Which dataset each row of a mix is of.

    Rows come in periods of `PERIOD`; each holds `ticks[i]` rows of dataset i, in an order that
    (seed, period) decides. So any count of rows is found in O(1).
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        weights_K = np.asarray(weights, np.float64)
        if not len(weights_K) or not np.isfinite(weights_K).all() or (weights_K <= 0).any():
            raise SpecError(f"weights are {list(weights)}; each must be above 0")
        self.ticks = _ticks(weights_K)
        self.seed = seed
        self._counts = lru_cache(maxsize=4)(self._period_counts)
        if not self.ticks.all():
            raise SpecError(f"weights are {list(weights)}; none may be below 1/{PERIOD} of their sum")

    def counts(self, row: int) -> np.ndarray:
        """int64 [K]: rows of each dataset among the first `row` rows."""
        period, rest = divmod(row, PERIOD)
        return period * self.ticks + self._counts(period)[rest]

    def longest(self, rows: Sequence[int]) -> int:
        """The largest number of rows that needs at most `rows[i]` of dataset i."""
        found = []
        for i, n in enumerate(rows):
            period, rest = divmod(n, int(self.ticks[i]))
            within = self._counts(period)[:, i]
            found.append(period * PERIOD + int(np.searchsorted(within, rest, side="right")) - 1)
        return min(found)

    def _period_counts(self, period: int) -> np.ndarray:
        """int64 [P + 1, K]: rows of each dataset among the first p of a period."""
        source_P = np.searchsorted(
            np.cumsum(self.ticks), permutation(PERIOD, "mix", self.seed, period), side="right"
        )
        counts = np.zeros((PERIOD + 1, len(self.ticks)), np.int64)
        np.cumsum(source_P[:, None] == np.arange(len(self.ticks)), axis=0, out=counts[1:])
        return counts


def _ticks(weights_K: np.ndarray) -> np.ndarray:
    """Shares of `PERIOD` by largest remainder, ties to the first; int64 [K]."""
    share_K = weights_K / weights_K.sum() * PERIOD
    ticks = np.floor(share_K).astype(np.int64)
    short = PERIOD - int(ticks.sum())
    ticks[np.argsort(ticks - share_K, kind="stable")[:short]] += 1
    return ticks


def mix(
    parts: Sequence[tuple["Dataset", float]],
    sites: Sequence[str] | str | None = None,
    *,
    state: Mapping[str, Any] | None = None,
    **options: Any,
) -> "MixedStream":
    """Shuffled batches of several datasets' rows, in the proportions of their weights.

    It ends before the first row that some dataset would have to serve in pass `epochs` + 1; until then
    each dataset serves its rows in its own order, none twice in a pass. `options` are those of
    `Dataset.stream` without `drop_last`. `prefetch_bytes` holds for each dataset; `centre` and `unit_norm`
    use the weighted statistics of all.

    Raises:
        SpecError: bad weights, sites that some dataset lacks or that differ in width, or a state of
            another mix.
    """
    return _mixed(parts, sites, StreamOptions(**options), state)


def _mixed(
    parts: Sequence[tuple["Dataset", float]],
    sites: Sequence[str] | str | None,
    asked: StreamOptions,
    state: Mapping[str, Any] | None,
) -> "MixedStream":
    if asked.rotated:
        raise SpecError("each dataset of a mix has its own rotation; leave rotated out")
    if asked.drop_last:
        raise SpecError("a mix has no drop_last; its last batch is short, leave that one out")
    datasets = [dataset for dataset, _ in parts]
    schedule = Schedule([weight for _, weight in parts], asked.seed)
    chosen = datasets[0]._chosen(sites)
    for site in chosen:
        widths = {dataset.url: dataset.d_in(site) for dataset in datasets}
        if len(set(widths.values())) > 1:
            raise SpecError(f"{site} has different widths: {widths}; mix datasets of one model")
    share_K = schedule.ticks / PERIOD

    def train_stats(site: str) -> dict[str, Any]:
        return _mixed_stats([d.split("train").stats(site) for d in datasets], share_K)

    windows = windows_of(state, len(datasets), asked.window)
    streams = [
        _MixPart(dataset, chosen, replace(asked, window=window), train_stats=train_stats)
        for dataset, window in zip(datasets, windows, strict=True)
    ]
    return MixedStream(parts, streams, schedule, asked, state)


def windows_of(state: Mapping[str, Any] | None, n: int, window: int | None) -> list[int | None]:
    """The window of each part: as asked for, else that of the state, whatever the batch size is now."""
    parts = state.get("parts") if state else None
    if window is not None or not isinstance(parts, list) or len(parts) != n:
        return [window] * n
    return [found if isinstance(found := p.get("window"), int) and found > 0 else None for p in parts]


class _MixPart(Stream):
    """One dataset's stream in a mix; its batches end where the mix's do."""

    _bounds: Iterator[int] = iter(())
    _bound: int | None = None

    @property
    def position(self) -> int:
        """Rows served, all passes together."""
        return self._epoch * self.n_rows + self._row

    def go_to(self, position: int, bounds: Iterator[int]) -> None:
        """Stand at `position`; batches end at `bounds`, also counted over all passes."""
        self._epoch, self._row = divmod(position, self.n_rows)
        self._bounds, self._bound = bounds, next(bounds, None)

    def _ends(self, epoch: int, row: int) -> Iterator[int]:
        start = epoch * self.n_rows
        while self._bound is not None and self._bound < start + self.n_rows:
            if self._bound > start + row:
                row = self._bound - start
                yield row
            self._bound = next(self._bounds, None)
        if self._bound is not None:
            yield self.n_rows


class MixedStream:
    """An iterator of `MixedBatch`; as `Stream`, with `state()` between any two batches, and it pickles."""

    def __init__(
        self,
        parts: Sequence[tuple["Dataset", float]],
        streams: list[_MixPart],
        schedule: Schedule,
        options: StreamOptions,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._parts, self.options = list(parts), options
        self._streams, self._schedule, self._row = streams, schedule, 0
        first = streams[0]
        self.sites, self.batch_size = first.sites, first.batch_size
        self.n_rows = schedule.longest([s.n_rows * s.epochs for s in streams])
        self.epochs = 1
        if not self.n_rows:
            raise SpecError("the datasets are too small for these weights: the first row is one too many")
        if state is not None:
            self.restore(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return _mixed, (self._parts, self.sites, self.options.sendable(), self.state())

    def for_rank(self, rank: int, world_size: int, gather: Gather | None = None) -> "MixedStream":
        """As `Stream.for_rank`."""
        options = replace(self.options, rank=rank, world_size=world_size, gather=gather)
        return _mixed(self._parts, self.sites, options, self.state())

    def __len__(self) -> int:
        return -(-self.n_rows // self.batch_size)

    def stats(self, site: str) -> dict[str, Any]:
        """mean, variance, mean_norm, max_abs and n_rows of the mixture as served."""
        parts = [stream.stats(site) for stream in self._streams]
        return _mixed_stats(parts, self._schedule.ticks / PERIOD) | {"n_rows": self.n_rows}

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return {**self._order_id(), "row": self._row}

    def _order_id(self) -> dict[str, Any]:
        return {
            "format": 1,
            "kind": "mix",
            "seed": self._schedule.seed,
            "ticks": self._schedule.ticks.tolist(),
            "parts": [stream._order_id() for stream in self._streams],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says. Call it between iterations, not during one.

        Raises:
            SpecError: the state is of another mix.
        """
        check_same(self._order_id(), state, "mix")
        self._row = _checked_row(state, self.n_rows + 1)

    def __iter__(self) -> Iterator[MixedBatch]:
        with contextlib.ExitStack() as stack:
            counts_K = self._schedule.counts(self._row)
            iterators = []
            for i, stream in enumerate(self._streams):
                stream.go_to(int(counts_K[i]), self._bounds(self._row, i))
                iterators.append(iter(stream))
                stack.callback(iterators[i].close)  # type: ignore[attr-defined]  # a generator
            while self._row < self.n_rows:
                end = min(self._row + self.batch_size, self.n_rows)
                counts_K = self._schedule.counts(end)
                pieces, n_rows = [], 0
                for i, stream in enumerate(self._streams):
                    while (begin := stream.position) < counts_K[i]:
                        pieces.append(_Piece(i, next(iterators[i]), n_rows))
                        n_rows += stream.position - begin
                self._row = end
                yield _joined(pieces)

    def _bounds(self, row: int, i: int) -> Iterator[int]:
        """Rows of dataset i before the end of each batch."""
        while row < self.n_rows:
            row = min(row + self.batch_size, self.n_rows)
            yield int(self._schedule.counts(row)[i])


class _Piece(NamedTuple):
    """Rows of one dataset, and one pass over it, in a batch."""

    source: int
    batch: Batch
    begin: int
    """The place of its first row, whoever serves that."""


def _joined(pieces: list[_Piece]) -> MixedBatch:
    batches = [piece.batch for piece in pieces]
    source = np.concatenate([np.full(len(piece.batch), piece.source) for piece in pieces])
    place = np.concatenate([piece.begin + piece.batch.place for piece in pieces])
    acts = {site: _concatenate([batch[site] for batch in batches]) for site in batches[0].acts}
    rows = None
    if batches[0]._rows is not None:
        names = ("token_id", "sequence", "position")
        rows = Rows(*(_concatenate([getattr(batch, name) for batch in batches]) for name in names))
    return MixedBatch(acts, rows, place, source)


def _concatenate(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch

    return torch.cat(parts)


def _mixed_stats(parts: Sequence[Mapping[str, Any]], share_K: np.ndarray) -> dict[str, Any]:
    """Statistics of rows drawn from the parts in these shares."""
    mean_D = sum(w * p["mean"] for w, p in zip(share_K, parts, strict=True))
    square_D = sum(w * (p["variance"] + p["mean"] ** 2) for w, p in zip(share_K, parts, strict=True))
    return {
        "mean": mean_D,
        "variance": np.maximum(square_D - mean_D**2, 0.0),
        "mean_norm": float(sum(w * p["mean_norm"] for w, p in zip(share_K, parts, strict=True))),
        "max_abs": max(p["max_abs"] for p in parts),
        "n_rows": sum(p["n_rows"] for p in parts),
    }


def check_same(ours: Mapping[str, Any], state: Mapping[str, Any], what: str) -> None:
    """See that a state is of this order; `what` names the kind of stream.

    Raises:
        SpecError: it is of another; says what differs.
    """
    found = {name: state.get(name) for name in ours}
    if found != ours:
        wrong = "; ".join(
            d
            for name in ours
            for a, b in [(found[name], ours[name])]
            for d in (
                differences(dict(enumerate(a)), dict(enumerate(b)), name)
                if isinstance(a, list) and isinstance(b, list)
                else differences(a, b, name)
            )
        )
        raise SpecError(
            f"the state is not of this {what}: {wrong}. Open the same datasets with the same order to resume"
        )


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """What differs between two JSON values, one phrase a field."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield f"{path} is {a!r} and {b!r}"


def _checked_row(state: Mapping[str, Any], n: int) -> int:
    row = state.get("row")
    if not isinstance(row, int) or not 0 <= row < n:
        raise SpecError(f"the state stands at row {row!r}; wanted one below {n}")
    return row
