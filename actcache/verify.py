"""Verification: what is stored against what the manifest says.

The listing shows missing and truncated objects; `deep` also reads every object and checks every
checksum. `zarr.json` is regenerated from the manifest and compared.
"""

from collections.abc import Mapping
from typing import Any

from .errors import CorruptObject
from .layout import array_layout, derived_arrays, derived_key, read_calibration, zarr_metadata
from .manifest import ShardTable
from .progress import Progress
from .reader import Dataset
from .shard import chunk_checksums, decode_shard, encode_shard, shard_key
from .store import Store


def verify(dataset: Dataset, *, deep: bool = False, progress: bool = True) -> dict[str, Any]:
    """Check a dataset; returns what was checked, as counts.

    Raises:
        CorruptObject: the first object that is missing, of another size, or (deep) of other bytes.
    """
    manifest, store = dataset.manifest, dataset._shared.store
    layout = array_layout(manifest.identity, {site: e.d_in for site, e in manifest.sites.items()})
    sizes = {listed.key: listed.size_bytes for split in manifest.splits for listed in store.listing(split)}
    tables = {
        path: (table, layout[path.removeprefix(f"{split}/")])
        for split in manifest.splits
        for path, table in dataset.split(split)._tables.items()
    }
    total = sum(len(table.size_bytes) for table, _ in tables.values())
    named: set[str] = set()
    stored = chunks = 0
    with Progress("verify", total, "objects", show=progress and deep) as bar:
        for path, (table, array) in tables.items():
            for shard, size in enumerate(table.size_bytes):
                key = shard_key(path, shard, 1 + len(array["row"]))
                _check_size(f"{store.url}/{key}", sizes.get(key), int(size))
                if deep:
                    chunks += _check_shard(store, key, table, shard, array)
                named.add(key)
                stored += int(size)
                bar.advance()
    implied = zarr_metadata(manifest) | _implied_shards(dataset)
    for key, data in implied.items():
        if _read(store, key) != data:
            raise CorruptObject(f"{store.url}/{key} is not what the manifest implies; {_REMEDY}")
    report = {
        "manifest version": manifest.version,
        "objects of the committed size": total,
        "bytes": stored,
        "zarr.json, offsets and rotations as the manifest implies": len(implied),
        "unreferenced objects": len(sizes.keys() - named - implied.keys()),
    }
    if deep:
        report |= {"objects read whole, crc32c right": total, "chunks decoded, crc32c right": chunks}
    return report


_REMEDY = "delete it and run the harvest again to rewrite it"


def _check_shard(store: Store, key: str, table: ShardTable, shard: int, array: Mapping[str, Any]) -> int:
    """Every byte of one shard against its own and the committed checksums; returns its chunks."""
    data, where = _read(store, key), f"{store.url}/{key}"
    present = int((table.chunk_nbytes[shard] > 0).sum())
    shape = (array["chunk_rows"], *array["row"])
    decode_shard(
        data, present * shape[0], shape, array["shard_rows"], array["dtype"], where, array["by_column"]
    )
    chunk_table = list(
        zip(table.chunk_offset[shard].tolist(), table.chunk_nbytes[shard].tolist(), strict=True)
    )
    if chunk_checksums(data, chunk_table) != table.chunk_crc32c[shard].tolist():
        raise CorruptObject(f"{where} is intact but not the shard that was committed; {_REMEDY}")
    return present


def _implied_shards(dataset: Dataset) -> dict[str, bytes]:
    """The offset and rotation shards that the calibrations imply, by key."""
    store, manifest, out = dataset._shared.store, dataset.manifest, {}
    calibrations = {
        site: read_calibration(store, site, e.calibration_sha256) for site, e in manifest.sites.items()
    }
    for path, site, field, array in derived_arrays(manifest):
        values = getattr(calibrations[site], field)
        data, _ = encode_shard(values, array["chunk_rows"], array["shard_rows"], float("nan"))
        out[derived_key(path, array)] = data
    return out


def _read(store: Store, key: str) -> bytes:
    try:
        return store.read(key)
    except FileNotFoundError:
        raise CorruptObject(f"{store.url}/{key} is missing; {_REMEDY}") from None


def _check_size(where: str, found: int | None, wanted: int) -> None:
    if found != wanted:
        what = "is missing" if found is None else f"holds {found} bytes"
        raise CorruptObject(f"{where} {what}, wanted {wanted}; {_REMEDY}")
