"""Statistics of stored rows: exact under merging, whatever the blocks, workers and order.

Specified in docs/format.md, "Statistics". Moments merge by Chan, Golub and LeVeque 1979.
Shapes: N rows, D = d_in, K occupied bins of the norm histogram, S pieces of rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .codec import Calibration

BINS_PER_OCTAVE = 32
ZERO_BIN = -(2**15)
"""Bin of a norm of zero: far below that of any float32."""
PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 99.9)

SUB_ROWS = 32  # float32 sums end here: variances within 2e-7 of float64 ones, where 680 rows gave 3e-6
_CENTRE_ROWS = 256
_PIECE_VALUES = 2**17  # pieces whose temporaries stay in a core's cache
SAFE_PEAKS = (1e-15, 1e15)  # peaks whose squares and their sums stay normal float32 numbers


@dataclass(frozen=True, eq=False)
class Statistics:
    """Exact, mergeable statistics of stored rows and of what storing cost them.

    The moments are those of the *stored* values, so anybody can recompute them from the shards;
    the `sse` fields compare them with the LM's output.
    """

    n_rows: int
    mean_D: np.ndarray
    m2_D: np.ndarray
    """float64 [D]: sum of squared deviations from the mean, per channel."""
    norm_sum: float
    norm_bins_K: np.ndarray
    """int64 [K], sorted: the occupied bins of log2 of the rows' norms, `BINS_PER_OCTAVE` an octave."""
    norm_counts_K: np.ndarray
    """int64 [K]: rows in each."""
    max_abs: float
    n_core: int
    core_mean_D: np.ndarray
    core_m2_D: np.ndarray
    sse: float
    """Squared error of the stored rows against the LM's, summed over rows and channels."""
    core_sse: float
    core_sse_D: np.ndarray
    """float64 [D]: the same by channel; NaN where a writer of an earlier format recorded the rows."""
    max_error: float
    rows_rescaled: int
    """Rows too large for the common step (they took a power-of-two multiple of it)."""

    @classmethod
    def of(
        cls, acts_ND: np.ndarray, stored_ND: np.ndarray, scale_N: np.ndarray | None, calibration: Calibration
    ) -> "Statistics":
        """Statistics of rows `stored_ND` that stand for the LM's rows `acts_ND` (both float32 [N, D])."""
        n_rows, d_in = acts_ND.shape
        core, rest, median = _Sums(d_in), _Sums(d_in), _Tile(calibration.median_D)
        norm2_N, core_sse_D = np.empty(n_rows), np.zeros(d_in)
        sse = core_sse = max_abs = max_error = 0.0
        for at, x_ND, y_ND, buffer_ND, peak in _pieces(acts_ND, stored_ND):
            core_N = _dots(median.subtract(x_ND, buffer_ND)) <= calibration.radius2
            core.add(y_ND, core_N, buffer_ND)
            if not core_N.all():
                rest.add(y_ND[~core_N], np.ones(np.count_nonzero(~core_N), bool), buffer_ND)
            norm2_N[at : at + len(y_ND)] = _dots(y_ND)
            max_abs = max(max_abs, peak)
            error_ND = np.subtract(y_ND, x_ND, out=buffer_ND[: len(y_ND)])
            sse_N = _dots(error_ND)
            sse += float(sse_N.sum(dtype=np.float64))
            core_sse += float(sse_N[core_N].sum(dtype=np.float64))
            max_error = max(max_error, float(error_ND.max()), -float(error_ND.min()))
            _add_up(core_sse_D, np.square(error_ND, out=error_ND), core_N.astype(error_ND.dtype))
        small = np.flatnonzero(norm2_N < SAFE_PEAKS[0] ** 2)
        norm2_N[small] = _dots(stored_ND[small].astype(np.float64))
        bins_K, counts_K = histogram(norm2_N)
        mean_D, m2_D = merge_moments([core.moments(), rest.moments()])
        _, core_mean_D, core_m2_D = core.moments()
        return cls(
            n_rows=n_rows,
            mean_D=mean_D,
            m2_D=m2_D,
            norm_sum=float(np.sqrt(norm2_N).sum()),
            norm_bins_K=bins_K,
            norm_counts_K=counts_K,
            max_abs=max_abs,
            n_core=core.n_rows,
            core_mean_D=core_mean_D,
            core_m2_D=core_m2_D,
            sse=sse,
            core_sse=core_sse,
            core_sse_D=core_sse_D,
            max_error=max_error,
            rows_rescaled=0 if scale_N is None else int((scale_N != np.float32(calibration.step)).sum()),
        )

    def summary(self) -> dict[str, Any]:
        """What `ds.stats(site)` gives: arrays float64 [D], `norm_percentiles` by percent, plain numbers."""
        n = max(self.n_rows, 1)
        core_total, total = float(self.core_m2_D.sum()), float(self.m2_D.sum())
        return {
            "n_rows": self.n_rows,
            "mean": self.mean_D,
            "variance": self.m2_D / n,
            "mean_norm": self.norm_sum / n,
            "norm_percentiles": norm_percentiles(self.norm_bins_K, self.norm_counts_K),
            "max_abs": self.max_abs,
            "n_core": self.n_core,
            "fvu_core": self.core_sse / core_total if core_total else 0.0,
            "fvu_all": self.sse / total if total else 0.0,
            "fvu_median_channel": median_channel(self.core_sse_D, self.core_m2_D),
            "max_error": self.max_error,
            "rows_rescaled": self.rows_rescaled,
        }


