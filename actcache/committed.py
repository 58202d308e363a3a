"""What is committed of a dataset, kept up to date, and the next version of it.

One driver holds one `Committed`. Opening it reads every segment once; after that a commit costs what
its new records cost, whatever the number of blocks: prefixes, sizes and statistics are running
values, and segments are merged in tiers. Any number of drivers may commit to one dataset: who loses
the race for a version takes in what the winner committed. It never writes `zarr.json`.
Specified in docs/format.md, "Segments", "Manifest" and "Commit protocol".
"""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .errors import FormatError
from .layout import calibration_key, n_shards
from .manifest import (
    SPLITS,
    Manifest,
    Segment,
    SiteExtent,
    commit_manifest,
    latest_version,
    read_manifest,
    read_records,
)
from .segment_files import open_segment_file, segment_records, segment_statistics
from .segments import RecordRows, compact, object_sizes, tallies, write_segment
from .spec import digest
from .statistics import Tally, merge_tallies
from .store import Store

log = logging.getLogger(__name__)

_TAKE = 1024  # rows of statistics that are unpacked at a time
_LOOSE_BYTES = 256 * 2**20
"""Of records that no segment holds yet; then one is written ahead of its version. 60 records of 32 sites, which
had 4 GB in a minute of a harvest."""
_LOSSES = ("ce_clean", "ce_stored", "ce_change", "n_tokens")
_MEASURED = "ce_change"


