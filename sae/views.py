"""Two ways to evaluate one loss formula: over every latent, or over the chosen entries.

An architecture writes its loss in terms of a view. `Dense` holds [N, F] and leaves everything to
autograd: slow and easy to check. `Chosen` holds one value for each chosen entry, and its `pre`
and `decode` carry hand-written gradients (sae/sparse.py) that touch those entries only. Where the
entries cover all that is not zero, both give the same loss and the same gradients. Both take
x - b_dec already made, and differentiable: it is made once a step.

Shapes: N rows, D = d_in, F = d_sae, M chosen entries, P prefixes. "Per entry" is [N, F] or [M].
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sparse
from .select import Entries

Parameters = dict[str, Tensor]
"""Of one SAE: W_enc_FD, b_enc_F, W_dec_FD, b_dec_D and what its architecture adds."""


class View(Protocol):
    """What a loss formula may use."""

    @property
    def pre(self) -> Tensor:
        """Pre-activations (x - b_dec) W_enc + b_enc, per entry."""

    @property
    def centred_ND(self) -> Tensor:
        """x - b_dec."""

    @property
    def n_rows(self) -> int: ...

    def per_entry(self, values_F: Tensor) -> Tensor:
        """A value of each latent, per entry."""

    def per_latent(self, values: Tensor) -> Tensor:
        """[F]: per-entry values summed over the rows."""

    def kept(self, values: Tensor) -> Tensor:
        """Zero where a rank-based architecture did not choose the entry."""

    def decode(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        """[N, D]: z W_dec, without b_dec."""

    def error(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        """[N, D]: x^ - x."""

    def decode_prefixes(self, values: Tensor, W_dec_FD: Tensor, ends: Sequence[int]) -> Tensor:
        """[P, N, D]: z W_dec through the first `ends[p]` latents; `ends` ascending, the last F."""


class Dense:
    """Every latent, by plain operations."""

    def __init__(self, centred_ND: Tensor, p: Parameters, mask_NF: Tensor | None = None) -> None:
        self.centred_ND = centred_ND
        self.pre = self.centred_ND @ p["W_enc_FD"].T + p["b_enc_F"]
        self.mask_NF = mask_NF
        self.n_rows = len(centred_ND)

    def per_entry(self, values_F: Tensor) -> Tensor:
        return values_F.expand_as(self.pre)

    def per_latent(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def kept(self, values: Tensor) -> Tensor:
        return values if self.mask_NF is None else values * self.mask_NF

    def decode(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        return values @ W_dec_FD

    def error(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        return values @ W_dec_FD - self.centred_ND

    def decode_prefixes(self, values: Tensor, W_dec_FD: Tensor, ends: Sequence[int]) -> Tensor:
        return torch.stack([values[:, :end] @ W_dec_FD[:end] for end in ends])


class Chosen:
    """The entries alone."""

    def __init__(self, centred_ND: Tensor, p: Parameters, entries: Entries) -> None:
        self.entries, self.n_rows, self.centred_ND = entries, entries.n_rows, centred_ND
        self._b_dec_D = p["b_dec_D"]
        self.pre = sparse.encode(entries, centred_ND.detach(), p["W_enc_FD"], p["b_enc_F"], p["b_dec_D"])

    def per_entry(self, values_F: Tensor) -> Tensor:
        return sparse.pick(values_F, self.entries)

    def per_latent(self, values: Tensor) -> Tensor:
        zeros_F = values.new_zeros(self.entries.n_columns)
        return zeros_F.index_add(0, torch.as_tensor(self.entries.columns), values)

    def kept(self, values: Tensor) -> Tensor:
        return values

    def decode(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        return sparse.decode(self.entries, values, W_dec_FD, self.entries.rows, self.entries.row_starts)

    def error(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        return sparse.less(self.decode(values, W_dec_FD), self.centred_ND.detach(), self._b_dec_D)

    def decode_prefixes(self, values: Tensor, W_dec_FD: Tensor, ends: Sequence[int]) -> Tensor:
        e, n_groups = self.entries, len(ends)
        columns_M = torch.as_tensor(e.columns)
        group_M = torch.bucketize(columns_M, torch.tensor(ends, device=columns_M.device), right=True)
        bag_M = torch.as_tensor(e.rows) * n_groups + group_M  # ascending, for columns ascend within a row
        starts = F.pad(torch.bincount(bag_M, minlength=e.n_rows * n_groups).cumsum(0), (1, 0))
        parts = sparse.decode(e, values, W_dec_FD, bag_M, starts)
        return parts.view(e.n_rows, n_groups, -1).cumsum(1).transpose(0, 1)
