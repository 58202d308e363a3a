"""Stores for tests of the commit protocol: one in a dict, and one that tells of each operation.

`Watched` wraps any store, so that what a test does at the n-th operation (count it, die there, let
another writer in) works on a dict, a directory and S3 alike.
"""

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

from actcache.errors import Conflict
from actcache.store import Listed, Store

WRITES = ("create", "swap", "delete")
READS = ("read", "exists", "listing", "folders")


class DictStore(Store):
    """The contract of a store without its clock, files and network: states are compared and copied."""

    def __init__(self, objects: dict[str, bytes] | None = None, url: str = "dict://store") -> None:
        super().__init__(url)
        self.objects = {} if objects is None else objects

    def create(self, key: str, data: bytes) -> bool:
        created = key not in self.objects
        if self.objects.setdefault(key, bytes(data)) != data:
            raise Conflict(f"{self.url}/{key} exists with other content")
        return created

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key][start:stop]

    def listing(self, prefix: str) -> list[Listed]:
        return [
            Listed(k, len(v), 0.0)
            for k, v in sorted(self.objects.items())
            if not prefix or k.startswith(f"{prefix}/")
        ]

    def folders(self, prefix: str = "") -> list[str]:
        return sorted({k.split("/")[0] for k in self.objects if "/" in k})

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        if self.objects.get(key) not in (expected, data):
            return False
        self.objects[key] = bytes(data)
        return True

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def sub(self, name: str) -> "DictStore":
        raise NotImplementedError("no test needs it")


class Watched:
    """A store that calls `before(operation, key)` and `after(operation, key)` around every operation."""

    def __init__(
        self,
        store: Any,
        before: Callable[[str, str], None] = lambda operation, key: None,
        after: Callable[[str, str], None] = lambda operation, key: None,
    ) -> None:
        self.store, self.before, self.after = store, before, after
        self.requests: Counter[str] = Counter()
        self.n_bytes: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        if name == "read_part":  # a reading like another
            return self.read
        found = getattr(self.store, name)
        if name not in WRITES + READS:
            return found

        def operation(key: str = "", *args: Any) -> Any:
            self.before(name, key)
            result = found(key, *args)
            self.requests[name] += 1
            moved = [x for x in (*args, result) if isinstance(x, bytes)]
            self.n_bytes["written" if name in WRITES else "read"] += sum(map(len, moved))
            self.after(name, key)
            return result

        return operation


class Died(BaseException):
    """What a store raises in place of a SIGKILL; no `except Exception` stops it."""


class DiesAt(Watched):
    """Dies at the n-th operation, from 0, whose "name key" matches: before it takes place, or after."""

    def __init__(self, store: Any, n: int, pattern: str = r".*", *, after: bool = False) -> None:
        super().__init__(store)
        setattr(self, "after" if after else "before", self._count)
        self._left, self._pattern = n, re.compile(pattern)

    def die(self, place: str) -> None:
        """What dying is; once dead, its other threads die at their next operation."""
        raise Died(place)

    def _count(self, operation: str, key: str) -> None:
        if self._left < 0:
            self.die("dead already")
        if self._pattern.fullmatch(f"{operation} {key}"):
            self._left -= 1
            if self._left < 0:
                self.die(f"{operation} {key}")


class KilledAt(DiesAt):
    """Its process is killed there, by SIGKILL; "inside" a local write, when the bytes are synced."""

    def __init__(self, store: Any, n: int, pattern: str, when: str) -> None:
        super().__init__(store, n, pattern, after=when == "after")
        self._when = when

    def die(self, place: str) -> None:
        if self._when == "inside":
            os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)
