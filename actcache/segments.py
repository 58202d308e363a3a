"""Which segments a version lists: new ones written, old ones merged; and what a driver takes out of them.

A driver gets the records of its own workers as the rows of segments that they will be (`RecordRows`): nothing
is parsed. Those of earlier runs and other drivers it parses from the store. A merged segment is a new object; the old
ones stay for the versions that list them. Specified in docs/format.md, "Segments".
"""

import heapq
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import FormatError
from .manifest import MAX_SHARDS, BlockRecord, ObjectRecord, Segment
from .segment_files import (
    OBJECTS,
    RECORDS,
    STATISTICS,
    RecordName,
    encoded,
    open_segment_file,
    segment_records,
    segment_statistics,
    statistics_row,
    store_segment,
)
from .statistics import Tally
from .store import Store
from .tables import SegmentObjects

FAN_IN = 8
"""Segments of one tier that become one of the next: at most 7 a tier, and each record is rewritten
once a tier. A tier is a power of 8 in records."""
COMPLETE_SEGMENTS = 3
"""A complete version has at most so many: with the listing, the manifest and a calibration for each of
five sites a reader is at 10 requests before its first chunk. Two are too few: then every small
extension would rewrite all but the largest."""


@dataclass(frozen=True, eq=False)
class RecordRows:
    """A block's record as the rows of a segment that it becomes.

    Of a record of 32 sites (d 2304) a driver parsed 4 MB of JSON in 90 ms; these rows it only passes on.
    """

    record: pa.RecordBatch
    """Of schema `RECORDS`, one row."""
    statistics: pa.RecordBatch
    """Of schema `STATISTICS`, a row a site, sorted."""
    objects: pa.RecordBatch
    """Of schema `OBJECTS`, in the record's order."""

    @classmethod
    def of(cls, record: BlockRecord) -> "RecordRows":
        """The rows of a record."""
        name = (record.split, ",".join(sorted(record.statistics)), record.block, record.n_sequences)
        blocks = range(record.block, record.block + 1)
        statistics = [
            statistics_row(record.split, site, blocks, s) for site, s in sorted(record.statistics.items())
        ]
        columns: dict[str, list[Any]] = {
            f.name: [getattr(o, f.name) for o in record.objects] for f in fields(ObjectRecord)
        }
        for column in ("chunk_offset", "chunk_nbytes", "chunk_crc32c"):
            # nobody reads a shard that is one value
            columns[column] = [() if o.constant is not None else getattr(o, column) for o in record.objects]
        return cls(
            pa.RecordBatch.from_pylist([dict(zip(RECORDS.names, name, strict=True))], RECORDS),
            pa.RecordBatch.from_pylist(statistics, STATISTICS),
            pa.RecordBatch.from_pydict(columns, OBJECTS),
        )

    def pack(self) -> bytes:
        """Bytes for `unpack`: Arrow streams. Of one run and its workers only; never stored."""
        sink = pa.BufferOutputStream()
        for batch in (self.record, self.statistics, self.objects):
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
        return bytes(sink.getvalue().to_pybytes())

    @classmethod
    def unpack(cls, data: bytes) -> "RecordRows":
        """What was packed; nothing is copied."""
        source = pa.BufferReader(data)
        return cls(*(pa.ipc.open_stream(source).read_all().to_batches()[0] for _ in range(3)))

    def stating(self, sites: Collection[str]) -> "RecordRows":
        """The same with statistics of some of its sites only: the others are stated elsewhere."""
        chosen = pc.is_in(self.statistics["site"], pa.array(sorted(sites), pa.string()))
        return replace(self, statistics=self.statistics.filter(chosen))

    @cached_property
    def name(self) -> RecordName:
        """As a segment has it."""
        return RecordName(**self.record.to_pylist()[0])

    @cached_property
    def key(self) -> str:
        """Where the record is stored."""
        return self.name.key

    @property
    def split(self) -> str:
        return self.name[0]

    @property
    def block(self) -> int:
        return self.name[2]

    @property
    def n_sequences(self) -> int:
        """Sequences of the split needed for this block and all before it."""
        return self.name[3]

    @property
    def n_rows(self) -> int:
        return int(self.statistics["n_rows"][0].as_py())

    @property
    def nbytes(self) -> int:
        """In memory."""
        return int(self.objects.nbytes + self.statistics.nbytes)

    @cached_property
    def sizes(self) -> list[tuple[str, int, int]]:
        """Path of the array, number and size in bytes of each object."""
        columns = (self.objects[name].to_pylist() for name in ("path", "shard", "size_bytes"))
        return list(zip(*columns, strict=True))

    @property
    def bits_per_value(self) -> float:
        """Of codes and scales, over all sites."""
        stored = sum(size for path, _, size in self.sizes if path.endswith(("/codes", "/scale")))
        values = pc.sum(pc.binary_length(self.statistics["mean_D"])).as_py() // 8 * self.n_rows
        return float(8 * stored / values)


