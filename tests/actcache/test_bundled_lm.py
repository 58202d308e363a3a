"""The bundled language model: it loads with plain transformers, is small, lossless and has learned Python."""

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import actcache

LM_DIR = Path(actcache.__file__).parent / "bundled" / "stdlib-gpt2"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
CONTEXT_SIZE = 256


def is_validation(text_bytes: bytes) -> bool:
    # written out here so that a change of the dataset's rule cannot move training text into this test
    return int.from_bytes(hashlib.sha256(text_bytes).digest()[:8], "big") / 2**64 < 0.05


@pytest.fixture(scope="module")
def heldout_sources() -> list[str]:
    paths = [path for path in sorted(STDLIB.rglob("*.py")) if "site-packages" not in path.parts]
    return [source.decode() for path in paths if is_validation(source := path.read_bytes())]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(LM_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(LM_DIR, dtype=torch.float32).eval()


def test_bundled_model_is_a_plain_gpt2_of_at_most_16_mb(model: Any) -> None:
    assert type(model).__name__ == "GPT2LMHeadModel"
    config = model.config
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (192, 6, 6, CONTEXT_SIZE)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert (LM_DIR / "model.safetensors").stat().st_size <= 16_000_000


def test_bundled_weights_are_float32_and_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.isfinite(parameter).all(), name


def test_bundled_tokenizer_has_one_special_token_within_the_vocabulary(tokenizer: Any, model: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    ids = {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        model.config.bos_token_id,
        model.config.eos_token_id,
    }
    assert ids == {0}


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x  # tab, trailing blanks   \n\n\n",
        "crlf\r\nand lone cr\rand nul \x00 bell \x07",
        " . , don't ' s ? ! : ; <pad> [MASK]",
        "naïve Ünïcödé 日本語 עברית 🐍 e\u0301 \ufeff\u200b",
        "",
    ],
)
def test_bundled_tokenizer_is_lossless(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bundled_tokenizer_is_lossless_on_python_sources(tokenizer: Any, heldout_sources: list[str]) -> None:
    for text in heldout_sources[:8]:
        ids = tokenizer.backend_tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert 0 not in ids


def test_bundled_model_predicts_heldout_python_far_better_than_token_frequencies(
    tokenizer: Any, model: Any, heldout_sources: list[str]
) -> None:
    stream: list[int] = []
    for text in heldout_sources:
        stream += [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
    assert len(stream) > 100_000, "the stdlib of this interpreter holds too little held-out text"
    starts = np.linspace(0, len(stream) - CONTEXT_SIZE, 32, dtype=int)  # all over the held-out documents
    tokens = torch.tensor([stream[start : start + CONTEXT_SIZE - 1] for start in starts])
    input_ids_BT = torch.nn.functional.pad(tokens, (1, 0), value=tokenizer.bos_token_id)
    with torch.inference_mode():
        ce = model(input_ids_BT, labels=input_ids_BT).loss.item()
    frequencies = np.bincount(tokens.flatten().numpy()) / tokens.numel()
    frequencies = frequencies[frequencies > 0]
    unigram_entropy = -(frequencies * np.log(frequencies)).sum()
    assert ce < 0.60 * unigram_entropy, (ce, unigram_entropy)


def test_model_card_states_text_licence_packing_and_figures() -> None:
    card = (LM_DIR / "README.md").read_text()
    for fact in ("PSF-2.0", "Packing", "unigram entropy", "bits per byte", "tokens per byte", "Limits"):
        assert fact in card, fact
