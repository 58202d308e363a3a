"""Removing what nobody needs: garbage collection inside a dataset, and whole datasets.

Only keys of the layout that docs/format.md names are ever removed; anything else is reported and
kept. Both remove in an order that leaves, wherever they are cut off, a dataset that reads and
harvests correctly. Ages are by the store's clock: a probe object is written and its time taken, since
this machine's clock may be hours off (icechunk lost data to that). Token stores are never touched.
"""

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from .errors import BeingWritten, CorruptObject, FormatError, NotADataset
from .layout import array_layout, calibration_keys, zarr_metadata
from .lease import Lease
from .manifest import (
    SPLITS,
    BlockRecord,
    Manifest,
    latest_version,
    read_manifest,
)
from .progress import Progress
from .segment_files import open_segment_file, segment_records
from .store import Listed, Store, folder_of, open_store

KEEP = 10
"""Manifest versions that are kept whatever their age."""
_THREADS = 16
_SPLIT, _SITE = "|".join(SPLITS), r"[A-Za-z0-9_.:\-]+"
_LAYOUT = {
    "manifest": r"_manifest/(?P<version>\d{8})\.json",
    "record": rf"_records/({_SPLIT})/\d{{8,}}-[0-9a-f]{{12}}\.json",
    "segment": r"_segments/[0-9a-f]{16}-(records|statistics|objects)\.parquet",
    "shard": rf"(?P<path>({_SPLIT})(/{_SITE}){{1,2}})/c/(?P<shard>\d+)(/0)?",
    "calibration": rf"_calibration/{_SITE}",
    "probe": r"_gc/[0-9a-f]{32}",
    "metadata": rf"(({_SPLIT})/({_SITE}/){{0,2}})?zarr\.json",
    "identity": r"_identity\.json",
}


def _by_kind(store: Store) -> tuple[dict[str, list[tuple[Listed, re.Match[str]]]], list[str]]:
    """Every object by the part of the layout that it is of, and the keys that this format does not write."""
    by_kind: dict[str, list[tuple[Listed, re.Match[str]]]] = {kind: [] for kind in _LAYOUT}
    unknown = []
    for o in store.listing(""):
        for kind, pattern in _LAYOUT.items():
            if m := re.fullmatch(pattern, o.key):
                by_kind[kind].append((o, m))
                break
        else:
            unknown.append(o.key)
    return by_kind, unknown


