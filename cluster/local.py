"""Runs as plain processes of this machine, without Ray or a server.

An attempt is a directory under $XDG_STATE_HOME/actcache-runs (~/.local/state): attempt.json, log, and exit once
it has ended. The process goes on when the submitter leaves. Nothing secret is written: the environment is inherited.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .attempts import POLL_S, Attempt, Backend, ClusterError, parse_id
from .config import Run
from .ray_jobs import require_env
from .steps import STOPPED


def state_directory() -> Path:
    """Where the attempts of local and Slurm runs are kept."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "actcache-runs"


class Local(Backend):
    """The runs of one state directory; `None`: the user's."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or state_directory() / "local"

    @staticmethod
    def here(run: Run) -> Run:
        """The run by our own interpreter, unless it names another."""
        return replace(run, python=sys.executable) if run.python == "python" else run

    def submit(self, run: Run) -> tuple[Attempt, bool]:
        """See `Backend`."""
        return super().submit(self.here(run))

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """See `Backend`."""
        found = []
        for path in self._directory.glob("*/attempt.json"):
            parsed = parse_id(path.parent.name)
            if parsed is not None and run in (None, parsed[0]):
                found.append(self._attempt(*parsed))
        return sorted(found, key=lambda a: a.number if run else a.started_s or 0)

    def _attempt(self, run: str, number: int) -> Attempt:
        place = self._directory / f"{run}-{number}"
        stored = json.loads((place / "attempt.json").read_text())
        ended, message = None, f"process {stored['pid']}, log {place / 'log'}"
        alive = process_identity(stored["pid"]) == stored["process"]
        try:
            code = int((place / "exit").read_text())
        except FileNotFoundError:
            status = "RUNNING" if alive else "FAILED"
            if not alive:
                message = f"its process {stored['pid']} is gone without an exit code: killed, or the machine went down"
                ended = (place / "log").stat().st_mtime
        else:
            status = {0: "SUCCEEDED", STOPPED: "STOPPED"}.get(code, "FAILED")
            ended = (place / "exit").stat().st_mtime
            message = f"exit code {code}, log {place / 'log'}"
        return Attempt(
            run=run,
            number=number,
            status=status,
            entrypoint=stored["entrypoint"],
            message=message,
            started_s=stored["started_s"],
            ended_s=ended,
        )

    def request(self, run: Run, attempt: int | str) -> str:
        """The command line, and where it runs."""
        require_env(run)
        run = self.here(run)
        place = self._directory / f"{run.name}-{attempt}"
        sent = {"id": f"{run.name}-{attempt}", "entrypoint": run.entrypoint, "directory": str(place)}
        return json.dumps(sent | {"cwd": run.working_dir or os.getcwd(), "env": list(run.env)}, indent=2)

    def start(self, run: Run, attempt: int) -> None:
        """See `Backend`."""
        require_env(run)
        place = self._directory / f"{run.name}-{attempt}"
        try:
            place.mkdir(parents=True)
        except FileExistsError as err:
            raise ClusterError(
                f"{run.name}-{attempt} already exists: somebody else has just submitted it"
            ) from err
        ours = str(Path(__file__).parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
        }
        command = [
            sys.executable,
            "-m",
            "cluster.steps",
            "--here",
            "--exit-file",
            str(place / "exit"),
            run.as_json(),
        ]
        with open(place / "log", "wb") as log:
            process = subprocess.Popen(
                command,
                cwd=run.working_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        stored: dict[str, Any] = {
            "pid": process.pid,
            "process": process_identity(process.pid),
            "entrypoint": run.entrypoint,
        }
        stored |= {"started_s": time.time(), "drain_s": run.drain_s}
        (place / "attempt.partial").write_text(json.dumps(stored))
        (place / "attempt.partial").rename(place / "attempt.json")

    def logs(self, attempt: Attempt) -> str:
        """See `Backend`."""
        return (self._directory / attempt.id / "log").read_text(errors="replace")

    def follow(self, attempt: Attempt, write: Callable[[str], object]) -> Attempt:
        """See `Backend`."""
        return follow_file(
            self._directory / attempt.id / "log", write, lambda: self._attempt(attempt.run, attempt.number)
        )

    def stop(self, attempt: Attempt) -> Attempt:
        """SIGTERM; SIGKILL after the run's `drain_s`."""
        stored = json.loads((self._directory / attempt.id / "attempt.json").read_text())
        pid = stored["pid"]
        if process_identity(pid) == stored["process"]:
            os.kill(pid, signal.SIGTERM)
        try:
            return self.wait(attempt, stored["drain_s"])
        except ClusterError:
            if process_identity(pid) == stored["process"]:
                os.kill(pid, signal.SIGKILL)  # its children get SIGTERM by that, a second one for most
            return self.wait(attempt, stored["drain_s"])


def follow_file(path: Path, write: Callable[[str], object], now: Callable[[], Any]) -> Attempt:
    """Pass a growing log to `write` until the attempt that `now` gives is over."""
    while not path.exists():
        if (attempt := now()).over:
            return attempt
        time.sleep(POLL_S)
    with open(path, errors="replace") as log:
        while True:
            attempt = now()
            if text := log.read():
                write(text)
            elif attempt.over:
                return attempt
            else:
                time.sleep(POLL_S)


def process_identity(pid: int) -> str | None:
    """What tells a process from any other with its number: boot and start time; None if it is gone."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{pid}/stat") as stat:
            state, *fields = stat.read().rpartition(")")[2].split()
            return None if state == "Z" else f"{boot.read().strip()}/{fields[18]}"
    except OSError:
        return None
