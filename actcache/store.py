"""Objects under one URL: created once and never overwritten, whole or not at all.

`create` is a temp file, fsync and hard link on local disk, `If-None-Match: *` on S3, exclusive create on
other fsspec file systems, and a lock in `memory://`. `swap` changes an object whose content is known:
`zarr.json`, and shards that something damaged. Nothing here knows what the objects mean. Transient faults
of remote stores are answered by `retry.py`; here is what a repeated or unanswered write may meet.
"""

import contextlib
import errno
import fcntl
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np

from .errors import Conflict, SpecError, StoreError
from .retry import (
    Retry,
    Transient,
    client_errors,
    error_code,
    http_status,
    is_transient,
    reason,
    with_retries,
)

T = TypeVar("T")

RETRY_OPTION = "actcache_retry"
"""The one storage option that is ours: the fields of `retry.Retry`, as a mapping."""
_TEMPORARY = ".actcache-tmp-"
ABSENT = "absent"
"""The condition of a write that nothing is there."""
_memory_lock = threading.Lock()
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What linking a file of one's own gives where a file system has no hard links."""


@dataclass(frozen=True)
class Listed:
    """One stored object in a listing."""

    key: str
    size_bytes: int
    modified_s: float
    """When it was written, in seconds since the epoch, by the store's clock (not this machine's)."""


class Store(ABC):
    """The objects under `url`. Keys are relative, with `/`. Safe to use from many threads.

    `open_store` picks the subclass; `create`, `read`, `listing`, `swap` and `delete` behave alike.
    """

    concurrent_reads = 32
    """How many threads that read are worth having: many hide a network's latency."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Store `data` under `key` unless something is there; no one ever sees a part of it.

        Returns:
            True if this call created it. False if the same bytes are there and may be another's: found
            there, or met again after a request of this call had lost its reply.

        Raises:
            Conflict: other bytes are there; they stay.
            StoreError: the store refused or failed; after a failure the object may be there.
        """

    @abstractmethod
    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object; all of it by default. Fewer only where the object ends.

        Raises:
            FileNotFoundError: no such object.
            StoreError: the store refused or failed.
        """

    def read_part(self, key: str, start: int, stop: int) -> "bytes | np.ndarray":
        """As `read`, as bytes or uint8 [n]; the thread's next call may overwrite them."""
        return self.read(key, start, stop)

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """`read` of each (key, start, stop), where several at once cost less than one by one.

        None for a part that did not come, or where nothing is gained: `read` it to learn why.
        """
        return [None] * len(parts)

    def read_again(self, key: str, start: int, stop: int) -> bytes:
        """As `read`, for bytes that were found damaged: no copy of them is used."""
        return self.read(key, start, stop)

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
    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        """Store `data` under `key` if `expected` is there (None: nothing); for `zarr.json` and repairs.

        Of many that swap the same `expected` for different `data` one wins, on local disk, on S3 and in
        memory. Other fsspec file systems, and directories that cannot be locked (NFS), have no such
        condition to offer: there the content is compared just before it is replaced.

        Returns:
            True if `data` is there now: put there, or found there, whoever put it. False if anything
            else is, or nothing although something was expected; it is left as it is.

        Raises:
            StoreError: the store refused or failed; `data` may be there.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; silent if it is gone."""

    def prune(self) -> int:
        """Remove empty directories, this one too, where the store has directories; returns how many."""
        return 0

    @abstractmethod
    def sub(self, name: str) -> "Store":
        """The store of the folder `name` under this one."""

    def ignored_condition(self, key: str, content: bytes) -> str:
        """How this store would let writers overwrite each other, in words; "" if it would not.

        Args:
            key: of an object of the caller's own, which is overwritten if a condition is ignored.
            content: of that object.

        Raises:
            StoreError: the store refused or failed.
        """
        try:
            created = self.create(key, content + b" replaced")
        except Conflict:
            created = False
        if created or self.read(key) != content:
            return "replaces an object that had to be absent (on S3: it ignores If-None-Match)"
        return ""

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self.read(key, 0, 1)
        except FileNotFoundError:
            return False
        return True


