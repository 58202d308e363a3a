"""Exact selection of the largest pre-activations, as sparse entries in row order.

Owns the one thing that bounds a sparse training step on CPU: `torch.topk` over [N, F] took
27 ms (N 2048, F 1536, k 32, one thread) where the encoder matmul took 13; the prefilters here
take 7 and give the same set. Ties go to the lowest column, then the lowest row, so the result
depends on the values alone, never on the buffers, the guess or the history.

Shapes: N rows, F = d_sae, C candidates, M chosen entries.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import on_device

_MIN_GROUP = 16
_MAX_GROUP = 32  # columns under one group maximum: 16-32 were fastest at F 1536 and 6144
_GROUPS_PER_K = 3  # fewer groups than 3k let too many candidates through (1.6k at 1.5 k groups)
_CACHED_ROWS = 128  # that become float32 at a time: 3 MB at F 6144
_MARGIN = 8  # more candidates by bfloat16 than are kept: then 0 of 2,048 rows changed on four models
GUESS_SHARE = 0.95  # of the last threshold: batches differ by about 1 %, this adds ~10 % candidates

Array = Any
"""A numpy array where activations are on the CPU, else a tensor on their device."""

Exact = Callable[[Array, Array, Array], Array]
"""Values at (rows, columns, row starts)."""


@dataclass
class Scratch:
    """Buffers that live as long as a run: a fresh 50 MB tensor a step costs 10-20 ms of page faults."""

    buffers: dict[str, Tensor] = field(default_factory=dict)
    guess: float = 0.0
    """Where `largest_in_batch` starts looking; it decides the speed, never the result."""

    def get(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """A contiguous tensor of this shape with undefined content; the same memory at every call."""
        size = int(np.prod(shape))
        buffer = self.buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < size:
            buffer = self.buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


@dataclass(frozen=True)
class Entries:
    """Chosen latents of a batch in row order (CSR): `values[m]` at (`rows[m]`, `columns[m]`)."""

    n_columns: int
    rows: Array
    columns: Array
    row_starts: Array
    """[N + 1]: entries of row n are `row_starts[n]:row_starts[n + 1]`."""
    values: Array

    @property
    def n_rows(self) -> int:
        return len(self.row_starts) - 1

    def positive(self) -> "Entries":
        """Without the entries that ReLU sets to zero; on a GPU, which would have to be waited for, with them."""
        if isinstance(self.values, Tensor):
            return self
        return self.kept(self.values > 0)

    def kept(self, keep_M: np.ndarray) -> "Entries":
        """Only the entries of the mask; on the CPU."""
        if keep_M.all():
            return self
        starts = np.concatenate([[0], np.cumsum(keep_M)])[self.row_starts]
        return Entries(self.n_columns, self.rows[keep_M], self.columns[keep_M], starts, self.values[keep_M])

    @cached_property
    def by_column(self) -> tuple[Array, Array]:
        """(order, starts): entries `order[starts[f]:starts[f + 1]]` are those of column f, rows ascending."""
        if isinstance(self.columns, Tensor):
            return on_device.by_column(self.columns, self.n_columns)
        # numpy sorts 16-bit keys by radix: 0.25 ms for 65k entries against 3.3 ms for 32-bit keys
        keys = self.columns.astype(np.uint16) if self.n_columns <= 1 << 16 else self.columns
        counts_F = np.bincount(self.columns, minlength=self.n_columns)
        return np.argsort(keys, kind="stable"), np.concatenate([[0], np.cumsum(counts_F)])


def largest_per_row(pre_NF: Tensor, k: int, scratch: Scratch, exact: Exact | None = None) -> Entries:
    """The k largest of each row, whatever their sign.

    A row's k-th largest group maximum is a lower bound of its k-th largest value, so only the
    values above that bound (about 1.1 k of them) are ranked.

    Args:
        exact: gives the true values at (rows, columns, row starts) where `pre_NF` is rounded
            (bfloat16). Then k + 8 are taken by the rounded values and ranked by the true ones.
    """
    n, f = pre_NF.shape
    wanted = k if exact is None else min(k + _MARGIN, f)
    if _elsewhere(pre_NF):
        return _largest_per_row_there(pre_NF, k, wanted, exact)
    flat_C, values_C = _candidates(pre_NF, wanted, scratch)
    starts = np.searchsorted(flat_C, np.arange(n + 1) * f)
    counts_N = np.diff(starts)
    if counts_N.min(initial=k) >= k:
        rows_C = np.repeat(np.arange(n), counts_N)
        columns_C = flat_C - rows_C * f
        if exact is not None:
            values_C = exact(rows_C, columns_C, starts)
        if not np.isnan(values_C).any():
            keep_C = keep_k_per_row(values_C, starts, counts_N, k)
            return Entries(f, rows_C[keep_C], columns_C[keep_C], np.arange(n + 1) * k, values_C[keep_C])
    # a NaN compares false; topk ranks it first, and the loss will show it
    columns = torch.topk(pre_NF, k).indices.sort(dim=1).values.reshape(-1).numpy()
    rows, starts = np.repeat(np.arange(n), k), np.arange(n + 1) * k
    values = pre_NF.numpy()[rows, columns] if exact is None else exact(rows, columns, starts)
    return Entries(f, rows, columns, starts, values)


def largest_in_batch(pre_NF: Tensor, n_entries: int, scratch: Scratch) -> Entries:
    """The `n_entries` largest positive values of the whole batch, or all positive ones if fewer.

    Starts from a guess of the threshold, taken from the batch before; when the guess was too
    high, from zero. A flat `torch.topk` took 100 ms at F 6144 where this takes 2-6.
    """
    if _elsewhere(pre_NF):
        return _entries_there(pre_NF, on_device.top_places(pre_NF, n_entries))
    per_row = n_entries // max(len(pre_NF), 1)
    flat_C, values_C, _ = _above_guess(pre_NF, n_entries, per_row, scratch, lambda n: n)
    if len(flat_C) > n_entries:
        last = len(flat_C) - n_entries
        threshold = np.partition(values_C, last)[last]
        keep_C = values_C > threshold
        ties = np.flatnonzero(values_C == threshold)
        keep_C[ties[: n_entries - np.count_nonzero(keep_C)]] = True
        flat_C, values_C = flat_C[keep_C], values_C[keep_C]
    scratch.guess = GUESS_SHARE * float(values_C.min(initial=np.inf)) if len(values_C) == n_entries else 0.0
    return _entries(pre_NF, flat_C, values_C)


def above_guess(
    pre_NF: Tensor, n_entries: int, per_row: int, scratch: Scratch, total: Callable[[int], int]
) -> tuple[Entries, int]:
    """(this process's candidates for the `n_entries` largest positive values, `total` of their number).

    Args:
        per_row: how many of them a row of `pre_NF` has about; it decides the speed only.
        total: sums over processes that hold other values of the same batch.
    """
    flat_C, values_C, n = _above_guess(pre_NF, n_entries, per_row, scratch, total)
    return _entries(pre_NF, flat_C, values_C), n


def _above_guess(
    pre_NF: Tensor, n_entries: int, per_row: int, scratch: Scratch, total: Callable[[int], int]
) -> tuple[np.ndarray, np.ndarray, int]:
    maxima_NG = _maxima(pre_NF, max(1, per_row), scratch)
    dtype = pre_NF.numpy().dtype
    flat_C, values_C, n = np.empty(0, np.int64), np.empty(0, dtype), 0
    for floor in (max(scratch.guess, 0.0), 0.0):
        least = np.asarray(np.nextafter(dtype.type(floor), dtype.type(np.inf)))
        flat_C, values_C = _at_least(pre_NF, least, maxima_NG, scratch)
        n = total(len(flat_C))
        if n >= n_entries:
            break
    return flat_C, values_C, n


def above(pre_NF: Tensor, floor_F: Tensor, scratch: Scratch) -> Entries:
    """The entries that exceed their latent's floor."""
    n, f = pre_NF.shape
    if _elsewhere(pre_NF):
        return _entries_there(pre_NF, (pre_NF > floor_F).reshape(-1).nonzero()[:, 0])
    mask_NF = scratch.get("mask", (n, f), torch.bool)
    torch.gt(pre_NF, floor_F, out=mask_NF)
    flat_C = np.flatnonzero(mask_NF.numpy())
    return _entries(pre_NF, flat_C, pre_NF.numpy().reshape(-1)[flat_C])


def _elsewhere(pre_NF: Tensor) -> bool:
    return pre_NF.device.type != "cpu"


def _largest_per_row_there(pre_NF: Tensor, k: int, wanted: int, exact: Exact | None) -> Entries:
    n, f = pre_NF.shape
    columns_NC = on_device.top_columns(pre_NF, wanted)
    rows_NC = torch.arange(n, device=pre_NF.device).unsqueeze(1)
    if exact is None:
        values_NC = pre_NF.gather(1, columns_NC)
    else:
        starts = torch.arange(n + 1, device=pre_NF.device) * wanted
        values_NC = exact(rows_NC.expand(n, wanted).flatten(), columns_NC.flatten(), starts).view(n, wanted)
        kept_Nk = on_device.top_columns(values_NC, k)
        columns_NC, values_NC = columns_NC.gather(1, kept_Nk), values_NC.gather(1, kept_Nk)
    starts = torch.arange(n + 1, device=pre_NF.device) * k
    return Entries(f, rows_NC.expand(n, k).flatten(), columns_NC.flatten(), starts, values_NC.flatten())


def _entries_there(pre_NF: Tensor, flat_M: Tensor) -> Entries:
    n, f = pre_NF.shape
    rows_M = flat_M // f
    starts = on_device.row_starts(rows_M, n)
    return Entries(f, rows_M, flat_M - rows_M * f, starts, pre_NF.reshape(-1)[flat_M])


def _candidates(pre_NF: Tensor, k: int, scratch: Scratch) -> tuple[np.ndarray, np.ndarray]:
    """(flat indices, ascending; values) of at least each row's k largest values; of fewer where there is NaN."""
    maxima_NG = _maxima(pre_NF, k, scratch)
    sample_NG = _scattered_maxima(pre_NF, k, scratch) if maxima_NG is None else maxima_NG
    last = sample_NG.shape[1] - k
    bound_N1 = np.partition(sample_NG, last, axis=1)[
        :, last, None
    ]  # at most the k-th largest value, and close
    return _at_least(pre_NF, bound_N1, maxima_NG, scratch)


def _group_size(f: int, k: int) -> int:
    """Columns that share a maximum, so that there are 3 k maxima or more."""
    return max(1, min(_MAX_GROUP, f // (_GROUPS_PER_K * k)))


def _maxima(pre_NF: Tensor, k: int, scratch: Scratch) -> np.ndarray | None:
    """[N, G]: the largest of each group of neighbouring columns; None where groups would be small, or F is odd.

    Groups of 8 took as long as a mask over all columns, or longer.
    """
    n, f = pre_NF.shape
    sizes = [size for size in range(_MIN_GROUP, _group_size(f, k) + 1) if f % size == 0]
    if not sizes:
        return None
    size = sizes[-1]
    if pre_NF.dtype != torch.bfloat16:
        maxima_NG = scratch.get("maxima", (n, f // size), pre_NF.dtype)
        return torch.amax(pre_NF.view(n, f // size, size), 2, out=maxima_NG).numpy()
    maxima_NG = scratch.get("maxima", (n, f // size), torch.float32)
    for start in range(0, n, _CACHED_ROWS):  # torch's amax of bfloat16 took 25 ms where this takes 5
        rows = slice(start, min(n, start + _CACHED_ROWS))
        part = scratch.get("part", (rows.stop - start, f), torch.float32).copy_(pre_NF[rows])
        torch.amax(part.view(len(part), f // size, size), 2, out=maxima_NG[rows])
    return maxima_NG.numpy()


def _scattered_maxima(pre_NF: Tensor, k: int, scratch: Scratch) -> np.ndarray:
    """[N, G]: the largest of each group of columns G apart; some columns may be in none."""
    n, f = pre_NF.shape
    size = _group_size(f, k)
    maxima_NG = scratch.get("maxima", (n, f // size), pre_NF.dtype)
    torch.amax(pre_NF[:, : f // size * size].view(n, size, f // size), 1, out=maxima_NG)
    return _known(maxima_NG)


def _at_least(
    pre_NF: Tensor, bound: np.ndarray, maxima_NG: np.ndarray | None, scratch: Scratch
) -> tuple[np.ndarray, np.ndarray]:
    """(flat indices, ascending; values if not rounded) of what is at least `bound`: one for all, or [N, 1].

    With maxima it looks only into groups whose maximum is: 3 ms at N 2048, F 6144, a mask over all 7.
    """
    n, f = pre_NF.shape
    if maxima_NG is None:
        mask_NF = scratch.get("mask", (n, f), torch.bool)
        torch.ge(pre_NF, torch.from_numpy(np.asarray(bound)).to(pre_NF.dtype), out=mask_NF)
        flat_C = np.flatnonzero(mask_NF.numpy())
        if pre_NF.dtype == torch.bfloat16:
            return flat_C, np.empty(0)  # who gives rounded values asks for the exact ones
        return flat_C, pre_NF.numpy().reshape(-1)[flat_C]
    n_groups = maxima_NG.shape[1]
    size = f // n_groups
    group_J = np.flatnonzero(maxima_NG >= bound)
    values_JS = scratch.get("groups", (len(group_J), size), pre_NF.dtype)
    torch.index_select(pre_NF.view(-1, size), 0, torch.from_numpy(group_J), out=values_JS)
    known_JS = _known(values_JS)
    inside_C = np.flatnonzero(known_JS >= (bound[group_J // n_groups] if bound.ndim else bound))
    return group_J[inside_C // size] * size + inside_C % size, known_JS.reshape(-1)[inside_C]


def _known(values: Tensor) -> np.ndarray:
    """As numpy, which has no bfloat16."""
    found: np.ndarray = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return found


def keep_k_per_row(values_C: np.ndarray, starts: np.ndarray, counts_N: np.ndarray, k: int) -> np.ndarray:
    """Which candidates (row-major, at least k a row) are among their row's k largest."""
    width = int(counts_N.max(initial=k))
    if width == k:
        return np.ones(len(values_C), dtype=bool)
    n = len(counts_N)
    padded = np.full((n, width), -np.inf, dtype=values_C.dtype)
    padded[np.arange(width) < counts_N[:, None]] = values_C
    padded.partition(width - k, axis=1)
    threshold_C = np.repeat(padded[:, width - k], counts_N)
    keep_C = values_C >= threshold_C
    if np.count_nonzero(keep_C) > n * k:
        above_C = values_C > threshold_C
        ties_C = keep_C & ~above_C
        quota_N = k - np.add.reduceat(above_C, starts[:-1], dtype=np.int64)
        so_far_C = np.cumsum(ties_C)
        rank_C: np.ndarray = so_far_C - np.repeat((so_far_C - ties_C)[starts[:-1]], counts_N)
        keep_C = above_C | (ties_C & (rank_C <= np.repeat(quota_N, counts_N)))
    return keep_C


def _entries(pre_NF: Tensor, flat_M: np.ndarray, values_M: np.ndarray) -> Entries:
    n, f = pre_NF.shape
    row_starts = np.searchsorted(flat_M, np.arange(n + 1) * f)
    rows_M = np.repeat(np.arange(n), np.diff(row_starts))
    return Entries(f, rows_M, flat_M - rows_M * f, row_starts, values_M)
