"""How a dataset is laid out in its prefix: arrays, calibrations and the Zarr metadata.

`zarr_metadata` is a pure function of a manifest and the calibrations, so it can be regenerated
and compared. Specified in docs/format.md, "Layout".
Shapes: D = d_in.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from .codec import Calibration, Precision
from .errors import CorruptObject
from .manifest import Manifest, check_format
from .shard import array_metadata, group_metadata, shard_key
from .spec import FORMAT, canonical_json

_SEQUENCE_CHUNK = 64
_BF16_NAN = 0x7FC0


def sequences_per_shard(identity: Mapping[str, Any]) -> int:
    """Sequences in one shard of a dataset's `input_ids`: about as many as a block holds."""
    return _SEQUENCE_CHUNK * max(
        1, identity["block_rows"] // (_SEQUENCE_CHUNK * identity["tokens"]["context_size"])
    )


def array_layout(identity: Mapping[str, Any], d_in: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Every array of a split by its path in the split: row shape, dtype, fill value, shard and chunk rows.

    `docs/format.md`, "Arrays", is this table in words. `d_in` names the sites.
    """
    precision = Precision.parse(identity["precision"])
    by_row = {"shard_rows": identity["block_rows"], "chunk_rows": identity["chunk_rows"]}
    by_sequence = {"shard_rows": sequences_per_shard(identity), "chunk_rows": _SEQUENCE_CHUNK}
    token = np.dtype("<u2" if identity["tokens"]["vocab_size"] <= 2**16 else "<u4")
    fill = -128 if precision.quantised else _BF16_NAN if precision.kind == "bf16" else "NaN"
    context_size = identity["tokens"]["context_size"]
    layout: dict[str, dict[str, Any]] = {
        "token_id": {"row": (), "dtype": token, "fill": 0, **by_row},
        "sequence": {"row": (), "dtype": np.dtype("<u4"), "fill": 0, **by_row},
        "position": {"row": (), "dtype": np.dtype("<u4"), "fill": 0, **by_row},
        "input_ids": {"row": (context_size,), "dtype": token, "fill": 0, **by_sequence},
        "length": {"row": (), "dtype": np.dtype("<u4"), "fill": 0, **by_sequence},
    }
    for site, width in d_in.items():
        layout[f"{site}/codes"] = {"row": (width,), "dtype": precision.dtype, "fill": fill, **by_row}
        if precision.quantised:
            layout[f"{site}/scale"] = {"row": (), "dtype": np.dtype("<f4"), "fill": "NaN", **by_row}
    return layout


def zarr_metadata(manifest: Manifest) -> dict[str, bytes]:
    """The `zarr.json` of every group and array, by key; shapes cover the committed prefix only."""
    precision = Precision.parse(manifest.identity["precision"])
    layout = array_layout(manifest.identity, {site: e.d_in for site, e in manifest.sites.items()})
    root = {"format": FORMAT, "id": manifest.id, "identity": manifest.identity}
    out = {"zarr.json": group_metadata({"actcache": root})}
    for split, size in manifest.splits.items():
        out[f"{split}/zarr.json"] = group_metadata({})
        for site, extent in manifest.sites.items():
            attributes = {"site": site, "precision": str(precision), "decode": precision.decode_line}
            out[f"{split}/{site}/zarr.json"] = group_metadata({"actcache": attributes})
            if precision.quantised:
                width = extent.d_in
                out[f"{split}/{site}/offset/zarr.json"] = array_metadata(
                    (width,), width, width, np.dtype("<f4"), "NaN", {}
                )
        for path, array in layout.items():
            rows = _committed(manifest, split, path, size)
            out[f"{split}/{path}/zarr.json"] = array_metadata(
                (rows, *array["row"]),
                array["shard_rows"],
                array["chunk_rows"],
                array["dtype"],
                array["fill"],
                {},
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


def offset_arrays(manifest: Manifest) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, site and layout of each split's copy of each site's offset: one shard of one chunk."""
    if Precision.parse(manifest.identity["precision"]).quantised:
        for split in manifest.splits:
            for site, extent in manifest.sites.items():
                array = {"chunk_rows": extent.d_in, "shard_rows": extent.d_in, "fill": "NaN"}
                yield f"{split}/{site}/offset", site, array


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
    return size["n_sequences"] if path in ("input_ids", "length") else size["n_rows"]


def calibration_key(site: str) -> str:
    """`_calibration/<site>.json`."""
    return f"_calibration/{site}.json"


def calibration_json(calibration: Calibration, site: str) -> bytes:
    """The stored form: canonical JSON, arrays as base64 of little-endian float32."""
    value = {
        "format": FORMAT,
        "site": site,
        "offset": base64.b64encode(calibration.offset_D.astype("<f4").tobytes()).decode(),
        "median": base64.b64encode(calibration.median_D.astype("<f4").tobytes()).decode(),
        **{k: getattr(calibration, k) for k in ("step", "radius2", "n_rows", "n_core", "core_variance")},
    }
    return canonical_json(value).encode()


def parse_calibration(data: bytes, where: str, sha256: str | None = None) -> Calibration:
    """Read a stored calibration, verifying its digest when one is given."""
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptObject(f"{where} does not match its sha256; restore it or harvest again")
    try:
        value = json.loads(data)
        check_format(value, where)
        return Calibration(
            offset_D=np.frombuffer(base64.b64decode(value["offset"]), "<f4"),
            median_D=np.frombuffer(base64.b64decode(value["median"]), "<f4"),
            **{k: value[k] for k in ("step", "radius2", "n_rows", "n_core", "core_variance")},
        )
    except (KeyError, TypeError, ValueError) as err:
        raise CorruptObject(f"{where} is not a calibration ({err}); restore it or harvest again") from err
