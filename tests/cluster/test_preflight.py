"""What preflight finds amiss, and that each failure says what helps. On several nodes: test_ray_runs.py."""

import contextlib
import json
import platform
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest
from ray_cluster import free_ports

from cluster import __main__ as command_line
from cluster import ray_jobs
from cluster.config import ConfigError, Run
from cluster.preflight import _nodes, _ranks, _unlike, check_command, preflight, ray_train
from cluster.ray_jobs import RayJobs
from cluster.training import Train

HARVEST = Run(name="job", command=("actcache", "harvest", "--root", "{root}"), root="/nowhere")


def failures(checks):
    return {check["check"]: check for check in checks if not check["ok"]}


def test_without_slurm_or_kubectl_the_programs_are_named(tmp_path, monkeypatch):
    run = Run(name="job", command=("actcache", "harvest"), root=f"file://{tmp_path}", image="i")
    monkeypatch.setenv("PATH", "/nowhere")
    checks = list(preflight(run, "slurm"))
    found = failures(checks)
    assert list(found) == ["sbatch", "squeue", "scancel", "scontrol"]
    assert {c["fix"] for c in found.values()} == {"submit from a login node of the Slurm cluster"}
    assert {c["where"] for c in checks} == {"login node", "this machine"}
    found = failures(preflight(run, "kuberay"))
    assert found["kubectl"]["fix"] == "install kubectl"


