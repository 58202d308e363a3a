"""Where Harvesters run: the interface, and this process. `ray_engine` has Ray actors.

Only block numbers go in and records come out; activations never pass through an engine.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

from .harvester import Harvester, Job
from .segments import RecordRows

Unit = tuple[str, int, tuple[str, ...]]
"""(split, block, sites): one thing for a Harvester to do."""


@dataclass
class WorkerState:
    """What the driver knows of one worker."""

    name: str
    """Number and node."""
    state: str
    """starting, ready, busy or given up."""
    running: int = 0
    """Blocks in flight."""
    times: Mapping[str, float] = field(default_factory=dict)
    """Its `overlap.Times` at its last block, and its `lm_batch`."""


class Engine(Protocol):
    """Runs units on Harvesters."""

    def __enter__(self) -> "Engine": ...
    def __exit__(self, *exc: object) -> None: ...
    def prepare(self) -> str:
        """Load the LM and calibrate the sites; returns the attention kernel that the LM runs."""

    def free(self) -> bool:
        """Whether a unit can be submitted that would not have to wait for another."""

    def busy(self) -> bool: ...
    def submit(self, unit: Unit) -> None: ...
    def completed(self) -> Iterator[tuple[Unit, RecordRows | BaseException]]:
        """What has ended; blocks until something has, or for a second or so."""

    def straggler(self, wanted: Container[Unit]) -> Unit | None:
        """A unit of those `wanted` that is in flight for so long that an idle worker should try it too."""

    def running(self, unit: Unit) -> bool:
        """Whether a copy of the unit is in flight."""

    def workers(self) -> list[WorkerState]: ...
    def fidelity(self, sites: Sequence[str]) -> dict[str, dict[str, float | None] | Exception]:
        """`Harvester.fidelity` of each site, or why it could not be measured."""

    def bare_tokens_per_s(self, sites: Sequence[str], seconds: float) -> float:
        """Of all workers together, each running nothing but the LM; see `Harvester.bare_tokens_per_s`."""


class LocalEngine:
    """One Harvester in this process; two threads, so that one block's upload overlaps the next's forward."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="harvest")
        self._running: dict[Future[RecordRows], Unit] = {}
        self._harvester: Harvester | None = None

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._harvester is not None:
            self._harvester.close()

    def prepare(self) -> str:
        self._harvester = Harvester(self._job)
        self._harvester.calibrate()
        return self._harvester.attention()

    @property
    def _prepared(self) -> Harvester:
        assert self._harvester is not None, "prepare() comes first"
        return self._harvester

    def free(self) -> bool:
        return len(self._running) < 2

    def busy(self) -> bool:
        return bool(self._running)

    def submit(self, unit: Unit) -> None:
        self._running[self._pool.submit(self._run_block, unit)] = unit

    def _run_block(self, unit: Unit) -> RecordRows:
        return RecordRows.of(self._prepared.run_block(*unit))

    def completed(self) -> Iterator[tuple[Unit, RecordRows | BaseException]]:
        done, _ = wait(self._running, timeout=1, return_when=FIRST_COMPLETED)
        for future in done:
            yield self._running.pop(future), future.exception() or future.result()

    def straggler(self, wanted: Container[Unit]) -> Unit | None:
        return None

    def running(self, unit: Unit) -> bool:
        return unit in self._running.values()

    def workers(self) -> list[WorkerState]:
        times = self._prepared.times.snapshot() | {"lm_batch": self._prepared.lm_batch}
        return [WorkerState("0", "busy" if self._running else "ready", len(self._running), times)]

    def fidelity(self, sites: Sequence[str]) -> dict[str, dict[str, float | None] | Exception]:
        found: dict[str, dict[str, float | None] | Exception] = {}
        for site in sites:
            try:
                found[site] = self._prepared.fidelity(site)
            except Exception as err:
                found[site] = err
        return found

    def bare_tokens_per_s(self, sites: Sequence[str], seconds: float) -> float:
        return self._prepared.bare_tokens_per_s(sites, seconds)
