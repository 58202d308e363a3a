"""What the splits of one opened dataset have in common: its pinned manifest, tables, statistics, calibrations.

All is read when it is first asked for. Shapes: N rows, D = d_in.
"""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from .codec import Calibration, Precision, decode, decode_components
from .corpus import TokenStore, open_tokens
from .errors import CorruptObject, ForkedProcess, FormatError, NotADataset
from .layout import array_layout, n_shards, read_calibration
from .manifest import OBJECTS, STATISTICS, Manifest, read_manifest, read_segment
from .spec import digest
from .store import Store, open_store
from .tables import SegmentObjects, Tables
from .untrusted import ParquetFile

_SEGMENT_THREADS = 3  # as many as a complete version has segments


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
        self._table_lock = threading.Lock()

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
        tables = [file.read(columns) for file in self._read("objects")]
        return pa.concat_tables([OBJECTS.empty_table().select(columns), *tables])

    @cached_property
    def statistics(self) -> pa.Table:
        tables = [file.read() for file in self._read("statistics")]
        return pa.concat_tables([STATISTICS.empty_table(), *tables])

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
        return Tables(
            split, counts, self.layout, lambda: self._segment_objects, self._table_lock, self.store.url
        )

    @cached_property
    def _segment_objects(self) -> list[SegmentObjects]:
        return [SegmentObjects(file) for file in self._read("objects")]

    def _read(self, kind: str) -> list[ParquetFile]:
        """One file of each segment, digests verified; nothing of them is decoded yet."""
        files = [(getattr(s, kind), getattr(s, f"{kind}_sha256")) for s in self.manifest.segments]
        try:
            with ThreadPoolExecutor(_SEGMENT_THREADS, thread_name_prefix="actcache-segments") as pool:
                return list(pool.map(lambda file: read_segment(self.store, *file), files))
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
        c = self.calibration(site)
        return decode(codes_ND, scale_N, c.offset_D, self.precision, c.rotation_DD, out)

    def decode_components(self, site: str, codes_ND: np.ndarray, scale_N: np.ndarray | None) -> np.ndarray:
        """float32 rows of a site stored `rotated`, in the coordinates of its principal components."""
        assert scale_N is not None
        return decode_components(codes_ND, scale_N, self.calibration(site))
