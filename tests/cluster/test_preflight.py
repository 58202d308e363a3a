"""What preflight finds amiss, and that each failure says what helps. On several nodes: test_ray_runs.py."""

import platform
import sys

import pytest
from ray_cluster import free_ports

from cluster.attempts import ClusterError
from cluster.config import Run
from cluster.preflight import _nodes, _unlike, check_command, preflight

HARVEST = Run(name="job", command=("actcache", "harvest", "--root", "{root}"), root="/nowhere")


def failures(checks):
    return {check["check"]: check for check in checks if not check["ok"]}


def test_without_slurm_or_kubectl_the_programs_are_named(tmp_path, monkeypatch):
    run = Run(name="job", command=("actcache", "harvest"), root=str(tmp_path), image="i")
    monkeypatch.setenv("PATH", "/nowhere")
    checks = list(preflight(run, "slurm"))
    found = failures(checks)
    assert list(found) == ["sbatch", "squeue", "scancel", "scontrol"]
    assert {c["fix"] for c in found.values()} == {"submit from a login node of the Slurm cluster"}
    assert {c["where"] for c in checks} == {"login node", "this machine"}
    found = failures(preflight(run, "kuberay"))
    assert found["kubectl"]["fix"] == "install kubectl"


def test_a_job_server_out_of_reach_is_one_failure_with_three_ways_out(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_ports(1)[0]}")
    [check] = preflight(HARVEST, "ray")
    assert (check["where"], check["check"], check["ok"]) == ("job server", "reached", False)
    assert check["fix"].startswith(
        "give --address http://HOST:8265 of the head, forward that port, or start one"
    )


def test_a_machine_without_our_code_is_named():
    run = Run(name="job", command=("a",), root="/nowhere", python="/bin/false")
    with pytest.raises(ClusterError, match="put root in RUN.toml"):
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
    told |= {"workers": 2, "gpus": 4096, "env_files": {"HF_TOKEN": str(tmp_path / "none")}}
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
