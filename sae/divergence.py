"""A loss that is not finite: the error, and what caused it."""

import numpy as np
import torch

from actcache.errors import ActcacheError


class NonFiniteLoss(ActcacheError, ArithmeticError):
    """A loss became inf or NaN; the message names the SAE, the step and any bad rows."""


def non_finite(
    name: str, loss: float, acts: "np.ndarray | torch.Tensor", step: int, rows: int, kept: str = ""
) -> NonFiniteLoss:
    """The error for an SAE's loss on a batch.

    Args:
        acts: the rows of the batch, not scaled.
        step: steps before this one.
        rows: rows before this batch.
        kept: says what is kept, after the cause and the remedy.
    """
    acts_ND: np.ndarray = np.asarray(torch.as_tensor(acts).float().cpu())
    bad = np.flatnonzero(~np.isfinite(acts_ND).all(axis=1))
    if len(bad):
        cause = f"{len(bad)} of its {len(acts_ND)} rows hold inf or NaN, first row {bad[0]} of the batch"
        remedy = "Harvest again in a dtype with more range, or leave those rows out."
    else:
        cause = "its rows are finite, so training diverged"
        remedy = "Lower the learning rate or raise lr_warmup_rows, and train into a new directory."
    return NonFiniteLoss(
        f"the loss of {name} is {loss} at step {step + 1} (batch {step}, rows {rows:,} "
        f"to {rows + len(acts_ND):,}): {cause}. {remedy}{kept}"
    )
