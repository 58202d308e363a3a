"""Prometheus metrics of a harvest, through Ray's exporter: `ray_<name>` on each node's metrics port.

The driver alone reports, by what its workers tell it with each block; so all is in one place, and a worker
that dies takes no counter with it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines import WorkerState

GAUGES: Mapping[str, str] = {
    "actcache_blocks_done": "Blocks that are committed, those of earlier runs included",
    "actcache_blocks_wanted": "Blocks that the Spec asks for",
    "actcache_blocks_set_aside": "Blocks of this run that failed after their attempts",
    "actcache_workers_ready": "Workers that have loaded the LM",
    "actcache_workers_wanted": "Workers asked for",
}
COUNTERS: Mapping[str, tuple[str, str]] = {
    "actcache_rows": ("rows", "Rows committed"),
    "actcache_tokens": ("tokens", "Tokens in forward passes"),
    "actcache_stored_bytes": ("bytes", "Bytes written"),
    "actcache_forward_seconds": ("forward_s", "Time in forward passes"),
    "actcache_encode_seconds": ("encode_s", "Time quantising"),
    "actcache_store_seconds": ("store_s", "Time from a block's last row to its record"),
    "actcache_behind_encode_seconds": ("behind_encode_s", "Time the LM stood still for quantising"),
    "actcache_behind_store_seconds": ("behind_store_s", "Time the LM stood still for the store"),
}
"""Metric, the field of `overlap.Times` that it counts, and what it means; tagged by worker."""


class Metrics:
    """The metrics of one dataset's harvest."""

    def __init__(self, dataset: str) -> None:
        from ray.util.metrics import Counter, Gauge

        tags = {"dataset": dataset}
        self._gauges: dict[str, Any] = {}
        for name, meaning in GAUGES.items():
            self._gauges[name] = Gauge(name, meaning, tag_keys=("dataset",))
            self._gauges[name].set_default_tags(tags)
        self._counters: dict[str, Any] = {}
        for name, (_, meaning) in COUNTERS.items():
            self._counters[name] = Counter(name, meaning, tag_keys=("dataset", "worker"))
            self._counters[name].set_default_tags(tags)
        self._counted: dict[tuple[str, str], float] = {}

    def update(self, done: int, wanted: int, set_aside: int, workers: Sequence["WorkerState"]) -> None:
        """Report how things stand."""
        ready = sum(w.state in ("ready", "busy") for w in workers)
        values = (done, wanted, set_aside, ready, len(workers))
        for name, value in zip(GAUGES, values, strict=True):
            self._gauges[name].set(value)
        for worker in workers:
            number = worker.name.partition(" ")[0]
            for name, (source, _) in COUNTERS.items():
                amount = worker.times.get(source, 0)
                more = amount - self._counted.get((name, number), 0)
                if more > 0:
                    self._counters[name].inc(more, tags={"worker": number})
                    self._counted[name, number] = amount
