"""Resampling: dead latents start again where the SAE is worst (Bricken et al. 2023, "Neuron resampling").

Every `every_rows` rows, at most `times` times, each dead latent takes a row of the batch at hand,
drawn with probability proportional to its squared loss. With u the unit vector of x - b_dec:
    W_dec_f = u * mean norm of the live decoder rows (1 where rows are of unit norm)
    W_enc_f = u * encoder_scale * mean norm of the live encoder rows,   b_enc_f = 0
and its Adam moments, and other parameters, as at the start. Defaults: encoder_scale 0.2 and four
times (after 25, 50, 75 and 100 thousand steps of 8,192 rows) from the paper, which drew from
819,200 rows where we draw from the batch at hand, as dictionary_learning.

Shapes: N rows, D = d_in, F = d_sae, A dead latents.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..group import ALONE, Axis
from ..views import Parameters


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """Dead latents restart at badly reconstructed rows."""

    kind: ClassVar[str] = "resample"

    every_rows: int = 204_800_000
    """resample: rows between resamplings, e.g. a tenth of the run; the default is the paper's."""

    times: int = 4
    """resample: how often at most."""

    encoder_scale: float = 0.2
    """resample: norm of the new encoder rows, as a share of the live ones' mean norm."""

    def __post_init__(self) -> None:
        for name in ("every_rows", "times"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.encoder_scale < float("inf"):
            raise ValueError(f"encoder_scale is {self.encoder_scale}; it must be positive")

    def due(self, rows_before: int, n_rows: int) -> bool:
        """Whether a step of `n_rows` after `rows_before` ends with a resampling."""
        done, now = rows_before // self.every_rows, (rows_before + n_rows) // self.every_rows
        return now > done and done < self.times

    def renew(
        self,
        p: Parameters,
        initial: Parameters,
        x_ND: Tensor,
        row_loss_N: Tensor,
        dead_A: Tensor,
        generator: torch.Generator,
        latents: Axis = ALONE.latents,
    ) -> None:
        """Overwrite this rank's dead latents' parameters.

        Args:
            initial: starting values of the extra parameters.
            x_ND, row_loss_N: the whole batch.
            generator: in one state on all ranks, which draw for the dead latents of all.
            latents: the ranks that hold the other latents.
        """
        dead_L = latents.gather(torch.tensor([len(dead_A)], device=x_ND.device)).flatten().tolist()
        weights_N = row_loss_N.double().square()
        if not sum(dead_L) or not weights_N.sum() > 0:
            return
        drawn = torch.multinomial(weights_N.cpu(), sum(dead_L), replacement=True, generator=generator)
        first = sum(dead_L[: latents.rank])
        drawn_A = drawn[first : first + len(dead_A)].to(x_ND.device)
        u_AD = x_ND[drawn_A] - p["b_dec_D"]
        u_AD = u_AD / torch.linalg.vector_norm(u_AD, dim=1, keepdim=True).clamp_min(1e-12)
        live_F = torch.ones(len(p["b_enc_F"]), dtype=torch.bool, device=x_ND.device)
        live_F[dead_A] = False
        n_live = latents.sum_(live_F.sum())
        if not n_live:  # all are dead: their own norms are all there is
            live_F[:] = True
            n_live = latents.sum_(live_F.sum())
        for name, scale in (("W_dec_FD", 1.0), ("W_enc_FD", self.encoder_scale)):
            norms = latents.sum_(torch.linalg.vector_norm(p[name][live_F], dim=1).sum())
            p[name][dead_A] = u_AD * (scale * norms / n_live)
        p["b_enc_F"][dead_A] = 0
        for name, values_F in initial.items():
            p[name][dead_A] = values_F.to(x_ND.device)[dead_A]
