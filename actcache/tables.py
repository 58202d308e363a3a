"""The chunk tables of a dataset's arrays, decoded from its segments array by array when they are needed.

A part of a segment's `objects` is read whole and its sha256 verified, when an array of it is asked for; then only
the paths of its rows are decoded, and the row groups of that array. A writer gives each array row
groups of its own, once it has some hundred rows; files in any other order are read too, each row group
once. Specified in docs/format.md, "Segments"; why: docs/design/003-commit.md.
Shapes: N shards, C chunks of a shard.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import FormatError
from .segment_files import encoded
from .untrusted import ParquetFile

_COLUMNS = ("shard", "size_bytes", "chunk_offset", "chunk_nbytes", "chunk_crc32c", "constant")


@dataclass(frozen=True, eq=False)
class ShardTable:
    """Where every chunk of one array lies, as numpy arrays over its shards."""

    path: str
    size_bytes: np.ndarray
    """int64 [shards]."""
    chunk_offset: np.ndarray
    """int32 [shards, chunks per shard]; int64 if a shard has 2^31 bytes or more. 0 where the shard is constant."""
    chunk_nbytes: np.ndarray
    """As `chunk_offset`."""
    chunk_crc32c: np.ndarray
    """uint32 [shards, chunks per shard]."""
    constant: np.ndarray
    """float64 [shards], NaN where the shard is not constant."""


class SegmentObjects:
    """A part of the `objects` of one segment. Not safe to use from two threads at once."""

    def __init__(self, file: ParquetFile) -> None:
        self._file: ParquetFile | None = file
        self._path_N, self.paths = encoded(file.read(("path",), encoded=True), "path")
        self._start_G = np.cumsum([0, *file.group_rows])
        self._groups_of: dict[str, list[int]] = {}
        """By path: the row groups with a row of it."""
        change_N = np.diff(self._path_N, prepend=-2) != 0
        change_N[self._start_G[:-1][np.diff(self._start_G) > 0]] = True
        begin_N = np.flatnonzero(change_N)
        group_N = np.searchsorted(self._start_G, begin_N, side="right") - 1
        for path, group in sorted({*zip(self._path_N[begin_N].tolist(), group_N.tolist(), strict=True)}):
            self._groups_of.setdefault(self.paths[path], []).append(group)
        self._left = set(range(len(file.group_rows)))
        self._rows: dict[str, list[pa.Table]] = defaultdict(list)
        """By path: its rows, of the row groups that have been decoded."""

    def take(self, path: str) -> list[pa.Table]:
        """The rows of an array, once: they are not kept."""
        for group in self._groups_of.pop(path, ()):
            if group in self._left:
                self._decode(group)
        return self._rows.pop(path, [])

    def _decode(self, group: int) -> None:
        """Keep the rows of a row group by path."""
        assert self._file is not None
        table = self._file.read(_COLUMNS, [group])
        path_N = self._path_N[self._start_G[group] : self._start_G[group + 1]]
        for path in np.unique(path_N).tolist():
            row_N = np.flatnonzero(path_N == path)
            first, n = int(row_N[0]), len(row_N)
            together = int(row_N[-1]) - first + 1 == n
            rows = table.slice(first, n) if together else table.take(pa.array(row_N))
            self._rows[self.paths[path]].append(rows)
        self._left.remove(group)
        if not self._left:
            self._file = None  # its bytes go


class Tables(Mapping[str, ShardTable]):
    """The chunk tables of a split by array path, each decoded when it is first asked for; thread-safe.

    Raises:
        FormatError: on the first use of an array, what `shard_table` and `check_chunks` refuse.
    """

    def __init__(
        self,
        split: str,
        n_shards: Mapping[str, int],
        layout: Mapping[str, Mapping[str, Any]],
        parts: Callable[[str], Sequence[SegmentObjects]],
        lock: threading.Lock,
        url: str,
    ) -> None:
        """Args:
        n_shards: committed shards by the array's path in the split; those without are left out.
        parts: gives those that may have rows of a path.
        lock: of the parts, which the splits share.
        """
        self._split, self._layout, self._url = split, layout, url
        self._n = {f"{split}/{path}": n for path, n in n_shards.items() if n}
        self._parts, self._lock = parts, lock
        self._found: dict[str, ShardTable] = {}

    def __getitem__(self, path: str) -> ShardTable:
        found = self._found.get(path)
        if found is None:
            n = self._n[path]
            with self._lock:
                found = self._found.get(path) or self._read(path, n)
                self._found[path] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._n)

    def __len__(self) -> int:
        return len(self._n)

    def __contains__(self, path: object) -> bool:
        return path in self._n

    def _read(self, path: str, n: int) -> ShardTable:
        array = self._layout[path.removeprefix(f"{self._split}/")]
        width = array["shard_rows"] // array["chunk_rows"]
        table = shard_table(path, n, width, [rows for part in self._parts(path) for rows in part.take(path)])
        check_chunks(table, array, f"{self._url}/{path}")
        return table


def shard_table(path: str, n: int, width: int, parts: Sequence[pa.Table]) -> ShardTable:
    """The chunk table of an array with `n` committed shards of `width` chunks, from its rows in any order.

    A shard may have several rows, any of which holds, and no chunks where it is constant.

    Raises:
        FormatError: a shard is missing, or a chunk table is of another length or absurd.
    """
    batches = [batch for part in parts for batch in part.to_batches() if len(batch)]
    listed = _n_listed(n, [batch["shard"].to_numpy() for batch in batches])
    if listed < n:
        raise FormatError(f"the manifest lists {listed} shards of {path}; {n} are committed. Harvest again")
    chunked = [_with_chunks(path, width, batch) for batch in batches]
    largest = max(int(b["size_bytes"].to_numpy().max()) for b in batches)
    narrow = np.int32 if largest < 2**31 else np.int64  # both end inside the object: half the memory
    if any(
        rows.any() for rows in chunked
    ):  # so that many are there; zeros take no memory before they are written to
        offset_NC, nbytes_NC, crc_NC = (np.zeros((n, width), d) for d in (narrow, narrow, np.uint32))
    else:
        offset_NC = nbytes_NC = crc_NC = np.broadcast_to(np.int32(0), (n, width))
    table = ShardTable(path, np.zeros(n, np.int64), offset_NC, nbytes_NC, crc_NC, np.zeros(n))
    for batch, chunked_M in zip(batches, chunked, strict=True):
        here, to = _rows_and_places(batch["shard"].to_numpy(), n)
        table.size_bytes[to] = batch["size_bytes"].to_numpy()[here]
        table.constant[to] = batch["constant"].to_numpy(zero_copy_only=False).astype(np.float64)[here]
        if chunked_M.any():
            _put_chunks(table, batch if chunked_M.all() else batch.filter(pa.array(chunked_M)))
    return table


def _with_chunks(path: str, width: int, batch: pa.RecordBatch) -> np.ndarray:
    """Which rows have a chunk table: bool [rows]; the others are constant.

    Raises:
        FormatError: another length than `width`, or neither.
    """
    lengths = np.stack([pc.list_value_length(batch[name]).to_numpy() for name in _COLUMNS[2:5]])
    chunked_M = (lengths == width).all(axis=0)
    constant_M = ~np.isnan(batch["constant"].to_numpy(zero_copy_only=False).astype(np.float64))
    if not (chunked_M | ((lengths == 0).all(axis=0) & constant_M)).all():
        found = f"{lengths.min()}..{lengths.max()}"
        raise FormatError(f"the chunk tables of {path} have {found} entries, wanted {width}")
    return chunked_M


def _rows_and_places(shard_M: np.ndarray, n: int) -> tuple[Any, Any]:
    """Which rows are of the first n shards, and where these go: slices where they follow each other."""
    here: Any = slice(None)
    to: Any = shard_M
    if shard_M.max() >= n:  # past the committed prefix
        here = np.flatnonzero(shard_M < n)
        to = shard_M[here]
    if len(to) and np.array_equal(to, np.arange(to[0], to[0] + len(to))):
        to = slice(int(to[0]), int(to[0]) + len(to))
    return here, to


def _put_chunks(table: ShardTable, rows: pa.RecordBatch) -> None:
    """Take in the chunk tables of some rows, all of the array's length."""
    size_M, width = rows["size_bytes"].to_numpy(), table.chunk_nbytes.shape[1]
    offset_MC, nbytes_MC, crc32c_MC = (
        rows[name].flatten().to_numpy().reshape(len(rows), width) for name in _COLUMNS[2:5]
    )
    if (
        (offset_MC < 0).any()
        or (nbytes_MC < 0).any()
        or (nbytes_MC > size_M[:, None]).any()
        or (offset_MC > size_M[:, None] - nbytes_MC).any()
    ):
        raise FormatError(
            f"a chunk of {table.path} lies outside its object; the manifest is damaged or hostile"
        )
    here, to = _rows_and_places(rows["shard"].to_numpy(), len(table.size_bytes))
    table.chunk_offset[to], table.chunk_nbytes[to] = offset_MC[here], nbytes_MC[here]
    table.chunk_crc32c[to] = crc32c_MC[here]


def _n_listed(n: int, shards: Sequence[np.ndarray]) -> int:
    """How many of the shards 0..n-1 are among some; none if there are negative ones."""
    if sum(map(len, shards)) < n or min(int(s.min()) for s in shards) < 0:
        return 0
    listed_N = np.zeros(n, bool)
    for shard_M in shards:
        listed_N[shard_M[shard_M < n]] = True
    return int(np.count_nonzero(listed_N))


def check_chunks(table: ShardTable, array: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that no chunk or shard of this array can have.

    Raises:
        FormatError: names the array.
    """
    decoded = array["chunk_rows"] * math.prod(array["row"]) * array["dtype"].itemsize
    largest = decoded + decoded // 128 + 1024  # more than any compressor makes of noise
    if (table.chunk_nbytes > largest).any():
        raise FormatError(
            f"a chunk of {where} is said to have {table.chunk_nbytes.max()} bytes; {largest} is the most that it can"
        )
    most = table.chunk_nbytes.shape[1] * (largest + 16) + 4
    if (table.size_bytes < 0).any() or (table.size_bytes > most).any():
        raise FormatError(
            f"a shard of {where} is said to have {table.size_bytes.max()} bytes; at most {most} can be"
        )
