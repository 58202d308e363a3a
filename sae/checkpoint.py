"""Files that are whole or absent: atomic writes, safetensors with a JSON header, run checkpoints.

A checkpoint is one file: the tensors of every SAE of the run (weights, Adam moments, dead
counters, generator) and, in its header, the JSON state (rows seen, reader state, thresholds). Being
one file that appears whole (sae/files.py), it is always some complete moment of the run, whatever is
killed when. Never pickle, never `torch.load`.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from actcache.errors import CorruptObject, FormatError, StoreError

FORMAT = 2  # 1 had the logarithms of JumpReLU's thresholds
CHECKPOINT_FILE = "checkpoint.safetensors"
_STATE_KEY = "actcache.sae.state"


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor: rows [first, first + len(tensor)) of `whole`, or all of it where whole is None."""

    tensor: Tensor
    first: int = 0
    whole: int | None = None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path`: temporary file in the same directory, fsync, rename, fsync of the directory.

    Raises:
        StoreError: the disk refused (full, read-only); what was at `path` is untouched.
    """
    with _replacing(path) as file:
        file.write(data)


def serialise(tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a safetensors file with `state` as JSON in its header."""
    from safetensors.torch import save

    metadata = None if state is None else {_STATE_KEY: json.dumps(state, allow_nan=False)}
    return save(dict(tensors), metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> None:
    """A safetensors file, written as `write_atomically` does, with `state` as JSON in its header."""
    write_atomically(path, serialise(tensors, state))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors and the JSON state of a file written by `write_tensors`.

    Raises:
        FileNotFoundError: there is none.
        CorruptObject: it is torn or no safetensors file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; copy the whole directory, or write it again")
    return parse_tensors(str(path), path.read_bytes())


def parse_tensors(where: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors and the JSON state of what `serialise` gave; `where` names it in messages.

    Raises:
        CorruptObject: it is torn or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")  # the format: 8 bytes of length, then a JSON header
        header = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        return tensors, json.loads(header[_STATE_KEY]) if _STATE_KEY in header else None
    except (SafetensorError, ValueError) as error:
        raise CorruptObject(
            f"{where} is not a whole safetensors file ({error}); copy or write it again"
        ) from error


def checkpoint_bytes(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> bytes:
    """A checkpoint as one safetensors file with `state` as JSON in its header."""
    return serialise(tensors, {"format": FORMAT, **state})


def parse_checkpoint(where: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `checkpoint_bytes` was given; `where` names it in messages.

    Raises:
        FormatError: a newer version wrote it.
        CorruptObject: it is damaged.
    """
    tensors, state = parse_tensors(where, data)
    if state is None or state.get("format") != FORMAT:
        found = "no state" if state is None else f"format {state.get('format')}"
        raise FormatError(
            f"{where} holds {found}; this version reads format {FORMAT}. Train into a new directory."
        )
    return tensors, state


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, as `field: found -> wanted`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = list(found) + [name for name in wanted if name not in found]
        return [
            line
            for name in names
            for line in differences(found.get(name), wanted.get(name), f"{where}.{name}".lstrip("."))
        ]
    if found == wanted:
        return []
    old, new = ("present" if isinstance(value, dict) else str(value) for value in (found, wanted))
    return [f"{where}: {old} -> {new}"]


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
