"""Tokens as text that can be shown: white space, control and direction characters made visible.

Owns how a token looks. Nothing here is markup: what is not the token's own text stands between
`QUIET` and `LOUD`, two control characters that no shown text contains, and the page's script
makes text nodes of all of it.
"""

import re
import unicodedata
from typing import Any

QUIET, LOUD = "\x01", "\x02"
_MAX_CHARS = 60  # of one token; what follows is cut and marked
_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}


class TokenTexts:
    """Text of single tokens. Part of a character (byte-level BPE) shows as U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._size = len(tokenizer)
        self._texts: dict[int, str] = {}

    def raw(self, token_id: int) -> str:
        """The token as it stands in a text."""
        if token_id not in self._texts:
            self._texts[token_id] = self._decode(token_id)
        return self._texts[token_id]

    def __getitem__(self, token_id: int) -> str:
        """The token as it is shown."""
        return visible(self.raw(token_id))

    def _decode(self, token_id: int) -> str:
        if not 0 <= token_id < self._size:  # a logit of the padding past the vocabulary
            return f"[{token_id}]"
        text = str(
            self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" "):
            return " " + text  # SentencePiece drops the leading space of a lone token
        return text


def visible(text: str) -> str:
    """The text with signs for what cannot be seen, at most 60 characters of it."""
    cut = len(text) > _MAX_CHARS
    parts = re.split(r"( {2,})", text[:_MAX_CHARS])
    out = "".join(
        _quiet("·" * len(part)) if part.startswith("  ") else "".join(map(_character, part)) for part in parts
    )
    return out + _quiet("…") if cut else out


def _character(c: str) -> str:
    """Controls (Cc), format characters such as U+202E (Cf) and lone surrogates would act on the page."""
    if c in _SIGNS:
        return _quiet(_SIGNS[c])
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return _quiet(f"⟨{ord(c):04X}⟩")
    return c


def _quiet(sign: str) -> str:
    return f"{QUIET}{sign}{LOUD}"
