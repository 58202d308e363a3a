"""Documents of a corpus: text files, jsonl, parquet, Arrow, from disk or any fsspec URL, one at a time.

This file finds a corpus's files, fixes their content by a digest, and reads documents in order:
texts, chats, or token ids. It holds one batch of a file's column, never a file of many documents. A
document that cannot be taken is counted by reason, or raises where the corpus is strict. It knows
nothing of tokenizers and token stores (`actcache.corpus`).
"""

import hashlib
import io
import json
import logging
import os
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from .corpus_files import filesystem, find_files, is_local_filesystem, public_cause
from .errors import CorpusError
from .retry import client_errors
from .spec import Corpus, canonical_json, public_text, public_url
from .store import client_options

log = logging.getLogger(__name__)

_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 1024
_HEAD_BYTES = 2**20
_PACKED_HEAD = 2**18
"""Limit of a packed text: unpacking what is cut off gives 64 KiB at a time, or nothing."""

EMPTY = "empty"
MAX_MALFORMED = 20
"""So many documents may be passed over whatever their share."""
_EARLY = 10_000
"""So many documents without a good one end the reading: the field has another name."""


class Document(NamedTuple):
    """One document, and where it came from."""

    file: int
    """Place in `ResolvedCorpus.files`."""
    record: int
    """Line (jsonl) or row (parquet, Arrow) in the file, from 0; 0 in a text file."""
    content: Any
    """Text; with `token_field` an integer array; with `chat_field` a list of messages."""


@dataclass
class Skipped:
    """How many documents were passed over, by reason; the report and the token store state it."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    """Where each reason was met first."""
    strict: bool = False

    def add(self, reason: str, where: str) -> None:
        """Count one.

        Raises:
            CorpusError: in strict mode, unless the document is only empty.
        """
        if self.strict and reason != EMPTY:
            raise CorpusError(f"{where}: {reason}. Repair it, or read the corpus without strict")
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    @property
    def n_malformed(self) -> int:
        """Documents that were passed over for another reason than being empty."""
        return sum(count for reason, count in self.counts.items() if reason != EMPTY)

    def check_share(self, n_taken: int, corpus: Corpus) -> None:
        """Refuse a corpus that is not what its description says.

        Raises:
            CorpusError: more documents than `Corpus.max_skipped_share` were passed over beside the `n_taken`.
        """
        share = self.n_malformed / max(1, n_taken + self.n_malformed)
        if self.n_malformed > MAX_MALFORMED and share > corpus.max_skipped_share:
            reason = max((r for r in self.counts if r != EMPTY), key=self.counts.__getitem__)
            first = f", the first of these is {self.first[reason]}" if reason in self.first else ""
            raise CorpusError(
                f"corpus {corpus.shown!r}: {self.n_malformed} of {n_taken + self.n_malformed} documents cannot be taken "
                f"({share:.0%}; at most {corpus.max_skipped_share:.0%} may be): {self.counts[reason]} {reason}{first}. "
                "Name the right field or format, repair the files, or raise max_skipped_share (--max-skipped-share)"
            )


@dataclass(frozen=True)
class ResolvedCorpus:
    """The files of a corpus, in reading order, and the digest that fixes their content."""

    corpus: Corpus
    files: tuple[str, ...]
    """fsspec URLs or local paths."""
    storage_options: Mapping[str, Any]
    format: str
    """text, jsonl, parquet or arrow."""
    revision: str | None
    """What fixes the content; None where nobody has looked (`locate_corpus`)."""

    @property
    def field(self) -> str | None:
        """The field or column that is read; None for text files."""
        corpus = self.corpus
        return None if self.format == "text" else corpus.token_field or corpus.chat_field or corpus.text_field

    @property
    def names(self) -> list[str]:
        """The files as they may be written down: below the folder that holds them all."""
        files = [public_url(file) for file in self.files]
        folder = os.path.commonpath([os.path.dirname(f) for f in files])
        return [os.path.relpath(f, folder) if folder else f for f in files]

    def identity(self) -> dict[str, Any]:
        """What enters the token store's identity; no path and no URL does."""
        corpus = self.corpus
        holds = "tokens" if corpus.token_field else "chat" if corpus.chat_field else "text"
        return {
            "format": self.format,
            "revision": self.revision,
            "field": self.field,
            "holds": holds,
            "max_tokens": corpus.max_tokens,
            "split_rule": {
                "by": "sha256 of the content",
                "validation_share": float(corpus.validation_share),
                "test_share": float(corpus.test_share),
            },
        }

    def where(self, file: int, record: int) -> str:
        """A document's place for people: lines and rows from 1."""
        name = public_url(self.files[file])
        return (
            name
            if self.format == "text"
            else f"{name}, {'line' if self.format == 'jsonl' else 'row'} {record + 1}"
        )


