"""What the ranks of a run decide together: to save, to stop, that one of them failed.

Ranks meet every few steps (`meet`) and exchange a few numbers on the host. Rank 0 decides when a checkpoint
is due; each rank's thread writes its part while training goes on; once all have written, rank 0 completes
the checkpoint at a later meeting. A rank that was asked to stop, or failed, says so there, and all of them
save, or raise, at one step. One process meets itself at every step.
"""

import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from actcache.errors import ActcacheError, Drained, RankFailed

from .checkpoint import PartInfo
from .checkpoint_writer import CheckpointWriter, Piece
from .group import Group
from .rundir import RunDirectory
from .training import CheckpointSchedule

logger = logging.getLogger(__name__)

MEETING_STEPS = 20
"""The most steps between meetings of several ranks."""

T = TypeVar("T")

State = Callable[[], dict[str, Any]]
"""The JSON state of a checkpoint; called on every rank."""

Pieces = Callable[[], Mapping[str, Piece]]
"""This rank's part of the tensors."""

Completed = Callable[[int, int], None]
"""Called on rank 0 with the rows and the step of a checkpoint that is complete; it does not raise."""


class Keeper:
    """Saves a run of one rank or several; keeps nothing without a directory.

    Args:
        group: all ranks of the run.
        directory: None keeps nothing.
        schedule: when a checkpoint is due.
        pieces, state: what a checkpoint holds.
        asked: True once somebody asked this process to stop.
        log_every: steps between lines of metrics; ranks meet at least so often.
        completed: told of each complete checkpoint.
    """

    def __init__(
        self,
        group: Group,
        directory: RunDirectory | None,
        schedule: CheckpointSchedule,
        pieces: Pieces,
        state: State,
        asked: Callable[[], bool],
        log_every: int = MEETING_STEPS,
        completed: Completed | None = None,
    ) -> None:
        self.group, self.directory, self._schedule = group, directory, schedule
        self._every = min(MEETING_STEPS, log_every)
        self._pieces, self._state, self._asked, self._completed = pieces, state, asked, completed
        attempt = self.group.objects(secrets.token_hex(4))[0]
        self.writer: CheckpointWriter | None = None
        if directory is not None:
            self.writer = directory.checkpoint_writer(group.rank, group.world, attempt)
        self._part: PartInfo | None = None
        self._begun: dict[str, Any] | None = None
        """State of the checkpoint that is being written, where rank 0 will complete it."""
        self._begun_rows: int | None = None
        self.saved_rows: int | None = None
        """Rows of the newest complete checkpoint."""
        self.failure: ActcacheError | None = None
        """Set by a rank that can not go on; every rank raises it at the next meeting."""
        self.stalls: list[float] = []
        """Share of its time that each rank waited for rows, as told at the last meeting."""

    def start(self, rows: int) -> None:
        """The run starts, or goes on, after `rows` rows."""
        self._schedule.begin(rows, time.monotonic())

    def due(self, step: int) -> bool:
        """True where the ranks meet; one process meets itself at every step."""
        return self.group.world == 1 or step % self._every == 0

    def meet(self, rows: int, stall: float) -> None:
        """Exchange, then save, complete a checkpoint, stop or raise, on all ranks alike.

        Raises:
            ActcacheError: what a rank failed by.
            Drained: somebody asked a rank to stop; the run is saved.
        """
        self._look()
        first = self.group.rank == 0
        numbers_WN = self.group.numbers(
            self.failure is not None,
            self._asked(),
            first and self._schedule.due(rows, time.monotonic()),
            self._part is not None,
            stall,
        )
        self.stalls = numbers_WN[:, 4].tolist()
        failed, asked, due, _ = (numbers_WN[:, :4] != 0).any(axis=0).tolist()
        if failed:
            self.raise_failure()
        if self._begun_rows is not None and numbers_WN[:, 3].all():
            self._complete()
        if asked:
            self._stop(rows)
        if due:
            self.begin(rows)

    def meet_last(self) -> None:
        """After the last step, or at a rung: raise on all ranks what one of them failed by."""
        if self.group.numbers(self.failure is not None).any():
            self.raise_failure()

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives here; raises on all ranks what it raised on one of them."""
        found: list[T] = []
        try:
            found = [work()]
        except ActcacheError as error:
            self.failure = error
        self.meet_last()
        return found[0]

    def begin(self, rows: int) -> None:
        """Copy this rank's part and write it in a thread; first complete the checkpoint before."""
        if self.writer is None:
            return
        if self._begun_rows is not None:
            self._finish_part()
        state = self._state()
        begun = self.directory.with_metrics(state) if self.group.rank == 0 and self.directory else None
        self.writer.begin(self._pieces(), rows)
        self._begun_rows, self._begun = (
            rows,
            begun,
        )  # whole: what `keep` would complete, had an error come before
        self._schedule.begin(rows, time.monotonic())

    def save(self, rows: int) -> None:
        """A checkpoint of this moment, complete when this returns; nothing where it is already there."""
        if self.writer is None:
            return
        if rows not in (self._begun_rows, self.saved_rows):
            self.begin(rows)
        if self._begun_rows is not None:
            self._finish_part()

    def close(self) -> None:
        """End of the run: wait for what is being written."""
        if self._begun_rows is not None:
            self._finish_part()

    def keep(self) -> None:
        """Complete what was begun before an error goes up, which comes first; other ranks can not be waited for."""
        if self.group.world == 1:
            try:
                self.close()
            except ActcacheError as error:
                logger.warning("%s", error)

    def _look(self) -> None:
        """Take up what the writer's thread has ended with."""
        if self.writer is None or self._begun_rows is None or self._part is not None or self.failure:
            return
        try:
            self._part = self.writer.written()
        except ActcacheError as error:
            self.failure = error

    def _finish_part(self) -> None:
        assert self.writer is not None, "something was begun"
        if self._part is None and self.failure is None:
            try:
                self._part = self.writer.wait()
            except ActcacheError as error:
                self.failure = error
        if self.group.numbers(self.failure is not None).any():
            self.raise_failure()
        self._complete()

    def _complete(self) -> None:
        """All parts are written: rank 0 makes them a checkpoint."""
        parts, rows = self.group.objects(self._part), self._begun_rows
        self._part = self._begun_rows = None
        error: ActcacheError | None = None
        if self.group.rank == 0:
            assert self.directory is not None
            assert rows is not None
            assert self._begun is not None
            try:
                self.directory.complete_checkpoint(rows, self._begun, parts)
            except ActcacheError as found:
                error = found
        self.failure = error
        if self.group.numbers(error is not None).any():
            self.raise_failure()
        self.saved_rows = rows
        if self._completed is not None and self._begun is not None and rows is not None:
            self._completed(rows, self._begun["step"])

    def _stop(self, rows: int) -> None:
        self.save(rows)
        kept = "nothing was kept: the run has no directory"
        if self.directory is not None:
            kept = f"saved in {self.directory.path}; run the same again to continue"
        raise Drained(f"stopped after {rows:,} rows, {kept}")

    def raise_failure(self) -> None:
        """Raise one rank's failure on all of them; every rank calls this."""
        told = self.group.objects(None if self.failure is None else str(self.failure))
        if self.failure is not None:
            raise self.failure
        rank, text = next((rank, text) for rank, text in enumerate(told) if text is not None)
        raise RankFailed(f"rank {rank}: {text}")


class Stop:
    """Inside this context SIGTERM or Ctrl-C asks the run to save and end; a second one ends it at once.

    Does nothing outside the main thread, where Python takes no signals.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        self.asked = signal.Signals(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.info("%s: saving the run; a second one ends it at once", self.asked.name)
