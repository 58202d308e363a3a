"""How well an SAE rebuilds its input, from activations alone.

Owns the mergeable accumulator of everything that needs only `x` and `x_hat`: sums are float64,
so any partition of the rows, merged in any order, gives the same figures (to about 1e-12).
Never touches the LM or a store.

Definitions (evaluation version 1; sums and means over the evaluated rows):
    fvu = sum ||x - x_hat||^2 / sum ||x - mu||^2, mu the mean of all evaluated rows
    explained_variance = 1 - fvu
    mse = mean ||x - x_hat||^2 (summed over dimensions, as SAELens)
    cosine = mean cos(x, x_hat), 0 where x_hat is 0; rows with x = 0 are left out
    l2_ratio = mean ||x_hat|| / ||x||; rows with x = 0 are left out

Shapes: N rows, D d_in.
"""

from typing import Self

import numpy as np
from torch import Tensor


class Reconstruction:
    """Sums over rows from which the reconstruction metrics follow."""

    def __init__(self, d_in: int) -> None:
        self.n_rows = 0
        self._mean_D = np.zeros(d_in)
        self._scatter = 0.0  # sum ||x - mean||^2 around the running mean
        self._error = 0.0  # sum ||x - x_hat||^2
        self._n_nonzero = 0  # rows with ||x|| > 0: the denominator of cosine and l2_ratio
        self._cosine = 0.0
        self._ratio = 0.0

    def update(self, acts_ND: Tensor, recon_ND: Tensor) -> None:
        """Count the rows of one chunk; the tensors stay on their device, only sums leave it."""
        x, y = acts_ND.double(), recon_ND.double()
        part = Reconstruction(x.shape[1])
        part.n_rows = x.shape[0]
        if part.n_rows == 0:
            return
        mean_D = x.mean(0)
        part._mean_D = mean_D.cpu().numpy()
        part._scatter = float((x - mean_D).square().sum())
        part._error = float((x - y).square().sum())
        norm_N, recon_norm_N = x.norm(dim=1), y.norm(dim=1)
        seen_N = norm_N > 0
        norm_N, recon_norm_N, dot_N = norm_N[seen_N], recon_norm_N[seen_N], (x * y).sum(1)[seen_N]
        part._n_nonzero = int(seen_N.sum())
        product_N = norm_N * recon_norm_N
        part._cosine = float((dot_N / product_N.where(recon_norm_N > 0, product_N.new_ones(()))).sum())
        part._ratio = float((recon_norm_N / norm_N).sum())
        self.merge(part)

    def merge(self, other: Self) -> None:
        """Add the rows that `other` has seen (Chan et al. 1979: the scatter of two parts around one mean)."""
        n = self.n_rows + other.n_rows
        if other.n_rows == 0:
            return
        delta_D = other._mean_D - self._mean_D
        self._scatter += other._scatter + float(delta_D @ delta_D) * self.n_rows * other.n_rows / n
        self._mean_D = self._mean_D + delta_D * (other.n_rows / n)
        self.n_rows = n
        self._error += other._error
        self._n_nonzero += other._n_nonzero
        self._cosine += other._cosine
        self._ratio += other._ratio

    def metrics(self) -> dict[str, float | None]:
        """The figures defined above; None where the rows leave one undefined (all equal, all zero)."""
        fvu = self._error / self._scatter if self._scatter > 0 else None
        return {
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1.0 - fvu,
            "mse": self._error / self.n_rows if self.n_rows else None,
            "cosine": self._cosine / self._n_nonzero if self._n_nonzero else None,
            "l2_ratio": self._ratio / self._n_nonzero if self._n_nonzero else None,
        }
