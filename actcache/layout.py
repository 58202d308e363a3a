"""How a dataset is laid out in its prefix: arrays, calibrations and the Zarr metadata.

`zarr_metadata` is a pure function of a manifest and the calibrations, so it can be regenerated
and compared. Specified in docs/format.md, "Layout".
Shapes: D = d_in.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from .codec import Calibration, Precision
from .errors import RESTORE, Conflict, CorruptObject
from .manifest import Manifest, parse_digested
from .shard import array_metadata, group_metadata, shard_key
from .spec import FORMAT, canonical_json, digest
from .store import Store
from .untrusted import MAX_CALIBRATION_BYTES, read_whole

BY_SEQUENCE = ("input_ids", "length", "document", "document_offset", "document_begins")
"""Arrays with one row a sequence: copies of the token store's."""

_SEQUENCE_CHUNK = 64
_FILL = {"fvu": -128, "rotated": 65535, "bf16": 0x7FC0, "fp16": "NaN", "fp32": "NaN"}
"""Of `codes`, by kind of precision: what no row is stored as (0x7FC0 are the bits of a NaN)."""


def sequences_per_shard(identity: Mapping[str, Any]) -> int:
    """Sequences in one shard of a dataset's `input_ids`: about as many as a block holds."""
    return _SEQUENCE_CHUNK * max(
        1, identity["block_rows"] // (_SEQUENCE_CHUNK * identity["tokens"]["context_size"])
    )


