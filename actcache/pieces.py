"""Where a long text may be cut so that its pieces' token ids, joined, are exactly those of the whole.

Tokenising takes about 160 bytes a character while it runs, 16 GB for a document of 100 MB. Byte-level
BPE first splits a text by a pattern and then works on each word alone. In the patterns below nothing
after a letter takes in a space, and a space and a letter begin a word whatever is before them: so a
word ends, and the next begins, between "x" and " y". NFC joins nothing to a space. Tokenizers of any
other make (SentencePiece, WordPiece) are not cut.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

PIECE_LENGTH = 2**20
"""Characters of a piece."""

_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
PATTERNS = (
    rf"{_LETTERS}|\p{{N}}{{1,3}}{_REST}",  # Llama 3
    rf"{_LETTERS}|\p{{N}}{_REST}",  # Qwen 2 and 3
)


def pieces(text: str, length: int = PIECE_LENGTH) -> Iterator[str]:
    """The text in pieces of about `length` characters, more where there is no place to cut."""
    start = 0
    while len(text) - start > length:
        cut = _CUT.search(text, start + length)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def may_be_cut(tokenizer: Any) -> bool:
    """Whether `pieces` are safe for this tokenizer: GPT-2's, NeoX's, Llama 3's, Qwen's kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    whole = json.loads(backend.to_str())
    model, normalizer = whole["model"], whole["normalizer"]
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and (normalizer is None or normalizer == {"type": "NFC"})
        and _splits_words(whole["pre_tokenizer"] or {})
        and not any(
            " " in token["content"] or token["single_word"] or token["lstrip"] or token["rstrip"]
            for token in whole["added_tokens"]
        )
    )


def _splits_words(pre_tokenizer: dict[str, Any]) -> bool:
    """GPT-2's pattern, which `ByteLevel` has built in, or one of `PATTERNS` before it."""
    if pre_tokenizer.get("type") == "ByteLevel":
        return bool(pre_tokenizer["use_regex"]) and not pre_tokenizer["add_prefix_space"]
    steps = pre_tokenizer.get("pretokenizers", [])
    if pre_tokenizer.get("type") != "Sequence" or [s["type"] for s in steps] != ["Split", "ByteLevel"]:
        return False
    split, level = steps
    return (
        split["pattern"].get("Regex") in PATTERNS
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and not level["use_regex"]
        and not level["add_prefix_space"]
    )
