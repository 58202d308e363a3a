"""Verification: what is stored against what the manifest says, all differences named.

The listing shows missing and truncated objects; `zarr.json` and offsets are regenerated and
compared. `deep` reads every object whole, one at a time: checksums, row metadata recomputed from
`input_ids` (docs/format.md, "Blocks"), statistics recomputed from the stored rows. `replay` asks
the LM (`actcache.replay`). Nothing is repaired here.
Shapes: N rows of a block, D = d_in.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .codec import Calibration, Precision, decode
from .corpus import kept_tokens
from .errors import RESTORE, ActcacheError, CorruptObject, DamagedDataset
from .layout import (
    BY_SEQUENCE,
    array_layout,
    calibration_key,
    derived_arrays,
    derived_key,
    object_sizes,
    read_calibration,
    rotation_bytes,
    rotation_key,
    zarr_metadata,
)
from .manifest import (
    BlockRecord,
    File,
    Manifest,
    Segment,
    read_manifest,
)
from .order import permutation
from .progress import Progress
from .reader import Dataset
from .segment_files import open_segment_file, statistics_of
from .shard import chunk_checksums, decode_shard, encode_shard, index_size, parse_index, shard_key
from .spec import canonical_json
from .statistics import Statistics
from .store import Listed

_REWRITE = "delete it and the root's zarr.json, and run the harvest again"
_PIECE_VALUES = 2**22
_UNIT = 2.0**-24  # half a unit in the last place of float32, relative
_SUMS = 1e-6  # what docs/format.md, "Statistics", allows float32 sums


def verify(
    dataset: Dataset,
    *,
    deep: bool = False,
    replay: int = 0,
    seed: int = 0,
    model: str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Check a dataset; returns what was checked, as counts.

    Memory is that of a block and of the chunk tables, whatever the size of the dataset.

    Args:
        dataset: opened at the version to check; `zarr.json` is compared with the newest.
        deep: read every object whole.
        replay: rows to recompute from the LM, drawn by `seed` over sites and splits.
        model: where the LM is, for datasets of a local directory; default: the identity's id.
        device: of the LM.

    Raises:
        DamagedDataset: something differs; `problems` has one line each, `checked` the counts.
        SpecError: `replay` was asked for and the LM is not the one that was harvested.
    """
    check = _Check(dataset, progress)
    check.metadata()
    check.versions()
    check.sizes()
    if deep:
        check.contents()
        check.records()
    if replay:
        from .replay import replay as run_replay

        counts, problems = run_replay(
            dataset, replay, seed=seed, model=model, device=device, progress=progress
        )
        check.counts |= counts
        check.problems += problems
    if check.problems:
        raise DamagedDataset(dataset.url, check.problems, check.counts)
    return check.counts


