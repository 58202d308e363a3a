"""The Parquet files of segments: written, merged array by array, and read with their digests verified.

A segment has three kinds of rows: which records it holds, statistics of runs of blocks, and the objects with
their chunk tables, cut into parts by path. A segment of a manifest of format 1 is read as one of now: it has
no records (they are columns of the others) and a row of statistics for each block.
Specified in docs/format.md, "Segments".
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import RESTORE, CorruptObject, FormatError
from .manifest import STATISTIC_ARRAYS, File, Part, Segment, record_key, statistic_bytes
from .statistics import Statistics, merge
from .store import Store
from .untrusted import MAX_BLOCKS, MAX_SEGMENT_BYTES, ParquetFile, read_whole


class RecordName(NamedTuple):
    """A record as a segment names it."""

    split: str
    sites: str
    """Sorted, joined by commas."""
    block: int
    n_sequences: int
    """Needed for the split's blocks so far."""

    @property
    def key(self) -> str:
        """Where the record is stored."""
        return record_key(self.split, self.block, self.sites.split(","))


RECORDS = pa.schema(
    [("split", pa.string()), ("sites", pa.string()), ("block", pa.int64()), ("n_sequences", pa.int64())]
)
_FIELDS = [
    (
        f.name,
        pa.binary() if f.name[-2:] in STATISTIC_ARRAYS else pa.int64() if f.type is int else pa.float64(),
    )
    for f in fields(Statistics)
]
STATISTICS = pa.schema(
    [("split", pa.string()), ("site", pa.string()), ("block", pa.int64()), ("n_blocks", pa.int64()), *_FIELDS]
)
OBJECTS = pa.schema(
    [
        ("path", pa.string()),
        ("shard", pa.int64()),
        ("size_bytes", pa.int64()),
        ("chunk_offset", pa.list_(pa.int64())),
        ("chunk_nbytes", pa.list_(pa.int64())),
        ("chunk_crc32c", pa.list_(pa.uint32())),
        ("constant", pa.float64()),
    ]
)
_FIELDS_2 = [field for field in _FIELDS if field[0] != "core_sse_D"]
"""In manifests of formats 1 and 2."""
_STATISTICS_2 = pa.schema([*list(STATISTICS)[:4], *_FIELDS_2])
_NAMED_1 = [("split", pa.string()), ("block", pa.int64())]
_STATISTICS_1 = pa.schema(
    [*_NAMED_1, ("site", pa.string()), ("sites", pa.string()), ("n_sequences", pa.int64()), *_FIELDS_2]
)
_OBJECTS_1 = pa.schema([*_NAMED_1, ("sites", pa.string()), *OBJECTS])
_SCHEMAS = {"records": RECORDS, "statistics": STATISTICS, "objects": OBJECTS}
_SCHEMAS_1 = {"statistics": _STATISTICS_1, "objects": _OBJECTS_1}

PART_BYTES = 2**27
"""A part of `objects` ends once it has so many bytes: a merge holds a part of each segment, and a reader of one site
of many fetches the parts of its arrays."""
_GROUP_ROWS = 256
"""A row group of `objects` ends where a path does, once it has so many rows: a reader decodes the arrays
that it wants, and what a group costs (some 2 kB) stays a few percent of it."""
_GROUP_CHUNKS = 2**20
"""And within a path, once it has so many chunks: 20 MB decoded."""
_ENCODING: dict[str, dict[str, Any]] = {
    "records": {"store_schema": False},  # it is written from dictionaries and read as text
    "statistics": {},
    "objects": {
        # no dictionaries of what hardly repeats: 30 % fewer bytes
        "use_dictionary": ["path", "constant"],
        "column_encoding": {
            f"{name}.list.element": "DELTA_BINARY_PACKED" for name in ("chunk_offset", "chunk_nbytes")
        },
    },
}


# Writing


def store_segment(
    store: Store,
    records: Iterable[RecordName],
    statistics: Iterable[pa.RecordBatch],
    arrays: Iterable[pa.Table],
) -> Segment:
    """Create the files of a segment.

    Args:
        records: in any order, each once.
        statistics: of schema `STATISTICS`; rows whose blocks follow each other become one.
        arrays: the `OBJECTS` rows of one array each, sorted by shard; in the order of their paths.
    """
    parts = _store_objects(store, arrays)
    named = sorted(records)
    split, sites, block, n_sequences = zip(*named, strict=True)
    columns = [_repeating(split), _repeating(sites), pa.array(block), pa.array(n_sequences)]
    table = pa.Table.from_arrays(columns, names=RECORDS.names)
    return Segment(
        n_records=len(named),
        records=_store_table(store, "records", table),
        statistics=_store_table(store, "statistics", join_runs(statistics)),
        objects=parts,
    )


