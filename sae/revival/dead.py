"""The dead latents of one batch, as the losses that revive them see them.

Shapes: N rows, D = d_in, F = d_sae, A dead latents.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..encoder import exact_values
from ..select import Scratch, largest_per_row
from ..views import Chosen, Dense, Parameters, View

_DENSE_UP_TO = 256  # dead latents: below this two small matmuls beat selecting entries


@dataclass
class Dead:
    """What a loss over the dead latents may use; differentiable in all parameters."""

    centred_ND: Tensor
    """x - b_dec, differentiable."""
    parameters: Parameters
    index_A: Tensor
    """The dead latents, ascending."""
    n_latents: int
    pre_NF: Tensor | None
    """Pre-activations of all latents where the step has them, undifferentiated, and in bfloat16 where
    latents are selected by it; None: compute."""
    scratch: Scratch

    @property
    def n(self) -> int:
        return len(self.index_A)

    @cached_property
    def own(self) -> Parameters:
        """The dead latents' parameters."""
        p = self.parameters
        per_latent = {name: p[name][self.index_A] for name in ("W_enc_FD", "b_enc_F", "W_dec_FD")}
        return {**per_latent, "b_dec_D": p["b_dec_D"]}

    def all(self) -> View:
        """Every dead latent in every row."""
        return Dense(self.centred_ND, self.own)

    def largest(self, k: int) -> tuple[View, Tensor]:
        """(view, its values): the k largest dead pre-activations of each row, whatever their sign."""
        if self.pre_NF is None or self.n <= max(_DENSE_UP_TO, k):
            view = self.all()
            if k == self.n:
                return view, view.pre
            chosen = torch.topk(view.pre, k, dim=-1).indices
            return view, view.pre * torch.zeros_like(view.pre).scatter(-1, chosen, 1)
        known_ND = self.centred_ND.detach()
        pre_NA = self.scratch.get("dead", (len(known_ND), self.n), self.pre_NF.dtype, known_ND.device)
        torch.index_select(self.pre_NF, 1, self.index_A, out=pre_NA)
        own = self.own  # gathered here: under no_grad it would be cut off from the parameters
        with torch.no_grad():
            exact = exact_values(known_ND, own) if pre_NA.dtype == torch.bfloat16 else None
            entries = largest_per_row(pre_NA, k, self.scratch, exact)
        chosen_view = Chosen(self.centred_ND, own, entries)
        return chosen_view, chosen_view.pre
