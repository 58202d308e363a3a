"""Runs as plain processes of this machine, without Ray or a server; they go on when the submitter leaves."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import env_files
from .attempts import Attempt, ClusterError
from .config import Run
from .ray_jobs import is_job_server, require_env
from .state import StateDirectory
from .steps import gpus_here
from .training import Nodes


class Local(StateDirectory):
    """Processes of this machine."""

    kind = "local"

    @staticmethod
    def here(run: Run) -> Run:
        """The run by our own interpreter, unless it names another."""
        return replace(run, python=sys.executable) if run.python == "python" else run

    def submit(self, run: Run) -> tuple[Attempt, bool]:
        """See `Backend`."""
        return super().submit(self.here(run))

    def _describe(self, stored: dict[str, Any]) -> str:
        return f"process {stored['pid']}"

    def _without_exit(self, stored: dict[str, Any], place: Path) -> tuple[str, str, float | None]:
        if process_identity(stored["pid"]) == stored["process"]:
            return "RUNNING", f"process {stored['pid']}, log {place / 'log'}", None
        gone = f"its process {stored['pid']} is gone without an exit code: killed, or the machine went down"
        return "FAILED", gone, (place / "log").stat().st_mtime

    def request(self, run: Run, attempt: int | str) -> str:
        """The command line, and where it runs."""
        require_env(run)
        run = self.here(run)
        place = self._directory / f"{run.name}-{attempt}"
        sent = {"id": f"{run.name}-{attempt}", "entrypoint": run.entrypoint, "directory": str(place)}
        return json.dumps(sent | {"cwd": run.working_dir or os.getcwd(), "env": list(run.env)}, indent=2)

    def nodes(self, run: Run) -> Nodes:
        """This machine."""
        return [(os.cpu_count() or 1, len(gpus_here()))]

    def start(self, run: Run, attempt: int) -> None:
        """See `Backend`."""
        require_env(run)
        place = self._claim(run, attempt)
        ours = str(Path(__file__).parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
        }
        environment |= env_files.variable(run.env_files)
        if is_job_server(environment.get("RAY_ADDRESS", "")):
            del environment["RAY_ADDRESS"]  # where jobs are submitted, which no Ray here could join
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
        self._record(place, run, pid=process.pid, process=process_identity(process.pid), drain_s=run.drain_s)

    def stop(self, attempt: Attempt) -> Attempt:
        """SIGTERM; SIGKILL after the run's `drain_s`."""
        stored = self._stored(self._directory / attempt.id)
        pid = stored["pid"]
        if process_identity(pid) == stored["process"]:
            os.kill(pid, signal.SIGTERM)
        try:
            return self.wait(attempt, stored["drain_s"])
        except ClusterError:
            if process_identity(pid) == stored["process"]:
                os.kill(pid, signal.SIGKILL)  # its children get SIGTERM by that, a second one for most
            return self.wait(attempt, stored["drain_s"])


def process_identity(pid: int) -> str | None:
    """What tells a process from any other with its number: boot and start time; None if it is gone."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{pid}/stat") as stat:
            state, *fields = stat.read().rpartition(")")[2].split()
            return None if state == "Z" else f"{boot.read().strip()}/{fields[18]}"
    except OSError:
        return None
