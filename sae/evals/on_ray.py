"""Evaluation during training on the Ray cluster that trains: an actor for each, with CPUs and GPUs of its own.

The actor is placed outside of the group of the training's workers and gives back what it reserves when it is done.
It belongs to the process that started it, rank 0, and ends with that.
"""

import os
import time
from typing import Any

from actcache.errors import SpecError
from sae.evals.during import EvalDuring, EvalDuringJob, Examiner, check_lm
from sae.evals.elsewhere import News, one_line


class RayEvaluation:
    """Evaluates in actors; used in a process that is connected to Ray."""

    def __init__(self, job: EvalDuringJob) -> None:
        """Starts nothing yet.

        Raises:
            SpecError: the settings name a device, or an LM that no node can have.
        """
        _check_settings(job.settings)
        model = job.settings.model
        if (
            model is None or os.path.isdir(model) or not model.startswith(("/", ".", "~"))
        ):  # else: on nodes alone
            check_lm(job.settings, job.ds)
        self._job = job
        self._actor: Any = None
        self._stages: list[Any] = []
        """References to what it has still to do: to begin, to load, to evaluate."""

    def begin(self, rows: int) -> None:
        """Ask for a place; the evaluation begins when there is one."""
        import ray

        settings = self._job.settings
        options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "max_restarts": 0}
        # DEFAULT: not inside the placement group of the training's workers
        kind = ray.remote(_Actor).options(scheduling_strategy="DEFAULT", **options)
        self._actor = kind.remote()
        calls = (
            self._actor.placed.remote(),
            self._actor.load.remote(self._job, rows),
            self._actor.evaluate.remote(),
        )
        self._stages = list(calls)

    def news(self, timeout_s: float = 0.0) -> News | None:
        """What has come since; None if there is nothing within `timeout_s`."""
        import ray

        deadline = time.monotonic() + timeout_s
        while self._stages:
            left = max(0.0, deadline - time.monotonic())
            if not ray.wait([self._stages[0]], timeout=left)[0]:
                return None
            try:
                found: News | None = ray.get(self._stages.pop(0))
            except ray.exceptions.RayTaskError as error:
                found = News(cause=one_line(error.cause or error))
            except ray.exceptions.RayError as error:
                found = News(cause=f"its worker was lost ({one_line(error)[:200]})")
            if found is not None:
                if found.cause is not None or not self._stages:
                    self.close()
                return found
        return None

    @property
    def begun(self) -> bool:
        return len(self._stages) < 3

    @property
    def doing(self) -> str:
        settings = self._job.settings
        gpus = f"{settings.gpus:g} GPU and " if settings.gpus else ""
        return (
            "is still going on" if self.begun else f"still waits for {gpus}{settings.cpus} CPU of the cluster"
        )

    def close(self) -> None:
        """End the actor."""
        import ray

        self._stages = []
        if self._actor is not None and ray.is_initialized():
            ray.kill(self._actor)
        self._actor = None


def _check_settings(settings: EvalDuring) -> None:
    if settings.device != "cpu":
        raise SpecError(
            f"eval device is {settings.device}, of a process beside the training; a run on Ray reserves GPUs instead, "
            "so give --eval-gpus 1"
        )


class _Actor:
    """An `Examiner` in a process of its own."""

    def placed(self) -> None:
        """Returns once it is placed and has started."""

    def load(self, job: EvalDuringJob, rows: int) -> News:
        self._started = time.perf_counter()
        self._examiner = Examiner(job, "cuda" if job.settings.gpus else "cpu")
        self._examiner.load(rows)
        return News()

    def evaluate(self) -> News:
        figures = self._examiner.evaluate()
        return News(figures=figures, seconds=round(time.perf_counter() - self._started, 3))
