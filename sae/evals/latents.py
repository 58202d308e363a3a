"""What each latent does: how often, how strongly and where it fires.

Owns the codes of a chunk of rows, the mergeable per-latent accumulator (one pass, the top K places of
each latent kept) and the parquet table of latents. Never touches the LM.

Definitions: a latent *fires* on a row where its activation is not 0;
    density = rows on which it fires / rows evaluated; *dead* = fires on none of them;
    l0 = mean number of latents that fire on a row; l1 = mean sum of |activation| over a row;
    firings over x = firings of latents with density > x / all firings (SAEBench's normalised forms).
The top places of a latent are its K largest positive activations; equal values are ordered by
(sequence, position), so the choice does not depend on how the rows were chunked or merged.

Shapes: N rows, F d_sae, K places kept, C non-zero codes of a chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sae.codes import encode_sparse
from sae.core import SAE
from sae.select import Scratch

_DENSITY_BINS = 48  # eight per decade from 1e-6 to 1
_L0_BINS = 50


@dataclass(frozen=True)
class Codes:
    """The non-zero activations of a chunk of rows: `value_C[i]` of `latent_C[i]` on row `row_C[i]`.

    Ordered by row, then by latent.
    """

    n_rows: int
    row_C: np.ndarray
    latent_C: np.ndarray
    value_C: np.ndarray

    @cached_property
    def l0_N(self) -> np.ndarray:
        """Latents that fire on each row, int64 [N]."""
        return np.bincount(self.row_C, minlength=self.n_rows)

    @cached_property
    def size_C(self) -> np.ndarray:
        """The values as float64, for sums."""
        return self.value_C.astype(np.float64)

    @cached_property
    def l1_N(self) -> np.ndarray:
        """Sum of |activation| on each row, float64 [N]."""
        return np.bincount(self.row_C, weights=np.abs(self.size_C), minlength=self.n_rows)


def sparse_codes(latents_NF: Tensor) -> Codes:
    """The non-zero entries of dense latents, row by row; the only scan over all N x F values."""
    n_rows, d_sae = latents_NF.shape
    at_C = _nonzero(latents_NF)
    value_C = latents_NF.reshape(-1)[at_C].float().cpu().numpy()
    row_C, latent_C = np.divmod(at_C.cpu().numpy(), d_sae)
    return Codes(n_rows, row_C, latent_C, value_C)


def encode(s: Any, acts_ND: Tensor, scratch: Scratch) -> tuple[Codes, Tensor]:
    """Codes and reconstruction [N, D] of rows; an `sae.SAE` is decoded from the codes alone."""
    if not isinstance(s, SAE):
        latents_NF = s.encode(acts_ND)
        return sparse_codes(latents_NF), s.decode(latents_NF)
    found = encode_sparse(s, acts_ND.to(s.dtype), scratch)
    latent_M, starts_N, value_M = (
        torch.from_numpy(part).to(s.device) for part in (found.columns, found.row_starts[:-1], found.values)
    )
    recon_ND = torch.nn.functional.embedding_bag(
        latent_M, s.W_dec, starts_N, mode="sum", per_sample_weights=value_M.to(s.dtype)
    )
    return Codes(len(acts_ND), found.rows, found.columns, found.values), recon_ND + s.b_dec


def _nonzero(latents_NF: Tensor) -> Tensor:
    """Places in the flat tensor of what is not zero; on a CPU numpy finds them several times faster."""
    flat = latents_NF.contiguous().view(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flat.ne(0).numpy()))
    return flat.nonzero()[:, 0]


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
        self._floor_F = np.zeros(d_sae, np.float32)  # at most the K-th largest value so far
        self._maxima_FG: np.ndarray | None = None  # of values dealt out to 2 K groups
        self._waiting: list[tuple[np.ndarray, ...]] = []  # places not ranked yet
        self._n_waiting = 0

    def update(self, codes: Codes, sequence_N: np.ndarray, position_N: np.ndarray) -> None:
        """Count one chunk; `sequence_N`, `position_N` say where its rows come from."""
        self.n_rows += codes.n_rows
        self.fires_F += np.bincount(codes.latent_C, minlength=self.d_sae)
        self.sum_F += np.bincount(codes.latent_C, weights=codes.size_C, minlength=self.d_sae)
        self._abs_sum += float(codes.l1_N.sum())
        self._rows_by_l0 += np.bincount(codes.l0_N, minlength=self.d_sae + 1)
        self._raise_floor(codes)
        keep = np.flatnonzero((codes.value_C > 0) & (codes.value_C >= self._floor_F[codes.latent_C]))
        row = codes.row_C[keep]
        self._add_places(codes.latent_C[keep], codes.value_C[keep], sequence_N[row], position_N[row])

    def merge(self, other: Self) -> None:
        """Add the rows that `other` has seen. Both keep the same number of places."""
        other.rank()
        if (self.d_sae, self.top_k) != (other.d_sae, other.top_k):
            raise ValueError(f"cannot merge statistics of {other.d_sae} latents into {self.d_sae}")
        self.n_rows += other.n_rows
        self.fires_F += other.fires_F
        self.sum_F += other.sum_F
        np.maximum(self.max_F, other.max_F, out=self.max_F)
        self._abs_sum += other._abs_sum
        self._rows_by_l0 += other._rows_by_l0
        self._add_places(other._top_latent, other._top_value, other._top_sequence, other._top_position)

    def _raise_floor(self, codes: Codes) -> None:
        """Maxima, and the floor below which a value is among no latent's K largest.

        The K-th largest of 2 K group maxima is at most the K-th largest value, and close to it: few others
        are left to rank.
        """
        n_groups = 2 * self.top_k
        if self._maxima_FG is None:
            self._maxima_FG = np.zeros((self.d_sae, n_groups), np.float32)
        at_C = codes.latent_C * n_groups + np.arange(len(codes.latent_C)) % n_groups
        np.maximum.at(self._maxima_FG.reshape(-1), at_C, codes.value_C)
        np.maximum(self.max_F, self._maxima_FG.max(1), out=self.max_F)
        bound_F = np.partition(self._maxima_FG, n_groups - self.top_k, axis=1)[:, n_groups - self.top_k]
        np.maximum(self._floor_F, bound_F, out=self._floor_F)

    def _add_places(self, latent: np.ndarray, value: np.ndarray, seq: np.ndarray, pos: np.ndarray) -> None:
        if len(latent):
            self._waiting.append((latent, value, seq, pos))
            self._n_waiting += len(latent)
        if self._n_waiting > 4 * self.top_k * self.d_sae:  # ranking each chunk took a third of the pass
            self.rank()

    def rank(self) -> None:
        """Keep the K best of what is kept and what waits; called where sums leave for another process."""
        self._maxima_FG = None  # the floor stays
        if not self._waiting:
            return
        kept = (self._top_latent, self._top_value, self._top_sequence, self._top_position)
        latent, value, seq, pos = (np.concatenate(parts) for parts in zip(kept, *self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        keep = np.flatnonzero(value >= self._floor_F[latent])
        latent, value, seq, pos = latent[keep], value[keep], seq[keep], pos[keep]
        # by latent, falling value (bits of positive floats are ordered as they are), sequence, position
        strength = latent.astype(np.uint64) << 32 | ~value.view(np.uint32)
        order = np.lexsort((seq << 32 | pos, strength))
        latent = latent[order]
        first = np.searchsorted(latent, latent, side="left")
        rank = np.arange(len(latent)) - first
        best = order[rank < self.top_k]
        self._floor_F[latent[rank == self.top_k - 1]] = value[order][rank == self.top_k - 1]
        self._top_latent = latent[rank < self.top_k]
        self._top_value, self._top_sequence, self._top_position = value[best], seq[best], pos[best]

    def top(self, latent: int) -> list[tuple[int, int, float]]:
        """(sequence, position, value) of the largest activations of one latent, largest first."""
        self.rank()
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
            "alive_share": 1 - dead / self.d_sae,
            "latents_over_1pct": int((self.density_F > 0.01).sum()),
            "latents_over_10pct": int((self.density_F > 0.1).sum()),
            "firings_over_1pct": self._share_of_firings(0.01),
            "firings_over_10pct": self._share_of_firings(0.1),
        }

    def _share_of_firings(self, density: float) -> float:
        total = int(self.fires_F.sum())
        return int(self.fires_F[self.density_F > density].sum()) / total if total else 0.0

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

    def columns(self) -> dict[str, Any]:
        """Columns of `latents.parquet`: fires, density, mean and max activation, the top places."""
        import pyarrow as pa

        self.rank()
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
        return table


def write_parquet(path: Path, columns: Mapping[str, Any]) -> None:
    """One row per latent; numpy arrays or Arrow's. The file appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.table(dict(columns)), partial, compression="zstd")
    partial.replace(path)


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The table of `write_parquet`, one dict per latent."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows
