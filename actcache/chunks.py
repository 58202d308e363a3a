"""Chunks of a split's arrays: fetched by ranged requests, checked against the manifest, decoded.

Where a chunk lies is known from the segments, so a chunk is one request and a constant one none;
neighbours in one object are fetched together. A damaged chunk is fetched once more before it is an
error. Safe to use from many threads.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .errors import RESTORE, CorruptObject
from .shard import Bytes, decode_chunk, shard_key
from .store import Store
from .tables import ShardTable

_REQUEST_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Request:
    """Neighbouring chunks of one array, in one object: one ranged request."""

    path: str
    first: int
    """Number of the first chunk in the array."""
    last: int
    """One past the last."""

    @property
    def n_chunks(self) -> int:
        return self.last - self.first


class _Place(NamedTuple):
    """The bytes of a chunk: [start, stop) of an object, with their checksum."""

    key: str
    start: int
    stop: int
    crc32c: int


class ChunkReader:
    """Reads the committed chunks of one split."""

    def __init__(
        self, store: Store, split: str, layout: Mapping[str, Any], tables: Mapping[str, ShardTable]
    ) -> None:
        self.store, self.split, self.layout, self.tables = store, split, layout, tables

    def requests(self, path: str, chunks: Sequence[int]) -> Iterator[Request]:
        """The requests that bring these chunks (ascending numbers), neighbours joined up to 4 MiB."""
        table = self.tables[f"{self.split}/{path}"]
        per_shard = table.chunk_nbytes.shape[1]
        start_C = table.chunk_offset.reshape(-1)[chunks].tolist()
        stop_C = (table.chunk_offset.reshape(-1)[chunks] + table.chunk_nbytes.reshape(-1)[chunks]).tolist()
        first = 0
        for i in range(1, len(chunks) + 1):
            if i == len(chunks) or (
                chunks[i] != chunks[i - 1] + 1
                or chunks[i] % per_shard == 0
                or start_C[i] != stop_C[i - 1]
                or stop_C[i] - start_C[first] > _REQUEST_BYTES
            ):
                yield Request(path, chunks[first], chunks[i - 1] + 1)
                first = i

    def read(self, path: str, chunk: int) -> np.ndarray:
        """One whole chunk, with the padding of a split's last one; not to be written to."""
        return self.fetch(Request(path, chunk, chunk + 1))[0]

    def read_into(self, path: str, chunk: int, out: np.ndarray, data: Bytes | None = None) -> None:
        """One whole chunk, into a contiguous array of its shape; from `data`, if its bytes are there already."""
        place = self._place(path, chunk)
        if place is None:
            out[...] = self._constant(path, chunk)
            return
        if data is None:
            data = self._read(place.key, place.start, place.stop)
        self._decode(path, place, data, out)

    def bytes_of(self, chunks: Sequence[tuple[str, int]]) -> dict[tuple[str, int], bytes]:
        """Bytes of (array, chunk)s, asked for together where the store gains by it; those that came."""
        wanted = {}
        for path, chunk in chunks:
            place = self._place(path, chunk)
            if place is not None:
                wanted[path, chunk] = place.key, place.start, place.stop
        found = self.store.read_parts(list(wanted.values()))
        return {which: data for which, data in zip(wanted, found, strict=True) if data is not None}

    def fetch(self, request: Request) -> list[np.ndarray]:
        """The whole chunks of a request; not to be written to.

        Raises:
            CorruptObject: the object is missing, or truncated or damaged both times; names its key.
        """
        path, array = request.path, self.layout[request.path]
        places = [p for c in range(request.first, request.last) if (p := self._place(path, c))]
        if not places:  # their shard is one value
            value = self._constant(path, request.first)
            return [np.broadcast_to(value, (array["chunk_rows"], *array["row"]))] * request.n_chunks
        data, at = self._read(places[0].key, places[0].start, places[-1].stop), places[0].start
        return [self._decode(path, place, data[place.start - at : place.stop - at]) for place in places]

    def _place(self, path: str, chunk: int) -> "_Place | None":
        """Where a chunk lies; None where its shard is one value."""
        table = self.tables[f"{self.split}/{path}"]
        shard, inner = divmod(chunk, table.chunk_nbytes.shape[1])
        if not math.isnan(table.constant.item(shard)):
            return None
        start, n_bytes = table.chunk_offset.item(shard, inner), table.chunk_nbytes.item(shard, inner)
        key = shard_key(table.path, shard, 1 + len(self.layout[path]["row"]))
        return _Place(key, start, start + n_bytes, table.chunk_crc32c.item(shard, inner))

    def _constant(self, path: str, chunk: int) -> Any:
        table = self.tables[f"{self.split}/{path}"]
        return self.layout[path]["dtype"].type(table.constant[chunk // table.chunk_nbytes.shape[1]])

    def _decode(self, path: str, place: "_Place", data: Bytes, out: np.ndarray | None = None) -> np.ndarray:
        """The chunk at `place`, from its bytes; those of a damaged one are read once more."""
        array, where = self.layout[path], f"{self.store.url}/{place.key}"
        shape = (array["chunk_rows"], *array["row"])
        try:
            return decode_chunk(data, shape, array["dtype"], where, place.crc32c, array["by_column"], out)
        except CorruptObject:  # once more, in case it was the transfer
            data = self._read(place.key, place.start, place.stop, again=True)
        if len(data) != place.stop - place.start:
            raise CorruptObject(
                f"{where} holds {place.start + len(data)} bytes, wanted {place.stop} or more; it is truncated"
            )
        return decode_chunk(data, shape, array["dtype"], where, place.crc32c, array["by_column"], out)

    def _read(self, key: str, start: int, stop: int, again: bool = False) -> Bytes:
        try:
            return (self.store.read_again if again else self.store.read_part)(key, start, stop)
        except FileNotFoundError:
            raise CorruptObject(
                f"{self.store.url}/{key} is missing although it was committed; {RESTORE}"
            ) from None
