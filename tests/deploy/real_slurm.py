"""docs/deploy/slurm.md and the slurm backend on a real Slurm of two nodes, with the real `ray symmetric-run`.

Not collected by itself: it wants root, Debian's slurm-wlm and munge, and ten minutes (CONTRIBUTING.md). Without an
accelerator the GPUs are files and the LM runs on the CPU; nothing else of the script is changed. ACTCACHE_SLURM_HOME keeps the
environment that the page makes, for the next time.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from slurm_cluster import UID, SlurmCluster, missing

from cluster.config import Run, Slurm, Workers
from cluster.slurm import script as slurm_script

ROOT = Path(__file__).parents[2]
CODE = ("actcache", "cluster", "sae", "deploy", "constraints.txt", "pyproject.toml", "README.md", "LICENSE")
EXTENT = "--tokens 262144 --max-tokens 600000 --block-rows 16384"
N_BLOCKS = 18


@pytest.fixture(scope="module")
def slurm():
    """The cluster, with a clone in its home and the environment that the page makes there."""
    assert missing() == [], "apt-get install slurm-wlm munge, and be root"
    base = Path(tempfile.mkdtemp(prefix="actcache-slurm-"))  # pytest's are for their owner alone
    base.chmod(0o755)
    home = Path(os.environ.get("ACTCACHE_SLURM_HOME", base / "home"))
    clone = home / "actcache"
    clone.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in CODE), str(clone)], check=True)
    if not (clone / ".venv").exists():
        page = (ROOT / "docs/deploy/slurm.md").read_text()
        made = re.findall(r"^       (python3.11 -m venv .*|\.venv/bin/pip install .*)$", page, re.M)
        assert len(made) == 3
        path = os.pathsep.join(("/usr/bin", os.environ["PATH"]))  # an interpreter that other users may run
        subprocess.run(" && ".join(made), shell=True, check=True, cwd=clone, env=os.environ | {"PATH": path})
    with SlurmCluster(base / "slurm", home) as cluster:
        yield cluster
    shutil.rmtree(base)


@pytest.fixture
def clone(slurm):
    return slurm.home / "actcache"


@pytest.fixture
def script(clone):
    """The page's script on two nodes of one claimed GPU, on the CPU, with a small extent."""
    text = (clone / "deploy/slurm/harvest.sbatch").read_text()
    for pattern, put in (
        (r"--gpus-per-node=8", "--gpus-per-node=1"),
        (r"GPUS_PER_NODE=8", "GPUS_PER_NODE=1"),
        (r"--device cuda\n    --gpus-per-worker 1", "--device cpu"),
        (r"--tokens 2000000", EXTENT),
    ):
        text, n = re.subn(pattern, put, text)
        assert n == 1, pattern
    path = clone / "mine.sbatch"
    path.write_text(text)
    return path


def sbatch(slurm, script, root, *options):
    return slurm.run(
        "sbatch", "--parsable", *options, str(script), cwd=script.parent, env={"ROOT": str(root)}
    ).strip()


def state(slurm, job):
    """(state, times requeued) as Slurm has it."""
    said = slurm.run("scontrol", "show", "job", job)
    return re.search(r"JobState=(\w+)", said)[1], int(re.search(r"Restarts=(\d+)", said)[1])


def ended(slurm, job, timeout_s=400):
    over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
    slurm.until(lambda: state(slurm, job)[0] in over, timeout_s)
    return state(slurm, job)[0]


def actcache(slurm, *arguments):
    clone = slurm.home / "actcache"
    return slurm.run(str(clone / ".venv/bin/actcache"), *arguments, cwd=clone)


def blocks(root):
    """Records of committed blocks: their files, with what they hold."""
    return {path.name: path.read_bytes() for path in root.glob("*/_records/*/*.json")}


def show(path):
    return f"\n{path}:\n{path.read_text()[-3000:]}" if path.exists() else ""


