"""Gated: one path decides which latents are active, another how much (Rajamanoharan et al. 2024, arXiv:2404.16014).

    h = (x - b_dec) W_enc,    gate = h + b_gate,    magnitude = h * exp(r_mag) + b_mag
    z = [gate > 0] ReLU(magnitude),    x^ = z W_dec + b_dec,    |W_dec_f| = 1
    loss = mean_N [ |x - x^|^2 + l1_coefficient * sum_f ReLU(gate_f)
                    + |x - ReLU(gate) W_dec - b_dec|^2 with W_dec and b_dec held fixed ]   (eq. 7)

The gate's step has no gradient; the penalty and the last term train the gate, and neither can
reach the decoder. `l1_coefficient` controls L0, indirectly, without shrinking values. The bias of
the trainer's pre-activations, `b_enc_F`, is b_gate. Defaults: learning rate 5e-5 and betas
(0, 0.999) as dictionary_learning; nothing for dead latents (the paper resamples as Bricken et al.).

Shapes: N rows, F = d_sae.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..group import Share
from ..select import Entries, Scratch, above
from ..views import View
from .base import Architecture, Moment, Optimiser, Parameters, Terms, check_coefficient, squared_error


@dataclass(frozen=True, kw_only=True)
class Gated(Architecture):
    """A gate with an L1 penalty, and magnitudes without one."""

    architecture: ClassVar[str] = "gated"
    published: ClassVar[Optimiser] = Optimiser(lr=5e-5, betas=(0.0, 0.999))

    l1_coefficient: float
    """Weight of the L1 penalty on the gate; larger gives fewer active latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficient("l1_coefficient", self.l1_coefficient)

    @property
    def sparsity(self) -> float:
        return self.l1_coefficient

    def extra_parameters(self, dtype: torch.dtype) -> Parameters:
        return {name: torch.zeros(self.d_sae, dtype=dtype) for name in ("r_mag_F", "b_mag_F")}

    def choose(self, pre_NF: Tensor, p: Parameters, scratch: Scratch, share: Share) -> Entries:
        return above(pre_NF, pre_NF.new_zeros(()), scratch)

    def loss(self, view: View, p: Parameters, moment: Moment) -> Terms:
        gate = view.pre
        hidden = gate - view.per_entry(p["b_enc_F"])
        magnitude = hidden * view.per_entry(p["r_mag_F"].exp()) + view.per_entry(p["b_mag_F"])
        latents = torch.relu(magnitude) * (gate > 0)
        error_ND = view.error(latents, p["W_dec_FD"])
        opened = torch.relu(gate)
        gate_error_ND = view.decode(opened, p["W_dec_FD"].detach()) - view.centred_ND.detach()
        penalty = self.l1_coefficient * moment.sparsity * view.share.total(opened.sum()) / view.n_rows
        fit = squared_error(error_ND, view.share)
        loss = fit + penalty + squared_error(gate_error_ND, view.share)
        return Terms(loss, error_ND, latents)

    def inference(self, p: Parameters, threshold: float | None) -> dict[str, Tensor]:
        return {"b_enc": p["b_mag_F"], "b_gate": p["b_enc_F"], "r_mag": p["r_mag_F"]}
