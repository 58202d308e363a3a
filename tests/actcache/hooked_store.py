"""A store that calls a function before each operation: to interleave writers, to fail, to die."""

from collections.abc import Callable

from actcache.store import Listed, Store


class HookedStore(Store):
    """`store`, with `before(verb, key)` called first; what that raises is raised in place of the operation."""

    def __init__(self, store: Store, before: Callable[[str, str], None]) -> None:
        super().__init__(store.url)
        self._store, self._before = store, before

    def create(self, key: str, data: bytes) -> bool:
        self._before("create", key)
        return self._store.create(key, data)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        self._before("read", key)
        return self._store.read(key, start, stop)

    def listing(self, prefix: str) -> list[Listed]:
        self._before("listing", prefix)
        return self._store.listing(prefix)

    def folders(self, prefix: str = "") -> list[str]:
        self._before("folders", prefix)
        return self._store.folders(prefix)

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        self._before("swap", key)
        return self._store.swap(key, expected, data)

    def delete(self, key: str) -> None:
        self._before("delete", key)
        self._store.delete(key)

    def sub(self, name: str) -> "HookedStore":
        return HookedStore(self._store.sub(name), self._before)
