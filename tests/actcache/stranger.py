"""A reader written from docs/format.md alone: what a stranger would write. Nothing of actcache is imported.

Section names of the page stand in the docstrings. Shapes: N rows, D = d_in, S sequences, T = context_size.
"""

import hashlib
import json
import math
import re
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from numcodecs import zstd

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "format.md").read_text()
SPLITS = ("train", "validation", "test")
# Permutations, the table of keys: `rows/<seed>/<split>/<block>` becomes KEYS["rows"].format(seed=0, ...)
KEYS = {
    key.split("/")[0]: re.sub(r"<(\w+)>", r"{\1}", key)
    for key in re.findall(r"^\| `(\w+/<seed>.*?)` \|", PAGE, re.M)
}


def section(title, page=PAGE):
    """The text of one section of the page."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert found, f"the page has no section {title!r}"
    return found[1]


def canonical(value):
    """Identity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value):
    """Identity."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def outputs(n, start):
    """Permutations, step 2, in Python's own integers."""
    mask, out = 2**64 - 1, []
    for k in range(n):
        z = (start + (k + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def permutation(n, key):
    """Permutations."""
    out = outputs(n, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    return np.array(sorted(range(n), key=out.__getitem__), np.int64)


def newest_manifest(directory):
    """Manifest, or that of a token store."""
    manifest = json.loads(max((directory / "_manifest").iterdir()).read_text())
    stated = manifest.pop("digest")
    assert manifest["format"] == (3 if "segments" in manifest else 2)
    assert stated == digest(manifest)
    assert manifest["id"] == digest(manifest["identity"])
    return manifest


# Precision: the recorded line, typed by hand (nothing that is stored is executed)
DECODE = {
    "codes * scale[:, None] * channel + offset": (
        lambda codes, scale, channel, offset, _: codes * scale[:, None] * channel + offset
    ),
    "(((codes >> 1).astype('<i2') ^ -(codes & 1).astype('<i2')) * scale[:, None]) @ rotation + offset": (
        lambda codes, scale, _, offset, rotation: (
            (((codes >> 1).astype("<i2") ^ -(codes & 1).astype("<i2")) * scale[:, None]) @ rotation + offset
        )
    ),
    "(codes.astype('<u4') << 16).view('<f4')": lambda codes, *_: (codes.astype("<u4") << 16).view("<f4"),
    "codes.astype('<f4')": lambda codes, *_: codes.astype("<f4"),
    "codes": lambda codes, *_: codes,
}


def read_all(directory, split, site):
    """Every row of a site, by plain zarr and the recorded line."""
    group = zarr.open_group(str(directory), mode="r")[f"{split}/{site}"]
    rest = [group[name][:] if name in group else None for name in ("scale", "channel", "offset", "rotation")]
    return DECODE[group.attrs["actcache"]["decode"]](group["codes"][:], *rest)


def token_rows(directory, split):
    """Blocks: token_id, sequence and position of every row, from the tokens and the identity alone."""
    manifest = newest_manifest(directory)
    identity, size = manifest["identity"], manifest["splits"][split]
    group = zarr.open_group(str(directory), mode="r")[split]
    input_ids_ST, length_S = group["input_ids"][:], group["length"][:]
    assert len(input_ids_ST) == size["n_sequences"]
    special = identity["tokens"]["special_token_ids"]
    kept = [
        (int(input_ids_ST[s, t]), s, t)
        for s in range(len(input_ids_ST))
        for t in range(length_S[s])
        if input_ids_ST[s, t] not in special
    ]
    kept_N3 = np.array(kept, np.int64).reshape(-1, 3)
    block_rows, parts = identity["block_rows"], []
    for block in range(size["n_blocks"]):
        begin = block * block_rows
        n = min(block_rows, size["n_rows"] - begin)
        parts.append(
            kept_N3[
                begin + permutation(n, KEYS["rows"].format(seed=identity["seed"], split=split, block=block))
            ]
        )
    return np.concatenate(parts).T


def reading_order(n_rows, chunk_rows, seed, epoch, lanes, window):
    """Reading order: the stored row of every global row."""
    chunks = [range(i, min(i + chunk_rows, n_rows)) for i in range(0, n_rows, chunk_rows)]
    placed = [chunks[i] for i in permutation(len(chunks), KEYS["chunks"].format(seed=seed, epoch=epoch))]
    chunk_of = np.repeat(range(len(placed)), [len(c) for c in placed])
    row_of = np.concatenate(placed)
    order, begin = np.full(n_rows, -1), 0
    for lane in range(lanes):
        end = begin + max(0, math.ceil((n_rows - lane) / lanes))
        assert begin == lane * (n_rows // lanes) + min(lane, n_rows % lanes)
        # pieces: runs of one chunk; windows: runs of `window` pieces
        piece = chunk_of[begin:end] - chunk_of[begin] if begin < end else np.zeros(0, int)
        served = []
        for w in range(math.ceil((piece.max(initial=-1) + 1) / window)):
            rows = row_of[begin:end][piece // window == w]
            key = KEYS["window"].format(seed=seed, epoch=epoch, lane=lane, window=w)
            served.append(rows[permutation(len(rows), key)])
        if served:
            order[lane::lanes] = np.concatenate(served)
        begin = end
    return order


def default_window(batch_size, lanes, identity):
    """Reading order, the defaults."""
    sequence_rows = batch_size * identity["tokens"]["context_size"]
    return max(2, math.ceil(4 * sequence_rows / (lanes * identity["block_rows"])))


def read_chunk(directory, path, shard, ndim, entry, inner, shape, dtype):
    """Shards: one chunk by its place in a segment's row, without zarr."""
    key = directory / path / "c" / str(shard) / "/".join("0" * (ndim - 1))
    with open(key, "rb") as file:
        file.seek(entry["chunk_offset"][inner])
        payload = file.read(entry["chunk_nbytes"][inner])
    frame, checksum = payload[:-4], struct.unpack("<I", payload[-4:])[0]
    assert google_crc32c.value(frame) == checksum
    return np.frombuffer(zstd.decompress(frame), dtype).reshape(shape)
