"""A local disk cache of fetched ranges, shared by the processes of a node, within a byte limit.

`CachedStore` wraps a store and keeps what never changes: ranges of shards, and segments. Files are
published by an atomic rename, so a reader takes no lock and sees all of an entry or nothing; each ends
in its own CRC-32C, and the chunk reader compares the manifest's as well. Writers take turns by `flock`
on one file, which ends with the process that held it. Entries leave in the order of last use.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import google_crc32c

from .errors import SpecError
from .store import Listed, Store

logger = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 10 * 2**30
_TEMPORARY = ".tmp-"
_LOCK = "lock"
_LOCK_TRIES = 50  # of 20 ms: whoever was stopped while it held the lock costs others the cache, not a hang
_KEEP = 0.9  # evict down to this share of the limit, so that the directory is scanned once in a tenth of it
_CRC = struct.Struct("<I")
_TOTAL = struct.Struct("<Q")


class Cache:
    """Entries in a directory, at most `limit_bytes` of files; safe to use from many processes."""

    def __init__(self, directory: str | os.PathLike[str], limit_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        if limit_bytes < 1:
            raise SpecError(f"cache_bytes is {limit_bytes}; it must be at least 1")
        self.directory, self.limit_bytes = Path(directory).expanduser().absolute(), limit_bytes
        self._warned = False

    def get(self, name: str, start: int, stop: int | None) -> bytes | None:
        """Bytes [start, stop) of the object `name`, from any entry that holds them all; None if none does."""
        folder = self._folder(name)
        exact = folder / _entry(start, stop)
        data = self._load(exact)
        if data is not None or stop is None:
            return data
        for path, first, last in _entries(folder):
            if first <= start and stop <= last and path != exact:
                data = self._load(path)
                if data is not None:
                    return data[start - first : stop - first]
        return None

    def put(self, name: str, start: int, stop: int | None, data: bytes) -> None:
        """Keep an entry, and make room for it. A cache that cannot be written is warned of, once."""
        size = len(data) + _CRC.size
        path = self._folder(name) / _entry(start, stop)
        if size > self.limit_bytes:
            return
        try:
            with self._lock() as descriptor:
                if descriptor is None or path.exists():
                    return
                total = _read_total(descriptor)
                if total is None or total + size > self.limit_bytes:
                    total = self._evict(size)
                if total + size > self.limit_bytes:
                    return
                # the count is raised first: a writer that dies between leaves it too high, never too low
                os.pwrite(descriptor, _TOTAL.pack(total + size), 0)
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.parent / f"{_TEMPORARY}{path.name}"
                temporary.write_bytes(data + _CRC.pack(google_crc32c.value(data)))
                os.replace(temporary, path)
        except OSError as err:
            if not self._warned:
                logger.warning("%s cannot be written (%s); reading on without it", self.directory, err)
            self._warned = True

    def drop(self, name: str, start: int, stop: int) -> None:
        """Remove the entries that hold any of these bytes."""
        for path, first, last in _entries(self._folder(name)):
            if first < stop and start < last:
                self._remove(path)

    def size_bytes(self) -> int:
        """Bytes of the files in the cache, by looking."""
        return sum(size for _, _, size in self._scan())

    def _folder(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:40]
        return self.directory / digest[:2] / digest[2:]

    def _load(self, path: Path) -> bytes | None:
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        data = stored[: -_CRC.size]
        if len(stored) < _CRC.size or _CRC.unpack(stored[-_CRC.size :])[0] != google_crc32c.value(data):
            logger.warning("%s is damaged; fetching it again", path)
            self._remove(path)
            return None
        with contextlib.suppress(OSError):  # evicted meanwhile, or a read-only directory
            os.utime(path)
        return data

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink()  # the count stays too high until the next scan
        except OSError as err:
            return isinstance(err, FileNotFoundError)
        return True

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int | None]:
        """A descriptor of the locked file, opened each time so that threads and forks exclude each other."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for _ in range(_LOCK_TRIES):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.02)
                else:
                    yield descriptor
                    return
            yield None
        finally:
            os.close(descriptor)

    def _evict(self, coming: int) -> int:
        """Delete what was used longest ago until `coming` bytes fit; bytes that are left. Hold the lock."""
        entries = sorted(self._scan())
        total = sum(size for _, _, size in entries)
        keep = max(0, min(int(self.limit_bytes * _KEEP), self.limit_bytes - coming))
        for _, path, size in entries:
            if total <= keep and not path.name.startswith(_TEMPORARY):
                continue
            if self._remove(path):  # a temporary file under the lock is a dead writer's
                total -= size
        return total

    def _scan(self) -> Iterator[tuple[int, Path, int]]:
        """Time of last use in ns, path and size of every file but the lock."""
        for folder, _, names in os.walk(self.directory):
            for name in names:
                if name == _LOCK:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found = os.stat(os.path.join(folder, name))
                    yield found.st_mtime_ns, Path(folder, name), found.st_size


