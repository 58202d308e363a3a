"""One training step's loss and gradients: the sparse way, and the dense way that it must equal.

Both evaluate the architecture's formula: the dense step over every latent with plain autograd, the
sparse one over the chosen entries, touching k columns a row except in the encoder matmul. Tests
hold them equal (1e-5 in float32, 1e-10 in float64). Nothing here changes a parameter.

Where ranks share a dictionary (sae/group.py), each computes the loss of the whole batch and all latents,
and differentiates its own part of it: the gradients of its latents, summed over its own rows.

Shapes: N rows, D = d_in, F = d_sae, A dead latents, M chosen entries.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .architectures import Architecture, Moment, Parameters
from .encoder import Selection, exact_values, pre_activations
from .group import ALONE, Share
from .revival import Dead, Resampling
from .select import Scratch
from .select_over_ranks import largest_per_row
from .views import INPUT_BIAS, Chosen, Dense, View

StepKind = Literal["sparse", "dense"]

_DENSE_ABOVE = 1 / 16  # share of all N * F entries, above which matmuls over all of them are faster


@dataclass(frozen=True)
class Outcome:
    """One batch seen by one SAE. Figures are those of the whole batch and all latents, whoever holds them."""

    gradients: Parameters
    """Where ranks share the SAE: of this rank's latents."""
    loss: float
    """What is differentiated: reconstruction, penalties and the loss over dead latents; scaled activations."""
    objective: float
    """`loss` without the loss over dead latents."""
    mse: float
    """mean_N |x - x^|^2, summed over dimensions."""
    row_loss_N: Tensor
    """|x - x^|^2 of each of this rank's rows."""
    n_active: int
    """Active latents in the whole batch."""
    fired_M: Tensor
    """Indices among this rank's latents of those that were active somewhere (repeats allowed)."""
    smallest: float | None
    """The smallest active value, where a threshold is learned from it; None when nothing was active."""
    share: Share
    """This rank's part of the batch."""


def gradients(
    kind: StepKind,
    config: Architecture,
    parameters: Parameters,
    x_ND: Tensor,
    dead_A: Tensor,
    moment: Moment,
    scratch: Scratch,
    selection: Selection = "float32",
    share: Share | None = None,
    n_dead: int | None = None,
) -> Outcome:
    """The step of the given kind.

    Args:
        x_ND: scaled activations, this rank's rows.
        dead_A: indices of the dead among this rank's latents.
        share: this rank's part of the batch; None: one process has all of it.
        n_dead: dead latents of all ranks; None: those of `dead_A`.
    """
    share = share or Share(ALONE, len(x_ND))
    n_dead = len(dead_A) if n_dead is None else n_dead
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    if share.group.latents.world > 1:
        leaves[INPUT_BIAS] = parameters["b_dec_D"].detach().requires_grad_()
    centred_ND = x_ND - leaves["b_dec_D"]
    view, pre_NF = _view(kind, config, leaves, centred_ND, scratch, selection, share)
    terms = config.loss(view, leaves, moment)
    row_loss_N = torch.linalg.vector_norm(terms.error_ND.detach(), dim=1).square_()
    mse = share.over_rows(row_loss_N.sum() / share.n_rows)
    loss = terms.loss
    if config.revive is not None and not isinstance(config.revive, Resampling) and n_dead:
        dead = Dead(centred_ND, leaves, dead_A, n_dead, config.d_sae, pre_NF, scratch, share)
        loss = loss + config.revive.loss(dead, terms.error_ND, mse)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    values = terms.latents.detach()
    active = values > 0
    smallest = loss.new_tensor(torch.inf)
    if config.learns_threshold_by_average and values.numel():
        smallest = torch.where(active, values, torch.inf).min()
    # all figures at once: on a GPU each that is asked for alone would be waited for
    figures = (loss.detach(), mse, active.sum(), smallest, terms.loss.detach())
    figures_W = share.group.everyone.gather(torch.stack([f.double() for f in figures])).tolist()
    loss_now, mse_now, own_active, _, objective = figures_W[share.group.everyone.rank]
    n_active, smallest_now = sum(w[2] for w in figures_W), min(w[3] for w in figures_W)
    if isinstance(view, Chosen):
        columns = torch.as_tensor(view.entries.columns)
        fired_M = columns if own_active == len(columns) else columns[active]
    else:
        fired_M = active.any(0).nonzero()[:, 0]
    gradients_found = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
    if INPUT_BIAS in leaves:
        gradients_found["b_dec_D"] = gradients_found["b_dec_D"] + share.group.latents.sum_(
            gradients_found.pop(INPUT_BIAS)
        )
    return Outcome(
        gradients=gradients_found,
        loss=loss_now,
        objective=objective,
        mse=mse_now,
        row_loss_N=row_loss_N,
        n_active=int(n_active),
        fired_M=fired_M,
        smallest=smallest_now if n_active and config.learns_threshold_by_average else None,
        share=share,
    )


def _view(
    kind: StepKind,
    config: Architecture,
    p: Parameters,
    centred_ND: Tensor,
    scratch: Scratch,
    selection: Selection,
    share: Share,
) -> tuple[View, Tensor | None]:
    """The view to evaluate the loss over, and the pre-activations of all latents where they are at hand."""
    latents = share.group.latents
    first = latents.part(config.d_sae).start
    if kind == "dense":
        with torch.no_grad():
            mask_NF = config.keep(Dense(centred_ND, p).pre)
        return Dense(centred_ND, p, mask_NF, share, first), None
    with torch.no_grad():
        known_ND, k = centred_ND.detach(), config.k_per_row
        pre_NF = pre_activations(known_ND, p, selection, scratch)
        if selection == "bfloat16":
            assert k is not None, "Training.rules refuses others"
            entries = largest_per_row(pre_NF, k, scratch, share, exact_values(known_ND, p)).positive()
        else:
            entries = config.choose(pre_NF, p, scratch, share)
    too_many = len(entries.values) > _DENSE_ABOVE * entries.n_rows * entries.n_columns
    if too_many and not config.by_rank:
        return Dense(centred_ND, p, None, share, first), None
    return Chosen(centred_ND, p, entries, share, first), pre_NF
