"""TopK: every row keeps its k largest latents (Gao et al. 2024, arXiv:2406.04093, sec. 2.3).

    z = ReLU(TopK((x - b_dec) W_enc + b_enc)),    x^ = z W_dec + b_dec
    loss = mean_N |x - x^|^2 + AuxK   (sae/revival/auxk.py)

`k` alone controls L0: it is k wherever at least k pre-activations are positive, fewer where not.
The ReLU is that of the published code (OpenAI, SAELens). Decoder rows are of unit norm. Defaults:
AuxK from Gao et al. sec. 2.4 and A.2; the learning rate is the trainer's, from the same paper.

Shapes: N rows, F = d_sae.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..group import Share
from ..revival import AuxK, Revival
from ..select import Entries, Scratch
from ..select_over_ranks import largest_per_row
from ..views import View
from .base import Architecture, Moment, Parameters, Terms, check_k, squared_error

_AUXK = AuxK()


@dataclass(frozen=True, kw_only=True)
class TopK(Architecture):
    """Every row keeps its k largest latents."""

    architecture: ClassVar[str] = "topk"
    by_rank: ClassVar[bool] = True
    scored_by: ClassVar[Literal["fvu", "loss"]] = "fvu"

    k: int
    """Latents active in each row, e.g. 32; batchtopk and matryoshka: on average over a batch."""

    encoder_norm: float = 1.0
    """Norm of each latent's encoder weights at the start, where decoder rows have 1. topk, batchtopk and
    matryoshka; 1 is the decoder's transpose, as published; 0.1 ends better in short runs."""

    revive: Revival | None = _AUXK

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self.k, self.d_sae)
        if not 0 < self.encoder_norm < math.inf:
            raise ValueError(f"encoder_norm is {self.encoder_norm}; it must be positive")

    @property
    def sparsity(self) -> float:
        return self.k

    @property
    def initial_encoder_norm(self) -> float:
        return self.encoder_norm

    @property
    def k_per_row(self) -> int | None:
        return self.k

    def keep(self, pre_NF: Tensor) -> Tensor:
        chosen = torch.topk(pre_NF, self.k, dim=-1).indices
        return torch.zeros_like(pre_NF).scatter(-1, chosen, 1)

    def choose(self, pre_NF: Tensor, p: Parameters, scratch: Scratch, share: Share) -> Entries:
        return largest_per_row(pre_NF, self.k, scratch, share).positive()

    def loss(self, view: View, p: Parameters, moment: Moment) -> Terms:
        latents = view.kept(torch.relu(view.pre))
        error_ND = view.error(latents, p["W_dec_FD"])
        return Terms(squared_error(error_ND, view.share), error_ND, latents)
