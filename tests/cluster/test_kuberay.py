"""RayJobs: held to KubeRay's CRD, to the rules that it does not state, and sent by the real kubectl.

The API server is a stand-in that keeps objects as they are posted and refuses those that the CRD refuses; no operator
runs here, so the states of a RayJob are set by the tests.
"""

import json
import shutil
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jsonschema
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))

from deployments import strict_schema

from cluster.attempts import ClusterError
from cluster.config import ConfigError, KubeRay, Run, Step, Workers
from cluster.kuberay import KubeRayJobs, manifest
from cluster.preflight import _of_kuberay

FULL = Run(
    name="acts",
    backend="kuberay",
    root="s3://bucket/acts",
    image="registry.example/actcache:1",
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
    workers=Workers(count=4, cpus=8, gpus=1, memory_gib=64),
    env=("HF_TOKEN",),
    kuberay=KubeRay(namespace="ml", service_account="acts", secret="acts-env", queue="gpus", spot=True),
)
PLAIN = Run(name="acts", backend="kuberay", image="i", command=("actcache", "ls", "s3://b/p"))
PIPELINE = replace(PLAIN, command=(), root="s3://b/p", steps=(Step(name="a", command=("python", "-V")),))


@pytest.fixture(scope="module")
def rayjob():
    return jsonschema.Draft202012Validator(strict_schema("RayJob"))


@pytest.mark.parametrize("run", [FULL, PLAIN, PIPELINE], ids=["full", "plain", "pipeline"])
def test_the_manifest_is_valid_and_keeps_the_rules_that_the_schema_misses(rayjob, run):
    made = json.loads(json.dumps(manifest(run, 12)))
    rayjob.validate(made)
    spec, cluster = made["spec"], made["spec"]["rayClusterSpec"]
    assert len(made["metadata"]["name"]) <= 47
    assert spec["shutdownAfterJobFinishes"]  # ttl, suspend and Kueue need it
    assert "clusterSelector" not in spec
    assert "deletionStrategy" not in spec
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "resources" not in group
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > run.drain_s
        assert "restartPolicy" not in pod


def test_a_misspelled_field_would_be_seen(rayjob):
    made = manifest(PLAIN, 1)
    made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        rayjob.validate(made)


def test_the_longest_name_fits():
    assert len(manifest(replace(PLAIN, name="a" * 40), 999_999)["metadata"]["name"]) <= 47


def test_resources_and_placement_are_the_runs_own_and_values_come_from_the_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    made = manifest(FULL, 1)
    group = made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    pod = group["template"]["spec"]
    [container] = pod["containers"]
    assert group["replicas"] == 4
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert pod["serviceAccountName"] == "acts"
    assert {t["key"] for t in pod["tolerations"]} == {"nvidia.com/gpu", "spot"}
    assert container["env"] == [
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "acts-env", "key": "HF_TOKEN"}}}
    ]
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert made["spec"]["suspend"] is True
    assert made["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert made["spec"]["entrypoint"].endswith("--root s3://bucket/acts --workers 4 --gpus-per-worker 1")
    assert "correct-horse" not in json.dumps(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "image is missing"),
        ({"kuberay": KubeRay()}, "kuberay.secret is missing"),
        ({"working_dir": "/x"}, "working_dir is for the backends local and ray"),
        ({"root": "/data"}, "root is a directory, which pods do not share"),
    ],
)
def test_what_pods_cannot_do_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        manifest(replace(FULL, **change), 1)


