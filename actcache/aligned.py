"""Datasets whose rows are the same tokens, side by side: `zip_datasets` is `actcache.zip`.

They are served in one order, and resume exactly, at any batch and world size. Specified in docs/format.md,
"Aligned datasets".
Shapes: N rows, D = d_in.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import SpecError
from .gathering import Gather
from .mixing import check_same, differences, windows_of
from .order import Order, Span
from .reader import Index
from .stream import Batch, Rows, Stream, StreamOptions

if TYPE_CHECKING:
    from .reader import Dataset


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
        found = list(differences(_alignment(first), _alignment(other)))
        if found:
            raise SpecError(
                f"{first.url} and {other.url} are not aligned: {'; '.join(found)}. "
                "Harvest both with one corpus, tokenizer, packing, seed and block_rows"
            )
    return Zipped(dict(zip(named, datasets, strict=True)))


def _alignment(dataset: "Dataset") -> dict[str, Any]:
    """What decides which token is in which row."""
    identity = dataset.manifest.identity
    return {"split": dataset.split_name, **{k: identity[k] for k in ("tokens", "seed", "block_rows")}}


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
        return self._stream(sites, StreamOptions(**options), state)

    def _stream(
        self, sites: Sequence[str] | str | None, asked: StreamOptions, state: Mapping[str, Any] | None
    ) -> "ZippedStream":
        if asked.rotated:
            raise SpecError("aligned datasets are served as decoded; leave rotated out")
        chosen: dict[str, list[str]] = {}
        for site in [sites] if isinstance(sites, str) else list(sites or self.sites):
            name, inner = self._parse(site)
            chosen.setdefault(name, []).append(inner)
        if asked.where is not None and asked.where.on_norm:
            raise SpecError("a condition on norms would leave other rows out of each aligned dataset")
        windows = windows_of(state, len(chosen), asked.window)
        streams = {
            name: _ZipPart(
                self.datasets[name],
                inner,
                replace(asked, window=windows[i], metadata=asked.metadata and not i),
            )
            for i, (name, inner) in enumerate(chosen.items())
        }
        return ZippedStream(self, streams, asked, state)


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
    """An iterator of batches of aligned datasets; as `Stream`, and it pickles."""

    def __init__(
        self,
        zipped: Zipped,
        streams: dict[str, _ZipPart],
        options: StreamOptions,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._zipped, self._streams, self.options = zipped, streams, options
        first = self._first = next(iter(streams.values()))
        self.sites = [f"{name}/{site}" for name, stream in streams.items() for site in stream.sites]
        self.batch_size, self.epochs = first.batch_size, first.epochs
        self.n_rows = min(stream.n_rows for stream in streams.values())
        self._chunk_rows = max(stream._chunk_rows for stream in streams.values())
        for stream in streams.values():
            stream.align(self.n_rows, self._chunk_rows)
        if state is not None:
            self.restore(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._zipped._stream, (self.sites, self.options.sendable(), self.state())

    def for_rank(self, rank: int, world_size: int, gather: Gather | None = None) -> "ZippedStream":
        """As `Stream.for_rank`."""
        options = replace(self.options, rank=rank, world_size=world_size, gather=gather)
        return self._zipped._stream(self.sites, options, self.state())

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
        check_same(self._order_id(), state, "zip")
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
                yield Batch(acts, batches[0]._rows, batches[0].place)