def resolve_corpus(corpus: Corpus, storage_options: Mapping[str, Any] | None = None) -> ResolvedCorpus:
    """Find the corpus's files and fix their content by a digest.

    Raises:
        CorpusError: nothing matches, or files of different formats do.
    """
    return with_revision(locate_corpus(corpus, storage_options))


def with_revision(located: ResolvedCorpus) -> ResolvedCorpus:
    """The corpus with the digest of its content, unless it has a revision: local files are read whole."""
    revision = located.revision or _content_digest(located.files, located.storage_options)
    return replace(located, revision=revision)


def locate_corpus(corpus: Corpus, storage_options: Mapping[str, Any] | None = None) -> ResolvedCorpus:
    """As `resolve_corpus`, without reading the files: the revision is what the corpus states, or None."""
    options = {} if corpus.source == "bundled:stdlib" else client_options(storage_options)
    files, found = find_files(corpus, options)
    field = corpus.token_field or corpus.chat_field
    if found == "text" and field is not None:
        raise CorpusError(
            f"corpus {corpus.shown!r} is text files, which have no field {field!r}; give jsonl, parquet or Arrow files"
        )
    if found == "text" and corpus.text_field != "text":
        log.warning(
            "corpus %r is text files: each is one document, and no field %r is read",
            corpus.shown,
            corpus.text_field,
        )
    return ResolvedCorpus(corpus, tuple(files), options, found, corpus.revision)


def is_local(file: str, options: Mapping[str, Any]) -> bool:
    """Whether a corpus file lies on this machine's file systems, where its digest is that of its bytes."""
    return is_local_filesystem(filesystem(file, options)[0])


def file_size(resolved: ResolvedCorpus, file: int) -> int:
    """Stored bytes of one of the corpus's files."""
    fs, path = filesystem(resolved.files[file], resolved.storage_options)
    try:
        return int(fs.size(path))
    except client_errors() as err:
        raise _unreadable(public_url(resolved.files[file]), err) from public_cause(err)


class Beginning(NamedTuple):
    """The first records of a file, and how much of the file they are."""

    documents: list[tuple[Document, float]]
    """Each with its length over that of what was taken of it: 1 where it is whole."""
    share: float
    """Of the file's stored bytes that hold these records, about."""


def beginning(resolved: ResolvedCorpus, file: int, n_records: int, n_characters: int) -> Beginning:
    """The first `n_records` of a file, fewer once they have `n_characters`; a text is cut to so many.

    Reads no more than these need: a text file's first bytes, 1 MiB of jsonl unless a line is longer, the
    footer and a batch of parquet and Arrow. A record that cannot be taken counts to the share alone.

    Raises:
        CorpusError: as `documents`.
    """
    name, size = public_url(resolved.files[file]), file_size(resolved, file)
    fs, path = filesystem(resolved.files[file], resolved.storage_options)
    found: list[tuple[Document, float]] = []
    with _reading(name):
        if resolved.format == "text":
            end = max(n_characters, _PACKED_HEAD) if name.endswith((".gz", ".zst")) else n_characters
            head = bytes(fs.cat_file(path, start=0, end=end))
            data = _unpacked(head, name).removeprefix(BOM_UTF8)
            cut = data.decode(errors="ignore") if len(head) < size else data  # a cut may split a character
            value, reason = _take_text(cut)
            return Beginning([(Document(file, 0, value), size / len(head))] if reason is None else [], 1.0)
        length, share = 0, 0.0
        with fs.open(path, "rb") as raw:
            for number, ((value, reason), part) in enumerate(_first_records(resolved, name, raw, size)):
                share += part
                if reason is None:
                    cut = value[:n_characters] if isinstance(value, str) else value
                    found.append((Document(file, number, cut), len(value) / len(cut)))
                    length += len(cut)
                if number + 1 == n_records or length >= n_characters:
                    break
    return Beginning(found, share)


