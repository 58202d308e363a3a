"""Records, segments and manifests: what is committed, with sizes, chunk offsets and checksums.

A *record* (JSON) commits one block for a set of sites. *Segments* (parquet) are compacted records.
A *manifest version* (JSON with its own digest) lists segments and is what readers pin. All are
created, never changed. Specified in docs/format.md, "Manifest".
"""

import base64
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import numpy as np

from .codec import Precision
from .errors import Conflict, CorruptObject, FormatError, NotADataset
from .spec import FORMAT, canonical_json, digest
from .statistics import Statistics
from .store import Store
from .untrusted import MAX_JSON_BYTES, check_manifest, load_json, read_whole

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

STATISTIC_ARRAYS = {"_D": np.dtype("<f8"), "_K": np.dtype("<i8")}
"""Dtype of a statistic that is an array, by the end of its name."""
MAX_SHARDS = 1 << 24
MANIFEST_FORMAT = 3
"""Format of manifests and their segments; all else has `spec.FORMAT`. Those before are read, and continued as this."""
_READ_THREADS = 16


@dataclass(frozen=True)
class ObjectRecord:
    """One stored shard: its array and number give its key; the chunk table gives its inside."""

    path: str
    """Path of the array in the dataset, e.g. `train/blocks.3.hook_resid_post/codes`."""
    shard: int
    size_bytes: int
    chunk_offset: tuple[int, ...]
    chunk_nbytes: tuple[int, ...]
    """0 where the chunk is absent (past the last row of a short block)."""
    chunk_crc32c: tuple[int, ...]
    """The checksum that ends each chunk; 0 where it is absent."""
    constant: float | None = None
    """The value of every element, where they are all equal (the usual scale): no need to read it."""


@dataclass(frozen=True, eq=False)
class BlockRecord:
    """One committed block of one split, for a set of sites."""

    split: str
    block: int
    n_rows: int
    n_sequences: int
    """Sequences of the split needed for this block and all before it."""
    objects: tuple[ObjectRecord, ...]
    statistics: Mapping[str, Statistics]
    """By site."""

    @property
    def key(self) -> str:
        """Where the record is stored."""
        return record_key(self.split, self.block, self.statistics)

    def to_json(self) -> bytes:
        """Canonical bytes: the same block on the same machine gives the same record."""
        value = {
            "format": FORMAT,
            "split": self.split,
            "block": self.block,
            "n_rows": self.n_rows,
            "n_sequences": self.n_sequences,
            "objects": [asdict(o) for o in self.objects],
            "statistics": {site: _statistics_json(s) for site, s in sorted(self.statistics.items())},
        }
        value["digest"] = digest(value)
        return canonical_json(value).encode()

    @classmethod
    def from_json(cls, data: bytes, key: str) -> "BlockRecord":
        """Parse the record stored under `key`.

        Raises:
            CorruptObject: not JSON, or not as its digest says; names the key.
            FormatError: of an unknown format, of wrong types, or of another key.
        """
        value = parse_digested(data, key, _REDO)
        try:
            record = cls(
                split=value["split"],
                block=_count(value["block"]),
                n_rows=_count(value["n_rows"]),
                n_sequences=_count(value["n_sequences"]),
                objects=tuple(_object_record(o) for o in _typed(value["objects"], list)),
                statistics={
                    _checked_site(s): _checked_statistics(v, value["format"])
                    for s, v in value["statistics"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatError(f"{key} is not a block record ({type(err).__name__}: {err})") from err
        if record.key != key:
            raise FormatError(f"{key} says it is {record.key}; it was copied or renamed. Delete it")
        return record


_REDO = "run the harvest again: it computes the block again and writes the record anew"


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a count belongs")
    return value


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} where a {kind.__name__} belongs")
    return value


def _checked_statistics(value: Mapping[str, Any], record_format: int) -> Statistics:
    statistics = _statistics_from(value, record_format)
    for f in fields(Statistics):
        found = getattr(statistics, f.name)
        if not isinstance(found, np.ndarray | int | float):
            raise ValueError(f"{f.name} {found!r}")
    return statistics


def _object_record(value: Mapping[str, Any]) -> ObjectRecord:
    chunks = {k: tuple(map(_count, value[k])) for k in ("chunk_offset", "chunk_nbytes", "chunk_crc32c")}
    constant = value["constant"]
    if not (constant is None or isinstance(constant, float)) or not isinstance(value["path"], str):
        raise ValueError(f"path {value['path']!r} with constant {constant!r}")
    sizes = {k: _count(value[k]) for k in ("shard", "size_bytes")}
    if sizes["shard"] >= MAX_SHARDS:
        raise ValueError(f"shard {sizes['shard']}")
    return ObjectRecord(**{**value, **sizes, **chunks})


def record_key(split: str, block: int, sites: Iterable[str]) -> str:
    """`_records/<split>/<block>-<digest of the sorted sites>.json`."""
    return f"_records/{split}/{block:08d}-{digest(sorted(sites))[:12]}.json"


def read_records(store: Store, known: Collection[str] = ()) -> Iterator[BlockRecord]:
    """Every record in the store whose key is not among `known`: one listing, then some reads at a time.

    A damaged one is left out, with a warning: its block counts as missing, and whoever computes it
    again replaces the record.
    """
    keys = [o.key for o in store.listing("_records") if o.key.endswith(".json") and o.key not in known]

    def read(key: str) -> BlockRecord | None:
        try:
            return BlockRecord.from_json(store.read(key), key)
        except CorruptObject as err:
            log.warning("%s/%s", store.url, err)
        except FileNotFoundError:
            log.debug("%s vanished since the listing: gc took it", key)
        return None

    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="records") as pool:
        for i in range(0, len(keys), _READ_THREADS):
            yield from (record for record in pool.map(read, keys[i : i + _READ_THREADS]) if record)


# Manifest versions


@dataclass(frozen=True)
class File:
    """A Parquet file of a segment, named by its content."""

    key: str
    sha256: str

    @property
    def kind(self) -> str:
        """`records`, `statistics` or `objects`."""
        return self.key.rpartition("-")[2].removesuffix(".parquet")


@dataclass(frozen=True)
class Part(File):
    """A part of a segment's `objects`: the rows of the paths from `first` to `last`."""

    first: str
    last: str

    def has(self, path: str) -> bool:
        """Whether rows of this array may be in it."""
        return self.first <= path <= self.last


@dataclass(frozen=True)
class Segment:
    """Compacted records, as Parquet files (`actcache.segment_files`)."""

    n_records: int
    records: File | None
    """None in a manifest of format 1, whose two files hold the records too."""
    statistics: File
    objects: tuple[Part, ...]

    @property
    def files(self) -> tuple[File, ...]:
        """All of them."""
        return (*([self.records] if self.records else []), self.statistics, *self.objects)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], manifest_format: int) -> "Segment":
        """What `check_manifest` has passed."""
        if manifest_format == 1:
            statistics, objects = ((value[k], value[f"{k}_sha256"]) for k in ("statistics", "objects"))
            return cls(value["n_records"], None, File(*statistics), (Part(*objects, "", chr(0x10FFFF)),))
        parts = tuple(Part(**part) for part in value["objects"])
        return cls(value["n_records"], File(**value["records"]), File(**value["statistics"]), parts)


