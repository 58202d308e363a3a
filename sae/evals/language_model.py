"""What an SAE costs the language model: its loss with the reconstruction spliced in.

Owns the LM-side metrics: clean, spliced, zero-ablated and mean-ablated cross-entropy, CE recovered, KL,
top-1 agreement, and the same error in a random direction. Splicing itself is `actcache.capture.splice`,
so harvest and evaluation cannot disagree about a site. Never reads stored activations.

Definitions:
    The value at the site is replaced on kept positions only (those that are rows of the dataset);
    BOS, padding and special tokens keep theirs. Losses are those predicted *from* kept positions:
    position t predicts token t + 1, where that token exists.
    ce_X = sum of losses / number of them, in nats per token.
    ce_recovered_A = (ce_A - ce_spliced) / (ce_A - ce_clean), A = zero, or mean: the stored mean
    of the train rows. 1 is a perfect reconstruction, 0 is as bad as the ablation.
    kl_X = mean KL(clean || X) in nats per token; kl_score = (kl_zero - kl) / kl_zero (SAEBench).
    top1_agreement = share of predictions whose most likely token is the clean one.
    random: x + ||x - x_hat|| u in place of x, u a random direction drawn anew for each row; kl_ratio =
    kl / kl_random, how much more the SAE's error hurts than a random one of equal norm (Gurnee 2024,
    "SAE reconstruction errors are (empirically) pathological"; there 2 to 4.5).
    Standard errors: delete-one jackknife over documents, numerator and denominator paired.

compat="saelens": the zero ablation replaces every position, BOS and padding included, and KL counts every
    kept position, also the last of a sequence, as SAELens 6 and SAEBench 0.6 do.

Shapes: B sequences of a batch, T tokens, M predictions, V vocabulary, D d_in, G groups.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sae.evals.groups import Grouped, position_bucket, position_range, ratio_error
from sae.evals.rows import EVAL_BATCH
from sae.evals.sequences import TokenBatch

_LOGITS_BYTES = 2**29  # a batch shrinks until its float32 logits fit: 16 x 1024 tokens of GPT-2 are 3.3 GB
PART_SEQUENCES = 2 * EVAL_BATCH

Replacement = Callable[[Tensor, torch.Generator], Tensor]
"""Given the activations [M, D] at the replaced positions and a generator of the batch: the values to put there."""


@dataclass(frozen=True)
class Intervention:
    """What is put at a site."""

    site: str
    replace: Replacement
    everywhere: bool = False
    """Also where no row is kept."""


class Losses:
    """Sums of one intervention by document and by position: n, ce, kl, top1; n_kl where kl counts more."""

    def __init__(self) -> None:
        self.by_document, self.by_position = Grouped(), Grouped()

    def merge(self, other: Self) -> None:
        """Add the predictions of `other`."""
        self.by_document.merge(other.by_document)
        self.by_position.merge(other.by_position)

    @property
    def n_tokens(self) -> int:
        return int(self.by_document["n"].sum()) if self.by_document.sums else 0

    def mean(self, name: str) -> float | None:
        """Of `ce`, `kl` or `top1`, per prediction."""
        if not self.by_document.sums:
            return None
        return _ratio(self.by_document[name].sum(), self.by_document[_count_of(name)].sum())


def _count_of(name: str) -> str:
    return "n_kl" if name == "kl" else "n"


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def measure_losses(
    lm: Any,
    batches: Iterator[TokenBatch],
    interventions: Mapping[str, Intervention],
    compat: str | None = None,
    seed: int = 0,
) -> dict[str, Losses]:
    """Losses over batches of sequences, clean and under every intervention.

    Args:
        lm: an `actcache.lm.LM`.
        batches: of `sequences.token_batches`.
        interventions: by name; "clean" is measured beside them, once.
        compat: "saelens" to count as SAELens does.
        seed: of random replacements; with the number of a batch's first sequence it decides them.
    """
    from actcache.capture import splice

    results = {name: Losses() for name in ("clean", *interventions)}
    for batch in batches:
        step = Step(lm, batch, count_last=compat == "saelens")
        clean_MV = step.log_probs()
        results["clean"].merge(step.losses(clean_MV, clean_MV))
        for name, intervention in interventions.items():
            g = torch.Generator().manual_seed(seed * 2**32 + batch.first)
            replace = on_positions(step, intervention, g)
            with splice(lm.model, {intervention.site: replace}):
                results[name].merge(step.losses(step.log_probs(), clean_MV))
    return results


def batch_size(lm: Any, n_tokens: int) -> int:
    """Sequences per forward pass, at most 16."""
    return max(1, min(EVAL_BATCH, _LOGITS_BYTES // (4 * n_tokens * lm.vocab_size)))


def on_positions(step: "Step", intervention: Intervention, g: torch.Generator) -> Callable[[Tensor], Tensor]:
    def intervene(acts_BTD: Tensor) -> Tensor:
        where_BT = step.kept_BT.to(acts_BTD.device)
        if intervention.everywhere:
            where_BT = torch.ones_like(where_BT)
        out_BTD = acts_BTD.clone()
        out_BTD[where_BT] = intervention.replace(acts_BTD[where_BT].float(), g).to(acts_BTD.dtype)
        return out_BTD

    return intervene


class Step:
    """One batch of sequences: which predictions count, and how to get them from the LM."""

    def __init__(self, lm: Any, batch: TokenBatch, count_last: bool) -> None:
        device = lm.device
        self._lm = lm
        self._input_ids_BT = torch.from_numpy(batch.input_ids_BT).to(device)
        self.kept_BT = torch.from_numpy(batch.kept_BT).to(device)
        length_B = torch.from_numpy(batch.length_B).to(device)
        n_tokens = self._input_ids_BT.shape[1]
        real_BT = torch.arange(n_tokens, device=device) < length_B[:, None]
        has_label_BT = torch.zeros_like(real_BT)
        has_label_BT[:, :-1] = real_BT[:, 1:]
        self._inputs: dict[str, Tensor] = {}
        if batch.position_ids_BT is not None:  # documents kept apart; they are only without an attention mask
            positions_BT = torch.from_numpy(batch.position_ids_BT).to(device)
            self._inputs = {"position_ids": positions_BT}
            has_label_BT[:, :-1] &= positions_BT[:, 1:] > 0
        elif not bool(real_BT.all()):
            self._inputs = {"attention_mask": real_BT.long()}
        counted_BT = self.kept_BT & real_BT & (has_label_BT if not count_last else True)
        self.counted_BT = counted_BT
        next_BT = torch.zeros_like(self._input_ids_BT)
        next_BT[:, :-1] = self._input_ids_BT[:, 1:]
        self.target_M = next_BT[counted_BT]
        self.labelled_M = has_label_BT[counted_BT].cpu().numpy().astype(np.float64)
        counted = counted_BT.cpu().numpy()
        self._document_M = batch.document_BT[counted]
        self._bucket_M = position_bucket(counted.nonzero()[1])

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Float32 logits [M, V] of the next token at the counted positions."""
        out = self._lm.model(self._input_ids_BT, **self._inputs, use_cache=False)
        logits_MV: Tensor = out.logits[self.counted_BT].float()
        return logits_MV

    def log_probs(self) -> Tensor:
        """Their log-probabilities."""
        return self.logits().log_softmax(-1)

    def losses(self, log_probs_MV: Tensor, clean_MV: Tensor) -> Losses:
        """Sums of the cross-entropy, KL(clean || these) and agreement."""
        ce_M = -log_probs_MV.gather(1, self.target_M[:, None])[:, 0].double().cpu().numpy()
        if log_probs_MV is clean_MV:
            kl_M, top1_M = np.zeros_like(ce_M), np.ones_like(ce_M)
        else:
            kl_M = (clean_MV.exp() * (clean_MV - log_probs_MV)).sum(1).double().cpu().numpy()
            top1_M = (log_probs_MV.argmax(1) == clean_MV.argmax(1)).double().cpu().numpy()
        values = {
            "n": self.labelled_M,
            "n_kl": np.ones_like(ce_M),
            "ce": ce_M * self.labelled_M,
            "kl": kl_M,
            "top1": top1_M * self.labelled_M,
        }
        found = Losses()
        found.by_document = Grouped.of(self._document_M, values)
        found.by_position = Grouped.of(self._bucket_M, values)
        return found


