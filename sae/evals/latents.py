"""What each latent does: how often, how strongly and where it fires.

Owns the mergeable per-latent accumulator (one pass, the top K places of each latent kept) and the
parquet table written from it. Never touches the LM.

Definitions (evaluation version 1): a latent *fires* on a row where its activation is not 0;
    density = rows on which it fires / rows evaluated; *dead* = fires on none of them;
    l0 = mean number of latents that fire on a row; l1 = mean sum of |activation| over a row.
The top places of a latent are its K largest positive activations; equal values are ordered by
(sequence, position), so the choice does not depend on how the rows were chunked or merged.

Shapes: N rows, F d_sae, K places kept, C non-zero codes of a chunk.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

_DENSITY_BINS = 48  # eight per decade from 1e-6 to 1
_L0_BINS = 50


@dataclass(frozen=True)
class Codes:
    """The non-zero activations of a chunk of rows: `value_C[i]` of `latent_C[i]` on row `row_C[i]`."""

    n_rows: int
    row_C: np.ndarray
    latent_C: np.ndarray
    value_C: np.ndarray


def sparse_codes(latents_NF: Tensor) -> Codes:
    """The non-zero entries of dense latents, row by row; the only scan over all N x F values."""
    row_C, latent_C = latents_NF.nonzero(as_tuple=True)
    value_C = latents_NF[row_C, latent_C]
    return Codes(
        latents_NF.shape[0], row_C.cpu().numpy(), latent_C.cpu().numpy(), value_C.float().cpu().numpy()
    )


class LatentStats:
    """Firing counts, sums, maxima and the top K places of every latent."""

    def __init__(self, d_sae: int, top_k: int = 16) -> None:
        self.d_sae, self.top_k = d_sae, top_k
        self.n_rows = 0
        self.fires_F = np.zeros(d_sae, np.int64)
        self.sum_F = np.zeros(d_sae)
        self.max_F = np.zeros(d_sae, np.float32)
        self._abs_sum = 0.0
        self._rows_by_l0 = np.zeros(d_sae + 1, np.int64)
        self._top_latent = np.zeros(0, np.int64)
        self._top_value = np.zeros(0, np.float32)
        self._top_sequence = np.zeros(0, np.int64)
        self._top_position = np.zeros(0, np.int64)
        self._floor_F = np.zeros(d_sae, np.float32)  # smallest kept value once K places are kept

    def update(self, codes: Codes, sequence_N: np.ndarray, position_N: np.ndarray) -> None:
        """Count one chunk; `sequence_N`, `position_N` say where its rows come from."""
        self.n_rows += codes.n_rows
        self.fires_F += np.bincount(codes.latent_C, minlength=self.d_sae)
        self.sum_F += np.bincount(codes.latent_C, weights=codes.value_C, minlength=self.d_sae)
        np.maximum.at(self.max_F, codes.latent_C, codes.value_C)
        self._abs_sum += float(np.abs(codes.value_C).sum(dtype=np.float64))
        l0_N = np.bincount(codes.row_C, minlength=codes.n_rows)
        self._rows_by_l0 += np.bincount(l0_N, minlength=self.d_sae + 1)
        keep = (codes.value_C > 0) & (codes.value_C >= self._floor_F[codes.latent_C])
        row = codes.row_C[keep]
        self._add_places(codes.latent_C[keep], codes.value_C[keep], sequence_N[row], position_N[row])

    def merge(self, other: Self) -> None:
        """Add the rows that `other` has seen. Both keep the same number of places."""
        if (self.d_sae, self.top_k) != (other.d_sae, other.top_k):
            raise ValueError(f"cannot merge statistics of {other.d_sae} latents into {self.d_sae}")
        self.n_rows += other.n_rows
        self.fires_F += other.fires_F
        self.sum_F += other.sum_F
        np.maximum(self.max_F, other.max_F, out=self.max_F)
        self._abs_sum += other._abs_sum
        self._rows_by_l0 += other._rows_by_l0
        self._add_places(other._top_latent, other._top_value, other._top_sequence, other._top_position)

    def _add_places(self, latent: np.ndarray, value: np.ndarray, seq: np.ndarray, pos: np.ndarray) -> None:
        if len(latent) == 0:
            return
        latent = np.concatenate([self._top_latent, latent])
        value = np.concatenate([self._top_value, value])
        seq = np.concatenate([self._top_sequence, seq])
        pos = np.concatenate([self._top_position, pos])
        order = np.lexsort((pos, seq, -value, latent))
        latent = latent[order]
        first = np.searchsorted(latent, latent, side="left")
        rank = np.arange(len(latent)) - first
        kept = order[rank < self.top_k]
        self._floor_F[latent[rank == self.top_k - 1]] = value[order][rank == self.top_k - 1]
        self._top_latent = latent[rank < self.top_k]
        self._top_value, self._top_sequence, self._top_position = value[kept], seq[kept], pos[kept]

    def top(self, latent: int) -> list[tuple[int, int, float]]:
        """(sequence, position, value) of the largest activations of one latent, largest first."""
        lo, hi = np.searchsorted(self._top_latent, [latent, latent + 1])
        places = zip(
            self._top_sequence[lo:hi], self._top_position[lo:hi], self._top_value[lo:hi], strict=True
        )
        return [(int(s), int(p), float(v)) for s, p, v in places]

    @property
    def density_F(self) -> np.ndarray:
        return self.fires_F / max(self.n_rows, 1)

    def metrics(self) -> dict[str, float | int]:
        """L0, L1 and how the latents are used, as plain numbers."""
        n = max(self.n_rows, 1)
        dead = int((self.fires_F == 0).sum())
        return {
            "l0": int(self.fires_F.sum()) / n,
            "l1": self._abs_sum / n,
            "dead_latents": dead,
            "dead_share": dead / self.d_sae,
            "latents_over_1pct": int((self.density_F > 0.01).sum()),
            "latents_over_10pct": int((self.density_F > 0.1).sum()),
        }

    def histograms(self) -> dict[str, dict[str, Any]]:
        """Rows by L0 (bins [edge, next edge)) and living latents by log10 density."""
        used = np.flatnonzero(self._rows_by_l0)
        lo, hi = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        width = -(-(hi - lo + 1) // _L0_BINS)
        edges = np.arange(lo, hi + width + 1, width)
        l0_counts = np.add.reduceat(np.pad(self._rows_by_l0, (0, width)), edges[:-1])
        log_edges = np.linspace(-6, 0, _DENSITY_BINS + 1)
        alive = self.density_F[self.fires_F > 0]
        log_counts, _ = np.histogram(np.log10(np.maximum(alive, 1e-6)), log_edges)
        return {
            "l0_per_row": {"edges": edges.tolist(), "counts": l0_counts.tolist()},
            "log10_density": {"edges": log_edges.tolist(), "counts": log_counts.tolist()},
        }

    def write_parquet(self, path: Path) -> None:
        """One row per latent: latent, fires, density, mean and max activation, top places."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        bounds = np.searchsorted(self._top_latent, np.arange(self.d_sae + 1)).astype(np.int32)
        table = {
            "latent": pa.array(np.arange(self.d_sae, dtype=np.int32)),
            "fires": pa.array(self.fires_F),
            "density": pa.array(self.density_F),
            "mean_activation": pa.array(self.sum_F / np.maximum(self.fires_F, 1)),
            "max_activation": pa.array(self.max_F),
        }
        for name, values in (
            ("top_sequence", self._top_sequence),
            ("top_position", self._top_position.astype(np.int32)),
            ("top_value", self._top_value),
        ):
            table[name] = pa.ListArray.from_arrays(pa.array(bounds), pa.array(values))
        partial = path.with_name(path.name + ".partial")
        pq.write_table(pa.table(table), partial, compression="zstd")
        partial.replace(path)


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The table of `write_parquet`, one dict per latent."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows
