"""Which checkpoints of a run are evaluated while it goes on, and where the figures go. Rank 0 alone has one.

A checkpoint that is evaluated is held until its weights are read. One evaluation goes on at a time; a checkpoint
that comes meanwhile is left out, with a line that says so. Nothing that goes wrong in an evaluation ends the run.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actcache.errors import StoreError
from sae.evals.during import EvalDuring, EvalDuringJob, job_of
from sae.evals.elsewhere import BackgroundProcess, Elsewhere, News
from sae.rundir import RunDirectory
from sae.trackers import Tracker

logger = logging.getLogger(__name__)

_PLACE_S = 60.0
"""At the end of a run, whose workers still hold theirs, an evaluation is waited for so long to get a place."""

__all__ = ["BackgroundProcess", "EvalBy", "Monitor", "monitor_of"]


EvalBy = Callable[[EvalDuringJob], Elsewhere]
"""Makes the place where a run's SAEs are evaluated; called once a run is known to need one."""


@dataclass(frozen=True)
class _Pending:
    """The evaluation that goes on."""

    rows: int
    step: int


class Monitor:
    """Has checkpoints evaluated elsewhere and keeps what comes back; no method waits but `finish`."""

    def __init__(
        self,
        settings: EvalDuring,
        elsewhere: Elsewhere,
        directory: RunDirectory,
        trackers: Sequence[Tracker],
    ) -> None:
        self.settings, self._elsewhere = settings, elsewhere
        self._directory, self._trackers = directory, trackers
        self._pending: _Pending | None = None
        self._dealt_rows = 0
        """Rows of the newest checkpoint that was evaluated or left out."""
        self.shown: dict[str, str] = {}
        """What the progress bar shows of the newest evaluation."""

    def start(self, rows: int | None, step: int, running: Sequence[str]) -> None:
        """The run begins, or goes on from the checkpoint after `rows` rows, which may still be to evaluate.

        `running`: names of the SAEs that train.
        """
        self._dealt_rows = min(self._directory.evaluated_rows[name] for name in running)
        if rows is not None:
            self.completed(rows, step)

    def completed(self, rows: int, step: int) -> None:
        """A checkpoint is complete: have it evaluated if it is the first after a multiple of `every_rows`."""
        self.look()
        if rows // self.settings.every_rows <= self._dealt_rows // self.settings.every_rows:
            return
        self._dealt_rows = rows
        if self._pending is not None:
            logger.warning(
                "the checkpoint after %s rows is not evaluated: the evaluation of the one after %s rows %s",
                f"{rows:,}",
                f"{self._pending.rows:,}",
                self._elsewhere.doing,
            )
            return
        self._pending = _Pending(rows, step)
        self._directory.checkpoints.held = rows
        self._elsewhere.begin(rows)

    def look(self, timeout_s: float = 0.0) -> None:
        """Take up what has come from the evaluation that goes on."""
        while self._pending is not None:
            news = self._elsewhere.news(timeout_s)
            if news is None:
                return
            self._directory.checkpoints.held = None
            if news.cause is not None:
                logger.warning(
                    "the checkpoint after %s rows could not be evaluated: %s; this does not touch the training",
                    f"{self._pending.rows:,}",
                    news.cause,
                )
                self._pending = None
            elif news.figures is not None:
                pending, self._pending = self._pending, None
                self._keep(pending, news)

    def finish(self, rows: int, step: int) -> None:
        """The run is finished after `rows` rows: wait for the evaluation that goes on, then for that of its SAEs."""
        until = time.monotonic() + self.settings.wait_s
        self._wait(until)
        self.completed(rows, step)
        self._wait(until)
        self.close()
        try:
            self._directory.sync_evals()
            self._directory.checkpoints.remove()
        except StoreError as error:
            logger.warning("%s", error)

    def close(self) -> None:
        """Give up the evaluation that goes on."""
        self._elsewhere.close()
        self._pending = self._directory.checkpoints.held = None

    def _wait(self, until: float) -> None:
        """For the evaluation that goes on, until this moment of the clock; less long for one that has no place yet."""
        if self._pending is None:
            return
        since = now = time.monotonic()
        rows = f"{self._pending.rows:,}"
        logger.info("waiting for the evaluation after %s rows, at most %.0f s", rows, max(0.0, until - now))
        while self._pending is not None:
            end = until if self._elsewhere.begun else min(until, since + _PLACE_S)
            if (now := time.monotonic()) >= end:
                break
            self.look(end - now)
        if self._pending is not None:
            logger.warning(
                "the evaluation after %s rows %s and is given up after %.0f s; python -m sae eval %s evaluates the finished SAEs",
                rows,
                self._elsewhere.doing,
                now - since,
                self._directory.path,
            )
            self.close()

    def _keep(self, pending: _Pending, news: News) -> None:
        """Figures into evals.jsonl, the trackers and the progress bar."""
        assert news.figures is not None
        at = {"step": pending.step, "rows": pending.rows, "seconds": news.seconds}
        lines = {name: {**at, **figures} for name, figures in news.figures.items()}
        try:
            self._directory.append_evals(pending.rows, lines)
        except StoreError as error:
            logger.warning("the evaluation after %s rows could not be kept: %s", f"{pending.rows:,}", error)
        for tracker in self._trackers:
            tracker.log_evals(lines, pending.step)
        self.shown = _shown(list(news.figures.values()))


def monitor_of(
    settings: EvalDuring | None,
    eval_by: EvalBy,
    stream: Any,
    directory: RunDirectory | None,
    trackers: Sequence[Tracker],
) -> Monitor | None:
    """The monitor of a run that asks for evaluations and is not finished; it has started nothing.

    Raises:
        SpecError: these evaluations cannot be done (`job_of`).
    """
    if settings is None or (directory is not None and directory.finished):
        return None
    if directory is None:  # which is refused
        job_of(settings, stream, None)
        return None
    job = job_of(settings, stream, directory.path, directory.storage_options)
    return Monitor(settings, eval_by(job), directory, trackers)


def _shown(figures: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What the progress bar shows of an evaluation."""
    labels = {"eval fvu": "fvu", "ce recovered": "ce_recovered_zero"}
    return {
        label: "/".join("?" if f.get(name) is None else f"{f[name]:.3f}" for f in figures)
        for label, name in labels.items()
        if any(name in f for f in figures)
    }
