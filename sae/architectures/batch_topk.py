"""BatchTopK: a batch of N rows keeps its k * N largest latents (Bussmann et al. 2024, arXiv:2412.06410).

    z = ReLU(BatchTopK((x - b_dec) W_enc + b_enc)),    x^ = z W_dec + b_dec
    loss as TopK's (sae/architectures/topk.py)

Training: `k` is the mean L0 of a batch; rows take more or fewer as they need. Inference: a latent
is active where its pre-activation is at least `threshold`, the estimate of the paper's
E[min positive activation] (sec. 3): a moving average of each batch's smallest chosen value. Its
rate is 0.1 (saev; SAELens 0.01, dictionary_learning 0.001): the threshold moves with the weights,
and after 78 steps an average of 100 batches gave an inference L0 of 1.6 where 0.1 stays
near k; the noise between batches is about 1 %. It starts at the first batch's value, not at 0.
Defaults are TopK's.

Shapes: N rows, F = d_sae.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..group import Share
from ..select import Entries, Scratch
from ..select_over_ranks import largest_in_batch
from .base import Parameters
from .topk import TopK

THRESHOLD_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class BatchTopK(TopK):
    """Each batch of N rows keeps its k * N largest latents; a fixed threshold at inference."""

    architecture: ClassVar[str] = "batchtopk"
    learns_threshold_by_average: ClassVar[bool] = True

    @property
    def k_per_row(self) -> int | None:
        return None

    def keep(self, pre_NF: Tensor) -> Tensor:
        flat = pre_NF.reshape(-1)
        chosen = torch.topk(flat, self.k * pre_NF.shape[0]).indices
        return torch.zeros_like(flat).scatter(0, chosen, 1).view_as(pre_NF)

    def choose(self, pre_NF: Tensor, p: Parameters, scratch: Scratch, share: Share) -> Entries:
        return largest_in_batch(pre_NF, self.k * share.n_rows, scratch, share)

    def inference(self, p: Parameters, threshold: float | None) -> dict[str, Tensor]:
        # nothing fired yet: no latent may fire at inference either
        value = math.inf if threshold is None else threshold
        return {"b_enc": p["b_enc_F"], "threshold": torch.tensor(value, dtype=p["b_enc_F"].dtype)}


def update_threshold(threshold: float | None, smallest: float) -> float:
    """The moving average after a batch whose smallest chosen value is `smallest`."""
    return smallest if threshold is None else threshold + THRESHOLD_RATE * (smallest - threshold)