def test_the_script_as_the_page_has_it_reaches_the_first_block_and_the_last(slurm, clone, script):
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        slurm.run("sbatch", "deploy/slurm/harvest.sbatch", cwd=clone)  # no node has eight
    root = slurm.home / f"first-{time.time_ns()}"
    job = sbatch(slurm, script, root)
    other = sbatch(slurm, script, root, "--job-name=second")
    assert ended(slurm, job) == "COMPLETED", show(clone / f"acts-{job}.log")
    log = (clone / f"acts-{job}.log").read_text()
    assert log.endswith("complete\n")
    assert "workers 2/2" in log
    assert "Ray runtime started" in (clone / f"acts-{job}.node2").read_text()
    assert "Token authentication is disabled" not in log
    # --exclusive: the second had to wait, and finds nothing to do
    assert ended(slurm, other) == "COMPLETED"
    first, second = (slurm.run("scontrol", "show", "job", j) for j in (job, other))
    assert re.search(r"StartTime=(\S+)", second)[1] >= re.search(r"EndTime=(\S+)", first)[1]
    assert "complete" in actcache(slurm, "ls", str(root))


def test_a_ray_that_does_not_start_is_requeued_and_then_finishes(slurm, clone, script):
    root = slurm.home / f"requeued-{time.time_ns()}"
    busy = 'import socket, time; s = socket.create_server(("", 6379)); time.sleep(600)'
    taken = subprocess.Popen([*slurm.enter("node1"), "python3", "-c", busy])
    try:
        job = sbatch(slurm, script, root)
        slurm.until(lambda: state(slurm, job)[1] == 1, 200)
    finally:
        taken.kill()
        taken.wait()
    assert f"{N_BLOCKS} blocks are missing" in (clone / f"acts-{job}.log").read_text()
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm lets it wait for two minutes
    assert ended(slurm, job) == "COMPLETED", show(clone / f"acts-{job}.log")


@pytest.mark.parametrize("how", ["scancel", "time limit", "node lost"])
def test_what_was_committed_stays_and_the_same_command_goes_on(slurm, clone, script, how):
    root = slurm.home / f"killed-{time.time_ns()}"
    job = sbatch(slurm, script, root, "--no-requeue")
    slurm.until(lambda: len(blocks(root)) >= 3 or state(slurm, job)[0] == "FAILED", 200)
    before = blocks(root)
    assert before, show(clone / f"acts-{job}.log")
    if how == "scancel":
        slurm.run("scancel", job)
    elif how == "time limit":
        slurm.root("scontrol", "update", f"JobId={job}", "TimeLimit=0:01")  # it has run for longer
    else:
        slurm.kill_node("node2")
        slurm.root("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=gone")
    expected = {"scancel": "CANCELLED", "time limit": "TIMEOUT", "node lost": "NODE_FAIL"}[how]
    assert ended(slurm, job) == expected
    if how == "node lost":
        slurm.revive("node2")
    during = blocks(root)
    assert before.items() <= during.items()
    assert len(during) < N_BLOCKS, "it was over before it was killed"
    slurm.until(lambda: slurm.run("squeue", "-h") == "", 90)
    job = sbatch(slurm, script, root)
    assert ended(slurm, job) == "COMPLETED", show(clone / f"acts-{job}.log")
    assert during.items() <= blocks(root).items()
    assert len(blocks(root)) == N_BLOCKS
    actcache(slurm, "verify", "--deep", str(next(root.glob("stdlib-*"))))


