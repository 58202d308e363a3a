"""Ranks of a training as workers of Ray Train: what each of them runs, and the actor that starts them once.

`Launch` runs Ray Train's `fit` in an actor beside the driver, so that Ray Train and what it prints stay out of
the driver, and ending that actor ends the controller and all ranks. Rank 0 tells it figures, and learns from it
whether to stop. Ray keeps no checkpoint: each start goes on from the run's directory. sae/ray_train.py makes one
`Launch` after the other.
"""

import logging
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actcache.errors import ActcacheError, RankFailed

from .distributed import Job, Workers, run_rank
from .evals.on_ray import RayEvaluation
from .train import Trainer

log = logging.getLogger(__name__)

FINAL = (ActcacheError, ValueError, ImportError)
"""Errors that another try would meet again."""
_TELL_S = 1.0
_CAUSE_S = 10.0
"""A rank that was told of another's failure waits so long for that one to say it itself."""
_PREEMPTION_S = 5.0


@dataclass
class News:
    """What rank 0 last said."""

    world: int = 0
    """Ranks, once they have begun; 0 before."""
    spread: str = ""
    begun_at: int | None = None
    """The row from which they went on."""
    rows: int = 0
    shown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class End:
    """How one start of the ranks ended."""

    cause: str | None = None
    """One line; None: they finished."""
    text: str = ""
    """All that Ray Train says of it."""
    unplaced: bool = False
    """No rank was started: others have taken the room meanwhile."""
    never: bool = False
    """There will never be room."""


