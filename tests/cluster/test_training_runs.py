"""Distributed trainings submitted to a real Ray cluster of two nodes: the run to copy, stopped and resumed ones."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_cluster import RayCluster

sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))

from tiny_harvest import SITES, tiny_spec

import actcache
import sae

pytest.importorskip("pandas", reason="Ray Train needs ray[train]")
pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """Environment of a submitter to a cluster whose two nodes have two CPUs each."""
    with RayCluster(head_cpus=2) as cluster:
        cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes(2)
        yield cluster.environment | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


def cli(environment, *arguments, timeout_s=900):
    command = [sys.executable, "-m", "cluster", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def status(environment, path):
    done = cli(environment, "status", path, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_until_it_trains(environment, path, file, timeout_s=300):
    """Until metrics are stored; fails as soon as the run has ended without."""
    deadline = time.monotonic() + timeout_s
    while not (file.exists() and file.stat().st_size):
        attempt = json.loads(cli(environment, "list", "--json").stdout.splitlines()[-1])
        assert attempt["status"] in ("PENDING", "RUNNING"), cli(environment, "logs", path).stdout[-3000:]
        assert time.monotonic() < deadline, cli(environment, "logs", path).stdout[-3000:]


SMALLER = {
    "262144": "32768",
    "600000": "240000",
    "1536": "96",
    '"2048"': '"256"',
    'python = "python"': f'python = "{sys.executable}"',
}
"""Smaller sizes for deploy/ray/train.toml, so that it takes a minute."""


def test_the_run_to_copy_harvests_trains_on_two_ranks_evaluates_and_reports(cluster, tmp_path):
    text = (ROOT / "deploy/ray/train.toml").read_text()
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "train.toml"
    path.write_text(text)

    checks = [json.loads(line) for line in cli(cluster, "preflight", path, "--json").stdout.splitlines()]
    assert [c for c in checks if not c["ok"]] == []
    [room] = [c["found"] for c in checks if c["check"] == "ranks of train"]
    assert room == "2 ranks of 1 CPU, 2 CPUs in all; room for 2 on 2 nodes with 4 CPUs together"
    assert len([c for c in checks if c["check"] == "ray[train]"]) == 2
    planned = cli(cluster, "submit", path, "--dry-run").stdout
    assert f"\nranks of train: {room}\n" in planned
    assert re.search(r"^.*python -m sae train .* --workers 2 ", planned, re.M)
    assert not (tmp_path / "data/runs").exists()

    done = cli(cluster, "submit", path, "--follow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert done.stdout.endswith("stdlib-saes-1 SUCCEEDED\n")
    assert "[train] training 4 SAEs on 2:" in done.stdout
    assert [step["state"] for step in status(cluster, path)["steps"]] == ["done"] * 4
    run = tmp_path / "data/runs/first"
    assert "<html" in (run / "report.html").read_text()
    assert len(list(run.glob("*/eval.json"))) == 4
    [line] = {(run / f"{name}/metrics.jsonl").read_text().splitlines()[-1] for name in ("topk-96-16",)}
    assert (json.loads(line)["world_size"], json.loads(line)["spread"]) == (2, "saes")

    path.write_text(text.replace("workers = 2 ", "workers = 3 "))  # of [train]
    again = cli(cluster, "submit", path, "--follow")
    assert again.stdout.endswith("stdlib-saes-2 SUCCEEDED\n"), again.stdout[-3000:] + again.stderr
    for step in ("train", "eval", "report"):
        assert f"{step}: done before\n" in again.stdout


LONG = """name = "long"
python = "PYTHON"
drain_s = 120
root = "ROOT"
[train]
workers = WORKERS
[[steps]]
name = "train"
command = ["python", "-m", "sae", "train", "--data", "DATA", "--site", "SITE", "--sae", "topk:d_sae=64,k=4",
    "--sae", "batchtopk:d_sae=48,k=4", "--batch-size", "128", "--epochs", "120", "--rows", "240000", "--lr", "2e-3",
    "--checkpoint-every-rows", "40000", "--out", "{root}/run"]
"""


def metrics(run, name="topk-64-4"):
    return [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_training_is_saved_and_goes_on_with_other_ranks_to_the_result_of_one_process(
    cluster, tmp_path
):
    """Whole SAEs are dealt, so the result is that of one process to the bit."""
    ds = actcache.harvest(tiny_spec(tmp_path), root=str(tmp_path / "acts"), engine="local", progress=False)
    path, run = tmp_path / "run.toml", tmp_path / "run"

    def write(workers):
        text = LONG.replace("PYTHON", sys.executable).replace("ROOT", str(tmp_path)).replace("SITE", SITES[0])
        path.write_text(text.replace("DATA", ds.url).replace("WORKERS", workers))

    write("2")
    submitted = cli(cluster, "submit", path)
    assert submitted.stdout.startswith("submitted long-1"), submitted.stderr
    file = run / "topk-64-4/metrics.jsonl"
    wait_until_it_trains(cluster, path, file)
    stopped = cli(cluster, "stop", path)
    assert (stopped.returncode, stopped.stdout) == (0, "long-1 is STOPPED\n"), stopped.stderr
    said = cli(cluster, "logs", path).stdout
    saved = re.search(r"stopped after ([\d,]+) rows, saved in", said)
    assert saved, said[-3000:]
    saved = int(saved[1].replace(",", ""))
    assert 0 < saved < 240_000
    [step] = status(cluster, path)["steps"]
    assert (step["state"], step["world_size"], step["spread"]) == ("partial", 2, "saes")
    assert len(step["stall_by_rank"]) == 2
    assert 0 < step["rows_done"] <= saved
    shown = cli(cluster, "status", path).stdout
    assert re.search(r"^train  partial +\d+% of 240,000 rows$", shown, re.M), shown
    assert re.search(r"^ +2 ranks by saes, stall at most [\d.]+% \(rank [01]\)$", shown, re.M), shown

    write("1")
    done = cli(cluster, "submit", path, "--follow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert f"continuing after {saved:,} rows" in done.stdout
    [step] = status(cluster, path)["steps"]
    assert (step["state"], step["rows_done"]) == ("done", 240_000)
    rows = [line["rows"] for line in metrics(run)]
    assert rows == sorted(set(rows))

    stream = ds.stream(SITES[0], batch_size=128, epochs=120, metadata=False)
    configs = [sae.TopK(d_sae=64, k=4), sae.BatchTopK(d_sae=48, k=4)]
    training = sae.Training(n_rows=240_000, lr=2e-3, checkpoint_every_rows=40_000)
    alone = sae.train(stream, configs, training, out=tmp_path / "alone")
    for one in alone:
        name = f"{one.cfg['architecture']}-{one.cfg['d_sae']}-4"
        ours = sae.load(run / name).state_dict()
        assert all(bool((tensor == ours[key]).all()) for key, tensor in one.state_dict().items()), name
        told, wanted = metrics(run, name), metrics(tmp_path / "alone", name)
        assert [(m["rows"], m["loss"]) for m in told] == [(m["rows"], m["loss"]) for m in wanted]
