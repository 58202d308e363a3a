"""One harvest of a dataset at a time: the others wait, and go on where it dies. Whoever removes objects holds it too.

Correctness does not depend on it. The commit protocol holds for any number of writers (docs/format.md,
"Commit protocol"); without the lease two drivers would compute each block twice. It is an object beside
the dataset, `_harvests/<name>.json`, that its holder rewrites every few seconds. Who waits judges by its own
clock whether that goes on, so clocks need not agree.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

from .errors import BeingWritten, StoreError
from .store import Store

log = logging.getLogger(__name__)

FOLDER = "_harvests"
BEAT_S = 10.0
DEAD_AFTER_S = 60.0
"""A lease that was not renewed for so long is free; longer than a store's outage that retries bridge."""
_POLL_S = 1.0
_REMIND_S = 60.0


class Lease:
    """The right to harvest `name` under `base`, as a context; waits until it is free.

    A lease that was lost to another run (this one had stalled) is reported, not enforced: both go on, and
    the dataset comes out the same.
    """

    def __init__(self, base: Store, name: str, *, now_s: float | None = None) -> None:
        """Args:
        now_s: the time by the store's clock. If given, nobody is waited for: entering raises BeingWritten if
            the lease was renewed within `DEAD_AFTER_S` of it.
        """
        self._base, self._key, self._now_s = base, f"{FOLDER}/{name}.json", now_s
        self._us = {"run": uuid.uuid4().hex, "since": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())}
        self._us |= _this_process()
        self._beats = 0
        self._stored: bytes | None = None
        self._over = threading.Event()

    def __enter__(self) -> "Lease":
        if self._now_s is None:
            self._acquire()
        else:
            self._take_or_refuse(self._now_s)
        self._thread = threading.Thread(target=self._renew, name="harvest-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        try:
            if self._read() == self._stored:
                self._base.delete(self._key)
        except StoreError as err:
            log.warning("the lease of this harvest stays for %.0f s: %s", DEAD_AFTER_S, err)

    def _acquire(self) -> None:
        found, since, reminded = self._read(), time.monotonic(), 0.0
        while found is not None:
            holder = parse_lease(found)
            now = time.monotonic()
            if now - since > DEAD_AFTER_S or _is_dead(holder):
                log.info("%s has died; going on with its harvest", _named(holder))
                break
            if not reminded or now - reminded > _REMIND_S:
                log.info("another run works on this dataset: %s; waiting for it", _named(holder))
                reminded = now
            time.sleep(_POLL_S)
            again = self._read()
            if again != found:
                found, since = again, time.monotonic()
        if not self._write(found):
            self._acquire()  # another one that waited was faster

    def _take_or_refuse(self, now_s: float) -> None:
        found = self._read()
        holder = parse_lease(found or b"")
        if found is not None and not _is_dead(holder):
            # listed after it was read: a lease that is renewed meanwhile looks younger, never older
            renewed_s = max(
                (o.modified_s for o in self._base.listing(FOLDER) if o.key == self._key), default=now_s
            )
            if now_s - renewed_s < DEAD_AFTER_S:
                raise BeingWritten(self._busy(holder))
        if not self._write(found):
            raise BeingWritten(self._busy(parse_lease(self._read() or b"")))

    def _busy(self, holder: dict[str, Any]) -> str:
        name = self._key.removeprefix(f"{FOLDER}/").removesuffix(".json")
        return (
            f"{self._base.url}/{name} is being written by {_named(holder)}. Wait until that has ended, or stop it; a run that "
            f"died is over {DEAD_AFTER_S:.0f} s after its last sign of life"
        )

    def _renew(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                if not self._write(self._stored):
                    log.warning("another run has taken this harvest over; both go on, nothing is lost")
                    return
            except StoreError as err:
                log.warning("the lease of this harvest was not renewed: %s", err)

    def _write(self, expected: bytes | None) -> bool:
        self._beats += 1
        data = json.dumps(self._us | {"beats": self._beats}).encode()
        if not self._base.swap(self._key, expected, data):
            return False
        self._stored = data
        return True

    def _read(self) -> bytes | None:
        try:
            return self._base.read(self._key)
        except FileNotFoundError:
            return None


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "process": _process(os.getpid())}


def _process(pid: int) -> str | None:
    """What tells a process from any other with its number, on Linux: boot, pid namespace and start time."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{pid}/stat") as stat:
            state, *fields = stat.read().rpartition(")")[2].split()
            if state == "Z":  # killed, and its parent has not asked yet
                return None
            return f"{boot.read().strip()}/{os.readlink('/proc/self/ns/pid')}/{fields[18]}"
    except OSError:
        return None


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host and namespace that is gone; False if it may live."""
    ours, theirs = _process(os.getpid()), holder.get("process")
    if ours is None or not isinstance(theirs, str) or not isinstance(holder.get("pid"), int):
        return False
    here = ours.rpartition("/")[0] == theirs.rpartition("/")[0]
    return here and _process(holder["pid"]) != theirs


def parse_lease(data: bytes) -> dict[str, Any]:
    """What a lease object says; empty if it is none."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