def write_segment(store: Store, records: Sequence[RecordRows]) -> Segment:
    """Compact records into immutable Parquet files, named by their content.

    No two of them state statistics of one block and site.
    """
    rows: dict[str, list[pa.RecordBatch]] = {}
    for record in records:
        for i, path in enumerate(record.objects["path"].to_pylist()):
            rows.setdefault(path, []).append(record.objects.slice(i, 1))
    # array by array: to combine all of them takes several times as long, in memory that is new
    arrays = (_once(pa.Table.from_batches(found).combine_chunks()) for _, found in sorted(rows.items()))
    return store_segment(store, [r.name for r in records], [r.statistics for r in records], arrays)


def compact(store: Store, segments: Sequence[Segment], *, complete: bool) -> list[Segment]:
    """The segments of a version: merged in tiers, and to `COMPLETE_SEGMENTS` in a complete one.

    Those of a manifest of format 1 become one of now.
    """
    kept = list(segments)
    if old := [s for s in kept if s.records is None]:
        kept = [s for s in kept if s.records is not None] + [merge_segments(store, old)]
    while True:
        tiers: dict[int, list[Segment]] = {}
        for segment in kept:
            tiers.setdefault((segment.n_records.bit_length() - 1) // 3, []).append(segment)
        full = [tier for _, tier in sorted(tiers.items()) if len(tier) >= FAN_IN]
        if full:
            chosen = full[0]
        elif complete and len(kept) > COMPLETE_SEGMENTS:
            by_size = sorted(kept, key=lambda s: s.n_records)
            chosen = by_size[: len(kept) - COMPLETE_SEGMENTS + 1]
        else:
            return kept
        kept = [s for s in kept if s not in chosen] + [merge_segments(store, chosen)]


def merge_segments(store: Store, segments: Sequence[Segment]) -> Segment:
    """One segment with the records of several; what two of them say is said once.

    The old ones stay, for the versions that list them.
    """
    records = {name for s in segments for name in segment_records(store, s)}
    statistics = [batch for s in segments for batch in segment_statistics(store, s).to_batches()]
    return store_segment(store, records, statistics, _arrays(store, segments))


def _arrays(store: Store, segments: Sequence[Segment]) -> Iterator[pa.Table]:
    """The `OBJECTS` rows of segments array by array, in the order of their paths; a part of each is open at a time."""

    def of(segment: Segment) -> Iterator[tuple[str, pa.Table]]:
        for part in segment.objects:
            opened = SegmentObjects(open_segment_file(store, segment, part))
            for path in sorted(opened.paths):
                for rows in opened.take(path):
                    yield path, rows

    for path, found in groupby(heapq.merge(*map(of, segments), key=itemgetter(0)), itemgetter(0)):
        rows = pa.concat_tables([rows for _, rows in found])
        yield _once(rows.append_column("path", pa.repeat(pa.scalar(path), len(rows))).select(OBJECTS.names))


def _once(array: pa.Table) -> pa.Table:
    """The rows of one array sorted by shard, the first of each."""
    shard_N = array["shard"].to_numpy()
    if (np.diff(shard_N) > 0).all():
        return array
    return array.take(np.unique(shard_N, return_index=True)[1])


_TALLIED = ("mean_D", "m2_D", "core_mean_D", "core_m2_D", "core_sse_D")


def tallies(table: pa.Table | pa.RecordBatch) -> list[Tally]:
    """The tally of each row of a segment's statistics.

    Raises:
        FormatError: arrays that are no float64, or of different lengths.
    """
    numbers = zip(
        *(
            table[n].to_pylist()
            for n in ("n_rows", "n_core", "sse", "core_sse", "max_error", "rows_rescaled")
        ),
        strict=True,
    )
    arrays = zip(*(table[name] for name in _TALLIED), strict=True)
    found = []
    for (n_rows, n_core, *rest), cells in zip(numbers, arrays, strict=True):
        try:
            # copies: a view would keep all of its record in memory
            arrays_D = [np.frombuffer(c.as_buffer(), "<f8").copy() for c in cells]
        except ValueError as err:
            raise FormatError(f"the statistics of a segment are damaged: {err}") from err
        if len({len(array_D) for array_D in arrays_D}) != 1:
            raise FormatError("the statistics of a segment are damaged: arrays of different lengths")
        mean_D, m2_D, core_mean_D, core_m2_D, core_sse_D = arrays_D
        found.append(
            Tally(n_rows, mean_D, float(m2_D.sum()), n_core, core_mean_D, core_m2_D, core_sse_D, *rest)
        )
    return found


def object_sizes(objects: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By array path (a dictionary column): the numbers of its shards, and their sizes in bytes.

    Raises:
        FormatError: a number or size that no writer gives.
    """
    path_N, paths = encoded(objects, "path")
    shard_N, size_N = objects["shard"].to_numpy(), objects["size_bytes"].to_numpy()
    if len(shard_N) and not (shard_N.min() >= 0 and shard_N.max() < MAX_SHARDS and size_N.min() >= 0):
        raise FormatError(
            f"a segment lists shards {shard_N.min()}..{shard_N.max()}; it is damaged or hostile"
        )
    order = np.argsort(path_N, kind="stable")
    bounds = np.searchsorted(path_N[order], np.arange(len(paths) + 1))
    return {
        path: (shard_N[order[a:b]], size_N[order[a:b]])
        for path, a, b in zip(paths, bounds[:-1], bounds[1:], strict=True)
    }
