"""A training on several processes: what is asked for, and what each rank does.

Every rank runs the loop of sae/train.py; sae/ray_train.py starts ranks on a Ray cluster, torchrun starts them
by itself. What they share is the run's directory and the process group. The directory alone says how far a run
is, so any number of ranks, started by either, goes on from the last checkpoint.
"""

import contextlib
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actcache.errors import Drained, RankFailed, SpecError, StoreError

from .architectures import Architecture
from .core import SAE
from .evals.during import EvalDuring
from .evals.monitor import BackgroundProcess, EvalBy
from .files import is_url, local_path
from .rundir import RunDirectory, progress_of
from .spread import Layout, Spread, spread_of
from .streams import ArrayStream, Stream
from .train import NonFiniteLoss, Told, Trainer
from .training import Training

logger = logging.getLogger(__name__)

Asked = Callable[[], bool]
"""True once somebody asked this rank to stop."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that a run asks Ray for."""

    least: int
    """It does not start with fewer."""

    most: int
    """More than `least`: it takes as many as there are, and goes on at another number."""

    gpus: int = 0
    """GPUs of each: 0 or 1."""

    cpus: int = 1
    """CPUs of each, and threads of its torch."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise SpecError(f"workers is {self.least} to {self.most}; it must be at least 1, the least first")
        if self.gpus not in (0, 1):
            raise SpecError(f"gpus_per_worker is {self.gpus:g}; a worker trains on one GPU, so give 0 or 1")
        if self.cpus < 1 or self.cpus != int(self.cpus):
            raise SpecError(f"cpus_per_worker is {self.cpus:g}; give a whole number of at least 1")

    @classmethod
    def of(cls, workers: int | tuple[int, int] | str, gpus: float = 0, cpus: float = 1) -> "Workers":
        """The workers that `4`, `(2, 8)` or `"2..8"` ask for.

        Raises:
            SpecError: it is none of these, or the numbers can not be met.
        """
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", workers.strip()) if isinstance(workers, str) else None
        if found is not None:
            both = int(found[1]), int(found[2] or found[1])
        elif isinstance(workers, int) and not isinstance(workers, bool):
            both = workers, workers
        elif isinstance(workers, tuple | list) and [type(n) for n in workers] == [int, int]:
            both = workers[0], workers[1]
        else:
            raise SpecError(f"workers is {workers!r}; give a number, or the least and the most as 2..8")
        return cls(least=both[0], most=both[1], gpus=gpus, cpus=cpus)  # type: ignore[arg-type]

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    @property
    def resources(self) -> dict[str, int]:
        """What each of them reserves, by Ray's names."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def __str__(self) -> str:
        n = f"{self.least} to {self.most}" if self.elastic else f"{self.most}"
        each = f"{self.gpus} GPU and " if self.gpus else ""
        return f"{n} worker{'s' if self.most > 1 else ''} of {each}{self.cpus} CPU"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as each of its ranks is told it. It pickles, and holds no rows."""

    stream: Stream
    configs: Sequence[Architecture]
    training: Training
    start: Sequence[SAE | None]
    out: str
    """An absolute local path, or a URL."""
    log: Sequence[str] = ()
    storage_options: Mapping[str, Any] | None = None
    spread: str | None = None
    evals: EvalDuring | None = None
    """Evaluations while it goes on, beside the workers."""

    def check(self, worlds: Iterable[int]) -> None:
        """Refuse what no rank could do, before any is started.

        Raises:
            SpecError: a spread that does not fit one of these numbers of workers, or a stream that can not be sent.
        """
        for world in worlds:
            spread_of(self.spread, world, len(self.configs))
        if isinstance(self.stream, ArrayStream):
            raise SpecError(
                "rows in memory are not sent to workers; take a stream of a dataset (actcache.open(...).stream(...)), "
                "leave out workers, or start this script with torchrun, where each process makes the rows itself"
            )
        if str(getattr(self.stream, "dataset_url", "")).startswith("memory://"):
            raise SpecError(
                f"{getattr(self.stream, 'dataset_url', '')} is in the memory of this process; copy the dataset to a "
                "place that workers see, or leave out workers"
            )
        try:
            pickle.dumps(self.stream)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise SpecError(
                f"a {type(self.stream).__name__} can not be sent to workers ({error}); take a stream of a dataset"
            ) from error


def absolute(out: str | os.PathLike[str] | None) -> str:
    """`out` as it reads in another process.

    Raises:
        SpecError: there is none.
    """
    if out is None:
        raise SpecError(
            "several workers need `out`, the run's directory, where they leave the SAEs; it is a path or a URL that "
            "all of their nodes share"
        )
    if os.fspath(out).startswith("memory://"):
        raise SpecError(
            f"{os.fspath(out)} is in the memory of one process; give a place that all workers share"
        )
    return os.fspath(out) if is_url(out) else str(local_path(out).absolute())


class _Onlooker(Layout):
    """The place of a process that trains nothing: it has no learner, and no part of any weights."""

    def trains(self, i: int) -> bool:
        return False


def directory_of(job: Job) -> RunDirectory:
    """The run's directory; settings are checked as the ranks will, without making weights.

    Raises:
        SpecError: a site that the stream has not, or a stream that ends too soon.
    """
    onlooker = Trainer(
        job.stream,
        job.configs,
        job.training,
        start=job.start,
        out=job.out,
        storage_options=job.storage_options,
        layout=_Onlooker(Spread()),
    )
    assert onlooker.directory is not None, "a job has a place"
    return onlooker.directory


def check_finished(job: Job) -> None:
    """Make sure that what the ranks have finished is to be seen from here.

    Raises:
        StoreError: the ranks wrote elsewhere.
    """
    if progress_of(job.out, job.storage_options)["state"] != "finished":
        raise StoreError(
            f"the workers have finished, but {job.out} is not finished as seen from here. Give `out` as a place that "
            "this process and all nodes share: a shared file system, or a URL."
        )


def run_rank(
    job: Job,
    *,
    resume: bool = True,
    device: torch.device | str = "cpu",
    tell: Told | None = None,
    asked: Asked | None = None,
    opened: Callable[[Trainer], None] | None = None,
    prepared: bool = False,
    eval_by: EvalBy = BackgroundProcess,
    returned: bool = True,
) -> list[SAE]:
    """Train as one rank of the process group, or alone where there is none; every rank calls it.

    Args:
        opened: called with the trainer once it stands where the run goes on.
        eval_by: where the run's SAEs are evaluated while it goes on.
        prepared: another process has made the run's directory; a rank that does not see it refuses.
        returned: False leaves the SAEs in the directory.

    Returns:
        The SAEs, on rank 0 and if they are wanted.
    """
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    layout = Layout(spread_of(job.spread, world, len(job.configs)))
    trainer = Trainer(
        job.stream,
        job.configs,
        job.training,
        start=job.start,
        out=job.out,
        log=job.log,
        storage_options=job.storage_options,
        device=device,
        layout=layout,
        tell=tell,
        asked=asked,
        evals=job.evals,
        eval_by=eval_by,
        returned=returned,
    )
    if prepared and trainer.directory is not None:
        trainer.directory.open(resume=True, writer=False, load=False)
    done = trainer.open(resume)
    if done is not None:
        return done
    if opened is not None:
        opened(trainer)
    with torch.enable_grad():
        return trainer.run()


def started_by_torchrun() -> bool:
    """True in a process that torchrun started as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def one_voice() -> Iterator[bool]:
    """In this context rank 0 of torchrun's speaks for all: it yields True there, and in a process alone.

    Other ranks say nothing but warnings, and end in silence by an error that rank 0 has too.
    """
    rank = int(os.environ["RANK"]) if started_by_torchrun() else 0
    if rank == 0:
        yield True
        return
    for package in ("actcache", "sae"):
        logging.getLogger(package).setLevel(logging.WARNING)
    try:
        yield False
    except Drained:
        raise SystemExit(143) from None
    except (RankFailed, NonFiniteLoss):
        raise SystemExit(1) from None


