"""AuxK: dead latents learn to explain the error that the live ones leave (Gao et al. 2024, sec. A.2).

    e = x - x^ (no gradient),   e^ = sum of the k_aux largest dead pre-activations times W_dec
    loss = coefficient * min(n_dead / k_aux, 1) * mean_N |e^ - e|^2

The pre-activations are taken before the ReLU, as SAELens does: a dead latent whose
pre-activation is always negative would otherwise get no gradient at all. The factor
min(n_dead / k_aux, 1) (SAELens) keeps a handful of dead latents from being asked to explain
everything. Defaults: coefficient 1/32 from the paper, k_aux d_in / 2 as SAELens and
dictionary_learning.

Shapes: N rows, D = d_in.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .dead import Dead


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """Dead latents explain the error."""

    kind: ClassVar[str] = "auxk"

    k_aux: int | None = None
    """auxk: dead latents that explain each row's error. None: d_in / 2."""

    aux_coefficient: float = 1 / 32
    """auxk: weight of the loss."""

    def __post_init__(self) -> None:
        if self.k_aux is not None and self.k_aux < 1:
            raise ValueError(f"k_aux is {self.k_aux}; it must be at least 1, or None for d_in / 2")
        if not 0 <= self.aux_coefficient < float("inf"):
            raise ValueError(f"aux_coefficient is {self.aux_coefficient}; it must be finite and not negative")

    def loss(self, dead: Dead, error_ND: Tensor, mse: Tensor) -> Tensor:
        k_aux = self.k_aux if self.k_aux is not None else max(1, dead.centred_ND.shape[1] // 2)
        view, values = dead.largest(min(k_aux, dead.n))
        miss_ND = view.decode(values, dead.own["W_dec_FD"]) + error_ND.detach()
        weight = self.aux_coefficient * min(dead.n / k_aux, 1.0)
        return weight * dead.share.over_rows(miss_ND.square().sum()) / dead.share.n_rows