def array_layout(identity: Mapping[str, Any], d_in: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Every array of a split by its path in the split: row shape, dtype, fill value, shard and chunk rows,
    and whether columns are compressed together.

    `docs/format.md`, "Arrays", is this table in words. `d_in` names the sites.
    """
    precision = Precision.parse(identity["precision"])
    by_row = {"shard_rows": identity["block_rows"], "chunk_rows": identity["chunk_rows"], "by_column": False}
    by_sequence = {
        "shard_rows": sequences_per_shard(identity),
        "chunk_rows": _SEQUENCE_CHUNK,
        "by_column": False,
    }
    token = np.dtype("<u2" if identity["tokens"]["vocab_size"] <= 2**16 else "<u4")
    context_size = identity["tokens"]["context_size"]
    layout: dict[str, dict[str, Any]] = {
        "token_id": {"row": (), "dtype": token, "fill": 0, **by_row},
        "sequence": {"row": (), "dtype": np.dtype("<u4"), "fill": 0, **by_row},
        "position": {"row": (), "dtype": np.dtype("<u4"), "fill": 0, **by_row},
        "input_ids": {"row": (context_size,), "dtype": token, "fill": 0, **by_sequence},
        "length": {"row": (), "dtype": np.dtype("<u4"), "fill": 0, **by_sequence},
        "document": {"row": (), "dtype": np.dtype("<i8"), "fill": 0, **by_sequence},
        "document_offset": {"row": (), "dtype": np.dtype("<u4"), "fill": 0, **by_sequence},
        "document_begins": {"row": (context_size,), "dtype": np.dtype("u1"), "fill": 0, **by_sequence},
    }
    for site, width in d_in.items():
        codes = {"row": (width,), "dtype": precision.dtype, "fill": _FILL[precision.kind], **by_row}
        layout[f"{site}/codes"] = codes | {"by_column": precision.rotated}
        if precision.quantised:
            layout[f"{site}/scale"] = {"row": (), "dtype": np.dtype("<f4"), "fill": "NaN", **by_row}
    return layout


def zarr_metadata(manifest: Manifest) -> dict[str, bytes]:
    """The `zarr.json` of every group and array, by key; shapes cover the committed prefix only."""
    precision = Precision.parse(manifest.identity["precision"])
    layout = array_layout(manifest.identity, {site: e.d_in for site, e in manifest.sites.items()})
    line = precision.decode_line
    if not has_channels(manifest.identity):
        line = line.replace(" * channel", "")
    root = {"format": manifest.identity["format"], "id": manifest.id, "identity": manifest.identity}
    out = {"zarr.json": group_metadata({"actcache": root})}
    for split, size in manifest.splits.items():
        out[f"{split}/zarr.json"] = group_metadata({})
        for site in manifest.sites:
            attributes = {"site": site, "precision": str(precision), "decode": line}
            out[f"{split}/{site}/zarr.json"] = group_metadata({"actcache": attributes})
        for path, array in layout.items():
            rows = _committed(manifest, split, path, size)
            out[f"{split}/{path}/zarr.json"] = array_metadata(
                (rows, *array["row"]),
                array["shard_rows"],
                array["chunk_rows"],
                array["dtype"],
                array["fill"],
                {},
                array["by_column"],
            )
    for path, _, _, array in derived_arrays(manifest):
        width = array["chunk_rows"]
        out[f"{path}/zarr.json"] = array_metadata(
            (width, *array["row"]), width, width, np.dtype("<f4"), "NaN", {}
        )
    # one request opens the whole hierarchy, and no listing meets what is not Zarr
    inside = {key.removesuffix("/zarr.json"): value for key, value in out.items() if key != "zarr.json"}
    out["zarr.json"]["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": inside,
    }
    out["zarr.json"] = out.pop("zarr.json")  # written last, over what it describes
    return {key: canonical_json(value).encode() for key, value in out.items()}


def derived_arrays(manifest: Manifest) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Path, site, Calibration field and layout of what each split repeats of the calibrations, for plain Zarr.

    Each array is one shard of one chunk.
    """
    precision = Precision.parse(manifest.identity["precision"])
    if not precision.quantised:
        return
    for split in manifest.splits:
        for site, extent in manifest.sites.items():
            array = {"chunk_rows": extent.d_in, "shard_rows": extent.d_in, "fill": "NaN", "by_column": False}
            yield f"{split}/{site}/offset", site, "offset_D", {"row": (), **array}
            if has_channels(manifest.identity):
                yield f"{split}/{site}/channel", site, "channel_D", {"row": (), **array}
            if precision.rotated:
                yield f"{split}/{site}/rotation", site, "rotation_DD", {"row": (extent.d_in,), **array}


def has_channels(identity: Mapping[str, Any]) -> bool:
    """Whether channels have multiples of the step: not in format 1."""
    return identity["format"] >= 2 and Precision.parse(identity["precision"]).kind == "fvu"


def derived_key(path: str, array: Mapping[str, Any]) -> str:
    """Key of the one shard of a derived array."""
    return shard_key(path, 0, 1 + len(array["row"]))


def n_shards(manifest: Manifest, split: str) -> dict[str, int]:
    """Committed shards of each array of a split, by its path in the split."""
    layout = array_layout(manifest.identity, {site: e.d_in for site, e in manifest.sites.items()})
    size = manifest.splits[split]
    return {
        path: -(-_committed(manifest, split, path, size) // array["shard_rows"])
        for path, array in layout.items()
    }


def object_sizes(objects: pa.Table, layout: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Key and size of every shard that a segment table names, of the arrays in `array_layout`."""
    sizes = {}
    for row in objects.select(["path", "shard", "size_bytes"]).to_pylist():
        array = layout.get(row["path"].partition("/")[2])
        if array is not None:
            sizes[shard_key(row["path"], row["shard"], 1 + len(array["row"]))] = row["size_bytes"]
    return sizes


def site_rows(manifest: Manifest, split: str, site: str) -> int:
    """Committed rows of a site in a split."""
    blocks = manifest.sites[site].n_blocks.get(split, 0)
    return min(blocks * manifest.identity["block_rows"], manifest.splits[split]["n_rows"])


def _committed(manifest: Manifest, split: str, path: str, size: Mapping[str, int]) -> int:
    """Length of an array's first axis."""
    site, _, _ = path.rpartition("/")
    if site:
        return site_rows(manifest, split, site)
    return size["n_sequences"] if path in BY_SEQUENCE else size["n_rows"]


def calibration_key(site: str) -> str:
    """`_calibration/<site>.json`."""
    return f"_calibration/{site}.json"


def calibration_json(calibration: Calibration, site: str) -> bytes:
    """The stored form: canonical JSON, arrays as base64 of little-endian float32; the rotation by its sha256."""
    rotation = rotation_bytes(calibration)
    value = {
        "format": FORMAT,
        "site": site,
        "offset": _base64(calibration.offset_D),
        "median": _base64(calibration.median_D),
        "channel": None if calibration.channel_D is None else _base64(calibration.channel_D),
        "rotation_sha256": None if rotation is None else hashlib.sha256(rotation).hexdigest(),
        **{k: getattr(calibration, k) for k in ("step", "radius2", "n_rows", "n_core", "core_variance")},
    }
    value["digest"] = digest(value)
    return canonical_json(value).encode()


def _base64(vector_D: np.ndarray) -> str:
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()


def _vector(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def rotation_bytes(calibration: Calibration) -> bytes | None:
    """The stored form of the rotation: float32 little-endian, row by row."""
    return None if calibration.rotation_DD is None else calibration.rotation_DD.astype("<f4").tobytes()


def rotation_key(site: str, sha256: str) -> str:
    """`_calibration/<site>-<first 16 digits of the sha256 of its bytes>.rotation`."""
    return f"_calibration/{site}-{sha256[:16]}.rotation"


def create_calibration(store: Store, calibration: Calibration, site: str) -> None:
    """Store a site's calibration, first the rotation that it names.

    Raises:
        Conflict: another calibration of the site is there; it stays and holds for all.
        CorruptObject: the rotation's object, whose key follows from its bytes, holds other bytes.
    """
    rotation = rotation_bytes(calibration)
    if rotation is not None:
        key = rotation_key(site, hashlib.sha256(rotation).hexdigest())
        try:
            store.create(key, rotation)
        except Conflict:
            raise CorruptObject(f"{store.url}/{key} is damaged; delete it and harvest again") from None
    store.create(calibration_key(site), calibration_json(calibration, site))


def read_calibration(store: Store, site: str, sha256: str | None = None) -> Calibration:
    """A site's stored calibration with its rotation, all digests verified; `sha256` is the manifest's.

    Raises:
        CorruptObject: it or its rotation is damaged, not the committed one, or missing.
    """
    key = calibration_key(site)
    calibration, rotation_sha256 = parse_calibration(_read(store, key), f"{store.url}/{key}", sha256)
    if rotation_sha256 is None:
        return calibration
    key, d_in = rotation_key(site, rotation_sha256), len(calibration.offset_D)
    rotation = _read(store, key)
    if len(rotation) != 4 * d_in**2 or hashlib.sha256(rotation).hexdigest() != rotation_sha256:
        raise CorruptObject(f"{store.url}/{key} does not match its sha256; {RESTORE}")
    return replace(calibration, rotation_DD=np.frombuffer(rotation, "<f4").reshape(d_in, d_in))


def calibration_keys(store: Store, site: str) -> list[str]:
    """Keys of a site's calibration and of the rotation that it names, if any."""
    key = calibration_key(site)
    _, rotation_sha256 = parse_calibration(_read(store, key), f"{store.url}/{key}")
    return [key, rotation_key(site, rotation_sha256)] if rotation_sha256 else [key]


def parse_calibration(data: bytes, where: str, sha256: str | None = None) -> tuple[Calibration, str | None]:
    """A stored calibration without its rotation, and the rotation's sha256; digests verified.

    Raises:
        CorruptObject: the bytes are damaged or not the committed ones.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptObject(f"{where} does not match its sha256; {RESTORE}")
    try:
        value = parse_digested(data, where, RESTORE)
        channel = value["channel"] if value["format"] > 1 else None
        calibration = Calibration(
            offset_D=_vector(value["offset"]),
            median_D=_vector(value["median"]),
            channel_D=None if channel is None else _vector(channel),
            **{k: value[k] for k in ("step", "radius2", "n_rows", "n_core", "core_variance")},
        )
        _check_channels(calibration)
        rotation_sha256 = value["rotation_sha256"]
        if rotation_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", rotation_sha256):
            raise ValueError(f"rotation_sha256 {rotation_sha256!r}")
        return calibration, rotation_sha256
    except (KeyError, TypeError, ValueError) as err:
        raise CorruptObject(f"{where} is not a calibration ({err}); {RESTORE}") from err


def _check_channels(calibration: Calibration) -> None:
    channel_D = calibration.channel_D
    if channel_D is None:
        return
    if len(channel_D) != len(calibration.offset_D):
        raise ValueError(f"{len(channel_D)} multiples of {len(calibration.offset_D)} channels")
    with np.errstate(all="ignore"):
        if not ((channel_D >= 1) & (np.frexp(channel_D)[0] == 0.5)).all():
            raise ValueError("a channel's multiple that is no power of two")


def _read(store: Store, key: str) -> bytes:
    try:
        return read_whole(store, key, MAX_CALIBRATION_BYTES)
    except FileNotFoundError:
        raise CorruptObject(f"{store.url}/{key} is missing although it was committed; {RESTORE}") from None
