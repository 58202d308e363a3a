"""Attempts that are kept as directories: attempt.json, log, and exit once the attempt has ended.

What runs without a server that remembers it (plain processes, Slurm's jobs) is kept so, under
$XDG_STATE_HOME/actcache-runs (~/.local/state). Nothing secret is written: the environment is inherited.
"""

import json
import os
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .attempts import POLL_S, Attempt, Backend, ClusterError, parse_id
from .config import Run
from .steps import STOPPED


class StateDirectory(Backend):
    """The attempts of one directory; `None`: the user's.

    `kind` is the folder below the user's, and `_describe` and `_without_exit` what a kind knows.
    """

    kind: str

    def __init__(self, directory: Path | None = None) -> None:
        base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        self._directory = directory or Path(base).expanduser() / "actcache-runs" / self.kind

    @abstractmethod
    def _describe(self, stored: dict[str, Any]) -> str:
        """What an attempt is here: its process, its job."""

    @abstractmethod
    def _without_exit(self, stored: dict[str, Any], place: Path) -> tuple[str, str, float | None]:
        """(status, message, when it ended) of an attempt that has left no exit code."""

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """See `Backend`."""
        found = []
        for path in self._directory.glob("*/attempt.json"):
            parsed = parse_id(path.parent.name)
            if parsed is not None and run in (None, parsed[0]):
                found.append(self._attempt(*parsed))
        return sorted(found, key=lambda a: a.number if run else a.started_s or 0)

    def logs(self, attempt: Attempt) -> str:
        """See `Backend`."""
        log = self._directory / attempt.id / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def follow(self, attempt: Attempt, write: Callable[[str], object]) -> Attempt:
        """See `Backend`."""
        log = self._directory / attempt.id / "log"
        while not log.exists():
            if (now := self._attempt(attempt.run, attempt.number)).over:
                return now
            time.sleep(POLL_S)
        with open(log, errors="replace") as file:
            while True:
                now = self._attempt(attempt.run, attempt.number)
                if text := file.read():
                    write(text)
                elif now.over:
                    return now
                else:
                    time.sleep(POLL_S)

    def _attempt(self, run: str, number: int) -> Attempt:
        place = self._directory / f"{run}-{number}"
        stored = self._stored(place)
        try:
            code = int((place / "exit").read_text())
        except FileNotFoundError:
            status, message, ended = self._without_exit(stored, place)
        else:
            status = {0: "SUCCEEDED", STOPPED: "STOPPED"}.get(code, "FAILED")
            message = f"exit code {code}, log {place / 'log'}, {self._describe(stored)}"
            ended = (place / "exit").stat().st_mtime
        return Attempt(
            run=run,
            number=number,
            status=status,
            entrypoint=stored["entrypoint"],
            message=message,
            started_s=stored["started_s"],
            ended_s=ended,
        )

    def _stored(self, place: Path) -> dict[str, Any]:
        return dict(json.loads((place / "attempt.json").read_text()))

    def _claim(self, run: Run, attempt: int) -> Path:
        """The attempt's directory, made by this call.

        Raises:
            ClusterError: somebody else's submission was first.
        """
        place = self._directory / f"{run.name}-{attempt}"
        try:
            place.mkdir(parents=True)
        except FileExistsError as err:
            raise ClusterError(
                f"{run.name}-{attempt} already exists: somebody else has just submitted it"
            ) from err
        return place

    def _record(self, place: Path, run: Run, **stored: Any) -> None:
        """From here on the attempt is known."""
        stored |= {"entrypoint": run.entrypoint, "started_s": time.time()}
        (place / "attempt.partial").write_text(json.dumps(stored))
        (place / "attempt.partial").rename(place / "attempt.json")
