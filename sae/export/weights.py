"""The same function with other weights: thresholds for another comparison, norms and biases moved.

Shapes: F = d_sae.
"""

import re
from typing import Any

import torch
from torch import Tensor

from ..core import SAE

BY_AVERAGE = ("batchtopk", "matryoshka")
"""Architectures that are active at or above their threshold."""


def strictly_above(threshold: Tensor, architecture: str) -> Tensor:
    """The threshold strictly above which is active what is active here."""
    if architecture not in BY_AVERAGE:
        return threshold
    # threshold 0 stays 0: a latent of value 0 is not active whatever the comparison
    below = torch.nextafter(threshold, torch.tensor(-torch.inf, dtype=threshold.dtype))
    return torch.where(threshold > 0, below, threshold)


def at_or_above(threshold: Tensor) -> Tensor:
    """The threshold at or above which is active what was so strictly above this one."""
    above = torch.nextafter(threshold, torch.tensor(torch.inf, dtype=threshold.dtype))
    return torch.where(threshold > 0, above, threshold)


def to_unit_norm(s: SAE, threshold_too: bool = True) -> None:
    """Decoder rows to unit norm in place; their norms go into what gives the latents' values."""
    norms_F = torch.linalg.vector_norm(s.W_dec, dim=1).clamp_min(1e-8)
    if torch.allclose(norms_F, torch.ones_like(norms_F)):
        return
    s.W_dec /= norms_F[:, None]
    s.b_enc *= norms_F
    if s.r_mag is not None:
        s.r_mag += norms_F.log()  # the gate is left alone
        return
    s.W_enc *= norms_F
    if s.threshold is not None and threshold_too:
        s.threshold = s.threshold * norms_F


def add_to_pre_activations(s: SAE, hidden_F: Tensor) -> None:
    """Change the biases as if (x - b_dec) W_enc were larger by this."""
    if s.b_gate is not None and s.r_mag is not None:
        s.b_gate += hidden_F
        hidden_F = hidden_F * s.r_mag.exp()
    s.b_enc += hidden_F


def layer_of(hook_name: Any) -> int | None:
    found = re.search(r"\d+", str(hook_name))
    return int(found.group()) if found else None