def _first_records(
    resolved: ResolvedCorpus, name: str, raw: Any, size: int
) -> Iterator[tuple["Taken", float]]:
    """Records of an open file of many, each with its share of the file's bytes; jsonl's not to the end."""
    take, field = _taker(resolved.corpus), resolved.field
    assert field is not None
    if resolved.format == "jsonl":
        for line, share in _first_lines(raw, name, size):
            value, reason = _json_field(line, field)
            yield (take(value) if reason is None else (None, reason)), share
        return
    rows = (_parquet_rows if resolved.format == "parquet" else _arrow_rows)(raw, name, size)
    raw.seek(0)
    columns = _parquet_column if resolved.format == "parquet" else _arrow_column
    for column in columns(raw, name, field):
        for value in _column_values(column, name, field, resolved.corpus):
            yield take(value), 1 / max(1.0, rows)


def _first_lines(raw: Any, name: str, size: int) -> Iterator[tuple[bytes, float]]:
    """The whole lines in the first MiB of a file, in more of it where they are longer."""
    head, text, wanted = b"", b"", _HEAD_BYTES
    while len(head) < size and b"\n" not in text:
        part = raw.read(wanted - len(head))
        if not part:
            break
        head += part
        text, wanted = _unpacked(head, name), 4 * wanted
    whole = text if len(head) >= size else text[: text.rfind(b"\n") + 1]
    for line in io.BytesIO(whole):
        yield line, len(line) / len(text) * len(head) / size


def _unpacked(head: bytes, name: str) -> bytes:
    """What the first bytes of a file hold; a packed one may end anywhere."""
    lines, parts = _unpacking(io.BytesIO(head), name), []
    try:
        while part := lines.read(2**16):
            parts.append(bytes(part))
    except (OSError, EOFError, zlib.error):
        if not parts:
            raise
    return b"".join(parts)


def _parquet_rows(raw: Any, name: str, size: int) -> float:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return float(pq.read_metadata(raw).num_rows)
    except pa.ArrowException as err:
        raise CorpusError(f"{name} is not a parquet file: {err}") from err


def _arrow_rows(raw: Any, name: str, size: int) -> float:
    """Rows of an Arrow file or stream, from its first and last batch or its first."""
    import pyarrow as pa

    try:
        try:
            table = pa.ipc.open_file(raw)
            n = table.num_record_batches
            return (
                float(table.get_batch(0).num_rows * (n - 1) + table.get_batch(n - 1).num_rows) if n else 0.0
            )
        except pa.ArrowInvalid:
            raw.seek(0)
            stream = pa.ipc.open_stream(raw)
            schema = raw.tell()
            rows = stream.read_next_batch().num_rows
            return rows * (size - schema) / (raw.tell() - schema)
    except StopIteration:
        return 0.0
    except pa.ArrowException as err:
        raise CorpusError(f"{name} is not an Arrow file or stream: {err}") from err


def documents(resolved: ResolvedCorpus, skipped: Skipped) -> Iterator[Document]:
    """The corpus's non-empty documents, in order; what cannot be taken is counted in `skipped`.

    Raises:
        CorpusError: a file that cannot be read at all, a column that is missing or of another type;
            more documents that cannot be taken than `Corpus.max_skipped_share` allows; with `skipped.strict`
            any at all.
    """
    n_taken = 0
    for number, file in enumerate(resolved.files):
        with _reading(public_url(file)):
            for record, (value, reason) in enumerate(_records(resolved, file)):
                if reason is None:
                    n_taken += 1
                    yield Document(number, record, value)
                else:
                    skipped.add(reason, resolved.where(number, record))
                    if not n_taken and skipped.n_malformed == _EARLY:
                        skipped.check_share(0, resolved.corpus)
    skipped.check_share(n_taken, resolved.corpus)


