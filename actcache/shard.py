"""Shard objects: the bytes of one Zarr v3 shard, assembled and parsed by the Zarr specification.

zarr-python 3.1 reads, modifies and writes whole shards; this writes one object in one go and
reads single chunks by range. zarr itself is the oracle in the tests. Format: docs/format.md,
"Shards" (Zarr v3 sharding codec 1.0, index at the end; inner codecs bytes, zstd, crc32c, or
transpose, bytes, blosc, crc32c where columns are to be compressed together).
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd

from .errors import RESTORE, CorruptObject

ZSTD_LEVEL = 1  # int8 codes of a GPT-2: levels 1, 3 and 9 all gave 5.33 bits; 9 at two thirds of the speed
_MISSING = 2**64 - 1
_RESIDUE = 0x48674BC7  # crc32c of anything followed by its own crc32c
_BLOSC = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": 2, "blocksize": 0}
_TRANSPOSED_ROWS = 16  # rows transposed at a time, so that their cache lines stay: 2-3 times the speed of all

Bytes = bytes | np.ndarray
"""Bytes, or uint8 [n]."""
Chunks = list[tuple[int, int]]
"""(offset, nbytes) of each chunk in a shard object, in C order; nbytes 0 where the chunk is absent."""


def chunk_checksums(data: bytes, chunks: Chunks) -> list[int]:
    """The crc32c that ends each chunk of a shard object; 0 where the chunk is absent.

    Recorded beside the offsets: a shard that is intact but not the committed one is then seen.
    (The crc of a whole object would not show it: what ends in its own crc has a constant one.)
    """
    return [struct.unpack_from("<I", data, at + size - 4)[0] if size else 0 for at, size in chunks]


def crc32c(data: Bytes) -> int:
    """CRC-32C (Castagnoli) of the bytes."""
    return int(google_crc32c.value(data))


def encode_shard(
    rows: np.ndarray, chunk_rows: int, shard_rows: int, fill_value: Any, by_column: bool = False
) -> tuple[bytes, Chunks]:
    """The shard object for `rows` [n, ...], n <= shard_rows, and where each chunk lies in it.

    A short last chunk is padded with `fill_value`; chunks past it are absent. `by_column` chooses the
    codecs for 2-byte codes whose columns differ.
    """
    assert shard_rows % chunk_rows == 0
    assert len(rows) <= shard_rows
    parts: list[bytes] = []
    chunks: Chunks = []
    offset = 0
    for i in range(0, shard_rows, chunk_rows):
        chunk = rows[i : i + chunk_rows]
        if not len(chunk):
            chunks.append((0, 0))
            continue
        if len(chunk) < chunk_rows:
            full = np.full((chunk_rows, *rows.shape[1:]), fill_value, rows.dtype)
            full[: len(chunk)] = chunk
            chunk = full
        payload = encode_chunk(chunk, by_column)
        parts.append(payload)
        chunks.append((offset, len(payload)))
        offset += len(payload)
    index = b"".join(struct.pack("<QQ", *(c if c[1] else (_MISSING, _MISSING))) for c in chunks)
    parts += [index, struct.pack("<I", crc32c(index))]
    return b"".join(parts), chunks


def encode_chunk(chunk: np.ndarray, by_column: bool = False) -> bytes:
    """bytes, zstd, crc32c; or transpose, bytes, blosc, crc32c."""
    little = np.ascontiguousarray(chunk, dtype=chunk.dtype.newbyteorder("<"))
    if by_column:
        columns = _transposed(little)
        packed = blosc.compress(columns, b"zstd", _BLOSC["clevel"], blosc.SHUFFLE, _BLOSC["blocksize"])
    else:
        packed = zstd.compress(little, ZSTD_LEVEL)
    packed = bytes(packed)
    return packed + struct.pack("<I", crc32c(packed))


def decode_chunk(
    payload: Bytes,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    key: str,
    checksum: int | None = None,
    by_column: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The chunk's array, its own checksum verified, and against the committed one if given.

    `out`, if given, is a contiguous array of that shape and dtype that receives it: no fresh memory.

    Raises:
        CorruptObject: the checksum or the decoded size is wrong; names `key`.
    """
    if len(payload) < 5 or crc32c(payload) != _RESIDUE:
        raise CorruptObject(
            f"{key}: a chunk of {len(payload)} bytes does not match its crc32c, the object is damaged; {RESTORE}"
        )
    if checksum is not None and struct.unpack("<I", bytes(payload[-4:]))[0] != checksum:
        raise CorruptObject(f"{key}: a chunk is intact but not the one that was committed; {RESTORE}")
    out = np.empty(tuple(shape), dtype) if out is None else out
    frame = memoryview(payload)[:-4]  # type: ignore[arg-type]  # an array is a buffer too
    stated = _blosc_content_size(frame) if by_column else _frame_content_size(frame)
    if stated != out.nbytes:
        raise CorruptObject(f"{key}: a chunk decodes to another size than its {out.nbytes} bytes")
    try:
        if by_column:
            columns = np.empty(out.shape[::-1], dtype)
            blosc.decompress(frame, columns)
            _transposed(columns, out)
        else:
            zstd.decompress(frame, out)
    except (RuntimeError, ValueError) as err:
        raise CorruptObject(f"{key}: a chunk is no frame of its {out.nbytes} bytes ({err})") from err
    return out


