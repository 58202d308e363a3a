"""Run in an environment of TransformerLens: its `run_with_cache` of saved tiny models, as .npz files.

`python lens_cache.py IDS.npy MODEL_DIR...` writes `lens.npz` into each directory: every cached value by
its hook name, and the weight and bias of each norm as `<norm>.w` and `<norm>.b`. Weights are converted by TransformerLens and
not processed: nothing is folded or centred. Its own configs know released models by name only, so the
shapes are written out here.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformer_lens.pretrained.weight_conversions as conversions
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoModelForCausalLM

_LAYER_NORM = {"normalization_type": "LN"}
_RMS = {"normalization_type": "RMS", "final_rms": True, "gated_mlp": True}


def _rotary(config, share=1.0):
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "positional_embedding_type": "rotary",
        "rotary_dim": int(d_head * share),
        "rotary_base": 10_000,
        "rotary_adjacent_pairs": False,
    }


def _local(kinds, window_size):
    return {"use_local_attn": True, "attn_types": kinds, "window_size": window_size}


def _grouped(config):
    return _RMS | _rotary(config) | {"n_key_value_heads": config.num_key_value_heads}


def _architecture(config):
    """What TransformerLens must know of a family beyond its sizes, and its weight conversion."""
    kind, n = config.model_type, config.num_hidden_layers
    if kind == "gpt2":
        return {**_LAYER_NORM}, conversions.convert_gpt2_weights
    if kind == "gpt_neo":
        local = _local(config.attention_layers, config.window_size)
        return _LAYER_NORM | local | {"use_attn_scale": False}, conversions.convert_neo_weights
    if kind == "gpt_neox":
        parallel = {"parallel_attn_mlp": config.use_parallel_residual}
        share = config.rope_parameters["partial_rotary_factor"]
        return _LAYER_NORM | _rotary(config, share) | parallel, conversions.convert_neox_weights
    if kind == "llama":
        return _grouped(config), conversions.convert_llama_weights
    if kind == "mistral":
        local = _local(["local"] * n, config.sliding_window)
        return _grouped(config) | local, conversions.convert_mistral_weights
    if kind == "qwen2":
        return _grouped(config), conversions.convert_qwen2_weights
    if kind == "qwen3":
        return _grouped(config) | {"use_qk_norm": True}, conversions.convert_qwen3_weights
    if kind == "phi3":
        return _grouped(config), conversions.convert_phi3_weights
    if kind in ("gemma2", "gemma3_text"):
        kinds = [{"sliding_attention": "local", "full_attention": "global"}[t] for t in config.layer_types]
        gemma = _grouped(config) | _local(kinds, config.sliding_window)
        gemma |= {"use_normalization_before_and_after": True, "attn_scale": config.query_pre_attn_scalar**0.5}
        if kind == "gemma2":
            gemma |= {"attn_scores_soft_cap": config.attn_logit_softcapping}
        else:
            bases = [config.rope_parameters[t]["rope_theta"] for t in ("full_attention", "sliding_attention")]
            gemma |= {"use_qk_norm": True, "rotary_base": bases[0], "rotary_base_local": bases[1]}
        return gemma, conversions.convert_gemma_weights
    raise ValueError(f"no TransformerLens shape for {kind}")


def _lens_model(model):
    config = model.config
    architecture, convert = _architecture(config)
    heads = config.num_attention_heads
    eps = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        d_mlp=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        eps=next(getattr(config, name) for name in eps if hasattr(config, name)),
        act_fn=_activation(config),
        device="cpu",
        dtype=torch.float32,
        original_architecture=type(model).__name__,
        default_prepend_bos=False,
        init_weights=False,
        **architecture,
    )
    lens = HookedTransformer(cfg)
    lens.load_and_process_state_dict(
        convert(model, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return lens.eval()


def _activation(config):
    names = ("hidden_activation", "activation_function", "hidden_act")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def main():
    ids = torch.from_numpy(np.load(sys.argv[1]))
    for directory in map(Path, sys.argv[2:]):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        lens = _lens_model(model)
        with torch.no_grad():
            _, cache = lens.run_with_cache(ids)
        arrays = {name: value.numpy() for name, value in cache.items()}
        norms = {name: p for name, p in lens.named_parameters() if name.endswith((".w", ".b"))}
        arrays |= {name: p.detach().numpy() for name, p in norms.items()}
        np.savez(directory / "lens.npz", **arrays)


if __name__ == "__main__":
    main()
