"""Objects under one URL: created once and never overwritten, whole or not at all.

`create` is a temp file, fsync and hard link on local disk, `If-None-Match: *` on S3 and other
fsspec object stores, and a lock in `memory://`. The only mutable objects are `zarr.json`, through
`replace`. Nothing here knows what the objects mean. Retries of transient faults live here only.
"""

import contextlib
import os
import random
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from .errors import Conflict, StoreError

T = TypeVar("T")

_RETRIES = 5
_TEMPORARY = ".actcache-tmp-"
_memory_lock = threading.Lock()


@dataclass(frozen=True)
class Listed:
    """One stored object in a listing."""

    key: str
    size_bytes: int
    modified_s: float
    """When it was written, in seconds since the epoch, by the store's clock (not this machine's)."""


class Store(ABC):
    """The objects under `url`. Keys are relative, with `/`. Safe to use from many threads.

    `open_store` picks the subclass; `create`, `read`, `listing`, `replace` and `delete` behave alike.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Store `data` under `key` unless something is there; no one ever sees a part of it.

        Returns:
            True if this call created it, False if the same bytes were there already.

        Raises:
            Conflict: other bytes are there; they stay.
            StoreError: the store refused or failed.
        """

    @abstractmethod
    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object; all of it by default.

        Raises:
            FileNotFoundError: no such object.
            StoreError: the store refused or failed.
        """

    @abstractmethod
    def listing(self, prefix: str) -> list[Listed]:
        """Objects in the folder `prefix` (no trailing slash; "" for all), sorted by key."""

    def leftovers(self) -> list[Listed]:
        """Temporary files of killed writers; they are no objects and in no `listing`."""
        return []

    @abstractmethod
    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders directly under `prefix`, sorted."""

    @abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Store `data` under `key`, whatever was there. For `zarr.json` alone."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; silent if it is gone."""

    def prune(self) -> int:
        """Remove empty directories, this one too, where the store has directories; returns how many."""
        return 0

    @abstractmethod
    def sub(self, name: str) -> "Store":
        """The store of the folder `name` under this one."""

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self.read(key, 0, 1)
        except FileNotFoundError:
            return False
        return True