def lm_metrics(
    clean: Losses, spliced: Losses, zero: Losses, mean: Losses, random: Losses
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """The figures defined above and, under the same names, standard errors of those that have one."""
    kl, kl_zero, kl_random = spliced.mean("kl"), zero.mean("kl"), random.mean("kl")
    metrics: dict[str, float | None] = {
        "ce_clean": clean.mean("ce"),
        "ce_spliced": spliced.mean("ce"),
        "ce_zero": zero.mean("ce"),
        "ce_mean": mean.mean("ce"),
        "ce_random": random.mean("ce"),
        "kl": kl,
        "kl_zero": kl_zero,
        "kl_mean": mean.mean("kl"),
        "kl_random": kl_random,
        "kl_score": None if kl is None or kl_zero is None else _ratio(kl_zero - kl, kl_zero),
        "kl_ratio": None if kl is None or kl_random is None else _ratio(kl, kl_random),
        "top1_agreement": spliced.mean("top1"),
    }
    if not clean.by_document.sums:
        return {**metrics, "ce_recovered_zero": None, "ce_recovered_mean": None}, {}
    c, s = clean.by_document, spliced.by_document
    errors: dict[str, float | None] = {
        "ce_clean": ratio_error(c["ce"], c["n"]),
        "ce_spliced": ratio_error(s["ce"], s["n"]),
        "kl": ratio_error(s["kl"], s["n_kl"]),
        "top1_agreement": ratio_error(s["top1"], s["n"]),
        "kl_ratio": ratio_error(s["kl"], random.by_document["kl"]),
    }
    for name, ablated in (("zero", zero.by_document), ("mean", mean.by_document)):
        gained_G, possible_G = ablated["ce"] - s["ce"], ablated["ce"] - c["ce"]
        metrics[f"ce_recovered_{name}"] = _ratio(gained_G.sum(), possible_G.sum())
        errors[f"ce_recovered_{name}"] = ratio_error(gained_G, possible_G)
    return metrics, errors


def losses_by_position(
    clean: Losses, spliced: Losses, zero: Losses, context_size: int
) -> list[dict[str, Any]]:
    """Losses of each position bucket; `beyond_context` where the harvested sequences have none."""
    found = []
    for g, bucket in enumerate(clean.by_position.ids_G.tolist()):
        n = clean.by_position["n"][g]
        ce, ce_spliced, ce_zero = (x.by_position["ce"][g] for x in (clean, spliced, zero))
        first, last = position_range(bucket)
        found.append(
            {
                "from": first,
                "to": last,
                "n_tokens": int(n),
                "ce_clean": _ratio(ce, n),
                "ce_spliced": _ratio(ce_spliced, n),
                "ce_recovered_zero": _ratio(ce_zero - ce_spliced, ce_zero - ce),
                "kl": _ratio(spliced.by_position["kl"][g], spliced.by_position["n_kl"][g]),
                "beyond_context": first >= context_size,
            }
        )
    return found


# Replacements


def zeros(acts_MD: Tensor, g: torch.Generator) -> Tensor:
    """Zero ablation."""
    return torch.zeros_like(acts_MD)


def constant(value_D: Tensor) -> Replacement:
    """The same row everywhere."""
    return lambda acts_MD, g: value_D.to(acts_MD.device).expand_as(acts_MD)


def reconstruction(s: Any) -> Replacement:
    """What the SAE makes of it."""

    def replace(acts_MD: Tensor, g: torch.Generator) -> Tensor:
        recon_MD: Tensor = s(acts_MD.to(_device(s)))
        return recon_MD.to(acts_MD.device)

    return replace


def random_error(s: Any) -> Replacement:
    """An error of the SAE's norm in a random direction, row by row."""
    recon = reconstruction(s)

    def replace(acts_MD: Tensor, g: torch.Generator) -> Tensor:
        norm_M = (acts_MD - recon(acts_MD, g)).norm(dim=1, keepdim=True)
        noise_MD = torch.randn(acts_MD.shape, generator=g).to(acts_MD.device)
        return acts_MD + norm_M * torch.nn.functional.normalize(noise_MD, dim=1)

    return replace


def _device(s: Any) -> torch.device:
    return next(iter(s.parameters()), torch.zeros(())).device
