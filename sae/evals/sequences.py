"""Batches of token sequences for the LM: those of a split, or several joined into longer ones.

Joining gives contexts beyond the one that was harvested: the tokens of `join` sequences behind each
other, without the BOS and padding in between. Knows no model.

Shapes: B sequences of a batch, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from actcache.errors import SpecError


@dataclass(frozen=True)
class TokenBatch:
    """Sequences for one forward pass, padded on the right."""

    first: int
    """Number of the first sequence in its split."""
    input_ids_BT: np.ndarray
    length_B: np.ndarray
    kept_BT: np.ndarray
    document_BT: np.ndarray
    """Document of each token; of its sequence where the split does not know. -1 where no row is kept."""
    position_ids_BT: np.ndarray | None


def token_batches(
    view: Any, start: int, stop: int, size: int, join: int = 1, bos_token_id: int | None = None
) -> Iterator[TokenBatch]:
    """Sequences [start, stop) of a split, `size` joined ones at a time.

    Raises:
        SpecError: the split keeps documents apart, which joined sequences cannot.
    """
    for first in range(start, stop, size * join):
        index = np.arange(first, min(first + size * join, stop))
        if len(index) % join:
            index = index[: len(index) - len(index) % join]
        if not len(index):
            return
        found = view.sequences(index)
        if found.position_ids is not None and join > 1:
            raise SpecError("packing 'isolated' keeps documents apart; its sequences cannot be joined.")
        ids, length, kept = (np.asarray(a) for a in (found.input_ids, found.length, found.kept))
        document = _documents(view, index, kept)
        arrays = [ids.astype(np.int64), kept.astype(bool), document]
        if join > 1:
            arrays, length = _joined(arrays, length, join, bos_token_id)
        yield TokenBatch(first, arrays[0], length.astype(np.int64), arrays[1], arrays[2], found.position_ids)


def _documents(view: Any, index: np.ndarray, kept_BT: np.ndarray) -> np.ndarray:
    document_BT = np.full(kept_BT.shape, -1, np.int64)
    b_M, position_M = kept_BT.nonzero()
    at = getattr(view, "documents_at", None)
    document_BT[b_M, position_M] = at(index[b_M], position_M).document if at else index[b_M]
    return document_BT


def _joined(
    arrays: list[np.ndarray], length_B: np.ndarray, join: int, bos_token_id: int | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Each array with rows of `join` sequences behind each other, and their lengths."""
    n, width = len(length_B) // join, arrays[0].shape[1] * join
    fills = (0, False, -1)
    out = [np.full((n, width), fill, a.dtype) for a, fill in zip(arrays, fills, strict=True)]
    length = np.zeros(n, np.int64)
    for b, tokens in enumerate(length_B.tolist()):
        row, has_bos = b // join, bos_token_id is not None and arrays[0][b, 0] == bos_token_id
        begin = 1 if b % join and has_bos else 0
        at, size = length[row], tokens - begin
        for mine, theirs in zip(out, arrays, strict=True):
            mine[row, at : at + size] = theirs[b, begin:tokens]
        length[row] += size
    longest = int(length.max())
    return [a[:, :longest] for a in out], length