def _transposed(values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The transpose of a matrix, contiguous."""
    out = np.empty(values.shape[::-1], values.dtype) if out is None else out
    for i in range(0, len(values), _TRANSPOSED_ROWS):
        out[:, i : i + _TRANSPOSED_ROWS] = values[i : i + _TRANSPOSED_ROWS].T
    return out


def _blosc_content_size(frame: memoryview) -> int:
    """The content size that a blosc frame states, -1 if it states another length of itself."""
    if len(frame) < 16:
        return -1
    content, _, length = struct.unpack_from("<III", frame, 4)
    return int(content) if length == len(frame) else -1


def _frame_content_size(frame: memoryview) -> int | None:
    """The content size that a zstd frame header declares (RFC 8878, 3.1.1.1), None if it does not."""
    flag = frame[4]
    width = (1 if flag & 0x20 else 0, 2, 4, 8)[flag >> 6]
    at = 5 + (0 if flag & 0x20 else 1) + (0, 1, 2, 4)[flag & 3]
    if not width or len(frame) < at + width:
        return None
    size = int.from_bytes(frame[at : at + width], "little")
    return size + 256 if width == 2 else size


def parse_index(tail: bytes, n_chunks: int, key: str) -> Chunks:
    """The chunk table from the last `index_size(n_chunks)` bytes of a shard object.

    Raises:
        CorruptObject: the index does not match its checksum.
    """
    index = tail[:-4]
    if len(tail) != index_size(n_chunks) or struct.unpack("<I", tail[-4:])[0] != crc32c(index):
        raise CorruptObject(
            f"{key}: the shard index does not match its crc32c; the object is damaged or torn"
        )
    pairs = [struct.unpack_from("<QQ", index, 16 * i) for i in range(n_chunks)]
    return [(0, 0) if pair[0] == _MISSING else (pair[0], pair[1]) for pair in pairs]


def index_size(n_chunks: int) -> int:
    """Bytes of a shard's index with its checksum."""
    return 16 * n_chunks + 4


def decode_shard(
    data: bytes,
    n_rows: int,
    chunk_shape: Sequence[int],
    shard_rows: int,
    dtype: np.dtype[Any],
    key: str,
    by_column: bool = False,
) -> np.ndarray:
    """All `n_rows` rows of a shard object, every checksum verified.

    Raises:
        CorruptObject: index, a chunk or the number of chunks is wrong.
    """
    chunk_rows = chunk_shape[0]
    n_chunks = shard_rows // chunk_rows
    chunks = parse_index(data[-index_size(n_chunks) :], n_chunks, key)
    wanted = math.ceil(n_rows / chunk_rows)
    if any(not c[1] for c in chunks[:wanted]) or any(c[1] for c in chunks[wanted:]):
        raise CorruptObject(
            f"{key}: holds {sum(1 for c in chunks if c[1])} chunks; {n_rows} rows need {wanted}"
        )
    rows = np.empty((wanted * chunk_rows, *chunk_shape[1:]), dtype)
    for i, (at, size) in enumerate(chunks[:wanted]):
        out = rows[i * chunk_rows : (i + 1) * chunk_rows]
        decode_chunk(data[at : at + size], chunk_shape, dtype, key, by_column=by_column, out=out)
    return rows[:n_rows]


def array_metadata(
    shape: Sequence[int],
    shard_rows: int,
    chunk_rows: int,
    dtype: np.dtype[Any],
    fill_value: Any,
    attributes: dict[str, Any],
    by_column: bool = False,
) -> dict[str, Any]:
    """The `zarr.json` of an array whose shards `encode_shard` writes."""
    endian = (
        {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    )
    names = {"i": "int", "u": "uint", "f": "float"}
    if by_column:
        first = [{"name": "transpose", "configuration": {"order": [1, 0]}}, endian]
        compressor: dict[str, Any] = {"name": "blosc", "configuration": _BLOSC}
    else:
        first = [endian]
        compressor = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": f"{names[dtype.kind]}{8 * dtype.itemsize}",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [chunk_rows, *shape[1:]],
                    "codecs": [*first, compressor, {"name": "crc32c"}],
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "index_location": "end",
                },
            }
        ],
        "attributes": attributes,
    }


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """The `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def shard_key(path: str, shard: int, ndim: int) -> str:
    """Key of a shard of the array at `path`: `path/c/7/0` for a matrix, `path/c/7` for a vector."""
    return f"{path}/c/{shard}" + "/0" * (ndim - 1)