class Committed:
    """The committed blocks of a dataset and what this run wants of it.

    Not thread-safe; `add` and `commit` belong to one driver's loop.
    """

    def __init__(
        self,
        store: Store,
        identity: Mapping[str, Any],
        source: str,
        widths: Mapping[str, int],
        wanted: Mapping[str, int],
    ) -> None:
        """Read what is committed.

        Args:
            store: the dataset's prefix.
            source: the corpus as it is shown.
            widths: d_in of each site that this run wants.
            wanted: blocks of each split that this run wants of each of them.
        """
        self.store, self.identity, self.source = store, dict(identity), source
        self.widths, self.wanted = dict(widths), {split: wanted[split] for split in SPLITS}
        self.manifest: Manifest | None = None
        self.loose: list[RecordRows]
        """Committed records that no segment holds yet, with statistics of what nothing else states."""
        self._ahead: list[Segment]
        """Segments that wait for the next version."""
        self._sizes: dict[str, _Sizes] = {}
        self._sized: set[str] = set()
        """Parts of segments whose sizes are known."""
        self._calibrations: dict[str, str] = {}
        self._begin()
        self.refresh()

    def _begin(self) -> None:
        """Know of no record."""
        self._runs: dict[tuple[str, str], _Runs] = {}
        self._n_sequences: dict[str, dict[int, int]] = {split: {} for split in SPLITS}
        self._known: set[str] = set()
        """Keys of the records that are counted."""
        self.loose, self._loose_bytes, self._ahead = [], 0, []

    def refresh(self) -> None:
        """Take in what others have committed: the segments of a version of theirs, and loose records.

        Statistics of runs of blocks cannot be told apart again, so after a version of somebody else's all is
        counted anew, one's own records among it.
        """
        version = latest_version(self.store)
        if version and (self.manifest is None or self.manifest.version != version):
            self.manifest = read_manifest(self.store, version)
            self._begin()
            for segment in self.manifest.segments:
                self._take_in(segment)
        for record in read_records(self.store, self._known):
            self.add(RecordRows.of(record))

    @property
    def n_waiting(self) -> int:
        """Committed records that no version lists yet."""
        return len(self.loose) + sum(segment.n_records for segment in self._ahead)

    def add(self, record: RecordRows) -> None:
        """Take in a record that was just committed; nothing of it counts twice."""
        if record.key in self._known:
            return
        self._known.add(record.key)
        for path, shard, size_bytes in record.sizes:
            self._sizes.setdefault(path, _Sizes()).put(shard, size_bytes)
        split, block = record.split, record.block
        self._n_sequences[split][block] = record.n_sequences
        sites = record.statistics["site"].to_pylist()
        fresh = {site for site in sites if block not in self._runs_of(split, site)}
        for site, tally in zip(sites, tallies(record.statistics), strict=True):
            if site in fresh:
                self._runs_of(split, site).add(range(block, block + 1), tally)
        self.loose.append(record if len(fresh) == len(sites) else record.stating(fresh))
        self._loose_bytes += record.nbytes
        if self._loose_bytes > _LOOSE_BYTES:
            self._ahead.append(write_segment(self.store, self.loose))
            self.loose, self._loose_bytes = [], 0

    def missing(self) -> list[tuple[str, int, tuple[str, ...]]]:
        """(split, block, sites) of what is wanted and not committed, held-out splits first."""
        units = []
        for split in ("validation", "test", "train"):
            runs = {site: self._runs_of(split, site) for site in self.widths}
            for block in range(self.wanted[split]):
                sites = tuple(site for site in runs if block not in runs[site])
                if sites:
                    units.append((split, block, sites))
        return units

    def covered(self) -> bool:
        """Whether the newest manifest, not only loose records, holds all that this run wants."""
        return self.manifest is not None and _holds(
            self.manifest.sites, self.manifest.fidelity, dict.fromkeys(self.widths, self.wanted)
        )

    def unmeasured(self) -> list[str]:
        """Wanted sites whose effect on the LM's loss no version states yet."""
        known = self.manifest.fidelity if self.manifest else {}
        return [site for site in self.widths if _MEASURED not in known.get(site, {})]

    def commit(
        self, losses: Mapping[str, Mapping[str, float | None]], provenance: Mapping[str, Any]
    ) -> Manifest:
        """Compact the loose records and create the next version.

        Another driver may create that version first: then what it committed is taken in and the next
        one tried, so that no record is lost and none counts twice.

        Args:
            losses: ce_clean, ce_stored, ce_change and n_tokens of the sites measured just now.
            provenance: of this run; that of the version before if empty.
        """
        while True:
            new = [write_segment(self.store, self.loose)] if self.loose else []
            manifest = self._next(losses, provenance, [*self._ahead, *new])
            kept = compact(self.store, manifest.segments, complete=manifest.complete)
            manifest = replace(manifest, segments=tuple(kept))
            if commit_manifest(self.store, manifest):
                self.manifest = manifest
                self._sized |= {part.key for s in manifest.segments for part in s.objects}
                self.loose, self._loose_bytes, self._ahead = [], 0, []
                return manifest
            log.info("%s: another run committed version %d first", self.store.url, manifest.version)
            self.refresh()

    def _next(
        self,
        losses: Mapping[str, Mapping[str, float | None]],
        provenance: Mapping[str, Any],
        new: Sequence[Segment],
    ) -> Manifest:
        before = self.manifest
        known = before.sites if before else {}
        widths = {site: extent.d_in for site, extent in known.items()} | self.widths
        sites = {
            site: SiteExtent(
                width,
                {split: self._runs_of(split, site).prefix for split in SPLITS},
                self._calibration_sha256(site),
            )
            for site, width in sorted(widths.items())
        }
        wanted = {site: dict(asked) for site, asked in (before.wanted if before else {}).items()}
        for site in self.widths:
            asked = wanted.get(site, {})
            wanted[site] = {split: max(n, asked.get(split, 0)) for split, n in self.wanted.items()}
        manifest = Manifest(
            version=before.version + 1 if before else 1,
            id=digest(self.identity),
            identity=self.identity,
            source=self.source,
            splits={split: self._extent(split, sites) for split in SPLITS},
            sites=sites,
            segments=(*(before.segments if before else ()), *new),
            wanted=wanted,
            complete=False,
            fidelity={},
            provenance=dict(provenance) or (before.provenance if before else {}),
        )
        stored = {split: self._stored_bytes(manifest, split) for split in SPLITS}
        for split, size in manifest.splits.items():
            size["size_bytes"] = sum(stored[split].values())
        losses = {**(before.fidelity if before else {}), **losses}
        for site in sites:
            measured = {k: v for k, v in losses.get(site, {}).items() if k in _LOSSES}
            if numbers := self._fidelity(site, stored) | measured:
                manifest.fidelity[site] = numbers
        return replace(manifest, complete=_holds(sites, manifest.fidelity, wanted))

    def _extent(self, split: str, sites: Mapping[str, SiteExtent]) -> dict[str, int]:
        """n_blocks, n_rows and n_sequences of the split's longest committed prefix."""
        n_blocks, longest = max((e.n_blocks[split], site) for site, e in sites.items())
        if not n_blocks:
            return {"n_blocks": 0, "n_rows": 0, "n_sequences": 0}
        tally = self._runs_of(split, longest).tally
        assert tally is not None
        n_sequences = self._n_sequences[split][n_blocks - 1]
        return {"n_blocks": n_blocks, "n_rows": tally.n_rows, "n_sequences": n_sequences}

    def _stored_bytes(self, manifest: Manifest, split: str) -> dict[str, int]:
        """Bytes of the committed shards of each array of a split."""
        return {
            path: self._sizes[f"{split}/{path}"].total(n)
            for path, n in n_shards(manifest, split).items()
            if n
        }

    def _fidelity(self, site: str, stored: Mapping[str, Mapping[str, int]]) -> dict[str, float | None]:
        """How well and how tightly a site is stored: its train split's numbers, or the first's with rows."""
        for split in SPLITS:
            tally = self._runs_of(split, site).tally
            if tally is not None:
                n_bytes = sum(stored[split].get(f"{site}/{name}", 0) for name in ("codes", "scale"))
                bits = 8 * n_bytes / (tally.n_rows * len(tally.mean_D))
                return {**tally.fidelity(), "bits_per_value": bits}
        return {}

    def _calibration_sha256(self, site: str) -> str:
        if site not in self._calibrations:
            data = self.store.read(calibration_key(site))
            self._calibrations[site] = hashlib.sha256(data).hexdigest()
        return self._calibrations[site]

    def _runs_of(self, split: str, site: str) -> "_Runs":
        return self._runs.setdefault((split, site), _Runs())

    def _take_in(self, segment: Segment) -> None:
        """A segment of another run, or of one before."""
        for part in segment.objects:
            if part.key not in self._sized:
                self._sized.add(part.key)
                file = open_segment_file(self.store, segment, part)
                sizes = object_sizes(file.read(("path", "shard", "size_bytes"), encoded=True))
                for path, (shards, bytes_N) in sizes.items():
                    self._sizes.setdefault(path, _Sizes()).put(shards, bytes_N)
        for name in segment_records(self.store, segment):
            self._known.add(name.key)
            self._n_sequences[name.split][name.block] = name.n_sequences
        table = segment_statistics(self.store, segment)
        names = zip(*(table[c].to_pylist() for c in ("split", "site", "block", "n_blocks")), strict=True)
        for i in range(0, len(table), _TAKE):
            for tally, (split, site, block, n_blocks) in zip(
                tallies(table.slice(i, _TAKE)), names, strict=False
            ):
                runs = self._runs_of(split, site)
                if block not in runs:  # format 1 may state a block twice
                    runs.add(range(block, block + n_blocks), tally)


