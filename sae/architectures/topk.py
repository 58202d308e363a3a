"""TopK: every row keeps its k largest latents (Gao et al. 2024, arXiv:2406.04093, sec. 2.3).

    z = ReLU(TopK((x - b_dec) W_enc + b_enc)),    x^ = z W_dec + b_dec
    loss = mean_N |x - x^|^2 + aux_coefficient * min(n_dead / k_aux, 1) * AuxK   (sae/auxk.py)

`k` alone controls L0: it is k wherever at least k pre-activations are positive, fewer where not.
The ReLU is that of the published code (OpenAI, SAELens). Defaults: `aux_coefficient` 1/32 and
AuxK itself from Gao et al. sec. 2.4 and A.2; `k_aux` d_in / 2 as SAELens and dictionary_learning.

Shapes: N rows, F = d_sae.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..select import Entries, Scratch, largest_per_row
from . import checks


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Every row keeps its k largest latents."""

    architecture: ClassVar[str] = "topk"
    has_threshold: ClassVar[bool] = False

    d_sae: int
    """Number of latents (the SAE's width), e.g. 8 to 64 times d_in."""

    k: int
    """Latents active in each row (its L0), e.g. 32."""

    k_aux: int | None = None
    """Dead latents that AuxK lets explain each row's error. None: d_in / 2."""

    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss, which revives dead latents; 0 turns it off."""

    site: str | None = None
    """Where in the model the activations come from, e.g. blocks.3.hook_resid_post. None: the
    stream's only site."""

    def __post_init__(self) -> None:
        checks.sparse(self)

    def activate(self, pre_NF: Tensor) -> Tensor:
        """Dense, differentiable latents."""
        values, columns = torch.topk(pre_NF, self.k, dim=-1)
        return torch.zeros_like(pre_NF).scatter(-1, columns, torch.relu(values))

    def select(self, pre_NF: Tensor, scratch: Scratch) -> Entries:
        """The same latents as `activate`, as entries."""
        return largest_per_row(pre_NF, self.k, scratch).positive()
