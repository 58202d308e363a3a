"""Ghost grads: dead latents act through an exponential and are asked for half the error.

    e = x - x^ (no gradient),   g = exp(dead pre-activations) W_dec
    g' = g * sg(|e| / (2 |g|))          in each row; sg(.) has no gradient
    G = mean_N |e - g'|^2
    loss = G * sg(mse / G)              as large as the reconstruction error

Jermyn & Templeton 2024, "Ghost grads: an improvement on resampling" (transformer-circuits.pub,
January 2024 update). `scale_by_dead_share` multiplies the loss by n_dead / d_sae, so that few
dead latents disturb little; without it one dead latent weighs as much as all.

Shapes: N rows, D = d_in.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .dead import Dead

_TINY = 1e-30  # against a division by zero in a row without error


@dataclass(frozen=True, kw_only=True)
class GhostGrads:
    """Dead latents get gradients through exp."""

    kind: ClassVar[str] = "ghost"

    scale_by_dead_share: bool = False
    """ghost: weigh the loss by the share of latents that are dead."""

    def loss(self, dead: Dead, error_ND: Tensor, mse: Tensor) -> Tensor:
        view = dead.all()
        ghost_ND = view.decode(view.pre.exp(), dead.own["W_dec_FD"])
        residual_ND = -error_ND.detach()
        norm = torch.linalg.vector_norm
        ratio_N1 = norm(residual_ND, dim=1, keepdim=True) / (2 * norm(ghost_ND, dim=1, keepdim=True) + _TINY)
        squared = (residual_ND - ghost_ND * ratio_N1.detach()).square().sum()
        loss = dead.share.over_rows(squared) / dead.share.n_rows
        loss = loss * (mse / (loss + _TINY)).detach()
        return loss * (dead.n / dead.n_latents) if self.scale_by_dead_share else loss
