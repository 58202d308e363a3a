"""What a dataset is: its identity (which value is in which row) and its extent (how much of it).

The identity's canonical JSON, hashed, names the dataset. Execution (workers, LM batch size,
device, URLs, credentials) is in neither. Specified in docs/format.md, "Identity".
This module never reads a corpus, a model or a store; `actcache.driver` resolves a `Spec`
against those into an identity.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

from .codec import Precision
from .errors import SpecError

FORMAT = 2
"""The format version this package writes; docs/format.md describes it, and 1, which is read."""

LM_DTYPES = ("float32", "bfloat16", "float16")
PACKINGS = ("concat", "isolated", "single")
CORPUS_FORMATS = ("text", "jsonl", "parquet", "arrow")
MIN_SEQUENCES_PER_BLOCK = 64
"""`block_rows >= 64 * context_size`: a sequence that straddles two blocks is run in both, so
shorter blocks would spend more than 1/64 of the forward passes twice."""
MAX_BLOCK_ROWS, MAX_CONTEXT_SIZE, MAX_INTEGER = 2**31, 2**20, 2**63 - 1
"""What readers take; no dataset is begun that they would refuse."""


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value that is hashed: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True, repr=False)
class Corpus:
    """Text, with how to read it and how its documents are split.

    Documents go to splits by a hash of their content, so no document (nor its duplicate) is in
    two splits, and adding documents moves none.
    """

    source: str
    """A file, glob or directory, on local disk or any fsspec URL (`s3://`, `hf://datasets/...`):
    `.jsonl[.gz|.zst]`, `.parquet` and `.arrow`/`.feather` hold one document a row; a file of text or source
    code (`.txt`, `.md`, `.py`, ..., also with `.gz` or `.zst`) is one document. Of a directory all files are read but
    hidden ones; they must be of one format and one split. A directory may be what
    `datasets.Dataset.save_to_disk` wrote. Or `bundled:stdlib`, the running Python's standard library without
    its tests."""

    _: KW_ONLY
    text_field: str = "text"
    """The field (jsonl) or column (parquet, Arrow) that holds the text; unused for text files."""

    token_field: str | None = None
    """In place of text: the field or column with lists of token ids of the model's tokenizer."""

    chat_field: str | None = None
    """In place of text: the field or column with a list of messages (`role`, `content`), which the
    tokenizer's chat template renders."""

    format: str | None = None
    """`text`, `jsonl`, `parquet` or `arrow`: what every file is, whatever its name. None: by the names; where they do not
    tell (`.json`, `.csv`, no suffix), it must be given."""

    max_skipped_share: float = 0.1
    """Raise if more than this share of the documents (and more than 20) cannot be read or tokenised: then the
    corpus is described wrongly, by another field say. Empty documents do not count. Not identity."""

    strict: bool = False
    """Raise at the first document that cannot be read or tokenised, in place of counting it. Empty
    ones are counted in either case. Not identity: it raises or changes nothing."""

    revision: str | None = None
    """What fixes the content. None: the digest of the files (local) or of their ETags (remote).
    Give it to skip reading a large local corpus for its digest."""

    max_tokens: int | None = None
    """Bounds the universe that is tokenised and shuffled, in tokens; None takes all."""

    validation_share: float = 0.05
    """Share of documents that go to the validation split."""

    test_share: float = 0.05
    """Share of documents that go to the test split."""

    def __post_init__(self) -> None:
        if not self.source:
            raise SpecError("the corpus source is empty; give a glob, a file, a URL or bundled:stdlib")
        if self.format is not None:
            _check_choice("format", self.format, CORPUS_FORMATS)
        if not 0 <= self.max_skipped_share <= 1:
            raise SpecError(f"max_skipped_share is {self.max_skipped_share}; it must be from 0 to 1")
        if self.token_field is not None and self.chat_field is not None:
            raise SpecError("token_field and chat_field are both given; a corpus has one of them, or text")
        if self.max_tokens is not None and not 0 < self.max_tokens <= MAX_INTEGER:
            raise SpecError(
                f"max_tokens is {self.max_tokens}; it must be positive and below 2^63, or None for all"
            )
        shares = (self.validation_share, self.test_share)
        if min(shares) < 0 or sum(shares) >= 1:
            raise SpecError(
                f"validation_share and test_share are {shares}; they must be >= 0 and leave some for train"
            )

    @property
    def shown(self) -> str:
        """The source as it may be printed, logged and stored: without what may be a credential."""
        return public_url(self.source)

    def __repr__(self) -> str:
        given = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name != "source" and getattr(self, f.name) != f.default
        )
        return f"Corpus({', '.join([repr(self.shown), *given])})"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One activation dataset, as asked for. Two equal identities are the same dataset."""

    model: str
    """Hugging Face id or local directory of a model that reads token ids, or `bundled:stdlib-gpt2`."""

    corpus: Corpus
    """The text."""

    sites: Sequence[str]
    """TransformerLens hook names (`blocks.3.hook_resid_post`; globs allowed) or HF module paths
    with `:in`/`:out`. Extent: more sites can be added later."""

    context_size: int
    """Tokens in a sequence, BOS included."""

    n_tokens: int
    """Rows wanted in the train split; rounded up to whole blocks, bounded by the corpus. Extent."""

    precision: str = "fvu:1e-3"
    """`fvu:<x>` (int8 codes whose noise is at most the fraction x of the variance of core rows),
    `rotated:<x>` (the same noise on principal components: fewer bits, slower), `bf16`, `fp16` or `fp32`."""

    lm_dtype: str = "float32"
    """The dtype the LM runs in: float32, bfloat16 or float16. Never guessed from the checkpoint."""

    model_revision: str | None = None
    """Hub commit, branch or tag; resolved to a commit. None: the default branch."""

    packing: str = "concat"
    """`concat`: documents joined by EOS and cut into sequences of `context_size`. `isolated`: whole
    documents side by side, each with its own positions and attention, those longer than a sequence cut.
    `single`: the beginning of one document in each sequence, padded; the rest of a long one is counted
    and left out."""

    prepend_bos: bool | None = None
    """Put BOS before each sequence (`concat`) or document (`isolated`, `single`). None: if and only if
    the tokenizer has a BOS token, whether it adds it of itself or not. So GPT-2 and NeoX get their
    `<|endoftext|>`, Llama, Mistral, Gemma and Phi-3 their BOS, Qwen none."""

    block_rows: int | None = None
    """Rows in a block, the unit of work, retry and storage. None: 131,072, fewer for huge rows."""

    chunk_rows: int | None = None
    """Rows in a chunk, the unit of reading; a power of two. None: about 1 MiB of codes."""

    validation_blocks: int = 1
    """Blocks of the validation split to harvest. Extent."""

    test_blocks: int = 1
    """Blocks of the test split to harvest. Extent."""

    seed: int = 0
    """Seeds the sequence shuffle and the row permutations."""

    def __post_init__(self) -> None:
        if isinstance(self.sites, str) or not self.sites:
            raise SpecError(f"sites is {self.sites!r}; give a list of one or more hook names")
        Precision.parse(self.precision)
        _check_choice("lm_dtype", self.lm_dtype, LM_DTYPES)
        _check_choice("packing", self.packing, PACKINGS)
        for name in ("context_size", "n_tokens", "block_rows", "chunk_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"{name} is {value}; it must be at least 1")
        limits = {"block_rows": MAX_BLOCK_ROWS, "context_size": MAX_CONTEXT_SIZE, "seed": MAX_INTEGER}
        for name, limit in limits.items():
            if abs(getattr(self, name) or 0) > limit:
                raise SpecError(f"{name} is {getattr(self, name)}; it must not exceed {limit}")
        if self.context_size < 2:
            raise SpecError(f"context_size is {self.context_size}; an LM needs at least 2 tokens to predict")
        if self.validation_blocks < 0 or self.test_blocks < 0:
            raise SpecError("validation_blocks and test_blocks count blocks; they cannot be negative")

    def block_shape(self, d_model: int) -> tuple[int, int]:
        """(block_rows, chunk_rows), with the defaults for rows of `d_model` values.

        Raises:
            SpecError: the two do not divide, or a block is shorter than 64 sequences.
        """
        floor = MIN_SEQUENCES_PER_BLOCK * self.context_size
        block_rows = self.block_rows or max(
            131_072 >> max(0, (d_model - 1).bit_length() - 13), _next_power(floor)
        )
        # about 1 MiB of int8 codes: smaller chunks multiply the requests, larger ones blur random access
        chunk_rows = self.chunk_rows or min(_previous_power(2**20 // d_model), _power_divisor(block_rows))
        if chunk_rows & (chunk_rows - 1):
            raise SpecError(f"chunk_rows is {chunk_rows}; it must be a power of two")
        if block_rows % chunk_rows:
            raise SpecError(f"block_rows is {block_rows}; it must be a multiple of chunk_rows ({chunk_rows})")
        if block_rows < floor:
            raise SpecError(
                f"block_rows is {block_rows}; at context_size {self.context_size} it must be >= {floor} "
                f"({MIN_SEQUENCES_PER_BLOCK} sequences), or straddling sequences cost too much"
            )
        return block_rows, chunk_rows


def dataset_name(identity: Mapping[str, Any], corpus_source: str) -> str:
    """A readable slug and the first 12 hex digits of the identity's digest."""
    parts = [
        re.split("[/:]", identity["model"]["id"])[-1],
        _source_slug(corpus_source),
        f"t{identity['tokens']['context_size']}",
        identity["precision"],
    ]
    return f"{slug('-'.join(parts))}-{digest(identity)[:12]}"


