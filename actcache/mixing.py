"""Several datasets in one stream: mixed by weight, or aligned row by row and side by side.

`mix` says how many rows of each dataset every batch has; each dataset keeps its own order.
`zip_datasets` (`actcache.zip`) takes datasets whose rows are the same tokens. Both resume exactly, at
any batch and world size. Specified in docs/format.md, "Mixed order" and "Aligned datasets".
Shapes: N rows, K datasets, P rows in a period.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import SpecError
from .order import Order, Span, permutation
from .reader import Index
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
    asked = StreamOptions(**options)
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

    windows = _windows(state, len(datasets), asked.window)
    streams = [
        _MixPart(dataset, chosen, replace(asked, window=window), train_stats=train_stats)
        for dataset, window in zip(datasets, windows, strict=True)
    ]
    return MixedStream(streams, schedule, state)


def _windows(state: Mapping[str, Any] | None, n: int, window: int | None) -> list[int | None]:
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
    """An iterator of `MixedBatch`; as `Stream`, with `state()` between any two batches."""

    def __init__(
        self, streams: list[_MixPart], schedule: Schedule, state: Mapping[str, Any] | None = None
    ) -> None:
        self._streams, self._schedule, self._row = streams, schedule, 0
        first = streams[0]
        self.sites, self.batch_size = first.sites, first.batch_size
        self.n_rows = schedule.longest([s.n_rows * s.epochs for s in streams])
        self.epochs = 1
        if not self.n_rows:
            raise SpecError("the datasets are too small for these weights: the first row is one too many")
        if state is not None:
            self.restore(state)

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
        _check_same(self._order_id(), state, "mix")
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
                pieces = []
                for i, stream in enumerate(self._streams):
                    while stream.position < counts_K[i]:
                        pieces.append((i, next(iterators[i])))
                self._row = end
                yield _joined(pieces)

    def _bounds(self, row: int, i: int) -> Iterator[int]:
        """Rows of dataset i before the end of each batch."""
        while row < self.n_rows:
            row = min(row + self.batch_size, self.n_rows)
            yield int(self._schedule.counts(row)[i])


def _joined(pieces: list[tuple[int, Batch]]) -> MixedBatch:
    batches = [batch for _, batch in pieces]
    source = np.concatenate([np.full(len(batch), i) for i, batch in pieces])
    acts = {site: _concatenate([batch[site] for batch in batches]) for site in batches[0].acts}
    rows = None
    if batches[0]._rows is not None:
        names = ("token_id", "sequence", "position")
        rows = Rows(*(_concatenate([getattr(batch, name) for batch in batches]) for name in names))
    return MixedBatch(acts, rows, source)


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


def zip_datasets(*datasets: "Dataset", names: Sequence[str] | None = None) -> "Zipped":
    """Datasets whose rows are the same tokens, side by side: base and chat, or two models of a crosscoder.

    Row i of all is one token if their tokens, seed and `block_rows` agree; models, sites, precisions and
    `chunk_rows` may differ. A site is then called `NAME/SITE`, with the names "0", "1", ... by default.

    Raises:
        SpecError: the rows are not aligned; says what differs.
    """
    named = list(map(str, range(len(datasets)))) if names is None else list(names)
    if len(datasets) < 2 or len(named) != len(datasets) or len(set(named)) != len(named):
        raise SpecError(
            f"zip got {len(datasets)} datasets and names {named}; wanted two or more, one name each"
        )
    if bad := [name for name in named if not name or "/" in name]:
        raise SpecError(f"names are {named}; {bad[0]!r} must not be empty or hold '/'")
    first = datasets[0]
    for other in datasets[1:]:
        differences = list(_differences(_alignment(first), _alignment(other)))
        if differences:
            raise SpecError(
                f"{first.url} and {other.url} are not aligned: {'; '.join(differences)}. "
                "Harvest both with one corpus, tokenizer, packing, seed and block_rows"
            )
    return Zipped(dict(zip(named, datasets, strict=True)))


def _alignment(dataset: "Dataset") -> dict[str, Any]:
    """What decides which token is in which row."""
    identity = dataset.manifest.identity
    return {"split": dataset.split_name, **{k: identity[k] for k in ("tokens", "seed", "block_rows")}}


def _differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield f"{path} is {a!r} and {b!r}"


class Zipped:
    """Aligned datasets under their names. Rows past the shortest one are not served."""

    def __init__(self, datasets: dict[str, "Dataset"]) -> None:
        self.datasets = datasets

    @property
    def sites(self) -> list[str]:
        return [f"{name}/{site}" for name, dataset in self.datasets.items() for site in dataset.sites]

    @property
    def n_rows(self) -> int:
        """Rows that all of them have."""
        return min(dataset.n_rows for dataset in self.datasets.values())

    def read(self, site: str, index: Index) -> np.ndarray:
        """As `Dataset.read`."""
        name, inner = self._parse(site)
        return self.datasets[name].read(inner, index)

    def rows(self, index: Index) -> Rows:
        """Which token each row is, in all of them."""
        return next(iter(self.datasets.values())).rows(index)

    def _parse(self, site: str) -> tuple[str, str]:
        name, _, inner = site.partition("/")
        if name not in self.datasets or inner not in self.datasets[name].sites:
            raise SpecError(f"no site {site!r}; the aligned datasets have {', '.join(self.sites)}")
        return name, inner

    def stream(
        self,
        sites: Sequence[str] | str | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "ZippedStream":
        """As `Dataset.stream`, with its options; `batch["NAME/SITE"]` of all of them are of the same tokens.

        A `where` on tokens or sequences holds for all; one on norms is refused. `prefetch_bytes` holds for
        each dataset.
        """
        asked = StreamOptions(**options)
        if asked.rotated:
            raise SpecError("aligned datasets are served as decoded; leave rotated out")
        chosen: dict[str, list[str]] = {}
        for site in [sites] if isinstance(sites, str) else list(sites or self.sites):
            name, inner = self._parse(site)
            chosen.setdefault(name, []).append(inner)
        if asked.where is not None and asked.where.on_norm:
            raise SpecError("a condition on norms would leave other rows out of each aligned dataset")
        windows = _windows(state, len(chosen), asked.window)
        streams = {
            name: _ZipPart(
                self.datasets[name],
                inner,
                replace(asked, window=windows[i], metadata=asked.metadata and not i),
            )
            for i, (name, inner) in enumerate(chosen.items())
        }
        return ZippedStream(streams, state)


class _ZipPart(Stream):
    """One dataset's stream among aligned ones, in the order that they share."""

    def align(self, n_rows: int, chunk_rows: int) -> None:
        """Take the order of `n_rows` rows in chunks of `chunk_rows`, a multiple of the stored ones."""
        self.n_rows, self._order_chunk_rows = n_rows, chunk_rows

    def _order(self, epoch: int) -> Order:
        return _SplitOrder(
            self.n_rows,
            self._order_chunk_rows,
            self.options.seed,
            epoch,
            self.options.lanes,
            self.window,
            stored_chunk_rows=self._chunk_rows,
        )


