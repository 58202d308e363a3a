"""How well an SAE rebuilds its input, from activations alone.

Owns the mergeable accumulator of everything that needs only `x` and `x_hat`: sums are float64,
so any partition of the rows, merged in any order, gives the same figures (to about 1e-12).
The scatter of the rows around their mean, which no SAE enters, is `row_pass.SiteRows`'. Never touches the
LM or a store.

Definitions (sums and means over the evaluated rows):
    fvu = sum ||x - x_hat||^2 / sum ||x - mu||^2, mu the mean of all evaluated rows
    explained_variance = 1 - fvu
    mse = mean ||x - x_hat||^2 (summed over dimensions, as SAELens)
    cosine = mean cos(x, x_hat), 0 where x_hat is 0; rows with x = 0 are left out
    l2_ratio = mean ||x_hat|| / ||x||; rows with x = 0 are left out
    relative_bias = sum ||x_hat||^2 / sum x . x_hat: the reconstruction is best shrunk by so much; below
        1 the SAE shrinks (Rajamanoharan et al. 2024, arXiv:2404.16014, eq. 10)
    shrinkage = 1 - relative_bias

Shapes: N rows, D d_in.
"""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

_CACHED_VALUES = 2**17  # made float64 at a time: 1 MB, which stays in cache


@dataclass(frozen=True)
class RowValues:
    """What is known of each row: float64 [N]."""

    error_N: np.ndarray
    """||x - x_hat||^2"""
    norm_N: np.ndarray
    """||x||"""
    recon_norm_N: np.ndarray
    """||x_hat||"""
    dot_N: np.ndarray
    """x . x_hat"""

    @property
    def cosine_N(self) -> np.ndarray:
        """0 where either is 0."""
        product_N = self.norm_N * self.recon_norm_N
        return np.divide(self.dot_N, product_N, out=np.zeros_like(product_N), where=product_N > 0)

    @property
    def ratio_N(self) -> np.ndarray:
        """||x_hat|| / ||x||; 0 where x is 0."""
        return np.divide(
            self.recon_norm_N, self.norm_N, out=np.zeros_like(self.norm_N), where=self.norm_N > 0
        )


def row_values(acts_ND: Tensor, recon_ND: Tensor) -> RowValues:
    """Float64 throughout, on the tensors' device; only [N] leaves it."""
    step = max(1, _CACHED_VALUES // max(1, acts_ND.shape[1]))
    found = []
    for acts, recon in zip(acts_ND.split(step), recon_ND.split(step), strict=True):
        x, y = acts.double(), recon.double()
        error = x - y
        values = (torch.linalg.vecdot(error, error), x.norm(dim=1), y.norm(dim=1), torch.linalg.vecdot(x, y))
        found.append(torch.stack(values))
    return RowValues(*torch.cat(found, 1).cpu().numpy())


def join_values(parts: list[RowValues]) -> RowValues:
    """The rows of `parts`, one after the other."""
    return RowValues(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(RowValues)))


class Reconstruction:
    """Sums over rows from which the reconstruction metrics follow."""

    def __init__(self) -> None:
        self.n_rows = 0
        self._error = 0.0  # sum ||x - x_hat||^2
        self._n_nonzero = 0  # rows with ||x|| > 0: the denominator of cosine and l2_ratio
        self._cosine = 0.0
        self._ratio = 0.0
        self._recon_square = 0.0
        self._dot = 0.0

    def update(self, values: RowValues) -> None:
        """Count rows."""
        self.n_rows += len(values.error_N)
        self._error += float(values.error_N.sum())
        self._n_nonzero += int((values.norm_N > 0).sum())
        self._cosine += float(values.cosine_N.sum())
        self._ratio += float(values.ratio_N.sum())
        self._recon_square += float(np.square(values.recon_norm_N).sum())
        self._dot += float(values.dot_N.sum())

    def merge(self, other: Self) -> None:
        """Add the rows that `other` has seen."""
        self.n_rows += other.n_rows
        self._error += other._error
        self._n_nonzero += other._n_nonzero
        self._cosine += other._cosine
        self._ratio += other._ratio
        self._recon_square += other._recon_square
        self._dot += other._dot

    def metrics(self, scatter: float) -> dict[str, float | None]:
        """The figures defined above; None where the rows leave one undefined (all equal, all zero).

        Args:
            scatter: sum ||x - mu||^2 of the rows.
        """
        fvu = self._error / scatter if scatter > 0 else None
        bias = self._recon_square / self._dot if self._dot else None
        return {
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1.0 - fvu,
            "mse": self._error / self.n_rows if self.n_rows else None,
            "cosine": self._cosine / self._n_nonzero if self._n_nonzero else None,
            "l2_ratio": self._ratio / self._n_nonzero if self._n_nonzero else None,
            "relative_bias": bias,
            "shrinkage": None if bias is None else 1.0 - bias,
        }
