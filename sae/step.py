"""One training step's loss and gradients: the sparse way, and the dense way that it must equal.

Both evaluate the architecture's formula: the dense step over every latent with plain autograd, the
sparse one over the chosen entries, touching k columns a row except in the encoder matmul. Tests
hold them equal (1e-5 in float32, 1e-10 in float64). Nothing here changes a parameter.

Shapes: N rows, D = d_in, F = d_sae, A dead latents, M chosen entries.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .architectures import Architecture, Moment, Parameters
from .encoder import Selection, exact_values, pre_activations
from .revival import Dead, Resampling
from .select import Scratch, largest_per_row
from .views import Chosen, Dense, View

StepKind = Literal["sparse", "dense"]

_DENSE_ABOVE = 1 / 16  # share of all N * F entries, above which matmuls over all of them are faster


@dataclass(frozen=True)
class Outcome:
    """One batch seen by one SAE."""

    gradients: Parameters
    loss: float
    """What is differentiated: reconstruction, penalties and the loss over dead latents; scaled activations."""
    mse: float
    """mean_N |x - x^|^2, summed over dimensions."""
    row_loss_N: Tensor
    """|x - x^|^2 of each row."""
    n_active: int
    """Active latents in the whole batch."""
    fired_M: Tensor
    """Indices of the latents that were active somewhere (repeats allowed)."""
    smallest: float | None
    """The smallest active value, where a threshold is learned from it; None when nothing was active."""


def gradients(
    kind: StepKind,
    config: Architecture,
    parameters: Parameters,
    x_ND: Tensor,
    dead_A: Tensor,
    moment: Moment,
    scratch: Scratch,
    selection: Selection = "float32",
) -> Outcome:
    """The step of the given kind; `x_ND` are scaled activations, `dead_A` indices of dead latents."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    centred_ND = x_ND - leaves["b_dec_D"]
    view, pre_NF = _view(kind, config, leaves, centred_ND, scratch, selection)
    terms = config.loss(view, leaves, moment)
    row_loss_N = torch.linalg.vector_norm(terms.error_ND.detach(), dim=1).square_()
    mse = row_loss_N.mean()
    loss = terms.loss
    if config.revive is not None and not isinstance(config.revive, Resampling) and len(dead_A):
        dead = Dead(centred_ND, leaves, dead_A, config.d_sae, pre_NF, scratch)
        loss = loss + config.revive.loss(dead, terms.error_ND, mse)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    values = terms.latents.detach()
    active = values > 0
    smallest = (
        torch.where(active, values, torch.inf).min() if config.learns_threshold_by_average else loss.detach()
    )
    # all figures at once: on a GPU each that is asked for alone would be waited for
    figures = (loss.detach(), mse, active.sum(), smallest)
    loss_now, mse_now, n_active, smallest_now = torch.stack([f.double() for f in figures]).tolist()
    if isinstance(view, Chosen):
        columns = torch.as_tensor(view.entries.columns)
        fired_M = columns if n_active == len(columns) else columns[active]
    else:
        fired_M = active.any(0).nonzero()[:, 0]
    return Outcome(
        gradients={
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        },
        loss=loss_now,
        mse=mse_now,
        row_loss_N=row_loss_N,
        n_active=int(n_active),
        fired_M=fired_M,
        smallest=smallest_now if n_active and config.learns_threshold_by_average else None,
    )


def _view(
    kind: StepKind,
    config: Architecture,
    p: Parameters,
    centred_ND: Tensor,
    scratch: Scratch,
    selection: Selection,
) -> tuple[View, Tensor | None]:
    """The view to evaluate the loss over, and the pre-activations of all latents where they are at hand."""
    if kind == "dense":
        with torch.no_grad():
            mask_NF = config.keep(Dense(centred_ND, p).pre)
        return Dense(centred_ND, p, mask_NF), None
    with torch.no_grad():
        known_ND, k = centred_ND.detach(), config.k_per_row
        pre_NF = pre_activations(known_ND, p, selection, scratch)
        if selection == "bfloat16":
            assert k is not None, "Training.rules refuses others"
            entries = largest_per_row(pre_NF, k, scratch, exact_values(known_ND, p)).positive()
        else:
            entries = config.choose(pre_NF, p, scratch)
    too_many = len(entries.values) > _DENSE_ABOVE * entries.n_rows * entries.n_columns
    if too_many and not config.by_rank:
        return Dense(centred_ND, p), None
    return Chosen(centred_ND, p, entries), pre_NF
