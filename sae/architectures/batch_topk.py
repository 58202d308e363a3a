"""BatchTopK: a batch of N rows keeps its k * N largest latents (Bussmann et al. 2024, arXiv:2412.06410).

    z = ReLU(BatchTopK((x - b_dec) W_enc + b_enc)),    x^ = z W_dec + b_dec
    loss as TopK's (sae/architectures/topk.py)

Training: `k` is the mean L0 of a batch; rows take more or fewer as they need. Inference: a latent
is active where its pre-activation is at least `threshold`, the estimate of the paper's
E[min positive activation] (sec. 3): a moving average of each batch's smallest chosen value. Its
rate is 0.1 (saev; SAELens 0.01, dictionary_learning 0.001): the threshold moves with the weights,
and after 78 steps an average of 100 batches gave an inference L0 of 1.6 where 0.1 stays
near k; the noise between batches is about 1 %. It starts at the first batch's value, not at 0.

Shapes: N rows, F = d_sae.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..select import Entries, Scratch, largest_in_batch
from . import checks

THRESHOLD_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """Each batch of N rows keeps its k * N largest latents; a fixed threshold at inference."""

    architecture: ClassVar[str] = "batchtopk"
    has_threshold: ClassVar[bool] = True

    d_sae: int
    """Number of latents (the SAE's width), e.g. 8 to 64 times d_in."""

    k: int
    """Latents active in a row on average (mean L0), e.g. 32."""

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
        """Dense, differentiable latents of one batch."""
        flat = pre_NF.reshape(-1)
        values, chosen = torch.topk(flat, self.k * pre_NF.shape[0])
        return torch.zeros_like(flat).scatter(0, chosen, torch.relu(values)).view_as(pre_NF)

    def select(self, pre_NF: Tensor, scratch: Scratch) -> Entries:
        """The same latents as `activate`, as entries."""
        return largest_in_batch(pre_NF, self.k * pre_NF.shape[0], scratch)


def update_threshold(threshold: float | None, smallest: float) -> float:
    """The moving average after a batch whose smallest chosen value is `smallest`."""
    return smallest if threshold is None else threshold + THRESHOLD_RATE * (smallest - threshold)
