"""The sbatch script: what it says, and what it makes of exit codes. No Slurm here: its programs are stand-ins."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.attempts import ClusterError
from cluster.config import ConfigError, Run, Slurm, Workers
from cluster.slurm import SlurmJobs, script

ROOT = Path(__file__).parents[2]
RUN = Run(
    name="acts",
    backend="slurm",
    root="/shared/acts",
    command=(
        "actcache",
        "harvest",
        "--root",
        "{root}",
        "--workers",
        "{workers}",
        "--gpus-per-worker",
        "{gpus}",
    ),
    workers=Workers(count=4, cpus=16, gpus=8, memory_gib=200),
    slurm=Slurm(partition="gpu", time="02:00:00"),
    env=("HF_TOKEN",),
)


def stand_ins(directory, ray_code=None):
    """sbatch runs the script; srun runs its command; `ray symmetric-run` what follows --, or fails in silence."""
    programs = {
        "sbatch": 'bash "$2" > /dev/null 2>&1 &\necho $!',
        "scontrol": "echo node1",
        "getent": "echo 127.0.1.1 STREAM node1; echo 10.0.0.1 STREAM node1",
        "squeue": 'kill -0 "$3" 2> /dev/null && echo "RUNNING None"',
        "scancel": 'kill -TERM "$3"',
        "srun": 'shift 3; SLURM_PROCID=0 exec "$@"',
        "ray": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
        if ray_code is None
        else f"exit {ray_code}",
    }
    programs["python"] = f'exec {sys.executable} "$@"'
    directory.mkdir()
    for name, body in programs.items():
        (directory / name).write_text(f"#!/bin/bash\n{body}\n")
        (directory / name).chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def test_the_script_asks_for_what_the_run_says_and_holds_no_value_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    text = SlurmJobs(tmp_path).request(RUN, 1)
    for line in (
        "nodes=4",
        "cpus-per-task=16",
        "mem=200G",
        "gpus-per-node=8",
        "partition=gpu",
        "time=02:00:00",
    ):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --export=HOME,PATH,USER,HF_TOKEN\n" in text
    assert "--workers 4 --gpus-per-worker 8" in text
    assert "correct-horse" not in text
    assert not {"--head", "--port", "--node-ip-address", "--block"} & set(
        text.split()
    )  # symmetric-run refuses them
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("code", "ray_code", "status"),
    [("pass", None, "SUCCEEDED"), ("raise SystemExit(3)", None, "FAILED"), ("pass", 0, "SUCCEEDED")],
)
def test_of_a_command_that_stores_nothing_known_the_exit_code_decides(
    tmp_path, monkeypatch, code, ray_code, status
):
    assert ended(tmp_path, monkeypatch, one_command(code), ray_code).status == status


@pytest.mark.slow
def test_what_is_stored_decides_where_ray_did_not_start(tmp_path, monkeypatch):
    """`ray symmetric-run` exits with 0 although `ray start` failed."""
    run = replace(
        one_command("pass"),
        command=("actcache", "harvest", "--root", str(tmp_path / "none"), "--tokens", "9"),
    )
    assert ended(tmp_path, monkeypatch, run, ray_code=0).status == "FAILED"


def one_command(code):
    return Run(name="acts", backend="slurm", command=("python", "-c", code))


def ended(tmp_path, monkeypatch, run, ray_code=None):
    monkeypatch.setenv("PATH", stand_ins(tmp_path / "bin", ray_code))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    jobs = SlurmJobs(tmp_path / "state")
    attempt, new = jobs.submit(run)
    assert new
    return jobs.wait(attempt, 60)


def test_stop_lets_the_command_finish(tmp_path, monkeypatch):
    started = tmp_path / "started"
    drain = (
        "import pathlib, signal, sys, time\n"
        "def drain(*_): time.sleep(1); print('drained', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, drain)\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PATH", stand_ins(tmp_path / "bin"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    jobs = SlurmJobs(tmp_path / "state")
    attempt, _ = jobs.submit(one_command(drain))
    deadline = time.monotonic() + 30
    while not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(ClusterError, match="acts-1 is RUNNING"):
        jobs.submit(one_command(drain))
    assert jobs.stop(attempt).status == "STOPPED"


def test_a_job_that_vanished_has_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", stand_ins(tmp_path / "bin"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    jobs = SlurmJobs(tmp_path / "state")
    jobs.submit(one_command("import time; time.sleep(60)"))
    stored = json.loads((tmp_path / "state/acts-1/attempt.json").read_text())
    os.kill(int(stored["job"]), signal.SIGKILL)
    assert "left no exit code" in jobs.wait(jobs.newest("acts"), 10).message


def test_without_slurm_it_says_so_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="sbatch is not installed here; submit from a login node"):
        SlurmJobs(tmp_path / "state").submit(one_command("pass"))
    assert not (tmp_path / "state").exists()
    with pytest.raises(ConfigError, match="working_dir is for the backends local and ray"):
        script(replace(RUN, working_dir="/x"), tmp_path)