@contextlib.contextmanager
def web_server(answers):
    """A server that gives `answers` (status, text) by path; 404 elsewhere, and no answer where there is None."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path, (404, "404: Not Found"))
            if answer is None:
                over.wait(60)
                return
            status, text = answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


REACH = "give --address http://HOST:8265 of the head, forward that port, or start one: ray start --head"
VERSION = json.dumps({"version": "4", "ray_version": "2.9.3", "ray_commit": "c", "session_name": "s"})


@pytest.mark.parametrize(
    ("answer", "found", "fix"),
    [
        (None, "URL has not answered within 0.5 s", "wait, or look at dashboard.log of the head"),
        (
            (401, "Unauthorized: Missing authentication token"),
            "the cluster wants its token",
            "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that has it",
        ),
        (
            (403, "Forbidden: Invalid authentication token"),
            "the cluster wants its token",
            "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that has it",
        ),
        ((200, "<html>Grafana</html>"), "URL answers (200), but not as Ray's job server does", REACH),
        ((200, '{"version": 1}'), "URL answers (200), but not as Ray's job server does", REACH),
        ((200, "[]"), "URL answers (200), but not as Ray's job server does", REACH),
        ((404, "404: Not Found"), "URL answers (404), but not as Ray's job server does", REACH),
        ((502, "Bad Gateway"), "URL answers (502), but not as Ray's job server does", REACH),
    ],
)
def test_what_is_no_job_server_is_said_in_one_line_within_a_bound(
    monkeypatch, tmp_path, capsys, answer, found, fix
):
    monkeypatch.setattr(ray_jobs, "_ANSWER_S", 0.5)
    monkeypatch.setenv("HOME", str(tmp_path))
    begun = time.monotonic()
    with web_server({"/api/version": answer}) as url:
        [check] = preflight_at(monkeypatch, url)
        assert (check["where"], check["check"], check["ok"]) == ("job server", "reached", False)
        assert (check["found"], check["fix"]) == (found.replace("URL", url), fix)
        monkeypatch.setattr(sys, "argv", ["cluster", "list"])
        assert command_line.main() == 1
    assert capsys.readouterr().err == f"error: {found.replace('URL', url)}; {fix}\n"
    assert time.monotonic() - begun < 20


def preflight_at(monkeypatch, url):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", url)
    return list(preflight(HARVEST, "ray"))


def test_a_job_server_out_of_reach_is_one_failure_with_three_ways_out(monkeypatch):
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    [check] = preflight_at(monkeypatch, url)
    assert (check["where"], check["check"], check["ok"]) == ("job server", "reached", False)
    assert (check["found"], check["fix"]) == (f"no job server is reached at {url}", REACH)


def test_another_ray_is_named_with_both_ways_out_and_a_server_that_takes_no_jobs_too(monkeypatch):
    import ray

    with web_server({"/api/version": (200, VERSION)}) as url:
        reached, version, job = preflight_at(monkeypatch, url)
    assert (reached["ok"], reached["found"]) == (True, url)
    assert (version["check"], version["ok"]) == ("Ray version", False)
    assert version["found"] == f"2.9.3, here {ray.__version__}"
    assert version["fix"] == (
        f"pip install 'ray[default]==2.9.3' here, or use an image with Ray {ray.__version__}"
    )
    assert (job["check"], job["ok"]) == ("job", False)
    assert "404" in job["found"]
    assert job["fix"]


TRAINING = Run(
    name="job",
    command=("python", "-m", "sae", "train", "--out", "x"),
    train=Train(workers=3, cpus=2, gpus=1),
)


def test_room_for_ranks_is_counted_on_the_nodes_that_the_job_server_knows(monkeypatch):
    nodes = [
        {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 1.0, "memory": 1e9}},
        {"state": "ALIVE", "resources_total": {"CPU": 3.0, "GPU": 4.0}},
        {"state": "ALIVE", "resources_total": {"memory": 1e9}},  # a head without work
        {"state": "DEAD", "resources_total": {"CPU": 64.0, "GPU": 8.0}},
    ]
    listed = json.dumps({"result": True, "data": {"result": {"result": nodes}}})
    answers = {"/api/version": (200, VERSION), ray_jobs._NODES: (200, listed)}
    with web_server(answers) as url:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", url)
        found = RayJobs().nodes(TRAINING)
    assert found == [(8, 1), (3, 4), (0, 0)]
    [check] = _ranks(TRAINING, found)
    assert (check["where"], check["check"], check["ok"]) == ("cluster", "ranks of job", False)
    assert check["found"] == (
        "3 ranks of 1 GPU and 2 CPUs, 3 GPUs and 6 CPUs in all; room for 2 on 3 nodes with 5 GPUs and 11 CPUs together"
    )
    assert check["fix"].startswith("start more nodes, wait for the autoscaler, or lower workers")
    assert [c["ok"] for c in _ranks(TRAINING, [*found, (2, 1)])] == [True]


def test_ranks_of_one_machine_may_share_cpus_but_not_gpus():
    [check] = _ranks(TRAINING, [(2, 3)], shared=True)
    assert check["ok"]
    assert check["found"].endswith(
        "room for 1 on 1 node with 3 GPUs and 2 CPUs; on one machine they may share CPUs"
    )
    [check] = _ranks(TRAINING, [(64, 2)], shared=True)
    assert not check["ok"]


def test_an_interpreter_that_lacks_what_ranks_import_is_named_with_what_it_lacks(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho pandas tensorboardX\n")
    python.chmod(0o755)
    found = ray_train("node 1", str(python))
    assert (found["where"], found["check"], found["ok"]) == ("node 1", "ray[train]", False)
    assert found["found"] == "lacks pandas, tensorboardX"
    assert found["fix"].startswith(f"pip install 'ray[train]' torch for {python}")
    assert ray_train("", "/nowhere/python")["found"] == "/nowhere/python: No such file or directory"
    assert ray_train("", "/bin/false")["found"] == "exit code 1"
    ours = [name for name in ("pandas", "pydantic", "tensorboardX") if find_spec(name) is None]
    assert ray_train("", sys.executable)["found"] == (
        f"lacks {', '.join(ours)}" if ours else "has all that ranks import"
    )


def test_a_machine_without_our_code_is_named():
    run = Run(name="job", command=("a",), root="/nowhere", python="/bin/false")
    with pytest.raises(ConfigError, match="put root in RUN.toml"):
        check_command(Run(name="job", command=("a",)))
    assert check_command(run) == ["/bin/false", "-m", "actcache", "check", "/nowhere", "--json"]


def test_nodes_unlike_the_others_are_named_with_what_they_have():
    same = "python 3.11.7, actcache 0.1.0, torch 2.13.0"
    versions = {"node 1": same, "node 2": same.replace("2.13", "2.12"), "node 3": same}
    [check] = _unlike(versions)
    assert (check["where"], check["found"]) == ("node 2", "torch 2.12.0; 2 of 3 nodes have torch 2.13.0")
    assert check["fix"].endswith("of the others: torch 2.13.0")
    assert [c["ok"] for c in _unlike(dict.fromkeys(versions, same))] == [True]
    assert list(_unlike({})) == []


@pytest.mark.ray
def test_a_cluster_of_other_python_and_too_few_gpus_lacking_a_file(ray_session, tmp_path):
    told = {
        "command": [sys.executable, "-m", "actcache", "check", str(tmp_path), "--json"],
        "python": "3.9.1",
    }
    told |= {"workers": 2, "gpus": 4096, "env_files": {"HF_TOKEN": str(tmp_path / "none")}, "ranks": False}
    checks = list(_nodes(told))
    found = failures(checks)
    assert found["GPUs"]["found"].endswith("of 8192 wanted")
    assert "lower count or gpus in [workers]" in found["GPUs"]["fix"]
    assert found["Python version"]["found"] == f"{platform.python_version()}, here 3.9.1"
    assert "image with Python 3.9.1" in found["Python version"]["fix"]
    assert found["env_files"]["found"].startswith(
        f"HF_TOKEN is wanted from {tmp_path}/none, which cannot be read"
    )
    assert found["env_files"]["where"].startswith("node ")
    assert found["env_files"]["fix"]
    assert len(found) == 3
    told |= {"command": [sys.executable, "-c", "raise SystemExit(3)"], "gpus": 0, "env_files": {}}
    gone = next(_nodes(told))
    assert (gone["check"], gone["found"]) == ("actcache", "exit code 3")
    assert "python in RUN.toml says which interpreter" in gone["fix"]