@dataclass
class _Plan:
    """What a collection removes, in the order it does."""

    newest: Manifest
    records: frozenset[str]
    """Keys of all records seen: a new one means that somebody writes."""
    stages: dict[str, list[Listed]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    """Keys that are not of the layout; kept."""


def collect_garbage(
    url: str,
    *,
    grace_s: float,
    keep: int = KEEP,
    dry_run: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Remove what no kept manifest version of the dataset at `url` names; returns keys and counts.

    Kept are the newest `keep` versions and all younger than `grace_s` seconds. Removed, if older than
    `grace_s`: dropped versions, records that a segment of the newest version holds, segments, shards and
    calibrations that no kept version names, and temporary files of killed writers. Records that no
    segment holds are committed work: they and what they name stay, whatever their age.

    Nothing is removed while somebody writes: it takes the lease that harvests take, so that one which begins meanwhile
    waits, and refuses while a harvest renews it. A writer that had stalled for longer than a lease lasts looks for its
    objects when it commits, and writes again what is gone.

    Raises:
        NotADataset: nothing committed there.
        BeingWritten: a harvest is running, or a loose record or an unreferenced object is younger than `grace_s`, or
            appeared meanwhile.
        CorruptObject, FormatError: what is committed cannot be read; nothing was removed.
    """
    if keep < 1 or grace_s < 0:
        raise ValueError(f"keep is {keep} and grace {grace_s} s; keep at least 1 version, and 0 s or more")
    store = open_store(url, storage_options)
    read_manifest(store)  # before anything is written there
    now_s = _store_time(store)
    with _alone(store, storage_options, now_s):
        plan = _plan(store, now_s, grace_s, keep)
        doomed = [o for objects in plan.stages.values() for o in objects]
        if not dry_run:
            with Progress("gc", len(doomed), "objects", show=progress) as bar:
                for objects in plan.stages.values():
                    if objects:
                        _check_quiet(store, plan)
                        _delete(store, objects, bar, in_order=objects is plan.stages["manifest versions"])
            _check_survivors(store, plan, {o.key for o in doomed})
    return {
        "url": store.url,
        "dry_run": dry_run,
        "removed": {name: len(objects) for name, objects in plan.stages.items()},
        "size_bytes": sum(o.size_bytes for o in doomed),
        "keys": [o.key for o in doomed],
        "unknown_keys": plan.unknown,
    }


def _store_time(store: Store) -> float:
    """Now, in seconds by the store's clock: the time it gives to an object written for the purpose."""
    key = f"_gc/{uuid.uuid4().hex}"
    store.create(key, b"written by gc to learn the store's time")
    try:
        return next(o.modified_s for o in store.listing("_gc") if o.key == key)
    finally:
        store.delete(key)


def _alone(
    store: Store, storage_options: Mapping[str, Any] | None, now_s: float
) -> AbstractContextManager[object]:
    """The lease of the dataset, without which no harvest of it begins.

    Raises:
        BeingWritten: when it is entered, if a harvest is running.
    """
    place = folder_of(store.url, storage_options)
    return nullcontext() if place is None else Lease(*place, now_s=now_s)


def _plan(store: Store, now: float, grace_s: float, keep: int) -> _Plan:
    by_kind, unknown = _by_kind(store)

    def old(o: Listed) -> bool:
        return now - o.modified_s >= grace_s

    versions = [(int(m["version"]), o) for o, m in by_kind["manifest"]]
    first_kept = min([v for v, _ in versions[-keep:]] + [v for v, o in versions if not old(o)])
    kept = [read_manifest(store, v) for v, _ in versions if v >= first_kept]
    named = _Named(store, kept, [o.key for o, _ in by_kind["record"]])
    implied = zarr_metadata(kept[-1])
    unknown += [o.key for o, _ in by_kind["metadata"] if o.key not in implied]

    unnamed: dict[str, list[Listed]] = {
        "segments": [o for o, _ in by_kind["segment"] if o.key not in named.segments],
        "shards": [o for o, m in by_kind["shard"] if not named.shard(m["path"], int(m["shard"]))],
        "calibrations": [o for o, _ in by_kind["calibration"] if not named.calibration(o.key)],
        "leftovers": store.leftovers(),
    }
    loose = [o for o, _ in by_kind["record"] if o.key in named.loose]
    young = [o for objects in (loose, *unnamed.values()) for o in objects if not old(o)]
    if young:
        raise BeingWritten(
            f"{store.url} seems to be written: {young[0].key} and {len(young) - 1} other uncommitted objects are "
            f"younger than the grace of {grace_s / 3600:g} h. Wait, or finish the harvest"
        )
    probes = [o for o, _ in by_kind["probe"] if old(o)]
    stages = {
        "manifest versions": [o for v, o in versions if v < first_kept],
        "records": [o for o, _ in by_kind["record"] if o.key in named.held and old(o)],
        **unnamed,
        "probes": probes,
    }
    return _Plan(kept[-1], frozenset(o.key for o, _ in by_kind["record"]), stages, sorted(unknown))


class _Named:
    """What the kept manifest versions and the loose records name."""

    def __init__(self, store: Store, kept: Sequence[Manifest], record_keys: Iterable[str]) -> None:
        segments = {s.statistics: s for manifest in kept for s in manifest.segments}
        self.segments = {file.key for s in segments.values() for file in s.files}
        self.sites = {site for manifest in kept for site in manifest.sites}
        self.places: set[tuple[str, int]] = set()
        """(path of the array, number of the shard)."""
        for s in segments.values():
            for part in s.objects:
                table = open_segment_file(store, s, part).read(("path", "shard"))
                self.places |= set(zip(table["path"].to_pylist(), table["shard"].to_pylist(), strict=True))
        self.held = {name.key for s in kept[-1].segments for name in segment_records(store, s)}
        self.loose = set(record_keys) - self.held
        for key in sorted(self.loose):
            record = BlockRecord.from_json(store.read(key), key)
            self.places |= {(o.path, o.shard) for o in record.objects}
            self.sites |= set(record.statistics)
        self.calibrations = {key for site in self.sites for key in calibration_keys(store, site)}
        widths = dict.fromkeys(self.sites, 1)
        self._arrays = set(array_layout(kept[-1].identity, widths))

    def shard(self, path: str, shard: int) -> bool:
        """Whether a shard is named, or is of an array that follows from a site's calibration."""
        inside = path.partition("/")[2]
        derived = inside not in self._arrays and inside.rpartition("/")[0] in self.sites
        return derived or (path, shard) in self.places

    def calibration(self, key: str) -> bool:
        """Whether a file under `_calibration/` is that of a named site, or the rotation that it names."""
        return key in self.calibrations


def _check_quiet(store: Store, plan: _Plan) -> None:
    """Right before removing: nobody has committed anything since the plan was made."""
    version = latest_version(store)
    new = {o.key for o in store.listing("_records")} - plan.records
    if version != plan.newest.version or new:
        what = f"version {version}" if version != plan.newest.version else min(new)
        raise BeingWritten(
            f"{store.url} is being written: {what} appeared since this collection began. What was removed until "
            "now was garbage; run it again when the harvest has finished"
        )


def _check_survivors(store: Store, plan: _Plan, removed: set[str]) -> None:
    """Whether a record that appeared meanwhile names what was removed; nothing else could tell."""
    for o in store.listing("_records"):
        if o.key in plan.records:
            continue
        record = BlockRecord.from_json(store.read(o.key), o.key)
        keys = {f"{named.path}/c/{named.shard}{end}" for named in record.objects for end in ("", "/0")}
        if keys & removed:
            raise CorruptObject(
                f"{store.url}/{o.key} was committed during this collection and names {min(keys & removed)}, which "
                "it had removed. Stop the harvest, delete that record and run the harvest again"
            )


def _delete(store: Store, objects: Sequence[Listed], bar: Progress, *, in_order: bool = False) -> None:
    def delete(o: Listed) -> None:
        store.delete(o.key)
        bar.advance()

    if in_order:
        for o in objects:
            delete(o)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(delete, objects))


# Whole datasets

_REMOVAL_ORDER = ("manifest", "metadata", "record", "segment", "shard", "calibration", "probe", "identity")
"""Readers lose the dataset first, all of it at once with its newest version. Calibrations outlive the
shards that were encoded with them, so that no later harvest adopts those under another offset."""


@dataclass(frozen=True)
class Removal:
    """What `remove_dataset` would remove, for the person to confirm."""

    store: Store
    name: str
    """Last part of the URL."""
    n_rows: Mapping[str, int]
    """By split, of the newest version; empty where none is readable."""
    size_bytes: int
    objects: Mapping[str, Sequence[Listed]]
    unknown: Sequence[str]
    """Keys that are not of the layout; kept."""
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)


