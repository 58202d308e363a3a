"""The activations of rows that are not zero, without the dense [N, F] result where the SAE allows it.

Equal to the entries of `SAE.encode` above zero; evaluation and the report read latents through this.
Shapes: N rows, D = d_in, F = d_sae, M activations.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .core import SAE
from .select import Entries, Scratch, above, largest_per_row


@torch.no_grad()
def encode_sparse(s: Any, acts_ND: Tensor, scratch: Scratch) -> Entries:
    """The positive entries of `s.encode(acts_ND)`, on the CPU."""
    pre_NF = _pre_activations(s, acts_ND, scratch) if isinstance(s, SAE) else None
    if pre_NF is None:
        device = next(iter(s.parameters()), torch.zeros(())).device
        return _found(s.encode(acts_ND.to(device)).float(), scratch)
    architecture = s.cfg["architecture"]
    if architecture == "topk":
        return largest_per_row(pre_NF, int(s.cfg["k"]), scratch).positive()
    floor_F = torch.zeros(pre_NF.shape[1])
    if architecture == "jumprelu":
        floor_F = torch.clamp(s.threshold, min=0).expand_as(floor_F)
    elif architecture in ("batchtopk", "matryoshka"):  # active at the threshold, too
        below = torch.nextafter(s.threshold, torch.full_like(s.threshold, -torch.inf))
        floor_F = torch.clamp(below, min=0).expand_as(floor_F)
    return above(pre_NF, floor_F, scratch)


def _pre_activations(s: SAE, acts_ND: Tensor, scratch: Scratch) -> Tensor | None:
    """Before the ReLU, by the operations of `SAE.encode`; None where only `encode` itself will do."""
    if s.device.type != "cpu" or s.dtype != torch.float32 or s.cfg["architecture"] == "gated":
        return None
    out = scratch.get("codes", (len(acts_ND), int(s.cfg["d_sae"])), torch.float32)
    return torch.matmul(acts_ND - s.b_dec, s.W_enc, out=out).add_(s.b_enc)


def _found(latents_NF: Tensor, scratch: Scratch) -> Entries:
    """The positive entries of dense latents; searched where they are, so that few leave a GPU."""
    n, f = latents_NF.shape
    if latents_NF.device.type == "cpu":
        return above(latents_NF.contiguous(), torch.zeros(f), scratch)
    row_M, latent_M = torch.nonzero(latents_NF > 0, as_tuple=True)
    values_M = latents_NF[row_M, latent_M].cpu().numpy()
    rows_M, columns_M = row_M.cpu().numpy(), latent_M.cpu().numpy()
    return Entries(f, rows_M, columns_M, np.searchsorted(rows_M, np.arange(n + 1)), values_M)
