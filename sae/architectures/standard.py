"""Standard: ReLU latents with an L1 penalty (Bricken et al. 2023, "Towards monosemanticity").

    z = ReLU((x - b_dec) W_enc + b_enc),    x^ = z W_dec + b_dec
    loss = mean_N [ |x - x^|^2 + l1_coefficient * sum_f z_f |W_dec_f| ]     (decoder "free")
    loss = mean_N [ |x - x^|^2 + l1_coefficient * sum_f z_f ],  |W_dec_f| = 1   (decoder "unit")

"free" is the form of Anthropic's April 2024 update (transformer-circuits.pub/2024/april-update):
decoder rows have any norm, and weighting by it leaves no gain in shrinking latents. "unit" is the
form of 2023. `l1_coefficient` controls L0, indirectly: about 5 in the update's units (mean norm
sqrt(d), the trainer's default), and L0 must be read off the metrics. Values are shrunk by it.
Defaults from the update: learning rate 5e-5, the penalty's weight rising over the first twentieth
of the run, decoder rows of norm 0.1 at the start with the encoder their transpose. The update does
not subtract b_dec from the input, as 2023 and SAELens do; the two differ by b_enc alone.
Dead latents: nothing by default (as the update); 2023 used resampling.

Shapes: N rows, F = d_sae.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..group import Share
from ..select import Entries, Scratch, above
from ..views import View
from .base import Architecture, Moment, Optimiser, Parameters, Terms, check_coefficient, squared_error


@dataclass(frozen=True, kw_only=True)
class Standard(Architecture):
    """ReLU and an L1 penalty."""

    architecture: ClassVar[str] = "standard"
    published: ClassVar[Optimiser] = Optimiser(lr=5e-5)

    l1_coefficient: float
    """Weight of the L1 penalty, e.g. 5 with activations of mean norm sqrt(d_in); larger gives
    fewer active latents. standard and gated."""

    decoder: Literal["free", "unit"] = "free"
    """standard: `free` weights the penalty by decoder norms; `unit` keeps decoder rows at norm 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficient("l1_coefficient", self.l1_coefficient)
        if self.decoder not in ("free", "unit"):
            raise ValueError(f"decoder is {self.decoder!r}; it must be one of free, unit")

    @property
    def sparsity(self) -> float:
        return self.l1_coefficient

    @property
    def l0_control(self) -> tuple[object, ...]:
        return self.l1_coefficient, self.decoder

    @property
    def decoder_norm(self) -> Literal["unit", "free"]:
        return self.decoder

    @property
    def initial_norm(self) -> float:
        return 0.1 if self.decoder == "free" else 1.0

    def choose(self, pre_NF: Tensor, p: Parameters, scratch: Scratch, share: Share) -> Entries:
        return above(pre_NF, pre_NF.new_zeros(()), scratch)

    def loss(self, view: View, p: Parameters, moment: Moment) -> Terms:
        latents = torch.relu(view.pre)
        error_ND = view.error(latents, p["W_dec_FD"])
        l1_F = view.per_latent(latents)
        if self.decoder == "free":
            l1_F = l1_F * torch.linalg.vector_norm(p["W_dec_FD"], dim=1)
        penalty = self.l1_coefficient * moment.sparsity * view.share.total(l1_F.sum()) / view.n_rows
        return Terms(squared_error(error_ND, view.share) + penalty, error_ND, latents)
