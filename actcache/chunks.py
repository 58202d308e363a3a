"""Chunks of a split's arrays: fetched by ranged requests, checked against the manifest, decoded.

Where a chunk lies is known from the segments, so a chunk is one request and a constant one none;
neighbours in one object are fetched together. A damaged chunk is fetched once more before it is an
error. Safe to use from many threads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import RESTORE, CorruptObject
from .manifest import ShardTable
from .shard import Bytes, decode_chunk, shard_key
from .store import Store

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
        found = self.fetch(Request(path, chunk, chunk + 1), out, data)[0]
        if found is not out:  # a constant
            out[...] = found

    def bytes_of(self, chunks: Sequence[tuple[str, int]]) -> dict[tuple[str, int], bytes]:
        """Bytes of (array, chunk)s, asked for together where the store gains by it; those that came."""
        wanted = {}
        for path, chunk in chunks:
            table = self.tables[f"{self.split}/{path}"]
            shard, inner = divmod(chunk, table.chunk_nbytes.shape[1])
            if np.isnan(table.constant[shard]):
                start = int(table.chunk_offset[shard, inner])
                key = shard_key(table.path, shard, 1 + len(self.layout[path]["row"]))
                wanted[path, chunk] = key, start, start + int(table.chunk_nbytes[shard, inner])
        found = self.store.read_parts(list(wanted.values()))
        return {which: data for which, data in zip(wanted, found, strict=True) if data is not None}

    def fetch(
        self, request: Request, out: np.ndarray | None = None, data: Bytes | None = None
    ) -> list[np.ndarray]:
        """The whole chunks of a request; not to be written to.

        Of a single chunk: decoded into `out` if given, from the bytes `data` if given.

        Raises:
            CorruptObject: the object is missing, or truncated or damaged both times; names its key.
        """
        array, table = self.layout[request.path], self.tables[f"{self.split}/{request.path}"]
        shard, inner = divmod(request.first, table.chunk_nbytes.shape[1])
        shape = (array["chunk_rows"], *array["row"])
        if not np.isnan(table.constant[shard]):
            value = array["dtype"].type(table.constant[shard])
            return [np.broadcast_to(value, shape)] * request.n_chunks
        here = slice(inner, inner + request.n_chunks)
        start_C = table.chunk_offset[shard, here].tolist()
        stop_C = (table.chunk_offset[shard, here] + table.chunk_nbytes[shard, here]).tolist()
        checksum_C = table.chunk_crc32c[shard, here].tolist()
        key = shard_key(table.path, shard, len(shape))
        where = f"{self.store.url}/{key}"
        if data is None:
            data = self._read(key, start_C[0], stop_C[-1])
        options = (shape, array["dtype"], where)
        chunks = []
        for start, stop, checksum in zip(start_C, stop_C, checksum_C, strict=True):
            payload = data[start - start_C[0] : stop - start_C[0]]
            try:
                chunks.append(decode_chunk(payload, *options, checksum, array["by_column"], out))
            except CorruptObject:  # once more, in case it was the transfer
                again = self._read(key, start, stop, again=True)
                if len(again) != stop - start:
                    raise CorruptObject(
                        f"{where} holds {start + len(again)} bytes, wanted {stop} or more; it is truncated"
                    ) from None
                chunks.append(decode_chunk(again, *options, checksum, array["by_column"], out))
        return chunks

    def _read(self, key: str, start: int, stop: int, again: bool = False) -> Bytes:
        try:
            return (self.store.read_again if again else self.store.read_part)(key, start, stop)
        except FileNotFoundError:
            raise CorruptObject(
                f"{self.store.url}/{key} is missing although it was committed; {RESTORE}"
            ) from None
