"""What one rank writes of a checkpoint: a copy of its tensors, stored by a thread while training goes on.

The format is sae/checkpoint.py's. Tensors are copied into buffers that are the files byte by byte, kept
and used again; only the copying stops the training. So a rank holds its part once more in the host's
memory. A part is several files of at most 128 MiB, cut between rows: an upload that fails is repeated
file by file, and no copy of the whole is made.
"""

import io
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from actcache.errors import Conflict, StoreError
from actcache.shard import crc32c

from .checkpoint import BLOCK_BYTES, PartFile, PartInfo, TensorPlace, folder_of
from .tensors import DTYPES

if TYPE_CHECKING:
    from actcache.store import Store

FILE_BYTES = 128 << 20
"""Tensors in one file of a part; only a row that is larger makes a larger one."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A rank's rows of a tensor: [first, first + len(tensor)) of `whole` rows, or all where `whole` is None.

    Every row is in the pieces of exactly one rank: what all ranks hold alike is one rank's to give.
    """

    tensor: Tensor
    first: int = 0
    whole: int | None = None


class CheckpointWriter:
    """Writes one rank's part of each checkpoint.

    `begin` copies and returns; `written` or `wait` give what was stored, for the rank that completes the
    checkpoint (`Checkpoints.complete`).

    Args:
        store: the run's directory.
        rank: of this process.
        world: how many ranks write.
        attempt: letters and digits that no other start of this run has, so that what a killed one left
            is never met; drawn if not given.
    """

    def __init__(self, store: "Store", rank: int = 0, world: int = 1, attempt: str | None = None) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.attempt = secrets.token_hex(4) if attempt is None else attempt
        if not re.fullmatch("[0-9a-z]+", self.attempt):
            raise ValueError(f"attempt is {attempt!r}; it must be lower-case letters and digits")
        self._buffers: list[io.BytesIO] = []  # gives its memory as bytes without a copy
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: futures.Future[PartInfo] | None = None

    @property
    def busy(self) -> bool:
        """True from `begin` until `written` or `wait` gave the part, or raised."""
        return self._pending is not None

    def begin(self, pieces: Mapping[str, Piece], rows: int) -> None:
        """Copy the pieces, then write them in a thread.

        They may change as soon as this returns. If the part before is still being written, this waits,
        and what was not asked for by `written` is forgotten: its checkpoint stays incomplete.

        Raises:
            StoreError: the part before could not be written.
        """
        self.wait()
        files = list(_cut(pieces))
        sizes = [_size(file) for file in files]
        if [buffer.getbuffer().nbytes for buffer in self._buffers] != sizes:
            self._buffers = []  # free them first
            self._buffers = [io.BytesIO(bytes(size)) for size in sizes]
        places = []
        for file, buffer in zip(files, self._buffers, strict=True):
            with buffer.getbuffer() as view:
                places.append(_copy(file, view))
        self._pending = self._pool.submit(self._write, rows, places)

    def written(self) -> PartInfo | None:
        """What the thread has stored, once; None if there is nothing or it is not ready. Never waits.

        Raises:
            StoreError: the store refused; the checkpoint before is intact.
        """
        if self._pending is None or not self._pending.done():
            return None
        return self.wait()

    def wait(self) -> PartInfo | None:
        """As `written`, after waiting for the thread; None if nothing was begun.

        Raises:
            StoreError: the store refused; the checkpoint before is intact.
        """
        if self._pending is None:
            return None
        futures.wait([self._pending])  # Ctrl-C may end this: the part can still be asked for
        pending, self._pending = self._pending, None
        return pending.result()

    def _write(self, rows: int, places: list[dict[str, TensorPlace]]) -> PartInfo:
        files: list[PartFile] = []
        for i, (buffer, tensors) in enumerate(zip(self._buffers, places, strict=True)):
            data = buffer.getvalue()
            name = f"part-{self.attempt}-{self.rank:05d}-of-{self.world:05d}-{i:04d}.safetensors"
            try:
                self.store.create(f"{folder_of(rows)}/{name}", data)
            except Conflict:
                raise
            except StoreError as error:
                raise StoreError(
                    f"a checkpoint could not be written: {error}. The one before is intact; run the same again "
                    "to continue from it."
                ) from error
            files.append(
                {"name": name, "size_bytes": len(data), "crc32c": _checksums(data), "tensors": tensors}
            )
        return {"rows": rows, "rank": self.rank, "world": self.world, "files": files}


@dataclass(frozen=True)
class _Cut:
    """Rows of a piece that go into one file."""

    name: str
    tensor: Tensor
    first: int
    whole: int | None


def _cut(pieces: Mapping[str, Piece]) -> Iterator[list[_Cut]]:
    """The pieces file by file: wide types first, so that all are aligned, and small tensors together."""
    file: list[_Cut] = []
    left = FILE_BYTES
    order = sorted(pieces.items(), key=lambda p: (-p[1].tensor.element_size(), p[1].tensor.nbytes, p[0]))
    for name, piece in order:
        tensor, first = piece.tensor, piece.first
        whole = piece.whole if piece.whole is not None or tensor.ndim == 0 else len(tensor)
        row_bytes = max(1, tensor.nbytes if tensor.ndim == 0 else tensor.nbytes // max(1, len(tensor)))
        rest = tensor
        while True:
            fits = max(left // row_bytes, 0 if file else 1)
            n_rows = 1 if rest.ndim == 0 else len(rest)
            if fits >= n_rows:
                file.append(_Cut(name, rest, first, whole))
                left -= rest.nbytes
                break
            if fits:
                file.append(_Cut(name, rest[:fits], first, whole))
                rest, first = rest[fits:], first + fits
            yield file
            file, left = [], FILE_BYTES
    if file:
        yield file


def _header(file: list[_Cut]) -> bytes:
    """As safetensors has it: the length in 8 bytes, then JSON, padded to a multiple of 8."""
    entries, offset = {}, 0
    for cut in file:
        end = offset + cut.tensor.nbytes
        shape = list(cut.tensor.shape)
        entries[cut.name] = {
            "dtype": _NAMES[cut.tensor.dtype],
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(file: list[_Cut]) -> int:
    return len(_header(file)) + sum(cut.tensor.nbytes for cut in file)


def _copy(file: list[_Cut], buffer: memoryview) -> dict[str, TensorPlace]:
    """Fill the buffer with the bytes of the file; returns where each tensor lies."""
    header = _header(file)
    buffer[: len(header)] = header
    places: dict[str, TensorPlace] = {}
    start = len(header)
    for cut in file:
        tensor = cut.tensor.detach()
        places[cut.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "start": start,
            "first": cut.first,
            "whole": cut.whole,
        }
        if tensor.numel():
            target = torch.frombuffer(buffer, dtype=torch.uint8, count=tensor.nbytes, offset=start)
            target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += tensor.nbytes
    return places


def _checksums(data: bytes) -> list[int]:
    view = np.frombuffer(data, np.uint8)
    return [crc32c(view[i : i + BLOCK_BYTES]) for i in range(0, len(view), BLOCK_BYTES)]
