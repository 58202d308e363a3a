"""Where a run's files are: a local directory, or a folder at any fsspec URL.

Both give the same promises: a file is whole or absent, metrics are kept up to the last `sync`. Locally a
file is replaced by rename. An object store has no rename and no append: metrics are written whole at each
`sync`. What is created once and never replaced goes through `store`, which both have: sae/checkpoint.py.
Knows nothing of what the files mean.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import Conflict, SpecError, StoreError

from .tensors import write_atomically

if TYPE_CHECKING:
    from actcache.store import Store


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this names an object store and not a local path (`file://` is local)."""
    scheme, found, _ = os.fspath(path).partition("://")
    return bool(found) and scheme not in ("file", "local")


def local_path(path: str | os.PathLike[str]) -> Path:
    """The local path, without `file://`."""
    return Path(os.fspath(path).removeprefix("file://").removeprefix("local://"))


def run_files(
    location: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> "RunFiles":
    """The files at a local path or an fsspec URL."""
    if not is_url(location):
        return LocalFiles(local_path(location))
    from actcache.store import open_store

    return StoredFiles(open_store(location, storage_options))


def replace_object(store: "Store", key: str, data: bytes) -> None:
    """Put an object in place of what is there.

    Raises:
        Conflict: another process changed it meanwhile.
        StoreError: the store refused; what was there is intact.
    """
    try:
        found: bytes | None = store.read(key)
    except FileNotFoundError:
        found = None
    if not store.swap(key, found, data):
        raise Conflict(
            f"{store.url}/{key} was changed by another process meanwhile; end one of the two and run again"
        )


class RunFiles(ABC):
    """Files under one place; `url` names it in messages. One process writes, any number read."""

    url: str
    store: "Store"
    """The same place, for objects that are created and never replaced."""

    @abstractmethod
    def make(self, folders: Sequence[str]) -> None:
        """Make the place and these folders.

        Raises:
            SpecError: it can not be written to.
        """

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A whole file; None if there is none."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole, in place of the one there.

        Raises:
            StoreError: refused; what was there is intact.
        """

    @abstractmethod
    def append(self, name: str, data: bytes) -> None:
        """Add to a file; others may see it only after `sync`."""

    @abstractmethod
    def sync(self, names: Sequence[str]) -> list[int]:
        """Make what was appended durable; returns the sizes in bytes."""

    @abstractmethod
    def cut(self, name: str, size: int) -> None:
        """Leave the first `size` bytes of a file, which is made if it is not there."""


class LocalFiles(RunFiles):
    """A directory."""

    def __init__(self, path: Path) -> None:
        from actcache.store import open_store

        self.path, self.url = path, str(path)
        self.store = open_store(path.absolute())

    def make(self, folders: Sequence[str]) -> None:
        try:
            for name in folders:
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"{self.path} can not be made: {error.strerror}. Choose a writable directory."
            ) from error

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (self.path / name).read_bytes()
        return None

    def replace(self, name: str, data: bytes) -> None:
        write_atomically(self.path / name, data)

    def append(self, name: str, data: bytes) -> None:
        try:
            with open(self.path / name, "ab") as file:
                file.write(data)
        except OSError as error:
            raise StoreError(
                f"{self.path / name} could not be written: {error.strerror or error}. The last checkpoint is "
                "intact; free space, then run the same again to continue from it."
            ) from error

    def sync(self, names: Sequence[str]) -> list[int]:
        for name in names:
            with open(self.path / name, "ab") as file:
                os.fsync(file.fileno())
        return [(self.path / name).stat().st_size for name in names]

    def cut(self, name: str, size: int) -> None:
        path = self.path / name
        if size and not path.exists():
            raise StoreError(
                f"{path} is missing, but the checkpoint counts {size} bytes of it; restore it from a copy"
            )
        path.touch()
        os.truncate(path, size)


class StoredFiles(RunFiles):
    """A folder of an object store. What is appended is held in memory until `sync`."""

    def __init__(self, store: "Store") -> None:
        self.store, self.url = store, store.url
        self._appended: dict[str, bytearray] = {}

    def make(self, folders: Sequence[str]) -> None:
        """Nothing to do: an object store has no directories."""

    def read(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def replace(self, name: str, data: bytes) -> None:
        replace_object(self.store, name, data)

    def append(self, name: str, data: bytes) -> None:
        self._appended.setdefault(name, bytearray()).extend(data)

    def sync(self, names: Sequence[str]) -> list[int]:
        for name in names:
            self.replace(name, bytes(self._appended.get(name, b"")))
        return [len(self._appended.get(name, b"")) for name in names]

    def cut(self, name: str, size: int) -> None:
        data = self.read(name) or b""
        if len(data) < size:
            raise StoreError(
                f"{self.url}/{name} has {len(data)} bytes, but the checkpoint counts {size}; restore it from a copy"
            )
        self._appended[name] = bytearray(data[:size])
