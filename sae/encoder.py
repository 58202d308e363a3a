"""The encoder matmul over every latent, in float32 or, to select by, in bfloat16.

Owns the one part of a sparse step that touches all d_sae columns of a row. No gradients here.

Shapes: N rows, D = d_in, F = d_sae, C candidates.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .select import Array, Exact, Scratch
from .sparse import products
from .views import Parameters

Selection = Literal["float32", "bfloat16"]


def pre_activations(centred_ND: Tensor, p: Parameters, selection: Selection, scratch: Scratch) -> Tensor:
    """[N, F] in a buffer that the next call overwrites; rounded where the selection is bfloat16."""
    x_ND, W_FD, b_F = centred_ND, p["W_enc_FD"], p["b_enc_F"]
    if selection == "bfloat16":
        x_ND, W_FD, b_F = x_ND.bfloat16(), W_FD.bfloat16(), b_F.bfloat16()
    out = scratch.get("pre", (len(x_ND), len(b_F)), x_ND.dtype, x_ND.device)
    return torch.addmm(b_F, x_ND, W_FD.T, out=out)


def exact_values(centred_ND: Tensor, p: Parameters) -> Exact:
    """What `largest_per_row` ranks rounded candidates by."""

    def exact(rows_C: Array, columns_C: Array, starts: Array) -> Array:
        values_C = products(columns_C, centred_ND, p["W_enc_FD"], rows_C, starts)
        values_C.add_(p["b_enc_F"][torch.as_tensor(columns_C)])
        return values_C.numpy() if isinstance(columns_C, np.ndarray) else values_C

    return exact
