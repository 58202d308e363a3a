"""Dashboards as compressed blocks that the page's script unpacks when they are looked at.

Owns the byte layout that `templates/report.js` reads. A block is base64 of a zlib stream: uint32
length of a JSON header (padded with spaces to 8 bytes), the header `{"meta": ..., "arrays": {name:
[type, offset, length]}}`, then the arrays, little endian, each at a multiple of 8 bytes. The
first block has what searching and sorting need, the others the snippets of `GROUP` latents each.

Activations are shown in 8 bits: share = round(255 value / largest of the latent), at least 1
where the latent is active; so a shown value is off by at most 1/510 of the largest. The peak of
a snippet keeps float32. Token ids are places in the page's own vocabulary, most frequent first,
0 for "outside the sequence", as planes of bytes (a third one past 65,535 tokens).
"""

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sae.report.dashboards import Dashboards
from sae.report.texts import TokenTexts
from sae.report.words import LATENT_COLUMNS
from sae.snippets import BEFORE, BINS, WIDTH

GROUP = 64
_ALIGN = 8


def blocks(dashboards: Dashboards, texts: TokenTexts, seed: int) -> list[str]:
    """The blocks of a page, the first one with the index, the others each with GROUP latents."""
    d, s = dashboards, dashboards.snippets
    vocabulary, local = _vocabulary(d)
    largest = np.maximum(s.largest, np.finfo(np.float32).tiny)
    words = {name: np.unique(texts.astype(str), return_inverse=True) for name, texts in d.words.items()}
    meta = {
        "before": BEFORE,
        "width": WIDTH,
        "bins": BINS,
        "group": GROUP,
        "n_rows": s.n_rows,
        "d_sae": d.d_sae,
        "seed": seed,
        "n_nearest": 0 if d.nearest_ids is None else d.nearest_ids.shape[1],
        "n_logits": 0 if d.logits is None else d.logits.top_ids.shape[1],
        "columns": list(d.columns),
        "labels": {n: LATENT_COLUMNS[n][0] for n in (*d.columns, *d.words) if n in LATENT_COLUMNS},
        "words": {name: list(kinds) for name, (kinds, _) in words.items()},
        "tokens": [""] + [texts[int(token)] for token in vocabulary],
    }
    index = {
        "latent": s.latents.astype(np.int32),
        "starts": s.starts.astype(np.uint32),
        "n_top": s.n_top.astype(np.uint8),
        "peak": local(s.token_ids[:, BEFORE]).astype(np.uint32),
        "value": s.value,
        **{f"column {name}": np.asarray(values, np.float32) for name, values in d.columns.items()},
        **{f"word {name}": places.astype(np.uint32) for name, (_, places) in words.items()},
    }
    index["largest"] = s.largest
    out = [pack(index, meta)]
    for first in range(0, len(s.latents), GROUP):
        latents = slice(first, min(first + GROUP, len(s.latents)))
        rows = slice(int(s.starts[latents.start]), int(s.starts[latents.stop]))
        n_rows_of = np.diff(s.starts[latents.start : latents.stop + 1])
        share = s.values[rows] / np.repeat(largest[latents], n_rows_of)[:, None] * 255
        share = np.where(share > 0, np.clip(np.rint(share), 1, 255), 0)
        ids = local(s.token_ids[rows])
        block = {
            "token_low": (ids & 255).astype(np.uint8),
            "token_high": (ids >> 8 & 255).astype(np.uint8),
            "share": share.astype(np.uint8),
            "sequence": s.sequence[rows].astype(np.int32),
            "position": s.position[rows].astype(np.int32),
            "histogram": _heights(s.histogram[latents]),
        }
        if len(vocabulary) >= 1 << 16:
            block["token_top"] = (ids >> 16).astype(np.uint8)
        if d.nearest_ids is not None and d.nearest is not None:
            block["nearest"] = d.nearest_ids[latents].astype(np.int32)
            block["cosine"] = np.rint(d.nearest[latents] * 1e4).astype(np.int16)
        if d.logits is not None:
            both = np.concatenate([d.logits.top[latents], d.logits.bottom[latents]], 1)
            scale = np.maximum(np.abs(both).max(1), np.finfo(np.float32).tiny)
            block["logit"] = np.rint(both / scale[:, None] * 32767).astype(np.int16)
            block["logit_scale"] = scale.astype(np.float32)
            tokens = np.concatenate([d.logits.top_ids[latents], d.logits.bottom_ids[latents]], 1)
            block["logit_histogram"] = _heights(d.logits.histogram[latents])
            block["logit_token"] = local(tokens).astype(np.uint32)
        out.append(pack(block, {}))
    return out


def _heights(counts: np.ndarray) -> np.ndarray:
    """uint8 [L, B]: of the highest bar; at least 1 where there is any."""
    height = counts / np.maximum(counts.max(1, keepdims=True), 1)
    return np.where(height > 0, np.clip(np.rint(height * 255), 1, 255), 0).astype(np.uint8)


def _vocabulary(d: Dashboards) -> tuple[np.ndarray, Any]:
    """Token ids that the page shows, most frequent first, and a function from ids to places from 1."""
    shown = [d.snippets.token_ids.reshape(-1)]
    if d.logits is not None:
        shown += [d.logits.top_ids.reshape(-1), d.logits.bottom_ids.reshape(-1)]
    ids = np.concatenate(shown)
    counts = np.bincount(ids[ids >= 0].astype(np.int64), minlength=1)
    order = np.argsort(-counts, kind="stable")
    vocabulary = order[: int((counts > 0).sum())]
    place = np.zeros(len(counts) + 1, np.int64)  # the last entry is what id -1 finds
    place[vocabulary] = np.arange(1, len(vocabulary) + 1)
    return vocabulary, lambda ids: place[ids]


def pack(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> str:
    """One block."""
    places: dict[str, list[Any]] = {}
    body = bytearray()
    for name, array in arrays.items():
        places[name] = [array.dtype.name, len(body), array.size]
        body += np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()
        body += bytes(-len(body) % _ALIGN)
    header = json.dumps({"meta": meta, "arrays": places}, separators=(",", ":"), ensure_ascii=True).encode()
    header += b" " * (-(len(header) + 4) % _ALIGN)
    data = len(header).to_bytes(4, "little") + header + bytes(body)
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpack(block: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, meta) of a block: what the page's script does, for tests and other readers."""
    data = zlib.decompress(base64.b64decode(block))
    size = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + size])
    arrays = {
        name: np.frombuffer(data, np.dtype(kind).newbyteorder("<"), length, 4 + size + offset)
        for name, (kind, offset, length) in header["arrays"].items()
    }
    return arrays, header["meta"]
