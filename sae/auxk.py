"""AuxK: dead latents learn to explain the error that the live ones leave (Gao et al. 2024, sec. A.2).

    e = x - x^ (no gradient),   e^ = sum of the k_aux largest dead pre-activations times W_dec
    AuxK = mean_N |e^ - e|^2,   weighted by aux_coefficient * min(n_dead / k_aux, 1)

The pre-activations are taken before the ReLU, as SAELens does: a dead latent whose
pre-activation is always negative would otherwise get no gradient at all. The factor
min(n_dead / k_aux, 1) (SAELens) keeps a handful of dead latents from being asked to explain everything.

Shapes: N rows, D = d_in, F = d_sae, A dead latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .architectures import Config
from .select import Scratch, largest_per_row
from .sparse import Gradients, backward, decode

_DENSE_UP_TO = 256  # dead latents: below this two small matmuls beat selecting entries


@dataclass(frozen=True)
class AuxTerm:
    """How many dead latents take part in each row, and the loss's weight."""

    k: int
    coefficient: float


def aux_term(config: Config, d_in: int, n_dead: int) -> AuxTerm | None:
    """None when there is nothing to revive or AuxK is off."""
    k_aux = config.k_aux if config.k_aux is not None else max(1, d_in // 2)
    if n_dead == 0 or config.aux_coefficient == 0:
        return None
    return AuxTerm(min(k_aux, n_dead), config.aux_coefficient * min(n_dead / k_aux, 1.0))


def dense_loss(pre_NF: Tensor, W_dec_FD: Tensor, error_ND: Tensor, dead_A: Tensor, term: AuxTerm) -> Tensor:
    """The AuxK loss by autograd; `error_ND` = x^ - x, detached here. The oracle of `add_gradients`."""
    pre_NA = pre_NF[:, dead_A]
    values, columns = torch.topk(pre_NA, term.k, dim=-1)
    latents_NA = torch.zeros_like(pre_NA).scatter(-1, columns, values)
    return term.coefficient * (latents_NA @ W_dec_FD[dead_A] + error_ND.detach()).square().sum(-1).mean()


def add_gradients(
    gradients: Gradients,
    pre_NF: Tensor,
    centred_ND: Tensor,
    error_ND: Tensor,
    W_dec_FD: Tensor,
    dead_A: Tensor,
    term: AuxTerm,
    scratch: Scratch,
) -> Tensor:
    """Add AuxK's gradients of W_enc, W_dec and b_enc; returns the loss (a scalar tensor)."""
    n, n_dead = pre_NF.shape[0], len(dead_A)
    W_dec_AD = W_dec_FD[dead_A]
    pre_NA = scratch.get("dead", (n, n_dead), pre_NF.dtype)
    torch.index_select(pre_NF, 1, dead_A, out=pre_NA)
    if n_dead <= max(_DENSE_UP_TO, term.k):
        parts, loss = _dense(pre_NA, centred_ND, error_ND, W_dec_AD, term)
    else:
        entries = largest_per_row(pre_NA, term.k, scratch)
        values_M, recon_ND = decode(entries, W_dec_AD)
        miss_ND = recon_ND.detach().add_(error_ND)
        loss = torch.vdot(miss_ND.view(-1), miss_ND.view(-1)) * (term.coefficient / n)
        grad_ND = miss_ND.mul_(2 * term.coefficient / n)
        parts = backward(entries, values_M, recon_ND, grad_ND, centred_ND)
    gradients.W_enc_FD.index_add_(0, dead_A, parts.W_enc_FD)
    gradients.W_dec_FD.index_add_(0, dead_A, parts.W_dec_FD)
    gradients.b_enc_F.index_add_(0, dead_A, parts.b_enc_F)
    return loss


def _dense(
    pre_NA: Tensor, centred_ND: Tensor, error_ND: Tensor, W_dec_AD: Tensor, term: AuxTerm
) -> tuple[Gradients, Tensor]:
    n, n_dead = pre_NA.shape
    chosen = None
    if term.k < n_dead:
        columns = torch.topk(pre_NA, term.k, dim=-1, sorted=False).indices
        chosen = torch.zeros_like(pre_NA).scatter_(-1, columns, 1)
    latents_NA = pre_NA if chosen is None else pre_NA * chosen
    miss_ND = torch.addmm(error_ND, latents_NA, W_dec_AD)
    loss = torch.vdot(miss_ND.view(-1), miss_ND.view(-1)) * (term.coefficient / n)
    grad_ND = miss_ND.mul_(2 * term.coefficient / n)
    grad_NA = grad_ND @ W_dec_AD.T
    if chosen is not None:
        grad_NA *= chosen
    return Gradients(grad_NA.T @ centred_ND, grad_NA.sum(0), latents_NA.T @ grad_ND), loss
