"""Which rows calibrate a site, and how many sites at a time: within a stated memory, whatever the context.

The rows are drawn over many sequences, since those of one are alike. Specified in docs/format.md,
"Calibration". `actcache.codec.calibrate` makes a calibration of them.
Shapes: S sequences, T tokens, N rows, D = d_in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .order import permutation

ROWS = 65_536
_SEQUENCES = 256
_TOKENS = 2**21
"""Long sequences are fewer: 256 of 131,072 tokens would be as many forward passes as some datasets take."""
_LEAST_SEQUENCES = 16


def sequences_wanted(context_size: int) -> int:
    """Sequences that a calibration looks at, at least: 256, fewer of very long ones."""
    return min(_SEQUENCES, max(_LEAST_SEQUENCES, _TOKENS // context_size))


def n_sequences(row_start: np.ndarray, context_size: int) -> int:
    """The first sequences of a split that a calibration looks at; `row_start` is the token store's."""
    enough = int(np.searchsorted(row_start, ROWS, side="left"))
    return min(max(sequences_wanted(context_size), enough), len(row_start) - 1)


def draw(kept_ST: np.ndarray, seed: int) -> np.ndarray:
    """bool [S, T]: which of the kept tokens calibrate, `ROWS` of them or all there are."""
    kept = np.flatnonzero(kept_ST)
    chosen = kept[permutation(len(kept), "calibration", seed)[:ROWS]]
    drawn_ST = np.zeros_like(kept_ST)
    drawn_ST.reshape(-1)[chosen] = True
    return drawn_ST


def site_groups(widths: Mapping[str, int], n_rows: int, budget_bytes: int) -> list[list[str]]:
    """Sites whose float32 rows fit into `budget_bytes` together, in order; at least one a group."""
    groups: list[list[str]] = []
    left = 0
    for site, d_in in widths.items():
        size = row_bytes(n_rows, d_in)
        if not groups or size > left:
            groups.append([])
            left = budget_bytes
        groups[-1].append(site)
        left -= size
    return groups


def row_bytes(n_rows: int, d_in: int) -> int:
    """Size in bytes of a site's rows as float32."""
    return 4 * n_rows * d_in


class Gathered:
    """The drawn rows of some sites, taken out of LM batches as they come: float32, in the order of tokens."""

    def __init__(self, sites: Sequence[str], widths: Mapping[str, int], drawn_ST: np.ndarray) -> None:
        self._drawn_ST = drawn_ST
        n_rows = int(drawn_ST.sum())
        self._rows = {site: np.empty((n_rows, widths[site]), np.float32) for site in sites}
        self._filled = 0

    def add(self, start: int, acts: Mapping[str, Any]) -> None:
        """Take in the batch whose first sequence is `start`: [B, T, D] of each site, numpy or torch."""
        batch = next(iter(acts.values()))
        row_N = np.flatnonzero(self._drawn_ST[start : start + len(batch)])
        place = slice(self._filled, self._filled + len(row_N))
        for site, acts_BTD in acts.items():
            self._rows[site][place] = _rows_of(acts_BTD, row_N)
        self._filled = place.stop

    def pop(self, site: str) -> np.ndarray:
        """A site's rows; they are not kept."""
        assert self._filled == len(self._rows[site]), "all batches have come"
        return self._rows.pop(site)


def _rows_of(acts_BTD: Any, row_N: np.ndarray) -> np.ndarray:
    """Rows of a batch by their number in it; of a tensor, only these leave the device."""
    if isinstance(acts_BTD, np.ndarray):
        return acts_BTD.reshape(-1, acts_BTD.shape[-1])[row_N]
    import torch

    chosen = torch.from_numpy(row_N).to(acts_BTD.device)
    rows: np.ndarray = acts_BTD.flatten(0, 1).index_select(0, chosen).cpu().float().numpy()
    return rows
