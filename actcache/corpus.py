"""Corpora and token stores: text in, packed and globally shuffled sequences out.

A corpus is read document by document; each goes to a split by a hash of its content, is
tokenised and packed. Each split is shuffled once at sequence level into a *token store*: plain
Zarr that every model with the tokenizer shares. What is skipped is counted and reported.
Specified in docs/format.md, "Token store".
Shapes: S sequences of a split, T = context_size.
"""

import hashlib
import json
import logging
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from .commit import create_exact_shard
from .errors import CorpusError, FormatError, SpecError
from .manifest import SPLITS, check_format
from .order import permutation
from .progress import Progress, format_count
from .retry import client_errors
from .shard import array_metadata, decode_shard, group_metadata, shard_key
from .spec import FORMAT, Corpus, Spec, canonical_json, digest, token_store_name
from .store import Store, client_options

log = logging.getLogger(__name__)

_SHARD_SEQUENCES = 4096
_CHUNK_SEQUENCES = 256
_ARRAY = {"chunk_rows": _CHUNK_SEQUENCES, "shard_rows": _SHARD_SEQUENCES, "fill": 0, "by_column": False}
_BATCH_DOCUMENTS = 64
_JSONL = (".jsonl", ".jsonl.gz", ".ndjson")


def split_of(text: str, validation_share: float = 0.05, test_share: float = 0.05) -> str:
    """The split of a document: fixed by its content alone, so a duplicate lands in the same one."""
    u = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    if u < validation_share:
        return "validation"
    return "test" if u < validation_share + test_share else "train"


@dataclass
class Skipped:
    """How many documents were passed over, by reason; the report and the token store state it."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    """Where each reason was met first."""

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)


@dataclass(frozen=True)
class ResolvedCorpus:
    """The files of a corpus, in reading order, and the digest that fixes their content."""

    corpus: Corpus
    files: tuple[str, ...]
    """fsspec URLs or local paths, sorted."""
    storage_options: Mapping[str, Any]
    format: str
    """text, jsonl or parquet."""
    revision: str

    def identity(self) -> dict[str, Any]:
        """What enters the token store's identity; no path and no URL does."""
        corpus = self.corpus
        return {
            "format": self.format,
            "revision": self.revision,
            "text_field": corpus.text_field if self.format != "text" else None,
            "max_tokens": corpus.max_tokens,
            "split_rule": {
                "by": "sha256 of the content",
                "validation_share": float(corpus.validation_share),
                "test_share": float(corpus.test_share),
            },
        }


def resolve_corpus(corpus: Corpus, storage_options: Mapping[str, Any] | None = None) -> ResolvedCorpus:
    """Find the corpus's files and fix their content by a digest.

    Raises:
        CorpusError: nothing matches, or files of different formats do.
    """
    options = client_options(storage_options)
    if corpus.source == "bundled:stdlib":
        files = _stdlib_files()
        options = {}
    elif corpus.source.startswith("bundled:"):
        raise CorpusError(f"corpus {corpus.source!r} is not bundled; the only one is bundled:stdlib")
    else:
        files = _find_files(corpus.source, options)
    formats = {_format_of(f) for f in files}
    if len(formats) > 1:
        raise CorpusError(
            f"corpus {corpus.source!r} matches files of formats {', '.join(sorted(formats))}; give a glob of one"
        )
    revision = corpus.revision or _content_digest(files, options)
    return ResolvedCorpus(corpus, tuple(files), options, formats.pop(), revision)


def documents(resolved: ResolvedCorpus, skipped: Skipped) -> Iterator[str]:
    """The corpus's non-empty texts, in order; what cannot be read is counted in `skipped`."""
    field_name = resolved.corpus.text_field
    for file in resolved.files:
        if resolved.format == "text":
            texts = iter([(file, _read_text(file, resolved.storage_options))])
        elif resolved.format == "jsonl":
            texts = _jsonl_texts(file, field_name, resolved.storage_options)
        else:
            texts = _parquet_texts(file, field_name, resolved.storage_options)
        for where, text in texts:
            if text is None:
                skipped.add("not valid UTF-8 or JSON, or without the text field", where)
            elif not text.strip():
                skipped.add("empty", where)
            elif not _encodable(text):
                skipped.add("not valid Unicode (lone surrogates)", where)
            else:
                yield text


