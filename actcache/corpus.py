"""Token stores: a corpus's documents in, packed and globally shuffled sequences out.

Each document goes to a split by a hash of its content, is tokenised and packed. Each split is
shuffled once at sequence level into a *token store*: plain Zarr that every model with the tokenizer
shares. Memory does not grow with the corpus but for 24 bytes a sequence while a split is shuffled.
What is skipped is counted and reported. Specified in docs/format.md, "Token store".
Shapes: S sequences of a split, T = context_size, M documents of a split.
"""

import hashlib
import json
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .commit import create_exact_shard
from .errors import CorpusError, FormatError, SpecError
from .manifest import SPLITS, check_format
from .order import permutation
from .packing import Packer, Spill, position_ids
from .pieces import PIECE_LENGTH, may_be_cut, pieces
from .progress import Progress, format_count
from .shard import array_metadata, decode_shard, group_metadata, shard_key
from .sources import Document, ResolvedCorpus, Skipped, documents
from .spec import FORMAT, Corpus, Spec, canonical_json, digest, token_store_name
from .store import Store

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")
Map = Callable[[Callable[[A], B], Iterable[A]], Iterator[B]]
"""How batches of documents are encoded: like `map`, results in order, possibly many at a time."""

DOCUMENT_ROWS = (65_536, 4_096)
"""Shard and chunk rows of a token store's arrays by document."""
_BATCH_DOCUMENTS = 512
_BATCH_LENGTH = 2**20
"""Characters (or token ids) of a batch; a longer document is a batch of its own."""
_TAKE_TOKENS = 2**20
_WRITES = 4
_HUGE = 2**24
"""Characters from which on tokenising a document as a whole takes gigabytes."""


def split_of(content: str | bytes, validation_share: float = 0.05, test_share: float = 0.05) -> str:
    """The split of a document: fixed by its content alone, so a duplicate lands in the same one."""
    data = content.encode() if isinstance(content, str) else content
    u = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
    if u < validation_share:
        return "validation"
    return "test" if u < validation_share + test_share else "train"


