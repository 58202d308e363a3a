"""Streams: what the trainer wants of one, and one from memory.

`ArrayStream` serves activations in an array, batched and shuffled as a dataset's stream is.

Shapes: N rows, D = d_in.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger(__name__)


class Batch(Protocol):
    """Rows of each site, aligned."""

    def __getitem__(self, site: str, /) -> np.ndarray: ...
    def __len__(self) -> int: ...


class Stream(Protocol):
    """What the trainer reads from; `ds.stream(...)` and `sae.ArrayStream` are such.

    A stream with `restore(state)` resumes at once; another is read again up to the row reached.
    """

    @property
    def sites(self) -> Sequence[str]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def n_rows(self) -> int: ...
    def stats(self, site: str, /) -> Mapping[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[Batch]: ...


class ArrayBatch(Mapping[str, np.ndarray]):
    """Rows of each site, aligned; `len` is the number of rows, `place` where each lies in the whole batch."""

    def __init__(self, acts: dict[str, np.ndarray], place: np.ndarray) -> None:
        self._acts, self.place = acts, place

    def __getitem__(self, site: str) -> np.ndarray:
        return self._acts[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._acts)

    def __len__(self) -> int:
        return len(next(iter(self._acts.values())))


class ArrayStream:
    """Batches of rows held in memory, each epoch in a new order that (seed, epoch) alone decides.

    Args:
        acts: [N, D], or a dict of site name to [N, D] with rows aligned.
        batch_size: rows; the last batch of an epoch may be shorter.
        seed: decides the order.
        epochs: how many times each row is served; None for ever.
        site: the name of the only site when `acts` is an array.
    """

    def __init__(
        self,
        acts: np.ndarray | Mapping[str, np.ndarray],
        *,
        batch_size: int = 4096,
        seed: int = 0,
        epochs: int | None = None,
        site: str = "activations",
    ) -> None:
        self._acts = dict(acts) if isinstance(acts, Mapping) else {site: np.asarray(acts)}
        shapes = {name: a.shape for name, a in self._acts.items()}
        if not shapes or any(len(shape) != 2 for shape in shapes.values()):
            raise ValueError(f"activations have shapes {shapes}; each site needs [rows, d_in]")
        if len({shape[0] for shape in shapes.values()}) > 1:
            raise ValueError(f"sites differ in rows: {shapes}; row i must be the same token at every site")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.sites = list(self._acts)
        self.n_rows = next(iter(shapes.values()))[0]
        if self.n_rows == 0:
            raise ValueError("the activations have no rows")
        self.batch_size, self.seed, self.epochs = batch_size, seed, epochs
        self._epoch = self._row = 0
        self._island = (0, 1)
        self._stats = cache(self._compute_stats)

    def stats(self, site: str) -> dict[str, Any]:
        """mean and variance float64 [D], mean_norm, max_abs, n_rows; computed at the first call."""
        return self._stats(site)

    def for_rank(self, rank: int, world_size: int, gather: Any = None) -> "ArrayStream":
        """The same stream from the same place for one of several ranks that all hold the array.

        Each serves the rows of the ranks that it would exchange with (`gather.ranks`); there is nothing to exchange.
        """
        joined = [rank] if gather is None else list(gather.ranks)
        found = copy.copy(self)
        found._island = (joined[0] // len(joined), world_size // len(joined))
        return found

    def state(self) -> dict[str, Any]:
        """Where the next batch starts; JSON-able."""
        return {
            "epoch": self._epoch,
            "row": self._row,
            "n_rows": self.n_rows,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state is of a stream with other rows, batch size or seed.
        """
        own = self.state()
        wrong = [
            f"{key} {state.get(key)} (here {own[key]})"
            for key in ("n_rows", "batch_size", "seed")
            if state.get(key) != own[key]
        ]
        if wrong:
            raise ValueError(
                f"the state is of another stream: {', '.join(wrong)}. Open the stream as before."
            )
        self._epoch, self._row = int(state["epoch"]), int(state["row"])

    def __iter__(self) -> Iterator[ArrayBatch]:
        while self.epochs is None or self._epoch < self.epochs:
            order = np.random.default_rng((self.seed, self._epoch)).permutation(self.n_rows)
            while self._row < self.n_rows:
                rows = order[self._row : self._row + self.batch_size]
                self._row += len(rows)
                if self._row == self.n_rows:
                    self._epoch, self._row = self._epoch + 1, 0
                    yield self._batch(rows)
                    break
                yield self._batch(rows)

    def _batch(self, rows: np.ndarray) -> ArrayBatch:
        island, islands = self._island
        place = np.arange(island, len(rows), islands)
        return ArrayBatch({name: a[rows[place]] for name, a in self._acts.items()}, place)

    def _compute_stats(self, site: str) -> dict[str, Any]:
        acts_ND = self._acts[site].astype(np.float64)
        return {
            "mean": acts_ND.mean(0),
            "variance": acts_ND.var(0),
            "mean_norm": float(np.linalg.norm(acts_ND, axis=1).mean()),
            "max_abs": float(np.abs(acts_ND).max()),
            "n_rows": self.n_rows,
        }


def resumed(stream: Stream, state: dict[str, Any], rows: int) -> Stream:
    """The stream continued where `state` was taken."""
    restore = getattr(stream, "restore", None)
    if restore is not None:
        restore(state)
        return stream
    logger.warning("this stream can not restore a position; reading %s rows again to reach it", f"{rows:,}")
    return _Skipping(stream, rows)


class _Skipping:
    """A stream without its first rows."""

    def __init__(self, stream: Stream, rows: int) -> None:
        self._stream, self._rows = stream, rows
        self.sites, self.batch_size, self.n_rows = stream.sites, stream.batch_size, stream.n_rows

    def stats(self, site: str, /) -> Mapping[str, Any]:
        return self._stream.stats(site)

    def state(self) -> dict[str, Any]:
        return self._stream.state()

    def __iter__(self) -> Iterator[Batch]:
        skipped = 0
        for batch in self._stream:
            if skipped >= self._rows:
                yield batch
            skipped += len(batch)


def dataset_of(stream: Stream) -> dict[str, Any]:
    """What the stream tells of its dataset, for provenance; empty for arrays."""
    dataset = getattr(stream, "dataset", None)
    spec = getattr(dataset, "spec", None)
    found = {
        "url": getattr(stream, "dataset_url", None),
        "id": getattr(dataset, "id", None) or getattr(stream, "dataset_id", None),
        "model": getattr(spec, "model", None),
        "context_size": getattr(spec, "context_size", None),
        "prepend_bos": getattr(spec, "prepend_bos", None),
    }
    return {name: value for name, value in found.items() if value is not None}
