"""Two ways to evaluate one loss formula: over every latent, or over the chosen entries.

An architecture writes its loss in terms of a view. `Dense` holds [N, F] and leaves everything to
autograd: slow and easy to check. `Chosen` holds one value for each chosen entry, and its `pre`
and `decode` carry hand-written gradients (sae/sparse.py) that touch those entries only. Where the
entries cover all that is not zero, both give the same loss and the same gradients. Both take
x - b_dec already made, and differentiable: it is made once a step. Where a group of ranks trains
(sae/group.py), a view holds this rank's rows and latents, `decode` gives the reconstruction by all latents, and
`share` sums the rest.

Shapes: N rows, D = d_in, F = d_sae, M chosen entries, P prefixes. "Per entry" is [N, F] or [M].
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sparse
from .group import ALONE, Share
from .select import Entries

Parameters = dict[str, Tensor]
"""One SAE's W_enc_FD, b_enc_F, W_dec_FD, b_dec_D and what its architecture adds. Where latents are sharded, a
rank holds its range of them, and `INPUT_BIAS` beside b_dec_D."""

INPUT_BIAS = "b_in_D"
"""b_dec as the encoder subtracts it, where latents are sharded: its gradient is a sum over ranks, that of b_dec
in the reconstruction is whole on each. Absent where one process holds all latents."""


class View(Protocol):
    """What a loss formula may use."""

    @property
    def pre(self) -> Tensor:
        """Pre-activations (x - b_dec) W_enc + b_enc, per entry."""

    @property
    def centred_ND(self) -> Tensor:
        """x - b_dec."""

    @property
    def n_rows(self) -> int:
        """Rows of the whole batch."""

    @property
    def share(self) -> Share:
        """This rank's part of the batch."""

    def per_entry(self, values_F: Tensor) -> Tensor:
        """A value of each latent, per entry."""

    def per_latent(self, values: Tensor) -> Tensor:
        """[F]: per-entry values summed over this rank's rows."""

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

    def __init__(
        self,
        centred_ND: Tensor,
        p: Parameters,
        mask_NF: Tensor | None = None,
        share: Share | None = None,
        first: int = 0,
    ) -> None:
        self.share = share or Share(ALONE, len(centred_ND))
        self.n_rows, self._first = self.share.n_rows, first
        self.centred_ND, self.mask_NF = centred_ND, mask_NF
        entering_ND = centred_ND
        if INPUT_BIAS in p:
            entering_ND = _Entering.apply(centred_ND.detach(), p[INPUT_BIAS])
        self.pre = entering_ND @ p["W_enc_FD"].T + p["b_enc_F"]

    def per_entry(self, values_F: Tensor) -> Tensor:
        return values_F.expand_as(self.pre)

    def per_latent(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def kept(self, values: Tensor) -> Tensor:
        return values if self.mask_NF is None else values * self.mask_NF

    def decode(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        return self.share.over_latents(values @ W_dec_FD)

    def error(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        return self.decode(values, W_dec_FD) - self.centred_ND

    def decode_prefixes(self, values: Tensor, W_dec_FD: Tensor, ends: Sequence[int]) -> Tensor:
        own = [max(end - self._first, 0) for end in ends]  # slices end where this rank's latents do
        return self.share.over_latents(torch.stack([values[:, :end] @ W_dec_FD[:end] for end in own]))


class Chosen:
    """The entries alone."""

    def __init__(
        self,
        centred_ND: Tensor,
        p: Parameters,
        entries: Entries,
        share: Share | None = None,
        first: int = 0,
    ) -> None:
        self.share = share or Share(ALONE, len(centred_ND))
        self.n_rows, self._first = self.share.n_rows, first
        self.entries, self.centred_ND = entries, centred_ND
        self._b_dec_D = p["b_dec_D"]
        b_in_D = p.get(INPUT_BIAS, self._b_dec_D)
        self.pre = sparse.encode(entries, centred_ND.detach(), p["W_enc_FD"], p["b_enc_F"], b_in_D)

    def per_entry(self, values_F: Tensor) -> Tensor:
        return sparse.pick(values_F, self.entries)

    def per_latent(self, values: Tensor) -> Tensor:
        zeros_F = values.new_zeros(self.entries.n_columns)
        return zeros_F.index_add(0, torch.as_tensor(self.entries.columns), values)

    def kept(self, values: Tensor) -> Tensor:
        return values

    def decode(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        entries = self.entries
        return self.share.over_latents(
            sparse.decode(entries, values, W_dec_FD, entries.rows, entries.row_starts)
        )

    def error(self, values: Tensor, W_dec_FD: Tensor) -> Tensor:
        return sparse.less(self.decode(values, W_dec_FD), self.centred_ND.detach(), self._b_dec_D)

    def decode_prefixes(self, values: Tensor, W_dec_FD: Tensor, ends: Sequence[int]) -> Tensor:
        e, n_groups = self.entries, len(ends)
        columns_M = torch.as_tensor(e.columns)
        ends_P = torch.tensor(ends, device=columns_M.device)
        group_M = torch.bucketize(columns_M + self._first, ends_P, right=True)
        bag_M = torch.as_tensor(e.rows) * n_groups + group_M  # ascending, for columns ascend within a row
        starts = F.pad(torch.bincount(bag_M, minlength=e.n_rows * n_groups).cumsum(0), (1, 0))
        parts = sparse.decode(e, values, W_dec_FD, bag_M, starts)
        parts = self.share.over_latents(parts)
        return parts.view(e.n_rows, n_groups, -1).cumsum(1).transpose(0, 1)


class _Entering(torch.autograd.Function):
    """x - b_dec as it is, differentiable in the encoder's b_dec alone."""

    @staticmethod
    def forward(ctx: Any, centred_ND: Tensor, b_in_D: Tensor) -> Tensor:
        return centred_ND.view_as(centred_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, -grads[0].sum(0)
