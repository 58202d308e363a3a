"""Harvesters as Ray actors, and `map` over a cluster.

Actors come and go: one that is lost is replaced, one that is not placed yet is not waited for, and the
last blocks of a slow one are tried on an idle one too. What a block holds does not depend on who runs it.
"""

import logging
import os
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

from .engines import Unit, WorkerState
from .errors import ActcacheError, HarvestError, WorkerLost
from .harvester import Harvester, Job
from .segments import RecordRows

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

_IN_FLIGHT = 2
"""Blocks on a worker at a time: one in the LM, one on its way into the store."""
_STARTS = 3
"""Times in a row that a worker may fail to start before it is given up."""
_SLOW = 3.0
"""A block that takes so many times the median is tried elsewhere too, once nothing else is left to do."""
_REMIND_S = 30.0


class HarvesterActor:
    """A Harvester in a process of its own. Loading is a call, so that its errors come back as results."""

    def start(self, job: Job) -> str:
        """Load the LM; returns the node's address."""
        import ray

        self._harvester = Harvester(job)
        return str(ray.util.get_node_ip_address())

    def calibrate(self) -> str:
        """Calibrate the sites; returns the LM's attention kernel."""
        self._harvester.calibrate()
        return self._harvester.attention()

    def run_block(self, *unit: Any) -> tuple[bytes, dict[str, float]]:
        """The record's rows, packed, and the times since the start."""
        record = RecordRows.of(self._harvester.run_block(*unit))
        times = self._harvester.times.snapshot()
        return record.pack(), times | {"lm_batch": self._harvester.lm_batch}

    def fidelity(self, site: str) -> dict[str, float | None]:
        return self._harvester.fidelity(site)

    def bare_tokens_per_s(self, sites: Sequence[str], seconds: float) -> float:
        return self._harvester.bare_tokens_per_s(sites, seconds)


@dataclass(eq=False)
class _Worker:
    number: int
    actor: Any
    starting: Any
    """Reference to its node; None once it is there."""
    failed_starts: int = 0
    node: str = ""
    running: int = 0
    times: Mapping[str, float] = field(default_factory=dict)
    earlier: Mapping[str, float] = field(default_factory=dict)
    """Times of the actors that it replaced."""

    @property
    def ready(self) -> bool:
        return self.actor is not None and self.starting is None

    def total(self) -> dict[str, float]:
        """Times of all its actors."""
        sums = {k: self.earlier.get(k, 0) + v for k, v in self.times.items() if k != "lm_batch"}
        return {**self.earlier, **sums, **{k: v for k, v in self.times.items() if k == "lm_batch"}}

    def state(self) -> WorkerState:
        if self.actor is None:
            word = "given up"
        elif self.starting is not None:
            word = "starting"
        else:
            word = "busy" if self.running else "ready"
        return WorkerState(f"{self.number} {self.node}".rstrip(), word, self.running, self.total())


