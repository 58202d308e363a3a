"""Choosing latents by torch operations alone, for pre-activations that are on a GPU.

The same sets as sae/select.py, but for ties, which fall as `torch.topk` has them. Groups of
neighbouring columns are ranked by their maxima first: the k largest values lie in the k groups with
the largest maxima, so only those are looked into, and all columns are read once. Nothing here
waits for the GPU but `above`, whose result has the size that it has.

Shapes: N rows, F = d_sae, G groups.
"""

import torch
from torch import Tensor

_GROUP = 32


def top_columns(pre_NF: Tensor, k: int) -> Tensor:
    """[N, k]: columns of each row's k largest values, ascending; NaN counts as largest."""
    n, f = pre_NF.shape
    if f % _GROUP or f // _GROUP <= k:
        return torch.topk(pre_NF, k).indices.sort(dim=1).values
    groups_NGS = pre_NF.view(n, f // _GROUP, _GROUP)
    group_Nk = torch.topk(groups_NGS.amax(2), k).indices
    inside_NC = torch.take_along_dim(groups_NGS, group_Nk.unsqueeze(2), 1).view(n, k * _GROUP)
    at_Nk = torch.topk(inside_NC, k).indices
    columns_Nk = group_Nk.gather(1, at_Nk // _GROUP) * _GROUP + at_Nk % _GROUP
    return columns_Nk.sort(dim=1).values


def top_places(pre_NF: Tensor, n_entries: int) -> Tensor:
    """[n_entries]: flat indices of the batch's largest values, ascending."""
    flat = pre_NF.reshape(1, -1)
    return top_columns(flat, min(n_entries, flat.shape[1]))[0]


def row_starts(rows_M: Tensor, n: int) -> Tensor:
    """[N + 1]: where each row's entries start; `rows_M` ascends."""
    return torch.searchsorted(rows_M, torch.arange(n + 1, device=rows_M.device))


def by_column(columns_M: Tensor, n_columns: int) -> tuple[Tensor, Tensor]:
    """(order, starts) as `Entries.by_column`."""
    sorted_M, order_M = torch.sort(columns_M, stable=True)
    return order_M, row_starts(sorted_M, n_columns)