def _repeating(texts: Sequence[str]) -> pa.DictionaryArray:
    """Texts that repeat, each kept once."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return pa.DictionaryArray.from_arrays(
        pa.array([number[text] for text in texts], pa.int32()), pa.array(list(number), pa.string())
    )


def _store_table(store: Store, kind: str, table: pa.Table) -> File:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", **_ENCODING[kind]) as writer:
        if len(table):  # else it has no row group
            writer.write_table(table)
    return _store_file(store, kind, sink.getvalue())


def _store_file(store: Store, kind: str, data: bytes) -> File:
    sha256 = hashlib.sha256(data).hexdigest()
    file = File(f"_segments/{sha256[:16]}-{kind}.parquet", sha256)
    store.create(file.key, data)
    return file


def _store_objects(store: Store, arrays: Iterable[pa.Table]) -> tuple[Part, ...]:
    """The parts of `objects`, each created as soon as it is full."""
    parts: list[Part] = []
    open_part: _OpenPart | None = None
    for group in _groups(arrays):
        open_part = open_part or _OpenPart(group)
        if open_part.write(group) >= PART_BYTES:
            parts.append(open_part.store(store))
            open_part = None
    if open_part:
        parts.append(open_part.store(store))
    return tuple(parts)


class _OpenPart:
    """A part that is being written."""

    def __init__(self, group: pa.Table) -> None:
        self._first = self._last = group["path"][0].as_py()
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(self._sink, OBJECTS, compression="zstd", **_ENCODING["objects"])

    def write(self, group: pa.Table) -> int:
        """Write a row group; returns the bytes so far."""
        self._writer.write_table(group)
        self._last = group["path"][-1].as_py()
        return self._sink.tell()

    def store(self, store: Store) -> Part:
        self._writer.close()
        file = _store_file(store, "objects", self._sink.getvalue())
        return Part(file.key, file.sha256, self._first, self._last)


def _groups(arrays: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The row groups of `objects`."""
    waiting: list[pa.Table] = []
    for array in arrays:
        n_chunks = max(1, len(array["chunk_offset"][0]))
        most = max(_GROUP_ROWS, _GROUP_CHUNKS // n_chunks)
        for at in range(0, len(array), most):
            waiting.append(array.slice(at, most))
            if sum(map(len, waiting)) >= _GROUP_ROWS:
                yield pa.concat_tables(waiting)
                waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def join_runs(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Statistics rows, in any order, with those of blocks that follow each other merged; sorted.

    Raises:
        FormatError: rows that have some of their blocks in common.
    """
    rows: list[dict[str, Any]] = []
    for (split, site), places in sorted(_by_site(batches).items()):
        runs = _tiled(places, f"{split}/{site}")
        begin = 0
        for i in range(1, len(runs) + 1):
            if i == len(runs) or runs[i][0].start != runs[i - 1][0].stop:
                blocks = range(runs[begin][0].start, runs[i - 1][0].stop)
                rows.append(statistics_row(split, site, blocks, merge([s for _, s in runs[begin:i]])))
                begin = i
    return pa.Table.from_pylist(rows, STATISTICS)


_Place = tuple[int, int, pa.RecordBatch, int]
"""Of a row of statistics: `block`, `n_blocks`, and where it is."""


def _by_site(batches: Iterable[pa.RecordBatch]) -> dict[tuple[str, str], list[_Place]]:
    """Rows of statistics by split and site; nothing is copied."""
    of: dict[tuple[str, str], list[_Place]] = {}
    for batch in batches:
        columns = [batch[name].to_pylist() for name in STATISTICS.names[:4]]
        for i, (split, site, block, n_blocks) in enumerate(zip(*columns, strict=True)):
            of.setdefault((split, site), []).append((block, n_blocks, batch, i))
    return of


def statistics_row(split: str, site: str, blocks: range, statistics: Statistics) -> dict[str, Any]:
    """A row of schema `STATISTICS`."""
    row: dict[str, Any] = {"split": split, "site": site, "block": blocks.start, "n_blocks": len(blocks)}
    for f in fields(statistics):
        value = getattr(statistics, f.name)
        row[f.name] = statistic_bytes(f.name, value) if f.name[-2:] in STATISTIC_ARRAYS else value
    return row


# Reading


def open_segment_file(store: Store, segment: Segment, file: File) -> ParquetFile:
    """A file of a segment, its digest verified; nothing of it is decoded yet."""
    schema = (_SCHEMAS if segment.records else _SCHEMAS_1)[file.kind]
    try:
        data = read_whole(store, file.key, MAX_SEGMENT_BYTES)
    except FileNotFoundError:
        raise CorruptObject(
            f"{store.url}/{file.key} is missing although it was committed; {RESTORE}"
        ) from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise CorruptObject(f"{store.url}/{file.key} does not match its sha256; {RESTORE}")
    earlier = _STATISTICS_2 if file.kind == "statistics" else None
    return ParquetFile(data, schema, f"{store.url}/{file.key}", earlier)


def segment_records(store: Store, segment: Segment) -> list[RecordName]:
    """The records that a segment holds."""
    file = open_segment_file(store, segment, segment.records or segment.statistics)
    table = file.read(RECORDS.names, encoded=True)
    split, sites = ([texts[i] for i in at] for at, texts in (encoded(table, c) for c in ("split", "sites")))
    names = zip(split, sites, table["block"].to_pylist(), table["n_sequences"].to_pylist(), strict=True)
    return list(dict.fromkeys(map(RecordName._make, names)))


def segment_statistics(store: Store, segment: Segment) -> pa.Table:
    """Of schema `STATISTICS`."""
    table = open_segment_file(store, segment, segment.statistics).read()
    if segment.records is None:
        table = table.append_column("n_blocks", pa.array(np.ones(len(table), np.int64)))
    if "core_sse_D" not in table.column_names:
        unknown = [statistic_bytes("core_sse_D", np.full(n // 8, np.nan)) for n in _lengths(table["mean_D"])]
        table = table.append_column("core_sse_D", pa.array(unknown, pa.binary()))
    return table.select(STATISTICS.names)


def _lengths(column: pa.ChunkedArray) -> list[int]:
    """Bytes of each element."""
    return list(pc.binary_length(column).to_pylist())


def encoded(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """A dictionary column as numbers [N] and what they mean."""
    chunks = table[name].unify_dictionaries().chunks
    if not chunks:
        return np.empty(0, np.int64), []
    return np.concatenate([c.indices.to_numpy() for c in chunks]), chunks[0].dictionary.to_pylist()


def statistics_of(table: pa.Table, split: str, site: str, n_blocks: int) -> list[tuple[range, Statistics]]:
    """The statistics of a site's first `n_blocks` blocks: of runs of blocks, in their order.

    Raises:
        FormatError: rows that do not tile these blocks, or are damaged.
    """
    chosen = pc.and_(
        pc.and_(pc.equal(table["split"], split), pc.equal(table["site"], site)),
        pc.less(table["block"], n_blocks),
    )
    places = _by_site(table.filter(chosen).to_batches()).get((split, site), [])
    runs = _tiled(places, f"{split}/{site}")
    found = sum(len(blocks) for blocks, _ in runs)
    if found != n_blocks or (runs and runs[-1][0].stop != n_blocks):
        raise FormatError(
            f"the manifest lists statistics of {found} blocks of {split}/{site}, wanted {n_blocks}"
        )
    return runs


def _tiled(places: Sequence[_Place], where: str) -> list[tuple[range, Statistics]]:
    """Rows of one site, sorted by block; one within another is passed over (format 1 may say a block twice)."""
    try:
        runs: list[tuple[range, Statistics]] = []
        end = 0
        for block, n_blocks, batch, i in sorted(places, key=lambda place: (place[0], -place[1])):
            if block < 0 or not 1 <= n_blocks <= MAX_BLOCKS:
                raise ValueError(f"{n_blocks} blocks from {block}")
            if block + n_blocks <= end:
                continue
            if block < end:
                raise ValueError(f"blocks {block}..{end - 1} are in two runs")
            end = block + n_blocks
            runs.append((range(block, end), _statistics(batch, i)))
        return runs
    except ValueError as err:
        raise FormatError(f"the statistics of {where} are damaged: {err}") from err


def _statistics(batch: pa.RecordBatch, i: int) -> Statistics:
    values: dict[str, Any] = {
        f.name: np.frombuffer(batch[f.name][i].as_buffer(), dtype)
        if (dtype := STATISTIC_ARRAYS.get(f.name[-2:]))
        else batch[f.name][i].as_py()
        for f in fields(Statistics)
    }
    for end in STATISTIC_ARRAYS:
        if len({len(value) for name, value in values.items() if name.endswith(end)}) != 1:
            raise ValueError("arrays of different lengths")
    return Statistics(**values)
