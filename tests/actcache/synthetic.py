"""Records of blocks that nobody computed: a dataset's commits at any size, without an LM or a shard.

Chunk tables, statistics and sizes are as large as real ones, so that what is counted here holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actcache.codec import Calibration, Precision, calibrate
from actcache.committed import Committed
from actcache.layout import array_layout, calibration_json, calibration_key
from actcache.manifest import SPLITS, BlockRecord, ObjectRecord
from actcache.segments import RecordRows
from actcache.statistics import Statistics
from actcache.store import Store

SITES = ("blocks.3.hook_resid_post", "blocks.6.hook_resid_post")
LOSSES = {"ce_clean": 3.0, "ce_stored": 3.001, "ce_change": 0.001, "n_tokens": 1000}


def identity(block_rows: int = 131_072, chunk_rows: int = 4096, context_size: int = 256) -> dict[str, Any]:
    """Of a dataset with R = `block_rows`, C = `chunk_rows`, T = `context_size`; the rest is empty."""
    return {
        "format": 2,
        "model": {"id": "synthetic", "revision": "none", "lm_dtype": "float32"},
        "precision": "fvu:0.001",
        "block_rows": block_rows,
        "chunk_rows": chunk_rows,
        "seed": 0,
        "tokens": {
            "context_size": context_size,
            "packing": "concat",
            "bos_token_id": None,
            "eos_token_id": None,
            "vocab_size": 50_257,
            "special_token_ids": [],
        },
    }


class Synthetic:
    """Records of `d_in` columns for `sites`; sequences have T rows, so that block b needs b·R/T of them."""

    def __init__(self, d_in: int = 192, sites: Sequence[str] = SITES, **shape: int) -> None:
        self.identity, self.sites, self.d_in = identity(**shape), sites, d_in
        rng = np.random.default_rng(0)
        acts_ND = rng.normal(size=(64, d_in)).astype(np.float32)
        self.calibration: Calibration = calibrate(acts_ND, Precision.parse(self.identity["precision"]))
        stored_ND = acts_ND + rng.normal(size=acts_ND.shape).astype(np.float32) * 0.03
        rows = self.identity["block_rows"]
        few = Statistics.of(acts_ND, stored_ND, None, self.calibration)
        self._statistics = replace(few, n_rows=rows, n_core=rows)

    def calibrate(self, store: Store) -> None:
        """Store the calibrations."""
        for site in self.sites:
            store.create(calibration_key(site), calibration_json(self.calibration, site))

    def committed(self, store: Store, **wanted: int) -> Committed:
        """A driver's state that wants so many blocks of each split."""
        blocks = dict.fromkeys(SPLITS, 0) | wanted
        return Committed(store, self.identity, "synthetic", dict.fromkeys(self.sites, self.d_in), blocks)

    def statistics(self, block: int, site: str) -> Statistics:
        """Of a block and site, as incompressible as real ones."""
        found, rng = self._statistics, np.random.default_rng([block, list(self.sites).index(site)])
        changed = {
            name: getattr(found, name) * rng.uniform(0.99, 1.01, self.d_in)
            for name in ("mean_D", "m2_D", "core_mean_D", "core_m2_D")
        }
        return replace(found, **changed)

    def record(self, split: str, block: int, sites: Sequence[str] | None = None) -> BlockRecord:
        """The record of a full block."""
        sites = sites or self.sites
        rows, context_size = self.identity["block_rows"], self.identity["tokens"]["context_size"]
        layout = array_layout(self.identity, dict.fromkeys(sites, self.d_in))
        objects = tuple(self._object(split, block, path, array) for path, array in layout.items())
        statistics = {site: self.statistics(block, site) for site in sites}
        return BlockRecord(split, block, rows, (block + 1) * rows // context_size, objects, statistics)

    def rows(self, split: str, block: int, sites: Sequence[str] | None = None) -> RecordRows:
        """The same, as a worker hands it to its driver."""
        return RecordRows.unpack(RecordRows.of(self.record(split, block, sites)).pack())

    def _object(self, split: str, block: int, path: str, array: Mapping[str, Any]) -> ObjectRecord:
        n = array["shard_rows"] // array["chunk_rows"]
        values = int(np.prod((array["chunk_rows"], *array["row"])))
        rng = np.random.default_rng([block, *path.encode()])
        size_N = (values * array["dtype"].itemsize * rng.uniform(0.6, 0.7, n)).astype(int)
        offset_N = np.cumsum(size_N) - size_N
        crc_N = rng.integers(0, 2**32, n)
        tables = (tuple(a.tolist()) for a in (offset_N, size_N, crc_N))
        constant = 0.1 if path.endswith("/scale") else None
        return ObjectRecord(f"{split}/{path}", block, int(size_N.sum()) + 16 * n + 4, *tables, constant)
