"""Blocks, objects, requests and bytes of a harvest that has not run: arithmetic over docs/format.md.

Counts of objects and requests follow the code that writes them and are exact where the token store is there
and one manifest version is written; bytes are estimated from measured bits per value.
Shapes: S sequences of a split, T = context_size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .codec import Precision
from .corpus import DOCUMENT_ROWS, TokenStore, sequence_rows
from .layout import BY_SEQUENCE, array_layout, sequences_per_shard
from .manifest import SPLITS, Manifest
from .sampling import SplitSize

_MEASURED_BITS: dict[str, dict[float, tuple[float, float]]] = {
    "fvu": {1e-4: (6.7, 7.1), 1e-3: (5.0, 5.34), 3e-3: (4.2, 4.52)},
    "rotated": {1e-4: (6.0, 6.69), 1e-3: (4.34, 4.96), 3e-3: (3.65, 4.17)},
    "bf16": {0.0: (12.5, 16.0)},
    "fp16": {0.0: (14.7, 16.0)},
    "fp32": {0.0: (29.5, 32.0)},
}
"""By kind and noise: lowest and highest bits per value, scales included (docs/design/002-codecs.md and the same on layers 3 and 6
of MiniLM, d 384). Of precisions that lose nothing the upper end is their size before compression."""
_BITS_OF_HALF = 0.5 * math.log2(10)  # a tenth of the noise variance takes this more: 6.02 dB a bit
_READ_SEQUENCES = 2**18
"""Sequences up to which it is read where each one's rows begin; beyond, rows are taken as evenly spread."""
_COMMIT_S, _COMMIT_SHARE, _COMMIT_BLOCKS = 60.0, 0.01, 1000  # as the driver commits versions


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of a split is wanted, and what is missing of it."""

    corpus_rows: int
    """Rows that the corpus gives."""
    blocks: int
    """Wanted, or all that the corpus gives."""
    n_rows: int
    n_sequences: int
    """That hold these rows."""
    missing: dict[str, int]
    """By site: blocks that are not committed."""
    blocks_to_do: int
    """Blocks missing of any site."""
    new_blocks: int
    """Those of them of which nothing is committed."""
    rows_to_do: int
    sequences_to_run: int
    """For the blocks to do; one that lies in two of them counts twice."""
    shards_by_sequence: int
    """Shards of each array by sequence that the blocks to do write, be they there or not."""
    new_shards_by_sequence: int
    """Those of the new blocks."""


@dataclass(frozen=True, kw_only=True)
class SiteSize:
    """What one site takes, over all splits."""

    d_in: int
    n_values: int
    bits_per_value: tuple[float, float]
    """Lowest and highest; equal where they were measured on this dataset."""
    measured: bool
    total_bytes: int
    """Of all that is wanted, at the highest."""
    missing_bytes: int
    """Of what is missing."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What is stored in all, and the requests for it."""

    sites_bytes: int
    metadata_bytes: int
    """Which token each row is, the token sequences, and calibrations."""
    token_store_bytes: int
    """Beside the dataset, shared by all models with the tokenizer; 0 where it is there."""
    total_bytes: int
    """All of these, what is there already included."""
    missing_bytes: int
    new_objects: int
    """In the dataset and the token store."""
    put_requests: int
    versions: int
    """Manifest versions that the harvest writes; from the second on counts are estimates."""
    get_requests_per_pass: int
    """Chunks of all sites of train; a stream fetches up to 63 a site twice."""
    get_requests_with_metadata: int
    """The same with token_id, sequence and position."""
    pass_bytes: int
    """Read by one pass over all sites of train."""


