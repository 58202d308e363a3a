"""Evaluations during training at moments that a test chooses, and datasets that fail. Imports no torch."""

import os
import signal
import sys
import time
from typing import Any

from sae.evals.during import EvalDuring, EvalDuringJob, Examiner
from sae.evals.elsewhere import News, one_line


class Here:
    """Evaluates in this process, for real: a call of `news` loads the checkpoint, the next one gives the figures."""

    begun, doing = True, "is still going on"

    def __init__(self, job: EvalDuringJob) -> None:
        self._examiner = Examiner(job, "cpu")
        self._rows: int | None = None
        self.asked: list[int] = []

    def begin(self, rows: int) -> None:
        self._rows = rows
        self.asked.append(rows)

    def news(self, timeout_s: float = 0.0) -> News | None:
        started = time.perf_counter()
        try:
            if self._rows is not None:
                self._examiner.load(self._rows)
                self._rows = None
                return News()
            return News(figures=self._examiner.evaluate(), seconds=time.perf_counter() - started)
        except Exception as error:
            return News(cause=one_line(error))

    def close(self) -> None:
        self._rows = None


class ByHand:
    """Says what it is told to, when it is told to: `told` is given out one by one, then nothing comes."""

    begun, doing = True, "is still going on"

    def __init__(self, job: EvalDuringJob) -> None:
        self.job = job
        self.asked: list[int] = []
        self.told: list[News] = []
        self.closed = False

    def begin(self, rows: int) -> None:
        self.asked.append(rows)

    def news(self, timeout_s: float = 0.0) -> News | None:
        return self.told.pop(0) if self.told else None

    def close(self) -> None:
        self.closed = True


def figures(**of_saes: dict[str, Any]) -> News:
    """News of an evaluation that is done: by the SAE's name with _ for -, its figures."""
    return News(figures={name.replace("_", "-"): values for name, values in of_saes.items()}, seconds=0.5)


class Dying:
    """In place of a dataset: whoever unpickles it says something and dies by a signal."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _die, ()


def _die() -> None:
    print("out of luck", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


class Refusing:
    """In place of a dataset: it cannot be opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ValueError("no such dataset\nany more.")


def job_on(ds: Any, run: str = "/nowhere") -> EvalDuringJob:
    """The job of a run that is nowhere."""
    return EvalDuringJob(settings=EvalDuring(every_rows=10, n_sequences=0), ds=ds, run=run)
