"""Runs on a real Ray cluster whose parts die: harvests to S3, two at once, and a whole sweep."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import s3fs
from ray_cluster import RayCluster, RayletCluster, pids_naming

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
HARVEST = ["actcache", "harvest", "--root", "{root}", "--max-tokens", "600000", "--context-size", "32"]
HARVEST += [
    "--block-rows",
    "4096",
    "--engine",
    "ray",
    "--lm-batch",
    "1",
]  # slow enough to be stopped in the middle


@pytest.fixture
def cluster():
    with RayCluster() as cluster:
        yield cluster


def cli(environment, *arguments, timeout_s=400):
    command = [sys.executable, "-m", "cluster", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def write_run(directory, name, root, *command, **fields):
    lines = {"name": name, "root": root, "command": list(command), "python": sys.executable} | fields
    path = directory / f"{name}.toml"
    tables = {key: value for key, value in lines.items() if isinstance(value, dict)}
    text = [f"{key} = {json.dumps(value)}\n" for key, value in lines.items() if key not in tables]
    for name, table in tables.items():
        text += [f"[{name}]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in table.items())]
    path.write_text("".join(text))
    return path


SECRET = "correct-horse-battery-staple"  # ministack takes any


def on_s3(cluster, s3, directory):
    """(environment of a submitter, fields of a run) whose commands find the S3 server; the key's secret is in a file."""
    (directory / "secret").write_text(SECRET + "\n")
    (directory / "key").write_text("me\n")
    names = {"AWS_ENDPOINT_URL": s3["endpoint_url"], "AWS_DEFAULT_REGION": "us-east-1"}
    files = {"AWS_ACCESS_KEY_ID": str(directory / "key"), "AWS_SECRET_ACCESS_KEY": str(directory / "secret")}
    environment = cluster.environment | names | {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": SECRET}
    return environment, {"env": list(names), "env_files": files}


def status(environment, path):
    done = cli(environment, "status", path, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stored_blocks(fs, root):
    """Blocks whose records are there: asking the store takes less of a harvest's time than `status`."""
    return len(fs.glob(f"{root}/*/_records/*/*.json"))


def wait_for_blocks(s3, root, n, timeout_s=240):
    """Until `n` more blocks are stored."""
    fs = s3fs.S3FileSystem(**s3, use_listings_cache=False, skip_instance_cache=True)
    before = stored_blocks(fs, root)
    deadline = time.monotonic() + timeout_s
    while stored_blocks(fs, root) < before + n:
        assert time.monotonic() < deadline, f"{before} blocks, and no {n} more"
        time.sleep(0.1)


def kill_driver(root):
    """SIGKILL to the processes of the command that writes there."""
    pids = [pid for pid in pids_naming(root) if b"actcache" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def verified(environment, url):
    command = [sys.executable, "-m", "actcache", "verify", url, "--deep", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda: RayCluster(token=TOKEN), id="ray start, with a token"),
        pytest.param(RayletCluster, id="cluster_utils.Cluster"),
    ],
)
def test_a_harvest_to_s3_is_followed_stopped_killed_and_resumed_while_nodes_come_and_go(kind, s3, tmp_path):
    """Its nodes read the bucket's credentials from files."""
    with kind() as cluster:
        environment, fields = on_s3(cluster, s3, tmp_path)
        command = [*HARVEST, "--tokens", "480000", "--workers", "3"]
        root = f"s3://bucket/{tmp_path.name}"
        path = write_run(tmp_path, "s3run", root, *command, **fields)
        lost = cluster.add_node()
        follower = subprocess.Popen(
            [sys.executable, "-m", "cluster", "submit", str(path), "--follow"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        wait_for_blocks(s3, root, 3)
        [step] = status(environment, path)["steps"]
        assert step["running"]
        assert step["state"] == "partial"
        assert step["blocks_done"] + step["blocks_missing"] == step["blocks_wanted"]
        cluster.kill(lost)
        added = cluster.add_node()

        stopped = cli(environment, "stop", path)
        assert (stopped.returncode, stopped.stdout) == (0, "s3run-1 is STOPPED\n")
        followed, why = follower.communicate(timeout=60)
        assert followed.startswith("submitted s3run-1; follow it with: python -m cluster logs -f s3run\n")
        assert "stopped by SIGTERM" in followed
        assert (follower.returncode, why.startswith("error: s3run-1 STOPPED")) == (1, True), why
        [drained] = status(environment, path)["steps"]
        assert not drained["running"]
        assert 0 < drained["blocks_done"] < drained["blocks_wanted"]

        assert cli(environment, "submit", path).stdout.startswith("submitted s3run-2")
        wait_for_blocks(s3, root, 1)
        kill_driver(root)
        deadline = time.monotonic() + 60
        while status(environment, path)["status"] != "FAILED":
            assert time.monotonic() < deadline
            time.sleep(0.5)

        assert cli(environment, "submit", path).stdout.startswith("submitted s3run-3")
        wait_for_blocks(s3, root, 1)
        cluster.remove(added)
        done = cli(environment, "logs", "-f", path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        assert done.stdout.endswith("s3run-3 SUCCEEDED\n")
        found = status(environment, path)
        assert (found["status"], found["steps"][0]["state"]) == ("SUCCEEDED", "done")
        assert verified(environment, found["steps"][0]["url"])["problems"] == []
        assert cli(environment, "submit", path).stdout.startswith("s3run-3 has succeeded already")
        kept = [file for file in Path(cluster.directory).rglob("*") if file.is_file() and holds(file, SECRET)]
        assert kept == []
        assert SECRET not in followed + done.stdout + json.dumps(found)


def holds(file, text):
    try:
        return text.encode() in file.read_bytes()
    except OSError:  # a socket, or gone
        return False


def test_a_dead_head_leaves_what_was_stored_and_a_new_one_finishes_the_run(cluster, s3, tmp_path):
    environment, fields = on_s3(cluster, s3, tmp_path)
    command = [*HARVEST, "--tokens", "200000", "--workers", "2"]
    path = write_run(tmp_path, "headless", "s3://bucket/headless", *command, **fields)
    assert cli(environment, "submit", path).returncode == 0
    wait_for_blocks(s3, "s3://bucket/headless", 3)
    cluster.kill("head")
    found = status(environment, path)
    assert found["status"] == "UNKNOWN"
    assert "no job server is reached at http" in found["message"]
    assert found["steps"][0]["blocks_done"] >= 3
    assert found["steps"][0]["state"] == "partial"
    cluster.start_head()
    done = cli(environment, "submit", path, "--follow")
    assert done.stdout.endswith("headless-1 SUCCEEDED\n"), done.stdout[-3000:] + done.stderr
    [step] = status(environment, path)["steps"]
    assert step["state"] == "done"
    assert verified(environment, step["url"])["problems"] == []


def test_two_runs_at_once_both_go_forward(cluster, tmp_path):
    """Each has half of the CPUs; while both work, the slower stores at least a third of what the faster does."""
    names = ("left", "right")
    paths = [
        write_run(
            tmp_path,
            name,
            str(tmp_path / name),
            *HARVEST,
            *("--tokens", "300000", "--workers", "2", "--seed", str(seed)),
        )
        for seed, name in enumerate(names)
    ]
    for path in paths:
        assert cli(cluster.environment, "submit", path).returncode == 0
    both_work = wait_for_records(tmp_path, names, min, 1)
    one_is_far = wait_for_records(tmp_path, names, max, 60)
    gains = [after - before for before, after in zip(both_work, one_is_far, strict=True)]
    assert 3 * min(gains) >= max(gains), gains
    for path in paths:
        assert cli(cluster.environment, "logs", "-f", path).returncode == 0


def wait_for_records(directory, names, which, n, timeout_s=300):
    """Blocks stored by each run, once the least or the most of them (`which`) is `n`."""
    fs = fsspec.filesystem("file")
    deadline = time.monotonic() + timeout_s
    while True:
        found = [stored_blocks(fs, directory / name) for name in names]
        if which(found) >= n:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_preflight_tries_every_node_and_names_the_one_that_is_unlike_the_others(cluster, tmp_path):
    """One node has another version of ours, and a clock five minutes ahead."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(  # a dist-info comes after the one where a worker starts
        "import importlib.metadata, time\n"
        "time.time = lambda real=time.time: real() + 300\n"
        "real = importlib.metadata.version\n"
        "importlib.metadata.version = lambda name: '9.9.9' if name == 'actcache' else real(name)\n"
    )
    path = write_run(tmp_path, "look", str(tmp_path / "acts"), *HARVEST)
    cluster.add_node()
    assert set(preflight_of(cluster, path, 2).values()) == {True}
    cluster.add_node(PYTHONPATH=f"{other}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    checks = preflight_of(cluster, path, 3)
    assert {(where.split()[1], check) for (where, check), ok in checks.items() if not ok} == {
        ("127.0.0.3", "same versions"),
        ("127.0.0.3", "list and clock"),
    }
    path.write_text(path.read_text() + "[workers]\ngpus = 1\n")
    failed = cli(cluster.environment, "preflight", path)
    assert failed.returncode == 1
    assert "FAIL cluster: GPUs: 0 of 1 wanted\n     fix: start more GPU nodes" in failed.stdout
    assert "same versions: actcache 9.9.9; 2 of 3 nodes have actcache " in failed.stdout
    assert "this machine's clock and the store's are 300 s apart\n     fix: let NTP set" in failed.stdout


def test_a_node_that_dies_during_preflight_is_named_and_the_others_are_still_checked(cluster, tmp_path):
    slow, begun = tmp_path / "slow", tmp_path / "begun"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "if sys.orig_argv[1:4] == ['-m', 'actcache', 'check']:\n"
        f"    pathlib.Path({str(begun)!r}).touch(); time.sleep(600)\n"
    )
    path = write_run(tmp_path, "look", str(tmp_path / "acts"), *HARVEST)
    dying = cluster.add_node(PYTHONPATH=f"{slow}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    cluster.wait_for_nodes(2)
    asked = subprocess.Popen(
        [sys.executable, "-m", "cluster", "preflight", str(path), "--json"],
        cwd=ROOT,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not begun.exists():
        assert time.monotonic() < deadline
        assert asked.poll() is None, asked.communicate()
        time.sleep(0.2)
    cluster.kill(dying)
    out, err = asked.communicate(timeout=120)
    checks = [json.loads(line) for line in out.splitlines()]
    [dead] = [check for check in checks if not check["ok"]]
    assert (dead["where"].split()[1], dead["check"]) == ("127.0.0.2", "reached")
    assert dead["fix"].startswith("look at that node in `ray list nodes`")
    others = {c["check"] for c in checks if c["where"].startswith("node") and c["where"] != dead["where"]}
    assert others >= {"put", "delete", "GPUs"}
    assert (asked.returncode, err) == (1, f"error: 1 of {len(checks)} checks failed: reached\n")


def preflight_of(cluster, path, n_nodes, timeout_s=120):
    """Whether all is well, by (where, check), once that many nodes are there."""
    deadline = time.monotonic() + timeout_s
    while True:
        done = cli(cluster.environment, "preflight", path, "--json")
        checks = {(c["where"], c["check"]): c["ok"] for c in map(json.loads, done.stdout.splitlines())}
        nodes = {where for where, _ in checks if where.startswith("node ")}
        if len(nodes) == n_nodes:
            break
        assert time.monotonic() < deadline, done.stdout + done.stderr
    every = ("put", "conditional put", "ranged get", "list and clock", "delete", "GPUs", "versions")
    assert {(node, check) for node in nodes for check in every} <= checks.keys()
    assert done.returncode == (0 if all(checks.values()) else 1)
    return checks


def test_a_cluster_with_tokens_gets_ours_and_who_has_none_is_told(tmp_path):
    with RayCluster(token=TOKEN) as cluster:
        stranger = cluster.environment | {"HOME": str(tmp_path)}
        for more in ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": TOKEN[::-1]}):
            refused = cli(stranger | more, "list")
            assert refused.returncode == 1, more
            assert refused.stderr.startswith("error: the cluster wants its token; set RAY_AUTH_TOKEN"), more
        (tmp_path / "token").write_text(TOKEN + "\n")
        for number, how in enumerate(
            ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, {"RAY_AUTH_TOKEN": TOKEN}), 1
        ):
            path = write_run(
                tmp_path, "known", str(tmp_path), "python", "-c", f"import ray; ray.init(); print({number})"
            )
            done = cli(stranger | how, "submit", path, "--follow")
            assert done.stdout.endswith(f"\n{number}\nknown-{number} SUCCEEDED\n"), done.stdout + done.stderr
            assert TOKEN not in done.stdout + done.stderr


SWEEP = """
name = "sweep"
root = "ROOT"
python = "PYTHON"
[[steps]]
name = "harvest"
num_cpus = 0
command = ["actcache", "harvest", "--root", "{root}", "--tokens", "40000", "--max-tokens", "80000", "--context-size", "32",
    "--block-rows", "4096", "--engine", "ray", "--workers", "2"]
[[steps]]
name = "train-topk"
needs = ["harvest"]
command = ["python", "-m", "sae", "train", "--data", "{data:harvest}", "--arch", "topk", "--k", "4", "--k", "8", "--d-sae", "96",
    "--d-sae", "192", "--batch-size", "256", "--checkpoint-every-rows", "4096", "--out", "{root}/topk"]
[[steps]]
name = "train-batchtopk"
needs = ["harvest"]
command = ["python", "-m", "sae", "train", "--data", "{data:harvest}", "--arch", "batchtopk", "--k", "4", "--k", "8", "--d-sae",
    "96", "--d-sae", "192", "--batch-size", "256", "--checkpoint-every-rows", "4096", "--out", "{root}/batchtopk"]
[[steps]]
name = "eval"
needs = ["train-topk", "train-batchtopk"]
command = ["python", "-m", "sae", "eval", "{root}/topk", "{root}/batchtopk", "--sequences", "16", "--split", "test"]
[[steps]]
name = "report-topk"
needs = ["eval"]
command = ["python", "-m", "sae", "report", "{root}/topk"]
[[steps]]
name = "report-batchtopk"
needs = ["eval"]
command = ["python", "-m", "sae", "report", "{root}/batchtopk"]
"""


def weights(root):
    """Digests of the trained weights by SAE, and the loss of each in the LM."""
    found = {}
    for path in sorted(Path(root).glob("*topk/*/")):
        if (path / "eval.json").exists():
            data = b"".join(f.read_bytes() for f in sorted(path.glob("*.safetensors")))
            found[f"{path.parent.name}/{path.name}"] = (
                hashlib.sha256(data).hexdigest(),
                json.loads((path / "eval.json").read_text())["ce_recovered_zero"],
            )
    return found


def test_a_sweep_killed_at_three_random_places_ends_in_the_undisturbed_result(cluster, tmp_path):
    environment = cluster.environment
    path = tmp_path / "sweep.toml"

    def write(name):
        text = SWEEP.replace("ROOT", str(tmp_path / name)).replace("PYTHON", sys.executable)
        path.write_text(text.replace('"sweep"', f'"{name}"'))

    write("undisturbed")
    begun = time.monotonic()
    done = cli(environment, "submit", path, "--follow")
    whole_s = time.monotonic() - begun
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    expected = weights(tmp_path / "undisturbed")
    assert len(expected) == 8

    write("killed")
    chance = random.Random(8)
    for number, share in enumerate(sorted(chance.uniform(0.1, 0.6) for _ in range(3)), 1):
        assert cli(environment, "submit", path).stdout.startswith(f"submitted killed-{number};")
        time.sleep(share * whole_s)
        for pid in pids_naming(str(tmp_path / "killed")):  # the runner and its steps, none in order
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        found = status(environment, path)
        assert found["status"] in ("RUNNING", "FAILED")
        deadline = time.monotonic() + 60
        while status(environment, path)["status"] != "FAILED":
            assert time.monotonic() < deadline
    done = cli(environment, "submit", path, "--follow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert done.stdout.endswith("killed-4 SUCCEEDED\n")
    assert weights(tmp_path / "killed") == expected
    for run in ("topk", "batchtopk"):
        assert re.search("<html", (tmp_path / "killed" / run / "report.html").read_text())
    assert [step["state"] for step in status(environment, path)["steps"]] == ["done"] * 6
