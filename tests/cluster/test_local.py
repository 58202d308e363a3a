"""Runs as processes of this machine: records that outlive the submitter, and what became of the dead."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cli(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"XDG_STATE_HOME": str(tmp_path / "state")}

    def call(*arguments, **more):
        command = [sys.executable, "-m", "cluster", *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=60
        )

    return call


def write_run(directory, code):
    path = directory / "run.toml"
    path.write_text(f'name = "job"\nbackend = "local"\ncommand = ["python", "-c", {json.dumps(code)}]\n')
    return path


def record(tmp_path, attempt):
    return json.loads((tmp_path / f"state/actcache-runs/local/{attempt}/attempt.json").read_text())


def test_a_run_is_followed_listed_and_not_repeated(cli, tmp_path):
    path = write_run(tmp_path, "print('hello')")
    done = cli("submit", path, "--follow")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("hello\njob-1 SUCCEEDED\n")
    assert cli("submit", path).stdout.startswith("job-1 has succeeded already")
    assert cli("logs", "job").stdout == "hello\n"  # found by its name
    assert json.loads(cli("status", "job", "--json").stdout)["status"] == "SUCCEEDED"
    assert [
        json.loads(line)["id"] for line in cli("list", "--backend", "local", "--json").stdout.splitlines()
    ] == ["job-1"]


def test_a_failed_run_is_the_next_attempt(cli, tmp_path):
    done = cli("submit", write_run(tmp_path, "raise SystemExit(3)"), "--follow")
    assert done.returncode == 1
    assert done.stderr.startswith("error: job-1 FAILED: exit code 3, log ")
    assert cli("submit", write_run(tmp_path, "pass"), "--follow").stdout.endswith("job-2 SUCCEEDED\n")


def test_stop_drains_and_a_killed_run_is_known_as_failed(cli, tmp_path):
    started = tmp_path / "started"
    drain = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('drained'), sys.exit(143)))\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    path = write_run(tmp_path, drain)
    for attempt in ("job-1", "job-2"):
        started.unlink(missing_ok=True)
        assert cli("submit", path).returncode == 0
        deadline = time.monotonic() + 30
        while not started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert cli("submit", path).stderr.startswith(f"error: {attempt} is RUNNING")
        if attempt == "job-1":
            assert cli("stop", path).stdout == "job-1 is STOPPED\n"
            assert "drained\n" in cli("logs", path).stdout
        else:
            os.kill(record(tmp_path, "job-2")["pid"], signal.SIGKILL)
            found = json.loads(cli("status", path, "--json").stdout)
            assert found["status"] == "FAILED"
            assert "is gone without an exit code" in found["message"]


TRAINING = """name = "job"
backend = "local"
root = "out"
command = ["python", "-m", "sae", "train", "--data", "acts", "--out", "{root}/x"]
[train]
workers = 3
"""


def test_dry_run_of_a_training_shows_what_runs_and_what_it_takes(cli, tmp_path):
    (tmp_path / "run.toml").write_text(TRAINING)
    done = cli("submit", tmp_path / "run.toml", "--dry-run")
    assert done.returncode == 0, done.stderr
    _, ranks, command = done.stdout.rstrip().rsplit("\n", 2)
    n = os.cpu_count()
    assert ranks.startswith(
        f"ranks of job: 3 ranks of 1 CPU, 3 CPUs in all; room for {min(n, 3)} on 1 node with "
    )
    added = "--workers 3 --gpus-per-worker 0 --cpus-per-worker 1"
    assert command == f"python -m sae train --data acts --out {tmp_path}/out/x {added}"


@pytest.mark.parametrize(
    ("address", "handed_on"), [("http://127.0.0.1:8265", None), ("127.0.0.1:6379", "127.0.0.1:6379")]
)
def test_the_address_of_a_job_server_is_not_handed_to_processes_here(cli, tmp_path, address, handed_on):
    path = write_run(tmp_path, "import os; print(os.environ.get('RAY_ADDRESS'))")
    done = cli("submit", path, "--follow", RAY_ADDRESS=address)
    assert done.stdout.splitlines()[1] == str(handed_on), done.stderr


def test_dry_run_writes_nothing_and_says_what_would_run(cli, tmp_path):
    done = cli("submit", write_run(tmp_path, "print('hello')"), "--dry-run")
    assert json.loads(done.stdout)["id"] == "job-<attempt>"
    assert not (tmp_path / "state").exists()