def open_store(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store at a local path or an fsspec URL (`s3://bucket/prefix`, `memory://x`, ...).

    `storage_options` go to fsspec and are never written anywhere.
    """
    text = os.fspath(url)
    scheme, _, rest = text.partition("://")
    if not rest:
        return LocalStore(Path(text).expanduser())
    if scheme in ("file", "local"):
        return LocalStore(Path(rest))
    return ObjectStore(text.rstrip("/"), dict(storage_options or {}))


class LocalStore(Store):
    """A directory on a local (or shared POSIX) file system with hard links."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        super().__init__(str(self.root))

    def _path(self, key: str) -> Path:
        _check_key(key)
        return self.root / key

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _store_errors(self.url, key), _temporary_file(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                if path.read_bytes() == data:
                    return False
                raise _conflict(self.url, key) from None
            _sync_directory(path.parent)
        return True

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with _store_errors(self.url, key), open(self._path(key), "rb") as file:
            if start:
                file.seek(start)
            if stop is None:
                return file.read()
            # Python allocates what is asked for, whatever the file holds
            return file.read(max(0, min(stop, os.fstat(file.fileno()).st_size) - start))

    def listing(self, prefix: str) -> list[Listed]:
        return self._walk(prefix, temporary=False)

    def leftovers(self) -> list[Listed]:
        return self._walk("", temporary=True)

    def _walk(self, prefix: str, *, temporary: bool) -> list[Listed]:
        found = []
        for folder, _, names in os.walk(self._path(prefix) if prefix else self.root):
            for name in names:
                path = Path(folder, name)
                if name.startswith(_TEMPORARY) == temporary:
                    with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                        stat, key = path.stat(), path.relative_to(self.root).as_posix()
                        found.append(Listed(key, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda o: o.key)

    def prune(self) -> int:
        removed = 0
        for folder, _, _ in os.walk(self.root, topdown=False):
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(folder)
                removed += 1
        return removed

    def folders(self, prefix: str = "") -> list[str]:
        base = self.root / prefix
        return sorted(p.name for p in base.iterdir() if p.is_dir()) if base.is_dir() else []

    def replace(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _store_errors(self.url, key), _temporary_file(path, data) as temporary:
            os.replace(temporary, path)
            _sync_directory(path.parent)

    def delete(self, key: str) -> None:
        with _store_errors(self.url, key):
            self._path(key).unlink(missing_ok=True)

    def sub(self, name: str) -> "LocalStore":
        return LocalStore(self._path(name))


class ObjectStore(Store):
    """Any fsspec file system with exclusive create; made for S3 through s3fs."""

    def __init__(self, url: str, storage_options: dict[str, Any]) -> None:
        super().__init__(url)
        self._options = storage_options
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **storage_options)
        except (ValueError, ImportError) as err:
            raise StoreError(f"cannot open {url}: {err}") from err
        self._in_memory = url.startswith("memory://")

    def _path(self, key: str) -> str:
        _check_key(key)
        return f"{self._root}/{key}"

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)

        def put() -> bool:
            try:
                with _memory_lock if self._in_memory else contextlib.nullcontext():
                    if self._in_memory and self._fs.exists(path):
                        raise FileExistsError(path)
                    self._fs.pipe_file(path, data, mode="overwrite" if self._in_memory else "create")
                return True
            except FileNotFoundError as err:
                raise StoreError(f"{self.url} cannot be written: {err}. Does the bucket exist?") from None
            except OSError:
                # 412 (as FileExistsError or EINVAL), 409, or a lost reply to a PUT that worked: look
                found = self._look(path)
                if found is None:
                    raise
                if found == data:
                    return False
                raise _conflict(self.url, key) from None

        return _with_retries(put, self.url, key)

    def _look(self, path: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(path))
        except FileNotFoundError:
            return None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        path = self._path(key)
        return _with_retries(lambda: bytes(self._fs.cat_file(path, start=start, end=stop)), self.url, key)

    def listing(self, prefix: str) -> list[Listed]:
        def find() -> list[Listed]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(prefix) if prefix else self._root, detail=True)
            return sorted(
                (
                    Listed(path[len(self._root) + 1 :], info["size"], self._modified(path, info))
                    for path, info in found.items()
                ),
                key=lambda o: o.key,
            )

        return _with_retries(find, self.url, prefix)

    def _modified(self, path: str, info: Mapping[str, Any]) -> float:
        """Seconds since the epoch from a listing's entry; each file system has its own name for it."""
        names = ("LastModified", "last_modified", "mtime", "updated", "created")
        when = next((info[name] for name in names if info.get(name) is not None), None)
        if when is None:
            when = self._fs.modified(path)
        if isinstance(when, str):
            when = datetime.fromisoformat(when)
        if isinstance(when, datetime):
            return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        return float(when)

    def folders(self, prefix: str = "") -> list[str]:
        def ls() -> list[str]:
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(f"{self._root}/{prefix}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return []
            return sorted(e["name"].rstrip("/").split("/")[-1] for e in entries if e["type"] == "directory")

        return _with_retries(ls, self.url, prefix)

    def replace(self, key: str, data: bytes) -> None:
        path = self._path(key)
        _with_retries(lambda: self._fs.pipe_file(path, data), self.url, key)

    def delete(self, key: str) -> None:
        path = self._path(key)

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)

        _with_retries(remove, self.url, key)

    def sub(self, name: str) -> "ObjectStore":
        _check_key(name)
        return ObjectStore(f"{self.url}/{name}", self._options)


def _check_key(key: str) -> None:
    """Refuse a key that leaves the prefix; keys come from manifests, which may be hostile."""
    parts = key.split("/")
    if not key or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"key {key!r} is refused: wanted a relative key without empty, '.' or '..' parts")


def _conflict(url: str, key: str) -> Conflict:
    return Conflict(
        f"{url}/{key} exists with other content. It is left as it is; run `actcache verify` on it"
    )


@contextlib.contextmanager
def _temporary_file(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file with `data` beside `path`, removed afterwards; a killed writer leaves only it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as err:  # a missing *object* is a FileNotFoundError; this is not one
        raise StoreError(
            f"cannot create the directory {path.parent}: {err.strerror}. Use another root"
        ) from err
    temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _store_errors(url: str, key: str) -> Iterator[None]:
    """Turn a client's error into a StoreError that says where; FileNotFoundError passes."""
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except client_errors() as err:
        reason = getattr(err, "strerror", None) or str(err) or type(err).__name__
        raise StoreError(f"{url}/{key}: {reason}. Check the URL, permissions and the space left") from err


def client_errors() -> tuple[type[Exception], ...]:
    """What fsspec's file systems raise: OSError, and botocore's own once s3fs is in use."""
    botocore = sys.modules.get("botocore.exceptions")
    return (OSError, botocore.BotoCoreError, botocore.ClientError) if botocore else (OSError,)


def _with_retries(work: Callable[[], T], url: str, key: str) -> T:
    """Run `work`, again after transient faults with jittered backoff, at most `_RETRIES` times."""
    for attempt in range(_RETRIES):
        try:
            with _store_errors(url, key):
                return work()
        except (FileNotFoundError, Conflict):
            raise
        except StoreError as err:
            transient = isinstance(err.__cause__, OSError) and not isinstance(err.__cause__, PermissionError)
            if not transient or attempt == _RETRIES - 1:
                raise
            time.sleep(min(0.1 * 2**attempt, 5.0) * (0.5 + random.random()))
    raise AssertionError("unreachable")
