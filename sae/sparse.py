"""Encoding and decoding chosen latents, with gradients that touch k columns a row, not d_sae.

Differentiable operations for `sae.views.Chosen`: used for the chosen latents and by AuxK for the
dead ones. On the CPU each sum runs in a fixed order, so the result is deterministic.

Shapes: N rows, D = d_in, F = d_sae, M chosen entries. W_enc is kept as [F, D], so that one row of
it is one latent and the field's `W_enc` [D, F] is a view.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import Array, Entries


def encode(
    entries: Entries, centred_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor
) -> Tensor:
    """`entries.values` [M] as the differentiable pre-activations that they are."""
    found: Tensor = _Encode.apply(entries, centred_ND, W_enc_FD, b_enc_F, b_dec_D)
    return found


def decode(entries: Entries, values_M: Tensor, W_FD: Tensor, bag_M: Array, starts: Array) -> Tensor:
    """[bags, D]: the sum over each bag's entries of value times row of W.

    Args:
        bag_M: the bag of each entry, ascending; `entries.rows` for one bag a row.
        starts: [bags + 1], where each bag starts.
    """
    found: Tensor = _Decode.apply(entries, values_M, W_FD, bag_M, starts)
    return found


def less(recon_ND: Tensor, centred_ND: Tensor, b_dec_D: Tensor) -> Tensor:
    """x^ - x, in the memory of `recon_ND`; `centred_ND` is x - b_dec, and only b_dec is differentiated.

    Three passes over [N, D] fewer than autograd takes for the same: with those of the squared error 3 % of the
    processor time of a step at d_sae 1536.
    """
    found: Tensor = _Less.apply(recon_ND, centred_ND, b_dec_D)
    return found


def pick(values_F: Tensor, entries: Entries) -> Tensor:
    """[M]: `values_F` at each entry's column."""
    found: Tensor = _Pick.apply(values_F, entries)
    return found


def products(columns_M: Array, left_ND: Tensor, right_FD: Tensor, bag_M: Array, starts: Array) -> Tensor:
    """[M]: at each entry the product of its bag's row of `left` and its column's row of `right`.

    The kernel is the one by which `embedding_bag` differentiates its weights: 0.35 ms at N 2048,
    k 16, D 192, where gathering both sides and `bmm` took 4.4.
    """
    found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left_ND.contiguous(),
        right_FD,
        torch.as_tensor(columns_M),
        torch.as_tensor(starts),
        torch.as_tensor(bag_M),
        0,
        -1,
    )
    return found


def _by_latent(entries: Entries, rows_ND: Tensor, weights_M: Tensor, row_M: Array) -> Tensor:
    """[F, D]: for each latent the weighted sum of the rows that its entries name.

    With the entries turned to latent-major order once, this is one `embedding_bag` over rows of
    the batch (0.2 ms against 2.9 for `index_add_`).
    """
    order_M, starts = entries.by_column
    return F.embedding_bag(
        torch.as_tensor(row_M[order_M]),
        rows_ND,
        torch.as_tensor(starts),
        mode="sum",
        per_sample_weights=weights_M[torch.as_tensor(order_M)],
        include_last_offset=True,
    )


def _sum_by_column(values_M: Tensor, entries: Entries) -> Tensor:
    columns_M = torch.as_tensor(entries.columns)
    return torch.bincount(columns_M, values_M.double(), entries.n_columns).to(values_M.dtype)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, entries: Entries, centred_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor
    ) -> Tensor:
        ctx.entries = entries
        ctx.save_for_backward(centred_ND, W_enc_FD)
        return torch.as_tensor(entries.values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_M,) = grads
        centred_ND, W_enc_FD = ctx.saved_tensors
        grad_F = _sum_by_column(grad_M, ctx.entries)
        grad_FD = _by_latent(ctx.entries, centred_ND, grad_M, ctx.entries.rows)
        # b_dec is subtracted from the input of every latent
        return None, None, grad_FD, grad_F, -(grad_F @ W_enc_FD)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, entries: Entries, values_M: Tensor, W_FD: Tensor, bag_M: Array, starts: Array
    ) -> Tensor:
        ctx.entries, ctx.bag_M, ctx.starts = entries, bag_M, starts
        ctx.save_for_backward(values_M, W_FD)
        return F.embedding_bag(
            torch.as_tensor(entries.columns),
            W_FD,
            torch.as_tensor(starts),
            mode="sum",
            per_sample_weights=values_M,
            include_last_offset=True,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_ND = grads[0].contiguous()
        values_M, W_FD = ctx.saved_tensors
        _, of_values, of_W, _, _ = ctx.needs_input_grad
        grad_M = None
        if of_values:
            grad_M = products(ctx.entries.columns, grad_ND, W_FD, ctx.bag_M, ctx.starts)
        grad_FD = _by_latent(ctx.entries, grad_ND, values_M, ctx.bag_M) if of_W else None
        return None, grad_M, grad_FD, None, None


class _Less(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recon_ND: Tensor, centred_ND: Tensor, b_dec_D: Tensor) -> Tensor:
        ctx.mark_dirty(recon_ND)
        return recon_ND.sub_(centred_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, grads[0].sum(0)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_F: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        return values_F[torch.as_tensor(entries.columns)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _sum_by_column(grads[0], ctx.entries), None
