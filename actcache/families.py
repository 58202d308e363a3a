"""Sites: where in a Hugging Face model each TransformerLens hook name has its value.

A family is one function from a decoder's config to a table: site name -> `Tap`, or the reason
why that name does not exist in such a model. Adding a name is adding a row; capture and splice
read the same row. Names, globs and near misses are resolved here too. Nothing here runs a model.

Conventions (weights are never folded, centred or rescaled; head sites are flattened to [B, T, heads * d_head]):

- `hook_embed` is what the token embedding module returns: without GPT-2's positions, with Gemma's
  factor sqrt(d_model).
- `hook_attn_out` and `hook_mlp_out` are what is added to the residual stream, so in Gemma 2 and 3
  they lie after the post-attention and post-feedforward norms.
- `*.hook_normalized` is the norm's whole output, weight and bias included: what the next layer reads.
  TransformerLens, unless it has folded them, has the hook before them.
- `attn.hook_q` and `attn.hook_k` lie before rotary embedding and before Qwen 3's and Gemma 3's q/k norms.
- `mlp.hook_pre` is the gate's pre-activation in gated MLPs; `mlp.hook_post` is what the down projection reads.
- GPT-NeoX with parallel residual has no `hook_resid_mid`, and its `ln2` reads `hook_resid_pre`.

Any other place is named by its module path from the model's root, with `:in` (its first tensor
argument) or `:out` (what it returns, or the first item of that).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from torch import nn

from .errors import SpecError


@dataclass(frozen=True)
class Tap:
    """Where a site's value passes: into or out of one module, whole or some of its columns."""

    module: str
    """Path of the module: `{}` stands for the block's number, from the decoder in a table, else from the root."""
    side: str
    """`in`: the module's first tensor argument; `out`: what it returns, or the first item of that."""
    columns: tuple[int, ...] | range | None = None
    """Columns of the last dimension that belong to the site (fused projections); None: all."""
    kept_by_caller: bool = False
    """The calling block holds this tensor too and adds it to the residual later, so a splice must
    overwrite it in place. Only for tensors that nothing else aliases (a fresh sum)."""
    clone: bool = False
    """Copy on capture: the module is unknown, so a later in-place operation cannot be ruled out."""


Table = dict[str, Tap | str]


def _into(module: str, **kwargs: Any) -> Tap:
    return Tap(module, "in", **kwargs)


def _out(module: str, **kwargs: Any) -> Tap:
    return Tap(module, "out", **kwargs)


def _gpt2(config: Any) -> Table:
    d = config.hidden_size
    return {
        "hook_embed": _out("wte"),
        "blocks.{}.hook_resid_pre": _into("h.{}"),
        "blocks.{}.ln1.hook_normalized": _out("h.{}.ln_1"),
        "blocks.{}.attn.hook_q": _out("h.{}.attn.c_attn", columns=range(0, d)),
        "blocks.{}.attn.hook_k": _out("h.{}.attn.c_attn", columns=range(d, 2 * d)),
        "blocks.{}.attn.hook_v": _out("h.{}.attn.c_attn", columns=range(2 * d, 3 * d)),
        "blocks.{}.attn.hook_z": _into("h.{}.attn.c_proj"),
        "blocks.{}.hook_attn_out": _out("h.{}.attn"),
        "blocks.{}.hook_resid_mid": _into("h.{}.ln_2", kept_by_caller=True),
        "blocks.{}.ln2.hook_normalized": _out("h.{}.ln_2"),
        "blocks.{}.mlp.hook_pre": _out("h.{}.mlp.c_fc"),
        "blocks.{}.mlp.hook_post": _into("h.{}.mlp.c_proj"),
        "blocks.{}.hook_mlp_out": _out("h.{}.mlp"),
        "blocks.{}.hook_resid_post": _out("h.{}"),
        "ln_final.hook_normalized": _out("ln_f"),
    }


def _gpt_neo(config: Any) -> Table:
    # GPT-2's blocks with projections of their own, one module deeper.
    return _gpt2(config) | {
        "blocks.{}.attn.hook_q": _out("h.{}.attn.attention.q_proj"),
        "blocks.{}.attn.hook_k": _out("h.{}.attn.attention.k_proj"),
        "blocks.{}.attn.hook_v": _out("h.{}.attn.attention.v_proj"),
        "blocks.{}.attn.hook_z": _into("h.{}.attn.attention.out_proj"),
    }


@lru_cache(maxsize=64)
def _interleaved(n_heads: int, d_head: int, part: int) -> tuple[int, ...]:
    """Columns of q, k or v (part 0, 1, 2) in GPT-NeoX's projection, laid out head by head as [q|k|v]."""
    return tuple(h * 3 * d_head + part * d_head + i for h in range(n_heads) for i in range(d_head))