@dataclass(frozen=True)
class SiteExtent:
    """What a manifest says of one site: its width and how many blocks of each split are committed."""

    d_in: int
    n_blocks: Mapping[str, int]
    """By split: blocks 0..n-1 are all committed."""
    calibration_sha256: str
    """Of `_calibration/<site>.json`."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One committed version of a dataset. See docs/format.md for each field."""

    version: int
    id: str
    """sha256 of the identity's canonical JSON."""
    identity: dict[str, Any]
    source: str
    """The corpus as the person named it (shown, not hashed); no credentials."""
    splits: dict[str, dict[str, int]]
    """By split: n_blocks, n_rows, n_sequences and size_bytes of the committed prefix."""
    sites: dict[str, SiteExtent]
    segments: tuple[Segment, ...]
    wanted: dict[str, dict[str, int]]
    """By site and split: blocks wanted, the most that any run asked for."""
    complete: bool
    """Whether everything wanted is committed and its effect on the LM's loss measured."""
    fidelity: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """By site: noise and size of what is stored, and its effect on the LM's loss once measured."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, kernel, LM batch, workers and rate of the run that wrote this version."""

    @property
    def key(self) -> str:
        """Where the version is stored."""
        return manifest_key(self.version)

    def to_json(self) -> bytes:
        value = {"format": MANIFEST_FORMAT, **asdict(self)}
        value["digest"] = digest(value)
        return canonical_json(value).encode()


def manifest_key(version: int) -> str:
    """`_manifest/00000001.json`, counted from 1."""
    return f"_manifest/{version:08d}.json"


def latest_version(store: Store) -> int:
    """The newest manifest version, 0 if there is none."""
    return max(_versions(store), default=0)


def _versions(store: Store) -> list[int]:
    """The manifest versions that are there, in order."""
    keys = (re.fullmatch(r"_manifest/(\d{8})\.json", o.key) for o in store.listing("_manifest"))
    return [int(m[1]) for m in keys if m]


