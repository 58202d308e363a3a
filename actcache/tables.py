"""The chunk tables of a dataset's arrays, decoded from its segments array by array when they are needed.

A segment's `objects` file is read whole and its sha256 verified; then only the paths of its rows are
decoded, and the row groups of an array when that array is asked for. A writer gives each array row
groups of its own, once it has some hundred rows; files in any other order are read too, each row group
once. Specified in docs/format.md, "Segments"; why: docs/design/003-commit.md.
Shapes: N shards, C chunks of a shard.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import FormatError
from .manifest import ShardTable
from .untrusted import ParquetFile

_MAX_CHUNKS = 1 << 20
_COLUMNS = ("shard", "size_bytes", "chunk_offset", "chunk_nbytes", "chunk_crc32c", "constant")


class SegmentObjects:
    """The `objects` file of one segment. Not safe to use from two threads at once."""

    def __init__(self, file: ParquetFile) -> None:
        self._file: ParquetFile | None = file
        table = file.read(("split", "path"), encoded=True).combine_chunks()
        self._path_N, self.paths = _encoded(table, "path")
        split_N, splits = _encoded(table, "split")
        number = {split: i for i, split in enumerate(splits)}
        wanted_P = np.array([number.get(path.partition("/")[0], -1) for path in self.paths], np.int64)
        self._path_N = np.where(wanted_P[self._path_N] == split_N, self._path_N, -1)  # else it is of no array
        self._start_G = np.cumsum([0, *file.group_rows])
        self._groups_of: dict[str, list[int]] = {}
        """By path: the row groups with a row of it."""
        change_N = np.diff(self._path_N, prepend=-2) != 0
        change_N[self._start_G[:-1][np.diff(self._start_G) > 0]] = True
        begin_N = np.flatnonzero(change_N)
        group_N = np.searchsorted(self._start_G, begin_N, side="right") - 1
        for path, group in sorted({*zip(self._path_N[begin_N].tolist(), group_N.tolist(), strict=True)}):
            if path >= 0:
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
            if path >= 0:
                row_N = np.flatnonzero(path_N == path)
                first, n = int(row_N[0]), len(row_N)
                together = int(row_N[-1]) - first + 1 == n
                rows = table.slice(first, n) if together else table.take(pa.array(row_N))
                self._rows[self.paths[path]].append(rows)
        self._left.remove(group)
        if not self._left:
            self._file = None  # its bytes go


def _encoded(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """A dictionary column as numbers [N] and what they mean."""
    chunks = table[name].unify_dictionaries().chunks
    if not chunks:
        return np.empty(0, np.int64), []
    return np.concatenate([c.indices.to_numpy() for c in chunks]), chunks[0].dictionary.to_pylist()


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
        segments: Callable[[], Sequence[SegmentObjects]],
        lock: threading.Lock,
        url: str,
    ) -> None:
        """Args:
        n_shards: committed shards by the array's path in the split; those without are left out.
        segments: opened when the first table is asked for.
        lock: of the segments, which the splits share.
        """
        self._split, self._layout, self._url = split, layout, url
        self._n = {f"{split}/{path}": n for path, n in n_shards.items() if n}
        self._segments, self._lock = segments, lock
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
        table = shard_table(path, n, [rows for s in self._segments() for rows in s.take(path)])
        check_chunks(table, self._layout[path.removeprefix(f"{self._split}/")], f"{self._url}/{path}")
        return table


def shard_table(path: str, n: int, parts: Sequence[pa.Table]) -> ShardTable:
    """The chunk table of an array with `n` committed shards, from its rows in any order; any of equal ones holds.

    Raises:
        FormatError: a shard is missing, or a chunk table is not of one length or absurd.
    """
    batches = [batch for part in parts for batch in part.to_batches() if len(batch)]
    listed = _n_listed(n, [batch["shard"].to_numpy() for batch in batches])
    if listed < n:
        raise FormatError(f"the manifest lists {listed} shards of {path}; {n} are committed. Harvest again")
    widths = np.unique([x for b in batches for x in _width_bounds(b["chunk_offset"])])
    if len(widths) != 1 or not 1 <= widths[0] <= _MAX_CHUNKS:
        raise FormatError(
            f"the chunk tables of {path} have {widths[0]}..{widths[-1]} entries; wanted one length"
        )
    if any(_width_bounds(b[c]) != (widths[0], widths[0]) for b in batches for c in _COLUMNS[3:5]):
        raise FormatError(f"the chunk tables of {path} differ in length; the manifest is damaged or hostile")
    width = int(widths[0])
    largest = max(int(b["size_bytes"].to_numpy().max()) for b in batches)
    narrow = np.int32 if largest < 2**31 else np.int64  # both end inside the object: half the memory
    table = ShardTable(
        path=path,
        size_bytes=np.empty(n, np.int64),
        chunk_offset=np.empty((n, width), narrow),
        chunk_nbytes=np.empty((n, width), narrow),
        chunk_crc32c=np.empty((n, width), np.uint32),
        constant=np.empty(n, np.float64),
    )
    for batch in batches:
        shard_M = batch["shard"].to_numpy()
        size_M = batch["size_bytes"].to_numpy()
        offset_MC, nbytes_MC, crc32c_MC = (
            batch[name].flatten().to_numpy().reshape(len(batch), width) for name in _COLUMNS[2:5]
        )
        if (
            (offset_MC < 0).any()
            or (nbytes_MC < 0).any()
            or (nbytes_MC > size_M[:, None]).any()
            or (offset_MC > size_M[:, None] - nbytes_MC).any()
        ):
            raise FormatError(
                f"a chunk of {path} lies outside its object; the manifest is damaged or hostile"
            )
        constant_M = batch["constant"].to_numpy(zero_copy_only=False).astype(np.float64)
        here: Any = slice(None)
        to: Any = shard_M
        if shard_M.max() >= n:  # past the committed prefix
            here = np.flatnonzero(shard_M < n)
            to = shard_M[here]
        if len(to) and np.array_equal(to, np.arange(to[0], to[0] + len(to))):
            to = slice(int(to[0]), int(to[0]) + len(to))
        table.size_bytes[to], table.constant[to] = size_M[here], constant_M[here]
        table.chunk_offset[to], table.chunk_nbytes[to] = offset_MC[here], nbytes_MC[here]
        table.chunk_crc32c[to] = crc32c_MC[here]
    return table


def _n_listed(n: int, shards: Sequence[np.ndarray]) -> int:
    """How many of the shards 0..n-1 are among some; none if there are negative ones."""
    if sum(map(len, shards)) < n or min(int(s.min()) for s in shards) < 0:
        return 0
    listed_N = np.zeros(n, bool)
    for shard_M in shards:
        listed_N[shard_M[shard_M < n]] = True
    return int(np.count_nonzero(listed_N))


def _width_bounds(lists: pa.Array) -> tuple[int, int]:
    """The shortest and the longest of some lists."""
    found = pc.min_max(pc.list_value_length(lists)).as_py()
    return found["min"], found["max"]


def check_chunks(table: ShardTable, array: Mapping[str, Any], where: str) -> None:
    """Refuse a chunk table that is not of this array: its length, and sizes that no chunk can have.

    Raises:
        FormatError: names the array.
    """
    wanted = array["shard_rows"] // array["chunk_rows"]
    if table.chunk_nbytes.shape[1] != wanted:
        raise FormatError(
            f"the chunk tables of {where} have {table.chunk_nbytes.shape[1]} entries, wanted {wanted}"
        )
    decoded = array["chunk_rows"] * math.prod(array["row"]) * array["dtype"].itemsize
    largest = decoded + decoded // 128 + 1024  # more than any compressor makes of noise
    if (table.chunk_nbytes > largest).any():
        raise FormatError(
            f"a chunk of {where} is said to have {table.chunk_nbytes.max()} bytes; {largest} is the most that it can"
        )
    most = wanted * (largest + 16) + 4
    if (table.size_bytes < 0).any() or (table.size_bytes > most).any():
        raise FormatError(
            f"a shard of {where} is said to have {table.size_bytes.max()} bytes; at most {most} can be"
        )
