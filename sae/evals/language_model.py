"""What an SAE costs the language model: its loss with the reconstruction spliced in.

Owns the LM-side metrics: clean, spliced, zero-ablated and mean-ablated cross-entropy, CE
recovered and KL. Splicing itself is `actcache.capture.splice`, so harvest and evaluation cannot
disagree about a site. Never reads stored activations.

Definitions (evaluation version 1):
    The value at the site is replaced on kept positions only (those that are rows of the dataset);
    BOS, padding and special tokens keep theirs. Losses are those predicted *from* kept positions:
    position t predicts token t + 1, where that token exists.
    ce_X = sum of losses / number of them, in nats per token.
    ce_recovered_A = (ce_A - ce_spliced) / (ce_A - ce_clean), A = zero, or mean: the stored mean
    of the train rows. 1 is a perfect reconstruction, 0 is as bad as the ablation.
    kl_X = mean KL(clean || X) in nats per token.
    Standard errors: delete-one jackknife over sequences, numerator and denominator paired.

Shapes: B sequences of a batch, T tokens, S sequences in all, M losses, V vocabulary, D d_in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

_BATCH_SEQUENCES = 16
_LOGITS_BYTES = 2**29  # a batch shrinks until its float32 logits fit: 16 x 1024 tokens of GPT-2 are 3.3 GB

Replacement = Callable[[Tensor], Tensor]
"""Given the kept activations [M, D], the values to put in their place."""


@dataclass
class Losses:
    """Sums of one intervention, one entry per sequence (S), in the order of the sequences."""

    n_tokens: list[int] = field(default_factory=list)
    ce: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def merge(self, other: Self) -> None:
        """Append the sequences of `other`."""
        self.n_tokens += other.n_tokens
        self.ce += other.ce
        self.kl += other.kl

    def mean_ce(self) -> float | None:
        return _ratio(sum(self.ce), sum(self.n_tokens))

    def mean_kl(self) -> float | None:
        return _ratio(sum(self.kl), sum(self.n_tokens))


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def measure_losses(
    lm: Any,
    view: Any,
    interventions: Mapping[str, tuple[str, Replacement]],
    n_sequences: int,
    on_batch: Callable[[int], None] = lambda n: None,
) -> dict[str, Losses]:
    """Losses of the first `n_sequences` sequences of `view`, clean and under every intervention.

    Args:
        lm: an `actcache.lm.LM`.
        view: a dataset, or one split of it.
        interventions: name -> (site, replacement); "clean" is measured beside them, once.
        n_sequences: how many sequences, from the first, in order.
        on_batch: told the number of sequences after each batch.
    """
    from actcache.capture import splice

    results = {name: Losses() for name in ("clean", *interventions)}
    start = 0
    while start < n_sequences:
        batch = view.sequences(slice(start, min(start + _batch_size(lm, view), n_sequences)))
        input_ids_BT = torch.from_numpy(np.asarray(batch.input_ids, np.int64)).to(lm.device)
        length_B = torch.from_numpy(np.asarray(batch.length, np.int64)).to(lm.device)
        kept_BT = torch.from_numpy(np.asarray(batch.kept, bool)).to(lm.device)
        positions_BT = None
        if batch.position_ids is not None:
            positions_BT = torch.from_numpy(batch.position_ids).to(lm.device)
        step = _Batch(lm, input_ids_BT, length_B, kept_BT, positions_BT)
        clean_MV = step.log_probs()
        results["clean"].merge(step.losses(clean_MV, clean_MV))
        for name, (site, replace) in interventions.items():
            with splice(lm.model, {site: _on_kept(kept_BT, replace)}):
                results[name].merge(step.losses(step.log_probs(), clean_MV))
        start += len(length_B)
        on_batch(len(length_B))
    return results


def _batch_size(lm: Any, view: Any) -> int:
    """Sequences per forward pass, at most 16."""
    n_tokens = int(view.sequences(slice(0, 1)).input_ids.shape[1])
    return max(1, min(_BATCH_SEQUENCES, _LOGITS_BYTES // (4 * n_tokens * lm.vocab_size)))


def _on_kept(kept_BT: Tensor, replace: Replacement) -> Replacement:
    def intervene(acts_BTD: Tensor) -> Tensor:
        out_BTD = acts_BTD.clone()
        out_BTD[kept_BT] = replace(acts_BTD[kept_BT].float()).to(acts_BTD.dtype)
        return out_BTD

    return intervene


class _Batch:
    """One batch of sequences: which losses count, and how to get them from the LM."""

    def __init__(
        self,
        lm: Any,
        input_ids_BT: Tensor,
        length_B: Tensor,
        kept_BT: Tensor,
        positions_BT: Tensor | None = None,
    ) -> None:
        n_tokens = input_ids_BT.shape[1]
        real_BT = torch.arange(n_tokens, device=length_B.device) < length_B[:, None]
        self._lm, self._input_ids_BT = lm, input_ids_BT
        self._counted_BT = kept_BT[:, :-1] & real_BT[:, 1:]
        self._inputs: dict[str, Tensor] = {}
        if positions_BT is not None:  # documents kept apart; they are only without an attention mask
            self._inputs = {"position_ids": positions_BT}
            self._counted_BT &= positions_BT[:, 1:] > 0
        elif not bool(real_BT.all()):
            self._inputs = {"attention_mask": real_BT.long()}
        self._target_M = input_ids_BT[:, 1:][self._counted_BT]
        self._sequence_M = self._counted_BT.nonzero()[:, 0]

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        """Float32 log-probabilities [M, V] of the next token at the counted positions."""
        out = self._lm.model(self._input_ids_BT, **self._inputs, use_cache=False)
        return out.logits[:, :-1][self._counted_BT].float().log_softmax(-1)

    def losses(self, log_probs_MV: Tensor, clean_MV: Tensor) -> Losses:
        """Per-sequence sums of the cross-entropy and of KL(clean || these)."""
        ce_M = -log_probs_MV.gather(1, self._target_M[:, None])[:, 0]
        if log_probs_MV is clean_MV:
            kl_M = torch.zeros_like(ce_M)
        else:
            kl_M = (clean_MV.exp() * (clean_MV - log_probs_MV)).sum(1)
        n_sequences = len(self._input_ids_BT)
        sums = [
            torch.zeros(n_sequences, dtype=torch.float64, device=v.device).index_add_(0, self._sequence_M, v)
            for v in (torch.ones_like(ce_M).double(), ce_M.double(), kl_M.double())
        ]
        n_tokens, ce, kl = (s.tolist() for s in sums)
        return Losses([int(n) for n in n_tokens], ce, kl)


def lm_metrics(
    clean: Losses, spliced: Losses, zero: Losses, mean: Losses
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """The figures defined above and, under the same names, standard errors of those that have one."""
    metrics: dict[str, float | None] = {
        "ce_clean": clean.mean_ce(),
        "ce_spliced": spliced.mean_ce(),
        "ce_zero": zero.mean_ce(),
        "ce_mean": mean.mean_ce(),
        "kl": spliced.mean_kl(),
        "kl_zero": zero.mean_kl(),
        "kl_mean": mean.mean_kl(),
    }
    errors: dict[str, float | None] = {}
    for name, ablated in (("zero", zero), ("mean", mean)):
        gained = np.array(ablated.ce) - np.array(spliced.ce)
        possible = np.array(ablated.ce) - np.array(clean.ce)
        metrics[f"ce_recovered_{name}"] = _ratio(gained.sum(), possible.sum())
        errors[f"ce_recovered_{name}"] = _jackknife(gained, possible)
    n_tokens = np.array(clean.n_tokens, np.float64)
    errors["ce_clean"] = _jackknife(np.array(clean.ce), n_tokens)
    errors["ce_spliced"] = _jackknife(np.array(spliced.ce), n_tokens)
    errors["kl"] = _jackknife(np.array(spliced.kl), n_tokens)
    return metrics, errors


def _jackknife(numerator_S: np.ndarray, denominator_S: np.ndarray) -> float | None:
    """Standard error of sum(numerator) / sum(denominator), leaving out one sequence at a time."""
    n = len(numerator_S)
    rest = denominator_S.sum() - denominator_S
    if n < 2 or (rest == 0).any():
        return None
    ratio_S = (numerator_S.sum() - numerator_S) / rest
    return float(np.sqrt((n - 1) / n * np.square(ratio_S - ratio_S.mean()).sum()))