def tokens_identity(spec: Spec, resolved: ResolvedCorpus, tokenizer: Any) -> dict[str, Any]:
    """The identity of the token store: what decides which token is where, and nothing of the model.

    Raises:
        SpecError: the tokenizer has no EOS to join documents with, or no BOS where one is asked for.
    """
    if tokenizer.eos_token_id is None:
        raise SpecError("the tokenizer has no EOS token; packing 'concat' joins documents with it. Set one")
    prepend_bos = tokenizer.bos_token_id is not None if spec.prepend_bos is None else spec.prepend_bos
    if prepend_bos and tokenizer.bos_token_id is None:
        raise SpecError("prepend_bos is True, but the tokenizer has no BOS token; set prepend_bos to False")
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_digest(tokenizer),
        "vocab_size": len(tokenizer),
        "corpus": resolved.identity(),
        "packing": spec.packing,
        "context_size": spec.context_size,
        "bos_token_id": tokenizer.bos_token_id if prepend_bos else None,
        "eos_token_id": tokenizer.eos_token_id,
        "special_token_ids": sorted(set(tokenizer.all_special_ids)),
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


class TokenStore:
    """Committed, shuffled sequences of each split. Reads are ranged; nothing is held but one shard."""

    def __init__(self, store: Store, manifest: Mapping[str, Any]) -> None:
        self.store, self.manifest = store, manifest
        self._shard = lru_cache(maxsize=4)(self._read_shard)

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

    def row_start(self, split: str) -> np.ndarray:
        """int64 [S + 1]: kept rows before each sequence."""
        return self._row_start(split)

    @lru_cache(maxsize=4)  # noqa: B019 - one store per process, three splits
    def _row_start(self, split: str) -> np.ndarray:
        n = self.n_sequences(split) + 1
        shards = -(-n // _SHARD_SEQUENCES)
        return np.concatenate([self._shard(f"{split}/row_start", i, n) for i in range(shards)])

    def sequences(self, split: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences [start, stop): input_ids [n, T] (padded with EOS) and length [n]."""
        n = self.n_sequences(split)
        assert 0 <= start <= stop <= n
        ids, lengths = [], []
        for shard in range(start // _SHARD_SEQUENCES, -(-stop // _SHARD_SEQUENCES)):
            base = shard * _SHARD_SEQUENCES
            part = slice(max(start - base, 0), stop - base)
            ids.append(self._shard(f"{split}/input_ids", shard, n)[part])
            lengths.append(self._shard(f"{split}/length", shard, n)[part])
        return np.concatenate(ids), np.concatenate(lengths)

    def _read_shard(self, path: str, shard: int, n: int) -> np.ndarray:
        array = self.manifest["arrays"][path]
        rows = min(n - shard * _SHARD_SEQUENCES, _SHARD_SEQUENCES)
        key = shard_key(path, shard, len(array["shape"]))
        data = self.store.read(key)
        chunk_shape = (_CHUNK_SEQUENCES, *array["shape"][1:])
        dtype = np.dtype(array["dtype"])
        return decode_shard(data, rows, chunk_shape, _SHARD_SEQUENCES, dtype, f"{self.store.url}/{key}")


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


def tokenise(
    spec: Spec, resolved: ResolvedCorpus, tokenizer: Any, root: Store, *, progress: bool = True
) -> TokenStore:
    """The token store of this corpus and tokenizer under `root`; built unless it is there.

    Raises:
        CorpusError: the corpus has no text, or no token of it would be a row.
    """
    identity = tokens_identity(spec, resolved, tokenizer)
    store = root.sub(f"tokens/{token_store_name(identity, spec.corpus.source)}")
    found = open_tokens(store)
    if found is not None:
        return found
    skipped = Skipped()
    streams = _tokenise_documents(resolved, tokenizer, identity, skipped, progress)
    for reason, count in skipped.counts.items():
        log.warning("%d documents skipped (%s), the first is %s", count, reason, skipped.first[reason])
    if not any(len(s) for s in streams.values()):
        raise CorpusError(f"corpus {spec.corpus.source!r} holds no text ({len(resolved.files)} files read)")
    arrays: dict[str, Any] = {}
    splits = {
        split: _write_split(
            store, split, np.concatenate(streams[split] or [np.zeros(0, np.uint32)]), identity, arrays
        )
        for split in SPLITS
    }
    if not splits["train"]["n_rows"]:
        raise CorpusError(
            f"corpus {spec.corpus.source!r} keeps no row: every token of its train split is special"
        )
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "kind": "tokens",
        "id": digest(identity),
        "identity": identity,
        "splits": splits,
        "arrays": arrays,
        "skipped": skipped.counts,
    }
    for split in SPLITS:
        store.create(f"{split}/zarr.json", canonical_json(group_metadata({})).encode())
    store.create("zarr.json", canonical_json(group_metadata({"actcache": {"id": manifest["id"]}})).encode())
    manifest["digest"] = digest(manifest)
    store.create("_manifest/00000001.json", canonical_json(manifest).encode())
    return TokenStore(store, manifest)


def _tokenise_documents(
    resolved: ResolvedCorpus, tokenizer: Any, identity: Mapping[str, Any], skipped: Skipped, progress: bool
) -> dict[str, list[np.ndarray]]:
    """Token ids of each split's documents in order, each followed by EOS."""
    corpus, eos = resolved.corpus, identity["eos_token_id"]
    streams: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    seen = 0
    with Progress("tokenise", corpus.max_tokens, "tokens", show=progress) as bar:
        for batch in _batched(documents(resolved, skipped), _BATCH_DOCUMENTS):
            ids = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            for text, document in zip(batch, ids, strict=True):
                if corpus.max_tokens is not None and seen >= corpus.max_tokens:
                    return streams
                split = split_of(text, corpus.validation_share, corpus.test_share)
                streams[split].append(np.asarray([*document, eos], np.uint32))
                seen += len(document) + 1
                bar.advance(len(document) + 1)
    return streams


def _write_split(
    store: Store, split: str, stream: np.ndarray, identity: Mapping[str, Any], arrays: dict[str, Any]
) -> dict[str, int]:
    """Pack, shuffle and store one split's token stream; returns its sizes."""
    dtype = np.dtype("<u2" if identity["vocab_size"] <= 2**16 else "<u4")
    input_ids_ST, length_S = pack_concat(
        stream.astype(dtype), identity["context_size"], identity["bos_token_id"], identity["eos_token_id"]
    )
    order_S = permutation(len(length_S), "sequences", identity["seed"], split)
    input_ids_ST, length_S = input_ids_ST[order_S], length_S[order_S]
    kept_S = kept_tokens(input_ids_ST, length_S, identity["special_token_ids"]).sum(axis=1)
    row_start = np.concatenate([[0], np.cumsum(kept_S)]).astype("<i8")
    for name, values in (
        ("input_ids", input_ids_ST),
        ("length", length_S.astype("<u4")),
        ("row_start", row_start),
    ):
        path = f"{split}/{name}"
        arrays[path] = {"shape": list(values.shape), "dtype": values.dtype.str}
        for shard in range(-(-len(values) // _SHARD_SEQUENCES)):
            rows = values[shard * _SHARD_SEQUENCES : (shard + 1) * _SHARD_SEQUENCES]
            create_exact_shard(store, path, shard, rows, _ARRAY)
        metadata = array_metadata(values.shape, _SHARD_SEQUENCES, _CHUNK_SEQUENCES, values.dtype, 0, {})
        store.create(f"{path}/zarr.json", canonical_json(metadata).encode())
    log.info("%s: %s sequences, %s rows", split, format_count(len(length_S)), format_count(row_start[-1]))
    return {"n_sequences": len(length_S), "n_rows": int(row_start[-1])}


def pack_concat(
    stream: np.ndarray, context_size: int, bos_token_id: int | None, eos_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a token stream into sequences [S, T], each begun by BOS if given, and their lengths [S].

    The remainder becomes a short last sequence, padded with EOS; no token is dropped.
    """
    begin = 0 if bos_token_id is None else 1
    width = context_size - begin
    n = -(-len(stream) // width)
    input_ids_ST = np.full((n, context_size), eos_token_id, stream.dtype)
    if begin:
        input_ids_ST[:, 0] = bos_token_id
    body = np.full(n * width, eos_token_id, stream.dtype)
    body[: len(stream)] = stream
    input_ids_ST[:, begin:] = body.reshape(n, width)
    length_S = np.full(n, context_size, np.int64)
    if n:
        length_S[-1] = len(stream) - (n - 1) * width + begin
    return input_ids_ST, length_S


def _batched(items: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _stdlib_files() -> list[str]:
    """The running interpreter's standard library sources, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = [p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts)]
    return [str(p) for p in sorted(found, key=lambda p: p.relative_to(root).as_posix())]


def _find_files(source: str, options: Mapping[str, Any]) -> list[str]:
    fs, path = _filesystem(source, options)
    try:
        if fs.isdir(path):
            inside = sorted(fs.find(path))
            for kind in ("parquet", "jsonl", "text"):
                files = [f for f in inside if _format_of(f) == kind]
                if files:
                    break
        else:
            files = sorted(f for f in fs.glob(path) if not fs.isdir(f))
    except client_errors() as err:
        raise CorpusError(f"cannot list corpus {source!r}: {err}. Check the URL and the credentials") from err
    if not files:
        raise CorpusError(f"no file matches corpus {source!r}; give a file, a directory, a glob or a URL")
    return [fs.unstrip_protocol(f) if "://" in source else f for f in files]


def _filesystem(source: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(source, **options)
    except (ValueError, ImportError) as err:
        raise CorpusError(f"cannot open corpus {source!r}: {err}") from err
    return fs, path


def _format_of(file: str) -> str:
    if file.endswith(_JSONL):
        return "jsonl"
    return "parquet" if file.endswith(".parquet") else "text"


def _content_digest(files: Sequence[str], options: Mapping[str, Any]) -> str:
    """sha256 over the files' contents (local) or ETags and sizes (remote), in order; no names."""
    total = hashlib.sha256()
    for file in files:
        fs, path = _filesystem(file, options)
        if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
            with open(path, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            info = fs.info(path)
            fixed = [info.get(k) for k in ("ETag", "etag", "blob_id", "sha256", "md5Hash") if info.get(k)]
            total.update(
                canonical_json([info["size"], *(str(f) for f in fixed or [fs.checksum(path)])]).encode()
            )
    return f"sha256:{total.hexdigest()}"


def _read_bytes(file: str, options: Mapping[str, Any]) -> bytes:
    fs, path = _filesystem(file, options)
    try:
        return bytes(fs.cat_file(path))
    except client_errors() as err:
        raise CorpusError(f"cannot read corpus file {file}: {err}") from err


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(file: str, options: Mapping[str, Any]) -> str | None:
    try:
        return _read_bytes(file, options).decode()
    except UnicodeDecodeError:
        return None


def _jsonl_texts(file: str, field_name: str, options: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    fs, path = _filesystem(file, options)
    with fs.open(path, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}:{number}"
            try:
                value = json.loads(line)
            except ValueError:
                yield where, None
                continue
            text = value.get(field_name) if isinstance(value, dict) else None
            yield where, text if isinstance(text, str) else None


def _parquet_texts(
    file: str, field_name: str, options: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = _filesystem(file, options)
    with fs.open(path, "rb") as raw:
        try:
            table = pq.ParquetFile(raw)
        except pa.ArrowException as err:
            raise CorpusError(f"{file} is not a parquet file: {err}") from err
        if field_name not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise CorpusError(f"{file} has no column {field_name!r}; it has {names}. Set text_field")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field_name]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield f"{file}, row {row}", text if isinstance(text, str) else None
