"""The driver of a training on a Ray cluster: it starts the ranks, shows how far they are, and starts them again.

Errors that a rank raises on purpose end the run, and the driver raises them. Anything else is a crash: the ranks
are started again, unless three crashes in a row began at the same row. Rows, weights and SAEs do not pass through
Ray: the ranks leave them in the run's directory. What the ranks run is sae/ray_ranks.py's.
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, TextIO

from actcache.errors import Drained, RankFailed, SpecError, WorkerLost
from actcache.progress import Progress

from .core import SAE
from .distributed import Job, Workers, check_finished, directory_of
from .evals.during import EvalDuring
from .evals.monitor import monitor_of
from .evals.on_ray import RayEvaluation
from .keeper import Stop
from .ray_ranks import FINAL, End, Launch, News, last_line
from .ray_room import Room, room_for, shortage
from .rundir import RunDirectory

log = logging.getLogger(__name__)

FAILURES = 3
"""Crashes in a row, of starts at one row, that end the run."""
_LOOK_S = 0.5
_REMIND_S = 30.0
_SETTLE_S = 3.0
"""After the least number of workers has a place, others are waited for so long."""
_GROW_S = 60.0
"""How often an elastic run looks for room for more: to save, stop and start again costs about half of that."""


def train_on_ray(job: Job, workers: Workers, resume: bool, returned: bool = True) -> list[SAE]:
    """The SAEs, trained on a Ray cluster; an empty list if they are not to be `returned`.

    The cluster is the one that is connected, or that RAY_ADDRESS names; else one on this machine.

    Raises:
        SpecError: the run can not be met as written, or what it needs can never be placed.
        ActcacheError: a rank failed, as `sae.train` says; Drained after SIGTERM or Ctrl-C.
        WorkerLost: three crashes at one row.
    """
    job.check(range(workers.least, workers.most + 1))
    directory = directory_of(job)
    monitor_of(job.evals, RayEvaluation, job.stream, directory, ())  # refuses what no rank could do
    found = directory.open(resume, load=returned)
    if isinstance(found, list):
        log.info("%s already holds this finished run; nothing to train", directory.path)
        return found
    aside = Aside(sys.stdout)
    # in this order: ray.init takes SIGTERM for itself
    with contextlib.redirect_stdout(aside), _ray(workers, job.evals), Stop() as stop:
        Driver(job, workers, directory, stop, aside.said).run()
    check_finished(job)
    return [directory.load(i) for i in range(len(directory.names))] if returned else []


class Aside(io.TextIOBase):
    """Standard output without what Ray's own threads print, which `said` keeps.

    Ray prints the death of each worker there, whatever `log_to_driver` says.
    """

    def __init__(self, stdout: TextIO) -> None:
        self._stdout, self.said = stdout, io.StringIO()

    def write(self, text: str) -> int:
        by_ray = threading.current_thread().name.startswith("ray_")
        return self.said.write(text) if by_ray else self._stdout.write(text)

    def flush(self) -> None:
        self._stdout.flush()


@contextlib.contextmanager
def _ray(workers: Workers, evals: EvalDuring | None) -> Iterator[None]:
    """Ray, connected and, if that was done here, left again; its output stays in its own files.

    One that is started here has room for the workers and, beside them, for an evaluation.
    """
    import ray

    if find_spec("pandas") is None:  # said before anything is started
        raise ModuleNotFoundError("Ray Train needs pandas: pip install 'actcache[train]'", name="pandas")
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, **quiet)
    else:  # address: a cluster that happens to run on this machine is somebody else's
        ray.init(
            address="local",
            num_cpus=max(workers.most * workers.cpus + (evals.cpus if evals else 0), os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=100 * 1024**2,  # settings and figures only
            logging_level=logging.ERROR,
            **quiet,
        )
    try:
        if not os.environ.get("RAY_ADDRESS"):
            _check_this_machine(ray, workers, evals)
        yield
    finally:
        ray.shutdown()


def _check_this_machine(ray: Any, workers: Workers, evals: EvalDuring | None) -> None:
    beside = evals.gpus if evals else 0
    gpus, wanted = ray.cluster_resources().get("GPU", 0), workers.gpus * workers.least + beside
    if gpus < wanted:
        who = f"{workers} and an evaluation of {beside:g} GPU" if beside else str(workers)
        raise SpecError(
            f"{who} need {wanted:g} GPU, and this machine has {gpus:g}; ask for less, or name a cluster by RAY_ADDRESS"
        )


class Driver:
    """Starts the ranks, again and again, until the run is finished or ends by an error."""

    def __init__(
        self, job: Job, workers: Workers, directory: RunDirectory, stop: Stop, said: io.StringIO
    ) -> None:
        self._job, self._workers, self._stop, self._said = job, workers, stop, said
        described = json.dumps([directory.description, directory.path], sort_keys=True)
        self._digest = hashlib.sha256(described.encode()).hexdigest()[:12]
        self._log_path: str | None = None

    def run(self) -> None:
        """Return once the run is finished.

        Raises:
            ActcacheError, ValueError, ImportError: a rank raised it.
            SpecError: there will never be room for the workers.
            WorkerLost: three crashes in a row began at one row.
        """
        row, crashes = -1, 0
        for attempt in itertools.count(1):
            # a name of its own: Ray Train would go on with what it finds under the name of another run
            name = f"sae-{self._digest}-{attempt}-{secrets.token_hex(4)}"
            start = Start(self._job, self._workers, self._stop)
            end = start.follow(name)
            if end.cause is None:
                return
            error = _first(start.failures)
            if isinstance(error, Drained) and self._stop.asked is None:
                if not start.outgrown:
                    log.info("a node is taken away: the run is saved, and goes on with other workers")
                continue
            if error is not None:
                if not isinstance(error, Drained):
                    log.info("all that the workers said is in %s", self._write(end.text))
                raise error
            if end.never:
                raise SpecError(end.cause)
            if self._stop.asked is not None:
                raise Drained(f"{end.cause}, as the run was stopped; {self._kept}")
            if end.unplaced:
                continue
            at = max(row, 0) if start.news.begun_at is None else start.news.begun_at
            row, crashes = (at, 1) if at > row else (row, crashes + 1)
            self._crashed(end, max(row, start.news.rows), crashes)

    def _crashed(self, end: End, row: int, crashes: int) -> None:
        """Note a crash; raise after the last that is allowed."""
        path = self._write(end.text)
        if crashes >= FAILURES:
            raise WorkerLost(
                f"{end.cause}, at row {row:,}; that was the third crash in a row without a new checkpoint. {path} has "
                f"all that is known; {self._kept}"
            )
        log.warning("%s, at row %s; starting the workers again (%s has more)", end.cause, f"{row:,}", path)

    @property
    def _kept(self) -> str:
        return f"run the same again to go on from the last checkpoint in {self._job.out}"

    def _write(self, text: str) -> str:
        """Add to this run's log file, which is made when there is something to say; returns its path."""
        if self._log_path is None:
            handle, self._log_path = tempfile.mkstemp(prefix=f"sae-train-{self._digest}-", suffix=".log")
            os.close(handle)
        with open(self._log_path, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n\n{self._said.getvalue()}\n")
        self._said.seek(0)
        self._said.truncate()
        return self._log_path


class Start:
    """One start of the ranks, from the request for room to their end."""

    def __init__(self, job: Job, workers: Workers, stop: Stop) -> None:
        self._job, self._workers, self._stop = job, workers, stop
        self._bars, self._progress = contextlib.ExitStack(), Progress("", None, show=False)
        self.news = News()
        """What rank 0 last said."""
        self.failures: list[tuple[int, BaseException]] = []
        """What ranks raised on purpose."""
        self.outgrown = False
        """They were asked to stop because there is room for more."""
        self._begun = self._spoken = time.monotonic()

    def follow(self, name: str) -> End:
        """Start the ranks and show their news until they have ended.

        Raises:
            Drained: the run was stopped before any had begun.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        world = self._found_room()
        near = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_concurrency": 8, "scheduling_strategy": near}
        launch = ray.remote(Launch).options(**options).remote()
        settings = {k: v for k, v in os.environ.items() if k.startswith("RAY_TRAIN_")}
        if len(ray.nodes()) == 1:  # nobody takes away the node that this process is on
            settings = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} | settings
        try:
            fit = launch.fit.remote(
                launch, self._job, replace(self._workers, least=world, most=world), name, settings
            )
            with self._bars, room_for(self._workers, 0) as room:
                self._watch(launch, fit, room)
            end: End = ray.get(fit)
            return end
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FINAL):
                raise error.cause from None
            return End(f"the workers could not be started ({last_line(str(error))})", str(error))
        except ray.exceptions.RayActorError as error:
            return End(f"the process that starts the workers has ended ({last_line(str(error))})", str(error))
        finally:
            ray.kill(launch)

    def _found_room(self) -> int:
        """How many workers there is room for, once it is enough: the most in a few seconds, where they are elastic."""
        log.info("waiting for %s", self._workers)
        least, most = self._workers.least, self._workers.most
        with room_for(self._workers, least) as room:
            while room.placed < least:
                self._pause()
                self._remind(f"still waiting for {self._workers}", lambda: shortage(self._workers))
            room.reserve_more(most - least)
            since = time.monotonic()
            while (placed := room.placed) < most and time.monotonic() - since < _SETTLE_S:
                self._pause()
            return placed

    def _pause(self) -> None:
        if self._stop.asked is not None:
            raise Drained(f"stopped before the workers began; run the same again to train {self._job.out}")
        time.sleep(_LOOK_S)

    def _watch(self, launch: Any, fit: Any, room: Room) -> None:
        """Until the ranks have ended: show what they tell, and ask them to stop when that is wanted.

        `room` is for those that an elastic run may have more.
        """
        import ray

        asked, looked = False, time.monotonic()
        while True:
            done, _ = ray.wait([fit], timeout=_LOOK_S)
            news, self.failures = ray.get(launch.look.remote())
            if self._see(news):
                room.reserve_more(self._workers.most - news.world)
                looked = time.monotonic()
            if done:
                return
            if not news.world:
                self._remind("the workers are starting", lambda: "they import torch and form a group")
                if self._stop.asked is not None:
                    raise Drained(
                        f"stopped before the workers began; run the same again to train {self._job.out}"
                    )
            if news.begun_at is not None and time.monotonic() - looked > _GROW_S:
                looked = time.monotonic()
                self.outgrown = self.outgrown or room.placed > 0
            if not asked and (self._stop.asked is not None or self.outgrown):
                asked = True
                launch.ask.remote()
                if self.outgrown:
                    log.info("there is room for more than %d workers: saving, to go on with them", news.world)

    def _see(self, news: News) -> bool:
        """Show rank 0's news; True if the ranks have just begun."""
        before, self.news = self.news, news
        if news.begun_at is None:
            return False
        begins = before.begun_at is None
        if begins:
            self._progress = self._bars.enter_context(self._bar(news))
            before = replace(news, rows=news.begun_at)
        stall = {"stall": news.shown["stall"]} if news.shown else {}  # first: 80 columns end before the last
        self._progress.advance(news.rows - before.rows, **(stall | dict(news.shown)))
        return begins

    def _bar(self, news: News) -> Progress:
        n, at = len(self._job.configs), news.begun_at or 0
        log.info(
            "%d worker%s after %.0f s, spread by %s%s", news.world, "s" if news.world > 1 else "",
            time.monotonic() - self._begun, news.spread, f"; continuing after {at:,} rows" if at else "",
        )  # fmt: skip
        label = f"training {n} SAE{'s' if n > 1 else ''} on {news.world}"
        return Progress(label, self._job.training.n_rows, "rows", done=at)

    def _remind(self, what: str, why: Callable[[], str]) -> None:
        """Say every half minute what is waited for."""
        now = time.monotonic()
        if now - self._spoken > _REMIND_S:
            self._spoken = now
            log.info("%s, for %.0f s: %s", what, now - self._begun, why())


def _first(failures: list[tuple[int, BaseException]]) -> BaseException | None:
    """What the run failed by: of the rank that failed, rather than of those that were told."""
    own = [error for _, error in failures if not isinstance(error, RankFailed)]
    return own[0] if own else failures[0][1] if failures else None
