"""Writing and merging segments, so that a version lists few of them, and what a driver takes out of them.

A driver gets the records of its own workers as the rows of segments that they will be (`RecordRows`): nothing
is parsed. Those of earlier runs and other drivers it parses from the store. A merged segment is a new object; the old
ones stay for the versions that list them. Specified in docs/format.md, "Segments".
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import FormatError
from .manifest import (
    MAX_SHARDS,
    OBJECTS,
    STATISTIC_ARRAYS,
    STATISTICS,
    BlockRecord,
    ObjectRecord,
    Segment,
    read_segment_table,
    record_key,
    statistic_bytes,
    store_segment,
)
from .statistics import Tally
from .store import Store

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

    objects: pa.RecordBatch
    """Of schema `OBJECTS`, in the record's order."""
    statistics: pa.RecordBatch
    """Of schema `STATISTICS`, a row a site, sorted."""

    @classmethod
    def of(cls, record: BlockRecord) -> "RecordRows":
        """The rows of a record."""
        sites = ",".join(sorted(record.statistics))
        named = {"split": record.split, "block": record.block, "sites": sites}
        columns = {name: [value] * len(record.objects) for name, value in named.items()}
        columns |= {f.name: [getattr(o, f.name) for o in record.objects] for f in fields(ObjectRecord)}
        statistics = []
        for site, found in sorted(record.statistics.items()):
            row = {**named, "site": site, "n_sequences": record.n_sequences}
            for f in fields(found):
                value = getattr(found, f.name)
                row[f.name] = statistic_bytes(f.name, value) if f.name[-2:] in STATISTIC_ARRAYS else value
            statistics.append(row)
        return cls(
            pa.RecordBatch.from_pydict(columns, OBJECTS), pa.RecordBatch.from_pylist(statistics, STATISTICS)
        )

    def pack(self) -> bytes:
        """Bytes for `unpack`: two Arrow streams. Of one run and its workers only; never stored."""
        sink = pa.BufferOutputStream()
        for batch in (self.objects, self.statistics):
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
        return bytes(sink.getvalue().to_pybytes())

    @classmethod
    def unpack(cls, data: bytes) -> "RecordRows":
        """What was packed; nothing is copied."""
        source = pa.BufferReader(data)
        objects, statistics = (pa.ipc.open_stream(source).read_all().to_batches()[0] for _ in range(2))
        return cls(objects, statistics)

    @cached_property
    def key(self) -> str:
        """Where the record is stored."""
        return record_key(self.split, self.block, self.statistics["site"].to_pylist())

    @property
    def split(self) -> str:
        return str(self.statistics["split"][0])

    @property
    def block(self) -> int:
        return int(self.statistics["block"][0].as_py())

    @property
    def n_rows(self) -> int:
        return int(self.statistics["n_rows"][0].as_py())

    @property
    def n_sequences(self) -> int:
        """Sequences of the split needed for this block and all before it."""
        return int(self.statistics["n_sequences"][0].as_py())

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
    """Compact records into two immutable parquet files, named by their content."""
    ordered = sorted(records, key=lambda r: r.key)
    objects = pa.Table.from_batches([r.objects for r in ordered]).combine_chunks()
    statistics = pa.Table.from_batches([r.statistics for r in ordered]).combine_chunks()
    objects = objects.sort_by([("path", "ascending"), ("shard", "ascending")])
    return store_segment(store, objects, statistics, len(records))


def compact(store: Store, segments: Sequence[Segment], *, complete: bool) -> list[Segment]:
    """The segments of a version: merged in tiers, and to `COMPLETE_SEGMENTS` in a complete one."""
    kept = list(segments)
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
    objects, statistics = (
        pa.concat_tables(
            read_segment_table(store, getattr(s, kind), getattr(s, f"{kind}_sha256")) for s in segments
        )
        for kind in ("objects", "statistics")
    )
    objects = _once(objects, ("path",), "shard")
    statistics = _once(statistics, ("split", "sites", "site"), "block")
    records = _once(statistics, ("split", "sites"), "block")
    return store_segment(store, objects, statistics, len(records))


def _once(table: pa.Table, names: Sequence[str], number: str) -> pa.Table:
    """The first row of each (names, number), sorted by them."""
    number_N = table[number].to_numpy()
    name_N = np.zeros(len(table), np.int64)
    for column in names:
        encoded = table[column].combine_chunks().dictionary_encode()
        rank = np.argsort(np.argsort(encoded.dictionary.to_numpy(zero_copy_only=False)))
        name_N = name_N * len(rank) + rank[encoded.indices.to_numpy()]
    order = np.lexsort((number_N, name_N))
    again = (np.diff(name_N[order]) == 0) & (np.diff(number_N[order]) == 0)
    return table.take(pa.array(order[np.concatenate([[True], ~again])]))


_TALLIED = ("mean_D", "m2_D", "core_mean_D", "core_m2_D")


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
            mean_D, m2_D, core_mean_D, core_m2_D = (np.frombuffer(c.as_buffer(), "<f8") for c in cells)
        except ValueError as err:
            raise FormatError(f"the statistics of a segment are damaged: {err}") from err
        if not len(mean_D) == len(m2_D) == len(core_mean_D) == len(core_m2_D):
            raise FormatError("the statistics of a segment are damaged: arrays of different lengths")
        # copies: a view would keep all of its record in memory
        moments = (
            n_rows,
            mean_D.copy(),
            float(m2_D.sum()),
            n_core,
            core_mean_D.copy(),
            float(core_m2_D.sum()),
        )
        found.append(Tally(*moments, *rest))
    return found


def object_sizes(objects: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By array path: the numbers of its shards in a segment table, and their sizes in bytes.

    Raises:
        FormatError: a number or size that no writer gives.
    """
    encoded = objects["path"].combine_chunks().dictionary_encode()
    path_N, shard_N, size_N = (
        encoded.indices.to_numpy(),
        objects["shard"].to_numpy(),
        objects["size_bytes"].to_numpy(),
    )
    if len(shard_N) and not (shard_N.min() >= 0 and shard_N.max() < MAX_SHARDS and size_N.min() >= 0):
        raise FormatError(
            f"a segment lists shards {shard_N.min()}..{shard_N.max()}; it is damaged or hostile"
        )
    order = np.argsort(path_N, kind="stable")
    bounds = np.searchsorted(path_N[order], np.arange(len(encoded.dictionary) + 1))
    return {
        path: (shard_N[order[a:b]], size_N[order[a:b]])
        for path, a, b in zip(encoded.dictionary.to_pylist(), bounds[:-1], bounds[1:], strict=True)
    }
