"""Places that a dataset is copied to: any store, or a repository of the Hugging Face Hub.

Objects are created, never overwritten. Only `zarr.json` and the card change from version to version, each while it still
is as it was read. `actcache.hub` decides which objects are copied.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import fsspec

from .errors import Conflict, StoreError
from .layout import zarr_metadata
from .manifest import Manifest
from .metadata import write_metadata
from .retry import client_errors
from .store import Store, client_options, folder_of, open_store

log = logging.getLogger(__name__)

CARD = "README.md"
_THREADS = 8
_COMMIT_BYTES = 256 * 10**6
_COMMIT_OBJECTS = 1000

Object = tuple[str, Callable[[], bytes]]
"""A key, and what reads the bytes."""


class Target(ABC):
    """A place that a dataset is copied to."""

    def __init__(self, url: str, store: Store) -> None:
        self.url, self._store = url.rstrip("/"), store

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Size in bytes of every object that is there, by key."""

    @abstractmethod
    def create(self, objects: Iterable[Object]) -> None:
        """Store objects; all are there when this returns.

        Raises:
            Conflict: another writer's bytes are there; they stay.
        """

    @abstractmethod
    def publish(self, manifest: Manifest, data: bytes, card: bytes | None) -> None:
        """Store the manifest (`data`), `zarr.json` and the card; only now does anybody see the copy.

        Raises:
            Conflict: another manifest of that version is there, or came meanwhile.
        """

    @abstractmethod
    def harvested(self, tokens_id: str) -> bool:
        """Whether a harvest over these tokens (digest of their identity) may have written shards there."""

    def read(self, key: str) -> bytes:
        """All of an object.

        Raises:
            FileNotFoundError: no such object.
        """
        return self._store.read(key)

    def conflict(self, key: str) -> Conflict:
        """What to raise about an object that has other bytes than the copy would."""
        return Conflict(
            f"{self.url}/{key} has other bytes than the dataset that is copied: both are of one Spec, but not of one "
            "harvest. It is left as it is; choose an empty place"
        )


def target_at(url: str, storage_options: Mapping[str, Any] | None) -> Target:
    """The target at a URL or a local path."""
    store = open_store(url, storage_options)
    return (Repository if url.startswith("hf://") else Place)(url, store, storage_options)


class Place(Target):
    """Any store."""

    def __init__(self, url: str, store: Store, storage_options: Mapping[str, Any] | None) -> None:
        super().__init__(url, store)
        self._options = storage_options

    def sizes(self) -> dict[str, int]:
        return {o.key: o.size_bytes for o in self._store.listing("")}

    def create(self, objects: Iterable[Object]) -> None:
        def create(item: Object) -> None:
            key, read = item
            try:
                self._store.create(key, read())
            except Conflict:
                raise self.conflict(key) from None

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="push") as pool:
            list(pool.map(create, objects))

    def harvested(self, tokens_id: str) -> bool:
        """By the token store, which a harvest makes beside the dataset before any shard, and nothing removes."""
        place = folder_of(self._store.url, self._options)
        if place is None:
            return True  # no folder above that can be looked at
        return any(name.endswith(f"-{tokens_id[:12]}") for name in place[0].folders("tokens"))

    def publish(self, manifest: Manifest, data: bytes, card: bytes | None) -> None:
        self.create([(manifest.key, partial(bytes, data))])
        write_metadata(self._store, set())
        if card is not None:
            before = self._store.read(CARD) if self._store.exists(CARD) else None
            self._store.swap(CARD, before, card)


class Repository(Target):
    """A repository of the Hugging Face Hub, which takes few commits an hour, one at a time.

    Each commit names the one before it, so whatever another writer commits meanwhile is an error, never lost.
    """

    def __init__(self, url: str, store: Store, storage_options: Mapping[str, Any] | None) -> None:
        super().__init__(url, store)
        self._fs, self._root = fsspec.core.url_to_fs(url.rstrip("/"), **client_options(storage_options))
        self._head: str | None = None
        """The commit that the next one must follow."""

    def sizes(self) -> dict[str, int]:
        self._fs.invalidate_cache()
        with self._errors(""):
            place = self._fs.resolve_path(self._root)
            info = self._api().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision)
            self._head = self._head or info.sha  # that of the first look: what came since is not known
            found = self._fs.find(self._root, detail=True)
        # the root may be spelled in another way: with a revision
        start = len(self._fs._strip_protocol(self._root)) + 1
        return {path[start:]: entry["size"] for path, entry in found.items()}

    def create(self, objects: Iterable[Object]) -> None:
        group: list[tuple[str, bytes]] = []
        for key, read in objects:
            group.append((key, read()))
            if sum(len(data) for _, data in group) >= _COMMIT_BYTES or len(group) == _COMMIT_OBJECTS:
                self._commit(group)
                group = []
        if group:
            self._commit(group)

    def publish(self, manifest: Manifest, data: bytes, card: bytes | None) -> None:
        last = zarr_metadata(manifest) | ({} if card is None else {CARD: card}) | {manifest.key: data}
        self._commit(list(last.items()))

    def harvested(self, tokens_id: str) -> bool:
        return False  # no harvest can write there: a file system without exclusive create

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._fs.endpoint, token=self._fs.token)

    def _commit(self, group: Sequence[tuple[str, bytes]]) -> None:
        from huggingface_hub import CommitOperationAdd

        assert self._head is not None, "what is there is looked at first"
        with self._errors(group[0][0]):
            place = self._fs.resolve_path(self._root)
            folder = f"{place.path_in_repo}/" if place.path_in_repo else ""
            made = self._api().create_commit(
                place.repo_id,
                [CommitOperationAdd(f"{folder}{key}", data) for key, data in group],
                commit_message=f"actcache push: {len(group)} objects",
                repo_type=place.repo_type,
                revision=place.revision,
                parent_commit=self._head,
            )
            self._head = made.oid
            self._fs.invalidate_cache()

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except client_errors() as err:
            raise StoreError(
                f"{self.url}/{key}: {err}. Check the URL and permissions; then push again"
            ) from err