class _Runs:
    """The committed blocks of one site of one split, and the merged tally of each unbroken run of them.

    So a block that comes out of order costs no more memory than one that does not.
    """

    def __init__(self) -> None:
        self._first: list[int] = []
        """First block of each run, sorted."""
        self._run: dict[int, tuple[int, Tally]] = {}
        """By first block: one past the last, and the tally of all."""

    def __contains__(self, block: int) -> bool:
        i = bisect_right(self._first, block)
        return i > 0 and block < self._run[self._first[i - 1]][0]

    @property
    def ranges(self) -> list[range]:
        """The runs, in order."""
        return [range(first, self._run[first][0]) for first in self._first]

    @property
    def prefix(self) -> int:
        """How many blocks from block 0 on are committed."""
        return self._run[0][0] if 0 in self._run else 0

    @property
    def tally(self) -> Tally | None:
        """Of the blocks of the prefix; None if there is none."""
        return self._run[0][1] if 0 in self._run else None

    def add(self, blocks: range, tally: Tally) -> None:
        """Take in a run of blocks.

        Raises:
            FormatError: one of them is known.
        """
        i = bisect_right(self._first, blocks.start)
        before = self._first[i - 1] if i else None
        after = self._first[i] if i < len(self._first) else None
        if blocks.start in self or (after is not None and after < blocks.stop):
            raise FormatError(
                f"blocks {blocks.start}..{blocks.stop - 1} are stated twice; the segments are damaged"
            )
        first, last, parts = blocks.start, blocks.stop, [tally]
        if after == last:
            last, tally = self._run.pop(after)
            parts.append(tally)
            del self._first[i]
        if before is not None and self._run[before][0] == first:
            first = before
            parts.insert(0, self._run[before][1])
        else:
            self._first.insert(i, first)
        self._run[first] = last, merge_tallies(parts)


class _Sizes:
    """Bytes of an array's committed shards, and of a prefix of them without adding it up again."""

    def __init__(self) -> None:
        self._bytes = np.zeros(16, np.int64)
        self._n = self._sum = 0

    def put(self, shard: np.ndarray | int, size_bytes: np.ndarray | int) -> None:
        """Note the sizes of shards; a shard may be named again."""
        needed = (shard if isinstance(shard, int) else int(shard.max())) + 1
        if needed > len(self._bytes):
            grown = np.zeros(2 * needed, np.int64)
            grown[: len(self._bytes)] = self._bytes
            self._bytes = grown
        self._bytes[shard] = size_bytes

    def total(self, n: int) -> int:
        """Bytes of shards 0..n-1."""
        if n < self._n:
            self._n = self._sum = 0
        self._sum += int(self._bytes[self._n : n].sum())
        self._n = n
        return self._sum


def _holds(
    sites: Mapping[str, SiteExtent],
    fidelity: Mapping[str, Mapping[str, float | None]],
    wanted: Mapping[str, Mapping[str, int]],
) -> bool:
    """Whether nothing of what is wanted, by site and split, is left to compute or to measure."""
    return all(
        site in sites
        and _MEASURED in fidelity.get(site, {})
        and all(sites[site].n_blocks[split] >= n for split, n in blocks.items())
        for site, blocks in wanted.items()
    )