class CachedStore(Store):
    """A store whose shards and segments are read through a `Cache`; all else goes to the store itself."""

    def __init__(self, store: Store, cache: Cache) -> None:
        super().__init__(store.url)
        self.store, self.cache = store, cache
        self.concurrent_reads = store.concurrent_reads

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if not _immutable(key):
            return self.store.read(key, start, stop)
        name = f"{self.url}/{key}"
        data = self.cache.get(name, start, stop)
        if data is None:
            data = self.store.read(key, start, stop)
            if stop is None or len(data) == stop - start:
                self.cache.put(name, start, stop, data)
        return data

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        names = [f"{self.url}/{key}" if _immutable(key) else None for key, *_ in parts]
        found = [
            None if name is None else self.cache.get(name, start, stop)
            for name, (_, start, stop) in zip(names, parts, strict=True)
        ]
        missing = [i for i, data in enumerate(found) if data is None]
        for i, data in zip(missing, self.store.read_parts([parts[i] for i in missing]), strict=True):
            name, (_, start, stop) = names[i], parts[i]
            if data is not None and name is not None and len(data) == stop - start:
                self.cache.put(name, start, stop, data)
            found[i] = data
        return found

    def read_again(self, key: str, start: int, stop: int) -> bytes:
        """As `read`, from the store: what the cache holds of these bytes was found damaged."""
        name = f"{self.url}/{key}"
        self.cache.drop(name, start, stop)
        data = self.store.read(key, start, stop)
        if len(data) == stop - start:
            self.cache.put(name, start, stop, data)
        return data

    def exists(self, key: str) -> bool:
        return self.store.exists(key)

    def create(self, key: str, data: bytes) -> bool:
        return self.store.create(key, data)

    def listing(self, prefix: str) -> list[Listed]:
        return self.store.listing(prefix)

    def folders(self, prefix: str = "") -> list[str]:
        return self.store.folders(prefix)

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        return self.store.swap(key, expected, data)

    def delete(self, key: str) -> None:
        self.store.delete(key)

    def sub(self, name: str) -> "CachedStore":
        return CachedStore(self.store.sub(name), self.cache)


def _immutable(key: str) -> bool:
    """Shards, which manifests give the checksums of, and segments, which are named by their content."""
    return "/c/" in key or key.startswith("_segments/")


def _entry(start: int, stop: int | None) -> str:
    return f"{start}-{'' if stop is None else stop}"


def _entries(folder: Path) -> Iterator[tuple[Path, int, float]]:
    """Path, first byte and one past the last of each entry of an object."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        first, dash, last = name.partition("-")
        if dash and first.isdigit() and (not last or last.isdigit()):
            yield folder / name, int(first), int(last) if last else float("inf")


def _read_total(descriptor: int) -> int | None:
    """The count of bytes in the cache; None if nobody has counted."""
    data = os.pread(descriptor, _TOTAL.size, 0)
    return int(_TOTAL.unpack(data)[0]) if len(data) == _TOTAL.size else None
