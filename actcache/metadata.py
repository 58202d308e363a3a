"""Zarr's metadata of a dataset, kept up to the newest manifest: `zarr.json`, offsets and rotations.

The only objects of a dataset that are ever replaced are written here, each while it still is as it was read.
Specified in docs/format.md, "Commit protocol", steps 8 and 9.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from .commit import create_exact_shard
from .layout import derived_arrays, derived_key, read_calibration, zarr_metadata
from .manifest import Manifest, latest_version, read_manifest
from .store import Store

_THREADS = 16


def write_metadata(store: Store, derived: set[str]) -> None:
    """Bring offsets, channels' multiples, rotations and `zarr.json` to the newest manifest; the root's comes last.

    `derived` has those arrays of the calibrations that are known to be there.

    No shape ever shrinks, however late a driver's write comes: what it replaces was read before it saw
    that its version is the newest, so it is of that version or an older one. Whoever commits a version
    checks afterwards that none came meanwhile, so the last word is that of the newest version.
    """
    while True:
        manifest = read_manifest(store)
        for path, site, field, array in derived_arrays(manifest):
            if path not in derived and not store.exists(derived_key(path, array)):
                values = getattr(read_calibration(store, site), field)
                create_exact_shard(store, path, 0, values, array)
            derived.add(path)  # a rotation of d 4096 is 64 MiB
        wanted = zarr_metadata(manifest)
        # three requests an array: one by one those of 32 sites took 19 s of a minute (docs/scale.md)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="metadata") as pool:
            found = dict(zip(wanted, pool.map(partial(_read_if_there, store), wanted), strict=True))
            if latest_version(store) != manifest.version:
                continue
            inner = [key for key in wanted if key != "zarr.json"]
            swapped = all(pool.map(partial(_replace, store, found, wanted), inner))
        swapped = swapped and _replace(store, found, wanted, "zarr.json")
        if swapped and latest_version(store) == manifest.version:
            return


def _replace(store: Store, found: Mapping[str, bytes | None], wanted: Mapping[str, bytes], key: str) -> bool:
    return found[key] == wanted[key] or store.swap(key, found[key], wanted[key])


def metadata_is_current(store: Store, manifest: Manifest) -> bool:
    """Whether the last write of `write_metadata` for this version happened: one request."""
    return _read_if_there(store, "zarr.json") == zarr_metadata(manifest)["zarr.json"]


def _read_if_there(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except FileNotFoundError:
        return None
