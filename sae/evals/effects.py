"""What one latent does to the LM's predictions: taken out (ablation), or added (steering).

Definitions:
    ablation replaces x by x - f_i W_dec[i] at kept positions, f_i the latent's activation: the SAE's error
        and all other latents stay. Measured at the kept positions where it fires.
    steering replaces x by x + alpha W_dec[i] at kept positions, whatever the activation; measured at all.
    logit_change = mean over the measured positions of the change of each token's logit;
    kl = mean KL(clean || changed), ce_change = mean change of the loss, in nats.

Shapes: M measured positions, V vocabulary, D d_in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.evals.language_model import Intervention, Replacement, Step, batch_size, on_positions
from sae.evals.sequences import token_batches


@dataclass(frozen=True)
class Effect:
    """Means over `n_tokens` positions; None where there is none."""

    n_tokens: int
    kl: float | None
    ce_change: float | None
    """Over the positions that have a next token."""
    logit_change_V: np.ndarray
    """float64 [V]."""

    def top(self, k: int = 10) -> tuple[list[int], list[int]]:
        """Token ids whose logits rise and fall the most."""
        order = np.argsort(-self.logit_change_V, kind="stable")
        return order[:k].tolist(), order[::-1][:k].tolist()


def ablate(s: Any, lm: Any, view: Any, latent: int, n_sequences: int = 64) -> Effect:
    """The effect of taking one latent out, over the first `n_sequences` sequences of a split.

    Raises:
        ValueError: the SAE has no such latent.
    """
    row_D = _row(s, latent)

    def activation(acts_MD: Tensor) -> Tensor:
        value: Tensor = s.encode(acts_MD.to(row_D.device))[..., latent].to(acts_MD.device)
        return value

    def replace(acts_MD: Tensor, g: torch.Generator) -> Tensor:
        return acts_MD - activation(acts_MD)[:, None] * row_D.to(acts_MD.device)

    return _effect(s, lm, view, replace, n_sequences, lambda acts: activation(acts) != 0)


def steer(s: Any, lm: Any, view: Any, latent: int, alpha: float, n_sequences: int = 64) -> Effect:
    """The effect of adding `alpha` times a latent's decoder row at every kept position.

    Raises:
        ValueError: the SAE has no such latent.
    """
    row_D = _row(s, latent)

    def replace(acts_MD: Tensor, g: torch.Generator) -> Tensor:
        return acts_MD + alpha * row_D.to(acts_MD.device)

    return _effect(s, lm, view, replace, n_sequences, None)


def _row(s: Any, latent: int) -> Tensor:
    d_sae = int(s.cfg["d_sae"])
    if not 0 <= latent < d_sae:
        raise ValueError(f"latent is {latent}; this SAE has latents 0 to {d_sae - 1}")
    row_D: Tensor = s.W_dec[latent].detach().float()
    return row_D


@torch.no_grad()
def _effect(
    s: Any,
    lm: Any,
    view: Any,
    replace: Replacement,
    n_sequences: int,
    measured: Callable[[Tensor], Tensor] | None,
) -> Effect:
    from actcache.capture import splice

    site, g = s.cfg["site"], torch.Generator()
    n, n_labelled, kl, ce = 0, 0.0, 0.0, 0.0
    change_V = np.zeros(lm.model.get_output_embeddings().weight.shape[0])
    stop = min(n_sequences, view.n_sequences)
    n_tokens = int(view.sequences(np.arange(1)).input_ids.shape[1])
    for batch in token_batches(view, 0, stop, batch_size(lm, n_tokens)):
        step = Step(lm, batch, count_last=True)
        seen: list[Tensor] = []

        def look(acts_BTD: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(acts_BTD)
            return acts_BTD

        with splice(lm.model, {site: look}):
            clean_MV = step.logits()
        with splice(lm.model, {site: on_positions(step, Intervention(site, replace), g)}):
            changed_MV = step.logits()
        if measured is not None:
            acts_MD = seen[0][step.counted_BT.to(seen[0].device)].float()
            take_M = measured(acts_MD).to(clean_MV.device)
            clean_MV, changed_MV = clean_MV[take_M], changed_MV[take_M]
        else:
            take_M = torch.ones(len(clean_MV), dtype=torch.bool, device=clean_MV.device)
        clean_logp, changed_logp = clean_MV.log_softmax(-1), changed_MV.log_softmax(-1)
        n += len(clean_MV)
        change_V += (changed_MV - clean_MV).double().sum(0).cpu().numpy()
        kl += float((clean_logp.exp() * (clean_logp - changed_logp)).sum())
        has_label_M = torch.from_numpy(step.labelled_M).to(take_M.device)[take_M]
        target_M = step.target_M[take_M][:, None]
        loss_change_M = (clean_logp.gather(1, target_M) - changed_logp.gather(1, target_M))[:, 0].double()
        ce += float((loss_change_M * has_label_M).sum())
        n_labelled += float(has_label_M.sum())
    return Effect(n, kl / n if n else None, ce / n_labelled if n_labelled else None, change_V / max(n, 1))
