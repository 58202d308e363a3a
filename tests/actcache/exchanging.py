"""Ranks as threads of one process: they exchange through a barrier, with copies, as over a network.

A barrier that is not full after `TIMEOUT_S` breaks, so a test of ranks that wait for each other fails and
does not hang.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TIMEOUT_S = 60


class Room:
    """One channel: each of `n` members brings an array and takes away a copy of all."""

    def __init__(self, n: int) -> None:
        self._barrier = threading.Barrier(n, timeout=TIMEOUT_S)
        self._brought: list[np.ndarray] = [np.empty(0, np.uint8)] * n
        self.sizes: list[int] = []
        """Bytes of each exchange, of one member."""
        self.errors: list[bytes] = []
        """What the headers of messages told of ranks that could not read, each once."""
        self.waited_for = threading.Event()
        """Set once a member has come."""

    def exchange(self, i: int, data: np.ndarray) -> list[np.ndarray]:
        self._brought[i] = data
        self.waited_for.set()
        self._barrier.wait()
        found = [array.copy() for array in self._brought]
        if i == 0:
            self.sizes.append(len(data))
            told = [array[56:512].tobytes().rstrip(b"\0") for array in found]
            self.errors += [text for text in told if text]
        self._barrier.wait()
        return found

    def close(self) -> None:
        self._barrier.abort()


class Group:
    """The ranks that join their rows; `member(rank)` is the `Gather` of one of them."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.rooms: list[Room] = []
        self._lock = threading.Lock()

    def member(self, rank: int) -> "Member":
        return Member(self, rank)

    def room(self, number: int) -> Room:
        with self._lock:
            while len(self.rooms) <= number:
                self.rooms.append(Room(len(self.ranks)))
            return self.rooms[number]

    def close(self) -> None:
        """What closing a process group does: calls under way and later ones raise."""
        for room in self.rooms:
            room.close()


class Member:
    def __init__(self, group: Group, rank: int) -> None:
        self._group, self._rank, self._opened = group, rank, 0

    @property
    def ranks(self) -> list[int]:
        return self._group.ranks

    def channel(self) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
        room, i = self._group.room(self._opened), self.ranks.index(self._rank)
        self._opened += 1
        return lambda data: room.exchange(i, data)


def in_threads(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the functions return or raise, each in a thread of its own."""
    results: list[Any] = [None] * len(functions)

    def run(i: int) -> None:
        try:
            results[i] = functions[i]()
        except Exception as err:
            results[i] = err

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
