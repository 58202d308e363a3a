"""Where Harvesters run: in this process, or as Ray actors.

Only block numbers go in and records come out; activations never pass through an engine.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, Protocol

from .errors import ActcacheError, WorkerLost
from .harvester import Harvester, Job

log = logging.getLogger(__name__)

Unit = tuple[str, int, tuple[str, ...]]
"""(split, block, sites): one thing for a Harvester to do."""


class Engine(Protocol):
    """Runs units on Harvesters. `completed` blocks until at least one is done."""

    def __enter__(self) -> "Engine": ...
    def __exit__(self, *exc: object) -> None: ...
    def prepare(self) -> str:
        """Load the LM and calibrate the sites; returns the attention kernel that the LM runs."""

    def free(self) -> bool: ...
    def busy(self) -> bool: ...
    def submit(self, unit: Unit) -> None: ...
    def completed(self) -> Iterator[tuple[Unit, bytes | BaseException]]: ...
    def fidelity(self, sites: Sequence[str]) -> dict[str, dict[str, float]]: ...


class LocalEngine:
    """One Harvester in this process; two threads, so that one block's upload overlaps the next's forward."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="harvest")
        self._running: dict[Future[bytes], Unit] = {}

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def prepare(self) -> str:
        self._harvester = Harvester(self._job)
        self._harvester.calibrate()
        return self._harvester.attention()

    def free(self) -> bool:
        return len(self._running) < 2

    def busy(self) -> bool:
        return bool(self._running)

    def submit(self, unit: Unit) -> None:
        self._running[self._pool.submit(self._harvester.run_block, *unit)] = unit

    def completed(self) -> Iterator[tuple[Unit, bytes | BaseException]]:
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            yield self._running.pop(future), future.exception() or future.result()

    def fidelity(self, sites: Sequence[str]) -> dict[str, dict[str, float]]:
        return {site: self._harvester.fidelity(site) for site in sites}


class RayEngine:
    """One Ray actor per worker, two blocks in flight on each; only ids go in and statistics come out.

    A lost actor is replaced by a fresh one rather than restarted by Ray: calls to a restarting actor
    fail at once, and a zombie whose node is cut off is fenced by the kill.
    """

    def __init__(self, job: Job, workers: int, gpus_per_worker: float) -> None:
        import ray

        self._ray, self._workers = ray, workers
        self._started = not ray.is_initialized()
        self._job = replace(job, threads=0 if gpus_per_worker else 1)
        self._options = {
            "num_cpus": 1,
            "num_gpus": gpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 2,
        }
        self._actors: list[Any] = []
        self._running: dict[Any, tuple[Any, Unit]] = {}

    def __enter__(self) -> "RayEngine":
        log.info("starting %d Ray workers", self._workers)
        if self._started:
            start_ray(self._workers)
        return self

    def __exit__(self, *exc: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def prepare(self) -> str:
        self._actors = [self._new_actor() for _ in range(self._workers)]
        self._call(self._actors[0].calibrate.remote())
        return str(self._call(self._actors[0].attention.remote()))

    def free(self) -> bool:
        return len(self._running) < 2 * self._workers

    def busy(self) -> bool:
        return bool(self._running)

    def submit(self, unit: Unit) -> None:
        taken = [actor for actor, _ in self._running.values()]
        actor = min(self._actors, key=taken.count)
        self._running[actor.run_block.remote(*unit)] = (actor, unit)

    def completed(self) -> Iterator[tuple[Unit, bytes | BaseException]]:
        done, _ = self._ray.wait(list(self._running), num_returns=1)
        for ref in done:
            actor, unit = self._running.pop(ref)
            try:
                yield unit, self._call(ref)
            except self._ray.exceptions.RayActorError as err:
                if actor in self._actors:  # the second block in flight on it comes here too
                    self._ray.kill(actor)
                    self._actors[self._actors.index(actor)] = self._new_actor()
                yield unit, WorkerLost(f"its worker was lost ({type(err).__name__})")
            except Exception as err:
                yield unit, err

    def _new_actor(self) -> Any:
        return self._ray.remote(Harvester).options(**self._options).remote(self._job)

    def fidelity(self, sites: Sequence[str]) -> dict[str, dict[str, float]]:
        refs = [self._actors[i % self._workers].fidelity.remote(site) for i, site in enumerate(sites)]
        return dict(zip(sites, (self._call(ref) for ref in refs), strict=True))

    def _call(self, ref: Any) -> Any:
        """The result; an error of ours comes back as itself, not wrapped in Ray's traceback."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as err:
            cause = err.cause
            raise (cause if isinstance(cause, ActcacheError) else err) from None


def start_ray(workers: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local one with a CPU per worker."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    cpus = max(workers, os.cpu_count() or 1)
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=100 * 1024**2,  # ids and statistics only
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
