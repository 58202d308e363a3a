"""How many tokens, sequences and rows a corpus holds, estimated from a sample of its documents.

A few documents of files spread over the corpus are tokenised and packed as a harvest does it, and what they
give is scaled by stored bytes. Bounded in bytes and time; nothing is written.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .corpus import Encoder, kept_tokens
from .errors import CorpusError
from .manifest import SPLITS
from .packing import Packer
from .sources import ResolvedCorpus, beginning, file_size, is_local

_FILES = 64
_DOCUMENTS = 512
_CHARACTERS = 2**20
_SIZED_FILES = 256  # of a remote corpus: each may be a request
_SAMPLE_S = 1.5
_GOLDEN = 0.6180339887498949  # multiples of it are spread evenly over [0, 1) wherever they are stopped


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """What one split of a token store holds, or is estimated to."""

    n_documents: int
    n_sequences: int
    n_rows: int


@dataclass(frozen=True, kw_only=True)
class CorpusEstimate:
    """A corpus's size by a sample of it."""

    n_tokens: int
    """Tokens put into sequences, BOS left out."""
    splits: dict[str, SplitSize]
    n_documents: int
    """Documents in the sample, some of them cut."""
    n_files: int
    """Files in the sample."""
    sampled_bytes: int
    """Stored bytes that the sample stands for."""
    total_bytes: int
    """Of the corpus's files, as they are stored."""


def estimate_corpus(
    resolved: ResolvedCorpus, tokens_identity: Mapping[str, Any], tokenizer: Any
) -> CorpusEstimate:
    """Estimate a corpus from about 1 MiB of text of up to 64 of its files.

    The same corpus gives the same sample, unless the time ends first (1.5 s, and the file at hand). Splits
    get the shares that the split rule expects, which small corpora miss by chance.

    Raises:
        CorpusError: a file that cannot be read; no document in the sample can be taken.
    """
    corpus, packing = resolved.corpus, tokens_identity["packing"]
    chosen = _spread(len(resolved.files), _FILES)
    encode = Encoder(tokenizer, corpus, tokens_identity, in_pieces=False)
    packer = Packer(tokens_identity)
    tokens, sampled, n_documents, n_files = 0.0, 0.0, 0, 0
    deadline = time.monotonic() + _SAMPLE_S
    for file in chosen:
        if n_files and time.monotonic() > deadline:
            break
        first = beginning(
            resolved, file, max(8, _DOCUMENTS // len(chosen)), max(4096, _CHARACTERS // len(chosen))
        )
        n_files += 1
        sampled += first.share * file_size(resolved, file)
        encoded = encode([document for document, _ in first.documents])
        for found, (_, factor) in zip(encoded, first.documents, strict=True):
            if found.reason is None:
                packer.add(found.ids)
                tokens += factor * len(found.ids)
                n_documents += 1
    if not n_documents:
        raise CorpusError(
            f"corpus {corpus.shown!r}: no document that can be taken among the first of {n_files} files"
        )
    own = packer.n_tokens + packer.n_tokens_cut
    records_S = packer.take(last=True)
    kept = int(
        kept_tokens(records_S["input_ids"], records_S["length"], tokens_identity["special_token_ids"]).sum()
    )
    total_bytes = _total_bytes(resolved)
    scale = total_bytes / sampled
    n_tokens, documents = tokens * scale, n_documents * scale
    if resolved.format == "text":
        documents = n_documents / n_files * len(resolved.files)
    if corpus.max_tokens is not None and corpus.max_tokens < n_tokens:
        documents *= corpus.max_tokens / n_tokens
        n_tokens = corpus.max_tokens
    if packing == "single":
        sequences = documents
        rows = documents * kept / len(records_S)
        n_tokens = documents * packer.n_tokens / len(records_S)
    else:
        width = tokens_identity["context_size"] - (tokens_identity["bos_token_id"] is not None)
        sequences = n_tokens / width if packing == "concat" else n_tokens * len(records_S) / own
        rows = n_tokens * kept / own
    shares = (1 - corpus.validation_share - corpus.test_share, corpus.validation_share, corpus.test_share)
    splits = {
        split: SplitSize(
            n_documents=round(share * documents),
            n_sequences=math.ceil(share * sequences),
            n_rows=round(share * rows),
        )
        for split, share in zip(SPLITS, shares, strict=True)
    }
    return CorpusEstimate(
        n_tokens=round(n_tokens),
        splits=splits,
        n_documents=n_documents,
        n_files=n_files,
        sampled_bytes=round(sampled),
        total_bytes=total_bytes,
    )


def _spread(n: int, most: int) -> Sequence[int]:
    """Up to `most` of the numbers below n, in an order that is spread over them wherever it is stopped."""
    if n <= most:
        return sorted(range(n), key=lambda i: i * _GOLDEN % 1)
    return list(dict.fromkeys(int((i * _GOLDEN + 0.5) % 1 * n) for i in range(most)))


def _total_bytes(resolved: ResolvedCorpus) -> int:
    """Stored bytes of all files; of a remote corpus of many, from the mean of some."""
    n = len(resolved.files)
    local = is_local(resolved.files[0], resolved.storage_options)
    sized = range(n) if local else _spread(n, _SIZED_FILES)
    return round(sum(file_size(resolved, file) for file in sized) * n / len(sized))
