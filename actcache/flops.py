"""Floating point operations of a forward pass up to the deepest of some sites, from a model without weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .families import find_tap
from .lm import is_causal

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """What one token costs on its way to the deepest site."""

    per_token: float
    """Floating point operations; a multiplication and an addition are two."""
    parameters: int
    """Weights of the blocks passed, embeddings left out; of experts those that are active."""
    blocks: int
    """Blocks passed, the one that holds the deepest site as a whole."""
    of_blocks: int
    note: str
    """What the count cannot know about this model; empty where there is nothing."""


def forward_cost(skeleton: nn.Module, sites: Sequence[str], context_size: int) -> ForwardCost:
    """2 P + 2 L T d_attn operations a token, for P weights in the L blocks passed at T tokens in a sequence.

    P counts matrices alone: not embeddings, biases and norms. 2 T d_attn is a layer's attention, queries
    times keys and scores times values, 4 d_attn for each of the T / 2 positions that a token of a causal
    model sees on average (d_attn = heads times d_head); twice that in a model that sees all T. Sliding
    windows and documents kept apart are not deducted, state-space scans not added. This is the usual count
    (Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1) with the causal half taken off attention.
    """
    config: Any = skeleton.config
    text = config.get_text_config()
    path, blocks = _blocks(skeleton, text)
    depth, head = _depth(skeleton, sites, path, len(blocks))
    share, note = _active_share(text, skeleton)
    weights = sum(_weights(block, share) for block in blocks[:depth]) + head
    n_heads = getattr(text, "num_attention_heads", None) or 0
    d_head = getattr(text, "head_dim", None) or (text.hidden_size // n_heads if n_heads else 0)
    seen = context_size / 2 if is_causal(config) else context_size
    return ForwardCost(
        per_token=2 * weights + 4 * seen * n_heads * d_head * depth,
        parameters=round(weights),
        blocks=depth,
        of_blocks=len(blocks),
        note=note,
    )


def _blocks(skeleton: nn.Module, text: Any) -> tuple[str, Sequence[nn.Module]]:
    """Path and modules of the decoder's blocks; the whole model as one where no list of them is found."""
    for path, module in skeleton.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers:
            return path, list(module)
    return "", [skeleton]


def _depth(skeleton: nn.Module, sites: Sequence[str], path: str, n_blocks: int) -> tuple[int, float]:
    """Blocks that run before the deepest site has its value, and weights after them (an unembedding)."""
    if not path:
        return 1, 0.0
    order = [name for name, _ in skeleton.named_modules()]
    depth, head = 0, 0.0
    for site in sites:
        tap = find_tap(skeleton, site)
        if tap.module.startswith(f"{path}."):
            number, _, inside = tap.module[len(path) + 1 :].partition(".")
            depth = max(depth, int(number) + (bool(inside) or tap.side == "out"))
        elif order.index(tap.module) > order.index(path):
            depth = n_blocks
            if tap.side == "out":
                head = max(head, _weights(skeleton.get_submodule(tap.module), 1.0))
    return depth, head


def _weights(module: nn.Module, active_share: float) -> float:
    """Elements of a module's matrices; of experts the share that runs for a token."""
    total = 0.0
    for path, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            expert = "experts" in f"{path}.{name}".split(".")
            total += parameter.numel() * (active_share if expert else 1) if parameter.ndim > 1 else 0
    return total


def _active_share(text: Any, skeleton: nn.Module) -> tuple[float, str]:
    """The share of a mixture's experts that runs for a token, and what is to be said about it."""
    if not any("experts" in path.split(".") for path, _ in skeleton.named_modules()):
        return 1.0, ""
    n, k = (
        next((getattr(text, a) for a in names if getattr(text, a, None)), None)
        for names in (_EXPERTS, _ACTIVE)
    )
    if not n or not k:
        return 1.0, "a mixture of experts whose config does not say how many run for a token: all are counted"
    return k / n, f"a mixture of experts: {k} of {n} are counted for each token"