def median_channel(core_sse_D: np.ndarray, core_m2_D: np.ndarray) -> float | None:
    """FVU of the median channel, over those whose core rows vary; None where it was not recorded.

    The total is that of the loud channels, which hold most of the variance.
    """
    varies_D = core_m2_D > 0
    if not varies_D.any():
        return 0.0
    fvu = float(np.median(core_sse_D[varies_D] / core_m2_D[varies_D]))
    return None if np.isnan(fvu) else fvu


@dataclass(frozen=True, eq=False)
class Tally:
    """What a version's fidelity takes of `Statistics`: squared deviations summed over channels where those of
    each are not needed, no norms."""

    n_rows: int
    mean_D: np.ndarray
    m2: float
    n_core: int
    core_mean_D: np.ndarray
    core_m2_D: np.ndarray
    core_sse_D: np.ndarray
    sse: float
    core_sse: float
    max_error: float
    rows_rescaled: int

    def fidelity(self) -> dict[str, float | None]:
        """As `Statistics.summary` has them."""
        core_m2 = float(self.core_m2_D.sum())
        return {
            "n_rows": self.n_rows,
            "fvu_core": self.core_sse / core_m2 if core_m2 else 0.0,
            "fvu_all": self.sse / self.m2 if self.m2 else 0.0,
            "fvu_median_channel": median_channel(self.core_sse_D, self.core_m2_D),
            "max_error": self.max_error,
            "rows_rescaled": self.rows_rescaled,
        }


def merge_tallies(parts: Sequence[Tally]) -> Tally:
    """The tally of all the parts' rows together; the order of parts changes only rounding."""
    n_rows, mean_D, m2 = _merge_totals([(p.n_rows, p.mean_D, p.m2) for p in parts])
    core_mean_D, core_m2_D = merge_moments([(p.n_core, p.core_mean_D, p.core_m2_D) for p in parts])
    return Tally(
        n_rows=n_rows,
        mean_D=mean_D,
        m2=m2,
        n_core=sum(p.n_core for p in parts),
        core_mean_D=core_mean_D,
        core_m2_D=core_m2_D,
        core_sse_D=_sum([p.core_sse_D for p in parts]),
        sse=sum(p.sse for p in parts),
        core_sse=sum(p.core_sse for p in parts),
        max_error=max(p.max_error for p in parts),
        rows_rescaled=sum(p.rows_rescaled for p in parts),
    )


