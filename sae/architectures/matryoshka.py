"""Matryoshka: BatchTopK whose first latents must also reconstruct alone (Bussmann et al. 2025, arXiv:2503.17547).

    z as BatchTopK's, chosen once over all latents
    x^_m = z_{1..m} W_dec_{1..m} + b_dec
    loss = sum over prefixes m of mean_N |x - x^_m|^2,  the last prefix being all of d_sae, + AuxK

`k` controls L0 as in BatchTopK, and so does the inference threshold. Prefixes are fixed, or drawn
anew at each step (Nabeshima 2024, "Matryoshka sparse autoencoders", whose lengths follow a
truncated Pareto law: P(length >= l) = l^-power). Defaults: fixed prefixes that
end at 1/32, 3/32, 7/32, 15/32 and all of d_sae, as in the paper and dictionary_learning; the sum
of the losses is the paper's and SAELens' (dictionary_learning takes their mean). Random: power
0.5, as in saev. Latents 0, 1, 2, ... are therefore ordered from coarse to fine.

Shapes: N rows, D = d_in, P prefixes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..views import View
from .base import Moment, Parameters, Terms, squared_error
from .batch_topk import BatchTopK

_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
_PARETO_POWER = 0.5


@dataclass(frozen=True, kw_only=True)
class Matryoshka(BatchTopK):
    """BatchTopK with a reconstruction from each of several prefixes of the latents."""

    architecture: ClassVar[str] = "matryoshka"

    prefixes: tuple[int, ...] | None = None
    """Matryoshka's prefix lengths, ascending; d_sae itself is always one. None: 1/32, 3/32, 7/32
    and 15/32 of d_sae."""

    n_random_prefixes: int = 0
    """Matryoshka prefixes drawn anew at each step in place of the fixed ones, e.g. 10; 0: fixed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.prefixes or ()
        if any(not 1 <= m <= self.d_sae for m in given) or list(given) != sorted(set(given)):
            raise ValueError(
                f"prefixes are {given}; they must ascend, each between 1 and d_sae = {self.d_sae}"
            )
        if not 0 <= self.n_random_prefixes < self.d_sae:
            raise ValueError(
                f"n_random_prefixes is {self.n_random_prefixes}; it must be at least 0 and below d_sae = {self.d_sae}"
            )
        if self.n_random_prefixes and self.prefixes is not None:
            raise ValueError("prefixes and n_random_prefixes are both set; give one of them")

    def moment(self, sparsity: float, generator: torch.Generator) -> Moment:
        if self.n_random_prefixes:
            reaching = torch.arange(1, self.d_sae + 1, dtype=torch.float64) ** -_PARETO_POWER
            drawn = torch.multinomial(-reaching.diff(), self.n_random_prefixes, generator=generator) + 1
            return Moment(sparsity, (*sorted(drawn.tolist()), self.d_sae))
        given = self.prefixes
        if given is None:
            given = tuple(int(share * self.d_sae) for share in _SHARES)
        return Moment(sparsity, tuple(dict.fromkeys(m for m in (*given, self.d_sae) if m)))

    def loss(self, view: View, p: Parameters, moment: Moment) -> Terms:
        latents = view.kept(torch.relu(view.pre))
        recon_PND = view.decode_prefixes(latents, p["W_dec_FD"], moment.prefixes)
        error_PND = recon_PND - view.centred_ND
        return Terms(squared_error(error_PND, view.share), error_PND[-1], latents)
