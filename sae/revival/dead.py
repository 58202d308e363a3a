"""The dead latents of one batch, as the losses that revive them see them.

Shapes: N rows, D = d_in, F = d_sae, A dead latents.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..encoder import exact_values
from ..group import Share
from ..select import Scratch
from ..select_over_ranks import largest_per_row
from ..views import INPUT_BIAS, Chosen, Dense, Parameters, View

_DENSE_UP_TO = 256  # dead latents: below this two small matmuls beat selecting entries


@dataclass
class Dead:
    """What a loss over the dead latents may use; differentiable in all parameters."""

    centred_ND: Tensor
    """x - b_dec, differentiable."""
    parameters: Parameters
    index_A: Tensor
    """This rank's dead latents, ascending."""
    n: int
    """Dead latents of all ranks."""
    n_latents: int
    """Latents of all ranks."""
    pre_NF: Tensor | None
    """Pre-activations of all latents where the step has them, undifferentiated, and in bfloat16 where
    latents are selected by it; None: compute."""
    scratch: Scratch
    share: Share

    @cached_property
    def own(self) -> Parameters:
        """This rank's dead latents' parameters."""
        p = self.parameters
        per_latent = {name: p[name][self.index_A] for name in ("W_enc_FD", "b_enc_F", "W_dec_FD")}
        return {**per_latent, **{name: p[name] for name in ("b_dec_D", INPUT_BIAS) if name in p}}

    def all(self) -> View:
        """Every dead latent in every row."""
        return Dense(self.centred_ND, self.own, share=self.share)

    def largest(self, k: int) -> tuple[View, Tensor]:
        """(view, its values): the k largest dead pre-activations of each row, whatever their sign."""
        if k == self.n:
            view = self.all()
            return view, view.pre
        alone = self.share.group.latents.world == 1
        if alone and (self.pre_NF is None or self.n <= max(_DENSE_UP_TO, k)):
            view = self.all()
            chosen = torch.topk(view.pre, k, dim=-1).indices
            return view, view.pre * torch.zeros_like(view.pre).scatter(-1, chosen, 1)
        own = self.own  # gathered here: under no_grad it would be cut off from the parameters
        with torch.no_grad():
            pre_NA = self._pre(own)
            exact = exact_values(self.centred_ND.detach(), own) if pre_NA.dtype == torch.bfloat16 else None
            entries = largest_per_row(pre_NA, k, self.scratch, self.share, exact)
        chosen_view = Chosen(self.centred_ND, own, entries, self.share)
        if alone or not isinstance(entries.values, Tensor):
            return chosen_view, chosen_view.pre
        return chosen_view, chosen_view.pre * (entries.values != 0)  # 0: not among the largest of all ranks

    def _pre(self, own: Parameters) -> Tensor:
        """[N, A]: pre-activations of this rank's dead latents."""
        known_ND = self.centred_ND.detach()
        if self.pre_NF is None:
            return torch.addmm(own["b_enc_F"], known_ND, own["W_enc_FD"].T)
        pre_NA = self.scratch.get(
            "dead", (len(known_ND), len(self.index_A)), self.pre_NF.dtype, known_ND.device
        )
        return torch.index_select(self.pre_NF, 1, self.index_A, out=pre_NA)