def _merge_totals(parts: Sequence[tuple[int, np.ndarray, float]]) -> tuple[int, np.ndarray, float]:
    """As `merge_moments`, with the squared deviations summed over channels."""
    n, mean_D, m2 = parts[0]
    for n_b, mean_b, m2_b in parts[1:]:
        if not n_b:
            continue
        delta_D = mean_b - mean_D
        total = n + n_b
        m2 += m2_b + float(delta_D @ delta_D) * (n * n_b / total)
        mean_D = mean_D + delta_D * (n_b / total)
        n = total
    return n, mean_D, m2


def norm_percentiles(bins_K: np.ndarray, counts_K: np.ndarray) -> Mapping[float, float]:
    """The middle of the bin that holds each of `PERCENTILES` of the norms (nearest rank), within 1.1 %."""
    if not len(bins_K):
        return {}
    upto_K = np.cumsum(counts_K)
    rank_P = np.ceil(np.array(PERCENTILES) / 100 * upto_K[-1])
    bin_P = bins_K[np.searchsorted(upto_K, rank_P)]
    norm_P = np.where(bin_P == ZERO_BIN, 0.0, np.exp2((bin_P + 0.5) / BINS_PER_OCTAVE))
    return dict(zip(PERCENTILES, norm_P.tolist(), strict=True))