def tokens_identity(
    spec: Spec, resolved: ResolvedCorpus, tokenizer: Any, n_embeddings: int | None = None
) -> dict[str, Any]:
    """The identity of the token store: what decides which token is where, and nothing of the model.

    `n_embeddings`: token ids that the model takes. A tokenizer may have more (Gemma 3's has one for images);
    documents that hold such a token are passed over.

    Raises:
        SpecError: the tokenizer has no EOS to join documents with, no BOS where one is asked for, or no
            chat template for a corpus of chats; or the model does not embed one of these.
    """
    if spec.packing == "concat" and tokenizer.eos_token_id is None:
        raise SpecError("the tokenizer has no EOS token; packing 'concat' joins documents with it. Set one")
    prepend_bos = tokenizer.bos_token_id is not None if spec.prepend_bos is None else spec.prepend_bos
    if prepend_bos and tokenizer.bos_token_id is None:
        raise SpecError("prepend_bos is True, but the tokenizer has no BOS token; set prepend_bos to False")
    template = None
    if spec.corpus.chat_field is not None:
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if template is None:
            raise SpecError("the tokenizer has no chat template to render chat_field with; use text_field")
    vocab_size = len(tokenizer) if n_embeddings is None else min(len(tokenizer), n_embeddings)
    put_in = {"BOS": tokenizer.bos_token_id if prepend_bos else None, "EOS": tokenizer.eos_token_id}
    for name, token_id in put_in.items():
        if token_id is not None and token_id >= vocab_size:
            raise SpecError(
                f"{name} is token {token_id}, and the model embeds {vocab_size} of the tokenizer's {len(tokenizer)} tokens; "
                "take the tokenizer that the model was trained with"
            )
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_digest(tokenizer),
        "vocab_size": vocab_size,
        "chat_template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "corpus": resolved.identity(),
        "packing": spec.packing,
        "context_size": spec.context_size,
        "bos_token_id": tokenizer.bos_token_id if prepend_bos else None,
        "eos_token_id": tokenizer.eos_token_id,
        "special_token_ids": sorted(i for i in set(tokenizer.all_special_ids) if i < vocab_size),
        "seed": spec.seed,
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what decides how text becomes ids (not of padding, truncation or chat templates)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest({"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()})
    whole = json.loads(backend.to_str())
    return digest({k: whole.get(k) for k in ("normalizer", "pre_tokenizer", "model", "added_tokens")})


def kept_tokens(
    input_ids_ST: np.ndarray, length_S: np.ndarray, special_token_ids: Sequence[int]
) -> np.ndarray:
    """Which tokens are rows, bool [S, T]: those inside the sequence that are not special.

    Padding is known by length, never by id: GPT-2 pads with EOS.
    """
    inside_ST = np.arange(input_ids_ST.shape[1]) < length_S[:, None]
    return inside_ST & ~np.isin(input_ids_ST, np.asarray(special_token_ids, input_ids_ST.dtype))


def sequence_rows(context_size: int) -> tuple[int, int]:
    """Shard and chunk rows of arrays by sequence: a shard is about 2^20 tokens, a chunk its 16th part."""
    shard = min(4096, max(64, 1 << (2**20 // context_size).bit_length() - 1))
    return shard, shard // 16


class TokenStore:
    """Committed, shuffled sequences of each split. Reads are of whole shards, a few of which are held.

    What grows with the corpus is `row_start`: 8 bytes a sequence of the split.
    """

    def __init__(self, store: Store, manifest: Mapping[str, Any]) -> None:
        self.store, self.manifest = store, manifest
        self._shard = lru_cache(maxsize=8)(self._read_shard)

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides which token is where."""
        return self.manifest["identity"]

    @cached_property
    def context_size(self) -> int:
        """T."""
        return int(self.identity["context_size"])

    def n_sequences(self, split: str) -> int:
        """S of the split."""
        return int(self.manifest["splits"][split]["n_sequences"])

    def n_rows(self, split: str) -> int:
        """Kept tokens of the split."""
        return int(self.manifest["splits"][split]["n_rows"])

    def n_documents(self, split: str) -> int:
        """M of the split."""
        return int(self.manifest["splits"][split]["n_documents"])

    def row_start(self, split: str) -> np.ndarray:
        """int64 [S + 1]: kept rows before each sequence."""
        return self._row_start(split)

    @lru_cache(maxsize=4)  # noqa: B019 - one store per process, three splits
    def _row_start(self, split: str) -> np.ndarray:
        return self.rows(split, "row_start", 0, self.n_sequences(split) + 1)

    def sequences(self, split: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences [start, stop): input_ids [n, T] (padded with EOS) and length [n]."""
        return self.rows(split, "input_ids", start, stop), self.rows(split, "length", start, stop)

    def documents(self, split: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """`document`, `document_offset` and `document_begins` of sequences [start, stop)."""
        names = ("document", "document_offset", "document_begins")
        return {name: self.rows(split, name, start, stop) for name in names}

    def position_ids(self, split: str, start: int, stop: int) -> np.ndarray | None:
        """int64 [n, T] of sequences [start, stop), from 0 in each document; None unless they are `isolated`."""
        if self.identity["packing"] != "isolated":
            return None
        return position_ids(self.documents(split, start, stop)["document_begins"])

    def source(self, split: str, document: int) -> tuple[str, int]:
        """The file (below the corpus's folder) and the record in it (from 0) of a document of the split."""
        file = self.rows(split, "document_file", document, document + 1)[0]
        record = self.rows(split, "document_record", document, document + 1)[0]
        return self.manifest["files"][file], int(record)

    def rows(self, split: str, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of one of the split's arrays; docs/format.md, "Token store", lists them."""
        path = f"{split}/{name}"
        array = self.manifest["arrays"][path]
        shard_rows = self._layout(path)[0]
        assert 0 <= start <= stop <= array["shape"][0]
        parts = [np.empty((0, *array["shape"][1:]), array["dtype"])]
        for shard in range(start // shard_rows, -(-stop // shard_rows)):
            base = shard * shard_rows
            parts.append(self._shard(path, shard)[max(start - base, 0) : stop - base])
        return np.concatenate(parts)

    def _layout(self, path: str) -> tuple[int, int]:
        by_document = path.split("/")[1] in ("document_start", "document_file", "document_record")
        return DOCUMENT_ROWS if by_document else sequence_rows(self.context_size)

    def _read_shard(self, path: str, shard: int) -> np.ndarray:
        array, (shard_rows, chunk_rows) = self.manifest["arrays"][path], self._layout(path)
        rows = min(array["shape"][0] - shard * shard_rows, shard_rows)
        key = shard_key(path, shard, len(array["shape"]))
        data = self.store.read(key)
        chunk_shape = (chunk_rows, *array["shape"][1:])
        dtype = np.dtype(array["dtype"])
        return decode_shard(data, rows, chunk_shape, shard_rows, dtype, f"{self.store.url}/{key}")


def open_tokens(store: Store) -> TokenStore | None:
    """The token store in `store`, or None when it was not finished."""
    try:
        manifest = json.loads(store.read("_manifest/00000001.json"))
    except FileNotFoundError:
        return None
    check_format(manifest, store.url)
    if manifest.get("digest") != digest({k: v for k, v in manifest.items() if k != "digest"}):
        raise FormatError(
            f"{store.url}: the token store's manifest does not match its digest; delete it and re-run"
        )
    return TokenStore(store, manifest)


def in_order(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` that works on the next item in a thread while the caller has the last one in hand."""
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        running: deque[Future[B]] = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > 1:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def tokenise(
    spec: Spec,
    resolved: ResolvedCorpus,
    tokenizer: Any,
    root: Store,
    *,
    identity: dict[str, Any] | None = None,
    run: Map[Any, Any] = in_order,
    progress: bool = True,
) -> TokenStore:
    """The token store of this corpus and tokenizer under `root`; built unless it is there.

    Args:
        identity: the tokens identity of the dataset; None: as `tokens_identity` gives it, of a model that
            embeds all of the tokenizer's tokens.
        run: encodes batches of documents; results come in the order of the batches. The store is the
            same whatever it is.

    Raises:
        CorpusError: the corpus has no text, or no token of it would be a row; a malformed document in
            a strict corpus.
    """
    identity = tokens_identity(spec, resolved, tokenizer) if identity is None else identity
    store = root.sub(f"tokens/{token_store_name(identity, spec.corpus.shown)}")
    found = open_tokens(store)
    if found is not None:
        known = Skipped(dict(found.manifest["skipped"]))
        known.check_share(sum(map(found.n_documents, SPLITS)), spec.corpus)
        if spec.corpus.strict and known.n_malformed:
            raise CorpusError(
                f"{store.url} was built without these documents: {found.manifest['skipped']}. Repair them, or read "
                "the corpus without strict"
            )
        return found
    skipped = Skipped(strict=spec.corpus.strict)
    arrays: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="actcache-") as scratch, _Uploads(store) as uploads:
        writers = {split: _Split(split, identity, Path(scratch), uploads, arrays) for split in SPLITS}
        encode = Encoder(tokenizer, spec.corpus, identity, may_be_cut(tokenizer))
        with Progress("tokenise", spec.corpus.max_tokens, "tokens", show=progress) as bar:
            for document in _encoded(resolved, encode, skipped, run):
                writers[document.split].add(document)
                bar.advance(len(document.ids))
        skipped.check_share(sum(writer.packer.n_documents for writer in writers.values()), spec.corpus)
        for reason, count in skipped.counts.items():
            log.warning("%d documents skipped (%s), the first is %s", count, reason, skipped.first[reason])
        if not any(writer.packer.n_documents for writer in writers.values()):
            why = "".join(f", {count} documents skipped: {name}" for name, count in skipped.counts.items())
            raise CorpusError(
                f"corpus {spec.corpus.shown!r} holds no text ({len(resolved.files)} files read{why})"
            )
        splits = {split: writer.finish() for split, writer in writers.items()}
    if not writers["train"].packer.n_documents:
        n = sum(writer.packer.n_documents for writer in writers.values())
        raise CorpusError(
            f"corpus {spec.corpus.shown!r} has {n} documents, all of which fall into the other splits by their "
            "content; give more documents, or lower validation_share and test_share"
        )
    if not splits["train"]["n_rows"]:
        raise CorpusError(
            f"corpus {spec.corpus.shown!r} keeps no row: every token of its train split is special"
        )
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "kind": "tokens",
        "id": digest(identity),
        "identity": identity,
        "splits": splits,
        "arrays": arrays,
        "files": resolved.names,
        "skipped": skipped.counts,
    }
    for split in SPLITS:
        store.create(f"{split}/zarr.json", canonical_json(group_metadata({})).encode())
    store.create("zarr.json", canonical_json(group_metadata({"actcache": {"id": manifest["id"]}})).encode())
    manifest["digest"] = digest(manifest)
    store.create("_manifest/00000001.json", canonical_json(manifest).encode())
    return TokenStore(store, manifest)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document as token ids, or why it is passed over."""

    file: int
    record: int
    split: str
    ids: np.ndarray
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Encoder:
    """Batches of documents to token ids and splits: what runs in parallel, here or elsewhere."""

    tokenizer: Any
    corpus: Corpus
    identity: Mapping[str, Any]
    in_pieces: bool
    """Whether a long text is tokenised piece by piece, which bounds the memory it takes."""

    def __call__(self, batch: Sequence[Document]) -> list[Encoded]:
        """Each document of the batch, in order."""
        if self.corpus.token_field is not None:
            return [self._finish(d, d.content, np.ascontiguousarray(d.content, "<i8")) for d in batch]
        texts = [self._rendered(d.content) for d in batch]
        ids = iter(self._ids([text for text in texts if text is not None]))
        return [
            self._refused(document, "refused by the chat template")
            if text is None
            else self._finish(document, text, next(ids))
            for document, text in zip(batch, texts, strict=True)
        ]

    def _ids(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Token ids int64 of each text; long ones by pieces where that gives the same ids."""
        short = [text for text in texts if not (self.in_pieces and len(text) > PIECE_LENGTH)]
        ids = iter(self._tokenised(short))
        for text in texts:
            if self.in_pieces and len(text) > PIECE_LENGTH:
                yield np.concatenate([self._tokenised([piece])[0] for piece in pieces(text, PIECE_LENGTH)])
            else:
                yield next(ids)

    def _tokenised(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.asarray(ids, "<i8") for ids in found["input_ids"]]

    def _rendered(self, content: Any) -> str | None:
        if self.corpus.chat_field is None:
            return str(content)
        import jinja2

        try:
            return str(self.tokenizer.apply_chat_template(content, tokenize=False))
        except jinja2.TemplateError:
            return None

    def _finish(self, document: Document, content: Any, ids: np.ndarray) -> Encoded:
        corpus, identity = self.corpus, self.identity
        data = content if isinstance(content, str) else ids.tobytes()
        split = split_of(data, corpus.validation_share, corpus.test_share)
        if len(ids) and not (ids.min() >= 0 and ids.max() < identity["vocab_size"]):
            return self._refused(document, "token ids outside of the vocabulary")
        given = corpus.token_field is not None or corpus.chat_field is not None
        concat, eos = identity["packing"] == "concat", identity["eos_token_id"]
        if given and not concat and identity["bos_token_id"] is not None:
            ids = ids[1:] if len(ids) and ids[0] == identity["bos_token_id"] else ids  # packing puts one
        if not len(ids):
            return self._refused(document, "without a token")
        if concat and not (given and ids[-1] == eos):
            ids = np.append(ids, eos)
        return Encoded(document.file, document.record, split, ids.astype(np.uint32))

    def _refused(self, document: Document, reason: str) -> Encoded:
        return Encoded(document.file, document.record, "", np.zeros(0, np.uint32), reason)


def _encoded(
    resolved: ResolvedCorpus, encode: Encoder, skipped: Skipped, run: Map[Any, Any]
) -> Iterator[Encoded]:
    """The corpus's documents as token ids, in order, until there are `max_tokens`."""
    seen, limit = 0, resolved.corpus.max_tokens
    for batch in run(encode, _batches(documents(resolved, skipped), resolved, encode.in_pieces)):
        for document in batch:
            if limit is not None and seen >= limit:
                return
            if document.reason is not None:
                skipped.add(document.reason, resolved.where(document.file, document.record))
                continue
            seen += len(document.ids)
            yield document


def _batches(
    found: Iterable[Document], resolved: ResolvedCorpus, in_pieces: bool
) -> Iterator[list[Document]]:
    """Runs of documents that are tokenised together, bounded in number and length."""
    batch: list[Document] = []
    length = 0
    for document in found:
        size = len(document.content)
        if size > _HUGE and isinstance(document.content, str) and not in_pieces:
            where = resolved.where(document.file, document.record)
            log.warning(
                "%s: %s characters, which this tokenizer must take as a whole", where, format_count(size)
            )
        if batch and (len(batch) == _BATCH_DOCUMENTS or length + size > _BATCH_LENGTH):
            yield batch
            batch, length = [], 0
        batch.append(document)
        length += size
    if batch:
        yield batch


class _Uploads:
    """Shards on their way into the store, a few at a time; an error comes out of a later call."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pool = ThreadPoolExecutor(_WRITES, thread_name_prefix="tokens")
        self._running: deque[Future[Any]] = deque()

    def __enter__(self) -> "_Uploads":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def put(self, path: str, shard: int, values: np.ndarray, array: Mapping[str, Any]) -> None:
        """Create a shard; waits while too many are on their way."""
        while len(self._running) >= 2 * _WRITES:
            self._running.popleft().result()
        self._running.append(self._pool.submit(create_exact_shard, self.store, path, shard, values, array))

    def wait(self) -> None:
        """All are in the store."""
        while self._running:
            self._running.popleft().result()


class _Array:
    """One array of the token store, written from its beginning to its end."""

    def __init__(self, uploads: _Uploads, path: str, rows: tuple[int, int]) -> None:
        self._uploads, self._path = uploads, path
        self._array = {"shard_rows": rows[0], "chunk_rows": rows[1], "fill": 0, "by_column": False}
        self._held: list[np.ndarray] = []
        self._n_held = self._shard = self.n = 0

    def append(self, values: np.ndarray) -> None:
        """The next rows, in the dtype that is stored."""
        self._held.append(values)
        self._n_held += len(values)
        self.n += len(values)
        size = self._array["shard_rows"]
        while self._n_held >= size:
            rows = np.concatenate(self._held)
            self._put(rows[:size])
            self._held, self._n_held = [rows[size:]], self._n_held - size

    def _put(self, rows: np.ndarray) -> None:
        self._uploads.put(self._path, self._shard, rows, self._array)
        self._shard += 1

    def finish(self, arrays: dict[str, Any]) -> None:
        """Write the last shard and the metadata; enter the array in `arrays`."""
        rows = np.concatenate(self._held)
        if len(rows):
            self._put(rows)
        shape = (self.n, *rows.shape[1:])
        arrays[self._path] = {"shape": list(shape), "dtype": rows.dtype.str}
        metadata = array_metadata(
            shape, self._array["shard_rows"], self._array["chunk_rows"], rows.dtype, 0, {}
        )
        self._uploads.store.create(f"{self._path}/zarr.json", canonical_json(metadata).encode())


class _Split:
    """One split in the making: documents are noted and packed as they come, sequences shuffled at the end."""

    def __init__(
        self,
        split: str,
        identity: Mapping[str, Any],
        scratch: Path,
        uploads: _Uploads,
        arrays: dict[str, Any],
    ) -> None:
        self._split, self._identity, self._uploads, self._arrays = split, identity, uploads, arrays
        self.packer = Packer(identity)
        self._spill = Spill(scratch / split, self.packer.dtype)
        self._documents = {
            name: self._array(name, DOCUMENT_ROWS)
            for name in ("document_start", "document_file", "document_record")
        }
        self._noted: list[tuple[int, int, int]] = []
        self._n_tokens = 0

    def _array(self, name: str, rows: tuple[int, int]) -> _Array:
        return _Array(self._uploads, f"{self._split}/{name}", rows)

    def add(self, document: Encoded) -> None:
        """Pack a document."""
        self.packer.add(document.ids)
        self._noted.append((self._n_tokens, document.file, document.record))
        self._n_tokens += len(document.ids)
        if len(self._noted) == DOCUMENT_ROWS[0]:
            self._note()
        if self.packer.ready() * self._identity["context_size"] >= _TAKE_TOKENS:
            self._spill.append(self.packer.take())

    def _note(self) -> None:
        noted = np.array(self._noted, np.int64).reshape(-1, 3)
        self._noted = []
        for array, values, dtype in zip(
            self._documents.values(), noted.T, ("<i8", "<u4", "<i8"), strict=True
        ):
            array.append(values.astype(dtype))

    def finish(self) -> dict[str, int]:
        """Shuffle and store the sequences; returns the split's sizes."""
        self._note()
        self._documents["document_start"].append(np.array([self._n_tokens], "<i8"))
        self._spill.append(self.packer.take(last=True))
        rows = sequence_rows(self._identity["context_size"])
        names = ("input_ids", "length", "document", "document_offset", "document_begins", "row_start")
        arrays = {name: self._array(name, rows) for name in names}
        n_rows = 0
        arrays["row_start"].append(np.zeros(1, "<i8"))
        order_S = permutation(self._spill.n, "sequences", self._identity["seed"], self._split)
        blank = self.packer.take(last=True)  # so that an array without rows has its shape
        for records_S in self._spill.shuffled(order_S, rows[0]) if self._spill.n else [blank]:
            for name in names[:4]:
                arrays[name].append(np.ascontiguousarray(records_S[name]))
            begins_ST = np.unpackbits(
                records_S["document_begins"], axis=1, count=self._identity["context_size"]
            )
            arrays["document_begins"].append(begins_ST)
            special = self._identity["special_token_ids"]
            kept_S = kept_tokens(records_S["input_ids"], records_S["length"], special).sum(axis=1)
            arrays["row_start"].append((n_rows + np.cumsum(kept_S)).astype("<i8"))
            n_rows += int(kept_S.sum())
        for array in (*arrays.values(), *self._documents.values()):
            array.finish(self._arrays)
        self._uploads.wait()
        log.info("%s: %s sequences, %s rows", self._split, format_count(self._spill.n), format_count(n_rows))
        return {
            "n_sequences": self._spill.n,
            "n_rows": n_rows,
            "n_documents": self.packer.n_documents,
            "n_tokens": self.packer.n_tokens,
            "n_tokens_cut": self.packer.n_tokens_cut,
        }
