"""Whether a run can work where it would run: versions, bucket, GPUs, model, clocks; each failure has a fix.

What a machine must be able to do is tried there by `python -m actcache check`: on this machine, and with Ray on
every node, by a job with the run's environment and code. Run as a module, this file is that job.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from . import env_files
from .attempts import ClusterError, backend
from .config import ConfigError, Run
from .ray_jobs import RayJobs
from .steps import is_harvest
from .training import Nodes

Check = dict[str, Any]
_MARK = "PREFLIGHT "
_NODES_S = 300  # for all nodes together, which work side by side
_RAY_TRAIN = ("ray", "torch", "pandas", "pydantic", "tensorboardX")
"""What ranks import."""


def preflight(run: Run, where: str) -> Iterator[Check]:
    """Checks as {"where", "check", "ok", "found", "fix"}, as they are made.

    Raises:
        ConfigError: the run cannot be checked as written.
    """
    check_command(run)
    if where == "ray":
        yield from _of_ray(run)
        return
    if where == "kuberay":
        yield from _of_kuberay(run)
    elif where == "slurm":
        for name in ("sbatch", "squeue", "scancel", "scontrol"):
            yield _program("login node", name, "submit from a login node of the Slurm cluster")
    yield from _here(run, gpus=run.workers.gpus if where == "local" else 0)
    if run.trainings():
        yield from _ranks(run, backend(where).nodes(run), shared=where == "local")
        if where != "kuberay":  # its image is not looked into
            python = sys.executable if run.python == "python" else run.python
            yield ray_train("this machine" if where == "local" else "login node", python)


def _one(where: str, name: str, ok: bool, found: str, fix: str = "") -> Check:
    return {
        "where": where,
        "check": name,
        "ok": ok,
        "found": " ".join(found.split()),
        "fix": "" if ok else fix,
    }


def _program(where: str, name: str, fix: str) -> Check:
    path = shutil.which(name)
    return _one(where, name, path is not None, path or "not installed", fix)


def check_command(run: Run) -> list[str]:
    """`actcache check` with root, model and storage options of the run's first harvest; without --gpus."""
    root, options = run.root, []
    for step in run.all_steps:
        words = run.program(step.command)
        if not is_harvest(words):
            continue
        said = {}
        for first, second in pairwise(words):
            if first in ("--root", "--model", "--model-revision"):
                said[first] = second
            if first == "--storage-option":
                options += [first, second]
        root = said.pop("--root", root)
        options += [word for pair in said.items() for word in pair]
        break
    if root is None:
        raise ConfigError("root is missing, so there is no place to check; put root in RUN.toml")
    return [run.python, "-m", "actcache", "check", root, *options, "--json"]


def _ranks(run: Run, nodes: Nodes, shared: bool = False) -> Iterator[Check]:
    """Whether there is room for the ranks of each training; `shared`: they may share CPUs."""
    for name, ranks in run.trainings().items():
        roomy = [(max(cpus, ranks.most * ranks.cpus), gpus) for cpus, gpus in nodes] if shared else nodes
        fix = "start more nodes, wait for the autoscaler, or lower workers, cpus or gpus in [train]"
        ok, enough = ranks.room(roomy) >= ranks.least, ranks.room(nodes) >= ranks.least
        found = ranks.beside(nodes) + ("; on one machine they may share CPUs" if ok and not enough else "")
        yield _one("cluster", f"ranks of {name}", ok, found, fix)


def ray_train(where: str, python: str) -> Check:
    """Whether that interpreter of this machine has what ranks import."""
    code = (
        f"from importlib.util import find_spec\nprint(*(n for n in {_RAY_TRAIN!r} if find_spec(n) is None))"
    )
    fix = f"pip install 'ray[train]' torch for {python}, with the Ray of the cluster, or use an image that has them"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as err:
        return _one(where, "ray[train]", False, f"{python}: {err.strerror}", fix)
    if done.returncode:
        found = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return _one(where, "ray[train]", False, found, fix)
    lacking = done.stdout.split()
    found = f"lacks {', '.join(lacking)}" if lacking else "has all that ranks import"
    return _one(where, "ray[train]", not lacking, found, fix)


