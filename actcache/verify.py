"""Verification: what is stored against what the manifest says.

The listing shows missing and truncated objects; `deep` also reads every object and checks every
checksum. `zarr.json` is regenerated from the manifest and compared.
"""

from typing import Any

from .errors import CorruptObject
from .layout import array_layout, calibration_key, offset_objects, parse_calibration, zarr_metadata
from .progress import Progress
from .reader import Dataset
from .shard import crc32c, decode_shard, shard_key


def verify(dataset: Dataset, *, deep: bool = False, progress: bool = True) -> dict[str, Any]:
    """Check a dataset; returns what was checked, as counts.

    Raises:
        CorruptObject: the first object that is missing, of another size, or (deep) of other bytes.
    """
    manifest, store = dataset.manifest, dataset._shared.store
    layout = array_layout(manifest.identity, {site: e.d_in for site, e in manifest.sites.items()})
    sizes = {listed.key: listed.size_bytes for split in manifest.splits for listed in store.listing(split)}
    tables = [
        (split, path, table)
        for split in manifest.splits
        for path, table in dataset.split(split)._tables.items()
    ]
    total = sum(len(table.size_bytes) for _, _, table in tables)
    checked = stored = chunks = 0
    with Progress("verify", total, "objects", show=progress and deep) as bar:
        for split, path, table in tables:
            array = layout[path.removeprefix(f"{split}/")]
            for shard, size in enumerate(table.size_bytes):
                key = shard_key(path, shard, 1 + len(array["row"]))
                _check_size(f"{store.url}/{key}", sizes.get(key), int(size))
                if deep:
                    data = store.read(key)
                    if crc32c(data) != table.crc32c[shard]:
                        raise CorruptObject(
                            f"{store.url}/{key} does not match its crc32c; restore it or harvest again"
                        )
                    present = int((table.chunk_nbytes[shard] > 0).sum())
                    shape = (array["chunk_rows"], *array["row"])
                    decode_shard(
                        data,
                        present * shape[0],
                        shape,
                        array["shard_rows"],
                        array["dtype"],
                        f"{store.url}/{key}",
                    )
                    chunks += present
                checked, stored = checked + 1, stored + int(size)
                bar.advance()
    raw = {site: store.read(calibration_key(site)) for site in manifest.sites}
    calibrations = {
        site: parse_calibration(data, calibration_key(site), manifest.sites[site].calibration_sha256)
        for site, data in raw.items()
    }
    metadata = zarr_metadata(manifest)
    for key, data in [*metadata.items(), *offset_objects(manifest, calibrations)]:
        if store.read(key) != data:
            raise CorruptObject(
                f"{store.url}/{key} is not what the manifest implies; run the harvest again to rewrite it"
            )
    report = {
        "manifest version": manifest.version,
        "objects of the committed size": checked,
        "bytes": stored,
        "zarr.json and offsets as the manifest implies": len(metadata)
        + len(calibrations) * len(manifest.splits),
        "unreferenced objects": _unreferenced(sizes, tables, layout, metadata),
    }
    if deep:
        report |= {"objects read whole, crc32c right": checked, "chunks decoded, crc32c right": chunks}
    return report


def _unreferenced(sizes: dict[str, int], tables: list[Any], layout: Any, metadata: Any) -> int:
    """Shards that no committed block names: of blocks in flight, or left by a crash."""
    named = {
        shard_key(path, shard, 1 + len(layout[path.removeprefix(f"{split}/")]["row"]))
        for split, path, table in tables
        for shard in range(len(table.size_bytes))
    }
    return sum(1 for key in sizes if key not in named and key not in metadata and "/offset/" not in key)


def _check_size(where: str, found: int | None, wanted: int) -> None:
    if found != wanted:
        what = "is missing" if found is None else f"holds {found} bytes"
        raise CorruptObject(f"{where} {what}, wanted {wanted}; restore it or harvest again")
