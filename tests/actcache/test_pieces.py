"""Cutting a text never changes an id, for the tokenizers of which it is claimed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from actcache.lm import load_tokenizer
from actcache.pieces import PATTERNS, may_be_cut, pieces


@pytest.fixture(scope="module", params=["gpt2", *PATTERNS])
def tokenizer(request):
    """The bundled BPE behind GPT-2's pattern, or behind NFC and one of the others."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    bundled = load_tokenizer("bundled:stdlib-gpt2")
    if request.param == "gpt2":
        return bundled
    backend = Tokenizer.from_str(bundled.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(request.param), behavior="isolated", invert=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


PARTS = ["a", "x y", " ", "  ", "'s", "'", "\n", "\r\n", "é", "e\u0301", "\u0301", "12345", ".", "return self", "<|endoftext|>", "ſ"]  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), max_size=40).map("".join), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_the_pieces_of_a_text_have_its_ids(tokenizer, text, length):
    assert may_be_cut(tokenizer)
    parts = list(pieces(text, length))
    assert "".join(parts) == text
    ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_long_text_is_cut_and_one_without_a_place_is_not():
    assert max(map(len, pieces("some words " * 100, 50))) < 60
    assert list(pieces("x" * 1000, 50)) == ["x" * 1000]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"model.dropout": 0.1},
        {"added_tokens": [{"id": 0, "content": "a b", "single_word": False, "lstrip": False, "rstrip": False,
                           "normalized": False, "special": True}]},
    ],
)  # fmt: skip
def test_other_tokenizers_are_not_cut(change):
    from tokenizers import Tokenizer

    whole = json.loads(load_tokenizer("bundled:stdlib-gpt2").backend_tokenizer.to_str())
    for key, value in change.items():
        *folder, name = key.split(".")
        (whole[folder[0]] if folder else whole)[name] = value
    assert not may_be_cut(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole))))


def test_byte_level_is_known_by_its_pattern():
    assert may_be_cut(tiny_tokenizer())