def _here(run: Run, gpus: int) -> Iterator[Check]:
    local = replace(run, python=sys.executable)
    yield from _checked("this machine", [*check_command(local), "--gpus", str(gpus)])


def _checked(where: str, command: Sequence[str]) -> Iterator[Check]:
    done = subprocess.run(list(command), capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for line in lines:
        yield {"where": where, **line}
    if not lines:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        fix = "use an image or environment that has this actcache: python in RUN.toml says which interpreter"
        yield _one(where, "actcache", False, said[-1], fix)


def _of_ray(run: Run) -> Iterator[Check]:
    jobs = RayJobs()
    try:
        theirs = jobs.versions()
    except ClusterError as err:
        yield _one("job server", "reached", False, err.found, err.fix)
        return
    import ray

    yield _one("job server", "reached", True, jobs.client.get_address())
    fix = f"pip install 'ray[default]=={theirs}' here, or use an image with Ray {ray.__version__}"
    yield _one(
        "job server", "Ray version", theirs == ray.__version__, f"{theirs}, here {ray.__version__}", fix
    )
    told = {"command": check_command(run), "workers": run.workers.count, "gpus": run.workers.gpus}
    told["env_files"] = dict(run.env_files)  # read on each node, to name those that lack a file
    told["ranks"] = bool(run.trainings())
    command = ("python", "-m", "cluster.preflight", json.dumps(told | {"python": platform.python_version()}))
    job = replace(run, name=f"{run.name[:29]}-preflight", command=command, steps=(), train=None)
    job = replace(job, num_cpus=0, num_gpus=0, env_files={})
    yield from _job(jobs, job)
    if run.trainings():
        try:
            yield from _ranks(run, jobs.nodes(run))
        except ClusterError as err:
            yield _one("cluster", "ranks", False, err.found, err.fix or "look at dashboard.log of the head")


def _job(jobs: RayJobs, job: Run) -> Iterator[Check]:
    """What the job on the cluster has found."""
    said: list[str] = []
    status, fix = "", ""
    try:
        before = jobs.attempts(job.name)
        jobs.start(job, before[-1].number + 1 if before else 1)
        ended = jobs.follow(jobs.newest(job.name), said.append)
        status, found = ended.status, f"{ended.id} {ended.status}: {ended.message}"
        fix = "python in RUN.toml must be the interpreter there that has ray, actcache and cluster (or give working_dir)"
    except ClusterError as err:
        found, fix = err.found, err.fix or "look at dashboard.log of the head, and try again"
    lines = [line for line in "".join(said).splitlines() if line.strip()]
    checks = [json.loads(line.removeprefix(_MARK)) for line in lines if line.startswith(_MARK)]
    yield from checks
    if status != "SUCCEEDED" or not checks:
        if status and lines and not lines[-1].startswith(_MARK):
            found = f"{ended.id} {status}: {lines[-1]}"
        yield _one("job server", "job", False, found, fix)


def _of_kuberay(run: Run) -> Iterator[Check]:
    from .kuberay import kubectl, manifest

    version = manifest(run, 1)["spec"]["rayClusterSpec"]["rayVersion"]
    yield _program("this machine", "kubectl", "install kubectl")
    if shutil.which("kubectl") is None:
        return
    where = ["-n", run.kuberay.namespace]
    questions = [
        (
            "KubeRay",
            ["get", "crd", "rayjobs.ray.io", "-o", "name"],
            "install the operator: deploy/kuberay, first step",
        ),
        (
            "may create RayJobs",
            ["auth", "can-i", "create", "rayjobs.ray.io", *where],
            "ask for a role with that verb",
        ),
    ]
    if run.kuberay.service_account:
        name = run.kuberay.service_account
        questions.append(
            ("service account", ["get", "serviceaccount", name, *where, "-o", "name"], f"create {name}")
        )
    for name, question, fix in questions:
        try:
            yield _one("Kubernetes", name, True, kubectl(*question))
        except ClusterError as err:
            yield _one("Kubernetes", name, False, str(err), fix)
    if run.env and run.kuberay.secret:
        fix = f"kubectl create secret generic {run.kuberay.secret} --from-literal=..., with the keys {', '.join(run.env)}"
        try:  # names of the keys only
            template = "go-template={{range $name, $_ := .data}}{{$name}} {{end}}"
            keys = kubectl("get", "secret", run.kuberay.secret, *where, "-o", template).split()
            lacking = [name for name in run.env if name not in keys]
            yield _one(
                "Kubernetes",
                "secret",
                not lacking,
                f"lacks {', '.join(lacking)}" if lacking else "has all keys",
                fix,
            )
        except ClusterError as err:
            yield _one("Kubernetes", "secret", False, str(err), fix)
    needed = " and ray[train]" if run.trainings() else ""
    said = f"{run.image} must have Ray {version}, as this machine{needed}; not looked into"
    yield _one("image", "Ray version", True, said)


def _nodes(told: dict[str, Any]) -> Iterator[Check]:
    """On the cluster: `actcache check` on every node, and whether there are enough GPUs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]

    def look(command: Sequence[str]) -> list[Check]:
        os.environ.update(env_files.variable(told["env_files"]))
        env_files.load()
        fix = "put the file there (a secret that the nodes mount), or correct env_files in RUN.toml"
        missing = [_one("", "env_files", False, found, fix) for found in env_files.troubles()]
        ranks = [ray_train("", command[0])] if told["ranks"] else []
        return [*_checked("", command), *ranks, *missing]

    asked = {}
    for node in nodes:
        gpus = told["gpus"] if node["Resources"].get("GPU") else 0
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(look).options(scheduling_strategy=strategy)
        asked[node["NodeManagerAddress"], node["NodeID"][:6]] = task.remote(
            [*told["command"], "--gpus", str(gpus)]
        )
    versions: dict[str, str] = {}
    deadline = time.monotonic() + _NODES_S
    for (address, node_id), answer in asked.items():
        where = f"node {address} {node_id}"
        try:
            checks = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except Exception as err:  # whatever keeps a task from running there
            fix = "look at that node in `ray list nodes` and at its raylet's log"
            yield _one(where, "reached", False, str(err).splitlines()[0], fix)
            continue
        for check in checks:
            if check["check"] == "versions":
                versions[where] = check["found"]
            yield {**check, "where": where}
    yield from _unlike(versions)
    found = sum(node["Resources"].get("GPU", 0) for node in nodes)
    wanted = told["workers"] * told["gpus"]
    fix = "start more GPU nodes, wait for the autoscaler, or lower count or gpus in [workers]"
    yield _one("cluster", "GPUs", found >= wanted, f"{found:g} of {wanted} wanted", fix)
    theirs = platform.python_version()
    same = theirs.split(".")[:2] == told["python"].split(".")[:2]
    fix = f"use Python {theirs} here, or an image with Python {told['python']}"
    yield _one("cluster", "Python version", same, f"{theirs}, here {told['python']}", fix)


def _unlike(versions: dict[str, str]) -> Iterator[Check]:
    """A failure for each node whose versions are not those of most nodes."""
    if not versions:
        return
    usual, n = Counter(versions.values()).most_common(1)[0]
    if n == len(versions):
        yield _one("cluster", "same versions", True, "on 1 node" if n == 1 else f"on {n} nodes")
    for where, found in versions.items():
        if found != usual:
            own = ", ".join(sorted(set(found.split(", ")) - set(usual.split(", "))))
            theirs = ", ".join(sorted(set(usual.split(", ")) - set(found.split(", "))))
            fix = f"start that node from the image or environment of the others: {theirs}"
            yield _one(
                where, "same versions", False, f"{own}; {n} of {len(versions)} nodes have {theirs}", fix
            )


if __name__ == "__main__":
    import ray

    ray.init(log_to_driver=False)
    for one in _nodes(json.loads(sys.argv[1])):
        print(_MARK + json.dumps(one), flush=True)
