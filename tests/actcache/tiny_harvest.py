"""A tiny model, corpus and Spec: a whole harvest in about a second, on the real path."""

from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import save_tiny_lm

from actcache.spec import Corpus, Spec

SITES = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out")
WORDS = ("def", "return", "self", "x", "=", "1", "(", ")", "import", "os", "\n", "if", "else:")


def write_corpus(directory: Path, n_documents: int = 120, seed: int = 0) -> str:
    """Text files of random words, each its own document; returns their glob."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(n_documents):
        words = rng.choice(WORDS, size=rng.integers(20, 80))
        (directory / f"{i:04d}.txt").write_text(f"document {i} " + " ".join(words))
    return str(directory / "*.txt")


def tiny_spec(directory: Path, family: str = "gpt2", **overrides: Any) -> Spec:
    """A Spec over a tiny model and corpus made under `directory`: context 16, blocks of 1,024 rows."""
    model = directory / f"tiny-{family}"
    if not model.exists():
        save_tiny_lm(model, family, vocab_size=104)  # room for tokens that a tokenizer class adds
    corpus = directory / "corpus"
    source = str(corpus / "*.txt") if corpus.exists() else write_corpus(corpus)
    fields: dict[str, Any] = {
        "model": str(model),
        "corpus": Corpus(source, validation_share=0.1, test_share=0.1),
        "sites": SITES,
        "context_size": 16,
        "n_tokens": 3_000,
        "block_rows": 1024,
        "chunk_rows": 64,
    }
    return Spec(**(fields | overrides))