def _gpt_neox(config: Any) -> Table:
    heads = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    qkv = "layers.{}.attention.query_key_value"
    resid_mid: Tap | str = _into("layers.{}.post_attention_layernorm", kept_by_caller=True)
    if config.use_parallel_residual:
        resid_mid = "attention and MLP run in parallel on hook_resid_pre, there is no residual in between"
    return {
        "hook_embed": _out("embed_in"),
        "blocks.{}.hook_resid_pre": _into("layers.{}"),
        "blocks.{}.ln1.hook_normalized": _out("layers.{}.input_layernorm"),
        "blocks.{}.attn.hook_q": _out(qkv, columns=_interleaved(*heads, 0)),
        "blocks.{}.attn.hook_k": _out(qkv, columns=_interleaved(*heads, 1)),
        "blocks.{}.attn.hook_v": _out(qkv, columns=_interleaved(*heads, 2)),
        "blocks.{}.attn.hook_z": _into("layers.{}.attention.dense"),
        "blocks.{}.hook_attn_out": _out("layers.{}.attention"),
        "blocks.{}.hook_resid_mid": resid_mid,
        "blocks.{}.ln2.hook_normalized": _out("layers.{}.post_attention_layernorm"),
        "blocks.{}.mlp.hook_pre": _out("layers.{}.mlp.dense_h_to_4h"),
        "blocks.{}.mlp.hook_post": _into("layers.{}.mlp.dense_4h_to_h"),
        "blocks.{}.hook_mlp_out": _out("layers.{}.mlp"),
        "blocks.{}.hook_resid_post": _out("layers.{}"),
        "ln_final.hook_normalized": _out("final_layer_norm"),
    }


def _llama(config: Any) -> Table:
    return {
        "hook_embed": _out("embed_tokens"),
        "blocks.{}.hook_resid_pre": _into("layers.{}"),
        "blocks.{}.ln1.hook_normalized": _out("layers.{}.input_layernorm"),
        "blocks.{}.attn.hook_q": _out("layers.{}.self_attn.q_proj"),
        "blocks.{}.attn.hook_k": _out("layers.{}.self_attn.k_proj"),
        "blocks.{}.attn.hook_v": _out("layers.{}.self_attn.v_proj"),
        "blocks.{}.attn.hook_z": _into("layers.{}.self_attn.o_proj"),
        "blocks.{}.hook_attn_out": _out("layers.{}.self_attn"),
        "blocks.{}.hook_resid_mid": _into("layers.{}.post_attention_layernorm", kept_by_caller=True),
        "blocks.{}.ln2.hook_normalized": _out("layers.{}.post_attention_layernorm"),
        "blocks.{}.mlp.hook_pre": _out("layers.{}.mlp.gate_proj"),
        "blocks.{}.mlp.hook_post": _into("layers.{}.mlp.down_proj"),
        "blocks.{}.hook_mlp_out": _out("layers.{}.mlp"),
        "blocks.{}.hook_resid_post": _out("layers.{}"),
        "ln_final.hook_normalized": _out("norm"),
    }


def _gemma(config: Any) -> Table:
    # `|` keeps the order of _llama's rows; only what Gemma's four norms change is named here.
    return _llama(config) | {
        "blocks.{}.hook_attn_out": _out("layers.{}.post_attention_layernorm"),
        "blocks.{}.hook_resid_mid": _into("layers.{}.pre_feedforward_layernorm", kept_by_caller=True),
        "blocks.{}.ln2.hook_normalized": _out("layers.{}.pre_feedforward_layernorm"),
        "blocks.{}.hook_mlp_out": _out("layers.{}.post_feedforward_layernorm"),
    }


def _phi3(config: Any) -> Table:
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    qkv = "layers.{}.self_attn.qkv_proj"
    return _llama(config) | {
        "blocks.{}.attn.hook_q": _out(qkv, columns=range(0, q)),
        "blocks.{}.attn.hook_k": _out(qkv, columns=range(q, q + kv)),
        "blocks.{}.attn.hook_v": _out(qkv, columns=range(q + kv, q + 2 * kv)),
        "blocks.{}.mlp.hook_pre": _out(
            "layers.{}.mlp.gate_up_proj", columns=range(0, config.intermediate_size)
        ),
    }


# By the decoder's `config.model_type`. A multimodal model is found by its text decoder.
_FAMILIES: dict[str, Callable[[Any], Table]] = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "phi3": _phi3,
}

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def _decoder(model: nn.Module) -> tuple[str, int, Table] | None:
    """Path prefix, number of blocks and table of the first module that is a decoder of a known family."""
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        family = _FAMILIES.get(getattr(config, "model_type", ""))
        if config is None or family is None:
            continue
        table = family(config)
        first = table["blocks.{}.hook_resid_pre"]
        assert isinstance(first, Tap)
        if hasattr(module, first.module.split(".")[0]):
            return (f"{path}." if path else ""), config.num_hidden_layers, table
    return None


def _expand(table: Table, n_blocks: int) -> list[tuple[str, Tap | str]]:
    """Every (name, row) of the model in forward order: before the blocks, block by block, after them."""
    rows = list(table.items())
    of_block = [i for i, (name, _) in enumerate(rows) if "{}" in name]
    first, last = of_block[0], of_block[-1] + 1
    blocks = [(name.format(n), row) for n in range(n_blocks) for name, row in rows[first:last]]
    return rows[:first] + blocks + rows[last:]


