"""Merging segments, so that a version lists few of them, and what a driver takes out of them.

A merged segment is a new object; the old ones stay for the versions that list them. Specified in
docs/format.md, "Segments".
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from .errors import FormatError
from .manifest import MAX_SHARDS, Segment, read_segment_table, statistics_row, store_segment
from .statistics import Statistics
from .store import Store

FAN_IN = 8
"""Segments of one tier that become one of the next: at most 7 a tier, and each record is rewritten
once a tier. A tier is a power of 8 in records."""
COMPLETE_SEGMENTS = 3
"""A complete version has at most so many: with the listing, the manifest and a calibration for each of
five sites a reader is at 10 requests before its first chunk. Two are too few: then every small
extension would rewrite all but the largest."""


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


def statistics_at(table: pa.Table, rows: Sequence[int]) -> list[Statistics]:
    """The statistics in some rows of a segment table."""
    return [statistics_row(row) for row in table.take(pa.array(rows)).to_pylist()]


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