def test_the_backend_submits_follows_stops_with_a_drain_and_goes_on(slurm, clone):
    name = f"acts{time.time_ns()}"
    run = clone / f"{name}.toml"
    python = clone / ".venv/bin/python"
    run.write_text(
        f'name = "{name}"\nbackend = "slurm"\nroot = "{slurm.home}/{name}"\npython = "{python}"\n'
        'command = ["actcache", "harvest", "--root", "{root}", "--model", "bundled:stdlib-gpt2", "--corpus", "bundled:stdlib",'
        f' "--site", "blocks.3.hook_resid_post", {json.dumps(EXTENT.replace("262144", "1048576").replace("600000", "3000000").split())[1:-1]}, "--workers", "{{workers}}", "--engine", "ray"]\n'
        '[workers]\ncount = 2\ncpus = 2\nmemory_gib = 6\n[slurm]\ntime = "00:20:00"\n'
    )
    os.chown(run, UID, UID)
    place = slurm.home / f".local/state/actcache-runs/slurm/{name}-1"

    def cluster(*arguments):
        return slurm.run(str(python), "-m", "cluster", *arguments, cwd=clone)

    def status():
        return json.loads(cluster("status", run.name, "--json"))

    assert "FAIL" not in cluster("preflight", run.name)
    assert "#SBATCH --nodes=2" in cluster("submit", run.name, "--dry-run")
    assert f"submitted {name}-1" in cluster("submit", run.name)
    slurm.until(lambda: len(blocks(slurm.home / name)) >= 2 or (place / "exit").exists(), 200)
    now = status()
    assert (now["status"], now["steps"][0]["state"]) in {("RUNNING", "partial"), ("RUNNING", "missing")}, (
        show(place / "log")
    )
    with pytest.raises(AssertionError, match="is RUNNING"):
        cluster("submit", run.name)
    assert "is STOPPED" in cluster("stop", run.name), show(place / "log")
    log = cluster("logs", run.name)
    assert "stopped" in log, log[-3000:]
    kept = blocks(slurm.home / name)
    assert 2 <= len(kept) < 66, "it was over before it was stopped"
    followed = cluster("submit", run.name, "--follow")
    assert "workers 2/2" in followed
    assert followed.endswith(f"{name}-2 SUCCEEDED\n")
    assert kept.items() <= blocks(slurm.home / name).items()
    assert status()["steps"][0]["state"] == "done"
    assert "has succeeded already" in cluster("submit", run.name)
    token = re.compile(r"\b[0-9a-f]{64}\b")
    assert not token.search(log + followed + (place / "script.sh").read_text())


@pytest.mark.parametrize("how", ["stop", "time limit"])
def test_slurm_lets_the_command_drain_and_no_one_else_hears(slurm, how):
    """Slurm's side alone, in seconds: `ray` is a stand-in that listens where the head would and runs the command."""
    home = slurm.home / f"drain-{time.time_ns()}"
    place = home / "d-1"
    for directory in (place, home / "bin"):
        directory.mkdir(parents=True)
    programs = {
        "python": 'exec /usr/bin/python3 "$@"',
        "ray": '[ "$SLURM_PROCID" -eq 0 ] || exec sleep 1000\n'
        """/usr/bin/python3 -c 'import socket, time; s = socket.create_server(("", 6379)); time.sleep(1000)' &\n"""
        'head=$!\nwhile [ "$1" != -- ]; do shift; done\nshift\n"$@"\ncode=$?\nkill $head\nexit $code',
    }
    for name, body in programs.items():
        (home / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (home / "bin" / name).chmod(0o755)
    drain = (
        "import signal, sys, time\n"
        "def drain(*_): time.sleep(3); print('drained', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, drain); print('up', flush=True); time.sleep(600)\n"
    )
    run = Run(
        name="d",
        backend="slurm",
        command=("python", "-c", drain),
        python=str(home / "bin/python"),
        workers=Workers(count=2, cpus=2, memory_gib=2),
        slurm=Slurm(time="00:01:00" if how == "time limit" else "01:00:00"),
        drain_s=20,
    )
    (place / "script.sh").write_text(slurm_script(run, place))
    subprocess.run(["chown", "-R", f"{UID}:{UID}", str(home)], check=True)
    job = slurm.run("sbatch", "--parsable", str(place / "script.sh")).strip()
    log = place / "log"
    slurm.until(lambda: log.exists() and "up\n" in log.read_text(), 60)
    if how == "stop":
        slurm.run("scancel", "--signal=TERM", "--batch", job)
    slurm.until((place / "exit").exists, 120)
    assert (place / "exit").read_text() == "143\n", log.read_text()
    assert "drained\n" in log.read_text()
    assert "forcing job termination" not in log.read_text()