Taken = tuple[Any, str | None]
"""A document's content, or None and the reason why it is passed over."""


def _records(resolved: ResolvedCorpus, file: str) -> Iterator[Taken]:
    """Every record of a file, in order."""
    take = _taker(resolved.corpus)
    fs, path = filesystem(file, resolved.storage_options)
    file = public_url(file)
    if resolved.format == "text":
        data = _unpacking(io.BytesIO(fs.cat_file(path)), file).read()
        yield _take_text(bytes(data).removeprefix(BOM_UTF8))
        return
    name = resolved.field
    assert name is not None
    with fs.open(path, "rb") as raw:
        if resolved.format == "jsonl":
            for line in _lines(raw, file):
                value, reason = _json_field(line, name)
                yield take(value) if reason is None else (None, reason)
        else:
            columns = _parquet_column if resolved.format == "parquet" else _arrow_column
            for column in columns(raw, file, name):
                yield from map(take, _column_values(column, file, name, resolved.corpus))


def _taker(corpus: Corpus) -> Callable[[Any], Taken]:
    return _take_tokens if corpus.token_field else _take_messages if corpus.chat_field else _take_text


def _take_text(value: Any) -> Taken:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None, "not valid UTF-8"
    if not isinstance(value, str):
        return None, "without the field" if value is None else f"of type {type(value).__name__}, not text"
    if not value.strip():
        return None, EMPTY
    try:
        value.encode()
    except UnicodeEncodeError:
        return None, "not valid Unicode (lone surrogates)"
    return value, None


def _take_tokens(value: Any) -> Taken:
    """Integer array [N] of a list of ids."""
    if value is None:
        return None, "without the field"
    if not isinstance(value, np.ndarray):
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            return None, "not a list of integers"
        try:
            value = np.array(value, np.int64)
        except OverflowError:
            return None, "token ids outside of the vocabulary"
    return (value, None) if len(value) else (None, EMPTY)


def _take_messages(value: Any) -> Taken:
    if value is None:
        return None, "without the field"
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    ):
        return None, "not a list of messages with role and content"
    return (value, None) if value else (None, EMPTY)


def _lines(raw: Any, path: str) -> Iterator[bytes]:
    with io.BufferedReader(_unpacking(raw, path), 2**20) as lines:
        yield from lines


def _unpacking(raw: Any, path: str) -> Any:
    """`raw`, unpacked as the name of the file says."""
    if path.endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".zst"):
        import pyarrow as pa

        return pa.CompressedInputStream(raw, "zstd")
    return raw


def _json_field(line: bytes, name: str) -> Taken:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None, "not valid UTF-8"
    if not text.strip():
        return None, EMPTY
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None, "not JSON"
    if not isinstance(value, dict):
        return None, "not a JSON object"
    return value.get(name), None


def _parquet_column(raw: Any, file: str, name: str) -> Iterator[Any]:
    """The column's values, about 8 MiB at a time, whatever the size of its row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
    except pa.ArrowException as err:
        raise CorpusError(f"{file} is not a parquet file: {err}") from err
    _check_column(table.schema_arrow.names, file, name)
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    widest = 1
    for group in groups:
        of_column = (group.column(i) for i in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in of_column if c.path_in_schema.split(".")[0] == name)
        widest = max(widest, size // max(1, group.num_rows))
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // widest))
    for batch in table.iter_batches(batch_size=rows, columns=[name], use_threads=False):
        yield batch.column(0)


def _arrow_column(raw: Any, file: str, name: str) -> Iterator[Any]:
    """The column's values, a record batch at a time: IPC files (feather) and streams (`datasets`)."""
    import pyarrow as pa

    try:
        try:
            table = pa.ipc.open_file(raw)
        except pa.ArrowInvalid:
            raw.seek(0)
            table = pa.ipc.open_stream(raw)
    except pa.ArrowException as err:
        raise CorpusError(f"{file} is not an Arrow file or stream: {err}") from err
    _check_column(table.schema.names, file, name)
    index = table.schema.get_field_index(name)
    if isinstance(table, pa.RecordBatchFileReader):
        batches: Iterator[Any] = (table.get_batch(i) for i in range(table.num_record_batches))
    else:
        batches = iter(table)
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.column(index).slice(start, _BATCH_ROWS)


