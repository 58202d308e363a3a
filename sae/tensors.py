"""Tensors as the bytes of a safetensors file, and local files that are whole or absent.

Never pickle, never `torch.load`.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from actcache.errors import CorruptObject, StoreError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of types in a safetensors header."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path`: temporary file in the same directory, fsync, rename, fsync of the directory.

    Raises:
        StoreError: the disk refused (full, read-only); what was at `path` is untouched.
    """
    with _replacing(path) as file:
        file.write(data)


def serialise(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file."""
    from safetensors.torch import save

    return save(dict(tensors))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written as `write_atomically` does."""
    write_atomically(path, serialise(tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is none.
        CorruptObject: it is torn or no safetensors file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; copy the whole directory, or write it again")
    return parse_tensors(str(path), path.read_bytes())


def parse_tensors(where: str, data: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes that `serialise` gave; `where` names them in messages.

    Raises:
        CorruptObject: they are torn or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError) as error:
        raise CorruptObject(
            f"{where} is not a whole safetensors file ({error}); copy or write it again"
        ) from error
    return tensors


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f".{path.name}.partial")  # a fixed name: a killed write leaves one, not many
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StoreError(
            f"{path} could not be written: {error.strerror or error}. What was there before is intact; "
            "free space or choose another directory, and run again."
        ) from error
