"""A store that calls functions around each operation: to interleave writers, to fail, to lose replies, to die."""

from collections.abc import Callable
from typing import TypeVar

from actcache.store import Listed, Store

T = TypeVar("T")
Hook = Callable[[str, str], None]


class HookedStore(Store):
    """`store`, with `before(verb, key)` and `after(verb, key)` called; what they raise, the operation raises."""

    def __init__(self, store: Store, before: Hook, after: Hook = lambda verb, key: None) -> None:
        super().__init__(store.url)
        self._store, self._before, self._after = store, before, after

    def _around(self, verb: str, key: str, work: Callable[[], T]) -> T:
        self._before(verb, key)
        result = work()
        self._after(verb, key)
        return result

    def create(self, key: str, data: bytes) -> bool:
        return self._around("create", key, lambda: self._store.create(key, data))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        return self._around("read", key, lambda: self._store.read(key, start, stop))

    def listing(self, prefix: str) -> list[Listed]:
        return self._around("listing", prefix, lambda: self._store.listing(prefix))

    def folders(self, prefix: str = "") -> list[str]:
        return self._around("folders", prefix, lambda: self._store.folders(prefix))

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        return self._around("swap", key, lambda: self._store.swap(key, expected, data))

    def delete(self, key: str) -> None:
        self._around("delete", key, lambda: self._store.delete(key))

    def sub(self, name: str) -> "HookedStore":
        return HookedStore(self._store.sub(name), self._before, self._after)
