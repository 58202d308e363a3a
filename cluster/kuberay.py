"""Runs as RayJobs of KubeRay: the manifest from RUN.toml, and `kubectl` for everything else.

The head has no work; workers have the resources of [workers], and are as many as harvests or ranks of a training need. A failure makes a new cluster, at most `retries` times, and
the command goes on from what is stored. Values of `env` come from a Kubernetes secret: none is ever in a manifest.
What schemas do not say is in ../shared/reference/ray.md, section 4; tests hold the manifest to both.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

from .attempts import POLL_S, Attempt, Backend, ClusterError, parse_id
from .config import ConfigError, Run
from .training import Nodes, run_directory

_LABEL = "actcache-run"
_ENTRYPOINT = "actcache/entrypoint"
_DRAIN = "actcache/drain-s"
_KEPT_S = 600  # of the cluster after the run, to look at it
_HEAD = {"cpus": 2, "memory_gib": 8}
_OBJECT_STORE_BYTES = 512 * 1024**2  # rows never pass through it


def manifest(run: Run, attempt: int | str) -> dict[str, Any]:
    """The RayJob of an attempt.

    Raises:
        ConfigError: it names no image, or variables without a secret that has them.
    """
    if run.image is None:
        raise ConfigError(
            "image is missing: kuberay runs an image with ray, actcache and sae (deploy/Dockerfile)"
        )
    if run.env and run.kuberay.secret is None:
        raise ConfigError(
            "env names variables, and kuberay.secret is missing: the Kubernetes secret that has them"
        )
    if run.env_files:
        raise ConfigError(
            "env_files is for the other backends; put the names in env, their values in kuberay.secret"
        )
    if run.working_dir is not None:
        raise ConfigError("working_dir is for the backends local and ray; put the code in the image")
    if run.root is not None and "://" not in run.root:
        raise ConfigError("root is a directory, which pods do not share; give a URL such as s3://bucket/acts")
    for step in run.all_steps:
        out = run_directory(run.program(step.command))
        if out is not None and "://" not in out:
            raise ConfigError(
                f"--out of {step.name} is a directory, which pods do not share; give a URL such as {{root}}/runs/x"
            )
    options, workers, n_pods = run.kuberay, run.workers, len(run.nodes())
    metadata: dict[str, Any] = {
        "name": f"{run.name}-{attempt}",
        "namespace": options.namespace,
        "labels": {_LABEL: run.name},
        "annotations": {_ENTRYPOINT: run.entrypoint, _DRAIN: str(run.drain_s)},
    }
    if options.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = options.queue
    cluster: dict[str, Any] = {
        "rayVersion": _ray_version(),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "object-store-memory": str(_OBJECT_STORE_BYTES)},
            "template": _pod(run, "ray-head", _HEAD["cpus"], _HEAD["memory_gib"], 0),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": n_pods,
                "minReplicas": n_pods,
                "maxReplicas": n_pods,
                "rayStartParams": {"object-store-memory": str(_OBJECT_STORE_BYTES)},
                "template": _pod(run, "ray-worker", workers.cpus, workers.memory_gib, workers.gpus),
            }
        ],
    }
    if options.token_auth:
        cluster["authOptions"] = {"mode": "token"}
    spec: dict[str, Any] = {
        "entrypoint": run.entrypoint,
        "jobId": f"{run.name}-{attempt}",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _KEPT_S,
        "backoffLimit": options.retries,
        "runtimeEnvYAML": f"env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: '{run.drain_s}'\n",
        "rayClusterSpec": cluster,
    }
    if options.queue:
        spec["suspend"] = True  # Kueue starts it
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _pod(run: Run, container: str, cpus: int, memory_gib: int, gpus: int) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    env = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": run.kuberay.secret, "key": name}}}
        for name in run.env
    ]
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": run.drain_s + 10,
        "containers": [
            {
                "name": container,
                "image": run.image,
                "resources": {"requests": dict(resources), "limits": dict(resources)},
                **({"env": env} if env else {}),
            }
        ],
    }
    if run.kuberay.service_account:
        spec["serviceAccountName"] = run.kuberay.service_account
    tolerations = []
    if gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if run.kuberay.spot and container == "ray-worker":
        tolerations.append({"key": "spot", "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        spec["tolerations"] = tolerations
    return {"spec": spec}


def _ray_version() -> str:
    """Ours: the image must have the same, as `preflight` says."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ray")
    except PackageNotFoundError as err:
        raise ClusterError(
            "Ray is not installed here, so its version is not known; pip install 'ray[default]'"
        ) from err


_STATES = {"SUCCEEDED": "SUCCEEDED", "FAILED": "FAILED", "STOPPED": "STOPPED"}
_DEPLOYMENT_STATES = {
    "Failed": "FAILED",
    "ValidationFailed": "FAILED",
    "Suspended": "PENDING",
    "Running": "RUNNING",
}


