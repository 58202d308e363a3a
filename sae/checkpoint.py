"""Checkpoints: one moment of a run, written in parts by its ranks, read back by rows of a tensor.

Under the run's directory, local or at any URL:

    checkpoints/{rows}/part-{attempt}-{rank}-of-{world}-{i}.safetensors   what one rank holds
    checkpoints/{rows}/done.json                                          that all parts are there

Only a checkpoint with a `done.json` exists. It holds the JSON state and, for each file, its size, the
crc32c of each block of 4 MiB, and for each tensor its place in the file and the rows of the whole tensor
that it is. So a rank of any world size reads the rows that it needs, and every byte that it reads is
checked. Parts are written by sae/checkpoint_writer.py; which checkpoint is the newest, how one becomes complete
and what may go is sae/checkpoint_folder.py's. Never pickle, never `torch.load`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from actcache.errors import CorruptObject, FormatError
from actcache.shard import crc32c

from .tensors import DTYPES

if TYPE_CHECKING:
    from actcache.store import Store

FORMAT = 3  # 1 had the logarithms of JumpReLU's thresholds, 2 was one file
FOLDER, DONE_FILE = "checkpoints", "done.json"
BLOCK_BYTES = 4 << 20
"""What one checksum covers, and the least that is read."""
_BLOCKS_AT_ONCE = 4  # of one read: 16 MiB
FILE_NAME = re.compile(r"part-([0-9a-z]+)-(\d{5,})-of-(\d{5,})-(\d{4,})\.safetensors")


class TensorPlace(TypedDict):
    """Where a tensor lies in a file, and which rows of the whole tensor it is."""

    dtype: str
    """As in a safetensors header, e.g. F32."""
    shape: list[int]
    start: int
    """First byte in the file."""
    first: int
    """Its first row among those of the whole tensor."""
    whole: int | None
    """Rows of the whole tensor; None for a single number, which has no rows."""


class PartFile(TypedDict):
    """A safetensors file of a part."""

    name: str
    size_bytes: int
    crc32c: list[int]
    """Checksum of each block of 4 MiB."""
    tensors: dict[str, TensorPlace]


class PartInfo(TypedDict):
    """What one rank wrote of a checkpoint; JSON-able, for the rank that completes it."""

    rows: int
    rank: int
    world: int
    files: list[PartFile]


def folder_of(rows: int) -> str:
    """The folder of the checkpoint after `rows` rows; names sort as numbers."""
    return f"{FOLDER}/{rows:016d}"


@dataclass(frozen=True)
class _Slice:
    """Rows [first, first + rows) of a tensor: `rows * row_bytes` bytes from `start` of `file`."""

    file: PartFile
    start: int
    first: int
    rows: int
    row_bytes: int


@dataclass(frozen=True)
class _Whole:
    """A tensor of a checkpoint, as the slices that parts hold."""

    dtype: str
    whole: int | None
    row_shape: tuple[int, ...]
    slices: tuple[_Slice, ...]
    """By `first`; together they are all rows, and no two of them share one."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row_shape if self.whole is None else (self.whole, *self.row_shape)


