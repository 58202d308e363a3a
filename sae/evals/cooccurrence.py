"""Which latents fire together.

Counts pairs on an even sample of the rows, since their number grows with the square of L0; the
sample is a function of the part alone.

Definitions: overlap of latents i and j = rows on which both fire / rows on which either does (Jaccard
    index), over the sampled rows; the partner of a latent is the one with the largest overlap of those
    it fired with at least twice.

Shapes: F d_sae, C non-zero codes, P pairs.
"""

from typing import Self

import numpy as np

from sae.evals.latents import Codes

PART_PAIRS = 2**20  # pairs sampled of a part: 20 ms of sorting
_TABLE_PAIRS = 2**22  # possible pairs up to which counting in a table beats sorting: 2,048 latents
MAX_PARTS = 64  # parts of which pairs are counted, the first ones: bounds the table of pairs


class Cooccurrence:
    """Counts of pairs of latents."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.n_rows = 0
        self._fires_F = np.zeros(d_sae, np.int64)
        self._pair_P = np.zeros(0, np.int64)  # smaller * d_sae + larger, ascending
        self._count_P = np.zeros(0, np.int64)
        self._stride = 0
        self._row = 0
        self._found: list[np.ndarray] = []

    def update(self, codes: Codes, part_rows: int) -> None:
        """Count a chunk of a part of `part_rows` rows; chunks come in order."""
        l0_N = codes.l0_N
        if not self._stride:
            pairs = (l0_N * (l0_N - 1.0)).sum() / 2 * part_rows / max(codes.n_rows, 1)
            self._stride = max(1, int(np.ceil(pairs / PART_PAIRS)))
        sampled_N = (self._row + np.arange(codes.n_rows)) % self._stride == 0
        self._row += codes.n_rows
        self.n_rows += int(sampled_N.sum())
        latent_C = codes.latent_C[np.repeat(sampled_N, l0_N)].astype(np.int64)
        self._fires_F += np.bincount(latent_C, minlength=self.d_sae)
        # codes of a row lie together, latents ascending; each is paired with those after it
        l0_N = l0_N[sampled_N]
        after_C = np.repeat(np.cumsum(l0_N), l0_N) - np.arange(len(latent_C)) - 1
        first_P = np.repeat(np.arange(len(latent_C)), after_C)
        offset_P = np.arange(len(first_P)) - np.repeat(np.cumsum(after_C) - after_C, after_C)
        self._found.append(latent_C[first_P] * self.d_sae + latent_C[first_P + 1 + offset_P])

    def end(self) -> None:
        """The part is whole."""
        pairs = np.concatenate([np.zeros(0, np.int64), *self._found])
        self._found, self._stride, self._row = [], 0, 0
        self._add(*self._tally(pairs))

    def merge(self, other: Self) -> None:
        """Add the parts of `other`."""
        self.n_rows += other.n_rows
        self._fires_F += other._fires_F
        self._add(other._pair_P, other._count_P)

    def _add(self, pair_P: np.ndarray, count_P: np.ndarray) -> None:
        if not len(self._pair_P):
            self._pair_P, self._count_P = pair_P, count_P
            return
        # both ascend: those that are known gain, the others come between
        at_P = np.searchsorted(self._pair_P, pair_P)
        known_P = self._pair_P[np.minimum(at_P, len(self._pair_P) - 1)] == pair_P
        count = self._count_P.copy()
        count[at_P[known_P]] += count_P[known_P]
        at, new_P = at_P[~known_P], np.flatnonzero(~known_P)
        self._pair_P = np.insert(self._pair_P, at, pair_P[new_P])
        self._count_P = np.insert(count, at, count_P[new_P])

    def _tally(self, pair_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Different pairs, ascending, and how often each comes."""
        if self.d_sae**2 <= _TABLE_PAIRS:
            count_T = np.bincount(pair_P)
            found = np.flatnonzero(count_T)
            return found, count_T[found]
        pair_P = np.sort(pair_P)
        starts = np.flatnonzero(np.diff(pair_P, prepend=-1))
        return pair_P[starts], np.diff(np.append(starts, len(pair_P)))

    def partners(self) -> tuple[np.ndarray, np.ndarray]:
        """The partner of each latent int32 [F], -1 for none, and their overlap float64 [F], NaN for none."""
        partner_F = np.full(self.d_sae, -1, np.int32)
        overlap_F = np.full(self.d_sae, np.nan)
        twice_P = self._count_P >= 2
        count_P = self._count_P[twice_P]
        one_P, other_P = np.divmod(self._pair_P[twice_P], self.d_sae)
        either_P = self._fires_F[one_P] + self._fires_F[other_P] - count_P
        overlap_P = count_P / np.maximum(either_P, 1)
        latent = np.concatenate([one_P, other_P])
        with_ = np.concatenate([other_P, one_P])
        overlap = np.concatenate([overlap_P, overlap_P])
        best_F = np.full(self.d_sae, -1.0)
        np.maximum.at(best_F, latent, overlap)
        best = np.flatnonzero(overlap == best_F[latent])
        first_F = np.full(self.d_sae, self.d_sae)  # of equal partners the lowest number
        np.minimum.at(first_F, latent[best], with_[best])
        has_F = best_F >= 0
        partner_F[has_F], overlap_F[has_F] = first_F[has_F], best_F[has_F]
        return partner_F, overlap_F

    def metrics(self) -> dict[str, float | None]:
        """Mean over the latents that fired on a sampled row of their partner's overlap; 0 without one."""
        fired_F = self._fires_F > 0
        _, overlap_F = self.partners()
        mean = float(np.nan_to_num(overlap_F[fired_F]).mean()) if fired_F.any() else None
        return {"partner_overlap": mean}