def token_store_name(tokens_identity: Mapping[str, Any], corpus_source: str) -> str:
    """As `dataset_name`, for the tokens that datasets of models with one tokenizer share."""
    readable = slug(f"{_source_slug(corpus_source)}-t{tokens_identity['context_size']}")
    return f"{readable}-{digest(tokens_identity)[:12]}"


def public_url(source: str) -> str:
    """A path as it is; a URL without user, query and fragment, any of which may hold a credential.

    `?` is a query where it must be one (http), elsewhere only where `=` follows: else it is of a glob.
    """

    def public(link: str) -> str:
        scheme, separator, rest = link.partition("://")
        if not separator:
            return link
        query = r"[?#].*" if scheme.lower() in ("http", "https") else r"\?[^/]*=.*"
        return f"{scheme}://{re.sub(r'^[^/@]*@', '', re.sub(query, '', rest))}"

    return "::".join(public(link) for link in source.split("::"))


def public_text(message: object) -> str:
    """A message of somebody else's, with each URL in it as `public_url` gives it."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>()|]+", lambda m: public_url(m[0]), str(message))


def shown_source(source: str) -> str:
    """A corpus source as it is written into manifests: a URL without credentials and query, an absolute local
    path without the directories above its last two parts."""
    if "://" not in source:
        return "/".join(Path(source).parts[-2:]) if Path(source).is_absolute() else source
    return public_url(source)


def slug(text: str) -> str:
    """Letters, digits and dots, the rest as single dashes; at most 80 characters."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80].rstrip("-.")


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint ` (did you mean 'x'?)` for an unknown name, or nothing when none is near."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _source_slug(source: str) -> str:
    named = [
        part for part in re.split(r"[/:?]+", source) if re.search(r"[A-Za-z0-9]", part) and "*" not in part
    ]
    return slug(named[-1]) if named else "corpus"


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SpecError(
            f"{field} is {value!r}; it must be one of {', '.join(choices)}{nearest(value, choices)}"
        )


def _next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _previous_power(n: int) -> int:
    return 1 << max(0, n.bit_length() - 1)


def _power_divisor(n: int) -> int:
    return n & -n
