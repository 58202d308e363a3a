"""One training step's loss and gradients: the sparse way, and the dense way that it must equal.

The dense step is the plain formula by autograd: slow, and easy to check against the papers. The
sparse step touches k columns a row, except in the encoder matmul; tests hold it equal to the
dense one (1e-5 in float32, 1e-10 in float64). Nothing here changes a parameter.

Shapes: N rows, D = d_in, F = d_sae, A dead latents, M chosen entries.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import auxk, sparse
from .architectures import Config
from .select import Scratch

StepKind = Literal["sparse", "dense"]


@dataclass
class Parameters:
    """What is trained. W_enc is kept as [F, D], so that one row is one latent and the field's
    `W_enc` [D, F] is a view of it."""

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.W_enc_FD, self.b_enc_F, self.W_dec_FD, self.b_dec_D]


@dataclass(frozen=True)
class Outcome:
    """One batch seen by one SAE."""

    gradients: list[Tensor]
    """In the order of `Parameters.tensors`."""
    loss: float
    """mse + AuxK, the quantity that is differentiated; scaled activations."""
    mse: float
    """mean_N |x - x^|^2, summed over dimensions."""
    n_active: int
    """Active latents in the whole batch."""
    fired_M: Tensor
    """Indices of the latents that were active somewhere (repeats allowed)."""
    smallest: float | None
    """The smallest active value; None when nothing was active."""


def gradients(
    kind: StepKind,
    config: Config,
    parameters: Parameters,
    x_ND: Tensor,
    dead_A: Tensor,
    scratch: Scratch,
) -> Outcome:
    """The step of the given kind; `x_ND` are scaled activations, `dead_A` indices of dead latents."""
    if kind == "dense":
        return dense_gradients(config, parameters, x_ND, dead_A)
    return sparse_gradients(config, parameters, x_ND, dead_A, scratch)


def dense_gradients(config: Config, parameters: Parameters, x_ND: Tensor, dead_A: Tensor) -> Outcome:
    """By autograd of the plain formula."""
    leaves = [p.detach().requires_grad_() for p in parameters.tensors()]
    W_enc_FD, b_enc_F, W_dec_FD, b_dec_D = leaves
    pre_NF = (x_ND - b_dec_D) @ W_enc_FD.T + b_enc_F
    latents_NF = config.activate(pre_NF)
    error_ND = latents_NF @ W_dec_FD + b_dec_D - x_ND
    loss = mse = error_ND.square().sum(-1).mean()
    term = auxk.aux_term(config, x_ND.shape[1], len(dead_A))
    if term is not None:
        loss = loss + auxk.dense_loss(pre_NF, W_dec_FD, error_ND, dead_A, term)
    active_NF = latents_NF.detach() > 0
    n_active = int(active_NF.sum())
    return Outcome(
        gradients=list(torch.autograd.grad(loss, leaves)),
        loss=loss.item(),
        mse=mse.item(),
        n_active=n_active,
        fired_M=active_NF.any(0).nonzero()[:, 0],
        smallest=latents_NF.detach()[active_NF].min().item() if n_active else None,
    )


def sparse_gradients(
    config: Config, parameters: Parameters, x_ND: Tensor, dead_A: Tensor, scratch: Scratch
) -> Outcome:
    """The same through the chosen latents alone."""
    n, d = x_ND.shape
    centred_ND = torch.sub(x_ND, parameters.b_dec_D, out=scratch.get("centred", (n, d), x_ND.dtype))
    pre_NF = scratch.get("pre", (n, config.d_sae), x_ND.dtype)
    torch.addmm(parameters.b_enc_F, centred_ND, parameters.W_enc_FD.T, out=pre_NF)
    entries = config.select(pre_NF, scratch)
    values_M, recon_ND = sparse.decode(entries, parameters.W_dec_FD)
    error_ND = torch.sub(recon_ND.detach(), centred_ND, out=scratch.get("error", (n, d), x_ND.dtype))
    loss = mse = torch.vdot(error_ND.view(-1), error_ND.view(-1)) / n
    grad_ND = torch.mul(error_ND, 2 / n, out=scratch.get("grad", (n, d), x_ND.dtype))
    found = sparse.backward(entries, values_M, recon_ND, grad_ND, centred_ND)
    term = auxk.aux_term(config, d, len(dead_A))
    if term is not None:
        loss = loss + auxk.add_gradients(
            found, pre_NF, centred_ND, error_ND, parameters.W_dec_FD, dead_A, term, scratch
        )
    # b_dec is added to the output, and subtracted from the input of every latent
    b_dec_grad_D = grad_ND.sum(0) - found.b_enc_F @ parameters.W_enc_FD
    return Outcome(
        gradients=[found.W_enc_FD, found.b_enc_F, found.W_dec_FD, b_dec_grad_D],
        loss=loss.item(),
        mse=mse.item(),
        n_active=len(entries.values),
        fired_M=torch.from_numpy(entries.columns),
        smallest=float(entries.values.min()) if len(entries.values) else None,
    )