class Launch:
    """One start of the ranks, as an actor beside the driver."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news = News()
        self._failures: list[tuple[int, BaseException]] = []
        self._asked = False

    def fit(self, me: Any, job: Job, workers: Workers, name: str, environment: Mapping[str, str]) -> End:
        """Run Ray Train until the ranks have ended; `me` is this actor's handle."""
        os.environ.update(environment)
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        with tempfile.TemporaryDirectory(prefix="sae-ray-train-") as storage:
            trainer = TorchTrainer(
                rank_main,
                train_loop_config={"job": job, "board": me, "cpus": workers.cpus},
                torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
                scaling_config=ScalingConfig(
                    # never (least, most): Ray Train counts what others hold as room, and grows without saving
                    num_workers=workers.most,
                    use_gpu=bool(workers.gpus),
                    resources_per_worker=workers.resources,
                ),
                run_config=RunConfig(
                    name=name,
                    storage_path=storage,
                    failure_config=FailureConfig(
                        max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                    ),
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            )
            try:
                trainer.fit()
            except TrainingFailedError as error:
                return _end_of(error)
        return End()

    def look(self) -> tuple[News, list[tuple[int, BaseException]]]:
        """For the driver: the news, and what ranks have failed by."""
        with self._lock:
            return self._news, list(self._failures)

    def ask(self) -> None:
        """Ask the ranks to save and stop."""
        self._asked = True

    def tell(self, news: News) -> bool:
        """From rank 0; returns whether it is asked to stop."""
        with self._lock:
            self._news = news
        return self._asked

    def failed(self, rank: int, error: BaseException) -> bool:
        """From a rank that ends by `error`; returns whether the rank that failed first has said so."""
        with self._lock:
            if (rank, str(error)) not in [(r, str(e)) for r, e in self._failures]:
                self._failures.append((rank, error))
            return any(not isinstance(e, RankFailed) for _, e in self._failures)


def rank_main(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    import ray
    import ray.train
    import torch
    from ray.train.torch import get_device

    context = ray.train.get_context()
    rank, board = context.get_world_rank(), config["board"]
    torch.set_num_threads(config["cpus"])
    line = Line(board, context.get_world_size()) if rank == 0 else None
    preempted = threading.Event()
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0":
        _watch_preemption(preempted)
    try:
        run_rank(
            config["job"],
            device=get_device(),
            tell=line.figures if line else _ignore,
            asked=lambda: preempted.is_set() or (line is not None and line.asked),
            opened=line.opened if line else None,
            prepared=True,
            eval_by=RayEvaluation,
            returned=False,
        )
    except FINAL as error:
        deadline = time.monotonic() + _CAUSE_S
        while not ray.get(board.failed.remote(rank, portable(error))) and time.monotonic() < deadline:
            time.sleep(0.1)
        raise
    finally:
        if line is not None:
            line.close()


class Line:
    """Rank 0's line to the driver: a thread that tells the newest figures, and asks whether to stop."""

    def __init__(self, board: Any, world: int) -> None:
        self.asked = False
        self._board, self._news, self._over = board, News(world=world), threading.Event()
        self._say()
        self._thread = threading.Thread(target=self._run, name="sae-line", daemon=True)
        self._thread.start()

    def opened(self, trainer: Trainer) -> None:
        """The trainer stands where the run goes on."""
        spread, world = str(trainer.layout.spread), trainer.layout.world
        self._news = News(world=world, spread=spread, begun_at=trainer.rows, rows=trainer.rows)

    def figures(self, told: dict[str, Any]) -> None:
        """Figures of a logged step; sent by the thread."""
        old = self._news
        self._news = News(old.world, old.spread, old.begun_at, told["rows"], told["shown"])

    def close(self) -> None:
        """Tell the last figures and end the thread."""
        self._over.set()
        self._thread.join()
        self._say()

    def _run(self) -> None:
        import ray

        while not self._over.wait(_TELL_S):
            try:
                self._say()
            except ray.exceptions.RayActorError:
                return  # the driver has ended, and this process is about to
            except ray.exceptions.RayError as error:
                log.warning("the driver could not be told: %s", error)

    def _say(self) -> None:
        import ray

        self.asked |= ray.get(self._board.tell.remote(self._news))


def _watch_preemption(found: threading.Event) -> None:
    """Set `found` once Ray is about to take a node of this run away; a thread of each rank takes part."""
    import ray
    import ray.train

    def watch() -> None:
        while not found.wait(_PREEMPTION_S):
            try:
                if ray.train.get_preemption_info() is not None:
                    found.set()
            except ray.exceptions.RayError:
                return  # the ranks are being ended

    threading.Thread(target=watch, name="sae-preemption", daemon=True).start()


def _ignore(_: dict[str, Any]) -> None:
    """Figures are told by rank 0."""


def portable(error: BaseException) -> BaseException:
    """The error, or one of its message where it does not pickle."""
    try:
        found = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class does when it is made again
        return ActcacheError(str(error))
    return error if type(found) is type(error) else ActcacheError(str(error))


def _end_of(error: Any) -> End:
    """How Ray Train ended, from what `fit` raised."""
    text, failure = str(error), getattr(error, "controller_failure", None)
    if failure is not None:
        kind = type(failure).__name__  # their classes are private to Ray
        if kind == "WorkerGroupStartupTimeoutError":
            return End("there was no room for the workers", text, unplaced=True)
        if kind == "InsufficientClusterResourcesError":
            return End(" ".join(str(failure).split()), text, never=True)
        return End(last_line(str(failure)), text)
    failures = getattr(error, "worker_failures", {})
    lost = [rank for rank, e in failures.items() if hasattr(e, "health_check_failure")]
    if lost:
        known = text.split("Some common causes")[0]  # what follows are Ray's guesses
        why = "its process has ended"
        if "memory" in known:
            why = "its node ran out of memory"
        elif "node has died" in known:
            why = "its node has died"
        return End(f"rank {lost[0]} was lost ({why})", text)
    for rank, e in failures.items():
        return End(f"rank {rank}: {last_line(str(e))}", text)
    return End(last_line(text), text)


def last_line(text: str) -> str:
    """The error that a traceback ends with."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "an error without a message"
