"""The text around a latent's strongest activations, as pieces that a page can show.

Owns how tokens become visible text: decoded one by one, white space and control characters made
visible, everything escaped. Reads no store; the caller brings tokens and activations.

Shapes: T tokens of a sequence.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

BEFORE, AFTER = 21, 10  # tokens shown around the strongest one: 32 in all
_MAX_CHARS = 60  # of one token; what follows is cut and marked
_NEAR = 8  # tokens: places of one sequence this close are shown once


@dataclass(frozen=True)
class Piece:
    """One token: its text, ready for a page, and its activation (None: no row, or inactive)."""

    text: Markup
    value: float | None
    share: float
    """Of the latent's maximum, 0-1."""


@dataclass(frozen=True)
class Snippet:
    """The strongest token of a place and what stands around it."""

    sequence: int
    position: int
    peak: Piece
    left: list[Piece]
    right: list[Piece]


class TokenTexts:
    """Text of single tokens. Part of a character (byte-level BPE) shows as U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, Markup] = {}

    def __getitem__(self, token_id: int) -> Markup:
        if token_id not in self._texts:
            self._texts[token_id] = visible(self._decode(token_id))
        return self._texts[token_id]

    def _decode(self, token_id: int) -> str:
        text = str(
            self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" "):
            return " " + text  # SentencePiece drops the leading space of a lone token
        return text


def visible(text: str) -> Markup:
    """Escaped text in which white space, control and direction characters can be seen."""
    cut = len(text) > _MAX_CHARS
    parts = re.split(r"(\n|\r|\t| {2,})", text[:_MAX_CHARS])
    out = Markup("").join(_mark(part) for part in parts)
    return out + Markup("<u>…</u>") if cut else out


def _mark(part: str) -> Markup:
    if part in ("\n", "\r", "\t"):
        return Markup("<u>{}</u>").format({"\n": "↵", "\r": "␍", "\t": "⇥"}[part])
    if part.startswith("  "):
        return Markup('<u class="sp">{}</u>').format(part)
    return Markup("").join(_character(c) for c in part)


def _character(c: str) -> Markup:
    """Controls (Cc), format characters such as U+202E (Cf) and lone surrogates would act on the page."""
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return Markup("<u>⟨{:04X}⟩</u>").format(ord(c))
    return escape(c)


def snippets_of(
    row: Mapping[str, Any],
    values: Mapping[int, np.ndarray],
    context: Mapping[int, np.ndarray],
    texts: TokenTexts,
    limit: int,
) -> list[Snippet]:
    """The strongest places of one latent, at most `limit`, near-duplicates in a sequence shown once.

    Args:
        row: the latent's row of `latents.parquet`.
        values: {sequence: its activations [T], NaN where there is no row}.
        context: {sequence: input ids [T]}.
        texts: text of each token.
        limit: how many.
    """
    shown: list[tuple[int, int]] = []
    snippets: list[Snippet] = []
    top = zip(row["top_sequence"], row["top_position"], row["top_value"], strict=True)
    for sequence, position, value in top:
        if len(snippets) == limit:
            break
        if any(q == sequence and abs(p - position) < _NEAR for q, p in shown):
            continue
        shown.append((sequence, position))
        ids_T, values_T = context[sequence], values[sequence]

        def piece(t: int, ids_T: np.ndarray = ids_T, values_T: np.ndarray = values_T) -> Piece:
            a = float(values_T[t])
            on = a > 0  # False for NaN
            share = min(a / row["max_activation"], 1.0) if on else 0.0
            return Piece(texts[int(ids_T[t])], a if on else None, share)

        peak = Piece(texts[int(ids_T[position])], float(value), min(value / row["max_activation"], 1.0))
        left = [piece(t) for t in range(max(0, position - BEFORE), position)]
        right = [piece(t) for t in range(position + 1, min(len(ids_T), position + 1 + AFTER))]
        snippets.append(Snippet(sequence, position, peak, left, right))
    return snippets