@dataclass(frozen=True)
class _SplitOrder(Order):
    """An order over larger chunks than the stored ones: its spans are given as spans of those."""

    stored_chunk_rows: int

    def _stored(self, spans: list[Span]) -> list[Span]:
        return [part for span in spans for part in self._split(span)]

    def _split(self, span: Span) -> Iterator[Span]:
        size = self.stored_chunk_rows
        row, end = span.chunk * self.chunk_rows + span.start, span.chunk * self.chunk_rows + span.stop
        while row < end:
            chunk, start = divmod(row, size)
            stop = min(size, start + end - row)
            yield Span(chunk, start, stop)
            row += stop - start


class ZippedStream:
    """An iterator of batches of aligned datasets; as `Stream`."""

    def __init__(self, streams: dict[str, _ZipPart], state: Mapping[str, Any] | None = None) -> None:
        self._streams = streams
        first = self._first = next(iter(streams.values()))
        self.sites = [f"{name}/{site}" for name, stream in streams.items() for site in stream.sites]
        self.batch_size, self.epochs = first.batch_size, first.epochs
        self.n_rows = min(stream.n_rows for stream in streams.values())
        self._chunk_rows = max(stream._chunk_rows for stream in streams.values())
        for stream in streams.values():
            stream.align(self.n_rows, self._chunk_rows)
        if state is not None:
            self.restore(state)

    def __len__(self) -> int:
        return len(self._first)

    def stats(self, site: str) -> dict[str, Any]:
        """As `Stream.stats`."""
        name, _, inner = site.partition("/")
        return self._streams[name].stats(inner)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        position = self._first.state()
        return {**self._order_id(), "epoch": position["epoch"], "row": position["row"]}

    def _order_id(self) -> dict[str, Any]:
        return {
            "format": 1,
            "kind": "zip",
            "chunk_rows": self._chunk_rows,
            "parts": [stream._order_id() for stream in self._streams.values()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says. Call it between iterations, not during one.

        Raises:
            SpecError: the state is of other datasets or of another order.
        """
        _check_same(self._order_id(), state, "zip")
        for stream in self._streams.values():
            stream.restore({**stream._order_id(), "epoch": state.get("epoch"), "row": state.get("row")})

    def __iter__(self) -> Iterator[Batch]:
        with contextlib.ExitStack() as stack:
            iterators = [iter(stream) for stream in self._streams.values()]
            for iterator in iterators:
                stack.callback(iterator.close)  # type: ignore[attr-defined]  # a generator
            for batches in zip(*iterators, strict=True):
                acts = {
                    f"{name}/{site}": batch[site]
                    for name, batch in zip(self._streams, batches, strict=True)
                    for site in batch.acts
                }
                yield Batch(acts, batches[0]._rows)


def _check_same(ours: Mapping[str, Any], state: Mapping[str, Any], what: str) -> None:
    found = {name: state.get(name) for name in ours}
    if found != ours:
        wrong = "; ".join(
            d
            for name in ours
            for a, b in [(found[name], ours[name])]
            for d in (
                _differences(dict(enumerate(a)), dict(enumerate(b)), name)
                if isinstance(a, list) and isinstance(b, list)
                else _differences(a, b, name)
            )
        )
        raise SpecError(
            f"the state is not of this {what}: {wrong}. Open the same datasets with the same order to resume"
        )


def _checked_row(state: Mapping[str, Any], n: int) -> int:
    row = state.get("row")
    if not isinstance(row, int) or not 0 <= row < n:
        raise SpecError(f"the state stands at row {row!r}; wanted one below {n}")
    return row
