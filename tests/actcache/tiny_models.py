"""Tiny random language models of every family, and a tiny tokenizer: the real classes, in milliseconds.

Weights are drawn large (norm weights away from 1, biases away from 0, logits away from uniform), so
that a site taken on the wrong side of a norm, a bias or a scale cannot pass for the right one.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

N_BLOCKS = 3
VOCAB_SIZE = 96
D_MODEL = 32

_SHAPE = {
    "num_hidden_layers": N_BLOCKS,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_attention_heads": 4,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}

# The sliding windows are shorter than the tests' sequences, so that they matter.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_layer": N_BLOCKS, "n_embd": D_MODEL, "n_head": 4, "n_positions": 64}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": N_BLOCKS, "hidden_size": D_MODEL, "num_heads": 4, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    ),
    "gpt_neox": ("gpt_neox", _SHAPE | {"max_position_embeddings": 64}),
    "gpt_neox_sequential": (
        "gpt_neox",
        _SHAPE | {"max_position_embeddings": 64, "use_parallel_residual": False},
    ),
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 8}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GROUPED | {"head_dim": 16}),
    "gemma2": ("gemma2", _GROUPED | {"head_dim": 16, "sliding_window": 8}),
    "gemma3": ("gemma3_text", _GROUPED | {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("phi3", _GROUPED | {"pad_token_id": 0}),
}

FAMILIES = tuple(_CONFIGS)

# Models without TransformerLens names here: their sites are module paths.
_CONFIGS |= {
    "bert": ("bert", _SHAPE | {"max_position_embeddings": 64}),
    "mamba": ("mamba", {"num_hidden_layers": N_BLOCKS, "hidden_size": D_MODEL, "state_size": 8}),
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Config of a 3-block model of the family, d_model 32; `overrides` go to the config."""
    model_type, options = _CONFIGS[family]
    return AutoConfig.for_model(model_type, **{"vocab_size": VOCAB_SIZE} | _IDS | options | overrides)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model of the family in eval mode, float32; the same weights for the same seed."""
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    return _randomise(auto.from_config(tiny_config(family, **overrides)), seed)


@lru_cache
def shared_model(family: str) -> Any:
    """One model per family and process, for tests that leave it as it is."""
    return tiny_model(family)


def block_of(model: Any, n: int) -> Any:
    """The module of block n."""
    decoder = model.get_decoder()
    return (decoder.h if hasattr(decoder, "h") else decoder.layers)[n]


def tokens(seed: int = 0, batch: int = 2, length: int = 12) -> torch.Tensor:
    """Random ids [batch, length] without special tokens."""
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_gemma3_multimodal(seed: int = 0) -> Any:
    """A `Gemma3ForConditionalGeneration` around the same text decoder, with a one-layer vision tower."""
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=tiny_config("gemma3").to_dict(),
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        mm_tokens_per_image=1,
        image_token_index=VOCAB_SIZE - 1,
    )
    return _randomise(AutoModelForImageTextToText.from_config(config), seed)


def _randomise(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norm weights are 1 or, in Gemma, 0; biases are 0
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(directory: Path | None = None) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of 96 entries (printable ASCII is never unknown); saved where asked."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = [chr(code) for code in range(33, 33 + VOCAB_SIZE - 4)] + ["Ġ"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if directory is not None:
        wrapped.save_pretrained(directory)
    return wrapped


def save_tiny_lm(directory: Path, family: str = "llama", tokenizer: bool = True, **overrides: Any) -> Path:
    """Write a tiny model (with its tokenizer, unless told otherwise) as `save_pretrained` does."""
    tiny_model(family, **overrides).save_pretrained(directory)
    if tokenizer:
        tiny_tokenizer(directory)
    return directory