def plan_removal(url: str, storage_options: Mapping[str, Any] | None = None) -> Removal:
    """Look at the dataset at `url` before removing it; nothing is changed.

    Raises:
        NotADataset: no dataset, nor what an interrupted removal or harvest leaves of one.
    """
    store = open_store(url, storage_options)
    by_kind, unknown = _by_kind(store)
    objects = {kind: [o for o, _ in found] for kind, found in by_kind.items()}
    if not objects["identity"] and not objects["manifest"]:
        raise NotADataset(
            f"{store.url} is no actcache dataset (`actcache ls` lists a prefix); nothing removed"
        )
    try:
        splits = read_manifest(store).splits
        n_rows = {split: size["n_rows"] for split, size in splits.items() if size["n_rows"]}
    except (NotADataset, CorruptObject, FormatError):
        n_rows = {}
    objects["probe"] += store.leftovers()
    size = sum(o.size_bytes for every in objects.values() for o in every)
    name = store.url.rstrip("/").split("/")[-1]
    return Removal(store, name, n_rows, size, objects, unknown, storage_options)


def remove_dataset(removal: Removal, *, progress: bool = True) -> int:
    """Remove a dataset; returns how many objects went.

    Cut off anywhere, it leaves a dataset that reads as before or not at all, and a harvest of the same
    Spec completes it correctly. A harvest that begins meanwhile waits.

    Raises:
        BeingWritten: a harvest of it is running; nothing was removed.
    """
    store, total = removal.store, sum(map(len, removal.objects.values()))
    with _alone(store, removal.storage_options, _store_time(store)):
        with Progress("rm", total, "objects", show=progress) as bar:
            for kind in _REMOVAL_ORDER:
                _delete(store, removal.objects[kind], bar, in_order=kind == "manifest")
        store.prune()
    return total
