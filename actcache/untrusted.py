"""Reading what a store holds without trusting it: JSON, Parquet and numbers, within limits.

A dataset may come from anywhere, and its digests with it, so nothing here relies on a digest. What a
file makes a reader allocate is bounded by the bytes that are really there, never by a number in it.
Everything is refused by an ActcacheError that says why.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import CorruptObject, FormatError
from .spec import FORMAT, MAX_BLOCK_ROWS, MAX_CONTEXT_SIZE, MAX_INTEGER, PACKINGS
from .store import Store

MAX_JSON_BYTES = 2**24
"""Of a manifest or a token store's: a real one has some 400 bytes for each thousand blocks."""
MAX_RECORD_BYTES = 2**28
MAX_CALIBRATION_BYTES = 2**28
MAX_SEGMENT_BYTES = 2**32
MAX_CHUNK_BYTES = 2**28
"""Of a decoded chunk; one of the default size has about 2^20."""
MAX_BLOCKS = 2**24
"""Of a split."""
_FREE_BYTES, _EXPANSION = 2**26, 100
"""A Parquet file may decode to 64 MiB and 100 times its size; those of real segments reach 20."""
_MAX_TEXT = 2**16
_MAX_DEPTH = 8


def read_whole(store: Store, key: str, limit: int) -> bytes:
    """All of an object of at most `limit` bytes.

    Raises:
        FileNotFoundError: no such object.
        FormatError: it is longer.
    """
    data = store.read(key, 0, limit + 1)
    if len(data) > limit:
        raise FormatError(f"{store.url}/{key} has more than {limit} bytes; it is not one that actcache wrote")
    return data


def load_json(data: bytes, where: str, remedy: str) -> Any:
    """JSON as this format writes it: no duplicate keys, NaN, infinity, lone surrogates or deep nesting.

    Raises:
        CorruptObject: anything else; says what, and where.
    """

    def refuse(what: str) -> Any:
        raise ValueError(f"{what} is not allowed")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) < len(items):
            refuse("a key that is there twice")
        return value

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text[:40])

    try:
        value = json.loads(data, object_pairs_hook=pairs, parse_constant=refuse, parse_float=number)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates, and nesting that cannot be written
    except (ValueError, RecursionError) as err:
        raise CorruptObject(f"{where} is damaged: not JSON of this format ({err}); {remedy}") from err
    return value


# Manifests


