"""Where a latent fires: on which positions of a sequence, and in how many sequences.

Owns the sums by (position bucket, latent) and the count of sequences; whole sequences come in one part.

Definitions:
    positional_score = share of the variance of a latent's activation that its position explains:
        eta^2 = sum_p n_p (mean_p - mean)^2 / sum (f - mean)^2 over 64 equal ranges of positions p,
        freed of what chance gives: 1 - (1 - eta^2)(n - 1)/(n - ranges) (Kelley 1935). Positional
        latents score near 1 (the idea: Gurnee et al. 2024, arXiv:2401.12181, sec. 4.2; there by mutual
        information of neurons and position), content latents near 0. NaN for a latent that never varies.
    prompts = sequences in which the latent fires; fires / prompts is SAEBench's
        consistent_activation_heuristic.

Shapes: F d_sae, P position ranges, S sequences of a part, C non-zero codes.
"""

from typing import Self

import numpy as np

from sae.evals.latents import Codes

POSITION_RANGES = 64


class Spread:
    """Mergeable sums over parts of whole sequences."""

    def __init__(self, d_sae: int, context_size: int) -> None:
        self.d_sae, self.context_size = d_sae, context_size
        self.n_ranges = min(POSITION_RANGES, context_size)
        self._rows_P = np.zeros(self.n_ranges, np.int64)
        self._sum_PF = np.zeros((self.n_ranges, d_sae))
        self._square_F = np.zeros(d_sae)
        self.prompts_F = np.zeros(d_sae, np.int64)
        self._fired_SF = np.zeros((0, d_sae), bool)

    def begin(self, n_sequences: int) -> None:
        """A part of `n_sequences` whole sequences comes."""
        self._fired_SF = np.zeros((n_sequences, self.d_sae), bool)

    def update(self, codes: Codes, local_N: np.ndarray, position_N: np.ndarray) -> None:
        """Count a chunk; `local_N` numbers the sequences of the part from 0."""
        range_N = np.minimum(position_N * self.n_ranges // self.context_size, self.n_ranges - 1)
        self._rows_P += np.bincount(range_N, minlength=self.n_ranges)
        value_C = codes.size_C
        np.add.at(self._sum_PF.reshape(-1), range_N[codes.row_C] * self.d_sae + codes.latent_C, value_C)
        self._square_F += np.bincount(codes.latent_C, weights=value_C * value_C, minlength=self.d_sae)
        self._fired_SF[local_N[codes.row_C], codes.latent_C] = True

    def end(self) -> None:
        """The part is whole."""
        self.prompts_F += self._fired_SF.sum(0)
        self._fired_SF = self._fired_SF[:0]

    def merge(self, other: Self) -> None:
        """Add the parts of `other`."""
        self._rows_P += other._rows_P
        self._sum_PF += other._sum_PF
        self._square_F += other._square_F
        self.prompts_F += other.prompts_F

    def positional_score_F(self) -> np.ndarray:
        """Float64 [F]; NaN where a latent does not vary or one range holds all rows."""
        seen_P = self._rows_P > 0
        rows_P = self._rows_P[seen_P].astype(np.float64)
        n, n_ranges = rows_P.sum(), len(rows_P)
        if n <= n_ranges or n_ranges < 2:
            return np.full(self.d_sae, np.nan)
        sum_PF = self._sum_PF[seen_P]
        mean_square_F = np.square(sum_PF.sum(0)) / n
        total_F = self._square_F - mean_square_F
        between_F = (np.square(sum_PF) / rows_P[:, None]).sum(0) - mean_square_F
        varies_F = total_F > 1e-12 * np.maximum(self._square_F, 1e-300)
        eta_F = np.divide(between_F, total_F, out=np.full(self.d_sae, np.nan), where=varies_F)
        score_F: np.ndarray = 1 - (1 - eta_F) * (n - 1) / (n - n_ranges)
        return score_F
