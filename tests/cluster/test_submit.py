"""Runs on a real Ray cluster with a real job server: submitted, followed, stopped, resumed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ray_cluster import RayCluster, free_ports, pids_naming

from cluster.attempts import ClusterError
from cluster.config import Run
from cluster.preflight import preflight
from cluster.ray_jobs import RayJobs

pytestmark = [pytest.mark.slow, pytest.mark.ray]
rays_own_warning = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
"""Of how Ray's client calls aiohttp; seen where it runs in this process."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """Environment of a submitter to a cluster of one node; its own ports, session directory and HOME."""
    with RayCluster() as cluster:
        yield cluster.environment


def cli(cluster, *arguments):
    command = [sys.executable, "-m", "cluster", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=300)


def write_run(directory, name, *command, **fields):
    lines = {"name": name, "command": list(command), "python": sys.executable} | fields
    path = directory / f"{name}.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))
    return path


def statuses(cluster, name):
    lines = map(json.loads, cli(cluster, "list", "--json").stdout.splitlines())
    return {line["id"]: line["status"] for line in lines if line["run"] == name}


def wait_for_file(path, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} has not appeared"
        time.sleep(0.1)


def test_a_run_with_its_own_code_and_environment_is_followed_to_its_end(cluster, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/greet.py").write_text("import os\nprint('hello', os.environ['GREETED'])\n")
    path = write_run(tmp_path, "greet", "python", "-m", "greet", env=["GREETED"], working_dir="code")
    environment = cluster | {"GREETED": "wor" + "ld"}

    done = cli(environment, "submit", path, "--follow")
    assert done.returncode == 0, done.stderr
    assert "submitted greet-1" in done.stdout
    assert "hello world\n" in done.stdout
    assert done.stdout.endswith("greet-1 SUCCEEDED\n")
    assert "hello world\n" in cli(cluster, "logs", "greet").stdout
    assert json.loads(cli(cluster, "status", path, "--json").stdout)["status"] == "SUCCEEDED"

    again = cli(environment, "submit", path)
    assert (again.returncode, again.stdout.split(";")[0]) == (0, "greet-1 has succeeded already")
    assert statuses(cluster, "greet") == {"greet-1": "SUCCEEDED"}


def test_a_failed_run_is_one_line_and_submitting_it_again_is_the_next_attempt(cluster, tmp_path):
    marker = tmp_path / "marker"
    code = f"import pathlib, sys; p = pathlib.Path({str(marker)!r}); sys.exit(0 if p.exists() else 7)"
    path = write_run(tmp_path, "flaky", "python", "-c", code)
    failed = cli(cluster, "submit", path, "--follow")
    assert failed.returncode == 1
    assert failed.stderr == "error: flaky-1 FAILED: Job entrypoint command failed with exit code 7\n"
    marker.touch()
    assert cli(cluster, "submit", path, "--follow").stdout.endswith("flaky-2 SUCCEEDED\n")
    assert statuses(cluster, "flaky") == {"flaky-1": "FAILED", "flaky-2": "SUCCEEDED"}


def test_a_running_run_is_not_submitted_twice_and_stop_lets_it_finish_its_work(cluster, tmp_path):
    started, drained = tmp_path / "started", tmp_path / "drained"
    code = (
        "import pathlib, signal, sys, time\n"
        f"def drain(*_): time.sleep(5); pathlib.Path({str(drained)!r}).touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, drain)\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "time.sleep(600)\n"
    )
    path = write_run(tmp_path, "long", "python", "-c", code)
    assert cli(cluster, "submit", path).returncode == 0
    wait_for_file(started)
    again = cli(cluster, "submit", path)
    assert again.returncode == 1
    assert again.stderr.startswith("error: long-1 is RUNNING; ")

    stopped = cli(cluster, "stop", "long")
    assert (stopped.returncode, stopped.stdout) == (0, "long-1 is STOPPED\n")
    assert drained.exists()  # 5 s of work, which Ray's own 3 s would have cut off
    assert cli(cluster, "stop", "long").stdout == "long-1 was already STOPPED\n"

    write_run(tmp_path, "long", "python", "-c", "print('done')")
    assert cli(cluster, "submit", path, "--follow").stdout.endswith("long-2 SUCCEEDED\n")
    write_run(tmp_path, "long", "python", "-c", "print('more')")  # not what succeeded: runs
    assert cli(cluster, "submit", path, "--follow").stdout.endswith("long-3 SUCCEEDED\n")
    assert "done\n" in cli(cluster, "logs", "long", "--attempt", 2).stdout


def test_two_submitters_at_once_make_one_attempt(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    jobs = RayJobs(cluster["RAY_API_SERVER_ADDRESS"])
    run = Run(name="race", command=("python", "-c", "import time; time.sleep(3)"), python=sys.executable)
    results, barrier = [], threading.Barrier(2)

    def one():
        barrier.wait()
        try:
            results.append(jobs.submit(run)[0].id)
        except ClusterError as err:
            results.append(str(err))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=len)[0] == "race-1"
    assert "already exists" in max(results, key=len) or "race-1 is" in max(results, key=len)
    assert [a.id for a in jobs.attempts("race")] == ["race-1"]


def test_a_harvest_runs_on_the_cluster(cluster, tmp_path):
    root = tmp_path / "acts"
    options = {"root": root, "tokens": 2000, "max-tokens": 60_000, "context-size": 32, "block-rows": 2048}
    options |= {"workers": 2, "engine": "ray"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    path = write_run(tmp_path, "harvest", "actcache", "harvest", *arguments)
    done = cli(cluster, "submit", path, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    command = [sys.executable, "-m", "actcache", "ls", str(root), "--json"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(listed)["state"] == "complete"


@rays_own_warning
def test_preflight_of_a_client_with_another_ray_fails_in_that_and_checks_the_rest(
    cluster, tmp_path, monkeypatch
):
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster["RAY_API_SERVER_ADDRESS"])
    theirs = ray.__version__
    monkeypatch.setattr(ray, "__version__", "2.59.9")
    run = Run(name="look", command=("a",), root=str(tmp_path), python=sys.executable)
    checks = list(preflight(run, "ray"))
    [failed] = [check for check in checks if not check["ok"]]
    assert (failed["where"], failed["check"]) == ("job server", "Ray version")
    assert failed["found"] == f"{theirs}, here 2.59.9"
    assert failed["fix"] == f"pip install 'ray[default]=={theirs}' here, or use an image with Ray 2.59.9"
    assert {"conditional put", "versions", "Python version"} <= {check["check"] for check in checks}


def test_following_ends_when_the_job_server_answers_no_more(cluster, tmp_path):
    go = tmp_path / "go"
    code = f"import pathlib, time\nprint('begun', flush=True)\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.1)"
    path = write_run(tmp_path, "frozen", "python", "-c", code)
    port = cluster["RAY_API_SERVER_ADDRESS"].rpartition(":")[2]
    [server] = [pid for pid in pids_naming(f"--port={port}") if is_dashboard(pid)]
    sooner = (
        "from cluster import __main__, ray_jobs; ray_jobs._ANSWER_S = 3.0; raise SystemExit(__main__.main())"
    )
    follower = subprocess.Popen(
        [sys.executable, "-c", sooner, "submit", str(path), "--follow"],
        cwd=ROOT,
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "begun\n" in iter(follower.stdout.readline, "")
        os.kill(server, signal.SIGSTOP)
        out, err = follower.communicate(timeout=60)
    finally:
        os.kill(server, signal.SIGCONT)
        go.touch()
        follower.kill()
        follower.communicate()
    assert (follower.returncode, out) == (1, "")
    assert "has not answered within 3 s; wait, or look at dashboard.log of the head" in err
    assert err.count("\n") == 1
    deadline = time.monotonic() + 60  # the run is none the worse
    while statuses(cluster, "frozen") != {"frozen-1": "SUCCEEDED"}:
        assert time.monotonic() < deadline
        time.sleep(1)


def is_dashboard(pid):
    return b"dashboard/dashboard.py" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_what_the_cluster_does_not_have_is_one_line(cluster):
    done = cli(cluster, "status", "nothing")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: this cluster knows no run 'nothing'")
    unreachable = cli(cluster, "list", "--address", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert unreachable.returncode == 1
    assert unreachable.stderr.startswith("error: no job server is reached at http://127.0.0.1:")
