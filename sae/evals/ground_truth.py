"""How much of a known truth an SAE has found: for data whose features were planted.

Definitions, as SAELens' evaluation of synthetic data and SynthSAEBench (arXiv:2602.14687):
    mcc = mean |cosine| of decoder rows and features, matched one to one for the largest sum
    uniqueness = different features that are nearest to some latent / latents
    precision, recall, f1: each latent as a detector (active or not) of the feature nearest to it, mean over
        latents

Shapes: N rows, F latents, G features, D dimensions.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.evals.geometry import mean_matched, unit_decoder


@torch.no_grad()
def ground_truth_scores(s: Any, features_GD: Tensor, truth_NG: Tensor, acts_ND: Tensor) -> dict[str, float]:
    """Scores against planted features.

    Args:
        s: an SAE with `W_dec`.
        features_GD: directions of the features.
        truth_NG: their activations on the rows; only whether they are 0 matters.
        acts_ND: the rows.
    """
    unit_FD = unit_decoder(s)
    if unit_FD is None:
        raise ValueError("the SAE has no decoder rows to match with features")
    cosine_FG = (unit_FD @ torch.nn.functional.normalize(features_GD.float(), dim=1).T).abs()
    nearest_F = cosine_FG.argmax(1)
    on_NF = s.encode(acts_ND) != 0
    true_NF = (truth_NG != 0)[:, nearest_F]
    both_F = (on_NF & true_NF).sum(0)
    on_F, true_F = on_NF.sum(0), true_NF.sum(0)
    return {
        "mcc": mean_matched(cosine_FG.cpu().numpy().astype(np.float64)),
        "uniqueness": len(nearest_F.unique()) / len(nearest_F),
        "precision": float((both_F / on_F.clamp(min=1)).mean()),
        "recall": float((both_F / true_F.clamp(min=1)).mean()),
        "f1": float((2 * both_F / (on_F + true_F).clamp(min=1)).mean()),
    }
