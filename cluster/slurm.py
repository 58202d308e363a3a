"""Runs as sbatch jobs that start Ray on their nodes by `ray symmetric-run`.

An attempt is a directory under the state directory, which must lie on a file system that the nodes share: the script, its
log, and exit once it has ended. symmetric-run hides failures of `ray start` behind exit code 0, so the script asks
afterwards whether the work is done, and that decides. It starts on port 6379, needs whole nodes, and ends with
`ray stop`.
"""

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from .attempts import Attempt, Backend, ClusterError, parse_id
from .config import ConfigError, Run
from .local import follow_file, state_directory
from .ray_jobs import require_env
from .steps import STOPPED

_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "RESIZING", "SUSPENDED")


def script(run: Run, place: Path) -> str:
    """The sbatch script of an attempt whose files are in `place`.

    Raises:
        ConfigError: what only other backends can do.
    """
    if run.working_dir is not None:
        raise ConfigError(
            "working_dir is for the backends local and ray; install the code where slurm.setup finds it"
        )
    options, workers = run.slurm, run.workers
    exported = ",".join(["HOME", "PATH", "USER", *run.env])  # names; sbatch takes the values
    lines = {
        "job-name": place.name,
        "output": str(place / "log"),
        "nodes": str(workers.count),
        "ntasks-per-node": "1",
        "cpus-per-task": str(workers.cpus),
        "mem": f"{workers.memory_gib}G",
        "time": options.time,
        "signal": f"B:TERM@{run.drain_s}",
        "export": exported,
    }
    if workers.gpus:
        lines["gpus-per-node"] = str(workers.gpus)
    for name in ("partition", "account"):
        if getattr(options, name):
            lines[name] = getattr(options, name)
    asked = shlex.join([run.python, "-m", "cluster.progress", run.as_json()])
    gpus = f" --num-gpus {workers.gpus}" if workers.gpus else ""
    header = "".join(f"#SBATCH --{name}={value}\n" for name, value in lines.items())
    return f"""#!/bin/bash
{header}#SBATCH --exclusive
#SBATCH --open-mode=append
set -uo pipefail
export SLURM_EXPORT_ENV=ALL RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
{options.setup or ""}
place={shlex.quote(str(place))}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# scancel and the time limit signal this shell; the work on the head's node gets it from here
work=
stopped=
trap 'stopped=1; [ -n "$work" ] && kill -TERM "$work"' TERM
srun --nodes={workers.count} --ntasks={workers.count} ray symmetric-run --address "$head:6379" \\
    --min-nodes {workers.count}{gpus} -- env RAY_ADDRESS="$head:6379" {run.entrypoint} &
work=$!
wait "$work"
code=$?
if [ -n "$stopped" ]; then
    wait "$work"
    code={STOPPED}
fi

# symmetric-run says 0 even where Ray did not start: what is stored decides
{asked}
case $? in
0) code=0 ;;
1) [ "$code" = 0 ] && code=1 ;;
esac
echo "$code" > "$place/exit.partial"
mv "$place/exit.partial" "$place/exit"
exit "$code"
"""


class SlurmJobs(Backend):
    """The runs of one state directory; `None`: the user's."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or state_directory() / "slurm"

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """See `Backend`. Without Slurm here, an attempt without an exit code is as it was submitted."""
        found = []
        for path in self._directory.glob("*/attempt.json"):
            parsed = parse_id(path.parent.name)
            if parsed is not None and run in (None, parsed[0]):
                found.append(self._attempt(*parsed))
        return sorted(found, key=lambda a: a.number if run else a.started_s or 0)

    def _attempt(self, run: str, number: int) -> Attempt:
        place = self._directory / f"{run}-{number}"
        stored = json.loads((place / "attempt.json").read_text())
        ended = None
        try:
            code = int((place / "exit").read_text())
        except FileNotFoundError:
            status, message = _queued(stored["job"])
        else:
            status = {0: "SUCCEEDED", STOPPED: "STOPPED"}.get(code, "FAILED")
            message = f"Slurm job {stored['job']}, exit code {code}, log {place / 'log'}"
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

    def request(self, run: Run, attempt: int | str) -> str:
        """The script."""
        require_env(run)
        return script(run, self._directory / f"{run.name}-{attempt}")

    def start(self, run: Run, attempt: int) -> None:
        """See `Backend`."""
        require_env(run)
        _program("sbatch")
        place = self._directory / f"{run.name}-{attempt}"
        try:
            place.mkdir(parents=True)
        except FileExistsError as err:
            raise ClusterError(
                f"{run.name}-{attempt} already exists: somebody else has just submitted it"
            ) from err
        (place / "script.sh").write_text(script(run, place))
        try:
            job = _slurm("sbatch", "--parsable", str(place / "script.sh")).partition(";")[0].strip()
        except ClusterError:
            shutil.rmtree(place)
            raise
        stored = {"job": job, "entrypoint": run.entrypoint, "started_s": time.time()}
        (place / "attempt.partial").write_text(json.dumps(stored))
        (place / "attempt.partial").rename(place / "attempt.json")

    def logs(self, attempt: Attempt) -> str:
        """See `Backend`."""
        log = self._directory / attempt.id / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def follow(self, attempt: Attempt, write: Callable[[str], object]) -> Attempt:
        """See `Backend`."""
        return follow_file(
            self._directory / attempt.id / "log", write, lambda: self._attempt(attempt.run, attempt.number)
        )

    def stop(self, attempt: Attempt) -> Attempt:
        """`scancel --signal=TERM --batch`: the script passes it on and waits; a job that waits in the queue is removed."""
        job = json.loads((self._directory / attempt.id / "attempt.json").read_text())["job"]
        if attempt.status == "PENDING":
            _slurm("scancel", job)
            (self._directory / attempt.id / "exit").write_text(f"{STOPPED}\n")
        else:
            _slurm("scancel", "--signal=TERM", "--batch", job)
        return self.wait(attempt, 900)


def _queued(job: str) -> tuple[str, str]:
    """(status, message) of a job that has left no exit code."""
    if shutil.which("squeue") is None:
        return "RUNNING", f"Slurm job {job}; squeue is not here, so whether it runs is not known"
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T %r"], capture_output=True, text=True)
    state, _, reason = done.stdout.strip().partition(" ")
    if state in _PENDING:
        return "PENDING", f"Slurm job {job} {state}: {reason}"
    if state:
        return "RUNNING", f"Slurm job {job} {state}"
    return (
        "FAILED",
        f"Slurm job {job} is no longer in the queue and left no exit code: killed, or its node was lost",
    )


def _program(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        raise ClusterError(
            f"{name} is not installed here; submit from a login node, or sbatch what --dry-run prints"
        )
    return program


def _slurm(name: str, *arguments: str) -> str:
    done = subprocess.run([_program(name), *arguments], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise ClusterError(f"{name}: {lines[-1]}")
    return done.stdout
