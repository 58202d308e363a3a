"""The Slurm script with stand-ins for Slurm and for `ray symmetric-run`, which would end every Ray of this machine."""

import os
import re
import subprocess
import sys

import pytest
from deployments import DEPLOY, ROOT

pytestmark = pytest.mark.slow
WHAT = "--tokens 4000 --max-tokens 60000 --block-rows 16384"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" >> "$CALLS"; fi',
    "getent": "echo 127.0.1.1 STREAM node1; echo 10.0.0.1 STREAM node1",
    "srun": 'while [ "$1" != ray ]; do shift; done; exec "$@"',
    "ray": 'echo "$@" >> "$CALLS"; [ -z "$FAILS" ] || exit 0; while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the script with a harvest of one block on this machine's CPU; returns how it ended and what was called."""
    bin_ = tmp_path / "venv/bin"
    bin_.mkdir(parents=True)
    for name, body in (STAND_INS | {"python": f'exec {sys.executable} "$@"'}).items():
        (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    text = (DEPLOY / "slurm/harvest.sbatch").read_text()
    text, n = re.subn(r"^    --model.*?^\)", f"    {WHAT}\n)", text, flags=re.M | re.S)
    text, m = re.subn(r"^HOW=\(.*?^\)", "HOW=()", text, flags=re.M | re.S)
    assert (n, m) == (1, 1)
    (tmp_path / "harvest.sbatch").write_text(text)

    def run(**environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        variables = {
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "VENV": str(tmp_path / "venv"),
            "ROOT": str(tmp_path / "acts"),
            "CALLS": str(calls),
            "FAILS": "",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_ID": "7",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            ["bash", str(tmp_path / "harvest.sbatch")],
            env=os.environ | variables | environment,
            capture_output=True,
            text=True,
        )
        return done, calls.read_text()

    return run


def test_success_is_what_the_manifest_says_not_the_exit_code_of_ray(slurm):
    done, calls = slurm(FAILS="ray start")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 blocks are missing" in done.stderr
    assert "requeue 7" in calls
    done, calls = slurm(FAILS="ray start", SLURM_RESTART_COUNT="3")
    assert (done.returncode, "requeue" in calls) == (1, False)
    done, calls = slurm()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("complete\n")
    assert "symmetric-run --address 10.0.0.1:6379 --min-nodes 1 --num-gpus 8" in calls
