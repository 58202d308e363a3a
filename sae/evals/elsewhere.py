"""A process of this machine that evaluates while the training goes on.

A process and not a thread, so that the training keeps its interpreter to itself; of lower priority, so that it
takes what the training leaves of the CPUs. It is started for the first evaluation, keeps the LM for the next, and
ends with the training however that ends: its pipe is closed then. What it prints goes to a file that is looked at
if it dies.
"""

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Protocol

from actcache.errors import SpecError
from sae.evals.during import EvalDuring, EvalDuringJob, Examiner, check_lm

_END_S = 5.0
_LOWER_PRIORITY = 10


@dataclass(frozen=True)
class News:
    """How far an evaluation is. All None: the SAEs are loaded, and the checkpoint may go."""

    figures: dict[str, dict[str, Any]] | None = None
    """Figures of each SAE, by its name; the evaluation is done."""
    seconds: float | None = None
    """From the reading of the checkpoint to the figures."""
    cause: str | None = None
    """One line; the evaluation has failed."""


class Elsewhere(Protocol):
    """Where evaluations are done, one at a time. Its methods never raise for what goes wrong there."""

    def begin(self, rows: int) -> None:
        """Start to evaluate the checkpoint after `rows` rows; the one before has ended."""

    def news(self, timeout_s: float = 0.0) -> News | None:
        """What has come since; None if there is nothing within `timeout_s`."""

    @property
    def begun(self) -> bool:
        """False while the evaluation has no place yet."""

    @property
    def doing(self) -> str:
        """What the evaluation does meanwhile, to follow its name in a sentence."""

    def close(self) -> None:
        """End whatever goes on there."""


class BackgroundProcess:
    """Evaluates in a process of this machine."""

    begun, doing = True, "is still going on"

    def __init__(self, job: EvalDuringJob) -> None:
        """Starts nothing yet.

        Raises:
            SpecError: this machine has not the device, or not the LM.
        """
        _check_device(job.settings)
        check_lm(job.settings, job.ds)
        self._job = job
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._printed: IO[bytes] | None = None
        self._cause = ""

    def begin(self, rows: int) -> None:
        """Start to evaluate; a process that died is replaced."""
        try:
            if self._pipe is None:
                self._start()
            assert self._pipe is not None, "started"
            self._pipe.send(rows)
        except OSError as error:  # told by `news`
            self._cause = f"the process that evaluates could not be started ({one_line(error)})"

    def news(self, timeout_s: float = 0.0) -> News | None:
        """What has come since; None if there is nothing within `timeout_s`."""
        try:
            if self._pipe is None:
                return News(cause=self._cause)
            if not self._pipe.poll(timeout_s):
                return None
            found: News = self._pipe.recv()
            return found
        except (EOFError, OSError):
            return News(cause=self._why_it_ended())

    def close(self) -> None:
        """End the process."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()  # it writes nothing
            self._process.wait()
        if self._printed is not None:
            self._printed.close()
        self._process = self._pipe = self._printed = None

    def _start(self) -> None:
        ours, theirs = Pipe()
        code = f"from sae.evals.elsewhere import serve; serve({theirs.fileno()})"
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # the same modules as here; a new process group, so that Ctrl-C reaches the training alone
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=self._printed,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": paths},
            process_group=0,
        )
        theirs.close()
        self._pipe = ours
        ours.send_bytes(pickle.dumps(self._job))

    def _why_it_ended(self) -> str:
        """One line about a process that has ended; it is cleared away."""
        assert self._process is not None
        assert self._printed is not None
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            code = None
        self._printed.seek(0)
        printed = self._printed.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(printed) if line.strip()), "it printed nothing")
        self.close()
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit status {code}"
        return f"the process that evaluates has ended {how} ({last})"


def _check_device(settings: EvalDuring) -> None:
    """Without a context on the device: only the process that evaluates makes one."""
    if settings.gpus:
        raise SpecError(
            f"eval gpus is {settings.gpus:g}, which a run on Ray reserves; here a process of this machine evaluates, so "
            "name its device, e.g. cuda:1"
        )
    if settings.device == "cpu":
        return
    import torch

    try:
        device, n = torch.device(settings.device), torch.cuda.device_count()
    except RuntimeError as error:
        raise SpecError(f"eval device is {settings.device!r}; give cpu, or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= n:
        raise SpecError(
            f"eval device is {settings.device}, and this machine has {n} GPUs; give cpu, or another"
        )


def serve(number: int) -> None:
    """The background process: evaluate what is asked for on the pipe of this file number, until it is closed."""
    os.nice(_LOWER_PRIORITY)
    pipe = Connection(number)
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, asked), daemon=True).start()
    data, examiner = asked.get(), None
    while True:
        rows = pickle.loads(asked.get())
        try:
            if examiner is None:
                job: EvalDuringJob = pickle.loads(data)
                examiner = Examiner(job, job.settings.device)
            started = time.perf_counter()
            examiner.load(rows)
            pipe.send(News())
            figures = examiner.evaluate()
            pipe.send(News(figures=figures, seconds=round(time.perf_counter() - started, 3)))
        except Exception as error:  # whatever it is, the training goes on and says it
            pipe.send(News(cause=one_line(error)))


def _listen(pipe: Connection, asked: "queue.SimpleQueue[bytes]") -> None:
    """Pass on what comes; end this process at once when the training is gone."""
    while True:
        try:
            asked.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def one_line(error: BaseException) -> str:
    """An error as the end of a sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return text or type(error).__name__