def site_names(model: nn.Module) -> list[str]:
    """Every TransformerLens-style site of `model`, in forward order; empty when its family is unknown.

    Sites by module path (`transformer.h.3.mlp:out`) exist beside these for any model.
    """
    decoder = _decoder(model)
    if decoder is None:
        return []
    _, n_blocks, table = decoder
    return [name for name, row in _expand(table, n_blocks) if isinstance(row, Tap)]


def find_tap(model: nn.Module, site: str) -> Tap:
    """The tap of one site, with its module path from the model's root.

    Raises:
        SpecError: no such site; names the nearest ones, or why this model has none.
    """
    if ":" in site:
        path, _, side = site.rpartition(":")
        if side in ("in", "out") and path and _has_module(model, path):
            return Tap(path, side, clone=True)
        raise _unknown(model, site)
    decoder = _decoder(model)
    if decoder is None:
        raise _unknown(model, site)
    prefix, n_blocks, table = decoder
    block = _BLOCK.match(site)
    number = block.group(1) if block else ""
    in_range = block is None or (int(number) < n_blocks and str(int(number)) == number)
    row = table.get(_BLOCK.sub("blocks.{}.", site, count=1)) if in_range and "{}" not in site else None
    if not isinstance(row, Tap):
        raise _unknown(model, site)
    return replace(row, module=prefix + row.module.format(number))


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _path_names(model: nn.Module) -> list[str]:
    return [f"{path}:{side}" for path, _ in model.named_modules() if path for side in ("in", "out")]


def _unknown(model: nn.Module, site: str) -> SpecError:
    """The error for a name or glob that matches no site: why, or what is near."""
    kind = type(model).__name__
    decoder = _decoder(model)
    if decoder is not None:
        rows = _expand(decoder[2], decoder[1])
        pattern = _as_regex(site)
        reason = next((row for name, row in rows if isinstance(row, str) and pattern.fullmatch(name)), None)
        if reason is not None:
            return SpecError(f"{kind} has no site {site!r}: {reason}. Choose another site.")
    names = _path_names(model) if ":" in site or decoder is None else site_names(model)
    near = get_close_matches(site, names, n=4, cutoff=0.5)
    if decoder is None and ":" not in site:
        near = near or [name for name in names if name.endswith(":out")][:4]
        return SpecError(
            f"{kind} has no site {site!r}: its family has no TransformerLens names here; "
            f"name a module path with :in or :out, such as {', '.join(near)}."
        )
    blocks = f"; its blocks are 0 to {decoder[1] - 1}" if decoder is not None and "blocks." in site else ""
    hint = f"Near names: {', '.join(near)}." if near else "See actcache.capture.site_names(model)."
    return SpecError(f"{kind} has no site {site!r}{blocks}. {hint}")


def _alternatives(pattern: str) -> Iterable[str]:
    """`pattern` with every brace written out: `{1,3}` is 1 and 3, `{4..6}` is 4, 5 and 6."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern]
    options: list[str] = []
    for option in brace.group(1).split(","):
        ends = re.fullmatch(r"\s*(\d+)\.\.(\d+)\s*", option)
        options += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [option.strip()]
    head, tail = pattern[: brace.start()], pattern[brace.end() :]
    return [written for option in options for written in _alternatives(head + option + tail)]


def _as_regex(pattern: str) -> re.Pattern[str]:
    """A glob over dotted names: `*` and `?` stay between two dots, `**` crosses them, `[0-3]` is one character."""
    pieces = re.split(r"(\*\*|\*|\?|\[[\w-]+\])", pattern)
    wild = {"**": ".*", "*": r"[^.:]*", "?": r"[^.:]"}
    # Odd pieces are what the split's group caught: wildcards and classes. The rest is literal.
    parts = [wild.get(p, p) if i % 2 else re.escape(p) for i, p in enumerate(pieces)]
    try:
        return re.compile("".join(parts))
    except re.error as err:
        raise SpecError(
            f"{pattern!r} is not a valid glob ({err}); write a range as {{1..3}} or [1-3]."
        ) from err


def resolve_sites(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The sites that `patterns` name, each once, in forward order whatever the order of the patterns.

    A pattern is a name, or a glob: `blocks.*.hook_resid_post`, `blocks.{1,3}.hook_mlp_out`,
    `blocks.{4..8}.*`. `*` stays within one part of the name; `**` crosses dots. Sites by module
    path come after the named ones, in the order of the model's modules.

    Raises:
        SpecError: a pattern matches nothing (near names are listed), or there is no pattern.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    known = site_names(model)
    paths = _path_names(model) if any(":" in pattern for pattern in patterns) else []
    chosen: set[str] = set()
    for pattern in (written for given in patterns for written in _alternatives(given)):
        regex = _as_regex(pattern)
        matches = [name for name in (paths if ":" in pattern else known) if regex.fullmatch(name)]
        if not matches:
            raise _unknown(model, pattern)
        chosen.update(matches)
    if not chosen:
        raise SpecError("no site was asked for; name at least one, such as blocks.0.hook_resid_post.")
    return [name for name in known + paths if name in chosen]