def merge(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of all the parts' rows together; the order of parts changes only rounding."""
    n_rows, n_core = sum(p.n_rows for p in parts), sum(p.n_core for p in parts)
    mean_D, m2_D = merge_moments([(p.n_rows, p.mean_D, p.m2_D) for p in parts])
    core_mean_D, core_m2_D = merge_moments([(p.n_core, p.core_mean_D, p.core_m2_D) for p in parts])
    bins_K, place = np.unique(np.concatenate([p.norm_bins_K for p in parts]), return_inverse=True)
    counts_K = np.zeros(len(bins_K), np.int64)
    np.add.at(counts_K, place, np.concatenate([p.norm_counts_K for p in parts]))
    return Statistics(
        n_rows=n_rows,
        mean_D=mean_D,
        m2_D=m2_D,
        norm_sum=sum(p.norm_sum for p in parts),
        norm_bins_K=bins_K,
        norm_counts_K=counts_K,
        max_abs=max(p.max_abs for p in parts),
        n_core=n_core,
        core_mean_D=core_mean_D,
        core_m2_D=core_m2_D,
        sse=sum(p.sse for p in parts),
        core_sse=sum(p.core_sse for p in parts),
        core_sse_D=_sum([p.core_sse_D for p in parts]),
        max_error=max(p.max_error for p in parts),
        rows_rescaled=sum(p.rows_rescaled for p in parts),
    )


def _sum(vectors: Sequence[np.ndarray]) -> np.ndarray:
    return np.add.reduce(np.array(vectors, np.float64), axis=0)


class _Sums:
    """Sums and sums of squares per channel, of rows shifted by the mean of the first: without cancellation.

    float32 within `SUB_ROWS` rows, float64 across. Products with ones instead of sums: BLAS adds up
    17,000 Mval/s of a piece in cache, `sum` 5,900.
    """

    def __init__(self, d_in: int) -> None:
        self.centre: _Tile | None = None
        self.n_rows, self.total_D, self.square_D = 0, np.zeros(d_in), np.zeros(d_in)

    def add(self, rows_ND: np.ndarray, counted_N: np.ndarray, buffer_ND: np.ndarray) -> None:
        """Take in the rows that are counted; all values are finite."""
        counted = np.flatnonzero(counted_N)
        if not len(counted):
            return
        if self.centre is None:
            first_ND = rows_ND[counted[:_CENTRE_ROWS]]
            self.centre = _Tile(first_ND.mean(axis=0, dtype=np.float64).astype(np.float32))
        self.n_rows += len(counted)
        shifted_ND = self.centre.subtract(rows_ND, buffer_ND)
        weight_N = counted_N.astype(shifted_ND.dtype)
        _add_up(self.total_D, shifted_ND, weight_N)
        _add_up(self.square_D, np.square(shifted_ND, out=shifted_ND), weight_N)

    def moments(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Rows, their mean, and sum of squared deviations from it; float64 [D]."""
        if self.centre is None:
            return 0, self.total_D, self.square_D
        mean_D = self.total_D / self.n_rows
        m2_D = np.maximum(self.square_D - self.total_D * mean_D, 0.0)
        return self.n_rows, self.centre.centre_D + mean_D, m2_D


def _add_up(sums_D: np.ndarray, rows_ND: np.ndarray, weight_N: np.ndarray) -> None:
    """Add the rows, each times its weight."""
    for part, sub_rows in _sub_blocks(len(rows_ND)):
        rows_SND = rows_ND[part].reshape(-1, sub_rows, len(sums_D))
        weight_S1N = weight_N[part].reshape(-1, 1, sub_rows)
        sums_D += np.matmul(weight_S1N, rows_SND)[:, 0].sum(axis=0, dtype=np.float64)


class _Tile:
    """A row to subtract from many, repeated: inner loops as long as a sub-block have twice the speed."""

    def __init__(self, centre_D: np.ndarray) -> None:
        self.centre_D, self._tile = centre_D, np.tile(centre_D, SUB_ROWS)

    def subtract(self, rows_ND: np.ndarray, buffer_ND: np.ndarray) -> np.ndarray:
        """rows - centre, in the buffer."""
        out_ND = buffer_ND[: len(rows_ND)]
        for part, sub_rows in _sub_blocks(len(rows_ND)):
            width = sub_rows * rows_ND.shape[1]
            rows_SW, out_SW = rows_ND[part].reshape(-1, width), out_ND[part].reshape(-1, width)
            np.subtract(rows_SW, self._tile[:width], out=out_SW)
        return out_ND


def _sub_blocks(n_rows: int) -> Iterator[tuple[slice, int]]:
    """The part of n rows that is whole sub-blocks, then the rest as one: (rows, rows of a sub-block)."""
    whole = n_rows - n_rows % SUB_ROWS
    if whole:
        yield slice(whole), SUB_ROWS
    if whole < n_rows:
        yield slice(whole, n_rows), n_rows - whole


def _pieces(
    acts_ND: np.ndarray, stored_ND: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, float]]:
    """Yield (first row, acts, stored, buffer, largest absolute value stored) of pieces that stay in cache.

    float64 where squares could leave the range of float32.
    """
    rows = max(1, _PIECE_VALUES // (SUB_ROWS * max(1, acts_ND.shape[1]))) * SUB_ROWS
    shared_ND = np.empty((min(rows, len(acts_ND)), acts_ND.shape[1]), np.float32)
    for i in range(0, len(acts_ND), rows):
        x_ND, y_ND = acts_ND[i : i + rows], stored_ND[i : i + rows]
        peak = max(float(y_ND.max()), -float(y_ND.min()))
        if SAFE_PEAKS[0] < peak < SAFE_PEAKS[1]:
            yield i, x_ND, y_ND, shared_ND, peak
        else:
            yield i, x_ND.astype(np.float64), y_ND.astype(np.float64), np.empty(y_ND.shape), peak


def _dots(rows_ND: np.ndarray) -> np.ndarray:
    """Squared norm of each row [N]."""
    return np.matmul(rows_ND[:, None, :], rows_ND[:, :, None])[:, 0, 0]


def histogram(norm2_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The occupied bins of rows' squared norms and how many rows each holds, int64 [K]."""
    bins_N = np.full(len(norm2_N), ZERO_BIN, np.int64)
    positive_N = norm2_N > 0
    bins_N[positive_N] = np.floor(np.log2(norm2_N[positive_N]) * (BINS_PER_OCTAVE / 2))
    counts = np.bincount(bins_N - ZERO_BIN)
    occupied_K = np.flatnonzero(counts)
    return occupied_K + ZERO_BIN, counts[occupied_K]


def merge_moments(parts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    n, mean_D, m2_D = 0, np.zeros_like(parts[0][1]), np.zeros_like(parts[0][2])
    for n_b, mean_b, m2_b in parts:
        if not n_b:
            continue
        delta_D = mean_b - mean_D
        total = n + n_b
        m2_D = m2_D + m2_b + delta_D**2 * (n * n_b / total)
        mean_D = mean_D + delta_D * (n_b / total)
        n = total
    return mean_D, m2_D