def _check_column(names: Sequence[str], file: str, name: str) -> None:
    if name not in names:
        raise CorpusError(f"{file} has no column {name!r}; it has {', '.join(names)}. Set text_field")


def _column_values(column: Any, file: str, name: str, corpus: Corpus) -> Iterator[Any]:
    """Bytes, messages or integer arrays, None where null; the type of the column is checked."""
    import pyarrow as pa
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if types.is_null(kind):
        yield from [None] * len(column)
    elif corpus.chat_field:
        if not (types.is_list(kind) or types.is_large_list(kind)) or not types.is_struct(kind.value_type):
            raise CorpusError(f"{file}: column {name!r} is {kind}; messages are a list of structs")
        yield from column.to_pylist()
    elif corpus.token_field:
        if types.is_fixed_size_list(kind):
            column = column.cast(pa.list_(kind.value_type))
        elif not (types.is_list(kind) or types.is_large_list(kind)):
            raise CorpusError(f"{file}: column {name!r} is {kind}; token ids are a list of integers")
        if not types.is_integer(column.type.value_type):
            raise CorpusError(f"{file}: column {name!r} is {kind}; token ids are a list of integers")
        yield from _id_arrays(column)
    elif types.is_string(kind) or types.is_large_string(kind):  # bytes: invalid UTF-8 is found one by one
        yield from column.cast(pa.binary() if types.is_string(kind) else pa.large_binary()).to_pylist()
    elif types.is_binary(kind) or types.is_large_binary(kind):
        yield from column.to_pylist()
    else:
        raise CorpusError(f"{file}: column {name!r} is {kind}, not text. Set text_field or token_field")


def _id_arrays(column: Any) -> Iterator[Any]:
    """The lists of a list column as integer arrays, without a Python object for each id."""
    offsets, values = column.offsets.to_numpy(), column.values
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    holes = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    ids = values.fill_null(0).to_numpy(zero_copy_only=False)
    for i in range(len(column)):
        if not valid[i]:
            yield None
        elif holes is not None and holes[offsets[i] : offsets[i + 1]].any():
            yield "a list with nulls"  # no list of integers
        else:
            yield ids[offsets[i] : offsets[i + 1]]


def _content_digest(files: Sequence[str], options: Mapping[str, Any]) -> str:
    """sha256 over the files' contents (local) or ETags and sizes (remote), in order; no names."""
    total = hashlib.sha256()
    for file in files:
        fs, path = filesystem(file, options)
        if is_local(file, options):
            with open(path, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            with _reading(public_url(file)):
                info = fs.info(path)
            fixed = [info.get(k) for k in ("ETag", "etag", "blob_id", "sha256", "md5Hash") if info.get(k)]
            total.update(
                canonical_json([info["size"], *(str(f) for f in fixed or [fs.checksum(path)])]).encode()
            )
    return f"sha256:{total.hexdigest()}"


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """A file that cannot be read to its end is an error that names it: what follows would be missing."""
    import pyarrow as pa

    try:
        yield
    except CorpusError:
        raise
    except (*client_errors(), EOFError, zlib.error, pa.ArrowException) as err:
        raise _unreadable(file, err) from public_cause(err)


def _unreadable(file: str, err: BaseException) -> CorpusError:
    return CorpusError(f"cannot read corpus file {file}: {public_text(err)}")
