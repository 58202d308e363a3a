"""The rows of a split in parts, each in the order of its sequences.

Rows are stored shuffled inside blocks. An evaluation wants whole batches of sequences, since some
published figures depend on them, and it wants parts that do not depend on who works on them: a part
is a run of batches of `EVAL_BATCH` sequences (16 i to 16 i + 15) that begin in one block, so its
rows, their order and every sum over them are the same with 1 worker or 8. Knows no SAE and no LM.

Shapes: N rows, D d_in.
"""

from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

EVAL_BATCH = 16
"""Sequences of an eval batch: the composition that batch-dependent figures refer to."""

_PART_BYTES = 2**27  # float32 rows of a part, all sites: 32,768 rows at 1,024 dimensions
_PART_ROWS = 2**15


@dataclass(frozen=True)
class Part:
    """Rows ordered by (sequence, position): their places in the split, and which tokens they are."""

    row_N: np.ndarray
    sequence_N: np.ndarray
    position_N: np.ndarray

    @property
    def batch_N(self) -> np.ndarray:
        """The eval batch of each row, ascending."""
        return self.sequence_N // EVAL_BATCH


class RowParts:
    """The first `n_rows` rows of a split, cut into parts. `part(i)` reads token metadata only; any thread may call it.

    Args:
        view: a split.
        n_rows: rows evaluated.
        block_rows: rows that the dataset shuffles among themselves.
        width: numbers in a row over all sites that are read together.
    """

    def __init__(self, view: Any, n_rows: int, block_rows: int, width: int) -> None:
        self._view, self._n_rows = view, n_rows
        self._block_rows = max(1, min(block_rows, n_rows))
        part_rows = min(_PART_ROWS, max(2**12, _PART_BYTES // (4 * width)))
        self._per_block = max(1, self._block_rows // part_rows)
        self._n_blocks = -(-n_rows // self._block_rows)
        self._blocks: dict[int, Part] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return self._n_blocks * self._per_block

    def part(self, number: int) -> Part:
        """May be empty: a short last block can lie in the last batch of the block before."""
        block, quarter = divmod(number, self._per_block)
        whole = self._batches_of(block)
        first_N = np.searchsorted(whole.batch_N, whole.batch_N, side="left")  # where each row's batch begins
        of_N = first_N * self._per_block // max(len(first_N), 1)
        return _take(whole, of_N == quarter)

    def _batches_of(self, block: int) -> Part:
        """Rows of the batches that begin in a block: without those of the block before, with the next one's."""
        own = self._sorted(block)
        if block:
            own = _take(own, own.batch_N > self._sorted(block - 1).batch_N[-1])
        if len(own.row_N) and block + 1 < self._n_blocks:
            after = self._sorted(block + 1)
            own = _join(own, _take(after, after.batch_N == own.batch_N[-1]))
        return own

    def _sorted(self, block: int) -> Part:
        with self._lock:
            if block not in self._blocks:
                start = block * self._block_rows
                row_N = np.arange(start, min(start + self._block_rows, self._n_rows))
                rows = self._view.rows(slice(int(row_N[0]), int(row_N[-1]) + 1))
                sequence_N, position_N = (
                    np.asarray(rows.sequence, np.int64),
                    np.asarray(rows.position, np.int64),
                )
                order = np.lexsort((position_N, sequence_N))
                while len(self._blocks) >= 3:  # a block and its neighbours
                    del self._blocks[next(iter(self._blocks))]
                self._blocks[block] = Part(row_N[order], sequence_N[order], position_N[order])
            return self._blocks[block]


def _take(part: Part, mask_N: np.ndarray) -> Part:
    return Part(part.row_N[mask_N], part.sequence_N[mask_N], part.position_N[mask_N])


def _join(first: Part, second: Part) -> Part:
    return Part(
        np.concatenate([first.row_N, second.row_N]),
        np.concatenate([first.sequence_N, second.sequence_N]),
        np.concatenate([first.position_N, second.position_N]),
    )