class _Check:
    """One verification: `problems` and `counts` fill as its steps run, in the order of `verify`."""

    def __init__(self, dataset: Dataset, progress: bool) -> None:
        self.dataset, self.progress = dataset, progress
        self.store, self.manifest = dataset._shared.store, dataset.manifest
        self.layout = array_layout(
            self.manifest.identity, {s: e.d_in for s, e in self.manifest.sites.items()}
        )
        self.listed: dict[str, Listed] = {o.key: o for o in self.store.listing("")}
        self.referenced: set[str] = set()
        self.held: set[str] = set()
        """Records that segments hold; the others are loose."""
        self.segments_read = True
        """Whether the tables of chunks and statistics could be read."""
        self.problems: list[str] = []
        self.counts: dict[str, Any] = {"manifest version": self.manifest.version}

    def problem(self, key: str, what: str, remedy: str) -> None:
        self.problems.append(f"{self.store.url}/{key} {what}; {remedy}")

    def attempt(self, work: Any) -> Any:
        """`work()`, or None with its error noted: damage is reported, not raised."""
        try:
            return work()
        except (ActcacheError, FileNotFoundError) as err:
            self.problems.append(str(err))
            return None

    # Quick

    def metadata(self) -> None:
        """What the manifests imply byte by byte: identity, calibrations, offsets, `zarr.json`, segments."""
        newest = self.attempt(lambda: read_manifest(self.store)) or self.manifest
        implied = {"_identity.json": canonical_json(newest.identity).encode()}
        self.calibrations: dict[str, Calibration] = {}
        for site, extent in newest.sites.items():
            self.referenced.add(calibration_key(site))
            sha256 = extent.calibration_sha256
            calibration = self.attempt(lambda s=site, h=sha256: read_calibration(self.store, s, h))
            if calibration is None:
                continue
            if len(calibration.offset_D) != extent.d_in:
                what = f"has {len(calibration.offset_D)} channels, wanted {extent.d_in}"
                self.problem(calibration_key(site), what, RESTORE)
                continue
            self.calibrations[site] = calibration
            rotation = rotation_bytes(calibration)
            if rotation is not None:
                self.referenced.add(rotation_key(site, hashlib.sha256(rotation).hexdigest()))
        for path, site, field, array in derived_arrays(newest):
            key = derived_key(path, array)
            self.referenced.add(key)
            if site in self.calibrations:
                values = getattr(self.calibrations[site], field)
                implied[key] = encode_shard(values, array["chunk_rows"], array["shard_rows"], float("nan"))[0]
        implied |= zarr_metadata(newest)
        for key, wanted in implied.items():
            self.referenced.add(key)
            found = self._read(key)
            if found is not None and found != wanted:
                self.problem(key, "is not what the manifest implies", _REWRITE)
        self.counts["calibrations, sha256 right"] = len(newest.sites)
        self.counts["zarr.json and offsets as the manifest implies"] = len(implied) - 1

    def versions(self) -> None:
        """Every manifest version: one chain of one dataset, whose segments are all there."""
        found = sorted(
            int(m[1]) for key in self.listed if (m := re.fullmatch(r"_manifest/(\d{8})\.json", key))
        )
        before: Manifest | None = None
        segments: dict[str, tuple[Segment, File]] = {}
        for version in found:
            manifest = self.attempt(lambda v=version: read_manifest(self.store, v))
            if manifest is None:
                continue
            self.referenced.add(manifest.key)
            if before is not None:
                self._follows(before, manifest)
            for s in manifest.segments:
                segments |= {file.key: (s, file) for file in s.files}
            before = manifest
        pinned = {file.key for s in self.manifest.segments for file in s.files}
        for key, (segment, file) in segments.items():
            self.referenced.add(key)
            if (
                self.attempt(lambda s=segment, f=file: open_segment_file(self.store, s, f).read(encoded=True))
                is None
            ):
                self.segments_read = self.segments_read and key not in pinned
        self.counts["manifest versions"] = len(found)
        self.counts["segment files, sha256 right"] = len(segments)

    def _follows(self, before: Manifest, manifest: Manifest) -> None:
        # a copy has no records, and only the versions that were pushed
        harvested = any(key.startswith("_records/") for key in self.listed)
        if manifest.version != before.version + 1 and harvested:
            missing = f"{before.version + 1}..{manifest.version - 1}"
            self.problem(manifest.key, f"follows version {before.version}; {missing} are missing", RESTORE)
        if manifest.id != before.id:
            self.problem(manifest.key, f"is of another dataset than version {before.version}", RESTORE)
        for site, extent in before.sites.items():
            later = manifest.sites.get(site)
            if later is None or any(later.n_blocks.get(k, 0) < n for k, n in extent.n_blocks.items()):
                self.problem(manifest.key, f"has fewer rows of {site} than version {before.version}", RESTORE)
            elif (later.d_in, later.calibration_sha256) != (extent.d_in, extent.calibration_sha256):
                self.problem(manifest.key, f"has {site} otherwise than version {before.version}", RESTORE)

    def sizes(self) -> None:
        """Every committed object in the listing with its size; what nobody names is counted."""
        named: dict[str, int] = {}
        self.tables: dict[str, Any] = {}
        if self.segments_read:
            named = object_sizes(self.dataset._shared.objects(), self.layout)
            names = self.dataset._shared.records
            self.held = {name.key for name in names}
            for split in self.manifest.splits:
                tables = self.attempt(lambda s=split: dict(self.dataset.split(s)._tables))
                self.tables |= tables or {}
        for key, size in named.items():
            found = self.listed.get(key)
            if found is None:
                self.problem(key, f"is missing, wanted {size} bytes", RESTORE)
            elif found.size_bytes != size:
                self.problem(key, f"holds {found.size_bytes} bytes, wanted {size}", RESTORE)
        records = {key for key in self.listed if key.startswith("_records/")}
        others = [o for k, o in self.listed.items() if k not in self.referenced | named.keys() | records]
        self.counts |= {
            "objects of the committed size": len(named),
            "bytes": sum(named.values()),
            "loose records": len(records - self.held),
            "unreferenced objects": len(others),
            "unreferenced bytes": sum(o.size_bytes for o in others),
            "leftovers of killed writers": len(self.store.leftovers()),
        }

    # Deep

    def contents(self) -> None:
        """Every shard of the version read whole, one after another."""
        total = sum(int(t.size_bytes.sum()) for t in self.tables.values())
        self.counts |= {
            "objects read whole, crc32c right": 0,
            "chunks decoded, crc32c right": 0,
            "rows whose token, sequence and position follow from input_ids": 0,
            "rows whose statistics follow from the stored values": 0,
        }
        with Progress("verify", total, "bytes", show=self.progress) as bar:
            self._bar = bar
            for split in self.manifest.splits:
                if self.manifest.splits[split]["n_rows"]:
                    self._row_metadata(split)
                for site in self.manifest.sites:
                    self._site(split, site)

    def records(self) -> None:
        """Every record parses; the objects of loose ones are there with their sizes."""
        keys = [key for key in self.listed if key.startswith("_records/")]
        for key in keys:
            data = self._read(key)
            record = None if data is None else self.attempt(lambda d=data, k=key: BlockRecord.from_json(d, k))
            if record is None:
                continue
            if record.key != key:
                self.problem(key, f"is the record of {record.key}; it was copied or renamed", "delete it")
            for o in record.objects if key not in self.held else ():
                array = self.layout.get(o.path.partition("/")[2])
                if array is None:  # of a site that no manifest has yet
                    continue
                found = self.listed.get(shard_key(o.path, o.shard, 1 + len(array["row"])))
                if found is None or found.size_bytes != o.size_bytes:
                    what = "is missing" if found is None else f"has {found.size_bytes} bytes"
                    self.problem(key, f"names shard {o.shard} of {o.path}, which {what}", "delete the record")
        self.counts["records that parse"] = len(keys)

    def _row_metadata(self, split: str) -> None:
        """The arrays by row against what `input_ids`, `length` and the identity imply."""
        blocks = self._natural_rows(split)
        names = ("token_id", "sequence", "position")
        n_blocks = (
            len(self.tables[f"{split}/token_id"].size_bytes) if f"{split}/token_id" in self.tables else 0
        )
        seed = self.manifest.identity["seed"]
        for block in range(n_blocks):
            natural = next(blocks, None)
            for i, name in enumerate(names):
                stored = self._shard(split, name, block)
                if natural is None or stored is None:
                    continue
                n = len(natural[0])
                wanted = natural[i][permutation(n, "rows", seed, split, block)]
                if len(stored) < n or not np.array_equal(stored[:n], wanted):
                    key = shard_key(f"{split}/{name}", block, 1)
                    self.problem(key, "is not what input_ids and the seed imply", RESTORE)
                elif not i:
                    self._count("rows whose token, sequence and position follow from input_ids", n)
        for _ in blocks:  # sequences past the last block are read too
            pass
        for name in BY_SEQUENCE[2:]:
            table = self.tables.get(f"{split}/{name}")
            for shard in range(len(table.size_bytes) if table is not None else 0):
                self._shard(split, name, shard)

    def _natural_rows(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray] | None]:
        """Token, sequence and position of each block's kept tokens in reading order; None where unknown."""
        special = self.manifest.identity["tokens"]["special_token_ids"]
        size, rows = self.manifest.splits[split], self.manifest.identity["block_rows"]
        per_shard = self.layout["input_ids"]["shard_rows"]
        pending = [np.empty((3, 0), np.int64)]
        left = size["n_rows"]
        for shard in range(-(-size["n_sequences"] // per_shard)):
            first = shard * per_shard
            n = min(per_shard, size["n_sequences"] - first)
            input_ids = self._shard(split, "input_ids", shard)
            length = self._shard(split, "length", shard)
            if input_ids is None or length is None or min(len(input_ids), len(length)) < n:
                return
            kept = kept_tokens(input_ids[:n], length[:n], special)
            sequence, position = np.nonzero(kept)
            pending.append(np.stack([input_ids[:n][kept].astype(np.int64), sequence + first, position]))
            while left and sum(p.shape[1] for p in pending) >= min(rows, left):
                every = np.concatenate(pending, axis=1)
                block = every[:, : min(rows, left)]
                pending, left = [every[:, block.shape[1] :]], left - block.shape[1]
                yield block[0], block[1], block[2]
        if left:
            key = shard_key(f"{split}/input_ids", 0, 2)
            self.problem(key, f"and its later shards lack the tokens of {left} committed rows", RESTORE)

    def _site(self, split: str, site: str) -> None:
        """Codes and scales of a site, block by block, and the statistics of runs of them."""
        path = f"{split}/{site}/codes"
        table = self.tables.get(path)
        if table is None:
            return
        n_blocks = len(table.size_bytes)
        runs = self.attempt(
            lambda: statistics_of(self.dataset._shared.statistics, split, site, n_blocks)
        ) or [(range(n_blocks), None)]
        calibration = self.calibrations.get(site)
        for blocks, recorded in runs:
            sums = recorded and calibration and _Sums(recorded, calibration, self.dataset._shared.precision)
            whole = True
            for block in blocks:
                rows = self._block(split, site, block)
                if rows is None:
                    whole = False
                elif sums:
                    sums.add(*rows)
            if not (sums and whole):
                continue
            differs = sums.differs()
            if differs:
                key = shard_key(path, blocks.start, 2)
                where = f"and those up to block {blocks.stop - 1} have" if len(blocks) > 1 else "has"
                self.problem(key, f"{where} rows whose {differs} is not the recorded one", RESTORE)
            else:
                self._count("rows whose statistics follow from the stored values", sums.n_rows)

    def _block(self, split: str, site: str, block: int) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Codes and scales of a block's rows; None, and a problem, where they are not to be had."""
        codes_ND = self._shard(split, f"{site}/codes", block)
        scale_N = self._shard(split, f"{site}/scale", block) if f"{site}/scale" in self.layout else None
        if scale_N is not None:
            self._constant(split, site, block, scale_N)
        if codes_ND is None or (scale_N is None and self.dataset._shared.precision.quantised):
            return None
        n = min(self.manifest.identity["block_rows"], self._rows_left(split, block))
        if len(codes_ND) < n:
            key = shard_key(f"{split}/{site}/codes", block, 2)
            self.problem(key, f"has {len(codes_ND)} rows, wanted {n}", RESTORE)
            return None
        return codes_ND[:n], None if scale_N is None else scale_N[:n]

    def _rows_left(self, split: str, block: int) -> int:
        return self.manifest.splits[split]["n_rows"] - block * self.manifest.identity["block_rows"]

    def _constant(self, split: str, site: str, block: int, scale_N: np.ndarray) -> None:
        constant = self.tables[f"{split}/{site}/scale"].constant[block]
        n = min(len(scale_N), self._rows_left(split, block))
        if not np.isnan(constant) and not (scale_N[:n] == np.float32(constant)).all():
            key = shard_key(f"{split}/{site}/scale", block, 1)
            self.problem(key, f"is not constantly {constant:g} as its record says", RESTORE)

    def _shard(self, split: str, path: str, shard: int) -> np.ndarray | None:
        """All stored rows of a shard with every byte of it checked; None, and a problem, if they are not."""
        table, array = self.tables.get(f"{split}/{path}"), self.layout[path]
        if table is None or shard >= len(table.size_bytes):
            return None
        key = shard_key(f"{split}/{path}", shard, 1 + len(array["row"]))
        found = self.listed.get(key)
        if found is None or found.size_bytes != table.size_bytes[shard]:
            return None  # noted by `sizes`
        data = self._read(key)
        rows = None if data is None else self.attempt(lambda: self._decode(key, data, table, shard, array))
        self._bar.advance(found.size_bytes)
        if rows is not None:
            self._count("objects read whole, crc32c right", 1)
            self._count("chunks decoded, crc32c right", len(rows) // array["chunk_rows"])
        return rows

    def _decode(self, key: str, data: bytes, table: Any, shard: int, array: Mapping[str, Any]) -> np.ndarray:
        where = f"{self.store.url}/{key}"
        n_chunks = array["shard_rows"] // array["chunk_rows"]
        committed = list(
            zip(table.chunk_offset[shard].tolist(), table.chunk_nbytes[shard].tolist(), strict=True)
        )
        found = parse_index(data[-index_size(n_chunks) :], n_chunks, where)
        constant = not np.isnan(table.constant[shard])  # then its chunks are not listed
        if found != committed and not constant:
            raise CorruptObject(f"{where} has another index than the one that was committed; {RESTORE}")
        present = sum(1 for _, nbytes in found if nbytes)
        shape = (array["chunk_rows"], *array["row"])
        rows = decode_shard(
            data, present * shape[0], shape, array["shard_rows"], array["dtype"], where, array["by_column"]
        )
        if not constant and chunk_checksums(data, committed) != table.chunk_crc32c[shard].tolist():
            raise CorruptObject(f"{where} is intact but not the shard that was committed; {RESTORE}")
        return rows

    def _count(self, name: str, n: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + n

    def _read(self, key: str) -> bytes | None:
        try:
            return self.store.read(key)
        except FileNotFoundError:
            rewritten = key.endswith(("zarr.json", "/offset/c/0", "/channel/c/0", "/rotation/c/0/0"))
            self.problem(key, "is missing", _REWRITE if rewritten else RESTORE)
            return None


class _Sums:
    """float64 sums over stored rows, against the statistics recorded of them."""

    def __init__(self, recorded: Statistics, calibration: Calibration, precision: Precision) -> None:
        d_in = len(recorded.mean_D)
        self._recorded, self._calibration, self._precision = recorded, calibration, precision
        self._total_D, self._square_D, self._peak_D = np.zeros(d_in), np.zeros(d_in), np.zeros(d_in)
        self._norm_sum, self._rescaled, self._finite = 0.0, 0, True
        self.n_rows = 0

    def add(self, codes_ND: np.ndarray, scale_N: np.ndarray | None) -> None:
        """Take in the rows of a block."""
        d_in = codes_ND.shape[1]
        c = self._calibration
        piece = max(1, _PIECE_VALUES // d_in)
        for i in range(0, len(codes_ND), piece):
            scale = None if scale_N is None else scale_N[i : i + piece]
            rows_ND = decode(codes_ND[i : i + piece], scale, c, self._precision)
            if not np.isfinite(rows_ND).all():
                self._finite = False
                return
            wide_ND = rows_ND.astype(np.float64)
            self._norm_sum += float(np.sqrt(np.einsum("nd,nd->n", wide_ND, wide_ND)).sum())
            np.maximum(self._peak_D, np.abs(rows_ND).max(axis=0, initial=0.0), out=self._peak_D)
            wide_ND -= self._recorded.mean_D
            self._total_D += wide_ND.sum(axis=0)
            self._square_D += np.einsum("nd,nd->d", wide_ND, wide_ND)
        self.n_rows += len(codes_ND)
        if scale_N is not None:
            self._rescaled += int((scale_N != np.float32(c.step)).sum())

    def differs(self) -> str:
        """The first statistic that the rows do not give, or ""."""
        if not self._finite:
            return "finiteness"
        recorded, n, peak_D = self._recorded, self.n_rows, self._peak_D
        d_in = len(peak_D)
        # the products of a rotation round by the number of rows that are multiplied at once
        slack = d_in * _UNIT if self._precision.rotated else 0.0
        m2_D, peak = self._square_D - self._total_D**2 / n, float(peak_D.max(initial=0.0))
        norm_slack = ((d_in + 2) * _UNIT + slack) * self._norm_sum
        checks = {
            "n_rows": recorded.n_rows == n == recorded.norm_counts_K.sum(),
            "mean_D": (np.abs(self._total_D / n) <= (_SUMS + slack) * peak_D).all(),
            "m2_D": (np.abs(recorded.m2_D - m2_D) <= _SUMS * m2_D + slack * n * peak_D**2).all(),
            "norm_sum": abs(recorded.norm_sum - self._norm_sum) <= norm_slack,
            "max_abs": abs(recorded.max_abs - peak) <= slack * peak,
            "rows_rescaled": recorded.rows_rescaled == self._rescaled,
        }
        return next((name for name, right in checks.items() if not right), "")
