"""Runs as sbatch jobs that start Ray on their nodes by `ray symmetric-run`.

An attempt is a directory under the state directory, which must lie on a file system that the nodes share: the script, its
log, and exit once it has ended. symmetric-run hides failures of `ray start` behind exit code 0, so the script asks
afterwards whether the work is done, and that decides. It starts on port 6379, needs whole nodes, and ends with
`ray stop`.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .attempts import Attempt, ClusterError
from .config import ConfigError, Run
from .ray_jobs import require_env
from .state import StateDirectory
from .steps import STOPPED
from .training import Nodes

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
    options, workers, n_nodes = run.slurm, run.workers, len(run.nodes())
    read = "".join(
        f"{name}=$(cat {shlex.quote(path)}) || exit\nexport {name}\n" for name, path in run.env_files.items()
    )
    exported = ",".join(["HOME", "PATH", "USER", *run.env])  # names; sbatch takes the values
    lines = {
        "job-name": place.name,
        "output": str(place / "log"),
        "nodes": str(n_nodes),
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
    # symmetric-run itself calls `ray`, that of the PATH
    path = f'export PATH={shlex.quote(parent)}:"$PATH"\n' if (parent := os.path.dirname(run.python)) else ""
    header = "".join(f"#SBATCH --{name}={value}\n" for name, value in lines.items())
    return f"""#!/bin/bash
{header}#SBATCH --exclusive
#SBATCH --open-mode=append
set -uo pipefail
export SLURM_EXPORT_ENV=ALL RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
{path}{options.setup or ""}
{read}export PLACE={shlex.quote(str(place))}
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n') # of this job: other users reach its ports
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
HEAD=$(getent ahostsv4 "$name" | awk '$1 !~ /^127\\./ {{ print $1; exit }}') # gRPC wants a name server for names
export HEAD="${{HEAD:?$name has no address that other nodes could reach, see /etc/hosts}}"

# other nodes start when the head listens, write into files of their own, and end with the first task
node='
if [ "$SLURM_PROCID" -eq 0 ]; then
    "$@"
    echo $? > "$PLACE/code"
    exit
fi
exec >> "$PLACE/log.$SLURMD_NODENAME" 2>&1
until (: < "/dev/tcp/$HEAD/6379") 2> /dev/null; do sleep 2; done
"$@"
exec sleep infinity'

# scancel and the time limit signal this shell; the work is on this node and gets it from here. srun would kill Ray with it
rm -f "$PLACE/pid" "$PLACE/code"
stopped=
work=
trap 'stopped=1; kill -TERM "$(cat "$PLACE/pid" 2> /dev/null || echo "$work")" 2> /dev/null' TERM
srun --nodes={n_nodes} --ntasks={n_nodes} --wait=10 bash -c "$node" node \\
    ray symmetric-run --address "$HEAD:6379" --min-nodes {n_nodes}{gpus} -- \\
    bash -c 'echo $$ > "$PLACE/pid"; exec "$@"' work env RAY_ADDRESS="$HEAD:6379" {run.entrypoint} &
work=$!
[ -z "$stopped" ] || kill -TERM "$work"
while kill -0 "$work" 2> /dev/null; do
    wait "$work"
done
code=$(cat "$PLACE/code" 2> /dev/null || echo 1)
[ -z "$stopped" ] || code={STOPPED}

# symmetric-run says 0 even where Ray did not start: what is stored decides
{asked}
case $? in
0) code=0 ;;
1) [ "$code" = 0 ] && code=1 ;;
esac
echo "$code" > "$PLACE/exit.partial"
mv "$PLACE/exit.partial" "$PLACE/exit"
exit "$code"
"""


class SlurmJobs(StateDirectory):
    """Jobs of Slurm. Without Slurm here, an attempt without an exit code is as it was submitted."""

    kind = "slurm"

    def _describe(self, stored: dict[str, Any]) -> str:
        return f"Slurm job {stored['job']}"

    def _without_exit(self, stored: dict[str, Any], place: Path) -> tuple[str, str, float | None]:
        return *_queued(stored["job"]), None

    def request(self, run: Run, attempt: int | str) -> str:
        """The script."""
        require_env(run)
        return script(run, self._directory / f"{run.name}-{attempt}")

    def nodes(self, run: Run) -> Nodes:
        """The nodes of the allocation."""
        return run.nodes()

    def start(self, run: Run, attempt: int) -> None:
        """See `Backend`."""
        require_env(run)
        _program("sbatch")
        place = self._claim(run, attempt)
        (place / "script.sh").write_text(script(run, place))
        try:
            job = _slurm("sbatch", "--parsable", str(place / "script.sh")).partition(";")[0].strip()
        except ClusterError:
            shutil.rmtree(place)
            raise
        self._record(place, run, job=job)

    def stop(self, attempt: Attempt) -> Attempt:
        """`scancel --signal=TERM --batch`: the script passes it on and waits; a job that waits in the queue is removed."""
        job = self._stored(self._directory / attempt.id)["job"]
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