def check_manifest(value: Any, splits: tuple[str, ...], manifest_format: int) -> None:
    """Types and bounds of every field of a manifest that code relies on.

    Raises:
        ValueError: names the first field that is not what it must be.
    """
    identity = _mapping(value["identity"], "identity")
    _integer(identity["format"], "identity.format", 1, FORMAT)
    tokens = _mapping(identity["tokens"], "identity.tokens")
    for name in ("id", "revision", "lm_dtype"):
        _text(_mapping(identity["model"], "identity.model")[name], f"identity.model.{name}")
    _text(identity["precision"], "identity.precision")
    chunk_rows = _integer(identity["chunk_rows"], "identity.chunk_rows", 1, MAX_CHUNK_BYTES // 4)
    block_rows = _integer(identity["block_rows"], "identity.block_rows", 1, MAX_BLOCK_ROWS)
    if block_rows % chunk_rows:
        raise ValueError(f"block_rows {block_rows} is not a multiple of chunk_rows {chunk_rows}")
    _integer(identity["seed"], "identity.seed", -MAX_INTEGER, MAX_INTEGER)
    if tokens["packing"] not in PACKINGS:
        raise ValueError(
            f"identity.tokens.packing is {_shown(tokens['packing'])}, wanted {', '.join(PACKINGS)}"
        )
    _integer(tokens["vocab_size"], "identity.tokens.vocab_size", 1, 2**32)
    for name in ("bos_token_id", "eos_token_id"):
        if tokens[name] is not None:
            _integer(tokens[name], f"identity.tokens.{name}", 0, 2**32)
    _integer(tokens["context_size"], "identity.tokens.context_size", 1, MAX_CONTEXT_SIZE)
    for i, token in enumerate(_sequence(tokens["special_token_ids"], "identity.tokens.special_token_ids")):
        _integer(token, f"identity.tokens.special_token_ids[{i}]", 0, tokens["vocab_size"] - 1)
    _integer(value["version"], "version", 1, 10**8 - 1)
    _text(value["source"], "source")
    if type(value["complete"]) is not bool:
        raise ValueError(f"complete is {value['complete']!r}, wanted true or false")
    for name in ("wanted", "fidelity", "provenance", "splits", "sites"):
        _mapping(value[name], name)
    if set(value["splits"]) != set(splits):
        raise ValueError(f"splits are {sorted(value['splits'])[:5]}, wanted {', '.join(splits)}")
    for split, size in value["splits"].items():
        for name, number in _mapping(size, f"splits.{split}").items():
            _integer(number, f"splits.{split}.{name}", 0, 2**53)
        if not {"n_blocks", "n_rows", "n_sequences"} <= size.keys():
            raise ValueError(f"splits.{split} lacks n_blocks, n_rows or n_sequences")
        if size["n_blocks"] > MAX_BLOCKS or not size["n_rows"] <= size["n_blocks"] * block_rows:
            raise ValueError(f"splits.{split} has {size['n_rows']} rows in {size['n_blocks']} blocks")
    for site, extent in value["sites"].items():
        width = _integer(_mapping(extent, f"sites.{site}")["d_in"], f"sites.{site}.d_in", 1, 2**24)
        if not readable_chunk(chunk_rows, width):
            raise ValueError(f"sites.{site} has chunks of {chunk_rows} rows of {width}: too large to read")
        if set(_mapping(extent["n_blocks"], f"sites.{site}.n_blocks")) != set(splits):
            raise ValueError(f"sites.{site}.n_blocks is not by split")
        for split, n in extent["n_blocks"].items():
            _integer(n, f"sites.{site}.n_blocks.{split}", 0, value["splits"][split]["n_blocks"])
        _sha256(extent["calibration_sha256"], f"sites.{site}.calibration_sha256")
    if not _sequence(value["segments"], "segments") and any(s["n_rows"] for s in value["splits"].values()):
        raise ValueError("rows are committed, but no segment is listed")
    for i, segment in enumerate(value["segments"]):
        what = f"segments[{i}]"
        _integer(_mapping(segment, what)["n_records"], f"{what}.n_records", 0, 2**53)
        if manifest_format == 1:
            for kind in ("objects", "statistics"):
                _file({"key": segment[kind], "sha256": segment[f"{kind}_sha256"]}, kind, f"{what}.{kind}")
            continue
        for kind in ("records", "statistics"):
            _file(segment[kind], kind, f"{what}.{kind}")
        for j, part in enumerate(_sequence(segment["objects"], f"{what}.objects")):
            _file(part, "objects", f"{what}.objects[{j}]")
            for name in ("first", "last"):
                _text(part[name], f"{what}.objects[{j}].{name}")
    for site, figures in value["fidelity"].items():
        for name, number in _mapping(figures, f"fidelity.{site}").items():
            if type(number) not in (int, float, type(None)):
                raise ValueError(f"fidelity.{site}.{name} is {_shown(number)}, wanted a number")


def _file(value: Any, kind: str, what: str) -> None:
    """A file of a segment: its key is one that this format writes, so it cannot leave the prefix."""
    key = _text(_mapping(value, what)["key"], f"{what}.key")
    if not re.fullmatch(rf"_segments/[0-9a-f]{{16}}-{kind}\.parquet", key):
        raise ValueError(f"{what}.key is {_shown(key)}, wanted _segments/<16 hex digits>-{kind}.parquet")
    _sha256(value["sha256"], f"{what}.sha256")


def readable_chunk(chunk_rows: int, d_in: int) -> bool:
    """Whether a chunk of a site is small enough, as float32, that readers take it."""
    return 4 * chunk_rows * d_in <= MAX_CHUNK_BYTES


def _integer(value: Any, what: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {_shown(value)}, wanted an integer in {low}..{high}")
    return value


def _text(value: Any, what: str) -> str:
    """Text that can be shown: control characters would reach a terminal."""
    if type(value) is not str or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"{what} is {_shown(value)}, wanted printable text")
    return value


def _sha256(value: Any, what: str) -> None:
    if type(value) is not str or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{what} is {_shown(value)}, wanted 64 hex digits")


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{what} is {_shown(value)}, wanted an object")
    return value


def _sequence(value: Any, what: str) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{what} is {_shown(value)}, wanted a list")
    return value


def _shown(value: Any) -> str:
    if type(value) is int and abs(value) >= 2**63:
        return "an integer beyond 64 bits"
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


# Parquet


def read_parquet(
    data: bytes, schema: pa.Schema, where: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """The table in `data`, as `ParquetFile.read` gives it; all columns unless told."""
    return ParquetFile(data, schema, where).read(columns)


class ParquetFile:
    """A Parquet file of exactly this schema; columns and row groups are decoded when they are asked for.

    What all of it decodes to is bounded by the size of `data`: the page headers of a column are added up
    before it is decoded, and text and binary stay dictionaries until their lengths are added up.
    What is not asked for is not looked at. Not safe to use from two threads at once.

    Raises:
        FormatError: not Parquet, or another schema.
    """

    def __init__(self, data: bytes, schema: pa.Schema, where: str, earlier: pa.Schema | None = None) -> None:
        """`earlier`: a schema of an earlier format, which will do too; `schema` is then the one found."""
        self._data, self._where = data, where
        self._limit = _FREE_BYTES + _EXPANSION * len(data)
        self._counted: set[tuple[int, int]] = set()
        """(row group, column) whose pages are in `_total`."""
        self._total = 0
        with self._refused():
            file = pq.ParquetFile(pa.BufferReader(data))
            found = next((k for k in (schema, earlier) if k and file.schema_arrow.equals(k)), None)
            if found is None:
                raise FormatError(f"{where} has other columns than this format's")
            self.schema: pa.Schema = found
            self._metadata = file.metadata
            if str(self._metadata.created_by).startswith("parquet-cpp version"):
                raise ValueError("written by a version whose column sizes are wrong")
            if self._metadata.num_columns != len(found):
                raise ValueError(f"{self._metadata.num_columns} columns, wanted {len(found)}")
            groups = range(self._metadata.num_row_groups)
            self.group_rows = [int(self._metadata.row_group(g).num_rows) for g in groups]
            """Rows of each row group."""
            rows = self._metadata.num_rows
            if sum(self.group_rows) != rows or min(self.group_rows, default=0) < 0:
                raise ValueError(f"its row groups hold {sum(self.group_rows)} rows, its footer says {rows}")

    def read(
        self,
        columns: Sequence[str] | None = None,
        groups: Sequence[int] | None = None,
        *,
        encoded: bool = False,
    ) -> pa.Table:
        """Rows without nulls but in `constant`; all columns and all row groups unless told.

        `encoded` leaves text and binary as dictionaries.

        Raises:
            FormatError: larger than its bytes can honestly be, damaged, or with nulls.
        """
        schema = self.schema if columns is None else pa.schema([self.schema.field(c) for c in columns])
        groups = range(len(self.group_rows)) if groups is None else groups
        texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_binary(f.type)]
        if not len(groups):
            return schema.empty_table()
        with self._refused():
            for g in groups:
                for name in schema.names:
                    self._count(g, self.schema.get_field_index(name))
            # no threads: after an error Arrow's may still be at work on what was refused
            file = pq.ParquetFile(
                pa.BufferReader(self._data),
                metadata=self._metadata,
                read_dictionary=texts,
                pre_buffer=False,
            )
            table = file.read_row_groups(list(groups), columns=schema.names, use_threads=False)
            table = table.select(schema.names)
            for name in texts:
                table[name].validate(full=True)  # Parquet does not see that text is UTF-8
            if not encoded:
                for name in texts:
                    table = _expand(table, name, schema.field(name).type, self._limit)
                table = table.cast(schema)
            if len(table) != sum(self.group_rows[g] for g in groups):
                raise ValueError(f"its row groups decode to {len(table)} rows, its footer says otherwise")
        for name in schema.names:
            if name != "constant" and (table[name].null_count or _inner_nulls(table[name])):
                raise FormatError(
                    f"{self._where} has nulls in column {name}; it is not one that actcache wrote"
                )
        return table

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """Whatever Arrow raises over damaged bytes, as a FormatError."""
        try:
            yield
        except (pa.ArrowException, ValueError, OSError, IndexError, OverflowError) as err:
            reason = str(err).splitlines()[0] if str(err) else type(err).__name__
            raise FormatError(
                f"{self._where} is not a Parquet file of this format ({reason}); restore it"
            ) from err

    def _count(self, group: int, column: int) -> None:
        """Add to the total what a column of a row group decodes to, once.

        Raises:
            ValueError: more than the limit by now, or pages that lie outside of the file.
        """
        if (group, column) not in self._counted:
            found = self._metadata.row_group(group).column(column)
            left = self._limit - self._total
            self._total += _column_bytes(self._data, found, self.group_rows[group], left)
            self._counted.add((group, column))


def _inner_nulls(column: pa.ChunkedArray) -> int:
    if not pa.types.is_list(column.type):
        return 0
    return sum(chunk.values.null_count for chunk in column.chunks)


def _expand(table: pa.Table, name: str, kind: pa.DataType, limit: int) -> pa.Table:
    """The dictionary column as plain values, once their lengths are known to be bearable."""
    column = table[name]
    total = 0
    for chunk in column.chunks:
        if not isinstance(chunk, pa.DictionaryArray):
            total += chunk.nbytes
            continue
        lengths = pc.binary_length(chunk.dictionary)
        total += pc.sum(pc.take(lengths, chunk.indices)).as_py() or 0
    if total > limit:
        raise ValueError(f"column {name} decodes to {total} bytes")
    return table.set_column(table.schema.get_field_index(name), name, column.cast(kind))


def _column_bytes(data: bytes, column: Any, rows: int, limit: int) -> int:
    """What the pages of one column of a row group say they decode to, from their headers.

    Raises:
        ValueError: more than `limit` bytes, or pages that lie outside of the file.
    """
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    end, values, total = start + column.total_compressed_size, 0, 0
    if not 0 <= start <= end <= len(data):
        raise ValueError("a column lies outside of the file")
    while start < end:
        page, start = _read_struct(data, start, end)
        size, packed = page.get(2), page.get(3)
        if not isinstance(size, int) or not isinstance(packed, int) or size < 0 or packed < 0:
            raise ValueError("a page without sizes")
        start += packed
        if start > end:
            raise ValueError("a page lies outside of its column")
        heads = [h for h in (page.get(5), page.get(7), page.get(8)) if isinstance(h, dict)]
        n = max((h.get(1, 0) for h in heads), default=0)
        if not isinstance(n, int) or n < 0:
            raise ValueError("a page with a negative number of values")
        values += n if page.get(1) != 2 else 0  # not of a dictionary
        total += size + 12 * n  # the value or index of each, and its levels
        if total > limit:
            raise ValueError(f"its pages decode to {total - limit} bytes more than they honestly can")
    if values != column.num_values or values < rows:
        raise ValueError(f"its pages hold {values} values, its footer says {column.num_values}")
    return total


def _read_struct(data: bytes, at: int, end: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol: its integers and structs by field number, and where it ends."""
    if depth > _MAX_DEPTH:
        raise ValueError("a page header that nests too deep")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        if at >= end:
            raise ValueError("a page header that does not end")
        head = data[at]
        at += 1
        if head == 0:
            return fields, at
        kind, delta = head & 15, head >> 4
        if delta:
            number += delta
        else:
            number, at = _read_varint(data, at, end)
        fields[number], at = _read_value(data, at, end, kind, depth)


def _read_value(data: bytes, at: int, end: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # booleans are in the type
        return None, at
    if kind == 3:
        return None, at + 1
    if kind in (4, 5, 6):
        return _read_varint(data, at, end)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        size, at = _read_varint(data, at, end, zigzag=False)
        return None, at + size
    if kind == 12:
        return _read_struct(data, at, end, depth + 1)
    raise ValueError("a page header with a collection in it")


def _read_varint(data: bytes, at: int, end: int, *, zigzag: bool = True) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise ValueError("a page header that does not end")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return (value >> 1) ^ -(value & 1) if zigzag else value, at
        shift += 7