def extents(
    identity: Mapping[str, Any],
    asked: Mapping[str, int],
    sizes: Mapping[str, SplitSize],
    sites: Sequence[str],
    manifest: Manifest | None,
    tokens: TokenStore | None,
) -> dict[str, Extent]:
    """What is wanted and missing of each split."""
    block_rows, per_shard = identity["block_rows"], sequences_per_shard(identity)
    out = {}
    for split in SPLITS:
        size = sizes[split]
        blocks = min(asked[split], -(-size.n_rows // block_rows))
        have = {
            site: manifest.sites[site].n_blocks.get(split, 0) if manifest and site in manifest.sites else 0
            for site in sites
        }
        missing = {site: max(0, blocks - n) for site, n in have.items()}
        first = blocks - max(missing.values())
        ends = np.minimum(np.arange(first, blocks + 1, dtype=np.int64) * block_rows, size.n_rows)
        begin_B, end_B = _sequences(split, ends, size, tokens)
        n_shards_B = -(-end_B // per_shard)
        there = min(blocks, manifest.splits[split]["n_blocks"]) if manifest else 0
        out[split] = Extent(
            corpus_rows=size.n_rows,
            blocks=blocks,
            n_rows=min(blocks * block_rows, size.n_rows),
            n_sequences=int(end_B[-1]),
            missing=missing,
            blocks_to_do=blocks - first,
            new_blocks=blocks - there,
            rows_to_do=int(ends[-1] - ends[0]),
            sequences_to_run=int((end_B[1:] - begin_B[:-1]).sum()),
            shards_by_sequence=int(n_shards_B[-1] - n_shards_B[0]),
            new_shards_by_sequence=int(n_shards_B[-1] - n_shards_B[there - first]),
        )
    return out


def _sequences(
    split: str, rows_B: np.ndarray, size: SplitSize, tokens: TokenStore | None
) -> tuple[np.ndarray, np.ndarray]:
    """For each row number: the sequence that holds it, and how many sequences begin before it."""
    if tokens is not None and size.n_sequences <= _READ_SEQUENCES:
        row_start = tokens.row_start(split)
        return np.searchsorted(row_start, rows_B, "right") - 1, np.searchsorted(row_start, rows_B, "left")
    at_B = rows_B * (size.n_sequences / max(1, size.n_rows))
    return np.floor(at_B).astype(np.int64), np.minimum(np.ceil(at_B), size.n_sequences).astype(np.int64)


def expected_sizes(
    identity: Mapping[str, Any],
    widths: Mapping[str, int],
    sizes: Mapping[str, SplitSize],
    extent: Mapping[str, Extent],
    manifest: Manifest | None,
    *,
    token_store_there: bool,
    wall_s: float,
) -> tuple[dict[str, SiteSize], Stored]:
    """Bytes of each site and of all, objects and requests; `wall_s` decides how many versions are written."""
    precision, chunk_rows = Precision.parse(identity["precision"]), identity["chunk_rows"]
    block_rows = identity["block_rows"]
    sites = {}
    for site, d_in in widths.items():
        rows = sum(e.n_rows for e in extent.values())
        there = sum(min((e.blocks - e.missing[site]) * block_rows, e.n_rows) for e in extent.values())
        bits, measured = _bits(precision, manifest, site)
        sites[site] = SiteSize(
            d_in=d_in,
            n_values=rows * d_in,
            bits_per_value=bits,
            measured=measured,
            total_bytes=math.ceil(rows * d_in * bits[1] / 8),
            missing_bytes=math.ceil((rows - there) * d_in * bits[1] / 8),
        )
    metadata, missing_metadata = _metadata_bytes(identity, widths, extent, manifest)
    token_store = 0 if token_store_there else _token_store_bytes(identity, sizes)
    versions = _versions(sum(e.blocks_to_do for e in extent.values()), wall_s)
    known = manifest.fidelity if manifest else {}
    states_losses = versions > 0 and any("ce_change" not in known.get(site, {}) for site in widths)
    new, put = _objects(identity, widths, extent, manifest, versions)
    new, put = new + states_losses, put + states_losses  # a version that is a manifest and nothing else
    if not token_store_there:
        shards = _token_store_objects(identity, sizes)
        new, put = new + shards, put + shards
    train = extent["train"]
    chunks = -(-train.n_rows // chunk_rows)
    sites_bytes = sum(s.total_bytes for s in sites.values())
    missing = sum(s.missing_bytes for s in sites.values()) + missing_metadata + token_store
    share = train.n_rows / max(1, sum(e.n_rows for e in extent.values()))
    return sites, Stored(
        sites_bytes=sites_bytes,
        metadata_bytes=metadata,
        token_store_bytes=token_store,
        total_bytes=sites_bytes + metadata + token_store,
        missing_bytes=missing,
        new_objects=new,
        put_requests=put,
        versions=versions + states_losses,
        get_requests_per_pass=chunks * len(widths),
        get_requests_with_metadata=chunks * (len(widths) + 3),
        pass_bytes=math.ceil(share * sites_bytes),
    )


def _bits(precision: Precision, manifest: Manifest | None, site: str) -> tuple[tuple[float, float], bool]:
    """Bits per value, lowest and highest, and whether this dataset itself says so."""
    stored = (manifest.fidelity.get(site, {}) if manifest else {}).get("bits_per_value")
    if stored is not None:
        return (stored, stored), True
    known = _MEASURED_BITS[precision.kind]
    if not precision.quantised:
        return known[0.0], False
    noise = sorted(known)
    low, high = (_between(precision.fvu, noise, [known[x][end] for x in noise]) for end in (0, 1))
    return (low, high), False


def _between(fvu: float, noise: Sequence[float], bits: Sequence[float]) -> float:
    """Linear in the logarithm of the noise between measurements; beyond, half a bit for each halving."""
    x = math.log10(fvu)
    at = [math.log10(n) for n in noise]
    if x < at[0]:
        return bits[0] + (at[0] - x) * _BITS_OF_HALF
    if x > at[-1]:
        return max(1.0, bits[-1] - (x - at[-1]) * _BITS_OF_HALF)
    return float(np.interp(x, at, bits))


def _metadata_bytes(
    identity: Mapping[str, Any],
    widths: Mapping[str, int],
    extent: Mapping[str, Extent],
    manifest: Manifest | None,
) -> tuple[int, int]:
    """Bytes of all but codes and scales, and those of them that are missing.

    A permuted column costs about the entropy of its values and 3 to 4 bits (measured: 12.9 for `sequence` of
    515, 11.0 for `position` of 256, 12.2 for `token_id` of 4,096); a token of `input_ids` at most that of the
    vocabulary.
    """
    tokens, precision = identity["tokens"], Precision.parse(identity["precision"])
    of_token = math.log2(tokens["vocab_size"]) + 0.5
    per_block = max(2, identity["block_rows"] / tokens["context_size"])
    by_row = of_token + math.log2(per_block) + 4 + math.log2(tokens["context_size"]) + 3.5
    by_sequence = tokens["context_size"] * of_token
    total = missing = 0.0
    for e in extent.values():
        total += e.n_rows * by_row + e.n_sequences * by_sequence
        new = e.new_blocks / max(1, e.blocks)
        missing += new * (e.n_rows * by_row + e.n_sequences * by_sequence)
    fixed = missing_fixed = 0
    for site, d_in in widths.items():
        size = 12 * d_in + 1000
        if precision.quantised:
            size += (1 + len(SPLITS)) * 4 * d_in
        if precision.kind == "fvu":
            size += (2 + len(SPLITS)) * 4 * d_in
        if precision.rotated:
            size += (1 + len(SPLITS)) * 4 * d_in**2
        fixed += size
        missing_fixed += size if manifest is None or site not in manifest.sites else 0
    return math.ceil(total / 8) + fixed, math.ceil(missing / 8) + missing_fixed


def _token_store_bytes(identity: Mapping[str, Any], sizes: Mapping[str, SplitSize]) -> int:
    """As `_metadata_bytes`: the sequences, and 16 bytes a document."""
    tokens = identity["tokens"]
    bits = tokens["context_size"] * (math.log2(tokens["vocab_size"]) + 0.5)
    return math.ceil(sum(s.n_sequences * bits / 8 + 16 * s.n_documents for s in sizes.values()))


def _token_store_objects(identity: Mapping[str, Any], sizes: Mapping[str, SplitSize]) -> int:
    """Shards and metadata of a token store."""
    by_sequence = sequence_rows(identity["tokens"]["context_size"])[0]
    n = 2  # zarr.json, manifest
    for size in sizes.values():
        sequences, documents = size.n_sequences, size.n_documents
        n += len(BY_SEQUENCE) * -(-sequences // by_sequence) + -(-(sequences + 1) // by_sequence)
        n += 2 * -(-documents // DOCUMENT_ROWS[0]) + -(-(documents + 1) // DOCUMENT_ROWS[0])
        n += 1 + len(BY_SEQUENCE) + 4  # zarr.json of the split and of each array
    return n


def _versions(blocks: int, wall_s: float) -> int:
    """Manifest versions with blocks of a run of `wall_s` over so many: one at its end, and as the driver commits."""
    if not blocks:
        return 0
    steady = _COMMIT_S / _COMMIT_SHARE
    by_time = min(wall_s, steady) / _COMMIT_S
    if wall_s > steady:
        by_time += math.log(wall_s / steady) / math.log1p(_COMMIT_SHARE)
    return 1 + min(max(int(by_time), blocks // _COMMIT_BLOCKS), blocks)


def _objects(
    identity: Mapping[str, Any],
    widths: Mapping[str, int],
    extent: Mapping[str, Extent],
    manifest: Manifest | None,
    versions: int,
) -> tuple[int, int]:
    """New objects in the dataset's prefix, and requests that write them or `zarr.json` again."""
    if not versions:
        return 0, 0
    precision = Precision.parse(identity["precision"])
    by_row = [path for path in array_layout(identity, {}) if path not in BY_SEQUENCE]
    per_site = 1 + precision.quantised  # codes, scale
    derived = 2 * precision.quantised  # offset, and channel or rotation: an array of one shard in each split
    fresh = [site for site in widths if manifest is None or site not in manifest.sites]
    new = put = 0
    grow = 1  # zarr.json of the root, and of arrays that are there and get longer
    for e in extent.values():
        codes = sum(e.missing.values()) * per_site
        new += codes + e.blocks_to_do + e.new_blocks * len(by_row)
        new += e.new_shards_by_sequence * len(BY_SEQUENCE)
        put += codes + e.blocks_to_do * (1 + len(by_row)) + e.shards_by_sequence * len(BY_SEQUENCE)
        grow += (len(by_row) + len(BY_SEQUENCE)) * bool(e.new_blocks)
        grow += per_site * sum(n > 0 for site, n in e.missing.items() if site not in fresh or versions > 1)
    once = len(fresh) * (1 + precision.rotated)  # calibrations
    # derived shards; zarr.json of these, of the site and of its arrays
    once += len(SPLITS) * len(fresh) * (2 * derived + 1 + per_site)
    if manifest is None:
        once += 1 + 1 + len(SPLITS) * (1 + len(by_row) + len(BY_SEQUENCE))  # _identity.json; groups, arrays
    rewritten = grow * (versions - (manifest is None))
    once += 4 * versions  # manifest and three files of a segment
    lease = 1  # and its renewals, six a minute, which are not counted
    probe = 2  # of the store's conditions; four on S3
    return new + once, put + once + rewritten + lease + probe