class KubeRayJobs(Backend):
    """RayJobs that this submitter made, in one namespace (None: all for `list`, the context's for the rest)."""

    def __init__(self, namespace: str | None = None) -> None:
        self._namespace = namespace

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """See `Backend`."""
        where = ["-n", self._namespace] if self._namespace else ["-A"]
        selector = _LABEL if run is None else f"{_LABEL}={run}"
        listed = json.loads(kubectl("get", "rayjobs.ray.io", *where, "-l", selector, "-o", "json"))
        found = [attempt for job in listed["items"] if (attempt := _attempt(job)) is not None]
        return sorted(found, key=lambda a: a.number if run else a.started_s or 0)

    def request(self, run: Run, attempt: int | str) -> str:
        """The manifest, as JSON, which `kubectl apply -f -` takes too."""
        return json.dumps(manifest(run, attempt), indent=2)

    def nodes(self, run: Run) -> Nodes:
        """The pods of the workers."""
        return run.nodes()

    def start(self, run: Run, attempt: int) -> None:
        """`kubectl create`: a second submitter of the same attempt is refused."""
        self._namespace = run.kuberay.namespace
        kubectl("create", "-f", "-", text=json.dumps(manifest(run, attempt)))

    def logs(self, attempt: Attempt) -> str:
        """What Ray's job server in the head's pod has; gone with the cluster."""
        return kubectl(*self._in_head(attempt), "ray", "job", "logs", "--address", _INSIDE, attempt.id)

    def follow(self, attempt: Attempt, write: Callable[[str], object]) -> Attempt:
        """See `Backend`."""
        while True:
            now = self._now(attempt)
            if now.over:
                return now
            if now.status == "RUNNING":
                break
            time.sleep(5 * POLL_S)
        command = [*self._in_head(attempt), "ray", "job", "logs", "--address", _INSIDE, "-f", attempt.id]
        with subprocess.Popen([_program(), *command], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                write(line)
        return self.wait(attempt, 60)

    def stop(self, attempt: Attempt) -> Attempt:
        """`ray job stop` in the head's pod, which waits for the drain; a RayJob that waits is deleted."""
        if attempt.status == "PENDING":
            kubectl("delete", "rayjob", attempt.id, *self._where(), "--wait=false")
            return Attempt(**{**vars(attempt), "status": "STOPPED", "message": "deleted before it ran"})
        kubectl(*self._in_head(attempt), "ray", "job", "stop", "--address", _INSIDE, attempt.id)
        return self.wait(attempt, 120)

    def _now(self, attempt: Attempt) -> Attempt:
        return next((a for a in self.attempts(attempt.run) if a.number == attempt.number), attempt)

    def _where(self) -> list[str]:
        return ["-n", self._namespace] if self._namespace else []

    def _in_head(self, attempt: Attempt) -> list[str]:
        job = json.loads(kubectl("get", "rayjob", attempt.id, *self._where(), "-o", "json"))
        cluster = job.get("status", {}).get("rayClusterName")
        if not cluster:
            raise ClusterError(f"{attempt.id} has no cluster (yet, or any more): {attempt.message}")
        selector = f"ray.io/cluster={cluster},ray.io/node-type=head"
        pods = json.loads(kubectl("get", "pods", *self._where(), "-l", selector, "-o", "json"))["items"]
        if not pods:
            raise ClusterError(f"the head of {cluster} is gone; its logs are where the cluster ships them")
        return ["exec", pods[0]["metadata"]["name"], *self._where(), "-c", "ray-head", "--"]


_INSIDE = "http://127.0.0.1:8265"


def _attempt(job: dict[str, Any]) -> Attempt | None:
    parsed = parse_id(job["metadata"]["name"])
    if parsed is None:
        return None
    status = job.get("status", {})
    deployment, of_job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    state = _STATES.get(of_job) or _DEPLOYMENT_STATES.get(deployment, "PENDING")
    if of_job == "FAILED" and deployment not in ("Failed", "Complete"):
        state = "PENDING"  # KubeRay tries again on a new cluster
    parts = [deployment, status.get("reason", ""), status.get("message", "")]
    return Attempt(
        run=parsed[0],
        number=parsed[1],
        status=state,
        entrypoint=job["metadata"].get("annotations", {}).get(_ENTRYPOINT, job["spec"].get("entrypoint", "")),
        message=": ".join(filter(None, parts)),
        started_s=_seconds(status.get("startTime")),
        ended_s=_seconds(status.get("endTime")),
    )


def _seconds(text: str | None) -> float | None:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp() if text else None


def _program() -> str:
    program = shutil.which("kubectl")
    if program is None:
        raise ClusterError(
            "kubectl is not installed here; install it, or apply what --dry-run prints elsewhere"
        )
    return program


def kubectl(*arguments: str, text: str | None = None) -> str:
    """What kubectl prints; ClusterError where it fails."""
    done = subprocess.run([_program(), *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise ClusterError(f"kubectl {arguments[0]}: {lines[-1]}")
    return done.stdout