def train_by_torchrun(job: Job, resume: bool, device: torch.device | str, returned: bool) -> list[SAE]:
    """Train as the rank that torchrun's environment says; the SAEs come back on rank 0, if they are wanted.

    The process group is made here, and ended, unless the script has one.
    """
    import torch.distributed as dist

    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if own.index is None else own.index)
        torch.cuda.set_device(own)
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        return run_rank(job, resume=resume, device=own, returned=returned)
    finally:
        if made:
            dist.destroy_process_group()


def train_by_ranks(
    stream: Stream,
    configs: Sequence[Architecture],
    training: Training,
    *,
    start: Sequence[SAE | None],
    out: str | os.PathLike[str] | None,
    resume: bool = True,
    log: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    workers: int | tuple[int, int] | str | None = None,
    spread: str | None = None,
    gpus_per_worker: float = 0,
    cpus_per_worker: float = 1,
    eval_every: EvalDuring | int | None = None,
    returned: bool = True,
) -> list[SAE]:
    """`sae.train` by several processes; this one is a rank where torchrun started it, else the driver.

    `returned`: False leaves the SAEs in `out`: all SAEs of a sweep may be more than one process can hold.

    Raises:
        SpecError: what is asked for does not fit together.
    """
    by_torchrun = started_by_torchrun()
    of_workers = workers is not None or bool(gpus_per_worker) or cpus_per_worker != 1
    if by_torchrun and of_workers:
        raise SpecError(
            "torchrun has started the processes already; leave out workers and what each of them has (a GPU each: "
            "device cuda), or start without torchrun"
        )
    if not by_torchrun and workers is None:
        raise SpecError(
            "spread, gpus_per_worker and cpus_per_worker are for several processes, and one trains alone; give workers "
            "too, or start with torchrun"
        )
    job = Job(
        stream=stream,
        configs=configs,
        training=training,
        start=start,
        out=absolute(out),
        log=log,
        storage_options=storage_options,
        spread=spread,
        evals=EvalDuring.of(eval_every),
    )
    if by_torchrun:
        return train_by_torchrun(job, resume, device, returned)
    if torch.device(device).type != "cpu":
        raise SpecError(
            f"device is {device}, of one process; for workers that train on a GPU each, give gpus_per_worker=1"
        )
    assert workers is not None, "checked above"
    from .ray_train import train_on_ray

    return train_on_ray(job, Workers.of(workers, gpus_per_worker, cpus_per_worker), resume, returned)