class ApiServer(ThreadingHTTPServer):
    """As much of a Kubernetes API server as `kubectl` needs to create, get, list and delete RayJobs."""

    def __init__(self, validator):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.validator, self.jobs, self.keys = validator, {}, ["OTHER"]


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def _send(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, code, reason, message):
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        self._send(code, status | {"reason": reason, "message": message, "code": code})

    def do_GET(self):
        url = urlsplit(self.path)
        verbs = ["create", "delete", "get", "list"]
        rayjobs = {
            "name": "rayjobs",
            "singularName": "rayjob",
            "namespaced": True,
            "kind": "RayJob",
            "verbs": verbs,
        }
        secrets = {
            "name": "secrets",
            "singularName": "secret",
            "namespaced": True,
            "kind": "Secret",
            "verbs": verbs,
        }
        version = {"groupVersion": "ray.io/v1", "version": "v1"}
        fixed = {
            "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [secrets]},
            "/api/v1/namespaces/ml/secrets/acts-env": {
                "kind": "Secret",
                "apiVersion": "v1",
                "metadata": {"name": "acts-env", "namespace": "ml"},
                "data": dict.fromkeys(self.server.keys, "eA=="),
            },
            "/apis": {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [{"name": "ray.io", "versions": [version], "preferredVersion": version}],
            },
            "/apis/ray.io/v1": {
                "kind": "APIResourceList",
                "groupVersion": "ray.io/v1",
                "resources": [rayjobs],
            },
        }
        validation = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
        kind = {"group": "ray.io", "version": "v1", "kind": "RayJob"}
        patch = {"parameters": [validation], "x-kubernetes-group-version-kind": kind, "responses": {}}
        paths = {"/apis/ray.io/v1/namespaces/{namespace}/rayjobs/{name}": {"patch": patch}}
        info = {"title": "stand-in", "version": "1"}
        fixed["/openapi/v3"] = {
            "paths": {"apis/ray.io/v1": {"serverRelativeURL": "/openapi/v3/apis/ray.io/v1"}}
        }
        fixed["/openapi/v3/apis/ray.io/v1"] = {"openapi": "3.0.0", "info": info, "paths": paths}
        if url.path in fixed:
            return self._send(200, fixed[url.path])
        parts = url.path.split("/")
        if parts[-1] == "rayjobs":
            [(label, _, value)] = [s.partition("=") for s in parse_qs(url.query)["labelSelector"]]
            jobs = [
                job
                for job in self.server.jobs.values()
                if job["metadata"]["labels"].get(label) and value in ("", job["metadata"]["labels"][label])
            ]
            return self._send(
                200, {"kind": "RayJobList", "apiVersion": "ray.io/v1", "metadata": {}, "items": jobs}
            )
        if parts[-1] in self.server.jobs:
            return self._send(200, self.server.jobs[parts[-1]])
        return self._refuse(404, "NotFound", f"{url.path} not found")

    def do_POST(self):
        if "/rayjobs" not in self.path:
            return self._refuse(403, "Forbidden", f"{self.path} is not allowed")
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        errors = [e.message for e in self.server.validator.iter_errors(job)]
        if errors:
            return self._refuse(422, "Invalid", errors[0])
        name = job["metadata"]["name"]
        if name in self.server.jobs:
            return self._refuse(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
        self.server.jobs[name] = job
        return self._send(201, job)

    def do_DELETE(self):
        self._send(200, self.server.jobs.pop(self.path.split("?")[0].split("/")[-1]))


@pytest.fixture
def api(rayjob, tmp_path, monkeypatch):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on this machine")
    with ApiServer(rayjob) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "here", "contexts": [context]}
        config |= {
            "clusters": [{"name": "here", "cluster": {"server": address}}],
            "users": [{"name": "me", "user": {}}],
        }
        (tmp_path / "config").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        monkeypatch.setenv("HOME", str(tmp_path))
        yield server
        server.shutdown()


def test_attempts_live_in_the_api_server_and_follow_the_operator(api):
    jobs = KubeRayJobs()
    attempt, new = jobs.submit(FULL)
    assert (attempt.id, attempt.status, new) == ("acts-1", "PENDING", True)
    with pytest.raises(ClusterError, match="acts-1 is PENDING"):
        jobs.submit(FULL)
    with pytest.raises(ClusterError, match='kubectl create: .*"acts-1" already exists'):
        jobs.start(FULL, 1)

    def said(**status):
        api.jobs["acts-1"]["status"] = status
        return jobs.newest("acts").status

    assert said(jobDeploymentStatus="Running", jobStatus="RUNNING") == "RUNNING"
    assert said(jobDeploymentStatus="Retrying", jobStatus="FAILED") == "PENDING"
    assert said(jobDeploymentStatus="Complete", jobStatus="STOPPED") == "STOPPED"
    assert said(jobDeploymentStatus="Failed", jobStatus="", reason="DeadlineExceeded") == "FAILED"
    assert jobs.newest("acts").message == "Failed: DeadlineExceeded"
    second, new = jobs.submit(FULL)
    assert (second.id, new) == ("acts-2", True)
    api.jobs["acts-2"]["status"] = {
        "jobDeploymentStatus": "Complete",
        "jobStatus": "SUCCEEDED",
        "startTime": "2026-01-02T03:04:05Z",
        "endTime": "2026-01-02T03:04:15Z",
    }
    done, new = jobs.submit(FULL)
    assert (done.id, new, done.ended_s - done.started_s) == ("acts-2", False, 10)
    assert [a.number for a in KubeRayJobs().attempts("acts")] == [1, 2]


def test_preflight_says_what_kubernetes_lacks_and_what_helps(api):
    """A cluster without operator, rights, account and one key of the secret."""
    checks = {check["check"]: check for check in _of_kuberay(FULL) if check["where"] == "Kubernetes"}
    assert {name: check["ok"] for name, check in checks.items()} == dict.fromkeys(
        ("KubeRay", "may create RayJobs", "service account", "secret"), False
    )
    assert all(check["fix"] for check in checks.values())
    assert checks["secret"]["found"] == "lacks HF_TOKEN"
    assert checks["secret"]["fix"] == (
        "kubectl create secret generic acts-env --from-literal=..., with the keys HF_TOKEN"
    )
    api.keys.append("HF_TOKEN")
    assert [c["ok"] for c in _of_kuberay(FULL) if c["check"] == "secret"] == [True]


def test_a_run_that_waits_is_taken_back_by_stop(api):
    jobs = KubeRayJobs()
    attempt, _ = jobs.submit(FULL)
    assert jobs.stop(attempt).status == "STOPPED"
    assert api.jobs == {}


def test_a_cluster_out_of_reach_is_one_line(tmp_path, monkeypatch):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on this machine")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ClusterError, match="kubectl get: "):
        KubeRayJobs().attempts()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="kubectl is not installed here"):
        KubeRayJobs().attempts()