class StoredCheckpoint(Mapping[str, Tensor]):
    """A complete checkpoint: its JSON state, and its tensors by name, read when they are asked for."""

    def __init__(
        self, store: "Store", rows: int, state: Mapping[str, Any], files: Sequence[PartFile]
    ) -> None:
        self.rows, self.state = rows, dict(state)
        self.store, self._folder = store, folder_of(rows)
        self.where = f"{store.url}/{self._folder}"
        self._tensors = _assembled(self.where, files)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._tensors[name].shape

    def under(self, prefix: str) -> "Mapping[str, Tensor]":
        """The tensors whose names begin with `prefix`, by the rest of the name; read when asked for."""
        return _Under(self, prefix)

    def read(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows [first, stop) of a tensor, whoever wrote them; all of it by default.

        Raises:
            KeyError: the checkpoint has no such tensor.
            ValueError: it has fewer rows.
            CorruptObject: a file is missing, cut off, or differs from its checksums.
        """
        tensor = self._tensors[name]
        if tensor.whole is None:
            out = torch.empty(tensor.row_shape, dtype=DTYPES[tensor.dtype])
            first, last = 0, 1
        else:
            last = tensor.whole if stop is None else stop
            if not 0 <= first <= last <= tensor.whole:
                raise ValueError(f"rows {first} to {last} of {name} are asked for; it has {tensor.whole}")
            out = torch.empty((last - first, *tensor.row_shape), dtype=DTYPES[tensor.dtype])
        target = out.reshape(-1).view(torch.uint8).numpy() if out.numel() else np.empty(0, np.uint8)
        jobs = [
            job
            for part in tensor.slices
            for job in _reads(part, max(first, part.first), min(last, part.first + part.rows), first)
        ]
        if len(jobs) == 1:
            self._fill(target, *jobs[0])
        elif jobs:
            with ThreadPoolExecutor(min(len(jobs), self.store.concurrent_reads)) as pool:
                list(pool.map(lambda job: self._fill(target, *job), jobs))
        return out

    def _fill(self, target: np.ndarray, file: PartFile, start: int, stop: int, at: int) -> None:
        """Bytes [start, stop) of a file into `target` from `at`, checked block by block."""
        base = start - start % BLOCK_BYTES
        end = min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, file["size_bytes"])
        key = f"{self._folder}/{file['name']}"
        try:
            data = np.frombuffer(self.store.read_part(key, base, end), np.uint8)
        except FileNotFoundError as error:
            raise self._damaged(f"{self.store.url}/{key} is missing") from error
        if len(data) != end - base:
            raise self._damaged(f"{self.store.url}/{key} ends after {base + len(data)} of {end} bytes")
        for offset in range(0, len(data), BLOCK_BYTES):
            block = (base + offset) // BLOCK_BYTES
            if crc32c(data[offset : offset + BLOCK_BYTES]) != file["crc32c"][block]:
                raise self._damaged(f"{self.store.url}/{key} differs from its checksum in block {block}")
        target[at : at + stop - start] = data[start - base : stop - base]

    def _damaged(self, what: str) -> CorruptObject:
        return CorruptObject(f"{what}; {_REMEDY.format(where=self.where)}")


class _Under(Mapping[str, Tensor]):
    def __init__(self, checkpoint: StoredCheckpoint, prefix: str) -> None:
        self._checkpoint, self._prefix = checkpoint, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.read(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self._prefix) for n in self._checkpoint if n.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


_REMEDY = "restore it from a copy, or remove {where} to go on from an older checkpoint or from the start"


def _reads(part: _Slice, first: int, stop: int, origin: int) -> Iterator[tuple[PartFile, int, int, int]]:
    """(file, start, stop, place in the target) of reads of some blocks, for rows [first, stop) of a slice."""
    if first >= stop:
        return
    start = part.start + (first - part.first) * part.row_bytes
    end = part.start + (stop - part.first) * part.row_bytes
    at, step = (first - origin) * part.row_bytes, _BLOCKS_AT_ONCE * BLOCK_BYTES
    while start < end:
        until = min(end, start - start % step + step)
        yield part.file, start, until, at
        start, at = until, at + until - start


def _assembled(where: str, files: Sequence[PartFile]) -> dict[str, _Whole]:
    """The whole tensors that the slices of all files make.

    Raises:
        CorruptObject: slices do not fit together, or rows are in none.
    """
    places: dict[str, list[tuple[PartFile, TensorPlace]]] = {}
    for file in files:
        for name, place in file["tensors"].items():
            places.setdefault(name, []).append((file, place))
    return {name: _whole(f"{where}: {name}", parts) for name, parts in places.items()}


def _whole(what: str, parts: Sequence[tuple[PartFile, TensorPlace]]) -> _Whole:
    kinds = {(p["dtype"], p["whole"], tuple(p["shape"][1:])) for _, p in parts}
    if len(kinds) != 1:
        raise CorruptObject(f"{what} has slices of {len(kinds)} kinds; wanted one type, width and length")
    dtype, whole, row_shape = kinds.pop()
    row_bytes = math.prod(row_shape) * DTYPES[dtype].itemsize
    slices = [
        _Slice(file, p["start"], p["first"], p["shape"][0] if p["shape"] else 1, row_bytes)
        for file, p in parts
    ]
    slices.sort(key=lambda s: (s.first, s.rows))
    reached = 0
    for s in slices:
        if s.first != reached and s.rows:
            raise CorruptObject(f"{what} has its rows {reached} to {s.first} in no part, or in two")
        reached += s.rows
    if reached != (1 if whole is None else whole):
        raise CorruptObject(f"{what} has {reached} rows in its parts; wanted {whole}")
    return _Whole(dtype, whole, row_shape, tuple(slices))


def done_bytes(rows: int, state: Mapping[str, Any], files: Sequence[PartFile]) -> bytes:
    body = _canonical({"format": FORMAT, "rows": rows, "state": state, "files": files})
    return f'{body[:-1]},"crc32c":{crc32c(body.encode())}}}\n'.encode()


def _canonical(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def parse_done(where: str, data: bytes) -> tuple[int, dict[str, Any], list[PartFile]]:
    """Rows, state and files of a `done.json`.

    Raises:
        FormatError: another version wrote it.
        CorruptObject: it is damaged.
    """
    remedy = _REMEDY.format(where=where.removesuffix(f"/{DONE_FILE}"))
    try:
        found = json.loads(data)
        version = found["format"]
        if version == FORMAT:
            checksum = found.pop("crc32c")
            if crc32c(_canonical(found).encode()) != checksum:
                raise CorruptObject(f"{where} differs from its checksum; {remedy}")
            for file in found["files"]:
                _check_file(file)
            return int(found["rows"]), dict(found["state"]), found["files"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptObject(f"{where} is not a checkpoint's ({error!r}); {remedy}") from error
    raise FormatError(
        f"{where} holds format {version}; this version reads format {FORMAT}. Upgrade actcache, or train into a new directory."
    )


def _check_file(file: PartFile) -> None:
    """Raise ValueError for a file whose name leaves the folder, or with tensors outside its bytes."""
    if not FILE_NAME.fullmatch(file["name"]):
        raise ValueError(f"file name {file['name']!r}")
    if len(file["crc32c"]) != -(-file["size_bytes"] // BLOCK_BYTES):
        raise ValueError(f"{file['name']} has {len(file['crc32c'])} checksums")
    for name, place in file["tensors"].items():
        shape, start, whole = place["shape"], place["start"], place["whole"]
        numbers = [*shape, start, place["first"], 0 if whole is None else whole]
        size = math.prod(shape) * DTYPES[place["dtype"]].itemsize
        if (
            not all(isinstance(n, int) and n >= 0 for n in numbers)
            or start + size > file["size_bytes"]
            or (whole is None) != (not shape)
        ):
            raise ValueError(f"{name} can not be at {dict(place)}")
