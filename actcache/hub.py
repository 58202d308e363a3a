"""Whole datasets copied to another place, such as a Hugging Face dataset repository, with a card.

What is copied is one manifest version: the objects that it names, then the manifest, so that nobody sees a part of it. A
copy reads like the original; it holds no harvest in progress. It goes to an empty place, or on top of an older
version of the same dataset: two harvests of one Spec may differ in rounding, and shards of both together would be neither.
Any fsspec URL will do: `hf://datasets/USER/NAME`, `s3://...`, a directory. `actcache.target` writes.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from typing import Any

import numpy as np

from .card import dataset_card
from .errors import Conflict, CorruptObject
from .layout import calibration_key, calibration_keys, derived_arrays, derived_key
from .reader import Dataset, open_dataset
from .shard import shard_key
from .spec import digest
from .store import Store
from .tables import ShardTable
from .target import CARD, Target, target_at

log = logging.getLogger(__name__)


def push(
    dataset: Dataset, url: str, *, storage_options: Mapping[str, Any] | None = None, card: bool = True
) -> Dataset:
    """Copy the pinned version of a dataset, all its splits, to `url`, and open it there.

    `url` must hold nothing, a part of this copy (a push that was cut off goes on) or an older version of the same
    harvest, which stays readable. Nothing that is there is overwritten. With `card`, a `README.md` that Hugging Face
    shows is written from the manifest, unless somebody else's is there. The repository of a `hf://` URL must exist; it
    gets a commit for every 256 MB.

    Raises:
        Conflict: something else is there: another dataset, another harvest of the same Spec, a newer version.
        CorruptObject: an object of the source is missing or has another size than committed.
        StoreError: the target refused.
    """
    shared, manifest = dataset._shared, dataset.manifest
    target = target_at(url, storage_options)
    there = target.sizes()
    older = _older_version(dataset, target, there, storage_options)
    known = _known(dataset, older, target, there)

    def missing(objects: Iterator[tuple[str, int | None]]) -> Iterator[tuple[str, Callable[[], bytes]]]:
        for key, size_bytes in objects:
            if key in known and there[key] == size_bytes:
                continue
            if key not in there:
                yield key, partial(_read, shared.store, key, size_bytes)
            elif target.read(key) != _read(shared.store, key, size_bytes):
                raise target.conflict(key)

    target.create(missing(_heads(dataset)))
    target.create(missing(_shards(dataset)))
    target.publish(manifest, _read(shared.store, manifest.key), _card(dataset, older, target, there, card))
    return open_dataset(url, version=manifest.version, storage_options=storage_options)


def pull(url: str, directory: str, *, storage_options: Mapping[str, Any] | None = None) -> Dataset:
    """Copy the newest version of the dataset at `url` to a local directory, and open it there.

    Raises:
        Conflict: the directory holds something else than a part or an older version of it; see `push`.
    """
    return push(open_dataset(url, storage_options=storage_options), directory, card=False)


def _read(store: Store, key: str, size_bytes: int | None = None) -> bytes:
    try:
        data = store.read(key)
    except FileNotFoundError:
        raise CorruptObject(f"{store.url}/{key} is missing although it was committed") from None
    if size_bytes is not None and len(data) != size_bytes:
        raise CorruptObject(f"{store.url}/{key} has {len(data)} bytes, wanted {size_bytes}")
    return data


# What may be there


def _older_version(
    dataset: Dataset, target: Target, there: Mapping[str, int], options: Mapping[str, Any] | None
) -> Dataset | None:
    """The version that the target holds, none if it holds none yet.

    Raises:
        Conflict: `dataset` is not a continuation of what is there.
    """
    manifest, store = dataset.manifest, dataset._shared.store
    if "_identity.json" in there and target.read("_identity.json") != _read(store, "_identity.json"):
        raise Conflict(f"{target.url} holds another dataset; choose an empty place")
    versions = [int(m[1]) for key in there if (m := re.fullmatch(r"_manifest/(\d{8})\.json", key))]
    records = {key for key in there if key.startswith("_records/")}
    if not versions:
        foreign = records | {key for key in there if key.endswith("zarr.json")}
        if foreign:
            raise Conflict(
                f"{target.url} holds no version of a dataset, but {min(foreign)}: a harvest in progress, or what is left "
                "of other data. It is left as it is; choose an empty place"
            )
        return None
    newest = max(versions)
    if newest > manifest.version:
        raise Conflict(
            f"{target.url} holds version {newest}, newer than version {manifest.version} of {store.url}. Nothing was "
            "written; choose an empty place"
        )
    older = open_dataset(target.url, version=newest, storage_options=options)
    if newest == manifest.version and target.read(manifest.key) != _read(store, manifest.key):
        raise target.conflict(manifest.key)
    if differs := _differs(older, dataset):
        raise target.conflict(differs)
    if loose := records - {record.key for record in older._shared.records}:
        raise Conflict(
            f"{target.url} holds blocks of a harvest that goes on there ({min(loose)}). Finish that harvest, or choose an "
            "empty place"
        )
    return older


def _differs(older: Dataset, newer: Dataset) -> str:
    """The first thing that `older` names and `newer` does not name with the same bytes; "" if there is none."""
    for site, extent in older.manifest.sites.items():
        ours = newer.manifest.sites.get(site)
        if ours is None or ours.calibration_sha256 != extent.calibration_sha256:
            return calibration_key(site)
    for split in older.manifest.splits:
        tables = newer._shared.tables(split)
        for path, table in older._shared.tables(split).items():
            if path not in tables:
                return path
            shard = _first_difference(table, tables[path])
            if shard is not None:
                return shard_key(path, shard, _ndim(older, path))
    return ""


def _first_difference(older: ShardTable, newer: ShardTable) -> int | None:
    """The first shard that has other bytes, or that `newer` does not have."""
    n = min(len(older.size_bytes), len(newer.size_bytes))
    same_N = older.size_bytes[:n] == newer.size_bytes[:n]
    for name in ("chunk_offset", "chunk_nbytes", "chunk_crc32c"):
        same_N &= (getattr(older, name)[:n] == getattr(newer, name)[:n]).all(axis=1)
    same_N &= (older.constant[:n] == newer.constant[:n]) | np.isnan(older.constant[:n]) & np.isnan(
        newer.constant[:n]
    )
    different = np.flatnonzero(~same_N)
    if len(different):
        return int(different[0])
    return n if n < len(older.size_bytes) else None


def _known(dataset: Dataset, older: Dataset | None, target: Target, there: Mapping[str, int]) -> Set[str]:
    """Keys of shards that are there with the source's bytes, known without reading them.

    An older version vouches for those that it names. So do the segments of this one, which a push stores before any
    shard, if they are all there, no other push's are and no harvest has run there.
    """
    if older is not None and older.manifest.version == dataset.manifest.version:
        return there.keys()
    ours, others = (
        {file.key for segment in (d.manifest.segments if d else ()) for file in segment.files}
        for d in (dataset, older)
    )
    if ours <= there.keys() and not target.harvested(digest(dataset.manifest.identity["tokens"])):
        # listed anew: another push may have begun, and its segments come before its shards
        segments = {key for key in target.sizes() if key.startswith("_segments/")}
        if segments - ours <= others:
            return there.keys()
    return {key for key, _ in _shards(older)} & there.keys() if older else frozenset()


def _card(
    dataset: Dataset, older: Dataset | None, target: Target, there: Mapping[str, int], asked: bool
) -> bytes | None:
    """The card to write; None if there is to be none, or somebody wrote one."""
    if not asked:
        return None
    card = dataset_card(dataset).encode()
    if CARD in there and target.read(CARD) not in (card, dataset_card(older).encode() if older else card):
        log.warning("%s/%s was not written by a push; it is left as it is", target.url, CARD)
        return None
    return card


# What is copied


def _ndim(dataset: Dataset, path: str) -> int:
    return 1 + len(dataset._shared.layout[path.partition("/")[2]]["row"])


def _heads(dataset: Dataset) -> Iterator[tuple[str, int | None]]:
    """Keys of what says what the shards are: identity, calibrations, segments; no size is recorded of them."""
    yield "_identity.json", None
    for site in dataset.manifest.sites:
        for key in calibration_keys(dataset._shared.store, site):
            yield key, None
    for segment in dataset.manifest.segments:
        for file in segment.files:
            yield file.key, None


def _shards(dataset: Dataset) -> Iterator[tuple[str, int | None]]:
    """Key and committed size of every shard of a version; size None where none is recorded."""
    for split in dataset.manifest.splits:
        for path, table in dataset._shared.tables(split).items():
            for shard, size_bytes in enumerate(table.size_bytes.tolist()):
                yield shard_key(path, shard, _ndim(dataset, path)), size_bytes
    for path, _, _, array in derived_arrays(dataset.manifest):
        yield derived_key(path, array), None
