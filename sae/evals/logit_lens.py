"""What each latent writes into the LM's predictions, from weights alone.

Definitions:
    logit weights of a latent = its decoder row through the final norm's linear part (centred where that
        norm centres, times its gain) times the unembedding: what one unit of it adds to each token's logit,
        up to the norm's scale and later layers. Only for sites of the residual stream's width.
    mean, std, skew, kurtosis: moments of a latent's logit weights over the vocabulary (population moments;
        kurtosis is excess: 0 for a normal distribution). High kurtosis with positive skew: it promotes a few
        tokens; negative skew: it suppresses them (Bloom and Lin 2024, "Understanding SAE features with the
        logit lens").
    enrichment of a token set = the largest |running sum| down the tokens sorted by logit weight, +1/|set| at a
        member and -1/(V - |set|) at another token (token set enrichment analysis, ibid.; the statistic of
        Subramanian et al. 2005 with weight 0). 1: the set is exactly the top, or the bottom.

Shapes: F latents, V vocabulary, D d_in.
"""

import string
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK_VALUES = 2**24


def reads_out(s: Any, lm: Any) -> bool:
    """Whether logit weights are defined: decoder rows as wide as the residual stream, and an unembedding."""
    W_dec = getattr(s, "W_dec", None)
    head = lm.model.get_output_embeddings()
    return W_dec is not None and head is not None and head.weight.shape[1] == W_dec.shape[1]


@torch.no_grad()
def logit_weights(s: Any, lm: Any, latents: Any = slice(None)) -> Tensor:
    """Logit weights [n, V] of some latents, float32, on the LM's device.

    Raises:
        ValueError: the site's width is not the residual stream's, or the model has no unembedding.
    """
    if not reads_out(s, lm):
        raise ValueError(
            f"the SAE of {s.cfg['site']} has no decoder rows of the residual stream's width; no logit weights."
        )
    unembed_VD = lm.model.get_output_embeddings().weight
    gain_D, centres = _final_norm(lm.model, unembed_VD.shape[1])
    rows_ND = s.W_dec[latents].detach().float().to(unembed_VD.device)
    if centres:
        rows_ND = rows_ND - rows_ND.mean(1, keepdim=True)
    weights_NV: Tensor = (rows_ND * gain_D) @ unembed_VD.float().T
    return weights_NV


def _final_norm(model: Any, width: int) -> tuple[Tensor, bool]:
    """Gain of the last norm [D], found by asking it, and whether it subtracts the mean; 1 where none is known."""
    from actcache.capture import site_names
    from actcache.families import find_tap

    device = model.get_output_embeddings().weight.device
    if "ln_final.hook_normalized" not in site_names(model):
        return torch.ones(width, device=device), False
    norm = model.get_submodule(find_tap(model, "ln_final.hook_normalized").module)
    dtype = next(norm.parameters()).dtype
    sign_D = torch.ones(width, device=device, dtype=dtype)
    sign_D[1::2] = -1  # mean 0 and size 1: only the gain changes it
    large_D = 1000 * sign_D
    gain_D = (norm(large_D[None]) - norm(-large_D[None]))[0].float() / 2 * sign_D.float()
    moved = (norm(large_D[None] + 500) - norm(large_D[None])).abs().max()
    return gain_D, bool(moved < 1e-2 * gain_D.abs().max())


def _chunks(s: Any, lm: Any) -> Iterator[tuple[slice, Tensor]]:
    n = len(s.W_dec)
    step = max(1, _CHUNK_VALUES // lm.model.get_output_embeddings().weight.shape[0])
    for start in range(0, n, step):
        here = slice(start, min(start + step, n))
        yield here, logit_weights(s, lm, here)


def logit_moments(s: Any, lm: Any) -> dict[str, np.ndarray]:
    """`logit_mean`, `logit_std`, `logit_skew`, `logit_kurtosis`, float64 [F]; NaN where a row is constant."""
    n = len(s.W_dec)
    out = {name: np.full(n, np.nan) for name in ("logit_mean", "logit_std", "logit_skew", "logit_kurtosis")}
    for here, weights_NV in _chunks(s, lm):
        for name, value in moments(weights_NV).items():
            out[name][here] = value.cpu().numpy()
    return out


def moments(weights_NV: Tensor) -> dict[str, Tensor]:
    """Mean, std, skew and excess kurtosis of each row, float64 [N]; skew and kurtosis NaN for a constant row."""
    x = weights_NV.double()
    mean = x.mean(1)
    x = x - mean[:, None]
    square = x.square()
    variance = square.mean(1)
    return {
        "logit_mean": mean,
        "logit_std": variance.sqrt(),
        "logit_skew": (square * x).mean(1) / variance**1.5,
        "logit_kurtosis": square.square().mean(1) / variance**2 - 3,
    }


def token_sets(tokenizer: Any, vocab_size: int) -> dict[str, np.ndarray]:
    """Sets of token ids by the look of their text; a set that is empty is left out."""
    texts = [tokenizer.decode([i]) if i < len(tokenizer) else "" for i in range(vocab_size)]
    looks = {
        "starts with a space": lambda t: t.startswith(" ") and bool(t.strip()),
        "capitalised": lambda t: t.strip()[:1].isupper() and t.strip()[1:].islower(),
        "upper case": lambda t: len(t.strip()) > 1 and t.strip().isupper(),
        "digits": lambda t: t.strip().isdigit(),
        "punctuation": lambda t: bool(t.strip()) and all(c in string.punctuation for c in t.strip()),
        "white space": lambda t: bool(t) and t.isspace(),
        "begins inside a word": lambda t: t[:1].isalpha(),
        "snake case": lambda t: "_" in t.strip("_ ") and t.strip().replace("_", "").isalnum(),
    }
    sets = {
        name: np.array([i for i, t in enumerate(texts) if look(t)], np.int64) for name, look in looks.items()
    }
    return {name: ids for name, ids in sets.items() if len(ids)}


def enrichment(weights_NV: Tensor, sets: Mapping[str, np.ndarray]) -> Tensor:
    """Enrichment of each set in each row, signed by where the set stands: [N, len(sets)].

    Positive: near the top, promoted; negative: near the bottom.
    """
    order_NV = weights_NV.argsort(1, descending=True)
    vocab_size = weights_NV.shape[1]
    scores = []
    for ids in sets.values():
        step_V = torch.full((vocab_size,), -1 / max(1, vocab_size - len(ids)), device=weights_NV.device)
        step_V[torch.as_tensor(ids, device=weights_NV.device)] = 1 / len(ids)
        running_NV = step_V.double()[order_NV].cumsum(1)
        place_N = running_NV.abs().argmax(1, keepdim=True)
        scores.append(running_NV.gather(1, place_N)[:, 0])
    return torch.stack(scores, 1)


def token_set_columns(s: Any, lm: Any, tokenizer: Any) -> dict[str, Any]:
    """Columns `token_set` (the most enriched set of each latent) and `token_set_score`, signed."""
    sets = token_sets(tokenizer, lm.model.get_output_embeddings().weight.shape[0])
    names = np.array(list(sets))
    best: list[np.ndarray] = []
    score: list[np.ndarray] = []
    for _, weights_NV in _chunks(s, lm):
        score_NS = enrichment(weights_NV, sets)
        index_N = score_NS.abs().argmax(1)
        best.append(names[index_N.cpu().numpy()])
        score.append(score_NS.gather(1, index_N[:, None])[:, 0].cpu().numpy())
    return {"token_set": np.concatenate(best), "token_set_score": np.concatenate(score)}