def open_store(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store at a local path or an fsspec URL (`s3://bucket/prefix`, `memory://x`, ...).

    `storage_options` go to fsspec and are never written anywhere, except `actcache_retry`: a mapping
    with `deadline_s` and other fields of `retry.Retry`. On S3 botocore's retries are off and s3fs's
    timeouts hold (5 s to connect, 15 s without a byte) unless `config_kwargs` say otherwise.

    Raises:
        SpecError: the URL is empty.
    """
    text = os.fspath(url)
    retry, options = _retry_of(storage_options), client_options(storage_options)
    scheme, separator, rest = text.partition("://")
    if not (rest if separator else text):
        raise SpecError(
            f"{text!r} names no place; give a directory ('.' is this one) or URL (s3://bucket/prefix)"
        )
    if not separator:
        return LocalStore(Path(text).expanduser(), retry)
    if scheme in ("file", "local"):
        return LocalStore(Path(rest), retry)
    if scheme in ("s3", "s3a"):
        from .s3 import S3Store

        return S3Store(text.rstrip("/"), options, retry)
    kind = MemoryStore if scheme == "memory" else ObjectStore
    return kind(text.rstrip("/"), options, retry)


def folder_of(url: str, storage_options: Mapping[str, Any] | None = None) -> tuple[Store, str] | None:
    """The store of the folder that an object or a dataset lies in, and its name there; None if it lies in none."""
    folder, _, name = url.rstrip("/").rpartition("/")
    if not name or not folder or folder.endswith("/"):
        return None  # a bucket, or the root of a disk
    return open_store(folder, storage_options), name


def client_options(storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The storage options that fsspec gets: all but ours."""
    return {k: v for k, v in (storage_options or {}).items() if k != RETRY_OPTION}


def _retry_of(storage_options: Mapping[str, Any] | None) -> Retry:
    fields = (storage_options or {}).get(RETRY_OPTION, {})
    try:
        return Retry(**fields)
    except TypeError:
        wanted = ", ".join(Retry.__dataclass_fields__)
        raise SpecError(
            f"storage option {RETRY_OPTION} is {fields!r}; wanted a mapping of {wanted} to seconds"
        ) from None


def _cpus() -> int:
    """CPUs that this process may use; macOS does not say which, only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalStore(Store):
    """A directory on a local (or shared POSIX) file system with hard links."""

    concurrent_reads = min(8, _cpus())  # decoding is what they wait for

    def __init__(self, root: Path, retry: Retry | None = None) -> None:
        self.root = root.absolute()
        self._retry = retry or Retry()
        self._part = threading.local()
        super().__init__(str(self.root))

    def _path(self, key: str) -> Path:
        _check_key(key)
        return self.root / key

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _store_errors(self.url, key), _temporary_file(path, data) as temporary:
            return self._link(key, temporary, path, data)

    def _link(self, key: str, temporary: Path, path: Path, data: bytes) -> bool:
        while True:
            try:
                os.link(temporary, path)
                _sync_directory(path.parent)
                return True
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile: link again
                    if path.read_bytes() == data:
                        return False
                    raise _conflict(self.url, key) from None
            except OSError as err:
                if err.errno in _NO_LINKS:
                    raise StoreError(
                        f"{self.url} is on a file system without hard links ({err.strerror}), on which one writer could "
                        "overwrite another. Use a local disk or an object store"
                    ) from err
                raise

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with _store_errors(self.url, key), open(self._path(key), "rb") as file:
            if start:
                file.seek(start)
            if stop is None:
                return file.read()
            # Python allocates what is asked for, whatever the file holds
            return file.read(max(0, min(stop, os.fstat(file.fileno()).st_size) - start))

    def read_part(self, key: str, start: int, stop: int) -> "bytes | np.ndarray":
        """Into memory that is used again: fresh memory costs three times the copying."""
        _check_key(key)
        with _store_errors(self.url, key):
            descriptor = os.open(f"{self.url}/{key}", os.O_RDONLY)
            try:
                n, buffer = stop - start, getattr(self._part, "buffer", None)
                if buffer is None or len(buffer) < n:
                    n = max(0, min(n, os.fstat(descriptor).st_size - start))  # as in `read`
                    buffer = self._part.buffer = np.empty(n, np.uint8)
                n = os.preadv(descriptor, [buffer[:n]], start)  # type: ignore[list-item]  # an array is a buffer too
            finally:
                os.close(descriptor)
        return buffer[:n]

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        path = self._path(key)
        with _store_errors(self.url, key), _temporary_file(path, data) as temporary:
            if expected is None:
                try:
                    self._link(key, temporary, path, data)
                    return True
                except Conflict:
                    return False
            with self._lock(path.parent):
                found = path.read_bytes() if path.exists() else None
                if found == expected != data:
                    os.replace(temporary, path)
                    _sync_directory(path.parent)
                return found in (expected, data)

    @contextlib.contextmanager
    def _lock(self, directory: Path) -> Iterator[None]:
        """Swaps in `directory` take turns; a holder that was stopped makes the others fail, not hang."""
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            with_retries(
                lambda: _try_lock(descriptor), self._retry, f"{directory}, locked by another process"
            )
            yield
        finally:
            os.close(descriptor)

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

    def delete(self, key: str) -> None:
        with _store_errors(self.url, key):
            self._path(key).unlink(missing_ok=True)

    def sub(self, name: str) -> "LocalStore":
        return LocalStore(self._path(name), self._retry)


class ObjectStore(Store):
    """Any fsspec file system with exclusive create.

    `_get`, `_put` and `_conditional` say how a file system reads and writes; the rest holds for all.
    """

    def __init__(self, url: str, storage_options: dict[str, Any], retry: Retry | None = None) -> None:
        super().__init__(url)
        self._options, self._retry = storage_options, retry or Retry()
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **storage_options)
        except (ValueError, ImportError, TypeError, KeyError) as err:
            raise StoreError(f"cannot open {url}: {reason(err)}. Check the URL and storage_options") from err

    def _path(self, key: str) -> str:
        _check_key(key)
        return f"{self._root}/{key}"

    def _repeated(self, work: Callable[[], T], key: str) -> T:
        return with_retries(work, self._retry, f"{self.url}/{key}".rstrip("/"))

    def _get(self, path: str, start: int, stop: int | None) -> tuple[bytes, str | None]:
        """Bytes of an object, and what names this content in a condition; None if nothing does."""
        whole = start == 0 and stop is None
        return bytes(
            self._fs.cat_file(path) if whole else self._fs.cat_file(path, start=start, end=stop)
        ), None

    def _put(self, path: str, data: bytes, condition: str | None) -> bool:
        """Write if `condition` holds: ABSENT, what `_get` named, or None for none. Whether it held."""
        try:
            self._fs.pipe_file(path, data, mode="create" if condition == ABSENT else "overwrite")
        except FileExistsError:
            return False
        return True

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)

        def attempt() -> bool:
            lost: Exception = Transient("an object was in the way and is gone")
            try:
                if self._write(path, key, data, ABSENT):
                    return True
            except client_errors() as err:
                if not is_transient(err) or http_status(err) is not None:
                    raise
                lost = err  # no reply: the write may have worked
            found = self._look(path)
            if found is None:
                raise lost
            if found[0] != data:
                raise _conflict(self.url, key)
            return False

        return self._repeated(attempt, key)

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        path = self._path(key)

        def attempt() -> bool:
            if expected is None and self._write(path, key, data, ABSENT):
                return True
            found = self._look(path)
            content, name = found or (None, ABSENT)
            if content == data:
                return True
            if content != expected:
                return False
            if expected is not None and self._write(path, key, data, name):
                return True
            raise Transient("the object changed between its read and its write")  # look again

        return self._repeated(attempt, key)

    def _write(self, path: str, key: str, data: bytes, condition: str | None) -> bool:
        try:
            return self._put(path, data, condition)
        except FileNotFoundError as err:
            raise StoreError(
                f"{self.url}/{key} cannot be written: {reason(err)}. Does the bucket exist?"
            ) from err

    def _look(self, path: str) -> tuple[bytes, str | None] | None:
        try:
            return self._get(path, 0, None)
        except FileNotFoundError as err:
            if error_code(err) == "NoSuchBucket":
                raise
            return None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        path = self._path(key)
        return self._repeated(lambda: self._get(path, start, stop)[0], key)

    def listing(self, prefix: str) -> list[Listed]:
        def find() -> list[Listed]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(prefix) if prefix else self._root, detail=True)
            return sorted(
                (
                    Listed(path[len(self._root) + 1 :], info["size"], self._modified(path, info))
                    for path, info in found.items()
                    if info["type"]
                    == "file"  # s3fs names the folder itself if it came between its two requests
                ),
                key=lambda o: o.key,
            )

        return self._repeated(find, prefix)

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
            except FileNotFoundError as err:
                if error_code(err) == "NoSuchBucket":
                    raise
                return []
            return sorted(e["name"].rstrip("/").split("/")[-1] for e in entries if e["type"] == "directory")

        return self._repeated(ls, prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)

        self._repeated(remove, key)

    def sub(self, name: str) -> "ObjectStore":
        _check_key(name)
        return type(self)(f"{self.url}/{name}", self._options, self._retry)


class MemoryStore(ObjectStore):
    """fsspec's `memory://`, shared by the threads of a process. Its exclusive create lets two writers win."""

    concurrent_reads = LocalStore.concurrent_reads

    def _put(self, path: str, data: bytes, condition: str | None) -> bool:
        with _memory_lock:
            # `exists` looks for a folder of that name in every key of the process
            if condition == ABSENT and self._fs._strip_protocol(path) in self._fs.store:
                return False
            self._fs.pipe_file(path, data)
        return True

    def listing(self, prefix: str) -> list[Listed]:
        with _memory_lock:  # it goes through a dict that must not change meanwhile
            return super().listing(prefix)

    def folders(self, prefix: str = "") -> list[str]:
        with _memory_lock:
            return super().folders(prefix)

    def delete(self, key: str) -> None:
        with _memory_lock:
            super().delete(key)

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        path = self._path(key)
        with _memory_lock:
            found = self._look(path)
            content = found[0] if found else None
            if content == expected != data:
                self._fs.pipe_file(path, data)
            return content in (expected, data)


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


def _try_lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # NFS locks no directory: `swap` says what then holds


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
