"""Sums over groups of rows or tokens (documents, positions, norms), and jackknife errors from them.

Owns the mergeable sums and the grouping rules; what is summed is the caller's. Every sum is
float64 and parts are merged in a fixed order, so figures do not depend on the number of workers.

Groups: a *document* of the corpus; a *position* bucket 0, 1, 2-3, 4-7, ... (powers of two); a
*norm* bucket, half an octave wide, around the stored mean norm of the train rows.

Shapes: N rows, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

NORM_BUCKETS = 8  # half octaves on either side of the mean norm: 16 times smaller to 16 times larger


_FEW_GROUPS = 32


@dataclass(frozen=True)
class Grouping:
    """Which group each row is in: of number `ids_G[index_N]`, ids ascending."""

    ids_G: np.ndarray
    index_N: np.ndarray

    @classmethod
    def of(cls, group_N: np.ndarray) -> Self:
        return cls(*np.unique(group_N, return_inverse=True))


class Grouped:
    """Sums by group: `ids_G` ascending, `sums[name]` [G] or [G, ...]."""

    def __init__(self) -> None:
        self.ids_G = np.zeros(0, np.int64)
        self.sums: dict[str, np.ndarray] = {}

    @classmethod
    def of(cls, group_N: "np.ndarray | Grouping", values: Mapping[str, np.ndarray]) -> Self:
        """Sum each value [N] or [N, ...] over the rows of each group."""
        grouping = group_N if isinstance(group_N, Grouping) else Grouping.of(group_N)
        found = cls()
        found.ids_G = grouping.ids_G
        for name, value in values.items():
            found.sums[name] = _sum_by(grouping.index_N, value, len(found.ids_G))
        return found

    def merge(self, other: Self) -> None:
        """Add the groups of `other`."""
        if not len(other.ids_G):
            return
        if not len(self.ids_G):
            self.ids_G, self.sums = other.ids_G, dict(other.sums)
            return
        both = np.concatenate([self.ids_G, other.ids_G])
        ids_G, index = np.unique(both, return_inverse=True)
        for name in self.sums:
            value = np.concatenate([self.sums[name], other.sums[name]])
            self.sums[name] = _sum_by(index, value, len(ids_G))
        self.ids_G = ids_G

    def __getitem__(self, name: str) -> np.ndarray:
        return self.sums[name]


def _sum_by(index_N: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    if value.ndim == 1:
        return np.bincount(index_N, weights=value, minlength=n)
    if n <= _FEW_GROUPS:
        one_hot_GN = (index_N == np.arange(n)[:, None]).astype(np.float64)
        few: np.ndarray = one_hot_GN @ value
        return few
    # many groups come in runs (documents of a sequence): no sorted copy of the rows is made
    starts = np.flatnonzero(np.diff(index_N, prepend=-1))
    out = np.zeros((n, *value.shape[1:]))
    np.add.at(out, index_N[starts], np.add.reduceat(value, starts, axis=0))
    return out


def position_bucket(position_N: np.ndarray) -> np.ndarray:
    """0 for position 0, else 1 + floor(log2(position))."""
    exponent = np.frexp(np.asarray(position_N, np.float64))[1]
    return np.where(np.asarray(position_N) > 0, exponent, 0).astype(np.int64)


def position_range(bucket: int) -> tuple[int, int]:
    """First and last position of a bucket."""
    return (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)


def norm_bucket(norm_N: np.ndarray, mean_norm: float) -> np.ndarray:
    """Nearest half octave of norm over mean norm, from -8 to 8."""
    with np.errstate(divide="ignore"):
        octave_N = 2 * np.log2(np.asarray(norm_N, np.float64) / mean_norm)
    return np.clip(np.rint(octave_N), -NORM_BUCKETS, NORM_BUCKETS).astype(np.int64)


def jackknife(left_out_G: np.ndarray) -> float | None:
    """Standard error of a figure from its values with one group left out at a time (Efron 1982, ch. 3).

    None where fewer than two groups leave it defined.
    """
    n = len(left_out_G)
    if n < 2 or not np.isfinite(left_out_G).all():
        return None
    return float(np.sqrt((n - 1) / n * np.square(left_out_G - left_out_G.mean()).sum()))


def ratio_error(numerator_G: np.ndarray, denominator_G: np.ndarray) -> float | None:
    """Jackknife error of sum(numerator) / sum(denominator); both leave the same group out."""
    return jackknife(leave_one_out(lambda a, b: a / b, numerator_G, denominator_G))


def leave_one_out(figure: Callable[..., Any], *sums_G: np.ndarray) -> np.ndarray:
    """`figure` of the totals of each sum without one group at a time: [G]; NaN where undefined."""
    rest = [value.sum() - value for value in sums_G]
    with np.errstate(divide="ignore", invalid="ignore"):
        left_out: np.ndarray = figure(*rest)
    return left_out