class RayEngine:
    """Up to `workers` actors, two blocks in flight on each; only ids go in and statistics come out.

    A lost actor is replaced by a fresh one rather than restarted by Ray: calls to a restarting actor
    fail at once, and a zombie whose node is cut off is fenced by the kill.
    """

    actor_class: type[HarvesterActor] = HarvesterActor

    def __init__(
        self,
        job: Job,
        workers: int,
        gpus_per_worker: float,
        placement: Mapping[str, Any] | None = None,
    ) -> None:
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        self._options = {
            "num_cpus": 1,
            "num_gpus": gpus_per_worker,
            **(placement or {}),
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": _IN_FLIGHT + 1,
        }
        self._job = replace(job, threads=0 if gpus_per_worker else max(1, int(self._options["num_cpus"])))
        self._workers = [_Worker(number, None, None) for number in range(workers)]
        self._running: dict[Any, tuple[_Worker, Any, Unit, float]] = {}
        """By reference: worker, its actor, unit, time of submission."""
        self._in_flight: Counter[Unit] = Counter()
        """Copies of each unit in `_running`."""
        self._spare: list[dict[int, _Worker]] = [{} for _ in range(_IN_FLIGHT)]
        """By blocks on them: the workers that can take another. A thousand are not looked through for each block."""
        self._durations: deque[float] = deque(maxlen=101)
        self._cause = ""
        self._reminded = time.monotonic()

    def __enter__(self) -> "RayEngine":
        log.info("starting %d Ray workers", len(self._workers))
        if self._started:
            start_ray(len(self._workers))
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            if worker.actor is not None:
                self._ray.kill(worker.actor)
        if self._started:
            self._ray.shutdown()

    def prepare(self) -> str:
        self._check_resources()
        for worker in self._workers:
            self._start(worker)
        return str(self._ask("calibrate", [()])[0])

    def _ask(self, method: str, calls: Sequence[tuple[Any, ...]], *, errors: bool = False) -> list[Any]:
        """`method` with each of these arguments, on idle workers side by side; on another where one is lost.

        Args:
            errors: what a call raises is its answer.

        Raises:
            WorkerLost: too many were lost that were not preempted.
        """
        answers: dict[int, Any] = {}
        lost = 0
        while len(answers) < len(calls):
            while not (idle := self._idle()):
                self._wait(())
            left = [i for i in range(len(calls)) if i not in answers]
            asked = [
                (i, worker, worker.actor, getattr(worker.actor, method).remote(*calls[i]))
                for i, worker in zip(left, idle, strict=False)
            ]
            for i, worker, actor, reference in asked:
                try:
                    answers[i] = self._call(reference)
                except self._ray.exceptions.RayActorError as err:
                    self._lost(worker, actor, err)
                    lost += not err.preempted
                except Exception as err:
                    if not errors:
                        raise
                    answers[i] = err
            if lost >= _STARTS * len(calls):
                raise WorkerLost(f"{lost} workers were lost in {method}; have they memory enough?")
        return [answers[i] for i in range(len(calls))]

    def _check_resources(self) -> None:
        """Refuse at once what a cluster of our own, which does not grow, can never place."""
        if not self._started or os.environ.get("RAY_ADDRESS"):
            return
        total = self._ray.cluster_resources()
        wanted = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"]}
        wanted |= self._options.get("resources") or {}
        for name, amount in wanted.items():
            if amount > total.get(name, 0):
                raise HarvestError(
                    f"a worker needs {amount:g} {name}, and this machine has {total.get(name, 0):g}; "
                    "ask for less, or name a cluster by RAY_ADDRESS"
                )

    def _start(self, worker: _Worker) -> None:
        worker.actor = self._ray.remote(self.actor_class).options(**self._options).remote()
        worker.starting = worker.actor.start.remote(self._job)
        worker.running, worker.earlier, worker.times = 0, worker.total(), {}
        self._place(worker)

    def _place(self, worker: _Worker) -> None:
        """Note what the worker can take, after each change of it."""
        for running, spare in enumerate(self._spare):
            if worker.ready and worker.running == running:
                spare[worker.number] = worker
            else:
                spare.pop(worker.number, None)

    def free(self) -> bool:
        return any(self._spare)

    def busy(self) -> bool:
        return bool(self._running)

    def running(self, unit: Unit) -> bool:
        return self._in_flight[unit] > 0

    def submit(self, unit: Unit) -> None:
        holders = [w for w, _, u, _ in self._running.values() if u == unit] if self.running(unit) else []
        spare = [w for workers in self._spare for w in islice(workers.values(), len(holders) + 1)]
        worker = min(spare, key=lambda w: (w in holders, w.running))
        worker.running += 1
        self._place(worker)
        self._in_flight[unit] += 1
        reference = worker.actor.run_block.remote(*unit)
        self._running[reference] = (worker, worker.actor, unit, time.monotonic())

    def straggler(self, wanted: Container[Unit]) -> Unit | None:
        if len(self._durations) < 3 or not self._spare[0]:
            return None
        now, limit = time.monotonic(), _SLOW * statistics.median(self._durations)
        for worker, _, unit, since in self._running.values():
            if now - since > limit and unit in wanted and self._in_flight[unit] == 1:
                log.info("block %d of %s is slow on worker %d; trying it on an idle one too",
                         unit[1], unit[0], worker.number)  # fmt: skip
                return unit
        return None

    def completed(self) -> Iterator[tuple[Unit, RecordRows | BaseException]]:
        for reference in self._wait(self._running):
            worker, actor, unit, since = self._running.pop(reference)
            self._in_flight[unit] -= 1
            if not self._in_flight[unit]:
                del self._in_flight[unit]
            if actor is worker.actor:
                worker.running -= 1
                self._place(worker)
            try:
                packed, worker.times = self._call(reference)
            except self._ray.exceptions.RayActorError as err:
                self._lost(worker, actor, err)
                yield unit, WorkerLost(f"its worker was lost ({type(err).__name__})", preempted=err.preempted)
            except Exception as err:
                yield unit, err
            else:
                self._durations.append(time.monotonic() - since)
                yield unit, RecordRows.unpack(packed)

    def _wait(self, references: Iterable[Any]) -> list[Any]:
        """Those of `references` that are done; after at most a second. Workers that have started are noted."""
        starting = {w.starting: w for w in self._workers if w.starting is not None}
        watched = [*references, *starting]
        if not watched:
            raise HarvestError(f"no worker could be started: {self._cause}")
        done, _ = self._ray.wait(watched, num_returns=1, timeout=1)
        if done:  # and all others that are there by now
            done, _ = self._ray.wait(watched, num_returns=len(watched), timeout=0)
        for reference in done:
            if reference in starting:
                self._note_start(starting[reference])
        self._remind()
        return [reference for reference in done if reference not in starting]

    def _note_start(self, worker: _Worker) -> None:
        reference, worker.starting = worker.starting, None
        try:
            worker.node = self._call(reference)
            worker.failed_starts = 0
            self._place(worker)
            return
        except ActcacheError:
            raise  # the request cannot be met, here or anywhere
        except Exception as err:
            self._cause = str(err).strip().splitlines()[-1] if str(err).strip() else type(err).__name__
            preempted = isinstance(err, self._ray.exceptions.RayActorError) and err.preempted
        self._ray.kill(worker.actor)
        worker.failed_starts += not preempted
        if worker.failed_starts < _STARTS:
            log.warning("worker %d did not start: %s; trying again", worker.number, self._cause)
            self._start(worker)
        else:
            log.error("worker %d is given up after %d tries: %s", worker.number, _STARTS, self._cause)
            worker.actor = None

    def _lost(self, worker: _Worker, actor: Any, err: Any) -> None:
        """Replace the worker's actor, unless that was done: both its blocks come here."""
        if actor is not worker.actor:
            return
        log.warning("worker %d on %s was lost%s; starting another",
                    worker.number, worker.node, " (preempted)" if err.preempted else "")  # fmt: skip
        self._ray.kill(actor)
        self._start(worker)

    def _remind(self) -> None:
        waiting = sum(w.starting is not None for w in self._workers)
        if not waiting:
            self._reminded = time.monotonic()
        elif time.monotonic() - self._reminded > _REMIND_S:
            self._reminded = time.monotonic()
            need = {
                k: v
                for k, v in self._options.items()
                if k in ("num_cpus", "num_gpus", "resources", "label_selector") and v
            }
            log.info("%d of %d workers are not placed or still loading; each needs %s; free on the cluster: %s",
                     waiting, len(self._workers), _words(need), _words(_free(self._ray)))  # fmt: skip

    def workers(self) -> list[WorkerState]:
        return [worker.state() for worker in self._workers]

    def fidelity(self, sites: Sequence[str]) -> dict[str, dict[str, float | None] | Exception]:
        found: dict[str, dict[str, float | None] | Exception] = {}
        for i in range(0, len(sites), step := max(1, len(self._idle()))):
            some = sites[i : i + step]
            try:
                found |= zip(
                    some, self._ask("fidelity", [(site,) for site in some], errors=True), strict=True
                )
            except (ActcacheError, OSError) as err:
                found |= dict.fromkeys(some, err)
        return found

    def _idle(self) -> list[_Worker]:
        """The workers without a block; those with one if all have: a copy of a slow block may be left over."""
        ready = [w for w in self._workers if w.ready]
        return [w for w in ready if not w.running] or ready

    def bare_tokens_per_s(self, sites: Sequence[str], seconds: float) -> float:
        calls = [w.actor.bare_tokens_per_s.remote(sites, seconds) for w in self._idle()]
        return float(sum(self._call(reference) for reference in calls))

    def _call(self, reference: Any) -> Any:
        """The result; an error of ours comes back as itself, not wrapped in Ray's traceback."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as err:
            cause = err.cause
            raise (cause if isinstance(cause, ActcacheError) else err) from None


def _free(ray: Any) -> dict[str, float]:
    shown = ray.available_resources()
    return {k: v for k, v in shown.items() if not k.startswith(("node:", "object_store", "memory"))}


def _words(resources: Mapping[str, Any]) -> str:
    """`{"num_cpus": 1.0}` -> `num_cpus 1`."""
    said = (f"{k} {v:g}" if isinstance(v, int | float) else f"{k} {v}" for k, v in resources.items())
    return ", ".join(said) or "nothing"


def in_a_cluster() -> bool:
    """Whether a Ray cluster is connected or named by RAY_ADDRESS."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def ray_map(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` over the cluster's CPUs, a task an item, results in order; for `corpus.tokenise`.

    At most two items a CPU, and 256 in all, are in flight, so that the object store stays small. Ray
    runs the tasks of a lost node again.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        start_ray(1)

    def call(function: Callable[[A], B], item: A) -> B:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
        return function(item)

    task = ray.remote(num_cpus=1)(call)
    shared = ray.put(function)
    limit = min(256, 2 * max(1, int(ray.cluster_resources().get("CPU", 1))))
    running: deque[Any] = deque()
    try:
        for item in items:
            running.append(task.remote(shared, item))
            if len(running) >= limit:
                yield ray.get(running.popleft())
        while running:
            yield ray.get(running.popleft())
    except ray.exceptions.RayTaskError as err:
        raise (err.cause if isinstance(err.cause, ActcacheError) else err) from None
    finally:
        # What is in flight runs out: in Ray 2.60 cancelling a task that ends at that moment aborts this process.
        if started:
            ray.shutdown()


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
