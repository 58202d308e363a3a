"""The largest pre-activations over all ranks: which of this rank's entries are among them.

Each rank chooses among its own rows and latents (sae/select.py), the candidates' values are gathered,
and every rank keeps those of its own that one process would have kept. Exact: ties go to the lowest
latent, then in a batch by (row, latent). On a GPU ties fall as `torch.topk` has them, and what is not
kept stays as an entry of value 0, so that nothing waits for a size.

Shapes: N rows, F latents of this rank, W ranks, M chosen entries.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import select
from .group import Axis, Share
from .select import Entries, Exact, Scratch


def largest_per_row(
    pre_NF: Tensor, k: int, scratch: Scratch, share: Share, exact: Exact | None = None
) -> Entries:
    """This rank's entries among the k largest of each row, whatever their sign; `exact` as in sae/select.py."""
    latents = share.group.latents
    if latents.world == 1:
        return select.largest_per_row(pre_NF, k, scratch, exact)
    n, f = pre_NF.shape
    own_k = min(k, f)
    own = select.largest_per_row(pre_NF, own_k, scratch, exact) if f else _nothing(pre_NF)
    values_NK = torch.as_tensor(own.values).view(n, own_k)
    if not isinstance(own.values, np.ndarray):
        return _replaced(own, values_NK, _reaching(values_NK, k, latents))
    return own.kept(_among(values_NK, k, latents))


def largest_in_batch(pre_NF: Tensor, n_entries: int, scratch: Scratch, share: Share) -> Entries:
    """This rank's entries among the `n_entries` largest positive values of the whole batch."""
    everyone = share.group.everyone
    if everyone.world == 1:
        return select.largest_in_batch(pre_NF, n_entries, scratch)
    if pre_NF.device.type != "cpu":
        own = select.largest_in_batch(pre_NF, min(n_entries, pre_NF.numel()), scratch)
        values_1M = torch.as_tensor(own.values)[None]
        return _replaced(own, values_1M, _reaching(values_1M, n_entries, everyone))
    per_row = n_entries // max(share.n_rows * share.group.latents.world, 1)
    own, total = select.above_guess(pre_NF, n_entries, per_row, scratch, lambda n: int(_total(n, everyone)))
    if total <= n_entries:
        scratch.guess = 0.0
        return own
    values_M = own.values
    all_values = _gathered(values_M, everyone)
    last = len(all_values) - n_entries
    threshold = np.partition(all_values, last)[last]
    keep_M = values_M > threshold
    ties_M = np.flatnonzero(values_M == threshold)
    room = n_entries - int(np.count_nonzero(all_values > threshold))
    if np.count_nonzero(all_values == threshold) > room:
        ties_M = _first_ties(own, ties_M, room, share)
    keep_M[ties_M] = True
    scratch.guess = select.GUESS_SHARE * float(threshold)
    return own.kept(keep_M)


def _among(values_NK: Tensor, k: int, latents: Axis) -> np.ndarray:
    """bool [N * K]: which of this rank's values are among the k largest of their row over all ranks."""
    n, own_k = values_NK.shape
    padded = torch.full((n, k), -torch.inf, dtype=values_NK.dtype)
    # a NaN must reach the loss: as the largest of all it is kept
    padded[:, :own_k] = torch.nan_to_num(values_NK, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    all_NC = latents.gather(padded).transpose(0, 1).reshape(n, -1).numpy()
    width = all_NC.shape[1]
    keep_C = select.keep_k_per_row(
        all_NC.reshape(-1), np.arange(n + 1) * width, np.full(n, width, np.int64), k
    )
    found: np.ndarray = keep_C.reshape(n, latents.world, k)[:, latents.rank, :own_k].reshape(-1)
    return found


def _reaching(values_NK: Tensor, k: int, axis: Axis) -> Tensor:
    """bool [N, K]: which reach their row's k-th largest value over all ranks."""
    n, own_k = values_NK.shape
    padded = values_NK.new_full((n, k), -torch.inf)
    padded[:, :own_k] = values_NK
    all_NC = axis.gather(padded).transpose(0, 1).reshape(n, -1)
    return ~(values_NK < torch.topk(all_NC, k).values[:, -1:])  # a NaN reaches it


def _replaced(own: Entries, values_NK: Tensor, keep_NK: Tensor) -> Entries:
    """The same entries, with 0 where they are not kept: ReLU and its gradient then leave them out."""
    values_M = torch.where(keep_NK, values_NK, 0.0).flatten()
    return Entries(own.n_columns, own.rows, own.columns, own.row_starts, values_M)


def _nothing(pre_NF: Tensor) -> Entries:
    """No entries, of rows without latents."""
    n = len(pre_NF)
    if pre_NF.device.type == "cpu":
        none = np.empty(0, np.int64)
        return Entries(0, none, none, np.zeros(n + 1, np.int64), np.empty(0, pre_NF.numpy().dtype))
    nowhere = torch.empty(0, dtype=torch.int64, device=pre_NF.device)
    starts = torch.zeros(n + 1, dtype=torch.int64, device=pre_NF.device)
    return Entries(0, nowhere, nowhere, starts, pre_NF.new_empty(0))


def _total(n: int, axis: Axis) -> float:
    return float(axis.sum_(torch.tensor([n], dtype=torch.float64))[0])


def _gathered(values_M: np.ndarray, axis: Axis) -> np.ndarray:
    """Every rank's values, one after the other."""
    found: np.ndarray = np.concatenate(_gathered_parts(values_M, axis))
    return found


def _gathered_parts(values_M: np.ndarray, axis: Axis) -> list[np.ndarray]:
    sizes = axis.gather(torch.tensor([len(values_M)])).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.as_tensor(values_M[:0]).dtype)
    padded[: len(values_M)] = torch.as_tensor(values_M)
    return [part[:size].numpy() for part, size in zip(axis.gather(padded), sizes, strict=True)]


def _first_ties(own: Entries, ties_M: np.ndarray, room: int, share: Share) -> np.ndarray:
    """This rank's entries at the threshold that are among the first `room` of all by (row, latent)."""
    group = share.group
    row_M: Any = own.rows[ties_M]
    if share.place_N is not None:
        row_M = share.place_N.numpy()[row_M]
    widths = group.latents.gather(torch.tensor([own.n_columns])).flatten().tolist()
    key_M = row_M * sum(widths) + own.columns[ties_M] + sum(widths[: group.latents.rank])
    all_keys = np.sort(_gathered(key_M, group.everyone))
    found: np.ndarray = ties_M[key_M <= all_keys[room - 1]] if room else ties_M[:0]
    return found
