"""Figures that depend on which rows share a batch, over recorded eval batches of 16 sequences.

SAELens and SAEBench publish them, so they are kept, with what their authors' code computes; a
formula that is wrong is computed only under a name that says so. The batch is part of the definition:
sequences 16 i to 16 i + 15 of the split (`rows.EVAL_BATCH`).

Definitions (b a batch of n_b rows, mean_b over its rows, mean over batches unless said):
    explained_variance_legacy = mean over rows of 1 - ||x - x_hat||^2 / ||x - mean_b(x)||^2
        (SAELens evals.py, SAEBench core; numbers in papers are this one, SAEBench issue 76)
    relative_bias_saebench = mean of mean_b ||x_hat||^2 / mean_b x . x_hat
    mse_saebench = mean over rows of ||x - x_hat||^2 / n_b
    explained_variance_saebench_wrong = 1 - E||e||^2 / (E||x||^2 - (E||x||^2 / d)^2), E the mean of batch
        means: SAEBench 0.6.0 takes squares where the mean row is meant. Predicting the mean does not give 0.

Shapes: N rows, D d_in, K batches.
"""

from typing import Self

import numpy as np

from sae.evals.reconstruction import RowValues


class BatchSums:
    """Sums over whole batches."""

    def __init__(self, d_in: int) -> None:
        self._d_in = d_in
        self._n_rows = self._n_batches = self._n_unequal = 0
        self._legacy = self._bias = self._error = self._square = 0.0

    def add(self, values: RowValues, distance_N: np.ndarray, batch_N: np.ndarray) -> None:
        """Count rows of whole batches.

        Args:
            values: of each row.
            distance_N: ||x - mean_b(x)||^2 of each row.
            batch_N: the batch of each row.
        """
        _, index_N, n_K = np.unique(batch_N, return_inverse=True, return_counts=True)

        def mean_K(value_N: np.ndarray) -> np.ndarray:
            mean: np.ndarray = np.bincount(index_N, weights=value_N, minlength=len(n_K)) / n_K
            return mean

        self._n_rows += len(batch_N)
        self._n_batches += len(n_K)
        # a row that is its batch's mean (a batch of one row) has no distance to share
        unequal_N = distance_N > 0
        self._n_unequal += int(unequal_N.sum())
        self._legacy += float((1 - values.error_N[unequal_N] / distance_N[unequal_N]).sum())
        dot_K = mean_K(values.dot_N)
        recon_K = mean_K(np.square(values.recon_norm_N))
        with np.errstate(divide="ignore", invalid="ignore"):
            self._bias += float((recon_K / dot_K).sum())
        self._error += float(mean_K(values.error_N).sum())
        self._square += float(mean_K(np.square(values.norm_N)).sum())

    def merge(self, other: Self) -> None:
        """Add the batches of `other`."""
        for name in ("_n_rows", "_n_batches", "_n_unequal", "_legacy", "_bias", "_error", "_square"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def metrics(self) -> dict[str, float | None]:
        """The figures defined above; None where they are undefined."""
        n = self._n_batches
        if not n:
            names = ("explained_variance_legacy", "relative_bias_saebench", "mse_saebench")
            return dict.fromkeys((*names, "explained_variance_saebench_wrong"))
        square, error = self._square / n, self._error / n
        wrong = square - (square / self._d_in) ** 2
        bias = self._bias / n
        return {
            "explained_variance_legacy": self._legacy / self._n_unequal if self._n_unequal else None,
            "relative_bias_saebench": bias if np.isfinite(bias) else None,
            "mse_saebench": self._error / self._n_rows,
            "explained_variance_saebench_wrong": 1 - error / wrong if wrong else None,
        }
