"""What the splits of one opened dataset have in common: its pinned manifest, tables, statistics, calibrations.

All is read when it is first asked for. Shapes: N rows, D = d_in.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from .codec import Calibration, Precision, decode, decode_components
from .corpus import TokenStore, open_tokens
from .errors import RESTORE, CorruptObject, ForkedProcess, FormatError, NotADataset
from .layout import array_layout, has_channels, n_shards, read_calibration
from .manifest import Manifest, Part, Segment, read_manifest
from .segment_files import (
    OBJECTS,
    STATISTICS,
    RecordName,
    open_segment_file,
    segment_records,
    segment_statistics,
)
from .spec import digest
from .store import Store, open_store
from .tables import SegmentObjects, Tables

_SEGMENT_THREADS = 8  # a complete version has three segments, each of some files


class Opened:
    """A dataset at a pinned version. Safe to use from many threads, not in a forked process."""

    def __init__(
        self, store: Store, manifest: Manifest, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self.store, self.manifest, self._storage_options = store, manifest, storage_options
        self.reopen: dict[str, Any] = {"url": store.url, "version": manifest.version}
        self._process = os.getpid()
        self.precision = Precision.parse(manifest.identity["precision"])
        self.calibration = lru_cache(maxsize=None)(self._calibration)
        self.tables = lru_cache(maxsize=None)(self._tables)
        self.sequence_ends = lru_cache(maxsize=None)(self._sequence_ends)
        self._table_lock = threading.Lock()
        self._opened: dict[str, SegmentObjects] = {}
        """By key of the part."""

    def check_process(self) -> None:
        """Refuse to go on in a forked child: threads and connections stayed behind, and it would hang.

        Raises:
            ForkedProcess: this is not the process that opened the dataset.
        """
        if os.getpid() != self._process:
            raise ForkedProcess(
                f"{self.store.url} was opened in process {self._process} and is used in its fork "
                f"{os.getpid()}. Open it after the fork, or start processes by spawn "
                '(DataLoader: multiprocessing_context="spawn")'
            )

    @cached_property
    def layout(self) -> dict[str, dict[str, Any]]:
        """Of the arrays of a split."""
        return array_layout(self.manifest.identity, {s: e.d_in for s, e in self.manifest.sites.items()})

    def objects(self) -> pa.Table:
        """path, shard and size_bytes of every object that the segments name."""
        columns = ("path", "shard", "size_bytes")
        files = self._each(lambda part: open_segment_file(self.store, *part).read(columns), self._parts)
        return pa.concat_tables([OBJECTS.empty_table().select(columns), *files])

    @cached_property
    def statistics(self) -> pa.Table:
        """Of all segments; schema `STATISTICS`."""
        tables = self._each(lambda s: segment_statistics(self.store, s), self.manifest.segments)
        return pa.concat_tables([STATISTICS.empty_table(), *tables])

    @cached_property
    def records(self) -> list[RecordName]:
        """Of all segments."""
        found = self._each(lambda s: segment_records(self.store, s), self.manifest.segments)
        return [record for records in found for record in records]

    def _sequence_ends(self, split: str) -> np.ndarray:
        """Sequences of a split that its blocks up to each one come from: int64 [blocks]."""
        size = self.manifest.splits[split]
        of_block = {block: n for named, _, block, n in self.records if named == split}
        ends = [of_block.get(block, -1) for block in range(size["n_blocks"])]
        if ends and (ends[-1] != size["n_sequences"] or min(ends) < 0 or sorted(ends) != ends):
            raise FormatError(
                f"{self.store.url}: the records of {split} do not lead to its sequences; {RESTORE}"
            )
        return np.array(ends, np.int64)

    @cached_property
    def tokens(self) -> TokenStore:
        """The token store that the harvest made, beside the dataset."""
        root = open_store(self.store.url.rpartition("/")[0], self._storage_options)
        wanted = digest(self.manifest.identity["tokens"])
        for name in root.folders("tokens"):
            if name.endswith(f"-{wanted[:12]}"):
                tokens = open_tokens(root.sub("tokens").sub(name))
                if tokens is not None and tokens.manifest["id"] == wanted:
                    return tokens
        raise NotADataset(
            f"{root.url}/tokens holds no token store of {self.store.url}; it names the documents' files. "
            "Copy it there, or harvest again"
        )

    def _tables(self, split: str) -> Tables:
        """The chunk tables of a split, read and decoded when they are asked for."""
        counts = n_shards(self.manifest, split)
        return Tables(split, counts, self.layout, self._parts_of, self._table_lock, self.store.url)

    @cached_property
    def _parts(self) -> list[tuple[Segment, Part]]:
        return [(segment, part) for segment in self.manifest.segments for part in segment.objects]

    def _parts_of(self, path: str) -> list[SegmentObjects]:
        """The parts that may have rows of an array; each is read once."""
        wanted = [(segment, part) for segment, part in self._parts if part.has(path)]
        new = [(segment, part) for segment, part in wanted if part.key not in self._opened]
        files = self._each(lambda part: open_segment_file(self.store, *part), new)
        self._opened |= {p.key: SegmentObjects(f) for (_, p), f in zip(new, files, strict=True)}
        return [self._opened[part.key] for _, part in wanted]

    def _each(self, read: Callable[[Any], Any], of: Sequence[Any]) -> list[Any]:
        """What is read of each of some segments or parts, side by side; digests are verified."""
        try:
            with ThreadPoolExecutor(_SEGMENT_THREADS, thread_name_prefix="actcache-segments") as pool:
                return list(pool.map(read, of))
        except CorruptObject:
            read_manifest(self.store, self.manifest.version)  # says so if gc removed the pinned version
            raise

    def _calibration(self, site: str) -> Calibration:
        extent = self.manifest.sites[site]
        calibration = read_calibration(self.store, site, extent.calibration_sha256)
        if len(calibration.offset_D) != extent.d_in:
            raise FormatError(
                f"{self.store.url}: the calibration of {site} has {len(calibration.offset_D)} channels, "
                f"wanted {extent.d_in}"
            )
        if has_channels(self.manifest.identity) and calibration.channel_D is None:
            raise FormatError(f"{self.store.url}: the calibration of {site} has no multiples of its channels")
        return calibration

    def decode(
        self,
        site: str,
        codes_ND: np.ndarray,
        scale_N: np.ndarray | None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 rows of a site, in `out` if given."""
        if not self.precision.quantised:
            return decode(codes_ND, None, None, self.precision, out=out)
        return decode(codes_ND, scale_N, self.calibration(site), self.precision, out)

    def decode_components(self, site: str, codes_ND: np.ndarray, scale_N: np.ndarray | None) -> np.ndarray:
        """float32 rows of a site stored `rotated`, in the coordinates of its principal components."""
        assert scale_N is not None
        return decode_components(codes_ND, scale_N, self.calibration(site))
