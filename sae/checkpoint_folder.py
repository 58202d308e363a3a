"""The checkpoints of a run: which is the newest, how a new one becomes complete, and what may go.

Objects are created and never overwritten. A checkpoint exists once its `done.json` does; the one before is
removed after that, its own `done.json` first, so that none is ever without its parts. The format is
sae/checkpoint.py's.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from actcache.errors import Conflict, FormatError, StoreError

from .checkpoint import (
    DONE_FILE,
    FILE_NAME,
    FOLDER,
    FORMAT,
    PartFile,
    PartInfo,
    StoredCheckpoint,
    done_bytes,
    folder_of,
    parse_done,
)

if TYPE_CHECKING:
    from actcache.store import Store

_OLD_FILES = re.compile(r"checkpoints/\d{16}\.safetensors")


class Checkpoints:
    """The checkpoints of a run: the newest, a new one, and what may go.

    One process completes checkpoints, that of rank 0; others may look.
    """

    def __init__(self, store: "Store") -> None:
        self.store = store
        self._known: set[int] = set()
        self.held: int | None = None
        """Rows of a checkpoint that is still read, and so stays, though newer ones come."""

    @property
    def rows(self) -> int | None:
        """Rows of the newest checkpoint that was found or completed."""
        return max(self._known, default=None)

    def newest(self) -> "StoredCheckpoint | None":
        """The newest complete checkpoint.

        Raises:
            FormatError: another version wrote it.
            CorruptObject: its `done.json` is damaged.
        """
        keys = [o.key for o in self.store.listing(FOLDER)]
        old = [key for key in keys if _OLD_FILES.fullmatch(key)]
        if old or self.store.exists("checkpoint.safetensors"):
            raise FormatError(
                f"{self.store.url} holds a checkpoint of an older format ({old[0] if old else 'checkpoint.safetensors'}); "
                f"this version reads format {FORMAT}. Train into a new directory."
            )
        self._known = {rows for key in keys if (rows := _rows_of_done(key)) is not None}
        return None if self.rows is None else self.at(self.rows)

    def at(self, rows: int) -> StoredCheckpoint:
        """The complete checkpoint after `rows` rows.

        Raises:
            FileNotFoundError: there is none.
            FormatError, CorruptObject: as `newest`.
        """
        key = f"{folder_of(rows)}/{DONE_FILE}"
        stored_rows, state, files = parse_done(f"{self.store.url}/{key}", self.store.read(key))
        return StoredCheckpoint(self.store, stored_rows, state, files)

    def complete(self, rows: int, state: Mapping[str, Any], parts: Sequence[PartInfo]) -> None:
        """Make the parts of all ranks a checkpoint, then remove older ones and what dead attempts left.

        Raises:
            Conflict: another process trains into the same directory.
            StoreError: a part is not to be seen from here, or the store refused.
        """
        _check_ranks(parts, rows)
        files = [file for part in parts for file in part["files"]]
        StoredCheckpoint(self.store, rows, state, files)  # refuses parts that leave rows out
        listed = {o.key: o.size_bytes for o in self.store.listing(FOLDER)}
        self._refuse_others(listed)
        folder = folder_of(rows)
        for part in parts:
            for file in part["files"]:
                self._check_there(f"{folder}/{file['name']}", file["size_bytes"], part["rank"], listed)
        try:
            self.store.create(f"{folder}/{DONE_FILE}", done_bytes(rows, state, files))
        except Conflict as error:
            raise self._conflict(folder) from error
        self._known.add(rows)
        self._sweep(rows, files, list(listed))
        self._known &= {rows, self.held}

    def remove(self) -> None:
        """Remove all checkpoints but one that is held, and what dead attempts left: the run is finished."""
        keys = [o.key for o in self.store.listing(FOLDER) if _is_ours(o.key)] + self._temporary()
        keys = [key for key in keys if _rows_of(key) != self.held]
        self._delete([key for key in keys if _rows_of_done(key) is not None])
        self._delete([key for key in keys if _rows_of_done(key) is None])
        self.store.sub(FOLDER).prune()
        self._known &= {self.held}

    def _refuse_others(self, listed: Mapping[str, int]) -> None:
        """A checkpoint that this run did not complete is another process's."""
        for key in listed:
            rows = _rows_of_done(key)
            if rows is not None and rows not in self._known:
                raise self._conflict(folder_of(rows))

    def _conflict(self, folder: str) -> Conflict:
        return Conflict(
            f"{self.store.url}/{folder} is a checkpoint of another process, which trains into the same "
            "directory; end one of the two, then run the same again"
        )

    def _check_there(self, key: str, size: int, rank: int, listed: Mapping[str, int]) -> None:
        if listed.get(key) == size:
            return
        try:  # a listing over NFS may be some seconds old; opening a file is not
            if size and len(self.store.read(key, size - 1, size + 1)) == 1:
                return
        except FileNotFoundError:
            pass
        raise StoreError(
            f"{self.store.url}/{key}, which rank {rank} wrote, is not there as seen by the process that completes "
            "the checkpoint. Let all ranks write to one place (a shared file system or a URL), and only one run."
        )

    def _sweep(self, rows: int, files: Sequence[PartFile], listed: Sequence[str]) -> None:
        """Remove what the complete checkpoint after `rows` makes needless.

        Of each older checkpoint `done.json` goes first: without its parts it would be a checkpoint that
        cannot be read, while parts without it are only bytes for the next sweep. Parts of another attempt
        in a later folder are what a killed process wrote; temporary files there may be this run's own.
        """
        own = {f"{folder_of(rows)}/{file['name']}" for file in files}
        attempts = {_attempt_of(key) for key in own}
        gone = [key for key in listed if _is_ours(key) and key not in own and _rows_of(key) != self.held]
        gone = [key for key in gone if _rows_of(key) <= rows or _attempt_of(key) not in attempts]
        gone += [key for key in self._temporary() if _rows_of(key) <= rows]
        self._delete([key for key in gone if _rows_of_done(key) is not None])
        self._delete([key for key in gone if _rows_of_done(key) is None])
        for older in sorted({_rows_of(key) for key in gone} - {rows}):
            self.store.sub(folder_of(older)).prune()

    def _temporary(self) -> list[str]:
        """Temporary files of writers that were killed."""
        return [o.key for o in self.store.leftovers() if o.key.startswith(f"{FOLDER}/")]

    def _delete(self, keys: Sequence[str]) -> None:
        if keys:
            with ThreadPoolExecutor(min(len(keys), self.store.concurrent_reads)) as pool:
                list(pool.map(self.store.delete, keys))


def _check_ranks(parts: Sequence[PartInfo], rows: int) -> None:
    world = len(parts)
    assert sorted(part["rank"] for part in parts) == list(range(world)), "one part of each rank"
    assert all(part["world"] == world and part["rows"] == rows for part in parts), "parts of one moment"


def _rows_of(key: str) -> int:
    """Rows of the checkpoint that an object belongs to; -1 if it belongs to none."""
    parts = key.split("/")
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else -1


def _rows_of_done(key: str) -> int | None:
    return _rows_of(key) if key.endswith(f"/{DONE_FILE}") and _rows_of(key) >= 0 else None


def _is_ours(key: str) -> bool:
    """Whether this module writes objects of that name; others stay."""
    return _rows_of(key) >= 0 and (_attempt_of(key) is not None or _rows_of_done(key) is not None)


def _attempt_of(key: str) -> str | None:
    found = FILE_NAME.fullmatch(key.rpartition("/")[2])
    return found[1] if found else None
