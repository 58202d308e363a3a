"""Working off the blocks of a harvest: attempts, draining on SIGTERM, progress, and where the time went."""

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .errors import ActcacheError, WorkerLost
from .progress import Progress, format_bytes, format_count
from .segments import RecordRows

if TYPE_CHECKING:
    from .engines import Engine, Unit, WorkerState

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times a block is tried before it is set aside and the rest finished."""
_SHOWN_WORKERS = 8
_SHOW_EVERY_S = 0.5
_BARE_SHARE, _BARE_S = 0.01, 10.0  # of the run, and at most, to measure the bare forward pass by


class Drain:
    """Inside this context SIGTERM asks the harvest to finish what is in flight and end; a second one kills.

    Does nothing outside the main thread, where Python takes no signals.
    """

    asked = False

    def __enter__(self) -> "Drain":
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log.info("SIGTERM: finishing the blocks in flight; a second one stops at once")


def work_off(
    pool: "Engine", units: Iterable["Unit"], drain: Drain
) -> Iterator[tuple["Unit", RecordRows | BaseException] | None]:
    """Each unit once with its record or its last error; None whenever nothing new has ended for a while.

    Errors that may pass are tried `ATTEMPTS` times; a preempted worker is no fault of its blocks. Once
    `drain` is asked, nothing more is begun.
    """
    queue = deque(units)
    left, attempts = set(queue), dict.fromkeys(queue, 0)
    while left and (pool.busy() or not drain.asked):
        while not drain.asked and pool.free():
            unit = queue.popleft() if queue else pool.straggler(left)
            if unit is None:
                break
            pool.submit(unit)
        ended = False
        for unit, result in pool.completed():
            ended = True
            if unit not in left:
                continue  # another worker was faster
            if isinstance(result, BaseException):
                if pool.running(unit):
                    continue  # a copy of it goes on
                attempts[unit] += not (isinstance(result, WorkerLost) and result.preempted)
                final = isinstance(result, ActcacheError) and not isinstance(result, OSError)
                if not final and attempts[unit] < ATTEMPTS:
                    what = str(result) or type(result).__name__
                    log.warning("block %d of %s: %s; trying again", unit[1], unit[0], what)
                    queue.append(unit)
                    continue
            left.discard(unit)
            yield unit, result
        if not ended:
            yield None


class Monitor:
    """The progress of one harvest: a line for people, metrics for Prometheus, numbers for the manifest."""

    def __init__(
        self, pool: "Engine", dataset: str, blocks: tuple[int, int], n_rows: int, show: bool, metrics: bool
    ) -> None:
        """`blocks`: how many are done, and how many are wanted."""
        from .metrics import Metrics

        self._pool, self._blocks, self._wanted = pool, *blocks
        self._bar = Progress("harvest", n_rows, "rows", show=show)
        self._metrics = Metrics(dataset) if metrics else None
        self._bytes = self._rows = self._failed = 0
        self._begun = self._shown = time.monotonic()

    def __enter__(self) -> "Monitor":
        self._begun = time.monotonic()
        self._bar.__enter__()
        self._show(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show_all(None)
        self._bar.__exit__(kind, error, trace)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begun

    def done(self, record: RecordRows) -> None:
        """A block was committed."""
        self._blocks += 1
        self._rows += record.n_rows
        self._bytes += sum(size_bytes for _, _, size_bytes in record.sizes)
        self._show(record.n_rows, record)

    def failed(self) -> None:
        """A block was set aside."""
        self._failed += 1
        self._show(0)

    def tick(self) -> None:
        """Nothing has happened for a while."""
        self._show(0)

    def _show(self, n_rows: int, record: RecordRows | None = None) -> None:
        self._bar.advance(n_rows, blocks=f"{self._blocks}/{self._wanted}")
        now = time.monotonic()
        if now - self._shown > _SHOW_EVERY_S:  # the states of 500 workers take milliseconds to gather
            self._shown = now
            self._show_all(record)

    def _show_all(self, record: RecordRows | None) -> None:
        workers = self._pool.workers()
        total = _summed(workers)
        elapsed = max(self.elapsed_s, 1e-9)
        fields: dict[str, object] = {"out": f"{format_bytes(self._bytes / elapsed)}/s"}
        if record is not None:
            fields["bits/value"] = f"{record.bits_per_value:.2f}"
        if len(workers) > 1:
            ready = sum(w.state in ("ready", "busy") for w in workers)
            fields["workers"] = f"{ready}/{len(workers)}"
        if self._failed:
            fields["set aside"] = self._failed
        behind = _share(total, "behind_store_s")
        fields["waiting for the store"] = f"{behind:.0%}" if behind >= 0.05 else None
        self._bar.advance(0, **fields)
        if 1 < len(workers) <= _SHOWN_WORKERS:
            for worker in workers:
                self._bar.note(f"worker {worker.name}", _worker_line(worker, elapsed))
        if self._metrics:
            self._metrics.update(self._blocks, self._wanted, self._failed, workers)

    def summary(self, sites: Sequence[str] | None) -> dict[str, Any]:
        """Rates of this run for the manifest; measures the bare forward pass to `sites`, if any are given.

        `harvest_tax` is the share of the LM's rate that harvesting cost: 1 - tokens/s over those of bare
        forward passes on the same workers.
        """
        elapsed = self.elapsed_s
        total = _summed(self._pool.workers())
        found: dict[str, Any] = {
            "rows": self._rows,
            "harvest_s": round(elapsed, 3),
            "rows_per_s": round(self._rows / elapsed, 1) if self._rows else 0.0,
        }
        if not total.get("tokens"):
            return found
        found["lm_batch_used"] = min(int(w.times["lm_batch"]) for w in self._pool.workers() if w.times)
        found |= {name: round(total[name], 3) for name in sorted(total) if name.endswith("_s")}
        found["tokens_per_s"] = round(total["tokens"] / elapsed, 1)
        if sites is None:
            return found
        try:
            bare = self._pool.bare_tokens_per_s(sites, min(_BARE_S, _BARE_SHARE * elapsed))
        except Exception as err:  # the rows are all there; only a figure is missing
            log.warning("the bare forward pass was not measured: %s", err)
            return found
        if not bare:  # no worker is left
            return found
        found["bare_tokens_per_s"] = round(bare, 1)
        found["harvest_tax"] = round(1 - found["tokens_per_s"] / bare, 4)
        log.info(
            "%s tokens/s; a bare forward pass %s: harvesting took %.1f %%",
            format_count(found["tokens_per_s"]),
            format_count(bare),
            100 * found["harvest_tax"],
        )
        return found


def _worker_line(worker: "WorkerState", elapsed: float) -> str:
    parts = [worker.state, f"{worker.times.get('blocks', 0):.0f} blocks"]
    parts.append(f"{format_count(worker.times.get('rows', 0) / elapsed)} rows/s")
    if "lm_batch" in worker.times:
        parts.append(f"LM batch {worker.times['lm_batch']:.0f}")
    return "  ".join(parts)


def _summed(workers: Sequence["WorkerState"]) -> dict[str, float]:
    total: dict[str, float] = {}
    for worker in workers:
        for name, amount in worker.times.items():
            if name != "lm_batch":
                total[name] = total.get(name, 0) + amount
    return total


def _share(total: Mapping[str, float], name: str) -> float:
    """Of the LM's time: computing, or standing still for one of two reasons. 0 in its first second."""
    whole = sum(total.get(n, 0) for n in ("forward_s", "behind_encode_s", "behind_store_s"))
    return total.get(name, 0) / whole if whole >= 1 else 0.0
