"""Stages of a harvest side by side: a producer one item ahead of its consumer, within a budget of bytes."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Times:
    """Where a Harvester's time went, in seconds, and what it made, since it started.

    Stages overlap, so they do not add up to the time that passed.
    """

    forward_s: float = 0.0
    """Forward passes and the copy to the host; on a GPU until their kernels are queued."""
    encode_s: float = 0.0
    """Quantising, permuting, statistics; compression is in `store_s`."""
    store_s: float = 0.0
    """From a block's last row to its record: compressed, uploaded, committed."""
    behind_encode_s: float = 0.0
    """The LM stood still because a batch was not encoded yet."""
    behind_store_s: float = 0.0
    """The LM stood still because blocks before were still on their way into the store."""
    tokens: int = 0
    """Tokens in forward passes: rows, special tokens, padding, and sequences that two blocks share."""
    rows: int = 0
    blocks: int = 0
    bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def taking(self, name: str) -> Iterator[None]:
        """Add the time inside to the field `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - start})

    def add(self, **amounts: float) -> None:
        """Add to fields; safe in several threads."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def snapshot(self) -> dict[str, float]:
        """The fields as numbers."""
        with self._lock:
            return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_lock"}


class Room:
    """A budget of bytes that blocks under way share; whoever asks for more than is left waits.

    One is always let in, however large, so nothing waits for ever.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._taken = limit_bytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, n_bytes: int) -> Iterator[None]:
        """Hold `n_bytes` inside the context."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + n_bytes <= self._limit)
            self._taken += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= n_bytes
                self._changed.notify_all()


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def ahead(items: Iterable[T], pool: Executor, waited: Callable[[float], None]) -> Generator[T, None, None]:
    """`items`, made by a thread of `pool` one ahead of the consumer; the same order, the same errors.

    At most three exist at a time: one with the consumer, one waiting, one being made. A consumer that
    stops early stops the producer.

    Args:
        waited: gets the seconds for which the producer waited for the consumer, item by item.
    """
    line: queue.Queue[Any] = queue.Queue(maxsize=1)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        start = time.perf_counter()
        while not stopped.is_set():
            try:
                line.put(item, timeout=0.1)
            except queue.Full:
                continue
            waited(time.perf_counter() - start)
            return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as err:
            put(_Failed(err))
        else:
            put(end)

    running = pool.submit(produce)
    try:
        while (item := line.get()) is not end:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()
        if not running.cancel():
            running.result()