def _no_such_version(store: Store, version: int) -> NotADataset:
    found = _versions(store)
    have = f"has versions {found[0]} to {found[-1]}" if found else "has no version"
    return NotADataset(
        f"{store.url} {have}, wanted {version}: `actcache gc` removed it, or it was never committed. Open the "
        "newest (give no version)"
    )


def read_manifest(store: Store, version: int | None = None) -> Manifest:
    """A manifest version (the newest by default), digest verified.

    Raises:
        NotADataset: there is none.
        FormatError: a format this version does not know, wrong types, absurd sizes.
        CorruptObject: the digest does not match.
    """
    version = latest_version(store) if version is None else version
    if version < 1:
        raise NotADataset(
            f"no committed actcache dataset at {store.url}; check the URL (`actcache ls` lists a prefix), or harvest it"
        )
    key = manifest_key(version)
    try:
        data = read_whole(store, key, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise _no_such_version(store, version) from None
    manifest = parse_manifest(data, f"{store.url}/{key}")
    if manifest.version != version:
        raise FormatError(
            f"{store.url}/{key} says it is version {manifest.version}; it was copied or renamed"
        )
    return manifest


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Check and parse the bytes of a manifest; nothing in it is trusted before its shape is checked."""
    value = parse_digested(data, where, "restore it from a copy, or pin an older version", MANIFEST_FORMAT)
    found = value.pop("format")
    try:
        check_manifest(value, SPLITS, found)
        value["sites"] = {_checked_site(s): SiteExtent(**e) for s, e in value["sites"].items()}
        value["segments"] = tuple(Segment.from_json(s, found) for s in value["segments"])
        manifest = Manifest(**value)
        if manifest.id != digest(manifest.identity):
            raise ValueError("the id is not the digest of the identity")
        Precision.parse(manifest.identity["precision"])
    except (TypeError, KeyError, ValueError, AttributeError) as err:
        what = f"it lacks {err}" if isinstance(err, KeyError) else str(err)
        raise FormatError(f"{where} is not a manifest of format {found}: {what}") from err
    return manifest


def commit_manifest(store: Store, manifest: Manifest) -> bool:
    """Create this version; False when another driver has created that version first."""
    try:
        store.create(manifest.key, manifest.to_json())
    except Conflict:
        return False
    return True


def parse_digested(data: bytes, where: str, remedy: str, known: int = FORMAT) -> dict[str, Any]:
    """The JSON object in `data` without its `digest`, which must be that of the rest.

    Raises:
        FormatError: of an unknown format.
        CorruptObject: not JSON, or not as its digest says.
    """
    value = load_json(data, where, remedy)
    check_format(value, where, known)
    try:
        canonical = canonical_json(value).encode()
    except ValueError as err:
        raise FormatError(f"{where} holds what no JSON of ours does: {err}") from err
    # the bytes too: a changed last digit may read back as the same number
    if canonical != data or value.pop("digest", None) != digest(value):
        raise CorruptObject(f"{where} is damaged: it does not match its digest; {remedy}")
    return cast(dict[str, Any], value)


def check_format(value: Any, where: str, known: int = FORMAT) -> None:
    """Refuse what is not an object of a format from 1 to `known`."""
    found = value.get("format") if isinstance(value, dict) else None
    if type(found) is not int:
        raise FormatError(f"{where} states no format version; it is not an actcache object")
    if not 1 <= found <= known:
        raise FormatError(f"{where} holds format {found}; this reader knows 1-{known}. Upgrade actcache")


def _checked_site(site: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:\-]+", site) or set(site) <= {"."} or site.startswith("__"):
        raise ValueError(f"site name {site!r}")
    return site


def _statistics_json(statistics: Statistics) -> dict[str, Any]:
    return {
        f.name: base64.b64encode(statistic_bytes(f.name, value)).decode()
        if isinstance(value, np.ndarray)
        else value
        for f in fields(statistics)
        for value in [getattr(statistics, f.name)]
    }


def statistic_bytes(name: str, value: np.ndarray) -> bytes:
    """The elements of a statistic that is an array, as they are stored."""
    return value.astype(STATISTIC_ARRAYS[name[-2:]]).tobytes()


def _statistics_from(value: Mapping[str, Any], record_format: int) -> Statistics:
    arrays = {
        k: np.frombuffer(base64.b64decode(v), dtype)
        for k, v in value.items()
        if (dtype := STATISTIC_ARRAYS.get(k[-2:]))
    }
    if record_format == 1:
        if "core_sse_D" in value:
            raise ValueError("core_sse_D in a record of format 1")
        arrays["core_sse_D"] = np.full(len(arrays["mean_D"]), np.nan)
    return Statistics(**{**value, **arrays})
